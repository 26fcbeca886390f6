"""gs:// against a server that speaks the part of Google's JSON API that reading needs (moto has none)."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from distft import source
from distft.errors import DataError

# A process of its own: pyarrow holds the interpreter's lock while Google's client waits for an answer.
SERVER = r"""
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

OBJECTS = {"rows/a.jsonl": b"a" * 14, "rows/deep/b.jsonl": bytes(range(256)) * 5000, "rows/readme.md": b"#"}
PLACE = "/storage/v1/b/texts/o"


class Google(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        url = urlsplit(self.path)
        path, query = unquote(url.path), parse_qs(url.query)
        if path == PLACE:
            start = query.get("prefix", [""])[0]
            items = [self.metadata(name) for name in OBJECTS if name.startswith(start)]
            self.answer(200, json.dumps({"kind": "storage#objects", "items": items}).encode())
        elif path.removeprefix(f"{PLACE}/") in OBJECTS and "media" not in query.get("alt", []):
            self.answer(200, json.dumps(self.metadata(path.removeprefix(f"{PLACE}/"))).encode())
        elif (name := path.removeprefix(f"{PLACE}/").removeprefix("/texts/")) in OBJECTS:
            first, _, last = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")
            whole = OBJECTS[name]
            part = whole[int(first) : int(last) + 1 if last else None]
            self.answer(206, part, {"Content-Range": f"bytes {first}-{int(first) + len(part) - 1}/{len(whole)}"})
        else:
            self.answer(404, b'{"error": {"code": 404, "message": "Not Found"}}')

    @staticmethod
    def metadata(name):
        time = "2026-01-01T00:00:00.000Z"
        place = {"kind": "storage#object", "bucket": "texts", "name": name, "size": str(len(OBJECTS[name]))}
        return place | {"generation": "1", "metageneration": "1", "updated": time, "timeCreated": time}

    def answer(self, status, content, headers={}):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), "x-goog-generation": "1", **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


server = ThreadingHTTPServer(("127.0.0.1", 0), Google)
print(server.server_port, flush=True)
server.serve_forever()
"""


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with subprocess.Popen([sys.executable, "-c", SERVER], stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{int(server.stdout.readline())}")
        monkeypatch.setenv("DISTFT_CACHE", str(tmp_path / "cache"))
        yield
        server.kill()


@pytest.mark.usefixtures("bucket")
def test_objects_folders_and_globs() -> None:
    (one,) = source.files("gs://texts/rows/a.jsonl", Path())
    assert one.path.read_bytes() == b"a" * 14
    for address in ("gs://texts/rows", "gs://texts/**/*.jsonl"):
        found = source.files(address, Path())
        assert [file.name for file in found] == ["gs://texts/rows/a.jsonl", "gs://texts/rows/deep/b.jsonl"]
        assert found[0] == one
        assert found[1].path.read_bytes() == bytes(range(256)) * 5000
    with pytest.raises(DataError, match=r"nothing is there\n.*near it: a\.jsonl"):
        source.files("gs://texts/rows/aa.jsonl", Path())

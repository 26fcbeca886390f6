"""hf:// against a server that answers as the hub does: which files are taken, and what is said without it."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from distft import source
from distft.errors import JobError

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {
    "README.md": b"# Speeches",
    "dataset_infos.json": b"{}",
    "data/train-00000-of-00002.jsonl": b'{"text": "a"}\n',
    "data/train-00001-of-00002.jsonl": b'{"text": "b"}\n',
    "data/test.jsonl": b'{"text": "c"}\n',
    "extra/rows.csv": b"text\nd\n",
}


class Hub(BaseHTTPRequestHandler):
    """The part of the hub's HTTP API that one public data set needs."""

    asked: list[str]

    def do_GET(self) -> None:
        type(self).asked.append(self.path)
        path, _, _ = self.path.partition("?")
        info = "/api/datasets/owner/speeches"
        if path.startswith(f"{info}/tree/"):
            self.answer(json.dumps([self.entry(name) for name in FILES]).encode())
        elif path == info or path in {f"{info}/revision/{revision}" for revision in ("main", "v1", COMMIT)}:
            siblings = [{"rfilename": name} for name in FILES]
            self.answer(json.dumps({"id": "owner/speeches", "sha": COMMIT, "siblings": siblings}).encode())
        elif path.startswith("/datasets/owner/speeches/resolve/"):
            name = path.split("/", 6)[6]
            etag = self.entry(name)["oid"]
            self.answer(FILES[name], {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT})
        else:
            code = "RevisionNotFound" if path.startswith(info) else "RepoNotFound"
            self.answer(b"{}", {"X-Error-Code": code, "X-Error-Message": code}, 404)

    do_HEAD = do_GET

    @staticmethod
    def entry(name: str) -> dict[str, object]:
        oid = hashlib.sha1(FILES[name]).hexdigest()
        return {"type": "file", "path": name, "size": len(FILES[name]), "oid": oid}

    def answer(self, content: bytes, headers: dict[str, str] | None = None, status: int = 200) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def hub() -> Iterator[str]:
    Hub.asked = []
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


ASK = """
import json, logging, sys
from pathlib import Path
from distft import source
from distft.errors import DataError
logging.getLogger("distft").setLevel("INFO")
answers = []
for address in sys.argv[1:]:
    try:
        answers.append([[found.name, found.path.read_text()] for found in source.files(address, Path())])
    except DataError as error:
        answers.append(str(error))
print(json.dumps(answers))
"""


def ask(endpoint: str, home: Path, *addresses: str, **more: str) -> list[list[list[str]] | str]:
    """What each address comes to, in a process of its own: huggingface_hub reads its settings when it is imported."""
    settings = {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", **more}
    env = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))} | settings
    done = subprocess.run(
        [sys.executable, "-c", ASK, *addresses], env=env, capture_output=True, text=True, check=True, timeout=120
    )
    return json.loads(done.stdout)  # type: ignore[no-any-return]


def rows(*names: str) -> list[list[str]]:
    return [[f"hf://owner/speeches/{name}", FILES[name].decode()] for name in names]


TRAIN = rows("data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl")


def test_files_of_a_data_set(hub: str, tmp_path: Path) -> None:
    asked = {
        "hf://owner/speeches": TRAIN,
        "hf://datasets/owner/speeches/data": TRAIN,
        "hf://owner/speeches@v1/data/test.jsonl": rows("data/test.jsonl"),
        "hf://owner/speeches/extra": rows("extra/rows.csv"),
        "hf://owner/speeches/**/*.jsonl": rows("data/test.jsonl") + TRAIN,
    }
    assert ask(hub, tmp_path, *asked) == list(asked.values())
    fetched = {path.name for path in tmp_path.rglob("snapshots/**/*") if path.is_file()}
    assert fetched == {name.rsplit("/", 1)[-1] for name in FILES} - {"README.md", "dataset_infos.json"}


def test_what_is_cached_serves_without_a_hub(hub: str, tmp_path: Path) -> None:
    ask(hub, tmp_path, "hf://owner/speeches")
    nowhere = "http://127.0.0.1:9"
    assert ask(nowhere, tmp_path, "hf://owner/speeches") == [TRAIN]
    (said,) = ask(nowhere, tmp_path / "other", "hf://owner/speeches")
    assert "not in the cache, and the hub cannot be reached" in said
    assert "HF_ENDPOINT" in said


def test_what_the_hub_lacks(hub: str, tmp_path: Path) -> None:
    said = ask(
        hub,
        tmp_path,
        "hf://owner/speeches/data/tset.jsonl",
        "hf://owner/speechs",
        "hf://owner/speeches@v9",
        "hf://owner/speeches/*.parquet",
    )
    for answer, part in zip(
        said,
        ("near it: data/test.jsonl", "private, and no HF_TOKEN is here", "no such revision", "looked in"),
        strict=True,
    ):
        assert part in answer
    (answer,) = ask(hub, tmp_path, "hf://owner/speechs", HF_TOKEN="hf_planted")
    assert "private, and the HF_TOKEN here may not read it" in answer
    assert "planted" not in answer
    with pytest.raises(JobError, match="no address of a data set"):
        source.files("hf://owner", tmp_path)

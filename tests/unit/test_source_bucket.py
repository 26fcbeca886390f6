"""s3:// against moto's server: what is listed, what is fetched and when again, and what is said where it cannot be."""

from __future__ import annotations

import logging
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import boto3
import numpy as np
import pytest
from moto.server import ThreadedMotoServer
from safetensors.numpy import save_file

from distft import source
from distft.config import ModelSection
from distft.errors import DataError, JobError
from distft.model.files import materialise

OBJECTS = {
    "rows/a.jsonl": b'{"text": "a"}\n',
    "rows/b.jsonl": b'{"text": "b"}\n',
    "rows/deep/c.jsonl": b'{"text": "c"}\n',
    "rows/.hidden/d.jsonl": b'{"text": "d"}\n',
    "rows/readme.md": b"#",
}


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    running = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    yield f"http://{host}:{port}"
    running.stop()


@pytest.fixture
def put(server: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str, bytes], None]:
    """A bucket ``texts`` on a server without anything else; an empty cache; what writes an object."""
    for name in ("AWS_PROFILE", "AWS_CA_BUNDLE", "AWS_ENDPOINT_URL_S3", "AWS_REGION", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {
        "AWS_ENDPOINT_URL": server,
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "none"),
        "AWS_CONFIG_FILE": str(tmp_path / "none"),
        "DISTFT_CACHE": str(tmp_path / "cache"),
    }.items():
        monkeypatch.setenv(name, value)
    ask(f"{server}/moto-api/reset")
    client = boto3.client("s3", endpoint_url=server, region_name="us-east-1")
    client.create_bucket(Bucket="texts")

    def put_object(key: str, content: bytes) -> None:
        client.put_object(Bucket="texts", Key=key, Body=content)

    for key, content in OBJECTS.items():
        put_object(key, content)
    return put_object


def ask(url: str, content: bytes = b"") -> None:
    with urllib.request.urlopen(urllib.request.Request(url, data=content, headers={"Content-Type": "text/plain"})):
        pass


def names(address: str) -> list[str]:
    found = source.files(address, Path())
    key = {file.name.removeprefix("s3://texts/"): file.path for file in found}
    assert all(path.read_bytes() == OBJECTS[name] for name, path in key.items())
    assert all(path.name == name.rsplit("/", 1)[-1] for name, path in key.items())
    return list(key)


def refused(address: str) -> str:
    with pytest.raises(DataError) as error:
        source.files(address, Path())
    assert address in str(error.value)
    return str(error.value)


@pytest.mark.usefixtures("put")
def test_objects_folders_and_globs() -> None:
    assert names("s3://texts/rows/a.jsonl") == ["rows/a.jsonl"]
    assert names("s3://texts/rows") == names("s3://texts/rows/") == names("s3://texts")
    assert names("s3://texts/rows") == ["rows/a.jsonl", "rows/b.jsonl", "rows/deep/c.jsonl"]
    assert names("s3://texts/rows/*.jsonl") == ["rows/a.jsonl", "rows/b.jsonl"]
    assert names("s3://texts/*/?eep/*") == ["rows/deep/c.jsonl"]
    assert names("s3://texts/rows/readme.md") == ["rows/readme.md"]


def test_an_object_is_fetched_once_and_again_when_it_was_changed(put: Callable[[str, bytes], None]) -> None:
    (first,) = source.files("s3://texts/rows/a.jsonl", Path())
    first.path.write_bytes(b"what is in the cache is taken")
    assert source.files("s3://texts/rows/a.jsonl", Path()) == [first]
    put("rows/a.jsonl", b'{"text": "another"}\n')
    (second,) = source.files("s3://texts/rows/a.jsonl", Path())
    assert second.path != first.path
    assert second.name == first.name
    assert second.path.read_bytes() == b'{"text": "another"}\n'


def test_a_broken_download_goes_on_where_it_stopped(put: Callable[[str, bytes], None]) -> None:
    content = bytes(range(256)) * 100
    put("big.jsonl", content)
    (file,) = source.files("s3://texts/big.jsonl", Path())
    file.path.unlink()
    part = file.path.with_name(".big.jsonl.part")
    part.write_bytes(b"!" + content[1:20_000])  # the mark shows that this part is not fetched again
    assert source.files("s3://texts/big.jsonl", Path()) == [file]
    assert file.path.read_bytes() == b"!" + content[1:]
    assert not part.exists()


def test_many_at_once_get_the_same_whole_files(put: Callable[[str, bytes], None]) -> None:
    for number in range(30):
        put(f"many/{number:02d}.txt", f"text {number}".encode() * 1000)
    results: list[list[bytes]] = []

    def fetch() -> None:
        results.append([file.path.read_bytes() for file in source.files("s3://texts/many", Path())])

    threads = [threading.Thread(target=fetch) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [[f"text {number}".encode() * 1000 for number in range(30)]] * 3


@pytest.mark.usefixtures("put")
def test_what_is_not_there_names_what_is_near(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "near it: a.jsonl, b.jsonl" in refused("s3://texts/rows/aa.jsonl")
    assert "near it: rows" in refused("s3://texts/rowz/*.jsonl")
    assert "near it: texts" in refused("s3://text/rows/a.jsonl")
    assert "near it: texts" in refused("s3://text/**/*.jsonl")
    with pytest.raises(JobError, match="no bucket"):
        source.files("s3://", Path())
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
    assert "the server cannot be reached" in refused("s3://texts/rows/a.jsonl")


@pytest.mark.usefixtures("put")
def test_without_the_right_credentials_it_says_what_to_set(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ask(f"{server}/moto-api/reset-auth", b"0")  # from now on the server looks at them
    try:
        assert "access is refused" in refused("s3://texts/rows/a.jsonl")
        assert "access is refused" in refused("s3://texts/*.jsonl")
    finally:
        ask(f"{server}/moto-api/reset-auth", str(sys.maxsize).encode())


@pytest.mark.usefixtures("put")
def test_without_credentials_requests_are_not_signed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Buckets that are open to all can be read so; of others S3 answers 403 (moto cannot take such a request)."""
    signed = []

    class Refuses(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            signed.append("Authorization" in self.headers)
            self.send_response(403)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with HTTPServer(("127.0.0.1", 0), Refuses) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
        assert "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY" in refused("s3://texts/rows/a.jsonl")
        server.shutdown()
    assert not any(signed)


def test_a_model_folder(put: Callable[[str, bytes], None], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "tokenizer.json").write_text("{}")
    save_file({"weight": np.arange(100.0)}, folder / "model.safetensors")
    for path in folder.iterdir():
        put(f"models/tiny/{path.name}", path.read_bytes())
    put("models/tiny/pytorch_model.bin", b"never fetched")
    put("models/tiny/checkpoint-5/config.json", b"neither")
    fetched = materialise(ModelSection(source="s3://texts/models/tiny"), Path())
    assert {path.name: path.read_bytes() for path in fetched.iterdir() if not path.name.startswith(".")} == {
        path.name: path.read_bytes() for path in folder.iterdir()
    }
    assert materialise(ModelSection(source="s3://texts/models/tiny/"), Path()) == fetched
    with pytest.raises(DataError, match="near it: tiny"):
        materialise(ModelSection(source="s3://texts/models/tinny"), Path())

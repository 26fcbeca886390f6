"""What a run's models say, to a person and at the end of a run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from distft.config import Job
from distft.data.store import Prepared
from distft.errors import JobError
from distft.model import generate as continue_text
from distft.model import load_classifier, load_model, load_tokenizer, pad_id
from distft.orchestrate.data import Data
from distft.orchestrate.writing import generate, sample
from distft.runs import Run, read_json, write_json
from distft.task.prepare import prepare
from distft.train.folder import begin
from tests.distributed import tiny

TEMPLATE = (
    "{% if messages[0].role != 'system' %}[system]Be kind.<|endoftext|>{% endif %}"
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}<|endoftext|>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
ANSWERS = {"kind": "generation", "prompt": "Capital of {country}?\n", "response": "{capital}"}
ROWS = [("France", "Paris"), ("Italy", "Rome"), ("Peru", "Lima"), ("Norway", "Oslo"), ("Egypt", "Cairo")] * 8


pytestmark = pytest.mark.usefixtures("module_cache")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("written")
    tiny.make_model(made / "model")
    shutil.copytree(made / "model", made / "chat")
    tokenizer = load_tokenizer(made / "chat")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(made / "chat")
    with (made / "rows.jsonl").open("w") as file:
        for number, (country, capital) in enumerate(ROWS):
            turns = [("user", f"Hello {number}"), ("assistant", "Hi"), ("user", country), ("assistant", capital)]
            messages = [{"role": role, "content": content} for role, content in (turns if number % 4 else turns[2:])]
            row = {"country": f"{number} {country}", "capital": capital, "messages": messages}
            file.write(json.dumps(row | {"text": f"{number}: {country}", "label": capital[0] in "OPR"}) + "\n")
    return made


def run_of(folder: Path, name: str, task: dict[str, object], model: str = "model") -> tuple[Job, Run, Data]:
    """A run that was exported as if training had changed nothing."""
    data = {"source": "rows.jsonl", "splits": {"validation": 0.3, "test": 0.1}}
    job = tiny.job(folder, task=task, data=data, model={"source": model, "dtype": "fp32"})
    run = Run(folder / "runs" / name)
    begin(job, run)
    write_json(run.resolved, {**read_json(run.resolved), "decisions": {"model.dtype": {"value": "fp32"}}})
    prepared = prepare(job, folder / model)
    if task["kind"] == "classification":
        labels, tokenizer = Prepared.open(prepared).labels, load_tokenizer(folder / model)
        made = load_classifier(folder / model, torch.float32, labels=labels, pad_id=pad_id(tokenizer))
        made.save_pretrained(run.export)
        tokenizer.save_pretrained(run.export)
    else:
        shutil.copytree(folder / model, run.export, dirs_exist_ok=True)
    return job, run, Data(folder / model, prepared)


def continued(folder: Path, text: str) -> str:
    model, tokenizer = load_model(folder, torch.float32), load_tokenizer(folder)
    return "".join(continue_text(model, tokenizer, text, max_new_tokens=8, temperature=0, seed=0))


def test_a_chat_models_prompt_is_a_users_turn(folder: Path) -> None:
    _, run, _ = run_of(folder, "chat", {"kind": "generation", "preset": "chat"}, "chat")
    opened = "[system]Be kind.<|endoftext|>[user]Peru<|endoftext|>[assistant]"
    assert "".join(generate(run, "Peru", max_new_tokens=8)) == continued(folder / "chat", opened) != ""
    assert continued(folder / "chat", opened) != continued(folder / "chat", "Peru")


def test_without_a_template_a_prompt_ends_as_the_jobs_does(folder: Path) -> None:
    _, run, _ = run_of(folder, "plain", ANSWERS)
    expected = continued(folder / "model", "Capital of Peru?\n")
    assert "".join(generate(run, "Capital of Peru", max_new_tokens=8)) == expected
    assert "".join(generate(run, "Capital of Peru?\n", max_new_tokens=8)) == expected


def test_a_language_model_continues_the_prompt(folder: Path) -> None:
    _, run, _ = run_of(folder, "text", {"kind": "language_modeling"}, "chat")
    assert "".join(generate(run, "Peru", max_new_tokens=8)) == continued(folder / "chat", "Peru")


def test_a_classifier_writes_nothing(folder: Path) -> None:
    _, run, _ = run_of(folder, "classes", {"kind": "classification"})
    with pytest.raises(JobError, match="a classifier writes no text") as refused:
        next(generate(run, "Peru"))
    assert "text-classification" in str(refused.value)


def test_the_sample_of_a_chat_is_what_a_person_asked(folder: Path) -> None:
    """A row of several turns is passed over for one that was asked in one turn, whose words are shown."""
    job, run, data = run_of(folder, "chat-sample", {"kind": "generation", "preset": "chat"}, "chat")
    found = sample(job, run, data)
    assert dict(ROWS)[found["prompt"]] == found["reference"]
    assert found["base"] == found["best"] != ""


def test_the_sample_of_answers(folder: Path) -> None:
    found = sample(*run_of(folder, "plain-sample", ANSWERS))
    country = found["prompt"].removeprefix("Capital of ").split()[1]
    assert found["prompt"].startswith("Capital of ")
    assert dict(ROWS)[country.removesuffix("?")] == found["reference"]


def test_the_sample_of_a_classifier(folder: Path) -> None:
    found = sample(*run_of(folder, "class-sample", {"kind": "classification"}))
    country = found["prompt"].partition(": ")[2]
    assert found["reference"] == str(dict(ROWS)[country][0] in "OPR").lower()
    words = found["best"].replace(",", "").split()
    assert set(words[::2]) == {"true", "false"}
    assert float(words[1]) + float(words[3]) == pytest.approx(1, abs=0.011)
    assert float(words[1]) >= float(words[3])


def test_the_sample_of_a_language_model(folder: Path) -> None:
    found = sample(*run_of(folder, "text-sample", {"kind": "language_modeling"}))
    assert found.keys() == {"prompt", "base", "best"}
    assert found["base"] == found["best"]

"""Everything shipped is run: job files load, and the README shows what the command really prints."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from distft.cli import app
from distft.config import Job
from distft.config import check as check_files
from distft.config.addresses import scheme

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("path", sorted((ROOT / "launch").glob("*.yaml")), ids=lambda path: path.name)
def test_each_job_file_is_valid(path: Path) -> None:
    """Rows that are not there yet have a recipe, which the file names."""
    job = Job.load(path)
    made = [address for address in job.data.addresses if not scheme(address)]
    for address in made:
        recipe = f"launch/data/make_{Path(address).stem}.py"
        assert (ROOT / recipe).is_file()
        assert recipe.removeprefix("launch/data/") in path.read_text(encoding="utf-8")
    assert [problem for problem in check_files(job) if not (made and problem.key == "data.source")] == []


def recipe(name: str) -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "launch" / "data" / f"make_{name}.py"))


def test_messages_are_read_out_of_a_po_file() -> None:
    text = """msgid ""
msgstr "Language: de\\n"

#: models.py
#, python-format
msgctxt "menu"
msgid "Delete "
"%(name)s"
msgstr ""
"\\"%(name)s\\" "
"löschen"

#, fuzzy
msgid "Yes"
msgstr "Nein"

#~ msgid "Old"
#~ msgstr "Alt"
"""
    head, whole, guess, obsolete = recipe("translate")["entries"](text)
    assert head["msgstr"] == "Language: de\n"
    assert (whole["msgid"], whole["msgstr"]) == ("Delete %(name)s", '"%(name)s" löschen')
    assert "fuzzy" in guess
    assert obsolete == {}


def test_functions_lose_their_docstring_and_are_told_by_its_first_line() -> None:
    source = '''def add(a, b):
    """Add two numbers.

    More of it.
    """
    return a + b  # soon

def bare(): pass
'''
    assert list(recipe("summarize")["functions"](source)) == [("def add(a, b):\n    return a + b", "Add two numbers.")]


def test_the_recipe_of_functions_makes_the_columns_that_its_job_reads() -> None:
    command = [sys.executable, str(ROOT / "launch" / "data" / "make_summarize.py")]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    rows = [json.loads(line) for line in ran.stdout.splitlines()]
    assert len(rows) > 500
    assert all(row.keys() == {"text", "summary", "module"} for row in rows)


def test_the_job_of_the_readme_is_valid(tmp_path: Path) -> None:
    (job,) = re.findall(r"```yaml\n(# job\.yaml\n.*?)```", README, re.DOTALL)
    (tmp_path / "job.yaml").write_text(job)
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "one.txt").write_text("text")
    assert check_files(Job.load(tmp_path / "job.yaml")) == []


def test_the_sections_of_the_readme_are_valid(tmp_path: Path) -> None:
    tasks = re.findall(r"^task: .*$", README, re.MULTILINE)
    data = re.findall(r"```yaml\n(data:.*?)```", README, re.DOTALL)
    assert (len(tasks), len(data)) == (6, 1)  # two tasks stand in whole jobs, one of them wrong
    for task in tasks:
        if "modelling" not in task:
            (tmp_path / "job.yaml").write_text(f"model: {{source: gpt2}}\n{task}\ndata: {{source: a.jsonl}}\n")
            Job.load(tmp_path / "job.yaml")
    for section in data:
        (tmp_path / "job.yaml").write_text(f"model: {{source: gpt2}}\ntask: {{kind: language_modeling}}\n{section}")
        Job.load(tmp_path / "job.yaml")


def test_the_mistakes_of_the_readme_get_the_messages_of_the_readme(tmp_path: Path) -> None:
    (wrong,) = re.findall(r"```yaml\n(model: .*?)```", README, re.DOTALL)
    (tmp_path / "job.yaml").write_text(wrong)
    command = [sys.executable, "-m", "distft", "check", "job.yaml"]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ran.returncode == 2
    assert ran.stderr.startswith("distft: 5 problems")
    assert ran.stderr.strip() in README


def test_the_commands_of_the_readme_exist() -> None:
    named = set(re.findall(r"^\| `distft (\w+)", README, re.MULTILINE))
    assert named == {command.callback.__name__ for command in app.registered_commands if command.callback}


KINDS = ("onprem", "aws", "gcp", "azure", "kuberay", "slurm", "skypilot", "http://head:8265")


@pytest.mark.parametrize("path", sorted([*ROOT.glob("launch/*.sh"), *ROOT.glob("tests/**/*.sh")]), ids=str)
def test_each_script_passes_shellcheck(path: Path) -> None:
    command = [Path(sys.executable).with_name("shellcheck"), "--external-sources", "--source-path=SCRIPTDIR", path]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert ran.returncode == 0, ran.stdout


@pytest.mark.parametrize("kind", KINDS)
def test_a_job_is_submitted_to_each_kind_of_cluster_by_one_script(kind: str) -> None:
    options = [] if kind == "skypilot" else ["--set", "train.steps=3"]
    ran = launch("launch/quickstart.yaml", kind, "--dry-run", *options)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith("The main job: a real pretrained model")
    shown = [line.removeprefix("+ ") for line in ran.stderr.splitlines()]
    assert shown[-1].split()[:2] in (["distft", "submit"], ["sbatch", "cluster/slurm/distft.sbatch"], ["sky", "jobs"])
    for word in " ".join(shown).split():
        if word.startswith("cluster/"):
            assert (ROOT / word).is_file()


def test_the_script_refuses_a_wrong_job_and_a_kind_that_it_does_not_know() -> None:
    assert launch("launch/quickstart.yaml", "mainframe", "--dry-run").returncode == 2
    wrong = launch("launch/quickstart.yaml", "aws", "--dry-run", "--set", "train.steps=0")
    assert wrong.returncode == 2
    assert "train.steps" in wrong.stderr
    assert "ray dashboard" not in wrong.stderr
    assert "JOB KIND [--dry-run]" in launch().stderr


def launch(*words: str) -> subprocess.CompletedProcess[str]:
    """``launch/submit.sh``, called from elsewhere and with this environment's distft."""
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    command = [ROOT / "launch" / "submit.sh", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd="/", env=environment)

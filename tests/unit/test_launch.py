"""Everything shipped is run: job files load, and the README shows what the command really prints."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from distft.config import Job
from distft.config import check as check_files

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("path", sorted((ROOT / "launch").glob("*.yaml")), ids=lambda path: path.name)
def test_each_job_file_is_valid(path: Path) -> None:
    assert check_files(Job.load(path)) == []


def test_the_job_of_the_readme_is_valid(tmp_path: Path) -> None:
    (job,) = re.findall(r"```yaml\n(# job\.yaml\n.*?)```", README, re.DOTALL)
    (tmp_path / "job.yaml").write_text(job)
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "one.txt").write_text("text")
    assert check_files(Job.load(tmp_path / "job.yaml")) == []


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
    assert {"check", "prepare", "run", "train", "evaluate", "export", "generate"} == named
    for command in sorted(named):
        ran = subprocess.run([sys.executable, "-m", "distft", command, "--help"], capture_output=True, check=False)
        assert ran.returncode == 0, command

"""What definitions in cluster/ install, installed: the image's steps, ``node.sh setup``, and ``submit --install``.

Each takes minutes and gigabytes, and is gone afterwards.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from distft.runs import Run, read_lines, training_curve
from tests.distributed import tiny
from tests.integration.test_submit import JOB, Remote
from tests.support import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

DOCKERFILE = (ROOT / "cluster" / "Dockerfile").read_text()
LOCKED = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split() if "==" in line)


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """Removed at once: each test leaves gigabytes."""
    yield tmp_path
    shutil.rmtree(tmp_path, ignore_errors=True)


def clean(folder: Path) -> dict[str, str]:
    """The environment of a process that knows nothing of this installation."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL", "RAY_"))}
    (folder / "home").mkdir(exist_ok=True)
    return {**kept, "HOME": str(folder / "home")}


def call(command: list[str], folder: Path, environment: dict[str, str]) -> str:
    done = subprocess.run(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    assert done.returncode == 0, f"{command} ended with {done.returncode}\n{done.stdout[-6000:]}"
    return done.stdout


def steps(target: str) -> list[list[str]]:
    """The instructions of a target of the Dockerfile, those of its base first: name and the rest."""
    text = re.sub(r"\\\n", " ", re.sub(r"^ *#.*\n", "", DOCKERFILE, flags=re.MULTILINE))
    parts = re.split(r"^FROM (\S+) AS (\S+)$", text, flags=re.MULTILINE)
    stages = {name: (base, body) for base, name, body in zip(parts[1::3], parts[2::3], parts[3::3], strict=True)}
    base, body = stages[target]
    own = [line.split(None, 1) for line in body.splitlines() if line.strip()]
    return [*(steps(base) if base in stages else []), *own]


def reachable(command: str) -> str:
    """The same without an index of its own that cannot be reached from here: pip's usual one then."""
    for url in re.findall(r"--index-url (\S+)", command):
        try:
            socket.getaddrinfo(url.split("/")[2], 443)
        except OSError:
            print(f"{url} cannot be reached: pip's own index instead")
            command = command.replace(f"--index-url {url}", "")
    return command


def check_installed(python: Path, folder: Path, environment: dict[str, str]) -> None:
    """It is distft with what is locked, and works."""
    listed = call([str(python), "-m", "pip", "list", "--format=freeze"], folder, environment)
    found = dict(line.lower().split("==") for line in listed.split() if "==" in line)
    for name in ("torch", "ray", "deepspeed", "transformers"):
        assert found[name].partition("+")[0] == LOCKED[name], name
    (folder / "job.yaml").write_text(
        "model: {source: gpt2}\ntask: {kind: language_modeling}\ndata: {source: rows.txt, overlong: split}\n"
    )
    (folder / "rows.txt").write_text("A row.")
    call([str(python.parent / "distft"), "check", "job.yaml"], folder, environment)
    code = "import deepspeed, ray, torch, distft.train.worker; print(torch.ones(2).sum())"
    assert "tensor(2.)" in call([str(python), "-c", code], folder, environment)


def test_the_images_steps(folder: Path) -> None:
    """Those of the CPU's target: packages of Debian are known, and pip installs what is copied."""
    environment, work = clean(folder), folder / "work"
    work.mkdir()
    call([sys.executable, "-m", "venv", "venv"], folder, environment)
    environment["PATH"] = f"{folder / 'venv' / 'bin'}:{environment['PATH']}"
    done = []
    for name, rest in steps("cpu"):
        if name == "ENV":
            environment |= dict(word.split("=", 1) for word in shlex.split(rest))
            environment.pop("PIP_NO_CACHE_DIR", None)
        elif name == "COPY":
            *sources, target = shlex.split(rest)
            for source in sources:
                if (ROOT / source).is_dir():
                    shutil.copytree(ROOT / source, work / target, ignore=shutil.ignore_patterns("__pycache__"))
                else:
                    shutil.copy(ROOT / source, work / target)
        elif name == "RUN" and "apt-get" in rest:
            packages = re.findall(r"apt-get install (?:--\S+ )+([^&]+)", rest)[0].split()
            if shutil.which("apt-get"):
                call(["apt-get", "install", "--simulate", *packages], folder, environment)
        elif name == "RUN":
            call(["sh", "-ec", reachable(rest)], work, environment)
            done.append(rest)
    assert len(done) == 1
    check_installed(folder / "venv" / "bin" / "python", folder, environment)


def test_what_a_node_sets_up(folder: Path) -> None:
    """``node.sh setup`` of a bare machine, as ``ray up`` leaves files there; a second time it has nothing to do."""
    home, environment = folder / "distft", clean(folder)
    for name in ("distft", "cluster"):
        shutil.copytree(ROOT / name, home / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "constraints.txt", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, home)
    values = home / "cluster" / "values.env"
    shared = folder / "shared"
    shared.mkdir()
    values.write_text(values.read_text().replace("/mnt/distft", str(shared)))
    setup = ["bash", str(home / "cluster" / "node.sh"), "setup"]
    call(setup, folder, environment)
    installed = (home / ".venv" / "installed").stat().st_mtime_ns
    call(setup, folder, environment)
    assert (home / ".venv" / "installed").stat().st_mtime_ns == installed
    check_installed(home / ".venv" / "bin" / "python", folder, environment)
    refused = subprocess.run(
        ["bash", str(home / "cluster" / "node.sh"), "head"], env=environment, capture_output=True, text=True
    )
    assert refused.returncode == 1
    assert "no ~/.ray/auth_token" in refused.stderr


@pytest.mark.parametrize("tool", ["pip", "uv"])
def test_a_job_brings_what_it_needs_to_a_cluster_that_has_nothing_but_ray(
    folder: Path, tmp_path_factory: pytest.TempPathFactory, tool: str
) -> None:
    """``submit --install``, with an extra that the job asks for."""
    call([sys.executable, "-m", "venv", "bare"], folder, clean(folder))
    python = folder / "bare" / "bin" / "python"
    call([str(python), "-m", "pip", "install", f"ray[default]=={LOCKED['ray']}"], folder, clean(folder))
    tiny.make(folder)
    (folder / "tiny.yaml").write_text(JOB)
    cluster = Remote(folder, tmp_path_factory.mktemp("r"), python)
    words = ["submit", "tiny.yaml", "--wait", "--install", tool, "--constraints", str(ROOT / "constraints.txt")]
    words += ["--set", "train.steps=4", "--set", "track.mlflow=mlflow.db"]
    try:
        cluster.start()
        output, _ = cluster.distft(*words, seconds=1200)
    finally:
        cluster.end()
    assert "✓ evaluate on test" in output
    run = Run(cluster.runs / "tiny")
    assert len(training_curve(run.metrics)) == 4
    assert not [line for line in read_lines(run.metrics) if line.get("event") == "tracker"]

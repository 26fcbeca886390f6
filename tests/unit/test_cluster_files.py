"""cluster/: what all definitions share is the same in all of them; image, scripts and SkyPilot's file are sound."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from distft.config import Job
from tests.support import ROOT

FOLDER = ROOT / "cluster"
SCRIPTS = ["node.sh", "onprem-down.sh", "slurm/distft.sbatch"]
VALUES = dict(
    line.split("=", 1) for line in (FOLDER / "values.env").read_text().splitlines() if line and not line.startswith("#")
)
MANIFESTS = [*sorted((FOLDER / "kuberay").glob("ray*.yaml")), FOLDER / "skypilot.yaml"]


def tool(name: str) -> str:
    """A linter beside this Python, or on the path."""
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    return found or pytest.skip(f"{name} is not installed")


def test_versions_are_those_of_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    locked = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split() if "==" in line)
    assert VALUES["DISTFT_VERSION"] == project["version"]
    assert VALUES["RAY_VERSION"] == locked["ray"]
    assert VALUES["DISTFT_IMAGE"].endswith(f":{project['version']}")


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_manifests_name_the_shared_values(path: Path) -> None:
    text = path.read_text()
    assert set(re.findall(r"[\w./-]+/distft:[\w.-]+", text)) == {VALUES["DISTFT_IMAGE"]}
    assert set(re.findall(r"rayVersion: (\S+)", text)) <= {VALUES["RAY_VERSION"]}
    assert set(re.findall(r"/mnt/\w+", text)) == {VALUES["DISTFT_SHARED"]}


def test_the_image_is_that_of_the_values_and_its_user_has_no_rights() -> None:
    text = (FOLDER / "Dockerfile").read_text()
    assert f"-t {VALUES['DISTFT_IMAGE']} ." in text
    for stage in re.split(r"^FROM .* AS ", text, flags=re.MULTILINE)[2:]:
        assert re.search(r"^USER 1000$", stage, re.MULTILINE), stage
        assert "-c constraints.txt" in stage


def test_hadolint_finds_nothing_in_the_dockerfile() -> None:
    subprocess.run([tool("hadolint"), "Dockerfile"], cwd=FOLDER, check=True)


@pytest.mark.parametrize("script", SCRIPTS)
def test_shellcheck_finds_nothing_in_the_scripts(script: str) -> None:
    subprocess.run(["bash", "-n", script], cwd=FOLDER, check=True)
    subprocess.run([tool("shellcheck"), "-x", script], cwd=FOLDER, check=True)


def test_a_node_starts_ray_with_its_secrets_in_the_environment(tmp_path: Path) -> None:
    (tmp_path / "cluster").mkdir()
    for name in ("node.sh", "values.env"):
        shutil.copy(FOLDER / name, tmp_path / "cluster")
    ray = tmp_path / ".venv" / "bin" / "ray"
    ray.parent.mkdir(parents=True)
    ray.write_text('#!/bin/sh\necho "$1 $HF_TOKEN $RAY_AUTH_MODE"\n')
    ray.chmod(0o755)
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("token")
    (tmp_path / ".distft_env").write_text("HF_TOKEN=planted\n")
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "RAY_HEAD_IP": "192.0.2.10"}
    command = ["bash", str(tmp_path / "cluster" / "node.sh"), "worker"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "start planted token\n"
    assert (tmp_path / ".distft_env").stat().st_mode & 0o777 == 0o600


def test_the_slurm_script_is_requeued_and_appends_to_its_log() -> None:
    options = re.findall(r"^#SBATCH (\S+)", (FOLDER / "slurm" / "distft.sbatch").read_text(), re.MULTILINE)
    assert {"--requeue", "--open-mode=append", "--ntasks-per-node=1", "--signal=B:USR1@300"} <= set(options)


def test_the_job_of_skypilot_is_there() -> None:
    Job.load(ROOT / yaml.safe_load((FOLDER / "skypilot.yaml").read_text())["envs"]["JOB"])


def test_skypilot_takes_its_file() -> None:
    """SkyPilot is heavy, and pins what others pin too: it is not among the packages for development."""
    sky = pytest.importorskip(
        "sky", reason="SkyPilot is not installed; pip install skypilot, in an environment of its own"
    )
    config = yaml.safe_load((FOLDER / "skypilot.yaml").read_text())
    task = sky.Task.from_yaml_config(config)
    assert task.num_nodes == 1
    assert all(resources.use_spot for resources in task.resources)
    with pytest.raises(sky.exceptions.InvalidSkyPilotConfigError, match="use_spott"):
        sky.Task.from_yaml_config({**config, "resources": {"use_spott": True}})

"""cluster/slurm/distft.sbatch on a real Slurm of two nodes, on hosts of their own (``host.sh``): Debian's packages.

``apt-get install slurmctld slurmd slurm-client munge``. By Slurm's rule a requeued job waits two minutes, in which what
was left of it on the nodes ends.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from distft.runs import Run, read_json, read_lines, training_curve
from tests.distributed import tiny
from tests.integration.test_hosts import SCRIPT, WHY_NOT
from tests.integration.test_survive import JOB
from tests.support import ROOT

MISSING = [tool for tool in ("munged", "slurmctld", "slurmd", "sbatch") if shutil.which(tool) is None]
pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT)),
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}"),
]
STEPS = 60
BATCH = ROOT / "cluster" / "slurm" / "distft.sbatch"


class Slurm:
    """A controller on host 0, nodes of one CPU each on hosts 1 and 2; all see the same files, one munge serves them."""

    def __init__(self, folder: Path) -> None:
        net = f"10.79.{os.getpid() % 256}"
        self.folder, self.socket = folder, folder / "munge"
        self.environment = {
            **os.environ,
            "HOSTS_DIR": str(folder / "hosts"),
            "HOSTS_NET": net,
            "SLURM_CONF": str(folder / "slurm.conf"),
            "DISTFT_VENV": str(Path(sys.executable).parents[1]),
            "DISTFT_RUNS": str(folder / "runs"),
            "DISTFT_CACHE": str(folder / "cache"),
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "RAY_worker_niceness": "0",  # else a busy machine starves the workers
        }
        (folder / "hosts.txt").write_text(
            "127.0.0.1 localhost\n" + "".join(f"{net}.1{number} host{number}\n" for number in range(3))
        )
        (folder / "slurm.conf").write_text(f"""\
ClusterName=test
SlurmctldHost=host0
SlurmUser=root
AuthInfo=socket={self.socket}
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
ReturnToService=2
JobRequeue=1
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
NodeName=host[1-2] CPUs=1 RealMemory=1000
PartitionName=all Nodes=host[1-2] Default=YES State=UP
""")
        key = folder / "munge.key"
        key.touch(mode=0o400)
        key.chmod(0o600)
        key.write_bytes(secrets.token_bytes(128))
        for name in ("state", "spool-host1", "spool-host2", "log"):
            (folder / name).mkdir()
        munge = ["--foreground", "--force", f"--key-file={key}", f"--socket={self.socket}"]
        munge += [f"--{name}-file={folder}/log/munge.{name}" for name in ("log", "pid", "seed")]
        self.processes = [self.start("munged", *munge)]
        for number, command in enumerate([["slurmctld"], ["slurmd", "-N", "host1"], ["slurmd", "-N", "host2"]]):
            self.run("bash", SCRIPT, "up", str(number))
            on = ["bash", SCRIPT, "run", str(number)]
            self.run(*on, "mount", "--bind", str(folder / "hosts.txt"), "/etc/hosts")
            self.processes.append(self.start(*on, *command, "-D"))

    def start(self, *command: str) -> subprocess.Popen[bytes]:
        log = (self.folder / "daemons.log").open("ab")
        return subprocess.Popen(
            command, env=self.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=self.folder
        )

    def run(self, *command: str) -> str:
        done = subprocess.run(
            command,
            env=self.environment,
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, f"{command} ended with {done.returncode}\n{done.stdout}"
        return done.stdout

    def on_controller(self, *command: str) -> str:
        return self.run("bash", SCRIPT, "run", "0", *command)

    def state(self, job: str) -> str:
        return re.findall(r"JobState=(\w+)", self.on_controller("scontrol", "show", "job", job))[0]

    def wait(self, what: str, job: str, states: set[str], done: Callable[[], bool] = lambda: True) -> None:
        """Until the job is in one of these states and ``done()``; fails with its log."""
        until = time.monotonic() + 700
        while not (self.state(job) in states and done()):
            log = self.folder / f"distft-{job}.log"
            said = log.read_text()[-6000:] if log.exists() else ""
            assert time.monotonic() < until, f"{what} did not come\n{said}"
            assert self.state(job) != "FAILED", said
            time.sleep(0.5)


@pytest.fixture
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    made = Slurm(tmp_path_factory.mktemp("s"))
    try:
        yield made
    finally:
        made.run("bash", SCRIPT, "clean")
        made.processes[0].terminate()
        for process in made.processes:
            process.wait(30)


def test_a_job_over_two_nodes_that_is_told_to_stop_goes_on_from_its_checkpoint(slurm: Slurm) -> None:
    tiny.make(slurm.folder)
    (slurm.folder / "tiny.yaml").write_text(JOB)
    until = time.monotonic() + 60
    while slurm.on_controller("sinfo", "--noheader", "--format=%T").strip() != "idle":
        assert time.monotonic() < until, slurm.on_controller("sinfo")
        time.sleep(0.5)
    settings = [f"train.steps={STEPS}", "evaluate={samples: 8, compare_base: false}"]
    words = [word for setting in settings for word in ("--set", setting)]
    job = re.findall(r"\d+", slurm.on_controller("sbatch", str(BATCH), "tiny.yaml", *words))[0]
    run = Run(slurm.folder / "runs" / f"slurm-{job}")

    def steps() -> int:
        return len(training_curve(run.metrics)) if run.metrics.exists() else 0

    slurm.wait("the first steps", job, {"RUNNING"}, lambda: steps() >= 25)
    slurm.on_controller("scancel", "--signal=USR1", "--batch", job)
    slurm.wait("the queue", job, {"PENDING"})
    stopped_at = steps()
    assert 25 <= stopped_at < STEPS
    slurm.wait("the end", job, {"COMPLETED"})

    log = (slurm.folder / f"distft-{job}.log").read_text()
    assert "told to stop: a checkpoint is written" in log
    assert read_json(run.result)["status"] == "finished"
    lines = [line for line in read_lines(run.metrics) if line["kind"] == "train"]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))  # none is lost, and none done twice
    assert {line["world_size"] for line in lines} == {2}
    assert len({read_json(path)["host"] for path in run.logs.glob("rank-*.json")}) == 2
    assert not list((slurm.folder / "runs").glob(".slurm-*"))  # the token is gone with the job
    print(f"stopped after step {stopped_at}")

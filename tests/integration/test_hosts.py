"""A run whose hosts lose power, or are cut off: hosts of their own addresses on this machine (``host.sh``).

Host 0 is the head; hosts 1 and 2 have one CPU each. What is drawn is told by the seed: DISTFT_SEED takes it.
"""

from __future__ import annotations

import itertools
import os
import random
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from distft.runs import Run, read_json, read_lines, training_curve
from tests.distributed import tiny
from tests.integration.conftest import Home
from tests.integration.test_survive import JOB, STEPS, Survivor, check_curve, reference, seconds_to_go_on

WHY_NOT = next(
    (
        why
        for why, so in {
            "hosts are made of Linux namespaces": sys.platform != "linux",
            "only root may make hosts": sys.platform == "linux" and os.geteuid() != 0,
            **{f"{tool} is not installed": shutil.which(tool) is None for tool in ("ip", "unshare", "nsenter")},
        }.items()
        if so
    ),
    None,
)
pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT)),
]

SCRIPT = str(Path(__file__).with_name("host.sh"))
HEAD = 0
#: As :mod:`distft.orchestrate.cluster` tells those to set who start a head.
HEALTH = {
    "RAY_health_check_timeout_ms": "3000",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_failure_threshold": "3",
}
#: As it tells those to set who want to outlive the loss of a head.
HEAD_LOST = {"RAY_gcs_rpc_server_reconnect_timeout_s": "600"}
#: How long Ray may take to start on a host of a busy machine.
START_SECONDS = 300
#: How long it may take at most from the loss of a host to the next step.
RECOVERY_SECONDS = 30.0


class Hosts:
    """Three hosts with Ray on them.

    Args:
        folder: What belongs to them.
        head: What Ray's head is started with.
        environment: Of every process on them.
    """

    def __init__(
        self, folder: Path, head: Sequence[str] = ("--num-cpus=0", "--include-dashboard=false"), **environment: str
    ) -> None:
        self._sound: set[int] = set()
        self._head = head
        self._net = f"10.77.{os.getpid() % 256}"
        self.address = f"{self._net}.1{HEAD}:6379"
        self.environment = {
            "HOSTS_DIR": str(folder),
            "HOSTS_NET": self._net,
            "RAY_worker_niceness": "0",  # else a busy machine starves the workers
            "RAY_raylet_start_wait_time_s": "120",  # nor their start
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_gcs_storage": "rocksdb",
            "RAY_gcs_storage_path": str(folder / "gcs"),
            **HEAD_LOST,
            **HEALTH,
            **environment,
        }

    def script(self, *words: str) -> str:
        """Calls ``host.sh``."""
        done = self._start(*words)
        output, _ = done.communicate(timeout=START_SECONDS)
        assert done.returncode == 0, f"{words} ended with {done.returncode}\n{output}"
        return output

    def boot(self, *numbers: int) -> None:
        """Starts hosts, and Ray on them: the head first."""
        for number in numbers:
            self.script("up", str(number))
        self.start_ray(*numbers)
        self._sound.update(numbers)

    def mend(self) -> None:
        """Starts those anew that were lost."""
        lost = {0, 1, 2} - self._sound
        for number in lost:
            self.down(number)
        self.boot(*sorted(lost))

    def down(self, number: int) -> None:
        """Takes a host's power away."""
        self.script("down", str(number))
        self._sound.discard(number)

    def cut(self, number: int) -> None:
        """Pulls a host's cable."""
        self.script("cut", str(number))
        self._sound.discard(number)

    def join(self, number: int) -> None:
        """Plugs it in again, and starts Ray once the one of before has heard that it is taken for dead."""
        self.script("join", str(number))
        time.sleep(5)
        self.start_ray(number)
        self._sound.add(number)

    def start_ray(self, *numbers: int) -> None:
        """Starts Ray on hosts."""
        ray = [sys.executable, "-m", "ray.scripts.scripts", "start", "--disable-usage-stats"]
        if HEAD in numbers:
            self.script("run", str(HEAD), *ray, "--head", "--port=6379", *self._head)
        join = [*ray, f"--address={self.address}", "--num-cpus=1"]
        others = [self._start("run", str(number), *join) for number in numbers if number != HEAD]
        for other in others:
            output, _ = other.communicate(timeout=START_SECONDS)
            assert other.returncode == 0, output

    def number_of(self, address: str) -> int:
        """The number of the host with this address."""
        return int(address.rpartition(".")[2]) - 10

    def _start(self, *words: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            ["bash", SCRIPT, *words],
            env={**os.environ, **self.environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )


@pytest.fixture(scope="module")
def draw() -> random.Random:
    seed = int(os.environ.get("DISTFT_SEED") or random.randrange(1 << 31))
    print(f"DISTFT_SEED={seed}")
    return random.Random(seed)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    hosts = Hosts(tmp_path_factory.mktemp("hosts"))
    try:
        yield hosts
    finally:
        hosts.script("clean")


@pytest.fixture
def hosts(made: Hosts) -> Iterator[Hosts]:
    """All of them sound; a test that fails leaves no run behind."""
    made.mend()
    yield made
    while Survivor.processes:
        if Survivor.processes.pop().poll() is None:
            for number in (0, 1, 2):
                made.down(number)


@pytest.fixture(scope="module")
def stage(draw: random.Random) -> int:
    """Of all tests, so that there is one run to compare with."""
    drawn = draw.choice([1, 2, 3])
    print(f"ZeRO stage {drawn}")
    return drawn


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What all hosts see: the model, the corpus and the runs. Steps take longer than in ``test_survive``."""
    folder = tmp_path_factory.mktemp("files")
    tiny.make(folder)
    (folder / "tiny.yaml").write_text(JOB.replace("batch_size: 12", "batch_size: 24"))
    return folder


def home_on(hosts: Hosts, number: int, files: Path) -> Home:
    """Where commands run on that host."""
    home = Home(files, hosts.address, on=["bash", SCRIPT, "run", str(number)])
    home.environment |= hosts.environment
    return home


def check_one_writer(run: Run) -> None:
    """No group of workers writes once the next one has begun: the steps of each follow one another."""
    lines = [line for line in read_lines(run.metrics) if line["kind"] == "train" or "workers" in line]
    for before, line in itertools.pairwise(lines):
        if line["kind"] == "train":
            assert line["step"] == before["step"] + 1, (before, line)


def check_gone_on(home: Home, survivor: Survivor, stage: int, lost: float) -> None:
    """It went on as if nothing had been, and in time; said with its parts, since a busy machine starts slowly."""
    check_one_writer(survivor.run)
    check_curve(home, survivor, stage, exact=False)
    seconds = seconds_to_go_on(survivor, lost)
    noticed = next(one for one in survivor.events() if one["event"] == "lost")
    print(f"on again after {seconds:.1f} s, noticed after {noticed['time'] - lost:.1f} s: {noticed['reason']}")
    assert seconds <= RECOVERY_SECONDS


def test_a_host_without_power(hosts: Hosts, files: Path, draw: random.Random, stage: int) -> None:
    step, rank = draw.randrange(25, 100), draw.randrange(2)
    print(f"the host of rank {rank} loses its power after step {step}")
    home = home_on(hosts, HEAD, files)
    reference(home, stage)
    survivor = Survivor(home, "power", f"zero.stage={stage}", "cluster.workers={min: 1, max: 2}")
    survivor.wait_for_step(step)
    hosts.down(hosts.number_of(survivor.places()[rank].host))
    lost = time.time()
    survivor.end()
    assert read_json(survivor.run.result)["restarts"] == 1
    check_gone_on(home, survivor, stage, lost)


def test_a_pulled_cable(hosts: Hosts, files: Path, draw: random.Random, stage: int) -> None:
    """The host comes back, and the run grows onto it; what ran there before disturbs nobody."""
    step, rank = draw.randrange(25, 100), draw.randrange(2)
    print(f"the host of rank {rank} is cut off after step {step}")
    home = home_on(hosts, HEAD, files)
    reference(home, stage)
    settings = [f"zero.stage={stage}", "cluster.workers={min: 1, max: 2}", "cluster.stall_seconds=300"]
    survivor = Survivor(home, "cable", *settings)
    survivor.wait_for_step(step)
    number = hosts.number_of(survivor.places()[rank].host)
    hosts.cut(number)
    lost = time.time()
    survivor.wait_for_event("resize")
    (place,) = survivor.places()
    other = str(hosts.number_of(place.host))
    survivor.wait_for_step(survivor.step + 2)
    hosts.script("run", other, "kill", "-STOP", str(place.pid))  # the tiny model would be done before
    hosts.join(number)
    survivor.wait(survivor.run.stop_request.exists, "the request to grow")
    hosts.script("run", other, "kill", "-CONT", str(place.pid))
    survivor.end()
    sizes = [line["world_size"] for line in training_curve(survivor.run.metrics)]
    assert [size for size, before in itertools.pairwise([*sizes, 0]) if size != before] == [2, 1, 2]
    check_gone_on(home, survivor, stage, lost)


def test_a_worker_that_goes_on_alone(hosts: Hosts, files: Path, draw: random.Random, stage: int) -> None:
    """A worker needs nobody, is cut off, and still sees the run's files: it stops when another has taken over."""
    step = draw.randrange(25, 60)
    print(f"cut off after step {step}")
    home = home_on(hosts, HEAD, files)
    reference(home, stage)
    survivor = Survivor(home, "alone", f"zero.stage={stage}", "cluster.workers=1")
    survivor.wait_for_step(step)
    (place,) = survivor.places()
    hosts.cut(hosts.number_of(place.host))
    lost = time.time()
    survivor.end()
    assert read_json(survivor.run.result)["restarts"] == 1
    check_gone_on(home, survivor, stage, lost)


def test_the_head_is_lost(hosts: Hosts, files: Path, draw: random.Random, stage: int) -> None:
    """Driver and workers are on other hosts: training never stops, and the head is started again beside it."""
    step = draw.randrange(10, 40)
    print(f"the head loses its power after step {step}")
    home = home_on(hosts, 1, files)
    reference(home, stage)
    survivor = Survivor(home, "head", f"zero.stage={stage}")
    survivor.wait_for_step(step)
    hosts.down(HEAD)
    lost = time.time()
    time.sleep(10)
    hosts.boot(HEAD)
    print(f"the head is back after {time.time() - lost:.1f} s, at step {survivor.step}")
    said = survivor.end()
    print(f"ended {time.time() - lost:.1f} s after the loss")
    assert "the cluster's head does not answer" in said
    steps = [line for line in read_lines(survivor.run.metrics) if line["kind"] == "train"]
    assert [line["step"] for line in steps] == list(range(1, STEPS + 1))
    gaps = [line["time"] - before["time"] for before, line in itertools.pairwise(steps)]
    print(f"the longest step took {max(gaps):.1f} s, the median one {sorted(gaps)[len(gaps) // 2]:.2f} s")
    assert max(gaps) < 5
    assert len([one for one in survivor.events() if "workers" in one]) == 1
    check_curve(home, survivor, stage, exact=True)


def test_the_head_is_lost_for_good(hosts: Hosts, files: Path, draw: random.Random, stage: int) -> None:
    """The run ends with a word and a checkpoint, and goes on when there is a cluster again."""
    step = draw.randrange(10, 40)
    print(f"the head loses its power after step {step}, and does not come back")
    home = home_on(hosts, 1, files)
    reference(home, stage)
    home.environment["RAY_gcs_rpc_server_reconnect_timeout_s"] = "30"
    survivor = Survivor(home, "headless", f"zero.stage={stage}")
    survivor.wait_for_step(step)
    hosts.down(HEAD)
    lost = time.time()
    said = survivor.end(status=5)
    print(f"ended {time.time() - lost:.1f} s after the loss, at step {survivor.step}")
    assert "the cluster's head has not answered for 27 s" in said
    assert "--resume --name headless" in said
    for number in (1, 2):  # their Ray waits for the head that was
        hosts.down(number)
    hosts.mend()
    survivor = Survivor(home, "headless", f"zero.stage={stage}", resume=True)
    survivor.end()
    check_one_writer(survivor.run)
    check_curve(home, survivor, stage, exact=True)

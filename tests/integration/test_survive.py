"""A run whose workers, nodes or driver are taken away: its curve is that of a run that nobody touched.

Several Ray nodes on one machine, with one CPU each; ranks, steps and ZeRO stages are drawn anew each time, and the seed
is printed: DISTFT_SEED takes it.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import psutil
import pytest

from distft.orchestrate.cluster import MARKET
from distft.orchestrate.proof.disturbance import Kind, plan
from distft.orchestrate.train.places import Place, read_places
from distft.runs import Run, read_json, read_lines, training_curve
from tests.distributed import tiny
from tests.integration.conftest import Home
from tests.support import start_ranks, wait_for_ranks

pytestmark = [pytest.mark.ray, pytest.mark.timeout(1500)]

STEPS = 200
JOB = f"""\
model: {{source: ./model, dtype: fp32}}
task: {{kind: language_modeling}}
data:
  source: ./corpus.jsonl
  splits: {{validation: 0.1, test: 0.1}}
  max_tokens: 64
  overlong: split
train: {{steps: {STEPS}, batch_size: 12, micro_batch_size: 1, learning_rate: 1e-3, validate_every: {{steps: 100}}}}
checkpoint: {{every: {{steps: 20}}}}
cluster: {{workers: 2}}
track: {{tensorboard: false}}
"""


@pytest.fixture(scope="module")
def draw() -> random.Random:
    seed = int(os.environ.get("DISTFT_SEED") or random.randrange(1 << 31))
    print(f"DISTFT_SEED={seed}")
    return random.Random(seed)


class Cluster:
    """Ray nodes of one CPU each on this machine; the head has one too, or more."""

    def __init__(self, folder: Path, cpus: int = 1) -> None:
        from ray.cluster_utils import Cluster as RayCluster

        os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112  # else a busy machine starves the workers
        head = {"num_cpus": cpus, "include_dashboard": False, "temp_dir": str(folder)}
        self.ray = RayCluster(initialize_head=True, head_node_args=head)
        self.others: list[Any] = []
        self.folder = folder

    def resize(self, nodes: int, **labels: str) -> None:
        """Adds nodes, or takes the last ones away without a word."""
        while len(self.others) + 1 < nodes:
            self.others.append(self.ray.add_node(num_cpus=1, labels=labels))
        while len(self.others) + 1 > nodes:
            self.ray.remove_node(self.others.pop(), allow_graceful=False)

    def workers(self) -> list[psutil.Process]:
        """The processes that Ray Train has here for ranks, also before they have said where they are."""
        found = []
        for process in psutil.process_iter(["cmdline", "ppid"]):
            with contextlib.suppress(psutil.Error):
                mine = str(self.folder) in " ".join(psutil.Process(process.info["ppid"]).cmdline())
                if mine and "ray::RayTrainWorker" in " ".join(process.info["cmdline"] or []):
                    found.append(process)
        return found

    def drain(self, seconds: float) -> None:
        """Tells the last node that it goes in so many seconds."""
        from ray._raylet import GcsClient
        from ray.core.generated import autoscaler_pb2

        reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
        accepted, why = GcsClient(address=self.ray.address).drain_node(
            self.others[-1].node_id, reason, "test", int((time.time() + seconds) * 1000)
        )
        assert accepted, why


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    made = Cluster(tmp_path_factory.mktemp("r"))  # short: Ray's socket paths must stay under 108 bytes
    try:
        yield made
    finally:
        made.ray.shutdown()


@pytest.fixture(scope="module")
def tiny_home(tmp_path_factory: pytest.TempPathFactory, cluster: Cluster) -> Home:
    folder = tmp_path_factory.mktemp("survive")
    tiny.make(folder)
    (folder / "tiny.yaml").write_text(JOB)
    return Home(folder, cluster.ray.address)


@pytest.fixture(autouse=True)
def no_driver_left() -> Iterator[None]:
    """A test that fails leaves no run behind that holds the cluster."""
    yield
    while Survivor.processes:
        process = Survivor.processes.pop()
        if process.poll() is None:
            process.kill()
            process.communicate()


class Trail:
    """What a run has written by now."""

    def __init__(self, run: Run) -> None:
        self.run = run

    @property
    def step(self) -> int:
        steps = [line["step"] for line in read_lines(self.run.metrics) if line["kind"] == "train"]
        return steps[-1] if steps else 0

    def events(self) -> list[dict[str, Any]]:
        return [line for line in read_lines(self.run.metrics) if line["kind"] == "event"]

    def named(self, name: str) -> list[str]:
        return [one["reason"] for one in self.events() if one["event"] == name]

    def places(self) -> list[Place]:
        """Where the ranks are that run now."""
        newest = max(read_json(path)["attempt"] for path in self.run.logs.glob("rank-*.json"))
        return read_places(self.run, newest)


class Survivor(Trail):
    """A run that is going on, and what is done to it."""

    processes: ClassVar[list[subprocess.Popen[str]]] = []

    def __init__(self, home: Home, name: str, *settings: str, resume: bool = False) -> None:
        super().__init__(Run(home.folder / "runs" / name))
        words = ["--resume"] if resume else []
        words += [word for setting in settings for word in ("--set", setting)]
        self.process = home.start("train", "tiny.yaml", "--name", name, *words)
        self.processes.append(self.process)

    def wait(self, condition: Callable[[], bool], what: str, seconds: float = 600) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None, f"it ended before {what}\n{self.process.communicate()}"
            assert time.monotonic() < end, f"{what} did not come in time; {self.events()}"
            time.sleep(0.02)

    def wait_for_step(self, step: int) -> None:
        self.wait(lambda: self.step >= step, f"step {step}")

    def wait_for_event(self, name: str, seconds: float = 600) -> None:
        self.wait(lambda: name in [one["event"] for one in self.events()], name, seconds)

    def grow(self, cluster: Cluster, nodes: int) -> None:
        """Adds nodes; a rank stands still until they are seen, since the tiny model would be done before."""
        place, *_ = self.places()
        os.kill(place.pid, signal.SIGSTOP)
        cluster.resize(nodes)
        self.wait(self.run.stop_request.exists, "the request to grow")
        os.kill(place.pid, signal.SIGCONT)

    def end(self, status: int = 0, seconds: float = 600) -> str:
        output, errors = self.process.communicate(timeout=seconds)
        assert self.process.returncode == status, f"{output}\n{errors}\n{self.events()}"
        assert "Traceback" not in errors
        assert "SIGTERM received" not in errors
        return output + errors


def reference(home: Home, stage: int) -> list[dict[str, Any]]:
    """The curve of a run without Ray that nobody touches, made once for each stage."""
    name = f"reference-{stage}"
    run = Run(home.folder / "runs" / name)
    if not run.metrics.exists():
        command = [sys.executable, "-m", "distft.train", str(home.folder / "tiny.yaml"), "--name", name]
        command += ["--runs", str(run.folder.parent), "--set", f"zero.stage={stage}"]
        ranks = wait_for_ranks(start_ranks(command, 2, home.folder, home.environment), home.folder, 240)
        assert ranks.statuses == [0, 0], ranks
    return training_curve(run.metrics)


def check_curve(home: Home, survivor: Trail, stage: int, *, exact: bool) -> None:
    """Each step stands once, of the same rows, with the same loss as in the run that nobody touched."""
    expected, curve = reference(home, stage), training_curve(survivor.run.metrics)
    assert [line["step"] for line in curve] == list(range(1, STEPS + 1))
    assert [line["sample_digest"] for line in curve] == [line["sample_digest"] for line in expected]
    for ours, theirs in zip(curve, expected, strict=True):
        for name in ("loss", "grad_norm"):
            if exact:
                assert ours[name] == theirs[name], (ours["step"], name)
            else:
                assert ours[name] == pytest.approx(theirs[name], rel=1e-5), (ours["step"], name)
    audited = json.loads(home.distft("audit", survivor.run.name, "--json")[0])  # every row once an epoch
    assert audited["sound"], audited
    assert audited["losses_checked"] == STEPS


def seconds_to_go_on(survivor: Trail, since: float) -> float:
    """From a moment to the end of the first step that was made by workers started after it."""
    lines = list(read_lines(survivor.run.metrics))
    begun = next(n for n, line in enumerate(lines) if line["time"] > since and "workers" in line)
    return float(next(line["time"] for line in lines[begun:] if line["kind"] == "train") - since)


@functools.cache
def stage_of(draw: random.Random) -> int:
    """The same for all tests, so that one run that nobody touches serves them all."""
    stage = draw.choice([1, 2, 3])
    print(f"ZeRO stage {stage}")
    return stage


def test_a_killed_rank(tiny_home: Home, cluster: Cluster, draw: random.Random) -> None:
    """By ``distft chaos``, which tells what it cost."""
    stage = stage_of(draw)
    kinds: list[Kind] = ["worker", "driver", "flip"]  # what is left on a cluster that was not started for it
    seed = next(
        seed
        for seed in iter(lambda: draw.randrange(1 << 31), None)
        for fault in plan(seed, 1, STEPS, kinds, 20)
        if fault.kind == "worker" and 25 <= fault.step < 150
    )
    cluster.resize(2)
    words = ["--kills", "1", "--seed", str(seed), "--name", "killed", "--set", f"zero.stage={stage}"]
    refused = tiny_home.distft("chaos", "tiny.yaml", *words, status=2)[1]
    assert "a cluster that was not started for this" in refused
    told = json.loads(tiny_home.distft("chaos", "tiny.yaml", *words, "--yes", "--json", timeout=600)[0])
    survivor = Trail(Run(tiny_home.folder / "runs" / "killed"))
    (struck,) = told["struck"]
    print(f"{struck['what']} after step {struck['step']}, on again after {struck['seconds']:.1f} s")
    assert told["survived"], told
    assert struck["seconds"] == pytest.approx(seconds_to_go_on(survivor, struck["time"]), abs=0.1)
    assert [what.partition(":")[0] for what in told["left_out"]] == ["node", "disk"]
    rank = int(struck["what"].split()[1])
    assert survivor.named("lost") == [f"[rank {rank}] its process died"]
    assert read_json(survivor.run.result)["restarts"] == 1
    for place in survivor.places():  # Ray had started it before it was needed
        assert psutil.boot_time() + place.started / os.sysconf("SC_CLK_TCK") < place.attempt
    heard = read_json(survivor.run.environment)  # of the nodes, before the start
    assert (len(heard["nodes"]), len(heard["network"])) == (2, 2)
    check_curve(tiny_home, survivor, stage, exact=True)


@pytest.mark.slow
def test_a_rank_killed_while_it_starts(tiny_home: Home, cluster: Cluster, draw: random.Random) -> None:
    """Nothing of the group that did not come to train holds the room that the next one needs."""
    stage, seconds = stage_of(draw), draw.uniform(0, 8)
    cluster.resize(2)
    survivor = Survivor(tiny_home, "unborn", f"zero.stage={stage}", "cluster.max_failures=1")
    survivor.wait(lambda: len(cluster.workers()) == 2, "the workers' processes")
    time.sleep(seconds)
    draw.choice(cluster.workers()).kill()
    killed = time.time()
    print(f"SIGKILL {seconds:.1f} s after its process came")
    survivor.end()
    print(f"on again after {seconds_to_go_on(survivor, killed):.1f} s: {survivor.named('lost')}")
    assert len(survivor.named("lost")) == 1
    check_curve(tiny_home, survivor, stage, exact=True)


def test_a_node_goes_and_another_comes(tiny_home: Home, cluster: Cluster, draw: random.Random) -> None:
    stage, step = stage_of(draw), draw.randrange(25, 100)
    print(f"node removed after step {step}")
    cluster.resize(2)
    survivor = Survivor(tiny_home, "elastic", f"zero.stage={stage}", "cluster.workers={min: 1, max: 2}")
    survivor.wait_for_step(step)
    cluster.resize(1)
    gone = time.time()
    survivor.wait_for_event("resize")
    survivor.grow(cluster, 2)
    survivor.end()
    print(f"on again after {seconds_to_go_on(survivor, gone):.1f} s")
    sizes = [line["world_size"] for line in training_curve(survivor.run.metrics)]
    assert [size for size, before in zip(sizes, [0, *sizes], strict=False) if size != before] == [2, 1, 2]
    check_curve(tiny_home, survivor, stage, exact=False)


@pytest.mark.slow
def test_one_worker_becomes_three(tiny_home: Home, cluster: Cluster, draw: random.Random) -> None:
    stage = stage_of(draw)
    cluster.resize(1)
    survivor = Survivor(tiny_home, "grown", f"zero.stage={stage}", "cluster.workers={min: 1, max: 3}")
    survivor.wait_for_step(draw.randrange(1, 40))
    survivor.grow(cluster, 3)
    survivor.end()
    sizes = {line["world_size"] for line in training_curve(survivor.run.metrics)}
    assert {1, 3} <= sizes
    check_curve(tiny_home, survivor, stage, exact=False)


@pytest.mark.slow
def test_workers_that_share_rows_come_in_groups(tiny_home: Home, cluster: Cluster, draw: random.Random) -> None:
    stage = stage_of(draw)
    cluster.resize(3)
    elastic = "cluster.workers={min: 2, max: 4}", "train.sequence_parallel_size=2"
    survivor = Survivor(tiny_home, "groups", f"zero.stage={stage}", *elastic)
    survivor.wait_for_step(draw.randrange(1, 40))
    survivor.grow(cluster, 4)
    survivor.end()
    assert {line["world_size"] for line in training_curve(survivor.run.metrics)} == {2, 4}
    check_curve(tiny_home, survivor, stage, exact=False)


@pytest.mark.slow
def test_a_killed_driver(tiny_home: Home, cluster: Cluster, draw: random.Random) -> None:
    stage, step = stage_of(draw), draw.randrange(25, 150)
    cluster.resize(2)
    first = Survivor(tiny_home, "driver", f"zero.stage={stage}")
    first.wait_for_step(step)
    places = first.places()
    first.process.kill()
    first.process.communicate()
    again = Survivor(tiny_home, "driver", f"zero.stage={stage}", resume=True)
    again.end()
    check_curve(tiny_home, again, stage, exact=True)
    assert not any(Path(f"/proc/{place.pid}").exists() for place in places)


@pytest.mark.slow
def test_sigterm(tiny_home: Home, cluster: Cluster, draw: random.Random) -> None:
    stage, step = stage_of(draw), draw.randrange(25, 150)
    cluster.resize(2)
    first = Survivor(tiny_home, "sigterm", f"zero.stage={stage}")
    first.wait_for_step(step)
    first.process.terminate()
    said = first.end(status=130)
    assert "--resume" in said
    result = read_json(first.run.result)
    assert result["status"] == "interrupted"
    assert list((first.run.checkpoints / f"step-{result['step']:06}").glob("COMPLETE"))
    again = Survivor(tiny_home, "sigterm", f"zero.stage={stage}", resume=True)
    again.end()
    check_curve(tiny_home, again, stage, exact=True)


@pytest.mark.slow
@pytest.mark.parametrize("when", ["starting", "standing"])
def test_ctrl_c_that_no_step_follows(tiny_home: Home, cluster: Cluster, draw: random.Random, when: str) -> None:
    """The run ends all the same, at the second Ctrl-C where a rank stands still, and nothing of it stays behind."""
    stage, rank = stage_of(draw), draw.randrange(2)
    cluster.resize(2)
    first = Survivor(tiny_home, when, f"zero.stage={stage}")
    places: list[Place] = []
    if when == "starting":
        first.wait((first.run.logs / "ray").exists, "the start of the workers")
    else:
        first.wait_for_step(draw.randrange(25, 150))
        places = first.places()
        os.kill(places[rank].pid, signal.SIGSTOP)
        first.process.send_signal(signal.SIGINT)
        time.sleep(1)
        assert first.process.poll() is None
    first.process.send_signal(signal.SIGINT)
    first.end(status=130, seconds=30)
    assert read_json(first.run.result)["status"] == "interrupted"
    again = Survivor(tiny_home, when, f"zero.stage={stage}", resume=True)
    again.end()
    check_curve(tiny_home, again, stage, exact=True)
    assert not any(Path(f"/proc/{place.pid}").exists() for place in places)


@pytest.mark.slow
def test_a_drain_notice(tiny_home: Home, cluster: Cluster, draw: random.Random) -> None:
    """The node that hosts a rank goes: a checkpoint at once, one just before, and on with what is left.

    It is marked as one that may go, so rank 0 is on the other.
    """
    stage, step = stage_of(draw), draw.randrange(25, 100)
    cluster.resize(1)
    cluster.resize(2, **{MARKET: "spot"})
    settings = [f"zero.stage={stage}", "cluster.workers={min: 1, max: 2}", "cluster.max_failures=0"]
    survivor = Survivor(tiny_home, "preempted", *settings)
    survivor.wait_for_step(step)
    assert [place.node == cluster.others[-1].node_id for place in survivor.places()] == [False, True]
    cluster.drain(8)
    noticed = time.time()
    survivor.wait_for_event("preempted", 30)
    cluster.resize(1)
    survivor.end()
    at_once = [one for one in survivor.events() if one["event"] == "checkpoint" and one["time"] > noticed]
    assert at_once[0]["time"] - noticed < 4
    stopped = next(one for one in survivor.events() if one["event"] == "preempted")
    assert noticed < stopped["time"] < noticed + 8.5
    lines = list(read_lines(survivor.run.metrics))
    steps = [line["step"] for line in lines if line["kind"] == "train"]
    assert steps == list(range(1, STEPS + 1)), "no step was lost, and none made twice"
    check_curve(tiny_home, survivor, stage, exact=False)


@pytest.mark.slow
def test_a_rank_that_is_stopped(tiny_home: Home, cluster: Cluster, draw: random.Random) -> None:
    stage, step, rank = stage_of(draw), draw.randrange(25, 150), draw.randrange(2)
    cluster.resize(2)
    survivor = Survivor(tiny_home, "stopped", f"zero.stage={stage}", "cluster.stall_seconds=8")
    survivor.wait_for_step(step)
    place = survivor.places()[rank]
    os.kill(place.pid, signal.SIGSTOP)
    stopped = time.time()
    survivor.wait_for_event("stalled", 30)
    print(f"explained after {time.time() - stopped:.1f} s: {survivor.named('stalled')}")
    (text,) = survivor.named("stalled")
    assert f"rank {rank} (pid {place.pid} on" in text
    assert "SIGSTOP" in text
    assert f"rank {1 - rank} (pid" in text
    assert "waits for the others in" in text
    output = survivor.end()
    assert output.count("SIGSTOP") == 1, output
    check_curve(tiny_home, survivor, stage, exact=True)


@pytest.mark.slow
def test_out_of_memory(tiny_home: Home, cluster: Cluster, draw: random.Random) -> None:
    """A rank's address space is closed: its next large allocation fails, as on a machine without memory left."""
    stage, rank = stage_of(draw), draw.randrange(2)
    step = 20 * draw.randrange(1, 5) + 5  # beside no save: its thread would find no memory to start, and hang
    cluster.resize(2)
    settings = [f"zero.stage={stage}", "train.micro_batch_size=6", "cluster.max_failures=0"]
    survivor = Survivor(tiny_home, "memory", *settings)
    survivor.wait_for_step(step)
    resource.prlimit(survivor.places()[rank].pid, resource.RLIMIT_AS, (1 << 20, 1 << 20))
    survivor.end()
    (text,) = survivor.named("out_of_memory")
    assert f"[rank {rank}]" in text
    assert "3 rows a pass instead of 6" in text
    curve = training_curve(survivor.run.metrics)
    assert {line["rows"] for line in curve} == {12}
    assert curve[-1]["micro_batch_size"] == 3
    check_curve(tiny_home, survivor, stage, exact=False)


BUG = """
from transformers import LlamaForCausalLM


class Buggy(LlamaForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        self.get_input_embeddings().register_forward_pre_hook(look)


def look(module, inputs):
    if (inputs[0] == TILDE).any():
        raise ValueError("this text is unlucky")
"""


@pytest.mark.slow
def test_a_bug_of_the_user(tiny_home: Home, cluster: Cluster, draw: random.Random) -> None:
    """A model with code of its own that raises at one row: twice at the same step, and the run is ended."""
    cluster.resize(2)
    tilde = read_json(tiny_home.folder / "model" / "tokenizer.json")["model"]["vocab"]["~"]
    tiny.make_model(tiny_home.folder / "buggy")
    (tiny_home.folder / "buggy" / "buggy.py").write_text(BUG.replace("TILDE", str(tilde)))
    path = tiny_home.folder / "buggy" / "config.json"
    config = {**read_json(path), "auto_map": {"AutoModelForCausalLM": "buggy.Buggy"}}
    path.write_text(json.dumps(config))
    settings = [f"zero.stage={stage_of(draw)}", "model.source=./buggy", "model.trust_remote_code=true"]
    survivor = Survivor(tiny_home, "bug", *settings, "cluster.max_failures=10", "checkpoint.every.steps=1")
    output, errors = survivor.process.communicate(timeout=600)
    assert survivor.process.returncode == 5, output + errors
    assert errors.count("this text is unlucky") == 1
    assert f"the same error twice after step {survivor.step:,}" in errors
    assert "[rank " in errors
    assert "Traceback" not in errors
    assert read_json(survivor.run.result)["status"] == "failed"
    assert sum("workers" in one for one in survivor.events()) == 2

"""Searches over trials that are sharded runs of their own: nothing waits for ever, nothing is left, nothing is lost."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from distft.orchestrate.train.places import read_places
from distft.runs import Run, read_json, read_lines, training_curve
from distft.tuning.trials import Trial, read_trials
from tests.distributed import tiny
from tests.integration.conftest import Home
from tests.integration.test_survive import Cluster

pytestmark = [pytest.mark.ray, pytest.mark.timeout(1500)]

JOB = """\
model: {source: ./model, dtype: fp32}
task: {kind: language_modeling}
data: {source: ./corpus.jsonl, max_tokens: 64, overlong: split, splits: {validation: 0.1, test: 0.1}}
train: {epochs: 2, batch_size: 8, learning_rate: 1.0e-3}
zero: {stage: 2}
cluster: {workers: 2}
track: {tensorboard: false}
search:
  space:
    train.learning_rate: {log_uniform: [1.0e-5, 1.0e-1]}
    train.batch_size: {choice: [4, 8, 16]}
  trials: 4
  workers_per_trial: 1
"""

ADAPTER = "model.adapter={kind: lora, rank: 4}"

WATCH = """
import json, sys, time
import psutil, ray
from ray.util.placement_group import placement_group_table
ray.init(address=sys.argv[1], log_to_driver=False, logging_level="ERROR")
while True:
    groups = [one for one in placement_group_table().values() if one["state"] != "REMOVED"]
    workers = 0
    for process in psutil.process_iter(["cmdline", "ppid"]):
        line = " ".join(process.info["cmdline"] or [])
        if line.startswith("ray::RayTrainWorker"):
            try:
                workers += sys.argv[2] in " ".join(psutil.Process(process.info["ppid"]).cmdline())
            except psutil.Error:
                pass
    print(json.dumps({"time": time.time(), "groups": len(groups), "workers": workers}), flush=True)
    time.sleep(0.2)
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    made = Cluster(tmp_path_factory.mktemp("r"))
    try:
        made.resize(2)
        yield made
    finally:
        made.ray.shutdown()


@pytest.fixture(scope="module")
def searching(tmp_path_factory: pytest.TempPathFactory, cluster: Cluster) -> Home:
    folder = tmp_path_factory.mktemp("search")
    tiny.make(folder)
    (folder / "search.yaml").write_text(JOB)
    return Home(folder, cluster.ray.address)


class Watched:
    """What a search holds of the cluster, looked at from outside five times a second."""

    def __init__(self, cluster: Cluster, path: Path) -> None:
        self.path = path
        self.process = subprocess.Popen(
            [sys.executable, "-c", WATCH, cluster.ray.address, str(cluster.folder)], stdout=path.open("w")
        )

    def __enter__(self) -> Watched:
        until = time.time() + 60
        while not self.looks():
            assert time.time() < until, "nothing is seen of the cluster"
            time.sleep(0.2)
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()

    def looks(self) -> list[dict[str, Any]]:
        return list(read_lines(self.path))

    def most(self, what: str) -> int:
        return max(look[what] for look in self.looks())

    def wait_until_free(self, seconds: float = 20) -> None:
        until = time.time() + seconds
        while (last := self.looks()[-1])["groups"] or last["workers"]:
            assert time.time() < until, f"left behind: {last}"
            time.sleep(0.2)


def trials_of(home: Home, name: str) -> list[Trial]:
    return read_trials(Run(home.folder / "runs" / name).trials)


def told(trial: Trial) -> tuple[Any, ...]:
    """What must come out again; a trial that is stopped makes a step or two until it hears of it."""
    return trial.id, trial.params, trial.status, trial.values, trial.tokens if trial.status == "finished" else None


def test_trials_share_the_cluster_and_leave_nothing_behind(searching: Home, cluster: Cluster, tmp_path: Path) -> None:
    with Watched(cluster, tmp_path / "looks.jsonl") as watched:
        output, _ = searching.distft("search", "search.yaml", "--name", "shared", timeout=900)
        watched.wait_until_free()
        assert watched.most("groups") == 2, "two trials at the same time, and never more"
        assert watched.most("workers") == 2
    run, trials = Run(searching.folder / "runs" / "shared"), trials_of(searching, "shared")
    assert [trial.id for trial in trials] == ["000", "001", "002", "003"]
    assert trials[0].params == {"train.learning_rate": 1e-3, "train.batch_size": 8}, "the job's own settings come first"
    assert {trial.status for trial in trials} <= {"finished", "stopped"}
    best = min(trials, key=lambda trial: trial.objective or 9.9)
    assert best.checkpoint is not None
    assert Path(best.checkpoint).is_dir()
    assert f"Best {best.id}" in output
    found = read_json(run.search / "summary.json")
    assert found["best"]["params"] == best.params
    assert found["tokens"] == sum(trial.tokens for trial in trials) <= found["tokens_without_stopping"]
    for picture in ("learning-curves.png", "parallel-coordinates.png"):
        assert (run.search / picture).read_bytes().startswith(b"\x89PNG")
    for trial in trials:  # each is a run like any other, of rows in the same order
        curve = training_curve(run.search / "trials" / trial.id / "metrics.jsonl")
        assert sum(line["tokens"] for line in curve) == trial.tokens
        assert len(trial.values) >= 1
    assert read_json(run.result)["test_looks"] == []


def test_more_workers_than_the_cluster_has_are_refused_before_a_trial(searching: Home) -> None:
    settings = ("--name", "large", "--set", "search.workers_per_trial=3")
    _, errors = searching.distft("search", "search.yaml", *settings, status=4)
    assert "search.workers_per_trial: 3 workers of 1 CPU are asked for, and the cluster holds 2" in errors
    assert not Run(searching.folder / "runs" / "large").trials.exists()


@pytest.mark.slow
def test_a_search_fails_when_no_trial_succeeds(searching: Home) -> None:
    space = json.dumps({"model.adapter.alpha": {"choice": [1e37, 1e38]}})  # beyond fp32 at the second step
    settings = ("--set", f"search.space={space}", "--set", "search.algorithm=grid", "--set", ADAPTER)
    _, errors = searching.distft("search", "search.yaml", "--name", "none", *settings, status=5, timeout=300)
    assert "no trial succeeded" in errors
    assert "trial 000" in errors


@pytest.mark.slow
def test_the_run_goes_on_from_the_best_trial(searching: Home) -> None:
    """Its curve is the trial's and goes on on more workers; what is exported and scored is that model."""
    searching.distft("search", "search.yaml", "--name", "grown", timeout=900)
    searching.distft("run", "search.yaml", "--name", "grown", "--resume", timeout=900)
    run = Run(searching.folder / "runs" / "grown")
    best = read_json(run.result)["search"]
    trial = next(one for one in trials_of(searching, "grown") if one.id == best["id"])
    curve = training_curve(run.metrics)
    theirs = training_curve(run.search / "trials" / trial.id / "metrics.jsonl")
    assert curve[: len(theirs)] == theirs
    assert [line["step"] for line in curve] == list(range(1, curve[-1]["steps"] + 1))
    assert read_json(run.result)["status"] == "finished"
    searching.distft("audit", "grown")
    alone = [f"--set={name}={value}" for name, value in trial.params.items()]
    searching.distft("train", "search.yaml", "--name", "alone", "--set", "search=null", *alone, timeout=300)
    for mine, line in zip(curve, searching.curve("alone"), strict=True):
        assert mine["sample_digest"] == line["sample_digest"]
        assert mine["loss"] == pytest.approx(line["loss"], rel=1e-5)


@pytest.mark.slow
def test_the_best_that_were_stopped_are_promoted(searching: Home) -> None:
    """They go on from their checkpoints, on more workers, to the end of their own schedule."""
    searching.distft("search", "search.yaml", "--name", "promoted", "--set", "search.promote={top: 4, workers: 2}")
    run = Run(searching.folder / "runs" / "promoted")
    sizes = set()
    for trial in trials_of(searching, "promoted"):
        curve = training_curve(run.search / "trials" / trial.id / "metrics.jsonl")
        assert trial.status == "finished"
        assert [line["step"] for line in curve] == list(range(1, curve[-1]["steps"] + 1))
        sizes.add(tuple(dict.fromkeys(line["world_size"] for line in curve)))
    assert (1, 2) in sizes, "ASHA stopped none of them"


@pytest.fixture(params=[1, 2], ids=["one-node", "two-nodes"])
def place(
    request: pytest.FixtureRequest, cluster: Cluster, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Cluster]:
    """Two CPUs: of one node of a second Ray cluster on this machine, or of two nodes; no dashboard."""
    if request.param == 2:
        yield cluster
        return
    made = Cluster(tmp_path_factory.mktemp("r"), cpus=2)
    try:
        yield made
    finally:
        made.ray.shutdown()


@pytest.mark.slow
def test_twelve_trials_of_two_workers(searching: Home, place: Cluster, tmp_path: Path) -> None:
    """One trial at a time, half of them stopped early, nothing held beyond it, no time lost between them."""
    name = tmp_path.name
    settings = ["--set", "search.trials=12", "--set", "search.workers_per_trial=2"]
    home = Home(searching.folder, place.ray.address)
    with Watched(place, tmp_path / "looks.jsonl") as watched:
        began = time.time()
        home.distft("search", "search.yaml", "--name", name, *settings, timeout=1400)
        seconds = time.time() - began
        watched.wait_until_free()
        assert watched.most("groups") == 1
        assert watched.most("workers") == 2
    trials = trials_of(searching, name)
    assert len(trials) == 12
    stopped = sum(trial.status == "stopped" for trial in trials)
    work = sum(trial.seconds for trial in trials)
    print(f"{stopped} of 12 stopped; {seconds:.0f} s for trials of {work:.0f} s together: {seconds / work:.3f}")
    assert stopped >= 6
    assert seconds <= 1.15 * work


@pytest.mark.slow
def test_a_search_goes_on_after_its_driver_was_killed(searching: Home) -> None:
    settings = ["--set", "search.trials=5", "--set", "search.workers_per_trial=2", "--set", "train.epochs=8"]
    searching.distft("search", "search.yaml", "--name", "undisturbed", *settings, timeout=900)
    process = searching.start("search", "search.yaml", "--name", "killed", *settings)
    until = time.time() + 600
    while sum(trial.status != "running" for trial in trials_of(searching, "killed")) < 2:
        assert time.time() < until
        time.sleep(0.5)
    current = Run(searching.folder / "runs" / "killed" / "search" / "trials" / "002")
    while len(training_curve(current.metrics)) < 5:
        assert time.time() < until
        time.sleep(0.2)
    process.kill()
    process.communicate()
    before = trials_of(searching, "killed")
    assert [trial.status for trial in before].count("running") == 1
    searching.distft("search", "search.yaml", "--name", "killed", "--resume", *settings, timeout=900)
    after, undisturbed = trials_of(searching, "killed"), trials_of(searching, "undisturbed")
    for trial in before:
        if trial.status != "running":
            assert trial in after, "no finished trial is repeated"
    assert [told(trial) for trial in after] == [told(trial) for trial in undisturbed]


@pytest.mark.slow
def test_a_population_takes_turns_and_the_poor_go_on_from_the_good(
    searching: Home, cluster: Cluster, tmp_path: Path
) -> None:
    """Two CPUs for four trials of one worker; the driver is killed once; the run goes on from the best."""
    space = {"train.learning_rate": {"log_uniform": [1e-5, 1e-1]}, "train.weight_decay": {"choice": [0.0, 0.1]}}
    settings = [
        *("--set", f"search.space={json.dumps(space)}", "--set", "search.scheduler={kind: pbt, grace: 0.3}"),
        *("--set", "search.workers_per_trial=1"),
    ]
    run = Run(searching.folder / "runs" / "pbt")
    with Watched(cluster, tmp_path / "looks.jsonl") as watched:
        process = searching.start("search", "search.yaml", "--name", "pbt", *settings)
        until = time.time() + 600
        while not any(trial.exploits for trial in trials_of(searching, "pbt")):
            assert time.time() < until
            assert process.poll() is None, process.communicate()
            time.sleep(0.2)
        process.kill()
        process.communicate()
        watched.wait_until_free(60)
        searching.distft("search", "search.yaml", "--name", "pbt", "--resume", *settings, timeout=900)
        watched.wait_until_free()
        assert watched.most("groups") == 2
        assert watched.most("workers") == 2
    trials = trials_of(searching, "pbt")
    assert [trial.status for trial in trials] == ["finished"] * 4
    exploits = [(trial, exploit) for trial in trials for exploit in trial.exploits]
    assert len(exploits) == 3, "one of four at each of three rungs"
    folders = {trial.id: Run(run.search / "trials" / trial.id) for trial in trials}
    last = max(exploit.step for _, exploit in exploits)
    trial, exploit = next(one for one in exploits if one[1].step == last)
    mine, theirs = (training_curve(folders[name].metrics) for name in (trial.id, exploit.trial))
    assert [line["step"] for line in mine] == list(range(1, mine[-1]["steps"] + 1))
    alike = ["loss", "sample_digest", "learning_rate"]
    assert [[line[key] for key in alike] for line in mine[:last]] == [
        [line[key] for key in alike] for line in theirs[:last]
    ]
    assert mine[last]["loss"] == pytest.approx(theirs[last]["loss"], rel=1e-6), "measured before the first update"
    assert trial.params != next(one for one in trials if one.id == exploit.trial).params
    assert read_json(folders[trial.id].resolved)["job"]["train"]["learning_rate"] == trial.params["train.learning_rate"]
    assert len({sum(line["tokens"] for line in training_curve(folder.metrics)) for folder in folders.values()}) == 1
    searching.distft("search", "search.yaml", "--name", "pbt-undisturbed", *settings, timeout=900)
    assert [told(trial) for trial in trials_of(searching, "pbt-undisturbed")] == [told(trial) for trial in trials]
    searching.distft("run", "search.yaml", "--name", "pbt", "--resume", *settings, timeout=900)
    best = read_json(run.result)["search"]
    curve = training_curve(run.metrics)
    assert curve == training_curve(folders[best["id"]].metrics), "nothing is trained again"
    assert read_json(run.result)["status"] == "finished"
    searching.distft("audit", "pbt")


@pytest.mark.slow
def test_trials_that_fail_are_told_and_the_search_goes_on(searching: Home, cluster: Cluster) -> None:
    """One raises, one's loss is not a number, one's worker is killed, one runs out of memory."""
    space = {
        "model.adapter.alpha": {"choice": [32, 33, 1e38]},  # the last is beyond fp32 at the second step
        "data.max_tokens": {"choice": [512, 64]},  # which is too short for some documents
    }
    settings = [
        *("--set", f"search.space={json.dumps(space)}", "--set", "search.algorithm=grid"),
        *("--set", "search.scheduler={kind: none}", "--set", "search.workers_per_trial=2"),
        *("--set", "search.trials=6", "--set", "train.epochs=150", "--set", "train.micro_batch_size=4"),
        *("--set", ADAPTER, "--set", "data.overlong=error", "--set", "data.max_tokens=512"),
    ]
    process = searching.start("search", "search.yaml", "--name", "failing", *settings)
    run = Run(searching.folder / "runs" / "failing")

    def ranks(trial: str) -> list[int]:
        """The processes of a trial that is at work."""
        its = Run(run.search / "trials" / trial)
        until = time.time() + 300
        while len(training_curve(its.metrics)) < 10:
            assert time.time() < until
            assert process.poll() is None
            time.sleep(0.1)
        return [place.pid for place in read_places(its, read_json(its.group))]

    os.kill(ranks("000")[1], signal.SIGKILL)
    for pid in ranks("002"):
        psutil.Process(pid).rlimit(psutil.RLIMIT_AS, (1 << 20, 1 << 20))
    output, errors = process.communicate(timeout=900)
    assert process.returncode == 0, errors
    by_id = {trial.id: trial for trial in trials_of(searching, "failing")}
    assert {name: trial.status for name, trial in by_id.items()} == {
        "000": "finished",
        "001": "failed",
        "002": "finished",
        "003": "failed",
        "004": "failed",
        "005": "failed",
    }
    assert "data.overlong" in (by_id["001"].reason or "")
    assert "nan" in (by_id["004"].reason or "") or "inf" in (by_id["004"].reason or "")
    events = [line["event"] for line in read_lines(run.search / "trials" / "000" / "metrics.jsonl") if "event" in line]
    assert "lost" in events
    events = [line["event"] for line in read_lines(run.search / "trials" / "002" / "metrics.jsonl") if "event" in line]
    assert "out_of_memory" in events
    assert "raylet" not in output + errors

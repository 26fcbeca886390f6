"""Dividing the batch, and what is left to auto."""

from __future__ import annotations

import math
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distft.config import Job
from distft.errors import JobError
from distft.plan.batch import BatchPlan
from distft.plan.choices import (
    Choice,
    choose,
    choose_activation_checkpointing,
    choose_compile,
    choose_dtype,
    choose_sequence_parallel,
    choose_stage,
)
from distft.plan.devices import named
from distft.plan.hardware import Hardware, peak_flops, share_of_peak
from tests.unit.test_plan_memory import LLAMA_8B, SMOLLM2

SLOW_CPU = Hardware("cpu", "an old CPU", fast_bf16=False)
FAST_CPU = Hardware("cpu", "a new CPU", fast_bf16=True)
H100 = Hardware.of(named("H100"))

sizes = st.integers(1, 40)


@given(batch=sizes, world=st.integers(1, 9), micro=st.integers(1, 12), rows=st.integers(1, 40))
def test_every_row_is_in_one_micro_batch_of_one_rank(batch: int, world: int, micro: int, rows: int) -> None:
    rows = min(rows, batch)
    plan = BatchPlan.solve(batch, world, micro, 128, "cpu")
    indices = np.arange(100, 100 + rows)
    parts = [plan.micro_batches(indices, rank) for rank in range(world)]
    assert {len(mine) for mine in parts} == {plan.accumulation(rows)}
    dealt = [part for passes in zip(*parts, strict=True) for part in passes]
    assert np.concatenate(dealt).tolist() == indices.tolist()
    assert all(len(part) <= plan.micro_batch_size for part in dealt)


@given(batch=sizes, world=st.integers(1, 9), micro=st.integers(1, 12))
def test_no_pass_is_empty_on_every_rank(batch: int, world: int, micro: int) -> None:
    plan = BatchPlan.solve(batch, world, micro, 128, "cpu")
    last = [plan.micro_batches(np.arange(batch), rank)[-1] for rank in range(world)]
    assert sum(map(len, last)) > 0


@pytest.mark.parametrize(("world", "micro"), [(1, 2), (2, 2), (3, 2)])
def test_rows_share_a_micro_batch_whatever_the_number_of_workers(world: int, micro: int) -> None:
    plan = BatchPlan.solve(12, world, micro, 128, "cpu")
    parts = [part.tolist() for rank in range(world) for part in plan.micro_batches(np.arange(12), rank)]
    assert sorted(part for part in parts if part) == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9], [10, 11]]


def test_an_uneven_batch_leaves_empty_passes_at_the_end() -> None:
    plan = BatchPlan.solve(7, 3, 2, 128, "cpu")
    assert [part.tolist() for part in plan.micro_batches(np.arange(7), 0)] == [[0, 1], [6]]
    assert [part.tolist() for part in plan.micro_batches(np.arange(7), 1)] == [[2, 3], []]
    assert plan.accumulation(3) == 1


def test_auto_fills_a_pass_with_tokens_and_says_so() -> None:
    plan = BatchPlan.solve(32, 2, "auto", 512, "cpu")
    assert plan.micro_batch_size == 4
    assert "2,048 tokens" in plan.reason
    assert BatchPlan.solve(32, 2, "auto", 4096, "cpu").micro_batch_size == 1


def test_a_micro_batch_is_no_more_than_a_workers_share() -> None:
    plan = BatchPlan.solve(4, 2, 8, 128, "cpu")
    assert plan.micro_batch_size == 2
    assert "share" in plan.reason


def test_sizes_must_be_positive() -> None:
    with pytest.raises(JobError, match=r"train\.micro_batch_size"):
        BatchPlan.solve(4, 2, 0, 128, "cpu")


def test_dtype_follows_the_device_and_gives_the_reason() -> None:
    assert choose_dtype("auto", FAST_CPU).value == "bf16"
    slow = choose_dtype("auto", SLOW_CPU)
    assert slow.value == "fp32"
    assert "an old CPU" in slow.reason
    assert choose_dtype("bf16", SLOW_CPU).value == "bf16"
    with pytest.raises(JobError, match="fp16"):
        choose_dtype("fp16", FAST_CPU)


def test_stage_and_recomputation() -> None:
    assert choose_stage("auto", 1).value == 0
    assert choose_stage("auto", 2).value == 2
    assert choose_stage(3, 1).value == 3
    assert choose_activation_checkpointing(True).value is True
    assert choose_activation_checkpointing("auto").value is False


def job(tmp_path: Path, *settings: str) -> Job:
    values = {"model": {"source": "m"}, "task": {"kind": "language_modeling"}, "data": {"source": "d.txt"}}
    return Job.from_values(values, tmp_path, settings)


@pytest.mark.parametrize(
    ("settings", "hardware", "stage", "seconds", "compiler", "value", "reason"),
    [
        ([], FAST_CPU, 2, 3600.0, True, True, "about 60 min of passes"),
        ([], FAST_CPU, 2, 120.0, True, False, "about 2 min of passes"),
        ([], FAST_CPU, 2, None, True, False, "not known"),
        ([], FAST_CPU, 2, 3600.0, False, False, "C++ compiler"),
        ([], FAST_CPU, 3, 3600.0, True, False, "ZeRO-3"),
        ([], Hardware("cuda", "B200", True), 2, 3600.0, True, False, "not measured on B200"),
        (["data.packing=false"], FAST_CPU, 2, 3600.0, True, False, "not packed"),
        (["model.adapter={kind: lora, quantize: nf4}"], FAST_CPU, 2, 3600.0, True, False, "four-bit"),
        (["train.compile=false"], FAST_CPU, 2, 3600.0, True, False, "set in the job"),
        (["train.compile=true", "data.packing=false"], FAST_CPU, 2, 1.0, True, True, "set in the job"),
    ],
)
def test_layers_are_compiled_where_the_run_is_long_enough(
    tmp_path: Path,
    settings: list[str],
    hardware: Hardware,
    stage: int,
    seconds: float | None,
    compiler: bool,
    value: bool,
    reason: str,
) -> None:
    choice = choose_compile(job(tmp_path, *settings), hardware, stage, seconds, compiler=compiler)
    assert choice.value is value
    assert reason in choice.reason


def test_what_cannot_be_compiled_is_refused_where_it_was_asked_for(tmp_path: Path) -> None:
    asked = job(tmp_path, "train.compile=true")
    with pytest.raises(JobError, match="ZeRO-3") as refused:
        choose_compile(asked, FAST_CPU, 3, None, compiler=True)
    assert refused.value.where == "train.compile"
    with pytest.raises(JobError, match=r"C\+\+ compiler"):
        choose_compile(asked, FAST_CPU, 2, None, compiler=False)


def test_the_length_of_a_run_follows_from_its_tokens_model_and_workers(tmp_path: Path) -> None:
    def decided(tokens: int, workers: int) -> bool:
        made = choose(job(tmp_path), workers, replace(FAST_CPU, memory_bytes=10**12), shape=LLAMA_8B, run_tokens=tokens)
        return made.compile.value

    assert [decided(tokens, 8) for tokens in (1_000, 100_000_000)] == [False, True]
    assert [decided(20_000, workers) for workers in (1, 64)] == [True, False]


def test_gradients_are_sent_once_a_step_where_that_shows(tmp_path: Path) -> None:
    """ZeRO 2 sends them in every pass. On GPUs of one node the passes hide that, and memory counts."""
    machine = replace(FAST_CPU, memory_bytes=10**12)
    settings = "train.micro_batch_size=1", "train.batch_size=8", "data.max_tokens=256"
    several = job(tmp_path, *settings)

    def stage(one: Job, hardware: Hardware, workers: int, **more: int) -> int:
        return choose(one, workers, hardware, shape=SMOLLM2, **more).stage.value

    found = choose(several, 2, machine, shape=SMOLLM2, workers_per_node=2).stage
    assert found.value == 1
    assert "not in each of its 4 passes" in found.reason
    assert stage(job(tmp_path, *settings[1:], "train.micro_batch_size=4"), machine, 2, workers_per_node=2) == 2
    assert stage(several, H100, 8, workers_per_node=8) == 2
    assert stage(several, machine, 2, workers_per_node=2, micro_batch_limit=1) == 2  # memory ran out before
    assert stage(several, replace(machine, memory_bytes=6 * 10**9), 2, workers_per_node=2) == 2  # it would now
    assert stage(job(tmp_path, *settings, "zero.stage=2"), machine, 2, workers_per_node=2) == 2


@pytest.mark.parametrize(
    ("settings", "workers", "per_node", "value", "reason"),
    [
        ([], 16, 8, 1, "set in the job"),
        (["zero.hpz_partition_size=auto"], 16, 8, 8, "the workers of a node"),
        (["zero.hpz_partition_size=auto"], 8, 8, 1, "one node"),
        (["zero.hpz_partition_size=auto"], 2, 1, 1, "a node of its own"),
        (["zero.hpz_partition_size=auto"], 12, 8, 1, "cannot be divided into groups of 8"),
        (["zero.hpz_partition_size=auto", "train.batch_size=4", "train.micro_batch_size=1"], 4, 2, 1, "weights once"),
        (["zero.hpz_partition_size=4", "cluster.workers={min: 2, max: 8}"], 8, 8, 4, "set in the job"),
        (["zero.hpz_partition_size=4", "cluster.workers={min: 2, max: 8}"], 6, 8, 1, "groups of 4"),
        (["zero.hpz_partition_size=4", "cluster.workers={min: 2, max: 8}"], 4, 8, 1, "these are all workers"),
    ],
)
def test_nodes_hold_the_weights_once_more_where_that_saves_their_network(
    tmp_path: Path, settings: list[str], workers: int, per_node: int, value: int, reason: str
) -> None:
    usual = ["zero.stage=3", "train.batch_size=64", "train.micro_batch_size=1", f"cluster.workers={workers}"]
    made = choose(job(tmp_path, *usual, *settings), workers, H100, shape=SMOLLM2, workers_per_node=per_node)
    assert made.hpz.value == value
    assert reason in made.hpz.reason
    assert made.record()["zero.hpz_partition_size"] == {"value": value, "reason": made.hpz.reason}


def test_a_second_copy_of_the_weights_makes_way_for_what_needs_the_memory(tmp_path: Path) -> None:
    settings = "zero={stage: 3, hpz_partition_size: auto}", "train.batch_size=64", "train.micro_batch_size=1"
    one = job(tmp_path, *settings, "data.max_tokens=4096", "train.activation_checkpointing=true")
    fits = choose(one, 8, H100, shape=LLAMA_8B, workers_per_node=4).hpz
    assert fits.value == 4
    tight = replace(H100, memory_bytes=31 * 10**9)
    left = choose(one, 8, tight, shape=LLAMA_8B, workers_per_node=4).hpz
    assert (left.value, left.reason[:7]) == (1, "memory:")
    small = job(tmp_path, "zero.hpz_partition_size=auto", *settings[1:])
    told = choose(small, 8, H100, shape=SMOLLM2, workers_per_node=4).record()
    assert told["zero.stage"]["value"] == 1
    assert told["zero.hpz_partition_size"] == {"value": 1, "reason": "at stage 1 every worker has all weights"}


@given(batch=st.integers(1, 40), groups=st.integers(1, 5), sharing=st.integers(1, 4), micro=st.integers(1, 6))
def test_workers_that_share_rows_are_given_the_same(batch: int, groups: int, sharing: int, micro: int) -> None:
    plan = BatchPlan(batch, groups * sharing, micro, "asked for", sharing)
    alone = BatchPlan(batch, groups, micro, "asked for")
    indices = np.arange(batch)
    for rank in range(groups * sharing):
        given = plan.micro_batches(indices, rank)
        expected = alone.micro_batches(indices, rank // sharing)
        assert [one.tolist() for one in given] == [one.tolist() for one in expected]


@pytest.mark.parametrize(
    ("asked", "workers", "size", "reason"),
    [
        (1, 2, 1, "set in the job"),
        (3, 3, 3, "set in the job"),
        (3, 6, 3, "set in the job"),
        (3, 4, 1, "4 workers cannot be divided into groups of 3"),
        (9, 6, 3, "6 workers cannot be divided into groups of 9"),
    ],
)
def test_rows_are_shared_as_far_as_the_workers_allow(asked: int, workers: int, size: int, reason: str) -> None:
    assert choose_sequence_parallel(asked, workers, SMOLLM2) == Choice(size, reason)


def test_heads_that_cannot_be_divided_are_told_with_what_can() -> None:
    with pytest.raises(JobError, match=r"9 attention heads, 3 of keys, cannot be divided between 2 workers") as refused:
        choose_sequence_parallel(2, 2, SMOLLM2)
    assert refused.value.fix == "choose 3, 9 or remove it"


def test_layers_of_shared_rows_are_not_compiled(tmp_path: Path) -> None:
    one = job(tmp_path, "train.sequence_parallel_size=2", "cluster.workers=2")
    made = choose_compile(one, FAST_CPU, 2, 3600.0, compiler=True)
    assert (made.value, made.reason[:28]) == (False, "the exchange between workers")


def test_threads_are_told_with_what_they_leave_idle(tmp_path: Path) -> None:
    def told(cpus: int, workers: int) -> tuple[int, str]:
        one = job(tmp_path, f"cluster.resources_per_worker.CPU={cpus}")
        found = choose(one, workers, replace(FAST_CPU, cores=8), workers_per_node=workers).record()
        decided = found["cluster.resources_per_worker.CPU"]
        return decided["value"], decided["reason"]

    assert told(4, 2) == (4, "a thread for each CPU that a worker holds")
    threads, reason = told(1, 2)
    assert threads == 1
    assert "with 4 the workers would use all 8 cores" in reason
    assert "more than the 8 cores" in told(8, 2)[1]
    gpus = choose(job(tmp_path), 1, Hardware("cuda", "B200", True)).record()
    assert "cluster.resources_per_worker.CPU" not in gpus


def test_workers_of_a_machine_share_its_peak() -> None:
    """Their threads are busy at the same time: each has its part of what they reach together, a core's at least."""
    threads, many = torch.get_num_threads(), 8 * (os.cpu_count() or 1)
    machine = replace(FAST_CPU, cores=many)
    alone, of_many = (share_of_peak(machine, torch.float32, workers, 1) for workers in (1, many))
    assert of_many < alone / 2  # 8 if nothing else ran: so many threads are no faster than the cores that are there
    crowded = share_of_peak(replace(machine, cores=1), torch.float32, many, 1)
    assert crowded > alone / 4
    assert torch.get_num_threads() == threads


def test_a_machine_has_room_for_some_workers_at_once() -> None:
    machine = replace(FAST_CPU, cores=4)
    assert [machine.at_once(threads) for threads in (1, 2, 4)] == [4, 2, 1]
    assert machine.at_once(8) == 1  # its rate was measured with all of its threads
    assert replace(machine, cores=None).at_once(1) == Hardware("cuda", "B200", True).at_once(8) == math.inf


def test_peaks_are_looked_up_or_measured() -> None:
    h100 = Hardware("cuda", "NVIDIA H100 80GB HBM3", fast_bf16=True)
    assert peak_flops(h100, torch.bfloat16).flops == 989e12
    measured = peak_flops(Hardware.detect(), torch.float32)
    assert 1e9 < measured.flops < 1e15


@pytest.mark.parametrize(
    ("vendor", "flags", "fast"),
    [
        ("AuthenticAMD", "avx2 avx512f avx512_bf16", True),
        ("AuthenticAMD", "avx2 avx512f", False),
        ("GenuineIntel", "avx2 avx512f avx512_bf16 amx_bf16 amx_tile", True),
        ("GenuineIntel", "avx2 avx512f avx512_bf16", False),
    ],
)
def test_bf16_is_chosen_where_it_is_faster(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, vendor: str, flags: str, fast: bool
) -> None:
    """Intel's bf16 instructions outside matrix tiles are slower than fp32's."""
    told = tmp_path / "cpuinfo"
    told.write_text(f"processor\t: 0\nvendor_id\t: {vendor}\nflags\t\t: fpu {flags} sse\n\nprocessor\t: 1\n")
    monkeypatch.setattr("distft.plan.hardware.Path", lambda _: told)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("distft.plan.hardware._first_gpu", lambda: None)
    for seen in (Hardware.detect(), Hardware.glance()):
        assert seen.fast_bf16 is fast
        assert choose_dtype("auto", seen).value == ("bf16" if fast else "fp32")

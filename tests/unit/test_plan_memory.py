"""The planner's formulas: ZeRO's, what they must do, and what is refused."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distft.config import Job
from distft.errors import CapacityError, JobError
from distft.model.shape import Shape, llama_tensors, of_config
from distft.plan import calibration
from distft.plan.batch import BatchPlan
from distft.plan.calibration import Correction, Observation, kind_of
from distft.plan.choices import choose
from distft.plan.devices import DEVICES, known, named
from distft.plan.estimate import Workload, first_setup, whole_plan
from distft.plan.fit import Room, Subject, setup_of
from distft.plan.hardware import Hardware
from distft.plan.memory import Memory, memory
from distft.plan.setup import Setup
from distft.plan.speed import Collective, Rates, collectives, head_exchange, step_time


def llama(layers: int, hidden: int, heads: int, kv_heads: int, intermediate: int, vocabulary: int) -> Shape:
    sizes = {
        "layers": layers,
        "hidden": hidden,
        "heads": heads,
        "kv_heads": kv_heads,
        "intermediate": intermediate,
        "vocabulary": vocabulary,
    }
    tensors = llama_tensors(**sizes)
    config = {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": intermediate,
        "vocab_size": vocabulary,
    }
    return of_config(config, tensors, 0, "here")


LLAMA_8B = llama(32, 4096, 32, 8, 14336, 128256)
#: Of 163 M parameters: the head's are its own here.
SMOLLM2 = llama(30, 576, 9, 3, 1536, 49152)
SETUP = Setup("cuda", "bf16", 0, "none", False, 8, 1, 64, 2, 4096, 4096, False)


def need(**changes: object) -> Memory:
    return memory(LLAMA_8B, LLAMA_8B.parameters, replace(SETUP, **changes))  # type: ignore[arg-type]


def model_states(found: Memory) -> int:
    parts = found.moments["update"]
    return sum(parts[name] for name in ("weights", "fp32 weights", "moments", "gradients") if name in parts)


def test_a_known_model_has_its_parameters() -> None:
    assert LLAMA_8B.parameters == 8_030_261_248  # meta-llama/Llama-3.1-8B, the sum of its safetensors


@pytest.mark.parametrize(
    ("stage", "bytes_each"), [(0, 16.0), (1, 2 + 4 + 12 / 8), (2, 2 + 4 / 8 + 12 / 8), (3, (2 + 4 + 12) / 8)]
)
def test_model_states_follow_zero(stage: int, bytes_each: float) -> None:
    """ZeRO's 2 + 2 + 12 bytes, split as in its figure 1; DeepSpeed sums gradients in fp32 from stage 1 on."""
    assert model_states(need(stage=stage)) / LLAMA_8B.parameters == pytest.approx(bytes_each, rel=1e-6)


def test_activations_grow_with_tokens_and_shrink_by_recomputing() -> None:
    plain = need().moments["forward pass"]["activations"]
    assert need(micro_batch_size=4).moments["forward pass"]["activations"] == 2 * plain
    assert need(checkpointing=True).moments["forward pass"]["activations"] < plain / 10


@pytest.mark.parametrize(
    ("stage", "dtype", "kept"), [(0, "fp32", 0), (1, "bf16", 4), (1, "fp32", 0), (2, "bf16", 0), (3, "fp32", 4 / 8)]
)
def test_gradients_stay_between_steps_where_deepspeed_keeps_them(stage: int, dtype: str, kept: float) -> None:
    found = need(stage=stage, dtype=dtype, micro_batch_size=8).moments["forward pass"]
    assert found["gradients"] == pytest.approx(kept * LLAMA_8B.parameters, rel=1e-6)


def test_recomputing_and_unrepeated_keys_take_less() -> None:
    def kept(**changes: object) -> float:
        """Bytes of a token and layer."""
        return need(**changes).moments["forward pass"]["activations"] / (32 * SETUP.pass_tokens)

    assert kept() - kept(compiled=True) == 2 * (4 + 2) * 4096 + 2 * 2 * 14336
    assert kept(device_type="cpu") == kept(compiled=True)
    assert kept(masked=True) - kept() == 2 * 2 * (32 - 8) * 128 + 2 * SETUP.row_tokens


def test_a_head_that_is_more_than_a_product_keeps_all_logits() -> None:
    capped = memory(replace(LLAMA_8B, plain_head=False), LLAMA_8B.parameters, SETUP)
    logits = 2 * 4096 * 128256 * 2
    assert capped.moments["forward pass"]["loss"] > 4 * logits > need().moments["forward pass"]["loss"]


def test_a_mask_is_counted_where_texts_are_not_attended_one_by_one(tmp_path: Path) -> None:
    how = [("cuda", "bf16", True), ("cuda", "fp32", True), ("cuda", "fp32", False), ("cpu", "fp32", True)]
    masked = [
        setup_of(
            job(tmp_path, data={"source": "rows.txt", "max_tokens": 4096, "packing": packing}),
            Hardware(device_type, "any", fast_bf16=True),
            BatchPlan(8, 1, 1, "asked for"),
            dtype=dtype,
            stage=0,
            nodes=1,
            hpz=1,
        ).masked
        for device_type, dtype, packing in how
    ]
    assert masked == [False, True, False, False]


def test_offloading_moves_the_optimizer_to_the_host() -> None:
    kept, moved = need(stage=2), need(stage=2, offload="cpu")
    share = 12 * LLAMA_8B.parameters // 8
    assert kept.device_bytes - moved.device_bytes >= share
    assert moved.host_bytes >= share


@given(stage=st.integers(0, 3), workers=st.integers(1, 64), again=st.booleans(), micro=st.integers(1, 4))
def test_more_workers_and_recomputing_never_take_more(stage: int, workers: int, again: bool, micro: int) -> None:
    setting = {"stage": stage, "micro_batch_size": micro, "batch_size": 1024}
    one = need(workers=workers, checkpointing=again, **setting)
    assert need(workers=workers + 1, checkpointing=again, **setting).device_bytes <= one.device_bytes
    assert need(workers=workers, checkpointing=True, **setting).device_bytes <= one.device_bytes
    assert one.checkpoint_bytes == 12 * LLAMA_8B.parameters
    assert all(size >= 0 for parts in one.moments.values() for size in parts.values())


def test_a_ring_takes_what_alpha_and_beta_say() -> None:
    reduced = Collective(4, 2, 8_000, 1)
    assert reduced.sent == 2 * 3 / 4 * 8_000
    assert reduced.seconds(alpha=1e-3, beta=1e6) == pytest.approx(2 * 3 * (1e-3 + 2_000 / 1e6))


def test_stages_send_what_zero_says() -> None:
    """2 Psi up to stage 2 and 3 Psi at stage 3 (ZeRO, section 7), in fp32 gradients and bf16 weights."""
    elements = LLAMA_8B.parameters
    sent = [
        sum(one.rounds * one.bytes * one.times for one in collectives(LLAMA_8B, elements, replace(SETUP, stage=stage)))
        for stage in range(4)
    ]
    passes = SETUP.passes
    assert sent[0] == 2 * 4 * elements
    assert sent[1] == (2 * 4 + 2) * elements
    assert sent[2] == (2 * 4 * passes + 2) * elements
    assert sent[3] == passes * (2 * 2 + 4) * elements
    on_cpu = replace(SETUP, stage=3, device_type="cpu")  # gloo's reduce-scatter is an all-reduce
    assert sum(one.rounds * one.bytes * one.times for one in collectives(LLAMA_8B, elements, on_cpu)) == (
        passes * (2 * 2 + 2 * 4) * elements
    )


def test_a_second_copy_of_the_weights_stays_off_the_network() -> None:
    """ZeRO++, section 3.2: after a step's first pass weights come from the same node, which holds them once more."""
    without = replace(SETUP, stage=3, workers=16, nodes=2)
    setup = replace(without, hpz=8)
    elements = LLAMA_8B.parameters
    whole, again, scattered = collectives(LLAMA_8B, elements, setup)
    assert (whole.ranks, again.ranks, scattered.ranks) == (16, 8, 16)
    assert (whole.times, again.times) == (1, 2 * setup.passes - 1)
    assert whole.bytes == again.bytes == 2 * elements
    more = need(stage=3, workers=16, nodes=2, hpz=8).device_bytes - need(stage=3, workers=16, nodes=2).device_bytes
    assert more == 2 * elements // 8
    rates = replace(Rates.of(named("H100")), network=1e9)
    times = [step_time(LLAMA_8B, elements, each, rates) for each in (without, setup)]
    assert times[1].sending < 0.7 * times[0].sending
    adapter = collectives(LLAMA_8B, elements // 100, setup)
    assert (adapter[0].bytes, adapter[1].times) == (2 * (elements // 100), 2 * setup.passes)  # frozen: never fetched


def test_ranks_that_share_rows_hold_a_share_of_the_activations_and_exchange_heads() -> None:
    alone, shared = (need(stage=3, sharing=size).moments["forward pass"] for size in (1, 4))
    assert shared["activations"] == alone["activations"] / 4
    assert shared["weights"] == alone["weights"]
    setup = replace(SETUP, sharing=4)
    assert setup.passes == 4 * SETUP.passes
    assert setup.rank_tokens == SETUP.rank_tokens
    exchange = head_exchange(LLAMA_8B, setup)
    tokens, numbers = setup.micro_batch_size * 4096 // 4, 2 * (32 + 8) * 128  # queries, keys, values and what is found
    assert exchange.bytes == LLAMA_8B.layers * tokens * numbers * 2
    assert exchange.times == 2 * setup.passes
    assert head_exchange(LLAMA_8B, replace(setup, sharing=16)).bytes == LLAMA_8B.layers * tokens // 4 * 96 * 128 * 2
    rates = Rates.of(named("H100"))
    alone_, shared_ = (step_time(LLAMA_8B, LLAMA_8B.parameters, each, rates) for each in (SETUP, setup))
    assert shared_.compute == pytest.approx(alone_.compute)
    assert shared_.sent_bytes == pytest.approx(alone_.sent_bytes + 0.75 * exchange.bytes * exchange.times)
    assert shared_.waiting >= exchange.seconds(rates.latency[0], rates.link)


def test_arithmetic_bounds_a_step() -> None:
    rates = Rates.of(named("H100"))
    one = step_time(LLAMA_8B, LLAMA_8B.parameters, SETUP, rates)
    again = step_time(LLAMA_8B, LLAMA_8B.parameters, replace(SETUP, checkpointing=True), rates)
    assert 1.2 < again.compute / one.compute < 4 / 3
    far = step_time(LLAMA_8B, LLAMA_8B.parameters, replace(SETUP, nodes=8), rates)
    assert far.sending > one.sending
    assert one.seconds >= one.compute


def test_gradients_are_handled_after_every_pass_on_a_cpu() -> None:
    cpu, rates = replace(SETUP, device_type="cpu", stage=2, micro_batch_size=8), Rates.of_cpu(1e11)
    setups = cpu, replace(cpu, micro_batch_size=2)
    one, more = (step_time(LLAMA_8B, LLAMA_8B.parameters, setup, rates) for setup in setups)
    assert one.handling > 0
    assert more.handling == pytest.approx(4 * one.handling)
    assert one.seconds == one.compute + one.handling + one.update + one.waiting
    alone = replace(cpu, stage=0, workers=1)
    assert step_time(LLAMA_8B, LLAMA_8B.parameters, alone, rates).handling == 0
    assert step_time(LLAMA_8B, LLAMA_8B.parameters, SETUP, Rates.of(named("H100"))).handling == 0


def test_workers_beyond_the_cores_take_turns() -> None:
    """Three workers on two cores: four rows are a pass of all three, and one of a worker that is not crowded."""
    setup = replace(SETUP, device_type="cpu", stage=2, workers=3, batch_size=4, micro_batch_size=1)

    def crowded(setup: Setup) -> tuple[float, float]:
        each = [step_time(LLAMA_8B, LLAMA_8B.parameters, setup, Rates.of_cpu(1e11, cores)) for cores in (2, math.inf)]
        return each[0].compute / each[1].compute, each[0].update / each[1].update

    assert crowded(setup) == pytest.approx((1.25, 1.5))
    assert crowded(replace(setup, batch_size=6)) == pytest.approx((1.5, 1.5))
    assert crowded(replace(setup, sharing=3)) == pytest.approx((1.5, 1.5))
    assert crowded(replace(setup, workers=2)) == (1, 1)
    assert crowded(replace(setup, workers=4, nodes=2)) == (1, 1)


@pytest.mark.parametrize(
    ("said", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100-PCIe"),
        ("NVIDIA A100-SXM4-40GB", "A100-40GB"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA A10G", "A10G"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA GH200 480GB", "GH200"),
        ("NVIDIA B200", "B200"),
        ("AMD Instinct MI300X OAM", "MI300X"),
        ("AMD-Instinct-MI300X-OAM", "MI300X"),
        ("Tesla K80", None),
    ],
)
def test_devices_are_known_by_what_drivers_call_them(said: str, name: str | None) -> None:
    found = known(said)
    assert (found and found.name) == name


def test_each_device_is_known_by_its_own_name_and_has_a_source() -> None:
    for device in DEVICES:
        assert named(device.name) is device
        assert device.source
    with pytest.raises(JobError, match="H100"):
        named("Abacus")


def job(tmp_path: Path, **sections: object) -> Job:
    (tmp_path / "rows.txt").write_text("text")
    values = {
        "model": {"source": "model"},
        "task": {"kind": "language_modeling"},
        "data": {"source": "rows.txt", "max_tokens": 4096, "overlong": "split"},
        "train": {"batch_size": 32},
    }
    return Job.from_values({**values, **sections}, tmp_path)


def test_what_fits_is_decided_as_before(tmp_path: Path) -> None:
    roomy = replace(Hardware.of(named("B200")), memory_bytes=10**13)
    before = choose(job(tmp_path), 8, Hardware("cuda", "B200", True))
    assert choose(job(tmp_path), 8, roomy, shape=LLAMA_8B, workers_per_node=8) == before


def test_what_is_left_open_is_decided_by_memory_with_the_reason(tmp_path: Path) -> None:
    h100 = Hardware.of(named("H100"))
    decided = choose(job(tmp_path), 8, h100, shape=LLAMA_8B, workers_per_node=8)
    assert decided == choose(job(tmp_path), 8, h100, shape=LLAMA_8B, workers_per_node=8)
    assert decided.batch.micro_batch_size < 4
    assert "of 80.0 GB a worker" in decided.batch.reason
    small = choose(job(tmp_path), 8, Hardware.of(named("L40S")), shape=LLAMA_8B, workers_per_node=8)
    assert (small.stage.value, small.batch.micro_batch_size) == (3, 1) or small.activation_checkpointing.value
    room = Room.of(Hardware.of(named("L40S")), 8)
    setup = first_setup(job(tmp_path), Hardware.of(named("L40S")), small, 1)
    assert room is not None
    assert room.holds(memory(LLAMA_8B, LLAMA_8B.parameters, setup))


def test_what_the_job_says_is_not_changed_but_refused(tmp_path: Path) -> None:
    fixed = job(tmp_path, zero={"stage": 2}, train={"micro_batch_size": 4, "activation_checkpointing": False})
    with pytest.raises(CapacityError) as refused:
        choose(fixed, 8, Hardware.of(named("A10G")), shape=LLAMA_8B, workers_per_node=8)
    assert refused.value.exit_status == 4
    assert "24.0 GB" in refused.value.what
    assert "model.adapter" in str(refused.value.fix)


def test_rows_too_long_for_a_device_may_be_shared(tmp_path: Path) -> None:
    train = {"micro_batch_size": 1, "activation_checkpointing": True}
    data, model = {"source": "rows.txt", "max_tokens": 65536}, {"source": "model", "adapter": {"kind": "lora"}}

    def chosen(**more: object) -> int:
        one = job(tmp_path, model=model, data=data, zero={"stage": 3}, cluster={"workers": 8}, train={**train, **more})
        made = choose(one, 8, Hardware.of(named("A10G")), shape=LLAMA_8B, workers_per_node=8)
        return made.sequence_parallel.value

    with pytest.raises(CapacityError) as refused:
        chosen()
    assert "what would fit: train.sequence_parallel_size: 8; or data.max_tokens: 32768" in str(refused.value)
    assert chosen(sequence_parallel_size=8) == 8


def test_offloading_is_decided_by_memory_where_the_job_leaves_it_open(tmp_path: Path) -> None:
    h100, roomy = Hardware.of(named("H100")), replace(Hardware.of(named("B200")), memory_bytes=10**13)
    kept, asked = job(tmp_path), job(tmp_path, zero={"offload": "auto"})
    with pytest.raises(CapacityError) as refused:
        choose(kept, 1, h100, shape=LLAMA_8B)
    assert "zero.offload: cpu" in str(refused.value.fix)
    moved = choose(asked, 1, h100, shape=LLAMA_8B)
    assert (moved.offload.value, moved.stage.value) == ("cpu", 1)
    assert "of 80.0 GB a worker" in moved.offload.reason
    assert first_setup(asked, h100, moved, 1).offload == "cpu"
    assert moved.record()["zero.offload"] == {"value": "cpu", "reason": moved.offload.reason}
    assert choose(asked, 8, roomy, shape=LLAMA_8B, workers_per_node=8).offload.value == "none"
    with pytest.raises(CapacityError):  # stage 0 is asked for, which splits nothing that could be kept elsewhere
        choose(job(tmp_path, zero={"offload": "auto", "stage": 0}), 1, h100, shape=LLAMA_8B)


def test_one_worker_offloads_at_a_stage_that_can(tmp_path: Path) -> None:
    h100 = Hardware.of(named("H100"))
    assert choose(job(tmp_path, zero={"offload": "cpu"}), 1, h100, shape=LLAMA_8B).stage.value == 1


def test_advice_is_followed_and_helps(tmp_path: Path) -> None:
    lora = {"source": "model", "adapter": {"kind": "lora"}}
    again = {"batch_size": 32, "activation_checkpointing": True}
    found = choose(
        job(tmp_path, model=lora, train=again), 8, Hardware.of(named("A10G")), shape=LLAMA_8B, workers_per_node=8
    )
    assert found.batch.micro_batch_size >= 1


def test_a_cpus_memory_is_shared_by_its_workers(tmp_path: Path) -> None:
    machine = Hardware("cpu", "CPU", True, memory_bytes=100 * 10**9)
    alone, shared = Room.of(machine, 1), Room.of(machine, 4)
    assert alone is not None
    assert shared is not None
    assert alone.total_bytes == 4 * shared.total_bytes
    with pytest.raises(CapacityError, match=r"25\.0 GB"):
        choose(job(tmp_path), 4, machine, shape=LLAMA_8B, workers_per_node=4)


def test_the_whole_plan_marks_what_is_chosen_and_what_does_not_fit(tmp_path: Path) -> None:
    h100 = Hardware.of(named("H100"))
    choices = choose(job(tmp_path), 8, h100, shape=LLAMA_8B, workers_per_node=8)
    made = whole_plan(
        job(tmp_path),
        Subject.of(job(tmp_path), LLAMA_8B),
        first_setup(job(tmp_path), h100, choices, 1),
        Rates.of(named("H100")),
        Room.of(h100, 8),
        seen=(),
        workload=Workload.of(job(tmp_path), 3200, 3200 * 4096),
        price=2.0,
    )
    assert [one.setup.stage for one in made if one.chosen] == [choices.stage.value]
    stage_0 = made[0]
    assert not stage_0.fits
    chosen = next(one for one in made if one.chosen)
    assert chosen.hours is not None
    assert chosen.hours == pytest.approx(100 * chosen.step_seconds / 3600)
    assert chosen.money == pytest.approx(chosen.hours * 2.0 * 8)
    json.dumps([one.as_json() for one in made], allow_nan=False)


def test_texts_that_share_a_row_cost_what_they_attend_to(tmp_path: Path) -> None:
    hardware = Hardware.of(named("H100"))
    choices = choose(job(tmp_path), 8, hardware, shape=LLAMA_8B, workers_per_node=8)
    setup, subject = first_setup(job(tmp_path), hardware, choices, 1), Subject.of(job(tmp_path), LLAMA_8B)
    whole, parted = (
        next(
            one.step_seconds
            for one in whole_plan(
                job(tmp_path),
                subject,
                setup,
                Rates.of(named("H100")),
                Room.of(hardware, 8),
                seen=(),
                workload=Workload.of(job(tmp_path), 3200, 3200 * 4096, attended),
            )
            if one.chosen
        )
        for attended in (None, 128)
    )
    assert parted < 0.95 * whole


def test_work_is_known_from_prepared_data_or_from_the_job(tmp_path: Path) -> None:
    prepared = Workload.of(job(tmp_path), 100, 100 * 4096 // 2)
    assert (prepared.steps, prepared.fill) == (4, 0.5)
    assert prepared.attended_tokens == 4096
    assert Workload.of(job(tmp_path), 100, 100 * 4096, 512).attended_tokens == 512
    assert Workload.of(job(tmp_path), None, None).steps is None
    assert Workload.of(job(tmp_path, train={"steps": 7, "batch_size": 2}), None, None).tokens == 7 * 2 * 4096


def observed(memory: float, seconds: float = 3.0, kind: str = "one kind", predicted: float = 1e9) -> Observation:
    return Observation(predicted, memory, 2.0, seconds, kind)


def test_runs_correct_the_next_prediction(tmp_path: Path) -> None:
    path = tmp_path / "calibration.json"
    for measured in (1.1e9, 1.2e9, 9e9):
        calibration.remember(path, "CPU, bf16", observed(measured))
    learnt = calibration.correction(calibration.read(path, "CPU, bf16"), "another kind")
    assert learnt == Correction(1.2, 1.5, 3)
    assert learnt.bytes(2.5e9, process=0.5e9) == pytest.approx(0.5e9 + 1.2 * 2e9)
    assert calibration.read(path, "another, bf16") == []
    path.write_text("[not json")
    assert calibration.read(path, "CPU, bf16") == []
    calibration.remember(path, "CPU, bf16", observed(1e9))
    assert len(calibration.read(path, "CPU, bf16")) == 1


def test_runs_of_the_same_kind_tell_more_than_all_others(tmp_path: Path) -> None:
    h100 = Hardware.of(named("H100"))
    setup = first_setup(job(tmp_path), h100, choose(job(tmp_path), 8, h100, shape=LLAMA_8B, workers_per_node=8), 1)
    same = kind_of(5, LLAMA_8B.parameters, setup)
    seen = [observed(1.1e9), observed(1.1e9), observed(0.9e9, 8.0, same), observed(1.1e9)]
    assert calibration.correction(seen, same) == Correction(0.9, 4.0, 1)
    # Other texts, which fill rows otherwise, are no other kind.
    assert kind_of(5, LLAMA_8B.parameters, replace(setup, attended_tokens=7, fill=0.5)) == same
    others = [replace(setup, stage=setup.stage - 1), replace(setup, compiled=True), replace(setup, micro_batch_size=9)]
    assert same not in [kind_of(5, LLAMA_8B.parameters, one) for one in others] + [kind_of(4, 5, setup)]


def test_small_models_teach_nothing(tmp_path: Path) -> None:
    path = tmp_path / "calibration.json"
    calibration.remember(path, "CPU", observed(9e6, predicted=1e6))
    assert not path.exists()
    assert calibration.correction([], "any kind") == Correction()


def test_only_the_newest_runs_are_remembered(tmp_path: Path) -> None:
    path = tmp_path / "calibration.json"
    for number in range(calibration.KEPT + 5):
        calibration.remember(path, "CPU", observed(1e9, float(number)))
    kept = calibration.read(path, "CPU")
    assert [one.measured_seconds for one in kept] == [float(n) for n in range(5, calibration.KEPT + 5)]


def test_a_gpu_is_seen_through_its_driver_without_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'NVIDIA H100 80GB HBM3, 81559'\necho 'NVIDIA L4, 23034'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    seen = Hardware.glance()
    assert (seen.device_type, seen.name, seen.memory_bytes) == ("cuda", "NVIDIA H100 80GB HBM3", 81559 * 2**20)
    tool.write_text("#!/bin/sh\necho 'No devices were found'\nexit 6\n")
    assert Hardware.glance().device_type == "cpu"

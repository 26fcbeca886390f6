"""Training on one GPU: MFU, peak memory and the planner's error, with and without each optimisation.

``python benchmarks/gpu.py --minutes 12`` needs a checkout, torch, transformers and psutil; peft for LoRA, DeepSpeed for
ZeRO and Ray for the cases under Ray Train, which are passed over where those are missing. Most cases are measured by
DeepSpeed, as distft trains on one GPU too; beside them stands the reference engine, which needs none. Models are Llamas
with the sizes of real ones and random weights. Each case runs in a process of its own, so that running out of memory
ends that case alone; what is known already is not measured again, so that a run that was cut short goes on.

Tokens are random, in packed rows of 4,096 with documents of 128 to 2,048 tokens, or whole rows of one document.
MFU is of the peak in the maker's data sheet, by the operations that :mod:`distft.plan.speed` counts: attention within
documents, nothing for recomputed activations. Beside it stands the measured rate of a large product of random matrices.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402

from benchmarks.provenance import provenance  # noqa: E402
from distft import engine as engines  # noqa: E402
from distft.model import chunk  # noqa: E402
from distft.model.batch import IGNORED, Batch  # noqa: E402
from distft.model.shape import Shape, llama_tensors, of_config  # noqa: E402
from distft.plan import memory as planned_memory  # noqa: E402
from distft.plan.devices import known  # noqa: E402
from distft.plan.hardware import Hardware, peak_flops  # noqa: E402
from distft.plan.setup import Setup  # noqa: E402
from distft.plan.speed import EFFICIENCY, LATENCY, Rates, flops_per_token, step_time  # noqa: E402
from distft.world import World  # noqa: E402

_SIZES = ("layers", "hidden", "heads", "kv_heads", "intermediate", "vocabulary", "tied")
#: As SmolLM2-135M, Llama 3.2 1B and 3B and Llama 3.1 8B have them; and a small one, by which losses
#: are compared.
MODELS: dict[str, dict[str, Any]] = {
    name: dict(zip(_SIZES, sizes, strict=True))
    for name, sizes in {
        "tiny": (2, 64, 4, 2, 128, 512, True),
        "135M": (30, 576, 9, 3, 1536, 49152, True),
        "1B": (16, 2048, 32, 8, 8192, 128256, True),
        "3B": (28, 3072, 24, 8, 8192, 128256, True),
        "8B": (32, 4096, 32, 8, 14336, 128256, False),
    }.items()
}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
WARM, TIMED, COMPARED = 2, 5, 10
#: How far losses may be from those of fp32 on a CPU: the contract's invariant 2.
TOLERANCE = {"fp32": 1e-5, "bf16": 1e-2}


@dataclass(frozen=True)
class Lora:
    """An adapter as the job file's ``model.adapter`` has it, which pydantic is needed for."""

    rank: int = 16
    alpha: float = 32
    targets: str = "all-linear"
    dropout: float = 0.0
    dora: bool = False
    rslora: bool = False


@dataclass(frozen=True)
class Case:
    """What is run.

    Attributes:
        model: A name in ``MODELS``.
        rows: Of a pass.
        batch_size: Rows of a step.
        tokens: Of a row.
        documents: Whether rows are packed with several, or hold one.
        lora: Whether an adapter is trained, instead of all weights.
        engine: ``plain`` or ``zero`` (DeepSpeed).
        stage: ZeRO's.
        offload: ``none`` or ``cpu``.
        attention: ``varlen`` (text by text, as distft trains), ``sdpa`` (a mask for packed rows), ``flex_attention``
            or ``flash_attention_2``.
        checkpointing: Whether activations are computed again.
        compiled: Whether layers are compiled.
        fused: Whether head and loss are one step.
        chunk_tokens: Tokens whose logits exist at a time in that step.
        dtype: ``bf16`` or ``fp32``.
        ray: Whether it runs as a worker of Ray Train.
    """

    model: str
    rows: int = 1
    batch_size: int = 8
    tokens: int = 4096
    documents: bool = True
    lora: bool = False
    engine: str = "plain"
    stage: int = 0
    offload: str = "none"
    attention: str = "varlen"
    checkpointing: bool = False
    compiled: bool = False
    fused: bool = True
    chunk_tokens: int = chunk.GPU_TOKENS
    dtype: str = "bf16"
    ray: bool = False

    @property
    def name(self) -> str:
        """Everything that tells it from others, in words."""
        words = [self.model, "lora" if self.lora else "full", f"{self.rows}x{self.tokens}", self.attention]
        words += [] if self.documents else ["whole"]
        words += [f"zero{self.stage}"] if self.engine == "zero" else []
        words += ["offload"] if self.offload == "cpu" else []
        words += ["recomputed"] if self.checkpointing else []
        words += ["compiled"] if self.compiled else []
        words += [] if self.fused else ["unfused"]
        words += [f"chunk{self.chunk_tokens}"] if self.chunk_tokens != chunk.GPU_TOKENS else []
        words += ["fp32"] if self.dtype == "fp32" else []
        return "-".join(words + (["ray"] if self.ray else []))

    @property
    def shape(self) -> Shape:
        """Of its model, for the planner; without a fused loss it is as if the head were not plain."""
        sizes = MODELS[self.model]
        config = {
            "num_hidden_layers": sizes["layers"],
            "hidden_size": sizes["hidden"],
            "num_attention_heads": sizes["heads"],
            "num_key_value_heads": sizes["kv_heads"],
            "intermediate_size": sizes["intermediate"],
            "vocab_size": sizes["vocabulary"],
        }
        return replace(of_config(config, llama_tensors(**sizes), 0, self.model), plain_head=self.fused)

    @property
    def trained(self) -> int:
        """Parameters: LoRA, arXiv 2106.09685, section 4.1."""
        matrices = self.shape.matrices.values()
        return sum(Lora().rank * sum(one) for one in matrices) if self.lora else self.shape.parameters


def cases() -> list[Case]:
    """All of them, those that tell most first: device time is short."""
    tiny = Case("tiny", rows=2, batch_size=4, tokens=256)
    same = [
        replace(tiny, dtype="fp32", attention="sdpa"),
        replace(tiny, attention="sdpa"),
        tiny,
        replace(tiny, attention="flex_attention"),
        replace(tiny, fused=False),
        replace(tiny, engine="zero"),
        replace(tiny, engine="zero", stage=3),
    ]
    one, three = Case("1B", rows=4, batch_size=16, engine="zero"), Case("3B", rows=2, engine="zero")
    eight, small = Case("8B", rows=2, lora=True, engine="zero"), Case("135M", rows=4, batch_size=16, engine="zero")
    goals = [replace(each, documents=False, compiled=how) for how in (False, True) for each in (one, three, eight)]
    ways = [
        one,
        replace(one, attention="sdpa"),
        *(replace(one, chunk_tokens=tokens) for tokens in (64, 4096)),
        replace(one, compiled=True),
        replace(one, fused=False),
        replace(one, checkpointing=True),
        replace(one, attention="flex_attention"),
        replace(one, attention="flash_attention_2"),
        replace(one, rows=1),
        small,
        replace(small, compiled=True),
        three,
        replace(three, attention="sdpa"),
        replace(three, compiled=True),
        replace(three, checkpointing=True, rows=4),
        eight,
        replace(eight, attention="sdpa"),
        replace(eight, compiled=True),
        replace(eight, checkpointing=True, rows=4),
        *(replace(each, lora=True) for each in (small, one, three)),
    ]
    reference = [replace(each, engine="plain", documents=False) for each in (one, three, eight)]
    stages = [replace(each, stage=stage) for each in (small, one, three, eight) for stage in (1, 3)]
    offload = [replace(each, stage=stage, offload="cpu") for each in (one, three) for stage in (2, 3)]
    offload.append(replace(eight, lora=False, rows=1, checkpointing=True, stage=3, offload="cpu"))
    return [*same, *goals, *reference, *ways, *stages, *offload, replace(one, ray=True)]


def lacking(case: Case) -> str | None:
    """The package that a case needs and that is not here, or None."""
    needed = {
        "peft": case.lora,
        "deepspeed": case.engine == "zero",
        "flash_attn": case.attention == "flash_attention_2",
        "ray": case.ray,
    }
    return next((name for name, used in needed.items() if used and importlib.util.find_spec(name) is None), None)


def build(case: Case, device: torch.device) -> torch.nn.Module:
    """The loss model with random weights; a large one is made on the device, which draws them in no time."""
    import transformers

    from distft.model.loss import LossModel

    transformers.logging.set_verbosity_error()
    shape = case.shape
    config = transformers.LlamaConfig(
        num_hidden_layers=shape.layers,
        hidden_size=shape.hidden,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        intermediate_size=shape.intermediate,
        vocab_size=shape.vocabulary,
        tie_word_embeddings=shape.tied,
        max_position_embeddings=case.tokens,
        rope_theta=500000.0,
    )
    torch.manual_seed(1)
    dtype, attention = DTYPES[case.dtype], "sdpa" if case.attention == "varlen" else case.attention
    with torch.device("cpu" if case.model == "tiny" else device):  # equal small ones are drawn everywhere
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
        if case.lora:
            from distft.model.adapter import add_adapter

            add_adapter(model, Lora(), 1)  # type: ignore[arg-type]
    made = LossModel(
        model.to(device), activation_checkpointing=case.checkpointing, fused=case.fused, compiled=case.compiled
    )
    if case.attention == "sdpa":
        model.set_attn_implementation("sdpa")
    elif made.by_segments != (case.attention == "varlen"):
        raise RuntimeError("texts are not attended one by one on this device: its kernel did not do what a mask does")
    return made


def documents(case: Case, draw: np.random.Generator) -> list[int]:
    """Lengths of the documents of a row."""
    if not case.documents:
        return [case.tokens]
    low, high = min(128, case.tokens // 8), min(2048, case.tokens // 2)
    lengths: list[int] = []
    while sum(lengths) < case.tokens:
        lengths.append(min(int(draw.integers(low, high + 1)), case.tokens - sum(lengths)))
    return lengths


def batches(case: Case, steps: int) -> Iterator[list[tuple[Batch, list[int]]]]:
    """The passes of each step, with the lengths of their documents; every token but a document's first is a target."""
    draw = np.random.default_rng(1)
    for _ in range(steps):
        made = []
        for _ in range(case.batch_size // case.rows):
            rows = [documents(case, draw) for _ in range(case.rows)]
            ids = torch.from_numpy(draw.integers(0, case.shape.vocabulary, (case.rows, case.tokens)))
            positions = torch.stack([torch.cat([torch.arange(length) for length in row]) for row in rows])
            labels = torch.full_like(ids, IGNORED)
            labels[:, :-1] = ids[:, 1:]
            labels[:, :-1][positions[:, 1:] == 0] = IGNORED
            made.append((Batch(ids, positions, labels), [length for row in rows for length in row]))
        yield made


def measure(case: Case, device_type: str) -> dict[str, Any]:
    """Trains for some steps; figures, and what the planner says of them."""
    device = torch.device(device_type)
    chunk.GPU_TOKENS = case.chunk_tokens
    began = time.perf_counter()
    settings = engines.Settings(DTYPES[case.dtype], case.stage, case.offload, max_grad_norm=1.0)
    engine = engines.open(build(case, device), settings, World(), case.engine)  # type: ignore[arg-type]
    opened = time.perf_counter()
    seconds, losses, lengths = [], [], []
    count = COMPARED if case.model == "tiny" else WARM + TIMED
    for passes in batches(case, count):
        lengths += [length for _, row in passes for length in row]
        start = time.perf_counter()
        losses.append(step(engine, passes, 1e-3 if case.model == "tiny" else 1e-5))
        seconds.append(time.perf_counter() - start)
    peak = engine.peak_memory_bytes()
    attended = round(sum(length**2 for length in lengths) / sum(lengths))
    figures = {
        "step_seconds": statistics.median(seconds[WARM:]),
        "first_step_seconds": seconds[0],
        "opening_seconds": opened - began,
        "peak_memory_bytes": peak,
        "losses": losses,
        "all_step_seconds": seconds,
        "kernels": kernels(engine, next(batches(case, 1)), device_type),
    }
    return {**figures, **against_plan(case, figures, attended, device_type)}


def step(engine: engines.Engine, passes: Sequence[tuple[Batch, list[int]]], learning_rate: float) -> float:
    """One update; the mean loss of the targets. The norm that it ends with is waited for."""
    targets = sum(batch.supervised_tokens for batch, _ in passes)
    losses = []
    for number, (batch, _) in enumerate(passes):
        losses.append(engine.forward_backward(batch, 1 / targets, last=number == len(passes) - 1, seed=number))
    engine.step(learning_rate)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return float(torch.cat(losses).sum()) / targets


def kernels(
    engine: engines.Engine, passes: Sequence[tuple[Batch, list[int]]], device_type: str
) -> list[dict[str, Any]]:
    """Where a step's time goes: the kernels that take most, with their shares, and the device's idle time as one."""
    from torch.profiler import ProfilerActivity, profile

    on_gpu = device_type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as seen:
        start = time.perf_counter()
        step(engine, passes, 0.0)
        whole = 1e6 * (time.perf_counter() - start)
    took = {one.key: one.self_device_time_total if on_gpu else one.self_cpu_time_total for one in seen.key_averages()}
    busy = sum(took.values())
    most = sorted(took.items(), key=lambda one: -one[1])[:12]
    told = [{"kernel": name[:120], "share": round(micros / max(busy, 1), 4)} for name, micros in most]
    return [{"kernel": "(none: share of the profiled step)", "share": round(max(0.0, 1 - busy / whole), 4)}, *told]


def setup_of(case: Case, attended: int, device_type: str) -> Setup:
    """The case as the planner takes it."""
    return Setup(
        device_type=device_type,
        dtype=case.dtype,
        stage=case.stage,
        offload=case.offload,
        checkpointing=case.checkpointing,
        workers=1,
        nodes=1,
        batch_size=case.batch_size,
        micro_batch_size=case.rows,
        row_tokens=case.tokens,
        attended_tokens=attended,
        masked=case.documents and case.attention == "sdpa",
    )


def against_plan(case: Case, figures: dict[str, Any], attended: int, device_type: str) -> dict[str, Any]:
    """MFU, and the planner's figures for this case with their errors, predicted over measured less one."""
    hardware, shape, trained = Hardware.detect(), case.shape, case.trained
    setup = setup_of(case, attended, device_type)
    peak = peak_flops(hardware, DTYPES[case.dtype])
    rates = Rates.of_cpu(peak.flops)
    if device_type == "cuda":
        listed = known(hardware.name)
        unknown = Rates(peak.flops, EFFICIENCY["cuda"], 1e12, 32e9, 1e9, LATENCY["cuda"])
        rates = unknown if listed is None else Rates.of(listed, case.dtype)
    predicted = {
        "peak_memory_bytes": planned_memory.memory(shape, trained, setup).device_bytes,
        "step_seconds": step_time(shape, trained, setup, rates).seconds,
    }
    flops = flops_per_token(shape, trained, attended)
    rate = case.batch_size * case.tokens / figures["step_seconds"]
    product = product_flops(device_type, DTYPES[case.dtype])
    return {
        "parameters": shape.parameters,
        "trained": trained,
        "attended_tokens": attended,
        "flops_per_token": flops,
        "tokens_per_second": rate,
        "mfu": rate * flops / peak.flops,
        "peak": asdict(peak),
        "share_of_measured_product": rate * flops / product,
        "product_flops": product,
        "predicted": predicted,
        "error": {name: value / figures[name] - 1 for name, value in predicted.items()},
    }


def product_flops(device_type: str, dtype: torch.dtype) -> float:
    """Operations a second of a product of random matrices, which takes more power than one of ones: the median."""
    size = 8192 if device_type == "cuda" else 512
    one, other = (torch.randn(size, size, device=device_type, dtype=dtype) for _ in range(2))
    seconds = []
    for _ in range(12):
        start = time.perf_counter()
        one @ other
        if device_type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / statistics.median(seconds[2:])


def alone(case: Case, device_type: str) -> dict[str, Any]:
    """Measures a case in this process; what became of it, as plain values."""
    try:
        return under_ray(case, device_type) if case.ray else measure(case, device_type)
    except torch.OutOfMemoryError as error:
        need = planned_memory.memory(case.shape, case.trained, setup_of(case, case.tokens, device_type))
        has = Hardware.detect().memory_bytes
        planned = {"planned_bytes": need.device_bytes, "device_has_bytes": has}
        return {"failed": "out of memory", "said": str(error).splitlines()[0][:300], **planned}


def under_ray(case: Case, device_type: str) -> dict[str, Any]:
    """The same as the one worker of a Ray Train group, as distft's own workers are."""
    import ray.train
    from ray.train.torch import TorchTrainer

    with tempfile.TemporaryDirectory() as storage:
        told = Path(storage) / "figures.json"  # without a checkpoint Ray Train hands no metrics back
        given = asdict(case)

        def work() -> None:
            from benchmarks import gpu

            told.write_text(json.dumps(gpu.measure(gpu.Case(**given), device_type)))

        scaling = ray.train.ScalingConfig(num_workers=1, use_gpu=device_type == "cuda")
        TorchTrainer(work, scaling_config=scaling, run_config=ray.train.RunConfig(storage_path=storage)).fit()
        found: dict[str, Any] = json.loads(told.read_text())
    return found


def run(case: Case, device_type: str, seconds: float) -> dict[str, Any]:
    """A case in a process of its own, ended when its time is over."""
    command = [sys.executable, __file__, "--one", json.dumps(asdict(case)), "--device", device_type]
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    changed = {"PYTHONPATH": paths} | ({} if device_type == "cuda" else {"CUDA_VISIBLE_DEVICES": ""})
    try:
        done = subprocess.run(
            command, env={**os.environ, **changed}, capture_output=True, text=True, timeout=seconds, check=False
        )
    except subprocess.TimeoutExpired:
        return {"failed": "no time", "said": f"it was ended after {seconds:.0f} s"}
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        return {"failed": "error", "said": done.stderr[-1500:]}
    found: dict[str, Any] = json.loads(lines[-1])
    return found


def wanted(known_already: dict[str, Any], chosen: Sequence[Case], *, again: bool) -> Iterator[Case]:
    """The cases that are still to be measured: one that ran, or ran out of memory, is known."""
    for case in chosen:
        found = known_already.get(case.name)
        if again or found is None or found.get("failed") not in (None, "out of memory"):
            yield case


def compare(results: dict[str, Any], reference: Sequence[float]) -> None:
    """Writes how far each small case's losses are from the reference's into it: the largest relative difference."""
    for found in results.values():
        if found["case"]["model"] == "tiny" and "losses" in found:
            pairs = zip(found["losses"], reference, strict=True)
            found["from_reference"] = max(abs(loss / other - 1) for loss, other in pairs)
            found["equal"] = found["from_reference"] <= TOLERANCE[found["case"]["dtype"]]


def as_table(results: dict[str, Any]) -> str:
    """Markdown."""
    lines = [
        "| case | tokens/s | MFU | of a measured product | step s (planned) | peak GB (planned) | losses |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, one in results.items():
        if "failed" in one:
            need = f"({one['planned_bytes'] / 1e9:.1f})" if "planned_bytes" in one else ""
            lines.append(f"| {name} | {one['failed']} | | | | {need} | |")
            continue
        error, planned = one["error"], one["predicted"]
        off = f"{one['from_reference']:.0e} off{'' if one['equal'] else ': NOT EQUAL'}" if "equal" in one else ""
        lines.append(
            f"| {name} | {one['tokens_per_second']:,.0f} | {one['mfu']:.1%} | {one['share_of_measured_product']:.1%} "
            f"| {one['step_seconds']:.3f} ({planned['step_seconds']:.3f}, {error['step_seconds']:+.0%}) "
            f"| {one['peak_memory_bytes'] / 1e9:.1f} ({planned['peak_memory_bytes'] / 1e9:.1f}, "
            f"{error['peak_memory_bytes']:+.0%}) | {off} |"
        )
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    """Of the command line."""
    made = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    made.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    made.add_argument("--minutes", type=float, default=60, help="no case is begun after them, and one is ended then")
    made.add_argument("--only", nargs="*", default=[], metavar="WORD", help="cases whose names hold one of these")
    made.add_argument("--again", action="store_true", help="measure what is known too")
    made.add_argument("--list", action="store_true", help="print the names of the cases")
    made.add_argument("--out", type=Path, help="[benchmarks/baselines/gpu-DEVICE.json]")
    made.add_argument("--one", help=argparse.SUPPRESS)  # a case as JSON: what a child process runs
    return made


def main(words: Sequence[str] | None = None) -> None:
    """Runs the cases, writing after each, and prints the table."""
    arguments = parser().parse_args(words)
    if arguments.one:
        print(json.dumps(alone(Case(**json.loads(arguments.one)), arguments.device)))
        return
    chosen = [case for case in cases() if not arguments.only or any(word in case.name for word in arguments.only)]
    if arguments.list:
        print("\n".join(case.name for case in chosen))
        return
    end = time.monotonic() + 60 * arguments.minutes
    name = torch.cuda.get_device_name() if arguments.device == "cuda" else "cpu"
    listed = known(name)
    word = listed.name if listed else "-".join(name.split())
    out = arguments.out or ROOT / "benchmarks" / "baselines" / f"gpu-{word}.json"
    document: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {"device": name, "results": {}}
    results: dict[str, Any] = document["results"]
    facts = provenance(("peft", "triton", "flash_attn"))
    for case in wanted(results, chosen, again=arguments.again):
        missing = lacking(case)
        left = end - time.monotonic()
        if missing is None and left < 10:
            continue
        found = {"failed": f"no {missing}"} if missing else run(case, arguments.device, left)
        results[case.name] = {"case": asdict(case), "provenance": facts, **found}
        if any(one["case"]["model"] == "tiny" and "losses" in one for one in results.values()):
            document.setdefault("reference", run(cases()[0], "cpu", 300)["losses"])
            compare(results, document["reference"])
        out.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
        print(as_table({case.name: results[case.name]}).splitlines()[-1], flush=True)
    print(as_table(results))


if __name__ == "__main__":
    main()

"""The planner against tables that others have published: predicted tokens a second beside theirs, with the error.

``python -m benchmarks.published``. Nothing is run. Each row is predicted twice: from the device's data sheet and the
one efficiency that the planner takes for all GPUs; and with that of the first row of its table, so that what is
left is how time grows with devices. Rows that train in ways that distft has not (tensor and pipeline parallel) are
predicted as if they were sharded data parallel.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from distft.config.sections import AdapterSection
from distft.model.shape import Shape, llama_tensors, of_config
from distft.plan.devices import named
from distft.plan.setup import Setup
from distft.plan.speed import EFFICIENCY, Rates, step_time

ROOT = Path(__file__).parents[1]

LLM_FOUNDRY = "mosaicml/llm-foundry c90b9b3, scripts/train/benchmarking/README.md, H100 80GB BF16"
TORCHTITAN = (
    "pytorch/torchtitan 31a17bf, benchmarks/llama3_h100_202412_torchtitan.md, tables 1 and 3; on H100s of 96 GB HBM2e, "
    "2.4 TB/s and 500 W, which are predicted as SXM ones of 700 W"
)
NEMO = "NVIDIA NeMo AutoModel performance summary, 2025-10-02, fine-tuning (LoRA), DGX-H100"


@dataclass(frozen=True)
class Published:
    """A row of a published table.

    Attributes:
        table: Where it is from.
        what: How the model was trained.
        model: Its name in :data:`SHAPES`.
        devices: H100s, 8 in a node.
        tokens: Of a row.
        micro_batch: Rows of a pass on a device.
        passes: Passes of a step.
        tokens_per_second: By each device, as published.
        adapter: Whether it is LoRA.
        checkpointing: Whether all activations were computed again.
        stage: The ZeRO stage that does the same.
        gradient_bytes: Of a gradient that is sent.
        reason: Why the prediction may be further off than 20 %; empty: it may not.
    """

    table: str
    what: str
    model: str
    devices: int
    tokens: int
    micro_batch: int
    passes: int
    tokens_per_second: float
    adapter: bool = False
    checkpointing: bool = False
    stage: int = 3
    gradient_bytes: int = 2
    reason: str = ""


def llama(layers: int, hidden: int, heads: int, kv_heads: int, intermediate: int, vocabulary: int) -> Shape:
    """A Llama of these sizes."""
    sizes = {
        "layers": layers,
        "hidden": hidden,
        "heads": heads,
        "kv_heads": kv_heads,
        "intermediate": intermediate,
        "vocabulary": vocabulary,
    }
    config = {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": intermediate,
        "vocab_size": vocabulary,
    }
    return of_config(config, llama_tensors(**sizes), 0, "published")


def mpt(layers: int, hidden: int, heads: int, vocabulary: int, positions: int) -> Shape:
    """An MPT of these sizes: GPT-2's layers without biases, embeddings tied, positions learnt."""
    tensors: dict[str, tuple[int, ...]] = {"wte.weight": (vocabulary, hidden), "wpe.weight": (positions, hidden)}
    for layer in range(layers):
        tensors |= {
            f"blocks.{layer}.attn.Wqkv.weight": (3 * hidden, hidden),
            f"blocks.{layer}.attn.out_proj.weight": (hidden, hidden),
            f"blocks.{layer}.ffn.up_proj.weight": (4 * hidden, hidden),
            f"blocks.{layer}.ffn.down_proj.weight": (hidden, 4 * hidden),
            f"blocks.{layer}.norm_1.weight": (hidden,),
            f"blocks.{layer}.norm_2.weight": (hidden,),
        }
    tensors["norm_f.weight"] = (hidden,)
    config = {"n_layers": layers, "d_model": hidden, "n_heads": heads, "vocab_size": vocabulary}
    return of_config(config, tensors, 0, "published")


SHAPES = {
    "MPT-7B": mpt(32, 4096, 32, 50432, 2048),
    "Llama 3.1 8B": llama(32, 4096, 32, 8, 14336, 128256),
    "Llama 3 70B": llama(80, 8192, 64, 8, 28672, 128256),
}

_SPLIT_OTHERWISE = (
    "trained with tensor parallel 2 and pipeline parallel 4, whose exchanges in every layer and bubbles are not in the "
    "model; the authors reach 18 % of the peak"
)

ROWS = (
    *(
        Published(LLM_FOUNDRY, "FSDP", "MPT-7B", devices, 2048, 6, 1, speed)
        for devices, speed in ((8, 10643), (128, 10475), (256, 10119), (512, 9670))
    ),
    Published(
        TORCHTITAN,
        "FSDP, compiled, part of the activations again",
        "Llama 3.1 8B",
        8,
        8192,
        2,
        1,
        6667,
        gradient_bytes=4,
    ),
    Published(
        TORCHTITAN,
        "FSDP, compiled, part of the activations again",
        "Llama 3.1 8B",
        128,
        8192,
        2,
        1,
        6514,
        gradient_bytes=4,
    ),
    Published(TORCHTITAN, "FSDP, part of the activations again", "Llama 3.1 8B", 8, 8192, 2, 1, 5762, gradient_bytes=4),
    Published(
        TORCHTITAN, "FSDP, part of the activations again", "Llama 3.1 8B", 128, 8192, 2, 1, 5605, gradient_bytes=4
    ),
    *(
        Published(NEMO, "LoRA, TP 2, PP 4", "Llama 3 70B", *how, adapter=True, reason=_SPLIT_OTHERWISE)
        for how in ((8, 4096, 1, 4, 608.42), (16, 4096, 1, 2, 640.95))
    ),
)


@dataclass(frozen=True)
class Row:
    """A published row and its predictions, in tokens a second of each device; an error is predicted / published - 1.

    Attributes:
        published: It.
        predicted: From the data sheet.
        error: Its error.
        scaled: With the efficiency of the first row of the same kind; None for that row.
        scaled_error: Its error.
    """

    published: Published
    predicted: float
    error: float
    scaled: float | None
    scaled_error: float | None


def predict(row: Published, efficiency: float) -> float:
    """Tokens a second of each device, at an efficiency."""
    shape = SHAPES[row.model]
    trained = shape.trained(AdapterSection(kind="lora", rank=8)) if row.adapter else shape.parameters
    setup = Setup(
        device_type="cuda",
        dtype="bf16",
        stage=row.stage,
        offload="none",
        checkpointing=row.checkpointing,
        workers=row.devices,
        nodes=-(-row.devices // 8),
        batch_size=row.devices * row.micro_batch * row.passes,
        micro_batch_size=row.micro_batch,
        row_tokens=row.tokens,
        attended_tokens=row.tokens,
        masked=False,
    )
    rates = replace(Rates.of(named("H100")), efficiency=efficiency)
    seconds = step_time(shape, trained, setup, rates, row.gradient_bytes).seconds
    return setup.step_tokens / seconds / row.devices


def matching_efficiency(row: Published) -> float:
    """The efficiency with which a row is predicted as it was published, by bisection."""
    low, high = 0.01, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if predict(row, middle) < row.tokens_per_second else (low, middle)
    return low


def compare(rows: tuple[Published, ...] = ROWS) -> Iterator[Row]:
    """Each row with its predictions."""
    first: dict[tuple[str, str], float] = {}
    for row in rows:
        plain = predict(row, EFFICIENCY["cuda"])
        kind = (row.table, row.what)
        scaled = predict(row, first[kind]) if kind in first else None
        first.setdefault(kind, matching_efficiency(row))
        published = row.tokens_per_second
        yield Row(row, plain, plain / published - 1, scaled, None if scaled is None else scaled / published - 1)


def table(rows: list[Row]) -> str:
    """As Markdown."""
    lines = [
        "| model | how | H100s | published | predicted | error | from the first row | error |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for one in rows:
        row = one.published
        scaled = "| | "
        if one.scaled is not None and one.scaled_error is not None:
            scaled = f"| {one.scaled:,.0f} | {one.scaled_error:+.0%} "
        lines.append(
            f"| {row.model} | {row.what} | {row.devices} | {row.tokens_per_second:,.0f} | {one.predicted:,.0f} "
            f"| {one.error:+.0%} {scaled}|"
        )
    reasons = {f"{one.published.model}: {one.published.reason}" for one in rows if one.published.reason}
    return "\n".join([*lines, "", "Tokens a second of each device.", *sorted(reasons)])


def main() -> None:
    """Prints the table and writes it with its sources."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "baselines" / "published.json")
    arguments = parser.parse_args()
    rows = list(compare())
    print(table(rows))
    document = {"efficiency": EFFICIENCY["cuda"], "rows": [asdict(row) for row in rows]}
    arguments.out.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

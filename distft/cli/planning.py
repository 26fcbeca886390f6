"""``distft plan``: what a job needs, on this machine or on devices that are not here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from distft.cli.arguments import JobFile, Json, Overrides, load, print_json
from distft.errors import CapacityError, DataError, JobError

if TYPE_CHECKING:
    from rich.table import Table

    from distft.config import Job
    from distft.plan.devices import Device
    from distft.plan.estimate import Estimate, Workload
    from distft.plan.hardware import Hardware
    from distft.plan.speed import Links, Rates

#: Parts of memory that have a column of their own; all others are the rest.
COLUMNS = ("weights", "optimizer", "grads", "activ.", "rest")
_COLUMN_OF = {
    "weights": "weights",
    "gathered weights": "weights",
    "second copy of weights": "weights",
    "fp32 weights": "optimizer",
    "moments": "optimizer",
    "gradients": "grads",
    "bucket": "grads",
    "gradients on their way": "grads",
    "gradients in fp32": "grads",
    "activations": "activ.",
}


def plan(
    job: JobFile,
    set_: Overrides = None,
    device: Annotated[
        str | None, typer.Option(help="Plan for devices of this name: H100 [default: those here].")
    ] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Workers in all [default: cluster.workers].")] = None,
    nodes: Annotated[int | None, typer.Option(min=1, help="Machines that they are on.")] = None,
    price: Annotated[float | None, typer.Option(min=0, help="What one device costs for an hour.")] = None,
    as_json: Json = False,
) -> None:
    """What the job needs: memory by part, seconds, hours and money, for each ZeRO stage; what cannot fit is refused."""
    from distft.model.shape import read_shape
    from distft.plan import calibration
    from distft.plan.choices import choose
    from distft.plan.devices import known, named
    from distft.plan.estimate import first_setup, whole_plan
    from distft.plan.fit import Room, Subject
    from distft.plan.hardware import Hardware

    loaded = load(job, set_)
    shape = read_shape(loaded.model, loaded.folder)
    hardware = Hardware.glance() if device is None else Hardware.of(named(device))
    listed = known(hardware.name) if hardware.device_type == "cuda" else None
    count = workers or _most_workers(loaded)
    machines = nodes or (1 if listed is None else -(-count // listed.per_node))
    if machines > count:
        raise JobError(f"{count} workers cannot be on {machines} machines", where="--nodes")
    per_node = -(-count // machines)
    subject = Subject.of(loaded, shape)
    facts: dict[str, Any] = {
        "job": str(job),
        "model": {"source": loaded.model.source, "parameters": shape.parameters, "trained": subject.trained},
        "device": hardware.name,
        "workers": count,
        "nodes": machines,
    }
    workload = _workload(loaded)
    try:
        choices = choose(loaded, count, hardware, shape=shape, workers_per_node=per_node, run_tokens=workload.tokens)
    except CapacityError as refused:
        if as_json:
            print_json({**facts, "fits": False, "reason": refused.what, "fix": refused.fix, "plans": []})
        raise
    links = _links(hardware) if device is None and machines > 1 else None
    made = whole_plan(
        loaded,
        subject,
        first_setup(loaded, hardware, choices, machines),
        _rates(hardware, listed, choices.dtype.value, per_node, loaded.cluster.threads).over(links),
        Room.of(hardware, per_node),
        seen=calibration.read(calibration.calibration_path(), calibration.key_of(hardware, choices.dtype.value)),
        workload=workload,
        price=price,
    )
    facts |= {
        "fits": True,
        "decisions": choices.record(),
        "steps": workload.steps,
        "tokens": workload.tokens,
        "tokens_from": workload.source,
        "calibrated_by_runs": next(one for one in made if one.chosen).correction.runs,
        "checkpoint_budget_bytes": loaded.checkpoint.budget_bytes,
        "network": None if links is None else asdict(links),
        "plans": [one.as_json() for one in made],
    }
    if as_json:
        print_json(facts)
    else:
        _show(facts, made, workload, hardware)


def _most_workers(job: Job) -> int:
    from distft.config import Bounds

    asked = job.cluster.workers
    return asked.max if isinstance(asked, Bounds) else asked


def _links(hardware: Hardware) -> Links | None:
    """The network between nodes that was measured last here, where it is what ranks send over."""
    from distft.orchestrate.nodes.network import network_file
    from distft.plan.hardware import has_rdma
    from distft.plan.speed import Links
    from distft.runs import read_json

    if hardware.device_type == "cuda" and has_rdma():
        return None
    try:
        return Links.of(read_json(network_file())["links"])
    except (OSError, ValueError, LookupError, TypeError):
        return None


def _rates(hardware: Hardware, listed: Device | None, dtype: str, workers_per_node: int, threads: int) -> Rates:
    """A worker's, from the table, or measured here, for which torch is loaded."""
    from distft.plan.speed import EFFICIENCY, Rates

    if listed is not None:
        return Rates.of(listed, dtype)
    from distft.model import DTYPES
    from distft.plan.hardware import peak_flops, share_of_peak

    if hardware.device_type == "cpu":
        peak = share_of_peak(hardware, DTYPES[dtype], workers_per_node, threads)
        return Rates.of_cpu(peak, hardware.at_once(threads))
    measured = peak_flops(hardware, DTYPES[dtype]).flops
    return Rates(measured, EFFICIENCY["cuda"], 1e12, 32e9, 1e9, (5e-6, 15e-6))


def _workload(job: Job) -> Workload:
    """From the prepared data, where it is in the cache; what lies in a bucket or on the hub is not fetched for it."""
    from distft.config.addresses import scheme
    from distft.data.prepare import found
    from distft.data.store import Prepared
    from distft.model.files import cached
    from distft.plan.estimate import Workload

    if any(scheme(address) in ("s3", "gs", "hf") for address in job.data.addresses):
        return Workload.of(job, None, None)
    try:
        model = cached(job.model, job.folder)
        folder = None if model is None else found(job, model)
    except DataError:
        folder = None
    if folder is None:
        return Workload.of(job, None, None)
    prepared = Prepared.open(folder)
    rows, card = prepared.rows("train"), prepared.card
    return Workload.of(job, len(rows), card["tokens"]["train"]["all"], rows.attended_tokens() if len(rows) else None)


def _show(facts: dict[str, Any], made: Sequence[Estimate], workload: Workload, hardware: Hardware) -> None:
    from distft.cli.proofs import console

    out = console()
    for line in _heading(facts, workload, hardware):
        out.print(line, markup=False)
    out.print(_table(made))
    chosen = next(one for one in made if one.chosen)
    for line in _details(chosen, facts["decisions"], facts["calibrated_by_runs"], facts["checkpoint_budget_bytes"]):
        out.print(line, markup=False, soft_wrap=True)
    if network := facts["network"]:
        trip = network["round_trip_seconds"] * 1000
        speed = f"{network['bytes_per_second'] / 1e6:,.0f} MB/s and {trip:.2g} ms there and back"
        out.print(f"Between machines: {speed}, as measured last", markup=False, soft_wrap=True)


def _heading(facts: dict[str, Any], workload: Workload, hardware: Hardware) -> Iterator[str]:
    from distft.config.values import amount

    model, count, machines = facts["model"], facts["workers"], facts["nodes"]
    trained = "" if model["trained"] == model["parameters"] else f", {model['trained'] / 1e6:,.1f} M of them trained"
    yield f"{model['source']}: {model['parameters'] / 1e6:,.1f} M parameters{trained}"
    where = f" on {machines} machines" if machines > 1 else ""
    size = "" if hardware.memory_bytes is None else f" of {amount(hardware.memory_bytes)}"
    shared = " together" if hardware.device_type == "cpu" and machines == 1 else ""
    yield f"{count} worker{'' if count == 1 else 's'}{where}, {hardware.name}{size}{shared}"
    if workload.steps is None:
        yield f"steps and time are {workload.source}"
    else:
        yield f"{workload.steps:,} steps, {workload.tokens:,} tokens ({workload.source})"
    yield "\nA worker's memory at its peak, by part, in GB; rows: of one pass"


def _table(made: Sequence[Estimate]) -> Table:
    """A line for each stage and offload, memory by part at its peak, in GB (10**9 bytes)."""
    from rich import box
    from rich.table import Table

    from distft.report.words import duration

    on_cpu, priced = made[0].setup.device_type == "cpu", made[0].price is not None
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=0)
    table.add_column("ZeRO", no_wrap=True)
    heads = ["rows", *COLUMNS, "memory", *([] if on_cpu else ["host"])]
    for head in (*heads, "tokens/s", "time", *(["cost"] if priced else [])):
        table.add_column(head, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for one in made:
        setup, parts = one.setup, grouped(one)
        cells = [f"{setup.micro_batch_size}{'*' if setup.checkpointing else ''}"]
        cells += [_gigabytes(parts[name]) for name in COLUMNS] + [_gigabytes(one.device_bytes)]
        cells += [] if on_cpu else [_gigabytes(one.way.memory.host_bytes)]
        cells += [f"{one.tokens_per_second:,.0f}", "?" if one.hours is None else duration(one.hours * 3600)]
        cells += ["?" if one.money is None else f"{one.money:,.2f}"] if priced else []
        mark = "[green]★ chosen[/]" if one.chosen else ("" if one.fits else "[red]no room[/]")
        style = "bold" if one.chosen else ("" if one.fits else "dim")
        table.add_row(f"{setup.stage}{' offload' if setup.offload != 'none' else ''}", *cells, mark, style=style)
    return table


def _gigabytes(size: float) -> str:
    """Nothing where there is nothing."""
    return f"{size / 1e9:,.2f}" if 0 < size < 1e10 else f"{size / 1e9:,.1f}" if size else ""


def grouped(one: Estimate) -> dict[str, float]:
    """The parts of its peak by column; they sum to its device memory, what was learnt included."""
    parts = dict.fromkeys(COLUMNS, 0.0)
    for name, size in one.way.memory.parts.items():
        parts[_COLUMN_OF.get(name, "rest")] += size
    parts["rest"] += one.device_bytes - one.way.memory.device_bytes
    return parts


def _details(chosen: Estimate, decisions: dict[str, dict[str, Any]], runs: int, budget_bytes: int) -> Iterator[str]:
    """What was decided and why, and what else the chosen way takes."""
    from distft.config.values import amount

    for key, decided in decisions.items():
        yield f"{key}: {decided['value']} ({decided['reason']})"
    memory = chosen.way.memory
    yield ""
    yield f"Memory peaks in the {memory.peak}" if memory.peak != "loading" else "Memory peaks while the model is loaded"
    if chosen.setup.checkpointing:
        yield "* activations are computed again in the backward pass"
    sent = f", {amount(chosen.time.sent_bytes)} sent by each worker" if chosen.setup.workers > 1 else ""
    yield f"A step takes {chosen.step_seconds:,.3g} s{sent}; a checkpoint {amount(memory.checkpoint_bytes)}"
    if 2 * memory.checkpoint_bytes > budget_bytes:  # the newest is kept while the next one is written
        yield f"checkpoint.budget is {amount(budget_bytes)}: at least {amount(2 * memory.checkpoint_bytes)} are needed"
    learnt = f"corrected by {runs} runs on this kind of device" if runs else "not yet corrected by runs on such devices"
    yield f"Seconds are estimates, {learnt}; validation, saving and starting come on top."

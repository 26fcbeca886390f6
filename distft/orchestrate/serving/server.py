"""A run's model behind HTTP on the cluster, until somebody asks to stop."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Literal

from distft.certificate import read as certificate
from distft.config import Bounds
from distft.errors import CapacityError, JobError, RunError
from distft.export import exported
from distft.orchestrate.bases import shared_bases
from distft.orchestrate.cluster import Node, connected, describe, free_nodes, joined, listed, room
from distft.orchestrate.listener import SILENT, Listener
from distft.orchestrate.results import export_base
from distft.orchestrate.serving.watch import Watch, shut_down
from distft.runs import Run
from distft.serving.keys import Keys
from distft.serving.protocol import Model
from distft.serving.settings import Settings
from distft.train.folder import job_of

BASE = "base"
"""What requests call the model that training began with."""


@dataclass(frozen=True)
class Serving:
    """Models that answer.

    Attributes:
        url: Where.
        models: What they are called, and what they do.
        key: The API key that was made, since none was given; None where there was one, or none is asked for.
        insecure: Whether no key is asked for.
        check: Passes while the cluster serves them; raises a RunError once it does not.
    """

    url: str
    models: tuple[Model, ...]
    key: str | None
    insecure: bool
    check: Callable[[], None]


@contextlib.contextmanager
def serve(
    models: Run | Mapping[str, Run],
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    replicas: int | None = None,
    engine: Literal["auto", "transformers", "vllm"] | None = None,
    address: str = "auto",
    key_file: Path | None = None,
    insecure: bool = False,
    base: bool = False,
    listener: Listener = SILENT,
) -> Iterator[Serving]:
    """Serves the exported models of some runs; a context, at whose end requests are finished and replicas go.

    What is not given is the first run's ``serve`` section's.

    Args:
        models: A run, whose model is called as it is, or runs by the names that requests call their models.
        host: The address to listen at; loopback unless said otherwise.
        port: And the port.
        replicas: Copies of each model.
        engine: What writes tokens; ``auto`` is transformers.
        address: The cluster: ``auto``, ``local`` or an address.
        key_file: A file of API keys; else those in DISTFT_API_KEYS, else one is made.
        insecure: Whether no key is asked for.
        base: Whether the model that the first run began with is served too, as ``base``.
        listener: Who is told.

    Raises:
        JobError: A run has no export or no base to serve, the port is taken, or the cluster serves something already.
        CapacityError: The cluster cannot hold the replicas, or lacks the engine.
        RunError: A replica does not start, or its model is not the one that was trained; the message says why.
    """
    from distft.orchestrate.serving.application import others, running
    from distft.serving.app import ENVIRONMENT, models_of

    runs = {models.name: models} if isinstance(models, Run) else dict(models)
    _check_exports(runs)
    _check_port(host, port)
    first = next(iter(runs.values()))
    folders = _folders(runs, first if base else None, listener)
    section = job_of(first).serve
    many = Bounds(min=replicas, max=replicas) if replicas is not None else section.replicas
    chosen = engine or section.engine
    if chosen == "vllm":
        from distft.serving.vllm_engine import refuse_absent

        refuse_absent()
    key, hashes = _keys(key_file, insecure)
    asked = Settings(
        models={name: str(folder) for name, folder in folders.items()},
        bases=shared_bases(runs, folders, chosen, listener),
        engine=chosen,
        min_replicas=many.min,
        max_replicas=many.max,
        idle_seconds=section.idle_seconds,
        concurrent=section.concurrent,
        max_new_tokens=section.max_new_tokens,
        keys=hashes,
        key_file=str(key_file.resolve()) if key_file else None,
        insecure=insecure,
        loopback=_is_loopback(host),
    )
    listener.stage("cluster")
    with _on(address, listener, ENVIRONMENT) as nodes:
        if running() is not None:
            raise JobError(
                "this cluster serves models already", where=address, fix="--update puts others in their place"
            )
        if foreign := others():
            raise JobError(
                f"Ray Serve on this cluster has other applications, which would end with these models: {foreign}",
                where=address,
                fix="take another cluster; or put distft.serving.app:build beside them with Ray's own serve deploy",
            )
        settings = _with_room(asked, nodes)
        with _deployed(settings, host, port, listener) as check:
            yield Serving(f"http://{host}:{port}", models_of(settings), key, insecure, check)


def _with_room(settings: Settings, nodes: Sequence[Node]) -> Settings:
    """The settings with what each replica takes of these nodes.

    Raises:
        CapacityError: Not all replicas fit.
    """
    most = settings.max_replicas * len(settings.deployments())
    need = _resources(nodes, most)
    _check_room(most, need, nodes, "serve fewer models or replicas, or join a larger cluster")
    return settings.model_copy(update={"resources": need, "threads": max(1, int(_most_cpus(nodes)) // most)})


@contextlib.contextmanager
def _deployed(settings: Settings, host: str, port: int, listener: Listener) -> Iterator[Callable[[], None]]:
    """The application on the cluster that this process is connected to, until the end: see :func:`serve`.

    Yields:
        See :attr:`Serving.check`.
    """
    from distft.orchestrate.serving.application import deploy, start

    watch = None
    listener.stage("start replicas, and prove that they are the trained model")
    try:
        start(host, port)
        for name, proof in deploy(settings).items():
            listener.note(f"  {name}: {proof}")
        listener.stage("serving")
        watch = Watch()
        yield watch.check
        listener.stage("finish the requests that run")
    finally:
        if watch is None or watch.lost is None:
            shut_down()


def _folders(runs: Mapping[str, Run], based: Run | None, listener: Listener) -> dict[str, Path]:
    """The exports of runs by the names of their models, with the base of one of them, where that is served too.

    Raises:
        JobError: A run is called as the base is, or has no base to serve.
    """
    folders = {name: run.export for name, run in runs.items()}
    if based is None:
        return folders
    if BASE in folders:
        raise JobError(f"two models are called {BASE}", where="--base", fix="call the run otherwise: NAME=RUN")
    return {**folders, BASE: export_base(based, listener)}


def update(models: Mapping[str, Run], *, address: str = "auto", listener: Listener = SILENT) -> None:
    """Puts other runs in the place of what a cluster serves under these names, without losing a request.

    New replicas start beside the old ones, and take their place when they have proved themselves; where they cannot,
    the old ones stay. A new name is served beside the others: over the base that they share, where it is the run's too.

    Args:
        models: Runs by the names that requests call their models; those under other names stay as they are.
        address: The cluster.
        listener: Who is told.

    Raises:
        JobError: A run has no export, the cluster serves nothing, or a run needs another base than its name has.
        CapacityError: The cluster has no room for new replicas beside the old ones.
        RunError: The new replicas do not start, or their model is not the one that was trained.
    """
    from distft.orchestrate.serving.application import deploy, running

    _check_exports(models)
    listener.stage("cluster")
    with _on(address, listener):
        found = running()
        if found is None:
            raise JobError("this cluster serves nothing", where=address, fix="leave --update out")
        before, homes = found
        folders = {name: str(run.export) for name, run in models.items()}
        after = before.model_copy(update={"models": before.models | folders})
        changed = _changed(after, homes, models)
        count, fix = len(changed) * before.max_replicas, "add a node, or stop the server and serve the new run"
        _check_room(count, before.resources, free_nodes(), fix)
        listener.stage("start replicas, and prove that they are the trained model")
        try:
            proofs = deploy(after)
        except RunError:
            deploy(before)  # else Ray Serve goes on asking for the new ones
            raise
        for name in models:
            listener.note(f"  {name}: {proofs[name]}")


def _changed(after: Settings, homes: Mapping[str, str], names: Iterable[str]) -> set[str]:
    """The deployments that get other models under some names.

    Raises:
        JobError: A name would move to another deployment, and requests for it could meet neither on the way.
    """
    found = {name: home for home, held in after.deployments().items() for name in held}
    for name in names:
        if homes.get(name, found[name]) != found[name]:
            shares = "shares a base with others" if after.base(homes[name]) else "has weights of its own"
            raise JobError(
                f"{name} {shares}, which cannot be said of the new run",
                where=name,
                fix="serve the new run under another name, NEWNAME=RUN --update; or stop the server, and serve it anew",
            )
    return {found[name] for name in names}


@contextlib.contextmanager
def _on(address: str, listener: Listener, environment: Mapping[str, str] | None = None) -> Iterator[list[Node]]:
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    with connected(address, environment=environment) as nodes:
        if (where := joined()) is not None:
            listener.note(f"  {where}")
        yield nodes


def _check_exports(models: Mapping[str, Run]) -> None:
    for name, run in models.items():
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
            raise JobError(
                f"a model cannot be called {name!r}", fix="letters, digits, '.', '_' and '-'; NAME=RUN names it"
            )
        certificate(exported(run))


def _check_port(host: str, port: int) -> None:
    """Refuses an address that cannot be listened at: Serve's proxy would try it for ever."""
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            trial.bind(place)
    except OSError as error:
        raise JobError(
            f"cannot listen at {host}:{port}: {error.strerror}", where="--port", fix="choose another port or host"
        ) from error


def _is_loopback(host: str) -> bool:
    return all(ip_address(place[0]).is_loopback for *_, place in socket.getaddrinfo(host, None))


def _check_room(replicas: int, need: Mapping[str, float], nodes: Sequence[Node], fix: str) -> None:
    """Refuses what would wait for room for ever."""
    if (fit := room(need, nodes)) < replicas:
        what = describe(replicas, need).replace("worker", "replica")
        raise CapacityError(f"{what} are asked for, and there is room for {fit} ({listed(need, nodes)})", fix=fix)


def _resources(nodes: Sequence[Node], replicas: int) -> dict[str, float]:
    """What a replica takes: a GPU where there is one; of the CPUs, half its share, so that a new one fits beside it."""
    if any(node.resources.get("GPU", 0) for node in nodes):
        return {"CPU": 1.0, "GPU": 1.0}
    return {"CPU": _most_cpus(nodes) / (2 * replicas)}


def _most_cpus(nodes: Sequence[Node]) -> float:
    return max(node.resources.get("CPU", 0) for node in nodes)


def _keys(file: Path | None, insecure: bool) -> tuple[str | None, tuple[str, ...]]:
    """The key that was made, where there is none, and what the gateway knows keys by beside a file's."""
    if insecure:
        return None, ()
    if file is not None:
        Keys(file=file)  # refused here rather than on the cluster
        return None, ()
    if listed := os.environ.get("DISTFT_API_KEYS"):
        return None, Keys.listed(listed).hashes()
    keys, made = Keys.made()
    return made, keys.hashes()

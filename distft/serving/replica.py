"""Models in this process, proved to be the trained ones through the HTTP that clients use."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from distft.certificate import compare, proved, read, refuse
from distft.certificate.http import replay
from distft.certificate.identity import identity, weights_of
from distft.certificate.shared import compare_adapted, has_adapter, served_by
from distft.errors import RunError
from distft.serving.adapted import AdaptedEngine, SharedService
from distft.serving.api import create
from distft.serving.classifier import Classifier
from distft.serving.models import model_of
from distft.serving.service import Judge, LocalService, Writer

if TYPE_CHECKING:
    from distft.serving.protocol import Engine

_START_SECONDS = 30.0


def proven(
    name: str,
    folder: Path,
    *,
    engine: str = "auto",
    max_new_tokens: int,
    concurrent: int,
    waiting: int,
) -> tuple[LocalService, str]:
    """Loads an export and replays its certificate over HTTP, on a port that only this process knows.

    Args:
        name: What requests call the model.
        folder: The export.
        engine: What writes its tokens: ``transformers`` or ``vllm``; ``auto`` is transformers.
        max_new_tokens: The most tokens of one answer.
        concurrent: Answers that are written at the same time.
        waiting: Answers that may wait for a place.

    Returns:
        The model behind a service, and a line that says what was proved.

    Raises:
        DataError: The folder cannot be loaded, or is not safe to load.
        CapacityError: The engine is not installed, or the device is too small.
        RunError: What is served is not the model that was trained; the message names the reason.
    """
    certificate = read(folder)
    loaded = _loaded(name, folder, engine, certificate.dtype, concurrent)
    service = LocalService([loaded], max_new_tokens=max_new_tokens, most=concurrent + waiting)
    with _listening(service) as url:
        replies = replay(certificate, url, model=name)
    served = identity(folder)
    refuse(compare(certificate, replies, served), str(folder))
    return service, proved(certificate, replies, served)


def proven_together(
    folders: Mapping[str, Path], base: Path, word: str, *, max_new_tokens: int, concurrent: int, waiting: int
) -> tuple[SharedService, dict[str, str]]:
    """Loads a base once, with the adapters of some exports, and replays the certificate of each.

    Args:
        folders: The exports by what requests call their models.
        base: The folder of the model beneath them.
        word: What their ``base_of`` says of it.
        max_new_tokens: As above.
        concurrent: As above, of all models together.
        waiting: As above, of each model.

    Returns:
        The models behind a service, and by model a line that says what was proved.

    Raises:
        DataError: A folder cannot be loaded, or is not safe to load.
        CapacityError: The device is too small.
        RunError: What is served is not the model that was trained; the message names the model and the reason.
    """
    from distft.serving.transformers_engine import TransformersEngine

    weights, _, dtype = word.partition("-")
    if weights_of(base) != weights:
        what = "the base has other weights than those that the adapters were trained over"
        raise RunError(what, where=str(base), fix=f"serve {', '.join(folders)} one by one, with weights of their own")
    shared = TransformersEngine.load(base, dtype, concurrent=concurrent, adapted=True)
    options = {"max_new_tokens": max_new_tokens, "most": concurrent + waiting}

    def load(name: str) -> tuple[Writer, str]:
        writer = Writer(model_of(name, folders[name]), AdaptedEngine.load(shared, folders[name]))
        return writer, _proved_over_base(writer, folders[name], LocalService([writer], **options))

    found = {name: load(name) for name in folders}
    service = LocalService([writer for writer, _ in found.values()], **options)
    adapters = [name for name, folder in folders.items() if has_adapter(folder)]
    together = SharedService(service, shared, lambda name: load(name)[0], adapters)
    return together, {name: proof for name, (_, proof) in found.items()}


def _proved_over_base(writer: Writer, folder: Path, service: LocalService) -> str:
    certificate, name = read(folder), writer.model.name
    with _listening(service) as url:
        replies = replay(certificate, url, model=name)
    refuse(compare_adapted(certificate, replies, folder), f"{name} ({folder})")
    return proved(certificate, replies, served_by(certificate, folder))


def _loaded(name: str, folder: Path, engine: str, dtype: str, concurrent: int) -> Writer | Judge:
    model = model_of(name, folder)
    if model.kind == "classification":
        return Judge(model, Classifier.load(folder, dtype))
    return Writer(model, _engine(engine, folder, dtype, concurrent))


def _engine(name: str, folder: Path, dtype: str, concurrent: int) -> Engine:
    if name == "vllm":
        from distft.serving.vllm_engine import VllmEngine

        return VllmEngine(folder, dtype, concurrent=concurrent)
    from distft.serving.transformers_engine import TransformersEngine

    return TransformersEngine.load(folder, dtype, concurrent=concurrent)


@contextlib.contextmanager
def _listening(service: LocalService) -> Iterator[str]:
    """The HTTP API over a service of this process; its address."""
    import uvicorn

    server = uvicorn.Server(uvicorn.Config(create(service, None, page=None), port=0, log_config=None, lifespan="off"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    until = time.monotonic() + _START_SECONDS
    while not server.started:
        if time.monotonic() > until or not thread.is_alive():
            raise RunError("no port could be listened at to prove the model")
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()

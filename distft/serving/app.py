"""Ray Serve around the HTTP API: a light gateway, and replicas that each hold one model.

Ray's own tools take it too: ``serve deploy`` and KubeRay's RayService name it as ``import_path:
distft.serving.app:build``, with :class:`Settings` as ``args``
(https://docs.ray.io/en/releases-2.60.0/serve/advanced-guides/app-builder-guide.html).

Two tiers, so that a dead replica, a full queue and a timeout are answered by us with OpenAI's error object, where
Serve's own proxy would answer with plain text that makes clients try a slow request three times.
"""

from __future__ import annotations

import asyncio
import dataclasses
import gc
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from ray import serve
from ray.exceptions import RayActorError, TaskCancelledError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from distft.serving.flow import gathered
from distft.serving.models import model_of, refuse_other_engine
from distft.serving.protocol import ApiError, Delta, Judgement, Model, Question
from distft.serving.settings import Settings

if TYPE_CHECKING:
    from distft.serving.adapted import SharedService
    from distft.serving.service import LocalService

APP, GATEWAY = "distft", "gateway"
"""The names of the application and of its way in, on the cluster."""
_LOOK_SECONDS = 0.5
#: While all models are ready they are looked at less often: each look asks for all of Serve's state.
_SETTLED_SECONDS = 5.0
#: Pieces of a stream that come within so long go through the cluster together, as those of Ray's own server of language
#: models do (``RAYLLM_MODEL_RESPONSE_BATCH_TIMEOUT_MS``): a message costs tenths of a millisecond of a processor in
#: each of three processes, and nobody reads faster.
_GATHER_SECONDS = 0.1
#: A request whose replica dies before it has told anything goes to another one, this often.
_TRIES = 3
_LOST = (RayActorError, ReplicaUnavailableError)
#: Serve's processes send requests and pieces of answers by gRPC: as Ray objects a piece takes twice the processor's
#: time, and with vLLM beside it on two cores a token took 0.089 s instead of 0.044. They listen for both in any case.
ENVIRONMENT = {"RAY_SERVE_USE_GRPC_BY_DEFAULT": "1"}
#: Load is its mean over so long; when it has been too much for the replicas for so long, there is one more.
_LOOK_BACK_SECONDS, _GROW_SECONDS = 15.0, 10.0
#: The states in which a model may have no replica because nobody asked.
_ASLEEP = ("HEALTHY", "UPSCALING", "DOWNSCALING")


class Replica:
    """One copy of a model: ready only when it has answered its certificate's prompts as the trained model did.

    Or of several models over one base, each proved like that.
    """

    def __init__(self, folders: Mapping[str, str], base: str, settings: Settings) -> None:
        from distft.serving.replica import proven, proven_together

        found = {name: Path(folder) for name, folder in folders.items()}
        limits = {
            "max_new_tokens": settings.max_new_tokens,
            "concurrent": settings.places(),
            "waiting": settings.waiting,
        }
        self._idle_seconds = settings.idle_seconds if settings.min_replicas == 0 else None
        self._shared: SharedService | None = None
        self._service: LocalService | SharedService
        if base:
            self._shared, self._proofs = proven_together(found, Path(settings.bases[base]), base, **limits)
            self._service = self._shared
        else:
            ((name, place),) = found.items()
            self._service, proof = proven(name, place, engine=settings.engine, **limits)
            self._proofs = {name: proof}
        gc.collect()
        gc.freeze()  # else going through what the libraries hold stops all answers for half a second now and then

    async def pieces(self, question: Question) -> AsyncGenerator[list[Delta]]:
        """The pieces of all answers as they come, those that come soon after others together."""
        async with aclosing(gathered(self._service.answer(question), _GATHER_SECONDS)) as found:
            async for deltas in found:
                yield deltas

    async def whole(self, question: Question) -> list[Delta]:
        """All pieces at once: one message through the cluster where nobody reads along."""
        return [delta async for delta in self._service.answer(question)]

    async def classify(self, name: str, texts: Sequence[str]) -> list[Judgement]:
        """The labels of some texts."""
        return await self._service.classify(name, texts)

    async def proof(self, name: str) -> str:
        """A line that says how a model was proved to be the trained one."""
        return self._proofs[name]

    async def check_health(self) -> None:
        """Ray Serve asks every ten seconds, and starts another replica where this raises."""
        self._service.check()
        if self._shared is not None and self._idle_seconds is not None:
            self._shared.drop_idle(self._idle_seconds)


class Replicas:
    """The service that the gateway asks: models whose replicas are anywhere on the cluster."""

    def __init__(
        self,
        models: Sequence[Model],
        homes: Mapping[str, str],
        handles: Mapping[str, DeploymentHandle],
        *,
        let_go: bool,
    ) -> None:
        self._models = {model.name: model for model in models}
        self._homes, self._handles, self._let_go = homes, handles, let_go
        self._ready: frozenset[str] = frozenset()
        self._running: frozenset[str] = frozenset()

    def models(self) -> list[Model]:
        """All of them; ready are those with a replica, or that have none because nobody asked until now."""
        return [
            dataclasses.replace(model, ready=home in self._ready, running=home in self._running)
            for model, home in ((model, self._homes[name]) for name, model in self._models.items())
        ]

    async def watch(self) -> None:
        """Looks which models have a replica, again and again; never returns."""
        name = serve.get_replica_context().app_name
        while True:
            status = await asyncio.to_thread(serve.status)
            found = status.applications[name].deployments if name in status.applications else {}
            self._running = frozenset(name for name, one in found.items() if one.replica_states.get("RUNNING"))
            asleep = (name for name, one in found.items() if self._let_go and one.status in _ASLEEP)
            self._ready = self._running.union(asleep)
            settled = self._ready.issuperset(self._homes.values())
            await asyncio.sleep(_SETTLED_SECONDS if settled else _LOOK_SECONDS)

    async def answer(self, question: Question) -> AsyncGenerator[Delta]:
        """See :class:`~.protocol.Service`."""
        handle, told = self._handle(question.model), False
        for attempt in range(1, _TRIES + 1):
            try:
                if question.stream:
                    pieces = handle.options(stream=True).pieces.remote(question)
                    try:
                        async for deltas in pieces:
                            told = True
                            for delta in deltas:
                                yield delta
                    finally:
                        pieces.cancel()
                else:
                    for delta in await _cancellable(handle.whole.remote(question)):
                        yield delta
                return
            except Exception as error:
                _refuse(error, told=told, last=attempt == _TRIES)

    async def classify(self, model: str, texts: Sequence[str]) -> list[Judgement]:
        """See :class:`~.protocol.Service`."""
        handle = self._handle(model)
        for attempt in range(1, _TRIES + 1):
            try:
                found: list[Judgement] = await _cancellable(handle.classify.remote(model, texts))
                return found
            except Exception as error:
                _refuse(error, told=False, last=attempt == _TRIES)
        raise AssertionError("the last try returns or raises")

    def _handle(self, name: str) -> DeploymentHandle:
        if name not in self._homes:
            raise ApiError(404, f"there is no model {name!r}", code="model_not_found", param="model")
        return self._handles[self._homes[name]]


async def _cancellable(response: Any) -> Any:
    """A replica's answer; it stops working on it where nobody waits any more."""
    try:
        return await response
    except asyncio.CancelledError:
        response.cancel()
        raise


def _refuse(error: Exception, *, told: bool, last: bool) -> None:
    """Says in our words why a request failed; returns where it can be tried again on another replica."""
    if isinstance(error, ApiError):
        if error.code == "model_not_found":  # the gateway knows it: that replica is from before an update
            raise ApiError(503, "the model is being started", "server_error", code="starting", retry_after=1.0)
        raise getattr(error, "cause", error)  # Ray wraps what a replica raises
    if isinstance(error, BackPressureError):
        raise ApiError(
            429, "too many requests are waiting", "rate_limit_error", code="overloaded", retry_after=1.0
        ) from error
    if isinstance(error, DeploymentUnavailableError):
        raise ApiError(503, "the model could not be started", "server_error", code="unavailable") from error
    if isinstance(error, TaskCancelledError) or (isinstance(error, _LOST) and (told or last)):
        raise ApiError(
            503,
            "the replica that wrote this answer is gone; ask again",
            "server_error",
            code="replica_lost",
            retry_after=1.0,
        ) from error
    if not isinstance(error, _LOST):
        raise error


@serve.ingress()
class Gateway:
    """Speaks HTTP; holds no model."""

    def __init__(
        self,
        settings: Settings,
        models: Sequence[Model],
        homes: Mapping[str, str],
        handles: dict[str, DeploymentHandle],
    ) -> None:
        self._settings, self._homes, self._deployments = settings, homes, len(handles)
        # Those that are handed over send as the process does that bound them; by ENVIRONMENT those made here.
        made = {name: serve.get_deployment_handle(name, one.app_name) for name, one in handles.items()}
        self._service = Replicas(models, homes, made, let_go=settings.min_replicas == 0)
        self._watching = asyncio.get_running_loop().create_task(self._service.watch())
        self._api: FastAPI

    def __serve_build_asgi_app__(self) -> Any:
        """The application that Serve's proxy hands requests to."""
        from distft.serving.api import create
        from distft.serving.keys import Keys
        from distft.serving.limits import Limits

        asked = self._settings
        keys = None if asked.insecure else Keys(asked.keys, Path(asked.key_file) if asked.key_file else None)
        limits = Limits(
            new_tokens=asked.max_new_tokens,
            seconds=asked.seconds,
            running=asked.places() * asked.max_replicas * self._deployments,
            waiting=asked.waiting,
        )
        self._api = create(self._service, keys, limits, loopback=asked.loopback)
        return _without_request_id(self._api)

    async def check_health(self) -> None:
        """Ray Serve asks every ten seconds, and starts another gateway where this raises."""
        if self._watching.done():
            self._watching.result()

    async def settings(self) -> tuple[Settings, Mapping[str, str]]:
        """What is served, and each model's deployment."""
        return self._settings, self._homes

    async def ready(self) -> bool:
        """Whether every model is."""
        return all(model.ready for model in self._service.models())

    async def drain(self) -> int:
        """Refuses new requests from now on; tells how many are left."""
        state = self._api.state
        state.draining = True
        return int(state.gate.running + state.gate.waiting)


def _without_request_id(app: FastAPI) -> ASGIApp:
    """The application without the header that Serve's proxy adds too, from the same id."""

    async def wrapped(scope: Scope, receive: Receive, send: Send) -> None:
        async def told(message: Message) -> None:
            if message["type"] == "http.response.start":
                del MutableHeaders(scope=message)["x-request-id"]
            await send(message)

        await app(scope, receive, told)

    return wrapped


def build(settings: Settings | Mapping[str, Any]) -> serve.Application:
    """The application.

    Args:
        settings: Or, from Ray's own tools, its fields as they stand in their file.

    Raises:
        JobError: A folder is no export, or its model is not for the engine.
        ValueError: The fields are no settings.
    """
    return application(Settings.model_validate(settings), {})


def application(settings: Settings, beside: Mapping[str, float]) -> serve.Application:
    """The same, its gateway where these resources are."""
    handles: dict[str, serve.Application] = {}
    homes: dict[str, str] = {}
    for home, names in settings.deployments().items():
        folders = {name: settings.models[name] for name in names}
        handles[home] = _deployment(home, settings).bind(folders, settings.base(home), settings)
        homes |= dict.fromkeys(names, home)
    gateway = serve.deployment(
        Gateway,
        name=GATEWAY,
        max_ongoing_requests=10_000,  # its own limits come first
        max_surge_percent=100,
        graceful_shutdown_timeout_s=settings.seconds,
        ray_actor_options={"num_cpus": 0, "resources": dict(beside)},
    )
    return gateway.bind(settings, models_of(settings), homes, handles)


def models_of(settings: Settings) -> tuple[Model, ...]:
    """What the exports say of their models.

    Raises:
        JobError: A folder is no export, or its model is not for the engine.
    """
    models = tuple(model_of(name, Path(folder)) for name, folder in settings.models.items())
    for model in models:
        refuse_other_engine(model, settings.engine)
    return models


def _deployment(name: str, settings: Settings) -> serve.Deployment:
    """Replicas of one model, or of several over one base: new ones start, and prove themselves, before old ones go."""
    resources = dict(settings.resources)
    many: dict[str, Any] = {"num_replicas": settings.max_replicas}
    if settings.min_replicas != settings.max_replicas:
        many = {
            "autoscaling_config": {
                "min_replicas": settings.min_replicas,
                "max_replicas": settings.max_replicas,
                "initial_replicas": None if settings.min_replicas else 1,  # of each update, to prove itself
                "target_ongoing_requests": settings.places(),
                "look_back_period_s": _LOOK_BACK_SECONDS,
                "upscale_delay_s": _GROW_SECONDS,
                "downscale_delay_s": settings.idle_seconds,
            }
        }
    return serve.deployment(
        Replica,
        name=name,
        ray_actor_options={
            "num_cpus": resources.pop("CPU", 0),
            "num_gpus": resources.pop("GPU", 0),
            "resources": resources,
            # As the process starts: what is set later does not reach the thread in which the engine computes.
            "runtime_env": {"env_vars": {"OMP_NUM_THREADS": str(settings.threads)}},
        },
        max_ongoing_requests=settings.places(),
        max_queued_requests=settings.waiting,
        max_constructor_retry_count=1,
        max_surge_percent=100,
        graceful_shutdown_timeout_s=settings.seconds,
        **many,
    )

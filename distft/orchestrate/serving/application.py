"""The application on the cluster that this process is connected to: started, put in another's place, asked, ended."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from contextlib import suppress

from ray import serve

from distft.errors import RunError
from distft.serving.app import APP, GATEWAY, application
from distft.serving.settings import Settings

#: Requests that run when a server is stopped have so long.
_LEAVE_SECONDS = 30.0
_LOOK_SECONDS, _READY_SECONDS = 0.5, 60.0
_QUIET = {"log_level": "ERROR", "enable_access_log": False}
#: The head's node, where the proxy of :func:`start` is: a gateway elsewhere could be lost without it.
_HEAD = {"node:__internal_head__": 0.001}


def start(host: str, port: int) -> None:
    """Starts Ray Serve on the cluster that this process is connected to.

    One that runs already without an application is ended first: it would go on listening where it was told before.
    """
    if not serve.status().applications:
        serve.shutdown()
    serve.start(proxy_location="HeadOnly", http_options={"host": host, "port": port}, logging_config=_QUIET)


def deploy(settings: Settings) -> dict[str, str]:
    """Starts the application, or puts this one in the place of another, and waits until it answers.

    Returns:
        By model, a line that says how a replica was proved to be the trained one.

    Raises:
        RunError: A replica did not start, with what it said.
    """
    try:
        serve.run(application(settings, _HEAD), name=APP, route_prefix="/", logging_config=_QUIET)
    except RuntimeError as error:
        raise _why(settings) or RunError(str(error)) from error
    gateway, until = serve.get_deployment_handle(GATEWAY, APP), time.monotonic() + _READY_SECONDS
    while not gateway.ready.remote().result():
        if time.monotonic() > until:
            raise RunError("its replicas run, and the gateway does not see them", where=APP)
        time.sleep(_LOOK_SECONDS)
    return {
        name: serve.get_deployment_handle(home, APP).proof.remote(name).result()
        for home, names in settings.deployments().items()
        for name in names
    }


def _why(settings: Settings) -> RunError | None:
    """What a replica that did not start said last; Ray Serve hands it on as the text of a traceback."""
    for name in settings.deployments():
        said = serve.status().applications[APP].deployments[name].message.strip()
        ours = re.search(r"^distft\.errors\.\w+: (.+)", said, re.DOTALL | re.MULTILINE)
        if said:
            return RunError(ours[1] if ours else said.splitlines()[-1], where=name)
    return None


def running() -> tuple[Settings, Mapping[str, str]] | None:
    """What the cluster serves now, and each model's deployment; None where it serves nothing of ours."""
    if APP not in serve.status().applications:
        return None
    found: tuple[Settings, Mapping[str, str]] = serve.get_deployment_handle(GATEWAY, APP).settings.remote().result()
    return found


def others() -> list[str]:
    """Applications on the cluster that are none of ours."""
    return sorted(name for name in serve.status().applications if name != APP)


def shut_down() -> None:
    """Lets the requests that run finish, and ends all replicas."""
    if APP in serve.status().applications:
        gateway, until = serve.get_deployment_handle(GATEWAY, APP), time.monotonic() + _LEAVE_SECONDS
        with suppress(TimeoutError):  # one that did not start knows of no requests
            while gateway.drain.remote().result(timeout_s=_LEAVE_SECONDS) and time.monotonic() < until:
                time.sleep(_LOOK_SECONDS)
    serve.shutdown()

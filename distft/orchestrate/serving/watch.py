"""Whether the cluster still serves, and an end that a silent head does not hold up."""

from __future__ import annotations

import logging
import time
from typing import Any

from distft.errors import ClusterLost, RunError
from distft.orchestrate.asking import Question, in_background
from distft.orchestrate.cluster import live_nodes

#: How long a gateway that is asked whether it still serves has for an answer, and how long it or the head may be
#: silent: Ray's own process on this node ends about 60 s after the head, and this one with it, before it could say why.
_ASK_SECONDS, _SILENT_SECONDS = 2.0, 40.0
_SERVE_AGAIN = "serve again, once there is a cluster"


class Watch:
    """Whether the cluster still serves: its gateway is asked, and its head, without which a gateway may go on a while.

    Both by threads of their own, for any call into a cluster that is lost may never return.
    """

    def __init__(self) -> None:
        from ray.serve import get_deployment_handle

        from distft.serving.app import APP, GATEWAY

        self._gateway = get_deployment_handle(GATEWAY, APP)
        self._questions: tuple[Question[Any], ...] = Question(self._heard, 1.0), Question(live_nodes, 5.0)
        self.lost: RunError | None = None
        """Why it serves no more."""

    def _heard(self) -> None:
        """Returns when the gateway has answered.

        Raises:
            RunError: It is gone for good.
        """
        from ray.exceptions import RayError
        from ray.serve.exceptions import DeploymentUnavailableError, RayServeException

        while True:
            try:
                self._gateway.ready.remote().result(timeout_s=_ASK_SECONDS)
                return
            except DeploymentUnavailableError:
                raise RunError("somebody took the models down", fix=_SERVE_AGAIN) from None
            except (TimeoutError, RayError, RayServeException):  # Ray Serve restarts what ended
                time.sleep(1)

    def check(self) -> None:
        """See :attr:`.server.Serving.check`."""
        try:
            for question in self._questions:
                question.answer()
                if (silent := question.waiting_seconds) > _SILENT_SECONDS:
                    what = (
                        f"nothing was heard of the models for {silent:.0f} s: the cluster's head is lost, or Ray Serve"
                    )
                    raise ClusterLost(what, fix=_SERVE_AGAIN)
        except RunError as error:
            self.lost = error
            logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # tasks of Ray Serve's end with errors of their own
            raise


def shut_down() -> None:
    """Lets the requests that run finish, and ends all replicas.

    Raises:
        ClusterLost: The cluster's head does not answer.
    """
    from distft.orchestrate.serving.application import shut_down as end

    head = Question(live_nodes, 1.0)
    ended = in_background(end)  # it may never return where the head is lost
    while not ended.done():
        head.answer()
        if head.waiting_seconds > _SILENT_SECONDS:
            raise ClusterLost(
                f"the cluster's head has not answered for {head.waiting_seconds:.0f} s",
                fix="end its processes on every node, where there are any left: ray stop",
            )
        time.sleep(0.1)
    ended.result()

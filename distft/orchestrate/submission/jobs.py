"""The jobs of a remote cluster: handed in, watched and stopped through Ray's Jobs API.

Source: https://docs.ray.io/en/releases-2.60.0/cluster/running-applications/job-submission/sdk.html
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import json
import logging
import os
import re
import secrets
import tempfile
import time
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.error import HTTPError
from urllib.parse import urlsplit

from distft import __version__
from distft.errors import CapacityError, DistftError, JobError, RunError
from distft.orchestrate.cluster import MARKET, Node
from distft.orchestrate.submission.parcel import Parcel, extras_of, installation
from distft.runs import Run

#: How long a job that is told to stop may take for its checkpoint; Ray's default is 3 s.
STOP_SECONDS = 600
#: How long a cluster may take to answer at first, and after it has been lost, before it is given up.
ANSWER_SECONDS, LOST_SECONDS = 10.0, 120.0
#: How long a log may be silent before its job is asked how it is: the node that wrote it may be gone.
SILENT_SECONDS = 60.0
#: How long the installation of an environment may take, on each node.
INSTALL_SECONDS = 3600

#: The label by which Ray tells nodes apart.
NODE = "ray.io/node-id"

#: Ray's words for a job, and ours.
STATUS = {"PENDING": "waiting", "RUNNING": "running", "STOPPED": "stopped", "SUCCEEDED": "finished", "FAILED": "failed"}
ENDED = ("stopped", "finished", "failed")


@dataclass(frozen=True)
class Submitted:
    """A job on a cluster.

    Attributes:
        id: Ray's submission id.
        status: waiting, running, stopped, finished or failed.
        run: The run's name.
        runs: Where the cluster keeps runs; empty where the cluster's own DISTFT_RUNS says so.
        began: Seconds since the epoch.
        ended: The same; None while it goes on.
        exit_status: That of ``distft run``; None while it goes on, and where it was ended from outside.
        message: What Ray says of it.
        node: The address of the node that its driver runs on, as far as that is known.
    """

    id: str
    status: str
    run: str
    runs: str
    began: float
    ended: float | None
    exit_status: int | None
    message: str
    node: str | None

    @property
    def folder(self) -> Run | None:
        """The run's folder, where it can be read from here."""
        run = Run(Path(self.runs) / self.run)
        return run if self.runs and run.job.is_file() else None

    def as_json(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)


class Cluster:
    """The jobs of one cluster.

    Args:
        address: That of its dashboard: ``http://HOST:8265``.

    Raises:
        JobError: It is no such address.
        CapacityError: No cluster answers there, or it wants a token that is not here or is another.
    """

    def __init__(self, address: str) -> None:
        self.url = url_of(address)
        self.secured = _wants_token(self.url)
        os.environ["RAY_API_SERVER_ADDRESS"] = self.url  # Ray lets RAY_ADDRESS override what it is called with
        with self._explained():
            from ray.job_submission import JobSubmissionClient

            for module in ("dashboard_sdk", "job.sdk"):  # they tell each upload, and each end of a log
                logging.getLogger(f"ray.dashboard.modules.{module}").setLevel(logging.WARNING)
            self._client = JobSubmissionClient(self.url, headers=self._headers())

    @property
    def exposes_token(self) -> bool:
        """Whether the token goes over a network in clear."""
        host = urlsplit(self.url).hostname or ""
        with contextlib.suppress(ValueError):
            return self.secured and self.url.startswith("http:") and not ipaddress.ip_address(host).is_loopback
        return self.secured and self.url.startswith("http:") and host != "localhost"

    def submit(self, parcel: Parcel, install: Literal["uv", "pip"] | None = None) -> Submitted:
        """Sends a job; it goes on without whoever sent it.

        Raises:
            JobError: The run is in progress there.
            CapacityError: The files are more than Ray takes.
        """
        order = parcel.order
        self._refuse_twice(order.run, order.runs)
        # An environment variable here is seen by all who may use the cluster: no secret among them.
        environment: dict[str, Any] = {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS)}}
        if install is not None:
            environment |= {
                **installation(install, parcel.files["constraints.txt"], extras_of(parcel.checked)),
                "config": {"setup_timeout_seconds": INSTALL_SECONDS},
            }
        with tempfile.TemporaryDirectory() as folder, self._explained():
            archive = Path(folder) / "parcel.zip"
            parcel.pack(archive)
            id = self._client.submit_job(
                entrypoint="exec python -m distft.orchestrate.submission.driver",
                submission_id=f"{order.run}-{secrets.token_hex(3)}",
                runtime_env={"working_dir": str(archive), **environment},
                metadata={
                    "distft": __version__,
                    "run": order.run,
                    "job": order.job,
                    "runs": order.runs or "",
                    "sha256": order.digest,
                },
                entrypoint_label_selector=driver_labels(*self._nodes()) or None,
            )
        return self.job(id)

    def job(self, id: str) -> Submitted:
        """A job.

        Raises:
            JobError: The cluster knows no such job.
        """
        with self._explained(id):
            return _submitted(self._client.get_job_info(id))

    def jobs(self) -> list[Submitted]:
        """The jobs that distft has submitted, the newest last."""
        with self._explained():
            found = [_submitted(info) for info in self._client.list_jobs() if "distft" in (info.metadata or {})]
        return sorted(found, key=lambda job: job.began)

    def log(self, id: str) -> str:
        """What a job has said so far."""
        with self._explained(id):
            return str(self._client.get_job_logs(id))

    def follow(self, id: str, say: Callable[[str], None]) -> Submitted:
        """Passes on what a job says, from its beginning until it ends; survives a loss of the connection.

        Raises:
            JobError: The cluster knows no such job.
            RunError: The cluster has not answered for two minutes.
        """
        import aiohttp

        told, answered = _Told(say), time.monotonic()
        while True:
            with contextlib.suppress(OSError, RuntimeError, aiohttp.ClientError):  # the job itself is asked below
                asyncio.run(tail(self._client.tail_job_logs(id), told))
            try:
                job = self.job(id)
                answered = time.monotonic()
                if job.status in ENDED:
                    with contextlib.suppress(DistftError):  # its node may be gone, and the log with it
                        told(0, self.log(id))
                    return job
            except (CapacityError, RunError) as error:
                if time.monotonic() - answered > LOST_SECONDS:
                    raise RunError(
                        "the cluster does not answer any more; the job may go on there",
                        where=self.url,
                        fix=f"come back with: distft logs {id} --follow --address {self.url}",
                    ) from error
            time.sleep(1)

    def stop(self, id: str) -> bool:
        """Asks a job to stop, with a checkpoint; whether it was running."""
        with self._explained(id):
            return bool(self._client.stop_job(id))

    def wait(self, id: str) -> Submitted:
        """The job, once it has ended."""
        while (job := self.job(id)).status not in ENDED:
            time.sleep(1)
        return job

    def _refuse_twice(self, run: str, runs: str | None) -> None:
        for job in self.jobs():
            if job.run == run and job.runs == (runs or "") and job.status not in ENDED:
                raise JobError(
                    f"the run {run!r} is {job.status} there already, as {job.id}",
                    where=self.url,
                    fix=f"watch it: distft logs {job.id} --follow; or give this one another --name",
                )

    def _nodes(self) -> tuple[list[Node], list[Node]]:
        """The head, and the other nodes."""
        from ray.util.state.api import ListApiOptions, StateApiClient, StateResource

        client = StateApiClient(self.url, headers=self._headers())
        options = ListApiOptions(detail=True, limit=1000)
        head: list[Node] = []
        others: list[Node] = []
        for node in client.list(StateResource.NODES, options, raise_on_missing_output=False):
            if node["state"] == "ALIVE":
                found = Node(node["node_ip"], node["resources_total"], node["node_id"], node["labels"] or {})
                (head if node["is_head_node"] else others).append(found)
        return head, others

    def _headers(self) -> dict[str, str]:
        """The token that Ray's own client would send, also where RAY_AUTH_MODE is not set; only to who asks for one."""
        if not self.secured:
            return {}
        from ray._raylet import AuthenticationTokenLoader  # type: ignore[attr-defined]  # compiled

        return dict(AuthenticationTokenLoader.instance().get_token_for_http_header(ignore_auth_mode=True))

    @contextlib.contextmanager
    def _explained(self, id: str | None = None) -> Iterator[None]:
        """What Ray's client raises, as errors that a person can act on."""
        from ray.exceptions import AuthenticationError

        try:
            yield
        except AuthenticationError as error:
            wrong = "another token than the one here" if self._headers() else "a token, and none is here"
            raise CapacityError(
                f"the cluster wants {wrong}",
                where=self.url,
                fix="on its head `ray get-auth-token` prints it; put it into RAY_AUTH_TOKEN or ~/.ray/auth_token "
                "(mode 0600) here",
            ) from error
        except OSError as error:  # requests' own and Python's ConnectionError are both
            raise _unreachable(self.url, error) from error
        except RuntimeError as error:
            status = re.search(r"status code (\d+)", str(error))
            if id is not None and status is not None and status[1] == "404":
                raise JobError(
                    f"the cluster knows no job {id!r}",
                    where=self.url,
                    fix="distft status lists them. A cluster whose head was lost has forgotten its jobs; the run goes "
                    "on with: distft submit JOB --name RUN --resume",
                ) from error
            said = str(error).strip().splitlines() or [type(error).__name__]
            raise RunError(f"the cluster refused: {said[-1]}", where=self.url) from error


def url_of(address: str) -> str:
    """The address of a dashboard, whole: ``http://head:8265`` of ``head:8265``.

    Raises:
        JobError: It is another kind of address.
    """
    url = address if "://" in address else f"http://{address}"
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.hostname == "auto" or parts.username:
        raise JobError(
            f"{parts._replace(netloc=parts.netloc.rpartition('@')[2]).geturl()!r} is no address of a Ray dashboard",
            where="--address",
            fix="write http://HOST:8265, or reach it through a tunnel: ssh -L 8265:localhost:8265 HOST, then "
            "http://localhost:8265",
        )
    return url.rstrip("/")


def driver_labels(head: Sequence[Node], others: Sequence[Node]) -> dict[str, str]:
    """Labels by which a job's driver is kept off the head, whose loss it then outlives, and off nodes that may go.

    A cluster that has nothing but its head yet gets the driver there: it would wait for another node for ever.

    Returns:
        Ray's label selector; empty where the head is all there is.
    """
    if not head or not others:
        return {}
    selector = {NODE: f"!{head[0].id}"}
    if any(node.labels.get(MARKET) == "spot" for node in others) and any(
        node.labels.get(MARKET) != "spot" for node in others
    ):
        selector[MARKET] = "!spot"
    return selector


class _Told:
    """What of a log has been passed on; a log that is read anew from its beginning is passed on from there on."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say, self._letters = say, 0

    def __call__(self, place: int, piece: str) -> None:
        new = piece[max(0, self._letters - place) :]
        if new:
            self._say(new)
            self._letters = place + len(piece)


async def tail(pieces: AsyncIterator[str], told: Callable[[int, str], None]) -> None:
    """Passes a log's pieces on, each with its place, until it ends or is silent for too long.

    Raises:
        TimeoutError: No piece came for ``SILENT_SECONDS``.
    """
    place = 0
    while True:
        async with asyncio.timeout(SILENT_SECONDS):  # wait_for of Python 3.11 may lose Ctrl-C
            try:
                piece = await anext(pieces, None)
            finally:  # a connection that Ctrl-C cuts off may end with an error of its own, which would hide it
                if (task := asyncio.current_task()) is not None and task.cancelling():
                    raise asyncio.CancelledError
        if piece is None:
            return
        told(place, piece)
        place += len(piece)


def _submitted(info: Any) -> Submitted:
    """What Ray's ``JobDetails`` say; times are in milliseconds there."""
    about: Mapping[str, str] = info.metadata or {}
    return Submitted(
        id=info.submission_id or "",
        status=STATUS[info.status.value],
        run=about.get("run", ""),
        runs=about.get("runs", ""),
        began=(info.start_time or 0) / 1000,
        ended=info.end_time / 1000 if info.end_time else None,
        exit_status=info.driver_exit_code,
        message=info.message or "",
        node=info.driver_info.node_ip_address if info.driver_info else None,
    )


def _wants_token(url: str) -> bool:
    """Whether a cluster asks for a token (Ray 2.52 and newer); the first question to it, so that it is soon known."""
    try:
        with urllib.request.urlopen(f"{url}/api/authentication_mode", timeout=ANSWER_SECONDS) as answer:
            return bool(json.load(answer)["authentication_mode"] == "token")
    except HTTPError:
        return False
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _unreachable(url, error) from error


def _unreachable(url: str, error: Exception) -> CapacityError:
    said = getattr(error, "reason", error)
    return CapacityError(
        f"no Ray dashboard answers: {str(said).splitlines()[0] if str(said) else type(said).__name__}",
        where=url,
        fix="is the cluster up, and the tunnel to its head open? ssh -L 8265:localhost:8265 HEAD",
    )

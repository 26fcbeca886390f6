"""Whether trackers will let a job in: looked at where its workers will be, before they start."""

from __future__ import annotations

import os
import urllib.request
from urllib.error import HTTPError

from distft.config import Job
from distft.errors import JobError

#: How long MLflow's server may take to answer; one that is away holds no job up.
ANSWER_SECONDS = 5.0
#: What W&B calls not being told anything over the network.
WANDB_ALONE = ("offline", "dryrun", "disabled")
WHERE = "in the environment of the cluster's nodes (of `ray start`), not in the job file"


def lacking(job: Job) -> JobError | None:
    """The secret that a tracker of the job asks for and this process has not; None where none is missing.

    An error is returned, not raised: Ray would wrap it.
    """
    track = job.track
    if track.wandb is not None and _wandb_lacks_key():
        fix = f"set WANDB_API_KEY {WHERE}; or WANDB_MODE=offline, and `wandb sync` later"
        return JobError("Weights & Biases wants a key, and no WANDB_API_KEY is here", where="track.wandb", fix=fix)
    if track.mlflow is not None and track.mlflow.startswith(("http://", "https://")) and _mlflow_refuses(track.mlflow):
        fix = f"set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN, {WHERE}"
        names = ("MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_PASSWORD")
        known = next((name for name in names if os.environ.get(name)), None)
        told = f"takes another {known} than the one here" if known else "wants a password or a token, and none is here"
        return JobError(f"MLflow's server {told}", where="track.mlflow", fix=fix)
    return None


def _wandb_lacks_key() -> bool:
    """As W&B itself looks for one: its variables, its settings and ~/.netrc."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_MODE") in WANDB_ALONE:
        return False  # its import takes seconds
    import wandb
    from wandb.sdk.lib import wbauth

    settings = wandb.setup().settings
    if settings.mode in WANDB_ALONE:
        return False
    return wbauth.authenticate_session(host=settings.base_url, source="distft", prompt=False) is None


def _mlflow_refuses(address: str) -> bool:
    """Whether its server answers, and refuses whoever asks with what this process has."""
    try:
        path = f"{address.rstrip('/')}/api/2.0/mlflow/experiments/search?max_results=1"
        urllib.request.urlopen(path, timeout=ANSWER_SECONDS).close()
    except HTTPError as error:
        return error.code in (401, 403) and _mlflow_refuses_client(address)
    except (OSError, ValueError):
        return False  # a tracker that is away is told of once training has begun, see :mod:`.trackers`
    return False


def _mlflow_refuses_client(address: str) -> bool:
    """Of a server that refuses strangers: MLflow's own client finds variables, its file of credentials, ~/.netrc."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    from mlflow.exceptions import MlflowException
    from mlflow.tracking import MlflowClient

    try:
        MlflowClient(address).search_experiments(max_results=1)
    except MlflowException:
        return True
    return False

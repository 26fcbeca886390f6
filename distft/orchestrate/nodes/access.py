"""Before a run: whether its workers have the secrets that they will need."""

from __future__ import annotations

from secrets import token_hex

from distft.config import Job
from distft.errors import CapacityError, DistftError
from distft.orchestrate.nodes.check import places_of
from distft.orchestrate.nodes.shared import Shared
from distft.runs import Run
from distft.train.credentials import WHERE, lacking


def check_access(job: Job, run: Run) -> None:
    """Refuses a job whose trackers or whose bucket for checkpoints would refuse it; asks nobody where it has none.

    It is tried in a process of the cluster: workers have the environment that Ray was started in, not the driver's.

    Raises:
        DistftError: Which secret is missing, and where it belongs.
    """
    track = job.track
    buckets = [Shared(place, setting, token_hex(16)) for place, setting in places_of(job, run).items()]
    buckets = [one for one in buckets if one.in_bucket]
    if not buckets and track.wandb is None and track.mlflow is None:
        return
    import ray

    found = ray.get(ray.remote(num_cpus=0)(_refusal).remote(job, buckets))
    if found is not None:
        raise found


def _refusal(job: Job, buckets: list[Shared]) -> DistftError | None:
    """What is refused to this process; returned, since Ray would wrap what is raised."""
    for bucket in buckets:
        try:
            bucket.write("access")
        except DistftError as error:
            fix = f"{error.fix}, {WHERE}" if error.fix else None
            return CapacityError(error.what, where=f"{bucket.setting} {bucket.address}", fix=fix)
        finally:
            bucket.clear()
    return lacking(job)

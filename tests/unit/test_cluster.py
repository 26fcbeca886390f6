"""What a cluster holds, and the refusal of what it cannot."""

from __future__ import annotations

import pytest

from distft.config import Bounds, Job
from distft.errors import CapacityError
from distft.orchestrate.cluster import MARKET, Node, check_capacity, selectors, worker_resources, workers_of

SMALL = Node("10.0.0.1", {"CPU": 3.0})
GPUS = Node("10.0.0.2", {"CPU": 16.0, "GPU": 2.0})


def job(*settings: str) -> Job:
    values = {"model": {"source": "owner/model"}, "task": {"kind": "language_modeling"}, "data": {"source": "x.txt"}}
    return Job.from_values(values, ".", settings)


def just(workers: int) -> Bounds:
    return Bounds(min=workers, max=workers)


def test_workers_are_counted_node_by_node() -> None:
    """3 + 16 CPUs hold one and four workers of 3 or 4 CPUs: a worker does not lie on two nodes."""
    check_capacity(just(6), {"CPU": 3}, [SMALL, GPUS])
    check_capacity(just(4), {"CPU": 4}, [SMALL, GPUS])
    with pytest.raises(CapacityError):
        check_capacity(just(5), {"CPU": 4}, [SMALL, GPUS])


def test_the_refusal_says_what_there_is_and_what_would_fit() -> None:
    with pytest.raises(CapacityError) as refused:
        check_capacity(just(4), {"CPU": 1, "GPU": 1}, [SMALL, GPUS])
    text = str(refused.value)
    assert "4 workers of 1 CPU, 1 GPU" in text
    assert "10.0.0.2: 16 CPU, 2 GPU" in text
    assert "set cluster.workers: 2" in text
    assert refused.value.exit_status == 4


def test_fractions_of_a_cpu_add_up() -> None:
    check_capacity(just(10), {"CPU": 0.1}, [Node("n", {"CPU": 1.0})])


def test_a_gpu_is_asked_for_where_there_are_some() -> None:
    assert worker_resources(job(), [SMALL]) == {"CPU": 1}
    assert worker_resources(job(), [SMALL, GPUS]) == {"CPU": 1, "GPU": 1}
    assert worker_resources(job("cluster.resources_per_worker={CPU: 2, GPU: 0}"), [GPUS]) == {"CPU": 2, "GPU": 0}


def test_elastic_workers_need_room_for_the_least_of_them() -> None:
    assert workers_of(job("cluster.workers=3")) == just(3)
    elastic = workers_of(job("cluster.workers={min: 2, max: 8}"))
    assert elastic == Bounds(min=2, max=8)
    check_capacity(elastic, {"GPU": 1}, [SMALL, GPUS])
    with pytest.raises(CapacityError, match=r"at least 2 workers of 1 GPU.*holds 0"):
        check_capacity(elastic, {"GPU": 1}, [SMALL])


def test_rank_0_is_kept_off_spot_nodes_where_another_has_room() -> None:
    spot = Node("10.0.0.3", {"CPU": 8.0}, labels={MARKET: "spot"})
    assert selectors(2, {"CPU": 1}, [SMALL, GPUS]) is None
    assert selectors(3, {"CPU": 1}, [spot, SMALL]) == [{MARKET: "!spot"}, {}, {}]
    assert selectors(1, {"CPU": 4}, [spot, SMALL]) is None, "only the spot node holds it"

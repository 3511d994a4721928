"""What an ingress says of the cluster: by the controller's news, and by what it sees itself."""

import asyncio
from dataclasses import dataclass, replace
from typing import Any

import pytest

from cluster.ingress.deployment import Cluster
from cluster.metrics import IngressMetrics
from cluster.placement import ClusterView, HeadInfo, Loading, Placement
from cluster.rpc import Identity
from model.progress import Progress
from tests.cluster_fakes import DEADLINE_S

PLACED = Placement(3, (), ())
HEADS = (HeadInfo("head", "a:1"),)
STARTING = ClusterView(1, "loading experts", 40, "worker-1: no disk", None, (), 2)


@dataclass
class Pool:
    """As much of a HeadPool as is asked."""

    num_ready: int
    heads: Any = None

    def update(self, heads: Any) -> None:
        self.heads = heads


def cluster(num_ready: int, waker: Any = None) -> tuple[Cluster, Pool]:
    pool = Pool(num_ready)
    heads: Any = pool
    identity = Identity("ingress", "tiny")
    ingress = Cluster(None, heads, IngressMetrics(), identity, wait_s=DEADLINE_S, waker=waker)
    return ingress, pool


def test_before_any_news_nothing_is_ready() -> None:
    readiness = cluster(0)[0].readiness()
    assert (readiness.ready, readiness.phase) == (False, "waiting for the controller")


def test_while_the_cluster_starts_its_phase_is_the_controllers() -> None:
    ingress, pool = cluster(0)
    ingress._on_view(STARTING)
    readiness = ingress.readiness()
    assert (readiness.ready, readiness.phase, readiness.percent) == (False, "loading experts", 40)
    assert readiness.error == "worker-1: no disk"
    assert pool.heads == ()


def test_workers_that_load_are_told_before_anybody_can_ask_them() -> None:
    ingress, _ = cluster(0)
    loads = (
        Loading("worker-0", Progress(600, 150, 3.0), borrows=True),
        Loading("worker-1", Progress(600), borrows=False),
    )
    ingress._on_view(replace(STARTING, loading=loads))
    first, second = ingress.readiness().loading
    assert (first.worker, first.source) == ("worker-0", "lender")
    assert (first.loaded_bytes, first.total_bytes) == (150, 600)
    assert (first.bytes_per_s, first.left_s) == (50.0, 9.0)
    assert (second.source, second.left_s) == ("disk", None)


@pytest.mark.parametrize(
    ("placement", "listed", "num_ready", "is_ready"),
    [
        (PLACED, HEADS, 1, True),
        (PLACED, HEADS, 0, True),  # lost just now: requests wait for the next
        (PLACED, (), 1, True),  # the controller has lost sight of it
        (PLACED, (), 0, False),
        (None, (), 1, False),
    ],
)
def test_ready_is_where_experts_are_placed_and_a_head_is_there_or_due(
    placement: Placement | None, listed: tuple[HeadInfo, ...], num_ready: int, is_ready: bool
) -> None:
    ingress, pool = cluster(num_ready)
    ingress._on_view(replace(STARTING, placement=placement, heads=listed))
    readiness = ingress.readiness()
    assert readiness.ready == is_ready
    assert (readiness.phase == "ready") == is_ready
    assert readiness.heads_ready == num_ready
    assert pool.heads == listed


BEGUN = replace(STARTING, error=None)
READY = replace(BEGUN, placement=PLACED, heads=HEADS)


@pytest.mark.parametrize(
    "news",
    [
        [replace(BEGUN, takes_over=True), READY],
        [BEGUN, replace(BEGUN, takes_over=True), READY],  # it has not looked for workers at first
        [READY],
    ],
)
def test_a_request_waits_for_a_controller_that_takes_over(news: list[ClusterView]) -> None:
    async def run() -> bool:
        ingress, _ = cluster(0)
        asked = asyncio.create_task(ingress.settled())
        for view in news:
            await asyncio.sleep(0)
            assert not asked.done()
            ingress._on_view(view)
        return (await asked).ready

    assert asyncio.run(asyncio.wait_for(run(), DEADLINE_S))


def test_a_service_that_sleeps_takes_requests() -> None:
    """Else nothing would send it the one that wakes it."""
    ingress, _ = cluster(0)
    ingress._on_view(replace(BEGUN, is_asleep=True))
    readiness = ingress.readiness()
    assert (readiness.ready, readiness.phase) == (True, "asleep until the next request")


def test_a_request_wakes_a_service_that_may_sleep_and_waits_for_it() -> None:
    """Also where its controller has started anew meanwhile, and has not looked for heads yet."""
    wishes: list[str] = []

    async def run() -> bool:
        ingress, _ = cluster(0, waker=lambda: wishes.append("wake"))
        ingress._on_view(replace(BEGUN, takes_over=False))
        asked = asyncio.create_task(ingress.settled())
        await asyncio.sleep(0)
        assert not asked.done()
        ingress._on_view(READY)
        return (await asked).ready

    assert asyncio.run(asyncio.wait_for(run(), DEADLINE_S))
    assert wishes == ["wake"]


@pytest.mark.parametrize(
    "view", [replace(BEGUN, takes_over=False), replace(STARTING, takes_over=True)]
)
def test_a_request_is_told_at_once_of_a_start_that_takes_long_or_fails(view: ClusterView) -> None:
    ingress, _ = cluster(0)
    ingress._on_view(view)
    settled = asyncio.run(asyncio.wait_for(ingress.settled(), DEADLINE_S / 2))
    assert (settled.ready, settled.phase) == (False, "loading experts")

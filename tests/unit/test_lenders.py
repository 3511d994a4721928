"""Lenders are where they are needed, and nowhere else."""

import asyncio
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest
from ray.exceptions import RayActorError

from cluster import lenders as lenders_module
from cluster.lenders import MAX_LENDERS, REST_S, Lenders
from cluster.network import Network

MODEL = Path("/models/mixtral")


class FakeCluster:
    """Nodes, which of them have the folder, and the lenders that were started on them."""

    def __init__(self, **has_folder: bool) -> None:
        self.has_folder = has_folder
        self.asked: list[str] = []
        self.started: list[str] = []
        self.failing: set[str] = set()
        self.now = 0.0

    def which_have(self, model: Path, nodes: Collection[str]) -> dict[str, bool]:
        assert model == MODEL
        self.asked += sorted(nodes)
        return {node: self.has_folder[node] for node in nodes}

    def start(self, _lenders: Lenders, node: str) -> Any:
        self.started.append(node)

        async def info() -> None:
            if node in self.failing:
                raise RayActorError

        method = type("Method", (), {"remote": staticmethod(info)})
        return type("Handle", (), {"info": method})


@pytest.fixture
def looked_round(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Has lenders look round so many times, REST_S apart."""

    def look(cluster: FakeCluster, times: int = 1, lenders: Lenders | None = None) -> Lenders:
        monkeypatch.setattr(lenders_module, "alive_nodes", lambda: set(cluster.has_folder))
        monkeypatch.setattr(lenders_module, "which_have", cluster.which_have)
        monkeypatch.setattr(lenders_module.time, "monotonic", lambda: cluster.now)
        monkeypatch.setattr(lenders_module.ray, "kill", lambda handle: None)
        monkeypatch.setattr(Lenders, "_start", lambda self, node: cluster.start(self, node))
        keeper = lenders or Lenders(MODEL, "w", Network())

        async def run() -> None:
            for _ in range(times):
                await keeper._look_round()
                cluster.now += REST_S

        asyncio.run(run())
        return keeper

    return look


def test_where_every_node_has_the_folder_nothing_is_started(looked_round: Any) -> None:
    cluster = FakeCluster(a=True, b=True)
    looked_round(cluster, times=3)
    assert cluster.started == []
    assert cluster.asked == ["a", "b"]  # once


def test_where_one_lacks_it_those_that_have_it_lend_but_not_all(looked_round: Any) -> None:
    having = {f"having{number}": True for number in range(MAX_LENDERS + 2)}
    cluster = FakeCluster(**having, lacking=False)
    looked_round(cluster, times=3)
    assert len(cluster.started) == len(set(cluster.started)) == MAX_LENDERS
    assert set(cluster.started) <= having.keys()


def test_a_node_that_joins_without_the_folder_is_noticed(looked_round: Any) -> None:
    cluster = FakeCluster(a=True)
    keeper = looked_round(cluster)
    cluster.has_folder["b"] = False
    looked_round(cluster, lenders=keeper)
    assert cluster.started == ["a"]
    assert cluster.asked == ["a", "b"]


def test_a_lender_that_fails_is_started_again_and_others_take_its_place(looked_round: Any) -> None:
    having = {f"having{number}": True for number in range(MAX_LENDERS + 1)}
    cluster = FakeCluster(**having, lacking=False)
    keeper = looked_round(cluster)
    lost = cluster.started[0]
    (spare,) = having.keys() - set(cluster.started)
    cluster.failing = {lost}
    cluster.now -= REST_S  # within its rest
    looked_round(cluster, lenders=keeper)
    cluster.now -= REST_S
    looked_round(cluster, lenders=keeper)
    assert cluster.started.count(spare) == 1
    assert cluster.started.count(lost) == 1
    cluster.failing = set()
    looked_round(cluster, lenders=keeper)
    assert cluster.started.count(lost) == 2


def test_nobody_is_asked_to_lend_what_no_node_has(looked_round: Any) -> None:
    cluster = FakeCluster(a=False, b=False)
    looked_round(cluster)
    assert cluster.started == []

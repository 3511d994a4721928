"""The keeper of a head's streams goes on whatever becomes of one worker's."""

import threading
from collections.abc import Iterator

import pytest

from cluster.head import connections
from cluster.head.connections import Connections
from cluster.head.feed import PlacementFeed
from cluster.placement import WorkerInfo
from cluster.rpc import Identity
from model import Mixtral
from tests.cluster_fakes import DEADLINE_S, MemoryStream, Worker

INFOS = [WorkerInfo(f"worker-{number}", "127.0.0.1:1", number + 1, 0) for number in range(3)]


@pytest.fixture
def feed() -> PlacementFeed:
    return PlacementFeed()


@pytest.fixture
def kept(
    feed: PlacementFeed, mixtral: Mixtral, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Connections]:
    """Connections to workers that all answer."""
    monkeypatch.setattr(
        connections, "WorkerStream", lambda info, identity: MemoryStream(Worker(info, mixtral))
    )
    kept = Connections(Identity("head", "f"), feed, drain_s=DEADLINE_S)
    yield kept
    kept.close()


def test_a_worker_that_no_thread_can_be_had_for_is_tried_again(
    kept: Connections, feed: PlacementFeed, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = threading.Thread.start
    denied: list[str] = []

    def deny_each_once(thread: threading.Thread) -> None:
        if thread.name.startswith("connect") and thread.name not in denied:
            denied.append(thread.name)
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", deny_each_once)
    kept.want(INFOS)
    with feed.changed:
        assert feed.changed.wait_for(lambda: kept.streams.keys() == set(INFOS), 5.0)
    assert len(denied) == len(INFOS)
    assert not kept._connecting

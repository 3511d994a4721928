"""What everybody makes of the controller's news, also when it starts anew."""

import asyncio
from contextlib import suppress
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from ray.serve._private.common import TimeStampedValue

from cluster import follow as follow_module
from cluster.follow import (
    DECIDED_AT,
    HEADS_WANTED,
    HeadReport,
    Publisher,
    as_heads_were_told,
    follow,
)
from cluster.placement import ClusterView, HeadInfo, Placement

STARTING = ClusterView(1, "starting expert workers", 0, None, None, (), 1)
READY = ClusterView(4, "ready", 100, None, Placement(1, (), ()), (HeadInfo("head", "a:1"),), 1)


class Controller:
    """Answers with one view after the other; an exception is raised. Then never again."""

    def __init__(self, *answers: ClusterView | Exception) -> None:
        self._answers = list(answers)
        self.asked: list[tuple[int, HeadReport | None]] = []
        self.watch = self
        self.is_done = asyncio.Event()

    async def remote(self, known: int, head: HeadReport | None) -> ClusterView:
        self.asked.append((known, head))
        if not self._answers:
            self.is_done.set()
            await asyncio.Event().wait()
        answer = self._answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


def seen(
    *answers: ClusterView | Exception, faults: int = 0, report_faults: int = 0
) -> tuple[list[ClusterView], Controller]:
    """The views that a follower of this controller acts on.

    faults, report_faults: how often acting on a view, and reporting, fail at first.
    """
    views: list[ClusterView] = []
    left = {"view": faults, "report": report_faults}

    def fail(what: str) -> None:
        left[what] -= 1
        if left[what] >= 0:
            raise RuntimeError(f"a fault of the {what}")

    def on_view(view: ClusterView) -> None:
        fail("view")
        views.append(view)

    def report() -> None:
        fail("report")

    controller: Any = None

    async def scenario() -> None:
        nonlocal controller
        controller = Controller(*answers)
        task = asyncio.create_task(follow(controller, on_view, report))
        async with asyncio.timeout(10):
            await controller.is_done.wait()
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task

    asyncio.run(scenario())
    return views, controller


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follow_module, "RETRY_AFTER_S", 0)


def test_each_view_counts_once() -> None:
    views, controller = seen(STARTING, STARTING, READY, READY)
    assert views == [STARTING, READY]
    assert [known for known, _ in controller.asked] == [0, 1, 1, 4, 4]


def test_a_controller_that_is_away_changes_nothing() -> None:
    views, _ = seen(READY, ConnectionError("gone"), ConnectionError("gone"), READY)
    assert views == [READY]


def test_a_controller_that_starts_anew_does_not_make_anybody_forget() -> None:
    again = replace(READY, version=3, placement=Placement(2, (), ()))
    views, _ = seen(READY, ConnectionError("gone"), STARTING, replace(STARTING, percent=5), again)
    assert views == [READY, again]


def test_a_controller_that_has_been_replaced_is_not_believed() -> None:
    """It may go on for a while beside the one that took over; its heads are those of before."""
    before = replace(READY, version=9, heads=(), placement=Placement(7, (), (), term=1))
    now = replace(READY, version=2, placement=Placement(1, (), (), term=2))
    views, _ = seen(before, now, replace(before, version=10), now)
    assert views == [before, now]


def test_another_view_of_the_same_number_is_news() -> None:
    """The versions of a controller that starts anew may by chance be where the last one's were."""
    again = replace(READY, heads=())
    assert seen(READY, again)[0] == [READY, again]


def test_a_view_that_could_not_be_acted_on_is_told_again(caplog: pytest.LogCaptureFixture) -> None:
    views, _ = seen(STARTING, STARTING, READY, faults=1)
    assert views == [STARTING, READY]
    assert "RuntimeError: a fault of the view" in caplog.text
    assert "does not answer" not in caplog.text


def test_a_report_that_fails_is_not_the_controllers_fault(caplog: pytest.LogCaptureFixture) -> None:
    views, _ = seen(READY, report_faults=1)
    assert views == [READY]
    assert "RuntimeError: a fault of the report" in caplog.text
    assert "does not answer" not in caplog.text


# --- how many heads Serve runs ---


def told(*, target: int = 5, num_calls: float = 0.0, **heads: tuple[float, float]) -> int:
    """What Serve's policy makes of the last decision that each head has heard of: its time, and
    the number of heads. Before, each had heard of an older one.

    target: heads that are wanted so far. num_calls: that wait for one.
    """
    recorded = {
        DECIDED_AT: {
            head: [TimeStampedValue(1, 0), TimeStampedValue(2, at)]
            for head, (at, _) in heads.items()
        },
        HEADS_WANTED: {
            head: [TimeStampedValue(1, 99), TimeStampedValue(2, number)]
            for head, (_, number) in heads.items()
        },
    }
    context: Any = SimpleNamespace(
        target_num_replicas=target,
        raw_metrics=recorded if heads else {},
        total_queued_requests=num_calls,
    )
    number, state = as_heads_were_told(context)
    assert state == {}
    return number


def test_serve_runs_as_many_heads_as_the_latest_decision_says() -> None:
    assert told() == 5
    assert told(first=(10.0, 2)) == 2
    assert told(first=(10.0, 2), second=(20.0, 3), third=(15.0, 4)) == 3
    assert told(first=(10.0, 0)) == 0


def test_a_call_that_waits_starts_the_first_head_and_no_other() -> None:
    assert told(target=0) == 0
    assert told(target=0, num_calls=2.0) == 1
    assert told(target=3, num_calls=2.0) == 3
    assert told(target=0, num_calls=2.0, first=(10.0, 2)) == 2


def test_a_service_that_falls_asleep_has_no_placement_any_more() -> None:
    """Unlike that of a controller which has yet to learn what is placed."""
    asleep = replace(READY, version=5, placement=None, heads=(), is_asleep=True)
    waking = replace(asleep, version=6, is_asleep=False)
    assert seen(READY, asleep, waking)[0] == [READY, asleep, waking]
    assert seen(READY, waking)[0] == [READY]


def test_who_waits_hears_of_what_differs_and_of_nothing_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(follow_module, "WATCH_S", 60.0)

    async def run() -> None:
        news = Publisher(STARTING)
        assert await news.other_than(0) == STARTING  # at once, to whoever comes anew
        waiting = asyncio.create_task(news.other_than(STARTING.version))
        ready = asyncio.create_task(news.until(lambda view: view.phase == "ready"))
        news.publish(STARTING)
        await asyncio.sleep(0)
        assert not waiting.done()
        news.publish(replace(STARTING, percent=50))
        view = await asyncio.wait_for(waiting, 5)
        assert (view.version, view.percent) == (STARTING.version + 1, 50)
        assert not ready.done()
        news.publish(replace(news.view, phase="ready"))
        await asyncio.wait_for(ready, 5)
        monkeypatch.setattr(follow_module, "WATCH_S", 0.01)
        assert await news.other_than(news.view.version) == news.view  # nothing new, in time

    asyncio.run(run())

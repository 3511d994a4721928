"""A request that finds no head wakes the service, however often that fails."""

import asyncio

import pytest

from cluster.ingress import waking
from cluster.ingress.waking import Waker

LIMIT_S = 10.0


class Handle:
    """Of a deployment: notes what is called, fails at first as often as it is told to."""

    def __init__(self, name: str, called: list[str], *, failures: int = 0) -> None:
        self.has_answered = asyncio.Event()
        self._name = name
        self._called = called
        self._failures = failures
        self.wake = self.awake = self

    async def remote(self) -> None:
        self._called.append(self._name)
        self._failures -= 1
        if self._failures >= 0:
            raise ConnectionError("gone")
        self.has_answered.set()


async def woken(*, wishes: int = 1, failures: int = 0) -> list[str]:
    """Whom so many wishes at a time have called, in order."""
    called: list[str] = []
    heads = Handle("heads", called)
    waker = Waker(Handle("controller", called, failures=failures), heads)
    for _ in range(wishes):
        waker()
    async with asyncio.timeout(LIMIT_S):
        await heads.has_answered.wait()
    await waker.close()
    return called


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waking, "AGAIN_S", 0)


def test_the_controller_hears_before_a_head_starts() -> None:
    assert asyncio.run(woken()) == ["controller", "heads"]


def test_many_wishes_at_a_time_are_one() -> None:
    assert asyncio.run(woken(wishes=5)) == ["controller", "heads"]


def test_a_controller_that_is_away_is_asked_again() -> None:
    assert asyncio.run(woken(failures=2)) == ["controller"] * 3 + ["heads"]

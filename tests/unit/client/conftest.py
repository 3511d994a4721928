"""Every test of the client is one of both clients."""

import asyncio
from collections.abc import Iterator

import pytest

from cluster.client import io
from tests.client_fakes import Asynchronous, Blocking, Way


@pytest.fixture(params=["blocking", "asynchronous"])
def way(request: pytest.FixtureRequest) -> Iterator[Way]:
    if request.param == "blocking":
        yield Blocking()
        return
    with asyncio.Runner() as runner:
        yield Asynchronous(runner)


@pytest.fixture(autouse=True)
def _no_settings_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MAESTRALE_BASE_URL", raising=False)
    monkeypatch.delenv("MAESTRALE_API_KEY", raising=False)


@pytest.fixture
def slept_s(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that clients waited, instead of waiting."""
    slept: list[float] = []

    async def sleep(_self: object, seconds: float) -> None:
        slept.append(seconds)

    monkeypatch.setattr(io.BlockingIo, "sleep", sleep)
    monkeypatch.setattr(io.AsyncIo, "sleep", sleep)
    return slept

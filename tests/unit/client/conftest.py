"""Every test of the client is one of both clients."""

import asyncio
from collections.abc import Iterator

import pytest

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

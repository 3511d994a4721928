"""Operators ask, through the SDK, for a better placement; callers see what moves."""

import asyncio
import json

import httpx
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from cluster.client import Client
from cluster.console import console, print_rebalancing
from cluster.errors import APIStatusError
from cluster.ingress import admin, errors
from cluster.ingress.auth import Access, ApiKey
from cluster.schema import Move, Rebalancing

FOUND = Rebalancing(
    moves=[Move(worker="worker-1", layer=5, expert=2, slice_number=1, num_slices=2)],
    busiest_before=[1.0, 1.76],
    busiest_after=[1.0, 1.09],
    gain=0.243,
    adopted=False,
)


LOOPBACK = "http://127.0.0.1"
NO_KEYS = Access(allow_open=True)
KEYS = Access.with_keys(
    [ApiKey("user"), ApiKey("operator", is_admin=True)], allow_open=False, allowed_origins=()
)


def app_of(
    answer: Rebalancing | Exception | None, asked: list[bool], access: Access = NO_KEYS
) -> FastAPI:
    """answer: of the controller; an exception is raised, a TimeoutError by never answering."""

    async def rebalance(dry_run: bool) -> Rebalancing | None:
        asked.append(dry_run)
        if isinstance(answer, TimeoutError):
            await asyncio.Event().wait()
        if isinstance(answer, Exception):
            raise answer
        return answer

    app = FastAPI()
    app.include_router(admin.router(rebalance, access))
    errors.install(app)
    return app


def client_of(answer: Rebalancing | Exception | None, asked: list[bool]) -> Client:
    server = TestClient(app_of(answer, asked), base_url=LOOPBACK)

    def answer_to(request: httpx.Request) -> httpx.Response:
        reply = server.request(
            request.method, str(request.url), content=request.content, headers=request.headers
        )
        return httpx.Response(reply.status_code, headers=reply.headers, content=reply.content)

    return Client(LOOPBACK, transport=httpx.MockTransport(answer_to), max_retries=0)


@pytest.mark.parametrize("dry_run", [True, False])
def test_the_sdk_gets_what_the_controller_found(dry_run: bool) -> None:
    asked: list[bool] = []
    with client_of(FOUND, asked) as client:
        assert client.cluster.rebalance(dry_run=dry_run) == FOUND
    assert asked == [dry_run]


def test_before_the_first_placement_it_is_not_ready() -> None:
    with (
        client_of(None, []) as client,
        pytest.raises(APIStatusError, match="not placed yet") as refused,
    ):
        client.cluster.rebalance()
    assert refused.value.status_code == 503


@pytest.mark.parametrize("failure", [TimeoutError(), ConnectionError("actor 10.0.0.7 is dead")])
def test_without_a_controller_callers_are_told_to_come_back(
    failure: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(admin, "WAIT_S", 0.01)
    with (
        client_of(failure, []) as client,
        pytest.raises(APIStatusError, match="the controller does not answer") as refused,
    ):
        client.cluster.rebalance()
    assert refused.value.status_code == 503
    assert refused.value.response.headers["retry-after"] == "2"
    assert "10.0.0.7" not in refused.value.response.text


@pytest.mark.parametrize(
    ("access", "host", "key", "status"),
    [
        (KEYS, "127.0.0.1", "operator", 200),
        (KEYS, "10.1.2.3", "operator", 200),
        (KEYS, "10.1.2.3", "user", 403),
        (KEYS, "127.0.0.1", "user", 403),
        (KEYS, "127.0.0.1", "guess", 403),
        (KEYS, "127.0.0.1", None, 403),
        (NO_KEYS, "127.0.0.1", None, 200),
        (NO_KEYS, "127.0.0.1", "any", 200),
        (NO_KEYS, "10.1.2.3", None, 403),
    ],
)
def test_only_operators_change_the_cluster(
    access: Access, host: str, key: str | None, status: int
) -> None:
    """Those with a key that is marked, or on loopback where there are no keys."""
    asked: list[bool] = []
    server = TestClient(app_of(FOUND, asked, access), base_url=f"http://{host}")
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    reply = server.post("/admin/rebalance", json={"dry_run": False}, headers=headers)
    assert reply.status_code == status
    assert asked == ([False] if status == 200 else [])
    if status == 403:
        assert reply.json()["error"]["type"] == "permission_error"
        assert "marked as admin" in reply.json()["error"]["message"]


@pytest.mark.parametrize("key", ["k" * 100_000, "\ud800", "k\ud800" * 100_000])
def test_an_unknown_key_is_told_short_and_readable(key: str) -> None:
    server = TestClient(app_of(FOUND, []), base_url=LOOPBACK)
    headers = {"Content-Type": "application/json"}
    content = json.dumps({key: 1})
    reply = server.post("/admin/rebalance", content=content, headers=headers)
    assert reply.status_code == 400
    assert len(reply.content) < 1_000


def test_people_are_told_what_moves_and_what_for() -> None:
    with console.capture() as told:
        print_rebalancing(FOUND)
    for part in ("worker-1", "1 of 2", "1.76", "1.09", "1 experts would be loaded", "24.3%"):
        assert part in told.get()
    with console.capture() as told:
        print_rebalancing(FOUND.model_copy(update={"moves": []}))
    assert "Nothing to move" in told.get()

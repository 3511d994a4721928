"""When the SDK asks again, how long it waits first, and that nothing leaks on the way."""

import email.utils
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster import errors
from cluster.client import retry
from tests.client_fakes import (
    COMPLETION,
    DONE,
    Packets,
    Server,
    Way,
    event,
    events_response,
    text_chunk,
)

NOW_S = 1_700_000_000.0


def waits(headers: dict[str, str] | None, num_retries: int = 0, chance: float = 0.0) -> float:
    return retry.wait_s(headers, num_retries, now_s=NOW_S, chance=chance)


def date(seconds: float) -> str:
    return email.utils.formatdate(NOW_S + seconds, usegmt=True)


# --- the policy ---


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"retry-after": "20"}, 20),
        ({"retry-after": "120"}, 120),
        ({"retry-after": "0.5"}, 0.5),
        ({"retry-after": date(20)}, 20),
        ({"retry-after-ms": "2500"}, 2.5),
        ({"retry-after-ms": "2500", "retry-after": "20"}, 2.5),
        ({"retry-after-ms": "soon", "retry-after": "20"}, 20),
    ],
)
def test_what_a_server_asks_for_is_waited(headers: dict[str, str], seconds: float) -> None:
    assert waits(headers, num_retries=3, chance=0.5) == seconds


@pytest.mark.parametrize(
    "retry_after",
    [
        "0", "-10", "121", "1e9", "nan", "inf", "", "soon", "99999999999999999999999999999999999",
        date(-10), date(0), date(121),
        "Fri, 99 Sep 2023 16:26:57 GMT", "Zun, 29 September 2023 26:26:57 GMT", "2023-09-29",
        "Fri, 29 Sep 99999 16:26:57 GMT",
    ],
)  # fmt: skip
def test_what_cannot_be_waited_or_read_is_not(retry_after: str) -> None:
    assert waits({"retry-after": retry_after}) == 0.5


def test_waits_double_up_to_eight_seconds() -> None:
    assert [waits(None, number) for number in range(6)] == [0.5, 1, 2, 4, 8, 8]
    assert waits({}, 10_000) == 8


@given(number=st.integers(0, 50), chance=st.floats(0, 1, exclude_max=True))
def test_chance_takes_off_a_quarter_at_most(number: int, chance: float) -> None:
    longest = waits(None, number)
    assert 0.75 * longest <= waits(None, number, chance) <= longest


@pytest.mark.parametrize("status", [408, 409, 429, 500, 502, 503, 504, 529])
def test_what_may_pass_is_worth_a_retry(status: int) -> None:
    assert retry.is_worth_it(httpx.Response(status))
    assert not retry.is_worth_it(httpx.Response(status, headers={"X-Should-Retry": "false"}))


@pytest.mark.parametrize("status", [200, 307, 400, 401, 403, 404, 413, 422])
def test_what_will_not_pass_is_not(status: int) -> None:
    assert not retry.is_worth_it(httpx.Response(status))
    assert retry.is_worth_it(httpx.Response(status, headers={"X-Should-Retry": "true"}))


@pytest.mark.parametrize(
    ("error", "is_worth_it"),
    [
        (httpx.ConnectError("refused"), True),
        (httpx.ConnectTimeout("slow"), True),
        (httpx.ReadTimeout("slow"), True),
        (httpx.RemoteProtocolError("gone"), True),
        (httpx.ReadError("reset"), True),
        (httpx.ProxyError("407"), True),
        (httpx.LocalProtocolError("a header of ours"), False),
        (httpx.DecodingError("not gzip"), False),
        (httpx.UnsupportedProtocol("ftp"), False),
    ],
)
def test_only_a_connection_that_may_come_about_is(
    error: httpx.RequestError, is_worth_it: bool
) -> None:
    assert retry.is_worth_it(error) is is_worth_it


# --- the client ---


def turned_away(status: int = 503, **headers: str) -> httpx.Response:
    return httpx.Response(status, headers=headers, stream=Packets([b'{"error": ', b'"no"}']))


def succeeds() -> httpx.Response:
    return httpx.Response(200, json=COMPLETION)


def test_a_call_is_made_again_until_it_succeeds(way: Way, slept_s: list[float]) -> None:
    server = Server(turned_away(), httpx.ConnectError("refused"), succeeds())
    reply = way.client(server, max_retries=2).completions.create(prompt="a")
    assert reply.choices[0].text == " blows"
    assert [request.headers.get("x-retry-count") for request in server.requests] == [None, "1", "2"]
    assert len({request.content for request in server.requests}) == 1
    assert [0.375 <= slept_s[0] <= 0.5, 0.75 <= slept_s[1] <= 1] == [True, True]


def test_the_last_failure_is_raised(way: Way, slept_s: list[float]) -> None:
    server = Server(turned_away(), turned_away(429, **{"x-request-id": "req-2"}))
    with pytest.raises(errors.RateLimitError, match=r"^no$") as caught:
        way.client(server, max_retries=1).completions.create(prompt="a")
    assert caught.value.request_id == "req-2"
    assert len(slept_s) == 1
    server = Server(turned_away(), httpx.ReadTimeout("slow"))
    with pytest.raises(errors.APITimeoutError):
        way.client(server, max_retries=1).completions.create(prompt="a")


def test_a_server_is_waited_for_as_long_as_it_asks(way: Way, slept_s: list[float]) -> None:
    server = Server(turned_away(429, **{"Retry-After": "7"}), succeeds())
    way.client(server, max_retries=1).completions.create(prompt="a")
    assert slept_s == [7]


@pytest.mark.parametrize("status", [400, 404])
def test_a_refusal_is_final(way: Way, status: int, slept_s: list[float]) -> None:
    server = Server(httpx.Response(status), succeeds())
    with pytest.raises(errors.APIStatusError):
        way.client(server, max_retries=2).completions.create(prompt="a")
    assert slept_s == []


def test_without_retries_a_call_is_made_once(way: Way, slept_s: list[float]) -> None:
    server = Server(turned_away(), succeeds())
    with pytest.raises(errors.InternalServerError):
        way.client(server, max_retries=0).completions.create(prompt="a")
    assert (len(server.requests), slept_s) == (1, [])


def test_a_cluster_that_is_not_ready_is_not_asked_again(way: Way, slept_s: list[float]) -> None:
    body = {"ready": False, "phase": "loading", "percent": 4, "epoch": 0, "heads_ready": 0}
    server = Server(httpx.Response(503, json={**body, "heads_expected": 1, "workers": []}))
    assert not way.client(server, max_retries=2).cluster.status().ready
    assert (len(server.requests), slept_s) == (1, [])


def test_a_stream_is_asked_for_again_before_its_first_chunk(way: Way, slept_s: list[float]) -> None:
    body = Packets([event(text_chunk("a")), DONE])
    server = Server(turned_away(), events_response(body))
    stream = way.client(server, max_retries=1).completions.create(prompt="a", stream=True)
    assert [chunk.choices[0].text for chunk in stream] == ["a"]
    assert len(slept_s) == 1


@pytest.mark.parametrize("stream", [False, True])
def test_no_connection_leaks_on_retries(way: Way, stream: bool, slept_s: list[float]) -> None:
    refused = [turned_away() for _ in range(3)]
    broken = Packets([b'{"err'], httpx.ReadError("reset"))
    server = Server(*refused, httpx.Response(500, stream=broken))
    with pytest.raises(errors.APIConnectionError):
        way.client(server, max_retries=3).completions.create(prompt="a", stream=stream)
    bodies: list[Any] = [response.stream for response in refused]
    assert all(response.is_closed for response in refused)
    assert broken.is_closed
    assert len(bodies) == len(slept_s) == 3

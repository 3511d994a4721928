"""Streams of chunks, however they are cut and however they end."""

import json
import sys
from itertools import pairwise
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cluster import errors
from tests.client_fakes import (
    CHAT,
    COMPLETION,
    DONE,
    Blocking,
    Packets,
    Server,
    Way,
    event,
    events_response,
    text_chunk,
)


def stream_of(way: Way, body: Packets) -> Any:
    return way.client(Server(events_response(body))).completions.create(prompt="a", stream=True)


def test_a_stream_is_its_chunks_in_order(way: Way) -> None:
    texts = ["The ", "wind 🌬", "\u2028", ""]
    body = Packets([b": keep-alive\n\n", *(event(text_chunk(text)) for text in texts), DONE])
    assert [chunk.choices[0].text for chunk in stream_of(way, body)] == texts
    assert body.is_closed


def test_a_chat_stream_is_its_deltas_in_order(way: Way) -> None:
    deltas: list[dict[str, Any]] = [{"role": "assistant", "content": ""}, {"content": "Yes"}, {}]
    chunks = [{**CHAT, "choices": [{"index": 0, "delta": delta}]} for delta in deltas]
    for chunk in chunks:
        chunk["object"] = "chat.completion.chunk"
    server = Server(events_response(Packets([*map(event, chunks), DONE])))
    stream = way.client(server).chat.completions.create(messages=[], stream=True)
    assert [chunk.choices[0].delta.content for chunk in stream] == ["", "Yes", None]
    assert server.requests[0].url.path == "/v1/chat/completions"
    assert server.body == {"messages": [], "stream": True}


STREAM = b"".join(
    [event(text_chunk("Il maestrale ")), b":\r\n\r\n", event(text_chunk("è 🌬")), DONE]
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])  # it keeps nothing
@given(places=st.lists(st.integers(0, len(STREAM)), max_size=8))
def test_a_stream_cut_anyhow_has_the_same_chunks(way: Way, places: list[int]) -> None:
    edges = [0, *sorted(places), len(STREAM)]
    body = Packets([STREAM[a:b] for a, b in pairwise(edges)])
    assert [chunk.choices[0].text for chunk in stream_of(way, body)] == ["Il maestrale ", "è 🌬"]


def test_a_chunk_is_returned_before_the_next_is_read(way: Way) -> None:
    body = Packets([event(text_chunk("a")), event(text_chunk("b")), DONE])
    next(stream_of(way, body))
    assert body.num_read == 1


def test_nothing_is_read_past_the_end_mark(way: Way) -> None:
    body = Packets([event(text_chunk("a")), DONE + event("not a completion"), b"more"])
    assert len(list(stream_of(way, body))) == 1
    assert body.num_read == 2


def test_a_stream_knows_its_request(way: Way) -> None:
    stream = stream_of(way, Packets([DONE]))
    assert stream.request_id == "req-9"
    assert "req-9" in repr(stream)
    assert "open" in repr(stream)
    stream.close()
    assert "closed" in repr(stream)


@pytest.mark.parametrize("num_read", [0, 1])
def test_a_stream_closed_early_closes_its_connection(way: Way, num_read: int) -> None:
    body = Packets([event(text_chunk("a")), event(text_chunk("b")), DONE])
    stream = stream_of(way, body)
    for _ in range(num_read):
        next(stream)
    assert not body.is_closed
    stream.close()
    assert body.is_closed
    assert list(stream) == []
    stream.close()


def test_a_stream_left_closes_its_connection(way: Way) -> None:
    body = Packets([event(text_chunk("a")), DONE])
    with stream_of(way, body) as stream:
        next(stream)
    assert body.is_closed


def test_a_stream_left_by_the_callers_error_closes_its_connection(way: Way) -> None:
    body = Packets([event(text_chunk("a")), DONE])
    with pytest.raises(KeyError), stream_of(way, body) as stream:
        next(stream)
        raise KeyError("the caller's own")
    assert body.is_closed


@pytest.mark.skipif(sys.implementation.name != "cpython", reason="needs reference counting")
def test_a_blocking_stream_dropped_by_break_closes_its_connection() -> None:
    body = Packets([event(text_chunk("a")), DONE])
    for _ in stream_of(Blocking(), body):
        break
    assert body.is_closed


@pytest.mark.parametrize(
    ("error", "message"),
    [
        ({"message": "worker lost", "type": "server_error", "code": None}, "^worker lost$"),
        ({"message": "worker lost", "code": 500}, "^worker lost$"),
        ("worker lost", "^worker lost$"),
        ({"reason": "worker lost"}, "worker lost"),
    ],
)
def test_an_error_in_the_stream_is_raised_after_the_chunks(
    way: Way, error: object, message: str
) -> None:
    body = Packets([event(text_chunk("a")), event({"error": error}), DONE])
    stream = stream_of(way, body)
    assert next(stream).choices[0].text == "a"
    with pytest.raises(errors.APIStreamError, match=message):
        next(stream)
    assert body.is_closed
    assert list(stream) == []


@pytest.mark.parametrize("end", [b"", b"data: [DONE]", b"data: [DONE]\n", b'data: {"id"'])
def test_a_stream_without_its_end_mark_broke_off(way: Way, end: bytes) -> None:
    body = Packets([event(text_chunk("a")), end])
    stream = stream_of(way, body)
    next(stream)
    with pytest.raises(errors.APIStreamError, match=r"req-9.* before \[DONE\], after 1 chunks"):
        next(stream)
    assert body.is_closed


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (httpx.RemoteProtocolError("incomplete chunked read"), "incomplete chunked read"),
        (httpx.ReadError("reset by peer"), "reset by peer"),
        (httpx.ReadTimeout("timed out"), "nothing came within 600 s"),
    ],
)
def test_a_connection_that_fails_in_a_stream_breaks_it_off(
    way: Way, error: Exception, message: str
) -> None:
    body = Packets([event(text_chunk("a"))], error)
    stream = stream_of(way, body)
    next(stream)
    with pytest.raises(errors.APIStreamError, match=message) as caught:
        next(stream)
    assert caught.value.__cause__ is error
    assert body.is_closed


@pytest.mark.parametrize("data", [b"{}", b"7", b"hello", b"", b"[" * 5_000])
def test_a_chunk_of_another_shape_is_named(way: Way, data: bytes) -> None:
    body = Packets([b"data: " + data + b"\n\n", DONE])
    with pytest.raises(errors.APIResponseValidationError, match="not a Completion"):
        next(stream_of(way, body))
    assert body.is_closed


def test_an_error_before_the_first_chunk_is_raised_by_create(way: Way) -> None:
    body = Packets([b'{"error": {"message": "too many", ', b'"type": "overloaded"}}'])
    server = Server(httpx.Response(429, stream=body))
    with pytest.raises(errors.RateLimitError, match="too many"):
        way.client(server).completions.create(prompt="a", stream=True)
    assert body.is_closed


def test_an_answer_that_is_no_stream_is_named(way: Way) -> None:
    body = Packets([json.dumps(COMPLETION).encode()])
    answer = httpx.Response(200, headers={"content-type": "application/json"}, stream=body)
    with pytest.raises(errors.APIResponseValidationError, match="json where an event stream"):
        way.client(Server(answer)).completions.create(prompt="a", stream=True)
    assert body.is_closed


def test_an_error_status_is_no_stream_whatever_its_content_type(way: Way) -> None:
    body = Packets([event({"error": {"message": "no head"}})])
    answer = httpx.Response(500, headers={"content-type": "text/event-stream"}, stream=body)
    with pytest.raises(errors.InternalServerError, match="no head"):
        way.client(Server(answer)).completions.create(prompt="a", stream=True)

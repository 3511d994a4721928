"""Responses as HTTP has them: read, and before their bodies have come."""

import json

import httpx
import pytest

from cluster import errors
from tests.client_fakes import (
    CHAT,
    COMPLETION,
    DONE,
    Packets,
    Server,
    Way,
    event,
    events_response,
    text_chunk,
)


def test_a_raw_response_has_headers_and_bytes_and_parses(way: Way) -> None:
    server = Server(httpx.Response(200, json=CHAT, headers={"x-request-id": "req-9", "x-a": "b"}))
    raw = way.client(server).chat.completions.with_raw_response.create(messages=[])
    assert (raw.status_code, raw.headers["x-a"], raw.request_id) == (200, "b", "req-9")
    assert raw.json() == json.loads(raw.text) == json.loads(raw.content) == CHAT
    assert raw.parse().choices[0].message.content == "Yes."
    assert raw.retries_taken == 0
    assert server.body == {"messages": []}


def test_a_raw_response_counts_its_retries(way: Way) -> None:
    again = httpx.Response(503, headers={"retry-after-ms": "1"})
    server = Server(again, again, httpx.Response(200, json=COMPLETION))
    raw = way.client(server, max_retries=2).completions.with_raw_response.create(prompt="a")
    assert raw.retries_taken == 2


def test_a_raw_stream_parses_to_its_chunks(way: Way) -> None:
    body = Packets([event(text_chunk("a")), event(text_chunk("b")), DONE])
    server = Server(events_response(body))
    client = way.client(server, max_retries=2)
    raw = client.completions.with_raw_response.create(prompt="a", stream=True)
    assert raw.request_id == "req-9"
    assert body.num_read == 0
    assert [chunk.choices[0].text for chunk in raw.parse()] == ["a", "b"]
    assert body.is_closed
    assert server.body == {"prompt": "a", "stream": True}


@pytest.mark.parametrize("kind", ["with_raw_response", "with_streaming_response"])
def test_an_error_is_raised_not_returned(way: Way, kind: str) -> None:
    body = Packets([b'{"error": {"message": "No."}}'])
    completions = way.client(Server(httpx.Response(404, stream=body))).completions
    with pytest.raises(errors.NotFoundError, match=r"^No\.$"):
        if kind == "with_raw_response":
            completions.with_raw_response.create(prompt="a")
        else:
            completions.with_streaming_response.create(prompt="a").__enter__()
    assert body.is_closed


def test_what_does_not_parse_is_raised_by_parse(way: Way) -> None:
    raw = way.client(Server(httpx.Response(200, text="<html>"))).completions.with_raw_response
    response = raw.create(prompt="a")
    assert response.text == "<html>"
    with pytest.raises(errors.APIResponseValidationError, match="not a Completion"):
        response.parse()


def streamed(body: Packets, kind: str = "application/json") -> Server:
    return Server(httpx.Response(200, headers={"content-type": kind}, stream=body))


def test_a_streamed_response_comes_before_its_body(way: Way) -> None:
    body = Packets([json.dumps(COMPLETION).encode()])
    create = way.client(streamed(body)).completions.with_streaming_response.create
    with create(prompt="a") as response:
        assert (response.status_code, body.num_read) == (200, 0)
        assert json.loads(response.read()) == COMPLETION
        assert response.parse().choices[0].text == " blows"
    with way.client(streamed(Packets(body.packets))).completions.with_streaming_response.create(
        prompt="a"
    ) as response:
        assert response.parse().choices[0].text == " blows"


def test_a_streamed_response_is_read_as_it_comes(way: Way) -> None:
    body = Packets([b"data: a\n", b"\ndata: ", b"b\n\n"])
    completions = way.client(streamed(body, "text/event-stream")).completions
    with completions.with_streaming_response.create(prompt="a", stream=True) as response:
        assert next(response.iter_bytes()) == b"data: a\n"
        assert body.num_read == 1
    assert body.is_closed
    body = Packets(body.packets)
    completions = way.client(streamed(body, "text/event-stream")).completions
    with completions.with_streaming_response.create(prompt="a", stream=True) as response:
        assert list(response.iter_lines()) == ["data: a", "", "data: b", ""]


def test_a_streamed_response_of_a_stream_parses_to_its_chunks(way: Way) -> None:
    body = Packets([event(text_chunk("a")), DONE])
    completions = way.client(streamed(body, "text/event-stream")).completions
    with completions.with_streaming_response.create(prompt="a", stream=True) as response:
        assert [chunk.choices[0].text for chunk in response.parse()] == ["a"]
    assert body.is_closed


def test_a_streamed_response_that_breaks_off_is_a_broken_connection(way: Way) -> None:
    for read in ("read", "parse"):
        body = Packets([b'{"id"'], httpx.ReadError("reset"))
        create = way.client(streamed(body)).completions.with_streaming_response.create
        with (
            pytest.raises(errors.APIConnectionError, match="reset"),
            create(prompt="a") as response,
        ):
            getattr(response, read)()
        assert body.is_closed
    body = Packets([b'{"id"'], httpx.ReadError("reset"))
    create = way.client(streamed(body)).completions.with_streaming_response.create
    with pytest.raises(errors.APIConnectionError, match="reset"), create(prompt="a") as response:
        list(response.iter_bytes())

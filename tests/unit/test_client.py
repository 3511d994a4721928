"""The SDK against a made-up transport: what it sends, what it returns, what it raises."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster import errors
from cluster.client import Client, Stream
from cluster.client.request import settings
from cluster.schema import ChatCompletion, Classification, Completion

Handler = Callable[[httpx.Request], httpx.Response]

COMPLETION = {
    "id": "cmpl-1",
    "object": "text_completion",
    "created": 1,
    "model": "tiny",
    "choices": [{"index": 0, "text": " blows", "finish_reason": "length"}],
    "usage": {"prompt_tokens": 3, "completion_tokens": 1, "total_tokens": 4},
}
CHAT = {
    "id": "chatcmpl-1",
    "created": 1,
    "model": "tiny",
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "Yes."}}],
}
CLASSIFICATION = {
    "id": "classify-1",
    "created": 1,
    "model": "tiny",
    "data": [{"index": 0, "label": "good", "probs": [0.25, 0.75], "num_classes": 2}],
    "usage": {"prompt_tokens": 3, "completion_tokens": 0, "total_tokens": 3},
}
MODEL = {"id": "tiny", "created": 1, "max_model_len": 512}
READINESS = {
    "ready": False,
    "phase": "loading experts",
    "percent": 40,
    "epoch": 0,
    "heads_ready": 0,
    "heads_expected": 1,
    "workers": [{"name": "w0", "address": "127.0.0.1:1", "num_experts": 4, "num_bytes": 9}],
}


class Packets(httpx.SyncByteStream):
    """A body that comes in given packets, and may fail after the last."""

    def __init__(self, packets: list[bytes], error: Exception | None = None) -> None:
        self.packets = packets
        self.error = error
        self.num_read = 0
        self.is_closed = False

    def __iter__(self) -> Iterator[bytes]:
        for packet in self.packets:
            self.num_read += 1
            yield packet
        if self.error is not None:
            raise self.error

    def close(self) -> None:
        self.is_closed = True


class Server:
    """Answers every request in one way and remembers what was asked."""

    def __init__(self, answer: httpx.Response | Exception) -> None:
        self.answer = answer
        self.requests: list[httpx.Request] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer

    @property
    def body(self) -> Any:
        return json.loads(self.requests[-1].content)

    def client(self, base_url: str | None = "http://server", **options: Any) -> Client:
        return Client(base_url, transport=httpx.MockTransport(self), **options)


@pytest.fixture(autouse=True)
def _no_settings_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MAESTRALE_BASE_URL", raising=False)
    monkeypatch.delenv("MAESTRALE_API_KEY", raising=False)


def event(value: Any) -> bytes:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n".encode()


def text_chunk(text: str) -> dict[str, Any]:
    return {**COMPLETION, "choices": [{"index": 0, "text": text}], "usage": None}


def events(body: httpx.SyncByteStream, **headers: str) -> Server:
    kind = {"content-type": "text/event-stream; charset=utf-8", "x-request-id": "req-9"}
    return Server(httpx.Response(200, headers={**kind, **headers}, stream=body))


def stream_of(body: httpx.SyncByteStream) -> Stream[Completion]:
    return events(body).client().completions.create(prompt="a", stream=True)


DONE = b"data: [DONE]\n\n"


# --- what is sent ---


def test_only_given_parameters_are_sent() -> None:
    server = Server(httpx.Response(200, json=COMPLETION))
    server.client().completions.create(prompt="a")
    assert server.body == {"prompt": "a"}

    server = Server(httpx.Response(200, json=CHAT))
    server.client().chat.completions.create(messages=[{"role": "user", "content": "a"}])
    assert server.body == {"messages": [{"role": "user", "content": "a"}]}


def test_given_parameters_are_sent_as_they_are() -> None:
    given: dict[str, Any] = {
        "prompt": [[1, 2], [3]],
        "model": "tiny",
        "max_tokens": 0,
        "temperature": 0.0,
        "top_p": 0.5,
        "top_k": 0,
        "seed": 0,
        "stop": ["a", "\u2028"],
        "n": 2,
        "user": "u",
        "logit_bias": {"1": 2},
    }
    server = Server(httpx.Response(200, json=COMPLETION))
    server.client().completions.create(**given)
    assert server.body == given
    assert server.requests[0].headers["content-type"] == "application/json"


def test_classify_sends_its_inputs_and_returns_what_was_found() -> None:
    server = Server(httpx.Response(200, json=CLASSIFICATION))
    reply = server.client().classify(input="a")
    assert server.body == {"input": "a"}
    assert (server.requests[0].method, server.requests[0].url.path) == ("POST", "/v1/classify")
    assert isinstance(reply, Classification)
    assert (reply.data[0].label, reply.data[0].probs) == ("good", [0.25, 0.75])
    server.client().classify(input=[[1, 2]], model="tiny", use_activation=False, user="u")
    assert server.body == {
        "input": [[1, 2]],
        "model": "tiny",
        "use_activation": False,
        "user": "u",
    }


def test_unknown_parameters_travel_even_as_null() -> None:
    server = Server(httpx.Response(200, json=CHAT))
    server.client().chat.completions.create(messages=[], max_completion_tokens=3, guess=None)
    assert server.body == {"messages": [], "max_completion_tokens": 3, "guess": None}


def test_a_replys_message_is_a_message() -> None:
    server = Server(httpx.Response(200, json=CHAT))
    client = server.client()
    answer = client.chat.completions.create(messages=[{"role": "user", "content": "Wind?"}])
    client.chat.completions.create(messages=[answer.choices[0].message])
    assert server.body == {"messages": [{"role": "assistant", "content": "Yes."}]}


@pytest.mark.parametrize("stream", [False, True])
def test_stream_is_sent_only_when_true(stream: bool) -> None:
    body = Packets([event(text_chunk("a")), DONE])
    server = events(body) if stream else Server(httpx.Response(200, json=COMPLETION))
    reply = server.client().completions.create(prompt="a", stream=stream)
    assert isinstance(reply, Stream if stream else Completion)
    assert server.body.get("stream") == (True if stream else None)


@pytest.mark.parametrize(
    "base_url",
    ["http://h:1", "http://h:1/", "http://h:1/v1", "http://h:1/v1/", "HTTP://H:1/v1"],
)
def test_every_way_to_write_the_base_url_leads_to_one_server(base_url: str) -> None:
    server = Server(httpx.Response(200, json=COMPLETION))
    client = server.client(base_url)
    client.completions.create(prompt="a")
    with pytest.raises(errors.APIResponseError):
        client.ready()
    assert [str(r.url) for r in server.requests] == [
        "http://h:1/v1/completions",
        "http://h:1/ready",
    ]


@pytest.mark.parametrize("base_url", ["https://h/llm", "https://h/llm/v1/"])
def test_a_base_url_may_have_a_path(base_url: str) -> None:
    server = Server(httpx.Response(200, json=COMPLETION))
    server.client(base_url).completions.create(prompt="a")
    assert str(server.requests[0].url) == "https://h/llm/v1/completions"


def test_an_ipv6_base_url_keeps_its_brackets() -> None:
    server = Server(httpx.Response(200, json=COMPLETION))
    server.client("http://[::1]:8000").completions.create(prompt="a")
    assert str(server.requests[0].url) == "http://[::1]:8000/v1/completions"


@pytest.mark.parametrize(
    ("path", "call"),
    [
        ("/v1/models", lambda client: client.models.list()),
        ("/v1/models/tiny", lambda client: client.models.retrieve("tiny")),
        ("/v1/models/org%2Ftiny%3F", lambda client: client.models.retrieve("org/tiny?")),
        ("/ready", lambda client: client.ready()),
    ],
)
def test_every_get_asks_its_path(path: str, call: Callable[[Client], object]) -> None:
    server = Server(httpx.Response(404))
    with pytest.raises(errors.NotFoundError):
        call(server.client())
    assert server.requests[0].method == "GET"
    assert server.requests[0].url.raw_path.decode() == path


@pytest.mark.parametrize("model", ["", ".", ".."])
def test_an_id_that_would_lead_elsewhere_is_refused(model: str) -> None:
    server = Server(httpx.Response(200, json=MODEL))
    with pytest.raises(ValueError, match="no model id"):
        server.client().models.retrieve(model)
    assert server.requests == []


# --- settings ---


def test_without_settings_the_server_is_the_local_one() -> None:
    server = Server(httpx.Response(200, json=COMPLETION))
    server.client(None).completions.create(prompt="a")
    assert str(server.requests[0].url) == "http://127.0.0.1:8000/v1/completions"
    assert "authorization" not in server.requests[0].headers


def test_the_environment_fills_the_gaps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAESTRALE_BASE_URL", "http://elsewhere/v1/")
    monkeypatch.setenv("MAESTRALE_API_KEY", "key-of-env")
    server = Server(httpx.Response(200, json=COMPLETION))
    server.client(None).completions.create(prompt="a")
    assert str(server.requests[0].url) == "http://elsewhere/v1/completions"
    assert server.requests[0].headers["authorization"] == "Bearer key-of-env"


def test_arguments_win_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAESTRALE_BASE_URL", "not a URL at all")
    monkeypatch.setenv("MAESTRALE_API_KEY", "key-of-env")
    server = Server(httpx.Response(200, json=COMPLETION))
    server.client("http://here", api_key="key-given").completions.create(prompt="a")
    server.client("http://here", api_key="").completions.create(prompt="a")
    first, second = server.requests
    assert first.url.host == "here"
    assert first.headers["authorization"] == "Bearer key-given"
    assert "authorization" not in second.headers


def test_empty_variables_count_as_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAESTRALE_BASE_URL", "")
    monkeypatch.setenv("MAESTRALE_API_KEY", "")
    server = Server(httpx.Response(200, json=COMPLETION))
    server.client(None).completions.create(prompt="a")
    assert server.requests[0].url.host == "127.0.0.1"
    assert "authorization" not in server.requests[0].headers


@pytest.mark.parametrize(
    "base_url",
    ["", "localhost:8000", "127.0.0.1:8000", "ftp://h", "http://", "http://h?a=b", "http://h:x"],
)
def test_a_base_url_that_is_none_is_named(base_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(errors.ConfigurationError, match=r"base_url .*http://127.0.0.1:8000"):
        Client(base_url)
    if base_url:
        monkeypatch.setenv("MAESTRALE_BASE_URL", base_url)
        with pytest.raises(errors.ConfigurationError, match="MAESTRALE_BASE_URL"):
            Client()


def test_a_password_in_the_base_url_is_refused_unquoted() -> None:
    with pytest.raises(errors.ConfigurationError, match="api_key") as caught:
        Client("http://user:secret@h")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("api_key", ["secret\n", "sec ret", "secrét"])
def test_a_key_that_no_header_can_carry_is_refused_unquoted(api_key: str) -> None:
    with pytest.raises(errors.ConfigurationError, match="api_key") as caught:
        Client(api_key=api_key)
    assert api_key.strip() not in str(caught.value)
    assert caught.value.__cause__ is None


@pytest.mark.parametrize("timeout", [0, -1, float("nan"), float("inf")])
def test_a_timeout_that_is_none_is_refused(timeout: float) -> None:
    with pytest.raises(errors.ConfigurationError, match="timeout"):
        Client(timeout=timeout)


def test_the_timeout_bounds_every_wait() -> None:
    server = Server(httpx.Response(200, json=COMPLETION))
    server.client(timeout=90).completions.create(prompt="a")
    server.client(timeout=2).completions.create(prompt="a")
    slow, quick = (request.extensions["timeout"] for request in server.requests)
    assert slow == {"connect": 5, "read": 90, "write": 90, "pool": 90}
    assert set(quick.values()) == {2}


def test_the_repr_shows_address_and_state_but_no_key() -> None:
    client = Client("http://h:1/v1", api_key="secret")
    assert repr(client) == "<Client of http://h:1, open>"
    client.close()
    assert repr(client) == "<Client of http://h:1, closed>"


def test_the_repr_of_settings_shows_no_key() -> None:
    checked = settings(base_url="http://h", api_key="secret", timeout=1, environ={})
    assert checked.headers == {"Authorization": "Bearer secret"}
    assert "secret" not in repr(checked)


def test_a_client_left_is_closed() -> None:
    with Client() as client:
        assert "open" in repr(client)
    assert "closed" in repr(client)
    client.close()


# --- what is returned ---


def test_replies_are_typed() -> None:
    completion = Server(httpx.Response(200, json=COMPLETION)).client().completions.create(prompt="")
    assert isinstance(completion, Completion)
    assert completion.choices[0].text == " blows"
    assert completion.usage is not None
    assert completion.usage.total_tokens == 4

    chat = Server(httpx.Response(200, json=CHAT)).client().chat.completions.create(messages=[])
    assert isinstance(chat, ChatCompletion)
    assert chat.choices[0].message.content == "Yes."

    models = Server(httpx.Response(200, json={"data": [MODEL]})).client().models.list()
    assert [model.id for model in models.data] == ["tiny"]
    model = Server(httpx.Response(200, json=MODEL)).client().models.retrieve("tiny")
    assert model.max_model_len == 512


def test_what_replies_say_of_tokens_is_typed() -> None:
    asked = {"logprobs": 1, "logit_bias": {7: -100}, "response_format": {"type": "json_object"}}
    of_completion = {
        "tokens": [" blows"],
        "token_logprobs": [None],
        "top_logprobs": [None],
        "text_offset": [0],
    }
    of_prompt = [None, {"7": {"logprob": -1, "rank": 3, "decoded_token": "a"}}]
    choice = {
        **COMPLETION["choices"][0],
        "logprobs": of_completion,
        "prompt_logprobs": of_prompt,
        "stop_reason": 7,
    }
    server = Server(httpx.Response(200, json={**COMPLETION, "choices": [choice]}))
    completion = server.client().completions.create(prompt="a", **asked)
    assert server.body == {"prompt": "a", **asked, "logit_bias": {"7": -100}}
    (told,) = completion.choices
    assert told.logprobs is not None
    assert told.logprobs.tokens == [" blows"]
    assert told.prompt_logprobs is not None
    assert told.prompt_logprobs[1] is not None
    assert told.prompt_logprobs[1][7].rank == 3
    assert told.stop_reason == 7

    token = {"token": "Yes", "logprob": -0.5, "bytes": [89, 101, 115]}
    choice = {
        **CHAT["choices"][0],
        "logprobs": {"content": [{**token, "top_logprobs": [token]}]},
    }
    usage = {
        "prompt_tokens": 3,
        "completion_tokens": 1,
        "total_tokens": 4,
        "prompt_tokens_details": {"cached_tokens": 2},
    }
    server = Server(httpx.Response(200, json={**CHAT, "choices": [choice], "usage": usage}))
    chat = server.client().chat.completions.create(messages=[], logprobs=True, top_logprobs=1)
    assert server.body == {"messages": [], "logprobs": True, "top_logprobs": 1}
    assert chat.choices[0].logprobs is not None
    assert chat.choices[0].logprobs.content[0].top_logprobs[0].bytes == list(b"Yes")
    assert chat.usage is not None
    assert chat.usage.prompt_tokens_details is not None
    assert chat.usage.prompt_tokens_details.cached_tokens == 2


def test_what_a_newer_server_adds_is_kept() -> None:
    reply = {**COMPLETION, "speed": 7}
    completion = Server(httpx.Response(200, json=reply)).client().completions.create(prompt="a")
    assert completion.model_dump()["speed"] == 7


@pytest.mark.parametrize("status", [200, 503])
def test_readiness_is_returned_ready_or_not(status: int) -> None:
    body = {**READINESS, "ready": status == 200}
    readiness = Server(httpx.Response(status, json=body)).client().ready()
    assert readiness.ready is (status == 200)
    assert readiness.workers[0].name == "w0"


@pytest.mark.parametrize("body", [b"", b"<html>no upstream</html>", b'{"error": "no upstream"}'])
def test_a_503_without_readiness_is_an_error(body: bytes) -> None:
    with pytest.raises(errors.InternalServerError, match=r"upstream|empty body"):
        Server(httpx.Response(503, content=body)).client().ready()


def test_metrics_are_text() -> None:
    text = "# HELP maestrale_x x\nmaestrale_x 1.0\n"
    assert Server(httpx.Response(200, text=text)).client().metrics() == text
    with pytest.raises(errors.PermissionDeniedError):
        Server(httpx.Response(403)).client().metrics()


# --- streams ---


def test_a_stream_is_its_chunks_in_order() -> None:
    texts = ["The ", "wind 🌬", "\u2028", ""]
    body = Packets([b": keep-alive\n\n", *(event(text_chunk(text)) for text in texts), DONE])
    assert [chunk.choices[0].text for chunk in stream_of(body)] == texts
    assert body.is_closed


def test_a_chat_stream_is_its_deltas_in_order() -> None:
    deltas: list[dict[str, Any]] = [{"role": "assistant", "content": ""}, {"content": "Yes"}, {}]
    chunks = [{**CHAT, "choices": [{"index": 0, "delta": delta}]} for delta in deltas]
    for chunk in chunks:
        chunk["object"] = "chat.completion.chunk"
    server = events(Packets([*map(event, chunks), DONE]))
    stream = server.client().chat.completions.create(messages=[], stream=True)
    assert [chunk.choices[0].delta.content for chunk in stream] == ["", "Yes", None]
    assert server.requests[0].url.path == "/v1/chat/completions"
    assert server.body == {"messages": [], "stream": True}


STREAM = b"".join(
    [event(text_chunk("Il maestrale ")), b":\r\n\r\n", event(text_chunk("è 🌬")), DONE]
)


@given(places=st.lists(st.integers(0, len(STREAM)), max_size=8))
def test_a_stream_cut_anyhow_has_the_same_chunks(places: list[int]) -> None:
    edges = [0, *sorted(places), len(STREAM)]
    body = Packets([STREAM[a:b] for a, b in pairwise(edges)])
    assert [chunk.choices[0].text for chunk in stream_of(body)] == ["Il maestrale ", "è 🌬"]


def test_a_chunk_is_returned_before_the_next_is_read() -> None:
    body = Packets([event(text_chunk("a")), event(text_chunk("b")), DONE])
    next(stream_of(body))
    assert body.num_read == 1


def test_nothing_is_read_past_the_end_mark() -> None:
    body = Packets([event(text_chunk("a")), DONE + event("not a completion"), b"more"])
    assert len(list(stream_of(body))) == 1
    assert body.num_read == 2


def test_a_stream_knows_its_request() -> None:
    stream = stream_of(Packets([DONE]))
    assert stream.request_id == "req-9"
    assert "req-9" in repr(stream)
    assert "open" in repr(stream)
    stream.close()
    assert "closed" in repr(stream)


@pytest.mark.parametrize("num_read", [0, 1])
def test_a_stream_closed_early_closes_its_connection(num_read: int) -> None:
    body = Packets([event(text_chunk("a")), event(text_chunk("b")), DONE])
    stream = stream_of(body)
    for _ in range(num_read):
        next(stream)
    assert not body.is_closed
    stream.close()
    assert body.is_closed
    assert list(stream) == []
    stream.close()


def test_a_stream_left_closes_its_connection() -> None:
    body = Packets([event(text_chunk("a")), DONE])
    with stream_of(body) as stream:
        next(stream)
    assert body.is_closed


def test_a_stream_left_by_the_callers_error_closes_its_connection() -> None:
    body = Packets([event(text_chunk("a")), DONE])
    with pytest.raises(KeyError), stream_of(body) as stream:
        next(stream)
        raise KeyError("the caller's own")
    assert body.is_closed


@pytest.mark.skipif(sys.implementation.name != "cpython", reason="needs reference counting")
def test_a_stream_dropped_by_break_closes_its_connection() -> None:
    body = Packets([event(text_chunk("a")), DONE])
    for _ in stream_of(body):
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
def test_an_error_in_the_stream_is_raised_after_the_chunks(error: object, message: str) -> None:
    body = Packets([event(text_chunk("a")), event({"error": error}), DONE])
    stream = stream_of(body)
    assert next(stream).choices[0].text == "a"
    with pytest.raises(errors.APIStreamError, match=message):
        next(stream)
    assert body.is_closed
    assert list(stream) == []


@pytest.mark.parametrize("end", [b"", b"data: [DONE]", b"data: [DONE]\n", b'data: {"id"'])
def test_a_stream_without_its_end_mark_broke_off(end: bytes) -> None:
    body = Packets([event(text_chunk("a")), end])
    stream = stream_of(body)
    next(stream)
    with pytest.raises(errors.APIStreamError, match=r"req-9.* before \[DONE\], after 1 chunks"):
        next(stream)
    assert body.is_closed


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (httpx.RemoteProtocolError("incomplete chunked read"), "incomplete chunked read"),
        (httpx.ReadError("reset by peer"), "reset by peer"),
        (httpx.ReadTimeout("timed out"), "nothing came for 600 s"),
    ],
)
def test_a_connection_that_fails_in_a_stream_breaks_it_off(error: Exception, message: str) -> None:
    body = Packets([event(text_chunk("a"))], error)
    stream = stream_of(body)
    next(stream)
    with pytest.raises(errors.APIStreamError, match=message) as caught:
        next(stream)
    assert caught.value.__cause__ is error
    assert body.is_closed


@pytest.mark.parametrize("data", [b"{}", b"7", b"hello", b"", b"[" * 5_000])
def test_a_chunk_of_another_shape_is_named(data: bytes) -> None:
    body = Packets([b"data: " + data + b"\n\n", DONE])
    with pytest.raises(errors.APIResponseError, match="not a Completion"):
        next(stream_of(body))
    assert body.is_closed


def test_an_error_before_the_first_chunk_is_raised_by_create() -> None:
    body = Packets([b'{"error": {"message": "too many", ', b'"type": "overloaded"}}'])
    server = Server(httpx.Response(429, stream=body))
    with pytest.raises(errors.RateLimitError, match="too many"):
        server.client().completions.create(prompt="a", stream=True)
    assert body.is_closed


def test_an_answer_that_is_no_stream_is_named() -> None:
    body = Packets([json.dumps(COMPLETION).encode()])
    answer = httpx.Response(200, headers={"content-type": "application/json"}, stream=body)
    with pytest.raises(errors.APIResponseError, match="application/json where an event stream"):
        Server(answer).client().completions.create(prompt="a", stream=True)
    assert body.is_closed


def test_an_error_status_is_no_stream_whatever_its_content_type() -> None:
    body = Packets([event({"error": {"message": "no head"}})])
    answer = httpx.Response(500, headers={"content-type": "text/event-stream"}, stream=body)
    with pytest.raises(errors.InternalServerError, match="no head"):
        Server(answer).client().completions.create(prompt="a", stream=True)


# --- errors ---


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, errors.BadRequestError),
        (401, errors.AuthenticationError),
        (403, errors.PermissionDeniedError),
        (404, errors.NotFoundError),
        (409, errors.APIStatusError),
        (413, errors.RequestTooLargeError),
        (418, errors.APIStatusError),
        (422, errors.UnprocessableEntityError),
        (429, errors.RateLimitError),
        (500, errors.InternalServerError),
        (502, errors.InternalServerError),
        (529, errors.InternalServerError),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_every_error_status_has_its_class(status: int, kind: type, stream: bool) -> None:
    error = {"message": "No.", "type": "some_error", "param": "prompt", "code": "some_code"}
    answer = httpx.Response(status, json={"error": error}, headers={"x-request-id": "req-9"})
    with pytest.raises(errors.APIStatusError) as caught:
        Server(answer).client().completions.create(prompt="a", stream=stream)
    raised = caught.value
    assert type(raised) is kind
    assert str(raised) == raised.message == "No."
    assert (raised.kind, raised.param, raised.code) == ("some_error", "prompt", "some_code")
    assert (raised.status_code, raised.request_id) == (status, "req-9")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "an empty body"),
        (b"<html>\n <h1>Bad Gateway</h1></html>", "<html> <h1>Bad Gateway</h1></html>"),
        (b"x" * 10_000, "x{200}\\.\\.\\."),
        (b"\xff\xfe", "\ufffd"),
        (b'{"detail": "Not Found"}', "Not Found"),
        (b'{"error": null}', "null"),
        (b'{"error": {"type": "t"}}', "without an error object"),
        (b'["error"]', "error"),
        (b"[" * 5_000, "without an error object"),
    ],
)
def test_an_error_without_openais_body_says_what_came(body: bytes, message: str) -> None:
    with pytest.raises(errors.InternalServerError, match=message) as caught:
        Server(httpx.Response(502, content=body)).client().completions.create(prompt="a")
    assert "POST http://server/v1/completions answered 502" in str(caught.value)
    assert len(str(caught.value)) < 500
    assert caught.value.request_id is None


@pytest.mark.parametrize(
    ("error", "code"),
    [({"message": "No.", "code": 400}, "400"), ("No.", None), ({"message": "No."}, None)],
)
def test_other_servers_error_objects_are_understood(error: object, code: str | None) -> None:
    answer = httpx.Response(400, json={"error": error})
    with pytest.raises(errors.BadRequestError, match=r"^No\.$") as caught:
        Server(answer).client().completions.create(prompt="a")
    assert caught.value.code == code


@pytest.mark.parametrize("body", [b"", b"<html>", b"{}", b"[]", b'{"id": 3}', b"[" * 5_000])
def test_a_success_of_another_shape_is_named(body: bytes) -> None:
    with pytest.raises(errors.APIResponseError, match="not a Completion") as caught:
        Server(httpx.Response(200, content=body)).client().completions.create(prompt="a")
    assert "maestrale serve" in str(caught.value)
    assert caught.value.__cause__ is not None


def test_a_redirect_is_named_and_not_followed() -> None:
    server = Server(httpx.Response(307, headers={"location": "https://other/v1/completions"}))
    with pytest.raises(errors.APIResponseError, match=r"307.*https://other"):
        server.client().completions.create(prompt="a")
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("cause", "kind", "message"),
    [
        (httpx.ConnectError("refused"), "APIConnectionError", "refused.*`maestrale serve` running"),
        (httpx.ProxyError("407"), "APIConnectionError", "no connection.*ProxyError: 407"),
        (httpx.ReadError("reset"), "APIConnectionError", "broke before the whole answer.*reset"),
        (httpx.RemoteProtocolError("gone"), "APIConnectionError", "broke before .*gone"),
        (httpx.ConnectTimeout("slow"), "APITimeoutError", "within 5 s.*`maestrale serve` running"),
        (httpx.ReadTimeout("slow"), "APITimeoutError", "no answer in 600 s.*timeout"),
        (httpx.DecodingError("not gzip"), "APIResponseError", "cannot be decoded.*not gzip"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_every_failure_of_the_connection_has_its_class(
    cause: Exception, kind: str, message: str, stream: bool
) -> None:
    with pytest.raises(errors.APIError, match=message) as caught:
        Server(cause).client().completions.create(prompt="a", stream=stream)
    assert type(caught.value) is getattr(errors, kind)
    assert "http://server" in str(caught.value)
    assert caught.value.__cause__ is cause


def test_an_error_body_that_breaks_off_is_a_broken_connection() -> None:
    body = Packets([b'{"error"'], httpx.ReadError("reset"))
    server = Server(httpx.Response(500, stream=body))
    with pytest.raises(errors.APIConnectionError, match="reset"):
        server.client().completions.create(prompt="a", stream=True)
    assert body.is_closed


# --- imports ---


def test_the_client_needs_only_httpx_and_pydantic() -> None:
    program = "import sys, cluster.client; print(*sorted(sys.modules), sep='\\n')"
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=True
    )
    loaded = done.stdout.split()
    packages = {name.partition(".")[0] for name in loaded}
    heavy = {"torch", "ray", "grpc", "google", "numpy", "fastapi", "transformers"}
    assert packages.isdisjoint(heavy | {"model", "protos"})
    ours = {".".join(name.split(".")[:2]) for name in loaded if name.startswith("cluster.")}
    assert ours == {"cluster.client", "cluster.errors", "cluster.schema"}

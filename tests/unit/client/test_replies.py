"""What the SDK returns."""

import httpx
import pytest

from cluster import errors
from cluster.client import Sample
from cluster.schema import ChatCompletion, Completion
from tests.client_fakes import (
    CHAT,
    COMPLETION,
    DONE,
    MODEL,
    Packets,
    Server,
    Way,
    event,
    events_response,
    text_chunk,
)

READINESS = {
    "ready": False,
    "phase": "loading experts",
    "percent": 40,
    "epoch": 0,
    "heads_ready": 0,
    "heads_expected": 1,
    "workers": [{"name": "w0", "address": "127.0.0.1:1", "num_experts": 4, "num_bytes": 9}],
}


def test_replies_are_typed(way: Way) -> None:
    completion = way.client(Server(httpx.Response(200, json=COMPLETION))).completions.create(
        prompt=""
    )
    assert isinstance(completion, Completion)
    assert completion.choices[0].text == " blows"
    assert completion.usage is not None
    assert completion.usage.total_tokens == 4

    chat = way.client(Server(httpx.Response(200, json=CHAT))).chat.completions.create(messages=[])
    assert isinstance(chat, ChatCompletion)
    assert chat.choices[0].message.content == "Yes."

    models = way.client(Server(httpx.Response(200, json={"data": [MODEL]}))).models.list()
    assert [model.id for model in models.data] == ["tiny"]
    model = way.client(Server(httpx.Response(200, json=MODEL))).models.retrieve("tiny")
    assert model.max_model_len == 512


def test_what_replies_say_of_tokens_is_typed(way: Way) -> None:
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
    completion = way.client(server).completions.create(prompt="a", **asked)
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
    chat = way.client(server).chat.completions.create(messages=[], logprobs=True, top_logprobs=1)
    assert server.body == {"messages": [], "logprobs": True, "top_logprobs": 1}
    assert chat.choices[0].logprobs is not None
    assert chat.choices[0].logprobs.content[0].top_logprobs[0].bytes == list(b"Yes")
    assert chat.usage is not None
    assert chat.usage.prompt_tokens_details is not None
    assert chat.usage.prompt_tokens_details.cached_tokens == 2


def test_what_a_newer_server_adds_is_kept(way: Way) -> None:
    reply = {**COMPLETION, "speed": 7}
    completion = way.client(Server(httpx.Response(200, json=reply))).completions.create(prompt="a")
    assert completion.model_dump()["speed"] == 7


@pytest.mark.parametrize("status", [200, 503])
def test_readiness_is_returned_ready_or_not(way: Way, status: int) -> None:
    body = {**READINESS, "ready": status == 200}
    readiness = way.client(Server(httpx.Response(status, json=body))).cluster.status()
    assert readiness.ready is (status == 200)
    assert readiness.workers[0].name == "w0"


@pytest.mark.parametrize("body", [b"", b"<html>no upstream</html>", b'{"error": "no upstream"}'])
def test_a_503_without_readiness_is_an_error(way: Way, body: bytes) -> None:
    with pytest.raises(errors.InternalServerError, match=r"upstream|empty body"):
        way.client(Server(httpx.Response(503, content=body))).cluster.status()


def test_metrics_are_samples(way: Way) -> None:
    text = '# HELP maestrale_x x\nmaestrale_x{process="head-0"} 1.5\n'
    server = Server(httpx.Response(200, text=text))
    assert way.client(server).cluster.metrics() == [
        Sample("maestrale_x", {"process": "head-0"}, 1.5)
    ]
    assert server.requests[0].url.path == "/metrics"
    with pytest.raises(errors.PermissionDeniedError):
        way.client(Server(httpx.Response(403))).cluster.metrics()
    with pytest.raises(errors.APIResponseValidationError, match=r"<html>.*maestrale serve"):
        way.client(Server(httpx.Response(200, text="<html>\n"))).cluster.metrics()


def test_a_reply_knows_its_request(way: Way) -> None:
    answer = httpx.Response(200, json=COMPLETION, headers={"x-request-id": "req-9"})
    reply = way.client(Server(answer)).completions.create(prompt="a")
    assert reply._request_id == "req-9"
    assert "_request_id" not in reply.model_dump()
    body = Packets([event(text_chunk("a")), DONE])
    stream = way.client(Server(events_response(body))).completions.create(prompt="a", stream=True)
    assert next(stream)._request_id == "req-9"

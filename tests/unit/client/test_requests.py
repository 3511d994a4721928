"""What the SDK sends."""

from collections.abc import Callable
from typing import Any

import httpx
import pytest

from cluster import errors
from cluster.client.params import (
    ChatParams,
    ClassifyParams,
    CompletionParams,
    DetokenizeParams,
    TokenizeParams,
)
from cluster.schema import (
    ChatCompletionRequest,
    Classification,
    ClassifyRequest,
    Completion,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)
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

CLASSIFICATION = {
    "id": "classify-1",
    "created": 1,
    "model": "tiny",
    "data": [{"index": 0, "label": "good", "probs": [0.25, 0.75], "num_classes": 2}],
    "usage": {"prompt_tokens": 3, "completion_tokens": 0, "total_tokens": 3},
}


def test_only_given_parameters_are_sent(way: Way) -> None:
    server = Server(httpx.Response(200, json=COMPLETION))
    way.client(server).completions.create(prompt="a")
    assert server.body == {"prompt": "a"}

    server = Server(httpx.Response(200, json=CHAT))
    way.client(server).chat.completions.create(messages=[{"role": "user", "content": "a"}])
    assert server.body == {"messages": [{"role": "user", "content": "a"}]}


def test_given_parameters_are_sent_as_they_are(way: Way) -> None:
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
    way.client(server).completions.create(**given)
    assert server.body == given
    assert server.requests[0].headers["content-type"] == "application/json"


def test_classify_sends_its_inputs_and_returns_what_was_found(way: Way) -> None:
    server = Server(httpx.Response(200, json=CLASSIFICATION))
    reply = way.client(server).classify(input="a")
    assert server.body == {"input": "a"}
    assert (server.requests[0].method, server.requests[0].url.path) == ("POST", "/v1/classify")
    assert isinstance(reply, Classification)
    assert (reply.data[0].label, reply.data[0].probs) == ("good", [0.25, 0.75])
    way.client(server).classify(input=[[1, 2]], model="tiny", use_activation=False, user="u")
    assert server.body == {
        "input": [[1, 2]],
        "model": "tiny",
        "use_activation": False,
        "user": "u",
    }


def test_texts_become_tokens_and_tokens_texts(way: Way) -> None:
    server = Server(httpx.Response(200, json={"count": 2, "max_model_len": 9, "tokens": [5, 6]}))
    reply = way.client(server).tokenize(prompt="a b", add_special_tokens=False)
    assert (reply.count, reply.tokens) == (2, [5, 6])
    assert server.requests[0].url.path == "/tokenize"
    assert server.body == {"prompt": "a b", "add_special_tokens": False}
    server = Server(httpx.Response(200, json={"prompt": "a b"}))
    assert way.client(server).detokenize(tokens=[5, 6]).prompt == "a b"
    assert server.requests[0].url.path == "/detokenize"
    assert server.body == {"tokens": [5, 6]}


def test_what_is_none_is_not_sent_but_in_extra_body_it_is(way: Way) -> None:
    server = Server(httpx.Response(200, json=CHAT))
    way.client(server).chat.completions.create(
        messages=[], max_tokens=None, seed=3, extra_body={"guess": None, "seed": 4}
    )
    assert server.body == {"messages": [], "guess": None, "seed": 4}


def test_extras_are_sent_and_win(way: Way) -> None:
    server = Server(httpx.Response(200, json=COMPLETION))
    way.client(server, api_key="ours").completions.create(
        prompt="a", extra_headers={"authorization": "theirs", "X-More": "1"}, extra_query={"b": 2}
    )
    (request,) = server.requests
    assert request.headers.get_list("authorization") == ["theirs"]
    assert request.headers["x-more"] == "1"
    assert request.url.query == b"b=2"
    assert server.body == {"prompt": "a"}


def test_every_field_of_a_request_can_be_given() -> None:
    for params, request in (
        (CompletionParams, CompletionRequest),
        (ChatParams, ChatCompletionRequest),
        (ClassifyParams, ClassifyRequest),
        (TokenizeParams, TokenizeRequest),
        (DetokenizeParams, DetokenizeRequest),
    ):
        assert set(request.model_fields) <= {*params.__annotations__, "stream"}


def test_a_replys_message_is_a_message(way: Way) -> None:
    server = Server(httpx.Response(200, json=CHAT))
    client = way.client(server)
    answer = client.chat.completions.create(messages=[{"role": "user", "content": "Wind?"}])
    client.chat.completions.create(messages=[answer.choices[0].message])
    assert server.body == {"messages": [{"role": "assistant", "content": "Yes."}]}


@pytest.mark.parametrize("stream", [False, True])
def test_stream_is_sent_only_when_true(way: Way, stream: bool) -> None:
    body = Packets([event(text_chunk("a")), DONE])
    server = (
        Server(events_response(body)) if stream else Server(httpx.Response(200, json=COMPLETION))
    )
    reply = way.client(server).completions.create(prompt="a", stream=stream)
    assert isinstance(reply, Completion) is not stream
    assert server.body.get("stream") == (True if stream else None)


@pytest.mark.parametrize(
    "base_url",
    ["http://h:1", "http://h:1/", "http://h:1/v1", "http://h:1/v1/", "HTTP://H:1/v1"],
)
def test_every_way_to_write_the_base_url_leads_to_one_server(way: Way, base_url: str) -> None:
    server = Server(httpx.Response(200, json=COMPLETION))
    client = way.client(server, base_url)
    client.completions.create(prompt="a")
    with pytest.raises(errors.APIResponseValidationError):
        client.cluster.status()
    assert [str(r.url) for r in server.requests] == [
        "http://h:1/v1/completions",
        "http://h:1/ready",
    ]


@pytest.mark.parametrize("base_url", ["https://h/llm", "https://h/llm/v1/"])
def test_a_base_url_may_have_a_path(way: Way, base_url: str) -> None:
    server = Server(httpx.Response(200, json=COMPLETION))
    way.client(server, base_url).completions.create(prompt="a")
    assert str(server.requests[0].url) == "https://h/llm/v1/completions"


def test_an_ipv6_base_url_keeps_its_brackets(way: Way) -> None:
    server = Server(httpx.Response(200, json=COMPLETION))
    way.client(server, "http://[::1]:8000").completions.create(prompt="a")
    assert str(server.requests[0].url) == "http://[::1]:8000/v1/completions"


@pytest.mark.parametrize(
    ("path", "call"),
    [
        ("/v1/models", lambda client: client.models.list()),
        ("/v1/models/tiny", lambda client: client.models.retrieve("tiny")),
        ("/v1/models/org%2Ftiny%3F", lambda client: client.models.retrieve("org/tiny?")),
        ("/ready", lambda client: client.cluster.status()),
    ],
)
def test_every_get_asks_its_path(way: Way, path: str, call: Callable[[Any], object]) -> None:
    server = Server(httpx.Response(404))
    with pytest.raises(errors.NotFoundError):
        call(way.client(server))
    assert server.requests[0].method == "GET"
    assert server.requests[0].url.raw_path.decode() == path


@pytest.mark.parametrize("model", ["", ".", ".."])
def test_an_id_that_would_lead_elsewhere_is_refused(way: Way, model: str) -> None:
    server = Server(httpx.Response(200, json=MODEL))
    with pytest.raises(ValueError, match="no model id"):
        way.client(server).models.retrieve(model)
    assert server.requests == []

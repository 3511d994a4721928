"""What the HTTP API cannot serve it refuses: with the right status, naming the field."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from cluster.schema import (
    MAX_CHOICES,
    ChatCompletionRequest,
    CompletionRequest,
    GenerationRequest,
)
from tests.api_fakes import (
    BOTH,
    CHAT,
    COMPLETIONS,
    CONTEXT,
    EITHER_WAY,
    JSON,
    LOADING,
    MODEL_ID,
    USER,
    VOCAB_SIZE,
    Api,
    Caller,
    assert_error,
    body_for,
    never_ends,
    story,
)


@pytest.fixture
def api(tiny_folder: Path) -> Api:
    return Api(tiny_folder)


# --- refusals ---

WRONG: list[tuple[str, dict[str, Any], str | None]] = [
    (COMPLETIONS, {}, "prompt"),
    (COMPLETIONS, {"prompt": None}, "prompt"),
    (COMPLETIONS, {"prompt": ""}, "prompt"),
    (COMPLETIONS, {"prompt": []}, "prompt"),
    (COMPLETIONS, {"prompt": [[]]}, "prompt"),
    (COMPLETIONS, {"prompt": [""]}, "prompt"),
    (COMPLETIONS, {"prompt": ["a", ""]}, "prompt"),
    (COMPLETIONS, {"prompt": 5}, "prompt"),
    (COMPLETIONS, {"prompt": {"text": "a"}}, "prompt"),
    (COMPLETIONS, {"prompt": ["a", 5]}, "prompt"),
    (COMPLETIONS, {"prompt": [5, "a"]}, "prompt"),
    (COMPLETIONS, {"prompt": [1, True]}, "prompt"),
    (COMPLETIONS, {"prompt": [1, 2.5]}, "prompt"),
    (COMPLETIONS, {"prompt": [1, -1]}, "prompt"),
    (COMPLETIONS, {"prompt": [1, VOCAB_SIZE]}, "prompt"),
    (COMPLETIONS, {"prompt": [[1], [1, 2**70]]}, "prompt"),
    (COMPLETIONS, {"prompt": [5] * CONTEXT, "max_tokens": 1}, "prompt"),
    (COMPLETIONS, {"prompt": [[5], [5] * (CONTEXT + 1)]}, "prompt"),
    (COMPLETIONS, {"prompt": "wind " * 200}, "prompt"),
    (COMPLETIONS, {"prompt": "a", "max_tokens": 0}, "max_tokens"),
    (COMPLETIONS, {"prompt": "a", "max_tokens": -1}, "max_tokens"),
    (COMPLETIONS, {"prompt": "a", "max_tokens": CONTEXT + 1}, "max_tokens"),
    (COMPLETIONS, {"prompt": "a", "max_tokens": 10**50}, "max_tokens"),
    (COMPLETIONS, {"prompt": "a", "max_tokens": "many"}, "max_tokens"),
    (COMPLETIONS, {"prompt": "a", "temperature": -0.1}, "temperature"),
    (COMPLETIONS, {"prompt": "a", "temperature": 2.1}, "temperature"),
    (COMPLETIONS, {"prompt": "a", "temperature": 10**400}, "temperature"),
    (COMPLETIONS, {"prompt": "a", "top_p": 0}, "top_p"),
    (COMPLETIONS, {"prompt": "a", "top_p": 1.1}, "top_p"),
    (COMPLETIONS, {"prompt": "a", "top_k": -2}, "top_k"),
    (COMPLETIONS, {"prompt": "a", "seed": 2**63}, "seed"),
    (COMPLETIONS, {"prompt": "a", "n": 0}, "n"),
    (COMPLETIONS, {"prompt": "a", "n": MAX_CHOICES + 1}, "n"),
    (COMPLETIONS, {"prompt": ["a"] * 2, "n": MAX_CHOICES}, "n"),
    (COMPLETIONS, {"prompt": "a", "stop": ""}, "stop"),
    (COMPLETIONS, {"prompt": "a", "stop": ["a", ""]}, "stop"),
    (COMPLETIONS, {"prompt": "a", "stop": ["a"] * 17}, "stop"),
    (COMPLETIONS, {"prompt": "a", "stop": 3}, "stop"),
    (COMPLETIONS, {"prompt": "a", "stream": "sometimes"}, "stream"),
    (COMPLETIONS, {"prompt": "a", "stream": True, "stream_options": 1}, "stream_options"),
    (CHAT, {}, "messages"),
    (CHAT, {"messages": []}, "messages"),
    (CHAT, {"messages": "hello"}, "messages"),
    (CHAT, {"messages": [{"role": "user"}]}, "messages"),
    (CHAT, {"messages": [{"role": "user", "content": 5}]}, "messages"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages"),
    (CHAT, {"messages": [{"role": "tool", "content": "a"}]}, "messages"),
    (CHAT, {"messages": [USER, USER]}, "messages"),
    (CHAT, {"messages": [USER, {"role": "assistant", "content": "a"}]}, "messages"),
    (CHAT, {"messages": [{"role": "user", "content": "wind " * 200}]}, "messages"),
    (CHAT, {"messages": [USER], "max_tokens": -1}, "max_tokens"),
    (CHAT, {"messages": [USER], "max_tokens": CONTEXT + 1}, "max_tokens"),
    (
        CHAT,
        {"messages": [USER], "max_completion_tokens": CONTEXT + 1},
        "max_completion_tokens",
    ),
]


@pytest.mark.parametrize(("path", "body", "param"), WRONG)
def test_a_wrong_request_is_a_400_that_names_the_field(
    api: Api, path: str, body: dict[str, Any], param: str | None
) -> None:
    """A stream, too: before its first byte."""
    for stream in (False, True):
        content = json.dumps({"stream": stream, **body})
        response = api.request("POST", path, content=content, headers=JSON)
        code = response.json()["error"]["code"]
        assert code in (None, "context_length_exceeded")
        assert_error(response, 400, param=param, code=code)
    assert api.engine.journals == []
    assert api.num_in_progress == 0


def test_a_prompt_beyond_the_context_says_so_in_its_code(api: Api) -> None:
    for path, body, param in (
        (COMPLETIONS, {"prompt": [5] * CONTEXT}, "prompt"),
        (CHAT, {"messages": [{"role": "user", "content": "wind " * 200}]}, "messages"),
    ):
        message = assert_error(
            api.post(path, body), 400, param=param, code="context_length_exceeded"
        )
        assert f"the context of {CONTEXT}" in message


@BOTH
@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b'"a"', b"3", b"null", b'{"prompt": "a"', b"\xff\xfe", b"[" * 9_000],
)
def test_a_body_that_is_no_json_object_is_a_400(api: Api, path: str, content: bytes) -> None:
    response = api.request("POST", path, content=content, headers=JSON)
    assert_error(response, 400, param=response.json()["error"]["param"])
    assert response.json()["error"]["param"] in (None, "body")


@pytest.mark.parametrize("content", [b'{"prompt": "\\ud800"}', b'{"prompt": "a\\udfff"}'])
def test_text_that_is_no_unicode_is_a_400(api: Api, content: bytes) -> None:
    assert_error(
        api.request("POST", COMPLETIONS, content=content, headers=JSON), 400, param="prompt"
    )
    body = {"messages": [{"role": "user", "content": "\ud800"}]}
    response = api.request("POST", CHAT, content=json.dumps(body), headers=JSON)
    assert_error(response, 400, param="messages")


def test_options_of_a_stream_need_a_stream(api: Api) -> None:
    body = {"prompt": "a", "stream_options": {"include_usage": True}}
    response = api.post(COMPLETIONS, body)
    assert response.status_code == 400
    assert "stream_options: only allowed with stream: true" in response.text


@given(
    values=st.lists(
        st.integers(-3, 3000)
        | st.text(max_size=2)
        | st.none()
        | st.floats(allow_nan=False, allow_infinity=False),
        min_size=1,
        max_size=20,
    )
)
def test_a_validation_error_is_short_however_much_is_wrong(
    tiny_folder: Path, values: list[Any]
) -> None:
    api = Api(tiny_folder)
    response = api.post(COMPLETIONS, {"prompt": "a", "stop": values * 20, "n": values})
    assert response.status_code == 400
    assert len(response.content) < 1_000


@pytest.mark.parametrize(
    ("request_type", "fields"),
    [
        (CompletionRequest, {"prompt": [-1] * 5_000}),
        (CompletionRequest, {"prompt": [5] * 5_000 + ["a"]}),
        (CompletionRequest, {"prompt": [[-1]] * 5_000}),
        (CompletionRequest, {"prompt": [[-1] * 5_000]}),
        (CompletionRequest, {"prompt": [None] * 5_000}),
        (CompletionRequest, {"prompt": "a", "stop": [""] * 5_000}),
        (ChatCompletionRequest, {"messages": [5] * 5_000}),
        (ChatCompletionRequest, {"messages": [{"role": "user", "content": [5] * 5_000}]}),
    ],
)
def test_checking_a_long_wrong_body_stops_soon(
    request_type: type[GenerationRequest], fields: dict[str, Any]
) -> None:
    """The largest body holds a million items; a report on each took minutes and gigabytes."""
    with pytest.raises(ValidationError) as refused:
        request_type.model_validate(fields)
    assert refused.value.error_count() < 100


@pytest.mark.parametrize(
    ("fields", "param"),
    [({"prompt": ["a"] * 2_000}, "prompt"), ({"n": 2}, "n"), ({"best_of": 2}, "best_of")],
)
def test_too_many_prompts_are_refused_before_they_cost_anything(
    api: Api, monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any], param: str
) -> None:
    num_encoded = 0
    encode = api.tokenizer.encode

    def counted(text: str) -> list[int]:
        nonlocal num_encoded
        num_encoded += 1
        return encode(text)

    monkeypatch.setattr(api.tokenizer, "encode", counted)
    response = api.post(COMPLETIONS, {"prompt": ["a"] * MAX_CHOICES, **fields})
    assert_error(response, 400, param=param)
    assert num_encoded == 0


# --- what is not served ---


@BOTH
@EITHER_WAY
def test_an_unknown_model_is_a_404_that_names_the_known_one(
    api: Api, path: str, stream: bool
) -> None:
    response = api.post(path, body_for(path, model="gpt-9", stream=stream))
    message = assert_error(
        response, 404, param="model", code="model_not_found", kind="not_found_error"
    )
    assert "gpt-9" in message
    assert MODEL_ID in message


ASKED_FOR: dict[str, Any] = {
    "function_call": {"name": "f"},
    "functions": [{"name": "f"}],
    "guided_json": {},
    "skip_special_tokens": False,
    "suffix": "b",
    "use_beam_search": True,
}


@BOTH
@pytest.mark.parametrize("field", ASKED_FOR)
def test_a_parameter_that_would_be_ignored_is_refused_by_name(
    api: Api, path: str, field: str
) -> None:
    response = api.post(path, body_for(path, **{field: ASKED_FOR[field]}))
    assert_error(response, 400, param=field, code="unsupported")


@pytest.mark.parametrize(
    ("path", "field"),
    [
        (COMPLETIONS, "tools"),
        (COMPLETIONS, "tool_choice"),
        (COMPLETIONS, "top_logprobs"),
        (CHAT, "add_special_tokens"),
        (CHAT, "chat_template"),
        (CHAT, "documents"),
        (CHAT, "echo"),
    ],
)
def test_a_parameter_of_the_other_endpoint_is_refused_by_name(
    api: Api, path: str, field: str
) -> None:
    assert_error(
        api.post(path, body_for(path, **{field: True})), 400, param=field, code="unsupported"
    )


@BOTH
def test_parameters_that_ask_for_nothing_and_unknown_ones_are_ignored(api: Api, path: str) -> None:
    neutral = {
        "add_generation_prompt": True,
        "best_of": 1,
        "continue_final_message": False,
        "echo": False,
        "frequency_penalty": 0.0,
        "logit_bias": {},
        "logprobs": False,
        "presence_penalty": 0,
        "response_format": {"type": "text"},
        "skip_special_tokens": True,
        "spaces_between_special_tokens": True,
        "structured_outputs": {},
        "tools": [],
        "tool_choice": "auto",
        "suffix": None,
        "top_logprobs": 0,
    }
    body = body_for(path, **neutral, store=True, metadata={"a": [1]}, invented=[[{}]])
    assert api.post(path, body).status_code == 200


# --- overload and outages ---


@BOTH
@EITHER_WAY
def test_before_it_is_ready_requests_are_told_to_come_back(
    api: Api, path: str, stream: bool
) -> None:
    api.engine.state = LOADING
    response = api.post(path, body_for(path, stream=stream))
    message = assert_error(response, 503, kind="service_unavailable")
    assert int(response.headers["retry-after"]) >= 1
    assert "loading experts, 40 %" in message
    assert api.engine.journals == []


@BOTH
@EITHER_WAY
def test_too_many_requests_are_told_to_come_back(api: Api, path: str, stream: bool) -> None:
    """And are welcome once a place is free."""
    api.engine.script = never_ends

    async def overload() -> None:
        callers = [Caller(api, COMPLETIONS, {"prompt": "a"}) for _ in range(2)]
        for caller in callers:
            await caller.until(lambda: len(api.engine.journals) == 2)
        assert api.num_in_progress == 2
        refused = await api.ask("POST", path, json=body_for(path, stream=stream))
        assert_error(refused, 429, code="overloaded", kind="rate_limit_error")
        assert int(refused.headers["retry-after"]) >= 1
        assert len(api.engine.journals) == 2
        await callers[0].hang_up()
        api.engine.script = story
        served = await api.ask("POST", path, json=body_for(path, stream=stream))
        assert served.status_code == 200
        await callers[1].hang_up()

    asyncio.run(overload())
    assert api.num_in_progress == 0


def test_a_request_takes_one_place_however_many_choices_it_has(api: Api) -> None:
    api.configure(max_concurrent_requests=1)
    assert api.post(COMPLETIONS, {"prompt": ["a", "b"], "n": 4}).status_code == 200


@BOTH
def test_a_body_over_the_limit_is_a_413(api: Api, path: str) -> None:
    field = "prompt" if path == COMPLETIONS else "user"
    body = body_for(path) | {field: "a" * api.settings.max_body_bytes}
    assert_error(api.post(path, body), 413)

    async def in_pieces() -> AsyncIterator[bytes]:
        for _ in range(100):
            yield b" " * 1_000

    assert_error(api.request("POST", path, content=in_pieces(), headers=JSON), 413)


def test_a_body_of_exactly_the_limit_is_read(api: Api) -> None:
    body = json.dumps({"prompt": "a"}).encode()
    padded = body + b" " * (api.settings.max_body_bytes - len(body))
    assert api.request("POST", COMPLETIONS, content=padded, headers=JSON).status_code == 200
    response = api.request("POST", COMPLETIONS, content=padded + b" ", headers=JSON)
    assert_error(response, 413)

"""Tokens over HTTP, prompts in every form, and the small endpoints beside them."""

import asyncio
import logging
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from anthropic.types import message_create_params
from anthropic.types.message_count_tokens_params import MessageCountTokensParams
from openai.types import completion_create_params
from openai.types.chat import completion_create_params as chat_params
from openai.types.responses import response_create_params

from cluster.schema import (
    IGNORED,
    MAX_CHOICES,
    ChatCompletionRequest,
    CompletionRequest,
    ModelRequest,
)
from cluster.schema.anthropic import CountTokensRequest, MessagesRequest
from cluster.schema.responses import ResponsesRequest
from tests.api_fakes import (
    BOTH,
    CHAT,
    COMPLETIONS,
    CONTEXT,
    EOS,
    MODEL_ID,
    USER,
    VOCAB_SIZE,
    Api,
    Caller,
    assert_error,
    body_for,
    never_ends,
    tools_folder,
)
from tests.unit.test_api_tools import WEATHER

CLOCK = {"type": "function", "function": {"name": "clock"}}


@pytest.fixture
def api(tiny_folder: Path) -> Api:
    return Api(tiny_folder)


# --- tokenize and detokenize ---


@pytest.mark.parametrize("prefix", ["", "/v1"])
def test_a_text_becomes_the_prompt_that_a_completion_would_have(api: Api, prefix: str) -> None:
    reply = api.post(f"{prefix}/tokenize", {"prompt": "the wind", "model": MODEL_ID}).json()
    api.post(COMPLETIONS, {"prompt": "the wind"})
    ids = list(api.engine.journals[0].prompt_ids)
    assert reply == {
        "count": len(ids),
        "max_model_len": CONTEXT,
        "tokens": ids,
        "token_strs": None,
    }
    back = api.post(f"{prefix}/detokenize", {"tokens": ids}).json()
    assert back == {"prompt": "the wind"}
    api.post(COMPLETIONS, {"prompt": ids})
    assert api.engine.journals[1].prompt_ids == api.engine.journals[0].prompt_ids


def test_tokens_are_spelled_on_demand(api: Api) -> None:
    body = {"prompt": "the wind", "return_token_strs": True}
    begun = api.post("/tokenize", body).json()
    bare = api.post("/tokenize", {**body, "add_special_tokens": False}).json()
    assert begun["token_strs"] == ["<s>", *bare["token_strs"]]
    assert "".join(bare["token_strs"]).replace("\u2581", " ") == " the wind"


def test_a_conversation_becomes_the_prompt_that_a_chat_would_have(
    tiny_folder: Path, tmp_path: Path
) -> None:
    api = Api(tools_folder(tiny_folder, tmp_path))
    api.configure(max_model_len=1_000)
    for fields in ({}, {"tools": [WEATHER]}, {"add_generation_prompt": False}):
        reply = api.post("/tokenize", {"messages": [USER], **fields}).json()
        assert api.post(CHAT, {"messages": [USER], **fields}).status_code == 200
        assert tuple(reply["tokens"]) == api.engine.journals[-1].prompt_ids


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": ""}, "prompt"),
        ("/tokenize", {"prompt": "a" * 10_000}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": [USER]}, "messages"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/tokenize", {"messages": [USER, USER]}, "messages"),
        ("/tokenize", {"messages": [USER], "add_special_tokens": True}, "add_special_tokens"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": [VOCAB_SIZE]}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
        ("/detokenize", {"tokens": "a"}, "tokens"),
        ("/detokenize", {"tokens": [5] * (CONTEXT + 1)}, "tokens"),
    ],
)
def test_a_wrong_request_is_a_400_that_names_the_field(
    api: Api, path: str, body: dict[str, Any], param: str
) -> None:
    is_long = len(str(body)) > 9_000 or len(body.get("tokens", "")) > CONTEXT
    code = "context_length_exceeded" if is_long else None
    assert_error(api.post(path, body), 400, param=param, code=code)


def test_what_the_tokenizer_cannot_do_is_refused_by_name(api: Api) -> None:
    for path, body, param in (
        ("/tokenize", {"messages": [USER], "tools": [CLOCK]}, "tools"),
        ("/tokenize", {"messages": [USER], "chat_template": "{{ 1 }}"}, "chat_template"),
    ):
        assert_error(api.post(path, body), 400, param=param, code="unsupported")
    response = api.post("/tokenize", {"prompt": "a", "model": "gpt-9"})
    assert_error(response, 404, param="model", code="model_not_found", kind="not_found_error")


def test_no_tokens_are_no_text(api: Api) -> None:
    assert api.post("/detokenize", {"tokens": []}).json() == {"prompt": ""}


# --- facts ---


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_the_tokenizer_tells_what_clients_must_know(api: Api, method: str) -> None:
    info = api.request(method, "/tokenizer_info").json()
    assert (info["bos_token"], info["bos_token_id"]) == ("<s>", api.tokenizer.bos_id)
    assert (info["eos_token"], info["eos_token_id"]) == ("</s>", EOS)
    assert (info["vocab_size"], info["model_max_length"]) == (VOCAB_SIZE, CONTEXT)
    assert "messages" in info["chat_template"]


def test_the_version_is_the_packages(api: Api) -> None:
    assert api.get("/version").json() == {"version": version("maestrale")}


def test_the_load_is_the_number_of_requests_in_progress(api: Api) -> None:
    api.engine.script = never_ends

    async def load() -> list[int]:
        seen = [(await api.ask("GET", "/load")).json()["server_load"]]
        caller = Caller(api, COMPLETIONS, {"prompt": "a", "stream": True})
        await caller.until(lambda: api.engine.journals)
        seen.append((await api.ask("GET", "/load")).json()["server_load"])
        await caller.hang_up()
        return [*seen, (await api.ask("GET", "/load")).json()["server_load"]]

    assert asyncio.run(load()) == [0, 1, 0]


# --- prompts ---


def test_ids_and_text_may_be_mixed(api: Api) -> None:
    ids = api.tokenizer.encode_prompt("the wind")
    reply = api.post(COMPLETIONS, {"prompt": [ids, "the wind"]}).json()
    first, second = reply["choices"]
    assert first["text"] == second["text"] == " the wind"
    assert api.engine.journals[0].prompt_ids == api.engine.journals[1].prompt_ids
    response = api.post(COMPLETIONS, {"prompt": ["a", [5]] * MAX_CHOICES})
    assert_error(response, 400, param="prompt")


def test_a_text_goes_without_begin_token_on_demand(api: Api) -> None:
    api.post(COMPLETIONS, {"prompt": "the wind", "add_special_tokens": False})
    assert list(api.engine.journals[0].prompt_ids) == api.tokenizer.encode("the wind")


@pytest.mark.parametrize(
    ("number", "max_tokens", "num_kept"), [(5, 4, 5), (1, 4, 1), (500, 4, 40), (-1, 30, 34)]
)
def test_a_prompt_is_cut_at_its_beginning(
    api: Api, number: int, max_tokens: int, num_kept: int
) -> None:
    prompt = list(range(100, 140))
    body = {"prompt": prompt, "max_tokens": max_tokens, "truncate_prompt_tokens": number}
    reply = api.post(COMPLETIONS, {**body, "echo": True}).json()
    (journal,) = api.engine.journals
    assert list(journal.prompt_ids) == prompt[-num_kept:]
    assert reply["choices"][0]["text"].startswith(api.tokenizer.decode(prompt[-num_kept:]))
    assert reply["usage"]["prompt_tokens"] == num_kept


def test_a_prompt_of_any_length_fits_when_it_is_cut(api: Api) -> None:
    for path, field in ((COMPLETIONS, {"prompt": [5] * 900}), (CHAT, {})):
        body = {**body_for(path), **field, "truncate_prompt_tokens": -1, "max_tokens": 10}
        assert api.post(path, body).status_code == 200
    assert len(api.engine.journals[0].prompt_ids) == CONTEXT - 10
    assert_error(
        api.post(COMPLETIONS, {"prompt": "a", "truncate_prompt_tokens": 0}),
        400,
        param="truncate_prompt_tokens",
    )


# --- tokens in replies ---


@pytest.mark.parametrize("stream", [False, True])
def test_tokens_are_spelled_as_ids_on_demand(api: Api, stream: bool) -> None:
    fields: dict[str, Any] = {"return_tokens_as_token_ids": True}
    body = {"prompt": "the wind", "echo": True, "logprobs": 1, **fields}
    if stream:
        *chunks, _ = api.events(COMPLETIONS, body)
        told = [chunk["choices"][0]["logprobs"] for chunk in chunks]
    else:
        told = [api.post(COMPLETIONS, body).json()["choices"][0]["logprobs"]]
    (journal,) = api.engine.journals
    ids = [*journal.prompt_ids, *journal.emitted_ids]
    spelled = [f"token_id:{token_id}" for token_id in ids]
    assert [token for each in told for token in each["tokens"]] == spelled
    tops = [top for each in told for top in each["top_logprobs"]]
    assert tops[0] is None
    assert all(token in top for token, top in zip(spelled[1:], tops[1:], strict=True))
    reply = api.post(CHAT, {"messages": [USER], "logprobs": True, "top_logprobs": 2, **fields})
    content = reply.json()["choices"][0]["logprobs"]["content"]
    emitted = api.engine.journals[1].emitted_ids
    assert [each["token"] for each in content] == [f"token_id:{each}" for each in emitted]
    assert all(
        top["token"].startswith("token_id:") for one in content for top in one["top_logprobs"]
    )


# --- what nobody looks at ---


@BOTH
def test_ignored_fields_are_counted_by_names_from_a_fixed_set(
    api: Api, path: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert "store" in IGNORED
    with caplog.at_level(logging.DEBUG, "cluster.ingress.answerer"):
        api.post(path, body_for(path, store=True, one=1, two=2))
        api.post(path, body_for(path))

    def counted(field: str) -> float | None:
        registry = api.metrics.registry
        return registry.get_sample_value("maestrale_ignored_fields_total", {"field": field})

    assert (counted("store"), counted("other"), counted("one")) == (1, 2, None)
    assert [record.message for record in caplog.records] == ["ignored fields: store, one, two"]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (COMPLETIONS, {"prompt": "the wind"}),
        (CHAT, {"messages": [USER]}),
        ("/v1/responses", {"input": "the wind"}),
        ("/v1/messages", {"messages": [USER], "max_tokens": 2}),
        ("/v1/messages/count_tokens", {"messages": [USER]}),
    ],
)
def test_every_api_counts_what_it_ignores_once(api: Api, path: str, body: dict[str, Any]) -> None:
    fields = {"moderation": {"model": "m"}, "context_management": [{"type": "t"}], "new": 1}
    assert api.post(path, body | fields).status_code == 200
    counted = {
        field: api.metrics.registry.get_sample_value(
            "maestrale_ignored_fields_total", {"field": field}
        )
        for field in ("moderation", "context_management", "other")
    }
    assert counted == {"moderation": 1, "context_management": 1, "other": 1}


@pytest.mark.parametrize(
    ("asked", "params"),
    [
        (CompletionRequest, completion_create_params.CompletionCreateParamsNonStreaming),
        (ChatCompletionRequest, chat_params.CompletionCreateParamsNonStreaming),
        (ResponsesRequest, response_create_params.ResponseCreateParamsNonStreaming),
        (MessagesRequest, message_create_params.MessageCreateParamsNonStreaming),
        (CountTokensRequest, MessageCountTokensParams),
    ],
)
def test_each_field_of_the_official_clients_is_taken_refused_or_counted_by_name(
    asked: type[ModelRequest], params: type
) -> None:
    known = asked.model_fields.keys() | asked.not_supported.keys() | IGNORED
    assert get_type_hints(params).keys() - known == set()

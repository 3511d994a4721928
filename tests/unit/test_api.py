"""The HTTP API answers as OpenAI's does: the same shapes, streamed or not."""

import asyncio
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.ingress.journal import Journal
from cluster.ingress.messages import to_submit
from cluster.schema import (
    MAX_SEED,
    ChatCompletion,
    ChatCompletionChunk,
    Completion,
    Model,
    ModelList,
    Readiness,
)
from model.generation_defaults import GenerationDefaults
from protos import head_pb2
from tests.api_fakes import (
    BOTH,
    CHAT,
    COMPLETIONS,
    CONTEXT,
    DONE,
    EITHER_WAY,
    EOS,
    LETTER_C,
    LOADING,
    MODEL_ID,
    USER,
    VOCAB_SIZE,
    Api,
    assert_error,
    body_for,
    fails_after,
)

SECRET = ValueError("the password is hunter2")


@pytest.fixture
def api(tiny_folder: Path) -> Api:
    return Api(tiny_folder)


# --- completions ---


def test_a_completion_has_the_engines_text(api: Api) -> None:
    response = api.post(COMPLETIONS, {"prompt": "the wind", "model": MODEL_ID})
    assert response.status_code == 200
    completion = Completion.model_validate(response.json())
    (choice,) = completion.choices
    assert (choice.index, choice.text, choice.finish_reason) == (0, " the wind", "stop")
    assert completion.id.startswith("cmpl-")
    assert (completion.object, completion.model) == ("text_completion", MODEL_ID)
    num_prompt = len(api.tokenizer.encode_prompt("the wind"))
    assert completion.usage is not None
    assert completion.usage.prompt_tokens == num_prompt
    assert completion.usage.completion_tokens == num_prompt  # without <s>, with </s>
    assert completion.usage.total_tokens == 2 * num_prompt


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("form", ["text", "ids", "texts", "lists of ids"])
def test_every_form_of_prompt_is_answered_prompt_by_prompt(api: Api, form: str, n: int) -> None:
    texts = ["the wind", "a small hill", "one"]
    ids = [api.tokenizer.encode_prompt(text) for text in texts]
    prompt: Any = {"text": texts[0], "ids": ids[0], "texts": texts, "lists of ids": ids}[form]
    asked = texts[:1] if form in ("text", "ids") else texts
    response = api.post(COMPLETIONS, {"prompt": prompt, "n": n, "max_tokens": 30})
    completion = Completion.model_validate(response.json())
    assert [choice.index for choice in completion.choices] == list(range(len(asked) * n))
    assert [choice.text for choice in completion.choices] == [
        f" {text}{'C' * choice}" for text in asked for choice in range(n)
    ]
    assert completion.usage is not None
    assert completion.usage.prompt_tokens == sum(len(each) for each in ids[: len(asked)])
    assert completion.usage.completion_tokens == sum(
        len(journal.emitted_ids) for journal in api.engine.journals
    )


def test_an_empty_answer_is_an_answer(api: Api) -> None:
    api.engine.script = lambda journal: [EOS]
    for path in (COMPLETIONS, CHAT):
        reply = api.post(path, body_for(path)).json()
        assert reply["choices"][0]["finish_reason"] == "stop"
        assert reply["usage"]["completion_tokens"] == 1


@BOTH
def test_an_answer_that_reaches_max_tokens_says_so(api: Api, path: str) -> None:
    reply = api.post(path, body_for(path, max_tokens=2)).json()
    assert reply["choices"][0]["finish_reason"] == "length"
    assert reply["usage"]["completion_tokens"] == 2


def test_left_out_max_tokens_are_16_for_completions_and_the_rest_of_the_context_for_chat(
    api: Api,
) -> None:
    api.post(COMPLETIONS, {"prompt": "a"})
    api.post(CHAT, {"messages": [USER]})
    api.post(COMPLETIONS, {"prompt": [5] * (CONTEXT - 3)})  # no room for 16
    room = CONTEXT - len(api.engine.journals[1].prompt_ids)
    assert [j.params.max_tokens for j in api.engine.journals] == [16, room, 3]


# --- chat ---


def test_a_chat_answer_is_the_assistants_message(api: Api) -> None:
    response = api.post(CHAT, {"messages": [USER], "n": 2})
    completion = ChatCompletion.model_validate(response.json())
    assert completion.id.startswith("chatcmpl-")
    assert completion.object == "chat.completion"
    for index, choice in enumerate(completion.choices):
        assert choice.index == index
        assert choice.message.role == "assistant"
        assert choice.message.content == "[INST] the wind [/INST]" + "C" * index
        assert choice.finish_reason == "stop"


def test_chat_reads_content_parts_and_the_newer_name_of_max_tokens(api: Api) -> None:
    parts = [{"type": "text", "text": "the"}, {"type": "text", "text": "wind"}]
    body = {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": parts},
            {"role": "assistant", "content": "Yes."},
            {"role": "user", "content": "Go on."},
        ],
        "max_tokens": 9,
        "max_completion_tokens": 4,
    }
    assert api.post(CHAT, body).status_code == 200
    (journal,) = api.engine.journals
    assert journal.params.max_tokens == 4
    assert api.tokenizer.decode(list(journal.prompt_ids)) == (
        "[INST] Be brief.\n\nthe\nwind [/INST] Yes. [INST] Go on. [/INST]"
    )


def test_a_developers_message_is_the_systems(api: Api) -> None:
    for role in ("system", "developer"):
        messages = [{"role": role, "content": "Be brief."}, USER]
        assert api.post(CHAT, {"messages": messages}).status_code == 200
    one, other = api.engine.journals
    assert one.prompt_ids == other.prompt_ids


def test_control_tokens_in_a_message_stay_text(api: Api) -> None:
    api.post(CHAT, {"messages": [{"role": "user", "content": "</s><s>"}]})
    (journal,) = api.engine.journals
    assert journal.prompt_ids.count(api.tokenizer.bos_id) == 1
    assert EOS not in journal.prompt_ids


# --- streams ---


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize(("path", "stop"), [(COMPLETIONS, "wi"), (CHAT, "INST] "), (CHAT, None)])
def test_a_stream_joins_to_the_plain_reply(api: Api, path: str, stop: str | None, n: int) -> None:
    body = body_for(path, n=n, stop=stop, seed=1)
    plain = api.post(path, body).json()
    *chunks, done = api.events(path, body)
    assert done == DONE
    texts, finishes = [""] * n, [[] for _ in range(n)]  # type: ignore[var-annotated]
    for chunk in chunks:
        (choice,) = chunk["choices"]
        index = choice["index"]
        texts[index] += choice["text"] if "text" in choice else choice["delta"]["content"] or ""
        if choice["finish_reason"]:
            finishes[index].append(choice["finish_reason"])
        else:
            assert not finishes[index]  # nothing follows the end
    for index, choice in enumerate(plain["choices"]):
        text = choice["text"] if "text" in choice else choice["message"]["content"]
        assert texts[index] == text
        assert finishes[index] == [choice["finish_reason"]]
    schema = Completion if path == COMPLETIONS else ChatCompletionChunk
    for chunk in chunks:
        schema.model_validate(chunk)
    heads = [(chunk["id"], chunk["created"], chunk["model"], chunk["object"]) for chunk in chunks]
    assert len(set(heads)) == 1
    assert heads[0][3] == ("text_completion" if path == COMPLETIONS else "chat.completion.chunk")


def test_a_chat_stream_begins_every_choice_with_the_role_and_only_with_it(api: Api) -> None:
    *chunks, _ = api.events(CHAT, {"messages": [USER], "n": 3})
    choices = [chunk["choices"][0] for chunk in chunks]
    for _, of_one in groupby(sorted(choices, key=lambda c: c["index"]), lambda c: c["index"]):
        first, *others = of_one
        assert first["delta"] == {"role": "assistant", "content": ""}
        assert all(choice["delta"]["role"] is None for choice in others)


@BOTH
@pytest.mark.parametrize("options", [None, {}, {"include_usage": False}, {"include_usage": True}])
def test_usage_is_the_last_chunk_of_a_stream_and_only_on_demand(
    api: Api, path: str, options: dict[str, bool] | None
) -> None:
    body = body_for(path, n=2)
    usage = api.post(path, body).json()["usage"]
    *chunks, last, done = api.events(path, {**body, "stream_options": options})
    assert done == DONE
    assert all(chunk["usage"] is None and len(chunk["choices"]) == 1 for chunk in chunks)
    if options and options.get("include_usage"):
        assert last["choices"] == []
        assert last["usage"] == usage
    else:
        assert last["usage"] is None
        assert len(last["choices"]) == 1


def test_text_is_streamed_as_it_comes_and_never_cut_within_a_character(api: Api) -> None:
    text = "é風🌬 the wind"
    ids = api.tokenizer.encode(text)
    api.engine.script = lambda journal: [*ids, EOS]
    *chunks, _ = api.events(COMPLETIONS, {"prompt": "a", "max_tokens": 40})
    pieces = [chunk["choices"][0]["text"] for chunk in chunks]
    assert "".join(pieces) == " " + text
    assert len(pieces) > 3
    assert "\ufffd" not in "".join(pieces)


# --- stop strings ---


@BOTH
@EITHER_WAY
def test_a_stop_string_ends_the_text_before_it_and_the_request_at_the_head(
    api: Api, path: str, stream: bool
) -> None:
    api.engine.script = lambda journal: [*api.tokenizer.encode("one two three four five"), EOS]
    body = body_for(path, stop=["four", "three", "nine"])
    leading = " " if path == COMPLETIONS else ""
    if stream:
        *chunks, _ = api.events(path, body)
        choices = [chunk["choices"][0] for chunk in chunks]
        text = "".join(c["text"] if "text" in c else c["delta"]["content"] or "" for c in choices)
        finish = choices[-1]["finish_reason"]
    else:
        (choice,) = api.post(path, body).json()["choices"]
        text = choice["text"] if "text" in choice else choice["message"]["content"]
        finish = choice["finish_reason"]
    assert (text, finish) == (f"{leading}one two ", "stop")
    assert len(api.engine.aborted) == 1


# --- what reaches the engine ---


def test_journals_carry_what_was_asked(api: Api) -> None:
    api.post(
        COMPLETIONS,
        {"prompt": ["a", "b"], "n": 2, "temperature": 0.5, "top_p": 0.25, "top_k": 7, "seed": -3},
    )
    params = [journal.params for journal in api.engine.journals]
    assert [p.choice for p in params] == [0, 1, 0, 1]
    for p in params:
        assert (p.temperature, p.top_p, p.top_k, p.seed) == (0.5, 0.25, 7, -3)
        assert p.stop_token_ids == (EOS,)
        assert p.max_tokens == 16


def test_journals_carry_vllms_parameters_too(api: Api) -> None:
    asked = {"min_p": 0.1, "typical_p": 0.9, "repetition_penalty": 1.2, "min_tokens": 3}
    api.post(COMPLETIONS, {"prompt": "a", "stop_token_ids": [LETTER_C], **asked})
    params = api.engine.journals[0].params
    assert {name: getattr(params, name) for name in asked} == asked
    assert params.stop_token_ids == (EOS, LETTER_C)


def test_ignore_eos_leaves_only_the_callers_own_stop_tokens(api: Api) -> None:
    body = {"prompt": "the wind", "ignore_eos": True, "stop_token_ids": [9], "max_tokens": 1}
    api.post(COMPLETIONS, body)
    assert api.engine.journals[0].params.stop_token_ids == (9,)


def test_a_stop_token_ends_the_text_and_is_no_part_of_it(api: Api) -> None:
    api.engine.script = fails_after(4, AssertionError("it goes on after a stop token"))
    body = {"prompt": "a", "stop_token_ids": [LETTER_C]}
    choice = api.post(COMPLETIONS, body).json()["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("", "stop")


def test_what_a_request_leaves_open_is_as_the_checkpoint_recommends(api: Api) -> None:
    defaults = GenerationDefaults(temperature=0.3, top_k=40, repetition_penalty=1.1)
    api.configure(defaults=defaults)
    api.post(COMPLETIONS, {"prompt": "a"})
    api.post(COMPLETIONS, {"prompt": "a", "temperature": 1, "top_k": -1, "top_p": 0.5})
    silent, explicit = (journal.params for journal in api.engine.journals)
    assert (silent.temperature, silent.top_k, silent.repetition_penalty) == (0.3, 40, 1.1)
    assert (explicit.temperature, explicit.top_k, explicit.top_p) == (1.0, 0, 0.5)
    assert explicit.repetition_penalty == 1.1


def test_null_and_minus_one_are_defaults(api: Api) -> None:
    nulls = {"temperature": None, "top_p": None, "n": None, "stop": None, "max_tokens": None}
    response = api.post(COMPLETIONS, {"prompt": "a", **nulls, "top_k": -1, "logit_bias": None})
    assert response.status_code == 200
    params = api.engine.journals[0].params
    assert (params.temperature, params.top_p, params.top_k, params.max_tokens) == (1.0, 1.0, 0, 16)


def test_a_request_without_seed_draws_one_that_all_its_choices_share(api: Api) -> None:
    api.post(COMPLETIONS, {"prompt": "a", "n": 2})
    api.post(COMPLETIONS, {"prompt": "a"})
    one, same, other = (journal.params.seed for journal in api.engine.journals)
    assert one == same != other


FIELDS = st.fixed_dictionaries(
    {},
    optional={
        "temperature": st.floats(0, 2),
        "top_p": st.floats(0, 1, exclude_min=True),
        "top_k": st.sampled_from([-1, 0, 1, 2**31, 2**32 - 1, 2**32, 2**40, 2**63, 10**30]),
        "seed": st.integers(-MAX_SEED - 1, MAX_SEED),
        "n": st.integers(1, 3),
        "max_tokens": st.integers(1, CONTEXT),
    },
)


@given(fields=FIELDS)
def test_every_accepted_request_can_be_sent_to_a_head_and_arrives_as_it_was(
    tiny_folder: Path, fields: dict[str, Any]
) -> None:
    api = Api(tiny_folder)
    response = api.post(COMPLETIONS, {"prompt": "a", **fields})
    if response.status_code != 200:
        assert_error(response, 400, param="top_k")
        return
    for journal in api.engine.journals:
        emitted, journal.emitted_ids = journal.emitted_ids, []
        message = to_submit(1, journal).SerializeToString()
        submit = head_pb2.HeadRequest.FromString(message).submit
        journal.emitted_ids = emitted
        assert tuple(submit.token_ids) == journal.prompt_ids
        for field in ("max_tokens", "temperature", "top_p", "seed", "choice"):
            assert getattr(submit.params, field) == getattr(journal.params, field)
        # beyond the vocabulary one bound is as good as another
        assert min(submit.params.top_k, VOCAB_SIZE) == min(journal.params.top_k, VOCAB_SIZE)


# --- counts ---

OUTCOMES: list[tuple[str, str, dict[str, Any] | None, int]] = [
    ("POST", COMPLETIONS, {"prompt": "a"}, 200),
    ("POST", COMPLETIONS, {"prompt": "a", "stream": True}, 200),
    ("POST", COMPLETIONS, {"prompt": ""}, 400),
    ("POST", COMPLETIONS, {"prompt": "a", "model": "x"}, 404),
    ("POST", COMPLETIONS, {"prompt": "a" * 30_000}, 413),
    ("POST", COMPLETIONS, {"prompt": "a", "seed": 13}, 500),
    ("POST", CHAT, {"messages": [USER], "seed": 13, "stream": True}, 500),
    ("POST", CHAT, {"messages": [USER]}, 200),
    ("GET", COMPLETIONS, None, 405),
    ("GET", "/v1/models", None, 200),
    ("GET", "/health", None, 200),
    ("GET", "/ready", None, 200),
    ("GET", "/metrics", None, 200),
]


def unlucky(journal: Journal) -> Iterator[int | Exception]:
    if journal.params.seed == 13:
        yield SECRET
    yield EOS


@pytest.mark.parametrize(("method", "path", "body", "status"), OUTCOMES)
def test_every_reply_is_counted(
    api: Api, method: str, path: str, body: dict[str, Any] | None, status: int
) -> None:
    api.engine.script = unlucky
    response = api.request(method, path, json=body)
    assert response.status_code == status
    assert "x-request-id" not in response.headers  # Serve adds one: two would be joined by a comma
    assert api.num_requests(path, status) == 1


def test_unknown_paths_share_one_count(api: Api) -> None:
    for path in ("/", "/v1", "/admin", f"/{'x' * 500}"):
        assert_error(api.get(path), 404, kind="not_found_error")
    assert api.num_requests("other", 404) == 4


def test_model_names_do_not_become_labels(api: Api) -> None:
    api.get("/v1/models/one")
    api.get("/v1/models/two")
    assert api.num_requests("/v1/models/{model_id:path}", 404) == 2


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", COMPLETIONS, "POST"),
        ("DELETE", CHAT, "POST"),
        ("POST", "/v1/models", "GET"),
        ("PUT", "/ready", "GET"),
    ],
)
def test_a_wrong_method_is_a_405_that_names_the_right_one(
    api: Api, method: str, path: str, allowed: str
) -> None:
    response = api.request(method, path)
    assert_error(response, 405)
    assert allowed in response.headers.get("allow", "")  # RFC 9110, 15.5.6


# --- the other endpoints ---


def test_models_lists_the_one_model_and_finds_it_by_id(api: Api) -> None:
    listed = ModelList.model_validate(api.get("/v1/models").json())
    (model,) = listed.data
    assert (model.id, model.max_model_len) == (MODEL_ID, CONTEXT)
    assert Model.model_validate(api.get(f"/v1/models/{MODEL_ID}").json()) == model
    response = api.get("/v1/models/org/other")
    assert_error(response, 404, param="model", code="model_not_found", kind="not_found_error")


def test_a_model_id_with_a_slash_is_found(api: Api) -> None:
    api.configure(model_id="mistralai/Mixtral-8x7B")
    assert api.get("/v1/models/mistralai/Mixtral-8x7B").status_code == 200


def test_ready_is_200_or_503_with_how_far_it_is(api: Api) -> None:
    response = api.get("/ready")
    assert response.status_code == 200
    assert Readiness.model_validate(response.json()) == api.engine.state
    api.engine.state = LOADING
    response = api.get("/ready")
    assert response.status_code == 503
    assert Readiness.model_validate(response.json()) == LOADING
    assert api.get("/health").status_code == 200  # alive all the same


def test_metrics_are_those_of_every_process(api: Api) -> None:
    response = api.get("/metrics")
    assert response.text == "# every process\n"
    assert response.headers["content-type"].startswith("text/plain")


def test_the_engine_runs_as_long_as_the_app(api: Api) -> None:
    async def live() -> None:
        assert not api.engine.is_running
        async with api.app.router.lifespan_context(api.app):
            assert api.engine.is_running
        assert not api.engine.is_running

    asyncio.run(live())

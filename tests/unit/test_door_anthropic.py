"""Anthropic's Messages API over the same engine, as the anthropic client speaks it."""

import asyncio
import json
from itertools import groupby
from pathlib import Path
from typing import Any

import anthropic
import pytest
from anthropic.types import Message

from cluster.errors import HeadUnavailableError
from cluster.ingress import anthropic as door
from cluster.ingress.auth import Access, ApiKey
from cluster.ingress.tool_calls import CallDelta
from tests.api_fakes import (
    CHAT,
    CONTEXT,
    EOS,
    JSON,
    LOADING,
    MODEL_ID,
    USER,
    Api,
    Caller,
    fails_after,
    never_ends,
    tools_folder,
)
from tests.official_clients import anthropic_client

PATH = "/v1/messages"
WEATHER: Any = {
    "name": "weather",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}},
}
CLOCK: Any = {"name": "clock", "description": "tells the time", "input_schema": {"type": "object"}}
USE: Any = {"type": "tool_use", "id": "toolu_01", "name": "weather", "input": {"city": "Nice"}}
CALLS = (
    '[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Nice"}}, '
    '{"name": "clock", "arguments": {}}]'
)
ECHO = "[INST] the wind [/INST]"
"""What the scripted engine answers to USER: the conversation as the template writes it."""


@pytest.fixture
def api(tiny_folder: Path) -> Api:
    return Api(tiny_folder)


def asked(fields: dict[str, Any]) -> dict[str, Any]:
    return {"model": MODEL_ID, "max_tokens": 40, "messages": [USER], **fields}


def create(api: Api, **fields: Any) -> Message:
    async def ask() -> Message:
        async with anthropic_client(api) as client:
            return await client.messages.create(**asked(fields))

    return asyncio.run(ask())


def stream(api: Api, **fields: Any) -> list[Any]:
    """The events of a stream."""

    async def ask() -> list[Any]:
        async with anthropic_client(api) as client:
            events = await client.messages.create(stream=True, **asked(fields))
            return [event async for event in events]

    return asyncio.run(ask())


def chat_prompt(api: Api, *messages: dict[str, str]) -> tuple[int, ...]:
    """The prompt that chat makes of these."""
    assert api.post(CHAT, {"messages": list(messages)}).status_code == 200
    return api.engine.journals[-1].prompt_ids


def test_a_message_has_the_engines_text(api: Api) -> None:
    message = create(api)
    assert [(block.type, block.text) for block in message.content] == [("text", ECHO)]  # type: ignore[union-attr]
    assert (message.role, message.type, message.model) == ("assistant", "message", MODEL_ID)
    assert (message.stop_reason, message.stop_sequence) == ("end_turn", None)
    assert message.id.startswith("msg_")
    (journal,) = api.engine.journals
    assert message.usage.input_tokens == len(journal.prompt_ids)
    assert message.usage.output_tokens == len(journal.emitted_ids)


def test_tokens_found_in_the_cache_are_counted_apart(api: Api) -> None:
    api.engine.num_reused = 3
    usage = create(api).usage
    assert usage.cache_read_input_tokens == 3
    assert usage.input_tokens + 3 == len(api.engine.journals[0].prompt_ids)
    last = [event for event in stream(api) if event.type == "message_delta"][-1]
    assert last.usage.cache_read_input_tokens == 3


def test_a_stream_has_anthropics_events_in_order(api: Api) -> None:
    body = {**asked({}), "stream": True}
    lines = api.post(PATH, body).text.split("\n")
    names = [line.removeprefix("event: ") for line in lines if line.startswith("event: ")]
    num_deltas = names.count("content_block_delta")
    assert num_deltas > 1
    assert names == [
        "message_start",
        "content_block_start",
        "ping",
        *["content_block_delta"] * num_deltas,
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]


def test_the_clients_own_stream_helper_ends_with_the_plain_message(api: Api) -> None:
    async def ask() -> Message:
        async with (
            anthropic_client(api) as client,
            client.messages.stream(**asked({})) as events,
        ):
            assert "".join([text async for text in events.text_stream]) == ECHO
            return await events.get_final_message()

    streamed, plain = asyncio.run(ask()), create(api)
    assert streamed.content[0].text == plain.content[0].text  # type: ignore[union-attr]
    assert streamed.usage == plain.usage
    assert streamed.stop_reason == "end_turn"


def test_system_and_blocks_are_the_conversation_that_chat_has(api: Api) -> None:
    create(
        api,
        system=[{"type": "text", "text": "be brief"}, {"type": "text", "text": "and kind"}],
        messages=[
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "the", "cache_control": {"type": "ephemeral"}},
                    {"type": "text", "text": "wind"},
                ],
            },
            {"role": "assistant", "content": "it blows"},
            {"role": "user", "content": "and"},
            {"role": "user", "content": "then"},
        ],
    )
    assert api.engine.journals[0].prompt_ids == chat_prompt(
        api,
        {"role": "system", "content": "be brief\nand kind"},
        {"role": "user", "content": "the\nwind"},
        {"role": "assistant", "content": "it blows"},
        {"role": "user", "content": "and\nthen"},
    )


def test_an_answer_that_the_caller_has_begun_goes_on(api: Api) -> None:
    turns = [USER, {"role": "assistant", "content": "it"}]
    create(api, messages=turns)
    api.post(CHAT, {"messages": turns, "continue_final_message": True})
    ours, chats = api.engine.journals
    assert ours.prompt_ids == chats.prompt_ids


@pytest.fixture(scope="module")
def folder(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tools_folder(tiny_folder, tmp_path_factory.mktemp("tools"))


@pytest.fixture
def caller(folder: Path) -> Api:
    """A model that calls two tools, one after the other."""
    api = Api(folder)
    api.configure(max_model_len=1_000, max_body_bytes=100_000)
    api.engine.script = lambda journal: [*api.tokenizer.encode(CALLS), EOS]
    return api


def test_calls_are_blocks_streamed_or_not(caller: Api) -> None:
    async def ask() -> Message:
        fields = asked({"tools": [WEATHER, CLOCK], "max_tokens": 400})
        async with (
            anthropic_client(caller) as client,
            client.messages.stream(**fields) as events,
        ):
            return await events.get_final_message()

    plain = create(caller, tools=[WEATHER, CLOCK], max_tokens=400)
    for message in (plain, asyncio.run(ask())):
        assert message.stop_reason == "tool_use"
        assert [(block.type, block.name, block.input) for block in message.content] == [  # type: ignore[union-attr]
            ("tool_use", "weather", {"city": "Nice"}),
            ("tool_use", "clock", {}),
        ]
    events = stream(caller, tools=[WEATHER, CLOCK], max_tokens=400)
    kinds = [(event.type, event.index) for event in events if hasattr(event, "index")]
    in_order = [kind for kind, _ in groupby(kinds)]
    assert in_order == [
        ("content_block_start", 0),
        ("content_block_delta", 0),
        ("content_block_stop", 0),
        ("content_block_start", 1),
        ("content_block_delta", 1),
        ("content_block_stop", 1),
    ]


def test_a_tools_name_may_be_as_long_as_anthropics(caller: Api) -> None:
    create(caller, tools=[{**WEATHER, "name": "n" * 128}])
    with pytest.raises(anthropic.BadRequestError, match="tools: "):
        create(caller, tools=[{**WEATHER, "name": "n" * 129}])
    assert len(caller.engine.journals) == 1


def test_text_before_a_call_is_a_block_of_its_own(caller: Api) -> None:
    caller.engine.script = lambda journal: [*caller.tokenizer.encode(f"wait {CALLS}"), EOS]
    message = create(caller, tools=[WEATHER, CLOCK], max_tokens=400)
    assert [block.type for block in message.content] == ["text", "tool_use", "tool_use"]
    events = stream(caller, tools=[WEATHER, CLOCK], max_tokens=400)
    starts = [event for event in events if event.type == "content_block_start"]
    assert [start.content_block.type for start in starts] == ["text", "tool_use", "tool_use"]


def test_text_behind_a_call_is_a_block_of_its_own(caller: Api) -> None:
    caller.engine.script = lambda journal: [*caller.tokenizer.encode(f"{CALLS} done"), EOS]
    events = stream(caller, tools=[WEATHER, CLOCK], max_tokens=400)
    starts = [event for event in events if event.type == "content_block_start"]
    assert [start.content_block.type for start in starts] == ["tool_use", "tool_use", "text"]
    deltas = [event.delta for event in events if event.type == "content_block_delta"]
    assert (deltas[-1].type, deltas[-1].text) == ("text_delta", " done")


def test_tools_and_their_results_are_the_conversation_that_chat_has(caller: Api) -> None:
    create(
        caller,
        tools=[WEATHER],
        messages=[
            USER,
            {"role": "assistant", "content": [{"type": "text", "text": "wait"}, USE]},
            {
                "role": "user",
                "content": [
                    {"type": "tool_result", "tool_use_id": "toolu_01", "content": "sun"},
                    {"type": "text", "text": "so?"},
                ],
            },
        ],
    )
    function = {"name": "weather", "parameters": WEATHER["input_schema"]}
    call = {"name": "weather", "arguments": json.dumps(USE["input"])}
    response = caller.post(
        CHAT,
        {
            "tools": [{"type": "function", "function": function}],
            "messages": [
                USER,
                {
                    "role": "assistant",
                    "content": "wait",
                    "tool_calls": [{"id": "toolu_01", "type": "function", "function": call}],
                },
                {"role": "tool", "tool_call_id": "toolu_01", "content": "sun"},
                {"role": "user", "content": "so?"},
            ],
        },
    )
    assert response.status_code == 200
    ours, chats = caller.engine.journals
    assert ours.prompt_ids == chats.prompt_ids


@pytest.mark.parametrize(
    ("choice", "chats"),
    [
        ({"type": "any"}, "required"),
        ({"type": "tool", "name": "clock"}, {"type": "function", "function": {"name": "clock"}}),
        ({"type": "auto"}, "auto"),
        ({"type": "none"}, "none"),
    ],
)
def test_a_tool_choice_means_what_chats_does(caller: Api, choice: Any, chats: Any) -> None:
    create(caller, tools=[CLOCK], tool_choice=choice)
    function = {"name": "clock", "description": "tells the time", "parameters": {"type": "object"}}
    tools = [{"type": "function", "function": function}]
    assert (
        caller.post(CHAT, {"messages": [USER], "tools": tools, "tool_choice": chats}).status_code
        == 200
    )
    one, other = caller.engine.journals
    assert (one.prompt_ids, one.grammar) == (other.prompt_ids, other.grammar)


def test_a_call_that_is_cut_off_has_no_arguments_and_says_why(caller: Api) -> None:
    head = '[TOOL_CALLS] [{"name": "weather", "arguments": {"ci'
    cut = len(caller.tokenizer.encode(head))
    message = create(caller, tools=[WEATHER], max_tokens=cut)
    assert message.stop_reason == "max_tokens"
    assert [block.input for block in message.content] == [{}]  # type: ignore[union-attr]


@pytest.mark.parametrize("value", ["NaN", "1e999", '"\\ud83d"', '{"\\ud83d": 1}'])
def test_a_call_whose_arguments_no_answer_could_hold_has_none(value: str) -> None:
    call = CallDelta(0, id="abcdefghi", name="weather", arguments=f'{{"city": {value}}}')
    assert door._block(call).input == {}


def test_parameters_reach_the_engine(api: Api) -> None:
    extra = {"temperature": 0.25, "top_p": 0.5, "top_k": 7}
    create(api, max_tokens=9, extra_body=extra, metadata={"user_id": "ada"})
    create(api, max_tokens=9)
    (one, other) = api.engine.journals
    params = one.params
    assert (params.temperature, params.top_p, params.top_k) == (0.25, 0.5, 7)
    assert params.max_tokens == 9
    assert one.client == other.client  # the key names the caller, where there is one


def test_a_key_is_the_same_client_in_both_headers(api: Api) -> None:
    body = asked({})
    for headers in ({"x-api-key": "sesame"}, {"authorization": "Bearer sesame"}, {}):
        assert api.post(PATH, body, headers=headers).status_code == 200
    by_key, by_bearer, by_none = [journal.client for journal in api.engine.journals]
    assert by_key == by_bearer != by_none == ""


@pytest.mark.parametrize(
    ("fields", "reason", "sequence"),
    [
        ({}, "end_turn", None),
        ({"max_tokens": 3}, "max_tokens", None),
        ({"stop_sequences": ["never", "wind"]}, "stop_sequence", "wind"),
    ],
)
def test_the_reason_to_stop_is_told_either_way(
    api: Api, fields: dict[str, Any], reason: str, sequence: str | None
) -> None:
    plain = create(api, **fields)
    assert (plain.stop_reason, plain.stop_sequence) == (reason, sequence)
    (delta,) = [event for event in stream(api, **fields) if event.type == "message_delta"]
    assert (delta.delta.stop_reason, delta.delta.stop_sequence) == (reason, sequence)
    assert delta.usage.output_tokens == plain.usage.output_tokens


def test_counting_tells_what_the_message_costs(api: Api) -> None:
    async def count() -> int:
        async with anthropic_client(api) as client:
            counted = await client.messages.count_tokens(
                model=MODEL_ID, system="be brief", messages=[{"role": "user", "content": "wind"}]
            )
            return counted.input_tokens

    api.engine.state = LOADING  # it needs no engine
    assert asyncio.run(count()) == len(
        api.tokenizer.encode_prompt("[INST] be brief\n\nwind [/INST]")
    )
    assert api.engine.journals == []


def test_a_conversation_beyond_the_context_is_counted(api: Api) -> None:
    text = " ".join(["wind"] * CONTEXT)
    body = {"model": MODEL_ID, "messages": [{"role": "user", "content": text}]}
    reply = api.post(f"{PATH}/count_tokens", body)
    num_tokens = len(api.tokenizer.encode_prompt(f"[INST] {text} [/INST]"))
    assert num_tokens > CONTEXT
    assert reply.json() == {"input_tokens": num_tokens}
    assert api.post(PATH, {**body, "max_tokens": 1}).status_code == 400


def test_a_schema_becomes_a_grammar(api: Api) -> None:
    schema = {"type": "object", "properties": {"name": {"type": "string"}}}
    create(api, output_config={"format": {"type": "json_schema", "schema": schema}})
    grammar = api.engine.journals[0].grammar
    assert grammar is not None
    assert '"name"' in grammar.text


def test_a_wrong_key_is_refused_in_anthropics_words(api: Api) -> None:
    api.admit(Access.with_keys([ApiKey("sesame")], allow_open=False, allowed_origins=()))
    assert create(api).content  # the client sends its key as x-api-key
    assert "no API key" in assert_refused(api, asked({}), 401, "authentication_error")


def assert_refused(api: Api, body: dict[str, Any], status: int, kind: str) -> str:
    """Anthropic's error object and nothing else. Returns the message."""
    response = api.request("POST", PATH, content=json.dumps(body), headers=JSON)
    assert response.status_code == status, response.text
    error = response.json()
    assert set(error) == {"type", "error"}
    assert error["type"] == "error"
    assert set(error["error"]) == {"type", "message"}
    assert error["error"]["type"] == kind
    message: str = error["error"]["message"]
    return message


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_tokens": None}, "max_tokens: Field required"),
        ({"max_tokens": 1000}, "max_tokens: 1000 exceeds the context"),
        ({"messages": []}, "messages: List should have at least 1"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]},
            "messages: Input tag 'image' found",
        ),
        ({"messages": [{"role": "tool", "content": "x"}]}, "not 'tool'"),
        (
            {"messages": [{"role": "user", "content": [{**USE, "id": "x"}]}]},
            "messages: a tool_use block cannot be in a turn of user",
        ),
        ({"messages": [{"role": "assistant", "content": [USE]}]}, "messages: "),
        ({"messages": [{"role": "user", "content": []}]}, "messages: List should have at least 1"),
        ({"tools": [{"type": "web_search_20250305", "name": "x"}]}, "tools: Input should be"),
        ({"tools": [WEATHER]}, "tools: the chat template of this model"),
        (
            {"tools": [{"name": "x", "input_schema": {"type": "array"}}]},
            "tools: must be the",
        ),
        ({"tool_choice": {"type": "any"}}, "tool_choice: there are no tools"),
        ({"tool_choice": {"type": "tool"}}, "tool_choice: name must be given"),
        ({"thinking": {"type": "enabled", "budget_tokens": 9}}, "thinking is not supported"),
        ({"output_format": {"type": "json_schema"}}, "output_format is not supported"),
        ({"temperature": -1}, "temperature: Input should be greater than or equal to 0"),
        ({"system": [{"type": "image"}]}, "system: Input should be 'text'"),
        (
            {"output_config": {"format": {"type": "json_schema", "schema": {"\ud800": 1}}}},
            "output_config.format: it is not valid Unicode",
        ),
    ],
)
def test_what_cannot_be_served_is_refused_in_anthropics_words(
    api: Api, fields: dict[str, Any], message: str
) -> None:
    assert message in assert_refused(api, asked(fields), 400, "invalid_request_error")
    assert api.engine.journals == []


def test_each_status_has_anthropics_type(api: Api) -> None:
    assert "not served" in assert_refused(api, asked({"model": "x"}), 404, "not_found_error")
    assert_refused(api, asked({"system": "x" * 30_000}), 413, "request_too_large")
    api.engine.state = LOADING
    assert "not ready yet" in assert_refused(api, asked({}), 503, "overloaded_error")
    api.configure(max_concurrent_requests=0)
    api.engine.state = api.engine.state.model_copy(update={"ready": True})
    assert_refused(api, asked({}), 429, "rate_limit_error")
    api.engine.script = fails_after(0, ValueError("the password is hunter2"))
    api.configure(max_concurrent_requests=1)
    assert "hunter2" not in assert_refused(api, asked({}), 500, "api_error")


def test_the_client_raises_its_own_errors(api: Api) -> None:
    with pytest.raises(anthropic.NotFoundError, match="not served here"):
        create(api, model="claude")
    with pytest.raises(anthropic.BadRequestError, match="thinking is not supported"):
        create(api, thinking={"type": "enabled", "budget_tokens": 1024})


def test_a_failure_within_a_stream_is_an_error_event(api: Api) -> None:
    api.engine.script = fails_after(2, HeadUnavailableError("the head is gone"))
    with pytest.raises(anthropic.APIStatusError, match="no head replica could finish"):
        stream(api)


@pytest.mark.parametrize("is_streamed", [False, True])
def test_a_caller_who_hangs_up_ends_the_request(api: Api, is_streamed: bool) -> None:
    api.engine.script = never_ends

    async def leave() -> None:
        caller = Caller(api, PATH, {**asked({}), "stream": is_streamed})
        await caller.until(lambda: api.engine.journals and api.engine.journals[0].emitted_ids)
        await caller.hang_up()

    asyncio.run(leave())
    assert len(api.engine.aborted) == 1
    assert api.num_in_progress == 0

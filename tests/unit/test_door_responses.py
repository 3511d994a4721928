"""The Responses API over the same engine, as the openai client speaks it."""

import asyncio
import json
import math
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai.types.responses import Response
from pydantic import BaseModel

from cluster.errors import HeadUnavailableError
from cluster.ingress.errors import UNFINISHED
from cluster.ingress.journal import Journal
from tests.api_fakes import (
    CHAT,
    EOS,
    JSON,
    LETTER_C,
    LOADING,
    MODEL_ID,
    Api,
    Caller,
    assert_error,
    fails_after,
    never_ends,
    tools_folder,
)
from tests.official_clients import openai_client

PATH = "/v1/responses"
WEATHER: Any = {
    "type": "function",
    "name": "weather",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    "strict": True,
}
CLOCK: Any = {"type": "function", "name": "clock", "parameters": {"type": "object"}}
ARGUMENTS = '{"city": "Nice"}'
CALL: Any = {
    "type": "function_call",
    "call_id": "call_1",
    "name": "weather",
    "arguments": ARGUMENTS,
}
CALLS = (
    f'[TOOL_CALLS] [{{"name": "weather", "arguments": {ARGUMENTS}}}, '
    '{"name": "clock", "arguments": {}}]'
)
ECHO = "[INST] the wind [/INST]"
"""What the scripted engine answers to "the wind": the conversation as the template writes it."""


@pytest.fixture
def api(tiny_folder: Path) -> Api:
    return Api(tiny_folder)


def create(api: Api, **fields: Any) -> Response:
    async def ask() -> Response:
        async with openai_client(api) as client:
            return await client.responses.create(**{"model": MODEL_ID, **fields})

    return asyncio.run(ask())


def stream(api: Api, **fields: Any) -> list[Any]:
    """The events of a stream."""

    async def ask() -> list[Any]:
        async with openai_client(api) as client:
            fields.setdefault("model", MODEL_ID)
            return [event async for event in await client.responses.create(stream=True, **fields)]

    return asyncio.run(ask())


def chat_prompt(api: Api, *messages: dict[str, str]) -> tuple[int, ...]:
    """The prompt that chat makes of these."""
    assert api.post(CHAT, {"messages": list(messages)}).status_code == 200
    return api.engine.journals[-1].prompt_ids


def test_a_response_has_the_engines_text(api: Api) -> None:
    api.engine.num_reused = 3
    response = create(api, input="the wind", metadata={"topic": "weather"}, store=True)
    assert response.output_text == ECHO
    assert (response.status, response.model, response.object) == ("completed", MODEL_ID, "response")
    assert response.id.startswith("resp_")
    assert response.metadata == {"topic": "weather"}
    assert response.to_dict()["store"] is False  # nothing is, whatever is asked for
    (message,) = response.output
    assert (message.type, message.status) == ("message", "completed")
    (journal,) = api.engine.journals
    usage = response.usage
    assert usage is not None
    assert usage.input_tokens == len(journal.prompt_ids)
    assert usage.output_tokens == len(journal.emitted_ids)
    assert usage.total_tokens == usage.input_tokens + usage.output_tokens
    assert usage.input_tokens_details.cached_tokens == 3


def test_a_stream_tells_the_same_response_event_by_event(api: Api) -> None:
    events = stream(api, input="the wind")
    kinds = [event.type for event in events]
    texts = kinds.count("response.output_text.delta")
    assert texts > 1
    assert kinds == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        *["response.output_text.delta"] * texts,
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == events[-4].text == events[-1].response.output_text == ECHO
    response = events[-1].response
    assert {event.response.id for event in events if hasattr(event, "response")} == {response.id}
    assert {event.item_id for event in events if hasattr(event, "item_id")} == {
        response.output[0].id
    }
    plain = create(api, input="the wind")
    assert response.usage == plain.usage


def test_the_clients_own_stream_helper_ends_with_the_response(api: Api) -> None:
    async def ask() -> str:
        async with (
            openai_client(api) as client,
            client.responses.stream(model=MODEL_ID, input="the wind") as events,
        ):
            return (await events.get_final_response()).output_text

    assert asyncio.run(ask()) == ECHO


def test_events_are_framed_with_their_names(api: Api) -> None:
    lines = api.post(PATH, {"input": "the wind", "stream": True}).text.split("\n")
    names = [line.removeprefix("event: ") for line in lines if line.startswith("event: ")]
    assert (names[0], names[-1]) == ("response.created", "response.completed")
    assert len(names) == sum(line.startswith("data: ") for line in lines)


def test_items_and_instructions_are_the_conversation_that_chat_has(api: Api) -> None:
    create(
        api,
        instructions="be brief",
        input=[
            {"role": "developer", "content": "and kind"},
            {"role": "user", "content": [{"type": "input_text", "text": "the wind"}]},
            {
                "id": "msg_1",
                "type": "message",
                "role": "assistant",
                "status": "completed",
                "content": [{"type": "output_text", "text": "it blows", "annotations": []}],
            },
            {"role": "user", "content": "and"},
            {"role": "user", "content": "then"},
        ],
    )
    assert api.engine.journals[0].prompt_ids == chat_prompt(
        api,
        {"role": "system", "content": "be brief\nand kind"},
        {"role": "user", "content": "the wind"},
        {"role": "assistant", "content": "it blows"},
        {"role": "user", "content": "and\nthen"},
    )


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


def test_calls_are_items_streamed_or_not(caller: Api) -> None:
    fields: dict[str, Any] = {"input": "the wind", "tools": [WEATHER, CLOCK]}
    plain = create(caller, **fields)
    events = stream(caller, **fields)
    for response in (plain, events[-1].response):
        assert response.status == "completed"
        assert [(item.type, item.name, item.arguments) for item in response.output] == [
            ("function_call", "weather", ARGUMENTS),
            ("function_call", "clock", "{}"),
        ]
    assert [tool.name for tool in plain.tools] == ["weather", "clock"]  # type: ignore[union-attr]
    kinds = [kind for kind, _ in groupby(event.type for event in events)]
    one_call = [
        "response.output_item.added",
        "response.function_call_arguments.delta",
        "response.function_call_arguments.done",
        "response.output_item.done",
    ]
    assert kinds == [
        "response.created",
        "response.in_progress",
        *one_call,
        *one_call,
        "response.completed",
    ]
    added = [event for event in events if event.type == "response.output_item.added"]
    assert [(event.output_index, event.item.name) for event in added] == [
        (0, "weather"),
        (1, "clock"),
    ]
    assert [event.item.call_id for event in added] == [
        item.call_id for item in events[-1].response.output
    ]


def test_the_clients_own_stream_helper_reads_text_and_calls(caller: Api) -> None:
    caller.engine.script = lambda journal: [*caller.tokenizer.encode(f"wait {CALLS}"), EOS]

    async def ask() -> list[str]:
        async with (
            openai_client(caller) as client,
            client.responses.stream(
                model=MODEL_ID, input="the wind", tools=[WEATHER, CLOCK]
            ) as events,
        ):
            return [item.type for item in (await events.get_final_response()).output]

    assert asyncio.run(ask()) == ["message", "function_call", "function_call"]


def test_text_behind_calls_is_a_message_of_its_own_in_a_stream(caller: Api) -> None:
    said = f"wait {CALLS} done"
    caller.engine.script = lambda journal: [*caller.tokenizer.encode(said), EOS]
    events = stream(caller, input="the wind", tools=[WEATHER, CLOCK])
    items = events[-1].response.output
    assert [item.type for item in items] == ["message", "function_call", "function_call", "message"]
    assert [item.content[0].text for item in (items[0], items[3])] == ["wait ", " done"]
    done = [event.item for event in events if event.type == "response.output_item.done"]
    assert [item.to_dict() for item in done] == [item.to_dict() for item in items]
    (plain,) = [
        i for i in create(caller, input="x", tools=[WEATHER, CLOCK]).output if i.type == "message"
    ]
    assert plain.content[0].text == "wait  done"


def test_tools_and_their_results_are_the_conversation_that_chat_has(caller: Api) -> None:
    create(
        caller,
        tools=[WEATHER],
        input=[
            {"role": "user", "content": "the wind"},
            {"role": "assistant", "content": "wait"},
            CALL,
            {"type": "function_call_output", "call_id": "call_1", "output": "sun"},
        ],
    )
    function = {"name": "weather", "parameters": WEATHER["parameters"]}
    call = {"name": "weather", "arguments": ARGUMENTS}
    response = caller.post(
        CHAT,
        {
            "tools": [{"type": "function", "function": function}],
            "messages": [
                {"role": "user", "content": "the wind"},
                {
                    "role": "assistant",
                    "content": "wait",
                    "tool_calls": [{"id": "call_1", "type": "function", "function": call}],
                },
                {"role": "tool", "tool_call_id": "call_1", "content": "sun"},
            ],
        },
    )
    assert response.status_code == 200
    ours, chats = caller.engine.journals
    assert ours.prompt_ids == chats.prompt_ids


@pytest.mark.parametrize(
    ("choice", "chats"),
    [
        ("required", "required"),
        ("none", "none"),
        (
            {"type": "function", "name": "clock"},
            {"type": "function", "function": {"name": "clock"}},
        ),
    ],
)
def test_a_tool_choice_means_what_chats_does(caller: Api, choice: Any, chats: Any) -> None:
    create(caller, input="the wind", tools=[CLOCK], tool_choice=choice, parallel_tool_calls=False)
    function = {"name": "clock", "parameters": {"type": "object"}}
    response = caller.post(
        CHAT,
        {
            "messages": [{"role": "user", "content": "the wind"}],
            "tools": [{"type": "function", "function": function}],
            "tool_choice": chats,
            "parallel_tool_calls": False,
        },
    )
    assert response.status_code == 200
    one, other = caller.engine.journals
    assert (one.prompt_ids, one.grammar) == (other.prompt_ids, other.grammar)


def test_a_call_that_is_cut_off_is_incomplete(caller: Api) -> None:
    head = '[TOOL_CALLS] [{"name": "weather", "arguments": {"ci'
    cut = len(caller.tokenizer.encode(head))
    fields: dict[str, Any] = {"input": "x", "tools": [WEATHER], "max_output_tokens": cut}
    for response in (create(caller, **fields), stream(caller, **fields)[-1].response):
        (item,) = response.output
        assert (response.status, item.status) == ("incomplete", "incomplete")
        assert ARGUMENTS.startswith(item.arguments)


def test_parameters_reach_the_engine_and_come_back(api: Api) -> None:
    response = create(api, input="the wind", temperature=0.25, top_p=0.5, max_output_tokens=7)
    params = api.engine.journals[0].params
    assert (params.temperature, params.top_p, params.max_tokens) == (0.25, 0.5, 7)
    assert (response.temperature, response.top_p) == (0.25, 0.5)
    assert response.max_output_tokens == 7


@pytest.mark.parametrize("is_streamed", [False, True])
def test_an_answer_that_is_cut_is_incomplete(api: Api, is_streamed: bool) -> None:
    fields: dict[str, Any] = {"input": "the wind", "max_output_tokens": 3}
    if is_streamed:
        last = stream(api, **fields)[-1]
        assert last.type == "response.incomplete"
        response = last.response
    else:
        response = create(api, **fields)
    assert response.status == "incomplete"
    assert response.incomplete_details.reason == "max_output_tokens"
    assert response.output[0].status == "incomplete"
    assert response.usage.output_tokens == 3


class Animal(BaseModel):
    name: str


def test_a_schema_becomes_a_grammar_and_its_answer_an_object(api: Api) -> None:
    def spell(journal: Journal) -> Iterator[int]:
        yield from api.tokenizer.encode('{"name": "cow"}')
        yield EOS

    api.engine.script = spell

    async def ask() -> Any:
        async with openai_client(api) as client:
            return await client.responses.parse(
                model=MODEL_ID, input="the wind", text_format=Animal
            )

    response = asyncio.run(ask())
    assert response.output_parsed == Animal(name="cow")
    grammar = api.engine.journals[0].grammar
    assert grammar is not None
    assert '"name"' in grammar.text
    assert response.text.format.type == "json_schema"


def test_logprobs_come_where_they_are_asked_for(api: Api) -> None:
    asked = create(api, input="the wind", include=["message.output_text.logprobs"], top_logprobs=2)
    (part,) = asked.output[0].content  # type: ignore[union-attr]
    assert "".join(each.token for each in part.logprobs) == ECHO
    assert {len(each.top_logprobs) for each in part.logprobs} == {2}
    streamed = stream(api, input="the wind", top_logprobs=2)
    deltas = [event for event in streamed if event.type == "response.output_text.delta"]
    assert [each.token for event in deltas for each in event.logprobs] == [
        each.token for each in part.logprobs
    ]
    assert create(api, input="the wind").output[0].content[0].logprobs == []  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id", "not stored here"),
        ({"conversation": "conv_1"}, "conversation", "send the whole conversation"),
        ({"background": True}, "background", "not supported"),
        ({"input": []}, "input", "at least 1"),
        (
            {"input": [{"type": "item_reference", "id": "x"}]},
            "input",
            "an item must be",
        ),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image"}]}]},
            "input",
            "'input_text' or 'output_text', not 'input_image'",
        ),
        ({"input": [{"role": "tool", "content": "x"}]}, "input", "'developer', not 'tool'"),
        ({"input": [{"role": "assistant", "content": "x"}]}, "input", "must not be the assistant"),
        ({"tools": [{"type": "web_search"}]}, "tools", "Input should be 'function'"),
        (
            {"tools": [{**WEATHER, "parameters": {"type": "array"}}]},
            "tools",
            "must be the schema of an object",
        ),
        (
            {"tools": [{**CLOCK, "description": "\ud800"}], "tool_choice": "none"},
            "tools",
            "what JSON cannot",
        ),
        (
            {"tools": [{**CLOCK, "parameters": {"minimum": math.nan}}], "tool_choice": "none"},
            "tools",
            "what JSON cannot",
        ),
        ({"tool_choice": "required"}, "tool_choice", "there are no tools"),
        ({"tool_choice": "sometimes"}, "tool_choice", "'auto', 'none' or 'required'"),
        (
            {"input": [{**CALL, "arguments": "["}]},
            "input",
            "input: arguments of weather",
        ),
        ({"temperature": 3}, "temperature", "less than or equal to 2"),
        ({"max_output_tokens": 1000}, "max_output_tokens", "max_output_tokens: 1000 exceeds"),
        ({"text": {"format": {"type": "json_schema"}}}, "text", "name and schema"),
        (
            {"text": {"format": {"type": "text", "description": "\udfff"}}},
            "text",
            "what JSON cannot",
        ),
        ({"text": {"format": {"type": "json_object", "schema": {}}}}, "text", "name and schema"),
        (
            {"text": {"format": {"type": "json_schema", "name": "x", "schema": {"\ud800": 1}}}},
            "text.format",
            "text.format: it is not valid Unicode",
        ),
        ({"metadata": {"x" * 65: "y"}}, "metadata", "at most 64"),
    ],
)
def test_what_cannot_be_served_is_refused_by_its_name(
    api: Api, fields: dict[str, Any], param: str, message: str
) -> None:
    body = json.dumps({"input": "the wind", **fields})
    response = api.request("POST", PATH, content=body, headers=JSON)
    code = "unsupported" if param == "background" else None
    assert message in assert_error(response, 400, param=param, code=code)
    assert api.engine.journals == []


def test_another_model_is_not_found(api: Api) -> None:
    with pytest.raises(openai.NotFoundError, match="not served here"):
        create(api, input="the wind", model="gpt")


def test_before_a_head_is_ready_the_status_is_503(api: Api) -> None:
    api.engine.state = LOADING
    with pytest.raises(openai.InternalServerError, match="not ready yet"):
        stream(api, input="the wind")


def test_a_failure_before_the_first_token_has_a_status_of_its_own(api: Api) -> None:
    api.engine.script = fails_after(0, HeadUnavailableError("the head is gone"))
    with pytest.raises(openai.InternalServerError, match="no head replica could finish"):
        stream(api, input="the wind")


def test_a_failure_after_it_is_told_by_the_stream(api: Api) -> None:
    api.engine.script = fails_after(2, HeadUnavailableError("the head is gone"))
    last = stream(api, input="the wind")[-1]
    assert last.type == "response.failed"
    assert last.response.status == "failed"
    assert last.response.error.message == UNFINISHED


@pytest.mark.parametrize("is_streamed", [False, True])
def test_a_caller_who_hangs_up_ends_the_request(api: Api, is_streamed: bool) -> None:
    api.engine.script = never_ends

    async def leave() -> None:
        caller = Caller(api, PATH, {"input": "the wind", "stream": is_streamed})
        await caller.until(lambda: api.engine.journals and api.engine.journals[0].emitted_ids)
        await caller.hang_up()

    asyncio.run(leave())
    assert len(api.engine.aborted) == 1
    assert api.num_in_progress == 0


def test_the_openapi_document_names_both_forms_of_input(api: Api) -> None:
    document: httpx.Response = api.get("/openapi.json")
    schema = document.json()["components"]["schemas"]["ResponsesRequest"]["properties"]["input"]
    assert {form["type"] for form in schema["oneOf"]} == {"string", "array"}


def test_an_answer_without_text_is_one_empty_part(api: Api) -> None:
    api.engine.script = lambda journal: [EOS]
    assert create(api, input="the wind").output_text == ""
    api.engine.script = lambda journal: [LETTER_C, EOS]
    assert create(api, input="the wind").output_text == "C"

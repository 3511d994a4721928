"""Tools: what the model is shown, what it must write, and how its calls are told."""

import json
import re
from pathlib import Path
from typing import Any

import mistral_common
import pytest

from cluster.schema import ChatCompletion
from model.chat import ChatFormat
from model.tokenizer import Tokenizer
from tests.api_fakes import (
    CHAT,
    DONE,
    EITHER_WAY,
    EOS,
    USER,
    Api,
    assert_error,
    tools_folder,
)
from tests.unit.test_chat_tools import TEMPLATE, V3_FILE

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
CLOCK = {"type": "function", "function": {"name": "clock"}}
ARGUMENTS = '{"city": "Nice"}'
CALL = f'{{"name": "weather", "arguments": {ARGUMENTS}}}'
CALLS = f'[{CALL}, {{"name": "clock", "arguments": {{}}}}]'
LONG = {"max_model_len": 1_000, "max_body_bytes": 100_000}


@pytest.fixture(scope="module")
def folder(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tools_folder(tiny_folder, tmp_path_factory.mktemp("tools"))


@pytest.fixture
def api(folder: Path) -> Api:
    api = Api(folder)
    api.configure(**LONG)
    return api


def says(api: Api, text: str) -> None:
    api.engine.script = lambda journal: [*api.tokenizer.encode(text), EOS]


def body(**fields: Any) -> dict[str, Any]:
    return {"messages": [USER], "tools": [WEATHER, CLOCK], **fields}


def told(api: Api, stream: bool, **fields: Any) -> tuple[Any, Any, list[dict[str, Any]]]:
    """Finish, content and calls of an answer; a stream's put together as clients do."""
    if not stream:
        reply = api.post(CHAT, body(**fields))
        assert reply.status_code == 200, reply.text
        ChatCompletion.model_validate(reply.json())
        (choice,) = reply.json()["choices"]
        message = choice["message"]
        return choice["finish_reason"], message["content"], message.get("tool_calls", [])
    *chunks, done = api.events(CHAT, body(**fields))
    assert done == DONE
    finish, content, calls = None, None, []
    for chunk in chunks[1:]:
        (choice,) = chunk["choices"]
        assert finish is None
        finish = choice["finish_reason"]
        delta = choice["delta"]
        if delta["content"]:
            content = (content or "") + delta["content"]
        for piece in delta.get("tool_calls", []):
            if "id" in piece:
                assert piece["index"] == len(calls)
                assert set(piece) == {"index", "id", "type", "function"}
                calls.append({"id": piece["id"], "type": piece["type"], "function": {}})
                calls[-1]["function"] = {"name": piece["function"]["name"], "arguments": ""}
            else:
                assert set(piece) == {"index", "function"}
                assert set(piece["function"]) == {"arguments"}
            calls[piece["index"]]["function"]["arguments"] += piece["function"]["arguments"]
    return finish, content, calls


@EITHER_WAY
def test_calls_are_told_as_openais(api: Api, stream: bool) -> None:
    says(api, f"[TOOL_CALLS] {CALLS}")
    finish, content, calls = told(api, stream)
    assert (finish, content) == ("tool_calls", None)
    assert [call["function"] for call in calls] == [
        {"name": "weather", "arguments": ARGUMENTS},
        {"name": "clock", "arguments": "{}"},
    ]
    for call in calls:
        assert call["type"] == "function"
        assert re.fullmatch(r"[a-zA-Z0-9]{9}", call["id"])


@EITHER_WAY
@pytest.mark.parametrize("text", ["It rains.", '[TOOL_CALLS] [{"name": "weather", "arg'])
def test_what_is_no_call_stays_content(api: Api, stream: bool, text: str) -> None:
    says(api, text)
    assert told(api, stream) == ("stop", text, [])


@EITHER_WAY
def test_a_call_that_is_cut_off_ends_by_length(api: Api, stream: bool) -> None:
    says(api, f"[TOOL_CALLS] {CALLS}")
    num_tokens = len(api.tokenizer.encode(f"[TOOL_CALLS] [{CALL.removesuffix(' ')[:-6]}"))
    finish, content, calls = told(api, stream, max_tokens=num_tokens)
    assert (finish, content) == ("length", None)
    assert ARGUMENTS.startswith(calls[0]["function"]["arguments"])
    assert calls[0]["function"]["arguments"]


def test_the_model_is_shown_the_tools(api: Api) -> None:
    api.post(CHAT, body())
    api.post(CHAT, body(tool_choice="none"))
    api.post(CHAT, {"messages": [USER]})
    shown, hidden, plain = (api.tokenizer.decode(list(j.prompt_ids)) for j in api.engine.journals)
    assert '[AVAILABLE_TOOLS] [{"type": "function", "function": {"name": "weather", ' in shown
    assert hidden == plain
    assert "AVAILABLE" not in plain


@EITHER_WAY
@pytest.mark.parametrize(
    ("choice", "names", "only_one"),
    [
        ("required", ["weather", "clock"], False),
        ({"type": "function", "function": {"name": "weather"}}, ["weather"], True),
    ],
)
def test_a_forced_call_has_a_grammar_and_begins_in_the_prompt(
    api: Api, stream: bool, choice: Any, names: list[str], only_one: bool
) -> None:
    says(api, f"[{CALL}]")
    finish, content, calls = told(api, stream, tool_choice=choice)
    assert (finish, content) == ("tool_calls", None)
    assert [call["function"]["name"] for call in calls] == ["weather"]
    (journal,) = api.engine.journals
    assert api.tokenizer.decode(list(journal.prompt_ids)).endswith("[TOOL_CALLS]")
    assert journal.grammar is not None
    wanted = json.loads(journal.grammar.text)
    assert (journal.grammar.kind, wanted["only_one"]) == ("tool_calls", only_one)
    assert [name for name, _ in wanted["functions"]] == names


def test_left_to_the_model_a_call_has_no_grammar_and_may_be_bounded_to_one(api: Api) -> None:
    says(api, f"[TOOL_CALLS] {CALLS}")
    _, _, calls = told(api, False, parallel_tool_calls=False)
    assert len(calls) == 1
    assert api.engine.journals[0].grammar is None
    told(api, False, parallel_tool_calls=False, tool_choice="required")
    assert json.loads(api.engine.journals[1].grammar.text)["only_one"]  # type: ignore[union-attr]


def test_calls_behind_a_control_token_are_found(folder: Path) -> None:
    """Of Mistral's third vocabulary the marker is a token without text."""
    api = Api(folder)
    file = Path(mistral_common.__file__).parent / "data" / V3_FILE
    api.tokenizer = Tokenizer(file)
    api._chat = ChatFormat(api.tokenizer, TEMPLATE)
    api.configure(**LONG, vocab_size=api.tokenizer.vocab_size)
    marker_id = api.tokenizer.control_ids["[TOOL_CALLS]"]
    api.engine.script = lambda journal: [marker_id, *api.tokenizer.encode(CALLS), EOS]
    for stream in (False, True):
        finish, content, calls = told(api, stream)
        assert (finish, content, len(calls)) == ("tool_calls", None, 2)
    says(api, CALLS)
    assert len(told(api, True, tool_choice="required")[2]) == 2
    assert api.engine.journals[-1].prompt_ids[-1] == marker_id


# --- history ---

ASKED = {
    "role": "assistant",
    "content": None,
    "tool_calls": [
        {
            "id": "call_of_another_server",
            "type": "function",
            "function": {"name": "weather", "arguments": '{"city":"Nice"}'},
        }
    ],
}
RESULT = {"role": "tool", "content": "sun", "tool_call_id": "call_of_another_server"}


def test_calls_and_their_results_are_rendered_and_their_ids_brought_into_form(api: Api) -> None:
    assert api.post(CHAT, body(messages=[USER, ASKED, RESULT])).status_code == 200
    text = api.tokenizer.decode(list(api.engine.journals[0].prompt_ids))
    asked = re.search(r'\[TOOL_CALLS\] \[{"name": "weather", .*"id": "([a-zA-Z0-9]{9})"}\]', text)
    answered = re.search(r'{"content": "sun", "call_id": "([a-zA-Z0-9]{9})"}', text)
    assert asked
    assert answered
    assert asked[1] == answered[1]


# --- refusals ---


def with_arguments(arguments: str) -> dict[str, Any]:
    (call,) = ASKED["tool_calls"]  # type: ignore[misc]
    function = {"name": "weather", "arguments": arguments}
    return {**ASKED, "tool_calls": [{**call, "function": function}]}  # type: ignore[dict-item]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"tools": [{"type": "retrieval", "function": {"name": "a"}}]}, "tools"),
        ({"tools": [{"function": {"name": "a b"}}]}, "tools"),
        ({"tools": [{"function": {"name": "a", "parameters": {"type": "string"}}}]}, "tools"),
        ({"tools": [CLOCK] * 129}, "tools"),
        ({"tools": [], "tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": "sometimes"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "sun"}}}, "tool_choice"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"structured_outputs": {"regex": "a"}}, "structured_outputs"),
        ({"messages": [USER, {"role": "assistant"}]}, "messages"),
        ({"messages": [USER, with_arguments("{"), RESULT]}, "messages"),
        ({"messages": [USER, with_arguments("[]"), RESULT]}, "messages"),
        ({"messages": [USER, with_arguments("[" * 9_000), RESULT]}, "messages"),
    ],
)
def test_a_wrong_request_is_a_400_that_names_the_field(
    api: Api, fields: dict[str, Any], param: str
) -> None:
    assert_error(api.post(CHAT, body(**fields)), 400, param=param)
    assert api.engine.journals == []


def test_a_template_without_tools_refuses_them_clearly(tiny_folder: Path) -> None:
    api = Api(tiny_folder)
    message = assert_error(api.post(CHAT, body()), 400, param="tools", code="unsupported")
    assert "chat template" in message
    assert api.post(CHAT, body(tool_choice="none")).status_code == 200


# --- how a conversation ends ---


def test_a_message_is_continued_in_its_text(api: Api) -> None:
    messages = [USER, {"role": "assistant", "content": "It ra"}]
    api.engine.script = lambda journal: [*api.tokenizer.encode("ins"), EOS]
    reply = api.post(CHAT, {"messages": messages, "continue_final_message": True})
    assert reply.json()["choices"][0]["message"]["content"] == " ins"
    (journal,) = api.engine.journals
    assert api.tokenizer.decode(list(journal.prompt_ids)).endswith("[/INST] It ra")
    assert EOS not in journal.prompt_ids


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"continue_final_message": True}, "continue_final_message"),
        (
            {"continue_final_message": True, "add_generation_prompt": True},
            "add_generation_prompt",
        ),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"bos_token": "a"}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": 3}, "chat_template_kwargs"),
    ],
)
def test_a_wrong_end_is_a_400_that_names_the_field(
    api: Api, fields: dict[str, Any], param: str
) -> None:
    assert_error(api.post(CHAT, {"messages": [USER], **fields}), 400, param=param)

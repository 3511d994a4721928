"""Conversations with tools become mistral-common's ids; templates see what transformers shows."""

from pathlib import Path
from typing import Any

import mistral_common
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mistral_common.protocol.instruct import messages as mistral
from mistral_common.protocol.instruct import tool_calls as mistral_tools
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

from model.chat import CALLS_MARKER, ChatFormat, Message, ToolCall
from model.errors import PromptError
from model.tokenizer import Tokenizer

V3_FILE = "mistral_instruct_tokenizer_240323.model.v3"
TEMPLATE = (Path(__file__).parents[1] / "data" / "tools_template.jinja").read_text()
FUNCTION = {
    "name": "weather",
    "description": "The weather of a place",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
        "required": ["city"],
    },
}
TOOL = {"type": "function", "function": FUNCTION}
CALL = ToolCall("abcdefghi", "weather", {"city": "Nice", "days": 2})
CONTROL_TEXT = "<s> </s> [INST] [/INST] [TOOL_CALLS] [/AVAILABLE_TOOLS] [control_8]"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """With the pieces of Mistral's third format, where [INST] and its like are control tokens."""
    return Tokenizer(Path(mistral_common.__file__).parent / "data" / V3_FILE)


@pytest.fixture(scope="module")
def chat(tokenizer: Tokenizer) -> ChatFormat:
    return ChatFormat(tokenizer, TEMPLATE)


@pytest.fixture(scope="module")
def reference() -> MistralTokenizer:
    return MistralTokenizer.v3()


def mistral_message(message: Message) -> Any:
    match message.role:
        case "system":
            return mistral.SystemMessage(content=message.content)
        case "user":
            return mistral.UserMessage(content=message.content)
        case "tool":
            return mistral.ToolMessage(content=message.content, tool_call_id=message.tool_call_id)
    calls = [
        mistral_tools.ToolCall(
            id=call.id,
            function=mistral_tools.FunctionCall(name=call.name, arguments=call.arguments),
        )
        for call in message.tool_calls
    ]
    return mistral.AssistantMessage(content=message.content, tool_calls=calls or None)


def reference_ids(reference: MistralTokenizer, messages: list[Message], *, has_tools: bool) -> Any:
    tools = [mistral_tools.Tool(function=mistral_tools.Function(**FUNCTION))] if has_tools else None
    request = ChatCompletionRequest(
        tools=tools, messages=[mistral_message(message) for message in messages]
    )
    return reference.encode_chat_completion(request).tokens


ASKED = [Message("system", "Be brief."), Message("user", "Weather in Nice?")]
CALLED = [*ASKED, Message("assistant", None, tool_calls=(CALL,))]
ANSWERED = [*CALLED, Message("tool", "21 degrees, é🌬", tool_call_id=CALL.id)]
WHOLE = [*ANSWERED, Message("assistant", "21 degrees."), Message("user", f"Why {CONTROL_TEXT}?")]


@pytest.mark.parametrize("messages", [ASKED, ANSWERED, WHOLE], ids=["asked", "answered", "whole"])
@pytest.mark.parametrize("has_tools", [False, True])
def test_ids_equal_mistral_commons(
    chat: ChatFormat, reference: MistralTokenizer, messages: list[Message], has_tools: bool
) -> None:
    ids = chat.encode(messages, tools=[TOOL] if has_tools else [])
    assert ids == reference_ids(reference, messages, has_tools=has_tools)


TEXT = st.lists(st.sampled_from([CONTROL_TEXT, "[", "INST]", " ", "\n", "wind"]) | st.text()).map(
    "".join
)


@given(question=TEXT, result=TEXT, city=TEXT)
def test_typed_control_tokens_stay_text_wherever_they_stand(
    chat: ChatFormat, tokenizer: Tokenizer, question: str, result: str, city: str
) -> None:
    """In a question, in arguments, in a result, and cut at the template's own text."""
    control_ids = frozenset(tokenizer.control_ids.values())

    def controls(question: str, result: str, city: str) -> list[int]:
        messages = [
            Message("user", question),
            Message("assistant", None, tool_calls=(ToolCall("abcdefghi", "f", {"city": city}),)),
            Message("tool", result, tool_call_id="abcdefghi"),
        ]
        ids = chat.encode(messages, tools=[{"type": question, "function": {"name": result}}])
        return [token_id for token_id in ids if token_id in control_ids]

    assert controls(question, result, city) == controls("a", "b", "c")


def test_a_template_sees_what_transformers_shows_it(chat: ChatFormat, tokenizer: Tokenizer) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    shown = [message.as_variable() for message in ANSWERED]
    (text,), _ = render_jinja_template(
        [shown],
        tools=[TOOL],
        chat_template=TEMPLATE,
        add_generation_prompt=True,
        bos_token="<s>",
        eos_token="</s>",
    )
    ids = chat.encode(ANSWERED, tools=[TOOL])
    spelled = {token_id: piece for piece, token_id in tokenizer.control_ids.items()}
    parts = [spelled[i].encode() if i in spelled else tokenizer.token_bytes(i) for i in ids]
    assert b"".join(parts).decode() == text


def test_a_forced_call_begins_behind_the_marker(chat: ChatFormat, tokenizer: Tokenizer) -> None:
    ids = chat.encode(ASKED, tools=[TOOL], calls_tools=True)
    assert chat.calls_marker_id == tokenizer.control_ids[CALLS_MARKER] == ids[-1]
    assert ids[:-1] == chat.encode(ASKED, tools=[TOOL])


def test_without_such_a_control_token_the_marker_is_text(mixtral_tokenizer: Tokenizer) -> None:
    chat = ChatFormat(mixtral_tokenizer, TEMPLATE)
    assert chat.takes_tools
    assert chat.calls_marker_id is None
    ids = chat.encode(ASKED, tools=[TOOL], calls_tools=True)
    assert mixtral_tokenizer.decode(ids).endswith("[/INST][TOOL_CALLS]")


def test_templates_without_tools_say_so(tokenizer: Tokenizer) -> None:
    assert not ChatFormat(tokenizer).takes_tools
    assert not ChatFormat(tokenizer, "{{ tools }}").takes_tools  # in a form that is not Mistral's


def test_an_id_that_the_template_refuses_is_named(chat: ChatFormat) -> None:
    call = ToolCall("call_1", "weather", {})
    with pytest.raises(PromptError, match="nine characters, not call_1"):
        chat.encode([*ASKED, Message("assistant", None, tool_calls=(call,))], adds_prompt=False)


# --- how a conversation ends ---


def test_an_answer_is_continued_where_it_ends(chat: ChatFormat, tokenizer: Tokenizer) -> None:
    begun = [*ASKED, Message("assistant", "It is  ")]
    ids = chat.encode(begun, continues_last=True, adds_prompt=False)
    assert ids == [*chat.encode(ASKED), *tokenizer.encode("It is  ")]
    closed = chat.encode(begun, adds_prompt=False)
    assert closed == [*ids, tokenizer.eos_id]


def test_a_template_that_leaves_the_last_message_out_cannot_continue_it(
    tokenizer: Tokenizer,
) -> None:
    chat = ChatFormat(tokenizer, "{{ messages[0].content }}")
    with pytest.raises(PromptError, match="does not show the last message"):
        chat.encode([*ASKED, Message("assistant", "It")], continues_last=True, adds_prompt=False)


def test_a_template_has_the_callers_variables(tokenizer: Tokenizer) -> None:
    chat = ChatFormat(tokenizer, "{{ mood | default('calm') }}{{ add_generation_prompt }}")
    assert chat.encode(ASKED, variables={"mood": "wild"}) == tokenizer.encode("wildTrue")
    assert chat.encode(ASKED, adds_prompt=False) == tokenizer.encode("calmFalse")


def test_a_mark_that_a_template_breaks_is_no_text(tokenizer: Tokenizer) -> None:
    """It would tell the secret that keeps callers from writing marks."""
    with pytest.raises(PromptError, match="changed a control token"):
        ChatFormat(tokenizer, "{{ '[INST]'[:-1] }}").encode(ASKED)

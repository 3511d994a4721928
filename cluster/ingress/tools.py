"""What a chat request says of tools and conversation, in the terms of model/chat.py.

Knows schema; renders nothing, reads no answer.
"""

import json
import re
import string
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

from cluster.errors import RequestError
from cluster.ingress.tool_calls import CallRules
from cluster.schema import ChatCompletionRequest, ChatMessage, FunctionDefinition, Tool, ToolChoice
from cluster.schema import ToolCall as AskedCall
from model.chat import ChatFormat, Message, ToolCall
from model.errors import GrammarError
from model.grammar_spec import GrammarSpec

_DIGITS = string.digits + string.ascii_letters
_CALL_ID = re.compile(r"[a-zA-Z0-9]{9}")


@dataclass(frozen=True)
class ToolUse:
    """What becomes of a request's tools."""

    shown: tuple[dict[str, Any], ...] = ()
    """Descriptions, for the chat template."""
    rules: CallRules | None = None
    """How calls are found in the answers; None where none is looked for."""
    grammar: GrammarSpec | None = None
    """Of the calls, where there must be some."""


def tool_use(body: ChatCompletionRequest, chat: ChatFormat) -> ToolUse:
    """What a request asks for. With tool_choice `none` the model is not told of tools at all.

    Raises RequestError (400) where that cannot be had.
    """
    choice = body.tool_choice
    is_forced = choice not in ("auto", "none")
    if not body.tools or choice == "none":
        if is_forced:
            raise _refused("tool_choice", "there are no tools to choose from")
        return ToolUse()
    shown = shown_tools(body.tools, chat)
    if body.response_format is not None and body.response_format.type != "text":
        raise _refused("response_format", "an answer that may call tools cannot have a form, too")
    if body.structured_outputs is not None and body.structured_outputs.wanted:
        raise _refused("structured_outputs", "an answer that may call tools has no other form")
    functions = [tool.function for tool in body.tools]
    if isinstance(choice, ToolChoice):
        functions = [each for each in functions if each.name == choice.function.name]
        if not functions:
            raise _refused("tool_choice", f"there is no function {choice.function.name!r} in tools")
    only_one = not body.parallel_tool_calls or isinstance(choice, ToolChoice)
    return ToolUse(
        shown=shown,
        rules=CallRules(
            frozenset(function.name for function in functions),
            marker_id=chat.calls_marker_id,
            begins_with_calls=is_forced,
            only_one=only_one,
        ),
        grammar=_grammar(functions, only_one=only_one) if is_forced else None,
    )


def shown_tools(tools: Sequence[Tool], chat: ChatFormat) -> tuple[dict[str, Any], ...]:
    """Descriptions of tools, for the chat template. Raises RequestError (400) if it takes none."""
    if tools and not chat.takes_tools:
        raise RequestError(
            400,
            "tools: the chat template of this model does not tell it of tools in a form that is "
            "known here",
            param="tools",
            code="unsupported",
        )
    return tuple(_shown(tool.function) for tool in tools)


def conversation(messages: Sequence[ChatMessage]) -> list[Message]:
    """The turns of a request. Raises RequestError (400)."""
    return [
        Message(
            message.role,
            message.text,
            tool_calls=tuple(_call(each) for each in message.tool_calls or ()),
            tool_call_id=None if message.tool_call_id is None else _call_id(message.tool_call_id),
            name=message.name,
        )
        for message in messages
    ]


def _shown(function: FunctionDefinition) -> dict[str, Any]:
    """In the order in which Mistral's models were shown functions, whatever the request's."""
    described = {} if function.description is None else {"description": function.description}
    shown = {"name": function.name, **described, "parameters": _schema(function)}
    return {"type": "function", "function": shown}


def _schema(function: FunctionDefinition) -> dict[str, Any]:
    return function.parameters or {"type": "object", "properties": {}}


def _grammar(functions: Sequence[FunctionDefinition], *, only_one: bool) -> GrammarSpec:
    by_name = [(each.name, {"type": "object", **_schema(each)}) for each in functions]
    try:
        return GrammarSpec.for_calls(by_name, only_one=only_one)
    except (GrammarError, RecursionError) as error:
        raise _refused("tools", str(error)) from error


def _call(call: AskedCall) -> ToolCall:
    try:
        arguments = json.loads(call.function.arguments or "{}")
    except (ValueError, RecursionError) as error:
        raise _refused("messages", f"arguments of {call.function.name}: {error}") from error
    if not isinstance(arguments, dict):
        raise _refused("messages", f"arguments of {call.function.name}: not a JSON object")
    return ToolCall(_call_id(call.id), call.function.name, arguments)


def _call_id(given: str) -> str:
    """In Mistral's form, which its templates insist on; for other ids always the same one."""
    if _CALL_ID.fullmatch(given):
        return given
    number = int.from_bytes(blake2b(given.encode("utf-8", "surrogatepass")).digest(), "little")
    return "".join(_DIGITS[number // len(_DIGITS) ** place % len(_DIGITS)] for place in range(9))


def _refused(field: str, problem: str) -> RequestError:
    return RequestError(400, f"{field}: {problem}", param=field)

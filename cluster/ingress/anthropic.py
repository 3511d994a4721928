"""Anthropic's Messages API as a door to chat: its request to chat's, an answer to its message."""

import json
import uuid
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from fastapi import APIRouter, Request, Response

from cluster.errors import RequestError
from cluster.ingress import sse
from cluster.ingress.answerer import Answerer
from cluster.ingress.document import ERRORS, GENERATION, STREAMED, TOKENS
from cluster.ingress.door import client_of, conversation, reply, told_by
from cluster.ingress.errors import ANTHROPIC_PATH, anthropic_body
from cluster.ingress.prepare import Work
from cluster.ingress.text import TextDelta
from cluster.ingress.tool_calls import CallDelta
from cluster.schema import (
    ChatCompletionRequest,
    ChatMessage,
    FunctionCall,
    FunctionDefinition,
    Tool,
    ToolCall,
)
from cluster.schema.anthropic import (
    AnthropicError,
    AnthropicMessage,
    CountTokensRequest,
    MessageEvent,
    MessagesRequest,
    MessagesTool,
    MessageUsage,
    StopReason,
    TextBlock,
    TokenCount,
    ToolResultBlock,
    ToolUseBlock,
    Turn,
    Words,
)

_IN_CHAT = {
    "max_tokens": "max_completion_tokens",
    "model": "model",
    "stop_sequences": "stop",
    "stream": "stream",
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
}
"""What chat calls the fields that it has, too."""

_NAMES = {
    "continue_final_message": "messages",
    "max_completion_tokens": "max_tokens",
    "parameters": "tools",
    "response_format": "output_config.format",
    "tool_calls": "messages",
}
"""What a caller calls the fields that chat's refusals name."""


_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {**told, "model": AnthropicError} for status, told in ERRORS.items()
}


def router(answerer: Answerer) -> APIRouter:
    """POST /v1/messages and /v1/messages/count_tokens."""
    routes = APIRouter()

    @routes.post(
        ANTHROPIC_PATH,
        response_model=AnthropicMessage,
        responses={**STREAMED, **_ERRORS},
        tags=[GENERATION],
    )
    async def messages(body: MessagesRequest, request: Request) -> Response:
        """Answer a conversation, in Anthropic's words."""
        answerer.prepare.check(body)
        answerer.note_ignored(body)
        with told_by(_NAMES):
            work = await answerer.chat(
                chat_request(body), client_of(request, body.metadata.user_id)
            )
        return await reply(
            request, answerer, work, MessagesReplies(work, answerer.settings.model_id)
        )

    @routes.post(f"{ANTHROPIC_PATH}/count_tokens", responses=_ERRORS, tags=[TOKENS])
    async def count_tokens(body: CountTokensRequest) -> TokenCount:
        """How many tokens a conversation is, template included; also one beyond the context."""
        answerer.prepare.check(body)
        answerer.note_ignored(body)
        with told_by(_NAMES):
            chat = chat_request(body)
            ids = await answerer.prepared(chat, lambda: answerer.prepare.chat_ids(chat))
        return TokenCount(input_tokens=len(ids))

    return routes


_CHOICES = {"auto": "auto", "any": "required", "none": "none"}
"""What chat calls the tool choices without a name."""


def chat_request(body: CountTokensRequest) -> ChatCompletionRequest:
    """The same request in the words of chat completions."""
    turns = [message for turn in body.messages for message in _messages(turn)]
    if body.system is not None:
        turns.insert(0, ChatMessage(role="system", content=_text(body.system)))
    fields: dict[str, Any] = {
        ours: getattr(body, theirs)
        for theirs, ours in _IN_CHAT.items()
        if theirs in body.model_fields_set
    }
    if isinstance(body, MessagesRequest) and body.output_config.format is not None:
        schema = {"name": "output", "schema": body.output_config.format.json_schema}
        fields["response_format"] = {"type": "json_schema", "json_schema": schema}
    choice = body.tool_choice
    if choice is not None:
        named = {"type": "function", "function": {"name": choice.name}}
        fields["tool_choice"] = _CHOICES.get(choice.type, named)
        fields["parallel_tool_calls"] = not choice.disable_parallel_tool_use
    return ChatCompletionRequest(
        messages=conversation(turns),
        tools=[_tool(tool) for tool in body.tools],
        # an answer that the caller has begun is to be gone on with
        continue_final_message=body.messages[-1].role == "assistant",
        **fields,
    )


def _tool(tool: MessagesTool) -> Tool:
    return Tool(
        function=FunctionDefinition(
            name=tool.name, description=tool.description, parameters=tool.input_schema
        )
    )


def _messages(turn: Turn) -> Iterator[ChatMessage]:
    """A turn's messages: what tools have answered, then the rest."""
    if isinstance(turn.content, str):
        yield ChatMessage(role=turn.role, content=turn.content)
        return
    texts, calls = [], []
    for block in turn.content:
        match block:
            case TextBlock():
                texts.append(block.text)
            case ToolUseBlock():
                arguments = json.dumps(block.input, ensure_ascii=False)
                function = FunctionCall(name=block.name, arguments=arguments)
                calls.append(ToolCall(id=block.id, function=function))
            case ToolResultBlock():
                result = _text(block.content)
                yield ChatMessage(role="tool", tool_call_id=block.tool_use_id, content=result)
    if texts or calls:
        text = "\n".join(texts) if texts else None
        yield ChatMessage(role=turn.role, content=text, tool_calls=calls or None)


def _text(words: Words) -> str:
    return words if isinstance(words, str) else "\n".join(block.text for block in words)


class MessagesReplies:
    """The message that answers one request, or the events of its stream."""

    def __init__(self, work: Work, model_id: str) -> None:
        self._work = work
        self._model_id = model_id
        self._id = f"msg_{uuid.uuid4().hex}"
        self._num_tokens = 0
        self._num_blocks = 0  # that have begun; the last one is open
        self._is_in_text = False
        self._end = TextDelta("")

    def whole(self, answer: TextDelta) -> AnthropicMessage:
        """The message that is not streamed."""
        self._take(answer)
        reason, sequence = self._stop()
        content: list[TextBlock | ToolUseBlock] = [_block(call) for call in answer.tool_calls]
        if answer.text or not content:
            content.insert(0, TextBlock(text=answer.text))
        return self._message(content=content, stop_reason=reason, stop_sequence=sequence)

    def opening(self) -> Iterator[bytes]:
        yield _event("message_start", message=self._message(content=[]))

    def delta(self, _index: int, delta: TextDelta) -> Iterator[bytes]:
        self._take(delta)
        for piece in delta.in_order():
            if isinstance(piece, str):
                if not self._is_in_text:
                    yield from self._begin(TextBlock(text=""))
                yield self._news("text_delta", text=piece)
                continue
            if piece.id is not None:
                yield from self._begin(_block(replace(piece, arguments="")))
            if piece.arguments:
                yield self._news("input_json_delta", partial_json=piece.arguments)

    def closing(self) -> Iterator[bytes]:
        if not self._num_blocks:
            yield from self._begin(TextBlock(text=""))
        yield _event("content_block_stop", index=self._num_blocks - 1)
        reason, sequence = self._stop()
        yield _event(
            "message_delta",
            delta={"stop_reason": reason, "stop_sequence": sequence},
            usage=self._usage(),
        )
        yield _event("message_stop")

    def failure(self, error: RequestError) -> Iterator[bytes]:
        yield sse.event(anthropic_body(error), name="error")

    def _begin(self, block: TextBlock | ToolUseBlock) -> Iterator[bytes]:
        """End the block that is open, and open this one."""
        if self._num_blocks:
            yield _event("content_block_stop", index=self._num_blocks - 1)
        yield _event("content_block_start", index=self._num_blocks, content_block=block)
        if not self._num_blocks:
            yield _event("ping")
        self._num_blocks += 1
        self._is_in_text = isinstance(block, TextBlock)

    def _news(self, kind: str, **fields: Any) -> bytes:
        """Of the block that is open."""
        return _event(
            "content_block_delta", index=self._num_blocks - 1, delta={"type": kind, **fields}
        )

    def _take(self, delta: TextDelta) -> None:
        self._num_tokens += len(delta.token_ids)
        self._end = delta

    def _stop(self) -> tuple[StopReason, str | None]:
        """Why the answer has ended, and the stop sequence if it was one."""
        end = self._end
        if end.finish == "length":
            return "max_tokens", None
        if end.finish == "tool_calls":
            return "tool_use", None
        if isinstance(end.stop_reason, str):
            return "stop_sequence", end.stop_reason
        return "end_turn", None

    def _message(self, **fields: Any) -> AnthropicMessage:
        return AnthropicMessage(id=self._id, model=self._model_id, usage=self._usage(), **fields)

    def _usage(self) -> MessageUsage:
        usage = self._work.usage(self._num_tokens)
        details = usage.prompt_tokens_details
        num_cached = details.cached_tokens if details else 0
        return MessageUsage(
            input_tokens=usage.prompt_tokens - num_cached,
            cache_read_input_tokens=num_cached,
            output_tokens=usage.completion_tokens,
        )


def _block(call: CallDelta) -> ToolUseBlock:
    """A call as a block, which cannot tell arguments that are cut off, no object, or no JSON.

    Python reads infinities and half a surrogate pair; no answer could hold them.
    """
    try:
        given = json.loads(call.arguments or "{}")
        json.dumps(given, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError):
        given = {}
    return ToolUseBlock(
        id=call.id or "", name=call.name or "", input=given if isinstance(given, dict) else {}
    )


def _event(kind: str, **fields: Any) -> bytes:
    return sse.event(MessageEvent(type=kind, **fields), name=kind)

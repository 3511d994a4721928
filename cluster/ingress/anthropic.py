"""Anthropic's Messages API as a door to chat: its request to chat's, an answer to its message."""

import uuid
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from fastapi.responses import Response as HttpResponse
from fastapi.routing import APIRoute

from cluster.errors import RequestError
from cluster.ingress import sse
from cluster.ingress.answerer import Answerer
from cluster.ingress.door import client_of, conversation, reply, told_by
from cluster.ingress.errors import as_request_error
from cluster.ingress.prepare import Work
from cluster.ingress.text import TextDelta
from cluster.schema import ChatCompletionRequest
from cluster.schema.anthropic import (
    AnswerBlock,
    AnthropicError,
    AnthropicErrorDetail,
    AnthropicMessage,
    Content,
    CountTokensRequest,
    MessageEvent,
    MessagesRequest,
    MessageUsage,
    StopReason,
    TokenCount,
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
    "max_completion_tokens": "max_tokens",
    "response_format": "output_config.format",
}
"""What a caller calls the fields that chat's refusals name."""

_ERROR_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


def router(answerer: Answerer) -> APIRouter:
    """POST /v1/messages and /v1/messages/count_tokens."""
    routes = APIRouter(route_class=_Route)

    @routes.post("/v1/messages", response_model=AnthropicMessage)
    async def messages(body: MessagesRequest, request: Request) -> HttpResponse:
        """Answer a conversation, in Anthropic's words."""
        answerer.prepare.check(body)
        with told_by(_NAMES):
            work = answerer.chat(chat_request(body), client_of(request, body.metadata.user_id))
        return await reply(
            request, answerer, work, MessagesReplies(work, answerer.settings.model_id)
        )

    @routes.post("/v1/messages/count_tokens")
    async def count_tokens(body: CountTokensRequest) -> TokenCount:
        """How many tokens a conversation is, template included."""
        answerer.prepare.check(body)
        with told_by(_NAMES):
            work = answerer.prepare.chat(chat_request(body), client="")
        return TokenCount(input_tokens=work.usage(0).prompt_tokens)

    return routes


def chat_request(body: CountTokensRequest) -> ChatCompletionRequest:
    """The same request in the words of chat completions."""
    turns = [] if body.system is None else [("system", _text(body.system))]
    turns += [(turn.role, _text(turn.content)) for turn in body.messages]
    fields: dict[str, Any] = {
        ours: getattr(body, theirs)
        for theirs, ours in _IN_CHAT.items()
        if theirs in body.model_fields_set
    }
    if isinstance(body, MessagesRequest) and body.output_config.format is not None:
        schema = {"name": "output", "schema": body.output_config.format.json_schema}
        fields["response_format"] = {"type": "json_schema", "json_schema": schema}
    return ChatCompletionRequest(messages=conversation(turns), **fields)


def _text(content: Content) -> str:
    return content if isinstance(content, str) else "\n".join(block.text for block in content)


class MessagesReplies:
    """The message that answers one request, or the events of its stream."""

    def __init__(self, work: Work, model_id: str) -> None:
        self._work = work
        self._model_id = model_id
        self._id = f"msg_{uuid.uuid4().hex}"
        self._num_tokens = 0
        self._end = TextDelta("")

    def whole(self, answer: TextDelta) -> AnthropicMessage:
        """The message that is not streamed."""
        self._take(answer)
        reason, sequence = self._stop()
        return self._message(
            content=[AnswerBlock(text=answer.text)], stop_reason=reason, stop_sequence=sequence
        )

    def opening(self) -> Iterator[bytes]:
        yield _event("message_start", message=self._message(content=[]))
        yield _event("content_block_start", index=0, content_block=AnswerBlock(text=""))
        yield _event("ping")

    def delta(self, _index: int, delta: TextDelta) -> Iterator[bytes]:
        self._take(delta)
        if delta.text:
            news = {"type": "text_delta", "text": delta.text}
            yield _event("content_block_delta", index=0, delta=news)

    def closing(self) -> Iterator[bytes]:
        yield _event("content_block_stop", index=0)
        reason, sequence = self._stop()
        yield _event(
            "message_delta",
            delta={"stop_reason": reason, "stop_sequence": sequence},
            usage=self._usage(),
        )
        yield _event("message_stop")

    def failure(self, error: RequestError) -> Iterator[bytes]:
        yield sse.event(_error_body(error), name="error")

    def _take(self, delta: TextDelta) -> None:
        self._num_tokens += len(delta.token_ids)
        self._end = delta

    def _stop(self) -> tuple[StopReason, str | None]:
        """Why the answer has ended, and the stop sequence if it was one."""
        end = self._end
        if end.finish == "length":
            return "max_tokens", None
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


class _Route(APIRoute):
    """Answers every failure in Anthropic's words."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, HttpResponse]]:
        handle = super().get_route_handler()

        async def handle_or_refuse(request: Request) -> HttpResponse:
            try:
                return await handle(request)
            except Exception as error:
                refusal = as_request_error(error)
                body = _error_body(refusal).model_dump()
                return JSONResponse(body, refusal.status, refusal.headers)

        return handle_or_refuse


def _error_body(error: RequestError) -> AnthropicError:
    other = "api_error" if error.status >= 500 else "invalid_request_error"
    kind = _ERROR_TYPES.get(error.status, other)
    return AnthropicError(error=AnthropicErrorDetail(type=kind, message=error.message))


def _event(kind: str, **fields: Any) -> bytes:
    return sse.event(MessageEvent(type=kind, **fields), name=kind)

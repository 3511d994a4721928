"""OpenAI's Responses API as a door to chat: its request to chat's, an answer to its response.

Nothing is stored, so every request brings its whole conversation.
"""

import time
import uuid
from collections.abc import Iterator
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response as HttpResponse

from cluster.errors import RequestError
from cluster.ingress import sse
from cluster.ingress.answerer import Answerer
from cluster.ingress.door import client_of, conversation, reply, told_by
from cluster.ingress.logprobs import chat_logprobs
from cluster.ingress.prepare import Work
from cluster.ingress.text import TextDelta
from cluster.schema import ChatCompletionRequest, ContentLogprob
from cluster.schema.responses import (
    IncompleteDetails,
    InputMessage,
    InputTokensDetails,
    OutputMessage,
    OutputText,
    Response,
    ResponseError,
    ResponsesRequest,
    ResponseUsage,
    StreamEvent,
)

_IN_CHAT = {
    "max_output_tokens": "max_completion_tokens",
    "model": "model",
    "stream": "stream",
    "temperature": "temperature",
    "top_logprobs": "top_logprobs",
    "top_p": "top_p",
    "user": "user",
}
"""What chat calls the fields that it has, too."""

_NAMES = {
    "max_completion_tokens": "max_output_tokens",
    "messages": "input",
    "response_format": "text.format",
}
"""What a caller calls the fields that chat's refusals name."""


def router(answerer: Answerer) -> APIRouter:
    """POST /v1/responses."""
    routes = APIRouter()

    @routes.post("/v1/responses", response_model=Response)
    async def responses(body: ResponsesRequest, request: Request) -> HttpResponse:
        """Answer a conversation, in the Responses API's words. Nothing is stored."""
        answerer.prepare.check(body)
        with told_by(_NAMES):
            work = answerer.chat(chat_request(body), client_of(request, body.user))
        replies = ResponsesReplies(body, work, answerer.settings.model_id)
        return await reply(request, answerer, work, replies)

    return routes


def chat_request(body: ResponsesRequest) -> ChatCompletionRequest:
    """The same request in the words of chat completions."""
    turns = [] if body.instructions is None else [("system", body.instructions)]
    if isinstance(body.input, str):
        turns.append(("user", body.input))
    else:
        turns += [(_role(item), _text(item)) for item in body.input]
    fields: dict[str, Any] = {
        ours: getattr(body, theirs)
        for theirs, ours in _IN_CHAT.items()
        if theirs in body.model_fields_set
    }
    if body.text.format is not None:
        fields["response_format"] = body.text.format.response_format()
    return ChatCompletionRequest(
        messages=conversation(turns),
        logprobs=bool(body.include or body.top_logprobs),
        **fields,
    )


def _role(item: InputMessage) -> str:
    return "system" if item.role == "developer" else item.role


def _text(item: InputMessage) -> str:
    if isinstance(item.content, str):
        return item.content
    return "\n".join(part.text for part in item.content)


class ResponsesReplies:
    """The response to one request, or the events of its stream."""

    def __init__(self, body: ResponsesRequest, work: Work, model_id: str) -> None:
        self._body = body
        self._work = work
        self._model_id = model_id
        self._id = f"resp_{uuid.uuid4().hex}"
        self._item_id = f"msg_{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._num_events = 0
        self._num_tokens = 0
        self._text = ""
        self._logprobs: list[ContentLogprob] = []
        self._is_cut = False

    def whole(self, answer: TextDelta) -> Response:
        """The response that is not streamed."""
        self._take(answer)
        return self._ended()

    def opening(self) -> Iterator[bytes]:
        begun = self._response("in_progress")
        yield self._event("response.created", response=begun)
        yield self._event("response.in_progress", response=begun)
        item = OutputMessage(id=self._item_id, status="in_progress", content=[])
        yield self._event("response.output_item.added", output_index=0, item=item)
        yield self._part_event("response.content_part.added", part=OutputText(text=""))

    def delta(self, _index: int, delta: TextDelta) -> Iterator[bytes]:
        logprobs = self._take(delta)
        if delta.text or logprobs:
            yield self._part_event(
                "response.output_text.delta", delta=delta.text, logprobs=logprobs
            )

    def closing(self) -> Iterator[bytes]:
        item = self._item()
        (part,) = item.content
        yield self._part_event("response.output_text.done", text=part.text, logprobs=part.logprobs)
        yield self._part_event("response.content_part.done", part=part)
        yield self._event("response.output_item.done", output_index=0, item=item)
        response = self._ended()
        yield self._event(f"response.{response.status}", response=response)

    def failure(self, error: RequestError) -> Iterator[bytes]:
        failed = self._response("failed")
        failed.error = ResponseError(code=error.code or error.kind, message=error.message)
        yield self._event("response.failed", response=failed)

    def _take(self, delta: TextDelta) -> list[ContentLogprob]:
        """Add to the answer; returns the log-probabilities that are new."""
        logprobs = chat_logprobs(delta.reports).content
        self._text += delta.text
        self._logprobs += logprobs
        self._num_tokens += len(delta.token_ids)
        self._is_cut = self._is_cut or delta.finish == "length"
        return logprobs

    def _ended(self) -> Response:
        response = self._response("incomplete" if self._is_cut else "completed")
        response.output = [self._item()]
        if self._is_cut:
            response.incomplete_details = IncompleteDetails()
        else:
            response.completed_at = int(time.time())
        usage = self._work.usage(self._num_tokens)
        details = usage.prompt_tokens_details
        response.usage = ResponseUsage(
            input_tokens=usage.prompt_tokens,
            input_tokens_details=InputTokensDetails(
                cached_tokens=details.cached_tokens if details else 0
            ),
            output_tokens=usage.completion_tokens,
            total_tokens=usage.total_tokens,
        )
        return response

    def _item(self) -> OutputMessage:
        """The answer, as far as it has come."""
        return OutputMessage(
            id=self._item_id,
            status="incomplete" if self._is_cut else "completed",
            content=[OutputText(text=self._text, logprobs=self._logprobs)],
        )

    def _response(self, status: Any) -> Response:
        """What was asked for, with no answer yet."""
        body, params = self._body, self._work.journals[0].params
        form = body.text.format
        return Response(
            id=self._id,
            created_at=self._created,
            status=status,
            model=self._model_id,
            output=[],
            instructions=body.instructions,
            max_output_tokens=body.max_output_tokens,
            temperature=params.temperature,
            top_p=params.top_p,
            top_logprobs=body.top_logprobs,
            text={
                "format": {"type": "text"}
                if form is None
                else form.model_dump(by_alias=True, exclude_none=True)
            },
            metadata=body.metadata,
        )

    def _part_event(self, kind: str, **fields: Any) -> bytes:
        return self._event(kind, item_id=self._item_id, output_index=0, content_index=0, **fields)

    def _event(self, kind: str, **fields: Any) -> bytes:
        event = StreamEvent(type=kind, sequence_number=self._num_events, **fields)
        self._num_events += 1
        return sse.event(event, name=kind)

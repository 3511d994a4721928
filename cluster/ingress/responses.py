"""OpenAI's Responses API as a door to chat: its request to chat's, an answer to its response.

Nothing is stored, so every request brings its whole conversation.
"""

import time
import uuid
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from fastapi import APIRouter, Request
from fastapi import Response as HttpResponse

from cluster.errors import RequestError
from cluster.ingress import sse
from cluster.ingress.answerer import Answerer
from cluster.ingress.document import GENERATION, STREAMED
from cluster.ingress.door import client_of, conversation, reply, told_by
from cluster.ingress.logprobs import chat_logprobs
from cluster.ingress.prepare import Work
from cluster.ingress.text import TextDelta, in_order, joined
from cluster.ingress.tool_calls import CallDelta
from cluster.schema import (
    ChatCompletionRequest,
    ChatMessage,
    FunctionCall,
    FunctionDefinition,
    Tool,
    ToolCall,
)
from cluster.schema.responses import (
    FunctionTool,
    IncompleteDetails,
    InputCall,
    InputCallOutput,
    InputMessage,
    InputTokensDetails,
    NamedTool,
    OutputCall,
    OutputItem,
    OutputMessage,
    OutputText,
    Response,
    ResponseError,
    ResponsesRequest,
    ResponseUsage,
    Status,
    StreamEvent,
    Words,
)

_IN_CHAT = {
    "max_output_tokens": "max_completion_tokens",
    "model": "model",
    "parallel_tool_calls": "parallel_tool_calls",
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
    "parameters": "tools",
    "response_format": "text.format",
    "tool_calls": "input",
}
"""What a caller calls the fields that chat's refusals name."""


def router(answerer: Answerer) -> APIRouter:
    """POST /v1/responses."""
    routes = APIRouter()

    @routes.post("/v1/responses", response_model=Response, responses=STREAMED, tags=[GENERATION])
    async def responses(body: ResponsesRequest, request: Request) -> HttpResponse:
        """Answer a conversation, in the Responses API's words. Nothing is stored."""
        answerer.prepare.check(body)
        answerer.note_ignored(body)
        with told_by(_NAMES):
            work = await answerer.chat(chat_request(body), client_of(request, body.user))
        replies = ResponsesReplies(body, work, answerer.settings.model_id)
        return await reply(request, answerer, work, replies)

    return routes


def chat_request(body: ResponsesRequest) -> ChatCompletionRequest:
    """The same request in the words of chat completions."""
    turns = []
    if body.instructions is not None:
        turns.append(ChatMessage(role="system", content=body.instructions))
    if isinstance(body.input, str):
        turns.append(ChatMessage(role="user", content=body.input))
    else:
        turns += [_message(item) for item in body.input]
    fields: dict[str, Any] = {
        ours: getattr(body, theirs)
        for theirs, ours in _IN_CHAT.items()
        if theirs in body.model_fields_set
    }
    if body.text.format is not None:
        fields["response_format"] = body.text.format.response_format()
    choice = body.tool_choice
    if isinstance(choice, NamedTool):
        fields["tool_choice"] = {"type": "function", "function": {"name": choice.name}}
    else:
        fields["tool_choice"] = choice
    return ChatCompletionRequest(
        messages=conversation(turns),
        tools=[_tool(tool) for tool in body.tools],
        logprobs=bool(body.include or body.top_logprobs),
        **fields,
    )


def _tool(tool: FunctionTool) -> Tool:
    return Tool(function=FunctionDefinition(**tool.model_dump(exclude={"type"})))


def _message(item: InputMessage | InputCall | InputCallOutput) -> ChatMessage:
    match item:
        case InputCall():
            function = FunctionCall(name=item.name, arguments=item.arguments)
            call = ToolCall(id=item.call_id, function=function)
            return ChatMessage(role="assistant", tool_calls=[call])
        case InputCallOutput():
            result = _text(item.output)
            return ChatMessage(role="tool", tool_call_id=item.call_id, content=result)
        case InputMessage():
            return ChatMessage(role=item.role, content=_text(item.content))


def _text(words: Words) -> str:
    return words if isinstance(words, str) else "\n".join(part.text for part in words)


class ResponsesReplies:
    """The response to one request, or the events of its stream."""

    def __init__(self, body: ResponsesRequest, work: Work, model_id: str) -> None:
        self._body = body
        self._work = work
        self._model_id = model_id
        self._id = f"resp_{uuid.uuid4().hex}"
        self._message_id = f"msg_{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._num_events = 0
        self._deltas: list[TextDelta] = []
        self._open: OutputItem | None = None
        self._num_items = 0  # that have begun; the last one may be open

    def whole(self, answer: TextDelta) -> Response:
        """The response, when all of the answer is there."""
        return self._whole([answer])

    def _whole(self, deltas: Sequence[TextDelta]) -> Response:
        answer = joined(deltas)
        is_cut = answer.finish == "length"
        response = self._response("incomplete" if is_cut else "completed")
        response.output = self._items(deltas)
        if is_cut:
            response.incomplete_details = IncompleteDetails()
        else:
            response.completed_at = int(time.time())
        usage = self._work.usage(len(answer.token_ids))
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

    def opening(self) -> Iterator[bytes]:
        begun = self._response("in_progress")
        yield self._event("response.created", response=begun)
        yield self._event("response.in_progress", response=begun)

    def delta(self, _index: int, delta: TextDelta) -> Iterator[bytes]:
        self._deltas.append(delta)
        logprobs = chat_logprobs(delta.reports).content
        if logprobs and not delta.text and isinstance(self._open, OutputMessage):
            yield self._part_event("response.output_text.delta", delta="", logprobs=logprobs)
        for piece in delta.in_order():
            if isinstance(piece, str):
                if not isinstance(self._open, OutputMessage):
                    yield from self._begin_message()
                yield self._part_event("response.output_text.delta", delta=piece, logprobs=logprobs)
                continue
            if piece.id is not None:
                yield from self._begin(_call(piece, "in_progress"))
            if piece.arguments:
                yield self._item_event(
                    "response.function_call_arguments.delta", delta=piece.arguments
                )

    def closing(self) -> Iterator[bytes]:
        if not self._num_items:
            yield from self._begin_message()
        yield from self._finish()
        response = self._whole(self._deltas)
        yield self._event(f"response.{response.status}", response=response)

    def failure(self, error: RequestError) -> Iterator[bytes]:
        failed = self._response("failed")
        failed.error = ResponseError(code=error.code or error.kind, message=error.message)
        yield self._event("response.failed", response=failed)

    def _begin_message(self) -> Iterator[bytes]:
        message_id = f"{self._message_id}{self._num_items or ''}"
        yield from self._begin(OutputMessage(id=message_id, status="in_progress", content=[]))
        yield self._part_event("response.content_part.added", part=OutputText(text=""))

    def _begin(self, item: OutputItem) -> Iterator[bytes]:
        """Finish the item that is open, and open this one without what is said of it later."""
        if self._open is not None:
            yield from self._finish()
        self._open = item
        self._num_items += 1
        yield self._event("response.output_item.added", output_index=self._num_items - 1, item=item)

    def _finish(self) -> Iterator[bytes]:
        """Tell all of the item that is open."""
        index = self._num_items - 1
        item = self._items(self._deltas)[index]
        if isinstance(item, OutputMessage):
            (part,) = item.content
            yield self._part_event(
                "response.output_text.done", text=part.text, logprobs=part.logprobs
            )
            yield self._part_event("response.content_part.done", part=part)
        else:
            yield self._item_event(
                "response.function_call_arguments.done", name=item.name, arguments=item.arguments
            )
        yield self._event("response.output_item.done", output_index=index, item=item)

    def _items(self, deltas: Sequence[TextDelta]) -> list[OutputItem]:
        """What an answer consists of, in the order in which it came; only its last item can be cut
        off. The first message has all reports of tokens.
        """
        items: list[OutputItem] = []
        reports = tuple(each for delta in deltas for each in delta.reports)
        for part in in_order(deltas) or [""]:
            if isinstance(part, CallDelta):
                items.append(_call(part, "completed"))
                continue
            content = [OutputText(text=part, logprobs=chat_logprobs(reports).content)]
            message_id, reports = f"{self._message_id}{len(items) or ''}", ()
            items.append(OutputMessage(id=message_id, status="completed", content=content))
        if deltas and deltas[-1].finish == "length":
            items[-1].status = "incomplete"
        return items

    def _response(self, status: Status | Literal["failed"]) -> Response:
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
            parallel_tool_calls=body.parallel_tool_calls,
            tool_choice=body.tool_choice,
            tools=body.tools,
        )

    def _part_event(self, kind: str, **fields: Any) -> bytes:
        """Of the text of the message that is open."""
        return self._item_event(kind, content_index=0, **fields)

    def _item_event(self, kind: str, **fields: Any) -> bytes:
        """Of the item that is open."""
        item_id = self._open.id if self._open else None
        return self._event(kind, item_id=item_id, output_index=self._num_items - 1, **fields)

    def _event(self, kind: str, **fields: Any) -> bytes:
        event = StreamEvent(type=kind, sequence_number=self._num_events, **fields)
        self._num_events += 1
        return sse.event(event, name=kind)


def _call(call: CallDelta, status: Status) -> OutputCall:
    return OutputCall(
        id=f"fc_{call.id}",
        status=status,
        call_id=call.id or "",
        name=call.name or "",
        arguments="" if status == "in_progress" else call.arguments,
    )

"""What the doors that speak other APIs than ours share: each translates a request to chat's words,
and tells the answer in its own.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol

from fastapi import Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel

from cluster.errors import RequestError
from cluster.ingress import sse
from cluster.ingress.answerer import Answerer
from cluster.ingress.clients import client_key
from cluster.ingress.disconnect import unless_disconnected
from cluster.ingress.prepare import Work
from cluster.ingress.text import TextDelta
from cluster.schema import ChatMessage


class AnswerForm(sse.StreamForm, Protocol):
    """How an API tells the one answer of a request: at once, or as events."""

    def whole(self, answer: TextDelta) -> BaseModel:
        """The reply that is not streamed."""
        ...


async def reply(request: Request, answerer: Answerer, work: Work, form: AnswerForm) -> Response:
    """The reply to a request of one choice. Raises as Answerer.deltas does."""
    if work.body.stream:
        keep_alive_s = answerer.settings.sse_keep_alive_s
        return await sse.stream(request, answerer.deltas(work), form, keep_alive_s=keep_alive_s)
    (answer,) = await unless_disconnected(request, answerer.answers(work))
    return JSONResponse(form.whole(answer).model_dump())


def client_of(request: Request, user: str | None) -> str:
    """Who asks; see client_key. Anthropic's header of keys counts like OpenAI's."""
    key = request.headers.get("x-api-key")
    return client_key(f"Bearer {key}" if key else request.headers.get("authorization"), user)


def conversation(turns: Iterable[tuple[str, str]]) -> list[ChatMessage]:
    """Messages of chat completions, of roles and texts.

    Turns of one role that follow each other become one message, as Anthropic's API promises and as
    most templates need it; so do a system prompt and the system messages right behind it.
    """
    messages: list[ChatMessage] = []
    for role, text in turns:
        if messages and messages[-1].role == role:
            text = f"{messages.pop().text}\n{text}"
        messages.append(ChatMessage(role=role, content=text))
    return messages


@contextmanager
def told_by(names: Mapping[str, str]) -> Iterator[None]:
    """Name the field at fault as the caller knows it. names: its names by those of chat."""
    try:
        yield
    except RequestError as error:
        ours = error.param
        if ours is None or ours not in names:
            raise
        raise RequestError(
            error.status,
            error.message.replace(ours, names[ours]),
            kind=error.kind,
            param=names[ours],
            code=error.code,
            headers=error.headers,
        ) from error

"""What the doors that speak other APIs than ours share: each translates a request to chat's words,
and tells the answer in its own.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Protocol

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ValidationError

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
    """Who asks; see client_key."""
    return client_key(request.headers.get("authorization"), user)


def conversation(turns: Iterable[ChatMessage]) -> list[ChatMessage]:
    """The messages of a chat request.

    Turns of one role that follow each other become one message, as Anthropic's API promises and as
    most templates need it; so do a system prompt and the system messages right behind it, and what
    the assistant has said and called. Results of tools stay apart.
    """
    messages: list[ChatMessage] = []
    for role, group in groupby(turns, key=lambda turn: turn.role):
        own = list(group)
        messages += own if role == "tool" else [_as_one(own)]
    return messages


def _as_one(turns: Sequence[ChatMessage]) -> ChatMessage:
    """Turns of one role. All at once: each may add a little to megabytes of text."""
    if len(turns) == 1:
        return turns[0]
    texts = [turn.text for turn in turns if turn.text is not None]
    calls = [call for turn in turns for call in turn.tool_calls or ()]
    return ChatMessage(
        role=turns[0].role, content="\n".join(texts) if texts else None, tool_calls=calls or None
    )


def invalid(error: ValidationError, names: Mapping[str, str]) -> RequestValidationError:
    """As if the body that came over HTTP were wrong. names: as for told_by."""
    problems = []
    for item in error.errors():
        field, *rest = item["loc"] or ("body",)
        problems.append({**item, "loc": ("body", names.get(str(field), field), *rest)})
    return RequestValidationError(problems)


@contextmanager
def told_by(names: Mapping[str, str]) -> Iterator[None]:
    """Name the field at fault as the caller knows it. names: its names by those of chat."""
    try:
        yield
    except ValidationError as error:
        raise invalid(error, names) from error
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

"""Server-sent events: how one is framed, and how a stream of them goes out over HTTP."""

import asyncio
import math
from collections.abc import AsyncGenerator, Iterable
from typing import Protocol, TypeVar

from fastapi import Request
from fastapi.responses import StreamingResponse
from pydantic import BaseModel
from starlette.types import Message, Receive, Scope, Send

from cluster.errors import RequestError
from cluster.ingress.disconnect import unless_disconnected
from cluster.ingress.errors import as_request_error
from cluster.ingress.text import TextDelta

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"
"""A comment, which readers of events skip."""

T = TypeVar("T")
Deltas = AsyncGenerator[tuple[int, TextDelta], None]


def event(body: BaseModel, name: str | None = None) -> bytes:
    """One event with a JSON body."""
    head = b"" if name is None else b"event: " + name.encode() + b"\n"
    return head + b"data: " + body.model_dump_json().encode() + b"\n\n"


class StreamForm(Protocol):
    """How a protocol tells one request's answer, as events."""

    def opening(self) -> Iterable[bytes]:
        """What a stream begins with."""
        ...

    def delta(self, index: int, delta: TextDelta) -> Iterable[bytes]:
        """What is new of a choice."""
        ...

    def closing(self) -> Iterable[bytes]:
        """What a stream ends with when all choices have ended."""
        ...

    def failure(self, error: RequestError) -> Iterable[bytes]:
        """What it ends with otherwise."""
        ...


async def stream(
    request: Request, deltas: Deltas, form: StreamForm, *, keep_alive_s: float
) -> "EventStream":
    """The streamed reply of a request.

    Waits for the first delta, so that an early failure is raised and gets a status of its own; but
    no longer than `keep_alive_s`, because what stands between here and the caller may give up on a
    silent connection. From then on a failure is told in the stream.
    """
    first = asyncio.create_task(_first_of(deltas))
    try:
        await unless_disconnected(request, asyncio.wait([first], timeout=keep_alive_s))
        if first.done():
            first.result()
    except BaseException:
        await _close(first, deltas)
        raise
    return EventStream(first, deltas, form, keep_alive_s)


class EventStream(StreamingResponse):
    """Events of one request, with comments while there are none.

    It ends the request however it ends itself: when all is told, when the server cancels it, and at
    once when the caller hangs up, whichever way the server tells that (a message, a failing send).
    """

    def __init__(
        self,
        first: "asyncio.Task[tuple[int, TextDelta]]",
        deltas: Deltas,
        form: StreamForm,
        keep_alive_s: float,
    ) -> None:
        """first: the task that waits for the first of the deltas."""
        # nginx would otherwise hold events back until it has a page of them
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(self._events(), media_type="text/event-stream", headers=headers)
        self._first = first
        self._deltas = deltas
        self._form = form
        self._keep_alive_s = keep_alive_s
        self._last_sent = 0.0  # on the event loop's clock

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        clock = asyncio.get_running_loop().time
        sending = asyncio.Lock()

        async def tell(message: Message) -> None:
            async with sending:
                await send(message)
                self._last_sent = clock() if message.get("more_body", True) else math.inf

        async def keep_alive() -> None:
            """Send a comment whenever nothing was sent for so long."""
            while True:
                # while something is on its way, nothing is silent
                since = clock() if sending.locked() else self._last_sent
                rest_s = since + self._keep_alive_s - clock()
                if rest_s > 0:
                    await asyncio.sleep(rest_s)
                else:
                    body = {"type": "http.response.body", "body": KEEP_ALIVE, "more_body": True}
                    await tell(body)

        self._last_sent = clock()
        telling = asyncio.create_task(self.stream_response(tell))
        watching = asyncio.create_task(self.listen_for_disconnect(receive))
        comforting = asyncio.create_task(keep_alive())
        tasks = [telling, watching, comforting]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if telling.done():
                telling.result()
        except OSError:
            pass  # the caller is gone
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await _close(self._first, self._deltas)

    async def _events(self) -> AsyncGenerator[bytes, None]:
        form = self._form
        try:
            for part in form.opening():
                yield part
            for part in form.delta(*await self._first):
                yield part
            async for index, delta in self._deltas:
                for part in form.delta(index, delta):
                    yield part
            for part in form.closing():
                yield part
        except Exception as error:
            # The status is sent already: the stream itself must say that it failed.
            for part in form.failure(as_request_error(error)):
                yield part


async def _first_of(deltas: AsyncGenerator[T, None]) -> T:
    return await anext(deltas)


async def _close(first: "asyncio.Task[T]", deltas: AsyncGenerator[T, None]) -> None:
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    await deltas.aclose()

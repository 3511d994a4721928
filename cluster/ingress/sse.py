"""Server-sent events, as OpenAI frames them."""

from collections.abc import AsyncGenerator

from fastapi.responses import StreamingResponse
from pydantic import BaseModel
from starlette.types import Receive, Scope, Send

DONE = b"data: [DONE]\n\n"


def event(body: BaseModel) -> bytes:
    """One event with a JSON body."""
    return b"data: " + body.model_dump_json().encode() + b"\n\n"


class EventStream(StreamingResponse):
    """A streamed reply that closes its events however it ends.

    Starlette leaves them to the garbage collector when the caller can no longer be reached; what
    they hold (a request in a head) must go at once.
    """

    def __init__(self, events: AsyncGenerator[bytes, None]) -> None:
        headers = {"Cache-Control": "no-cache"}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._events.aclose()

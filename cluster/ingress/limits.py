"""Bounds on what callers may take: the size of a body, the number of requests in progress."""

from collections.abc import Iterator
from contextlib import contextmanager

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster.errors import RequestError


class BodyLimit:
    """ASGI middleware that refuses bodies over a size, before they are held in memory."""

    def __init__(self, app: ASGIApp, *, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        num_received = 0

        async def counted() -> Message:
            nonlocal num_received
            message = await receive()
            num_received += len(message.get("body", b""))
            if num_received > self._max_bytes:
                raise HTTPException(
                    413, f"the request body is larger than {self._max_bytes:,} bytes"
                )
            return message

        await self._app(scope, counted, send)


class ConcurrencyLimit:
    """Counts requests in progress. Owned by one event loop."""

    def __init__(self, max_requests: int) -> None:
        self._max_requests = max_requests
        self.num_open = 0

    @contextmanager
    def slot(self) -> Iterator[None]:
        """Hold a place. Raises RequestError 429 when there is none."""
        if self.num_open >= self._max_requests:
            raise RequestError(
                429,
                f"{self.num_open} requests are in progress, which is the limit; try again later",
                kind="rate_limit_error",
                code="overloaded",
                headers={"Retry-After": "1"},
            )
        self.num_open += 1
        try:
            yield
        finally:
            self.num_open -= 1

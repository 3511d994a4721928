"""The API's methods, made of the functions in calls.py: each for a reply, for a response, and for a
response whose body is still to come; blocking and asynchronous.
"""

from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import (
    AbstractAsyncContextManager,
    AbstractContextManager,
    asynccontextmanager,
    contextmanager,
)
from functools import wraps
from typing import Any, ParamSpec, Self, TypeVar

import httpx

from cluster.client.call import Call
from cluster.client.chunks import Chunks
from cluster.client.exchange import Exchange
from cluster.client.io import AsyncIo, BlockingIo, finish
from cluster.client.response import AsyncStreamedResponse, RawResponse, StreamedResponse
from cluster.client.settings import Settings
from cluster.client.stream import AsyncStream, Stream

P = ParamSpec("P")
S = TypeVar("S")
A = TypeVar("A")


class Connection:
    """One server, over a pool of connections. Blocking; safe to share between threads."""

    def __init__(self, settings: Settings, http: httpx.Client) -> None:
        self.settings = settings
        self.http = http
        self._exchange = Exchange(settings, BlockingIo(http))

    def with_settings(self, settings: Settings) -> Self:
        """Another that shares the pool."""
        return type(self)(settings, self.http)

    def method(self, build: Callable[P, Call[S, Any]]) -> Callable[P, S]:
        """Gives the reply, or the stream."""

        @wraps(build)
        def method(*args: P.args, **kwargs: P.kwargs) -> S:
            reply: S = _streaming(finish(self._exchange.run(build(*args, **kwargs))))
            return reply

        return method

    def raw_method(self, build: Callable[P, Call[S, Any]]) -> Callable[P, RawResponse[S]]:
        """Gives the response."""

        @wraps(build)
        def method(*args: P.args, **kwargs: P.kwargs) -> RawResponse[S]:
            call = build(*args, **kwargs)
            response = finish(self._exchange.respond(call))
            return RawResponse(
                response, lambda: _streaming(self._exchange.understand(call, response))
            )

        return method

    def streamed_method(
        self, build: Callable[P, Call[S, Any]]
    ) -> Callable[P, AbstractContextManager[StreamedResponse[S]]]:
        """Gives the response before its body has come."""

        @wraps(build)
        @contextmanager
        def method(*args: P.args, **kwargs: P.kwargs) -> Iterator[StreamedResponse[S]]:
            call = build(*args, **kwargs)
            response = finish(self._exchange.respond_early(call))

            def parse() -> S:
                read = self._exchange.read_and_understand(call, response)
                reply: S = _streaming(finish(read))
                return reply

            try:
                yield StreamedResponse(response, parse)
            finally:
                response.close()

        return method


class AsyncConnection:
    """One server, over a pool of connections. Owned by an event loop."""

    def __init__(self, settings: Settings, http: httpx.AsyncClient) -> None:
        self.settings = settings
        self.http = http
        self._exchange = Exchange(settings, AsyncIo(http))

    def with_settings(self, settings: Settings) -> Self:
        """Another that shares the pool."""
        return type(self)(settings, self.http)

    def method(self, build: Callable[P, Call[Any, A]]) -> Callable[P, Coroutine[Any, Any, A]]:
        """Gives the reply, or the stream."""

        @wraps(build)
        async def method(*args: P.args, **kwargs: P.kwargs) -> A:
            reply: A = _async_streaming(await self._exchange.run(build(*args, **kwargs)))
            return reply

        return method

    def raw_method(
        self, build: Callable[P, Call[Any, A]]
    ) -> Callable[P, Coroutine[Any, Any, RawResponse[A]]]:
        """Gives the response."""

        @wraps(build)
        async def method(*args: P.args, **kwargs: P.kwargs) -> RawResponse[A]:
            call = build(*args, **kwargs)
            response = await self._exchange.respond(call)
            return RawResponse(
                response, lambda: _async_streaming(self._exchange.understand(call, response))
            )

        return method

    def streamed_method(
        self, build: Callable[P, Call[Any, A]]
    ) -> Callable[P, AbstractAsyncContextManager[AsyncStreamedResponse[A]]]:
        """Gives the response before its body has come."""

        @wraps(build)
        @asynccontextmanager
        async def method(
            *args: P.args, **kwargs: P.kwargs
        ) -> AsyncIterator[AsyncStreamedResponse[A]]:
            call = build(*args, **kwargs)
            response = await self._exchange.respond_early(call)

            async def parse() -> A:
                read = self._exchange.read_and_understand(call, response)
                reply: A = _async_streaming(await read)
                return reply

            try:
                yield AsyncStreamedResponse(response, parse)
            finally:
                await response.aclose()

        return method


def _streaming(answer: Any) -> Any:
    return Stream(answer) if isinstance(answer, Chunks) else answer


def _async_streaming(answer: Any) -> Any:
    return AsyncStream(answer) if isinstance(answer, Chunks) else answer

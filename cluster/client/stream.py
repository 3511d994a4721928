"""A streamed reply, chunk by chunk, blocking and asynchronous."""

from types import TracebackType
from typing import Generic, Self

import httpx

from cluster.client import failures
from cluster.client.chunks import Chunks
from cluster.client.io import finish
from cluster.client.reply import ReplyT


class _AnyStream(Generic[ReplyT]):
    """What blocking and asynchronous streams share."""

    def __init__(self, chunks: Chunks[ReplyT]) -> None:
        self._chunks = chunks

    @property
    def response(self) -> httpx.Response:
        """The response whose chunks come now; another one after the stream has gone on."""
        return self._chunks.response

    @property
    def request_id(self) -> str | None:
        """The server's X-Request-Id, by which its log knows this request."""
        return failures.request_id(self.response)

    def __repr__(self) -> str:
        state = "closed" if self.response.is_closed else "open"
        name = type(self).__name__
        return f"<{name} of {self.response.request.url}, request {self.request_id}, {state}>"


class Stream(_AnyStream[ReplyT]):
    """Iterator over the chunks of one reply; owns its connection until it ends or is closed.

    If the connection breaks off, the stream asks for the rest and goes on: every chunk comes once.
    That takes a client with `max_retries` above 0, and a request for one choice without
    log-probabilities.

    Closing early closes the connection, which makes the server cancel the request: leave a
    stream by `with`, or by `close()`. For one thread at a time.

    Iterating raises APIStreamError if the server reports an error or the stream ends, breaks or
    falls silent before its end mark and cannot go on, and APIResponseValidationError for a chunk
    of another shape. The stream is closed then.
    """

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> ReplyT:
        chunk = finish(self._chunks.next())
        if chunk is None:
            raise StopIteration
        return chunk

    def close(self) -> None:
        """End the stream here. Closing again does nothing."""
        finish(self._chunks.close())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self) -> None:
        # a loop left by `break`, whose stream nobody holds: the server must not go on generating
        self.close()


class AsyncStream(_AnyStream[ReplyT]):
    """`Stream` for `async for`, `async with` and `await stream.close()`. Owned by one task.

    Nobody closes one that is dropped before its end: a collector cannot wait.
    """

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> ReplyT:
        chunk = await self._chunks.next()
        if chunk is None:
            raise StopAsyncIteration
        return chunk

    async def close(self) -> None:
        """End the stream here. Closing again does nothing."""
        await self._chunks.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

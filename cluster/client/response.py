"""Responses as HTTP has them, for callers who want headers, bytes, or to parse by themselves."""

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any, Generic, TypeVar

import httpx

from cluster.client import failures
from cluster.client.call import RETRY_COUNT

T = TypeVar("T")


class _AnyResponse:
    """What all of them share."""

    def __init__(self, response: httpx.Response) -> None:
        self.http_response = response

    @property
    def status_code(self) -> int:
        return self.http_response.status_code

    @property
    def headers(self) -> httpx.Headers:
        return self.http_response.headers

    @property
    def request_id(self) -> str | None:
        """The server's X-Request-Id, by which its log knows this request."""
        return failures.request_id(self.http_response)

    @property
    def retries_taken(self) -> int:
        """How often the request was sent before this answer came."""
        return int(self.http_response.request.headers.get(RETRY_COUNT, 0))

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.status_code} of {self.http_response.request.url}>"


class RawResponse(_AnyResponse, Generic[T]):
    """A response, read, unless it is a stream: then `parse` gives the chunks."""

    def __init__(self, response: httpx.Response, parse: Callable[[], T]) -> None:
        super().__init__(response)
        self._parse = parse

    @property
    def content(self) -> bytes:
        return self.http_response.content

    @property
    def text(self) -> str:
        return self.http_response.text

    def json(self) -> Any:
        return self.http_response.json()

    def parse(self) -> T:
        """What the method gives without `with_raw_response`. Raises as it does."""
        return self._parse()


class StreamedResponse(_AnyResponse, Generic[T]):
    """A response whose body comes as it is read. Closed when its `with` block is left."""

    def __init__(self, response: httpx.Response, parse: Callable[[], T]) -> None:
        super().__init__(response)
        self._parse = parse

    def read(self) -> bytes:
        with failures.mapped(self.http_response.request):
            return self.http_response.read()

    def iter_bytes(self, chunk_size: int | None = None) -> Iterator[bytes]:
        with failures.mapped(self.http_response.request):
            yield from self.http_response.iter_bytes(chunk_size)

    def iter_lines(self) -> Iterator[str]:
        with failures.mapped(self.http_response.request):
            yield from self.http_response.iter_lines()

    def parse(self) -> T:
        """What the method gives without `with_streaming_response`. Raises as it does."""
        return self._parse()


class AsyncStreamedResponse(_AnyResponse, Generic[T]):
    """`StreamedResponse` with `await` and `async for`."""

    def __init__(self, response: httpx.Response, parse: Callable[[], Awaitable[T]]) -> None:
        super().__init__(response)
        self._parse = parse

    async def read(self) -> bytes:
        with failures.mapped(self.http_response.request):
            return await self.http_response.aread()

    async def iter_bytes(self, chunk_size: int | None = None) -> AsyncIterator[bytes]:
        with failures.mapped(self.http_response.request):
            async for data in self.http_response.aiter_bytes(chunk_size):
                yield data

    async def iter_lines(self) -> AsyncIterator[str]:
        with failures.mapped(self.http_response.request):
            async for line in self.http_response.aiter_lines():
                yield line

    async def parse(self) -> T:
        """What the method gives without `with_streaming_response`. Raises as it does."""
        return await self._parse()

"""The few things that a client waits for, blocking and asynchronous.

What decides about them (exchange.py, stream.py) is written once, with `await`. A blocking client
runs the same code: its waits block where they stand, so that nothing is ever suspended and no event
loop is needed.
"""

import time
from collections.abc import AsyncIterator, Coroutine, Iterator
from typing import Any, Protocol, TypeVar

import httpx

T = TypeVar("T")


class Io(Protocol):
    """All that waits. What httpx raises leaves as it is."""

    @property
    def http(self) -> httpx.Client | httpx.AsyncClient: ...

    async def send(self, request: httpx.Request) -> httpx.Response:
        """Return once the headers are in."""
        ...

    async def read(self, response: httpx.Response) -> None:
        """Take in the whole body; nothing to do where it has been read."""
        ...

    def packets(self, response: httpx.Response) -> AsyncIterator[bytes]:
        """The body as it comes."""
        ...

    async def close(self, response: httpx.Response) -> None:
        """Give the response's connection back, or end it if more is to come."""
        ...

    async def sleep(self, seconds: float) -> None: ...


def finish(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine whose every wait is a BlockingIo's."""
    try:
        coroutine.send(None)
    except StopIteration as end:
        result: T = end.value
        return result
    coroutine.close()
    raise AssertionError(f"{coroutine} was suspended")


class BlockingIo:
    """Waits by blocking its thread."""

    def __init__(self, http: httpx.Client) -> None:
        self.http = http

    async def send(self, request: httpx.Request) -> httpx.Response:
        return self.http.send(request, stream=True)

    async def read(self, response: httpx.Response) -> None:
        response.read()

    def packets(self, response: httpx.Response) -> AsyncIterator[bytes]:
        return _BlockingPackets(response.iter_bytes())

    async def close(self, response: httpx.Response) -> None:
        response.close()

    async def sleep(self, seconds: float) -> None:
        time.sleep(seconds)  # noqa: ASYNC251


class AsyncIo:
    """Waits on asyncio's event loop."""

    def __init__(self, http: httpx.AsyncClient) -> None:
        self.http = http

    async def send(self, request: httpx.Request) -> httpx.Response:
        return await self.http.send(request, stream=True)

    async def read(self, response: httpx.Response) -> None:
        await response.aread()

    def packets(self, response: httpx.Response) -> AsyncIterator[bytes]:
        return response.aiter_bytes()

    async def close(self, response: httpx.Response) -> None:
        await response.aclose()

    async def sleep(self, seconds: float) -> None:
        import asyncio  # not above: blocking clients have no use for it, and it is slow to import

        await asyncio.sleep(seconds)


class _BlockingPackets:
    def __init__(self, packets: Iterator[bytes]) -> None:
        self._packets = packets

    def __aiter__(self) -> "_BlockingPackets":
        return self

    async def __anext__(self) -> bytes:
        for packet in self._packets:
            return packet
        raise StopAsyncIteration

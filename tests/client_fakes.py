"""The SDK's other side, made up: a server that answers as told, and bodies in packets.

The same tests run for the blocking and the asynchronous client: `Awaited` makes the latter's
methods and streams wait where they are called.
"""

import asyncio
import json
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Coroutine, Iterator
from typing import Any, Self

import httpx

from cluster.client import AsyncClient, Client

COMPLETION = {
    "id": "cmpl-1",
    "object": "text_completion",
    "created": 1,
    "model": "tiny",
    "choices": [{"index": 0, "text": " blows", "finish_reason": "length"}],
    "usage": {"prompt_tokens": 3, "completion_tokens": 1, "total_tokens": 4},
}
CHAT = {
    "id": "chatcmpl-1",
    "created": 1,
    "model": "tiny",
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "Yes."}}],
}
MODEL = {"id": "tiny", "created": 1, "root": "tiny", "max_model_len": 512}
DONE = b"data: [DONE]\n\n"


def event(value: Any) -> bytes:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n".encode()


def text_chunk(text: str) -> dict[str, Any]:
    return {**COMPLETION, "choices": [{"index": 0, "text": text}], "usage": None}


class Packets(httpx.SyncByteStream, httpx.AsyncByteStream):
    """A body that comes in given packets, and may fail after the last."""

    def __init__(self, packets: list[bytes], error: Exception | None = None) -> None:
        self.packets = packets
        self.error = error
        self.num_read = 0
        self.is_closed = False

    def __iter__(self) -> Iterator[bytes]:
        for packet in self.packets:
            self.num_read += 1
            yield packet
        if self.error is not None:
            raise self.error

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for packet in self:
            yield packet

    def close(self) -> None:
        self.is_closed = True

    async def aclose(self) -> None:
        self.close()


Answer = httpx.Response | Exception


class Server:
    """Answers the requests in turn, the last answer again and again, and keeps what was asked."""

    def __init__(self, *answers: Answer) -> None:
        self.answers = list(answers)
        self.requests: list[httpx.Request] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer

    @property
    def body(self) -> Any:
        """What the last request asked."""
        return json.loads(self.requests[-1].content)


def events_response(body: Packets, **headers: str) -> httpx.Response:
    """A streamed answer."""
    kind = {"content-type": "text/event-stream; charset=utf-8", "x-request-id": "req-9"}
    return httpx.Response(200, headers={**kind, **headers}, stream=body)


class Way(ABC):
    """How the client under test is called."""

    @abstractmethod
    def client(self, server: Any, base_url: str | None = "http://server", **options: Any) -> Any:
        """A client, of which every answer comes from a server; it asks once unless told."""


class Blocking(Way):
    def client(self, server: Any, base_url: str | None = "http://server", **options: Any) -> Client:
        options = {"max_retries": 0, **options}
        return Client(base_url, transport=httpx.MockTransport(server), **options)


class Asynchronous(Way):
    def __init__(self, runner: asyncio.Runner) -> None:
        self._runner = runner

    def client(self, server: Any, base_url: str | None = "http://server", **options: Any) -> Any:
        options = {"max_retries": 0, **options}
        client = AsyncClient(base_url, transport=httpx.MockTransport(server), **options)
        return Awaited(client, self._runner)


class Awaited:
    """Something asynchronous that is waited for where it is called."""

    def __init__(self, inner: Any, runner: asyncio.Runner) -> None:
        self._inner = inner
        self._runner = runner

    def __getattr__(self, name: str) -> Any:
        return self._wait(getattr(self._inner, name))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._wait(self._inner(*args, **kwargs))

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Any:
        try:
            return self._run(anext(self._inner))
        except StopAsyncIteration:
            raise StopIteration from None

    def __enter__(self) -> Any:
        return self._wait(self._run(self._inner.__aenter__()))

    def __exit__(self, *error: Any) -> Any:
        return self._run(self._inner.__aexit__(*error))

    def __repr__(self) -> str:
        return repr(self._inner)

    def _wait(self, value: Any) -> Any:
        if isinstance(value, Coroutine):
            value = self._run(value)
        ours = type(value).__module__.startswith("cluster.client")
        waits = callable(value) or hasattr(value, "__anext__") or hasattr(value, "__aenter__")
        return Awaited(value, self._runner) if ours or waits else value

    def _run(self, awaitable: Any) -> Any:
        async def wait() -> Any:
            return await awaitable

        return self._runner.run(wait())

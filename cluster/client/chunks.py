"""The chunks of one streamed answer, over however many connections."""

import logging
import random
import secrets
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any, Generic, cast

import httpx

from cluster.client import failures, retry
from cluster.client.call import StreamCall
from cluster.client.continuation import Chunk, Continuation, can_continue
from cluster.client.io import Io
from cluster.client.reply import ReplyT, read_chunk
from cluster.client.sse import EventDecoder
from cluster.errors import APIError

logger = logging.getLogger(__name__)

END_MARK = "[DONE]"


class ChunkReader(Generic[ReplyT]):
    """Cuts packets into chunks, and decides what to do when they cease to come. No I/O."""

    def __init__(self, call: StreamCall[Any, Any], *, max_retries: int) -> None:
        """max_retries: how often in a row a stream may break off and go on, with nothing between;
        0 for a stream that does not go on.
        """
        goes_on = max_retries > 0 and can_continue(call.body or {})
        self._continuation = Continuation(call, seed=secrets.randbits(63)) if goes_on else None
        self._call = call
        self._reply = cast(type[ReplyT], call.chunk)
        self._max_retries = max_retries
        self._num_breaks = 0
        self._num_chunks = 0
        self._decoder = EventDecoder()
        self.has_ended = False
        """Whether the end mark has come."""

    @property
    def call(self) -> StreamCall[Any, Any]:
        """The request for what is still to come."""
        return self._continuation.call if self._continuation else self._call

    def begin(self, response: httpx.Response) -> None:
        """Take packets of this response from now on. Raises APIStreamError if it is none that
        goes on where the last one broke off.
        """
        self._decoder = EventDecoder()
        if self._continuation and not self._continuation.is_next(response):
            raise failures.not_resumed(response)

    def read(self, response: httpx.Response, packet: bytes) -> Iterator[ReplyT]:
        """Chunks that end in a packet. Raises as `read_chunk` does, after those before."""
        for data in self._decoder.feed(packet):
            if data == END_MARK:
                self.has_ended = True
                return
            chunk: ReplyT | None = read_chunk(response, data, self._reply)
            if self._continuation:
                chunk = cast(ReplyT | None, self._continuation.show(cast(Chunk, chunk)))
            if chunk is not None:
                yield chunk
                self._num_chunks += 1
                self._num_breaks = 0

    @contextmanager
    def going_on(
        self, response: httpx.Response, error: httpx.RequestError | None
    ) -> Iterator[float]:
        """Around asking for the rest, after a connection that ended before the end mark; gives
        the seconds to wait before.

        Raises APIStreamError if the stream cannot go on, or that fails.
        """
        is_possible = self._continuation and self._continuation.is_possible
        if not is_possible or (error is not None and not retry.is_worth_it(error)):
            raise failures.stream_broke_off(response, self._num_chunks, error) from error
        if self._num_breaks >= self._max_retries:
            why = f"it broke off {self._num_breaks + 1} times without a chunk between"
            raise failures.stream_broke_off(response, self._num_chunks, error, why) from error
        chance = random.random()
        wait_s = retry.wait_s(None, self._num_breaks, now_s=time.time(), chance=chance)
        self._num_breaks += 1
        why = repr(error or "no [DONE]")
        logger.info("%s broke off (%s); goes on in %.1f s", self._call.path, why, wait_s)
        try:
            yield wait_s
        except APIError as failure:
            why = failure.message
            raise failures.stream_broke_off(response, self._num_chunks, error, why) from failure


class Chunks(Generic[ReplyT]):
    """Takes the chunks of a stream from its connections. Owned by one Stream or AsyncStream."""

    def __init__(
        self,
        io: Io,
        reader: ChunkReader[ReplyT],
        response: httpx.Response,
        reopen: Callable[[StreamCall[Any, Any]], Awaitable[httpx.Response]],
    ) -> None:
        """reopen: sends a call and returns once the headers of its stream are in."""
        self._io = io
        self._reader = reader
        self._reopen = reopen
        self._is_closed = False
        self._take(response)

    async def next(self) -> ReplyT | None:
        """The next chunk; None after the last, or once closed. A failure closes the stream."""
        try:
            while not self._is_closed:
                for chunk in self._ready:
                    return chunk
                if self._reader.has_ended:
                    await self.close()
                else:
                    await self._receive()
        except BaseException:
            await self.close()
            raise
        return None

    async def close(self) -> None:
        self._is_closed = True
        await self._io.close(self.response)

    def _take(self, response: httpx.Response) -> None:
        self.response = response
        self._packets = self._io.packets(response)
        self._ready: Iterator[ReplyT] = iter(())

    async def _receive(self) -> None:
        """One more packet, if need be of another connection."""
        broken_by = None
        try:
            packet = await anext(self._packets, None)
        except httpx.RequestError as error:
            packet, broken_by = None, error
        if packet is not None:
            self._ready = self._reader.read(self.response, packet)
            return
        await self._io.close(self.response)
        with self._reader.going_on(self.response, broken_by) as wait_s:
            await self._io.sleep(wait_s)
            self._take(await self._reopen(self._reader.call))
        self._reader.begin(self.response)

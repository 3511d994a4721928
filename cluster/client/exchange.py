"""Making a call: sending it, again if need be, and reading the answer. io.py does the waiting."""

import logging
import random
import time
from collections.abc import Callable
from typing import Any

import httpx

from cluster.client import failures, retry
from cluster.client.call import Call, ReplyCall, StreamCall
from cluster.client.chunks import ChunkReader, Chunks
from cluster.client.io import Io
from cluster.client.reply import check_status, check_stream, is_event_stream
from cluster.client.settings import Settings

logger = logging.getLogger(__name__)

KeepOpen = Callable[[httpx.Response], bool]
"""Tells whether an answer's body is left to come as it is read."""


class Exchange:
    """Calls to one server and their answers. Errors leave as those of `cluster.errors`."""

    def __init__(self, settings: Settings, io: Io) -> None:
        self.settings = settings
        self.io = io

    async def run(self, call: Call[Any, Any]) -> Any:
        """The reply, or the chunks. A stream is here once its headers are."""
        if isinstance(call, ReplyCall):
            return call.read(await self._send(call, _never))
        assert isinstance(call, StreamCall)
        reader = ChunkReader[Any](call, max_retries=self.settings.max_retries)
        return Chunks(self.io, reader, await self._open(reader.call), self._open)

    async def respond(self, call: Call[Any, Any]) -> httpx.Response:
        """The response, read unless it is a stream. Raises for an error status."""
        is_stream = isinstance(call, StreamCall)
        response = await self._send(call, is_event_stream if is_stream else _never)
        check_status(response)
        return response

    async def respond_early(self, call: Call[Any, Any]) -> httpx.Response:
        """The response before its body has come. Raises for an error status."""
        response = await self._send(call, _is_success)
        check_status(response)
        return response

    def understand(self, call: Call[Any, Any], response: httpx.Response) -> Any:
        """What a response says that has been read, or is a stream. As the stream was asked for as
        it is, it cannot go on if it breaks off.
        """
        if isinstance(call, ReplyCall):
            return call.read(response)
        assert isinstance(call, StreamCall)
        check_stream(response)
        return Chunks(self.io, ChunkReader[Any](call, max_retries=0), response, self._open)

    async def read_and_understand(self, call: Call[Any, Any], response: httpx.Response) -> Any:
        """The same of a response that may not have been read."""
        if not is_event_stream(response):
            with failures.mapped(response.request):
                await self.io.read(response)
        return self.understand(call, response)

    async def _open(self, call: StreamCall[Any, Any]) -> httpx.Response:
        response = await self._send(call, is_event_stream)
        check_stream(response)
        return response

    async def _send(self, call: Call[Any, Any], keep_open: KeepOpen) -> httpx.Response:
        """Send until an answer is not worth a retry, or there have been enough."""
        max_retries = self.settings.max_retries if call.is_retried else 0
        num_retries = 0
        while True:
            request = call.request(self.io.http, self.settings, num_retries)
            outcome = await self._try(request, keep_open)
            if num_retries == max_retries or not retry.is_worth_it(outcome):
                break
            headers = outcome.headers if isinstance(outcome, httpx.Response) else None
            wait_s = retry.wait_s(headers, num_retries, now_s=time.time(), chance=random.random())
            num_retries += 1
            logger.info(
                "%s %s: %r; retry %d of %d in %.1f s",
                *(call.method, call.path, outcome, num_retries, max_retries, wait_s),
            )
            await self.io.sleep(wait_s)
        if isinstance(outcome, httpx.RequestError):
            raise failures.transport_error(outcome, request) from outcome
        return outcome

    async def _try(
        self, request: httpx.Request, keep_open: KeepOpen
    ) -> httpx.Response | httpx.RequestError:
        """Send once. The answer comes read, and its connection is free, unless it is kept open."""
        try:
            response = await self.io.send(request)
            if not keep_open(response):
                try:
                    await self.io.read(response)
                finally:
                    await self.io.close(response)
        except httpx.RequestError as error:
            return error
        return response


def _never(_response: httpx.Response) -> bool:
    return False


def _is_success(response: httpx.Response) -> bool:
    return response.is_success

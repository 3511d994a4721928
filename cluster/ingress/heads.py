"""The ingress's side of the streams to the heads. Owned by the event loop; no text, no HTTP."""

import asyncio
import itertools
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing

import grpc

from cluster import rpc
from cluster.errors import HandshakeError, HeadUnavailableError, RequestError
from cluster.ingress.journal import Journal
from cluster.ingress.messages import to_classify, to_news, to_submit
from cluster.placement import HeadInfo
from protos import head_pb2, head_pb2_grpc

logger = logging.getLogger(__name__)


class HeadConnection:
    """One stream to one head, for all requests that this ingress sends there."""

    def __init__(self, head: HeadInfo, identity: rpc.Identity) -> None:
        """Starts connecting; must be created on the event loop."""
        self.head = head
        self.is_broken = False
        self._identity = identity
        self._channel = grpc.aio.insecure_channel(head.address, options=rpc.CHANNEL_OPTIONS)
        self._stub = head_pb2_grpc.HeadStub(self._channel)
        self._outgoing: asyncio.Queue[head_pb2.HeadRequest] = asyncio.Queue()
        self._events: dict[int, asyncio.Queue[head_pb2.SequenceEvent | HeadUnavailableError]] = {}
        self._ids = itertools.count(1)
        self._reader = asyncio.create_task(self._read())

    def __repr__(self) -> str:
        return f"HeadConnection({self.head.name}, {self.num_open} open)"

    @property
    def num_open(self) -> int:
        """Requests in progress there."""
        return len(self._events)

    async def generate(self, journal: Journal) -> AsyncGenerator[tuple[int, ...], None]:
        """Run a journal on this head from where it stands; yields and records new ids.

        Closing the iterator aborts the request at the head.
        Raises HeadUnavailableError when the head is lost or fails, RequestError when it refuses.
        """
        request_id = next(self._ids)
        async with aclosing(self._run(request_id, to_submit(request_id, journal))) as events:
            async for event in events:
                news = to_news(event)
                journal.record(news)
                yield news.token_ids

    async def classify(self, prompt_ids: Sequence[int], client: str) -> tuple[float, ...]:
        """Logits of a prompt on this head, one for each label. Cancelling aborts it there.

        Raises as `generate` does.
        """
        request_id = next(self._ids)
        request = to_classify(request_id, prompt_ids, client)
        async with aclosing(self._run(request_id, request)) as events:
            return tuple((await anext(events)).scores)

    async def _run(
        self, request_id: int, submit: head_pb2.HeadRequest
    ) -> AsyncGenerator[head_pb2.SequenceEvent, None]:
        """Submit a request; yields its events up to its end. Closing before that aborts it."""
        if self.is_broken:
            raise HeadUnavailableError(f"{self.head.name} is gone")
        arrived = self._events[request_id] = asyncio.Queue()
        self._outgoing.put_nowait(submit)
        has_ended = False
        try:
            while not has_ended:
                event = await arrived.get()
                if isinstance(event, HeadUnavailableError):
                    raise event
                has_ended = event.finish != head_pb2.FINISH_NONE
                if event.finish == head_pb2.FINISH_INVALID:
                    raise RequestError(400, event.error, param=event.param or None)
                if event.finish == head_pb2.FINISH_ERROR:
                    raise HeadUnavailableError(f"{self.head.name}: {event.error}")
                yield event
        finally:
            del self._events[request_id]
            if not has_ended and not self.is_broken:
                abort = head_pb2.Abort(request_id=request_id)
                self._outgoing.put_nowait(head_pb2.HeadRequest(abort=abort))

    async def close(self) -> None:
        self._reader.cancel()
        await asyncio.gather(self._reader, return_exceptions=True)
        await self._channel.close()

    async def _read(self) -> None:
        """Shake hands, then pass each event to the request it belongs to."""
        reason = "the stream has ended"
        try:
            reply = await self._stub.Hello(self._identity.hello(), timeout=rpc.HANDSHAKE_TIMEOUT_S)
            self._identity.check(reply)
            async for step in self._stub.Generate(self._requests()):
                for event in step.events:
                    if event.request_id in self._events:  # else aborted meanwhile
                        self._events[event.request_id].put_nowait(event)
        except grpc.RpcError as error:
            reason = rpc.describe(error)
        except HandshakeError as error:
            reason = str(error)
        finally:
            self.is_broken = True
            lost = HeadUnavailableError(f"{self.head.name} at {self.head.address}: {reason}")
            for events in self._events.values():
                events.put_nowait(lost)
        logger.warning("%s", lost)

    async def _requests(self) -> AsyncIterator[head_pb2.HeadRequest]:
        while True:
            yield await self._outgoing.get()


class HeadPool:
    """Connections to all heads that take requests. Owned by the event loop."""

    def __init__(self, identity: rpc.Identity) -> None:
        self._identity = identity
        self._heads: Sequence[HeadInfo] = ()
        self._connections: dict[HeadInfo, HeadConnection] = {}
        self._closing: set[asyncio.Task[None]] = set()

    def __repr__(self) -> str:
        return f"HeadPool({list(self._connections.values())})"

    def update(self, heads: Sequence[HeadInfo]) -> None:
        """Take note of the heads that there are now, and connect to new ones."""
        self._heads = heads
        self._refresh()

    def generate(self, journal: Journal) -> AsyncGenerator[tuple[int, ...], None]:
        """Run a journal on the head with the fewest open requests; see HeadConnection.

        Raises HeadUnavailableError when there is no head.
        """
        return self._least_busy().generate(journal)

    async def classify(self, prompt_ids: Sequence[int], client: str) -> tuple[float, ...]:
        """Logits of a prompt, computed on that head; see HeadConnection.

        Raises HeadUnavailableError when there is no head.
        """
        return await self._least_busy().classify(prompt_ids, client)

    async def close(self) -> None:
        self._heads = ()
        closing = [*self._closing, *(c.close() for c in self._connections.values())]
        self._connections = {}
        await asyncio.gather(*closing)

    def _least_busy(self) -> HeadConnection:
        self._refresh()
        if not self._connections:
            raise HeadUnavailableError("no head replica is connected")
        return min(self._connections.values(), key=lambda c: c.num_open)

    def _refresh(self) -> None:
        """Replace broken streams, drop heads that are gone, connect to those that are new.

        A head that is no longer listed keeps its stream while requests are open on it: the
        controller may be the one who lost sight of it.
        """
        for head, connection in list(self._connections.items()):
            if connection.is_broken or (head not in self._heads and not connection.num_open):
                del self._connections[head]
                task = asyncio.create_task(connection.close())
                self._closing.add(task)
                task.add_done_callback(self._closing.discard)
        for head in self._heads:
            if head not in self._connections:
                self._connections[head] = HeadConnection(head, self._identity)

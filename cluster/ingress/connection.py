"""One head as an ingress sees it: a stream for all requests, and how the head is doing.

Owned by the event loop; no text, no HTTP.
"""

import asyncio
import itertools
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Collection, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

import grpc

from cluster import rpc
from cluster.errors import (
    HandshakeError,
    HeadDrainsError,
    HeadFailedError,
    HeadLostError,
    HeadUnavailableError,
    RequestError,
)
from cluster.ingress.choice import PrefixMemory, Standing
from cluster.ingress.journal import Journal
from cluster.ingress.messages import to_classify, to_news, to_submit
from cluster.placement import HeadInfo
from protos import head_pb2, head_pb2_grpc

logger = logging.getLogger(__name__)

OpenChannel = Callable[[str], grpc.aio.Channel]

_TICKS = 5
"""In which the time of a head's silence is counted. A clock would also count the time when this
process itself was stopped, and blame the head for it."""


@dataclass(frozen=True)
class _Open:
    """A request in progress."""

    avoids: HeadInfo | None
    """The head that has failed to compute it: not to go on with it."""
    events: asyncio.Queue[head_pb2.SequenceEvent | HeadUnavailableError] = field(
        default_factory=asyncio.Queue
    )


class HeadConnection:
    """One stream to one head, for all requests that this ingress sends there."""

    def __init__(
        self,
        head: HeadInfo,
        identity: rpc.Identity,
        *,
        silent_after_s: float,
        on_change: Callable[[], None],
        open_channel: OpenChannel,
    ) -> None:
        """Starts connecting; must be created on the event loop.

        on_change: called when it begins to take requests, and when it takes no more.
        """
        self.head = head
        self.load: head_pb2.Load | None = None
        """What the head last said; None until it has said anything."""
        self.loss: HeadLostError | None = None
        """Why there is no stream any more."""
        self._identity = identity
        self._on_change = on_change
        self._channel = open_channel(head.address)
        self._stub = head_pb2_grpc.HeadStub(self._channel)
        self._outgoing: asyncio.Queue[head_pb2.HeadRequest] = asyncio.Queue()
        self._open: dict[int, _Open] = {}
        self._ids = itertools.count(1)
        self._prefixes = PrefixMemory(0)
        self._num_open_then = 0
        self._num_tokens_since = 0
        """What has been sent there since it last said how busy it is."""
        self._silent_after_s = silent_after_s
        self._num_silent_ticks = 0
        self._reader = asyncio.create_task(self._read())
        self._ticker = asyncio.create_task(self._tick())

    def __repr__(self) -> str:
        state = self.loss or ("takes requests" if self.takes_requests else "takes none")
        return f"HeadConnection({self.head.name}, {self.num_open} open, {state})"

    @property
    def num_open(self) -> int:
        """Requests of this ingress in progress there."""
        return len(self._open)

    @property
    def takes_requests(self) -> bool:
        return self.load is not None and not self.load.is_draining and self.loss is None

    @property
    def is_draining(self) -> bool:
        return self.load is not None and self.load.is_draining and self.loss is None

    def standing(self, keys: Sequence[bytes]) -> Standing:
        """How it stands towards a request whose known tokens have these block keys.

        What it last said, and what this ingress has done since.
        """
        assert self.load is not None, f"{self} has not said yet how busy it is"
        since = self.num_open - self._num_open_then
        return Standing(
            num_requests=max(self.num_open, self.load.num_requests + since),
            num_waiting=self.load.num_waiting,
            num_free_tokens=self.load.num_free_tokens - self._num_tokens_since,
            num_shared=self._prefixes.num_shared(keys),
        )

    def remember(self, keys: Sequence[bytes]) -> None:
        """It has, or will soon have, computed these blocks of a sequence."""
        self._prefixes.remember(keys)

    async def generate(
        self, journal: Journal, avoids: HeadInfo | None
    ) -> AsyncGenerator[tuple[int, ...], None]:
        """Run a journal on this head from where it stands; yields and records new ids.

        avoids: the head that is not to go on with it.
        Closing the iterator aborts the request at the head.
        Raises HeadUnavailableError, one of its kinds, when the head does not finish it, and
        RequestError when it refuses.
        """
        request_id = next(self._ids)
        self._num_tokens_since += len(journal.prompt_ids) + len(journal.emitted_ids)
        submit = to_submit(request_id, journal)
        async with aclosing(self._run(request_id, submit, avoids)) as events:
            async for event in events:
                news = to_news(event)
                journal.record(news)
                yield news.token_ids

    async def classify(
        self, prompt_ids: Sequence[int], client: str, avoids: HeadInfo | None
    ) -> tuple[float, ...]:
        """Logits of a prompt on this head, one for each label. Cancelling aborts it there.

        Raises as `generate` does.
        """
        request_id = next(self._ids)
        self._num_tokens_since += len(prompt_ids)
        request = to_classify(request_id, prompt_ids, client)
        async with aclosing(self._run(request_id, request, avoids)) as events:
            return tuple((await anext(events)).scores)

    def hand_back(self, to: Collection[HeadInfo]) -> None:
        """End its requests with which one of these heads may go on, with HeadDrainsError."""
        drains = HeadDrainsError(f"{self.head.name} is about to stop")
        for request in self._open.values():
            if any(head != request.avoids for head in to):
                request.events.put_nowait(drains)

    async def close(self) -> None:
        """Hang up. Requests that are open are lost, and aborted at the head."""
        self._lose("hung up", logging.INFO)
        for task in (self._reader, self._ticker):
            task.cancel()
        await asyncio.gather(self._reader, self._ticker, return_exceptions=True)
        await self._channel.close()

    async def _run(
        self, request_id: int, submit: head_pb2.HeadRequest, avoids: HeadInfo | None
    ) -> AsyncGenerator[head_pb2.SequenceEvent, None]:
        """Submit a request; yields its events up to its end. Closing before that aborts it."""
        if self.loss:
            raise self.loss
        request = self._open[request_id] = _Open(avoids)
        self._outgoing.put_nowait(submit)
        has_ended = False
        try:
            while not has_ended:
                event = await request.events.get()
                if isinstance(event, HeadUnavailableError):
                    raise event
                has_ended = event.finish != head_pb2.FINISH_NONE
                if event.finish == head_pb2.FINISH_INVALID:
                    raise RequestError(400, event.error, param=event.param or None)
                if event.finish == head_pb2.FINISH_ERROR:
                    raise HeadFailedError(f"{self.head.name}: {event.error}")
                yield event
        finally:
            del self._open[request_id]
            if not has_ended and not self.loss:
                abort = head_pb2.Abort(request_id=request_id)
                self._outgoing.put_nowait(head_pb2.HeadRequest(abort=abort))

    async def _read(self) -> None:
        """Shake hands, then pass each event to the request it belongs to."""
        reason = "the stream has ended"
        try:
            reply = await self._stub.Hello(self._identity.hello(), timeout=rpc.HANDSHAKE_TIMEOUT_S)
            self._identity.check(reply)
            self._num_silent_ticks = 0
            async for step in self._stub.Generate(self._requests()):
                self._num_silent_ticks = 0
                for event in step.events:
                    if event.request_id in self._open:  # else aborted meanwhile
                        self._open[event.request_id].events.put_nowait(event)
                if step.HasField("load"):
                    self._note(step.load)
        except grpc.RpcError as error:
            reason = rpc.describe(error)
        except HandshakeError as error:
            reason = str(error)
            logger.warning("%s cannot be used: %s", self.head.name, reason)
        except Exception:
            reason = "its events could not be read"
            logger.exception("%s: %s", self.head.name, reason)
        finally:
            self._lose(reason)

    def _note(self, load: head_pb2.Load) -> None:
        took_requests, self.load = self.takes_requests, load
        if not took_requests:
            self._prefixes = PrefixMemory(load.num_cache_tokens)
        self._num_open_then, self._num_tokens_since = self.num_open, 0
        if self.takes_requests != took_requests:
            logger.info("%s", self)
            self._on_change()

    async def _tick(self) -> None:
        """Count how long the head has been silent."""
        while self._num_silent_ticks < _TICKS:
            await asyncio.sleep(self._silent_after_s / _TICKS)
            self._num_silent_ticks += 1
        self._lose(f"silent for {self._silent_after_s:g} s")

    def _lose(self, reason: str, level: int = logging.WARNING) -> None:
        """Tell whoever has a request here, once, that this head will not finish it."""
        if self.loss:
            return
        self.loss = HeadLostError(f"{self.head.name} at {self.head.address}: {reason}")
        # one that was never reached is called again and again, as long as it is listed
        logger.log(level if self.load else logging.INFO, "%s", self)
        for request in self._open.values():
            request.events.put_nowait(self.loss)
        self._on_change()

    async def _requests(self) -> AsyncIterator[head_pb2.HeadRequest]:
        while True:
            yield await self._outgoing.get()

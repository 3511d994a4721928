"""All heads as an ingress sees them: chooses one for a request, and another when that one is lost.

A request is a journal; another head takes what was emitted for known and goes on with the next
token, which is the same there. So a stream goes on without a gap, a repeat or an error. Owned by
the event loop; no text, no HTTP.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from functools import partial

from cluster import rpc
from cluster.errors import ConfigurationError, HeadUnavailableError, RequestError
from cluster.ingress.choice import block_keys, cost
from cluster.ingress.connection import HeadConnection, OpenChannel
from cluster.ingress.journal import Journal
from cluster.ingress.tries import Tries
from cluster.log import RequestLogger
from cluster.metrics import IngressMetrics
from cluster.placement import HeadInfo

logger = logging.getLogger(__name__)
request_logger = RequestLogger(logger)

RECONNECT_S = 0.1
"""Pause before a head is called again whose stream broke: perhaps only the connection did."""

UNREACHABLE_S = 1.0
"""Pause before a head is called again that could not be reached at all."""


class HeadPool:
    """Connections to all heads. Owned by the event loop."""

    def __init__(
        self,
        identity: rpc.Identity,
        metrics: IngressMetrics,
        *,
        silent_after_s: float,
        wait_s: float,
        wake: Callable[[], None] = lambda: None,
        open_channel: OpenChannel | None = None,
    ) -> None:
        """silent_after_s: from which silence of a head on it counts as lost.
        wait_s: how long a request waits for a head when there is none.
        wake: called when one begins to wait.
        """
        self._identity = identity
        self._metrics = metrics
        self._silent_after_s = silent_after_s
        self._wait_s = wait_s
        self._wake = wake
        self._open_channel = open_channel or partial(
            rpc.new_aio_channel, security=identity.security, to="head"
        )
        self._heads: Sequence[HeadInfo] = ()
        self._connections: dict[HeadInfo, HeadConnection] = {}
        self._resting: set[HeadInfo] = set()
        """Not to be called again just yet."""
        self._closing: set[asyncio.Task[None]] = set()
        self._is_closed = False
        self._num_waiting = 0
        self._changed = asyncio.Event()
        self._one_suspect = asyncio.Lock()

    def __repr__(self) -> str:
        return f"HeadPool({list(self._connections.values())}, {self._num_waiting} waiting)"

    @property
    def num_ready(self) -> int:
        """Heads that take requests now."""
        return sum(connection.takes_requests for connection in self._connections.values())

    def update(self, heads: Sequence[HeadInfo]) -> None:
        """Take note of the heads that there are now, and connect to new ones."""
        self._heads = heads
        self._refresh()

    async def generate(self, journal: Journal) -> AsyncGenerator[tuple[int, ...], None]:
        """Run a journal to its end, on as many heads as it takes; yields and records new ids.

        Closing the iterator aborts it.
        Raises RequestError when a head refuses it; HeadUnavailableError when there is no head in
        time, or when it must not be tried again (`tries.py`).
        """
        tries = Tries()
        while True:
            async with self._probation(tries) as probation:
                head = await self._chosen(journal.known_ids, journal.cache_salt, tries)
                try:
                    async with aclosing(head.generate(journal, tries.failed_at)) as batches:
                        async for token_ids in batches:
                            if tries.is_suspect:
                                await probation.aclose()
                            tries.progress()
                            yield token_ids
                    return
                except (HeadUnavailableError, RequestError) as error:
                    self._again_after(error, head, tries)
                finally:
                    self._remember(head, journal)

    async def classify(self, prompt_ids: Sequence[int], client: str) -> tuple[float, ...]:
        """Logits of a prompt, one for each label. Cancelling aborts it.

        Raises as `generate` does.
        """
        tries = Tries()
        while True:
            async with self._probation(tries):
                head = await self._chosen(prompt_ids, "", tries)
                try:
                    return await head.classify(prompt_ids, client, tries.failed_at)
                except (HeadUnavailableError, RequestError) as error:
                    self._again_after(error, head, tries)

    async def close(self) -> None:
        """Hang up everywhere; requests that are open end with HeadUnavailableError."""
        self._is_closed = True
        self._heads = ()
        closing = [*self._closing, *(each.close() for each in self._connections.values())]
        self._connections = {}
        self._on_change()
        for result in await asyncio.gather(*closing, return_exceptions=True):
            if isinstance(result, Exception):
                logger.error("a connection to a head could not be closed", exc_info=result)

    @asynccontextmanager
    async def _probation(self, tries: Tries) -> AsyncIterator[AsyncExitStack]:
        """Entered by one suspect at a time, which may leave early, and by all others at once."""
        async with AsyncExitStack() as stack:
            if tries.is_suspect:
                await self._candidates_in_time(tries)  # else each in its turn would wait so long
                await stack.enter_async_context(self._one_suspect)
            yield stack

    def _again_after(
        self, error: HeadUnavailableError | RequestError, head: HeadConnection, tries: Tries
    ) -> None:
        """Note that a head did not finish a request; raises when that was the last try."""
        cause = tries.again_after(error, head.head)
        self._metrics.observe_replay(cause)
        request_logger.info("another head goes on with it: %s", error)

    async def _chosen(self, ids: Sequence[int], salt: str, tries: Tries) -> HeadConnection:
        """The head that a request with these known ids should go to; waits until there is one.

        Raises HeadUnavailableError when none has come in time.
        """
        heads = await self._candidates_in_time(tries)
        keys = block_keys(ids, salt) if len(self._connections) > 1 else []
        head = min(heads, key=lambda head: cost(head.standing(keys), len(ids)))
        head.remember(keys)
        return head

    async def _candidates_in_time(self, tries: Tries) -> list[HeadConnection]:
        """Heads that may take a request, at least one, as soon as there are any."""
        if heads := self._candidates(tries):
            return heads
        if not self._num_waiting:
            logger.warning("requests wait for a head replica: %s", self)
        self._wake()
        self._num_waiting += 1
        try:
            async with asyncio.timeout(self._wait_s):
                while not (heads := self._candidates(tries)):
                    await self._changed.wait()
        except TimeoutError as error:
            raise HeadUnavailableError(
                f"there was no head replica for {self._wait_s:g} s; try again later"
            ) from error
        finally:
            self._num_waiting -= 1
        return heads

    def _candidates(self, tries: Tries) -> list[HeadConnection]:
        """Heads that may take a request now."""
        if self._is_closed:
            raise HeadUnavailableError("the ingress is shutting down")
        ready = [head for head in self._connections.values() if head.takes_requests]
        if tries.failure is None:
            return ready
        others = [head for head in ready if head.head != tries.failed_at]
        if not others:
            raise tries.failure
        return others

    def _remember(self, head: HeadConnection, journal: Journal) -> None:
        """An answer is the beginning of its conversation's next prompt."""
        if len(self._connections) > 1:
            head.remember(block_keys(journal.known_ids, journal.cache_salt))

    def _on_change(self) -> None:
        """A head takes requests, or takes none any more."""
        self._refresh()
        ready = [each.head for each in self._connections.values() if each.takes_requests]
        for connection in self._connections.values():
            if connection.is_draining:
                connection.hand_back(ready)
        self._changed.set()
        self._changed = asyncio.Event()

    def _refresh(self) -> None:
        """Drop streams that broke and heads that have gone, connect to those that are listed.

        A head that is not listed any more keeps its stream while it lives and does not say that it
        is about to stop: the controller may be the one who lost sight of it.
        """
        for head, connection in list(self._connections.items()):
            is_done = connection.is_draining and not connection.num_open
            if connection.loss or (is_done and head not in self._heads):
                del self._connections[head]
                task = asyncio.create_task(connection.close())
                self._closing.add(task)
                task.add_done_callback(self._closing.discard)
                self._rest(head, RECONNECT_S if connection.load else UNREACHABLE_S)
        for head in self._heads:
            if head not in self._connections and head not in self._resting:
                self._connect(head)

    def _connect(self, head: HeadInfo) -> None:
        try:
            self._connections[head] = HeadConnection(
                head,
                self._identity,
                silent_after_s=self._silent_after_s,
                on_change=self._on_change,
                open_channel=self._open_channel,
            )
        except ConfigurationError as error:
            # Certificates are being renewed; whoever brought the news of this head goes on.
            logger.warning("%s is called again soon: %s", head.name, error)
            self._rest(head, UNREACHABLE_S)

    def _rest(self, head: HeadInfo, seconds: float) -> None:
        self._resting.add(head)
        asyncio.get_running_loop().call_later(seconds, self._rested, head)

    def _rested(self, head: HeadInfo) -> None:
        self._resting.discard(head)
        self._refresh()

"""Streams to the workers that are wanted: made, watched and ended beside the engine's thread."""

import logging
import threading
import time
from collections.abc import Iterable, Mapping

from cluster import rpc
from cluster.errors import ConfigurationError, ExpertsUnavailableError, HandshakeError
from cluster.head.feed import PlacementFeed
from cluster.head.stream import WorkerStream
from cluster.placement import Placement, WorkerInfo

logger = logging.getLogger(__name__)

RECONNECT_EVERY_S = 0.5
"""How often a worker that does not answer is tried again."""

BEAT_S = 0.05
"""How often overdue reads are looked for: the most by which a deadline is overstepped."""


class Connections:
    """Keeps a stream to every wanted worker. Thread-safe.

    Threads: a keeper, and one for each worker that is being connected, since a handshake with a
    paused worker takes its whole timeout.
    """

    def __init__(self, identity: rpc.Identity, feed: PlacementFeed, *, drain_s: float) -> None:
        """feed: its newest placement's workers are wanted at once, before anybody says so; its
            `changed` is notified when a stream comes or goes.
        drain_s: how long the stream of a worker that is not wanted any more may wait for answers.
        """
        self.streams: Mapping[WorkerInfo, WorkerStream] = {}
        """Of workers that are wanted and connected. Replaced, never changed."""
        self.version = 0
        """Grows whenever `streams` is replaced."""
        self._identity = identity
        self._feed = feed
        self._heard: Placement | None = None
        self._changed = feed.changed
        self._drain_s = drain_s
        self._wanted: frozenset[WorkerInfo] = frozenset()
        self._connecting: set[WorkerInfo] = set()
        self._failed: dict[WorkerInfo, float] = {}
        """When to try again."""
        self._draining: list[tuple[WorkerStream, float]] = []
        self._is_closed = False
        self._wake = threading.Event()
        self._keeper = threading.Thread(target=self._keep, name="keeper", daemon=True)
        self._keeper.start()

    def __repr__(self) -> str:
        missing = sorted(worker.name for worker in self._wanted - self.streams.keys())
        return f"{list(self.streams.values())}, without {missing}"

    def want(self, workers: Iterable[WorkerInfo]) -> None:
        """Connect to these, in the background; the others' streams end when they owe nothing."""
        with self._changed:
            self._wanted = frozenset(workers)
            leaving = [stream for w, stream in self.streams.items() if w not in self._wanted]
            if leaving:
                give_up_at = time.monotonic() + self._drain_s
                self._draining += [(stream, give_up_at) for stream in leaving]
                self._set({w: s for w, s in self.streams.items() if w in self._wanted})
        self._wake.set()

    def lose(self, stream: WorkerStream) -> bool:
        """End a stream that has failed, and connect anew; says whether it was still in use."""
        with self._changed:
            is_known = self.streams.get(stream.worker) is stream
            if is_known:
                self._set({w: s for w, s in self.streams.items() if s is not stream})
        stream.close()
        self._wake.set()
        return is_known

    def close(self) -> None:
        """End all streams. A worker that is being connected is let go when it answers."""
        with self._changed:
            self._is_closed = True
            self._wanted = frozenset()
        self._wake.set()
        self._keeper.join()
        for stream in (*self.streams.values(), *(stream for stream, _ in self._draining)):
            stream.close()
        self.streams = {}

    def _set(self, streams: Mapping[WorkerInfo, WorkerStream]) -> None:
        """The lock must be held."""
        self.streams = streams
        self.version += 1
        self._changed.notify_all()

    def _keep(self) -> None:
        while not self._is_closed:
            now = time.monotonic()
            for stream in self.streams.values():
                stream.watch(now)
            self._end_drained(now)
            self._hear()
            self._connect_missing(now)
            self._wake.wait(BEAT_S)
            self._wake.clear()

    def _hear(self) -> None:
        with self._changed:
            newest = self._feed.newest
            if newest is not None and newest is not self._heard and not self._is_closed:
                self._heard = newest
                self._wanted |= frozenset(newest.workers)

    def _end_drained(self, now: float) -> None:
        with self._changed:
            draining, self._draining = self._draining, []
            for stream, give_up_at in draining:
                stream.watch(now)
                if stream.num_outstanding and now < give_up_at:
                    self._draining.append((stream, give_up_at))
                    continue
                logger.info("%s holds nothing for us any more, disconnected", stream.worker.name)
                stream.close()

    def _connect_missing(self, now: float) -> None:
        with self._changed:
            self._failed = {w: at for w, at in self._failed.items() if w in self._wanted}
            missing = [
                worker
                for worker in self._wanted - self.streams.keys() - self._connecting
                if self._failed.get(worker, now) <= now
            ]
            self._connecting.update(missing)
        for worker in missing:
            thread = threading.Thread(
                target=self._connect, args=(worker,), name=f"connect {worker.name}", daemon=True
            )
            try:
                thread.start()
            except RuntimeError as error:  # there may be no more threads, but the keeper goes on
                self._log_failure(worker, f"{worker.name}: {error}")
                with self._changed:
                    self._connecting.discard(worker)
                    self._failed[worker] = time.monotonic() + RECONNECT_EVERY_S

    def _connect(self, worker: WorkerInfo) -> None:
        stream = None
        try:
            stream = WorkerStream(worker, self._identity)
        except (ExpertsUnavailableError, HandshakeError, ConfigurationError) as error:
            self._log_failure(worker, str(error))
        finally:
            with self._changed:
                self._connecting.discard(worker)
                is_wanted = worker in self._wanted
                if stream is None:
                    self._failed[worker] = time.monotonic() + RECONNECT_EVERY_S
                elif is_wanted:
                    logger.info("connected to %s at %s", worker.name, worker.address)
                    self._failed.pop(worker, None)
                    self._set({**self.streams, worker: stream})
        if stream is not None and not is_wanted:
            stream.close()

    def _log_failure(self, worker: WorkerInfo, reason: str) -> None:
        """To be called before the failure is noted: only the first in a row is a warning."""
        level = logging.DEBUG if worker in self._failed else logging.WARNING
        logger.log(level, "trying again every %.1f s: %s", RECONNECT_EVERY_S, reason)

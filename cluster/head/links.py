"""The ways to a worker: gRPC, or a pipe if it is on this host. Messages out, answers in order."""

import logging
import os
import queue
import select
import threading
import time
import weakref
from collections.abc import Iterator
from typing import Protocol

import grpc

from cluster import rpc, wire
from cluster.errors import WireError
from cluster.pipe import Buffer, Pipe

logger = logging.getLogger(__name__)

SLOW_AFTER_S = 1.0
"""A wait longer than this is logged, with what it waits for."""


class LinkLostError(Exception):
    """The worker is gone, or its time is over; the link is of no more use."""


class Link(Protocol):
    """Used by the engine's thread, but for `watch` and `close`. Times are `time.monotonic`'s."""

    def send(self, message: wire.Parts, overdue_at: float) -> None:
        """Send a message. Never raises: whatever fails shows when the answer is wanted."""
        ...

    def receive(self, overdue_at: float, where: str) -> Buffer:
        """The next answer. where: what for, for people. Raises LinkLostError."""
        ...

    def wait(self, until: float) -> bool:
        """Whether, by then, `receive` has an answer or an error to give at once."""
        ...

    def fileno(self) -> int:
        """Of a descriptor that can be read when it may be worth to `wait` again."""
        ...

    def watch(self, now: float) -> None:
        """Called now and then from another thread, for links that cannot watch the time."""
        ...

    def close(self) -> None:
        """End the link, whatever is outstanding."""
        ...


class GrpcLink:
    """A stream of the worker's Compute method.

    gRPC's blocking read has no timeout of its own, so `watch` cancels a read that is overdue. Nor
    can a descriptor tell of an answer: once somebody waits for one that may come from elsewhere
    first, a thread reads.
    """

    def __init__(self, channel: grpc.Channel) -> None:
        """The channel is closed with the link."""
        self._channel = channel
        self._outgoing: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        """Taken to change `_wait`, and while its read is cancelled: it cannot be the next one's."""
        self._wait: tuple[float, float, str] | None = None
        """Of the read in progress: since when, until when, and for what."""
        self._was_slow = False
        self._missed_deadline = False
        compute = channel.stream_stream(f"/{rpc.EXPERT_SERVICE}/Compute")
        self._incoming: Iterator[bytes] = compute(iter(self._outgoing.get, None))
        self._ahead: _ReadAhead | None = None

    def send(self, message: wire.Parts, overdue_at: float) -> None:
        """Queue a message; gRPC's own thread sends it."""
        self._outgoing.put(wire.joined(message))

    def receive(self, overdue_at: float, where: str) -> bytes:
        since = time.monotonic()
        with self._lock:
            self._wait = (since, overdue_at, where)
        try:
            return next(self._incoming)
        except (grpc.RpcError, StopIteration) as error:
            reason = rpc.describe(error) if isinstance(error, grpc.RpcError) else "stream ended"
            if self._missed_deadline:
                reason = f"no answer within {time.monotonic() - since:.2f} s"
            raise LinkLostError(reason) from error
        finally:
            with self._lock:
                self._wait, self._was_slow = None, False

    def wait(self, until: float) -> bool:
        try:
            return self._read_ahead().wait(until)
        except (OSError, RuntimeError) as error:
            # There is no descriptor, or no thread, to be had; to receive needs neither.
            logger.warning("cannot wait for one answer of several: %s", error)
            return True

    def fileno(self) -> int:
        return self._read_ahead().fileno()

    def _read_ahead(self) -> "_ReadAhead":
        if self._ahead is None:
            with self._lock:
                self._incoming = self._ahead = _ReadAhead(self._incoming)
        return self._ahead

    def watch(self, now: float) -> None:
        with self._lock:
            if self._wait is None:
                return
            since, overdue_at, where = self._wait
            if now > overdue_at:
                self._missed_deadline = True
                self._incoming.cancel()  # type: ignore[attr-defined]
            elif now - since > SLOW_AFTER_S and not self._was_slow:
                self._was_slow = True
                logger.warning("waiting since %.1f s for %s", now - since, where)

    def close(self) -> None:
        self._outgoing.put(None)
        self._incoming.cancel()  # type: ignore[attr-defined]
        self._channel.close()


class _ReadAhead:
    """A stream's messages, read by a thread of its own, so that one can wait for them by time."""

    def __init__(self, messages: Iterator[bytes]) -> None:
        """Ends with the stream, however it does."""
        self._messages = messages
        self._arrived: queue.SimpleQueue[bytes | Exception] = queue.SimpleQueue()
        self._end: Exception | None = None
        self._count = os.eventfd(0, os.EFD_SEMAPHORE | os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        """Of what has arrived; can be read unless it is 0."""
        weakref.finalize(self, os.close, self._count)  # when no thread waits on it any more
        self._poll = select.poll()
        self._poll.register(self._count, select.POLLIN)
        threading.Thread(target=self._read, name="answers", daemon=True).start()

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        if self._end is None:
            arrived = self._arrived.get()
            if not isinstance(arrived, Exception):
                os.eventfd_read(self._count)
                return arrived
            self._end = arrived  # which stays to be read
        raise self._end

    def wait(self, until: float) -> bool:
        """Whether, by then, there is a message or the end."""
        return bool(self._poll.poll(_left_s(until) * 1e3))

    def fileno(self) -> int:
        return self._count

    def cancel(self) -> None:
        """End the stream. From any thread."""
        self._messages.cancel()  # type: ignore[attr-defined]

    def _read(self) -> None:
        while True:
            arrived: bytes | Exception
            try:
                arrived = next(self._messages)
            except Exception as error:  # the reader's to raise, whatever it is
                arrived = error
            os.eventfd_write(self._count, 1)  # first: who takes a message can lower the count
            self._arrived.put(arrived)
            if isinstance(arrived, Exception):
                return


class PipeLink:
    """A pipe to a worker of this host."""

    def __init__(self, name: str) -> None:
        """Raises OSError when the worker of that name is not on this host, or is another user's."""
        self._pipe = Pipe.connect(name, max_bytes=rpc.MAX_MESSAGE_BYTES)
        self._broken = ""

    def send(self, message: wire.Parts, overdue_at: float) -> None:
        if self._broken:  # perhaps in the middle of a message: what follows would be its rest
            return
        try:
            self._pipe.send(message, _left_s(overdue_at))
        except (OSError, WireError) as error:
            self._broken = f"it could not be asked: {error}"

    def receive(self, overdue_at: float, where: str) -> memoryview:
        if self._broken:
            raise LinkLostError(self._broken)
        since = time.monotonic()
        try:
            if overdue_at - since > SLOW_AFTER_S:
                try:
                    return self._pipe.receive(SLOW_AFTER_S)
                except TimeoutError:
                    logger.warning("waiting since %.1f s for %s", SLOW_AFTER_S, where)
            return self._pipe.receive(_left_s(overdue_at))
        except TimeoutError as error:
            reason = f"no answer within {time.monotonic() - since:.2f} s"
            raise LinkLostError(reason) from error
        except (OSError, WireError) as error:
            raise LinkLostError(str(error)) from error

    def wait(self, until: float) -> bool:
        if self._broken:
            return True
        try:
            self._pipe.wait(_left_s(until))
        except TimeoutError:
            return False
        except (OSError, WireError) as error:
            self._broken = str(error)
        return True

    def fileno(self) -> int:
        return self._pipe.fileno()

    def watch(self, now: float) -> None:
        """Nothing to do: a pipe's waits end by themselves."""

    def close(self) -> None:
        self._pipe.close()


def _left_s(overdue_at: float) -> float:
    return max(0.0, overdue_at - time.monotonic())

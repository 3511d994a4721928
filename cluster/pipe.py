"""A Unix socket between two processes of one host: whole messages at a tenth of gRPC's cost.

Names are abstract (Linux): no file is left behind, and a process on another host, or in another
network namespace, finds nobody there. Both ends refuse a peer of another user, so that what crosses
needs no encryption. A message is sent as its length, 8 bytes little-endian, and its bytes.
"""

import logging
import os
import secrets
import select
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress

import numpy as np

from cluster.errors import WireError

logger = logging.getLogger(__name__)

_LENGTH = struct.Struct("<Q")
_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid

_BUFFER_BYTES = 4 * 2**20
"""Asked of the kernel for each direction, so that a usual step is written at once."""

_STOP_GRACE_S = 2.0

_SPIN_S = 0.005
"""How long after a message was sent the next is looked for, before sleeping until it comes. A
processor that has slept takes tens of microseconds to wake up, and is slow for hundreds more."""

_SEND_TIMEOUT_S = 300.0
"""For a reply. A peer may read its other workers' answers first, so this is far beyond what one of
those may take (expert_timeout_s); one that is stopped must not hold its place for good."""

_FIRST_PAUSE_S = 0.05
_LONGEST_PAUSE_S = 1.0
"""Before a connection is accepted again: each failure in a row doubles the pause. It is descriptors
or memory that lack, and trying at once would only keep the processor from whoever holds them."""

Buffer = bytes | memoryview


class Pipe:
    """One end of a connection. Owned by one thread, but for `close`.

    While it waits to send it takes what arrives, so that two ends which both send large messages
    never wait for each other.
    """

    def __init__(self, connected: socket.socket, *, max_bytes: int) -> None:
        """max_bytes: of a message to take. Raises PermissionError for another user's peer."""
        self._socket = connected  # before anything can fail: `__del__` closes it
        credentials = connected.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        _, uid, _ = _CREDENTIALS.unpack(credentials)
        if uid != os.getuid():
            connected.close()
            raise PermissionError(f"the peer runs as user {uid}, this process as {os.getuid()}")
        connected.setblocking(False)
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            connected.setsockopt(socket.SOL_SOCKET, option, _BUFFER_BYTES)
        self._max_bytes = max_bytes
        self._poll = select.poll()
        self._poll.register(connected, select.POLLIN)
        self._arrived: deque[memoryview] = deque()
        self._length = bytearray(_LENGTH.size)
        self._message: memoryview | None = None
        self._rest = memoryview(self._length)
        """What is still to be filled of the length, or of the message."""
        self._spin_until = 0.0
        self._is_soon = False
        """Whether the last message came in that time; else looking for the next one would only keep
        the processor from whoever computes it."""

    @classmethod
    def connect(cls, name: str, *, max_bytes: int) -> "Pipe":
        """The other end's name is a PipeServer's. Raises OSError when nobody is there."""
        unconnected = socket.socket(socket.AF_UNIX)
        try:
            unconnected.connect(f"\0{name}")
        except OSError:
            unconnected.close()
            raise
        return cls(unconnected, max_bytes=max_bytes)

    def send(self, parts: Sequence[Buffer], timeout_s: float | None = None) -> None:
        """Send the parts as one message, without joining them.

        Raises TimeoutError, ConnectionError when the peer is gone, or WireError for what it sends.
        """
        deadline = _deadline(timeout_s)
        views = [memoryview(part).cast("B") for part in parts]
        unsent = deque([memoryview(_LENGTH.pack(sum(map(len, views)))), *filter(len, views)])
        while unsent:
            try:
                num_sent = self._socket.sendmsg(unsent)
            except BlockingIOError:
                self._wait(select.POLLIN | select.POLLOUT, deadline)
                self._take()
                continue
            while unsent and num_sent >= len(unsent[0]):
                num_sent -= len(unsent.popleft())
            if num_sent:
                unsent[0] = unsent[0][num_sent:]
        self._spin_until = time.monotonic() + _SPIN_S

    def receive(self, timeout_s: float | None = None) -> memoryview:
        """The next message. Raises as `send` does."""
        self.wait(timeout_s)
        return self._arrived.popleft()

    def wait(self, timeout_s: float | None = None) -> None:
        """Until the next message is there whole. Raises as `send` does."""
        deadline = _deadline(timeout_s)
        spin_until = self._spin_until if deadline is None else min(self._spin_until, deadline)
        self._take()
        while not self._arrived:
            if self._is_soon and time.monotonic() < spin_until:
                os.sched_yield()
            else:
                self._wait(select.POLLIN, deadline)
            self._take()
        self._is_soon = time.monotonic() < self._spin_until

    def fileno(self) -> int:
        """Of a descriptor that can be read when more has arrived, or the peer is gone."""
        return self._socket.fileno()

    def close(self) -> None:
        """End the connection. From another thread too: whoever waits gets a ConnectionError."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def __del__(self) -> None:
        # not in `close`: another thread may still wait on the descriptor, which would be reused
        self._socket.close()

    def _wait(self, events: int, deadline: float | None) -> None:
        left_s = None if deadline is None else max(0.0, deadline - time.monotonic())
        self._poll.modify(self._socket, events)
        if not self._poll.poll(None if left_s is None else left_s * 1e3):
            raise TimeoutError("nothing came in time")

    def _take(self) -> None:
        """Take all that has arrived; blocks for nothing."""
        while True:
            try:
                num_bytes = self._socket.recv_into(self._rest)
            except BlockingIOError:
                return
            if num_bytes == 0:
                if self._arrived:
                    return  # these first; the next call ends here again
                raise ConnectionResetError("the peer has closed the connection")
            self._rest = self._rest[num_bytes:]
            while not self._rest:
                self._advance()
            if self._arrived and self._message is None:
                return

    def _advance(self) -> None:
        """The length, or the message, is complete."""
        if self._message is None:
            (num_bytes,) = _LENGTH.unpack(self._length)
            if not 0 < num_bytes <= self._max_bytes:
                raise WireError(
                    f"a message of {num_bytes:,} bytes; 1 to {self._max_bytes:,} may be"
                )
            # not a bytearray, which would be filled with zeros first
            self._message = np.empty(num_bytes, dtype=np.uint8).data
            self._rest = self._message
        else:
            self._arrived.append(self._message)
            self._message = None
            self._rest = memoryview(self._length)


class PipeServer:
    """Answers one message after the other, on a thread for each connection."""

    def __init__(
        self,
        answer: Callable[[memoryview], Sequence[Buffer]],
        *,
        max_bytes: int,
        max_connections: int,
    ) -> None:
        """answer: parts of the reply to a message; must not raise."""
        self.name = f"maestrale-{secrets.token_hex(16)}"
        self._answer = answer
        self._max_bytes = max_bytes
        self._max_connections = max_connections
        self._is_stopped = threading.Event()
        self._lock = threading.Lock()
        self._open: dict[Pipe, threading.Thread] = {}
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.bind(f"\0{self.name}")
        self._accepting = threading.Thread(target=self._accept, name="pipes", daemon=True)

    def start(self) -> None:
        """Take connections from now on."""
        self._socket.listen()
        self._accepting.start()

    def stop(self) -> None:
        """End all connections. An answer that is being computed is not waited for for long."""
        self._is_stopped.set()
        with suppress(OSError):  # it is stopped already
            self._socket.shutdown(socket.SHUT_RDWR)
        deadline = time.monotonic() + _STOP_GRACE_S
        self._accepting.join(_STOP_GRACE_S)
        self._socket.close()
        with self._lock:
            still_open = dict(self._open)
        for pipe in still_open:
            pipe.close()
        for thread in still_open.values():
            thread.join(max(0.0, deadline - time.monotonic()))

    def _accept(self) -> None:
        pause_s = _FIRST_PAUSE_S
        while True:
            try:
                connected, _ = self._socket.accept()
            except OSError as error:
                if self._is_stopped.is_set():
                    return
                logger.warning("no connection taken, again in %.2f s: %s", pause_s, error)
                self._is_stopped.wait(pause_s)
                pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
                continue
            pause_s = _FIRST_PAUSE_S
            try:
                self._admit(connected)
            except (OSError, RuntimeError) as error:
                logger.warning("refused a connection: %s", error)
                connected.close()

    def _admit(self, connected: socket.socket) -> None:
        """Serve a connection. Raises OSError, or RuntimeError when there can be no more threads."""
        pipe = Pipe(connected, max_bytes=self._max_bytes)
        thread = threading.Thread(target=self._serve, args=(pipe,), name="pipe", daemon=True)
        with self._lock:  # until the entry is there, which the thread removes at its end
            if len(self._open) >= self._max_connections:
                raise ConnectionRefusedError(f"{len(self._open)} are open")
            thread.start()
            self._open[pipe] = thread

    def _serve(self, pipe: Pipe) -> None:
        try:
            while True:
                pipe.send(self._answer(pipe.receive()), _SEND_TIMEOUT_S)
        except WireError as error:
            logger.warning("ended a connection: %s", error)
        except TimeoutError:
            logger.warning("ended a connection: no reply was taken for %.0f s", _SEND_TIMEOUT_S)
        except OSError:
            pass  # the peer has hung up, or `stop` has
        finally:
            pipe.close()
            with self._lock:
                del self._open[pipe]


def _deadline(timeout_s: float | None) -> float | None:
    return None if timeout_s is None else time.monotonic() + timeout_s

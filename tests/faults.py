"""Faults on purpose: processes killed or paused, connections cut, stalled or slow, weights corrupt.

Processes are found below one that the test has started, and ended by their ids: on a machine that
others use too, a name alone may be somebody else's.
"""

import contextlib
import os
import queue
import shutil
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil
import torch
from torch import Tensor

from model.tensor_files import SafetensorsFile

# --- processes ---

CONTROLLER = "maestrale:Controller"
"""Its class as `actors` takes it: Serve has a controller, too."""


def descendants(root: int) -> list[psutil.Process]:
    """All processes below this one."""
    return psutil.Process(root).children(recursive=True)


def actors(root: int, kind: str) -> list[int]:
    """Process ids of Ray's actors and Serve's replicas of a class, below `root`, ascending.

    kind: name of the class, such as HeadReplica; Ray shows it in the process's title.
    """
    found = []
    for process in descendants(root):
        with contextlib.suppress(psutil.NoSuchProcess):
            if kind in "".join(process.cmdline()[:1]):
                found.append(process.pid)
    return sorted(found)


def oldest(root: int, kind: str) -> Callable[[], int | None]:
    """Picks the actor of a class that has lived longest: the one that most depends on."""

    def pick() -> int | None:
        pids = actors(root, kind)
        return min(pids, key=lambda pid: psutil.Process(pid).create_time(), default=None)

    return pick


def listener(root: int, address: str) -> int:
    """Id of the process below `root` that listens at HOST:PORT, as a worker's report names it."""
    port = int(address.rsplit(":", 1)[1])
    for process in descendants(root):
        with contextlib.suppress(psutil.NoSuchProcess):
            for connection in process.net_connections("tcp"):
                if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port:
                    return process.pid
    raise AssertionError(f"no process below {root} listens at {address}")


def kill(pid: int) -> None:
    """kill -9: no destructor, no last word."""
    os.kill(pid, signal.SIGKILL)


def pause(pid: int) -> None:
    """SIGSTOP, for good. The kernel still takes its bytes; nobody answers."""
    os.kill(pid, signal.SIGSTOP)


def kill_all(root: int) -> None:
    """The same for a process and all below it."""
    doomed = [psutil.Process(root), *descendants(root)]
    for process in doomed:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


@contextmanager
def paused(pid: int) -> Iterator[None]:
    """`pause` inside, SIGCONT at the end."""
    pause(pid)
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


@contextmanager
def killing(
    pick: Callable[[], int | None], every_s: float, how: Callable[[int], None] = kill
) -> Iterator[list[int]]:
    """Inside, do that to what `pick` names every so often; None spares it this time.

    Yields the ids killed so far. An error of `pick` is raised at the end.
    """
    killed: list[int] = []
    errors: list[Exception] = []
    is_over = threading.Event()

    def run() -> None:
        try:
            while not is_over.wait(every_s):
                pid = pick()
                if pid is not None:
                    how(pid)
                    killed.append(pid)
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=run, name="killer", daemon=True)
    thread.start()
    try:
        yield killed
    finally:
        is_over.set()
        thread.join()
    if errors:
        raise errors[0]


# --- connections ---


class Proxy:
    """Stands between a client and `target`: passes bytes on, late if told to.

    Threads: one accepts, two carry each direction of a connection.
    """

    def __init__(self, target: str, *, delay_s: float = 0.0) -> None:
        """delay_s: how late every byte arrives, each way. Costs no throughput."""
        host, port = target.rsplit(":", 1)
        self._target = (host, int(port))
        self._delay_s = delay_s
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.num_cut = 0
        """Connections that `cut` has ended, without those that had ended before."""
        self._open: list[tuple[socket.socket, socket.socket]] = []
        self._ended: set[socket.socket] = set()
        self._is_over = False
        self._changing = threading.Lock()  # of what is open, and whether all is over
        self._flows = threading.Event()
        self._flows.set()

    def __enter__(self) -> Self:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._flows.set()
        with self._changing:
            self._is_over = True
        # a plain close would leave the thread in accept, and the port open
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()

    def cut(self) -> None:
        """End all connections; new ones may come."""
        with self._changing:
            pairs, self._open = self._open, []
            self.num_cut += sum(self._ended.isdisjoint(pair) for pair in pairs)
            self._ended.clear()
        for each in chain.from_iterable(pairs):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()

    def stall(self) -> None:
        """Let no byte through any more, while all connections stay open."""
        self._flows.clear()

    def resume(self) -> None:
        """Let the bytes through again, those held back first."""
        self._flows.set()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                try:
                    server = socket.create_connection(self._target)
                except OSError:
                    client.close()  # as if nobody listened here either
                    continue
                server.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                with self._changing:
                    if self._is_over:
                        client.close()
                        server.close()
                        return
                    self._open.append((client, server))
                for source, sink in ((client, server), (server, client)):
                    late: queue.SimpleQueue[tuple[float, bytes]] = queue.SimpleQueue()
                    for carry, end in ((self._take, source), (self._give, sink)):
                        threading.Thread(target=carry, args=(end, late), daemon=True).start()

    def _take(self, source: socket.socket, late: queue.SimpleQueue[tuple[float, bytes]]) -> None:
        data = b"."
        while data:
            try:
                data = source.recv(65536)
            except OSError:
                data = b""
            late.put((time.monotonic() + self._delay_s, data))

    def _give(self, sink: socket.socket, late: queue.SimpleQueue[tuple[float, bytes]]) -> None:
        with contextlib.suppress(OSError):
            while True:
                due, data = late.get()
                time.sleep(max(0.0, due - time.monotonic()))
                self._flows.wait()
                if not data:
                    self._ended.add(sink)
                    sink.shutdown(socket.SHUT_RDWR)
                    return
                sink.sendall(data)


# --- weights ---


def corrupt_copy(source: Path, target: Path, tensor: str, *, byte: int = 0) -> Path:
    """Copy a checkpoint of one safetensors file; one bit of a tensor is not what it was.

    tensor: its name. byte: which of its bytes, from 0, negative from its end; its lowest bit flips.
    Returns `target`.
    """
    shutil.copytree(source, target, dirs_exist_ok=True)
    path = target / "model.safetensors"
    stored = SafetensorsFile(path).tensors[tensor]
    at = stored.begin + range(stored.num_bytes)[byte]
    with path.open("r+b") as file:
        file.seek(at)
        (value,) = file.read(1)
        file.seek(at)
        file.write(bytes([value ^ 1]))
    return target


def corrupt(tensor: Tensor, *, byte: int = 0, bit: int = 0) -> None:
    """Flip one bit of a contiguous tensor in memory, in place."""
    tensor.view(-1).view(torch.uint8)[byte] ^= 1 << bit


@contextmanager
def slow_disk(delay_s: float) -> Iterator[None]:
    """Inside, every read of a tensor of a safetensors file by this process takes so much longer."""
    read = SafetensorsFile.read

    def slowly(self: SafetensorsFile, name: str, offset: int, out: Tensor) -> None:
        time.sleep(delay_s)
        read(self, name, offset, out)

    SafetensorsFile.read = slowly  # type: ignore[method-assign]
    try:
        yield
    finally:
        SafetensorsFile.read = read  # type: ignore[method-assign]

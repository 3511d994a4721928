"""A link to a worker ends when its worker is gone or late, and not otherwise."""

import queue
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.head.links import GrpcLink, LinkLostError, PipeLink


def pipe_to_a_worker() -> tuple[PipeLink, socket.socket]:
    """A link, and the worker's end of it."""
    name = f"maestrale-test-{secrets.token_hex(8)}"
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(f"\0{name}")
        listening.listen()
        link = PipeLink(name)
        worker, _ = listening.accept()
    return link, worker


def test_nothing_follows_a_message_that_was_cut_off() -> None:
    link, worker = pipe_to_a_worker()
    with worker:
        worker.setblocking(False)
        link.send((bytes(64 * 2**20),), overdue_at=0.0)
        with suppress(BlockingIOError):
            while worker.recv(2**20):
                pass
        link.send((b"next",), overdue_at=time.monotonic() + 5)
        with pytest.raises(BlockingIOError):
            worker.recv(1)
        with pytest.raises(LinkLostError, match="could not be asked"):
            link.receive(time.monotonic() + 5, "a test")
        link.close()


class Answers:
    """A worker's stream; whether a read was in progress when it was cancelled."""

    def __init__(self) -> None:
        self.ready: queue.SimpleQueue[bytes | Exception] = queue.SimpleQueue()
        self.has_returned = threading.Event()
        self.cancelled_late: list[bool] = []

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        ready = self.ready.get(timeout=10)
        if isinstance(ready, Exception):
            raise ready
        return ready

    def cancel(self) -> None:
        self.cancelled_late.append(self.has_returned.is_set())


def test_no_read_is_cancelled_for_the_lateness_of_the_one_before() -> None:
    """The answer comes while the keeper finds it overdue."""
    answers = Answers()
    channel: Any = SimpleNamespace(
        stream_stream=lambda method: lambda calls: answers, close=lambda: None
    )
    link = GrpcLink(channel)

    class Deadline(float):
        def __lt__(self, now: float) -> bool:
            """Asked by `watch`; meanwhile the reader does what it can."""
            answers.ready.put(b"answer")
            answers.has_returned.wait(0.2)
            return super().__lt__(now)

    def read() -> None:
        assert link.receive(Deadline(0.0), "a test") == b"answer"
        answers.has_returned.set()

    reader = threading.Thread(target=read)
    reader.start()
    while not answers.cancelled_late:
        link.watch(time.monotonic())
    reader.join(10)
    assert answers.has_returned.is_set()
    assert answers.cancelled_late == [False]
    link.close()


def test_an_answer_by_grpc_can_be_waited_for_by_time() -> None:
    """And what ends the stream is told after all that came before it."""
    answers = Answers()
    channel: Any = SimpleNamespace(
        stream_stream=lambda method: lambda calls: answers, close=lambda: None
    )
    link = GrpcLink(channel)
    assert not link.wait(0.0)
    far = time.monotonic() + 10
    answers.ready.put(b"one")
    assert link.wait(far)
    answers.ready.put(b"two")
    assert [link.receive(far, "a test"), link.receive(far, "a test")] == [b"one", b"two"]
    assert not link.wait(0.0)
    answers.ready.put(StopIteration())
    for _ in range(2):
        assert link.wait(far)
        with pytest.raises(LinkLostError, match="stream ended"):
            link.receive(far, "a test")
    link.close()


def test_an_answer_by_pipe_can_be_waited_for_by_time() -> None:
    link, worker = pipe_to_a_worker()
    far = time.monotonic() + 10
    worker.send(bytes([3]) + bytes(7) + b"o")
    assert not link.wait(0.0)  # not whole yet
    worker.send(b"ne")
    assert link.wait(far)
    assert link.receive(far, "a test") == b"one"
    worker.send(bytes(8))  # no message is empty
    for _ in range(2):
        assert link.wait(far)
        with pytest.raises(LinkLostError, match="a message of 0 bytes"):
            link.receive(far, "a test")
    worker.close()
    link.close()

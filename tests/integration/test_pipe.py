"""Messages over a Unix socket arrive whole, in order, or the reason why not does."""

import errno
import os
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from queue import SimpleQueue

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster import pipe as pipe_module
from cluster.errors import WireError
from cluster.pipe import Buffer, Pipe, PipeServer

MAX_BYTES = 32 * 2**20


def echo(message: bytearray) -> Sequence[Buffer]:
    return [message[:1], memoryview(message)[1:]]


@contextmanager
def serving(
    answer: Callable[[bytearray], Sequence[Buffer]] = echo, max_connections: int = 4
) -> Iterator[PipeServer]:
    server = PipeServer(answer, max_bytes=MAX_BYTES, max_connections=max_connections)
    server.start()
    try:
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="module")
def server() -> Iterator[PipeServer]:
    with serving() as server:
        yield server


def connect(server: PipeServer) -> Pipe:
    return Pipe.connect(server.name, max_bytes=MAX_BYTES)


def pair() -> tuple[Pipe, socket.socket]:
    ours, theirs = socket.socketpair()
    return Pipe(ours, max_bytes=MAX_BYTES), theirs


@settings(deadline=None, max_examples=50)
@given(st.lists(st.lists(st.binary(max_size=5_000), min_size=1), min_size=1, max_size=5))
def test_messages_come_back_whole_and_in_order(
    server: PipeServer, messages: list[list[bytes]]
) -> None:
    messages = [[b"first", *parts] for parts in messages]
    pipe = connect(server)
    for parts in messages:
        pipe.send(parts, timeout_s=5)
    assert [pipe.receive(timeout_s=5) for _ in messages] == [b"".join(m) for m in messages]
    pipe.close()


def test_both_ends_may_send_more_than_the_kernel_holds(server: PipeServer) -> None:
    large = os.urandom(24 * 2**20)
    pipe = connect(server)
    for _ in range(3):  # without a reader in between
        pipe.send([large], timeout_s=30)
    assert all(pipe.receive(timeout_s=30) == large for _ in range(3))
    pipe.close()


@given(st.integers(1, 40))
@settings(deadline=None, max_examples=20)
def test_a_message_in_pieces_is_put_together(size_of_piece: int) -> None:
    pipe, peer = pair()
    message = bytes(range(50))
    framed = 2 * (struct.pack("<Q", len(message)) + message)
    for begin in range(0, len(framed), size_of_piece):
        peer.send(framed[begin : begin + size_of_piece])
    assert [pipe.receive(1), pipe.receive(1)] == [message, message]
    peer.close()


def test_what_came_before_the_end_is_still_received() -> None:
    pipe, peer = pair()
    peer.send(struct.pack("<Q", 3) + b"yes")
    peer.close()
    assert pipe.receive(1) == b"yes"
    with pytest.raises(ConnectionError):
        pipe.receive(1)


def test_a_silent_peer_runs_into_the_deadline() -> None:
    pipe, peer = pair()
    with pytest.raises(TimeoutError):
        pipe.receive(timeout_s=0.01)
    with pytest.raises(TimeoutError):
        pipe.send([bytes(64 * 2**20)], timeout_s=0.01)
    peer.close()


@pytest.mark.parametrize("length", [0, MAX_BYTES + 1, 2**64 - 1])
def test_a_length_out_of_bounds_is_refused_before_memory_is_taken(length: int) -> None:
    pipe, peer = pair()
    peer.send(struct.pack("<Q", length))
    with pytest.raises(WireError, match=f"{length:,}"):
        pipe.receive(1)
    peer.close()


def test_closing_wakes_whoever_waits() -> None:
    pipe, peer = pair()
    threading.Timer(0.05, pipe.close).start()
    with pytest.raises(ConnectionError):
        pipe.receive()
    peer.close()


def test_nobody_is_behind_an_unknown_name() -> None:
    with pytest.raises(OSError, match="refused"):
        Pipe.connect("maestrale-of-another-host", max_bytes=1)


def test_another_users_process_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving() as server:
        monkeypatch.setattr(os, "getuid", lambda: 12_345)
        with pytest.raises(PermissionError, match="12345"):
            connect(server)


def test_a_refused_end_goes_without_a_complaint(monkeypatch: pytest.MonkeyPatch) -> None:
    complaints: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", complaints.append)
    monkeypatch.setattr(os, "getuid", lambda: 12_345)
    ours, theirs = socket.socketpair()
    with suppress(PermissionError):
        Pipe(ours, max_bytes=MAX_BYTES)
    assert theirs.recv(1) == b""
    assert not complaints
    theirs.close()


def test_a_server_bounds_its_connections_and_takes_new_ones_for_old() -> None:
    with serving(max_connections=1) as server:
        first, second = connect(server), connect(server)
        first.send([b"hello"], 5)
        assert first.receive(5) == b"hello"
        with pytest.raises(ConnectionError):
            second.receive(5)
        first.close()
        third = _connected_at_last(server)
        assert third.receive(5) == b"hello"


def _connected_at_last(server: PipeServer) -> Pipe:
    """The server frees a place as soon as its thread has seen the end of the old connection."""
    for _ in range(1_000):
        pipe = connect(server)
        try:
            pipe.send([b"hello"], 5)
            message = pipe.receive(5)
        except ConnectionError:
            continue
        assert message == b"hello"
        pipe.send([b"hello"], 5)
        return pipe
    raise AssertionError("no place became free")


def test_a_bad_message_ends_its_connection_alone() -> None:
    with serving() as server:
        good, bad = connect(server), socket.socket(socket.AF_UNIX)
        bad.connect(f"\0{server.name}")
        bad.send(struct.pack("<Q", 2**63))
        assert bad.recv(1) == b""
        good.send([b"hello"], 5)
        assert good.receive(5) == b"hello"
        bad.close()


def refuse_once(
    monkeypatch: pytest.MonkeyPatch, owner: type, method: str, error: Exception
) -> None:
    """Have the next call of a method fail, whoever makes it."""
    works = getattr(owner, method)

    def fails(self: object, *args: object) -> object:
        monkeypatch.setattr(owner, method, works)
        raise error

    monkeypatch.setattr(owner, method, fails)


def assert_echoes(server: PipeServer) -> None:
    pipe = connect(server)
    pipe.send([b"hello"], 5)
    assert pipe.receive(5) == b"hello"
    pipe.close()


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOMEM])
def test_a_server_takes_connections_again_once_there_are_descriptors(
    number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_once(monkeypatch, socket.socket, "accept", OSError(number, os.strerror(number)))
    with serving() as server:
        assert_echoes(server)


@pytest.mark.parametrize(
    ("owner", "method", "error"),
    [
        (socket.socket, "setblocking", OSError("no buffers")),
        (threading.Thread, "start", RuntimeError("can't start new thread")),
    ],
    ids=["no socket", "no thread"],
)
def test_a_connection_that_cannot_be_served_ends_alone(
    owner: type, method: str, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(max_connections=1) as server:
        refused = socket.socket(socket.AF_UNIX)
        refuse_once(monkeypatch, owner, method, error)
        refused.connect(f"\0{server.name}")
        assert refused.recv(1) == b""
        refused.close()
        assert not server._open
        assert_echoes(server)


def test_a_peer_that_takes_no_reply_loses_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.pipe._SEND_TIMEOUT_S", 0.05)
    threads: SimpleQueue[threading.Thread] = SimpleQueue()

    def answer(message: bytearray) -> Sequence[Buffer]:
        threads.put(threading.current_thread())
        return [bytes(MAX_BYTES)]

    with serving(answer) as server:
        stopped = connect(server)
        stopped.send([b"hello"], 5)
        threads.get(timeout=5).join(10)
        assert not server._open
        with pytest.raises(ConnectionError):
            stopped.receive(5)


def test_all_answers_together_hold_up_the_end_for_one_grace_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    may_answer, asked = threading.Event(), threading.Semaphore(0)

    def answer(message: bytearray) -> Sequence[Buffer]:
        asked.release()
        may_answer.wait()
        return [message]

    now = 0.0

    def join(thread: threading.Thread, timeout: float) -> None:
        nonlocal now
        now += timeout

    with serving(answer) as server:
        pipes = [connect(server) for _ in range(4)]
        for pipe in pipes:
            pipe.send([b"hello"], 5)
            asked.acquire()
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "join", join)
            patch.setattr(time, "monotonic", lambda: now)
            server.stop()
        may_answer.set()
    assert now <= pipe_module._STOP_GRACE_S


def test_a_stopped_server_has_hung_up_and_left_no_thread() -> None:
    before = set(threading.enumerate())
    with serving() as server:
        pipe = connect(server)
        pipe.send([b"hello"], 5)
        assert pipe.receive(5) == b"hello"
    with pytest.raises(ConnectionError):
        pipe.receive(5)
    with pytest.raises(OSError, match="refused"):
        connect(server)
    assert set(threading.enumerate()) <= before


def test_what_came_soon_is_looked_for_the_next_time_and_what_took_long_is_slept_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ours, theirs = pair()
    num_looks = 0

    def send_at_first_look() -> None:
        nonlocal num_looks
        num_looks += 1
        if num_looks == 1:
            theirs.sendall(struct.pack("<Q", 1) + b"b")

    monkeypatch.setattr(os, "sched_yield", send_at_first_look)
    monkeypatch.setattr(pipe_module, "_SPIN_S", 60.0)
    ours.send([b"question"])
    theirs.sendall(struct.pack("<Q", 1) + b"a")
    assert ours.receive(5) == b"a"  # nothing is known of its time yet
    assert num_looks == 0
    ours.send([b"question"])
    assert ours.receive(5) == b"b"
    assert num_looks >= 1
    monkeypatch.setattr(pipe_module, "_SPIN_S", 0.0)
    ours.send([b"question"])
    theirs.sendall(struct.pack("<Q", 1) + b"c")
    assert ours.receive(5) == b"c"  # too late by now
    monkeypatch.setattr(pipe_module, "_SPIN_S", 60.0)
    num_looks = 1
    ours.send([b"question"])
    with pytest.raises(TimeoutError):
        ours.receive(0.01)
    assert num_looks == 1
    theirs.close()

"""A link to a worker that cannot be asked stays lost, and sends nothing more."""

import secrets
import socket
import time
from contextlib import suppress

import pytest

from cluster.head.links import LinkLostError, PipeLink


def test_nothing_follows_a_message_that_was_cut_off() -> None:
    name = f"maestrale-test-{secrets.token_hex(8)}"
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(f"\0{name}")
        listening.listen()
        link = PipeLink(name)
        worker, _ = listening.accept()
    with worker:
        worker.setblocking(False)
        link.send(bytes(64 * 2**20), overdue_at=0.0)
        with suppress(BlockingIOError):
            while worker.recv(2**20):
                pass
        link.send(b"next", overdue_at=time.monotonic() + 5)
        with pytest.raises(BlockingIOError):
            worker.recv(1)
        with pytest.raises(LinkLostError, match="could not be asked"):
            link.receive(time.monotonic() + 5, "a test")
        link.close()

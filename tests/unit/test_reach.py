"""Who is cut off, and who has only lost one of the others."""

import asyncio

import pytest

from cluster import reach
from cluster.reach import is_cut_off

OWN = "10.0.0.1"


class Connection:
    """As much of a stream's writer as is used."""

    num_open = 0

    def __init__(self) -> None:
        Connection.num_open += 1

    def close(self) -> None:
        Connection.num_open -= 1

    async def wait_closed(self) -> None:
        raise ConnectionResetError


@pytest.fixture(autouse=True)
def _network(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first part of an address says what comes of a connection to it."""

    async def connect(host: str, port: int) -> tuple[None, Connection]:
        if host.startswith("silent"):
            await asyncio.Event().wait()
        if host.startswith("refuses"):
            raise ConnectionRefusedError
        if host.startswith("no-route"):
            raise OSError(113, "No route to host")
        return None, Connection()

    monkeypatch.setattr(asyncio, "open_connection", connect)
    monkeypatch.setattr(reach, "CONNECT_TIMEOUT_S", 0.001)


@pytest.mark.parametrize(
    ("addresses", "is_so"),
    [
        ([], False),
        ([f"{OWN}:1", f"{OWN}:2"], False),  # one host, no network to be cut off from
        (["silent:1", f"{OWN}:1"], True),
        (["silent:1", "no-route:2"], True),
        (["silent:1", "answers:2"], False),
        (["refuses:1", "silent:2"], False),  # its process is gone, its host is not
    ],
)
def test_who_reaches_nobody_on_other_hosts_is_cut_off(addresses: list[str], is_so: bool) -> None:
    assert asyncio.run(is_cut_off(OWN, addresses)) == is_so
    assert Connection.num_open == 0


def test_the_brackets_of_an_ipv6_address_are_no_part_of_its_host() -> None:
    assert not asyncio.run(is_cut_off("fd00::1", ["[fd00::1]:1"]))
    assert asyncio.run(is_cut_off("fd00::1", ["[silent::2]:1"]))

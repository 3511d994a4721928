"""Where the processes of the data plane listen, and how they know each other. Opens nothing."""

from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Literal

THE_NODES_OWN = "node"
"""As a data_plane_host: each process listens on the address by which Ray knows its node."""


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address. Raises ValueError if it is no IP address."""
    address = ip_address(host)
    mapped = getattr(address, "ipv4_mapped", None)
    return bool((mapped or address).is_loopback)


@dataclass(frozen=True)
class Network:
    """Where heads and workers listen, and how they know their peers: see ServeConfig's fields."""

    host: str = "127.0.0.1"
    tls_folder: Path | None = None
    cluster_token_from: Path | Literal["environment"] | None = None
    allow_plaintext: bool = False


def listen_host(data_plane_host: str, node_address: str) -> str:
    """Where a process listens that runs on the node of this address."""
    return node_address if data_plane_host == THE_NODES_OWN else data_plane_host

"""What is looked at before a server listens, on IPv4 and IPv6."""

import socket

import pytest

from cluster.app import check_port, free_port
from cluster.errors import ConfigurationError


def has_ipv6_loopback() -> bool:
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            return True
    except OSError:
        return False


needs_ipv6 = pytest.mark.skipif(not has_ipv6_loopback(), reason="this machine has no ::1")
EITHER = pytest.mark.parametrize("host", ["127.0.0.1", pytest.param("::1", marks=needs_ipv6)])


@EITHER
def test_a_free_port_is_one_to_listen_on(host: str) -> None:
    check_port(host, free_port(host), "--port")


@EITHER
def test_a_port_that_is_taken_is_refused_with_the_flag_that_helps(host: str) -> None:
    is_ipv6 = ":" in host
    family = socket.AF_INET6 if is_ipv6 else socket.AF_INET
    with socket.create_server((host, 0), family=family) as other:
        port = other.getsockname()[1]
        with pytest.raises(ConfigurationError, match="choose another with --grpc-port") as refused:
            check_port(host, port, "--grpc-port")
    shown = f"[{host}]:{port}" if is_ipv6 else f"{host}:{port}"
    assert f"cannot listen on {shown}: " in str(refused.value)

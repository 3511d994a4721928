"""Connections are cut as the proxy says."""

import socket

from tests import faults


def test_only_connections_that_live_are_cut() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with faults.Proxy(f"127.0.0.1:{port}") as proxy:
            address = ("127.0.0.1", int(proxy.address.rsplit(":", 1)[1]))
            gone = socket.create_connection(address, timeout=10)
            with server.accept()[0] as end:
                gone.close()
                end.settimeout(10)
                assert end.recv(1) == b""
            with socket.create_connection(address, timeout=10) as alive, server.accept()[0] as end:
                end.sendall(b".")
                assert alive.recv(1) == b"."
                proxy.cut()
                assert alive.recv(1) == b""
            assert proxy.num_cut == 1

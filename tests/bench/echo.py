"""Which gRPC stream is fastest for one call at a time: blocking or asyncio, TCP or Unix socket?

Two server processes that echo raw bytes over a bidirectional stream, one blocking, one asyncio;
blocking and asyncio clients in this process. The asyncio client runs its loop only while it waits,
as an engine thread would. Round trips in microseconds. Prints one table for RESULTS.md.

    python -m tests.bench.echo
"""

import asyncio
import queue
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
from rich.console import Console
from rich.table import Table

from cluster.rpc import CHANNEL_OPTIONS

SIZES = (400, 8_192, 262_144)
NUM_ROUND_TRIPS = 1_000
METHOD = "/bench.Echo/Echo"


def main() -> None:
    if len(sys.argv) == 3:
        serve(kind=sys.argv[1], socket=sys.argv[2])
        return
    table = Table(title="round trip of one message, p50 / p90, us")
    for heading in ("bytes", "server", "transport", "blocking client", "asyncio client"):
        table.add_column(heading, justify="right")
    with tempfile.TemporaryDirectory() as folder:
        servers = {kind: start(kind, Path(folder) / kind) for kind in ("blocking", "asyncio")}
        try:
            for size in SIZES:
                for kind, (_, addresses) in servers.items():
                    for address in addresses:
                        transport = "unix" if address.startswith("unix:") else "tcp"
                        times = (blocking(address, size), with_asyncio(address, size))
                        table.add_row(str(size), kind, transport, *times)
        finally:
            for process, _ in servers.values():
                process.kill()
    Console().print(table)


def start(kind: str, socket: Path) -> tuple[subprocess.Popen[str], list[str]]:
    """An echo server in a process of its own, and its two addresses."""
    command = [sys.executable, "-m", "tests.bench.echo", kind, f"unix:{socket}"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, [f"127.0.0.1:{process.stdout.readline().strip()}", command[-1]]


def serve(*, kind: str, socket: str) -> None:
    def handler(messages: Iterator[bytes], _context: Any) -> Iterator[bytes]:
        yield from messages

    async def async_handler(messages: AsyncIterator[bytes], _context: Any) -> AsyncIterator[bytes]:
        async for message in messages:
            yield message

    def generic(echo: Any) -> grpc.GenericRpcHandler:
        method = grpc.stream_stream_rpc_method_handler(echo)
        return grpc.method_handlers_generic_handler("bench.Echo", {"Echo": method})

    async def serve_async() -> None:
        server = grpc.aio.server(options=CHANNEL_OPTIONS)
        server.add_generic_rpc_handlers((generic(async_handler),))
        print(server.add_insecure_port("127.0.0.1:0"), flush=True)
        server.add_insecure_port(socket)
        await server.start()
        await server.wait_for_termination()

    if kind == "asyncio":
        asyncio.run(serve_async())
    server = grpc.server(ThreadPoolExecutor(4), options=CHANNEL_OPTIONS)
    server.add_generic_rpc_handlers((generic(handler),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.add_insecure_port(socket)
    server.start()
    print(port, flush=True)
    server.wait_for_termination()


def blocking(address: str, size: int) -> str:
    message, outgoing = b"x" * size, queue.SimpleQueue[bytes | None]()
    with grpc.insecure_channel(address, options=CHANNEL_OPTIONS) as channel:
        replies = channel.stream_stream(METHOD)(iter(outgoing.get, None))

        def round_trip() -> None:
            outgoing.put(message)
            next(replies)

        result = percentiles(round_trip)
        outgoing.put(None)
    return result


def with_asyncio(address: str, size: int) -> str:
    message = b"x" * size
    with asyncio.Runner() as runner:

        async def connect() -> Any:
            channel = grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
            return channel, channel.stream_stream(METHOD)()

        channel, stream = runner.run(connect())

        async def exchange() -> None:
            await stream.write(message)
            await stream.read()

        result = percentiles(lambda: runner.run(exchange()))
        runner.run(channel.close())
    return result


def percentiles(round_trip: Callable[[], None]) -> str:
    times = []
    for _ in range(NUM_ROUND_TRIPS + 100):
        started = time.perf_counter()
        round_trip()
        times.append(time.perf_counter() - started)
    times = sorted(times[100:])
    p50, p90 = times[len(times) // 2], times[len(times) * 9 // 10]
    return f"{p50 * 1e6:.0f} / {p90 * 1e6:.0f}"


if __name__ == "__main__":
    main()

"""Who hears from nobody on other hosts may be the one who is cut off. Knows TCP, nothing above."""

import asyncio
from collections.abc import Iterable
from contextlib import suppress

CONNECT_TIMEOUT_S = 1.0


async def is_cut_off(own_host: str, addresses: Iterable[str]) -> bool:
    """Whether some of these HOST:PORT are on other hosts than this, and none of those is reached.

    A process that hangs is reached, since the kernel takes connections for it, and so is the host
    of one that has ended, since it refuses them.
    """
    ends = [address.rpartition(":")[::2] for address in addresses]
    elsewhere = [(host.strip("[]"), int(port)) for host, port in ends]
    checks = [_is_reached(host, port) for host, port in elsewhere if host != own_host]
    return bool(checks) and not any(await asyncio.gather(*checks))


async def _is_reached(host: str, port: int) -> bool:
    try:
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            _, writer = await asyncio.open_connection(host, port)
    except ConnectionRefusedError:
        return True
    except OSError:  # TimeoutError is one
        return False
    writer.close()
    with suppress(OSError):
        await writer.wait_closed()
    return True

"""Clients that hang up before they are answered, and what a service has in hand afterwards."""

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from cluster.client import Client

IDLE = {
    "maestrale_requests_in_progress": 0,
    "maestrale_sequences_running": 0,
    "maestrale_sequences_waiting": 0,
    "blocks in use": 0,
}
"""What `in_hand` tells of a service that nobody asks."""
LONG_CHARS = 1_200
"""Of a story, that is: most of the tiny model's context."""
_PART_BYTES = 1 << 16


@dataclass(frozen=True)
class Leaver:
    """How a client left. num_parts: of the answer, that had come."""

    num_parts: int
    is_over: bool
    """It was answered to the end, or refused, before it could leave."""


def bodies(stories: Sequence[str], count: int) -> list[dict[str, Any]]:
    """As many requests: by turns streamed and plain, two with a long prompt, two with a short one.

    Each asks for more tokens than can have come when it is left.
    """
    made: list[dict[str, Any]] = []
    for number in range(count):
        story = stories[number % len(stories)]
        is_long = number % 4 < 2
        # a beginning of its own, so that no prompt is found in the cache
        prompt = f"{number} {' '.join([story] * 4)[:LONG_CHARS]}" if is_long else f"{number} times"
        made.append(
            {
                "prompt": prompt,
                "truncate_prompt_tokens": 400,
                "max_tokens": 100 if is_long else 480,
                "temperature": 0,
                "ignore_eos": True,
                "stream": number % 2 == 0,
            }
        )
    return made


def ask_and_leave(
    url: str, bodies: Sequence[dict[str, Any]], after_s: float, at_once: int
) -> list[Leaver]:
    """Ask on a connection for each, so many at a time, and hang up so long after having asked."""
    address = urlsplit(url)

    async def ask(places: asyncio.Semaphore, body: dict[str, Any]) -> Leaver:
        num_parts = 0
        async with places:
            # no HTTP client: hundreds of those are slower than what they ask
            reader, writer = await asyncio.open_connection(address.hostname, address.port)
            try:
                writer.write(_posted(address.netloc, body))
                async with asyncio.timeout(after_s):
                    while await reader.read(_PART_BYTES):
                        num_parts += 1
            except TimeoutError:
                return Leaver(num_parts, is_over=False)
            finally:
                writer.close()
        return Leaver(num_parts, is_over=True)

    async def ask_all() -> list[Leaver]:
        places = asyncio.Semaphore(at_once)
        return await asyncio.gather(*(ask(places, body) for body in bodies))

    return asyncio.run(ask_all())


def _posted(host: str, body: dict[str, Any]) -> bytes:
    content = json.dumps(body).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    )
    return head.encode() + content


def in_hand(client: Client) -> dict[str, float]:
    """Requests, sequences and blocks that the service holds, over all its processes."""
    samples = client.cluster.metrics()

    def total(name: str) -> float:
        return sum(sample.value for sample in samples if sample.name == name)

    held = {name: total(name) for name in IDLE if name.startswith("maestrale_")}
    held["blocks in use"] = total("maestrale_kv_blocks") - total("maestrale_kv_blocks_free")
    return held

"""Which head a request should go to: by load, room and what is computed there already. Pure."""

import hashlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

BLOCK_TOKENS = 16
"""Grain of prefixes here. Heads share by their own blocks; a difference costs a guess, no more."""

TOKENS_PER_REQUEST = 64
"""A request in progress at a head weighs as much as so many tokens to compute: about what a typical
answer has still to come. So 64 tokens of a shared beginning make up for one more neighbour."""

MAX_REMEMBERED = 65_536
"""Blocks of a head that are remembered, at most: a million tokens, some 10 MB."""


@dataclass(frozen=True)
class Standing:
    """How a head stands towards one request.

    num_requests, num_waiting: there now, of all ingresses; those that wait are among them.
    num_free_tokens: for which its KV cache has room.
    num_shared:      tokens of the request's beginning that it has computed.
    """

    num_requests: int
    num_waiting: int
    num_free_tokens: int
    num_shared: int


def cost(standing: Standing, num_tokens: int) -> tuple[bool, int]:
    """What a request of so many known tokens would cost there; the head with the least is chosen.

    A head without room for it comes after all that have room. Then counts, in tokens, what must be
    computed for it and what others are in its way; one that waits has also its prompt to compute.
    """
    num_to_compute = num_tokens - standing.num_shared
    num_in_the_way = standing.num_requests + standing.num_waiting
    return (
        num_to_compute > standing.num_free_tokens,
        num_to_compute + TOKENS_PER_REQUEST * num_in_the_way,
    )


def block_keys(token_ids: Sequence[int], cache_salt: str) -> list[bytes]:
    """A name for each full block of tokens and all before it. Other salts give other names."""
    key = hashlib.blake2b(cache_salt.encode(), digest_size=16).digest()
    keys = []
    for end in range(BLOCK_TOKENS, len(token_ids) + 1, BLOCK_TOKENS):
        block = array("I", token_ids[end - BLOCK_TOKENS : end]).tobytes()
        key = hashlib.blake2b(key + block, digest_size=16).digest()
        keys.append(key)
    return keys


class PrefixMemory:
    """Which beginnings a head has computed lately, as far as this ingress has sent them there."""

    def __init__(self, num_tokens: int) -> None:
        """num_tokens: that the head's KV cache holds; it has forgotten what is older."""
        self._max_blocks = min(num_tokens // BLOCK_TOKENS, MAX_REMEMBERED)
        self._keys: dict[bytes, None] = {}
        """An ordered set: the first to be forgotten comes first."""

    def __len__(self) -> int:
        return len(self._keys)

    def remember(self, keys: Sequence[bytes]) -> None:
        """The head has, or is about to compute, these blocks of one sequence, in its order.

        The last is forgotten first: it is worth nothing without those before it.
        """
        for key in reversed(keys):
            self._keys.pop(key, None)
            self._keys[key] = None
        while len(self._keys) > self._max_blocks:
            del self._keys[next(iter(self._keys))]

    def num_shared(self, keys: Sequence[bytes]) -> int:
        """Tokens from the start of a sequence with these blocks that are there."""
        num_blocks = 0
        for key in keys:
            if key not in self._keys:
                break
            num_blocks += 1
        return num_blocks * BLOCK_TOKENS

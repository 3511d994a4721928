"""Which tokens of a sequence need not be computed, since another sequence has computed them.

A block is named by a chain of hashes: its own tokens and all those before it. Full blocks are
shared as they are. The last, partly filled block of a prompt is copied, since both sequences go on
writing behind it. Pure: no clock, no I/O, no torch.
"""

import hashlib
from array import array
from collections.abc import Sequence as Ids
from dataclasses import dataclass

from cluster.head.sequence import Sequence
from model.blocks import BlockPool, Key


def chain(before: Key, token_ids: Ids[int]) -> Key:
    """The key of a block with these tokens that follows the block `before`.

    A cryptographic hash: a collision would show one user another's text.
    """
    return hashlib.blake2b(before + array("I", token_ids).tobytes(), digest_size=16).digest()


@dataclass(frozen=True)
class Match:
    """What is there of a sequence already.

    num_tokens:  of the sequence, from its start.
    shared:      full blocks, the first of them number `first` of the sequence; those before it
                 lie behind the sliding window, and are neither needed nor looked for.
    copied:      the block that holds the tokens after those, to be copied; None if there are none.
    """

    num_tokens: int
    shared: tuple[int, ...]
    first: int = 0
    copied: int | None = None


NOTHING = Match(0, ())


class PrefixCache:
    """Finds and names the contents of blocks. Owned by the scheduler, like the pool.

    Mutable state: contents that a running sequence is about to compute. Who needs one of them waits
    for it rather than compute it a second time.
    """

    def __init__(self, pool: BlockPool, sliding_window: int | None = None) -> None:
        self._pool = pool
        self._window = sliding_window
        self._expected: dict[Key, Sequence] = {}

    def match(self, sequence: Sequence) -> Match | None:
        """What can be reused of a sequence that has not begun; None: more in a moment.

        At least one token is left to compute, whose logits are wanted.
        """
        if sequence.params.prompt_logprobs is not None:
            return NOTHING  # all of the prompt's logits are wanted
        size = self._pool.block_size
        num_known = len(sequence.token_ids)
        keys = self._keys(sequence)
        num_full, first = self._longest(keys)
        if num_full < len(keys) and keys[num_full] in self._expected:
            return None
        shared = [self._found(key) for key in keys[first:num_full]]
        num_tokens, copied = num_full * size, None
        if num_full == len(keys) and num_known > num_tokens:
            tail = self._tail_key(sequence, num_known)
            if tail in self._expected:
                return None
            copied = self._pool.find(tail)
            num_tokens = num_tokens if copied is None else num_known
        if num_tokens == num_known:
            num_tokens -= 1
            copied = shared.pop() if copied is None else copied
        if num_tokens % size == 0:
            copied = None
        return Match(num_tokens, tuple(shared), min(first, num_tokens // size), copied)

    def begin(self, sequence: Sequence) -> None:
        """Expect what a sequence that starts now is going to compute of its known tokens."""
        for key in self._keys(sequence)[sequence.num_published :]:
            self._expected.setdefault(key, sequence)
        num_prompt = len(sequence.prompt_ids)
        # one that begins anew may find more than its prompt, whose tail is then of no interest
        sequence.has_published_prompt = sequence.num_computed >= num_prompt
        if not sequence.has_published_prompt and not self._is_full(num_prompt):
            self._expected.setdefault(self._tail_key(sequence, num_prompt), sequence)

    def publish(self, sequence: Sequence) -> None:
        """Let others find what a sequence has computed since it was last published."""
        table, size = sequence.table, self._pool.block_size
        num_full = sequence.num_computed // size
        if num_full > sequence.num_published:
            keys = self._keys(sequence)
            for index in range(sequence.num_published, num_full):
                self._publish(keys[index], table.blocks[index - table.first])
            sequence.num_published = num_full
        num_prompt = len(sequence.prompt_ids)
        if not sequence.has_published_prompt and sequence.num_computed >= num_prompt:
            sequence.has_published_prompt = True
            if not self._is_full(num_prompt):
                block = table.blocks[num_prompt // size - table.first]
                self._publish(self._tail_key(sequence, num_prompt), block)

    def end(self, sequence: Sequence) -> None:
        """Expect nothing more of a sequence that ends or starts anew."""
        if sequence.has_published_prompt and len(sequence.keys) <= sequence.num_published:
            return
        for key in [key for key, by in self._expected.items() if by is sequence]:
            del self._expected[key]

    def check(self) -> None:
        """Raise AssertionError if something is expected although nothing runs."""
        assert not self._expected, f"{len(self._expected)} contents are expected of nobody"

    def _longest(self, keys: Ids[Key]) -> tuple[int, int]:
        """How many full blocks from the start can be reused, and which is the first needed."""
        longest, num_in_a_row = (0, 0), 0
        for num_full, key in enumerate(keys, start=1):
            if self._pool.find(key) is not None:
                num_in_a_row += 1
                first = 0
                if self._window is not None:
                    # one token less may be reused than these hold: see `match`
                    first = max(0, num_full - -(-self._window // self._pool.block_size))
                if num_in_a_row >= num_full - first:
                    longest = (num_full, first)
            elif self._window is None:
                break
            else:
                num_in_a_row = 0
        return longest

    def _keys(self, sequence: Sequence) -> list[Key]:
        """Of all full blocks of known tokens."""
        size, keys = self._pool.block_size, sequence.keys
        for index in range(len(keys), len(sequence.token_ids) // size):
            before = keys[-1] if keys else _root(sequence)
            keys.append(chain(before, sequence.token_ids[index * size : (index + 1) * size]))
        return keys

    def _tail_key(self, sequence: Sequence, end: int) -> Key:
        """Of the tokens before `end` that fill no block."""
        num_full = end // self._pool.block_size
        before = self._keys(sequence)[num_full - 1] if num_full else _root(sequence)
        return chain(before, sequence.token_ids[num_full * self._pool.block_size : end])

    def _is_full(self, num_tokens: int) -> bool:
        return num_tokens % self._pool.block_size == 0

    def _found(self, key: Key) -> int:
        block = self._pool.find(key)
        assert block is not None, "a block was lost while it was looked for"
        return block

    def _publish(self, key: Key, block: int) -> None:
        self._pool.remember(key, block)
        self._expected.pop(key, None)


def _root(sequence: Sequence) -> Key:
    """What the first block of a sequence follows: requests with different salts share nothing."""
    return hashlib.blake2b(sequence.cache_salt.encode(), digest_size=16).digest()

"""Which blocks of the KV cache are free, owned, or kept for their content.

Numbers and keys only: no tensors, no clock, no I/O.
"""

from collections import Counter
from collections.abc import Iterable, Sequence

Key = bytes
"""Names the content of a block: its own tokens and all those before it (`prefix.py` makes them)."""


def blocks_of_sequence(
    max_len: int, block_size: int, *, window: int | None = None, max_new: int = 1
) -> int:
    """How many blocks a sequence of up to max_len tokens holds at once.

    With a sliding window, blocks that no later token can see are given back: what a step of
    max_new tokens touches, from the first position still visible to the last new one, lies
    window + max_new - 2 positions apart.
    """
    whole = -(-max_len // block_size)
    if window is None:
        return whole
    return min(whole, -(-(window + max_new - 2) // block_size) + 1)


class BlockPool:
    """Hands out the blocks of a KV cache. Not thread-safe: owned by one scheduler.

    A block has owners (several may share one), or is free. A free block whose content is known by
    a key is cached: it can be found and shared again until its turn comes to be handed out, the
    one that was given back first before the others.

    Invariant: free + owned + cached = total, and no block is two of them (`check`).
    """

    def __init__(self, *, num_blocks: int, block_size: int) -> None:
        """num_blocks blocks of block_size tokens each."""
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"need at least 1 block of 1 token, not {num_blocks} of {block_size}")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._free = list(range(num_blocks - 1, -1, -1))
        self._num_owners: dict[int, int] = {}
        self._cached: dict[int, None] = {}
        """An ordered set: the next to be handed out comes first."""
        self._block_of: dict[Key, int] = {}
        self._keys_of: dict[int, list[Key]] = {}

    def __repr__(self) -> str:
        return f"BlockPool({self.num_free} free of {self.num_blocks} x {self.block_size} tokens)"

    @property
    def num_free(self) -> int:
        """Blocks that can be handed out, cached ones included."""
        return len(self._free) + len(self._cached)

    def blocks_for(self, num_tokens: int) -> int:
        """How many blocks that many tokens fill."""
        return -(-num_tokens // self.block_size)

    def allocate(self, num_blocks: int) -> list[int] | None:
        """That many blocks of their own, or None (and nothing changed) when fewer are free."""
        if num_blocks > self.num_free:
            return None
        blocks = [self._take() for _ in range(num_blocks)]
        self._num_owners.update(dict.fromkeys(blocks, 1))
        return blocks

    def _take(self) -> int:
        if self._free:
            return self._free.pop()
        block = next(iter(self._cached))
        del self._cached[block]
        for key in self._keys_of.pop(block):
            del self._block_of[key]
        return block

    def share(self, block: int) -> None:
        """One more owner for an owned or cached block."""
        if block in self._cached:
            del self._cached[block]
            self._num_owners[block] = 1
        else:
            assert block in self._num_owners, f"block {block} is shared but has no content"
            self._num_owners[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """Take one owner off each of these blocks of one sequence, which stand in its order.

        Of those that nobody owns any more, the last is handed out again first: what follows is
        worth nothing without what comes before.
        """
        for block in reversed(blocks):
            assert block in self._num_owners, f"block {block} was released but is not owned"
            self._num_owners[block] -= 1
            if self._num_owners[block]:
                continue
            del self._num_owners[block]
            if block in self._keys_of:
                self._cached[block] = None
            else:
                self._free.append(block)

    def remember(self, key: Key, block: int) -> None:
        """Let an owned block be found by the key of its content. The first under a key stays."""
        assert block in self._num_owners, f"block {block} is remembered but not owned"
        if key not in self._block_of:
            self._block_of[key] = block
            self._keys_of.setdefault(block, []).append(key)

    def forget(self, blocks: Iterable[int]) -> None:
        """Let these owned blocks be found no more: what they hold is not what was said."""
        for block in blocks:
            for key in self._keys_of.pop(block, ()):
                del self._block_of[key]

    def find(self, key: Key) -> int | None:
        """The block with this content, owned or cached."""
        return self._block_of.get(key)

    def is_cached(self, block: int) -> bool:
        """Whether a block is kept for its content alone, so that sharing it leaves fewer free."""
        return block in self._cached

    def check(self, owners: Iterable[Sequence[int]] | None = None) -> None:
        """Raise AssertionError, with the numbers, if a block is lost, doubled or misremembered.

        owners: the blocks of each owner there is; then each block's count of owners is checked too.
        """
        free, owned, cached = set(self._free), set(self._num_owners), set(self._cached)
        assert len(free) == len(self._free), f"a block is free twice: {sorted(self._free)}"
        for one, other in ((free, owned), (free, cached), (owned, cached)):
            assert not one & other, f"blocks {sorted(one & other)} are in two states"
        assert len(free) + len(owned) + len(cached) == self.num_blocks, (
            f"{len(free)} free + {len(owned)} owned + {len(cached)} cached != {self.num_blocks}"
        )
        keys = {key: block for block, keys in self._keys_of.items() for key in keys}
        assert keys == self._block_of, "a key and its block do not know each other"
        assert cached <= set(self._keys_of) <= owned | cached, "a free block has a key"
        if owners is not None:
            counted = Counter(block for blocks in owners for block in blocks)
            assert counted == self._num_owners, f"owners {counted} are not {self._num_owners}"


class BlockTable:
    """The blocks of one sequence, in the order of its positions.

    Covers the positions from `first` x block_size on: blocks before that held what a sliding
    window has left behind, and were given back.
    """

    def __init__(self, pool: BlockPool, shared: Iterable[int] = (), first: int = 0) -> None:
        """shared: blocks that begin the table, the first of them number `first` of the sequence;
        the table becomes one more owner of each.
        """
        self._pool = pool
        self.first = first
        self.blocks = list(shared)
        for block in self.blocks:
            pool.share(block)

    def __repr__(self) -> str:
        return f"BlockTable({self.blocks} from block {self.first} on)"

    def grow(self, end: int) -> bool:
        """Cover all positions before end; False, and nothing changed, when too few are free."""
        num_missing = self._pool.blocks_for(end) - self.first - len(self.blocks)
        return num_missing <= 0 or self.extend(num_missing)

    def extend(self, num_blocks: int) -> bool:
        """That many more blocks at its end; False, and nothing changed, when too few are free."""
        blocks = self._pool.allocate(num_blocks)
        if blocks is None:
            return False
        self.blocks += blocks
        return True

    def drop_before(self, position: int) -> None:
        """Give the blocks back that lie before a position as a whole."""
        num_dropped = min(position // self._pool.block_size - self.first, len(self.blocks))
        if num_dropped > 0:
            self._pool.release(self.blocks[:num_dropped])
            del self.blocks[:num_dropped]
            self.first += num_dropped

    def release(self) -> None:
        """Give all back."""
        self._pool.release(self.blocks)
        self.blocks = []

"""Which blocks of the KV cache are free. Numbers only: no tensors, no clock, no I/O."""

from collections.abc import Iterable


def blocks_of_sequence(
    max_len: int, block_size: int, *, window: int | None = None, max_new: int = 1
) -> int:
    """How many blocks a sequence of up to max_len tokens needs.

    With a sliding window the blocks are a ring: the positions that a step of max_new tokens
    touches, from the first that is still visible to the last new one, lie window + max_new - 2
    apart, and two positions share a slot only from (ring - 1) * block_size + 1 on.
    """
    whole = -(-max_len // block_size)
    if window is None:
        return whole
    return min(whole, -(-(window + max_new - 2) // block_size) + 1)


class BlockPool:
    """Hands out the blocks of a KV cache. Not thread-safe: owned by one scheduler.

    Invariant: a block is either free or owned, never both, and none is lost (`check`).
    """

    def __init__(self, *, num_blocks: int, block_size: int) -> None:
        """num_blocks blocks of block_size tokens each."""
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"need at least 1 block of 1 token, not {num_blocks} of {block_size}")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._free = list(range(num_blocks - 1, -1, -1))
        self._owned: set[int] = set()

    def __repr__(self) -> str:
        return f"BlockPool({self.num_free} free of {self.num_blocks} x {self.block_size} tokens)"

    @property
    def num_free(self) -> int:
        return len(self._free)

    def blocks_for(self, num_tokens: int) -> int:
        """How many blocks that many tokens fill."""
        return -(-num_tokens // self.block_size)

    def allocate(self, num_blocks: int) -> list[int] | None:
        """That many blocks, or None (and nothing changed) when fewer are free."""
        if num_blocks > len(self._free):
            return None
        blocks = [self._free.pop() for _ in range(num_blocks)]
        self._owned.update(blocks)
        return blocks

    def release(self, blocks: Iterable[int]) -> None:
        """Take blocks back. Each must be owned."""
        for block in blocks:
            assert block in self._owned, f"block {block} was released but is not owned"
            self._owned.remove(block)
            self._free.append(block)

    def check(self) -> None:
        """Raise AssertionError, with the numbers, if a block is lost or doubled."""
        free, owned = set(self._free), self._owned
        assert len(free) == len(self._free), f"a block is free twice: {sorted(self._free)}"
        assert not free & owned, f"blocks {sorted(free & owned)} are free and owned"
        total = len(free) + len(owned)
        assert total == self.num_blocks, (
            f"{len(free)} free + {len(owned)} owned != {self.num_blocks}"
        )

"""No block is lost, none belongs to two, whatever is taken and given back."""

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from model.blocks import BlockPool


class PoolUnderUse(RuleBasedStateMachine):
    """Takes and gives back blocks at random, and keeps its own books beside the pool's."""

    @initialize(num_blocks=st.integers(1, 12), block_size=st.integers(1, 4))
    def start(self, num_blocks: int, block_size: int) -> None:
        self.pool = BlockPool(num_blocks=num_blocks, block_size=block_size)
        self.held: list[list[int]] = []

    @rule(num_blocks=st.integers(0, 6))
    def allocate(self, num_blocks: int) -> None:
        num_free = self.pool.num_free
        blocks = self.pool.allocate(num_blocks)
        assert (blocks is None) == (num_blocks > num_free)
        if blocks is None:
            assert self.pool.num_free == num_free
        else:
            assert len(blocks) == num_blocks
            self.held.append(blocks)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        holder = data.draw(st.integers(0, len(self.held) - 1))
        self.pool.release(self.held.pop(holder))

    @invariant()
    def every_block_is_free_or_held_once(self) -> None:
        if not hasattr(self, "pool"):
            return
        self.pool.check()
        held = [block for blocks in self.held for block in blocks]
        assert len(held) == len(set(held))
        assert set(held) <= set(range(self.pool.num_blocks))
        assert self.pool.num_free + len(held) == self.pool.num_blocks


TestPoolUnderUse = PoolUnderUse.TestCase


@pytest.mark.parametrize(
    ("num_tokens", "num_blocks"), [(0, 0), (1, 1), (4, 1), (5, 2), (8, 2), (9, 3)]
)
def test_a_part_of_a_block_takes_a_whole_one(num_tokens: int, num_blocks: int) -> None:
    assert BlockPool(num_blocks=1, block_size=4).blocks_for(num_tokens) == num_blocks


def test_a_block_cannot_be_given_back_twice() -> None:
    pool = BlockPool(num_blocks=3, block_size=4)
    blocks = pool.allocate(2)
    assert blocks is not None
    pool.release(blocks)
    with pytest.raises(AssertionError, match="is not owned"):
        pool.release(blocks)


@pytest.mark.parametrize("damage", ["lost", "doubled", "both"])
def test_the_check_finds_broken_books(damage: str) -> None:
    pool = BlockPool(num_blocks=3, block_size=4)
    (block,) = pool.allocate(1) or []
    match damage:
        case "lost":
            pool._owned.clear()
        case "doubled":
            pool._free[0] = pool._free[1]
        case "both":
            pool._free.append(block)
    with pytest.raises(AssertionError):
        pool.check()


@pytest.mark.parametrize(("num_blocks", "block_size"), [(0, 4), (3, 0), (-1, 4)])
def test_a_pool_of_nothing_is_refused(num_blocks: int, block_size: int) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        BlockPool(num_blocks=num_blocks, block_size=block_size)


def test_the_pool_shows_how_full_it_is() -> None:
    pool = BlockPool(num_blocks=3, block_size=4)
    pool.allocate(1)
    assert repr(pool) == "BlockPool(2 free of 3 x 4 tokens)"

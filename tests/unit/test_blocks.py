"""No block is lost, none belongs to two, whatever is taken and given back."""

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from model.blocks import BlockPool, BlockTable


class PoolUnderUse(RuleBasedStateMachine):
    """Takes, shares, names and gives back blocks at random, and keeps books beside the pool's."""

    @initialize(num_blocks=st.integers(1, 12), block_size=st.integers(1, 4))
    def start(self, num_blocks: int, block_size: int) -> None:
        self.pool = BlockPool(num_blocks=num_blocks, block_size=block_size)
        self.held: list[list[int]] = []
        self.content: dict[int, bytes] = {}
        """What was last written to a block and named."""
        self.num_named = 0

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
            for block in blocks:  # and written to
                self.content.pop(block, None)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        holder = data.draw(st.integers(0, len(self.held) - 1))
        self.pool.release(self.held.pop(holder))

    @precondition(lambda self: any(self.held))
    @rule(data=st.data())
    def name(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from([b for blocks in self.held for b in blocks]))
        key = self.content.get(block)
        if key is None:
            self.num_named += 1
            key = self.content[block] = str(self.num_named).encode()
        self.pool.remember(key, block)

    @precondition(lambda self: self.content)
    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        """Whatever is found still holds what it was named for."""
        key = data.draw(st.sampled_from(sorted(self.content.values())))
        block = self.pool.find(key)
        assert block is not None, "an unused content was forgotten"
        assert self.content[block] == key
        self.pool.share(block)
        self.held.append([block])

    @invariant()
    def every_block_is_free_or_held(self) -> None:
        if not hasattr(self, "pool"):
            return
        self.pool.check(self.held)
        held = {block for blocks in self.held for block in blocks}
        assert held <= set(range(self.pool.num_blocks))
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
            pool._num_owners.clear()
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


def test_what_was_given_back_first_is_forgotten_first_and_a_tail_before_its_start() -> None:
    pool = BlockPool(num_blocks=4, block_size=1)
    older, newer = pool.allocate(2) or [], pool.allocate(2) or []
    for index, block in enumerate(older + newer):
        pool.remember(bytes([index]), block)
    pool.release(older)
    pool.release(newer)
    assert pool.num_free == 4
    assert all(map(pool.is_cached, older + newer))
    forgotten = []
    for _ in range(4):
        pool.allocate(1)
        forgotten += [i for i in range(4) if pool.find(bytes([i])) is None and i not in forgotten]
    assert forgotten == [1, 0, 3, 2]


def test_the_first_block_under_a_key_stays() -> None:
    pool = BlockPool(num_blocks=2, block_size=1)
    (one,), (other,) = pool.allocate(1) or [], pool.allocate(1) or []
    pool.remember(b"key", one)
    pool.remember(b"key", other)
    assert pool.find(b"key") == one
    pool.release([other])
    assert pool.num_free == 1
    assert not pool.is_cached(other)


def test_a_table_covers_what_it_must_and_gives_back_what_lies_behind() -> None:
    pool = BlockPool(num_blocks=4, block_size=4)
    table = BlockTable(pool)
    assert table.grow(9)
    assert (len(table.blocks), pool.num_free) == (3, 1)
    assert not table.grow(17)
    assert len(table.blocks) == 3
    table.drop_before(7)
    assert (table.first, len(table.blocks)) == (1, 2)
    table.drop_before(-3)
    assert table.grow(17)
    assert (table.first, len(table.blocks), pool.num_free) == (1, 4, 0)
    table.release()
    pool.check([])

"""The flat layout of a step."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from model.batch import Span, build_batch, slots_of

CPU = torch.device("cpu")


def test_the_worked_example_of_the_module_holds() -> None:
    a = Span([105, 106], start=5, blocks=[7, 2])
    b = Span([200, 201, 202], start=0, blocks=[0], num_logits=2)
    batch = build_batch([a, b], block_size=4, device=CPU)
    assert batch.token_ids_T.tolist() == [105, 106, 200, 201, 202]
    assert batch.positions_T.tolist() == [5, 6, 0, 1, 2]
    assert batch.slots_T.tolist() == [9, 10, 0, 1, 2]
    assert batch.logits_rows.tolist() == [1, 3, 4]
    assert batch.num_tokens == 5
    assert (a.end, b.end) == (7, 3)


def test_a_batch_may_want_no_logits() -> None:
    batch = build_batch([Span([1, 2], 0, [0], num_logits=0)], block_size=4, device=CPU)
    assert batch.logits_rows.tolist() == []
    assert batch.logits_rows.dtype == batch.token_ids_T.dtype == torch.int64


@given(
    blocks=st.lists(st.integers(0, 50), min_size=1, max_size=6, unique=True),
    block_size=st.integers(1, 5),
    cuts=st.tuples(st.integers(0, 30), st.integers(0, 30)),
)
def test_slots_walk_through_the_blocks_in_order(
    blocks: list[int], block_size: int, cuts: tuple[int, int]
) -> None:
    every_slot = [block * block_size + offset for block in blocks for offset in range(block_size)]
    start, end = sorted(min(cut, len(every_slot)) for cut in cuts)
    assert slots_of(blocks, block_size, start, end) == every_slot[start:end]

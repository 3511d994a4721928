"""What one forward pass works on: tokens of many sequences, flat in one axis.

Example, block size 4: sequence A brings tokens 5 and 6 of its own (two new, five known before) and
holds blocks [7, 2]; sequence B starts with three tokens in block [0].

    token_ids_T   A5 A6 B0 B1 B2
    positions_T    5  6  0  1  2
    slots_T        9 10  0  1  2      A5: block 2, offset 1 -> 2 * 4 + 1

Shape suffix: T tokens of this step, over all sequences.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Span:
    """What one sequence brings to a step.

    token_ids:  the new tokens, in order.
    start:      position of the first of them = tokens of this sequence already in the cache.
    blocks:     the sequence's blocks, with room for start + len(token_ids) tokens.
    first_block: number of the first of them in the sequence; above 0 where a sliding window has
                left earlier ones behind.
    num_logits: for how many of the last new tokens logits are wanted (0: none, 1: to sample).
    """

    token_ids: Sequence[int]
    start: int
    blocks: Sequence[int]
    num_logits: int = 1
    first_block: int = 0

    @property
    def end(self) -> int:
        """Tokens of this sequence in the cache after the step."""
        return self.start + len(self.token_ids)


@dataclass(frozen=True)
class Batch:
    """The tensors of one step (see the module's example). Integer tensors are int64."""

    spans: tuple[Span, ...]
    block_size: int
    token_ids_T: Tensor
    positions_T: Tensor
    slots_T: Tensor
    logits_rows: Tensor
    """Rows of T whose logits are wanted, in the order of the spans."""

    @property
    def num_tokens(self) -> int:
        return self.token_ids_T.shape[0]


def build_batch(spans: Sequence[Span], *, block_size: int, device: torch.device) -> Batch:
    """Lay the spans flat, in their order."""
    token_ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    logits_rows: list[int] = []
    for span in spans:
        token_ids += span.token_ids
        positions += range(span.start, span.end)
        slots += slots_of(span.blocks, block_size, span.start, span.end, span.first_block)
        logits_rows += range(len(token_ids) - span.num_logits, len(token_ids))
    return Batch(
        spans=tuple(spans),
        block_size=block_size,
        token_ids_T=torch.tensor(token_ids, device=device),
        positions_T=torch.tensor(positions, device=device),
        slots_T=torch.tensor(slots, device=device),
        logits_rows=torch.tensor(logits_rows, dtype=torch.int64, device=device),
    )


def split_spans(spans: Sequence[Span], number: int) -> list[list[Span]]:
    """Micro-batches with about as many tokens each, in order; `number` of them, if so many tokens
    there are. A span that lies across a border is cut, so the second part must come after the
    first.
    """
    total = sum(len(span.token_ids) for span in spans)
    number = max(1, min(number, total))
    parts: list[list[Span]] = [[] for _ in range(number)]
    begin = 0
    for span in spans:
        end = begin + len(span.token_ids)
        for index in range(number):
            first, last = total * index // number, total * (index + 1) // number
            if first < end and begin < last:
                parts[index].append(_cut(span, max(first - begin, 0), min(last, end) - begin))
        begin = end
    return parts


def _cut(span: Span, begin: int, end: int) -> Span:
    """Its tokens from `begin` to `end`, with those of its logits that are theirs."""
    if begin == 0 and end == len(span.token_ids):
        return span
    first_logits = len(span.token_ids) - span.num_logits
    return replace(
        span,
        token_ids=span.token_ids[begin:end],
        start=span.start + begin,
        num_logits=max(0, end - max(begin, first_logits)),
    )


def slots_of(
    blocks: Sequence[int], block_size: int, start: int, end: int, first_block: int = 0
) -> list[int]:
    """Cache slots of the positions start..end-1 of a sequence that holds `blocks`."""
    return [
        blocks[position // block_size - first_block] * block_size + position % block_size
        for position in range(start, end)
    ]

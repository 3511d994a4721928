"""Causal grouped-query attention over the paged KV cache, in plain torch.

The plan of a step (which rows attend to which slots) is made once and used by every layer. Spans
with the same number of new tokens form one group, so that all decoding sequences are one call.

Shape suffixes: S sequences of a group, Q new tokens of each, L longest context of the group,
N query heads, K key/value heads, H head dimension, T tokens.
"""

from collections import defaultdict
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from model.batch import Batch, Span, slots_of
from model.kv_cache import KVCache


@dataclass(frozen=True)
class Group:
    """Sequences with equally many new tokens, padded to the longest context among them."""

    rows_SQ: Tensor
    """Rows of T, int64."""
    slots_SL: Tensor
    """Cache slots of each sequence's context. Padding is masked, yet repeats the sequence's own
    last slot: another's could hold NaN, which no mask stops."""
    mask_S1QL: Tensor
    """True where a new token may look."""


def plan_attention(batch: Batch, sliding_window: int | None) -> tuple[Group, ...]:
    """Group the spans of a step and build each group's slots and mask.

    sliding_window: how many positions back a token may look, itself included; None for all.
    """
    first_row: list[int] = []
    by_length: dict[int, list[int]] = defaultdict(list)
    row = 0
    for index, span in enumerate(batch.spans):
        first_row.append(row)
        row += len(span.token_ids)
        by_length[len(span.token_ids)].append(index)
    return tuple(
        _group(
            [batch.spans[i] for i in indices],
            [first_row[i] for i in indices],
            batch,
            sliding_window,
        )
        for indices in by_length.values()
    )


def _group(spans: list[Span], first_rows: list[int], batch: Batch, window: int | None) -> Group:
    device = batch.token_ids_T.device
    longest = max(span.end for span in spans)
    num_new = len(spans[0].token_ids)
    slots = [slots_of(span.blocks, batch.block_size, 0, span.end) for span in spans]
    slots = [own + own[-1:] * (longest - len(own)) for own in slots]
    starts_S11 = torch.tensor([span.start for span in spans], device=device)[:, None, None]
    query_positions = starts_S11 + torch.arange(num_new, device=device)[None, :, None]
    key_positions = torch.arange(longest, device=device)[None, None, :]
    mask_SQL = key_positions <= query_positions
    if window is not None:
        mask_SQL &= key_positions > query_positions - window
    rows = torch.tensor(first_rows, device=device)[:, None] + torch.arange(num_new, device=device)
    return Group(
        rows_SQ=rows, slots_SL=torch.tensor(slots, device=device), mask_S1QL=mask_SQL[:, None]
    )


def attend(q_TNH: Tensor, groups: tuple[Group, ...], cache: KVCache, layer: int) -> Tensor:
    """Attention output of every token, (T, N, H), dtype of q.

    The step's own keys and values must already be in the cache.
    """
    output_TNH = torch.empty_like(q_TNH)
    for group in groups:
        keys_SLKH, values_SLKH = cache.read(layer, group.slots_SL)
        attended_SNQH = F.scaled_dot_product_attention(
            q_TNH[group.rows_SQ].transpose(1, 2),
            keys_SLKH.transpose(1, 2),
            values_SLKH.transpose(1, 2),
            attn_mask=group.mask_S1QL,
            enable_gqa=True,
        )
        output_TNH[group.rows_SQ] = attended_SNQH.transpose(1, 2)
    return output_TNH

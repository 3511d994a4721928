"""Causal grouped-query attention over the paged KV cache: the seam, and two backends in torch.

A backend plans once per step (which rows attend to which slots) and attends once per layer. With a
sliding window only the slots within it are read, so older ones may have been written over.

Shape suffixes: S sequences of a group, Q new tokens of each, L longest visible context of the
group, N query heads, K key/value heads, G query heads per key/value head, X both G and Q,
H head dimension, T tokens.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from model.batch import Batch, Span, slots_of
from model.errors import ConfigError
from model.kv_cache import KVCache

BACKENDS = ("sdpa", "reference", "flash")


class AttentionBackend(Protocol):
    """One way to compute attention."""

    def plan(self, batch: Batch) -> Any:
        """What every layer of this step needs to know."""
        ...

    def attend(self, q_TNH: Tensor, plan: Any, cache: KVCache, layer: int) -> Tensor:
        """Attention output of every token, (T, N, H), dtype of q.

        plan: of this backend. The step's own keys and values must already be in the cache.
        """
        ...


def attention_backend(name: str, sliding_window: int | None) -> AttentionBackend:
    """The backend of that name.

    sliding_window: how many positions back a token may look, itself included; None for all.
    Raises ConfigError for an unknown name, or where flash-attn is missing.
    """
    match name:
        case "sdpa":
            return SdpaAttention(sliding_window)
        case "reference":
            return ReferenceAttention(sliding_window)
        case "flash":
            from model.flash_attention import FlashAttention

            return FlashAttention(sliding_window)
    raise ConfigError(f"attention {name!r} is not one of {', '.join(BACKENDS)}")


@dataclass(frozen=True)
class Context:
    """Where the keys and values are that the new tokens of some spans may look at."""

    slots_SL: NDArray[np.int64]
    """Cache slots, in the order of positions. Padded with the sequence's own last slot: another's
    could hold NaN, which no mask stops."""
    first_S: NDArray[np.int64]
    """The first position of each."""
    lengths_S: NDArray[np.int64]


def visible_context(spans: Sequence[Span], block_size: int, window: int | None) -> Context:
    """All positions that any new token of each span may look at."""
    starts_S, ends_S, first_blocks_S = np.array(
        [(span.start, span.end, span.first_block) for span in spans], dtype=np.int64
    ).T
    first_S = np.zeros_like(starts_S) if window is None else np.maximum(0, starts_S - window + 1)
    lengths_S = ends_S - first_S
    positions_SL = first_S[:, None] + np.arange(lengths_S.max())
    positions_SL = np.minimum(positions_SL, ends_S[:, None] - 1)
    widest = max(len(span.blocks) for span in spans)
    tables = np.array(
        [[*span.blocks, *[0] * (widest - len(span.blocks))] for span in spans], dtype=np.int64
    )
    blocks_SL = np.take_along_axis(
        tables, positions_SL // block_size - first_blocks_S[:, None], axis=1
    )
    return Context(blocks_SL * block_size + positions_SL % block_size, first_S, lengths_S)


@dataclass(frozen=True)
class Group:
    """Sequences with equally many new tokens, padded to the longest context among them."""

    rows_SQ: Tensor
    """Rows of T, int64."""
    slots_SL: Tensor
    """Cache slots of each sequence's context, padded (see `Context`)."""
    mask_S1QL: Tensor
    """True where a new token may look."""


class SdpaAttention:
    """torch's scaled_dot_product_attention. Sequences with equally many new tokens form one call,
    so that all that decode are one.
    """

    def __init__(self, sliding_window: int | None) -> None:
        self._window = sliding_window

    def plan(self, batch: Batch) -> tuple[Group, ...]:
        by_length: dict[int, list[tuple[int, Span]]] = defaultdict(list)
        row = 0
        for span in batch.spans:
            by_length[len(span.token_ids)].append((row, span))
            row += len(span.token_ids)
        return tuple(self._group(members, batch) for members in by_length.values())

    def _group(self, members: list[tuple[int, Span]], batch: Batch) -> Group:
        device = batch.token_ids_T.device
        rows, spans = zip(*members, strict=True)
        context = visible_context(spans, batch.block_size, self._window)
        new_Q = np.arange(len(spans[0].token_ids))
        starts_S = np.array([span.start for span in spans])
        query_SQ1 = (starts_S[:, None] + new_Q)[:, :, None]
        key_S1L = (context.first_S[:, None] + np.arange(context.slots_SL.shape[1]))[:, None]
        mask_SQL = key_S1L <= query_SQ1
        if self._window is not None:
            mask_SQL &= key_S1L > query_SQ1 - self._window
        return Group(
            rows_SQ=torch.from_numpy(np.array(rows)[:, None] + new_Q).to(device),
            slots_SL=torch.from_numpy(context.slots_SL).to(device),
            mask_S1QL=torch.from_numpy(mask_SQL[:, None]).to(device),
        )

    def attend(self, q_TNH: Tensor, plan: tuple[Group, ...], cache: KVCache, layer: int) -> Tensor:
        output_TNH = torch.empty_like(q_TNH)
        for group in plan:
            keys_SLKH, values_SLKH = cache.read(layer, group.slots_SL)
            num_kv_heads = keys_SLKH.shape[2]
            # The query heads that share a key head stand in one matrix with its new tokens: each
            # key is read once for all of them, not once for each.
            rows = group.rows_SQ.flatten()
            q_SQKGH = (
                q_TNH.index_select(0, rows)
                .unflatten(0, group.rows_SQ.shape)
                .unflatten(2, (num_kv_heads, -1))
            )
            q_SKGQH = q_SQKGH.permute(0, 2, 3, 1, 4)
            num_sharing, num_new = q_SKGQH.shape[2:4]
            mask_S1GQL = group.mask_S1QL[:, :, None].expand(-1, -1, num_sharing, -1, -1)
            attended_SKXH = F.scaled_dot_product_attention(
                q_SKGQH.flatten(2, 3),
                keys_SLKH.transpose(1, 2),
                values_SLKH.transpose(1, 2),
                attn_mask=mask_S1GQL.flatten(2, 3),
            )
            attended_SKGQH = attended_SKXH.unflatten(2, (num_sharing, num_new))
            attended_SQNH = attended_SKGQH.permute(0, 3, 1, 2, 4).flatten(2, 3)
            output_TNH.index_copy_(0, rows, attended_SQNH.flatten(0, 1))
        return output_TNH


class ReferenceAttention:
    """The textbook's formula, token by token in float32: slow, and what the others must equal."""

    def __init__(self, sliding_window: int | None) -> None:
        self._window = sliding_window

    def plan(self, batch: Batch) -> list[list[int]]:
        """Of every token the slots it may look at."""
        slots = []
        for span in batch.spans:
            for position in range(span.start, span.end):
                first = 0 if self._window is None else max(0, position - self._window + 1)
                slots.append(
                    slots_of(span.blocks, batch.block_size, first, position + 1, span.first_block)
                )
        return slots

    def attend(self, q_TNH: Tensor, plan: list[list[int]], cache: KVCache, layer: int) -> Tensor:
        output_TNH = torch.empty_like(q_TNH)
        for row, slots in enumerate(plan):
            keys_LKH, values_LKH = cache.read(layer, torch.tensor(slots, device=q_TNH.device))
            q_KGH = q_TNH[row].float().unflatten(0, (keys_LKH.shape[1], -1))
            scores_KGL = torch.einsum("kgh,lkh->kgl", q_KGH, keys_LKH.float())
            weights_KGL = (scores_KGL * q_TNH.shape[-1] ** -0.5).softmax(dim=-1)
            attended_KGH = torch.einsum("kgl,lkh->kgh", weights_KGL, values_LKH.float())
            output_TNH[row] = attended_KGH.flatten(0, 1)
        return output_TNH

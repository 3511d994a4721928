"""Causal grouped-query attention over the paged KV cache: the seam, and two backends in torch.

A backend plans once per step (which rows attend to which slots) and attends once per layer. With a
sliding window only the slots within it are read, so older ones may have been written over.

Shape suffixes: S sequences of a group, Q new tokens of each, L longest visible context of the
group, N query heads, K key/value heads, G query heads per key/value head, H head dimension,
T tokens.
"""

from collections import defaultdict
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
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


def visible_slots(span: Span, block_size: int, window: int | None) -> list[int]:
    """Slots of all positions that any new token of the span may look at, in order."""
    first = 0 if window is None else max(0, span.start - window + 1)
    return slots_of(span.blocks, block_size, first, span.end)


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
        slots = [visible_slots(span, batch.block_size, self._window) for _, span in members]
        longest = max(len(own) for own in slots)
        num_new = len(members[0][1].token_ids)
        new_Q = torch.arange(num_new, device=device)

        def column(numbers: list[int]) -> Tensor:
            return torch.tensor(numbers, device=device)[:, None, None]

        query_positions = column([span.start for _, span in members]) + new_Q[:, None]
        first_visible = column(
            [span.end - len(own) for (_, span), own in zip(members, slots, strict=True)]
        )
        key_positions = first_visible + torch.arange(longest, device=device)
        mask_SQL = key_positions <= query_positions
        if self._window is not None:
            mask_SQL &= key_positions > query_positions - self._window
        padded = [own + own[-1:] * (longest - len(own)) for own in slots]
        return Group(
            rows_SQ=torch.tensor([row for row, _ in members], device=device)[:, None] + new_Q,
            slots_SL=torch.tensor(padded, device=device),
            mask_S1QL=mask_SQL[:, None],
        )

    def attend(self, q_TNH: Tensor, plan: tuple[Group, ...], cache: KVCache, layer: int) -> Tensor:
        output_TNH = torch.empty_like(q_TNH)
        for group in plan:
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


class ReferenceAttention:
    """The textbook's formula, token by token in float32: slow, and what the others must equal."""

    def __init__(self, sliding_window: int | None) -> None:
        self._window = sliding_window

    def plan(self, batch: Batch) -> list[list[int]]:
        """Of every token the slots it may look at."""
        return [
            visible_slots(
                Span(span.token_ids[index : index + 1], span.start + index, span.blocks),
                batch.block_size,
                self._window,
            )
            for span in batch.spans
            for index in range(len(span.token_ids))
        ]

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

"""Attention by flash-attn's kernel for sequences of different lengths (CUDA, half precision).

Needs the `cuda` extra. Not run on a GPU yet; a unit test checks what the kernel is handed.

Shape suffixes: T tokens, L visible context of all sequences, one after another, S sequences,
N query heads, K key/value heads, H head dimension.
"""

from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

from model.attention import visible_context
from model.batch import Batch
from model.errors import ConfigError
from model.kv_cache import KVCache


@dataclass(frozen=True)
class Packed:
    """All sequences of a step in a row, as the kernel wants them."""

    slots_L: Tensor
    ends_q_S1: Tensor
    """Where each sequence's new tokens end, with a 0 in front, int32."""
    ends_k_S1: Tensor
    """Where each sequence's visible context ends, with a 0 in front, int32."""
    longest_q: int
    longest_k: int


class FlashAttention:
    """flash_attn_varlen_func over keys and values gathered from the blocks."""

    def __init__(self, sliding_window: int | None) -> None:
        """Raises ConfigError where flash-attn is not installed."""
        try:
            from flash_attn import flash_attn_varlen_func
        except ImportError as error:
            raise ConfigError(
                "attention 'flash' needs flash-attn and a CUDA device: pip install "
                f"'maestrale[cuda]', or choose 'sdpa' ({error})"
            ) from error
        self._kernel: Any = flash_attn_varlen_func
        self._window = sliding_window

    def plan(self, batch: Batch) -> Packed:
        device = batch.token_ids_T.device
        context = visible_context(batch.spans, batch.block_size, self._window)
        lengths_q = [len(span.token_ids) for span in batch.spans]
        lengths_k: list[int] = context.lengths_S.tolist()
        is_own_SL = np.arange(context.slots_SL.shape[1]) < context.lengths_S[:, None]

        def ends(lengths: list[int]) -> Tensor:
            return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)

        return Packed(
            slots_L=torch.from_numpy(context.slots_SL[is_own_SL]).to(device),
            ends_q_S1=ends(lengths_q),
            ends_k_S1=ends(lengths_k),
            longest_q=max(lengths_q),
            longest_k=max(lengths_k),
        )

    def attend(self, q_TNH: Tensor, plan: Packed, cache: KVCache, layer: int) -> Tensor:
        keys_LKH, values_LKH = cache.read(layer, plan.slots_L)
        # causal is aligned to the end of each sequence: its last new token sees its last key
        back = -1 if self._window is None else self._window - 1
        output_TNH: Tensor = self._kernel(
            q_TNH,
            keys_LKH,
            values_LKH,
            plan.ends_q_S1,
            plan.ends_k_S1,
            plan.longest_q,
            plan.longest_k,
            causal=True,
            window_size=(back, 0 if self._window is not None else -1),
        )
        return output_TNH

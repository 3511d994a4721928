"""Keys and values of all sequences, in blocks. Tensors only; who owns a block is `blocks.py`'s.

Shape suffixes: P slots (blocks x block size), K key/value heads, H head dimension, T tokens.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from model.config import MixtralConfig


class KVCache:
    """One keys and one values tensor per layer, each (P, K, H). Owned by one engine thread."""

    def __init__(
        self,
        config: MixtralConfig,
        *,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (num_blocks * block_size, config.num_key_value_heads, config.head_dim)
        self.block_size = block_size
        self.keys = [
            torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_hidden_layers)
        ]
        self.values = [torch.zeros_like(keys) for keys in self.keys]

    def __repr__(self) -> str:
        num_slots = self.keys[0].shape[0]
        return f"KVCache({num_slots} tokens in blocks of {self.block_size}, {self.num_bytes} bytes)"

    @property
    def num_bytes(self) -> int:
        return 2 * sum(keys.nbytes for keys in self.keys)

    def write(self, layer: int, slots_T: Tensor, keys_TKH: Tensor, values_TKH: Tensor) -> None:
        """Store the keys and values of a step's tokens."""
        self.keys[layer].index_copy_(0, slots_T, keys_TKH)
        self.values[layer].index_copy_(0, slots_T, values_TKH)

    def read(self, layer: int, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values at `slots` of any shape S: two tensors (*S, K, H), copied."""
        # index_select copies whole rows: several times as fast on CPU as indexing by a tensor
        keys, values = (
            tensor.index_select(0, slots.flatten()).view(*slots.shape, *tensor.shape[1:])
            for tensor in (self.keys[layer], self.values[layer])
        )
        return keys, values

    def copy(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Copy keys and values from slots to slots, in every layer. All are read before any is
        written.
        """
        if not sources:
            return
        device = self.keys[0].device
        sources_S = torch.tensor(sources, device=device)
        targets_S = torch.tensor(targets, device=device)
        for layer in range(len(self.keys)):
            self.write(layer, targets_S, *self.read(layer, sources_S))

"""Half-precision weights for a processor that multiplies float32 faster.

Where it has no instructions for them, torch widens every weight for every few rows anew. FBGEMM,
which torch carries for x86, keeps float16 weights in the order in which its kernel reads them and
widens them in registers: 14336 x 4096 in 6 ms for up to six rows on two threads, where torch needs
6.5 ms a row (tests/bench/RESULTS.md). Packing takes a core 10 ns a weight, once: every thread packs
a block.

bfloat16 weights lose nothing that matters as float16: its precision is higher, and what lies below
its range (2**-24) does not show beside a matrix's larger weights. Matrices of which that is not
true are left as they are.

Shape suffixes: R rows, I inputs, O outputs.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from model.linear import Weight, multiplies

_HAS_FBGEMM = torch.backends.quantized.engine in ("x86", "fbgemm")

_MIN_WEIGHTS = 2**20
"""Smaller matrices stay in the processor's cache, however they are held."""

_BLOCK_INPUTS, _BLOCK_OUTPUTS = 512, 16
"""What FBGEMM fills a matrix up to a multiple of."""

_MIN_BLOCK_WEIGHTS = 2**24
"""Of a matrix that several threads pack: each block is one more product to wait for."""

_MOST_FILLED = 8 / 7
"""Of the bytes that the weights themselves take: 14336 inputs cut over eight workers still fit."""

_LARGEST_MIN = 2.0**-8
"""The largest weight is at least this: what float16 rounds off is then below 2**-17 of it."""


@dataclass(frozen=True)
class PackedHalfMatrix:
    """A weight matrix (outputs, inputs) in float16, in FBGEMM's order."""

    blocks: Sequence[Any]
    """torch's opaque objects, one below the other."""
    block_outputs: int
    """Of each but the last."""
    num_outputs: int
    num_inputs: int

    @property
    def nbytes(self) -> int:
        return _packed_bytes(self.num_outputs, self.num_inputs)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The sum of each output's weights: the packed ones cannot be looked at."""
        return (self.linear(torch.ones(1, self.num_inputs)),)

    def linear(self, x_RI: Tensor) -> Tensor:
        wide_RI = x_RI.float()
        product_RO = x_RI.new_empty(len(x_RI), self.num_outputs)
        for block, place in zip(
            self.blocks, product_RO.split(self.block_outputs, dim=1), strict=True
        ):
            place.copy_(torch.ops.quantized.linear_dynamic_fp16(wide_RI, block))
        return product_RO


def packed_if_faster(weight_OI: Tensor) -> Weight:
    """The same weights, packed where this processor multiplies them faster so."""
    if (
        not _HAS_FBGEMM
        or weight_OI.device.type != "cpu"
        or multiplies(weight_OI.dtype)
        or weight_OI.numel() < _MIN_WEIGHTS
        or _packed_bytes(*weight_OI.shape) > _MOST_FILLED * weight_OI.nbytes
    ):
        return weight_OI
    low, high = (float(extreme) for extreme in weight_OI.aminmax())
    if not _LARGEST_MIN <= max(-low, high) <= torch.finfo(torch.float16).max:
        return weight_OI
    num_outputs, num_inputs = weight_OI.shape
    num_blocks = min(torch.get_num_threads(), -(-weight_OI.numel() // _MIN_BLOCK_WEIGHTS))
    block_outputs = -(-num_outputs // num_blocks // _BLOCK_OUTPUTS) * _BLOCK_OUTPUTS
    with ThreadPoolExecutor(num_blocks) as pool:  # torch packs without Python's lock
        blocks = list(pool.map(_packed, weight_OI.split(block_outputs)))
    return PackedHalfMatrix(blocks, block_outputs, num_outputs, num_inputs)


def _packed(block_OI: Tensor) -> Any:
    return torch.ops.quantized.linear_prepack_fp16(block_OI.float(), None)


def _packed_bytes(num_outputs: int, num_inputs: int) -> int:
    outputs = -(-num_outputs // _BLOCK_OUTPUTS) * _BLOCK_OUTPUTS
    return 2 * outputs * -(-num_inputs // _BLOCK_INPUTS) * _BLOCK_INPUTS

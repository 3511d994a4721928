"""nf4: codes and products by bitsandbytes, which is imported when first needed.

Shape suffixes: O outputs, I inputs, R rows.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from model.errors import QuantizationError

NF4_BLOCK = 64
"""Weights that share a scale; rows follow each other, so a block may span two of them."""
NF4_SCALES_BLOCK = 256
"""Scales that share a scale, in nf4-double."""


_ROWS_AT_ONCE = 256  # bounds what quantising takes in float32 beside the matrix; whole blocks


def nf4_parts(weight_OI: Tensor, *, is_double: bool) -> dict[str, Tensor]:
    """Two codes to a byte, and scales. Raises QuantizationError without bitsandbytes."""
    functional = bitsandbytes().functional
    pieces = [
        functional.quantize_4bit(rows.float().contiguous(), blocksize=NF4_BLOCK, quant_type="nf4")
        for rows in weight_OI.split(_ROWS_AT_ONCE)
    ]
    codes = torch.cat([codes for codes, _ in pieces])
    scales = torch.cat([state.absmax for _, state in pieces])
    if not is_double:
        return {"codes": codes, "scales": scales}
    offset = scales.mean()
    scale_codes, state = functional.quantize_blockwise(
        scales - offset, code=_scale_levels(scales.device), blocksize=NF4_SCALES_BLOCK
    )
    return {
        "codes": codes,
        "scales": scale_codes,
        "scale_scales": state.absmax,
        "scale_offset": offset.view(1),
    }


def nf4_matrix(
    parts: Mapping[str, Tensor], shape: tuple[int, int], dtype: torch.dtype
) -> "Nf4Matrix":
    """The parts as something that multiplies rows of that dtype. Raises QuantizationError."""
    functional = bitsandbytes().functional
    device = parts["codes"].device
    # Its kernel for AVX-512 begins a block with every row, whatever the last one left: wrong by
    # far where a row is not whole blocks. As a single row the same weights come out right.
    is_one_row = device.type == "cpu" and shape[1] % NF4_BLOCK != 0
    offset = scales_state = None
    if "scale_scales" in parts:
        offset = parts["scale_offset"].squeeze()
        scales_state = functional.QuantState(
            absmax=parts["scale_scales"],
            blocksize=NF4_SCALES_BLOCK,
            code=_scale_levels(device),
            dtype=torch.float32,
        )
    state = functional.QuantState(
        absmax=parts["scales"],
        shape=torch.Size([shape[0] * shape[1]] if is_one_row else shape),
        code=functional.get_4bit_type("nf4", device=device),
        blocksize=NF4_BLOCK,
        quant_type="nf4",
        dtype=dtype,
        offset=offset,
        state2=scales_state,
    )
    nbytes = sum(part.nbytes for part in parts.values())
    if not is_one_row:
        return Nf4Matrix(parts["codes"], state, nbytes, bitsandbytes().matmul_4bit)

    def multiply(x_RI: Tensor, codes: Tensor, state: Any) -> Tensor:
        return F.linear(x_RI, functional.dequantize_4bit(codes, state).view(shape))

    return Nf4Matrix(parts["codes"], state, nbytes, multiply)


@dataclass(frozen=True)
class Nf4Matrix:
    """bitsandbytes' NormalFloat4: 16 levels where a normal distribution's weights are."""

    codes: Tensor
    state: Any
    """bitsandbytes' QuantState, with the scales."""
    nbytes: int
    multiply: Callable[[Tensor, Tensor, Any], Tensor]
    """Rows by codes and state: bitsandbytes' matmul_4bit, or what stands in for it."""

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        state = self.state
        if not state.nested:
            return self.codes, state.absmax
        return self.codes, state.absmax, state.state2.absmax, state.offset

    def linear(self, x_RI: Tensor) -> Tensor:
        return self.multiply(x_RI, self.codes, self.state)


def bitsandbytes() -> Any:
    """The library. Raises QuantizationError where it is not installed."""
    try:
        return import_module("bitsandbytes")
    except ImportError as error:
        raise QuantizationError(
            "nf4 needs bitsandbytes, which is not installed: pip install 'maestrale[quant]'"
        ) from error


@cache
def _scale_levels(device: torch.device) -> Tensor:
    """The 256 levels of an 8-bit scale; one copy for all matrices."""
    levels: Tensor = bitsandbytes().functional.create_dynamic_map().to(device)
    return levels

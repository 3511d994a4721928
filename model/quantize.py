"""Weight matrices in 8 or 4 bits: how they are made, checked and multiplied. Knows no files.

A quantised matrix is a few *parts* (tensors by name). Making parts of a dense matrix, and making
parts into something that multiplies, are apart, so that what is quantised at load and what was
written before and read back go the same way and compute the same bits.

    mode        parts per matrix                                     of bf16   good for
    nf4         4-bit codes, a float32 scale per 64 weights            0.281   CUDA, least memory
    nf4-double  the same with 8-bit scales, scaled per 256 of them     0.258   the same
    int8        8-bit codes, a scale per output                        0.501   close to lossless
    int4        4-bit codes, scale and zero per 32 inputs of a row     0.313   speed on a CPU

Rows stay in the dtype of the checkpoint. int8 and int4 have fast kernels for bfloat16 on a CPU;
elsewhere they are turned into the rows' dtype for each product: less memory, not more speed.
Scales of int8 and int4 are bfloat16 because those kernels want the rows' dtype; codes are chosen
for the rounded scales.

Shape suffixes: O outputs, I inputs, R rows, P inputs padded to whole groups, G groups of a row.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from model.errors import QuantizationError
from model.experts import ExpertWeights, Matrix

MODES = ("nf4", "nf4-double", "int8", "int4")

Parts = Mapping[str, Tensor]
Shape = tuple[int, ...]

NF4_BLOCK = 64
"""Weights that share a scale; rows follow each other, so a block may span two of them."""
NF4_SCALES_BLOCK = 256
"""Scales that share a scale, in nf4-double."""
INT4_GROUP = 32
"""Inputs of a row that share scale and zero: the smallest that torch's kernel knows, for fidelity.
The next larger one would save a tenth of the memory, and its kernel is not faster."""

_INT4_OUTPUTS = 16  # torch's kernel wants a multiple of it
# With others torch 2.13's kernel computes nonsense or crashes the process, without a word; measured
# on AVX2, where 8 was enough.
_INT8_INPUTS = 32
_SMALLEST_SCALE = 1e-8  # of a group or row whose weights are all the same
_ROWS_AT_ONCE = 2048  # bounds what quantising takes in float32 beside the matrix


@dataclass(frozen=True)
class PartSpec:
    """What a part of a quantised matrix must look like."""

    dtype: torch.dtype
    shape: Shape
    low: float | None = None
    """The least sound value; None where every value of the dtype is."""

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


def require(mode: str) -> None:
    """Raise QuantizationError when the mode is unknown or its library is not installed."""
    _check_mode(mode)
    if mode.startswith("nf4"):
        _bitsandbytes()


def part_specs(mode: str, shape: tuple[int, int]) -> dict[str, PartSpec]:
    """The parts of a matrix of that shape (outputs, inputs). Raises QuantizationError."""
    _check_mode(mode)
    outputs, inputs = shape
    if mode == "int8":
        return {
            "codes": PartSpec(torch.int8, (outputs, inputs), -127),
            "scales": PartSpec(torch.bfloat16, (outputs,), 0),
        }
    if mode == "int4":
        groups = -(-inputs // INT4_GROUP)
        return {
            "codes": PartSpec(torch.uint8, (outputs, groups * INT4_GROUP // 2)),
            "scales": PartSpec(torch.bfloat16, (outputs, groups), 0),
            "zeros": PartSpec(torch.bfloat16, (outputs, groups), -torch.inf),
        }
    num_blocks = -(-outputs * inputs // NF4_BLOCK)
    codes = PartSpec(torch.uint8, (-(-outputs * inputs // 2), 1))
    if mode == "nf4":
        return {"codes": codes, "scales": PartSpec(torch.float32, (num_blocks,), 0)}
    return {
        "codes": codes,
        "scales": PartSpec(torch.uint8, (num_blocks,)),
        "scale_scales": PartSpec(torch.float32, (-(-num_blocks // NF4_SCALES_BLOCK),), 0),
        "scale_offset": PartSpec(torch.float32, (1,), 0),
    }


def quantized_bytes(mode: str, shape: tuple[int, int]) -> int:
    """Memory of a matrix of that shape, which is also its size in a file."""
    return sum(spec.num_bytes for spec in part_specs(mode, shape).values())


def check_parts(parts: Parts, mode: str, shape: tuple[int, int]) -> None:
    """Raise ValueError naming the part that a matrix of that mode and shape cannot have."""
    specs = part_specs(mode, shape)
    if parts.keys() != specs.keys():
        raise ValueError(f"the parts are {sorted(parts)}, {mode} has {sorted(specs)}")
    for name, spec in specs.items():
        part = parts[name]
        if (part.dtype, tuple(part.shape)) != (spec.dtype, spec.shape):
            raise ValueError(
                f"{name} is {part.dtype} of shape {tuple(part.shape)}, "
                f"{mode} has {spec.dtype} of shape {spec.shape}"
            )
        if spec.low is None:
            continue
        low, high = (float(extreme) for extreme in part.aminmax())
        if not (spec.low <= low and high < torch.inf and low > -torch.inf):  # also refuses NaN
            raise ValueError(f"{name} holds values from {low} to {high}, impossible for {mode}")


@torch.no_grad()
def quantize(weight_OI: Tensor, mode: str) -> dict[str, Tensor]:
    """The parts of a dense matrix, on its device. Raises QuantizationError."""
    _check_mode(mode)
    if mode.startswith("nf4"):
        return _nf4_parts(weight_OI, is_double=mode == "nf4-double")
    make = _int8_parts if mode == "int8" else _int4_parts
    pieces = [make(rows.float()) for rows in weight_OI.split(_ROWS_AT_ONCE)]
    return {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]}


def matrix(parts: Parts, mode: str, shape: tuple[int, int], dtype: torch.dtype) -> Matrix:
    """Sound parts as something that multiplies rows of that dtype. Raises QuantizationError."""
    has_kernel = dtype == torch.bfloat16 and parts["codes"].device.type == "cpu"
    if mode == "int8":
        has_kernel = has_kernel and shape[1] % _INT8_INPUTS == 0
        return Int8Matrix(parts["codes"], parts["scales"], has_kernel=has_kernel)
    if mode == "int4":
        if has_kernel and shape[0] % _INT4_OUTPUTS == 0:
            return PackedInt4Matrix.from_parts(parts)
        return Int4Matrix(parts["codes"], parts["scales"], parts["zeros"], num_inputs=shape[1])
    return Nf4Matrix.from_parts(parts, shape, dtype)


def quantize_expert(weights: ExpertWeights, mode: str) -> ExpertWeights:
    """The same expert in fewer bits. Raises QuantizationError."""

    def smaller(weight: Tensor | Matrix) -> Matrix:
        if not isinstance(weight, Tensor):
            raise QuantizationError("the expert is quantised already")
        outputs, inputs = weight.shape
        return matrix(quantize(weight, mode), mode, (outputs, inputs), weight.dtype)

    return ExpertWeights(smaller(weights.w13_2FD), smaller(weights.w2_DF))


# --- int8 ---


@dataclass(frozen=True)
class Int8Matrix:
    """weight[o, i] = codes[o, i] * scales[o]."""

    codes_OI: Tensor
    scales_O: Tensor
    has_kernel: bool
    """Whether torch's kernel can be used: rows will be bfloat16, on a CPU."""

    @property
    def nbytes(self) -> int:
        return self.codes_OI.nbytes + self.scales_O.nbytes

    def linear(self, x_RI: Tensor) -> Tensor:
        product_RO: Tensor
        if self.has_kernel:
            # the kernel does not look, and computes nonsense from scales of another dtype
            assert x_RI.dtype == self.scales_O.dtype, f"rows are {x_RI.dtype}"
            product_RO = torch.ops.aten._weight_int8pack_mm(
                x_RI.contiguous(), self.codes_OI, self.scales_O
            )
        else:
            product_RO = F.linear(x_RI, self.codes_OI.to(x_RI.dtype)) * self.scales_O.to(x_RI.dtype)
        return product_RO


def _int8_parts(weight_OI: Tensor) -> dict[str, Tensor]:
    largest_O1 = weight_OI.abs().amax(1, keepdim=True)
    scales_O1 = (largest_O1 / 127).clamp(min=_SMALLEST_SCALE).bfloat16()
    codes_OI = (weight_OI / scales_O1).round_().clamp_(-127, 127).to(torch.int8)
    return {"codes": codes_OI, "scales": scales_O1.squeeze(1)}


# --- int4 ---


@dataclass(frozen=True)
class Int4Matrix:
    """weight[o, i] = (code[o, i] - 8) * scale[o, g] + zero[o, g] with g = i // INT4_GROUP.

    Even inputs have the low half of a byte, odd ones the high half.
    """

    codes: Tensor
    scales_OG: Tensor
    zeros_OG: Tensor
    num_inputs: int

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scales_OG.nbytes + self.zeros_OG.nbytes

    def linear(self, x_RI: Tensor) -> Tensor:
        centred_OP = unpack_int4(self.codes).to(x_RI.dtype).sub_(8)
        weight_OGx = centred_OP.view(*self.scales_OG.shape, INT4_GROUP)
        weight_OGx.mul_(self.scales_OG[..., None]).add_(self.zeros_OG[..., None])
        return F.linear(x_RI, weight_OGx.flatten(1)[:, : self.num_inputs])


@dataclass(frozen=True)
class PackedInt4Matrix:
    """The same in the order that torch's CPU kernel wants, which differs between processors."""

    packed: Tensor
    scales_and_zeros_GO2: Tensor

    @classmethod
    def from_parts(cls, parts: Parts) -> "PackedInt4Matrix":
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(
            unpack_int4(parts["codes"]).int(), 1
        )
        pairs_OG2 = torch.stack((parts["scales"], parts["zeros"]), dim=-1)
        return cls(packed, pairs_OG2.transpose(0, 1).contiguous())

    @property
    def nbytes(self) -> int:
        return self.packed.nbytes + self.scales_and_zeros_GO2.nbytes

    def linear(self, x_RI: Tensor) -> Tensor:
        assert x_RI.dtype == self.scales_and_zeros_GO2.dtype, f"rows are {x_RI.dtype}"
        padding = self.scales_and_zeros_GO2.shape[0] * INT4_GROUP - x_RI.shape[1]
        product_RO: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
            F.pad(x_RI, (0, padding)).contiguous(),
            self.packed,
            INT4_GROUP,
            self.scales_and_zeros_GO2,
        )
        return product_RO


def unpack_int4(codes: Tensor) -> Tensor:
    """One code per element, in order, uint8."""
    return torch.stack((codes & 15, codes >> 4), dim=-1).flatten(1)


def _int4_parts(weight_OI: Tensor) -> dict[str, Tensor]:
    # Padding repeats the last input, so that it does not widen the last group's range.
    padding = -weight_OI.shape[1] % INT4_GROUP
    padded_OP = torch.cat((weight_OI, weight_OI[:, -1:].expand(-1, padding)), dim=1)
    groups_OGx = padded_OP.unflatten(1, (-1, INT4_GROUP))
    low_OG1, high_OG1 = groups_OGx.aminmax(dim=-1, keepdim=True)
    # The least weight becomes code 0, the greatest 15. Searching nine narrower ranges for the
    # smallest squared error was tried: nine times the work for 0.17 instead of 0.26 % of
    # perplexity (40 stories, tiny checkpoint).
    scales_OG1 = ((high_OG1 - low_OG1) / 15).clamp(min=_SMALLEST_SCALE).bfloat16()
    zeros_OG1 = (low_OG1 + 8 * scales_OG1.float()).bfloat16()
    codes_OGx = ((groups_OGx - zeros_OG1) / scales_OG1 + 8).round_().clamp_(0, 15)
    codes_OP = codes_OGx.flatten(1).to(torch.uint8)
    return {
        "codes": codes_OP[:, ::2] | codes_OP[:, 1::2] << 4,
        "scales": scales_OG1.squeeze(2),
        "zeros": zeros_OG1.squeeze(2),
    }


# --- nf4 ---


@dataclass(frozen=True)
class Nf4Matrix:
    """bitsandbytes' NormalFloat4: 16 levels where a normal distribution's weights are."""

    codes: Tensor
    state: Any
    """bitsandbytes' QuantState, with the scales."""
    nbytes: int
    matmul_4bit: Callable[[Tensor, Tensor, Any], Tensor]

    @classmethod
    def from_parts(cls, parts: Parts, shape: tuple[int, int], dtype: torch.dtype) -> "Nf4Matrix":
        bitsandbytes = _bitsandbytes()
        functional = bitsandbytes.functional
        device = parts["codes"].device
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
            shape=torch.Size(shape),
            code=functional.get_4bit_type("nf4", device=device),
            blocksize=NF4_BLOCK,
            quant_type="nf4",
            dtype=dtype,
            offset=offset,
            state2=scales_state,
        )
        nbytes = sum(part.nbytes for part in parts.values())
        return cls(parts["codes"], state, nbytes, bitsandbytes.matmul_4bit)

    def linear(self, x_RI: Tensor) -> Tensor:
        return self.matmul_4bit(x_RI, self.codes, self.state)


def _nf4_parts(weight_OI: Tensor, *, is_double: bool) -> dict[str, Tensor]:
    codes, state = _bitsandbytes().functional.quantize_4bit(
        weight_OI.float().contiguous(),
        blocksize=NF4_BLOCK,
        quant_type="nf4",
        compress_statistics=is_double,
    )
    parts = {"codes": codes, "scales": state.absmax}
    if is_double:
        parts |= {"scale_scales": state.state2.absmax, "scale_offset": state.offset.view(1)}
    return parts


@cache
def _scale_levels(device: torch.device) -> Tensor:
    """The 256 levels of an 8-bit scale; one copy for all matrices."""
    levels: Tensor = _bitsandbytes().functional.create_dynamic_map().to(device)
    return levels


def _bitsandbytes() -> Any:
    try:
        return import_module("bitsandbytes")
    except ImportError as error:
        raise QuantizationError(
            "nf4 needs bitsandbytes, which is not installed: pip install 'maestrale[quant]'"
        ) from error


def _check_mode(mode: str) -> None:
    if mode not in MODES:
        raise QuantizationError(f"quantisation {mode!r} is not one of {', '.join(MODES)}")

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
for the rounded scales. What codes mean is the business of `quantized_int` and `quantized_nf4`.

Shape suffixes: O outputs, I inputs.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from model.errors import QuantizationError
from model.linear import Matrix
from model.quantized_int import INT4_GROUP, int4_matrix, int4_parts, int8_matrix, int8_parts
from model.quantized_nf4 import NF4_BLOCK, NF4_SCALES_BLOCK, bitsandbytes, nf4_matrix, nf4_parts

MODES = ("nf4", "nf4-double", "int8", "int4")

Parts = Mapping[str, Tensor]
Shape = tuple[int, ...]


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
        bitsandbytes()


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


def cut(
    parts: Parts, mode: str, shape: tuple[int, int], *, axis: int, begin: int, end: int
) -> dict[str, Tensor]:
    """The parts of some rows (axis 0) or columns (axis 1) of a matrix: the same codes and scales.

    shape: of the whole matrix. Raises QuantizationError where weights on both sides of a cut share
    a scale.
    """
    if mode == "nf4-double":
        raise QuantizationError("nf4-double cannot be sliced, its scales share scales: take nf4")
    outputs, inputs = shape
    group = {"int8": 1, "int4": INT4_GROUP, "nf4": NF4_BLOCK}[mode]
    if mode == "nf4" and inputs % group:
        raise QuantizationError(f"nf4 cannot be sliced: {inputs} inputs are no multiple of {group}")
    if axis == 1 and (begin % group or (end % group and end < inputs)):
        raise QuantizationError(
            f"{mode} cannot be sliced at inputs {begin} to {end}: {group} of them share a scale"
        )
    rows = slice(begin, end) if axis == 0 else slice(None)
    num_groups = -(-inputs // group)
    columns = slice(0, num_groups) if axis == 0 else slice(begin // group, -(-end // group))
    wanted = (end - begin, inputs) if axis == 0 else (outputs, end - begin)
    found = {}
    for name, spec in part_specs(mode, wanted).items():
        part = parts[name].view(outputs, -1)[rows]
        if (mode, name) != ("int8", "scales"):  # these belong to whole rows
            part = part.unflatten(1, (num_groups, -1))[:, columns]
        found[name] = part.reshape(spec.shape).clone()
    return found


@torch.no_grad()
def quantize(weight_OI: Tensor, mode: str) -> dict[str, Tensor]:
    """The parts of a dense matrix, on its device. Raises QuantizationError."""
    _check_mode(mode)
    if mode == "int8":
        return int8_parts(weight_OI)
    if mode == "int4":
        return int4_parts(weight_OI)
    return nf4_parts(weight_OI, is_double=mode == "nf4-double")


def matrix(parts: Parts, mode: str, shape: tuple[int, int], dtype: torch.dtype) -> Matrix:
    """Sound parts as something that multiplies rows of that dtype. Raises QuantizationError."""
    _check_mode(mode)
    make = {"int8": int8_matrix, "int4": int4_matrix}.get(mode, nf4_matrix)
    return make(parts, shape, dtype)


def quantized(weight_OI: Tensor, mode: str) -> Matrix:
    """A dense matrix in fewer bits, for rows of its own dtype. Raises QuantizationError."""
    outputs, inputs = weight_OI.shape
    return matrix(quantize(weight_OI, mode), mode, (outputs, inputs), weight_OI.dtype)


def _check_mode(mode: str) -> None:
    if mode not in MODES:
        raise QuantizationError(f"quantisation {mode!r} is not one of {', '.join(MODES)}")

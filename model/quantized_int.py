"""int8 and int4: codes, and matrices that multiply by torch's CPU kernels where there are any.

Shape suffixes: O outputs, I inputs, R rows, P inputs padded to whole groups, G groups of a row.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from model.linear import Matrix, widened_linear, widening_pays

INT4_GROUP = 32
"""Inputs of a row that share scale and zero: the smallest that torch's kernel knows, for fidelity.
The next larger one would save a tenth of the memory, and its kernel is not faster."""

_INT4_OUTPUTS = 16  # torch's kernel wants a multiple of it
_INT4_BLOCKS = (64, 32)  # outputs that its kernel may keep side by side
_INT4_OUTPUTS_AT_ONCE = 512  # weights that are float32 at a time; whole blocks
_INT4_ROWS_PER_THREAD = 64  # from which on float32 beats that kernel; measured on AVX-512
# With others torch 2.13's kernel computes nonsense or crashes the process, without a word; measured
# on AVX2, where 8 was enough.
_INT8_INPUTS = 32
_INT8_ROWS_PER_THREAD = 16  # from which on float32 beats torch's int8 kernel; measured on AVX2
# Bytes times bytes, exactly: without these instructions oneDNN's product may overflow (AVX2).
_MULTIPLIES_BYTES = torch.cpu._is_vnni_supported()
_BYTES_ROWS = 6  # from which on that beats torch's int8 kernel, with one thread and with two
_FINER = 254  # steps of a row's second part in one of the first
_SMALLEST_SCALE = 1e-8  # of a group or row whose weights are all the same
_SMALLEST_STEP = 1e-30  # of a row that is all zeros
_ROWS_AT_ONCE = 256  # bounds what is in 32 bits at once while a matrix is made

_Parts = Mapping[str, Tensor]


def int8_parts(weight_OI: Tensor) -> dict[str, Tensor]:
    """Codes from -127 to 127, and a scale for every output."""
    return _by_rows(lambda rows: _int8_parts(rows.float()), weight_OI)


def int8_matrix(parts: _Parts, shape: tuple[int, int], dtype: torch.dtype) -> Matrix:
    """The parts as something that multiplies rows of that dtype."""
    has_kernel = _may_have_kernel(parts, dtype) and shape[1] % _INT8_INPUTS == 0
    return Int8Matrix(parts["codes"], parts["scales"], has_kernel=has_kernel)


def int4_parts(weight_OI: Tensor) -> dict[str, Tensor]:
    """Codes from 0 to 15, two to a byte, and scale and zero for every group of inputs."""
    return _by_rows(lambda rows: _int4_parts(rows.float()), weight_OI)


def int4_matrix(parts: _Parts, shape: tuple[int, int], dtype: torch.dtype) -> Matrix:
    """The parts as something that multiplies rows of that dtype."""
    if _may_have_kernel(parts, dtype) and shape[0] % _INT4_OUTPUTS == 0:
        return PackedInt4Matrix.from_parts(parts)
    return Int4Matrix(parts["codes"], parts["scales"], parts["zeros"], num_inputs=shape[1])


def _may_have_kernel(parts: _Parts, dtype: torch.dtype) -> bool:
    return dtype == torch.bfloat16 and parts["codes"].device.type == "cpu"


def _by_rows(make: Callable[[Tensor], dict[str, Tensor]], matrix: Tensor) -> dict[str, Tensor]:
    """What `make` makes of every few rows, one below the other."""
    joined: dict[str, Tensor] = {}
    for begin in range(0, len(matrix), _ROWS_AT_ONCE):
        for name, piece in make(matrix[begin : begin + _ROWS_AT_ONCE]).items():
            if name not in joined:
                joined[name] = piece.new_empty(len(matrix), *piece.shape[1:])
            joined[name][begin : begin + _ROWS_AT_ONCE] = piece
    return joined


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

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.codes_OI, self.scales_O)

    def linear(self, x_RI: Tensor) -> Tensor:
        product_RO: Tensor
        if self._bytes_pay(x_RI):
            product_RO = self._multiply_bytes(x_RI)
        elif widening_pays(x_RI, _INT8_ROWS_PER_THREAD):
            product_RO = widened_linear(x_RI, len(self.codes_OI), self._wide)
        elif self.has_kernel:
            # the kernel does not look, and computes nonsense from scales of another dtype
            assert x_RI.dtype == self.scales_O.dtype, f"rows are {x_RI.dtype}"
            product_RO = torch.ops.aten._weight_int8pack_mm(
                x_RI.contiguous(), self.codes_OI, self.scales_O
            )
        else:
            codes_OI, scales_O = self.codes_OI.to(x_RI.dtype), self.scales_O.to(x_RI.dtype)
            if x_RI.dtype == torch.float16:  # bare codes would add up to more than it can hold
                product_RO = F.linear(x_RI, codes_OI.mul_(scales_O[:, None]))
            else:
                product_RO = F.linear(x_RI, codes_OI) * scales_O
        return product_RO

    def _bytes_pay(self, x_RI: Tensor) -> bool:
        return (
            _MULTIPLIES_BYTES
            and x_RI.device.type == "cpu"
            and x_RI.dtype in (torch.bfloat16, torch.float16)
            and len(x_RI) >= _BYTES_ROWS
        )

    def _multiply_bytes(self, x_RI: Tensor) -> Tensor:
        """Rows in two parts of one byte each: in 127 steps of the row's largest, and what that
        leaves. What both leave is 1/64,516 of the largest at most; bfloat16 rounds off 1/512 of it.
        """
        num_rows = len(x_RI)
        wide_RI = x_RI.float()
        steps_R1 = wide_RI.abs().amax(1, keepdim=True).clamp_(min=_SMALLEST_STEP).div_(127)
        wide_RI.div_(steps_R1)
        first_RI = wide_RI.round()
        second_RI = wide_RI.sub_(first_RI).mul_(_FINER).round_()
        parts_2RI = torch.cat((first_RI, second_RI)).to(torch.int8)
        sums_2RO = torch._int_mm(parts_2RI, self.codes_OI.t()).float()
        product_RO = sums_2RO[:num_rows].add_(sums_2RO[num_rows:], alpha=1 / _FINER)
        return product_RO.mul_(steps_R1).mul_(self.scales_O.float()).to(x_RI.dtype)

    def _wide(self, outputs: slice) -> Tensor:
        return self.codes_OI[outputs].float().mul_(self.scales_O[outputs, None])


def _int8_parts(weight_OI: Tensor) -> dict[str, Tensor]:
    largest_O1 = weight_OI.abs().amax(1, keepdim=True)
    scales_O1 = (largest_O1 / 127).clamp(min=_SMALLEST_SCALE).bfloat16()
    codes_OI = (weight_OI / scales_O1).round_().clamp_(-127, 127).to(torch.int8)
    return {"codes": codes_OI, "scales": scales_O1.squeeze(1)}


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

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.codes, self.scales_OG, self.zeros_OG)

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
    def from_parts(cls, parts: _Parts) -> "PackedInt4Matrix":
        def pack(codes: Tensor) -> dict[str, Tensor]:
            integers = unpack_int4(codes).int()
            return {"": torch.ops.aten._convert_weight_to_int4pack_for_cpu(integers, 1)}

        # the kernel's order is by blocks of at most 64 rows: pieces join to what the whole gives
        packed = _by_rows(pack, parts["codes"])[""]
        pairs_OG2 = torch.stack((parts["scales"], parts["zeros"]), dim=-1)
        return cls(packed, pairs_OG2.transpose(0, 1).contiguous())

    @property
    def nbytes(self) -> int:
        return self.packed.nbytes + self.scales_and_zeros_GO2.nbytes

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.packed, self.scales_and_zeros_GO2)

    def linear(self, x_RI: Tensor) -> Tensor:
        assert x_RI.dtype == self.scales_and_zeros_GO2.dtype, f"rows are {x_RI.dtype}"
        num_groups, num_outputs, _ = self.scales_and_zeros_GO2.shape
        product_RO: Tensor
        padded_RP = F.pad(x_RI, (0, num_groups * INT4_GROUP - x_RI.shape[1]))
        if (
            widening_pays(x_RI, _INT4_ROWS_PER_THREAD)
            and _block_outputs()
            and num_outputs % _block_outputs() == 0
        ):
            wide_RP = padded_RP.float()
            product_RO = x_RI.new_empty(len(x_RI), num_outputs)
            for begin in range(0, num_outputs, _INT4_OUTPUTS_AT_ONCE):
                outputs = slice(begin, begin + _INT4_OUTPUTS_AT_ONCE)
                product_RO[:, outputs] = wide_RP @ self._wide(outputs)
            return product_RO
        product_RO = torch.ops.aten._weight_int4pack_mm_for_cpu(
            padded_RP.contiguous(), self.packed, INT4_GROUP, self.scales_and_zeros_GO2
        )
        return product_RO

    def _wide(self, outputs: slice) -> Tensor:
        num_groups, _, _ = self.scales_and_zeros_GO2.shape
        codes_PO = _unpacked(self.packed, num_groups * INT4_GROUP, _block_outputs(), outputs)
        codes_GxO = codes_PO.view(num_groups, INT4_GROUP, -1).float()
        pairs_GO2 = self.scales_and_zeros_GO2[:, outputs].float()
        scales_G1O, zeros_G1O = pairs_GO2[..., 0].unsqueeze(1), pairs_GO2[..., 1].unsqueeze(1)
        weight_GxO = torch.addcmul(zeros_G1O - 8 * scales_G1O, codes_GxO, scales_G1O, out=codes_GxO)
        return weight_GxO.flatten(0, 1)


def _unpacked(packed: Tensor, num_inputs: int, block: int, outputs: slice) -> Tensor:
    """Codes (inputs, outputs) of some whole blocks of what torch's kernel reads."""
    half = block // 2
    blocks = slice(outputs.start // block, -(-outputs.stop // block))
    halves_PBx = packed.view(-1, num_inputs, half)[blocks].transpose(0, 1)
    codes_PBx = packed.new_empty(*halves_PBx.shape[:2], block)
    torch.bitwise_and(halves_PBx, 15, out=codes_PBx[..., :half])
    torch.bitwise_right_shift(halves_PBx, 4, out=codes_PBx[..., half:])
    return codes_PBx.flatten(1)


@cache
def _block_outputs() -> int:
    """How many outputs torch's kernel for this processor keeps side by side, input after input: the
    first half of them in the low halves of bytes. 0: it has another order.

    Found out by packing the outputs' own numbers, first their low bits, then their high ones.
    """
    for block in _INT4_BLOCKS:
        numbers = torch.arange(block)
        found = torch.zeros(INT4_GROUP, block, dtype=torch.int64)
        for shift in (0, 4):
            codes = (numbers >> shift & 15)[:, None].expand(-1, INT4_GROUP).int().contiguous()
            packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
            codes = _unpacked(packed, INT4_GROUP, block, slice(0, block))
            found |= codes.long() << shift
        if (found == numbers).all():
            return block
    return 0


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

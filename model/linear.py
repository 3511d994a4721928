"""Rows through a weight matrix, however the matrix is held.

Shape suffixes: R rows, I inputs, O outputs.
"""

import time
from collections.abc import Callable
from functools import cache
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

_HAS_INSTRUCTIONS: dict[torch.dtype, bool] = {
    torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported(),
    torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported(),
}
"""Whether this CPU has any for matrices of that dtype, fast or slow."""

_TRIAL = (256, 1024, 4096)  # rows, outputs, inputs
_NUM_TRIALS = 5

_DENSE_ROWS_PER_THREAD = {False: 6, True: 32}
"""From so many rows on, multiplying in float32 repays making every weight one. By whether there are
instructions, which are then slow ones; measured on AVX2, and on AVX-512 without AMX."""

_OUTPUTS_AT_ONCE = 256
"""Weights that are float32 at a time stay in the processor's cache: 4 MiB of 4,096 inputs."""


class Matrix(Protocol):
    """A weight matrix (outputs, inputs) that is held as something else than a plain tensor."""

    @property
    def nbytes(self) -> int:
        """Memory that it takes, scales included."""
        ...

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What tells these weights from others: codes, scales, or what else they are held as."""
        ...

    def linear(self, x_RI: Tensor) -> Tensor:
        """What `F.linear(x, matrix)` is for a plain tensor, in the dtype of x."""
        ...


Weight = Tensor | Matrix


def linear(x_RI: Tensor, weight: Weight) -> Tensor:
    """Rows through a weight matrix, however it is held."""
    if not isinstance(weight, Tensor):
        return weight.linear(x_RI)
    if widening_pays(x_RI, _DENSE_ROWS_PER_THREAD[_HAS_INSTRUCTIONS.get(x_RI.dtype, True)]):
        return _widened_dense(x_RI, weight)
    return F.linear(x_RI, weight)


@cache
def multiplies(dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies large matrices of that dtype at least as fast as float32 ones.

    Tried out once where it has instructions for them: those of Intel's processors without AMX do
    three fifths of what the same processor does in float32.
    """
    if not _HAS_INSTRUCTIONS.get(dtype, True):
        return False
    if dtype not in _HAS_INSTRUCTIONS:
        return True
    num_rows, num_outputs, num_inputs = _TRIAL
    x_RI, weight_OI = torch.ones(num_rows, num_inputs), torch.ones(num_outputs, num_inputs)
    half_RI, half_OI = x_RI.to(dtype), weight_OI.to(dtype)
    ways = (F.linear, _widened_dense)
    took_s: dict[Callable[[Tensor, Tensor], Tensor], list[float]] = {way: [] for way in ways}
    for _ in range(_NUM_TRIALS):
        for way in ways:
            started = time.perf_counter()
            way(half_RI, half_OI)
            took_s[way].append(time.perf_counter() - started)
    return min(took_s[F.linear]) <= min(took_s[_widened_dense])


def widening_pays(x_RI: Tensor, rows_per_thread: int) -> bool:
    """Whether these rows are multiplied faster in float32, weights converted as they are needed.

    So it is on a CPU without fast instructions for half precision once there are enough rows.
    Without any, torch converts every weight for every few rows anew.

    rows_per_thread: what repays the conversion, which depends on how the weights are held.
    """
    return (
        x_RI.device.type == "cpu"
        and not multiplies(x_RI.dtype)
        and len(x_RI) >= rows_per_thread * torch.get_num_threads()
    )


def widened_linear(x_RI: Tensor, num_outputs: int, weights: Callable[[slice], Tensor]) -> Tensor:
    """Rows through a matrix that is made float32 a few outputs at a time: (R, O), dtype of x.

    weights: the rows (outputs) of the matrix that a slice names, float32.
    """
    wide_IR = x_RI.float().t()
    # the weights on the left: torch's float32 product is up to twice as fast with few rows so
    product_OR = wide_IR.new_empty(num_outputs, len(x_RI))
    for begin in range(0, num_outputs, _OUTPUTS_AT_ONCE):
        outputs = slice(begin, begin + _OUTPUTS_AT_ONCE)
        torch.mm(weights(outputs), wide_IR, out=product_OR[outputs])
    return product_OR.t().to(x_RI.dtype, memory_format=torch.contiguous_format)


def _widened_dense(x_RI: Tensor, weight_OI: Tensor) -> Tensor:
    return widened_linear(x_RI, len(weight_OI), lambda outputs: weight_OI[outputs].float())

"""Rows through a weight matrix, however the matrix is held.

Shape suffixes: R rows, I inputs, O outputs.
"""

from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

_IS_NATIVE: dict[torch.dtype, bool] = {
    torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported(),
    torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported(),
}
"""Whether this CPU has instructions for matrices of that dtype."""

_DENSE_ROWS_PER_THREAD = 6
"""From so many rows on, multiplying in float32 repays making every weight one; measured on AVX2."""

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
    if widening_pays(x_RI, _DENSE_ROWS_PER_THREAD):
        return widened_linear(x_RI, len(weight), lambda outputs: weight[outputs].float())
    return F.linear(x_RI, weight)


def multiplies(dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies matrices of that dtype without widening them."""
    return _IS_NATIVE.get(dtype, True)


def widening_pays(x_RI: Tensor, rows_per_thread: int) -> bool:
    """Whether these rows are multiplied faster in float32, weights converted as they are needed.

    So it is on a CPU without instructions for half precision once there are enough rows: it
    multiplies in float32 anyway, and torch then converts every weight for every few rows anew.

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

"""Rows through a weight matrix, however the matrix is held.

Shape suffixes: R rows, I inputs.
"""

from typing import Protocol

import torch.nn.functional as F
from torch import Tensor


class Matrix(Protocol):
    """A weight matrix (outputs, inputs) that is held as something else than a plain tensor."""

    @property
    def nbytes(self) -> int:
        """Memory that it takes, scales included."""
        ...

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Codes, scales and whatever else it is held as."""
        ...

    def linear(self, x_RI: Tensor) -> Tensor:
        """What `F.linear(x, matrix)` is for a plain tensor, in the dtype of x."""
        ...


Weight = Tensor | Matrix


def linear(x_RI: Tensor, weight: Weight) -> Tensor:
    """Rows through a weight matrix, however it is held."""
    return F.linear(x_RI, weight) if isinstance(weight, Tensor) else weight.linear(x_RI)

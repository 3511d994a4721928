"""The expert FFNs, and the seam between a decoder and wherever they run.

The decoder knows only `Experts`. `LocalExperts` computes in this process; the service has another
that sends the rows away. Both end in `weighted_sums`, so both compute the same.

Shape suffixes: T tokens, D hidden, F intermediate, R rows sent to one place, A assignments
(row, expert, weight), K experts per token.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from model.linear import Weight, linear
from model.router import Routing
from model.units import Unit


class PendingRows(Protocol):
    """The experts' answer, on its way."""

    def wait(self) -> Tensor:
        """Block until it is there: weighted sums of the experts' outputs, (T, D) float32."""
        ...


class Experts(Protocol):
    """All experts of a model, wherever they are."""

    def dispatch(self, layer: int, x_TD: Tensor, routing: Routing) -> PendingRows:
        """Start computing, for every row, the weighted sum over its experts. Returns at once."""
        ...


@dataclass(frozen=True)
class ExpertWeights:
    """A unit: one expert of one layer, or a slice of one, which has fewer F.

    w1 (gate) and w3 (up) are stacked, so that one product serves both.
    """

    w13_2FD: Weight
    w2_DF: Weight

    @property
    def num_bytes(self) -> int:
        return self.w13_2FD.nbytes + self.w2_DF.nbytes


def checksum(weights: ExpertWeights) -> int:
    """Of all values as they are held in memory: no single bit can flip without changing it.

    Where `Matrix.tensors` has only sums of them, a flip that rounding hides is not seen.
    """
    total = 0
    for weight in (weights.w13_2FD, weights.w2_DF):
        for tensor in (weight,) if isinstance(weight, Tensor) else weight.tensors:
            values = tensor.reshape(-1).view(torch.uint8)
            num_whole = len(values) // 8 * 8
            whole = values[:num_whole].view(torch.int64).sum()  # wraps round, which is as good
            total = 31 * total + int(whole) + int(values[num_whole:].sum())
    return total


@dataclass(frozen=True)
class Assignments:
    """Which rows go to which expert with what weight, sorted by unit, then by row.

    Unit `counts[i][0]` owns the next `counts[i][1]` entries of rows_A and weights_A.
    """

    counts: tuple[tuple[Unit, int], ...]
    rows_A: Tensor
    """Row numbers, int64."""
    weights_A: Tensor
    """float32"""

    def to(self, device: torch.device) -> "Assignments":
        """The same on another device."""
        return Assignments(self.counts, self.rows_A.to(device), self.weights_A.to(device))


def assign(layer: int, routing: Routing) -> Assignments:
    """Sort a routing by expert; all of them whole."""
    # numpy: torch takes several microseconds for every step of this, in each layer of each step
    experts_A: NDArray[np.int64] = routing.expert_ids_TK.flatten().cpu().numpy()
    order_A = experts_A.argsort(kind="stable")
    counts = np.bincount(experts_A).tolist()
    top_k, device = routing.expert_ids_TK.shape[1], routing.weights_TK.device
    return Assignments(
        counts=tuple((Unit(layer, expert_id), n) for expert_id, n in enumerate(counts) if n),
        rows_A=torch.from_numpy(order_A // top_k).to(device),
        weights_A=routing.weights_TK.flatten()[torch.from_numpy(order_A).to(device)],
    )


def expert_ffn(weights: ExpertWeights, x_RD: Tensor) -> Tensor:
    """w2(silu(w1 x) * w3 x) of each row, dtype of x."""
    gate_RF, up_RF = linear(x_RD, weights.w13_2FD).chunk(2, dim=-1)
    return linear(F.silu(gate_RF) * up_RF, weights.w2_DF)


def weighted_sums(
    held: Mapping[Unit, ExpertWeights], x_RD: Tensor, assignments: Assignments
) -> Tensor:
    """Sum of weight x expert output for every row, (R, D) float32.

    Sums run in ascending order of the units, so the result does not depend on the batch.
    """
    sums_RD = torch.zeros(x_RD.shape, dtype=torch.float32, device=x_RD.device)
    begin = 0
    for unit, count in assignments.counts:
        rows = assignments.rows_A[begin : begin + count]
        weights = assignments.weights_A[begin : begin + count]
        begin += count
        output = expert_ffn(held[unit], x_RD[rows]).float()
        sums_RD.index_add_(0, rows, output * weights[:, None])
    return sums_RD


@dataclass(frozen=True)
class Computed:
    """An answer that is already there."""

    rows_TD: Tensor

    def wait(self) -> Tensor:
        return self.rows_TD


class LocalExperts:
    """All experts in this process."""

    def __init__(self, held: Mapping[Unit, ExpertWeights]) -> None:
        """held: every expert, whole."""
        self._held = held

    def dispatch(self, layer: int, x_TD: Tensor, routing: Routing) -> PendingRows:
        return Computed(weighted_sums(self._held, x_TD, assign(layer, routing)))

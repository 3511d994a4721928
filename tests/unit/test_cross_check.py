"""Rows are sampled at the share that is asked for, and a checksum sees every flipped bit."""

import random
import threading
from collections.abc import Iterator
from itertools import combinations
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from cluster import wire
from cluster.head.cross_check import MAX_WAITING, CrossCheck, _Sample
from cluster.metrics import HeadMetrics
from cluster.placement import WorkerInfo
from cluster.rpc import Identity
from model.experts import ExpertWeights, assign, checksum
from model.quantize import MODES, quantized
from model.router import Routing
from model.units import Unit
from tests.cluster_fakes import DEADLINE_S, random_rows

INFOS = [WorkerInfo(f"worker-{number}", "127.0.0.1:1", number + 1, 0) for number in range(3)]
HIDDEN = 6


class Recorded(CrossCheck):
    """Asks nobody; keeps what it would have checked, when it is let through."""

    def __init__(self, metrics: HeadMetrics, share: float) -> None:
        self.checked: list[_Sample] = []
        self.may_go_on = threading.Event()
        self.may_go_on.set()
        super().__init__(Identity("head", "f"), metrics, share=share)

    def _check(self, sample: _Sample) -> str:
        assert self.may_go_on.wait(DEADLINE_S)
        self.checked.append(sample)
        return "agreed"


@pytest.fixture
def metrics() -> HeadMetrics:
    return HeadMetrics()


@pytest.fixture
def check(metrics: HeadMetrics) -> Iterator[Recorded]:
    check = Recorded(metrics, share=0.01)
    yield check
    check.close()


def two_copies(unit: Unit) -> tuple[int, list[tuple[WorkerInfo, ...]]]:
    return 4, [(INFOS[0],), (INFOS[1], INFOS[2])]


def offer(check: CrossCheck, *, times: int, copies: object = two_copies) -> Tensor:
    """Rows for experts 2 and 5, five rows of two experts at a time."""
    x_TD = random_rows(5, HIDDEN, seed=0)
    routing = Routing(torch.tensor([[2, 5]] * 5), torch.ones(5, 2))
    for _ in range(times):
        check.offer(x_TD, assign(1, routing), copies)  # type: ignore[arg-type]
    return x_TD


def test_one_row_in_a_hundred_is_checked_of_one_expert_after_the_other(check: Recorded) -> None:
    x_TD = offer(check, times=45)
    check.close()
    assert [sample.unit for sample in check.checked] == [Unit(1, 2), Unit(1, 5)] * 2
    for sample in check.checked:
        assert sample.x_1D.equal(x_TD[:1])
        assert sample.copies == ((INFOS[0],), (INFOS[1], INFOS[2]))
        assert sample.epoch == 4


def test_each_pair_of_an_experts_copies_has_its_turn(check: Recorded) -> None:
    copies = [(info,) for info in INFOS]
    offer(check, times=65, copies=lambda unit: (4, copies))
    check.close()
    for unit in (Unit(1, 2), Unit(1, 5)):
        pairs = [sample.copies for sample in check.checked if sample.unit == unit]
        assert pairs == list(combinations(copies, 2))


def test_an_expert_with_one_copy_is_not_checked(check: Recorded) -> None:
    offer(check, times=45, copies=lambda unit: (4, [(INFOS[0],)]))
    check.close()
    assert check.checked == []


def test_what_nobody_has_time_for_is_dropped_and_counted(
    check: Recorded, metrics: HeadMetrics
) -> None:
    check.may_go_on.clear()
    offer(check, times=10 * (MAX_WAITING + 3))
    dropped = 'maestrale_expert_cross_checks_total{outcome="unanswered"}'
    assert dropped in metrics.exposition()
    check.may_go_on.set()


class Misshapen(CrossCheck):
    """Asks workers that answer at once; all but the first one's sums have some other shape."""

    def __init__(self, metrics: HeadMetrics, shape: tuple[int, int]) -> None:
        self._shape = shape
        super().__init__(Identity("head", "f"), metrics, share=1.0)

    def _channel(self, worker: WorkerInfo) -> Any:
        sums_RD = torch.ones((1, HIDDEN) if worker == INFOS[0] else self._shape)
        reply = wire.joined(wire.encode_reply(1, worker.incarnation, sums_RD, 0.0))
        return SimpleNamespace(stream_stream=lambda method: lambda calls, timeout: iter([reply]))


@pytest.mark.parametrize("shape", [(1, HIDDEN + 1), (2, HIDDEN), (0, 0), (1, 1)])
def test_sums_of_another_shape_are_no_answer(shape: tuple[int, int], metrics: HeadMetrics) -> None:
    check = Misshapen(metrics, shape)
    offer(check, times=1, copies=lambda unit: (4, [(INFOS[0],), (INFOS[1],)]))
    offer(check, times=1, copies=lambda unit: (4, [(INFOS[0],), (INFOS[0], INFOS[1])]))
    check.close()
    unanswered = 'maestrale_expert_cross_checks_total{outcome="unanswered"}'
    assert f"{unanswered} 2.0" in metrics.exposition()


@pytest.mark.parametrize("mode", [None, *MODES])
@given(seed=st.integers(0, 2**30))
def test_any_flipped_bit_changes_the_checksum(mode: str | None, seed: int) -> None:
    rng = random.Random(seed)
    dense = [random_rows(64, 33, seed=seed).T.contiguous(), random_rows(33, 64, seed=seed)]
    held = [matrix if mode is None else quantized(matrix, mode) for matrix in dense]
    weights = ExpertWeights(*held)
    before = checksum(weights)
    assert checksum(weights) == before
    matrix = rng.choice(held)
    tensor = rng.choice([matrix] if isinstance(matrix, Tensor) else list(matrix.tensors))
    values = tensor.view(-1).view(torch.uint8)
    values[rng.randrange(len(values))] ^= 1 << rng.randrange(8)
    assert checksum(weights) != before

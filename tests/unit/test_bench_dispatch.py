"""`bench dispatch`: its experts, its sums and its table. The round trips are in integration."""

import pytest
import torch

from cluster.bench.dispatch import PARTS, DispatchRow, SmallExperts, _TripWatch
from cluster.bench.dispatch_report import as_json, trips_table
from cluster.bench.summary import distribution


def test_small_experts_fit_their_configuration() -> None:
    holding = SmallExperts(64, "bfloat16")()
    assert set(holding.held) == set(holding.config.expert_units)
    for weights in holding.held.values():
        assert isinstance(weights.w13_2FD, torch.Tensor)
        assert isinstance(weights.w2_DF, torch.Tensor)
        assert weights.w13_2FD.shape == (2 * holding.config.intermediate_size, 64)
        assert weights.w2_DF.shape == (64, holding.config.intermediate_size)
        assert weights.w2_DF.dtype == holding.dtype == torch.bfloat16


def test_a_trip_is_its_parts_without_the_worker_however_they_overlap() -> None:
    ticks = iter([0.0, 0.0, 3.0, 4.0, 4.5, 4.5])
    watch = _TripWatch(lambda: next(ticks))
    watch.enter("packing")
    watch.enter("transfer")
    watch.enter("unpacking")
    watch.reveal(2.5, was="transfer", really="experts")  # longer than the wait: it overlapped
    watch.enter("outside")
    trip = watch.trip(4.5)
    assert [trip[name] for name in PARTS] == [3, 1, 0.5, 2.5]
    assert trip["beyond"] == 2.0


def test_the_report_is_in_microseconds_for_people_and_seconds_for_programs() -> None:
    beyond = distribution([0.001, 0.002])
    assert beyond is not None
    row = DispatchRow("tcp", 32, 2048, beyond, dict.fromkeys(PARTS, 0.003))
    table = trips_table([row])
    cells = [next(iter(column.cells)) for column in table.columns]
    assert cells == ["32", "2", "tcp", "1500", "1900", "1990", *["3000"] * 4]
    (found,) = as_json([row])["rows"]
    assert found["beyond"]["p50"] == pytest.approx(0.0015)

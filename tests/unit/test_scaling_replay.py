"""Scaling against a simulated cluster: out with a step of load, back after it, and then at rest."""

import pytest

from cluster.autoscale import Scaling
from tests.scaling_simulator import Load, Model, Moment, replay

SCALING = Scaling(max_heads=8, min_workers=2, max_workers=16, down_after_s=120)


@pytest.mark.parametrize("streams", [0, 3, 9, 17, 40])
def test_a_steady_load_is_settled_once(streams: int) -> None:
    """It may take several steps up, but never a step back, and ends in rest."""
    moments = list(replay([(0, streams)], SCALING, Model(), until_s=600))
    for name in ("num_heads", "num_workers"):
        targets = [getattr(moment.decision, name) for moment in moments]
        assert targets == sorted(targets), f"{name} flaps"
        assert len(set(targets[-200:])) == 1


STEP: Load = [(0, 2), (60, 40), (600, 2)]


@pytest.fixture(scope="module")
def timeline() -> list[Moment]:
    return list(replay(STEP, SCALING, Model(), until_s=1000))


def test_a_step_of_load_scales_out_and_back(timeline: list[Moment]) -> None:
    before, during, after = timeline[59], timeline[599], timeline[-1]
    assert (before.num_heads, before.num_workers) == (1, 2)
    assert during.num_heads >= 5  # forty streams, eight places each
    assert during.num_workers > 2
    assert (after.num_heads, after.num_workers) == (1, 2)


def test_the_step_is_met_before_it_ends_and_nothing_changes_then(timeline: list[Moment]) -> None:
    changes = [moment.at for moment in timeline if moment.decision.is_change]
    assert all(60 <= at <= 300 or at >= 600 for at in changes)


def test_every_change_gives_its_numbers(timeline: list[Moment]) -> None:
    changes = [moment.decision.reason for moment in timeline if moment.decision.is_change]
    assert changes
    for reason in changes:
        assert " -> " in reason
        assert "KV" in reason
        assert "Exposed" in reason

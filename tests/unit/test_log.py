"""A peer that provokes warnings does not fill the log."""

import logging

import pytest

from cluster.log import RareWarnings


def test_a_kind_of_warning_comes_at_most_every_ten_seconds(
    caplog: pytest.LogCaptureFixture,
) -> None:
    now = [100.0]
    warnings = RareWarnings(logging.getLogger("rare"), clock=lambda: now[0])

    def provoke(kind: str, at: float) -> None:
        now[0] = at
        warnings.warn(kind, f"{kind} at {at:.0f}")

    for at in (100, 101, 109.9, 110, 111):
        provoke("a", at)
    provoke("b", 111)
    provoke("a", 130)
    warnings.warn("c", "c" * 5_000)
    assert caplog.messages == [
        "a at 100",
        "a at 110 (and 2 more since the last such line)",
        "b at 111",
        "a at 130 (and 1 more since the last such line)",
        "c" * RareWarnings.MAX_CHARS,
    ]

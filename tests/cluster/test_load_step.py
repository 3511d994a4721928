"""Load rises and falls: heads, workers and nodes follow it, no request fails, and why is told."""

import json
from html import escape
from pathlib import Path
from typing import Any

import pytest

from cluster.bench.page import plot
from tests.bench.make_checkpoint import CACHE, make_checkpoint
from tests.cluster.conftest import settle_in
from tests.cluster.hosts import hosts

NUM_LAYERS = 4
TIMELINE = CACHE / "load-step.html"


@pytest.mark.timeout(900)
def test_heads_workers_and_nodes_follow_the_load(tmp_path: Path) -> None:
    model = make_checkpoint("experts", NUM_LAYERS)
    with hosts(tmp_path, [1]) as (host,):
        settle_in(host)
        program = f"python -m tests.cluster.load_step {model} {host.home}"
        told = json.loads(host.run(program, timeout_s=800).splitlines()[-1])
    TIMELINE.write_text(page(told), encoding="utf-8")
    timeline = told["timeline"]
    print(f"\n{told['num_ended']} streams; {TIMELINE}")
    for decision in told["decisions"]:
        print(f"{decision['s']:6.1f} s  {decision['decision']}")
    assert told["failures"] == []
    begun, ended = timeline[0], timeline[-1]
    for what, least in (("heads", 2), ("workers", 2), ("nodes", 5)):
        assert max(sample[what] for sample in timeline) >= least, what
        assert ended[what] == begun[what], what
    reasons = [decision["decision"] for decision in told["decisions"] if decision["decision"]]
    assert reasons
    assert all("->" in reason and "Exposed:" in reason for reason in reasons)


def page(told: dict[str, Any]) -> str:
    """The timeline as plots, and the decisions as a list."""

    def curve(name: str) -> list[tuple[float, float]]:
        return [(sample["s"], sample[name]) for sample in told["timeline"]]

    there = {name: curve(name) for name in ("nodes", "workers", "heads")}
    plots = [
        plot("callers", "s", {"": curve("callers")}),
        plot("there are", "s", there),
        plot("tokens per second", "s", {"": curve("tokens_per_s")}),
    ]
    decisions = "".join(
        f"<li>{decision['s']:.0f} s: {escape(decision['decision'])}</li>"
        for decision in told["decisions"]
        if decision["decision"]
    )
    return (
        '<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>Load step</title>'
        f"<h1>Load step</h1>{''.join(plots)}<ol>{decisions}</ol></html>\n"
    )

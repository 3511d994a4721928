"""A load run as tables for people and as JSON for programs. Pure: decides and measures nothing."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

from cluster.bench.summary import MEASURES, Distribution, Record, Summary


@dataclass(frozen=True)
class Point:
    """One load and what came of it."""

    load: float
    """Callers at a time, or requests a second."""
    records: Sequence[Record]
    summary: Summary


@dataclass(frozen=True)
class Run:
    """Several loads, one after another, on one server."""

    facts: Mapping[str, str]
    """What was measured, and when, for people."""
    load_name: str
    """What `Point.load` counts: "callers" or "offered/s"."""
    points: Sequence[Point]


def heading(run: Run) -> str:
    return ", ".join(f"{name} {value}" for name, value in run.facts.items())


@dataclass(frozen=True)
class Cells:
    """A table, to be shown by whatever means. Its numbers are text already."""

    heads: Sequence[str]
    rows: Sequence[Sequence[str]]

    def as_rich(self) -> Table:
        table = Table()
        for head in self.heads:
            table.add_column(head, justify="right")
        for row in self.rows:
            table.add_row(*row)
        return table


def rates(run: Run) -> Cells:
    """One row per load: how much went through."""
    heads = [run.load_name, "ok", "failed", "s", "ok/s", "tokens in/s", "out/s"]
    rows = []
    for point in run.points:
        found = point.summary
        row = [f"{point.load:g}", str(found.num_ok), str(found.num_failed)]
        row += [f"{found.duration_s:.1f}", f"{found.requests_per_s:.2f}"]
        row += [f"{found.input_tokens_per_s:.1f}", f"{found.output_tokens_per_s:.1f}"]
        if found.good_requests_per_s is not None and found.good_share is not None:
            row += [f"{found.good_requests_per_s:.2f}", f"{100 * found.good_share:.1f}"]
        rows.append(row)
    if len(rows[0]) > len(heads):
        heads += ["good/s", "good %"]
    return Cells(heads, rows)


def times(run: Run) -> Cells:
    """One row per load and measure."""
    rows = [
        [f"{point.load:g}", words, *milliseconds(point.summary.measures[name])]
        for point in run.points
        for name, words in MEASURES.items()
    ]
    return Cells([run.load_name, "milliseconds", "mean", "p50", "p90", "p99", "max"], rows)


def milliseconds(found: Distribution | None) -> list[str]:
    """Cells of a distribution in seconds: mean, p50, p90, p99, max."""
    if found is None:
        return ["-"] * 5
    return [
        f"{1000 * value:.2f}" for value in (found.mean, found.p50, found.p90, found.p99, found.max)
    ]


def notes(run: Run) -> list[str]:
    """What a reader must know to trust the numbers, a line each."""
    lines = []
    for point in run.points:
        summary, at = point.summary, f"at {point.load:g} {run.load_name}"
        for kind, number in summary.errors.items():
            example = next(r.message for r in point.records if r.error == kind)
            lines.append(f"{at}: {number} x {kind}, such as: {example}")
        if summary.num_counted:
            lines.append(
                f"{at}: {summary.num_counted} answers came without usage; their output tokens are "
                "counted by chunks, which may hold more than one"
            )
        if summary.num_without_input:
            lines.append(f"{at}: the input tokens of {summary.num_without_input} are unknown: 0")
        if summary.max_late_s > 0.01:
            lines.append(
                f"{at}: a request was sent {1000 * summary.max_late_s:.0f} ms after its time: the "
                "load generator was too slow, and its delay is in the numbers"
            )
    return lines


def as_json(run: Run) -> dict[str, Any]:
    """Everything, each request included; times in seconds from the first request's."""
    return {
        "facts": dict(run.facts),
        "load": run.load_name,
        "points": [
            {
                "load": point.load,
                "summary": asdict(point.summary),
                "requests": [_request_json(record, _start_of(point)) for record in point.records],
            }
            for point in run.points
        ],
    }


def _start_of(point: Point) -> float:
    return min(record.intended_s for record in point.records)


def _request_json(record: Record, start_s: float) -> dict[str, Any]:
    return {
        "intended_s": record.intended_s - start_s,
        "sent_s": record.sent_s - start_s,
        "ended_s": record.ended_s - start_s,
        "ttft_s": record.ttft_s,
        "tpot_s": record.tpot_s,
        "e2e_s": record.e2e_s,
        "gaps_s": record.gaps_s,
        "input_tokens": record.input_tokens,
        "output_tokens": record.output_tokens,
        "is_counted": record.is_counted,
        "error": record.error,
        "message": record.message,
    }

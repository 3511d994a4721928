"""What `bench dispatch` has measured, as a table for people and as JSON for programs."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.table import Table

from cluster.bench.dispatch import PARTS, DispatchRow


def trips_table(rows: Sequence[DispatchRow]) -> Table:
    """One row per transport and number of rows, microseconds."""
    table = Table(title="round trip beyond the worker's own time, us", title_justify="left")
    heads = ("rows", "KiB", "via", "p50", "p90", "p99", *PARTS)
    for head in heads:
        table.add_column(head, justify="right")
    for row in rows:
        found = row.beyond
        seconds = [found.p50, found.p90, found.p99]
        seconds += [row.parts[name] for name in PARTS]
        table.add_row(
            str(row.num_rows),
            f"{row.sent_bytes / 1024:.0f}",
            row.transport,
            *(f"{1e6 * value:.0f}" for value in seconds),
        )
    return table


def as_json(rows: Sequence[DispatchRow]) -> dict[str, Any]:
    """Seconds."""
    return {"rows": [asdict(row) for row in rows]}

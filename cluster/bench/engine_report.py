"""What `bench engine` has measured, as tables for people and as JSON for programs."""

from statistics import median
from typing import Any

from rich.table import Table

from cluster.bench.engine import EngineReport, Row
from cluster.step_stats import PARTS


def rates_table(report: EngineReport) -> Table:
    """One row per case and number of workers; the ratio is to the first number of workers."""
    several = len({row.num_workers for row in report.rows}) > 1
    table = Table(title="tokens per second", title_justify="left")
    heads = ["case", "workers", "median", "least", "most", *(["ratio"] if several else [])]
    for head in heads:
        table.add_column(head, justify="left" if head == "case" else "right")
    base: dict[str, float] = {}
    for row in report.rows:
        rates = row.tokens_per_s
        first = base.setdefault(str(row.case), median(rates))
        cells = [str(row.case), str(row.num_workers)]
        cells += [f"{value:.1f}" for value in (median(rates), min(rates), max(rates))]
        table.add_row(*cells, *([f"{median(rates) / first:.2f}"] if several else []))
    return table


def profile_tables(report: EngineReport) -> list[Table]:
    """Where a step's time goes: one table per case, two columns per number of workers."""
    rows_of: dict[str, list[Row]] = {}
    for row in report.rows:
        rows_of.setdefault(str(row.case), []).append(row)
    return [_profile_table(case, rows) for case, rows in rows_of.items()]


def _profile_table(case: str, rows: list[Row]) -> Table:
    table = Table(title=f"{case}: where a step's time goes", title_justify="left")
    table.add_column("part")
    for row in rows:
        table.add_column(f"{row.num_workers} workers, ms", justify="right")
        table.add_column("share", justify="right")
    columns = [row.parts for row in rows]
    steps_s = [sum(parts.values()) for parts in columns]
    for part in PARTS:
        if any(part in parts for parts in columns):
            cells = []
            for parts, step_s in zip(columns, steps_s, strict=True):
                seconds = parts.get(part)
                if seconds is None:
                    cells += ["-", "-"]
                else:
                    cells += [f"{1000 * seconds:.3f}", f"{100 * seconds / step_s:.1f} %"]
            table.add_row(part, *cells)
    table.add_section()
    table.add_row("step", *(cell for s in steps_s for cell in (f"{1000 * s:.3f}", "100.0 %")))
    return table


def as_json(report: EngineReport, *, is_profiled: bool) -> dict[str, Any]:
    """Rows and memory, for programs."""
    return {
        "rows": [_row_json(report, row, is_profiled=is_profiled) for row in report.rows],
        "memory": {
            "head_pss_bytes": report.head_bytes,
            "worker_pss_bytes": report.worker_bytes,
        },
    }


def _row_json(report: EngineReport, row: Row, *, is_profiled: bool) -> dict[str, Any]:
    case = row.case
    size = (
        {"sequences": case.size, "context_tokens": case.num_prompt, "new_tokens": case.num_new}
        if case.phase == "decode"
        else {"prompt_tokens": case.size}
    )
    return {
        "phase": case.phase,
        **size,
        "workers": row.num_workers,
        "slices": report.num_slices,
        "experts": report.quantization,
        "dtype": report.dtype,
        "tokens_per_s": row.tokens_per_s,
        **({"step_s": row.parts} if is_profiled else {}),
    }

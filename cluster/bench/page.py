"""A load run as one HTML file: tables and plots, nothing fetched, no script, all text escaped."""

from collections.abc import Mapping, Sequence
from html import escape

from cluster.bench.report import Cells, Run, notes, rates, times
from cluster.bench.summary import MEASURES, Record

Curve = Sequence[tuple[float, float]]

_COLOURS = ("#2266aa", "#cc5522", "#338844", "#884499", "#aa8800", "#008899", "#cc3366", "#555555")
_WIDTH, _HEIGHT = 460, 280
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 12, 12, 40  # margins round the plot

_STYLE = """
body { font: 15px/1.4 system-ui, sans-serif; margin: 2em auto; max-width: 62em; padding: 0 1em }
table { border-collapse: collapse; margin: 1em 0 }
td, th { border-bottom: 1px solid #ccc; padding: .2em .8em; text-align: right }
figure { display: inline-block; margin: 0 1em 1em 0; vertical-align: top }
figcaption { font-weight: 600 }
svg text { font-size: 11px; fill: currentColor }
"""


def page(run: Run) -> str:
    """The whole file."""
    title = "Maestrale bench"
    facts = "".join(
        f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in run.facts.items()
    )
    noted = "".join(f"<li>{escape(line)}</li>" for line in notes(run))
    return (
        f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>{title}</title>'
        f"<style>{_STYLE}</style><h1>{title}</h1><dl>{facts}</dl>"
        f"{_table(rates(run))}{_table(times(run))}{f'<ul>{noted}</ul>' if noted else ''}"
        f"{''.join(_sweep_plots(run))}{''.join(_run_plots(run))}</html>\n"
    )


def _table(cells: Cells) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in cells.heads)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in cells.rows
    )
    return f"<table><tr>{head}</tr>{body}</table>"


def _sweep_plots(run: Run) -> list[str]:
    """Over the load; only where there are several."""
    if len(run.points) < 2:
        return []
    rate = [(point.load, point.summary.output_tokens_per_s) for point in run.points]
    plots = [plot("output tokens per second", run.load_name, {"": rate})]
    for name in ("ttft", "tpot"):
        curves: dict[str, list[tuple[float, float]]] = {"p50": [], "p90": [], "p99": []}
        for point in run.points:
            found = point.summary.measures[name]
            if found is not None:
                curves["p50"].append((point.load, 1000 * found.p50))
                curves["p90"].append((point.load, 1000 * found.p90))
                curves["p99"].append((point.load, 1000 * found.p99))
        plots.append(plot(f"{MEASURES[name]}, ms", run.load_name, curves))
    return plots


def _run_plots(run: Run) -> list[str]:
    """Over the requests of each load: how many were as fast, and how it went over time."""

    def values(record: Record, name: str) -> list[float]:
        if record.error is not None:
            return []
        measured = {"ttft": record.ttft_s, "tpot": record.tpot_s, "e2e": record.e2e_s}
        if name == "gap":
            return record.gaps_s
        found = measured[name]
        return [] if found is None else [found]

    plots = []
    for name, words in MEASURES.items():
        curves = {
            f"{point.load:g}": shares([1000 * v for r in point.records for v in values(r, name)])
            for point in run.points
        }
        plots.append(plot(f"share of requests: {words}, %", "ms at most", curves))
    over_time = {}
    for point in run.points:
        start_s = min(record.intended_s for record in point.records)
        over_time[f"{point.load:g}"] = sorted(
            (record.intended_s - start_s, 1000 * record.ttft_s)
            for record in point.records
            if record.ttft_s is not None
        )
    plots.append(plot("first token, ms, over time", "s since the start", over_time, is_line=False))
    return plots


def shares(values: Sequence[float]) -> list[tuple[float, float]]:
    """The share of values, in percent, that are at most x: at most 200 points of the curve."""
    ascending = sorted(values)
    last = len(ascending) - 1
    if last < 0:
        return []
    indices = sorted({round(last * step / 200) for step in range(201)})
    return [(ascending[index], 100 * (index + 1) / (last + 1)) for index in indices]


def plot(title: str, x_name: str, curves: Mapping[str, Curve], *, is_line: bool = True) -> str:
    """A figure with axes from zero and a legend for curves that have names."""
    points = [point for curve in curves.values() for point in curve]
    if not points:
        return ""
    x_step, x_max = ticks(max(x for x, _ in points))
    y_step, y_max = ticks(max(y for _, y in points))

    def px(x: float) -> float:
        return round(_LEFT + x / x_max * (_WIDTH - _LEFT - _RIGHT), 1)

    def py(y: float) -> float:
        return round(_HEIGHT - _BOTTOM - y / y_max * (_HEIGHT - _TOP - _BOTTOM), 1)

    parts = []
    for number in range(round(y_max / y_step) + 1):
        y = number * y_step
        parts.append(
            f'<path d="M{_LEFT} {py(y)}H{_WIDTH - _RIGHT}" stroke="#8884"/>'
            f'<text x="{_LEFT - 6}" y="{py(y) + 4}" text-anchor="end">{y:g}</text>'
        )
    for number in range(round(x_max / x_step) + 1):
        x = number * x_step
        parts.append(
            f'<text x="{px(x)}" y="{_HEIGHT - _BOTTOM + 16}" text-anchor="middle">{x:g}</text>'
        )
    parts.append(
        f'<text x="{_WIDTH / 2}" y="{_HEIGHT - 6}" text-anchor="middle">{escape(x_name)}</text>'
    )
    for index, (name, curve) in enumerate(curves.items()):
        colour = _COLOURS[index % len(_COLOURS)]
        if is_line:
            path = " ".join(f"{px(x)},{py(y)}" for x, y in curve)
            parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}"/>')
        if not is_line or len(curve) < 20:
            parts += [
                f'<circle cx="{px(x)}" cy="{py(y)}" r="2" fill="{colour}"/>' for x, y in curve
            ]
        if name:
            parts.append(
                f'<text x="{_LEFT + 10}" y="{_TOP + 12 + 14 * index}" style="fill:{colour}">'
                f"{escape(name)}</text>"
            )
    return (
        f"<figure><figcaption>{escape(title)}</figcaption>"
        f'<svg width="{_WIDTH}" height="{_HEIGHT}" role="img">{"".join(parts)}</svg></figure>'
    )


def ticks(largest: float) -> tuple[float, float]:
    """A round step and the axis' end, a multiple of it: four to ten steps hold `largest`."""
    step = 1e-9
    while True:
        for factor in (1, 2, 5):
            if step * factor * 10 >= largest:
                step *= factor
                num_steps = max(1, -int(-largest // step))
                return step, num_steps * step
        step *= 10

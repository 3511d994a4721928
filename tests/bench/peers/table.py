"""All results as markdown for RESULTS.md. Pure."""

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from model.config import MixtralConfig
from tests.bench.peers.engines.engine import Engine
from tests.bench.peers.limits import Figure, limits_of
from tests.bench.peers.plan import PRECISIONS, Plan, Row
from tests.bench.peers.processes import IDLE_PERCENT
from tests.bench.peers.results import Result, Task
from tests.bench.peers.roofline import Limits, share_of_limit


@dataclass(frozen=True)
class Report:
    """What the tables are made of."""

    plan: Plan
    config: MixtralConfig
    engines: Sequence[Engine]
    results: Sequence[Result]
    failures: Mapping[str, str] = field(default_factory=dict)
    """Why an engine or one of its tasks could not be measured, by what it was."""
    same: tuple[str, str] = ("", "")
    """Names of the two engines that are one."""

    def markdown(self) -> str:
        limits = self._limits()
        parts = [self._machine(limits)]
        parts += [self._throughput(precision, limits) for precision in PRECISIONS]
        parts += [self._http(), self._memory(), self._same(), self._notes()]
        return "\n\n".join(part for part in parts if part)

    # --- sections ---

    def _machine(self, limits: Limits | None) -> str:
        if limits is None:
            return "The machine's limits were not measured: no shares below."
        lines = []
        for (what, kind, threads), per_s in self._figures().items():
            unit, scale = ("GB/s", 1e9) if what == "memory" else ("Gop/s", 1e9)
            values = [value / scale for value in per_s]
            lines.append([what, kind, str(threads), f"{spread(values)} {unit}"])
        text = table(["limit", "kind", "threads", "median (min-max)"], lines)
        return (
            f"{text}\n\nShares below are of the best: {limits.bytes_per_s / 1e9:.1f} GB/s and "
            f"{limits.operations_per_s / 1e9:.0f} Gop/s, whichever binds: the least time for "
            "reading the weights that a step touches once, or for its multiplications and "
            "additions, over the time it took."
        )

    def _throughput(self, precision: str, limits: Limits | None) -> str:
        columns = [("decode", size) for size in self.plan.sequences]
        columns += [("prefill", size) for size in self.plan.prefill]
        lines = []
        for engine in self.engines:
            if precision not in engine.precisions:
                continue
            cells = [
                self._throughput_cell(engine, precision, phase, size, limits)
                for phase, size in columns
            ]
            if any(cells):
                lines.append([f"{engine.name}, {engine.precisions[precision]}", *cells])
        if not lines:
            return ""
        heads = [f"{phase} {size}" for phase, size in columns]
        return f"Tokens per second, {precision}:\n\n" + table(["engine", *heads], lines)

    def _throughput_cell(
        self, engine: Engine, precision: str, phase: str, size: int, limits: Limits | None
    ) -> str:
        rows = self.rows(engine.name, precision, phase, size)
        if not rows:
            return ""
        values = [row.tokens_per_s for row in rows]
        text = spread(values)
        if limits is None:
            return text
        weights = engine.weight_bytes(precision)
        middle = statistics.median(values)
        share = share_of_limit(self.config, phase, size, middle, weights, limits)
        return f"{text}, {100 * share:.0f} %"

    def _http(self) -> str:
        lines = []
        for engine, precision, rows in self._each("http", self.plan.callers):
            lines.append(
                [
                    f"{engine.name}, {engine.precisions[precision]}",
                    spread([row.tokens_per_s for row in rows]),
                    spread([1000 * (row.ttft_s or 0) for row in rows]),
                    spread([1000 * (row.tpot_s or 0) for row in rows]),
                ]
            )
        if not lines:
            return ""
        plan = self.plan
        title = (
            f"HTTP, {plan.callers} streams at a time, {plan.requests} requests of "
            f"{plan.input_tokens} tokens in and {plan.output_tokens} out:"
        )
        heads = ["server", "tokens/s", "first token, ms", "token after it, ms"]
        return f"{title}\n\n{table(heads, lines)}"

    def _memory(self) -> str:
        lines = []
        for engine in self.engines:
            for precision in engine.precisions:
                alone = self._results_of("engine", engine, precision)
                served = self._results_of("http", engine, precision)
                columns = (
                    [result.peak_bytes for result in alone],
                    [result.peak_bytes for result in served],
                    [r.above_idle_bytes for r in alone if r.above_idle_bytes is not None],
                )
                if any(columns):
                    cells = [spread([b / 2**30 for b in column]) for column in columns]
                    lines.append([f"{engine.name}, {engine.precisions[precision]}", *cells])
        if not lines:
            return ""
        title = (
            "Memory, GiB: highest PSS of all of an engine's processes, files that it maps "
            "included; and what ours hold on top of idle processes:"
        )
        heads = ["engine", "highest, engine alone", "highest, HTTP server", "above idle"]
        return f"{title}\n\n{table(heads, lines)}"

    def _same(self) -> str:
        """How far two names for one engine lie apart."""
        lines = []
        one, other = self.same
        for phase, sizes in (
            ("decode", self.plan.sequences),
            ("prefill", self.plan.prefill),
            ("http", (self.plan.callers,)),
        ):
            for size in sizes:
                pairs = [
                    [row.tokens_per_s for row in self.rows(name, "bf16", phase, size)]
                    for name in (one, other)
                ]
                if all(pairs):
                    ratios = [b / a for a, b in zip(*pairs, strict=False)]
                    medians = statistics.median(pairs[1]) / statistics.median(pairs[0])
                    lines.append([f"{phase} {size}", f"{medians:.3f}", spread(ratios, digits=3)])
        if not lines:
            return ""
        heads = ["bf16", "ratio of medians", "ratios within a round"]
        title = f"{other} over {one}, which is the same: no difference below this is one."
        return f"{title}\n\n{table(heads, lines)}"

    def _notes(self) -> str:
        lines = [f"- {what}: {' '.join(why.split())[-300:]}" for what, why in self.failures.items()]
        busy = [r for r in self.results if r.busy_percent > IDLE_PERCENT]
        if busy:
            lines.append(
                f"- {len(busy)} of {len(self.results)} measurements began with others using up to "
                f"{max(r.busy_percent for r in busy):.0f} % of the CPU."
            )
        return "\n".join(lines)

    # --- what they share ---

    def rows(self, engine: str, precision: str, phase: str, size: int) -> list[Row]:
        """Of all rounds, in their order."""
        return [
            row
            for result in sorted(self.results, key=lambda result: result.round)
            if (result.task.engine, result.task.precision) == (engine, precision)
            for row in result.rows
            if (row.phase, row.size) == (phase, size)
        ]

    def _results_of(self, kind: str, engine: Engine, precision: str) -> list[Result]:
        wanted = Task(kind, engine.name, precision)
        return [result for result in self.results if result.task == wanted]

    def _each(self, phase: str, size: int) -> Iterable[tuple[Engine, str, list[Row]]]:
        for precision in PRECISIONS:
            for engine in self.engines:
                if rows := self.rows(engine.name, precision, phase, size):
                    yield engine, precision, rows

    def _figures(self) -> dict[tuple[str, str, int], list[float]]:
        found: dict[tuple[str, str, int], list[float]] = {}
        for result in self.results:
            for content in result.figures:
                figure = Figure(**content)
                key = (figure.what, figure.kind, figure.threads)
                found.setdefault(key, []).append(figure.per_s)
        return found

    def _limits(self) -> Limits | None:
        """Of the medians."""
        figures = [Figure(*key, statistics.median(per_s)) for key, per_s in self._figures().items()]
        return limits_of(figures) if figures else None


def spread(values: Sequence[float], *, digits: int | None = None) -> str:
    """Median, least and greatest; the latter two only where there are several. "" for none."""
    if not values:
        return ""
    form: Callable[[float], str] = significant
    if digits is not None:
        form = f"{{:.{digits}f}}".format
    middle = form(statistics.median(values))
    return f"{middle} ({form(min(values))}-{form(max(values))})" if len(values) > 1 else middle


def significant(value: float) -> str:
    """Three digits, or all of a larger whole number."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def table(heads: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rule = ["---"] * len(heads)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (heads, rule, *lines))

"""Every metric's name, unit and labels.

Each process keeps a registry of its own; the ingress merges the texts of all (`merging`).
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Literal

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
)
from prometheus_client.exposition import generate_latest

from cluster.signals import HeadTotals, WorkerTotals
from cluster.step_stats import StepStats
from model.units import Unit

disable_created_metrics()  # a second series per counter that nobody charts

_STEP_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_REQUEST_BUCKETS = (0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)


class Registry:
    """A process's own metrics. Base of those below."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()

    def exposition(self) -> str:
        """All metrics in Prometheus' text format."""
        return generate_latest(self.registry).decode()


class ServerMetrics(Registry):
    """Of a process that other processes call."""

    def __init__(self, plane: Literal["head", "expert"]) -> None:
        """plane: which of the two contracts it answers."""
        super().__init__()
        self._refusals = Counter(
            "maestrale_refused_peers",
            "Calls and messages of peers that were refused, by reason",
            ["plane", "reason"],
            registry=self.registry,
        )
        self._plane = plane

    def observe_refusal(self, reason: str) -> None:
        """reason: one of cluster.guard.Guard's."""
        self._refusals.labels(self._plane, reason).inc()


class HeadMetrics(ServerMetrics):
    """Of one head replica."""

    def __init__(self) -> None:
        super().__init__("head")
        self.totals = HeadTotals()
        """For the controller, who scales by them. May be read from any thread."""
        self._tokens = Counter(
            "maestrale_step_tokens",
            "Tokens computed by forward passes, prompt and new",
            registry=self.registry,
        )
        self._emitted = Counter(
            "maestrale_generation_tokens", "New tokens emitted", registry=self.registry
        )
        self._seconds = Histogram(
            "maestrale_step_seconds",
            "Time of one engine step by part",
            ["part"],
            buckets=_STEP_BUCKETS,
            registry=self.registry,
        )
        self._reused = Counter(
            "maestrale_prefix_cache_hit_tokens",
            "Tokens that were not computed since they were found in the cache",
            registry=self.registry,
        )
        self._preempted = Counter(
            "maestrale_preemptions",
            "Sequences that lost their blocks and were computed again",
            registry=self.registry,
        )
        self._drafted = Counter(
            "maestrale_draft_tokens", "Tokens guessed ahead", registry=self.registry
        )
        self._accepted = Counter(
            "maestrale_accepted_draft_tokens",
            "Guessed tokens that proved right",
            registry=self.registry,
        )
        self._running = Gauge(
            "maestrale_sequences_running", "Sequences in the last step", registry=self.registry
        )
        self._waiting = Gauge(
            "maestrale_sequences_waiting", "Sequences not admitted yet", registry=self.registry
        )
        self._free_blocks = Gauge(
            "maestrale_kv_blocks_free", "Free blocks of the KV cache", registry=self.registry
        )
        self._blocks = Gauge(
            "maestrale_kv_blocks", "Blocks of the KV cache", registry=self.registry
        )
        self._lost_workers = Counter(
            "maestrale_expert_worker_losses",
            "Expert workers that broke off or did not answer in time",
            registry=self.registry,
        )
        self._resent_rows = Counter(
            "maestrale_expert_rows_resent",
            "Rows of experts that were sent again after a loss or refusal",
            registry=self.registry,
        )
        self._hedged_rows = Counter(
            "maestrale_expert_rows_hedged",
            "Rows of experts that were sent to another copy as well since an answer was late, by"
            " outcome; won are those whose second answer came first",
            ["outcome"],
            registry=self.registry,
        )
        self._cross_checks = Counter(
            "maestrale_expert_cross_checks",
            "Rows that a second copy computed too, by outcome; damaged and unexplained are alarms",
            ["outcome"],
            registry=self.registry,
        )
        self._rows_waited = Counter(
            "maestrale_expert_rows_waited_seconds",
            "Time that steps stood still since no worker could be asked",
            registry=self.registry,
        )

    def observe(self, stats: StepStats) -> None:
        self.totals = self.totals.after(stats)
        self._tokens.inc(stats.num_tokens)
        self._emitted.inc(stats.num_emitted)
        self._reused.inc(stats.num_reused)
        self._preempted.inc(stats.num_preempted)
        self._drafted.inc(stats.num_drafted)
        self._accepted.inc(stats.num_accepted)
        for part, seconds in stats.parts.items():
            self._seconds.labels(part).observe(seconds)
        self._running.set(stats.num_sequences)
        self._waiting.set(stats.num_waiting)
        self._free_blocks.set(stats.num_free_blocks)
        self._blocks.set(stats.num_blocks)

    def observe_lost_worker(self) -> None:
        """A worker broke off or did not answer in time."""
        self._lost_workers.inc()

    def observe_resent(self, num_rows: int, waited_s: float) -> None:
        """Rows of experts were sent a second time, after so long without anybody to ask."""
        self._resent_rows.inc(num_rows)
        self._rows_waited.inc(waited_s)

    def observe_hedged(self, num_rows: int, outcome: str) -> None:
        """outcome: won, lost (the first worker was faster) or failed."""
        self._hedged_rows.labels(outcome).inc(num_rows)

    def observe_cross_check(self, outcome: str) -> None:
        """outcome: agreed, damaged (a copy's weights had changed), unexplained or unanswered."""
        self._cross_checks.labels(outcome).inc()

    def observe_idle(self, *, num_free_blocks: int) -> None:
        """No sequence is left."""
        self.totals = replace(self.totals, kv_fill=0.0, num_waiting=0)
        self._running.set(0)
        self._waiting.set(0)
        self._free_blocks.set(num_free_blocks)


class WorkerMetrics(ServerMetrics):
    """Of one expert worker."""

    def __init__(self) -> None:
        super().__init__("expert")
        self.totals = WorkerTotals()
        """For the controller, who scales by them. May be read from any thread."""
        self._row_counts: dict[tuple[int, int], int] = {}
        self._series: dict[tuple[int, int], Counter] = {}
        """Of `_rows`, by layer and expert."""
        self._rows = Counter(
            "maestrale_expert_rows",
            "Rows that an expert computed",
            ["layer", "expert"],
            registry=self.registry,
        )
        self._calls = Counter(
            "maestrale_expert_calls",
            "Calls answered, by outcome",
            ["outcome"],
            registry=self.registry,
        )
        self._passes = Counter(
            "maestrale_expert_passes",
            "Passes over an expert's weights; rows per pass is how well calls are batched",
            registry=self.registry,
        )
        self._seconds = Counter(
            "maestrale_expert_compute_seconds", "Time spent computing", registry=self.registry
        )
        self._queued = Counter(
            "maestrale_expert_queue_seconds",
            "Time that calls waited for their computation to begin, all together",
            registry=self.registry,
        )
        self._loaded = Counter(
            "maestrale_expert_loaded_bytes",
            "Bytes of experts loaded, by where they were read",
            ["source"],
            registry=self.registry,
        )
        self._to_load = Gauge(
            "maestrale_expert_to_load_bytes",
            "Bytes of experts that are still to be loaded",
            registry=self.registry,
        )

    def observe_load(self, source: str, num_bytes: int, left_bytes: int) -> None:
        """Bytes of experts have arrived, and so many are still to come. source: disk or lender."""
        self._loaded.labels(source).inc(num_bytes)
        self._to_load.set(left_bytes)

    def observe_pass(
        self, counts: Iterable[tuple[Unit, int]], seconds: float, queued_s: Sequence[float]
    ) -> None:
        """One grouped computation of some rows for each unit. One thread at a time.

        queued_s: how long each of the calls that it was for had waited.
        """
        waited_s = sum(queued_s)
        self.totals = WorkerTotals(
            busy_s=self.totals.busy_s + seconds,
            num_calls=self.totals.num_calls + len(queued_s),
            queued_s=self.totals.queued_s + waited_s,
        )
        self._queued.inc(waited_s)
        num_passes = 0
        for unit, num_rows in counts:
            key = (unit.layer, unit.expert_id)
            self._row_counts[key] = self._row_counts.get(key, 0) + num_rows
            series = self._series.get(key)
            if series is None:  # finding it anew takes 30 us, in every layer of every step
                series = self._series[key] = self._rows.labels(*map(str, key))
            series.inc(num_rows)
            num_passes += 1
        self._passes.inc(num_passes)
        self._seconds.inc(seconds)

    def row_counts(self) -> dict[tuple[int, int], int]:
        """Rows computed so far, by layer and expert. From any thread."""
        return self._row_counts.copy()

    def observe_call(self, outcome: str) -> None:
        """outcome: ok, invalid, not_held, busy or internal."""
        self._calls.labels(outcome).inc()


class IngressMetrics(Registry):
    """Of one ingress replica."""

    def __init__(self) -> None:
        super().__init__()
        self._requests = Counter(
            "maestrale_requests",
            "HTTP requests by endpoint and status",
            ["endpoint", "status"],
            registry=self.registry,
        )
        self._seconds = Histogram(
            "maestrale_request_seconds",
            "Time until the last byte of a reply",
            ["endpoint"],
            buckets=_REQUEST_BUCKETS,
            registry=self.registry,
        )
        self._prompt_tokens = Counter(
            "maestrale_prompt_tokens", "Prompt tokens of accepted requests", registry=self.registry
        )
        self._ignored = Counter(
            "maestrale_ignored_fields",
            "Fields of requests that nothing looks at, by name; those that nobody knows are other",
            ["field"],
            registry=self.registry,
        )
        self._epoch = Gauge(
            "maestrale_placement_epoch", "Placement that is in force", registry=self.registry
        )
        self._missing = Gauge(
            "maestrale_experts_missing",
            "Experts that no worker holds; rows for them wait",
            registry=self.registry,
        )
        self._asleep = Gauge(
            "maestrale_asleep",
            "1 while heads and workers are let go until the next request",
            registry=self.registry,
        )
        self.in_progress = Gauge(
            "maestrale_requests_in_progress", "Completions in progress", registry=self.registry
        )

        self._replays = Counter(
            "maestrale_replays",
            "Requests that another head went on with, by what became of the one before",
            ["cause"],
            registry=self.registry,
        )

    def observe_replay(self, cause: str) -> None:
        """cause: lost, failed or moved."""
        self._replays.labels(cause).inc()

    def observe_request(self, endpoint: str, status: int, seconds: float) -> None:
        self._requests.labels(endpoint, str(status)).inc()
        self._seconds.labels(endpoint).observe(seconds)

    def observe_ignored(self, field: str) -> None:
        """field: one of schema.IGNORED, or other."""
        self._ignored.labels(field).inc()

    def observe_placement(self, epoch: int, num_missing: int) -> None:
        """What the controller last told."""
        self._epoch.set(epoch)
        self._missing.set(num_missing)

    def observe_sleep(self, is_asleep: bool) -> None:
        """What the controller last told."""
        self._asleep.set(is_asleep)

    def observe_prompt(self, num_tokens: int) -> None:
        self._prompt_tokens.inc(num_tokens)

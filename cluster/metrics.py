"""What is measured: facts as dataclasses, and every metric's name, unit and labels.

Each process keeps a registry of its own; the ingress merges the texts of all (`merge`).
"""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
)
from prometheus_client.core import Metric
from prometheus_client.exposition import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from model.phases import Phase
from model.units import Unit

logger = logging.getLogger(__name__)

disable_created_metrics()  # a second series per counter that nobody charts

_STEP_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_REQUEST_BUCKETS = (0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)


PARTS = (
    "attention",
    "routing",
    "packing",
    "transfer",
    "experts",
    "unpacking",
    "logits",
    "sampling",
    "host",
)
"""Of a step's time. host: scheduling, building tensors, publishing, and the decoder's inputs."""


@dataclass(frozen=True, kw_only=True)
class StepStats:
    """One step of a head's engine."""

    num_tokens: int
    """Tokens computed, prompt and new."""
    num_sequences: int
    num_emitted: int
    """New tokens."""
    num_reused: int
    """Tokens of prompts that were found in the cache."""
    num_preempted: int
    """Sequences that lost their blocks and must be computed again."""
    num_drafted: int
    """Tokens guessed ahead."""
    num_accepted: int
    """Of those, the ones that proved right."""
    num_waiting: int
    """Sequences that could not be admitted yet."""
    num_free_blocks: int
    num_blocks: int
    forward_s: float
    """Forward pass, waiting for experts included."""
    sampling_s: float
    host_s: float
    """Scheduling, tensor building and publishing."""
    phases: Mapping[Phase, float]
    """Seconds of the forward pass by phase; empty where nobody watches."""

    @property
    def parts(self) -> dict[str, float]:
        """Seconds by PARTS; they sum to the step's whole time."""
        parts: dict[str, float] = {p: s for p, s in self.phases.items() if p in PARTS}
        parts["host"] = self.forward_s + self.host_s - sum(parts.values())
        parts["sampling"] = self.sampling_s
        return {part: parts[part] for part in PARTS if part in parts}


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

    def observe_cross_check(self, outcome: str) -> None:
        """outcome: agreed, damaged (a copy's weights had changed), unexplained or unanswered."""
        self._cross_checks.labels(outcome).inc()

    def observe_idle(self, *, num_free_blocks: int) -> None:
        """No sequence is left."""
        self._running.set(0)
        self._waiting.set(0)
        self._free_blocks.set(num_free_blocks)


class WorkerMetrics(ServerMetrics):
    """Of one expert worker."""

    def __init__(self) -> None:
        super().__init__("expert")
        self._row_counts: dict[tuple[int, int], int] = {}
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

    def observe_pass(self, counts: Iterable[tuple[Unit, int]], seconds: float) -> None:
        """One grouped computation of some rows for each unit, possibly for several calls."""
        for unit, num_rows in counts:
            key = (unit.layer, unit.expert_id)
            self._row_counts[key] = self._row_counts.get(key, 0) + num_rows
            self._rows.labels(str(unit.layer), str(unit.expert_id)).inc(num_rows)
            self._passes.inc()
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

    def observe_prompt(self, num_tokens: int) -> None:
        self._prompt_tokens.inc(num_tokens)


@dataclass
class _Merged:
    families: dict[str, Metric] = field(default_factory=dict)

    def collect(self) -> list[Metric]:
        return list(self.families.values())


def merge(expositions: Mapping[str, str]) -> str:
    """One text out of those of several processes; each sample gets a `process` label.

    expositions: text by process name. A text that does not parse is left out and logged.
    """
    merged = _Merged()
    for process, text in expositions.items():
        try:
            families = list(text_string_to_metric_families(text))
        except ValueError as error:
            logger.warning("metrics of %s do not parse and are left out: %s", process, error)
            continue
        for family in families:
            into = merged.families.setdefault(
                family.name, Metric(family.name, family.documentation, family.type)
            )
            for sample in family.samples:
                labels = {**sample.labels, "process": process}
                into.add_sample(sample.name, labels, sample.value)
    return generate_latest(merged).decode()

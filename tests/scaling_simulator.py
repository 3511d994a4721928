"""Replays a load against `cluster.autoscale.decide`, and prints what would have happened.

A load is how many streams are open from when on: lines of `seconds,streams`, synthetic or recorded.
The cluster is a few formulas, on purpose: queues where more arrives than is served, a start that
takes time, heads that end when their streams have. Run: python -m tests.scaling_simulator LOAD.csv
"""

import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cluster.autoscale import Decision, Scaling, State, decide
from cluster.signals import HeadLoad, Signals, WorkerLoad

Load = Sequence[tuple[float, int]]
"""From so many seconds on, so many streams are open."""


@dataclass(frozen=True, kw_only=True)
class Model:
    """What the simulated cluster can do. Times in seconds."""

    places_per_head: int = 8
    """Streams that fit into a head's KV cache; more wait."""
    own_s: float = 0.010
    """A step's time in the head, however many streams."""
    transfer_s: float = 0.004
    expert_s: float = 0.002
    """A step's time in the experts per stream, over two workers."""
    tokens_per_stream: int = 300
    head_start_s: float = 20.0
    worker_start_s: float = 40.0


@dataclass
class Stream:
    """One request on one head."""

    opened_at: float
    tokens_left: float


@dataclass
class Part:
    """A head or a worker."""

    name: str
    ready_at: float
    is_draining: bool = False
    streams: list[Stream] = field(default_factory=list)
    """Of a head, oldest first."""


@dataclass(frozen=True)
class Moment:
    """One second of the replay."""

    at: float
    num_streams: int
    num_heads: int
    num_workers: int
    decision: Decision

    def __str__(self) -> str:
        bars = "#" * self.num_streams
        return (
            f"{self.at:6.0f} s {self.num_streams:4d} streams, {self.num_heads:2d} heads, "
            f"{self.num_workers:2d} workers  {bars}\n         {self.decision.reason}"
        )


@dataclass
class Cluster:
    """Heads and workers, second by second."""

    model: Model
    heads: list[Part]
    workers: list[Part]
    _num_started: int = 0

    def step(self, now: float, wanted: int) -> Signals:
        """Let a second pass in which `wanted` streams are kept open; returns what was seen."""
        active = [head for head in self.heads if head.ready_at <= now and not head.is_draining]
        missing = wanted - sum(len(head.streams) for head in self.heads)
        for _ in range(missing if active else 0):
            emptiest = min(active, key=lambda head: len(head.streams))
            emptiest.streams.append(Stream(now, self.model.tokens_per_stream))
        ready = [worker for worker in self.workers if worker.ready_at <= now]
        serving = [head for head in self.heads if head.ready_at <= now]
        running = {h.name: h.streams[: self.model.places_per_head] for h in serving}
        expert_s = {
            name: self.model.expert_s * len(streams) * 2 / max(1, len(ready))
            for name, streams in running.items()
        }
        step_s = {
            name: self.model.own_s + self.model.transfer_s + seconds
            for name, seconds in expert_s.items()
        }
        asked = sum(expert_s[name] / step_s[name] for name, streams in running.items() if streams)
        slowed = max(1.0, asked / 0.98)
        utilisation = asked / slowed
        for head in serving:
            for stream in running[head.name]:
                stream.tokens_left -= 1 / (step_s[head.name] * slowed)
        heads = tuple(
            HeadLoad(
                kv_fill=len(running[head.name]) / self.model.places_per_head,
                step_fill=len(running[head.name]) / self.model.places_per_head,
                num_waiting=len(head.streams) - len(running[head.name]),
                own_s=self.model.own_s / step_s[head.name] if head.streams else 0.0,
                away_s=1 - self.model.own_s / step_s[head.name] + slowed - 1
                if head.streams
                else 0.0,
            )
            for head in active
        )
        for head in serving:
            head.streams = [stream for stream in head.streams if stream.tokens_left > 0]
        workers = tuple(
            WorkerLoad(utilisation=utilisation, queue_s=0.001 * utilisation / (1 - utilisation))
            for _ in ready
        )
        return Signals(heads=heads, workers=workers)

    def apply(self, decision: Decision, now: float) -> None:
        """Do as the controller and Serve would."""
        self.heads = [head for head in self.heads if head.streams or not head.is_draining]
        self._fit(self.heads, decision.num_heads, now=now, start_s=self.model.head_start_s)
        self._fit(self.workers, decision.num_workers, now=now, start_s=self.model.worker_start_s)
        self.workers = [worker for worker in self.workers if not worker.is_draining]

    def _fit(self, parts: list[Part], target: int, *, now: float, start_s: float) -> None:
        """Start those that are missing; let those drain that are too many, the last first."""
        staying = [part for part in parts if not part.is_draining]
        for part in staying[target:]:
            part.is_draining = True
        for _ in range(target - len(staying)):
            self._num_started += 1
            parts.append(Part(f"part-{self._num_started:03d}", now + start_s))


def replay(
    load: Load, settings: Scaling, model: Model, *, until_s: float, heads: int = 1, workers: int = 2
) -> Iterator[Moment]:
    """Second by second, what `decide` makes of a load."""
    cluster = Cluster(
        model,
        [Part(f"head-{number}", 0.0) for number in range(heads)],
        [Part(f"worker-{number}", 0.0) for number in range(workers)],
    )
    state = State.of(num_heads=heads, num_workers=workers)
    for second in range(math.ceil(until_s)):
        wanted = next((n for since, n in reversed(load) if since <= second), 0)
        signals = cluster.step(second, wanted)
        decision, state = decide(state, signals, settings, now=second)
        cluster.apply(decision, second)
        yield Moment(second, wanted, len(signals.heads), len(signals.workers), decision)


def main() -> None:
    rows = [line.split(",") for line in Path(sys.argv[1]).read_text().splitlines() if line]
    load = [(float(at), int(streams)) for at, streams in rows]
    settings = Scaling(max_heads=8, min_workers=2, max_workers=8, down_after_s=120)
    for moment in replay(load, settings, Model(), until_s=load[-1][0] + 600):
        if moment.decision.is_change or moment.at % 60 == 0:
            print(moment)


if __name__ == "__main__":
    main()

"""Replays a load against `cluster.autoscale.decide`, and prints what would have happened.

A load is how many streams are open from when on: lines of `seconds,streams`, synthetic or recorded.
The cluster is a few formulas, on purpose: queues where more arrives than is served, a start that
takes time, draining that waits for streams. Run: python -m tests.scaling_simulator LOAD.csv
"""

import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cluster.autoscale import Decision, Scaling, State, decide
from cluster.signals import HeadLoad, Signals, WorkerLoad

NUM_EXPERTS = 8
"""Of one layer: here all are alike."""

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
                name=head.name,
                kv_fill=len(running[head.name]) / self.model.places_per_head,
                step_fill=len(running[head.name]) / self.model.places_per_head,
                wait_s=max(
                    (now - s.opened_at for s in head.streams[len(running[head.name]) :]),
                    default=0.0,
                ),
                num_open=len(head.streams),
                own_s=self.model.own_s / step_s[head.name] if head.streams else 0.0,
                experts_s=expert_s[head.name] / step_s[head.name] if head.streams else 0.0,
                transfer_s=self.model.transfer_s / step_s[head.name] + slowed - 1
                if head.streams
                else 0.0,
                is_draining=head.is_draining,
            )
            for head in serving
        )
        for head in serving:
            head.streams = [stream for stream in head.streams if stream.tokens_left > 0]
        each = utilisation / NUM_EXPERTS
        workers = tuple(
            WorkerLoad(
                name=worker.name,
                utilisation=utilisation,
                queue_s=0.001 * utilisation / (1 - utilisation),
                experts={(0, expert_id): each for expert_id in range(NUM_EXPERTS)},
                expert_bytes=1,
                free_bytes=0,
                is_draining=worker.is_draining,
            )
            for worker in ready
        )
        pending = wanted if not active else 0
        return Signals(heads=heads, workers=workers, num_pending=pending)

    def apply(self, decision: Decision, now: float) -> None:
        """Do as the controller would."""
        for part in (*self.heads, *self.workers):
            part.is_draining = part.name in decision.drain
        empty = [head for head in self.heads if head.is_draining and not head.streams]
        self.heads = [head for head in self.heads if head not in empty]
        self.workers = [worker for worker in self.workers if not worker.is_draining]
        self.heads = self._fitted(
            self.heads, decision.num_heads, now=now, start_s=self.model.head_start_s
        )
        self.workers = self._fitted(
            self.workers, decision.num_workers, now=now, start_s=self.model.worker_start_s
        )

    def _fitted(self, parts: list[Part], target: int, *, now: float, start_s: float) -> list[Part]:
        """Start those that are missing; give up those that are too many and not there yet."""
        staying = [part for part in parts if not part.is_draining]
        late = sorted((p for p in staying if p.ready_at > now), key=lambda part: -part.ready_at)
        given_up = late[: max(0, len(staying) - target)]
        parts = [part for part in parts if part not in given_up]
        for _ in range(target - len(staying)):
            self._num_started += 1
            parts.append(Part(f"part-{self._num_started:03d}", now + start_s))
        return parts


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

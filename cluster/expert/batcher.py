"""Joins the calls of several heads that wait for the same layer. No network, no Ray.

There is no compute thread: whichever caller gets the compute lock computes for everybody who waits
for its layer (flat combining). With one head that costs no change of thread at all; with several,
calls that pile up behind a computation leave together.

Shape suffixes: R rows, D hidden, A assignments.
"""

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from cluster.metrics import WorkerMetrics
from model.experts import Assignments, ExpertWeights, weighted_sums
from model.units import Unit

Held = Mapping[Unit, ExpertWeights]


class NotHeldError(Exception):
    """A call for an expert that is not, or not yet, on this worker."""


@dataclass(eq=False)
class _Job:
    layer: int
    x_RD: Tensor
    assignments: Assignments
    done: bool = False
    sums_RD: Tensor | None = None
    error: Exception | None = None


@dataclass
class Batcher:
    """Computes calls against the experts that `held` maps at that moment. Thread-safe.

    Whoever loads experts adds them to `held` whole, one by one: a call sees an expert's final
    weights or none.
    """

    held: Held
    metrics: WorkerMetrics
    _waiting: list[_Job] = field(default_factory=list)
    _waiting_lock: threading.Lock = field(default_factory=threading.Lock)
    _compute_lock: threading.Lock = field(default_factory=threading.Lock)

    def compute(self, layer: int, x_RD: Tensor, assignments: Assignments) -> Tensor:
        """Weighted sums of one call, (R, D) float32. Blocks until they are there.

        Raises NotHeldError; or whatever the computation raised.
        """
        missing = [str(unit) for unit, _ in assignments.counts if unit not in self.held]
        if missing:
            raise NotHeldError(f"not held here: {', '.join(missing)}")
        job = _Job(layer, x_RD, assignments)
        with self._waiting_lock:
            self._waiting.append(job)
        with self._compute_lock:
            if not job.done:
                self._run(self._take(layer))
        if job.error is not None:
            raise job.error
        assert job.sums_RD is not None
        return job.sums_RD

    def _take(self, layer: int) -> list[_Job]:
        """Remove and return the jobs that wait for this layer."""
        with self._waiting_lock:
            taken = [job for job in self._waiting if job.layer == layer]
            self._waiting = [job for job in self._waiting if job.layer != layer]
        return taken

    def _run(self, jobs: list[_Job]) -> None:
        """Compute jobs of one layer together. The compute lock is held."""
        started = time.perf_counter()
        try:
            with torch.inference_mode():
                x_RD, assignments = join(jobs)
                sums_RD = weighted_sums(self.held, x_RD, assignments)
        except Exception as error:
            # Also out of memory: the callers get it as their answer, the worker goes on.
            for job in jobs:
                job.error, job.done = error, True
            return
        begin = 0
        for job in jobs:
            job.sums_RD = sums_RD[begin : begin + len(job.x_RD)]
            job.done = True
            begin += len(job.x_RD)
        seconds = time.perf_counter() - started
        self.metrics.observe_pass(assignments.counts, seconds)


def join(jobs: list[_Job]) -> tuple[Tensor, Assignments]:
    """Rows of all jobs on top of each other, and their assignments merged by unit."""
    if len(jobs) == 1:
        return jobs[0].x_RD, jobs[0].assignments
    pieces: dict[Unit, list[tuple[Tensor, Tensor]]] = {}
    first_row = 0
    for job in jobs:
        begin = 0
        for unit, count in job.assignments.counts:
            rows = job.assignments.rows_A[begin : begin + count] + first_row
            weights = job.assignments.weights_A[begin : begin + count]
            pieces.setdefault(unit, []).append((rows, weights))
            begin += count
        first_row += len(job.x_RD)
    ordered = sorted(pieces)
    nothing = (jobs[0].assignments.rows_A[:0], jobs[0].assignments.weights_A[:0])
    joined = [nothing, *(piece for unit in ordered for piece in pieces[unit])]
    assignments = Assignments(
        counts=tuple((unit, sum(len(rows) for rows, _ in pieces[unit])) for unit in ordered),
        rows_A=torch.cat([rows for rows, _ in joined]),
        weights_A=torch.cat([weights for _, weights in joined]),
    )
    return torch.cat([job.x_RD for job in jobs]), assignments

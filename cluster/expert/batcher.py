"""Joins the calls of several heads that wait for the same layer. No network, no Ray.

There is no compute thread: whichever caller gets the compute lock computes for everybody who waits,
until its own call is done (flat combining). With one head that costs no change of thread at all;
with several, calls that pile up behind a computation leave together, by layer. Calls of few rows go
first, so that one user's long prompt does not hold up everybody's tokens.

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


FEW_ROWS = 64
"""Up to here a call is somebody's tokens, or a short prompt: reading the weights takes longer than
the arithmetic."""

MAX_PASSED_OVER = 8
"""So often calls of few rows may go before one of many; then it is its turn."""

MAX_WAITING_BYTES = 2**30
"""Of rows. A head sends each worker the rows of one step at a time, at most: by default 512 tokens,
which take 4 MiB of Mixtral-8x7B's bf16 and 6 of 8x22B's. So this is room for 256 heads, or 170;
with a max_tokens_per_step of 8,192 for 16, or 10, and the others' calls are refused as busy."""


class NotHeldError(Exception):
    """A call for an expert that is not, or not yet, on this worker."""


class BusyError(Exception):
    """Too much waits here already."""


@dataclass(eq=False)
class _Job:
    layer: int
    x_RD: Tensor
    assignments: Assignments
    queued_at: float = field(default_factory=time.perf_counter)
    done: bool = False
    num_passed_over: int = 0
    sums_RD: Tensor | None = None
    error: Exception | None = None

    @property
    def has_many_rows(self) -> bool:
        return len(self.x_RD) > FEW_ROWS


@dataclass
class Batcher:
    """Computes calls against the experts that `held` maps at that moment. Thread-safe.

    Whoever loads experts adds them to `held` whole, one by one, and may drop them at any time: a
    call sees an expert's final weights or none.
    """

    held: Held
    metrics: WorkerMetrics
    max_waiting_bytes: int = MAX_WAITING_BYTES
    _waiting: list[_Job] = field(default_factory=list)
    _waiting_lock: threading.Lock = field(default_factory=threading.Lock)
    _compute_lock: threading.Lock = field(default_factory=threading.Lock)

    def compute(self, layer: int, x_RD: Tensor, assignments: Assignments) -> Tensor:
        """Weighted sums of one call, (R, D) float32. Blocks until they are there.

        Raises NotHeldError, BusyError, or whatever the computation raised.
        """
        missing = [str(unit) for unit, _ in assignments.counts if unit not in self.held]
        if missing:
            raise NotHeldError(f"not held here: {', '.join(missing)}")
        job = _Job(layer, x_RD, assignments)
        with self._waiting_lock:
            waiting_bytes = sum(other.x_RD.nbytes for other in self._waiting)
            if self._waiting and waiting_bytes + x_RD.nbytes > self.max_waiting_bytes:
                raise BusyError(
                    f"{len(self._waiting)} calls with {waiting_bytes:,} bytes of rows wait here, "
                    f"{x_RD.nbytes:,} more would exceed {self.max_waiting_bytes:,}"
                )
            self._waiting.append(job)
        with self._compute_lock:
            while not job.done:
                self._run(self._take())
        if job.error is not None:
            raise job.error
        assert job.sums_RD is not None
        return job.sums_RD

    def _take(self) -> list[_Job]:
        """Remove and return the jobs whose turn it is: of one layer, all of few rows or of many."""
        with self._waiting_lock:
            first = min(
                self._waiting,
                key=lambda job: job.has_many_rows and job.num_passed_over < MAX_PASSED_OVER,
            )  # the longest waiting, of equals
            kind = (first.layer, first.has_many_rows)
            taken = [job for job in self._waiting if (job.layer, job.has_many_rows) == kind]
            self._waiting = [job for job in self._waiting if job not in taken]
            for job in self._waiting:
                job.num_passed_over += 1
        return taken

    def _run(self, jobs: list[_Job]) -> None:
        """Compute jobs of one layer together, or each alone if that fails. Holds the compute lock.

        What one of them asks for, or what they take together, is not the others' fault.
        """
        try:
            self._run_together(jobs)
            return
        except Exception as error:
            if len(jobs) == 1:
                # Also out of memory: the caller gets it as its answer, the worker goes on.
                jobs[0].error, jobs[0].done = error, True
                return
        for job in jobs:
            self._run([job])

    def _run_together(self, jobs: list[_Job]) -> None:
        """Compute jobs of one layer in one pass; raises what goes wrong."""
        started = time.perf_counter()
        with torch.inference_mode():
            x_RD, assignments = join(jobs)
            try:
                held = {unit: self.held[unit] for unit, _ in assignments.counts}
            except KeyError as error:
                raise NotHeldError(f"dropped while the call waited: {error}") from error
            sums_RD = weighted_sums(held, x_RD, assignments)
        if sums_RD.device.type == "cuda":
            # What has only been launched is neither done nor known to be well; and calls that come
            # meanwhile are to pile up here, not one after the other in the device's queue.
            torch.cuda.current_stream(sums_RD.device).synchronize()
        begin = 0
        for job in jobs:
            job.sums_RD = sums_RD[begin : begin + len(job.x_RD)]
            job.done = True
            begin += len(job.x_RD)
        seconds = time.perf_counter() - started
        queued_s = [started - job.queued_at for job in jobs]
        self.metrics.observe_pass(assignments.counts, seconds, queued_s)


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

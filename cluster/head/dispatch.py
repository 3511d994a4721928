"""Experts on other processes: rows out over long-lived gRPC streams, weighted sums back.

One message per layer and worker, with every row once however many of the worker's experts it goes
to. A worker that fails costs only its own rows: they are sent again at once, to another copy, or
wait until there is one.

Shape suffixes: T tokens, D hidden, A assignments.
"""

import logging
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cluster import rpc, wire
from cluster.errors import CallRefusedError, ExpertFailedError, ExpertsUnavailableError
from cluster.head.answer_times import AnswerTimes
from cluster.head.choice import choose, renumbered, split
from cluster.head.cross_check import CrossCheck
from cluster.head.feed import PlacementFeed
from cluster.head.hedging import Hedging, other_copies
from cluster.head.part import Part
from cluster.head.race import Races
from cluster.head.routes import Directory, Routes
from cluster.metrics import HeadMetrics
from cluster.placement import Copy, Placement, WorkerInfo
from model.experts import Assignments, assign
from model.phases import UNWATCHED, Phases
from model.router import Routing
from model.units import Unit

logger = logging.getLogger(__name__)

ASK_AGAIN_S = 0.1
"""How long rows wait before a worker that refused them is asked again, if nothing changes."""

FAILURES_TO_BAN = 3
"""Calls in a row that a worker could not compute and another could: by then it is not the rows."""


class RemoteExperts:
    """All experts of a model, on the workers that the placement names.

    Owned by the engine's thread; the streams come and go in the background.
    """

    def __init__(
        self,
        feed: PlacementFeed,
        identity: rpc.Identity,
        *,
        timeout_s: float,
        recovery_timeout_s: float,
        phases: Phases = UNWATCHED,
        metrics: HeadMetrics | None = None,
        cross_check: CrossCheck | None = None,
        hedge_budget: float = 0.0,
    ) -> None:
        """timeout_s: for one answer; less where another copy could give it, see AnswerTimes.
        recovery_timeout_s: how long rows wait for somebody who can compute them.
        phases: told when rows are packed, under way and unpacked.
        cross_check: offered what is sent; ended by `close`.
        hedge_budget: see Hedging; 0: no rows are sent twice to be faster.
        """
        self.phases = phases
        self._timeout_s = timeout_s
        self._recovery_timeout_s = recovery_timeout_s
        self._metrics = metrics or HeadMetrics()
        self._cross_check = cross_check
        self._directory = Directory(feed, identity, drain_s=timeout_s)
        self._times: dict[WorkerInfo, AnswerTimes] = {}
        """Of workers that have answered; no more of them than the placement names."""
        self._hedging = Hedging(hedge_budget)
        self._races = Races(self.receive, self._metrics)
        self._num_failed: dict[WorkerInfo, int] = {}
        """Calls in a row that others computed in place of a worker that could not."""
        self._next_call_id = 1
        self._num_dispatches = 0

    def __repr__(self) -> str:
        return f"RemoteExperts({self._directory})"

    @property
    def placement(self) -> Placement | None:
        """The one that rows go by now."""
        return self._directory.placement

    def connect(self, timeout_s: float) -> bool:
        """Wait until every expert can be asked for; says whether that is so."""
        return self._directory.wait_for_routes(timeout_s)

    def close(self) -> None:
        """End all streams."""
        self._directory.close()
        if self._cross_check is not None:
            self._cross_check.close()

    def dispatch(self, layer: int, x_TD: Tensor, routing: Routing) -> "RemoteRows":
        """Send every row to the workers that hold its experts."""
        self.phases.enter("packing")
        late = self._races.late_workers()
        routes = self._directory.routes()
        assert routes is not None, "dispatch before the first placement"
        workers = routes.placement.workers
        if len(self._times) > len(workers):  # of some that have left
            self._times = {w: self._times[w] for w in workers if w in self._times}
        if len(self._num_failed) > len(workers):
            self._num_failed = {w: self._num_failed[w] for w in workers if w in self._num_failed}
        assignments = assign(layer, routing)
        parts = self._send(routes, x_TD, [assignments], avoid=late)
        for part in parts or ():
            self._hedging.earn(len(part.assignments.rows_A))
        if self._cross_check is not None and parts:
            self._cross_check.offer(x_TD, assignments, routes.copies)
        timed = self._num_dispatches % len(parts) if parts else None
        self._num_dispatches += 1
        return RemoteRows(self, layer, x_TD, assignments, parts, timed)

    def answers(
        self,
        rows: "RemoteRows",
        part: Part,
        *,
        refused_by: Collection[WorkerInfo],
        is_timely: bool,
    ) -> list[tuple[Part, wire.Reply]]:
        """The answer to a part, or where it is late to others with the same rows. Raises as
        `receive` does.

        refused_by: who else is not to be asked.
        is_timely: no other answer was waited for before, so the worker's time may be measured.
        """
        rivals = self._rivals(rows.x_TD, part, refused_by)
        answers = self._races.run(part, rivals) if rivals else [(part, self.receive(part))]
        if is_timely:
            times = self._times.setdefault(part.stream.worker, AnswerTimes())
            times.observe(len(part.assignments.rows_A), time.monotonic() - part.sent_at)
        return answers

    def receive(self, part: Part) -> wire.Reply:
        """The answer to a part. Drops the stream of a worker that fails, and raises why."""
        try:
            reply = part.stream.receive(part.call, part.overdue_at)
        except CallRefusedError:
            raise
        except ExpertsUnavailableError:
            if self._directory.lose(part.stream):
                self._metrics.observe_lost_worker()
            raise
        if self._num_failed:
            self._num_failed.pop(part.stream.worker, None)
        return reply

    def blame(self, workers: Collection[WorkerInfo]) -> None:
        """These could not compute what others could. Bans those that have done nothing else."""
        for worker in workers:
            self._num_failed[worker] = self._num_failed.get(worker, 0) + 1
            if self._num_failed[worker] >= FAILURES_TO_BAN:
                self._directory.ban(worker, "fails whatever it is asked")

    def send_again(
        self,
        rows: "RemoteRows",
        lost: Sequence[Assignments],
        refused_by: set[WorkerInfo],
        failed: Mapping[WorkerInfo, ExpertFailedError],
        cause: ExpertsUnavailableError | ExpertFailedError | None,
        lost_since: float,
    ) -> tuple[list[Part], bool]:
        """Send what was lost to others, as soon as there are any.

        Returns the parts, and whether they are all of the dispatch anew: a lost slice can only be
        made good by the same slice, or by computing everything again in another way.

        refused_by: who is not to be asked; cleared when it is time to ask them again.
        failed: who is not to be asked at all, and why; raised where that leaves nobody.
        lost_since: when the dispatch first lost something, see `patience_s`.
        """
        started = time.monotonic()
        has_waited = False
        has_slices = any(unit.num_slices > 1 for each in lost for unit, _ in each.counts)
        attempts = [(lost, False), *([([rows.assignments], True)] if has_slices else [])]
        while True:
            for wanted, is_all in attempts:
                routes = self._directory.routes()
                parts = None
                if routes is not None:
                    parts = self._send(routes, rows.x_TD, wanted, refused_by | failed.keys())
                if parts is not None:
                    num_rows = sum(len(each.rows_A) for each in wanted)
                    self._metrics.observe_resent(num_rows, time.monotonic() - started)
                    return parts, is_all
            if failed and routes is not None:
                units = [unit for unit, _ in rows.assignments.counts]
                if any(routes.options(u) and not routes.options(u, failed) for u in units):
                    raise next(iter(failed.values()))
            left_s = self.patience_s(rows.layer, lost_since, cause)
            if not has_waited:
                logger.warning("%s; rows wait, %.1f s at most", cause or "nobody to ask", left_s)
            has_waited = True
            self._directory.wait_for_change(min(left_s, ASK_AGAIN_S) if refused_by else left_s)
            refused_by.clear()

    def patience_s(
        self,
        layer: int,
        lost_since: float,
        cause: ExpertsUnavailableError | ExpertFailedError | None,
    ) -> float:
        """How much longer rows may wait. Raises ExpertsUnavailableError when it is no longer."""
        left_s = lost_since + self._recovery_timeout_s - time.monotonic()
        if left_s <= 0:
            raise ExpertsUnavailableError(
                f"{cause or f'nobody holds all experts of layer {layer}'}; "
                f"no replacement within {self._recovery_timeout_s:.0f} s"
            ) from cause
        return left_s

    def _send(
        self,
        routes: Routes,
        x_TD: Tensor,
        wanted: Sequence[Assignments],
        refused_by: Collection[WorkerInfo] = (),
        avoid: Collection[WorkerInfo] = (),
    ) -> list[Part] | None:
        """Choose copies, split by worker, in ascending order, and send each its part.

        None, and nothing is sent, if there is nobody to ask for some of it.
        avoid: who is asked only where no other trusted worker can be.
        """

        def options(unit: Unit) -> list[Copy]:
            found = routes.trusted_options(unit, avoid) if avoid else None
            return found or routes.options(unit, refused_by)

        ways = [[(count, options(unit)) for unit, count in each.counts] for each in wanted]
        if not all(found for each in ways for _, found in each):
            return None
        return [
            self._send_part(routes, x_TD, worker, mine)
            for each, found in zip(wanted, ways, strict=True)
            for worker, mine in split(each, choose(found))
        ]

    def _rivals(self, x_TD: Tensor, part: Part, refused_by: Collection[WorkerInfo]) -> list[Part]:
        """The same rows once more, at other copies; none unless the part is late for its worker,
        others hold its experts, and the budget allows it.
        """
        if part.hedge_at is None or part.stream.wait(part.call, part.hedge_at):
            return []
        avoid = {part.stream.worker, *refused_by, *self._races.late_workers()}
        routes = self._directory.routes()
        assert routes is not None, "a part before the first placement"
        counts = part.assignments.counts
        ways = other_copies(routes, [unit for unit, _ in counts], avoid)
        if ways is None:
            return []
        wanted = [(count, copies) for (_, count), copies in zip(counts, ways, strict=True)]
        again = split(part.assignments, choose(wanted))
        if not self._hedging.spend(sum(len(mine.rows_A) for _, mine in again)):
            return []
        return [self._send_part(routes, x_TD, worker, mine) for worker, mine in again]

    def _send_part(self, routes: Routes, x_TD: Tensor, worker: int, mine: Assignments) -> Part:
        rows_R, local_A = renumbered(mine.rows_A, len(x_TD))
        rows_R = rows_R.to(x_TD.device)
        call = wire.Call(
            call_id=self._next_call_id,
            epoch=routes.placement.epoch,
            layer=mine.counts[0][0].layer,
            x_RD=x_TD if len(rows_R) == len(x_TD) else x_TD.index_select(0, rows_R),
            assignments=Assignments(mine.counts, local_A, mine.weights_A),
        )
        self._next_call_id += 1
        stream = routes.streams[worker]
        now = time.monotonic()
        times = self._times.get(stream.worker)
        num_rows = len(mine.rows_A)
        hedge_s = self._hedging.due_s(num_rows, times.usual_s(num_rows)) if times else None
        hedge_at = None if hedge_s is None else now + hedge_s
        overdue_at = now + self._deadline_s(routes, worker, mine)
        stream.send(call, overdue_at)
        return Part(call, rows_R, mine, stream, now, hedge_at, overdue_at)

    def _deadline_s(self, routes: Routes, worker: int, mine: Assignments) -> float:
        """How long to wait for a worker: short where others could do the same."""
        if not all(routes.can_do_without(unit, worker) for unit, _ in mine.counts):
            return self._timeout_s
        times = self._times.get(routes.placement.workers[worker])
        deadline_s = times.deadline_s(len(mine.rows_A)) if times else None
        return self._timeout_s if deadline_s is None else min(deadline_s, self._timeout_s)


@dataclass(frozen=True)
class RemoteRows:
    """The answer to one dispatch, on its way from several workers."""

    experts: RemoteExperts
    layer: int
    x_TD: Tensor
    assignments: Assignments
    parts: list[Part] | None
    """None: some of the experts could not be asked for."""
    timed: int | None
    """Which of them is received first, and its worker's time taken: of answers that came while
    another was waited for nobody knows when. Each has its turn, dispatch by dispatch."""

    def wait(self) -> Tensor:
        """Weighted sums (T, D) float32, added in ascending order of the workers.

        Raises ExpertsUnavailableError when rows could not be computed anywhere in time, or
        ExpertFailedError when a worker could not compute them, and neither could another, or there
        is no other.
        """
        phases = self.experts.phases
        sums_TD: Tensor | None = None
        compute_s = 0.0
        parts = self.parts or []
        lost = [self.assignments] if self.parts is None else []
        cause: ExpertsUnavailableError | ExpertFailedError | None = None
        refused_by: set[WorkerInfo] = set()
        failed: dict[WorkerInfo, ExpertFailedError] = {}
        lost_since = None
        timed = self.timed
        while True:
            # One may be out of order; what two cannot compute is the rows' own fault.
            may_fail = not failed
            for part, answer in self._answers(parts, timed, refused_by | failed.keys()):
                if not isinstance(answer, wire.Reply):
                    if isinstance(answer, CallRefusedError):
                        refused_by.add(part.stream.worker)
                    elif isinstance(answer, ExpertFailedError):
                        if not may_fail:
                            raise answer
                        failed[part.stream.worker] = answer
                    logger.warning("%s; %d rows are sent again", answer, len(part.rows_R))
                    lost.append(part.assignments)
                    cause = answer
                    continue
                phases.enter("unpacking")
                compute_s = max(compute_s, answer.compute_s)
                sums_TD = self._plus(sums_TD, part, answer.sums_RD)
            if not lost:
                break
            # Experts keep no state, so twice does no harm.
            phases.enter("packing")
            if lost_since is None:
                lost_since = time.monotonic()
            else:  # whoever was asked instead failed, too
                self.experts.patience_s(self.layer, lost_since, cause)
            parts, is_all = self.experts.send_again(
                self, lost, refused_by, failed, cause, lost_since
            )
            lost, timed = [], None
            if is_all:
                sums_TD = None
        self.experts.blame(failed)
        phases.reveal(compute_s, was="transfer", really="experts")
        return self._zeros() if sums_TD is None else sums_TD

    def _plus(self, sums_TD: Tensor | None, part: Part, sums_RD: Tensor) -> Tensor:
        """Sums, None for zeros, and a part's."""
        sums_RD = sums_RD.to(self.x_TD.device)
        if part.assignments.counts == self.assignments.counts:
            return sums_RD  # the part is everything; it may be read only, but none is added to it
        sums_TD = self._zeros() if sums_TD is None else sums_TD
        return sums_TD.index_add_(0, part.rows_R, sums_RD)

    def _zeros(self) -> Tensor:
        return torch.zeros(self.x_TD.shape, dtype=torch.float32, device=self.x_TD.device)

    def _answers(
        self, parts: Sequence[Part], timed: int | None, avoid: Collection[WorkerInfo]
    ) -> Iterator[tuple[Part, wire.Reply | ExpertsUnavailableError | ExpertFailedError]]:
        """What comes of each part, in their order, whichever is received first."""
        early = None if timed is None else self._answer(parts[timed], avoid, is_timely=True)
        for number, part in enumerate(parts):
            if early is not None and number == timed:
                yield from early
            else:
                yield from self._answer(part, avoid, is_timely=False)

    def _answer(
        self, part: Part, avoid: Collection[WorkerInfo], *, is_timely: bool
    ) -> Sequence[tuple[Part, wire.Reply | ExpertsUnavailableError | ExpertFailedError]]:
        self.experts.phases.enter("transfer")
        try:
            return self.experts.answers(self, part, refused_by=avoid, is_timely=is_timely)
        except (ExpertsUnavailableError, ExpertFailedError) as error:
            return [(part, error)]

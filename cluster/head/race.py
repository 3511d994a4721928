"""Rows that several workers compute at once: whichever answer is complete first is used.

When and whom to ask too is `hedging`'s to decide.
"""

import select
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

from cluster import wire
from cluster.errors import ExpertFailedError, ExpertsUnavailableError
from cluster.head.part import Part
from cluster.metrics import HeadMetrics
from cluster.placement import WorkerInfo


class Races:
    """Runs them, and reads what came second once it is there: no stream is left out of order.

    Owned by the engine's thread.
    """

    def __init__(self, receive: Callable[[Part], wire.Reply], metrics: HeadMetrics) -> None:
        """receive: waits for the answer to a part; raises, and ends the stream of a worker that is
        lost, as RemoteExperts.receive does.
        """
        self._receive = receive
        self._metrics = metrics
        self._owed: list[Part] = []
        """Parts whose answers nobody needs any more."""

    def run(self, part: Part, rivals: Sequence[Part]) -> list[tuple[Part, wire.Reply]]:
        """The answer to a part, or else to all of the rivals, which have the same rows.

        A part that is late without an answer counts as lost as ever, but not before its deadline.
        Raises what has become of the part, where neither it nor the rivals could be computed.
        """
        _wait_for_either(part, rivals)
        fault: ExpertsUnavailableError | ExpertFailedError | None = None
        if part.is_answered():
            try:
                reply = self._receive(part)
            except (ExpertsUnavailableError, ExpertFailedError) as error:
                fault = error
            else:
                self._owed += rivals
                self._observe(rivals, "lost")
                return [(part, reply)]
        answers: list[tuple[Part, wire.Reply]] = []
        try:
            for rival in rivals:
                answers.append((rival, self._receive(rival)))
        except (ExpertsUnavailableError, ExpertFailedError):
            self._owed += rivals[len(answers) + 1 :]
            self._observe(rivals, "failed")
            if fault is not None:
                raise fault from None
            return [(part, self._receive(part))]
        if fault is None:
            self._owed.append(part)
        self._observe(rivals, "won")
        return answers

    def late_workers(self) -> set[WorkerInfo]:
        """Who owes an answer for longer than usual that nobody needs any more: a further call would
        wait behind it. Reads those that have come; one that is overdue is lost.
        """
        if not self._owed:
            return set()
        now = time.monotonic()
        owed, self._owed = self._owed, []
        for part in owed:
            if now < part.overdue_at and not part.is_answered():
                self._owed.append(part)
                continue
            with suppress(ExpertsUnavailableError, ExpertFailedError):
                self._receive(part)
        return {
            part.stream.worker
            for part in self._owed
            if part.hedge_at is not None and part.hedge_at < now
        }

    def _observe(self, rivals: Sequence[Part], outcome: str) -> None:
        num_rows = sum(len(rival.assignments.rows_A) for rival in rivals)
        self._metrics.observe_hedged(num_rows, outcome)


def _wait_for_either(part: Part, rivals: Sequence[Part]) -> None:
    """Until the part is answered, or all of its rivals are, or it is overdue."""
    while not part.is_answered():
        unanswered = [rival.stream for rival in rivals if not rival.is_answered()]
        left_s = part.overdue_at - time.monotonic()
        if not unanswered or left_s <= 0:
            return
        poll = select.poll()
        for stream in (part.stream, *unanswered):
            poll.register(stream, select.POLLIN)
        poll.poll(left_s * 1e3)

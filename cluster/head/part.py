"""What one worker is to compute of a dispatch, on its way.

Shape suffixes: R rows of one worker.
"""

from dataclasses import dataclass

from torch import Tensor

from cluster import wire
from cluster.head.stream import WorkerStream
from model.experts import Assignments


@dataclass(frozen=True)
class Part:
    """A call that was sent, and by when it should be answered, in `time.monotonic`'s seconds."""

    call: wire.Call
    rows_R: Tensor
    """Rows of the dispatch, int64."""
    assignments: Assignments
    """The same assignments as the call's, with rows of the dispatch."""
    stream: WorkerStream
    sent_at: float
    hedge_at: float | None
    """From when on other copies may be sent the same rows; None: not at all."""
    overdue_at: float

    def is_answered(self) -> bool:
        """Whether its answer, or the reason why none will come, can be received at once."""
        return self.stream.wait(self.call, self.sent_at)

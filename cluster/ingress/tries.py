"""Whether a request that a head did not finish may be tried again. Pure: counts, no clock.

1. The head is lost: replayed, on whatever head there is. Such a request may itself be what kills
   heads, so it is given up after MAX_LOST_IN_A_ROW heads without one new token, or MAX_LOST in all.
2. The head says that it failed: replayed once, on another head only. It may have been the head's
   fault (no way to a worker, a broken device), or its neighbours'; what fails again is the
   request's own fault, or the whole cluster's, and another try would not help.
3. The head is about to stop: replayed, and not counted, since every head stops only once.
4. The head refuses a replay, and names no parameter at fault: as if it had failed. Another head
   took the request, so it is this one that is too small for it.
"""

from cluster.errors import (
    HeadDrainsError,
    HeadFailedError,
    HeadLostError,
    HeadUnavailableError,
    RequestError,
)
from cluster.placement import HeadInfo

MAX_LOST_IN_A_ROW = 3
MAX_LOST = 8

SUSPECT_FROM = 2
"""Heads lost in a row from which a request must show that it is harmless before others of its kind
may be tried again: else one that kills heads takes all that share its head along each time."""


class Tries:
    """Of one request. Owned by whoever runs it."""

    def __init__(self) -> None:
        self.failure: HeadFailedError | None = None
        """What a head said that failed."""
        self.failed_at: HeadInfo | None = None
        """Which head that was."""
        self._is_replay = False
        self._num_lost = 0
        self._num_lost_in_a_row = 0

    @property
    def is_suspect(self) -> bool:
        return self._num_lost_in_a_row >= SUSPECT_FROM

    def progress(self) -> None:
        """New tokens have come."""
        self._num_lost_in_a_row = 0

    def again_after(self, error: HeadUnavailableError | RequestError, head: HeadInfo) -> str:
        """Note that this head did not finish it; returns why, in a word: lost, failed or moved.

        Raises HeadUnavailableError when it must not be tried again, or RequestError when it never
        could have worked.
        """
        if isinstance(error, RequestError):
            if error.param is not None or not self._is_replay:
                raise error
            error = HeadFailedError(f"{head.name} refuses what was begun: {error.message}")
        self._is_replay = True
        match error:
            case HeadDrainsError():
                return "moved"
            case HeadLostError():
                self._num_lost += 1
                self._num_lost_in_a_row += 1
                if self._num_lost_in_a_row >= MAX_LOST_IN_A_ROW or self._num_lost >= MAX_LOST:
                    raise HeadUnavailableError(
                        f"{error}; given up after {self._num_lost} heads were lost with it"
                    ) from error
                return "lost"
            case HeadFailedError() if self.failure is None:
                self.failure, self.failed_at = error, head
                return "failed"
        raise error

"""How long a worker usually takes, and may take before it counts as lost: by its latest answers.

Pure.
"""

import math

FLOOR_S = 0.25
"""Below it a busy machine's hiccups would pass for losses; with the keeper's beat and the second
worker's answer it leaves a stall well below half a second."""

TIMES_SLOWEST = 8.0
FADING = 0.99
"""With each answer the memory of the slowest fades: half of it is gone after 69."""

USUAL = 0.95
"""Of all answers, so many are faster than the time that counts as usual."""

_STEP = 0.2
"""How fast that time follows, in its logarithm. It rises by a fifth with an answer that was slower,
falls by 1 % with one that was faster, and so stands still where one in 20 is slower."""

_RISE, _FALL = math.exp(_STEP * USUAL), math.exp(_STEP * (USUAL - 1))

_LEAST_S = 1e-4
"""No time counts as shorter than that."""


class AnswerTimes:
    """Answer times of one worker, by the size of the call.

    Calls whose numbers of rows agree in their highest bit are of one size. For each the slowest
    answer is kept, fading with every later one: about a recent p99. And a p95 that follows by small
    steps, for which it is enough to know whether an answer took longer than that.
    """

    def __init__(self) -> None:
        self._slowest_s: dict[int, float] = {}
        self._usual_s: dict[int, float] = {}

    def observe(self, num_rows: int, seconds: float) -> None:
        """An answer came after so long, or would have come later still, had it been waited for.

        num_rows: of all experts together.
        """
        size = num_rows.bit_length()
        self._slowest_s[size] = max(seconds, FADING * self._slowest_s.get(size, 0.0))
        usual_s = self._usual_s.get(size)
        if usual_s is None:
            usual_s = seconds
        else:
            usual_s *= _RISE if seconds > usual_s else _FALL
        self._usual_s[size] = max(_LEAST_S, usual_s)

    def usual_s(self, num_rows: int) -> float | None:
        """Nearly all answers to calls of that size came sooner; None before any has come."""
        return self._usual_s.get(num_rows.bit_length())

    def deadline_s(self, num_rows: int) -> float | None:
        """How long to wait for a call of that size; None where nothing is known to go by.

        For a size that was never seen, time grows with the rows from the next smaller size.
        """
        size = num_rows.bit_length()
        smaller = [seen for seen in self._slowest_s if seen <= size]
        if not smaller:
            return None
        nearest = max(smaller)
        slowest_s = self._slowest_s[nearest] * (1 << size - nearest)
        return max(FLOOR_S, TIMES_SLOWEST * slowest_s)

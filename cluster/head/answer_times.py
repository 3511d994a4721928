"""How long a worker may take before it counts as lost, by how long it took lately. Pure."""

FLOOR_S = 0.25
"""Below it a busy machine's hiccups would pass for losses; with the keeper's beat and the second
worker's answer it leaves a stall well below half a second."""

TIMES_SLOWEST = 8.0
FADING = 0.99
"""With each answer the memory of the slowest fades: half of it is gone after 69."""


class AnswerTimes:
    """Answer times of one worker, by the size of the call.

    Calls whose numbers of rows agree in their highest bit are of one size. For each the slowest
    answer is kept, fading with every later one: about a recent p99.
    """

    def __init__(self) -> None:
        self._slowest_s: dict[int, float] = {}

    def observe(self, num_rows: int, seconds: float) -> None:
        """An answer came after so long. num_rows: of all experts together."""
        size = num_rows.bit_length()
        self._slowest_s[size] = max(seconds, FADING * self._slowest_s.get(size, 0.0))

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

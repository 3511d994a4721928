"""How much work each expert gets, from what workers have counted. Pure."""

from collections.abc import Mapping

MEMORY_ROWS = 20_000
"""Rows per expert after which what was counted before weighs half. By rows rather than by time:
a quiet night is no reason to move anything."""

PRIOR_ROWS = 100
"""That every expert counts as having got before anything was counted: few rows prove no skew."""


class LoadTracker:
    """Counts rows by layer and expert, the latest with the most weight."""

    def __init__(self, num_layers: int, num_experts: int) -> None:
        self._rows = [[0.0] * num_experts for _ in range(num_layers)]
        self._seen: dict[int, Mapping[tuple[int, int], int]] = {}

    def count(self, incarnation: int, rows: Mapping[tuple[int, int], int]) -> None:
        """rows: what the worker of this incarnation has computed since its start, by (layer,
        expert). A slice counts like a whole expert: all experts are cut alike.
        """
        seen = self._seen.get(incarnation, {})
        fresh = {key: total - seen.get(key, 0) for key, total in rows.items()}
        self._seen[incarnation] = rows
        num_experts = sum(map(len, self._rows))
        fading = 0.5 ** (sum(fresh.values()) / (MEMORY_ROWS * num_experts))
        self._rows = [[rows * fading for rows in layer] for layer in self._rows]
        for (layer, expert_id), num_rows in fresh.items():
            self._rows[layer][expert_id] += num_rows

    def forget(self, incarnation: int) -> None:
        """That worker is gone; what it has counted stays counted."""
        self._seen.pop(incarnation, None)

    def expected(self) -> list[list[float]]:
        """Expected load by layer and expert, in rows."""
        return [[rows + PRIOR_ROWS for rows in layer] for layer in self._rows]

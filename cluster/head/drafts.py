"""Guessing what a sequence says next from what it has said before (prompt-lookup decoding).

A guess costs rows in a step but no step of its own: those that prove right save a round trip to the
experts in every layer. Pure.
"""

from collections.abc import Sequence as Ids

_LENGTHS = (3, 2)
"""How many of the last tokens must have stood together before; the longer match is tried first."""


class LookupDrafter:
    """Of one sequence. Mutable state: where each short run of its tokens was last seen."""

    def __init__(self, max_drafts: int) -> None:
        """max_drafts: tokens guessed at once, at most."""
        self._max_drafts = max_drafts
        self._num_indexed = 0
        self._next_of: dict[tuple[int, ...], int] = {}
        """Position of the token that last followed a run of tokens."""

    def propose(self, token_ids: Ids[int], limit: int) -> tuple[int, ...]:
        """The tokens that followed the last ones when they stood there before; often none.

        token_ids: all of the sequence; may only have grown since the last call.
        """
        self._index(token_ids)
        for length in _LENGTHS:
            start = self._next_of.get(tuple(token_ids[-length:]))
            if start is not None:
                return tuple(token_ids[start : start + min(limit, self._max_drafts)])
        return ()

    def _index(self, token_ids: Ids[int]) -> None:
        for position in range(max(1, self._num_indexed), len(token_ids)):
            for length in _LENGTHS:
                if position >= length:
                    self._next_of[tuple(token_ids[position - length : position])] = position
        self._num_indexed = len(token_ids)

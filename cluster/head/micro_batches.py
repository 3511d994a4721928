"""Into how many micro-batches a step is cut: what has been measured to be the fastest. Pure.

While experts compute one, the head's attention computes another. That pays where the head would
wait for a slow link, or for experts whose time grows with their rows; where experts only read their
weights once more it costs. Nothing but trying tells which: now and then a few steps are cut into
one micro-batch more, or less, and the faster number is kept.
"""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

from model.phases import Phase

TRIAL_STEPS = 6
"""Steps of a trial; the first shows nothing, for its shapes are new."""

FIRST_TRIAL_AFTER = 8
LAST_TRIAL_AFTER = 512
"""Steps between two trials of steps of a size; doubled by each trial that changes nothing."""

WORTHWHILE = 0.95
"""Of the time so far: what is not faster by that much may be noise."""

MIN_HIDDEN = 0.1
"""Part of a step from which on it is worth trying to hide it behind the rest: what the head waits
for, or computes itself, whichever is less."""

_FADING = 0.3
"""Weight of the newest step's time."""


@dataclass
class _Size:
    """What is known of steps of about the same number of tokens."""

    best: int = 1
    seconds: dict[int, float] = field(default_factory=dict)
    """Per token, by number of micro-batches; later steps weigh more."""
    num_steps: int = 0
    """Since the last trial."""
    trial_after: int = FIRST_TRIAL_AFTER
    trial: int | None = None
    trial_steps: int = 0
    tries_more: bool = True


class MicroBatches:
    """Chooses for one head. Owned by the engine's thread."""

    def __init__(self, most: int) -> None:
        """most: micro-batches of a step; 1: never more."""
        self._most = most
        self._sizes: dict[int, _Size] = defaultdict(_Size)

    def choose(self, num_tokens: int) -> int:
        """For a step with so many tokens."""
        size = self._sizes[num_tokens.bit_length()]
        return min(size.trial or size.best, num_tokens, self._most)

    def observe(
        self, num_tokens: int, number: int, seconds: float, phases: Mapping[Phase, float]
    ) -> None:
        """How long a step's forward pass took in so many micro-batches, and in which phases."""
        size = self._sizes[num_tokens.bit_length()]
        if size.trial is not None:
            self._try(size, number, seconds / num_tokens)
            return
        if number != size.best:
            return  # fewer, for it had too few tokens
        _note(size, number, seconds / num_tokens)
        size.num_steps += 1
        away_s = phases.get("experts", 0.0) + phases.get("transfer", 0.0)
        may_help = size.best > 1 or min(away_s, seconds - away_s) >= MIN_HIDDEN * seconds
        if size.num_steps >= size.trial_after and may_help:
            size.trial = self._next(size)
            size.trial_steps = 0

    def _try(self, size: _Size, number: int, seconds: float) -> None:
        """A step of a trial; the last one decides."""
        assert size.trial is not None
        if number == size.trial:
            size.trial_steps += 1
            if size.trial_steps == 1:
                size.seconds.pop(number, None)
            else:
                _note(size, number, seconds)
            if size.trial_steps < TRIAL_STEPS:
                return
            if size.seconds[number] < WORTHWHILE * size.seconds[size.best]:
                size.best, size.trial_after = number, FIRST_TRIAL_AFTER
            else:
                size.tries_more = not size.tries_more
                size.trial_after = min(2 * size.trial_after, LAST_TRIAL_AFTER)
        size.trial, size.num_steps = None, 0

    def _next(self, size: _Size) -> int | None:
        """One more or one less, whichever there is; None if there is no other number."""
        more, less = size.best + 1, size.best - 1
        numbers = (more, less) if size.tries_more else (less, more)
        return next((number for number in numbers if 1 <= number <= self._most), None)


def _note(size: _Size, number: int, seconds: float) -> None:
    before = size.seconds.setdefault(number, seconds)
    size.seconds[number] = before + _FADING * (seconds - before)

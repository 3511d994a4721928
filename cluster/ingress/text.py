"""Token ids of one choice to the text that its reader gets: decoding and stop strings."""

from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from cluster.ingress.journal import Finish, Journal
from model.tokenizer import StreamDecoder

GenerateIds = Callable[[Journal], AsyncGenerator[tuple[int, ...], None]]
"""Runs a journal on a head; yields new ids as they come and records them."""


@dataclass(frozen=True)
class TextDelta:
    """New text of a choice, and why it ended, if it did."""

    text: str
    finish: Finish | None = None


class StopMatcher:
    """Finds stop strings in a growing text, and never lets a part of one out."""

    def __init__(self, stop_strings: Sequence[str]) -> None:
        self._stop_strings = stop_strings
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """Text that is safe to show now, and whether a stop string was met (it is cut off)."""
        held = self._held + text
        found = [
            (at + len(stop), at) for stop in self._stop_strings if (at := held.find(stop)) >= 0
        ]
        if found:
            # the one that is complete first, so that it does not matter how the text was cut
            _, start = min(found)
            return held[:start], True
        keep = max((_overlap(held, stop) for stop in self._stop_strings), default=0)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep], False

    def flush(self) -> str:
        """What was held back, when nothing follows any more."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` with which `stop` begins."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if stop.startswith(text[-n:])), 0)


async def generate_text(
    generate_ids: GenerateIds, journal: Journal, decoder: StreamDecoder, stop_strings: Sequence[str]
) -> AsyncGenerator[TextDelta, None]:
    """Text of one choice as it comes; the last item has `finish`.

    A stop string ends the choice at the head, too: closing the ids' iterator aborts them there.
    """
    matcher = StopMatcher(stop_strings)
    async with aclosing(generate_ids(journal)) as batches:
        async for token_ids in batches:
            text = "".join([decoder.push(token_id) for token_id in token_ids])
            if journal.finish:
                text += decoder.flush()
            text, is_stopped = matcher.push(text)
            if is_stopped:
                yield TextDelta(text, "stop")
                return
            if journal.finish:
                yield TextDelta(text + matcher.flush(), journal.finish)
            elif text:
                yield TextDelta(text)

"""Where a text ends: stop strings in text that grows token by token. No torch."""

from collections.abc import Sequence
from copy import deepcopy

from model.errors import SamplingError
from model.tokenizer import StreamDecoder, Tokenizer


class StopMatcher:
    """Finds stop strings in a growing text, and never lets a part of one out.

    What follows a stop string is never shown. Nor is the stop string itself, as in OpenAI's API,
    unless that is asked for (transformers would keep it).
    """

    def __init__(self, stop_strings: Sequence[str], *, shows_stop: bool = False) -> None:
        """stop_strings: none may be empty."""
        self.met: str | None = None
        """The stop string that was met."""
        self._stop_strings = stop_strings
        self._shows_stop = shows_stop
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """Text that is safe to show now, and whether a stop string was met."""
        held = self._held + text
        found = [
            (at + len(stop), at) for stop in self._stop_strings if (at := held.find(stop)) >= 0
        ]
        if found:
            # the one that is complete first, so that it does not matter how the text was cut
            end, start = min(found)
            self._held = ""
            self.met = held[start:end]
            return held[: end if self._shows_stop else start], True
        keep = max((overlap(held, stop) for stop in self._stop_strings), default=0)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep], False

    def flush(self) -> str:
        """What was held back, when nothing follows any more."""
        held, self._held = self._held, ""
        return held


class TextStream:
    """Text of one completion, piece by piece, up to a stop string. Owned by one stream."""

    def __init__(
        self, tokenizer: Tokenizer, stop_strings: Sequence[str], *, continues_text: bool
    ) -> None:
        self.is_stopped = False
        self._decoder = StreamDecoder(tokenizer, continues_text=continues_text)
        self._matcher = StopMatcher(stop_strings)

    def push(self, token_id: int) -> str:
        """Text that became certain with this token; empty once a stop string was met."""
        return self._show(self._decoder.push(token_id))

    def flush(self) -> str:
        """What was held back, when no token follows any more."""
        text = self._show(self._decoder.flush())
        return text if self.is_stopped else text + self._matcher.flush()

    def _show(self, text: str) -> str:
        if self.is_stopped:
            return ""
        shown, self.is_stopped = self._matcher.push(text)
        return shown


class TextOptions:
    """How the ids of a call's completions become text: where it stops, and what stands before."""

    def __init__(self, stop: str | Sequence[str], *, continues_text: bool) -> None:
        """stop: strings that end a text; raises SamplingError for an empty one.

        continues_text: whether the completions go on with a text, rather than begin one.
        """
        self._stop_strings = (stop,) if isinstance(stop, str) else tuple(stop)
        if "" in self._stop_strings:
            raise SamplingError("stop", "a stop string must not be empty")
        self._continues_text = continues_text

    def new_text(self, tokenizer: Tokenizer) -> TextStream:
        """For the next completion."""
        return TextStream(tokenizer, self._stop_strings, continues_text=self._continues_text)


class TextEnds:
    """Whether completions that branch from each other end by what they say, a token at a time."""

    def __init__(self, text: TextStream, tokenizer: Tokenizer) -> None:
        """text: of the completion with no token yet."""
        self._tokenizer = tokenizer
        self._texts: dict[tuple[int, ...], TextStream] = {(): text}
        self._length = 0

    def __call__(self, token_ids: tuple[int, ...]) -> bool:
        """Asked of what goes on by one token from one that was asked of and has not ended; no
        shorter one may follow.
        """
        if len(token_ids) > self._length:
            self._texts = {k: t for k, t in self._texts.items() if len(k) == self._length}
            self._length = len(token_ids)
        shared = {id(self._tokenizer): self._tokenizer}
        text = self._texts[token_ids] = deepcopy(self._texts[token_ids[:-1]], shared)
        text.push(token_ids[-1])
        return text.is_stopped


def overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` with which `stop` begins."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if stop.startswith(text[-n:])), 0)

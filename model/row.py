"""One sequence as the sampler sees it: what is asked for, and what it holds so far. No torch.

What looks back is kept up as the sequence grows, and only where the parameters want it.
"""

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from model.sampling_params import SamplingParams


class Row:
    """The parameters and the past of one sequence; made once, handed to every `sample` call.

    token_ids: prompt and completion, at least one. The caller's own list, not copied: the caller
               appends what was chosen and takes nothing away.
    num_prompt_tokens: how many of them are the request's prompt; what follows is its completion,
               also where another head has computed some of it.
    """

    def __init__(
        self, params: SamplingParams, token_ids: Sequence[int], num_prompt_tokens: int
    ) -> None:
        self.params = params
        self.token_ids = token_ids
        self.num_prompt_tokens = num_prompt_tokens
        self.has_penalties = (
            params.repetition_penalty != 1.0
            or params.frequency_penalty != 0.0
            or params.presence_penalty != 0.0
        )
        self.is_plain = not (
            self.has_penalties
            or params.min_tokens
            or params.bad_words
            or params.logit_bias
            or params.allowed_token_ids is not None
        )
        """Whether the logits are left as they are up to the temperature, but for a mask."""
        self._tally: _Tally | None = None
        self._bad_words: _BadWords | None = None
        self._allowed: NDArray[np.int32] | None = None
        self._biases: tuple[NDArray[np.int64], NDArray[np.float64]] | None = None

    def __repr__(self) -> str:
        return f"Row({self.num_prompt_tokens}+{self.num_emitted} tokens, {self.params})"

    @property
    def position(self) -> int:
        """Where in the sequence the next token will stand."""
        return len(self.token_ids)

    @property
    def num_emitted(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    def tally(self) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """The different ids that penalties apply to, and how often the completion holds each.

        The prompt's ids (0 times) are among them only for a repetition penalty. Views, valid until
        the next call; the work is that of the tokens appended since the last one.
        """
        if self._tally is None:
            self._tally = _Tally(self.num_prompt_tokens)
            if self.params.repetition_penalty != 1.0:
                self._tally.add(self.token_ids[: self.num_prompt_tokens], 0)
        self._tally.catch_up(self.token_ids)
        return self._tally.ids, self._tally.counts

    def completing_ids(self) -> list[int]:
        """Ids that would complete one of the bad words now."""
        if self._bad_words is None:
            self._bad_words = _BadWords(self.params.bad_words)
        return self._bad_words.completing(self.token_ids)

    def forbidden_stops(self) -> tuple[int, ...]:
        """Stop ids that min_tokens forbids now."""
        return self.params.stop_token_ids if self.num_emitted < self.params.min_tokens else ()

    def biases(self) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Ids of logit_bias, and what is added to each."""
        if self._biases is None:
            ids, values = zip(*self.params.logit_bias, strict=True)
            self._biases = np.array(ids, dtype=np.int64), np.array(values, dtype=np.float64)
        return self._biases

    def allowed_words(self, vocab_size: int) -> NDArray[np.int32]:
        """allowed_token_ids, which must not be None, as a packed mask; see `pack_mask`."""
        if self._allowed is None:
            assert self.params.allowed_token_ids is not None
            self._allowed = pack_mask(self.params.allowed_token_ids, vocab_size)
        return self._allowed


def pack_mask(token_ids: Sequence[int], vocab_size: int) -> NDArray[np.int32]:
    """These ids as bits, (ceil(vocab_size / 32),) little-endian int32: id i is bit i % 32 of word
    i // 32, lowest bit first.
    """
    bits = np.zeros(-(-vocab_size // 32) * 32, dtype=np.uint8)
    bits[np.array(token_ids, dtype=np.int64)] = 1
    return np.packbits(bits, bitorder="little").view("<i4")


class _Tally:
    """How often each id has come, in arrays that double as they fill."""

    def __init__(self, num_read: int) -> None:
        self._num_read = num_read
        """Tokens of the sequence that need no counting, or have had it."""
        self._slots: dict[int, int] = {}
        self._ids = np.empty(64, dtype=np.int64)
        self._counts = np.zeros(64)

    @property
    def ids(self) -> NDArray[np.int64]:
        return self._ids[: len(self._slots)]

    @property
    def counts(self) -> NDArray[np.float64]:
        return self._counts[: len(self._slots)]

    def catch_up(self, token_ids: Sequence[int]) -> None:
        self.add(token_ids[self._num_read :], 1)
        self._num_read = len(token_ids)

    def add(self, token_ids: Sequence[int], times: int) -> None:
        for token_id in token_ids:
            slot = self._slots.setdefault(token_id, len(self._slots))
            if slot == len(self._ids):
                self._ids = np.concatenate([self._ids, np.empty_like(self._ids)])
                self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
            self._ids[slot] = token_id
            self._counts[slot] += times


class _BadWords:
    """Banned sequences, found by the token that comes before their last."""

    def __init__(self, words: Sequence[tuple[int, ...]]) -> None:
        self._always = [word[0] for word in words if len(word) == 1]
        self._by_link: dict[int, list[tuple[list[int], int]]] = defaultdict(list)
        for *prefix, last in words:
            if prefix:
                self._by_link[prefix[-1]].append((prefix, last))

    def completing(self, token_ids: Sequence[int]) -> list[int]:
        longer = self._by_link.get(token_ids[-1], ())
        return self._always + [
            last for prefix, last in longer if list(token_ids[-len(prefix) :]) == prefix
        ]

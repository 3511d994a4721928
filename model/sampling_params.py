"""How the next token is to be chosen, per request. Plain data, no torch."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from model.errors import SamplingError

MAX_SEED = 2**63 - 1
MAX_LOGPROBS = 20
"""Likeliest tokens that may be asked for beside the chosen one; OpenAI's bound."""
_MAX_UINT32 = 2**32 - 1


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Sampling parameters of one completion.

    What changes the logits works in this order, each on what the one before has left:
    allowed_token_ids, bad_words, min_tokens (which forbid); logit_bias; repetition_penalty,
    frequency_penalty, presence_penalty; temperature, top_k, top_p, min_p, typical_p (which do
    nothing at temperature 0). Up to the penalties this is vLLM's order, and what transformers'
    `generate` has of it stands likewise there; from the temperature on it is transformers'
    (vLLM puts min_p before top_k).

    max_tokens:         new tokens at most; at least 1.
    min_tokens:         before that many new tokens no stop token can be chosen, unless nothing else
                        is left to choose.
    allowed_token_ids:  only these can be chosen; None allows all.
    bad_words:          sequences of ids that must not come to stand in the text: a token that would
                        complete one cannot be chosen. As in transformers, one may begin in the
                        prompt (in vLLM it may not).
    logit_bias:         (id, bias) pairs, each id once; the bias is added to the id's logit.
    repetition_penalty: the logits of tokens that the prompt or the completion holds are divided by
                        it where positive and multiplied where negative; 1 changes nothing.
    frequency_penalty:  is taken off a token's logit as often as the completion holds the token.
    presence_penalty:   is taken off the logits of all tokens that the completion holds.
    temperature:        0 is greedy; otherwise logits are divided by it.
    top_k:              keep the k likeliest tokens; 0 keeps all.
    top_p:              keep the likeliest tokens whose mass first reaches p; 1 keeps all.
    min_p:              keep the tokens at least this fraction as likely as the likeliest; 0: all.
    typical_p:          keep the tokens whose surprise is nearest to the entropy, until their mass
                        reaches p (locally typical sampling, 2202.00666); 1 keeps all.
    seed:               with `choice` and the position it alone decides every draw.
    choice:             index of the choice among those of one request; 0 is the plain request.
    stop_token_ids:     ids that end the completion; the last emitted id is then one of them.
    logprobs:           report each new token's log-probability and those of so many likeliest
                        tokens; None reports nothing. All are the model's own, before the above.
    prompt_logprobs:    the same of the prompt's tokens.
    """

    max_tokens: int = 16
    min_tokens: int = 0
    allowed_token_ids: tuple[int, ...] | None = None
    bad_words: tuple[tuple[int, ...], ...] = ()
    logit_bias: tuple[tuple[int, float], ...] = ()
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    seed: int = 0
    choice: int = 0
    stop_token_ids: tuple[int, ...] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise SamplingError(
                "max_tokens", f"max_tokens must be at least 1, not {self.max_tokens}"
            )
        if not 0 <= self.min_tokens <= self.max_tokens:
            raise SamplingError(
                "min_tokens",
                f"min_tokens must lie between 0 and max_tokens ({self.max_tokens}), "
                f"not {self.min_tokens}",
            )
        if not 0.01 <= self.repetition_penalty <= 100.0:
            raise SamplingError(
                "repetition_penalty",
                f"repetition_penalty {self.repetition_penalty} is not in [0.01, 100]",
            )
        for name in ("frequency_penalty", "presence_penalty"):
            if not -2.0 <= getattr(self, name) <= 2.0:
                raise SamplingError(name, f"{name} {getattr(self, name)} is not in [-2, 2]")
        if not 0.0 <= self.temperature <= 100.0:  # also refuses NaN
            raise SamplingError("temperature", f"temperature {self.temperature} is not in [0, 100]")
        if not 0 <= self.top_k <= _MAX_UINT32:
            raise SamplingError("top_k", f"top_k must be 0 (off) or more, not {self.top_k}")
        if not 0.0 < self.top_p <= 1.0:
            raise SamplingError("top_p", f"top_p must lie in (0, 1], not {self.top_p}")
        if not 0.0 <= self.min_p <= 1.0:
            raise SamplingError("min_p", f"min_p must lie in [0, 1], not {self.min_p}")
        if not 0.0 < self.typical_p <= 1.0:
            raise SamplingError("typical_p", f"typical_p must lie in (0, 1], not {self.typical_p}")
        if not -MAX_SEED - 1 <= self.seed <= MAX_SEED:
            raise SamplingError("seed", f"seed {self.seed} does not fit in 64 bits")
        if not 0 <= self.choice <= _MAX_UINT32:
            raise SamplingError("choice", f"choice must be 0 or more, not {self.choice}")
        for name in ("logprobs", "prompt_logprobs"):
            number = getattr(self, name)
            if number is not None and not 0 <= number <= MAX_LOGPROBS:
                raise SamplingError(name, f"{name} must lie in 0 to {MAX_LOGPROBS}, not {number}")
        self._check_ids()

    def _check_ids(self) -> None:
        """Refuse ids and lists of ids that no vocabulary has a use for."""
        if self.allowed_token_ids is not None and not self.allowed_token_ids:
            raise SamplingError("allowed_token_ids", "allowed_token_ids allows no token")
        if () in self.bad_words:
            raise SamplingError("bad_words", "bad_words holds an empty sequence")
        biases = dict(self.logit_bias)
        if len(biases) < len(self.logit_bias):
            raise SamplingError("logit_bias", "logit_bias names an id twice")
        for token_id, bias in biases.items():
            if not -100.0 <= bias <= 100.0:
                raise SamplingError(
                    "logit_bias",
                    f"logit_bias: {bias} of token {token_id} is not in [-100, 100]",
                )
        for name, token_ids in self._named_ids():
            if token_ids and min(token_ids) < 0:
                raise SamplingError(name, f"{name}: {min(token_ids)} is not a token id")

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raise SamplingError for an id that a vocabulary of this size does not have.

        stop_token_ids may name such ids: they are never chosen, and so stop nothing.
        """
        for name, token_ids in self._named_ids():
            if token_ids and max(token_ids) >= vocab_size:
                raise SamplingError(
                    name, f"{name}: {max(token_ids)} is out of vocabulary ({vocab_size} ids)"
                )

    def _named_ids(self) -> Iterator[tuple[str, Sequence[int]]]:
        """The ids that each field names."""
        yield "allowed_token_ids", self.allowed_token_ids or ()
        yield "bad_words", [token_id for word in self.bad_words for token_id in word]
        yield "logit_bias", [token_id for token_id, _ in self.logit_bias]

"""How the next token is to be chosen, per request. Plain data, no torch."""

from dataclasses import dataclass

from model.errors import SamplingError

MAX_SEED = 2**63 - 1
_MAX_UINT32 = 2**32 - 1


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Sampling parameters of one completion.

    The filters work in the order in which they stand here, each on what the one before has left;
    their meaning and order are those of transformers' `generate`.

    max_tokens:         new tokens at most; at least 1.
    min_tokens:         before that many new tokens no stop token can be chosen.
    repetition_penalty: the logits of tokens that the prompt or the completion holds are divided by
                        it where positive and multiplied where negative; 1 changes nothing.
    temperature:        0 is greedy; otherwise logits are divided by it.
    top_k:              keep the k likeliest tokens; 0 keeps all.
    top_p:              keep the likeliest tokens whose mass first reaches p; 1 keeps all.
    min_p:              keep the tokens at least this fraction as likely as the likeliest; 0: all.
    typical_p:          keep the tokens whose surprise is nearest to the entropy, until their mass
                        reaches p (locally typical sampling, 2202.00666); 1 keeps all.
    seed:               with `choice` and the position it alone decides every draw.
    choice:             index of the choice among those of one request; 0 is the plain request.
    stop_token_ids:     ids that end the completion; the last emitted id is then one of them.
    """

    max_tokens: int = 16
    min_tokens: int = 0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    seed: int = 0
    choice: int = 0
    stop_token_ids: tuple[int, ...] = ()

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

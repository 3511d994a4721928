"""From a request's fields to the parameters that a head draws by."""

import secrets
from typing import Any

from cluster.errors import RequestError
from cluster.schema import GenerationRequest
from model.errors import PromptError
from model.generation_defaults import GenerationDefaults
from model.sampling_params import SamplingParams
from model.tokenizer import Tokenizer

_WITH_DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
"""Fields that `generation_config.json` may have a default for."""


def sampling_params(
    body: GenerationRequest,
    tokenizer: Tokenizer,
    *,
    defaults: GenerationDefaults,
    eos_token_ids: tuple[int, ...],
    vocab_size: int,
    logprobs: int | None,
    prompt_logprobs: int | None,
) -> SamplingParams:
    """Those of choice 0; max_tokens is the caller's to set.

    defaults: what the checkpoint recommends for fields that the request leaves open.
    Raises RequestError and SamplingError.
    """
    asked = {name: _asked(body, name, defaults) for name in _WITH_DEFAULTS}
    asked["top_k"] = max(asked["top_k"], 0)
    for token_id in body.stop_token_ids:
        if token_id >= vocab_size:
            raise RequestError(
                400,
                f"stop_token_ids: {token_id} is out of vocabulary ({vocab_size} ids)",
                param="stop_token_ids",
            )
    own_ends = () if body.ignore_eos else eos_token_ids
    allowed = body.allowed_token_ids
    params = SamplingParams(
        # until the caller sets what room there is, and min_tokens is checked against that
        max_tokens=max(1, body.min_tokens),
        min_tokens=body.min_tokens,
        allowed_token_ids=None if allowed is None else tuple(sorted(set(allowed))),
        bad_words=tuple({ids: None for word in body.bad_words for ids in _ids_of(word, tokenizer)}),
        logit_bias=tuple(body.logit_bias.items()),
        presence_penalty=body.presence_penalty,
        frequency_penalty=body.frequency_penalty,
        typical_p=body.typical_p,
        seed=secrets.randbits(63) if body.seed is None else body.seed,
        stop_token_ids=tuple(dict.fromkeys((*own_ends, *body.stop_token_ids))),
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        **asked,
    )
    params.check_vocabulary(vocab_size)
    return params


def _asked(body: GenerationRequest, name: str, defaults: GenerationDefaults) -> Any:
    """A sampling field: the request's, else the checkpoint's default, else OpenAI's."""
    default = getattr(defaults, name)
    return getattr(body, name) if name in body.model_fields_set or default is None else default


def _ids_of(word: str, tokenizer: Tokenizer) -> list[tuple[int, ...]]:
    """A bad word's ids where a word begins and, if the tokenizer can say so, within one."""
    stripped = word.strip(" ")
    if not stripped:
        raise RequestError(400, f"bad_words: {word!r} is no word", param="bad_words")
    try:
        at_start = tuple(tokenizer.encode(stripped))
        behind_line_end = tokenizer.encode("\n" + stripped)
    except PromptError as error:
        raise RequestError(400, f"bad_words: {error}", param="bad_words") from error
    # SentencePiece begins every text with a space; behind a line's end there is none
    for first in range(len(behind_line_end)):
        within = tuple(behind_line_end[first:])
        if b"".join(map(tokenizer.token_bytes, within)) == stripped.encode():
            return [at_start, within]
    return [at_start]

"""One token for one sequence, by the definitions, one token of the vocabulary after the other.

The yardstick of the sampler's tests: plain lists, a full sort, loops. It imports nothing of what it
measures; floats are Python's, float64. Locally typical sampling is left to transformers.
"""

import math
from collections.abc import Collection, Sequence
from typing import Any


def shaped_logits(
    logits: Sequence[float],
    params: Any,
    token_ids: Sequence[int],
    num_prompt_tokens: int,
    mask: Collection[int] | None = None,
) -> list[float]:
    """Logits after everything that comes before the temperature.

    params: anything with SamplingParams' fields. mask: ids that a grammar allows.
    """
    completion = list(token_ids[num_prompt_tokens:])
    shaped = list(logits)
    for t in range(len(shaped)):
        if mask is not None and t not in mask:
            shaped[t] = -math.inf
        if params.allowed_token_ids is not None and t not in params.allowed_token_ids:
            shaped[t] = -math.inf
        if any(ends_with([*token_ids, t], word) for word in params.bad_words):
            shaped[t] = -math.inf
    if len(completion) < params.min_tokens:
        without_stops = [
            -math.inf if t in params.stop_token_ids else x for t, x in enumerate(shaped)
        ]
        if max(without_stops) > -math.inf or max(shaped) == -math.inf:
            shaped = without_stops
    for t, bias in params.logit_bias:
        shaped[t] += bias
    for t in range(len(shaped)):
        if t in token_ids and shaped[t] > 0:
            shaped[t] /= params.repetition_penalty
        elif t in token_ids:
            shaped[t] *= params.repetition_penalty
        shaped[t] -= params.frequency_penalty * completion.count(t)
        shaped[t] -= params.presence_penalty * (t in completion)
    return shaped


def ends_with(token_ids: Sequence[int], word: Sequence[int]) -> bool:
    return list(token_ids[-len(word) :]) == list(word)


def ranking(logits: Sequence[float]) -> list[int]:
    """Token ids, likeliest first; among equals the lower id."""
    return sorted(range(len(logits)), key=lambda t: (-logits[t], t))


def chosen(shaped: Sequence[float], params: Any, uniform: float) -> int | None:
    """The token that is chosen from shaped logits; None where all are forbidden."""
    order = ranking(shaped)
    best = shaped[order[0]]
    if best == -math.inf:
        return None
    if params.temperature == 0:
        return order[0]
    weights = {t: math.exp((shaped[t] - best) / params.temperature) for t in order}
    kept = order[: params.top_k or len(order)]
    mass = sum(weights[t] for t in kept)
    nucleus, before = [], 0.0
    for t in kept:
        if before < params.top_p * mass or not nucleus:
            nucleus.append(t)
        before += weights[t]
    last = [t for t in nucleus if weights[t] >= params.min_p and weights[t] > 0]
    target, reached = uniform * sum(weights[t] for t in last), 0.0
    for t in last:
        reached += weights[t]
        if reached > target:
            return t
    return last[-1]

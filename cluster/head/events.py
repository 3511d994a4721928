"""What an engine tells: news of requests, and how busy it is."""

from collections.abc import Sequence as Many
from dataclasses import dataclass
from typing import Protocol

from cluster.head.sequence import Finish
from model.sampling_params import TokenLogprobs

RequestKey = int
"""A request's number within its outbox."""


@dataclass(frozen=True)
class Event:
    """News of one request: new tokens, its end, or its failure.

    scores:     of a classified prompt, one for each label; it has ended.
    logprobs:   of token_ids, where they are asked for.
    prompt_logprobs: of the prompt from its second token on, with the first tokens.
    num_reused: with the first tokens, how many of the prompt's were not computed for this request.
    error:      the request failed and has ended; `is_refusal` says that it never could have worked.
    param:      of a refusal, the sampling parameter at fault, if it is one.
    """

    key: RequestKey
    token_ids: tuple[int, ...] = ()
    finish: Finish | None = None
    scores: tuple[float, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    num_reused: int | None = None
    error: str | None = None
    is_refusal: bool = False
    param: str | None = None


@dataclass(frozen=True)
class Load:
    """How busy an engine is.

    num_requests:     that it has taken and not ended.
    num_waiting:      of those, not admitted yet.
    num_free_tokens:  for which the KV cache has room, out of num_cache_tokens.
    """

    num_requests: int
    num_waiting: int
    num_free_tokens: int
    num_cache_tokens: int


class Outbox(Protocol):
    """Where the events of some requests go. Called from the engine's thread; must not block."""

    def put(self, events: Many[Event]) -> None: ...

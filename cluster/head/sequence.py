"""One request inside a head: what is known, what is computed, when it ends. Plain data."""

from collections.abc import Sequence as Ids
from dataclasses import dataclass, field
from typing import Literal

from cluster.head.drafts import LookupDrafter
from model.blocks import BlockTable, Key
from model.sampling_params import SamplingParams

Finish = Literal["stop", "length"]


@dataclass(eq=False)
class Sequence:
    """Token ids of one completion and how far its keys and values are computed.

        token_ids   |--- prompt ---|--- emitted ---|
                    |- num_computed -|- the next step's -|

    Owned by the engine's thread from `Engine.submit` on.
    """

    prompt_ids: Ids[int]
    params: SamplingParams
    client: str = ""
    """Who asks; clients share a head evenly."""
    priority: int = 0
    """Lower goes first among the requests of a client."""
    cache_salt: str = ""
    """Only requests with the same salt share computed prefixes."""

    drafter: LookupDrafter | None = None
    """Guesses its next tokens, where the request wants that."""

    token_ids: list[int] = field(init=False)
    num_computed: int = 0
    table: BlockTable = field(init=False, repr=False)
    """While it runs."""
    num_reused: int | None = None
    """Tokens of the prompt that were not computed when it began, since others had."""
    keys: list[Key] = field(default_factory=list, repr=False)
    """Of its full blocks; see `prefix.PrefixCache`, whose own the next two are as well."""
    num_published: int = 0
    has_published_prompt: bool = False
    rank: tuple[float, int] = (0.0, 0)
    """Where it stands among the requests of its client; see `waiting.WaitingQueue`."""

    def __post_init__(self) -> None:
        self.token_ids = list(self.prompt_ids)

    @property
    def max_len(self) -> int:
        """Tokens at most, prompt included."""
        return len(self.prompt_ids) + self.params.max_tokens

    @property
    def num_to_compute(self) -> int:
        return len(self.token_ids) - self.num_computed

    @property
    def num_emitted(self) -> int:
        return len(self.token_ids) - len(self.prompt_ids)

    def append(self, token_id: int) -> None:
        """One more token, which is known but not computed."""
        self.token_ids.append(token_id)

    @property
    def wants_prompt_logprobs(self) -> bool:
        return False

    @property
    def finish(self) -> Finish | None:
        """Why the sequence has ended, or None while it has not."""
        if self.num_emitted and self.token_ids[-1] in self.params.stop_token_ids:
            return "stop"
        return "length" if self.num_emitted >= self.params.max_tokens else None

"""One request inside a head: what is known, what is computed, when it ends. Plain data."""

from collections.abc import Sequence as Ids
from dataclasses import dataclass, field
from typing import Literal

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
    token_ids: list[int] = field(init=False)
    num_computed: int = 0
    blocks: list[int] = field(default_factory=list)

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
    def finish(self) -> Finish | None:
        """Why the sequence has ended, or None while it has not."""
        num_emitted = len(self.token_ids) - len(self.prompt_ids)
        if num_emitted and self.token_ids[-1] in self.params.stop_token_ids:
            return "stop"
        return "length" if num_emitted >= self.params.max_tokens else None

"""The ingress's record of one choice of a request: enough to tell its story, and to repeat it."""

from dataclasses import dataclass, field
from typing import Literal

from model.sampling_params import SamplingParams

Finish = Literal["stop", "length"]


@dataclass(eq=False)
class Journal:
    """Prompt ids, parameters with their seed, ids emitted so far. Owned by the event loop."""

    prompt_ids: tuple[int, ...]
    params: SamplingParams
    emitted_ids: list[int] = field(default_factory=list)
    finish: Finish | None = None

    def record(self, token_ids: tuple[int, ...], finish: Finish | None) -> None:
        """Append what a head has sent. Nothing may follow an end."""
        assert self.finish is None, f"tokens {token_ids} after the end ({self.finish})"
        self.emitted_ids += token_ids
        self.finish = finish

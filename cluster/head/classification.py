"""A prompt that is scored instead of continued. Plain data.

The scheduler and the KV cache treat it as any other sequence whose prompt is being computed.
"""

from collections.abc import Sequence as Ids
from dataclasses import dataclass, field

from cluster.head.sequence import Finish, Sequence
from model.sampling_params import SamplingParams


@dataclass(eq=False)
class Classification(Sequence):
    """A sequence that ends with the logits after its prompt, one for each label.

    No token is ever drawn: `token_ids` stays the prompt.
    """

    params: SamplingParams = field(init=False, default=SamplingParams())
    emitted_ids: Ids[int] = field(init=False, default=())
    scores: tuple[float, ...] | None = None

    @property
    def max_len(self) -> int:
        return len(self.prompt_ids)

    @property
    def finish(self) -> Finish | None:
        return None if self.scores is None else "stop"

"""One step of a head's engine, as facts."""

from collections.abc import Mapping
from dataclasses import dataclass

from model.phases import Phase

PARTS = (
    "attention",
    "routing",
    "packing",
    "transfer",
    "experts",
    "unpacking",
    "logits",
    "sampling",
    "host",
)
"""Of a step's time. host: scheduling, building tensors, publishing, and the decoder's inputs."""


@dataclass(frozen=True, kw_only=True)
class StepStats:
    """One step of a head's engine."""

    num_tokens: int
    """Tokens computed, prompt and new."""
    num_sequences: int
    num_micro_batches: int
    fill: float
    """How full it is: tokens or sequences, whichever is nearer to what a step may have."""
    num_emitted: int
    """New tokens."""
    num_reused: int
    """Tokens of prompts that were found in the cache."""
    num_preempted: int
    """Sequences that lost their blocks and must be computed again."""
    num_drafted: int
    """Tokens guessed ahead."""
    num_accepted: int
    """Of those, the ones that proved right."""
    num_waiting: int
    """Sequences that could not be admitted yet."""
    num_free_blocks: int
    num_blocks: int
    forward_s: float
    """Forward pass, waiting for experts included."""
    sampling_s: float
    host_s: float
    """Scheduling, tensor building and publishing."""
    phases: Mapping[Phase, float]
    """Seconds of the forward pass by phase; empty where nobody watches."""

    @property
    def parts(self) -> dict[str, float]:
        """Seconds by PARTS; they sum to the step's whole time."""
        parts: dict[str, float] = {p: s for p, s in self.phases.items() if p in PARTS}
        parts["host"] = self.forward_s + self.host_s - sum(parts.values())
        parts["sampling"] = self.sampling_s
        return {part: parts[part] for part in PARTS if part in parts}

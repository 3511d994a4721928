"""What heads, workers and ingresses tell of their load; scaling decides on nothing else."""

from collections.abc import Mapping
from dataclasses import dataclass

Expert = tuple[int, int]
"""(layer, expert id)."""


@dataclass(frozen=True, kw_only=True)
class HeadLoad:
    """How one head has fared since its last report. HeadReport is to carry it.

    From the engine's Load, and from StepStats over the steps of that time: where there was none,
    step_fill and times are 0.
    """

    name: str
    kv_fill: float
    """Part of its KV blocks that is taken: 1 - num_free_tokens / num_cache_tokens."""
    step_fill: float
    """How full its steps are: the mean of num_tokens / max_tokens_per_step or of num_sequences /
    max_running_sequences, whichever is larger."""
    wait_s: float
    """How long the sequence has waited that waits longest to be admitted, seconds."""
    num_open: int
    """Sequences that run or wait: Load.num_requests."""
    own_s: float
    """T_a: seconds of StepStats.parts that are neither experts nor transfer."""
    experts_s: float
    """T_e: seconds of parts["experts"]."""
    transfer_s: float
    """2 T_c: seconds of parts["transfer"]: both ways, and lying in a worker's queue."""
    is_draining: bool = False


@dataclass(frozen=True, kw_only=True)
class WorkerLoad:
    """How one expert worker has fared since its last report. WorkerReport is to carry it."""

    name: str
    utilisation: float
    """Part of the time in which it computed, from the seconds of observe_pass."""
    queue_s: float
    """Mean time that calls lay in the batcher before their computation began, seconds."""
    experts: Mapping[Expert, float]
    """Part of the time that each expert it holds was computed; they sum to utilisation."""
    expert_bytes: int
    """Of one expert as it holds it."""
    free_bytes: int | None
    """What it may hold besides; None: no bound is known."""
    is_draining: bool = False


@dataclass(frozen=True, kw_only=True)
class Signals:
    """Everything that a decision rests on."""

    heads: tuple[HeadLoad, ...]
    """Heads that are ready, those that drain included."""
    workers: tuple[WorkerLoad, ...]
    """Workers that have loaded what they hold, those that drain included."""
    num_pending: int = 0
    """Requests that ingresses hold since no head can take them."""

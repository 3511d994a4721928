"""The least time that a piece of work can take on a machine: whichever lasts longer, reading the
weights once or doing the operations. Pure.
"""

from dataclasses import dataclass

from model.config import MixtralConfig
from tests.bench.peers.engines.engine import WeightBytes


@dataclass(frozen=True)
class Limits:
    """What a machine can do at most."""

    bytes_per_s: float
    operations_per_s: float


@dataclass(frozen=True)
class Work:
    """What a step cannot do without. The KV cache and activations are left out: at these lengths
    they are below 2 % of the weights."""

    num_bytes: float
    num_operations: float

    def floor_s(self, limits: Limits) -> float:
        return max(
            self.num_bytes / limits.bytes_per_s, self.num_operations / limits.operations_per_s
        )

    def bound(self, limits: Limits) -> str:
        """Which limit is the nearer one."""
        reading_s = self.num_bytes / limits.bytes_per_s
        return "memory" if reading_s >= self.num_operations / limits.operations_per_s else "matrix"


def experts_touched(config: MixtralConfig, num_rows: int) -> float:
    """Expected number of a layer's experts that some row chooses, if all are equally likely."""
    missed = 1 - config.num_experts_per_tok / config.num_local_experts
    return config.num_local_experts * (1 - missed**num_rows)


def step_work(config: MixtralConfig, num_rows: int, num_logits: int, weights: WeightBytes) -> Work:
    """One pass of so many tokens, of which so many need logits."""
    kv_size = config.num_key_value_heads * config.head_dim
    q_size = config.num_attention_heads * config.head_dim
    attention = config.hidden_size * 2 * (q_size + kv_size)
    head = config.hidden_size * config.vocab_size
    expert = config.num_expert_parameters
    touched = experts_touched(config, num_rows)
    layer_bytes = attention * weights.attention + touched * expert * weights.expert
    per_row = config.num_hidden_layers * (attention + config.num_experts_per_tok * expert)
    return Work(
        num_bytes=config.num_hidden_layers * layer_bytes + head * weights.head,
        num_operations=2.0 * (num_rows * per_row + num_logits * head),
    )


def share_of_limit(
    config: MixtralConfig,
    phase: str,
    size: int,
    tokens_per_s: float,
    weights: WeightBytes,
    limits: Limits,
) -> float:
    """Least time of a decode step of `size` sequences, or of a prompt of `size` tokens, over the
    time that it took: 1 is as fast as the machine."""
    work = step_work(config, size, size if phase == "decode" else 1, weights)
    return work.floor_s(limits) * tokens_per_s / size

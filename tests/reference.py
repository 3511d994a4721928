"""transformers' Mixtral as a yardstick: random ones of any shape, and ours of the same weights."""

from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st

from model import Mixtral
from model.decoder import Decoder
from model.experts import LocalExperts
from model.weights import Checkpoint
from tests.fakes import small_config


@st.composite
def configs(draw: st.DrawFn) -> dict[str, Any]:
    """Shapes that one Mixtral or another could have."""
    num_kv_heads = draw(st.integers(1, 2))
    num_experts = draw(st.integers(2, 8))
    return small_config(
        hidden_size=draw(st.sampled_from([8, 20])),
        intermediate_size=draw(st.integers(1, 12)),
        num_hidden_layers=draw(st.integers(1, 3)),
        num_attention_heads=num_kv_heads * draw(st.sampled_from([1, 2, 3, 4, 8])),
        num_key_value_heads=num_kv_heads,
        head_dim=draw(st.sampled_from([2, 4, 6])),
        num_local_experts=num_experts,
        num_experts_per_tok=draw(st.integers(1, min(4, num_experts))),
        sliding_window=draw(st.sampled_from([None, 1, 3, 7, 100])),
        rope_theta=draw(st.sampled_from([100.0, 10_000.0, 1e6])),
        tie_word_embeddings=draw(st.booleans()),
        router_aux_loss_coef=draw(st.sampled_from([0.0, 0.02, 1.0])),
        max_position_embeddings=256,
    )


def save_reference(folder: Path, config: dict[str, Any], *, seed: int = 0, kind: str = "") -> Any:
    """A random Mixtral of transformers', float32, saved there. kind: its class; causal by default.

    Weights are scaled so that activations stay near 1.
    """
    import transformers

    fields = {name: value for name, value in config.items() if name != "model_type"}
    fields["rope_parameters"] = {"rope_type": "default", "rope_theta": fields.pop("rope_theta")}
    del fields["torch_dtype"]
    settings = transformers.MixtralConfig(**fields)
    reference = getattr(transformers, kind or "MixtralForCausalLM")(settings).float().eval()
    reference.set_experts_implementation("eager")  # the others want sizes of 16 bytes
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in reference.parameters():
            values = torch.randn(parameter.shape, generator=generator)
            is_norm = parameter.dim() == 1
            parameter.copy_(1 + 0.2 * values if is_norm else values * parameter.shape[-1] ** -0.5)
    reference.save_pretrained(folder)
    return reference


def load_ours(folder: Path, like: Mixtral) -> Mixtral:
    """That checkpoint as ours; for token ids only, as the tokenizer is another's."""
    checkpoint = Checkpoint(folder)
    config = checkpoint.config
    return Mixtral(
        Decoder(config, checkpoint.load_decoder()),
        LocalExperts(checkpoint.load_experts(config.expert_units)),
        like.tokenizer,
        like.chat,
    )


def pad_left(sequences: list[list[int]], pad_id: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask of a padded batch."""
    longest = max(len(ids) for ids in sequences)
    rows = [[pad_id] * (longest - len(ids)) + ids for ids in sequences]
    masks = [[0] * (longest - len(ids)) + [1] * len(ids) for ids in sequences]
    return torch.tensor(rows), torch.tensor(masks)

"""What shape a Mixtral has: `config.json` as a frozen dataclass. No torch, no weights.

Field names are Hugging Face's, so that a checkpoint's own file reads like this one.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model.errors import ConfigError

DTYPES = ("float32", "bfloat16", "float16")
"""Names of the floating types a model may be loaded in, as torch spells them."""

_SAME_NAME = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "num_experts_per_tok",
    "max_position_embeddings",
    "rms_norm_eps",
    "sliding_window",
    "tie_word_embeddings",
    "bos_token_id",
)
"""Fields that every version of transformers spells as we do."""


_COUNTS = (
    "hidden_size",
    "vocab_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "num_local_experts",
    "num_experts_per_tok",
    "max_position_embeddings",
    "sliding_window",
)


@dataclass(frozen=True, kw_only=True)
class MixtralConfig:
    """Sizes and constants of one Mixtral. Defaults are Mixtral-8x7B's."""

    vocab_size: int = 32_000
    hidden_size: int = 4_096
    intermediate_size: int = 14_336
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    head_dim: int = 128
    num_local_experts: int = 8
    num_experts_per_tok: int = 2
    max_position_embeddings: int = 131_072
    rope_theta: float = 1e6
    rms_norm_eps: float = 1e-5
    sliding_window: int | None = None
    tie_word_embeddings: bool = False
    bos_token_id: int = 1
    eos_token_ids: tuple[int, ...] = (2,)
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        for name in _COUNTS:
            value = getattr(self, name)
            if name == "sliding_window" and value is None:
                continue
            if type(value) is not int or value < 1:
                raise ConfigError(f"{name} must be a whole number of at least 1, not {value!r}")
        for name in ("rope_theta", "rms_norm_eps"):
            value = getattr(self, name)
            if type(value) not in (int, float) or not 0 < value < math.inf:
                raise ConfigError(f"{name} must be a number above 0, not {value!r}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of "
                f"num_key_value_heads ({self.num_key_value_heads})"
            )
        if not 1 <= self.num_experts_per_tok <= self.num_local_experts:
            raise ConfigError(
                f"num_experts_per_tok ({self.num_experts_per_tok}) must lie between 1 and "
                f"num_local_experts ({self.num_local_experts})"
            )
        if self.head_dim % 2:
            raise ConfigError(f"head_dim ({self.head_dim}) must be even: RoPE rotates pairs")
        if self.dtype not in DTYPES:
            raise ConfigError(f"dtype {self.dtype!r} is not one of {', '.join(DTYPES)}")

    @property
    def num_queries_per_kv(self) -> int:
        """How many query heads share one key/value head."""
        return self.num_attention_heads // self.num_key_value_heads

    @property
    def num_expert_parameters(self) -> int:
        """Parameters of one (layer, expert): w1, w2 and w3."""
        return 3 * self.hidden_size * self.intermediate_size

    def kv_bytes_per_token(self, bytes_per_element: int) -> int:
        """Bytes of KV cache that one token takes over all layers."""
        per_layer = 2 * self.num_key_value_heads * self.head_dim * bytes_per_element
        return self.num_hidden_layers * per_layer

    @classmethod
    def from_folder(cls, folder: Path) -> "MixtralConfig":
        """Read `config.json`; end tokens also from `generation_config.json` where it has them.

        Raises ConfigError when the file is missing, is not JSON or is not a Mixtral's.
        """
        config = _read_json(folder / "config.json")
        generation_file = folder / "generation_config.json"
        if generation_file.exists():
            eos = _read_json(generation_file).get("eos_token_id")
            if eos is not None:
                config = {**config, "eos_token_id": eos}
        return cls.from_dict(config)

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> "MixtralConfig":
        """Build from the content of `config.json`, in transformers' old or new spelling.

        Keys that do not change what a forward pass computes are ignored.
        Raises ConfigError naming the field that cannot be served.
        """
        _refuse_what_is_not_supported(config)
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        fields = {
            "head_dim": config.get("head_dim"),
            "num_local_experts": config.get("num_local_experts", config.get("num_experts")),
            "rope_theta": rope.get("rope_theta", config.get("rope_theta")),
            "dtype": config.get("dtype", config.get("torch_dtype")),
        }
        for name in _SAME_NAME:
            fields[name] = config.get(name)
        eos = config.get("eos_token_id")
        if eos is not None:
            fields["eos_token_ids"] = tuple(eos) if isinstance(eos, list) else (eos,)
        given = {name: value for name, value in fields.items() if value is not None}
        if "head_dim" not in given:
            hidden = given.get("hidden_size", cls.hidden_size)
            heads = given.get("num_attention_heads", cls.num_attention_heads)
            # what cannot be divided is refused by its own name below
            if type(hidden) is int and type(heads) is int and heads > 0:
                given["head_dim"] = hidden // heads
        return cls(**given)


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"{file} does not exist; is {file.parent} a checkpoint?") from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{file} holds a {type(content).__name__}, not a JSON object")
    return content


def _refuse_what_is_not_supported(config: dict[str, Any]) -> None:
    model_type = config.get("model_type")
    if model_type != "mixtral":
        raise ConfigError(f"model_type is {model_type!r}; only 'mixtral' can be served")
    activation = config.get("hidden_act", "silu")
    if activation != "silu":
        raise ConfigError(f"hidden_act is {activation!r}; only 'silu' is supported")
    if config.get("quantization_config"):
        raise ConfigError("quantization_config: AWQ, GPTQ and fp8 checkpoints are not supported")
    for field in ("rope_parameters", "rope_scaling"):
        if not isinstance(config.get(field) or {}, dict):
            raise ConfigError(f"{field} is not a JSON object: {config[field]!r}")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type != "default":
        raise ConfigError(f"rope type {rope_type!r} is not supported; only 'default' is")

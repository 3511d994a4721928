"""What shape a Mixtral has: `config.json` or Mistral's `params.json`. No torch, no weights.

Field names are Hugging Face's, so that a checkpoint's own file reads like this one.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model.errors import ConfigError
from model.labels import PROBLEM_TYPES, read_labels
from model.units import Unit

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
    "pad_token_id",
    "router_aux_loss_coef",
    "problem_type",
)
"""Fields that every version of transformers spells as we do."""

_MISTRALS_NAMES = {
    "vocab_size": "vocab_size",
    "hidden_size": "dim",
    "intermediate_size": "hidden_dim",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "num_key_value_heads": "n_kv_heads",
    "head_dim": "head_dim",
    "rms_norm_eps": "norm_eps",
}
"""Our fields by their names in `params.json`, which must have them all."""

_MISTRALS_UNSUPPORTED = (
    "quantization",
    "vision_encoder",
    "yarn",
    "rope_scaling",
    "llama_4_scaling",
    "lora",
    "q_lora_rank",
    "kv_lora_rank",
    "use_biases",
)
"""Fields of `params.json`, of other models than Mixtral, that change what is computed."""

_MAX_EXPERTS = 100_000
"""Of all layers; Mixtral-8x22B has 448. A damaged file must not fill memory with names."""

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
    pad_token_id: int | None = None
    router_aux_loss_coef: float = 0.001
    dtype: str = "bfloat16"
    labels: tuple[str, ...] | None = None
    """Of a sequence classifier, in the order of their ids; None for a model that generates."""
    problem_type: str | None = None
    """What a classifier was trained for, if its file says so: one of labels.PROBLEM_TYPES."""

    def __post_init__(self) -> None:
        for name in _COUNTS:
            value = getattr(self, name)
            if name == "sliding_window" and value is None:
                continue
            if type(value) is not int or value < 1:
                raise ConfigError(f"{name} must be a whole number of at least 1, not {value!r}")
        if self.num_hidden_layers * self.num_local_experts > _MAX_EXPERTS:
            raise ConfigError(
                f"num_hidden_layers ({self.num_hidden_layers}) times num_local_experts "
                f"({self.num_local_experts}) is more than {_MAX_EXPERTS}"
            )
        for name in ("rope_theta", "rms_norm_eps"):
            value = getattr(self, name)
            if type(value) not in (int, float) or not 0 < value < math.inf:
                raise ConfigError(f"{name} must be a number above 0, not {value!r}")
        coefficient = self.router_aux_loss_coef
        if type(coefficient) not in (int, float) or not 0 <= coefficient < math.inf:
            raise ConfigError(f"router_aux_loss_coef must be 0 or more, not {coefficient!r}")
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
        if type(self.tie_word_embeddings) is not bool:
            raise ConfigError(
                f"tie_word_embeddings must be true or false, not {self.tie_word_embeddings!r}"
            )
        for name, ids in (
            ("bos_token_id", (self.bos_token_id,)),
            ("eos_token_id", self.eos_token_ids),
        ):
            if not ids or any(type(token_id) is not int or token_id < 0 for token_id in ids):
                raise ConfigError(f"{name} must be token ids, not {ids!r}")
        pad = self.pad_token_id
        if pad is not None and (type(pad) is not int or pad < -1):  # -1 is some files' none
            raise ConfigError(f"pad_token_id must be a token id or null, not {pad!r}")
        if self.problem_type not in (None, *PROBLEM_TYPES):
            raise ConfigError(
                f"problem_type {self.problem_type!r} is not one of {', '.join(PROBLEM_TYPES)}"
            )
        if self.head_dim % 2:
            raise ConfigError(f"head_dim ({self.head_dim}) must be even: RoPE rotates pairs")
        if self.dtype not in DTYPES:
            raise ConfigError(f"dtype {self.dtype!r} is not one of {', '.join(DTYPES)}")

    @property
    def num_expert_parameters(self) -> int:
        """Parameters of one (layer, expert): w1, w2 and w3."""
        return 3 * self.hidden_size * self.intermediate_size

    @property
    def expert_units(self) -> list[Unit]:
        """All experts, whole."""
        layers, experts = range(self.num_hidden_layers), range(self.num_local_experts)
        return [Unit(layer, expert_id) for layer in layers for expert_id in experts]

    def kv_bytes_per_token(self, bytes_per_element: int) -> int:
        """Bytes of KV cache that one token takes over all layers."""
        per_layer = 2 * self.num_key_value_heads * self.head_dim * bytes_per_element
        return self.num_hidden_layers * per_layer

    @classmethod
    def from_folder(cls, folder: Path) -> "MixtralConfig":
        """Read `config.json`, or Mistral's `params.json` where there is none.

        End tokens are `generation_config.json`'s where it has them.
        Raises ConfigError naming the file that is missing or is not JSON, or what it asks for.
        """
        params_file = folder / "params.json"
        is_mistrals = params_file.is_file() and not (folder / "config.json").exists()
        content = read_json(params_file if is_mistrals else folder / "config.json")
        generation_file = folder / "generation_config.json"
        if generation_file.exists():
            eos = read_json(generation_file).get("eos_token_id")
            if eos is not None:
                content = {**content, "eos_token_id": eos}
        return cls.from_params(content) if is_mistrals else cls.from_dict(content)

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
            "num_local_experts": _agreed(config, "num_local_experts", "num_experts"),
            "rope_theta": _agreed(
                config | {"rope_parameters.rope_theta": rope.get("rope_theta")},
                "rope_parameters.rope_theta",
                "rope_theta",
            ),
            "dtype": _agreed(config, "dtype", "torch_dtype"),
            "eos_token_ids": _end_tokens(config),
            "labels": read_labels(config),
        }
        for name in _SAME_NAME:
            fields[name] = config.get(name)
        if "num_key_value_heads" in config and config["num_key_value_heads"] is None:
            # null is transformers' word for attention without groups
            fields["num_key_value_heads"] = config.get(
                "num_attention_heads", cls.num_attention_heads
            )
        given = {name: value for name, value in fields.items() if value is not None}
        if "head_dim" not in given:
            hidden = given.get("hidden_size", cls.hidden_size)
            heads = given.get("num_attention_heads", cls.num_attention_heads)
            # what cannot be divided is refused by its own name below
            if type(hidden) is int and type(heads) is int and heads > 0:
                given["head_dim"] = hidden // heads
        return cls(**given)

    @classmethod
    def from_params(cls, params: dict[str, Any]) -> "MixtralConfig":
        """Build from the content of `params.json`, the file of Mistral's own releases.

        It names no dtype (bfloat16 is what was released), and not always rope_theta and the context
        length (1e6 and 32768 are Mixtral-8x7B's). Raises ConfigError naming the field.
        """
        for name in _MISTRALS_UNSUPPORTED:
            if params.get(name):
                raise ConfigError(f"params.json: {name} is not supported")
        moe = params.get("moe")
        if not isinstance(moe, dict):
            raise ConfigError(
                f"params.json: moe is {moe!r}; only mixtures of experts can be served"
            )
        unknown = moe.keys() - {"num_experts", "num_experts_per_tok"}
        if unknown:
            raise ConfigError(f"params.json: moe.{min(unknown)} is not supported")
        fields: dict[str, Any] = {
            name: params.get(mistrals_name) for name, mistrals_name in _MISTRALS_NAMES.items()
        }
        fields["num_local_experts"] = moe.get("num_experts")
        fields["num_experts_per_tok"] = moe.get("num_experts_per_tok")
        for name, value in fields.items():
            if value is None:
                mistrals_name = _MISTRALS_NAMES.get(name, f"moe.{name}")
                raise ConfigError(f"params.json: {mistrals_name} is missing ({name})")
        window = params.get("sliding_window")
        return cls(
            **fields,
            rope_theta=params.get("rope_theta") or 1e6,
            max_position_embeddings=params.get("max_seq_len") or 32_768,
            # one release wrote the number as text
            sliding_window=int(window) if type(window) is str and window.isdecimal() else window,
            tie_word_embeddings=params.get("tied_embeddings") or False,
            eos_token_ids=_end_tokens(params) or (2,),
        )


def read_json(file: Path) -> dict[str, Any]:
    """The object that a file of a checkpoint holds. Raises ConfigError naming the file."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"{file} does not exist; is {file.parent} a checkpoint?") from error
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{file} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{file} holds a {type(content).__name__}, not a JSON object")
    return content


def _agreed(config: dict[str, Any], name: str, other_name: str) -> Any:
    """The value of a field with two spellings. Raises ConfigError when they differ."""
    value, other = config.get(name), config.get(other_name)
    if value is not None and other is not None and value != other:
        raise ConfigError(f"{name} is {value!r}, but {other_name} is {other!r}")
    return other if value is None else value


def _end_tokens(config: dict[str, Any]) -> tuple[int, ...] | None:
    eos = config.get("eos_token_id")
    if eos is None:
        return None
    return tuple(eos) if isinstance(eos, list) else (eos,)


def _refuse_what_is_not_supported(config: dict[str, Any]) -> None:
    model_type = config.get("model_type")
    if model_type != "mixtral":
        raise ConfigError(f"model_type is {model_type!r}; only 'mixtral' can be served")
    activation = config.get("hidden_act") or "silu"
    if activation != "silu":
        raise ConfigError(f"hidden_act is {activation!r}; only 'silu' is supported")
    if config.get("quantization_config"):
        raise ConfigError("quantization_config: AWQ, GPTQ and fp8 checkpoints are not supported")
    for field in ("rope_parameters", "rope_scaling"):
        rope = config.get(field) or {}
        if not isinstance(rope, dict):
            raise ConfigError(f"{field} is not a JSON object: {rope!r}")
        rope_type = rope.get("rope_type", rope.get("type")) or "default"
        if rope_type != "default":
            raise ConfigError(f"{field}: rope type {rope_type!r} is not supported, only 'default'")
        factor = rope.get("partial_rotary_factor")
        if factor not in (None, 1):
            raise ConfigError(f"{field}: partial_rotary_factor {factor!r} is not supported, only 1")

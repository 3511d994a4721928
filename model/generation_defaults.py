"""How a checkpoint's makers would have it sampled: `generation_config.json`. No torch."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model.config import read_json
from model.errors import ConfigError

_GENERATION_FIELDS: dict[str, tuple[str, float, float]] = {
    "temperature": ("temperature", 0.0, 100.0),
    "top_p": ("top_p", 1e-6, 1.0),
    "top_k": ("top_k", 0, 2**32 - 1),
    "min_p": ("min_p", 0.0, 1.0),
    "repetition_penalty": ("repetition_penalty", 0.01, 100.0),
    "max_tokens": ("max_new_tokens", 1, 2**32 - 1),
}
"""SamplingParams' names, with `generation_config.json`'s and the least and greatest value."""


@dataclass(frozen=True, kw_only=True)
class GenerationDefaults:
    """How a checkpoint's makers would have it sampled; None where they do not say."""

    temperature: float | None = None
    """0 for greedy."""
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    max_tokens: int | None = None

    @classmethod
    def from_folder(cls, folder: Path) -> "GenerationDefaults":
        """Read `generation_config.json`; nothing is said where there is no such file.

        Raises ConfigError naming the field that is not a number in its range.
        """
        file = folder / "generation_config.json"
        if not file.exists():
            return cls()
        content = read_json(file)
        fields: dict[str, Any] = {}
        for name, (theirs, low, high) in _GENERATION_FIELDS.items():
            value = content.get(theirs)
            if value is None:
                continue
            kinds = (int,) if isinstance(low, int) else (int, float)
            if type(value) not in kinds or not low <= value <= high:
                raise ConfigError(f"{file}: {theirs} is {value!r}, not between {low} and {high}")
            fields[name] = value
        if content.get("do_sample") is False:
            fields["temperature"] = 0.0
        return cls(**fields)

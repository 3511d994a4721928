"""Mixtral's maths as a library: no network, no Ray, no service.

Importing this package, or its submodules `config`, `tokenizer`, `chat`, `sampling_params`,
`grammar` and `errors`, does not import torch, so that a process which only handles text stays
small.

    from model import Mixtral
    print(Mixtral.load().generate("Once upon a time", max_tokens=60))
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from model.generate import Mixtral as Mixtral

__all__ = ["TINY", "Mixtral"]

TINY = Path(__file__).parent / "tiny"
"""Folder of the embedded checkpoint, the default wherever a model is asked for."""


def __getattr__(name: str) -> Any:
    if name == "Mixtral":
        from model.generate import Mixtral

        return Mixtral
    raise AttributeError(f"module 'model' has no attribute {name!r}")

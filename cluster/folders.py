"""Where a model's folder is on this node, and whether others may have it where this one has not."""

from pathlib import Path
from typing import TypeGuard

from model import TINY
from model.hub import is_hub_id, resolve


def checkpoint_folder(model: Path | None) -> Path:
    """The folder to load from, on this node. Raises CheckpointError when there is no such model."""
    return TINY if model is None else resolve(model).absolute()


def can_be_lent(model: Path | None) -> TypeGuard[Path]:
    """Whether it is named by a path, which some nodes may lack and others have."""
    return model is not None and not is_hub_id(model)


def lacks_folder(model: Path | None) -> TypeGuard[Path]:
    """Whether this node has no folder of this path, and others may."""
    return can_be_lent(model) and not model.expanduser().is_dir()


def checkpoint_path(model: Path | None) -> Path:
    """Where a model's folder is on this node, or would be. Raises CheckpointError."""
    return model.expanduser().absolute() if lacks_folder(model) else checkpoint_folder(model)

"""Where weight files are read from: a folder of this machine, or one that is read in another way.

No torch; what is in the files is `tensor_files`' business.
"""

from dataclasses import dataclass
from io import FileIO, RawIOBase
from pathlib import Path
from typing import Protocol


class WeightFolder(Protocol):
    """The files of a checkpoint, wherever they are. Not thread-safe."""

    @property
    def path(self) -> Path:
        """Where they are, for messages."""

    def names(self) -> list[str]:
        """Of all files that there are. Raises OSError."""

    def open(self, name: str) -> RawIOBase:
        """A file for reading, with seek and readinto. Raises OSError, here or when it is read."""


@dataclass(frozen=True)
class LocalFolder:
    """A folder that this machine can open by its path."""

    path: Path

    def names(self) -> list[str]:
        return [path.name for path in self.path.iterdir() if path.is_file()]

    def open(self, name: str) -> RawIOBase:
        return FileIO(self.path / name)

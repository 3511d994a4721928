"""What was read of every expert when a checkpoint was loaded first; every later load must match.

Digests are of the bytes as stored, before conversion and quantisation: so they are the same on
every host and for workers that hold their experts in different forms. The controller alone writes
the file; workers tell it what they have read, and are told what to expect.
"""

import hashlib
import json
import logging
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from cluster.errors import ManifestError
from model.units import Unit

logger = logging.getLogger(__name__)

FILE = "maestrale-manifest.json"

CACHE = Path("~/.cache/maestrale/manifests")
"""For manifests of checkpoints whose folder cannot be written."""

_FORMAT = "sha256 of the stored bytes, 1"


class Manifest:
    """The digests of one checkpoint, in memory and on disk."""

    def __init__(self, path: Path) -> None:
        """Read what there is. Raises ManifestError for a file that is none."""
        self.path = path
        self._digests: dict[str, str] = {}
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["format"] != _FORMAT:
                raise ValueError(f"format {content['format']!r}, not {_FORMAT!r}")
            self._digests = {str(key): str(digest) for key, digest in content["digests"].items()}
        except FileNotFoundError:
            return
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ManifestError(f"{path} is no manifest: {error}; delete it") from error

    @classmethod
    def of(cls, folder: Path, cache: Path) -> "Manifest":
        """Beside the checkpoint, or in `cache` where its folder cannot be written."""
        beside = folder / FILE
        if beside.exists() or os.access(folder, os.W_OK):
            return cls(beside)
        name = hashlib.sha256(str(folder).encode()).hexdigest()[:16]
        return cls(cache / f"{folder.name}-{name}.json")

    def expected(self, units: Iterable[Unit], mode: str | None) -> dict[Unit, str]:
        """The digests of those units that are known. mode: in which their worker holds experts."""
        keys = {unit: _key(unit, mode) for unit in units}
        return {unit: self._digests[key] for unit, key in keys.items() if key in self._digests}

    def sound(self, held: Mapping[Unit, str], mode: str | None) -> dict[Unit, str]:
        """Those units whose digest is right. What is not known yet is right, and noted down."""
        fresh = {
            key: digest
            for unit, digest in held.items()
            if (key := _key(unit, mode)) not in self._digests
        }
        if fresh:
            self._digests |= fresh
            self._write()
        expected = self.expected(held, mode)
        return {unit: digest for unit, digest in held.items() if digest == expected[unit]}

    def _write(self) -> None:
        content = {"format": _FORMAT, "digests": dict(sorted(self._digests.items()))}
        temporary = self.path.with_name(f"{self.path.name}.{os.getpid()}")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
            temporary.replace(self.path)
        except OSError as error:
            # Digests in memory still hold for as long as this controller lives.
            logger.warning("%s cannot be written: %s", self.path, error)


def _key(unit: Unit, mode: str | None) -> str:
    """Of a slice that is quantised more is read than of one that is not."""
    if unit.num_slices == 1:
        return f"{unit.layer}.{unit.expert_id}"
    part = f"{unit.slice_number}/{unit.num_slices}"
    return f"{unit.layer}.{unit.expert_id} {part} {mode or 'dense'}"

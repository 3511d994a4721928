"""Loads and drops what a worker is to hold, one unit after the other. No network, no Ray."""

import logging
import threading
import time
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from pathlib import Path

from cluster.errors import ManifestError
from cluster.manifest import CACHE, FILE
from model.experts import ExpertWeights, checksum
from model.units import Unit

logger = logging.getLogger(__name__)

Load = Callable[[Unit], tuple[ExpertWeights, str]]
"""Reads a unit; returns it with the digest of what was read."""


FilesOf = Callable[[Unit], Sequence[Path]]
"""Where a unit is read from."""


class Loader:
    """Keeps `held` at what was last asked for. Thread-safe; a thread of its own loads.

    A unit comes into `held` whole and checked, and so is never seen half loaded.
    """

    def __init__(
        self, load: Load, held: MutableMapping[Unit, ExpertWeights], files_of: FilesOf
    ) -> None:
        """held: what calls are answered from. files_of: for messages."""
        self._load = load
        self._held = held
        self._files_of = files_of
        self._digests: dict[Unit, str] = {}
        self._checksums: dict[Unit, int] = {}
        """Of the units as they are held, to find out what happens to them in memory."""
        self._wanted: Sequence[Unit] = ()
        self._expected: Mapping[Unit, str] = {}
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self.error: str | None = None
        """Why loading has stopped; None again once told what to hold."""

    @property
    def digests(self) -> dict[Unit, str]:
        """Of every unit that is held."""
        with self._lock:
            return self._digests.copy()

    @property
    def num_bytes(self) -> int:
        """Of every unit that is held."""
        with self._lock:
            return sum(weights.num_bytes for weights in self._held.values())

    def hold(self, units: Sequence[Unit], expected: Mapping[Unit, str]) -> None:
        """Hold exactly these units: drop others now, load what is missing in this order.

        expected: digests where they are known. A unit with another is dropped and loaded again; if
        it still has another, `error` says so. Returns at once.
        """
        with self._lock:
            self._wanted, self._expected, self.error = units, expected, None
            wanted = set(units)
            for unit, digest in list(self._digests.items()):
                if unit not in wanted or expected.get(unit, digest) != digest:
                    self._drop(unit)
            self._load_on()

    def drop_if_damaged(self, unit: Unit) -> bool:
        """Drop a unit and load it again if it is no longer what was loaded; says whether it was."""
        with self._lock:
            weights, as_loaded = self._held.get(unit), self._checksums.get(unit)
        if weights is None or checksum(weights) == as_loaded:
            return False
        with self._lock:
            if self._held.get(unit) is weights:
                self._drop(unit)
                self._load_on()
        return True

    def _drop(self, unit: Unit) -> None:
        del self._held[unit], self._digests[unit], self._checksums[unit]

    def _load_on(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="loader", daemon=True)
            self._thread.start()

    def _run(self) -> None:
        started = time.perf_counter()
        num_loaded = 0
        while (unit := self._next()) is not None:
            try:
                weights, digest = self._load(unit)
                self._take(unit, weights, digest, checksum(weights))
            except Exception as error:
                logger.exception("loading %s failed", unit)
                with self._lock:
                    if unit not in self._wanted:
                        continue
                    # The loader's last word: the controller reads it from the next report.
                    self.error = f"{type(error).__name__}: {error}"
                    self._thread = None
                return
            num_loaded += 1
        logger.info("loaded %d units in %.1f s", num_loaded, time.perf_counter() - started)

    def _next(self) -> Unit | None:
        """The first that is wanted and not held; without one the thread ends."""
        with self._lock:
            missing = (unit for unit in self._wanted if unit not in self._held)
            unit = next(missing, None)
            if unit is None:
                self._thread = None
            return unit

    def _take(self, unit: Unit, weights: ExpertWeights, digest: str, as_held: int) -> None:
        with self._lock:
            expected = self._expected.get(unit, digest)
            if digest != expected:
                raise ManifestError(
                    f"{unit}, read from {', '.join(map(str, self._files_of(unit)))}, has the "
                    f"digest {digest[:16]}, the manifest says {expected[:16]}: the file is damaged "
                    f"or was replaced since the first load; restore it, or, if the checkpoint is "
                    f"meant to be another, stop the service, delete the manifest ({FILE} beside "
                    f"it, or the one in {CACHE} of the controller's host) and start again"
                )
            if unit in self._wanted:
                self._digests[unit], self._checksums[unit] = digest, as_held
                self._held[unit] = weights

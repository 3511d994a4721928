"""Loads and drops what a worker is to hold, one unit after the other. No network, no Ray."""

import logging
import threading
import time
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from pathlib import Path

from cluster.errors import ManifestError
from cluster.manifest import CACHE, FILE
from model.experts import ExpertWeights, checksum
from model.progress import Progress
from model.units import Unit

logger = logging.getLogger(__name__)

LOG_EVERY_S = 10.0
"""Between lines of how far a load has come."""

Load = Callable[[Unit, Callable[[int], None]], tuple[ExpertWeights, str]]
"""Reads a unit, and tells bytes as they arrive; returns it with the digest of what was read."""

FilesOf = Callable[[Unit], Sequence[Path]]
"""Where a unit is read from."""

OnProgress = Callable[[int, int], None]
"""Called with how many bytes have arrived since the last call, and how many are left."""


class Loader:
    """Keeps `held` at what was last asked for. Thread-safe; a thread of its own loads.

    A unit comes into `held` whole and checked, and so is never seen half loaded.
    """

    def __init__(
        self,
        load: Load,
        held: MutableMapping[Unit, ExpertWeights],
        files_of: FilesOf,
        bytes_of: Callable[[Unit], int],
        on_progress: OnProgress = lambda num_bytes, left_bytes: None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """held: what calls are answered from. files_of: for messages. bytes_of: once loaded."""
        self._load = load
        self._held = held
        self._files_of = files_of
        self._bytes_of = bytes_of
        self._on_progress = on_progress
        self._clock = clock
        self._started_at = self._logged_at = 0.0
        self._finished_bytes = self._arrived_bytes = 0
        """Of the units that this load has finished, and of the one that is being read."""
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

    @property
    def progress(self) -> Progress | None:
        """Of the load that goes on; None when there is none."""
        with self._lock:
            if self._thread is None:
                return None
            missing = sum(map(self._bytes_of, self._missing()))
            return Progress(
                self._finished_bytes + missing,
                self._finished_bytes + self._arrived_bytes,
                self._clock() - self._started_at,
            )

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
            self._started_at = self._logged_at = self._clock()
            self._finished_bytes = self._arrived_bytes = 0
            self._thread = threading.Thread(target=self._run, name="loader", daemon=True)
            self._thread.start()

    def _run(self) -> None:
        num_loaded = 0
        while (unit := self._next()) is not None:
            try:
                weights, digest = self._load(unit, self._arrive)
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
        logger.info("loaded %d units in %.1f s", num_loaded, self._clock() - self._started_at)

    def _next(self) -> Unit | None:
        """The first that is wanted and not held; without one the thread ends."""
        with self._lock:
            unit = next(iter(self._missing()), None)
            if unit is None:
                self._thread = None
            return unit

    def _missing(self) -> Sequence[Unit]:
        return [unit for unit in self._wanted if unit not in self._held]

    def _arrive(self, num_bytes: int) -> None:
        """So many more bytes of the unit that is being read are there."""
        with self._lock:
            self._arrived_bytes += num_bytes
        if (progress := self.progress) is None:
            return
        self._on_progress(num_bytes, max(0, progress.total_bytes - progress.done_bytes))
        if (now := self._clock()) - self._logged_at >= LOG_EVERY_S:
            self._logged_at = now
            logger.info("loading: %s", progress)

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
                self._finished_bytes += self._bytes_of(unit)
            self._arrived_bytes = 0

"""The Ray actor round the expert service: loading, its lease, its end.

Ray places and watches it; tokens reach it through its own gRPC server only.
"""

import logging
import os
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import ray
import torch
from ray.util import get_node_ip_address

from cluster import rpc
from cluster.config import Network, listen_host
from cluster.expert.batcher import Batcher
from cluster.expert.service import ExpertService
from cluster.metrics import WorkerMetrics
from cluster.security import Security
from model.experts import ExpertWeights
from model.units import Unit
from model.weights import Checkpoint, torch_dtype

logger = logging.getLogger(__name__)

STOP_GRACE_S = 2.0


@dataclass(frozen=True, kw_only=True)
class WorkerSettings:
    """What a worker must know at its start. Sizes are in bytes, times in seconds."""

    name: str
    checkpoint: Path
    dtype: str | None
    expert_quantization: str | None
    device: str
    num_threads: int
    network: Network
    lease_s: float


@dataclass(frozen=True)
class WorkerReport:
    """How a worker is doing."""

    address: str
    incarnation: int
    epoch: int
    num_loaded: int
    """Experts that can be asked for."""
    num_wanted: int
    loaded_bytes: int
    error: str | None

    @property
    def is_loaded(self) -> bool:
        return self.error is None and self.num_loaded == self.num_wanted > 0


class ExpertWorker:
    """Holds some experts and answers heads. A Ray actor, detached.

    Lives as long as its lease: whoever owns it must call `heartbeat` within every `lease_s`.
    Threads: Ray's call in, one loads, one watches the lease, gRPC's serve.
    """

    def __init__(self, settings: WorkerSettings) -> None:
        security = Security.load(settings.network, "worker", os.environ)
        torch.set_num_threads(settings.num_threads)
        self._settings = settings
        checkpoint = Checkpoint(
            settings.checkpoint,
            dtype=torch_dtype(settings.dtype),
            device=settings.device,
            expert_quantization=settings.expert_quantization,
        )
        self._checkpoint = checkpoint
        self._held: dict[Unit, ExpertWeights] = {}
        self._loaded_bytes = 0
        self._num_wanted = 0
        self._error: str | None = None
        self._loader: threading.Thread | None = None

        metrics = WorkerMetrics()
        self._identity = rpc.Identity(
            settings.name, rpc.fingerprint(checkpoint.config, settings.dtype), security
        )
        service = ExpertService(
            Batcher(self._held, metrics),
            checkpoint.config,
            checkpoint.dtype,
            checkpoint.device,
            self._identity,
            metrics,
        )
        self._server, self._address = rpc.new_server(
            listen_host(settings.network.host, get_node_ip_address()),
            security,
            metrics.observe_refusal,
        )
        self._server.add_generic_rpc_handlers((service.handler(),))
        self._server.start()
        self._owner = ""
        self._epoch = 0
        self._lease_ends = time.monotonic() + settings.lease_s
        threading.Thread(target=self._watch_lease, name="lease", daemon=True).start()

    def __repr__(self) -> str:
        """Shown by Ray before each log line."""
        return f"ExpertWorker({self._settings.name})"

    def load(self, units: Sequence[Unit]) -> None:
        """Start loading these units; those already held stay. Returns at once."""
        if self._loader is not None and self._loader.is_alive():
            return
        missing = [unit for unit in units if unit not in self._held]
        self._num_wanted = len(units)
        self._error = None
        self._loader = threading.Thread(
            target=self._load, args=(missing,), name="loader", daemon=True
        )
        self._loader.start()

    def heartbeat(self, owner: str, epoch: int) -> WorkerReport:
        """Renew the lease in the name of `owner`, who from now on owns this worker.

        epoch: the placement in force. The worker remembers the highest, for a new controller.
        """
        self._owner = owner
        self._epoch = max(self._epoch, epoch)
        self._lease_ends = time.monotonic() + self._settings.lease_s
        return WorkerReport(
            address=self._address,
            incarnation=self._identity.incarnation,
            epoch=self._epoch,
            num_loaded=len(self._held),
            num_wanted=self._num_wanted,
            loaded_bytes=self._loaded_bytes,
            error=self._error,
        )

    def release(self, owner: str) -> None:
        """End this worker, unless it has passed to another owner."""
        if owner == self._owner:
            logger.info("%s: released by %r, ending", self._settings.name, owner)
            self._server.stop(STOP_GRACE_S).wait(STOP_GRACE_S + 1)
            ray.actor.exit_actor()

    def _load(self, units: Sequence[Unit]) -> None:
        started = time.perf_counter()
        try:
            for unit in units:
                weights = self._checkpoint.load_unit(unit)
                self._held[unit] = weights
                self._loaded_bytes += weights.num_bytes
        except Exception as error:
            # The loader's last word: the controller reads it from the next report.
            logger.exception("%s: loading failed", self._settings.name)
            self._error = f"{type(error).__name__}: {error}"
            return
        logger.info(
            "%s: loaded %d experts, %d bytes, in %.1f s",
            self._settings.name,
            len(units),
            self._loaded_bytes,
            time.perf_counter() - started,
        )

    def _watch_lease(self) -> None:
        while (left_s := self._lease_ends - time.monotonic()) > 0:
            time.sleep(min(left_s, 0.2))
        logger.warning("%s: lease of %r is over, ending", self._settings.name, self._owner)
        self._server.stop(STOP_GRACE_S).wait(STOP_GRACE_S + 1)
        # Not sys.exit: this is not the main thread, and Ray must see the process gone.
        os._exit(0)

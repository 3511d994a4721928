"""The Ray actor round the expert service: loading, its lease, its end.

Ray places and watches it; tokens reach it through its own gRPC server only.
"""

import logging
import os
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ray
import torch
from ray.util import get_node_ip_address

from cluster import PROTOCOL_VERSION, rpc
from cluster.errors import ConfigurationError
from cluster.expert.batcher import Batcher
from cluster.expert.lease import Lease
from cluster.expert.loader import Loader
from cluster.expert.service import ExpertService
from cluster.lenders import new_borrower
from cluster.lending.located import locate
from cluster.metrics import WorkerMetrics
from cluster.network import Network, listen_host
from cluster.placement import Stamp, WorkerReport
from cluster.security import Security
from model.experts import ExpertWeights
from model.tensor_files import digested
from model.units import Unit
from model.weights import Checkpoint, OnBytes, torch_dtype

logger = logging.getLogger(__name__)

STOP_GRACE_S = 2.0


@dataclass(frozen=True, kw_only=True)
class WorkerSettings:
    """What a worker must know at its start. Sizes are in bytes, times in seconds."""

    name: str
    model: Path | None
    """As in ServeConfig: each node finds, fetches or borrows its own."""
    dtype: str | None
    expert_quantization: str | None
    device: str
    num_threads: int
    network: Network
    lease_s: float
    options: Mapping[str, Any]
    """Ray's, for what it takes of its node."""
    weights: str
    """`Checkpoint.sample` of the model on the controller's node."""
    build: str = rpc.BUILD
    """A worker of another one is not kept."""

    @property
    def serves(self) -> str:
        """What a worker must be for heads of these settings to use it, in words that differ where
        that does. One that differs in the rest may go on until it is its turn to be replaced.
        """
        model = (self.model, self.weights, self.dtype, self.expert_quantization)
        return repr((PROTOCOL_VERSION, *model, self.network))


class ExpertWorker:
    """Holds some experts and answers heads. A Ray actor, detached.

    Lives as long as its lease: whoever owns it must call `heartbeat` within every `lease_s`.
    Threads: Ray's call in, one loads, one watches the lease, gRPC's serve.
    """

    def __init__(self, settings: WorkerSettings) -> None:
        security = Security.load(settings.network, "worker", os.environ)
        torch.set_num_threads(settings.num_threads)
        self._settings = settings
        borrower = partial(new_borrower, security=security, weights=settings.weights)
        located = locate(settings.model, borrower)
        checkpoint = Checkpoint(
            located.folder,
            files=located.weights,
            dtype=torch_dtype(settings.dtype),
            device=settings.device,
            expert_quantization=settings.expert_quantization,
        )
        weights = checkpoint.sample()
        if weights != settings.weights:
            raise ConfigurationError(
                f"{checkpoint.files.folder.path} holds other weights here ({weights}) than on the "
                f"controller's node ({settings.weights}): give all nodes the same files"
            )
        self._checkpoint = checkpoint
        held: dict[Unit, ExpertWeights] = {}
        self._borrows = located.weights is not None
        self._metrics = metrics = WorkerMetrics()
        self._loader = Loader(
            self._load,
            held,
            checkpoint.files_of,
            lambda unit: checkpoint.expert_bytes // unit.num_slices,
            partial(metrics.observe_load, "lender" if self._borrows else "disk"),
        )
        self._node = ray.get_runtime_context().get_node_id()
        self._identity = rpc.Identity(
            settings.name,
            rpc.fingerprint(checkpoint.config, settings.dtype, weights),
            security,
        )
        self._service = ExpertService(
            Batcher(held, metrics),
            checkpoint.config,
            checkpoint.dtype,
            checkpoint.device,
            self._identity,
            metrics,
            self._loader.drop_if_damaged,
            self._end_broken,
        )
        self._server, self._address = rpc.new_server(
            listen_host(settings.network.host, get_node_ip_address()),
            security,
            metrics.observe_refusal,
        )
        self._service.add_to(self._server)
        self._server.start()
        self._lease = Lease(settings.lease_s, time.monotonic())
        self._lock = threading.Lock()
        """So that orders of one controller do not overtake that another has taken over."""
        threading.Thread(target=self._watch_lease, name="lease", daemon=True).start()

    def __repr__(self) -> str:
        """Shown by Ray before each log line."""
        return f"ExpertWorker({self._settings.name})"

    def hold(self, owner: str, units: Sequence[Unit], expected: Mapping[Unit, str]) -> bool:
        """Hold exactly these units, see `Loader.hold`, unless another owns this worker; says
        whether it will. Returns at once.
        """
        with self._lock:
            is_owner = owner == self._lease.owner
            if is_owner:
                self._loader.hold(units, expected)
        return is_owner

    def heartbeat(self, owner: str, stamp: Stamp) -> WorkerReport:
        """Renew the lease in the name of `owner`, who owns this worker unless a later one does.

        stamp: of the placement in force. The worker remembers the highest, and says it to the next
        controller before it takes that one's.
        """
        with self._lock:
            known = self._lease.renew(owner, stamp, time.monotonic())
        return WorkerReport(
            address=self._address,
            incarnation=self._identity.incarnation,
            node=self._node,
            stamp=known,
            held=self._loader.digests,
            num_bytes=self._loader.num_bytes,
            rows=self._metrics.row_counts(),
            totals=self._metrics.totals,
            error=self._loader.error,
            settings=repr(self._settings),
            serves=self._settings.serves,
            loading=self._loader.progress,
            borrows=self._borrows,
        )

    def release(self, owner: str) -> None:
        """End this worker, unless it has passed to another owner."""
        if owner == self._lease.owner:
            logger.info("%s: released by %r, ending", self._settings.name, owner)
            self._service.end(self._server, STOP_GRACE_S)
            ray.actor.exit_actor()

    def _load(self, unit: Unit, on_bytes: OnBytes) -> tuple[ExpertWeights, str]:
        with digested() as digest:
            weights = self._checkpoint.load_unit(unit, on_bytes)
        return weights, digest.hexdigest()

    def _end_broken(self) -> None:
        """The controller sees it gone and starts another; heads send their rows elsewhere."""
        logger.error("%s: computes nothing any more, ending", self._settings.name)
        os._exit(1)

    def _watch_lease(self) -> None:
        while (left_s := self._lease.ends - time.monotonic()) > 0:
            time.sleep(min(left_s, 0.2))
        logger.warning("%s: lease of %r is over, ending", self._settings.name, self._lease.owner)
        self._service.end(self._server, STOP_GRACE_S)
        # Not sys.exit: this is not the main thread, and Ray must see the process gone.
        os._exit(0)

"""Expert workers without Ray: the service, its batcher and a real gRPC server, in this process."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from cluster import rpc
from cluster.expert.batcher import Batcher
from cluster.expert.service import ExpertService
from cluster.head.dispatch import RemoteExperts
from cluster.head.feed import PlacementFeed
from cluster.metrics import HeadMetrics, WorkerMetrics
from cluster.placement import Placement, Table, WorkerInfo
from cluster.planning import plan
from cluster.security import Security
from model.experts import checksum
from model.units import Unit
from model.weights import Checkpoint
from tests.faults import Proxy


def table_of(checkpoint: Checkpoint, num_workers: int = 2) -> Table:
    """The placement that the controller would make."""
    return plan(
        num_layers=checkpoint.config.num_hidden_layers,
        num_experts=checkpoint.config.num_local_experts,
        expert_bytes=[checkpoint.expert_bytes] * num_workers,
        budgets=[None] * num_workers,
    )


def dtype_name(checkpoint: Checkpoint) -> str:
    return str(checkpoint.dtype).removeprefix("torch.")


class WorkerServer:
    """Holds every expert, so that it can stand in for any other; which are asked for, the
    placement says."""

    def __init__(
        self,
        name: str,
        checkpoint: Checkpoint,
        security: Security = rpc.LOOPBACK_ONLY,
        units: Sequence[Unit] | None = None,
    ) -> None:
        """units: to hold in place of all experts."""
        self.held = held = checkpoint.load_experts(
            checkpoint.config.expert_units if units is None else units
        )
        self.num_broken = 0
        """How often it would have ended since it could compute nothing any more."""
        self._checksums = {unit: checksum(weights) for unit, weights in held.items()}
        self.metrics = WorkerMetrics()
        self.identity = rpc.Identity(
            name, rpc.fingerprint(checkpoint.config, dtype_name(checkpoint)), security
        )
        self.service = ExpertService(
            Batcher(held, self.metrics),
            checkpoint.config,
            checkpoint.dtype,
            checkpoint.device,
            self.identity,
            self.metrics,
            self._drop_if_damaged,
            self._end_broken,
        )
        self.server, self.address = rpc.new_server(
            "127.0.0.1", security, self.metrics.observe_refusal
        )
        self.service.add_to(self.server)
        self.server.start()

    def _drop_if_damaged(self, unit: Unit) -> bool:
        is_damaged = unit in self.held and checksum(self.held[unit]) != self._checksums[unit]
        if is_damaged:
            del self.held[unit]
        return is_damaged

    def _end_broken(self) -> None:
        self.num_broken += 1

    @property
    def info(self) -> WorkerInfo:
        return WorkerInfo(self.identity.name, self.address, self.identity.incarnation, 0)

    def stop(self) -> None:
        self.service.end(self.server, 0)


@contextmanager
def behind_proxy(worker: WorkerServer) -> Iterator[tuple[Proxy, WorkerInfo]]:
    """The worker as if it were on another host, which its pipe does not reach."""
    pipe, worker.identity.pipe = worker.identity.pipe, ""
    try:
        with Proxy(worker.address) as proxy:
            yield proxy, replace(worker.info, address=proxy.address)
    finally:
        worker.identity.pipe = pipe


def placement_on(servers: list[WorkerServer], checkpoint: Checkpoint, epoch: int = 1) -> Placement:
    return Placement(
        epoch, tuple(server.info for server in servers), table_of(checkpoint, len(servers))
    )


def remote_experts(
    feed: PlacementFeed,
    checkpoint: Checkpoint,
    *,
    timeout_s: float = 20.0,
    recovery_timeout_s: float = 20.0,
    security: Security = rpc.LOOPBACK_ONLY,
    metrics: HeadMetrics | None = None,
    hedge_budget: float = 0.0,
) -> RemoteExperts:
    fingerprint = rpc.fingerprint(checkpoint.config, dtype_name(checkpoint))
    identity = rpc.Identity("head", fingerprint, security)
    return RemoteExperts(
        feed,
        identity,
        timeout_s=timeout_s,
        recovery_timeout_s=recovery_timeout_s,
        metrics=metrics,
        hedge_budget=hedge_budget,
    )

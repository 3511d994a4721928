"""The controller: starts expert workers, places the experts, watches, and publishes who is where.

A Ray Serve deployment with one replica. Never on the path of a token: heads and ingresses keep the
last view they heard. A restarted controller finds its workers again by their names.
"""

import asyncio
import logging
import secrets
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import ray
from ray import serve
from ray.exceptions import RayActorError, RayError

from cluster.config import ServeConfig
from cluster.errors import MaestraleError
from cluster.follow import WATCH_S, HeadReport
from cluster.placement import (
    ClusterView,
    HeadInfo,
    Placement,
    Table,
    WorkerInfo,
    held_by,
)
from cluster.planning import plan
from model.errors import ModelError
from model.units import Unit

if TYPE_CHECKING:
    from cluster.expert.worker import WorkerReport

logger = logging.getLogger(__name__)

NAMESPACE = "maestrale"
"""Ray namespace of the expert workers."""

LOADING_BEAT_S = 0.25
"""Between heartbeats while something is still loading, so that progress is seen."""

HEAD_SILENT_AFTER_S = 6 * WATCH_S
"""A head that has not been heard of for so long is not handed out any more."""

MAX_MISSED_BEATS = 3

LOAD_AGAIN_S = 10.0
"""After a failure to load: a shared disk may come back, a broken file will not."""


@dataclass
class _Worker:
    """One expert worker as the controller knows it."""

    name: str
    quantization: str | None
    units: list[Unit]
    actor: Any
    report: "WorkerReport | None" = None
    num_missed: int = 0
    load_again_at: float = 0.0
    """Not before this may it be told to load again after a failure."""


class Controller:
    """Owns the placement. All state belongs to the replica's event loop."""

    def __init__(self, config: ServeConfig) -> None:
        """Must run on the replica's event loop."""
        self._config = config
        self._app_name = serve.get_replica_context().app_name
        self._owner = secrets.token_hex(8)
        self._workers: list[_Worker] = []
        self._heads: dict[str, tuple[HeadReport, float]] = {}
        self._epoch = 0
        self._view = ClusterView(
            version=1,
            phase="starting expert workers",
            percent=0,
            error=None,
            placement=None,
            heads=(),
            heads_expected=config.num_heads,
        )
        self._changed = asyncio.Event()
        self._supervisor = asyncio.create_task(self._supervise())

    def __repr__(self) -> str:
        return f"Controller({self._app_name}, {self._view})"

    async def watch(self, known: int, head: HeadReport | None = None) -> ClusterView:
        """The view, as soon as it is not the `known` version, at the latest after WATCH_S.

        head: a head replica says how it is doing, and that it is alive.
        """
        if head is not None:
            self._heads[head.name] = (head, time.monotonic())
            self._update_view()
        if self._view.version == known:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), WATCH_S)
        return self._view

    def check_health(self) -> None:
        """Called by Serve; a controller that supervises no more is replaced."""
        if self._supervisor.done():
            raise RuntimeError(f"supervision has ended: {self._supervisor}")

    async def __del__(self) -> None:
        """Called by Serve before it ends the replica: release the workers that are still ours."""
        self._supervisor.cancel()
        releases = [worker.actor.release.remote(self._owner) for worker in self._workers]
        if releases:
            await asyncio.wait([asyncio.ensure_future(_quietly(r)) for r in releases], timeout=5)

    async def _supervise(self) -> None:
        """Start the workers and keep them; never returns."""
        try:
            table = await asyncio.to_thread(self._plan)
        except (MaestraleError, ModelError) as error:
            # Another start would fail the same way: say so, to whoever asks, until deleted.
            logger.error("nothing can be placed: %s", error)
            self._set_view(replace(self._view, phase="failed", error=str(error)))
            await asyncio.Event().wait()
        for index, mode in enumerate(self._config.worker_quantization):
            name = f"{self._app_name}-worker-{index}"
            units = held_by(table, index)
            self._workers.append(_Worker(name, mode, units, self._start(name, mode)))
        while True:
            await asyncio.gather(*(self._beat(worker) for worker in self._workers))
            self._publish_if_moved(table)
            self._update_view()
            await asyncio.sleep(
                min(1.0, self._config.lease_renewal_s) if self._all_loaded() else LOADING_BEAT_S
            )

    def _plan(self) -> Table:
        """Which worker is to hold what. Reads the checkpoint's headers."""
        # torch is not wanted before a replica runs
        from model.weights import Checkpoint, torch_dtype

        config = self._config
        folder, dtype = config.checkpoint_folder(), torch_dtype(config.dtype)
        as_held = {
            mode: Checkpoint(folder, dtype=dtype, expert_quantization=mode)
            for mode in set(config.worker_quantization)
        }
        model = as_held[config.worker_quantization[0]].config
        return plan(
            num_layers=model.num_hidden_layers,
            num_experts=model.num_local_experts,
            expert_bytes=[as_held[mode].expert_bytes for mode in config.worker_quantization],
            budgets=[config.worker_memory_bytes] * config.num_workers,
        )

    def _start(self, name: str, quantization: str | None) -> Any:
        """Start a worker, or find the one of this name that is still alive."""
        # torch is only wanted in the workers
        from cluster.expert.worker import ExpertWorker, WorkerSettings

        config = self._config
        settings = WorkerSettings(
            name=name,
            checkpoint=config.checkpoint_folder(),
            dtype=config.dtype,
            expert_quantization=quantization,
            device=config.device,
            num_threads=config.worker_threads,
            network=config.network,
            lease_s=config.lease_s,
        )
        logger.info("starting %s", name)
        return (
            ray.remote(ExpertWorker)
            .options(
                name=name,
                namespace=NAMESPACE,
                lifetime="detached",
                get_if_exists=True,
                num_cpus=config.worker_cpus,
                num_gpus=config.worker_gpus,
                resources=config.worker_resources,
                max_concurrency=4,
            )
            .remote(settings)
        )

    async def _beat(self, worker: _Worker) -> None:
        """Renew one worker's lease and hear from it; start it again if it is dead."""
        timeout_s = self._config.lease_renewal_s
        if worker.report is None:
            timeout_s = 120.0  # its process is still starting
        try:
            report = await asyncio.wait_for(
                worker.actor.heartbeat.remote(self._owner, self._epoch), timeout_s
            )
        except RayActorError as error:
            logger.warning("%s is dead: %s", worker.name, _first_line(error))
            worker.report, worker.num_missed = None, 0
            worker.actor = self._start(worker.name, worker.quantization)
            return
        except (TimeoutError, RayError) as error:
            worker.num_missed += 1
            logger.warning(
                "%s missed %d heartbeats: %r", worker.name, worker.num_missed, _first_line(error)
            )
            if worker.num_missed >= MAX_MISSED_BEATS:
                ray.kill(worker.actor)
            return
        is_new = worker.report is None or worker.report.incarnation != report.incarnation
        worker.report, worker.num_missed = report, 0
        self._epoch = max(self._epoch, report.epoch)
        now = time.monotonic()
        if is_new or (report.error and now >= worker.load_again_at):
            worker.load_again_at = now + LOAD_AGAIN_S
            await worker.actor.load.remote(worker.units)

    def _all_loaded(self) -> bool:
        return all(worker.report and worker.report.is_loaded for worker in self._workers)

    def _publish_if_moved(self, table: Table) -> None:
        """Publish a placement of the next epoch if all is loaded and anything has moved."""
        if not self._all_loaded():
            return
        infos = tuple(
            WorkerInfo(
                worker.name,
                worker.report.address,
                worker.report.incarnation,
                worker.report.loaded_bytes,
            )
            for worker in self._workers
            if worker.report
        )
        if self._view.placement is None or self._view.placement.workers != infos:
            self._epoch += 1
            placement = Placement(self._epoch, infos, table)
            logger.info("placement %d: %s", self._epoch, infos)
            self._set_view(replace(self._view, placement=placement))

    def _update_view(self) -> None:
        """Derive phase, percent and heads from what is known now."""
        now = time.monotonic()
        self._heads = {
            name: (report, heard)
            for name, (report, heard) in self._heads.items()
            if now - heard < HEAD_SILENT_AFTER_S
        }
        heads = [report for report, _ in self._heads.values()]
        ready = tuple(HeadInfo(h.name, h.address) for h in heads if h.address)
        errors = [f"{h.name}: {h.error}" for h in heads if h.error] + [
            f"{worker.name}: {worker.report.error}"
            for worker in self._workers
            if worker.report and worker.report.error
        ]
        if not self._workers:
            return  # nothing is planned yet, or nothing can be
        phase, percent = self._progress(bool(ready))
        self._set_view(
            replace(
                self._view,
                phase=phase,
                percent=percent,
                error=errors[0] if errors else None,
                heads=ready,
            )
        )

    def _progress(self, has_head: bool) -> tuple[str, int]:
        reports = [worker.report for worker in self._workers if worker.report]
        if len(reports) < len(self._workers):
            return "starting expert workers", 10 * len(reports) // len(self._workers)
        loaded = sum(report.num_loaded for report in reports)
        wanted = sum(report.num_wanted for report in reports)
        if not self._all_loaded():
            return "loading experts", 10 + 80 * loaded // max(1, wanted)
        return ("ready", 100) if has_head else ("starting head replicas", 90)

    def _set_view(self, view: ClusterView) -> None:
        """Make this the view, and wake everybody who watches, if it differs."""
        if view != self._view:
            self._view = replace(view, version=self._view.version + 1)
            self._changed.set()
            self._changed = asyncio.Event()


async def _quietly(reference: Any) -> None:
    """Await a call to an actor that may be gone."""
    with suppress(RayError):
        await reference


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0]

"""An expert worker as the controller has it: an actor that is started, heard, told, replaced."""

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import ActorUnavailableError, RayActorError, RayError
from ray.util import get_node_ip_address, list_named_actors

from cluster.config import ServeConfig
from cluster.network import listen_host
from cluster.nodes import NAMESPACE
from cluster.reach import is_cut_off
from model.units import Unit

if TYPE_CHECKING:
    from cluster.placement import Stamp, WorkerReport

logger = logging.getLogger(__name__)

BEAT_TIMEOUT_S = 2.0

MAX_MISSED_BEATS = 3
"""A worker that has missed so many counts as dead, unless the controller is cut off: it is killed
and replaced."""

START_TIMEOUT_S = 120.0
"""For a worker's first heartbeat: its process has to start."""

LOAD_AGAIN_S = 10.0
"""After a failure to load: a shared disk may come back, a broken file will not."""

FIRST_WAIT_S = 1.0
MAX_WAIT_S = 30.0
"""Before a worker that died before its first heartbeat is started again, doubled each time: what
stopped it, such as a missing file on its node, is seldom gone at once."""


def worker_name(app_name: str, index: int) -> str:
    """Of an application's worker, by its number."""
    return f"{app_name}-worker-{index}"


def alive_workers(app_name: str) -> list[int]:
    """Numbers of an application's workers that are alive. Asks Ray, and blocks meanwhile."""
    prefix = worker_name(app_name, 0)[:-1]
    names = [
        actor["name"].removeprefix(prefix)
        for actor in list_named_actors(all_namespaces=True)
        if actor["namespace"] == NAMESPACE and actor["name"].startswith(prefix)
    ]
    return sorted(int(number) for number in names if number.isdecimal())


class WorkerActor:
    """One worker by its name, whatever process it is at the moment. Owned by one event loop."""

    def __init__(
        self,
        config: ServeConfig,
        name: str,
        quantization: str | None,
        weights: str,
        owner: str,
        peers: Callable[[], Iterable[str]],
    ) -> None:
        """weights: as in WorkerSettings. owner: of its lease. peers: addresses of all heads and
        workers, which show whose fault silence is. The first heartbeat starts it, or finds it if it
        is still alive.
        """
        self.name = name
        self.quantization = quantization
        self.incarnation: int | None = None
        """None until it has been heard of."""
        self.error: str | None = None
        """Why it cannot start, or has failed to load what it is to hold."""
        self.is_outdated = False
        """Whether it runs with other settings than it would be started with now, but can be used
        until it is replaced."""
        self.is_out_of_reach = False
        """Whether it is silent, and so is everybody else on other hosts."""
        self._peers = peers
        self._config = config
        self._weights = weights
        self._owner = owner
        self._actor: Any = None
        self._settings = self._serves = ""
        """What it is to be started with, in its report's words."""
        self._start_in_s: float | None = 0.0
        """Not None: it is dead, or has never been started."""
        self._num_failed_starts = 0
        """In a row."""
        self._num_missed = 0
        self._told: tuple[Unit, ...] | None = None
        """What it is sure to have heard that it is to hold."""
        self._tell_again_at = 0.0

    def __repr__(self) -> str:
        return (
            f"WorkerActor({self.name}, incarnation {self.incarnation}, "
            f"{self._num_missed} beats missed, to hold {len(self._told or ())} units)"
        )

    async def heartbeat(self, stamp: "Stamp") -> "WorkerReport | None":
        """Renew its lease and hear from it; None once it is dead. The next call starts another.

        A worker that stays silent is killed, and one that a controller before this one has started
        for another model, or so that our heads cannot reach it, is ended: both are dead in the end.
        While we are cut off ourselves nobody is: it is waited for.
        """
        if self._start_in_s is not None:
            await asyncio.sleep(self._start_in_s)
            # It imports torch and calls Ray's control store, which may be slow or away; whoever
            # waited for it here would renew nobody's lease meanwhile.
            try:
                self._actor = await asyncio.to_thread(self._start)
            except Exception as error:
                # Whatever it is, the other workers must be heard and kept meanwhile.
                self._note_failed_start(_first_line(error), is_certain=True)
                return None
            self._start_in_s = None
        while True:
            timeout_s = START_TIMEOUT_S if self.incarnation is None else BEAT_TIMEOUT_S
            try:
                report: WorkerReport = await asyncio.wait_for(
                    self._actor.heartbeat.remote(self._owner, stamp), timeout_s
                )
            except (TimeoutError, RayError) as error:
                is_away = isinstance(error, ActorUnavailableError)  # it may live nevertheless
                if isinstance(error, RayActorError) and not is_away:
                    self._note_death(error)
                    return None
                await self._note_silence(error)
                continue
            if self.incarnation != report.incarnation:
                self.incarnation, self._told = report.incarnation, None
            if report.serves != self._serves:
                logger.info("%s serves something else and is replaced", self.name)
                await self.release()
                continue
            self.is_outdated = report.settings != self._settings
            self._num_missed, self._num_failed_starts, self.error = 0, 0, report.error
            self.is_out_of_reach = False
            return report

    async def _note_silence(self, error: Exception) -> None:
        """Count a missed heartbeat; after too many kill it, unless it may not be its fault."""
        self._num_missed += 1
        logger.warning(
            "%s missed %d heartbeats: %r", self.name, self._num_missed, _first_line(error)
        )
        if not isinstance(error, TimeoutError):
            await asyncio.sleep(BEAT_TIMEOUT_S)  # it came at once, and so would the next
        if self._num_missed >= MAX_MISSED_BEATS:
            network = self._config.network
            own_host = listen_host(network.host, get_node_ip_address())
            self.is_out_of_reach = await is_cut_off(own_host, self._peers())
            if self.is_out_of_reach:
                logger.warning("no other host can be reached: %s is left alone", self.name)
            else:
                # Ray's control store may be away; nobody's lease would be renewed meanwhile
                await asyncio.to_thread(ray.kill, self._actor)

    def _note_death(self, error: RayActorError) -> None:
        """Say why, and when to start another: at once, unless it never came to its first beat."""
        cause = _cause(error)
        logger.warning("%s is dead: %s", self.name, cause)
        has_started = self.incarnation is not None
        self.incarnation, self._num_missed, self.error = None, 0, None
        self.is_out_of_reach = False
        if has_started:
            self._start_in_s = 0.0
            return
        # One that ends just when it is found, as its last owner wanted, is no failure.
        self._note_failed_start(cause, is_certain=error.actor_init_failed)

    def _note_failed_start(self, cause: str, *, is_certain: bool) -> None:
        """Start it again after ever longer waits; is_certain: it will not get up by itself."""
        doublings = min(self._num_failed_starts, 10)
        self._start_in_s = min(MAX_WAIT_S, FIRST_WAIT_S * 2**doublings)
        self._num_failed_starts += 1
        if is_certain or self._num_failed_starts > 1:
            self.error = f"cannot start: {cause}"
            logger.warning("%s %s", self.name, self.error)

    async def hold(
        self, units: tuple[Unit, ...], expected: Mapping[Unit, str], *, is_wrong: bool
    ) -> None:
        """Say what to hold, if that is news, was not taken, or has failed a while ago.

        is_wrong: it holds something else than `expected` in the place of a unit.
        """
        now = time.monotonic()
        has_failed = is_wrong or self.error is not None
        if units == self._told and not (has_failed and now >= self._tell_again_at):
            return
        self._told, self._tell_again_at = None, now + LOAD_AGAIN_S
        with suppress(TimeoutError, RayError):  # the next heartbeat says what is wrong
            order = self._actor.hold.remote(self._owner, units, expected)
            if await asyncio.wait_for(order, BEAT_TIMEOUT_S):
                self._told = units

    async def release(self) -> None:
        """End it, unless it has passed to another owner or has never been started."""
        if self._actor is None:
            return
        with suppress(RayError):
            await self._actor.release.remote(self._owner)

    async def dismiss(self) -> None:
        """End it, also where it has never been heard of: there is to be no other in its place."""
        if self.incarnation is None and self._actor is not None:
            ray.kill(self._actor)  # it may still wait for a node to start on
        else:
            await self.release()

    def _start(self) -> Any:
        """A handle of it; starts it if there is none of this name. From any thread."""
        # torch is only wanted in the workers
        from cluster.expert.worker import ExpertWorker, WorkerSettings

        config = self._config
        settings = WorkerSettings(
            name=self.name,
            model=config.model,
            dtype=config.dtype,
            expert_quantization=self.quantization,
            device=config.device,
            num_threads=config.worker_threads,
            network=config.network,
            lease_s=config.lease_s,
            options={
                "num_cpus": config.worker_cpus,
                "num_gpus": config.worker_gpus,
                "resources": config.worker_resources,
            },
            weights=self._weights,
        )
        self._settings, self._serves = repr(settings), settings.serves
        logger.info("starting %s", self.name)
        return (
            ray.remote(ExpertWorker)
            .options(
                name=self.name,
                namespace=NAMESPACE,
                lifetime="detached",
                get_if_exists=True,
                max_concurrency=4,
                **settings.options,
            )
            .remote(settings)
        )


def _cause(error: RayActorError) -> str:
    """What Ray says after its preamble and the traceback, or details, that it indents."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    places = [number for number, line in enumerate(lines) if line[0].isspace()]
    after = lines[places[-1] + 1 :] if places else []
    return (after or lines[-1:] or [repr(error)])[0].strip()


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0]

"""The controller: starts expert workers, says what each is to hold, and publishes who is where.

A Ray Serve deployment with one replica. Never on the path of a token: heads and ingresses keep the
last view they heard. A restarted controller finds its workers again by their names, and learns from
them what they hold. What to do is decided by `living`; this carries it out.
"""

import asyncio
import logging
import secrets
import time
from dataclasses import replace
from functools import partial
from typing import Any

from ray import serve
from ray.serve.schema import ApplicationStatus

from cluster.actors import WorkerActor, alive_workers, worker_name
from cluster.autoscale import Decision
from cluster.config import ServeConfig
from cluster.errors import MaestraleError
from cluster.folders import can_be_lent, checkpoint_path
from cluster.follow import WATCH_S, HeadReport, Publisher
from cluster.headers import read_headers
from cluster.lenders import Lenders
from cluster.living import Change, LivingPlacement, Sizes
from cluster.manifest import CACHE, Manifest
from cluster.nodes import run_where_it_will_be
from cluster.placement import ClusterView, HeadInfo, HeadsWanted
from cluster.scaling import Scaler
from cluster.schema import Move, Rebalancing
from model.errors import ModelError

logger = logging.getLogger(__name__)

BEAT_S = 1.0
"""Between heartbeats."""

UNSETTLED_BEAT_S = 0.25
"""The same while something is to be loaded or dropped, so that it is heard of soon."""

HEAD_SILENT_AFTER_S = 6 * WATCH_S
"""A head that has not been heard of for so long is not handed out any more."""

LOADING_EVERY_S = 1.0
"""How often news of loads in progress is given to everybody, at most."""

REBALANCE_EVERY_S = 30.0
"""How often it is asked whether another placement would pay."""

SCALE_EVERY_S = 5.0
"""How often it is asked how many heads and workers there should be: every head has reported at
least twice meanwhile."""


class _AsleepError(Exception):
    """Heads have gone, and workers are to go."""


class Controller:
    """Carries out the living placement. All state belongs to the replica's event loop."""

    def __init__(self, config: ServeConfig) -> None:
        """Must run on the replica's event loop."""
        self._config = self._given = config
        self._refusal: str | None = None
        """What is wrong with the changes to it."""
        self._app_name = serve.get_replica_context().app_name
        self._owner = secrets.token_hex(8)
        self._workers: dict[int, WorkerActor] = {}
        self._is_plan_due = asyncio.Event()
        self._are_missing = asyncio.Event()
        """Workers are wanted that there are not."""
        self._living: LivingPlacement | None = None
        self._heads: dict[str, tuple[HeadReport, float]] = {}
        self._scaler = Scaler(knows_heads_at=0.0)
        self._told_loading_at = 0.0
        self._news = Publisher(
            ClusterView(
                version=1,
                phase="starting expert workers",
                percent=0,
                error=None,
                placement=None,
                heads=(),
                heads_expected=config.num_heads,
            )
        )
        self._supervisor = asyncio.create_task(self._supervise())

    def __repr__(self) -> str:
        return f"Controller({self._app_name}, {self._news.view})"

    async def watch(self, known: int, head: HeadReport | None = None) -> ClusterView:
        """The view, as soon as it is not the `known` version, at the latest after WATCH_S.

        head: a head replica says how it is doing, and that it is alive.
        """
        if head is not None:
            self._heads[head.name] = (head, time.monotonic())
            self._update_view()
        return await self._news.other_than(known)

    async def reconfigure(self, changes: dict[str, Any]) -> None:
        """Called by Serve with the `user_config` that a file gives this deployment, and again when
        it has changed: settings that need no restart. What is wrong with them shows in the view.
        """
        try:
            self._config, self._refusal = self._given.with_live(changes), None
            logger.info("settings changed: %s", changes)
        except ValueError as error:
            # Raised, it would make Serve start another controller over and over.
            self._refusal = f"user_config is refused: {error}"
            logger.error("%s", self._refusal)
        self._update_view()

    async def rebalance(self, dry_run: bool) -> Rebalancing | None:
        """Plan anew for the load of now and, unless dry_run, have it done; returns what changes.

        None while the first placement is not there yet.
        """
        living = self._living
        if living is None or self._news.view.placement is None:
            return None
        change = await asyncio.to_thread(living.proposal())
        is_adopted = bool(change.moves) and not dry_run
        if is_adopted:
            self._adopt(living, change)
        return Rebalancing(
            moves=[
                Move(
                    worker=worker_name(self._app_name, worker),
                    layer=unit.layer,
                    expert=unit.expert_id,
                    slice_number=unit.slice_number,
                    num_slices=unit.num_slices,
                )
                for worker, unit in change.moves
            ],
            busiest_before=change.before,
            busiest_after=change.after,
            gain=change.gain,
            adopted=is_adopted,
        )

    async def wake(self) -> None:
        """Called by an ingress that has a request and no head: have heads and workers again."""
        self._scaler.is_awaited = True
        if self._news.view.is_asleep:
            number = self._config.num_heads
            wanted = HeadsWanted(number, time.time())
            logger.info("woken by a request")
            self._tell(is_asleep=False, heads_wanted=wanted, heads_expected=number)

    def check_health(self) -> None:
        """Called by Serve; a controller that supervises no more is replaced."""
        if self._supervisor.done():
            raise RuntimeError(f"supervision has ended: {self._supervisor}")

    async def __del__(self) -> None:
        """Called by Serve before it ends the replica: end the workers that are still ours, if the
        application is to end. The controller of a changed file goes on with them, within their
        lease.
        """
        self._supervisor.cancel()
        if await asyncio.to_thread(self._has_successor):
            return
        endings = [asyncio.ensure_future(worker.dismiss()) for worker in self._workers.values()]
        if endings:
            await asyncio.wait(endings, timeout=5)

    def _tell(self, **changes: Any) -> None:
        """Publish the view with these fields changed."""
        self._news.publish(replace(self._news.view, **changes))

    def _has_successor(self) -> bool:
        """Whether Serve is about to start another controller. Asks Serve, and blocks meanwhile."""
        try:
            application = serve.status().applications.get(self._app_name)
        except Exception as error:
            logger.warning("Serve does not say whether the application ends: %r", error)
            return False
        return application is not None and application.status != ApplicationStatus.DELETING

    async def _supervise(self) -> None:
        """Start the workers and keep them, but for times of sleep; never returns."""
        config = self._config
        # those that a controller before this one has added are still needed, for all it knows
        num_alive = max(await asyncio.to_thread(alive_workers, self._app_name), default=-1) + 1
        self._tell(takes_over=num_alive > 0)
        try:
            sizes, weights = await run_where_it_will_be(
                config.model,
                read_headers,
                config,
                on_missing=lambda why: self._tell(phase=why),
            )
            manifest = Manifest.of(checkpoint_path(config.model), CACHE.expanduser())
            num_workers = max(config.num_workers, min(num_alive, config.most_workers))
            living = self._new_living(sizes, num_workers)
            living.proposal()()  # is there room at all?
        except (MaestraleError, ModelError, OSError) as error:
            # Another start would fail the same way: say so, to whoever asks, until deleted.
            logger.error("nothing can be placed: %s", error)
            self._tell(phase="failed", error=str(error))
            await asyncio.Event().wait()
        if num_alive:  # and heads, which have yet to be heard of
            self._scaler = Scaler(time.monotonic() + HEAD_SILENT_AFTER_S)
        while True:
            try:
                await self._keep_alive(living, weights, manifest)
            except* _AsleepError:
                await self._sleep()
            living = self._new_living(sizes, self._config.num_workers)

    def _new_living(self, sizes: Sizes, num_workers: int) -> LivingPlacement:
        """Of nothing yet. Its placements count as later than all before."""
        living = LivingPlacement(
            sizes.for_workers(num_workers),
            partial(worker_name, self._app_name),
            drain_s=self._config.expert_timeout_s,
            term=time.time_ns(),
        )
        living.resize(num_workers)
        return living

    async def _keep_alive(self, living: LivingPlacement, weights: str, manifest: Manifest) -> None:
        """Start the workers and keep them. Raises a group with _AsleepError in the end."""
        config = self._given
        self._living = living
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._plan(living))
            tasks.create_task(self._balance(living))
            tasks.create_task(self._scale(living))
            if can_be_lent(config.model):
                tasks.create_task(Lenders(config.model, weights, config.network).keep())
            while True:
                for index in set(range(living.num_workers)) - self._workers.keys():
                    mode = config.worker_quantization[min(index, config.num_workers - 1)]
                    name = worker_name(self._app_name, index)
                    worker = WorkerActor(
                        config, name, mode, weights, self._owner, lambda: self._news.view.addresses
                    )
                    self._workers[index] = worker
                    tasks.create_task(self._keep(index, worker, living, manifest))
                self._are_missing.clear()
                await self._are_missing.wait()

    async def _sleep(self) -> None:
        """End all workers, and return when there is a request."""
        workers, self._workers, self._living = self._workers, {}, None
        self._tell(phase="asleep", error=None, placement=None, heads=())
        await asyncio.gather(*(worker.dismiss() for worker in workers.values()))
        await self._news.until(lambda view: not view.is_asleep)
        self._tell(phase="starting expert workers", percent=0)

    async def _keep(
        self, index: int, worker: WorkerActor, living: LivingPlacement, manifest: Manifest
    ) -> None:
        """Hear from one worker again and again, and tell it what to hold, until it may go."""
        while not living.may_go(index):
            report = await worker.heartbeat(living.stamp)
            if report is None:
                living.lose(index)
                self._go_on(living)
            else:
                # a unit that is not what was loaded first counts as not held
                sound = manifest.sound(report.held, worker.quantization)
                living.hear(index, replace(report, held=sound))
                self._go_on(living)
                orders = living.orders(index)
                expected = manifest.expected(orders, worker.quantization)
                await worker.hold(orders, expected, is_wrong=len(sound) < len(report.held))
                if worker.is_outdated and living.is_at_rest:
                    # one at a time: the next waits until this one's successor holds what it held
                    logger.info("%s has other settings and is replaced", worker.name)
                    living.lose(index)
                    self._go_on(living)
                    await worker.release()
                    continue
            beat_s = BEAT_S if living.is_settled else UNSETTLED_BEAT_S
            await asyncio.sleep(min(beat_s, self._config.lease_renewal_s))
        logger.info("%s holds nothing that is asked for and is released", worker.name)
        await worker.dismiss()
        living.lose(index)
        del self._workers[index]
        self._are_missing.set()  # it may be wanted again since

    def _go_on(self, living: LivingPlacement) -> None:
        """Take the next step of the placement, if what is known now allows one."""
        now = time.monotonic()
        if living.needs_plan:
            self._is_plan_due.set()
        living.drain([head.stamp for head, _ in self._heads.values()], now)
        if (placement := living.publish(now)) is not None:
            logger.info("placement %d: %s", placement.epoch, placement.workers)
            self._tell(placement=placement)
        self._update_view()

    async def _plan(self, living: LivingPlacement) -> None:
        """Adopt a plan for the workers that there are, whenever those have changed."""
        while True:
            await self._is_plan_due.wait()
            self._is_plan_due.clear()
            if living.needs_plan:
                self._adopt(living, await asyncio.to_thread(living.proposal()))

    async def _balance(self, living: LivingPlacement) -> None:
        """Adopt a better plan whenever there is one that is worth it."""
        while True:
            await asyncio.sleep(REBALANCE_EVERY_S)
            if self._config.rebalance_gain is None or not living.is_at_rest:
                continue
            change = await asyncio.to_thread(living.proposal())
            if change.moves and change.gain >= self._config.rebalance_gain and living.is_settled:
                self._adopt(living, change)

    def _adopt(self, living: LivingPlacement, change: Change) -> None:
        logger.info(
            "new plan: %d units to load, busiest workers of the layers %s x the mean",
            len(change.moves),
            [round(share, 2) for share in change.after],
        )
        living.adopt(change)

    async def _scale(self, living: LivingPlacement) -> None:
        """Have as many heads and workers as the settings and the load ask for.

        Raises _AsleepError when none are asked for and the last head has gone.
        """
        while True:
            await asyncio.sleep(SCALE_EVERY_S)
            if any(worker.is_out_of_reach for worker in self._workers.values()):
                continue  # heads are silent, too, which does not mean that they idle
            decision = self._scaler.decide(
                [head for head, _ in self._heads.values()],
                living.totals,
                self._config,
                num_workers=living.num_workers,
                is_placed=self._news.view.placement is not None,
                is_asleep=self._news.view.is_asleep,
                now=time.monotonic(),
            )
            if decision is not None:
                self._apply(decision, living)
            if self._news.view.is_asleep and not self._heads:
                raise _AsleepError

    def _apply(self, decision: Decision, living: LivingPlacement) -> None:
        """See to it that there are so many heads and workers; the last workers go after the heads,
        which may still need them.
        """
        logger.log(logging.INFO if decision.is_change else logging.DEBUG, "%s", decision.reason)
        if decision.num_workers:
            living.resize(decision.num_workers)
            self._are_missing.set()
        wanted = self._news.view.heads_wanted
        if wanted is None or wanted.number != decision.num_heads:
            wanted = HeadsWanted(decision.num_heads, time.time())
        self._tell(
            heads_expected=wanted.number,
            heads_wanted=wanted,
            is_asleep=wanted.number == 0,
            scaling=decision.reason if decision.is_change else self._news.view.scaling,
        )

    def _update_view(self) -> None:
        """Derive phase, percent and heads from what is known now."""
        living, now = self._living, time.monotonic()
        self._heads = {
            name: (report, heard)
            for name, (report, heard) in self._heads.items()
            if now - heard < HEAD_SILENT_AFTER_S
        }
        heads = [report for report, _ in self._heads.values()]
        ready = tuple(HeadInfo(h.name, h.address) for h in heads if h.address)
        errors = [self._refusal] if self._refusal else []
        errors += [f"{head.name}: {head.error}" for head in heads if head.error]
        workers = self._workers.values()
        errors += [f"{worker.name}: {worker.error}" for worker in workers if worker.error]
        if living is None:
            return  # nothing is planned yet, or nothing can be
        phase, percent = living.progress(has_head=bool(ready))
        loading = living.loading
        if loading and now - self._told_loading_at < LOADING_EVERY_S:
            loading = self._news.view.loading
        else:
            self._told_loading_at = now
        self._tell(
            phase=phase,
            percent=percent,
            error=errors[0] if errors else None,
            heads=ready,
            loading=loading,
        )

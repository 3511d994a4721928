"""How heads and ingresses hear from the controller: one call that returns when something changes,
answered by a Publisher, and made again and again by `follow`.

If the controller is away, everybody goes on with the last view. Knows no Ray: the handle is given.
"""

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

from cluster.placement import ClusterView, Stamp
from cluster.signals import HeadTotals

logger = logging.getLogger(__name__)

HEADS_WANTED, DECIDED_AT = "heads_wanted", "decided_at"
"""What a head records for Serve: the controller's HeadsWanted."""

WATCH_S = 2.0
"""The controller answers after this long even if nothing has changed."""

RETRY_AFTER_S = 1.0


@dataclass(frozen=True)
class HeadReport:
    """What a head replica tells the controller with every call.

    address: where it takes requests, None while it is not ready. error: why it never will be.
    stamp: of the placement it goes by, (0, 0) while it knows none.
    totals: what it has done since its start.
    """

    name: str
    address: str | None = None
    error: str | None = None
    stamp: Stamp = (0, 0)
    totals: HeadTotals = field(default_factory=HeadTotals)


class Publisher:
    """The controller's side: its view, and whoever waits for another. Owned by one event loop."""

    def __init__(self, view: ClusterView) -> None:
        self.view = view
        self._changed = asyncio.Event()

    def publish(self, view: ClusterView) -> None:
        """Make this the view, with a version of its own, and wake everybody who waits, if it
        differs.
        """
        if view != self.view:
            self.view = replace(view, version=self.view.version + 1)
            self._changed.set()
            self._changed = asyncio.Event()

    async def other_than(self, known: int) -> ClusterView:
        """The view, as soon as it is not the `known` version, at the latest after WATCH_S."""
        if self.view.version == known:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), WATCH_S)
        return self.view

    async def until(self, is_so: Callable[[ClusterView], bool]) -> None:
        """Return as soon as that is true of the view."""
        while not is_so(self.view):
            await self._changed.wait()


def as_heads_were_told(context: Any) -> tuple[int, dict[str, Any]]:
    """Serve's policy for the number of heads: the latest decision that one of them has heard of.
    Without any heads, a call that waits for one asks for the first.

    context: Serve's AutoscalingContext; this runs in Serve. A head that the controller does not
    reach goes on recording an older decision.
    """
    recorded = context.raw_metrics
    heard = [
        (decided[-1].value, recorded[HEADS_WANTED][replica][-1].value)
        for replica, decided in recorded.get(DECIDED_AT, {}).items()
        if decided and recorded[HEADS_WANTED].get(replica)
    ]
    if heard:
        return int(max(heard)[1]), {}
    is_called = context.target_num_replicas == 0 and context.total_queued_requests > 0
    return 1 if is_called else context.target_num_replicas, {}


async def follow(
    controller: Any,
    on_view: Callable[[ClusterView], None],
    head: Callable[[], HeadReport | None] = lambda: None,
) -> NoReturn:
    """Call `on_view` with every new view of the cluster, until cancelled.

    controller: handle of the Controller deployment. head: the report of the caller, if it is one.
    Neither callback can end it: an error is logged, and the same view is told again.
    """
    seen: ClusterView | None = None
    known = 0
    is_away = False
    while True:
        try:
            report = head()
            try:
                view = await asyncio.wait_for(controller.watch.remote(known, report), 5 * WATCH_S)
            except Exception as error:
                # Whatever keeps the controller from answering, the plan is the same: ask again.
                if not is_away:
                    logger.warning("the controller does not answer, going on without it: %r", error)
                is_away = True
                await asyncio.sleep(RETRY_AFTER_S)
                continue
            if is_away:
                logger.warning("the controller answers again")
            is_away = False
            known = view.version
            # compared as a whole: a controller that starts anew counts its versions anew
            if view != seen and not _is_older(view, seen):
                on_view(view)
                seen = view
        except Exception:
            # A fault of ours: who stopped following would go by an old view for good.
            logger.exception("the controller's news could not be followed; trying again")
            await asyncio.sleep(RETRY_AFTER_S)


def _is_older(view: ClusterView, seen: ClusterView | None) -> bool:
    """Whether a later controller has spoken already, or this one has started anew and does not know
    yet what it had placed: experts once placed stay so.

    Heads and workers order placements in the same way: one that has been replaced and does not know
    it yet may go on publishing.
    """
    if seen is None or seen.placement is None or view.is_asleep:
        return False
    return view.placement is None or view.placement.stamp < seen.placement.stamp

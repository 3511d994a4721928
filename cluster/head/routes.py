"""Who can be asked for what now: the placement to go by, who is connected, who is banned."""

import logging
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from cluster import rpc
from cluster.head.bans import Bans
from cluster.head.choice import options
from cluster.head.connections import Connections
from cluster.head.feed import PlacementFeed
from cluster.head.stream import WorkerStream
from cluster.placement import Copy, Placement, WorkerInfo
from model.units import Unit

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Routes:
    """Who can be asked, by a placement and the streams there are at one moment."""

    placement: Placement
    streams: Mapping[int, WorkerStream]
    """By worker number, of those that are connected."""
    trusted: frozenset[int]
    """Connected workers that are not banned."""
    _found: dict[tuple[Unit, int | None], list[Copy]] = field(default_factory=dict)

    def options(self, unit: Unit, refused_by: Collection[WorkerInfo] = ()) -> list[Copy]:
        """The ways to have a unit computed; by a banned worker only where nobody else can.

        refused_by: who is not to be asked at all.
        """
        if refused_by:
            workers = self.placement.workers
            others = [number for number in self.streams if workers[number] not in refused_by]
            return self.options_among(unit, others)
        found = self._found.get((unit, None))
        if found is None:
            found = self.options_among(unit, self.trusted)
            found = found or self.options_among(unit, self.streams)
            self._found[unit, None] = found
        return found

    def options_among(self, unit: Unit, workers: Collection[int]) -> list[Copy]:
        """The ways to have a unit computed by some workers."""
        return options(unit, self.placement.table[unit.layer][unit.expert_id], workers)

    def trusted_options(self, unit: Unit, avoid: Collection[WorkerInfo]) -> list[Copy]:
        """The ways to have a unit computed by trusted workers other than these."""
        workers = self.placement.workers
        others = [number for number in self.trusted if workers[number] not in avoid]
        return self.options_among(unit, others)

    def copies(self, unit: Unit) -> tuple[int, list[tuple[WorkerInfo, ...]]]:
        """The epoch, and of each way to have a unit computed the workers."""
        workers = self.placement.workers
        return self.placement.epoch, [
            tuple(workers[number] for number in copy) for copy in self.options(unit)
        ]

    @property
    def num_lacking(self) -> int:
        """Experts that nobody can be asked for."""
        return sum(
            not self.options(Unit(layer, expert_id))
            for layer, experts in enumerate(self.placement.table)
            for expert_id in range(len(experts))
        )

    def can_do_without(self, unit: Unit, worker: int) -> bool:
        """Whether trusted workers could compute the unit's expert without this one."""
        found = self._found.get((unit, worker))
        if found is None:
            whole = Unit(unit.layer, unit.expert_id)
            found = self.options_among(whole, self.trusted - {worker})
            self._found[unit, worker] = found
        return bool(found)


class Directory:
    """Keeps the routes up to date with the feed, the connections and the bans.

    Owned by the engine's thread. A newer placement is gone by as soon as no more experts lack
    somebody to ask than now: its new workers are connected in the background first.
    """

    def __init__(self, feed: PlacementFeed, identity: rpc.Identity, *, drain_s: float) -> None:
        """drain_s: how long the stream of a worker that is left out may still owe answers."""
        self._feed = feed
        self._connections = Connections(identity, feed, drain_s=drain_s)
        self._bans = Bans()
        self._routes: Routes | None = None
        self._seen: tuple[Placement | None, int, frozenset[object]] = (None, -1, frozenset())
        """The newest placement, connections' version and bans that the routes were made for."""

    def __repr__(self) -> str:
        epoch = self.placement and self.placement.epoch
        return f"epoch {epoch}, {self._connections}"

    @property
    def placement(self) -> Placement | None:
        """The one that the next rows go by; None before the first. From any thread.

        An idle engine asks for no routes: then it is the newest, once its workers are connected.
        """
        newest, connected = self._feed.newest, self._connections.streams
        if newest is not None and all(worker in connected for worker in newest.workers):
            return newest
        return self._routes.placement if self._routes else None

    def routes(self) -> Routes | None:
        """As of now; None before a first placement could be gone by."""
        newest, version = self._feed.newest, self._connections.version
        banned = self._bans.active(time.monotonic())
        seen = self._seen
        if newest is seen[0] and version == seen[1] and banned == seen[2]:
            return self._routes
        self._seen = (newest, version, banned)
        current = self._routes.placement if self._routes else None
        if newest is not seen[0] and newest is not None:
            self._connections.want({*newest.workers, *(current.workers if current else ())})
        if current is not None:
            self._routes = self._routes_by(current)
        if newest is not None and newest is not current:
            newer = self._routes_by(newest)
            if newer.num_lacking <= (self._routes.num_lacking if self._routes else 0):
                logger.info("placement %d: %s", newest.epoch, self._connections)
                self._routes = newer
                self._connections.want(newest.workers)
        return self._routes

    def wait_for_routes(self, timeout_s: float) -> bool:
        """Until every expert can be asked for; says whether that is so."""
        with self._feed.changed:
            return self._feed.changed.wait_for(lambda: self.routes() is not None, timeout_s)

    def wait_for_change(self, timeout_s: float) -> None:
        """Until a stream or placement comes or goes that the last routes do not know."""
        seen = self._seen[:2]
        with self._feed.changed:
            self._feed.changed.wait_for(
                lambda: (self._feed.newest, self._connections.version) != seen, timeout_s
            )

    def lose(self, stream: WorkerStream) -> bool:
        """End a stream that has failed and ban its worker; False if that is old news."""
        is_new = self._connections.lose(stream)
        if is_new:
            self.ban(stream.worker, "lost")
        return is_new

    def ban(self, worker: WorkerInfo, reason: str) -> None:
        """Ask a worker for a while only where nobody else can be."""
        ban_s = self._bans.ban(worker, time.monotonic())
        logger.warning("%s: %s, banned for %.1f s", worker.name, reason, ban_s)

    def close(self) -> None:
        """End all streams."""
        self._connections.close()

    def _routes_by(self, placement: Placement) -> Routes:
        known, banned = self._connections.streams, self._seen[2]
        streams = {
            number: known[worker]
            for number, worker in enumerate(placement.workers)
            if worker in known
        }
        trusted = (n for n, stream in streams.items() if stream.worker not in banned)
        return Routes(placement, streams, frozenset(trusted))

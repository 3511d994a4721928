"""What a head hears of placements, from whoever listens to the controller."""

import threading

from cluster.placement import Placement


class PlacementFeed:
    """The newest placement that this head has heard of. Thread-safe.

    Fed by whoever listens to the controller, read by the engine's thread.
    """

    def __init__(self) -> None:
        self.changed = threading.Condition()
        """Notified with every newer placement."""
        self.newest: Placement | None = None

    def put(self, placement: Placement) -> None:
        """Take a placement; one that is older than the one known is ignored."""
        with self.changed:
            if self.newest is None or placement.stamp > self.newest.stamp:
                self.newest = placement
                self.changed.notify_all()

"""Until when a worker lives, and whose it is. Pure: time is an argument, in seconds."""

from cluster.placement import Stamp


class Lease:
    """Owned by the controller of the highest term that has renewed it."""

    def __init__(self, length_s: float, now: float) -> None:
        self.ends = now + length_s
        self.owner = ""
        self._length_s = length_s
        self._stamp: Stamp = (0, 0)
        """The highest that was told by any controller."""

    def renew(self, owner: str, stamp: Stamp, now: float) -> Stamp:
        """Have it last from now on, in the name of a controller that goes by this placement.

        A controller of a lower term than one before it has been replaced and does not know it yet:
        it becomes no owner. Returns the highest stamp that was told before.
        """
        known = self._stamp
        if stamp[0] >= known[0]:
            self.owner = owner
        self._stamp = max(known, stamp)
        self.ends = now + self._length_s
        return known

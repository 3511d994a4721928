"""Workers that failed lately and are not asked for a while. Pure: time is an argument."""

from collections.abc import Hashable
from dataclasses import dataclass, field

FIRST_BAN_S = 0.5
LONGEST_BAN_S = 60.0


@dataclass
class Bans:
    """Who is banned until when, in seconds of any one clock.

    A ban is twice as long as the one before, up to LONGEST_BAN_S; who has given no cause for that
    long starts anew. What a ban means is up to the reader: a banned worker may be the only one.
    """

    _bans: dict[Hashable, tuple[float, float]] = field(default_factory=dict)
    """When each ends, and how long it is."""

    def ban(self, worker: Hashable, now: float) -> float:
        """Ban a worker that has just failed; says for how long."""
        until, length = self._bans.get(worker, (now, 0.0))
        is_new = not length or now - until > LONGEST_BAN_S
        length = FIRST_BAN_S if is_new else min(2 * length, LONGEST_BAN_S)
        self._bans[worker] = (now + length, length)
        return length

    def active(self, now: float) -> frozenset[Hashable]:
        """Who is banned now. Forgets those whose last ban is long over."""
        if not self._bans:
            return frozenset()
        self._bans = {w: ban for w, ban in self._bans.items() if now - ban[0] <= LONGEST_BAN_S}
        return frozenset(worker for worker, (until, _) in self._bans.items() if now < until)

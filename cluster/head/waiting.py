"""Whose turn it is among the sequences that wait. Pure: time is counted in tokens served.

Clients share a head evenly, whatever they ask for: the next to be admitted is a sequence of the
client that has been served the fewest tokens (a virtual token counter: Sheng et al., "Fairness in
serving large language models", 2024). Among the sequences of a client, each step of priority is a
head start of some thousands of tokens, not a wall. And now and then it is the turn of whoever has
waited longest, so that nobody starves, however many new clients appear.
"""

from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Iterator
from itertools import count
from operator import attrgetter

from cluster.head.sequence import Sequence

PRIORITY_TOKENS = 16_384
"""How many tokens a head must serve until a priority one step worse has caught up."""
OLDEST_SHARE = 8
"""One token in this many at most is served out of turn, to whoever has waited longest."""
_PRUNE_FROM = 1_024

_rank = attrgetter("rank")


class WaitingQueue:
    """Sequences that wait for their turn, by client. Owned by the scheduler."""

    def __init__(self) -> None:
        self._sequences: set[Sequence] = set()
        self._waiting: dict[str, list[Sequence]] = {}
        """Of each client that has somebody waiting, by rank."""
        self._served: dict[str, float] = {}
        """Tokens by client. One that comes back is lifted to `_floor`, so that it cannot save up
        the time when it asked for nothing."""
        self._floor = 0.0
        """The tokens of the client whose turn it was last, or of the one that has waited since."""
        self._last_client = ""
        self._total = 0
        self._oldest_from = 0
        """How many tokens must have been served until it is the turn of the oldest."""
        self._arrivals = count()

    def __len__(self) -> int:
        return len(self._sequences)

    def __contains__(self, sequence: Sequence) -> bool:
        return sequence in self._sequences

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence."""
        sequence.arrival = next(self._arrivals)
        sequence.rank = (self._total + sequence.priority * PRIORITY_TOKENS, sequence.arrival)
        if not self._sequences:
            self._floor = max(self._floor, self._served.get(self._last_client, 0))
        self._served[sequence.client] = max(self._served.get(sequence.client, 0), self._floor)
        self.put_back(sequence)
        if len(self._served) >= _PRUNE_FROM:
            self._prune()

    def put_back(self, sequence: Sequence) -> None:
        """Queue a sequence again whose turn came too early: it keeps its rank."""
        self._served.setdefault(sequence.client, self._floor)  # it may have been pruned
        self._sequences.add(sequence)
        insort(self._waiting.setdefault(sequence.client, []), sequence, key=_rank)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence that nobody wants any more."""
        self._sequences.remove(sequence)
        own = self._waiting[sequence.client]
        del own[bisect_left(own, sequence.rank, key=_rank)]
        if not own:
            del self._waiting[sequence.client]

    def take(self, sequence: Sequence) -> None:
        """Remove a sequence because its turn has come."""
        self._floor = max(self._floor, min(self._served[client] for client in self._waiting))
        self._last_client = sequence.client
        if self._is_oldests_turn:
            self._oldest_from = self._total + OLDEST_SHARE * len(sequence.token_ids)
        self.remove(sequence)

    def charge(self, sequence: Sequence, num_tokens: int) -> None:
        """Count tokens that a client is served."""
        self._served[sequence.client] = self._served.get(sequence.client, self._floor) + num_tokens
        self._total += num_tokens

    def in_turn(self) -> Iterator[Sequence]:
        """Those that wait, the next first. The one that came last may be taken, and charged for,
        before the next comes; nothing else may change meanwhile.
        """
        num_passed_over: Counter[str] = Counter()
        while True:
            candidates = [
                own[num_passed_over[client]]
                for client, own in self._waiting.items()
                if num_passed_over[client] < len(own)
            ]
            if not candidates:
                return
            if self._is_oldests_turn:
                sequence = min(candidates, key=lambda s: s.arrival)
            else:
                sequence = min(candidates, key=lambda s: (self._served[s.client], s.rank))
            yield sequence
            if sequence in self:
                num_passed_over[sequence.client] += 1

    @property
    def _is_oldests_turn(self) -> bool:
        return self._total >= self._oldest_from

    def _prune(self) -> None:
        """Forget the clients that would be lifted anyway when they come back."""
        self._served = {
            client: num_tokens
            for client, num_tokens in self._served.items()
            if num_tokens > self._floor or client in self._waiting
        }

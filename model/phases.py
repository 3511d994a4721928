"""Which part of a step runs now, told to whoever asks where its time goes. No clock here.

Told from one thread, at each change: what follows belongs to the part, until the next is entered.
"""

from typing import Literal, Protocol

Phase = Literal[
    "inputs",  # block tables, rotary tables, embeddings
    "attention",  # norm, projections, cache and attention of a layer
    "routing",  # norm and router of a layer
    "experts",  # computing experts, here or at the workers
    "packing",  # splitting rows by worker, serialising them, and handing them to gRPC's threads
    "transfer",  # waiting for sums longer than the slowest worker computes
    "unpacking",  # adding the workers' sums up
    "logits",  # final norm and LM head
    "outside",  # everything that is not the decoder's
]


class Phases(Protocol):
    """Whoever wants to know."""

    def enter(self, phase: Phase) -> None:
        """This part begins."""
        ...

    def reveal(self, seconds: float, was: Phase, really: Phase) -> None:
        """So much of the time that was told to be one part was another."""
        ...


class Unwatched:
    """Nobody does."""

    def enter(self, phase: Phase) -> None: ...

    def reveal(self, seconds: float, was: Phase, really: Phase) -> None: ...


UNWATCHED = Unwatched()

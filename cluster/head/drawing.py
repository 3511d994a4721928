"""From a step's logits to new tokens: one for each sequence that samples, more where drafts hold.

Every token is drawn as if there were no drafts: from its own logits, seed and position. A draft
holds when it is the token that was drawn; then the next draw's logits are there already. So
speculation changes when tokens come, never which.

Shape suffixes: L rows whose logits were wanted, V vocabulary.
"""

from collections.abc import Sequence as Many
from dataclasses import dataclass, field
from itertools import accumulate

from torch import Tensor

from cluster.head.classification import Classification
from cluster.head.scheduler import Chunk
from model.sampler import History, sample


@dataclass(frozen=True)
class Drawn:
    """The new tokens of one chunk, which its sequence has been given too."""

    chunk: Chunk
    token_ids: list[int] = field(default_factory=list)
    scores: tuple[float, ...] = ()
    """Of a classification, which gets no tokens."""


def draw(chunks: Many[Chunk], logits_LV: Tensor) -> list[Drawn]:
    """New tokens for each chunk that samples, at least one; appends them to the sequences.

    logits_LV: of each chunk's last rows, in order.
    """
    firsts = _first_rows(chunks)
    drawn = [Drawn(chunk) for chunk in chunks if chunk.samples]
    alive = [(one, firsts[one.chunk]) for one in drawn]
    while alive:
        rows = [row for _, row in alive]
        sequences = [one.chunk.sequence for one, _ in alive]
        token_ids = sample(
            logits_LV if len(rows) == len(logits_LV) else logits_LV[rows],
            [sequence.params for sequence in sequences],
            [len(sequence.token_ids) for sequence in sequences],
            [History(sequence.token_ids, len(sequence.prompt_ids)) for sequence in sequences],
        )
        still_alive = []
        for (one, row), token_id in zip(alive, token_ids, strict=True):
            one.token_ids.append(token_id)
            one.chunk.sequence.append(token_id)
            if _holds(one) and not one.chunk.sequence.finish:
                still_alive.append((one, row + 1))
        alive = still_alive
    return drawn


def score(chunks: Many[Chunk], logits_LV: Tensor) -> list[Drawn]:
    """The scores of each prompt that is computed, which its sequence is given too."""
    drawn = []
    for chunk, scores in zip((c for c in chunks if c.samples), logits_LV.tolist(), strict=True):
        assert isinstance(chunk.sequence, Classification), f"{chunk} asks a classifier for tokens"
        chunk.sequence.scores = tuple(scores)
        drawn.append(Drawn(chunk, scores=tuple(scores)))
    return drawn


def broken_chunks(chunks: Many[Chunk], logits_LV: Tensor) -> list[Chunk]:
    """Those with logits that are not numbers."""
    # the greatest tells: it is NaN or infinite where any is
    is_broken: list[bool] = (~logits_LV.amax(dim=-1).isfinite()).tolist()
    if not any(is_broken):
        return []
    firsts = _first_rows(chunks)
    return [
        chunk
        for chunk in chunks
        if any(is_broken[firsts[chunk] : firsts[chunk] + chunk.num_logits])
    ]


def _first_rows(chunks: Many[Chunk]) -> dict[Chunk, int]:
    ends = accumulate((chunk.num_logits for chunk in chunks), initial=0)
    return dict(zip(chunks, ends, strict=False))


def _holds(one: Drawn) -> bool:
    """Whether the token drawn last is what the draft said."""
    drafts, num_drawn = one.chunk.drafts, len(one.token_ids)
    return num_drawn <= len(drafts) and drafts[num_drawn - 1] == one.token_ids[-1]

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
from cluster.head.masks import GrammarMasks
from cluster.head.scheduler import Chunk
from model.errors import GrammarError
from model.logprobs import prompt_logprobs
from model.sampler import NOTHING_ALLOWED, sample
from model.sampling_params import TokenLogprobs


@dataclass(eq=False)
class Drawn:
    """What a step brought to one chunk; its sequence has been given it too."""

    chunk: Chunk
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    """Of token_ids, where they are asked for."""
    scores: tuple[float, ...] = ()
    """Of a classification, which gets no tokens."""
    error: str | None = None
    """Why no token can be drawn."""
    param: str | None = None
    """The sampling parameter at fault, where no other head could draw one either."""


def draw(
    chunks: Many[Chunk], logits_LV: Tensor, grammars: GrammarMasks | None = None
) -> list[Drawn]:
    """New tokens for each chunk that samples, at least one; appends them to the sequences.

    logits_LV: of each chunk's last rows, in order.
    grammars:  needed where a sequence has one.
    """
    firsts = _first_rows(chunks)
    drawn = [Drawn(chunk) for chunk in chunks if chunk.samples]
    alive = [
        (one, firsts[one.chunk] + one.chunk.num_logits - 1 - len(one.chunk.drafts)) for one in drawn
    ]
    while alive:
        rows = [row for _, row in alive]
        sequences = [one.chunk.sequence for one, _ in alive]
        masks, problems = grammars.of(sequences) if grammars else ({}, {})
        sampled = sample(
            logits_LV if len(rows) == len(logits_LV) else logits_LV[rows],
            [sequence.row for sequence in sequences],
            masks,
        )
        still_alive = []
        for i, (one, row) in enumerate(alive):
            token_id = sampled.token_ids[i]
            if i in problems:
                one.error = problems[i]
                continue
            if token_id is None:
                one.error = NOTHING_ALLOWED
                one.param = "bad_words" if sequences[i].params.bad_words else "allowed_token_ids"
                continue
            _give(one, token_id, sampled.logprobs[i])
            if one.error is None and _holds(one) and not sequences[i].finish:
                still_alive.append((one, row + 1))
        alive = still_alive
    return drawn


def _give(one: Drawn, token_id: int, logprobs: TokenLogprobs | None) -> None:
    try:
        one.chunk.sequence.append(token_id)
    except GrammarError as error:
        one.error = str(error)
        return
    one.token_ids.append(token_id)
    if logprobs:
        one.logprobs.append(logprobs)


def keep_prompt_logprobs(chunks: Many[Chunk], logits_LV: Tensor) -> None:
    """Give each sequence that wants them the log-probabilities of the prompt's tokens that follow
    those which this step has computed.
    """
    firsts = _first_rows(chunks)
    for chunk in chunks:
        sequence = chunk.sequence
        num_top = sequence.params.prompt_logprobs
        if num_top is None or not chunk.computes_prompt_logprobs:
            continue
        # one that was preempted computes some of them again
        done = 1 + len(sequence.prompt_logprobs)
        start = sequence.num_computed
        end = min(start + chunk.num_tokens, len(sequence.prompt_ids) - 1)
        next_ids = sequence.prompt_ids[done : end + 1]
        first = firsts[chunk] + done - 1 - start
        sequence.prompt_logprobs += prompt_logprobs(
            logits_LV[first : first + len(next_ids)], next_ids, num_top
        )


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

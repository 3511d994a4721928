"""Beam search: the few likeliest completions of a prompt, found by following several at once.

`BeamSearch` decides, from logits alone; `run` moves the keys and values and calls the decoder. The
rules (what counts as finished, when to give up, length penalty) and thus the ids are those of
transformers' `generate`.

Shape suffixes: B running beams, V vocabulary.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from model.batch import Span, build_batch
from model.blocks import BlockPool, BlockTable
from model.decoder import Decoder
from model.errors import SamplingError
from model.experts import Experts
from model.penalties import process
from model.row import Row
from model.sampler import NOTHING_ALLOWED
from model.sampling_params import SamplingParams

_BLOCK_SIZE = 16


@dataclass(frozen=True, kw_only=True)
class BeamParams:
    """How wide and how long to search.

    num_beams:      completions followed at once.
    length_penalty: a finished completion's score is its log-probability over length to this power;
                    above 0 favours long ones.
    early_stopping: when to stop, once num_beams completions are finished: True, at once; False,
                    when the best running one, as long as it is now, scores no better; "never",
                    when it could not score better at any length.
    """

    num_beams: int = 4
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False

    def __post_init__(self) -> None:
        if self.num_beams < 1:
            raise SamplingError("num_beams", f"num_beams must be at least 1, not {self.num_beams}")
        if not -10.0 <= self.length_penalty <= 10.0:
            raise SamplingError(
                "length_penalty", f"length_penalty {self.length_penalty} is not in [-10, 10]"
            )
        if self.early_stopping not in (True, False, "never"):
            raise SamplingError(
                "early_stopping",
                f'early_stopping must be true, false or "never", not {self.early_stopping!r}',
            )


@dataclass(frozen=True)
class Beam:
    """One completion. score: its log-probability; once finished, with the length penalty."""

    token_ids: tuple[int, ...]
    """New tokens, end token included."""
    score: float


def _never(token_ids: tuple[int, ...]) -> bool:
    return False


class BeamSearch:
    """The search for one prompt. Knows no cache: each step it is told what may come next.

    ends: whether a completion is finished by what it says, besides stop_token_ids and max_tokens.
    """

    def __init__(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        beams: BeamParams,
        ends: Callable[[tuple[int, ...]], bool] = _never,
    ) -> None:
        """Raises SamplingError if the parameters ask for sampling."""
        if params.temperature > 0:
            raise SamplingError("temperature", "beam search does not sample: temperature must be 0")
        self.prompt_ids = list(prompt_ids)
        self.params = params
        self.beams = beams
        self.running = [Beam((), 0.0)]
        self.finished: list[Beam] = []
        """Best first, num_beams at most."""
        self.is_done = False
        self._ends = ends

    def __repr__(self) -> str:
        return f"BeamSearch({len(self.running)} running, {len(self.finished)} finished)"

    def advance(self, logits_BV: Tensor) -> list[int]:
        """Extend the running beams by one token each.

        logits_BV: one row per running beam. Returns from which of them each new one descends.
        Raises SamplingError where the parameters forbid every token.
        """
        vocab_size = logits_BV.shape[1]
        scores_BV = self._log_probabilities(logits_BV) + logits_BV.new_tensor(
            [[beam.score] for beam in self.running]
        )
        # every beam could end with every stop token, and num_beams must be left to go on
        num_candidates = self.beams.num_beams * max(2, 1 + len(self.params.stop_token_ids))
        best = scores_BV.flatten().topk(min(num_candidates, scores_BV.numel()))
        length = len(self.running[0].token_ids) + 1
        is_last = length == self.params.max_tokens
        final_scores: list[float] = (best.values / length**self.beams.length_penalty).tolist()

        running: list[Beam] = []
        parents: list[int] = []
        ranked = zip(best.indices.tolist(), best.values.tolist(), final_scores, strict=True)
        for rank, (index, score, final_score) in enumerate(ranked):
            if score == -math.inf:
                break  # forbidden, as all that follow
            parent, token_id = divmod(index, vocab_size)
            token_ids = (*self.running[parent].token_ids, token_id)
            has_ended = token_id in self.params.stop_token_ids or self._ends(token_ids)
            if has_ended or is_last:
                # what ends below the best num_beams is forgotten
                if rank < self.beams.num_beams:
                    self.finished.append(Beam(token_ids, final_score))
            elif len(running) < self.beams.num_beams:
                running.append(Beam(token_ids, score))
                parents.append(parent)
        self.finished.sort(key=lambda beam: -beam.score)
        del self.finished[self.beams.num_beams :]
        self.running = running
        if not running and not self.finished:
            raise SamplingError("bad_words", NOTHING_ALLOWED)
        self.is_done = is_last or not running or self._cannot_improve(length)
        return parents

    def _log_probabilities(self, logits_BV: Tensor) -> Tensor:
        rows = [
            Row(self.params, [*self.prompt_ids, *beam.token_ids], len(self.prompt_ids))
            for beam in self.running
        ]
        return process(logits_BV.log_softmax(dim=-1), rows)

    def _cannot_improve(self, length: int) -> bool:
        if len(self.finished) < self.beams.num_beams:
            return False
        if self.beams.early_stopping is True:
            return True
        penalty = self.beams.length_penalty
        if self.beams.early_stopping == "never" and penalty > 0:
            length = self.params.max_tokens
        best_possible: float = self.running[0].score / length**penalty
        return best_possible <= self.finished[-1].score


class _Tables:
    """The block tables of one search's running beams.

    Beams share the blocks of the tokens that they have in common. Only a block that two of them
    are going to write to is copied, when they part.
    """

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool
        self.of_beam = [BlockTable(pool)]

    def fork(self, parents: Sequence[int], num_computed: int) -> list[tuple[int, int]]:
        """Give each new beam the table of its parent; returns (from, to) of blocks to be copied.

        A beam's first child takes its table over, so that beams which all go on copy nothing.
        num_computed: tokens whose keys and values are there, in each beam.
        """
        for beam, table in enumerate(self.of_beam):
            if beam not in parents:
                table.release()
        num_full = num_computed // self._pool.block_size
        tables: list[BlockTable] = []
        copies: list[tuple[int, int]] = []
        for beam, parent in enumerate(parents):
            table = self.of_beam[parent]
            if parent in parents[:beam]:
                table = BlockTable(self._pool, table.blocks[:num_full])
                table.grow(num_computed)
                copies += zip(
                    self.of_beam[parent].blocks[num_full:], table.blocks[num_full:], strict=True
                )
            tables.append(table)
        self.of_beam = tables
        return copies


def run(decoder: Decoder, experts: Experts, searches: Sequence[BeamSearch]) -> None:
    """Carry every search to its end; all of them share each forward pass."""
    pool = BlockPool(
        num_blocks=max(1, sum(_num_blocks(search) for search in searches)), block_size=_BLOCK_SIZE
    )
    cache = decoder.new_cache(num_blocks=pool.num_blocks, block_size=_BLOCK_SIZE)
    active = [(search, _Tables(pool)) for search in searches]
    while active:
        spans = [
            _next_span(search, beam, table)
            for search, tables in active
            for beam, table in zip(search.running, tables.of_beam, strict=True)
        ]
        batch = build_batch(spans, block_size=_BLOCK_SIZE, device=decoder.device)
        logits = decoder.forward(batch, cache, experts)
        rows = logits.split([len(search.running) for search, _ in active])
        copies: list[tuple[int, int]] = []
        for (search, tables), logits_BV in zip(active, rows, strict=True):
            num_computed = len(search.prompt_ids) + len(search.running[0].token_ids)
            copies += tables.fork(search.advance(logits_BV), num_computed)
        cache.copy(
            [slot for source, _ in copies for slot in _slots(source)],
            [slot for _, target in copies for slot in _slots(target)],
        )
        active = [(search, tables) for search, tables in active if not search.is_done]


def _slots(block: int) -> range:
    return range(block * _BLOCK_SIZE, (block + 1) * _BLOCK_SIZE)


def _num_blocks(search: BeamSearch) -> int:
    """What its beams hold at most: the prompt's full blocks together, the rest each its own."""
    num_prompt_tokens = len(search.prompt_ids)
    shared = num_prompt_tokens // _BLOCK_SIZE
    whole = -(-(num_prompt_tokens + search.params.max_tokens) // _BLOCK_SIZE)
    return shared + search.beams.num_beams * (whole - shared)


def _next_span(search: BeamSearch, beam: Beam, table: BlockTable) -> Span:
    known = len(search.prompt_ids) + len(beam.token_ids)
    has_room = table.grow(known)
    assert has_room, f"{search} needs more blocks than reckoned"
    if not beam.token_ids:
        return Span(search.prompt_ids, 0, table.blocks)
    return Span(beam.token_ids[-1:], known - 1, table.blocks)

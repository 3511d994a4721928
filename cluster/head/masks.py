"""Which tokens the grammars of a step's sequences allow, computed beside the forward pass."""

from collections.abc import Sequence as Many
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from cluster.head.sequence import Sequence
from model.errors import GrammarError
from model.grammar import GrammarCompiler
from model.penalties import Masks


@dataclass(frozen=True)
class _Begun:
    """Masks in the making: row i is that of sequence i."""

    sequences: list[Sequence]
    masks_SW: Tensor
    filled: Future[dict[int, GrammarError]]


class GrammarMasks:
    """Computes masks ahead on a thread of its own. Owned by the engine's thread.

    Sequences whose masks have begun must be left alone until they are asked for.
    """

    def __init__(self, compiler: GrammarCompiler) -> None:
        self._compiler = compiler
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="grammar masks")
        self._begun: _Begun | None = None

    def begin(self, sequences: Many[Sequence]) -> None:
        """Begin with the masks of those of these sequences that have a grammar."""
        self._begun = self._begin(sequences)

    def of(self, sequences: Many[Sequence]) -> tuple[Masks, dict[int, str]]:
        """Masks of those of these that have a grammar, and why some have none; both by index.

        Those that were begun are taken as they are, once; others are computed now.
        """
        wanted = {s: i for i, s in enumerate(sequences) if s.matcher}
        begun, self._begun = self._begun, None
        if begun is None or not wanted.keys() <= set(begun.sequences):
            begun = self._begin(sequences)
        if begun is None:
            return {}, {}
        problems = begun.filled.result()
        masks, reasons = {}, {}
        for row, sequence in enumerate(begun.sequences):
            if sequence in wanted and row in problems:
                reasons[wanted[sequence]] = str(problems[row])
            elif sequence in wanted:
                masks[wanted[sequence]] = begun.masks_SW[row].numpy()
        return masks, reasons

    def _begin(self, sequences: Many[Sequence]) -> _Begun | None:
        having = [sequence for sequence in sequences if sequence.matcher]
        if not having:
            return None
        masks_SW = torch.empty((len(having), self._compiler.num_words), dtype=torch.int32)
        matchers = {i: s.matcher for i, s in enumerate(having) if s.matcher}
        return _Begun(
            having, masks_SW, self._executor.submit(self._compiler.fill, matchers, masks_SW)
        )

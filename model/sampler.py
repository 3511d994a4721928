"""Choosing the next token of each sequence from its logits.

A choice depends on the sequence's own parameters, logits and past, never on what else is in the
batch; a draw's random number on (seed, choice, position) alone.

Shape suffixes: S sequences, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model.draw import draw
from model.logprobs import token_logprobs
from model.penalties import Masks, process
from model.row import Row
from model.sampling_params import TokenLogprobs

NOTHING_ALLOWED = "allowed_token_ids and bad_words leave no token that could come next"
"""What to say where no token can be chosen."""


@dataclass(frozen=True)
class Sampled:
    """What `sample` chose, row by row.

    token_ids: None where everything is forbidden, so that no token can be chosen.
    logprobs:  of the rows whose parameters ask for them; None for the others.
    """

    token_ids: list[int | None]
    logprobs: list[TokenLogprobs | None]


def sample(logits_SV: Tensor, rows: Sequence[Row], masks: Masks | None = None) -> Sampled:
    """The next token of each row. Appends nothing: whoever owns the rows' token ids does.

    logits_SV: float32, without NaN; left as they are.
    rows:      their parameters have passed `check_vocabulary`, and their ids are in vocabulary.
    masks:     of some rows (by index) the tokens that a grammar allows; see `penalties.Masks`.
    """
    shaped_SV = process(logits_SV, rows, masks)
    token_ids: list[int | None] = list(_argmax(shaped_SV))
    if shaped_SV is not logits_SV:
        can_choose = (shaped_SV.amax(dim=1) > -torch.inf).tolist()
        token_ids = [t if can else None for t, can in zip(token_ids, can_choose, strict=True)]
    drawn = [
        i for i, row in enumerate(rows) if row.params.temperature > 0 and token_ids[i] is not None
    ]
    if drawn:
        drawn_ids = draw(
            shaped_SV if len(drawn) == len(rows) else shaped_SV[drawn],
            [rows[i].params for i in drawn],
            [rows[i].position for i in drawn],
        )
        for i, token_id in zip(drawn, drawn_ids, strict=True):
            token_ids[i] = token_id
    return Sampled(token_ids, _logprobs(logits_SV, rows, token_ids))


def _argmax(logits_SV: Tensor) -> list[int]:
    """The first greatest of each row."""
    if logits_SV.is_cpu:
        # numpy's is 20 times as fast as torch's on a CPU
        token_ids: list[int] = logits_SV.numpy().argmax(axis=1).tolist()
    else:
        token_ids = logits_SV.argmax(dim=1).tolist()
    return token_ids


def _logprobs(
    logits_SV: Tensor, rows: Sequence[Row], token_ids: Sequence[int | None]
) -> list[TokenLogprobs | None]:
    logprobs: list[TokenLogprobs | None] = [None] * len(rows)
    asked = [
        (i, token_id, row.params.logprobs)
        for i, (row, token_id) in enumerate(zip(rows, token_ids, strict=True))
        if row.params.logprobs is not None and token_id is not None
    ]
    if asked:
        indices, own_ids, nums_top = zip(*asked, strict=True)
        asked_SV = logits_SV if len(asked) == len(rows) else logits_SV[list(indices)]
        for i, found in zip(indices, token_logprobs(asked_SV, own_ids, nums_top), strict=True):
            logprobs[i] = found
    return logprobs

"""What changes logits before the temperature: what is forbidden, biases, penalties.

Their order is documented at SamplingParams. All work on the few entries concerned, not on the
vocabulary, but for masks.

Shape suffixes: S sequences, V vocabulary, R some of the sequences, W words of 32 bits, L entries of
all sequences laid flat.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.row import Row

Masks = Mapping[int, NDArray[np.int32]]
"""Of some rows of a call the tokens that a grammar allows, packed as in `row.pack_mask`."""


def process(logits_SV: Tensor, rows: Sequence[Row], masks: Masks | None = None) -> Tensor:
    """Logits (or log-probabilities) after everything that comes before the temperature.

    What is forbidden is -inf. Returns the tensor it was given where nothing is asked for, and a new
    one elsewhere.
    """
    masks = masks or {}
    shaped = [i for i, row in enumerate(rows) if not row.is_plain or i in masks]
    if not shaped:
        return logits_SV
    logits_SV = logits_SV.clone(memory_format=torch.contiguous_format)
    _mask(logits_SV, rows, shaped, masks)
    _forbid(logits_SV, [(i, rows[i].completing_ids()) for i in shaped if rows[i].params.bad_words])
    _hold_back_stops(logits_SV, rows, shaped, masks)
    _add_biases(logits_SV, rows, [i for i in shaped if rows[i].params.logit_bias])
    _penalise(logits_SV, rows, [i for i in shaped if rows[i].has_penalties])
    return logits_SV


def _mask(logits_SV: Tensor, rows: Sequence[Row], shaped: list[int], masks: Masks) -> None:
    """Forbid what the masks or allowed_token_ids do not allow."""
    vocab_size = logits_SV.shape[1]
    masked: list[int] = []
    words: list[NDArray[np.int32]] = []
    for i in shaped:
        own = [masks[i]] if i in masks else []
        if rows[i].params.allowed_token_ids is not None:
            own.append(rows[i].allowed_words(vocab_size))
        if own:
            masked.append(i)
            words.append(np.bitwise_and.reduce(own))
    if not masked:
        return
    bytes_RW = np.stack(words).astype("<i4", copy=False).view(np.uint8)
    bits_RV = np.unpackbits(bytes_RW, axis=1, count=vocab_size, bitorder="little")
    is_forbidden_RV = torch.from_numpy(bits_RV == 0).to(logits_SV.device)
    if len(masked) == len(logits_SV):
        logits_SV.masked_fill_(is_forbidden_RV, -torch.inf)
    else:
        logits_SV[masked] = logits_SV[masked].masked_fill_(is_forbidden_RV, -torch.inf)


def _forbid(logits_SV: Tensor, banned: Sequence[tuple[int, Sequence[int]]]) -> None:
    """Forbid the ids of each (row, ids)."""
    indices = [(i, token_id) for i, token_ids in banned for token_id in token_ids]
    if indices:
        rows_L, ids_L = zip(*indices, strict=True)
        logits_SV[list(rows_L), list(ids_L)] = -torch.inf


def _hold_back_stops(
    logits_SV: Tensor, rows: Sequence[Row], shaped: list[int], masks: Masks
) -> None:
    """Forbid the stop tokens of those that have not emitted min_tokens."""
    vocab_size = logits_SV.shape[1]
    stops = {
        i: [token_id for token_id in rows[i].forbidden_stops() if token_id < vocab_size]
        for i in shaped
    }
    # a grammar that has come to its end allows nothing but a stop token
    for i, token_ids in list(stops.items()):
        p = rows[i].params
        if token_ids and (i in masks or p.allowed_token_ids is not None or p.bad_words):
            others_V = logits_SV[i].clone()
            others_V[token_ids] = -torch.inf
            if others_V.max() == -torch.inf:
                del stops[i]
    _forbid(logits_SV, list(stops.items()))


def _add_biases(logits_SV: Tensor, rows: Sequence[Row], biased: list[int]) -> None:
    if not biased:
        return
    pairs = [rows[i].biases() for i in biased]
    at_L = _entries(logits_SV, biased, [ids for ids, _ in pairs])
    biases_L = torch.from_numpy(np.concatenate([values for _, values in pairs]))
    logits_SV.view(-1).index_add_(0, at_L, biases_L.to(logits_SV))


def _penalise(logits_SV: Tensor, rows: Sequence[Row], penalised: list[int]) -> None:
    """Repetition, frequency and presence penalties, in this order."""
    if not penalised:
        return
    tallies = [rows[i].tally() for i in penalised]
    lengths = [len(ids) for ids, _ in tallies]

    def column(values: NDArray[np.float64]) -> Tensor:
        return torch.from_numpy(values).to(logits_SV)

    def spread(field: str) -> Tensor:
        return column(
            np.repeat([float(getattr(rows[i].params, field)) for i in penalised], lengths)
        )

    at_L = _entries(logits_SV, penalised, [ids for ids, _ in tallies])
    counts_L = column(np.concatenate([counts for _, counts in tallies]))
    factors_L = spread("repetition_penalty")
    values_L = logits_SV.view(-1).index_select(0, at_L)
    values_L = torch.where(values_L < 0, values_L * factors_L, values_L / factors_L)
    values_L -= spread("frequency_penalty") * counts_L
    values_L -= spread("presence_penalty") * (counts_L > 0)
    logits_SV.view(-1).index_copy_(0, at_L, values_L)


def _entries(logits_SV: Tensor, rows: Sequence[int], ids: Sequence[NDArray[np.int64]]) -> Tensor:
    """Where every id of every row stands in the flat logits, (L,) int64."""
    vocab_size = logits_SV.shape[1]
    ids_L = np.concatenate(ids)
    assert (ids_L < vocab_size).all(), "an id out of vocabulary would change another row's logits"
    starts_L = np.repeat(np.array(rows) * vocab_size, [len(own) for own in ids])
    return torch.from_numpy(starts_L + ids_L).to(logits_SV.device)

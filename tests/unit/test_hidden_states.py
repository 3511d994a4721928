"""A pass over any Mixtral gives transformers' logits, hidden states, router logits and losses."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model import Mixtral
from model.batch import Span, build_batch
from model.decoder import Trace
from model.errors import PromptError
from model.loss import IGNORED
from tests.fakes import small_config
from tests.reference import configs, load_ours, pad_left, save_reference

TOLERANCE = 1e-5
"""Of losses, in float32. Measured: 8e-7."""
ROW_TOLERANCE = 1e-4
"""Of single logits and states, of up to 5. Measured: 3e-6; random weights may do worse."""


def difference(actual: torch.Tensor, expected: torch.Tensor) -> float:
    assert actual.shape == expected.shape
    return float((actual - expected).abs().max())


def outputs_of(reference: Any, ids: torch.Tensor, **arguments: Any) -> Any:
    with torch.inference_mode():
        return reference(ids, output_hidden_states=True, output_router_logits=True, **arguments)


@settings(max_examples=10)
@given(config=configs(), seed=st.integers(0, 2**32 - 1))
def test_any_mixtral_equals_transformers(
    config: dict[str, Any], seed: int, mixtral: Mixtral, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("reference")
    reference = save_reference(folder, config, seed=seed)
    ours = load_ours(folder, mixtral)
    rng = random.Random(seed)
    ids = rng.choices(range(config["vocab_size"]), k=14)
    labels = [rng.choice([token_id, IGNORED]) for token_id in ids[:-1]] + ids[-1:]

    expected = outputs_of(reference, torch.tensor([ids]), labels=torch.tensor([labels]))
    actual = ours.forward([ids], [labels], output_hidden_states=True, output_router_logits=True)
    assert difference(actual.logits_TV, expected.logits[0]) <= ROW_TOLERANCE
    assert actual.loss is not None
    assert difference(actual.loss, expected.loss) <= TOLERANCE
    assert actual.aux_loss is not None
    assert difference(actual.aux_loss, expected.aux_loss) <= TOLERANCE
    for mine, its in zip(actual.hidden_states or (), expected.hidden_states, strict=True):
        assert difference(mine, its[0]) <= ROW_TOLERANCE
    for mine, its in zip(actual.router_logits or (), expected.router_logits, strict=True):
        assert difference(mine, its) <= ROW_TOLERANCE

    for max_chunk in (5, 1):  # chunked prefill, token by token
        assert difference(in_chunks(ours, ids, max_chunk, rng), expected.logits[0]) <= ROW_TOLERANCE


def in_chunks(ours: Mixtral, ids: list[int], max_chunk: int, rng: random.Random) -> torch.Tensor:
    """Logits of every position, computed a few tokens at a time."""
    cache = ours.decoder.new_cache(num_blocks=5, block_size=4)
    logits = []
    start = 0
    while start < len(ids):
        new = ids[start : start + rng.randint(1, max_chunk)]
        span = Span(new, start, [3, 0, 4, 1], num_logits=len(new))
        batch = build_batch([span], block_size=4, device=ours.decoder.device)
        logits.append(ours.decoder.forward(batch, cache, ours.experts))
        start += len(new)
    return torch.cat(logits)


def test_a_padded_batch_gives_what_transformers_gives_where_it_is_not_padding(
    mixtral: Mixtral, tmp_path: Path
) -> None:
    reference = save_reference(tmp_path, small_config(num_hidden_layers=2))
    ours = load_ours(tmp_path, mixtral)
    sequences = [[1, 5, 9, 7, 3], [1, 4], [1, 8, 8, 2, 6, 7, 23, 11, 12]]
    ids, mask = pad_left(sequences)
    labels = ids.masked_fill(mask == 0, IGNORED)
    labels[0, -2] = IGNORED
    expected = outputs_of(reference, ids, attention_mask=mask, labels=labels)

    actual = ours.forward(ids, labels, attention_mask=mask, output_router_logits=True)
    assert difference(actual.logits_TV, expected.logits[mask == 1]) <= ROW_TOLERANCE
    assert actual.aux_loss is not None
    assert difference(actual.aux_loss, expected.aux_loss) <= TOLERANCE

    # not the loss: there a row's last padding predicts its first token, which ours has nothing for
    rows = [outputs_of(reference, torch.tensor([own])) for own in sequences]
    losses = [
        torch.nn.functional.cross_entropy(row.logits[0, :-1], own[1:], reduction="none")
        for row, own in zip(rows, map(torch.tensor, sequences), strict=True)
    ]
    counted = [label[m == 1][1:] != IGNORED for label, m in zip(labels, mask, strict=True)]
    mean = torch.cat([loss[c] for loss, c in zip(losses, counted, strict=True)]).mean()
    plain = ours.forward(ids, labels, attention_mask=mask)
    assert plain.loss is not None
    assert difference(plain.loss, mean) <= TOLERANCE


def test_only_what_is_asked_for_comes_back(mixtral: Mixtral) -> None:
    ids = [1, 70, 300]
    plain = mixtral.forward([ids])
    assert plain.logits_TV.equal(mixtral.logits(ids))
    assert plain.loss is plain.aux_loss is plain.hidden_states is plain.router_logits is None

    states = mixtral.forward([ids], output_hidden_states=True)
    assert states.hidden_states is not None
    assert len(states.hidden_states) == mixtral.config.num_hidden_layers + 1
    assert states.router_logits is None

    losses = mixtral.forward([ids], [ids], output_router_logits=True)
    bare = mixtral.forward([ids], [ids])
    assert losses.loss is not None
    assert losses.aux_loss is not None
    assert bare.loss is not None
    # 0.02: of the tiny checkpoint's config.json
    assert torch.allclose(losses.loss, bare.loss + 0.02 * losses.aux_loss)


def test_a_trace_holds_all_tokens_of_the_step(mixtral: Mixtral) -> None:
    spans = [Span([1, 5, 9], 0, [1], num_logits=1), Span([1, 7], 0, [0], num_logits=0)]
    batch = build_batch(spans, block_size=4, device=mixtral.decoder.device)
    cache = mixtral.decoder.new_cache(num_blocks=2, block_size=4)
    trace = Trace()
    logits = mixtral.decoder.forward(batch, cache, mixtral.experts, trace)
    assert {len(states) for states in trace.hidden_states} == {5}
    assert {len(rows) for rows in trace.router_logits} == {5}
    from_states = trace.hidden_states[-1][2] @ mixtral.decoder.weights.lm_head_VD.T
    assert torch.allclose(logits[0], from_states, atol=1e-4)


def test_a_sequence_that_cannot_be_computed_is_refused(mixtral: Mixtral) -> None:
    with pytest.raises(PromptError, match="holds no tokens"):
        mixtral.forward([[1], []])
    with pytest.raises(PromptError, match="shape"):
        mixtral.forward([[1, 2]], attention_mask=[[1]])
    with pytest.raises(PromptError, match="1 labels"):
        mixtral.forward([[1, 2]], [[1]])
    with pytest.raises(PromptError, match="label 2048"):
        mixtral.forward([[1, 2]], [[1, 2_048]])

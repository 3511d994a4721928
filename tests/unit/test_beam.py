"""Beam search finds what transformers' finds."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model import Mixtral
from model.beam import Beam, BeamParams, BeamSearch
from model.chat import Message
from model.errors import PromptError, SamplingError
from model.sampling_params import SamplingParams
from model.stop import TextStream
from tests.reference import configs, load_ours, pad_left, save_reference

GREEDY = SamplingParams(temperature=0.0, max_tokens=30, stop_token_ids=(2,))
SHORT = replace(GREEDY, max_tokens=16)


@pytest.fixture(scope="module")
def prompts(mixtral: Mixtral) -> list[list[int]]:
    # of 2 to 20 tokens, so that prompts end before, at and behind the edge of a block; the last
    # one's beams end by themselves
    texts = ["Once upon a time, there was a little", "Tom"]
    question = [Message("user", "What does a cow say?")]
    encoded = [mixtral.tokenizer.encode_prompt(text) for text in texts]
    return [*encoded, (encoded[0] * 3)[:16], mixtral.chat.encode(question)]


def transformers_beams(
    reference: Any, prompts: list[list[int]], params: SamplingParams, beams: BeamParams
) -> tuple[list[list[int]], list[float]]:
    """Ids of all beams of all prompts, with what fills them up, and their scores."""
    ids, mask = pad_left(prompts)
    generated = reference.generate(
        ids,
        attention_mask=mask,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=list(params.stop_token_ids),
        max_new_tokens=params.max_tokens,
        min_new_tokens=params.min_tokens,
        repetition_penalty=params.repetition_penalty,
        bad_words_ids=[list(word) for word in params.bad_words] or None,
        num_beams=beams.num_beams,
        num_return_sequences=beams.num_beams,
        length_penalty=beams.length_penalty,
        early_stopping=beams.early_stopping,
        return_dict_in_generate=True,
        output_scores=True,
    )
    sequences = generated.sequences[:, ids.shape[1] :].tolist()
    return sequences, generated.sequences_scores.tolist()


def assert_same_beams(
    found: list[list[Beam]], expected: tuple[list[list[int]], list[float]], stop: tuple[int, ...]
) -> None:
    flat = [beam for beams in found for beam in beams]
    for beam, filled, score in zip(flat, *expected, strict=True):
        length = len(beam.token_ids)
        assert list(beam.token_ids) == filled[:length]
        assert set(filled[length:]) <= {0, *stop}  # what transformers fills up with
        assert beam.score == pytest.approx(score, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize(
    ("params", "beams"),
    [
        (GREEDY, BeamParams(num_beams=2)),
        (GREEDY, BeamParams(num_beams=4)),
        (SHORT, BeamParams(num_beams=4, length_penalty=2.0, early_stopping="never")),
        (SHORT, BeamParams(num_beams=3, length_penalty=-1.0, early_stopping=True)),
        (
            SamplingParams(
                temperature=0.0,
                max_tokens=16,
                min_tokens=9,
                repetition_penalty=1.3,
                stop_token_ids=(2, 5),
                bad_words=((266,), (1995, 326)),
            ),
            BeamParams(num_beams=3, length_penalty=0.0),
        ),
    ],
    ids=lambda value: str(value) if isinstance(value, BeamParams) else f"{value.max_tokens}",
)
def test_beams_are_transformers_in_a_padded_batch(
    mixtral: Mixtral,
    reference: Any,
    prompts: list[list[int]],
    params: SamplingParams,
    beams: BeamParams,
) -> None:
    expected = transformers_beams(reference, prompts, params, beams)
    ids, mask = pad_left(prompts)
    each = [params] * len(prompts)
    found = mixtral.beam_search_ids(ids, each, beams, attention_mask=mask)
    assert_same_beams(found, expected, params.stop_token_ids)
    # and without padding, alone
    alone = mixtral.beam_search_ids(prompts[-1:], [params], beams)[0]
    assert [beam.token_ids for beam in alone] == [beam.token_ids for beam in found[-1]]


def test_beams_hold_nothing_that_is_forbidden(mixtral: Mixtral, prompts: list[list[int]]) -> None:
    # fewer tokens than beams, so that at first some beams have no descendant
    params = replace(SHORT, allowed_token_ids=(5, 9), bad_words=((5, 5), (9, 9)), max_tokens=3)
    found = mixtral.beam_search_ids(prompts[:1], [params], BeamParams(num_beams=4))[0]
    assert {beam.token_ids for beam in found} == {(5, 9, 5), (9, 5, 9)}
    stuck = replace(params, bad_words=((5,), (9,)))
    with pytest.raises(SamplingError, match="leave no token"):
        mixtral.beam_search_ids(prompts[:1], [stuck], BeamParams(num_beams=4))


@settings(max_examples=4)
@given(config=configs(), seed=st.integers(0, 2**32 - 1), num_beams=st.integers(2, 4))
def test_any_mixtrals_beams_are_transformers(
    config: dict[str, Any],
    seed: int,
    num_beams: int,
    mixtral: Mixtral,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    # with a shorter window what comes next hangs on few tokens, so that beams which hold the same
    # pieces in another order are equally likely, and rounding decides between them
    config["sliding_window"] = config["sliding_window"] and max(7, config["sliding_window"])
    folder = tmp_path_factory.mktemp("reference")
    reference = save_reference(folder, config, seed=seed)
    ours = load_ours(folder, mixtral)
    prompts = [[1, 5, 9, 7, 3, 22, 13, 4, 11], [1]]
    params = SamplingParams(temperature=0.0, max_tokens=10, stop_token_ids=(2,))
    beams = BeamParams(num_beams=num_beams)
    expected = transformers_beams(reference, prompts, params, beams)
    found = ours.beam_search_ids(prompts, [params] * 2, beams)
    assert_same_beams(found, expected, params.stop_token_ids)


def test_one_beam_is_greedy(mixtral: Mixtral, prompts: list[list[int]]) -> None:
    each = [GREEDY] * len(prompts)
    found = mixtral.beam_search_ids(prompts, each, BeamParams(num_beams=1))
    assert [list(beams[0].token_ids) for beams in found] == mixtral.generate_ids(prompts, each)


def test_a_search_wide_enough_finds_the_best_of_all_completions() -> None:
    torch.manual_seed(0)
    first_V, second_VV = torch.randn(6).log_softmax(-1), torch.randn(6, 6).log_softmax(-1)
    params = SamplingParams(temperature=0.0, max_tokens=2)
    search = BeamSearch([1], params, BeamParams(num_beams=6, length_penalty=0.0))
    assert search.advance(first_V[None]) == [0] * 6
    lasts = [beam.token_ids[-1] for beam in search.running]
    search.advance(second_VV[lasts])
    assert search.is_done
    every = (first_V[:, None] + second_VV).flatten().topk(6)
    assert [divmod(i, 6) for i in every.indices.tolist()] == [b.token_ids for b in search.finished]
    assert [b.score for b in search.finished] == pytest.approx(every.values.tolist())


def test_texts_of_beams_come_best_first_and_without_the_stop_string(mixtral: Mixtral) -> None:
    fields: dict[str, Any] = {"max_tokens": 20, "num_beams": 3}
    prompt = "Once upon a time"
    params = SamplingParams(temperature=0.0, max_tokens=20, stop_token_ids=(2,))
    ids = mixtral.tokenizer.encode_prompt(prompt)
    found = mixtral.beam_search_ids([ids], [params], BeamParams(num_beams=3))[0]
    texts = mixtral.generate(prompt, num_return_sequences=3, **fields)
    whole = [mixtral.tokenizer.decode(ids + list(beam.token_ids)) for beam in found]
    assert [prompt + text for text in texts] == whole
    assert mixtral.generate(prompt, **fields) == texts[0]

    told: list[tuple[int, str]] = []
    mixtral.generate(
        prompt, num_return_sequences=3, on_text=lambda *piece: told.append(piece), **fields
    )
    assert told == list(enumerate(texts))

    stopped = mixtral.generate(prompt, num_return_sequences=3, stop="little", **fields)
    assert len(stopped) == 3
    assert not any("little" in text for text in stopped)


def test_each_candidates_text_is_read_a_token_at_a_time(
    mixtral: Mixtral, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of it each time would cost the more the longer it is."""
    num_pushed, push = 0, TextStream.push

    def counted(text: TextStream, token_id: int) -> str:
        nonlocal num_pushed
        num_pushed += 1
        return push(text, token_id)

    monkeypatch.setattr(TextStream, "push", counted)
    fields: dict[str, Any] = {"max_tokens": 40, "num_beams": 2, "stop": "no such text"}
    mixtral.generate("Once upon a time", **fields)
    num_candidates = 2 * 2
    assert num_pushed <= 40 * (num_candidates + 1)


def test_what_cannot_be_searched_is_refused_by_name(mixtral: Mixtral) -> None:
    for fields in (
        {"num_beams": 0},
        {"length_penalty": float("nan")},
        {"early_stopping": "soon"},
    ):
        with pytest.raises(SamplingError, match=next(iter(fields))):
            BeamParams(**fields)  # type: ignore[arg-type]
    with pytest.raises(SamplingError, match="temperature must be 0"):
        mixtral.generate("Tom", num_beams=2, temperature=0.5)
    with pytest.raises(SamplingError, match=r"num_return_sequences \(3\) must not exceed"):
        mixtral.generate("Tom", num_beams=2, num_return_sequences=3)
    with pytest.raises(SamplingError, match="want num_beams > 1"):
        mixtral.generate("Tom", early_stopping=True)
    with pytest.raises(PromptError, match="holds no tokens"):
        mixtral.beam_search_ids([[]], [GREEDY], BeamParams())

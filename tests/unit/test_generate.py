"""The library's front door: one process, whole texts, repeatable."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model import Mixtral
from model.chat import Message
from model.errors import ConfigError, ModelError, PromptError, SamplingError
from model.sampling_params import SamplingParams
from tests.reference import configs, load_ours, pad_left, save_reference

PROMPT = "Once upon a time, there was a little"
GREEDY = SamplingParams(temperature=0.0, max_tokens=12)
SAMPLED = SamplingParams(temperature=1.0, max_tokens=12, seed=3)


@pytest.fixture(scope="module")
def prompts(mixtral: Mixtral) -> list[list[int]]:
    texts = [PROMPT, "Tom", "The cat saw a big tree and", "Lily was happy. She"]
    return [mixtral.tokenizer.encode_prompt(text) for text in texts]


# --- against transformers ---


def transformers_greedy(
    reference: Any, prompts: list[list[int]], params: SamplingParams
) -> list[list[int]]:
    """New ids of a left-padded batch, cut behind each row's stop token."""
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
        sequence_bias={(token_id,): bias for token_id, bias in params.logit_bias} or None,
    )
    outputs = []
    for row in generated[:, ids.shape[1] :].tolist():
        ends = [at for at, token_id in enumerate(row) if token_id in params.stop_token_ids]
        outputs.append(row[: ends[0] + 1] if ends else row)
    return outputs


@pytest.mark.parametrize(
    "changes",
    [
        {"max_tokens": 100},
        {"max_tokens": 22, "repetition_penalty": 1.3, "min_tokens": 18},
        {"max_tokens": 22, "repetition_penalty": 0.9, "stop_token_ids": (2, 13, 263)},
        {"max_tokens": 22, "bad_words": ((266,), (1995, 326)), "logit_bias": ((5, -9.0),)},
    ],
    ids=str,
)
def test_greedy_ids_are_transformers_in_a_padded_batch(
    mixtral: Mixtral, reference: Any, prompts: list[list[int]], changes: dict[str, Any]
) -> None:
    question = mixtral.chat.encode([Message("user", "What does a cow say?")])  # ends by itself
    batch = [*prompts, question]
    params = replace(GREEDY, **({"stop_token_ids": (2,)} | changes))
    expected = transformers_greedy(reference, batch, params)
    ids, mask = pad_left(batch)
    each = [params] * len(batch)
    assert mixtral.generate_ids(ids, each, attention_mask=mask) == expected
    if params.max_tokens < 100:
        assert mixtral.generate_ids(batch, each) == expected


@settings(max_examples=4)
@given(config=configs(), seed=st.integers(0, 2**32 - 1))
def test_any_mixtrals_greedy_ids_are_transformers(
    config: dict[str, Any], seed: int, mixtral: Mixtral, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("reference")
    reference = save_reference(folder, config, seed=seed)
    # its cache breaks for windows of one token: a slice of the last 0 tokens is all of them
    reference.generation_config.use_cache = False
    batch = [[1, 5, 9, 7, 3, 22, 13, 4, 11], [1], [1, 8, 8]]
    params = replace(GREEDY, max_tokens=40)
    expected = transformers_greedy(reference, batch, params)
    assert load_ours(folder, mixtral).generate_ids(batch, [params] * 3) == expected


# --- text ---


@pytest.mark.parametrize("prompt", [PROMPT, "", "Tom said: 🦙 "])
@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_the_prompt_and_the_streamed_pieces_join_to_one_text(
    mixtral: Mixtral, prompt: str, temperature: float
) -> None:
    fields = {"max_tokens": 20, "temperature": temperature, "seed": 5}
    pieces = list(mixtral.stream(prompt, **fields))
    prompt_ids = mixtral.tokenizer.encode_prompt(prompt)
    params = SamplingParams(**fields, stop_token_ids=mixtral.config.eos_token_ids)
    emitted = mixtral.generate_ids([prompt_ids], [params])[0]
    assert prompt + "".join(pieces) == mixtral.tokenizer.decode(prompt_ids + emitted)
    assert "".join(pieces) == mixtral.generate(prompt, **fields)
    assert len(pieces) >= len(emitted)


def test_a_text_cut_within_a_character_ends_in_a_replacement_character(mixtral: Mixtral) -> None:
    # hot enough to draw any piece, so that one of these draws is the first byte of a character
    wild = [SamplingParams(temperature=100.0, max_tokens=1, choice=c) for c in range(300)]
    drawn = mixtral.generate_ids([mixtral.tokenizer.encode_prompt("Tom")] * 300, wild)
    first_bytes = [mixtral.tokenizer.token_bytes(ids[0]) for ids in drawn]
    choice = next(c for c, data in enumerate(first_bytes) if len(data) == 1 and data >= b"\xc3")
    text = mixtral.generate("Tom", temperature=100.0, max_tokens=1, choice=choice)
    assert text == "\ufffd"


def test_the_tiny_checkpoint_answers_and_then_stops(mixtral: Mixtral) -> None:
    question = [Message("user", "What does a cow say?")]
    answer = mixtral.answer(question, max_tokens=60)
    assert "moo" in answer.lower()
    emitted = mixtral.generate_ids(
        [mixtral.chat.encode(question)],
        [SamplingParams(temperature=0.0, max_tokens=60, stop_token_ids=(2,))],
    )[0]
    assert emitted[-1] == mixtral.tokenizer.eos_id
    assert answer == mixtral.tokenizer.decode(emitted)


# --- where it ends ---


def test_a_stop_token_ends_it_and_is_the_last(mixtral: Mixtral, prompts: list[list[int]]) -> None:
    free = mixtral.generate_ids([prompts[0]], [GREEDY])[0]
    assert len(free) == 12
    stop = free[7]
    stopped = mixtral.generate_ids([prompts[0]], [replace(GREEDY, stop_token_ids=(stop,))])[0]
    assert stopped == free[: free.index(stop) + 1]


def test_each_prompt_ends_by_itself(mixtral: Mixtral, prompts: list[list[int]]) -> None:
    lengths = [1, 9, 4, 12]
    params = [replace(GREEDY, max_tokens=length) for length in lengths]
    assert [len(ids) for ids in mixtral.generate_ids(prompts, params)] == lengths


def test_tokens_are_told_as_they_come(mixtral: Mixtral, prompts: list[list[int]]) -> None:
    told: list[list[int]] = [[] for _ in prompts]
    outputs = mixtral.generate_ids(
        prompts, [SAMPLED] * len(prompts), lambda index, token_id: told[index].append(token_id)
    )
    assert told == outputs


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_stop_string_ends_the_text_and_is_not_part_of_it(
    mixtral: Mixtral, temperature: float
) -> None:
    fields: dict[str, Any] = {"max_tokens": 20, "temperature": temperature, "seed": 1}
    whole = mixtral.generate(PROMPT, **fields)
    for begin in (0, 9, 21):
        stop = whole[begin : begin + 4]
        expected = whole[: whole.index(stop)]
        assert mixtral.generate(PROMPT, stop=["zzz", stop], **fields) == expected
        assert "".join(mixtral.stream(PROMPT, stop=stop, **fields)) == expected
    # a beginning of a stop string that never ends is text
    assert mixtral.generate(PROMPT, stop=whole[-3:] + "zzz", **fields) == whole


def test_a_stop_string_ends_the_computing_too(mixtral: Mixtral) -> None:
    whole = mixtral.generate(PROMPT, max_tokens=20)
    pieces = list(mixtral.stream(PROMPT, max_tokens=60, stop=whole[10:14]))
    assert len(pieces) < 16


def test_an_answer_stops_too(mixtral: Mixtral) -> None:
    question = [Message("user", "What does a cow say?")]
    answer = mixtral.answer(question, max_tokens=60)
    assert mixtral.answer(question, max_tokens=60, stop=answer[4:6]) == answer[:4]


def test_no_stop_token_comes_before_min_tokens(mixtral: Mixtral) -> None:
    question = mixtral.chat.encode([Message("user", "What does a cow say?")])
    params = replace(GREEDY, max_tokens=30, stop_token_ids=(2,))
    length = len(mixtral.generate_ids([question], [params])[0])
    assert length < 20
    for min_tokens in (length - 1, length, 20):
        ids = mixtral.generate_ids([question], [replace(params, min_tokens=min_tokens)])[0]
        assert len(ids) >= max(min_tokens, length)
        assert 2 not in ids[: min_tokens - 1]


# --- whose output it is ---


def test_the_texts_of_a_call_are_the_choices_of_its_seed(mixtral: Mixtral) -> None:
    fields: dict[str, Any] = {"max_tokens": 12, "temperature": 2.0, "seed": 7}
    told = [""] * 3

    def tell(index: int, piece: str) -> None:
        told[index] += piece

    texts = mixtral.generate(PROMPT, num_return_sequences=3, on_text=tell, **fields)
    assert texts == told
    assert len(set(texts)) == 3
    assert texts == [mixtral.generate(PROMPT, choice=choice, **fields) for choice in range(3)]
    ids = mixtral.tokenizer.encode_prompt(PROMPT)
    params = SamplingParams(**fields, stop_token_ids=mixtral.config.eos_token_ids)
    outputs = mixtral.generate_ids([ids], [params], num_return_sequences=3)
    assert [mixtral.tokenizer.decode(ids + own) for own in outputs] == [PROMPT + t for t in texts]


def test_several_outputs_of_a_prompt_stand_together(
    mixtral: Mixtral, prompts: list[list[int]]
) -> None:
    each = [replace(SAMPLED, seed=seed) for seed in range(len(prompts))]
    together = mixtral.generate_ids(prompts, each, num_return_sequences=2)
    for index, (ids, params) in enumerate(zip(prompts, each, strict=True)):
        own = mixtral.generate_ids([ids, ids], [params, replace(params, choice=1)])
        assert together[2 * index : 2 * index + 2] == own


@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_a_prompt_among_others_gets_what_it_gets_alone(
    mixtral: Mixtral, prompts: list[list[int]], params: SamplingParams
) -> None:
    each = [replace(params, seed=seed, max_tokens=8 + seed) for seed in range(len(prompts))]
    together = mixtral.generate_ids(prompts, each)
    alone = [mixtral.generate_ids([ids], [p])[0] for ids, p in zip(prompts, each, strict=True)]
    assert together == alone


def test_the_seed_and_the_choice_decide_a_sampled_text(
    mixtral: Mixtral, prompts: list[list[int]]
) -> None:
    params = [SAMPLED, SAMPLED, replace(SAMPLED, seed=4), replace(SAMPLED, choice=1)]
    same, again, other_seed, other_choice = mixtral.generate_ids([prompts[0]] * 4, params)
    assert same == again == mixtral.generate_ids([prompts[0]], [SAMPLED])[0]
    assert other_seed != same
    assert other_choice not in (same, other_seed)


@pytest.mark.parametrize("num_emitted", [1, 5, 11])
@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_a_replayed_request_goes_on_as_if_never_cut(
    mixtral: Mixtral, prompts: list[list[int]], params: SamplingParams, num_emitted: int
) -> None:
    whole = mixtral.generate_ids([prompts[0]], [params])[0]
    rest = replace(params, max_tokens=12 - num_emitted)
    resumed = mixtral.generate_ids([prompts[0] + whole[:num_emitted]], [rest])[0]
    assert whole[:num_emitted] + resumed == whole


# --- what is refused ---


def test_a_prompt_may_fill_the_context_and_no_more(mixtral: Mixtral) -> None:
    context = mixtral.config.max_position_embeddings
    one_more = replace(GREEDY, max_tokens=1)
    assert len(mixtral.generate_ids([[1] * (context - 1)], [one_more])[0]) == 1
    with pytest.raises(PromptError, match=f"{context} prompt tokens and 1 new ones"):
        mixtral.generate_ids([[1] * context], [one_more])
    with pytest.raises(PromptError, match="exceed the context of 512"):
        mixtral.logits([1] * (context + 1))


@pytest.mark.parametrize(
    ("prompt", "message"),
    [([], "holds no tokens"), ([1, 2_048], "token id 2048"), ([1, -1], "token id -1")],
)
def test_a_prompt_that_cannot_be_computed_is_refused(
    mixtral: Mixtral, prompt: list[int], message: str
) -> None:
    with pytest.raises(PromptError, match=message):
        mixtral.generate_ids([[1], prompt], [GREEDY, GREEDY])
    with pytest.raises(PromptError, match=message):
        mixtral.logits(prompt)


def test_what_cannot_be_generated_is_refused_by_name(mixtral: Mixtral) -> None:
    for field, value in (
        ("num_return_sequences", 0),
        ("num_beams", 0),
        ("stop", ""),
        ("stop", ["a", ""]),
        ("min_tokens", 17),
        ("typical_p", 0.0),
        ("logit_bias", ((2048, 1.0),)),
        ("logprobs", 3),
        ("bad_words", tuple((token_id,) for token_id in range(2048))),
    ):
        with pytest.raises(SamplingError, match=field.replace("stop", "stop string")):
            mixtral.generate(PROMPT, **{field: value})  # type: ignore[call-overload]
    with pytest.raises(PromptError, match="does not have the shape"):
        mixtral.generate_ids([[1, 2]], [GREEDY], attention_mask=[[1, 1, 1]])
    with pytest.raises(PromptError, match="holds no tokens"):
        mixtral.generate_ids([[1, 2]], [GREEDY], attention_mask=[[0, 0]])


def test_no_prompts_give_no_outputs(mixtral: Mixtral) -> None:
    assert mixtral.generate_ids([], []) == []


# --- loading ---


def test_the_checkpoints_own_dtype_is_the_default(tiny_folder: Path) -> None:
    assert Mixtral.load().decoder.dtype == torch.bfloat16
    assert Mixtral.load(str(tiny_folder), dtype="float16").decoder.dtype == torch.float16


def test_loading_counts_every_byte(tiny_folder: Path) -> None:
    arrived: list[int] = []
    Mixtral.load(tiny_folder, on_bytes=arrived.append)
    header_and_weights = (tiny_folder / "model.safetensors").stat().st_size
    assert header_and_weights * 0.99 < sum(arrived) < header_and_weights


def test_an_unknown_dtype_or_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="dtype 'int4' is not one of"):
        Mixtral.load(dtype="int4")
    with pytest.raises(ModelError, match="does not exist"):
        Mixtral.load(tmp_path)

"""What requests ask of the head reaches it as it was asked, and what nobody can do is refused."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from cluster.head.engine import Event
from cluster.head.messages import to_sequence, to_spec, to_step_events
from cluster.head.sequence import Sequence
from cluster.ingress.clients import client_key
from cluster.ingress.journal import Journal, News
from cluster.ingress.messages import to_news, to_submit
from cluster.schema import (
    MAX_BAD_WORDS,
    MAX_CHOICES,
    MAX_LOGIT_BIASES,
    MAX_PRIORITY,
    CompletionRequest,
)
from model.grammar_spec import GrammarSpec
from model.sampling_params import SamplingParams, TokenLogprobs
from protos import head_pb2
from tests.api_fakes import (
    BOTH,
    CHAT,
    CLASSIFY,
    COMPLETIONS,
    EOS,
    LETTER_C,
    USER,
    VOCAB_SIZE,
    Api,
    assert_error,
    body_for,
    logprobs_of,
)


@pytest.fixture
def api(tiny_folder: Path) -> Api:
    return Api(tiny_folder)


# --- from the body to the journal ---


@BOTH
def test_journals_carry_every_sampling_parameter(api: Api, path: str) -> None:
    same = {
        "presence_penalty": 0.5,
        "frequency_penalty": -1.5,
        "min_p": 0.1,
        "typical_p": 0.9,
        "repetition_penalty": 1.2,
        "min_tokens": 3,
        "seed": -3,
        "prompt_logprobs": 2,
    }
    body = {"logit_bias": {"7": -100, "0": 1.5}, "allowed_token_ids": [9, 5, 9], "n": 2}
    api.post(path, body_for(path, **same, **body))
    for choice, journal in enumerate(api.engine.journals):
        params = journal.params
        assert {name: getattr(params, name) for name in same} == same
        assert dict(params.logit_bias) == {7: -100.0, 0: 1.5}
        assert params.allowed_token_ids == (5, 9)
        assert params.choice == choice


@BOTH
def test_journals_carry_what_concerns_the_queue_and_the_cache(api: Api, path: str) -> None:
    asked = {"priority": -7, "cache_salt": "secret", "num_speculative_tokens": 4}
    api.post(path, body_for(path, **asked))
    (journal,) = api.engine.journals
    assert (journal.priority, journal.cache_salt, journal.num_drafts) == (-7, "secret", 4)
    assert "secret" not in repr(journal)


def test_guesses_ahead_are_the_servers_unless_a_request_says(api: Api) -> None:
    api.configure(num_drafts=3)
    api.post(COMPLETIONS, {"prompt": "a"})
    api.post(COMPLETIONS, {"prompt": "a", "num_speculative_tokens": 0})
    assert [journal.num_drafts for journal in api.engine.journals] == [3, 0]


@pytest.mark.parametrize(
    ("path", "body", "num_logprobs", "num_of_prompt"),
    [
        (COMPLETIONS, {}, None, None),
        (COMPLETIONS, {"logprobs": 0}, 0, None),
        (COMPLETIONS, {"logprobs": 20}, 20, None),
        (COMPLETIONS, {"logprobs": False}, None, None),
        (COMPLETIONS, {"logprobs": 2, "echo": True}, 2, 2),
        (COMPLETIONS, {"logprobs": 2, "echo": True, "prompt_logprobs": 5}, 2, 5),
        (COMPLETIONS, {"logprobs": 5, "echo": True, "prompt_logprobs": 2}, 5, 5),
        (COMPLETIONS, {"echo": True}, None, None),
        (COMPLETIONS, {"prompt_logprobs": 0}, None, 0),
        (COMPLETIONS, {"best_of": 3}, 0, None),
        (COMPLETIONS, {"best_of": 3, "logprobs": 4}, 4, None),
        (COMPLETIONS, {"best_of": 2, "n": 2}, None, None),
        (CHAT, {"logprobs": False, "top_logprobs": 0}, None, None),
        (CHAT, {"logprobs": True}, 0, None),
        (CHAT, {"logprobs": True, "top_logprobs": None}, 0, None),
        (CHAT, {"logprobs": True, "top_logprobs": 20}, 20, None),
    ],
)
def test_heads_are_asked_for_the_log_probabilities_that_are_needed(
    api: Api, path: str, body: dict[str, Any], num_logprobs: int | None, num_of_prompt: int | None
) -> None:
    assert api.post(path, body_for(path, **body)).status_code == 200
    for journal in api.engine.journals:
        assert journal.params.logprobs == num_logprobs
        assert journal.params.prompt_logprobs == num_of_prompt


def test_a_bad_word_is_bad_where_a_word_begins_and_within_one(api: Api) -> None:
    tokenizer = api.tokenizer
    api.post(COMPLETIONS, {"prompt": "a", "bad_words": [" wind", "wind", "é"]})
    words = api.engine.journals[0].params.bad_words
    assert len(set(words)) == len(words)
    texts = [b"".join(tokenizer.token_bytes(i) for i in ids).decode() for ids in words]
    assert sorted(texts) == sorted([" wind", "wind", " é", "é"])


@BOTH
@pytest.mark.parametrize(
    ("form", "kind"),
    [
        ({"response_format": {"type": "json_object"}}, "json_object"),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "schema": {"type": "object"}},
                }
            },
            "json_schema",
        ),
        ({"structured_outputs": {"choice": ["yes", "no"]}}, "choice"),
        ({"response_format": {"type": "text"}, "structured_outputs": {"regex": "a+"}}, "regex"),
    ],
)
def test_journals_carry_the_form_of_the_answer(
    api: Api, path: str, form: dict[str, Any], kind: str
) -> None:
    assert api.post(path, body_for(path, **form)).status_code == 200
    (journal,) = api.engine.journals
    assert journal.grammar is not None
    assert journal.grammar.kind == kind
    assert journal.grammar.continues_text == (path == COMPLETIONS)


def test_named_stop_tokens_come_after_the_models_own_and_none_twice(api: Api) -> None:
    api.post(COMPLETIONS, {"prompt": "a", "stop_token_ids": [9, EOS, 9]})
    assert api.engine.journals[0].params.stop_token_ids == (EOS, 9)


# --- refusals ---

WRONG: list[tuple[str, dict[str, Any], str]] = [
    *((path, {"presence_penalty": 2.1}, "presence_penalty") for path in (COMPLETIONS, CHAT)),
    (COMPLETIONS, {"frequency_penalty": -2.1}, "frequency_penalty"),
    (CHAT, {"logit_bias": {"99999999": 1}}, "logit_bias"),
    (COMPLETIONS, {"logit_bias": {str(VOCAB_SIZE): 1}}, "logit_bias"),
    (CHAT, {"logit_bias": {"abc": 1}}, "logit_bias"),
    (COMPLETIONS, {"logit_bias": {"-1": 1}}, "logit_bias"),
    (COMPLETIONS, {"logit_bias": {"01": 1}}, "logit_bias"),
    (COMPLETIONS, {"logit_bias": {"9" * 5_000: 1}}, "logit_bias"),
    (COMPLETIONS, {"logit_bias": {"1": 100.5}}, "logit_bias"),
    (COMPLETIONS, {"logit_bias": {"1": True}}, "logit_bias"),
    (COMPLETIONS, {"logit_bias": [1]}, "logit_bias"),
    (COMPLETIONS, {"logit_bias": {str(i): 0 for i in range(MAX_LOGIT_BIASES + 1)}}, "logit_bias"),
    (COMPLETIONS, {"bad_words": "wind"}, "bad_words"),
    (COMPLETIONS, {"bad_words": [""]}, "bad_words"),
    (COMPLETIONS, {"bad_words": ["  "]}, "bad_words"),
    (COMPLETIONS, {"bad_words": ["a"] * (MAX_BAD_WORDS + 1)}, "bad_words"),
    (COMPLETIONS, {"allowed_token_ids": []}, "allowed_token_ids"),
    (COMPLETIONS, {"allowed_token_ids": [VOCAB_SIZE]}, "allowed_token_ids"),
    (COMPLETIONS, {"stop_token_ids": [VOCAB_SIZE]}, "stop_token_ids"),
    (COMPLETIONS, {"min_tokens": 21}, "min_tokens"),
    (COMPLETIONS, {"logprobs": 21}, "logprobs"),
    (COMPLETIONS, {"logprobs": -1}, "logprobs"),
    (COMPLETIONS, {"logprobs": True}, "logprobs"),
    (CHAT, {"logprobs": 5}, "logprobs"),
    (CHAT, {"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    (CHAT, {"top_logprobs": 2}, "top_logprobs"),
    (CHAT, {"logprobs": False, "top_logprobs": 2}, "top_logprobs"),
    (COMPLETIONS, {"prompt_logprobs": -1}, "prompt_logprobs"),
    (COMPLETIONS, {"prompt_logprobs": 21}, "prompt_logprobs"),
    (COMPLETIONS, {"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
    (CHAT, {"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
    (COMPLETIONS, {"max_tokens": 0, "echo": False}, "max_tokens"),
    (CHAT, {"max_tokens": 0}, "max_tokens"),
    (COMPLETIONS, {"best_of": 2, "n": 3}, "best_of"),
    (COMPLETIONS, {"best_of": 2, "stream": True}, "best_of"),
    (COMPLETIONS, {"best_of": MAX_CHOICES + 1}, "best_of"),
    (COMPLETIONS, {"prompt": ["a", "b"], "best_of": MAX_CHOICES}, "best_of"),
    (COMPLETIONS, {"priority": MAX_PRIORITY + 1}, "priority"),
    (COMPLETIONS, {"cache_salt": 5}, "cache_salt"),
    (COMPLETIONS, {"num_speculative_tokens": 17}, "num_speculative_tokens"),
    (CHAT, {"seed": 2**63}, "seed"),
    (CHAT, {"seed": -(2**63) - 1}, "seed"),
    (CHAT, {"response_format": {"type": "json_schema"}}, "response_format"),
    (CHAT, {"response_format": {"type": "sound"}}, "response_format"),
    (CHAT, {"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs"),
    (CHAT, {"structured_outputs": {"regex": "a" * 9_000}}, "structured_outputs"),
    (CHAT, {"structured_outputs": {"invented": 1}}, "structured_outputs"),
]


@pytest.mark.parametrize(("path", "fields", "param"), WRONG)
def test_a_wrong_parameter_is_a_400_that_names_it(
    api: Api, path: str, fields: dict[str, Any], param: str
) -> None:
    assert_error(api.post(path, body_for(path, **fields)), 400, param=param)
    assert api.engine.journals == []


@pytest.mark.parametrize(
    "fields",
    [
        {"logit_bias": {f"x{i}": 1 for i in range(5_000)}},
        {"bad_words": [""] * 5_000},
        {"allowed_token_ids": [-1] * 5_000},
    ],
)
def test_checking_a_long_wrong_parameter_stops_soon(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as refused:
        CompletionRequest.model_validate({"prompt": "a", **fields})
    assert refused.value.error_count() == 1


# --- from the journal over the wire and back ---

TOKEN = st.integers(0, VOCAB_SIZE - 1)
OPTIONAL_NUMBER = st.none() | st.integers(0, 20)
SINGLE = st.floats(-100, 0, width=32)
PARAMS = st.builds(
    SamplingParams,
    max_tokens=st.integers(4, 100),
    min_tokens=st.integers(0, 4),
    allowed_token_ids=st.none() | st.lists(TOKEN, min_size=1, max_size=3).map(tuple),
    bad_words=st.lists(st.lists(TOKEN, min_size=1, max_size=3).map(tuple), max_size=3).map(tuple),
    logit_bias=st.dictionaries(TOKEN, st.floats(-100, 100), max_size=3).map(
        lambda biases: tuple(biases.items())
    ),
    repetition_penalty=st.floats(0.01, 100),
    frequency_penalty=st.floats(-2, 2),
    presence_penalty=st.floats(-2, 2),
    temperature=st.floats(0, 2),
    top_k=st.integers(0, 2**31),
    top_p=st.floats(0.1, 1),
    min_p=st.floats(0, 1),
    typical_p=st.floats(0.1, 1),
    seed=st.integers(-(2**63), 2**63 - 1),
    choice=st.integers(0, 127),
    stop_token_ids=st.lists(TOKEN, max_size=3).map(tuple),
    logprobs=OPTIONAL_NUMBER,
    prompt_logprobs=OPTIONAL_NUMBER,
)
JOURNALS = st.builds(
    Journal,
    prompt_ids=st.lists(TOKEN, min_size=1, max_size=5).map(tuple),
    params=PARAMS,
    client=st.text(max_size=5),
    priority=st.integers(-MAX_PRIORITY, MAX_PRIORITY),
    cache_salt=st.text(max_size=5),
    grammar=st.none() | st.just(GrammarSpec("regex", "é+", continues_text=True)),
    num_drafts=st.integers(0, 16),
)


def arrive(journal: Journal) -> tuple[Sequence, GrammarSpec | None]:
    """What a head makes of a journal."""
    message = to_submit(1, journal).SerializeToString()
    submit = head_pb2.HeadRequest.FromString(message).submit
    return to_sequence(submit), to_spec(submit)


@given(journal=JOURNALS)
def test_a_head_reads_what_the_journal_says(journal: Journal) -> None:
    sequence, spec = arrive(journal)
    assert tuple(sequence.prompt_ids) == journal.prompt_ids
    assert sequence.params == journal.params
    assert (sequence.client, sequence.priority) == (journal.client, journal.priority)
    assert sequence.cache_salt == journal.cache_salt
    assert spec == journal.grammar
    assert (sequence.drafter is not None) == (journal.num_drafts > 0)


@given(journal=JOURNALS, num_emitted=st.integers(1, 3))
def test_another_head_is_asked_only_for_what_is_left(journal: Journal, num_emitted: int) -> None:
    journal.record(News(tuple(range(num_emitted))))
    params = arrive(journal)[0].params
    asked = journal.params
    assert params.max_tokens == asked.max_tokens - num_emitted
    assert params.min_tokens == max(0, asked.min_tokens - num_emitted)
    assert params.prompt_logprobs is None
    for field in ("seed", "choice", "logprobs", "stop_token_ids", "logit_bias", "temperature"):
        assert getattr(params, field) == getattr(asked, field)


LOGPROBS = st.builds(
    TokenLogprobs,
    logprob=SINGLE,
    rank=st.integers(1, VOCAB_SIZE),
    top_ids=st.just((5, 9)),
    top_logprobs=st.tuples(SINGLE, st.just(float("-inf"))),
)


@given(
    logprobs=st.lists(LOGPROBS, max_size=3).map(tuple),
    prompt_logprobs=st.lists(LOGPROBS, max_size=3).map(tuple),
    num_reused=st.none() | st.integers(0, 9),
    finish=st.sampled_from([None, "stop", "length"]),
)
def test_news_of_a_head_arrive_as_they_were(
    logprobs: tuple[TokenLogprobs, ...],
    prompt_logprobs: tuple[TokenLogprobs, ...],
    num_reused: int | None,
    finish: Any,
) -> None:
    news = News((7, 8), finish, logprobs, prompt_logprobs, num_reused)
    event = Event(
        3,
        news.token_ids,
        finish,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        num_reused=num_reused,
    )
    message = to_step_events([event]).SerializeToString()
    assert to_news(head_pb2.StepEvents.FromString(message).events[0]) == news


def test_what_concerns_the_prompt_is_the_first_heads_to_tell() -> None:
    journal = Journal((1, 2), SamplingParams())
    of_prompt = (logprobs_of(2, 0),)
    journal.record(News((5,), prompt_logprobs=of_prompt, num_reused=0))
    journal.record(News((6,), num_reused=2))
    assert (journal.num_reused, journal.prompt_logprobs) == (0, of_prompt)
    assert journal.emitted_ids == [5, 6]


# --- who asks ---

BEARER = {"Authorization": "Bearer sk-very-secret"}


@BOTH
def test_clients_are_told_apart_by_key_then_by_user(api: Api, path: str) -> None:
    for headers, fields in (
        (BEARER, {"user": "tom"}),
        (BEARER, {}),
        ({"Authorization": "bearer  sk-very-secret "}, {}),
        ({"Authorization": "Bearer sk-other"}, {}),
        ({}, {"user": "tom"}),
        ({"Authorization": "Basic abc"}, {"user": "tom"}),
        ({"Authorization": "Bearer tom"}, {}),
        ({}, {}),
    ):
        api.post(path, body_for(path, **fields), headers=headers)
    by_key, again, spelled, other_key, by_user, basic, key_tom, nobody = (
        journal.client for journal in api.engine.journals
    )
    assert by_key == again == spelled
    assert by_user == basic
    assert len({by_key, other_key, by_user, key_tom, nobody}) == 5
    assert nobody == ""


def test_who_classifies_is_told_apart_too(api: Api) -> None:
    api.configure(labels=("a", "b", "c"))
    api.post(CLASSIFY, {"input": "a"}, headers=BEARER)
    assert api.engine.clients == [client_key("Bearer sk-very-secret", None)]


def test_a_key_goes_nowhere(api: Api, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(0):
        api.post(COMPLETIONS, {"prompt": "a"}, headers=BEARER)
        refused = api.post(COMPLETIONS, {"prompt": ""}, headers=BEARER)
    (journal,) = api.engine.journals
    assert len(journal.client) == 16
    assert int(journal.client, 16)
    for text in (repr(journal), str(to_submit(1, journal)), caplog.text, refused.text):
        assert "secret" not in text


# --- the length of the answer ---


def test_only_the_prompt_is_asked_for_with_one_token_that_is_dropped(api: Api) -> None:
    body = {"prompt": "the wind", "max_tokens": 0, "echo": True}
    reply = api.post(COMPLETIONS, body).json()
    assert api.engine.journals[0].params.max_tokens == 1
    (choice,) = reply["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("the wind", "length")
    assert reply["usage"]["completion_tokens"] == 0


def test_best_of_draws_them_all_and_counts_them_all(api: Api) -> None:
    api.engine.script = lambda journal: [LETTER_C, EOS]
    reply = api.post(COMPLETIONS, {"prompt": ["a", "b"], "n": 2, "best_of": 3}).json()
    assert [journal.params.choice for journal in api.engine.journals] == [0, 1, 2] * 2
    assert [choice["index"] for choice in reply["choices"]] == [0, 1, 2, 3]
    assert reply["usage"]["completion_tokens"] == 12
    assert reply["usage"]["prompt_tokens"] == sum(
        len(journal.prompt_ids) for journal in api.engine.journals[::3]
    )
    assert api.post(CHAT, {"messages": [USER], "best_of": 2}).status_code == 200

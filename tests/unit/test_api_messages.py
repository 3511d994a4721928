"""Between ingress and head: what a journal asks and what a head answers arrive as they were."""

from dataclasses import replace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from cluster.head.events import Event, Load
from cluster.head.messages import to_load, to_sequence, to_spec, to_step_events
from cluster.head.sequence import Sequence
from cluster.ingress.journal import Journal, News
from cluster.ingress.messages import to_news, to_submit
from cluster.schema import (
    MAX_PRIORITY,
)
from model.grammar_spec import GrammarSpec
from model.sampling_params import SamplingParams, TokenLogprobs
from protos import head_pb2
from tests.api_fakes import (
    VOCAB_SIZE,
    logprobs_of,
)

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
def test_another_head_is_told_what_was_emitted_and_asked_for_the_rest(
    journal: Journal, num_emitted: int
) -> None:
    journal.record(News(tuple(range(num_emitted))))
    sequence, _ = arrive(journal)
    assert tuple(sequence.prompt_ids) == journal.prompt_ids
    assert tuple(sequence.emitted_ids) == tuple(range(num_emitted))
    assert sequence.params == replace(journal.params, prompt_logprobs=None)


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


def test_how_busy_a_head_is_arrives_as_it_was() -> None:
    load = to_load(Load(5, 2, 160, 1_024), is_draining=True)
    message = head_pb2.StepEvents(load=load).SerializeToString()
    read = head_pb2.StepEvents.FromString(message).load
    assert (read.num_requests, read.num_waiting) == (5, 2)
    assert (read.num_free_tokens, read.num_cache_tokens) == (160, 1_024)
    assert read.is_draining


def test_what_concerns_the_prompt_is_the_first_heads_to_tell() -> None:
    journal = Journal((1, 2), SamplingParams())
    of_prompt = (logprobs_of(2, 0),)
    journal.record(News((5,), prompt_logprobs=of_prompt, num_reused=0))
    journal.record(News((6,), num_reused=2))
    assert (journal.num_reused, journal.prompt_logprobs) == (0, of_prompt)
    assert journal.emitted_ids == [5, 6]

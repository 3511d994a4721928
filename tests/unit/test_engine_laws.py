"""However a request is computed, it gets the ids it would get alone: float32, embedded model.

Chunked or whole, in one micro-batch or several, its prefix found or not, pushed out and computed
again, its tokens guessed ahead or not, one of several choices or asked for by itself, whoever else
runs, joins or is aborted.
"""

import random
import re
from collections.abc import Callable

import pytest

from cluster.head.drafts import LookupDrafter
from cluster.head.sequence import Sequence
from model import Mixtral
from model.grammar import Grammar, GrammarCompiler
from model.grammar_spec import GrammarSpec
from model.sampling_params import SamplingParams
from tests.cluster_fakes import Head, MemoryOutbox

EOS = (2,)
FORM = r"(Tom|Lily) is [1-9][0-9]? years old\."


@pytest.fixture(scope="module")
def ids(mixtral: Mixtral, stories: list[str]) -> list[list[int]]:
    return [mixtral.tokenizer.encode_prompt(story) for story in stories[:8]]


@pytest.fixture(scope="module")
def compiler(mixtral: Mixtral) -> GrammarCompiler:
    return GrammarCompiler(mixtral.tokenizer, EOS)


@pytest.fixture(scope="module")
def grammar(compiler: GrammarCompiler) -> Grammar:
    return compiler.compile(GrammarSpec("regex", FORM))


Make = Callable[[], Sequence]
"""The same request, asked anew."""


def some_requests(
    ids: list[list[int]], grammar: Grammar, compiler: GrammarCompiler, seed: int
) -> list[Make]:
    """Requests of all kinds, many with a prefix in common."""
    rng = random.Random(seed)
    makes = []
    for number in range(10):
        story = ids[number % 2]
        prompt = story[: rng.randint(1, 50)] if rng.random() < 0.7 else rng.choice(ids)[:30]
        params = SamplingParams(
            max_tokens=rng.randint(1, 24),
            temperature=rng.choice([0.0, 0.0, 0.9]),
            top_p=rng.choice([1.0, 0.9]),
            repetition_penalty=rng.choice([1.0, 1.0, 1.3]),
            presence_penalty=rng.choice([0.0, 0.7]),
            seed=rng.randint(0, 9),
            choice=rng.randint(0, 3),
            stop_token_ids=EOS,
        )
        num_drafts = rng.choice([0, 4])
        has_form = number == 3

        def make(
            prompt: list[int] = prompt,
            params: SamplingParams = params,
            num_drafts: int = num_drafts,
            has_form: bool = has_form,
        ) -> Sequence:
            drafter = LookupDrafter(num_drafts) if num_drafts else None
            sequence = Sequence(prompt, params, drafter=drafter)
            if has_form:
                sequence.follow(grammar.matcher(), compiler.end_ids)
            return sequence

        makes.append(make)
    return makes


def run(head: Head, sequences: list[Sequence], abort: dict[int, int] | None = None) -> MemoryOutbox:
    """All at once; `abort` names requests, and after how many events of anybody each leaves."""
    abort = dict(abort or {})
    num_events = 0

    def leave(event: object) -> None:
        nonlocal num_events
        num_events += 1
        for key in [key for key, after in abort.items() if after <= num_events]:
            del abort[key]
            head.engine.abort(outbox, key)

    outbox = MemoryOutbox(leave)
    leaving = set(abort)
    for key, sequence in enumerate(sequences):
        head.engine.submit(outbox, key, sequence)
    with head.running():
        outbox.wait_for_end(*(key for key in range(len(sequences)) if key not in leaving))
    return outbox


@pytest.mark.parametrize("seed", range(2))
def test_another_head_goes_on_where_one_has_stopped(
    mixtral: Mixtral,
    ids: list[list[int]],
    grammar: Grammar,
    compiler: GrammarCompiler,
    seed: int,
) -> None:
    makes = some_requests(ids, grammar, compiler, seed)
    whole = run(Head(mixtral, num_blocks=200, grammars=compiler), [make() for make in makes])
    rng = random.Random(seed)
    replays = {}
    for key, make in enumerate(makes):
        emitted = whole.ids(key)
        first = make()
        num_emitted = rng.randint(0, len(emitted) - 1)
        replay = Sequence(first.prompt_ids, first.params, emitted[:num_emitted])
        if first.matcher:
            replay.follow(grammar.matcher(), compiler.end_ids)
        replays[key] = (replay, emitted[num_emitted:])
    head = Head(mixtral, num_blocks=200, grammars=compiler)
    outbox = run(head, [replay for replay, _ in replays.values()])
    assert [outbox.ids(key) for key in replays] == [rest for _, rest in replays.values()]


@pytest.mark.parametrize("seed", range(2))
def test_no_company_and_no_shortage_changes_what_a_request_gets(
    mixtral: Mixtral,
    ids: list[list[int]],
    grammar: Grammar,
    compiler: GrammarCompiler,
    seed: int,
) -> None:
    makes = some_requests(ids, grammar, compiler, seed)
    alone = []
    for make in makes:
        sequence = make()
        sequence.drafter = None
        head = Head(mixtral, max_tokens_per_step=200, grammars=compiler)
        alone.append(run(head, [sequence]).ids(0))
    rng = random.Random(seed)
    # 26 blocks of 4 tokens hold one or two of them at full length
    head = Head(
        mixtral,
        num_blocks=26,
        max_tokens_per_step=rng.choice([6, 20]),
        grammars=compiler,
        max_micro_batches=3,
    )
    aborted = {key: rng.randint(1, 40) for key in rng.sample(range(10), 2)}
    outbox = run(head, [make() for make in makes], aborted)
    for key, expected in enumerate(alone):
        got = outbox.ids(key)
        assert got == expected[: len(got)] if key in aborted else got == expected
    steps = head.metrics.steps
    assert max(step.num_micro_batches for step in steps) > 1
    assert sum(step.num_preempted for step in steps) > 0
    assert sum(step.num_reused for step in steps) > 0
    assert sum(step.num_accepted for step in steps) <= sum(step.num_drafted for step in steps)
    head.assert_all_free()


def test_drafts_that_prove_right_save_steps(mixtral: Mixtral, ids: list[list[int]]) -> None:
    prompt = ids[0][:40] * 2  # told twice: what follows the first time is a good guess
    params = SamplingParams(max_tokens=24, temperature=0.0)
    plain_head, head = Head(mixtral, max_tokens_per_step=200), Head(mixtral)
    plain = run(plain_head, [Sequence(prompt, params)])
    guessed = run(head, [Sequence(prompt, params, drafter=LookupDrafter(6))])
    assert guessed.ids(0) == plain.ids(0)
    num_accepted = sum(step.num_accepted for step in head.metrics.steps)
    assert num_accepted > 0
    num_emitting = sum(step.num_emitted > 0 for step in head.metrics.steps)
    assert num_emitting == 24 - num_accepted


def test_a_shared_prefix_is_computed_once(mixtral: Mixtral, ids: list[list[int]]) -> None:
    prefix = (ids[0] + ids[1] + ids[2] + ids[3])[:400]
    head = Head(mixtral, num_blocks=300, max_model_len=512, max_tokens_per_step=64)
    params = SamplingParams(max_tokens=4, temperature=0.0)
    outbox = MemoryOutbox()
    with head.running() as engine:
        engine.submit(outbox, 0, Sequence([*prefix, 7], params))
        outbox.wait_for_end(0)
        engine.submit(outbox, 1, Sequence([*prefix, 9, 11], params))
        outbox.wait_for_end(1)
    assert [outbox.of(key)[0].num_reused for key in (0, 1)] == [0, 400]
    assert {event.num_reused for event in outbox.events if event.token_ids} == {0, 400, None}
    computed = sum(step.num_tokens for step in head.metrics.steps)
    assert computed == 401 + 3 + 2 + 3


def test_choices_asked_for_at_once_are_those_asked_for_one_by_one(
    mixtral: Mixtral, ids: list[list[int]]
) -> None:
    def choice(index: int) -> Sequence:
        params = SamplingParams(max_tokens=10, temperature=0.9, seed=5, choice=index)
        return Sequence(ids[1][:30], params)

    one_by_one = [run(Head(mixtral), [choice(index)]).ids(0) for index in range(4)]
    head = Head(mixtral)
    outbox = run(head, [choice(index) for index in range(4)])
    assert [outbox.ids(index) for index in range(4)] == one_by_one
    assert len({tuple(own) for own in one_by_one}) > 1
    assert sum(step.num_reused for step in head.metrics.steps) == 3 * 29


# --- what is reported ---


def test_log_probabilities_are_those_of_the_whole_text(
    mixtral: Mixtral, ids: list[list[int]]
) -> None:
    """Of the prompt and of what is emitted, in chunks and with drafts."""
    prompt = ids[0][:40]
    params = SamplingParams(
        max_tokens=12, temperature=0.0, logprobs=3, prompt_logprobs=2, repetition_penalty=1.2
    )
    head = Head(mixtral, num_blocks=20, max_tokens_per_step=7)
    outbox = run(
        head,
        [
            Sequence(prompt, params, drafter=LookupDrafter(3)),
            Sequence(ids[1][:20], params, cache_salt="another"),
        ],
    )
    for key, own in ((0, prompt), (1, ids[1][:20])):
        events = outbox.of(key)
        emitted = outbox.ids(key)
        reported = [*events[0].prompt_logprobs, *(x for event in events for x in event.logprobs)]
        assert not any(event.prompt_logprobs for event in events[1:])
        text = [*own, *emitted]
        expected_TV = mixtral.logits(text).log_softmax(dim=-1)
        assert len(reported) == len(text) - 1
        for position, one in enumerate(reported):
            logprobs_V = expected_TV[position]
            assert one.logprob == pytest.approx(logprobs_V[text[position + 1]].item(), abs=1e-4)
            num_top = 2 if position + 1 < len(own) else 3
            best = logprobs_V.topk(num_top)
            assert list(one.top_ids) == best.indices.tolist()
            assert list(one.top_logprobs) == pytest.approx(best.values.tolist(), abs=1e-4)


def test_an_answer_has_the_form_that_was_asked_for(
    mixtral: Mixtral, ids: list[list[int]], grammar: Grammar, compiler: GrammarCompiler
) -> None:
    sequences = []
    for seed in range(4):
        params = SamplingParams(max_tokens=60, temperature=1.0, seed=seed)
        drafter = LookupDrafter(4) if seed % 2 else None
        sequences.append(Sequence(ids[seed][:10], params, drafter=drafter))
        sequences[-1].follow(grammar.matcher(), compiler.end_ids)
    free = Sequence(ids[0][:10], SamplingParams(max_tokens=8, temperature=0.0))
    outbox = run(Head(mixtral, grammars=compiler, num_blocks=120), [*sequences, free])
    for key in range(4):
        *emitted, end = outbox.ids(key)
        assert end in EOS
        assert re.fullmatch(FORM, mixtral.tokenizer.decode(emitted))
    assert outbox.ids(4) == mixtral.generate_ids([ids[0][:10]], [free.params])[0]


@pytest.mark.parametrize("num_drafts", [0, 2])
def test_who_is_allowed_nothing_is_refused_after_what_came_and_costs_nobody_else(
    mixtral: Mixtral, ids: list[list[int]], num_drafts: int
) -> None:
    """The one token that is allowed is a bad word as well; the first time, it is a good guess."""
    stuck = SamplingParams(max_tokens=5, allowed_token_ids=(7,), bad_words=((7, 7),))
    drafter = LookupDrafter(num_drafts) if num_drafts else None
    free = SamplingParams(max_tokens=5, temperature=0.0)
    head = Head(mixtral)
    outbox = run(
        head,
        [Sequence([5, 6, 7, 8, 5, 6], stuck, drafter=drafter), Sequence(ids[1][:5], free)],
    )
    assert outbox.ids(0) == [7]
    refusal = outbox.of(0)[-1]
    assert refusal.error is not None
    assert "leave no token" in refusal.error
    # nobody tries it again: it would end there once more
    assert (refusal.is_refusal, refusal.param) == (True, "bad_words")
    assert outbox.ids(1) == mixtral.generate_ids([ids[1][:5]], [free])[0]
    head.assert_all_free()

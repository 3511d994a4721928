"""Heads die, fall silent, fail, drain and come back: a stream goes on as if nothing had been.

The ingress's real pool and connections, over heads in memory.
"""

import asyncio
from collections.abc import Callable, Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.errors import (
    ConfigurationError,
    HeadFailedError,
    HeadUnavailableError,
    RequestError,
)
from cluster.ingress.choice import BLOCK_TOKENS
from cluster.ingress.heads import HeadPool
from cluster.ingress.journal import Journal, News
from cluster.ingress.tries import MAX_LOST_IN_A_ROW
from model import Mixtral
from model.grammar import GrammarCompiler
from model.grammar_spec import GrammarSpec
from model.sampling_params import SamplingParams
from protos import head_pb2
from tests.cluster_fakes import Head
from tests.head_fakes import EngineHead, FakeHead, Network, next_id

T = TypeVar("T")

PROMPT = tuple(range(5, 25))


def run(work: Coroutine[Any, Any, T]) -> T:
    """To its end, which comes soon unless something hangs."""

    async def bounded() -> T:
        async with asyncio.timeout(30):
            return await work

    return asyncio.run(bounded())


def journal(max_tokens: int = 20, *, prompt: tuple[int, ...] = PROMPT, **more: Any) -> Journal:
    return Journal(prompt, SamplingParams(max_tokens=max_tokens, temperature=0.0), **more)


def expected(of: Journal) -> list[int]:
    """What every fake head emits."""
    num_prompt = len(of.prompt_ids)
    return [next_id(num_prompt + number) for number in range(1, of.params.max_tokens + 1)]


async def told(pool: HeadPool, of: Journal) -> list[int]:
    """All that a client reads, which is what the journal says."""
    read: list[int] = []
    async with aclosing(pool.generate(of)) as batches:
        async for token_ids in batches:
            read += token_ids
    assert read == of.emitted_ids
    return read


async def until(condition: Callable[[], Any]) -> None:
    while not condition():  # noqa: ASYNC110 (of fakes, which tell nobody)
        await asyncio.sleep(0.0005)


# --- a head dies ---


@given(cuts=st.lists(st.integers(1, 20), max_size=5))
def test_wherever_heads_die_each_token_comes_once(cuts: list[int]) -> None:
    """Each cut: after so many more tokens of all streams the head dies, and comes up again."""

    async def scenario() -> None:
        one, other = FakeHead("one"), FakeHead("other")
        network = Network(one, other)
        pool = network.pool()
        journals = [journal(8), journal(12), journal(1)]
        tasks = [asyncio.create_task(told(pool, each)) for each in journals]
        for number, cut in enumerate(cuts):
            head = (one, other)[number % 2]
            head.die_after = cut
            await until(lambda head=head: not head.is_up or all(task.done() for task in tasks))
            if not head.is_up:
                head.revive()
                pool.update(network.infos)
        assert await asyncio.gather(*tasks) == [expected(each) for each in journals]
        assert [each.finish for each in journals] == ["length"] * 3
        await pool.close()

    run(scenario())


def test_only_what_is_missing_is_asked_of_the_next_head() -> None:
    async def scenario() -> None:
        one, other = FakeHead("one"), FakeHead("other", num_free_tokens=0)
        pool = Network(one, other).pool()
        asked = journal(20)
        one.die_after = 7
        assert await told(pool, asked) == expected(asked)
        (first,), (second,) = one.submits, other.submits
        assert not first.emitted_ids
        assert list(second.token_ids) == list(PROMPT)
        assert list(second.emitted_ids) == expected(asked)[:7]
        await pool.close()

    run(scenario())


def test_a_fault_in_reading_a_heads_events_is_logged_and_another_head_goes_on(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Faulty(FakeHead):
        def load(self) -> Any:
            for stream in self.streams if self.submits else ():
                stream.up.put_nowait(None)  # type: ignore[arg-type]  # nothing that can be read
            return super().load()

    async def scenario() -> None:
        one, other = Faulty("one"), FakeHead("other", num_free_tokens=0)
        one.on_submit = lambda submit: one.beat()
        pool = Network(one, other).pool()
        asked = journal()
        assert await told(pool, asked) == expected(asked)
        assert (len(one.submits), len(other.submits)) == (1, 1)
        await pool.close()

    run(scenario())
    assert "one: its events could not be read" in caplog.text
    assert "AttributeError" in caplog.text


def test_the_first_head_that_answers_tells_what_was_cached_also_of_a_resumed_answer() -> None:
    resumed = journal(emitted_ids=[7, 8])
    resumed.record(News((9,), num_reused=16))
    resumed.record(News((10,), num_reused=21))  # another head, which goes on
    assert resumed.num_reused == 16
    whole = journal(emitted_ids=[7, 8])
    whole.record(News((9,), num_reused=len(PROMPT) + 1))  # the answer's tokens, too
    assert whole.num_reused == len(PROMPT)


def test_a_request_waits_for_a_head_to_come_up() -> None:
    async def scenario() -> None:
        head = FakeHead("one")
        network = Network(head)
        pool = network.pool()
        head.die_after = 5
        asked = journal()
        task = asyncio.create_task(told(pool, asked))
        await until(lambda: not head.is_up)
        await asyncio.sleep(0.01)
        assert not task.done()
        assert pool.num_ready == 0
        head.revive()
        pool.update(network.infos)
        assert await task == expected(asked)
        await pool.close()

    run(scenario())


def test_a_head_that_only_lost_its_connection_is_called_again() -> None:
    """Nobody else is there, and the controller says nothing new."""

    async def scenario() -> None:
        head = FakeHead("one")
        pool = Network(head).pool()
        head.die_after = 5
        asked = journal()
        task = asyncio.create_task(told(pool, asked))
        await until(lambda: not head.is_up)
        head.is_up, head.die_after = True, None
        assert await task == expected(asked)
        await pool.close()

    run(scenario())


def test_a_head_is_called_again_when_our_certificates_could_not_be_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As while they are renewed; the news of heads must not end there."""
    monkeypatch.setattr("cluster.ingress.heads.UNREACHABLE_S", 0.0)

    class Renewing(Network):
        num_calls = 0

        def open_channel(self, address: str) -> Any:
            self.num_calls += 1
            if self.num_calls == 1:
                raise ConfigurationError("cannot read ingress.pem")
            return super().open_channel(address)

    async def scenario() -> None:
        asked = journal()
        pool = Renewing(FakeHead("one"), FakeHead("other")).pool()
        assert await told(pool, asked) == expected(asked)
        await until(lambda: pool.num_ready == 2)
        await pool.close()

    run(scenario())


def test_without_a_head_in_time_the_request_ends_with_an_error() -> None:
    async def scenario() -> None:
        wishes: list[str] = []
        pool = Network().pool(wait_s=0.05, wake=lambda: wishes.append("wake"))
        with pytest.raises(HeadUnavailableError, match=r"no head replica for 0\.05 s"):
            await told(pool, journal())
        with pytest.raises(HeadUnavailableError, match=r"no head replica"):
            await pool.classify(PROMPT, "")
        assert wishes == ["wake", "wake"], "a service that sleeps would have been woken"
        await pool.close()

    run(scenario())


def test_a_shutdown_ends_requests_that_run_and_that_wait() -> None:
    async def scenario() -> None:
        head = FakeHead("one")
        head.gate.clear()
        pool = Network(head).pool()
        running = asyncio.create_task(told(pool, journal()))
        await until(lambda: head.submits)
        head.is_draining = True
        head.beat()
        await until(lambda: not pool.num_ready)
        waiting = asyncio.create_task(told(pool, journal()))
        await asyncio.sleep(0.01)
        await pool.close()
        for task in (running, waiting):
            with pytest.raises(HeadUnavailableError, match="shutting down"):
                await task

    run(scenario())


def test_one_head_that_cannot_be_closed_keeps_no_other_open(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Channel:
        def __init__(self, channel: Any, is_broken: bool) -> None:
            self.unary_unary, self.stream_stream = channel.unary_unary, channel.stream_stream
            self._is_broken = is_broken
            self.is_closed = False

        async def close(self) -> None:
            if self._is_broken:
                raise OSError("broken")
            await asyncio.sleep(0.01)
            self.is_closed = True

    channels: list[Channel] = []

    class Breaking(Network):
        def open_channel(self, address: str) -> Any:
            channels.append(Channel(super().open_channel(address), is_broken=not channels))
            return channels[-1]

    async def scenario() -> None:
        pool = Breaking(FakeHead("one"), FakeHead("other")).pool()
        await until(lambda: pool.num_ready == 2)
        await pool.close()
        assert [channel.is_closed for channel in channels] == [False, True]

    run(scenario())
    assert "OSError: broken" in caplog.text


def test_a_silent_head_counts_as_lost() -> None:
    async def scenario() -> None:
        one, other = FakeHead("one"), FakeHead("other", num_free_tokens=0)
        pool = Network(one, other).pool(silent_after_s=0.3)
        beating = asyncio.create_task(beat(other))
        one.gate.clear()
        asked = journal()
        task = asyncio.create_task(told(pool, asked))
        await until(lambda: one.submits)
        one.is_mute = True
        assert await task == expected(asked)
        assert len(other.submits) == 1
        beating.cancel()
        await pool.close()

    async def beat(head: FakeHead) -> None:
        while True:
            await asyncio.sleep(0.05)
            head.beat()

    run(scenario())


def test_a_request_that_kills_heads_is_given_up_and_costs_its_neighbours_nothing() -> None:
    poison = (666,)

    async def scenario() -> None:
        one, other = FakeHead("one"), FakeHead("other")
        network = Network(one, other)
        pool = network.pool()
        died: list[FakeHead] = []

        def take(head: FakeHead, submit: head_pb2.Submit) -> None:
            if tuple(submit.token_ids) == poison:
                died.append(head)
                head.die()
                asyncio.get_running_loop().call_later(0.02, revive, head)

        def revive(head: FakeHead) -> None:
            head.revive()
            pool.update(network.infos)

        for head in (one, other):
            head.on_submit = lambda submit, head=head: take(head, submit)
            head.gate.clear()  # nobody gets on before the poison has had its way
        neighbours = [journal() for _ in range(8)]
        tasks = [asyncio.create_task(told(pool, each)) for each in neighbours]
        await until(lambda: len(one.submits) + len(other.submits) == len(neighbours))
        poisoned = asyncio.create_task(told(pool, journal(prompt=poison)))
        await until(lambda: len(died) == 2)
        one.gate.set()
        other.gate.set()
        with pytest.raises(HeadUnavailableError, match=f"given up after {MAX_LOST_IN_A_ROW} heads"):
            await poisoned
        assert await asyncio.gather(*tasks) == [expected(each) for each in neighbours]
        assert len(died) == MAX_LOST_IN_A_ROW
        await pool.close()

    run(scenario())


# --- a head fails ---


def test_what_one_head_cannot_compute_is_tried_on_one_other() -> None:
    async def scenario() -> None:
        one, other = FakeHead("one"), FakeHead("other", num_free_tokens=0)
        pool = Network(one, other).pool()
        one.error = "no way to worker 3"
        asked = journal()
        assert await told(pool, asked) == expected(asked)
        other.error = "logits are not finite"
        with pytest.raises(HeadFailedError, match="other: logits are not finite"):
            await told(pool, journal())
        assert (one.num_computed, other.num_computed) == (2, 2)
        await pool.close()

    run(scenario())


def test_what_the_only_head_cannot_compute_ends_at_once() -> None:
    async def scenario() -> None:
        head = FakeHead("one")
        pool = Network(head).pool()
        head.error = "logits are not finite"
        with pytest.raises(HeadFailedError, match="one: logits are not finite"):
            await told(pool, journal())
        assert head.num_computed == 1
        await pool.close()

    run(scenario())


@pytest.mark.parametrize("num_large", [1, 0])
def test_what_a_smaller_head_refuses_to_go_on_with_is_no_callers_fault(num_large: int) -> None:
    async def scenario() -> None:
        one, small = FakeHead("one"), FakeHead("small", num_free_tokens=0)
        small.error, small.is_refusal = "30 tokens do not fit into the KV cache", True
        others = [FakeHead("large", num_free_tokens=0)][:num_large]
        pool = Network(one, small, *others).pool()
        await until(lambda: pool.num_ready == 2 + num_large)
        asked = journal(20)
        one.die_after = 7
        if num_large:
            assert await told(pool, asked) == expected(asked)
        else:
            with pytest.raises(HeadUnavailableError, match="small refuses"):
                await told(pool, asked)
            assert asked.emitted_ids == expected(asked)[:7]
        assert small.num_computed == 1
        await pool.close()

    run(scenario())


def test_what_the_first_head_refuses_is_the_callers_fault() -> None:
    async def scenario() -> None:
        head = FakeHead("one")
        head.error, head.is_refusal = "30 tokens do not fit into the KV cache", True
        pool = Network(head, FakeHead("other")).pool()
        await until(lambda: pool.num_ready == 2)
        with pytest.raises(RequestError, match="do not fit"):
            await told(pool, journal(20))
        await pool.close()

    run(scenario())


def test_a_prompt_is_classified_whatever_happens_to_heads() -> None:
    async def scenario() -> None:
        one, other = FakeHead("one"), FakeHead("other", num_free_tokens=0)
        pool = Network(one, other).pool()
        one.on_submit = lambda submit: one.die()
        assert await pool.classify(PROMPT, "me") == (len(PROMPT),)
        assert (one.num_computed, other.num_computed) == (1, 1)
        await pool.close()

    run(scenario())


# --- a head drains ---


def test_a_head_that_drains_hands_its_requests_to_another_at_once() -> None:
    async def scenario() -> None:
        one, other = FakeHead("one"), FakeHead("other", num_free_tokens=0)
        pool = Network(one, other).pool()
        asked = [journal(50) for _ in range(3)]
        tasks = [asyncio.create_task(told(pool, each)) for each in asked]
        await until(lambda: all(each.emitted_ids for each in asked))
        (stream,) = one.streams
        one.drain()
        one.gate.clear()
        assert await asyncio.gather(*tasks) == [expected(each) for each in asked]
        assert len(stream.aborted) == other.num_computed == 3
        await told(pool, journal())
        assert one.num_computed == 3
        await pool.close()

    run(scenario())


def test_a_head_that_drains_goes_on_until_there_is_another() -> None:
    async def scenario() -> None:
        one, other = FakeHead("one"), FakeHead("other")
        other.is_up = False
        network = Network(one, other)
        pool = network.pool()
        asked, late = journal(30), journal(200)
        tasks = [asyncio.create_task(told(pool, each)) for each in (asked, late)]
        await until(lambda: asked.emitted_ids and late.emitted_ids)
        one.drain()
        pool.update([])  # the controller does not hand it out any more
        assert await tasks[0] == expected(asked)
        assert other.num_computed == 0
        other.is_up = True
        pool.update(network.infos)
        await until(lambda: other.num_computed)
        one.gate.clear()
        assert await tasks[1] == expected(late)
        await pool.close()

    run(scenario())


def test_a_head_that_drains_goes_on_with_what_only_the_head_that_failed_it_could_take() -> None:
    async def scenario() -> None:
        one, other = FakeHead("one"), FakeHead("other", num_free_tokens=0)
        third = FakeHead("third")
        third.is_up = False
        network = Network(one, other, third)
        pool = network.pool()
        await until(lambda: pool.num_ready == 2)
        one.error = "no way to worker 3"
        other.gate.clear()
        asked = journal()
        task = asyncio.create_task(told(pool, asked))
        await until(lambda: other.num_computed)
        other.drain()
        await until(lambda: pool.num_ready == 1)
        await asyncio.sleep(0.01)
        assert not task.done()
        third.is_up = True
        pool.update(network.infos)
        assert await task == expected(asked)
        assert (one.num_computed, other.num_computed, third.num_computed) == (1, 1, 1)
        await pool.close()

    run(scenario())


def test_a_head_that_the_controller_lost_sight_of_is_still_used() -> None:
    async def scenario() -> None:
        head = FakeHead("one")
        pool = Network(head).pool()
        asked = journal()
        assert await told(pool, asked) == expected(asked)
        pool.update([])
        again = journal()
        assert await told(pool, again) == expected(again)
        await pool.close()

    run(scenario())


# --- which head ---


def test_requests_are_spread_and_those_that_begin_alike_stay_together() -> None:
    async def scenario() -> None:
        one, other = FakeHead("one"), FakeHead("other")
        pool = Network(one, other).pool()
        await until(lambda: pool.num_ready == 2)
        long = tuple(range(3, 3 + 20 * BLOCK_TOKENS))
        head = await at(pool, (one, other), (*long, 7))
        for _ in range(3):
            assert await at(pool, (one, other), (*long, 8)) is head
        for gate in (one.gate, other.gate):
            gate.clear()
        tasks = [asyncio.create_task(told(pool, journal())) for _ in range(8)]
        before = one.num_computed + other.num_computed
        await until(lambda: one.num_computed + other.num_computed == before + 8)
        assert sorted(each.num_computed for each in (one, other)) == [4, 8]
        one.gate.set()
        other.gate.set()
        await asyncio.gather(*tasks)
        await pool.close()

    async def at(pool: HeadPool, heads: tuple[FakeHead, ...], prompt: tuple[int, ...]) -> FakeHead:
        before = [head.num_computed for head in heads]
        await told(pool, journal(2, prompt=prompt))
        (index,) = (i for i, head in enumerate(heads) if head.num_computed > before[i])
        return heads[index]

    run(scenario())


def test_the_next_turn_of_a_conversation_goes_where_the_last_was_answered() -> None:
    async def scenario() -> None:
        one, other = FakeHead("one"), FakeHead("other")
        pool = Network(one, other).pool()
        await until(lambda: pool.num_ready == 2)
        turn = journal(100)
        await told(pool, turn)
        first = one if one.num_computed else other
        # a neighbour, so that without memory the other would be chosen
        first.gate.clear()
        neighbour = asyncio.create_task(told(pool, journal(1, prompt=PROMPT[:3])))
        await until(lambda: one.num_computed + other.num_computed == 2)
        following = journal(1, prompt=(*turn.known_ids, 9))
        next_turn = asyncio.create_task(told(pool, following))
        await until(lambda: one.num_computed + other.num_computed == 3)
        assert list(first.submits[-1].token_ids) == list(following.prompt_ids)
        first.gate.set()
        await asyncio.gather(neighbour, next_turn)
        await pool.close()

    run(scenario())


# --- with engines, in float32 ---

FORM = r"(Tom|Lily) (is|was) [1-9][0-9]? years old\."
EOS = (2,)


def requests(ids: list[list[int]]) -> list[Journal]:
    """Of every kind: greedy, drawn, guessed ahead, penalised, with a form, with logprobs."""
    form = GrammarSpec("regex", FORM)
    shared: dict[str, Any] = {"max_tokens": 12, "stop_token_ids": EOS}
    return [
        Journal(
            tuple(ids[0][:20]),
            SamplingParams(temperature=0.0, logprobs=2, prompt_logprobs=1, **shared),
        ),
        Journal(tuple(ids[1][:9]), SamplingParams(temperature=0.9, seed=3, choice=2, **shared)),
        Journal(
            tuple(ids[2][:30] * 2),
            SamplingParams(temperature=0.0, min_tokens=9, presence_penalty=0.7, **shared),
            num_drafts=4,
        ),
        Journal(
            tuple(ids[3][:12]),
            SamplingParams(temperature=1.0, seed=4, repetition_penalty=1.3, **shared),
            grammar=form,
        ),
    ]


@pytest.fixture(scope="module")
def ids(mixtral: Mixtral, stories: list[str]) -> list[list[int]]:
    return [mixtral.tokenizer.encode_prompt(story) for story in stories[:4]]


@pytest.fixture(scope="module")
def compiler(mixtral: Mixtral) -> GrammarCompiler:
    return GrammarCompiler(mixtral.tokenizer, EOS)


@pytest.fixture(scope="module")
def undisturbed(mixtral: Mixtral, compiler: GrammarCompiler, ids: list[list[int]]) -> list[Journal]:
    journals = requests(ids)
    tell_all(mixtral, compiler, journals, [])
    return journals


def tell_all(
    mixtral: Mixtral, compiler: GrammarCompiler, journals: list[Journal], cuts: list[int]
) -> None:
    """Run these at once on two heads, each of which dies in turn after so many tokens."""
    one, other = (Head(mixtral, num_blocks=200, grammars=compiler) for _ in range(2))

    async def scenario() -> None:
        heads = [
            EngineHead(name, engine, compiler)
            for name, engine in (("one", one.engine), ("other", other.engine))
        ]
        network = Network(*heads)
        pool = network.pool()
        tasks = [asyncio.create_task(told(pool, each)) for each in journals]
        for number, cut in enumerate(cuts):
            head = heads[number % 2]
            head.die_after = cut
            await until(lambda head=head: not head.is_up or all(task.done() for task in tasks))
            if not head.is_up:
                head.revive()
                pool.update(network.infos)
        await asyncio.gather(*tasks)
        await pool.close()

    with one.running(), other.running():
        run(scenario())
    for head in (one, other):
        head.assert_all_free()


@given(cuts=st.lists(st.integers(1, 15), min_size=1, max_size=4))
@settings(max_examples=4)
def test_no_death_of_a_head_changes_what_a_request_gets(
    mixtral: Mixtral,
    compiler: GrammarCompiler,
    ids: list[list[int]],
    undisturbed: list[Journal],
    cuts: list[int],
) -> None:
    journals = requests(ids)
    tell_all(mixtral, compiler, journals, cuts)
    for got, alone in zip(journals, undisturbed, strict=True):
        assert got.emitted_ids == alone.emitted_ids
        assert got.finish == alone.finish
        for mine, theirs in (
            (got.logprobs, alone.logprobs),
            (got.prompt_logprobs, alone.prompt_logprobs),
        ):
            assert len(mine) == len(theirs)
            for one, other in zip(mine, theirs, strict=True):
                assert one.logprob == pytest.approx(other.logprob, abs=1e-4)
                assert one.top_ids == other.top_ids

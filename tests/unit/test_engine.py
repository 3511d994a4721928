"""The engine gives every request the ids it would get alone, and one clear end."""

import logging
import threading
from types import SimpleNamespace

import pytest

from cluster.head.events import Event, Load
from cluster.head.sequence import Sequence
from model import Mixtral
from model.sampling_params import SamplingParams
from tests.cluster_fakes import (
    BrokenDevice,
    BrokenRow,
    FailingExperts,
    Head,
    MemoryOutbox,
    PoisonedExperts,
)

VOCAB_SIZE = 2048
EOS = (2,)


@pytest.fixture(scope="module")
def prompts(mixtral: Mixtral, stories: list[str]) -> list[list[int]]:
    """Beginnings of stories, of very different lengths."""
    lengths = [3, 40, 1, 17, 9, 65]
    ids = [mixtral.tokenizer.encode_prompt(story) for story in stories[: len(lengths)]]
    return [story_ids[:length] for story_ids, length in zip(ids, lengths, strict=True)]


def greedy(max_tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=0.0, stop_token_ids=EOS)


def drawn(max_tokens: int, seed: int) -> SamplingParams:
    return SamplingParams(
        max_tokens=max_tokens, temperature=0.9, top_p=0.95, seed=seed, stop_token_ids=EOS
    )


# --- what a request gets ---


@pytest.mark.parametrize("max_tokens_per_step", [6, 200], ids=["chunked", "whole prompts"])
def test_requests_that_join_and_leave_get_the_ids_they_get_alone(
    mixtral: Mixtral, prompts: list[list[int]], max_tokens_per_step: int
) -> None:
    params = [greedy(12), drawn(9, 3), drawn(20, -5), greedy(1), drawn(15, 2**62), greedy(6)]
    alone = [mixtral.generate_ids([p], [q])[0] for p, q in zip(prompts, params, strict=True)]
    head = Head(mixtral, max_tokens_per_step=max_tokens_per_step, max_running=4)
    outboxes = [MemoryOutbox(), MemoryOutbox()]
    num_joined = 0

    def join(event: Event | None = None) -> None:
        """One more request with every second event: between steps, while others run."""
        nonlocal num_joined
        index = num_joined // 2
        if num_joined % 2 == 0 and index < len(prompts):
            sequence = Sequence(prompts[index], params[index])
            head.engine.submit(outboxes[index % 2], index, sequence)
        num_joined += 1

    for outbox in outboxes:
        outbox.on_event = join
    with head.running():
        join()
        outboxes[0].wait_for_end(0, 2, 4)
        outboxes[1].wait_for_end(1, 3, 5)
    for index, ids in enumerate(alone):
        events = outboxes[index % 2].of(index)
        assert [event.token_ids for event in events] == [(token_id,) for token_id in ids]
        ends = "stop" if ids[-1] in EOS else "length"
        assert [event.finish for event in events] == [None] * (len(ids) - 1) + [ends]
        assert not any(event.error for event in events)
    head.assert_all_free()


def test_a_stop_token_is_the_last_id_and_says_so(
    mixtral: Mixtral, prompts: list[list[int]]
) -> None:
    (ids,) = mixtral.generate_ids([prompts[1]], [greedy(10)])
    stop = next(token_id for token_id in ids if ids.index(token_id) >= 3)
    params = SamplingParams(max_tokens=10, temperature=0.0, stop_token_ids=(stop, 7))
    head, outbox = Head(mixtral), MemoryOutbox()
    with head.running() as engine:
        engine.submit(outbox, 1, Sequence(prompts[1], params))
        outbox.wait_for_end(1)
    assert outbox.ids(1) == ids[: ids.index(stop) + 1]
    assert outbox.events[-1].finish == "stop"


def test_more_requests_than_fit_at_once_are_all_served(
    mixtral: Mixtral, prompts: list[list[int]]
) -> None:
    """Blocks for about two of them; those that wait take over the blocks of those that leave."""
    alone = mixtral.generate_ids([prompts[1]], [greedy(8)])[0]
    head, outbox = Head(mixtral, num_blocks=25, max_running=3), MemoryOutbox()
    for key in range(6):
        head.engine.submit(outbox, key, Sequence(prompts[1], greedy(8)))
    with head.running():
        outbox.wait_for_end(*range(6))
    assert [outbox.ids(key) for key in range(6)] == [alone] * 6
    head.assert_all_free()


# --- how news travels ---


def test_every_outbox_gets_at_most_one_message_per_step(
    mixtral: Mixtral, prompts: list[list[int]]
) -> None:
    head, outboxes = Head(mixtral), [MemoryOutbox(), MemoryOutbox()]
    for outbox in outboxes:
        for key, prompt in enumerate(prompts[:3]):
            head.engine.submit(outbox, key, Sequence(prompt, greedy(5 + key)))
    with head.running():
        for outbox in outboxes:
            outbox.wait_for_end(0, 1, 2)
    num_steps = len(head.metrics.steps)
    for outbox in outboxes:
        assert len(outbox.puts) <= num_steps
        for events in outbox.puts:
            keys = [event.key for event in events]
            assert len(keys) == len(set(keys)) > 0


def test_the_same_key_of_two_outboxes_is_two_requests(
    mixtral: Mixtral, prompts: list[list[int]]
) -> None:
    head, one, other = Head(mixtral), MemoryOutbox(), MemoryOutbox()
    head.engine.submit(one, 1, Sequence(prompts[0], greedy(4)))
    head.engine.submit(other, 1, Sequence(prompts[1], greedy(6)))
    with head.running():
        one.wait_for_end(1)
        other.wait_for_end(1)
    assert one.ids(1) == mixtral.generate_ids([prompts[0]], [greedy(4)])[0]
    assert other.ids(1) == mixtral.generate_ids([prompts[1]], [greedy(6)])[0]


def test_the_numbers_of_the_steps_add_up(mixtral: Mixtral, prompts: list[list[int]]) -> None:
    params = [greedy(6), drawn(9, 1), greedy(3), drawn(5, 2)]
    head, outbox = Head(mixtral, max_tokens_per_step=10, max_running=3), MemoryOutbox()
    for key, p in enumerate(params):
        head.engine.submit(outbox, key, Sequence(prompts[key], p, cache_salt=str(key)))
    with head.running():
        outbox.wait_for_end(*range(len(params)))
    steps = head.metrics.steps
    num_ids = [len(outbox.ids(key)) for key in range(len(params))]
    # all of a sequence is computed but its last id
    num_computed = sum(len(prompts[key]) + n - 1 for key, n in enumerate(num_ids))
    assert sum(step.num_tokens for step in steps) == num_computed
    assert sum(step.num_emitted for step in steps) == sum(num_ids) == len(outbox.events)
    for step in steps:
        assert 1 <= step.num_sequences <= 3
        assert step.num_emitted <= step.num_sequences <= step.num_tokens <= 10
        assert 0 <= step.num_waiting <= 1
        assert 0 <= step.num_free_blocks <= step.num_blocks == 64
        assert 0 < step.parts["experts"] < step.forward_s
        assert 0 < step.parts["attention"] < step.forward_s
        whole_s = step.forward_s + step.sampling_s + step.host_s
        assert sum(step.parts.values()) == pytest.approx(whole_s)
        assert step.sampling_s >= 0
        assert step.host_s > 0
    assert steps[-1].num_free_blocks == steps[-1].num_blocks
    exposition = head.metrics.exposition()
    assert f"maestrale_step_tokens_total {float(num_computed)}" in exposition
    assert f"maestrale_generation_tokens_total {float(sum(num_ids))}" in exposition


# --- leaving early ---


def test_nothing_follows_an_abort_and_its_blocks_are_free(
    mixtral: Mixtral, prompts: list[list[int]]
) -> None:
    head, outbox = Head(mixtral, num_blocks=30), MemoryOutbox()
    aborted_after: list[int] = []

    def abort_the_first(event: Event) -> None:
        if event.key == 1 and len(outbox.of(1)) == 2 and not aborted_after:
            head.engine.abort(outbox, 1)
            head.engine.abort(outbox, 1)  # once more does no harm
            head.engine.abort(outbox, 99)  # nor does an unknown one
            aborted_after.append(len(outbox.of(1)))
            head.engine.submit(outbox, 3, Sequence(prompts[3], greedy(10)))

    outbox.on_event = abort_the_first
    head.engine.submit(outbox, 1, Sequence(prompts[0], greedy(60)))
    head.engine.submit(outbox, 2, Sequence(prompts[1], greedy(10)))
    with head.running():
        outbox.wait_for_end(2, 3)
    assert len(outbox.of(1)) == 3  # the hook ran before the third was kept
    assert not outbox.has_ended(1)
    for key, prompt in ((2, prompts[1]), (3, prompts[3])):
        assert outbox.ids(key) == mixtral.generate_ids([prompt], [greedy(10)])[0]
    head.assert_all_free()


def test_an_outbox_that_leaves_takes_only_its_own_requests_along(
    mixtral: Mixtral, prompts: list[list[int]]
) -> None:
    head, staying = Head(mixtral, max_running=3), MemoryOutbox()

    def leave(event: Event) -> None:
        head.engine.abort(leaving)

    leaving = MemoryOutbox(leave)
    for key in range(4):  # running and waiting ones
        head.engine.submit(leaving, key, Sequence(prompts[0], greedy(50)))
    head.engine.submit(staying, 0, Sequence(prompts[1], greedy(5)))
    with head.running():
        staying.wait_for_end(0)
    assert len(leaving.puts) == 1
    assert staying.ids(0) == mixtral.generate_ids([prompts[1]], [greedy(5)])[0]
    head.assert_all_free()


def test_an_aborted_key_can_be_used_again(mixtral: Mixtral, prompts: list[list[int]]) -> None:
    head, outbox = Head(mixtral), MemoryOutbox()
    head.engine.submit(outbox, 1, Sequence(prompts[0], greedy(50)))
    head.engine.abort(outbox, 1)
    head.engine.submit(outbox, 1, Sequence(prompts[3], greedy(4)))
    with head.running():
        outbox.wait_for_end(1)
    assert outbox.ids(1) == mixtral.generate_ids([prompts[3]], [greedy(4)])[0]


# --- refusals ---


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "reason"),
    [
        ([], 4, "no tokens"),
        ([5, VOCAB_SIZE], 4, "out of vocabulary"),
        ([5, 2**32 - 1], 4, "out of vocabulary"),
        ([2**200], 4, "out of vocabulary"),
        ([5, -1], 4, "out of vocabulary"),
        ([5] * 100, 29, "exceed the context of 128"),
        ([5] * 129, 1, "exceed the context of 128"),
        ([5], 2**32 - 1, "exceed the context of 128"),
        ([5] * 80, 21, "do not fit into the KV cache"),
    ],
)
def test_what_can_never_work_is_refused_once_and_the_engine_goes_on(
    mixtral: Mixtral, prompt: list[int], max_tokens: int, reason: str
) -> None:
    head, outbox = Head(mixtral, num_blocks=25), MemoryOutbox()
    head.engine.submit(outbox, 1, Sequence(prompt, greedy(max_tokens)))
    head.engine.submit(outbox, 2, Sequence([1, 5], greedy(3)))
    with head.running():
        outbox.wait_for_end(1, 2)
    (refusal,) = outbox.of(1)
    assert refusal.is_refusal
    assert refusal.error is not None
    assert reason in refusal.error
    assert refusal.token_ids == ()
    assert outbox.ids(2) == mixtral.generate_ids([[1, 5]], [greedy(3)])[0]
    head.assert_all_free()


def test_the_longest_request_that_fits_is_served(mixtral: Mixtral) -> None:
    head, outbox = Head(mixtral, num_blocks=32, max_tokens_per_step=50), MemoryOutbox()
    head.engine.submit(outbox, 1, Sequence([5] * 127, greedy(1)))
    with head.running():
        outbox.wait_for_end(1)
    assert outbox.events[0].error is None


def test_a_key_in_use_is_refused_and_the_first_request_goes_on(
    mixtral: Mixtral, prompts: list[list[int]]
) -> None:
    head, outbox = Head(mixtral), MemoryOutbox()
    head.engine.submit(outbox, 1, Sequence(prompts[0], greedy(5)))
    head.engine.submit(outbox, 1, Sequence(prompts[1], greedy(5)))
    with head.running():
        outbox.wait_for_end(1)
        head.engine.submit(outbox, 2, Sequence(prompts[0], greedy(5)))
        outbox.wait_for_end(2)
    refusals = [event for event in outbox.of(1) if event.is_refusal]
    assert [event.error for event in refusals] == ["request 1 is already in progress"]
    assert outbox.ids(1) == outbox.ids(2)
    head.assert_all_free()


# --- failures ---


def test_failing_experts_cost_only_the_sequences_of_that_step(
    mixtral: Mixtral, prompts: list[list[int]], caplog: pytest.LogCaptureFixture
) -> None:
    """The third runs only after the two that fail, in their second step."""
    num_layers = mixtral.config.num_hidden_layers
    experts = FailingExperts(mixtral.experts, fail_at=[num_layers + 3])
    head, outbox = Head(mixtral, experts=experts, max_running=2), MemoryOutbox()
    for key in range(3):
        head.engine.submit(outbox, key, Sequence(prompts[0], greedy(5), cache_salt=str(key)))
    with caplog.at_level(logging.CRITICAL), head.running():
        outbox.wait_for_end(0, 1, 2)
        head.engine.submit(outbox, 3, Sequence(prompts[1], greedy(5)))
        outbox.wait_for_end(3)
    for key in (0, 1):
        first, failure = outbox.of(key)
        assert len(first.token_ids) == 1
        assert failure.error is not None
        assert f"call {num_layers + 3} was told to fail" in failure.error
        assert not failure.is_refusal
        assert failure.token_ids == ()
        assert failure.finish is None
    assert outbox.ids(2) == mixtral.generate_ids([prompts[0]], [greedy(5)])[0]
    assert outbox.ids(3) == mixtral.generate_ids([prompts[1]], [greedy(5)])[0]
    head.assert_all_free()


def test_an_allowed_temperature_never_fails_a_step(
    mixtral: Mixtral, prompts: list[list[int]]
) -> None:
    """However close to 0: it would take everybody else's requests down with it."""
    head, outbox = Head(mixtral), MemoryOutbox()
    for key, temperature in enumerate((1e-40, 5e-324, 1e-30)):
        params = SamplingParams(max_tokens=4, temperature=temperature)
        head.engine.submit(outbox, key, Sequence(prompts[0], params))
    head.engine.submit(outbox, 9, Sequence(prompts[1], greedy(4)))
    with head.running():
        outbox.wait_for_end(0, 1, 2, 9)
    assert [event.error for event in outbox.events if event.error] == []
    assert outbox.ids(9) == mixtral.generate_ids([prompts[1]], [greedy(4)])[0]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_logits_cost_only_their_own_sequence(
    mixtral: Mixtral, prompts: list[list[int]], value: float
) -> None:
    decoder = BrokenRow(mixtral.decoder, step=3, row=1, value=value)
    head, outbox = Head(mixtral, decoder=decoder), MemoryOutbox()
    params = [drawn(6, 1), drawn(6, 2), greedy(6)]
    for key, p in enumerate(params):
        head.engine.submit(outbox, key, Sequence(prompts[0], p, cache_salt=str(key)))
    with head.running():
        outbox.wait_for_end(0, 1, 2)
    alone = [mixtral.generate_ids([prompts[0]], [p])[0] for p in params]
    assert [outbox.ids(key) for key in range(3)] == [alone[0], alone[1][:2], alone[2]]
    assert [bool(outbox.of(key)[-1].error) for key in range(3)] == [False, True, False]
    assert head.metrics.steps[2].num_emitted == 2
    head.assert_all_free()


def test_values_that_are_not_numbers_do_not_spread_over_the_cache(
    mixtral: Mixtral, prompts: list[list[int]]
) -> None:
    """One sequence's keys and values are NaN; others run beside it and after it in its blocks."""
    experts = PoisonedExperts(mixtral.experts, fail_at=[3])
    head, outbox = Head(mixtral, experts=experts, num_blocks=20), MemoryOutbox()
    head.engine.submit(outbox, 0, Sequence(prompts[3], greedy(5)))  # the first row is its
    head.engine.submit(outbox, 1, Sequence(prompts[0], greedy(5)))
    with head.running():
        outbox.wait_for_end(0, 1)
        for key in (2, 3):
            head.engine.submit(outbox, key, Sequence(prompts[key + 1], greedy(5)))
        outbox.wait_for_end(2, 3)
    assert outbox.of(0)[-1].error
    for key, prompt in ((1, prompts[0]), (2, prompts[3]), (3, prompts[4])):
        assert outbox.ids(key) == mixtral.generate_ids([prompt], [greedy(5)])[0]
    head.assert_all_free()


def test_an_error_of_one_step_costs_only_its_sequences(
    mixtral: Mixtral, prompts: list[list[int]], caplog: pytest.LogCaptureFixture
) -> None:
    decoder = BrokenDevice(mixtral.decoder, fail_at={2})
    head, outbox = Head(mixtral, decoder=decoder), MemoryOutbox()
    head.engine.submit(outbox, 0, Sequence(prompts[0], greedy(5)))
    with caplog.at_level(logging.CRITICAL), head.running():
        outbox.wait_for_end(0)
        head.engine.submit(outbox, 1, Sequence(prompts[0], greedy(5)))
        outbox.wait_for_end(1)
    assert "CUDA error" in (outbox.of(0)[-1].error or "")
    assert outbox.ids(1) == mixtral.generate_ids([prompts[0]], [greedy(5)])[0]
    head.assert_all_free()


def test_an_error_that_stays_ends_the_engine_and_no_request(
    mixtral: Mixtral, prompts: list[list[int]], caplog: pytest.LogCaptureFixture
) -> None:
    """Their streams break, and another head goes on with them."""
    decoder = BrokenDevice(mixtral.decoder, fail_at=range(3, 100))
    head = Head(mixtral, decoder=decoder)
    outbox = MemoryOutbox(lambda event: head.engine.stop() if event.error else None)
    for key in range(3):
        head.engine.submit(outbox, key, Sequence(prompts[0], greedy(5), cache_salt=str(key)))
    with caplog.at_level(logging.CRITICAL), pytest.raises(RuntimeError, match="CUDA error"):
        head.engine.run()
    assert [len(outbox.ids(key)) for key in range(3)] == [2, 2, 2]
    assert not any(event.error for event in outbox.events)


# --- how busy it is ---


def test_the_load_says_who_is_there_and_what_room_is_left(
    mixtral: Mixtral, prompts: list[list[int]]
) -> None:
    head = Head(mixtral, max_running=1, num_blocks=64, block_size=4)
    loads = []
    outbox = MemoryOutbox(lambda event: loads.append(head.engine.load))
    for key in range(3):
        head.engine.submit(outbox, key, Sequence(prompts[0], greedy(2)))
    with head.running():
        outbox.wait_for_end(*range(3))
    assert len(prompts[0]) + 1 == 4  # one block
    assert loads[0] == Load(3, 2, 252, 256)
    assert head.engine.load == Load(0, 0, 256, 256)


# --- the end ---


def test_values_that_are_not_numbers_are_not_handed_to_the_next_request(mixtral: Mixtral) -> None:
    """They arise in the prompt's first chunk, whose blocks others could find."""
    prompt = list(range(10, 40))
    experts = PoisonedExperts(mixtral.experts, fail_at=[1])
    head, outbox = Head(mixtral, experts=experts, max_tokens_per_step=8), MemoryOutbox()
    with head.running() as engine:
        engine.submit(outbox, 0, Sequence(prompt, greedy(5)))
        outbox.wait_for_end(0)
        engine.submit(outbox, 1, Sequence(prompt, greedy(5)))
        outbox.wait_for_end(1)
    assert outbox.of(0)[-1].error is not None
    assert outbox.ids(1) == mixtral.generate_ids([prompt], [greedy(5)])[0]
    head.assert_all_free()


def test_stop_ends_every_open_request_with_one_error(
    mixtral: Mixtral, prompts: list[list[int]]
) -> None:
    head = Head(mixtral, max_running=2)

    def stop(event: Event) -> None:
        head.engine.stop()

    outbox = MemoryOutbox(stop)
    for key in range(4):  # two run, two wait
        head.engine.submit(outbox, key, Sequence(prompts[0], greedy(50), cache_salt=str(key)))
    with head.running():
        outbox.wait_for_end(*range(4))
    for key in range(4):
        *tokens, failure = outbox.of(key)
        assert len(tokens) == (1 if key < 2 else 0)
        assert failure.error == "the head replica is shutting down"
        assert not failure.is_refusal
    head.assert_all_free()


def test_an_idle_engine_stops_at_once(mixtral: Mixtral) -> None:
    head = Head(mixtral)
    with head.running():
        pass
    assert head.metrics.steps == []


def test_blocks_are_looked_at_seldom_where_that_takes_long(
    mixtral: Mixtral, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock that only a check moves on, by 2 s, and the test."""
    now, num_checks = 0.0, 0
    monkeypatch.setattr("cluster.head.engine.time", SimpleNamespace(perf_counter=lambda: now))

    def slow_check() -> None:
        nonlocal now, num_checks
        now, num_checks = now + 2.0, num_checks + 1

    engine = Head(mixtral).engine
    monkeypatch.setattr(engine._scheduler, "check", slow_check)
    for moment, expected in [(0.0, 1), (201.0, 1), (202.0, 2), (400.0, 2)]:
        now = moment
        engine._check_if_due()
        assert num_checks == expected


def test_a_lost_block_ends_an_engine_that_gets_idle(mixtral: Mixtral) -> None:
    head = Head(mixtral)
    head.pool.allocate(1)
    with pytest.raises(AssertionError, match="owners"):
        head.engine.run()


def test_requests_may_come_from_many_threads_at_once(
    mixtral: Mixtral, prompts: list[list[int]]
) -> None:
    head, outbox = Head(mixtral), MemoryOutbox()

    def submit(key: int) -> None:
        head.engine.submit(outbox, key, Sequence(prompts[0], greedy(3)))

    threads = [threading.Thread(target=submit, args=(key,)) for key in range(12)]
    with head.running():
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        outbox.wait_for_end(*range(12))
    assert {tuple(outbox.ids(key)) for key in range(12)} == {
        tuple(mixtral.generate_ids([prompts[0]], [greedy(3)])[0])
    }


def test_the_engine_shows_its_state(mixtral: Mixtral) -> None:
    head = Head(mixtral)
    shown = "Engine(Scheduler(0 running, 0 waiting, BlockPool(64 free of 64 x 4 tokens)))"
    assert repr(head.engine) == shown

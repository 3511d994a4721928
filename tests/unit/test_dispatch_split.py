"""A step's rows, split over workers and summed, are what one process computes."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from cluster import wire
from cluster.errors import ExpertFailedError, ExpertsUnavailableError
from cluster.head import connections
from cluster.head.answer_times import FLOOR_S, TIMES_SLOWEST
from cluster.head.dispatch import FAILURES_TO_BAN, RemoteExperts, RemoteRows
from cluster.head.feed import PlacementFeed
from cluster.placement import Copy, Placement, Table, WorkerInfo
from cluster.planning import plan
from cluster.rpc import Identity
from model import Mixtral
from model.experts import ExpertWeights
from model.phases import Phase
from model.router import Routing
from model.sampling_params import SamplingParams
from model.units import Unit
from model.weights import Checkpoint
from tests.cluster_fakes import DEADLINE_S, MemoryStream, Weights, Workers, random_rows

FRESH = WorkerInfo("worker-9", "127.0.0.1:9", 9, 0)
TOLERANCE = 1e-6
"""In float32: the same products, added in another order."""
NUM_EXPERTS = 8


@pytest.fixture(scope="module")
def weights(tiny_folder: Path) -> Weights:
    """Every expert and every slice, loaded when first asked for."""

    class Loaded(dict[Unit, ExpertWeights]):
        def __missing__(self, unit: Unit) -> ExpertWeights:
            self[unit] = checkpoint.load_unit(unit)
            return self[unit]

    checkpoint = Checkpoint(tiny_folder, dtype=torch.float32)
    return Loaded()


def placement_of(table: Table, num_workers: int, *, epoch: int = 1) -> Placement:
    """Workers with an incarnation that belongs to the epoch, as if all had been restarted."""
    return Placement(
        epoch,
        tuple(
            WorkerInfo(f"worker-{index}", f"127.0.0.1:{index + 1}", 100 * epoch + index, 0)
            for index in range(num_workers)
        ),
        table,
    )


def even_placement(mixtral: Mixtral, num_workers: int, *, epoch: int = 1) -> Placement:
    table = plan(
        num_layers=mixtral.config.num_hidden_layers,
        num_experts=NUM_EXPERTS,
        expert_bytes=[1] * num_workers,
        budgets=[None] * num_workers,
    )
    return placement_of(table, num_workers, epoch=epoch)


def routing_of(num_rows: int, *, seed: int, top_k: int = 2) -> Routing:
    generator = torch.Generator().manual_seed(seed)
    scores_TE = torch.rand(num_rows, NUM_EXPERTS, generator=generator)
    weights_TK = torch.rand(num_rows, top_k, generator=generator).softmax(dim=-1)
    return Routing(scores_TE.argsort(dim=1)[:, :top_k], weights_TK)


# --- what is computed, through the bytes ---


@contextmanager
def remote(
    mixtral: Mixtral,
    weights: Weights,
    placement: Placement,
    feed: PlacementFeed | None = None,
    *,
    recovery_timeout_s: float = 10.0,
) -> Iterator[tuple[RemoteExperts, Workers]]:
    """Experts behind streams that answer at once."""
    workers = Workers(mixtral, weights)
    workers.place(placement)
    feed = feed or PlacementFeed()
    feed.put(placement)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(connections, "WorkerStream", workers.stream)
        experts = RemoteExperts(
            feed, Identity("head", "f"), timeout_s=10.0, recovery_timeout_s=recovery_timeout_s
        )
        try:
            assert experts.connect(10.0)
            wait_until(lambda: is_complete(experts), feed)
            yield experts, workers
        finally:
            experts.close()


def is_complete(experts: RemoteExperts) -> bool:
    """Whether all wanted workers are connected."""
    return "without []" in repr(experts)


def wait_until(is_so: Callable[[], bool], feed: PlacementFeed) -> None:
    """Return once it is; looked at whenever a stream or placement comes or goes."""
    with feed.changed:
        assert feed.changed.wait_for(is_so, DEADLINE_S)


@pytest.mark.parametrize("num_workers", [1, 2, 3, 8, 11])
def test_remote_experts_compute_what_local_ones_do(
    mixtral: Mixtral, weights: Weights, num_workers: int
) -> None:
    placement = even_placement(mixtral, num_workers)
    with remote(mixtral, weights, placement) as (experts, _):
        for layer, num_rows in ((0, 1), (2, 7), (5, 30)):
            x_TD = random_rows(num_rows, mixtral.config.hidden_size, seed=layer)
            routing = routing_of(num_rows, seed=layer)
            torch.testing.assert_close(
                experts.dispatch(layer, x_TD, routing).wait(),
                mixtral.experts.dispatch(layer, x_TD, routing).wait(),
                rtol=TOLERANCE,
                atol=TOLERANCE,
            )


NUM_WORKERS = 4


@st.composite
def copies_of_an_expert(draw: st.DrawFn) -> tuple[Copy, ...]:
    """Copies on different workers, each whole or in slices."""
    workers = draw(st.permutations(range(NUM_WORKERS)))
    copies, begin = [], 0
    for num_slices in draw(st.lists(st.integers(1, 3), min_size=1, max_size=3)):
        copies.append(tuple(workers[begin : begin + num_slices]))
        begin += num_slices
    return tuple(copy for copy in copies if copy)


@given(
    layer=st.lists(copies_of_an_expert(), min_size=NUM_EXPERTS, max_size=NUM_EXPERTS).map(tuple),
    num_rows=st.integers(1, 20),
    top_k=st.integers(1, 4),
    seed=st.integers(0, 2**30),
)
def test_any_placement_gives_the_sums_of_local_experts(
    mixtral: Mixtral,
    weights: Weights,
    layer: tuple[tuple[Copy, ...], ...],
    num_rows: int,
    top_k: int,
    seed: int,
) -> None:
    x_TD = random_rows(num_rows, mixtral.config.hidden_size, seed=seed)
    routing = routing_of(num_rows, seed=seed, top_k=top_k)
    with remote(mixtral, weights, placement_of((layer,), NUM_WORKERS)) as (experts, _):
        torch.testing.assert_close(
            experts.dispatch(0, x_TD, routing).wait(),
            mixtral.experts.dispatch(0, x_TD, routing).wait(),
            rtol=TOLERANCE,
            atol=TOLERANCE,
        )


def test_a_row_travels_once_to_each_worker_that_needs_it(
    mixtral: Mixtral, weights: Weights
) -> None:
    placement = even_placement(mixtral, 2)
    x_TD = random_rows(12, mixtral.config.hidden_size, seed=0)
    routing = routing_of(12, seed=0, top_k=4)  # so that some experts of a row share a worker
    with remote(mixtral, weights, placement) as (experts, workers):
        experts.dispatch(3, x_TD, routing).wait()
        for index, info in enumerate(placement.workers):
            (call,) = workers[info].calls  # one message per layer and worker
            needed = {
                row
                for row, chosen in enumerate(routing.expert_ids_TK.tolist())
                if any(placement.table[3][expert_id] == ((index,),) for expert_id in chosen)
            }
            assert torch.equal(call.x_RD, x_TD[sorted(needed)])
            assert (call.layer, call.epoch) == (3, 1)


def test_a_whole_model_says_the_same_over_workers_as_in_one_process(
    mixtral: Mixtral, weights: Weights
) -> None:
    prompts = [[1, 438, 440], [1, 5, 600, 70, 8]]
    params = [SamplingParams(max_tokens=8, temperature=t, seed=3) for t in (0.0, 0.9)]
    with remote(mixtral, weights, even_placement(mixtral, 3)) as (experts, _):
        split = Mixtral(mixtral.decoder, experts, mixtral.tokenizer, mixtral.chat)
        assert split.generate_ids(prompts, params) == mixtral.generate_ids(prompts, params)


def test_a_dispatch_tells_its_phases_and_how_long_the_slowest_worker_computed(
    mixtral: Mixtral, weights: Weights
) -> None:
    told: list[object] = []

    class Listener:
        def enter(self, phase: Phase) -> None:
            told.append(phase)

        def reveal(self, seconds: float, was: Phase, really: Phase) -> None:
            told.append((seconds, was, really))

    placement = even_placement(mixtral, 2)
    with remote(mixtral, weights, placement) as (experts, workers):
        for info, seconds in zip(placement.workers, (0.3, 0.2), strict=True):
            workers[info].compute_s = seconds
        experts.phases = Listener()
        pending = experts.dispatch(
            0, random_rows(9, mixtral.config.hidden_size, seed=1), routing_of(9, seed=1)
        )
        assert told == ["packing"]
        pending.wait()
    assert told[1:] == [*["transfer", "unpacking"] * 2, (0.3, "transfer", "experts")]


# --- losses ---


def test_only_the_rows_of_a_lost_worker_are_sent_again(mixtral: Mixtral, weights: Weights) -> None:
    placement = even_placement(mixtral, 3)
    x_TD = random_rows(9, mixtral.config.hidden_size, seed=1)
    routing = routing_of(9, seed=1)
    with remote(mixtral, weights, placement) as (experts, workers):
        lost, *others = placement.workers
        workers[lost].fail_at = {1}
        sums_TD = experts.dispatch(0, x_TD, routing).wait()
        torch.testing.assert_close(
            sums_TD,
            mixtral.experts.dispatch(0, x_TD, routing).wait(),
            rtol=TOLERANCE,
            atol=TOLERANCE,
        )
        first, again = workers[lost].calls
        assert torch.equal(first.x_RD, again.x_RD)
        assert again.call_id > first.call_id
        assert [len(workers[info].calls) for info in others] == [1, 1]
        assert workers.num_connects == 4


def test_rows_of_a_lost_worker_follow_their_experts_to_a_new_placement(
    mixtral: Mixtral, weights: Weights
) -> None:
    """The lost worker's experts are now spread over two others, one of which is new."""
    old = even_placement(mixtral, 2)
    survivor, lost = old.workers
    fresh = WorkerInfo("worker-2", "127.0.0.1:9", 7, 0)
    table = tuple(
        tuple(((0,),) if copies == ((0,),) or e == 1 else ((1,),) for e, copies in enumerate(layer))
        for layer in old.table
    )
    new = Placement(2, (survivor, fresh), table)
    feed = PlacementFeed()
    x_TD = random_rows(20, mixtral.config.hidden_size, seed=1)
    routing = routing_of(20, seed=1)
    with remote(mixtral, weights, old, feed) as (experts, workers):
        workers.place(new)
        pending = experts.dispatch(0, x_TD, routing)
        workers[lost].fail_at = {1}
        feed.put(new)
        torch.testing.assert_close(
            pending.wait(),
            mixtral.experts.dispatch(0, x_TD, routing).wait(),
            rtol=TOLERANCE,
            atol=TOLERANCE,
        )
        assert [call.epoch for call in workers[fresh].calls] == [2]
        assert repr(experts).startswith("RemoteExperts(epoch 2, ")


def test_rows_that_nobody_can_compute_fail_within_the_recovery_time(
    mixtral: Mixtral, weights: Weights
) -> None:
    placement = even_placement(mixtral, 2)
    x_TD = random_rows(3, mixtral.config.hidden_size, seed=1)
    routing = routing_of(3, seed=1, top_k=NUM_EXPERTS)
    feed = PlacementFeed()
    with remote(mixtral, weights, placement, feed, recovery_timeout_s=0.0) as (experts, workers):
        lost = placement.workers[1]
        workers[lost].fail_at = {1}
        workers.unreachable = {lost}
        pending = experts.dispatch(0, x_TD, routing)
        with pytest.raises(ExpertsUnavailableError, match="told to fail; no replacement within 0"):
            pending.wait()
        with pytest.raises(ExpertsUnavailableError, match="nobody holds all experts of layer 0"):
            experts.dispatch(0, x_TD, routing).wait()
        # once it can be reached again, the next step goes through
        workers.unreachable = set()
        wait_until(lambda: is_complete(experts), feed)
        torch.testing.assert_close(
            experts.dispatch(0, x_TD, routing).wait(),
            mixtral.experts.dispatch(0, x_TD, routing).wait(),
            rtol=TOLERANCE,
            atol=TOLERANCE,
        )


# --- copies ---


def copied(*copies: Copy) -> tuple[tuple[Copy, ...], ...]:
    """A layer whose experts all have these copies."""
    return (copies,) * NUM_EXPERTS


def assert_right(
    mixtral: Mixtral, experts: RemoteExperts, *, seed: int = 1, pending: RemoteRows | None = None
) -> None:
    """A dispatch through layer 0 gives what local experts give."""
    rows = rows_of(mixtral, seed=seed)
    torch.testing.assert_close(
        (pending or experts.dispatch(0, *rows)).wait(),
        mixtral.experts.dispatch(0, *rows).wait(),
        rtol=TOLERANCE,
        atol=TOLERANCE,
    )


def rows_of(mixtral: Mixtral, *, seed: int = 1) -> tuple[Tensor, Routing]:
    """Rows for every expert."""
    x_TD = random_rows(6, mixtral.config.hidden_size, seed=seed)
    return x_TD, routing_of(6, seed=seed, top_k=NUM_EXPERTS)


def asked_of(workers: Workers, placement: Placement) -> list[int]:
    """How many calls each worker got."""
    return [len(workers[info].calls) for info in placement.workers]


def test_rows_of_a_lost_worker_go_to_another_copy_at_once(
    mixtral: Mixtral, weights: Weights
) -> None:
    placement = placement_of((copied((0,), (1,), (2,)),), 3)
    with remote(mixtral, weights, placement, recovery_timeout_s=0.0) as (experts, workers):
        lost = placement.workers[1]
        workers[lost].fail_at = {1}
        workers.unreachable = {lost}
        assert_right(mixtral, experts)
        assert sum(asked_of(workers, placement)) == 5  # the lost call became two
        assert_right(mixtral, experts, seed=2)
        assert asked_of(workers, placement)[1] == 1


@given(
    layer=st.lists(copies_of_an_expert(), min_size=NUM_EXPERTS, max_size=NUM_EXPERTS).map(tuple),
    failing=st.dictionaries(st.integers(0, NUM_WORKERS - 1), st.sets(st.integers(1, 3))),
    seed=st.integers(0, 2**30),
)
def test_losses_change_no_sum(
    mixtral: Mixtral,
    weights: Weights,
    layer: tuple[tuple[Copy, ...], ...],
    failing: dict[int, set[int]],
    seed: int,
) -> None:
    """Whatever the placement, whoever breaks off and comes back."""
    placement = placement_of((layer,), NUM_WORKERS)
    with remote(mixtral, weights, placement) as (experts, workers):
        for number, calls in failing.items():
            workers[placement.workers[number]].fail_at = calls
        for step in range(3):
            assert_right(mixtral, experts, seed=seed + step)


def test_a_lost_slice_is_made_good_by_the_same_slice(mixtral: Mixtral, weights: Weights) -> None:
    placement = placement_of((copied((0, 1), (2, 3)),), 4)
    with remote(mixtral, weights, placement, recovery_timeout_s=0.0) as (experts, workers):
        lost = placement.workers[1]
        workers[lost].fail_at = {1}
        workers.unreachable = {lost}
        assert_right(mixtral, experts)
        assert {unit.slice_number for unit, _ in workers[lost].calls[0].assignments.counts} == {1}
        assert asked_of(workers, placement) == [1, 1, 1, 2]


def test_a_slice_that_nobody_else_has_makes_all_be_computed_in_another_way(
    mixtral: Mixtral, weights: Weights
) -> None:
    layer = (*copied((0, 1), (2,))[:4], *copied((3,))[4:])
    placement = placement_of((layer,), 4)
    with remote(mixtral, weights, placement, recovery_timeout_s=0.0) as (experts, workers):
        lost = placement.workers[1]
        workers[lost].fail_at = {1}
        workers.unreachable = {lost}
        assert_right(mixtral, experts)
        assert asked_of(workers, placement)[3] == 2


def test_a_banned_worker_is_asked_only_where_nobody_else_can_be(
    mixtral: Mixtral, weights: Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.head.bans.FIRST_BAN_S", 1000.0)
    monkeypatch.setattr("cluster.head.bans.LONGEST_BAN_S", 1000.0)
    placement = placement_of((copied((0,), (1,)),), 2)
    feed = PlacementFeed()
    with remote(mixtral, weights, placement, feed) as (experts, workers):
        banned, other = placement.workers
        workers[banned].fail_at = {1}
        assert_right(mixtral, experts)
        wait_until(lambda: is_complete(experts), feed)
        assert_right(mixtral, experts, seed=2)
        assert asked_of(workers, placement) == [1, 3]
        workers[other].fail_at = {4}
        workers.unreachable = {other}
        assert_right(mixtral, experts, seed=3)
        assert asked_of(workers, placement) == [2, 4]


def test_a_worker_that_refuses_keeps_its_stream_and_another_copy_is_asked(
    mixtral: Mixtral, weights: Weights
) -> None:
    placement = placement_of((copied((0,), (1,)),), 2)
    with remote(mixtral, weights, placement, recovery_timeout_s=0.0) as (experts, workers):
        workers[placement.workers[0]].refusals = 1
        assert_right(mixtral, experts)
        assert asked_of(workers, placement) == [1, 2]
        assert workers.num_connects == 2


def test_the_only_worker_is_asked_again_until_it_takes_the_call(
    mixtral: Mixtral, weights: Weights
) -> None:
    placement = placement_of((copied((0,)),), 1)
    with remote(mixtral, weights, placement) as (experts, workers):
        workers[placement.workers[0]].refusals = 2
        assert_right(mixtral, experts)
        assert asked_of(workers, placement) == [3]
        assert workers.num_connects == 1


@pytest.mark.parametrize("trouble", ["refuses", "breaks off"])
def test_a_worker_that_never_takes_the_call_is_given_up(
    mixtral: Mixtral, weights: Weights, trouble: str
) -> None:
    placement = placement_of((copied((0,)),), 1)
    with remote(mixtral, weights, placement, recovery_timeout_s=0.3) as (experts, workers):
        worker = workers[placement.workers[0]]
        if trouble == "refuses":
            worker.refusals = 10**9
        else:
            worker.fail_at = set(range(10**4))
        with pytest.raises(ExpertsUnavailableError, match=r"told to .*; no replacement"):
            experts.dispatch(0, *rows_of(mixtral)).wait()
        assert len(worker.calls) > 1


def test_where_a_worker_is_broken_another_copy_is_asked(mixtral: Mixtral, weights: Weights) -> None:
    placement = placement_of((copied((0,), (1,)),), 2)
    with remote(mixtral, weights, placement) as (experts, workers):
        workers[placement.workers[0]].is_broken = True
        workers[placement.workers[1]].refusals = 1  # which is waited for
        assert_right(mixtral, experts)
        assert asked_of(workers, placement) == [1, 3]
        assert workers.num_connects == 2


def test_where_a_worker_is_broken_its_slices_are_asked_of_another(
    mixtral: Mixtral, weights: Weights
) -> None:
    placement = placement_of((copied((0, 1), (2, 3)),), 4)
    with remote(mixtral, weights, placement) as (experts, workers):
        for broken in (0, 3):
            for number, worker in enumerate(placement.workers):
                workers[worker].is_broken = number == broken
            assert_right(mixtral, experts)


@pytest.mark.parametrize(("num_copies", "num_calls"), [(1, 1), (2, 2), (3, 2)])
def test_what_two_copies_or_the_only_one_cannot_compute_fails_at_once(
    mixtral: Mixtral, weights: Weights, num_copies: int, num_calls: int
) -> None:
    copies = [(number,) for number in range(num_copies)]
    placement = placement_of((copied(*copies),), num_copies)
    with remote(mixtral, weights, placement) as (experts, workers):
        for worker in placement.workers:
            workers[worker].is_broken = True
        with pytest.raises(ExpertFailedError, match="told to be broken"):
            x_TD = random_rows(1, mixtral.config.hidden_size, seed=1)
            experts.dispatch(0, x_TD, routing_of(1, seed=1, top_k=1)).wait()
        assert sum(asked_of(workers, placement)) == num_calls


def test_a_worker_that_fails_again_and_again_is_asked_no_more(
    mixtral: Mixtral, weights: Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.head.bans.FIRST_BAN_S", 1000.0)
    monkeypatch.setattr("cluster.head.bans.LONGEST_BAN_S", 1000.0)
    placement = placement_of((copied((0,), (1,)),), 2)
    with remote(mixtral, weights, placement) as (experts, workers):
        workers[placement.workers[0]].is_broken = True
        for seed in range(FAILURES_TO_BAN + 2):
            assert_right(mixtral, experts, seed=seed)
        assert asked_of(workers, placement) == [FAILURES_TO_BAN, 2 * FAILURES_TO_BAN + 2]
        assert workers.num_connects == 2


def test_a_worker_that_fails_now_and_then_goes_on(mixtral: Mixtral, weights: Weights) -> None:
    placement = placement_of((copied((0,), (1,)),), 2)
    with remote(mixtral, weights, placement) as (experts, workers):
        for seed in range(3 * FAILURES_TO_BAN):
            workers[placement.workers[0]].is_broken = seed % FAILURES_TO_BAN > 0
            assert_right(mixtral, experts, seed=seed)
        assert asked_of(workers, placement)[0] == 3 * FAILURES_TO_BAN


def test_who_fails_where_another_fails_too_is_not_banned(
    mixtral: Mixtral, weights: Weights
) -> None:
    """What two cannot compute is the rows' own fault."""
    placement = placement_of((copied((0,), (1,)),), 2)
    with remote(mixtral, weights, placement) as (experts, workers):
        for is_broken in (True, False):
            for worker in placement.workers:
                workers[worker].is_broken = is_broken
            for seed in range(FAILURES_TO_BAN + 1):
                if is_broken:
                    with pytest.raises(ExpertFailedError):
                        experts.dispatch(0, *rows_of(mixtral, seed=seed)).wait()
                else:
                    assert_right(mixtral, experts, seed=seed)
        assert asked_of(workers, placement) == [2 * (FAILURES_TO_BAN + 1)] * 2


def test_a_worker_is_waited_for_briefly_where_others_could_answer(
    mixtral: Mixtral, weights: Weights
) -> None:
    for copies, patience_s in ((((0,), (1,)), FLOOR_S), (((0,),), 10.0)):
        placement = placement_of((copied(*copies),), 2)
        with remote(mixtral, weights, placement) as (experts, workers):
            for seed in range(3):
                assert_right(mixtral, experts, seed=seed)
            patience = workers[placement.workers[0]].patience_s
            assert patience[0] == pytest.approx(10.0, abs=1.0)  # before anything is known
            assert patience[-1] == pytest.approx(patience_s, abs=0.2)


def test_a_workers_time_is_taken_without_the_wait_for_others(
    mixtral: Mixtral, weights: Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    placement = placement_of((copied((0,), (1,)),), 2)
    takes_s = dict(zip(placement.workers, (2.0, 0.1), strict=True))
    now = sent_at = 100.0
    receive = MemoryStream.receive

    def receive_in_time(stream: MemoryStream, call: wire.Call, overdue_at: float) -> wire.Reply:
        nonlocal now
        now = max(now, sent_at + takes_s[stream.worker])
        return receive(stream, call, overdue_at)

    monkeypatch.setattr(MemoryStream, "receive", receive_in_time)
    monkeypatch.setattr("cluster.head.dispatch.time", SimpleNamespace(monotonic=lambda: now))
    with remote(mixtral, weights, placement) as (experts, workers):
        for seed in range(4):
            sent_at = now
            assert_right(mixtral, experts, seed=seed)
        assert asked_of(workers, placement) == [4, 4]
        for worker, seconds in takes_s.items():
            num_rows = len(workers[worker].calls[0].assignments.rows_A)
            deadline_s = experts._times[worker].deadline_s(num_rows)
            assert deadline_s == pytest.approx(TIMES_SLOWEST * seconds, rel=0.02)


# --- a new placement ---


def test_a_placement_is_gone_by_once_its_workers_are_connected(
    mixtral: Mixtral, weights: Weights
) -> None:
    old = placement_of((copied((0,)),), 2)
    kept, dropped = old.workers
    fresh = WorkerInfo("worker-2", "127.0.0.1:9", 7, 0)
    table = (tuple(((e % 2,),) for e in range(NUM_EXPERTS)),)
    new = Placement(2, (kept, fresh), table)
    feed = PlacementFeed()
    with remote(mixtral, weights, old, feed) as (experts, workers):
        workers.place(new)
        workers.unreachable = {fresh}
        feed.put(new)
        assert_right(mixtral, experts)
        assert experts.placement is old
        workers.unreachable = set()
        wait_until(lambda: is_complete(experts), feed)
        assert_right(mixtral, experts)
        assert experts.placement is new
        assert [call.epoch for call in workers[fresh].calls] == [2]
        assert dropped.name not in repr(experts)


def test_an_idle_head_connects_to_new_workers_and_says_what_it_will_go_by(
    mixtral: Mixtral, weights: Weights
) -> None:
    old = placement_of((copied((0,)),), 1)
    new = Placement(2, (*old.workers, FRESH), (copied((1,)),))
    feed = PlacementFeed()
    with remote(mixtral, weights, old, feed) as (experts, workers):
        workers.place(new)
        workers.unreachable = {FRESH}
        feed.put(new)
        assert experts.placement is old
        workers.unreachable = set()
        wait_until(lambda: experts.placement is new, feed)
        assert workers[FRESH].calls == []
        assert_right(mixtral, experts)
        assert len(workers[FRESH].calls) == 1


def test_a_worker_that_leaves_may_first_answer_what_it_was_asked(
    mixtral: Mixtral, weights: Weights
) -> None:
    old = placement_of((copied((1,)),), 2)
    new = replace(placement_of((copied((0,)),), 2), epoch=2, workers=old.workers[:1])
    feed = PlacementFeed()
    with remote(mixtral, weights, old, feed) as (experts, workers):
        workers.place(new)
        pending = experts.dispatch(0, *rows_of(mixtral))
        feed.put(new)
        assert_right(mixtral, experts, seed=2)
        assert experts.placement is new
        assert_right(mixtral, experts, pending=pending)
        assert asked_of(workers, old) == [1, 1]  # nothing was sent twice


def test_the_answer_times_of_workers_that_have_left_are_forgotten(
    mixtral: Mixtral, weights: Weights
) -> None:
    feed = PlacementFeed()
    placements = [placement_of((copied((0,)),), 1, epoch=epoch) for epoch in range(1, 5)]
    with remote(mixtral, weights, placements[0], feed) as (experts, workers):
        for placement in placements:
            workers.place(placement)
            feed.put(placement)
            wait_until(lambda placement=placement: experts.placement is placement, feed)
            for seed in range(2):
                assert_right(mixtral, experts, seed=seed)
            assert experts._times.keys() == set(placement.workers)


def test_rows_for_an_expert_that_nobody_holds_wait_for_a_placement_that_has_it(
    mixtral: Mixtral, weights: Weights
) -> None:
    whole = placement_of((copied((0,)),), 1)
    hole = replace(whole, epoch=2, table=(((), *whole.table[0][1:]),))
    filled = replace(whole, epoch=3, table=(copied((1,)),), workers=(*whole.workers, FRESH))
    feed = PlacementFeed()
    with remote(mixtral, weights, whole, feed) as (experts, workers):
        lost = whole.workers[0]
        workers[lost].fail_at = {1}
        workers.unreachable = {lost}
        pending = experts.dispatch(0, *rows_of(mixtral))
        workers.place(filled)
        feed.put(hole)
        threading.Timer(0.05, feed.put, [filled]).start()
        assert_right(mixtral, experts, pending=pending)
        assert experts.placement is filled


# --- the feed ---


def test_the_feed_keeps_the_latest_placement_whatever_the_order(mixtral: Mixtral) -> None:
    feed = PlacementFeed()
    assert feed.newest is None
    newer, older = (even_placement(mixtral, 2, epoch=epoch) for epoch in (5, 4))
    feed.put(newer)
    feed.put(older)
    assert feed.newest is newer
    of_the_next_controller = replace(older, term=1)
    feed.put(of_the_next_controller)
    feed.put(newer)
    assert feed.newest is of_the_next_controller

"""Copies and slices over real gRPC, without Ray: what a loss, a stall or a full worker costs."""

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import grpc
import pytest
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc

from cluster import rpc
from cluster.head.cross_check import CrossCheck
from cluster.head.dispatch import RemoteExperts
from cluster.head.feed import PlacementFeed
from cluster.metrics import HeadMetrics
from cluster.placement import Copy, Placement, Table, held_by
from model import Mixtral
from model.experts import Assignments, LocalExperts, assign, checksum
from model.router import Routing
from model.sampling_params import SamplingParams
from model.units import Unit
from model.weights import Checkpoint
from tests.cluster_fakes import random_rows
from tests.integration.workers import WorkerServer, behind_proxy, remote_experts

GREEDY = SamplingParams(max_tokens=40, temperature=0.0)
PATIENCE_S = 60.0
"""Of everything that the tests must not wait for: a test that does takes longer than FAR_BELOW."""
FAR_BELOW_S = 30.0


def everywhere(checkpoint: Checkpoint, *copies: Copy) -> Table:
    """A table in which every expert has these copies."""
    config = checkpoint.config
    return ((copies,) * config.num_local_experts,) * config.num_hidden_layers


def with_experts(mixtral: Mixtral, experts: RemoteExperts) -> Mixtral:
    return Mixtral(mixtral.decoder, experts, mixtral.tokenizer, mixtral.chat)


@contextmanager
def connected(
    placement: Placement, checkpoint: Checkpoint, feed: PlacementFeed | None = None
) -> Iterator[RemoteExperts]:
    """Experts on all workers of the placement."""
    feed = feed or PlacementFeed()
    feed.put(placement)
    experts = remote_experts(feed, checkpoint, timeout_s=PATIENCE_S, recovery_timeout_s=PATIENCE_S)
    try:
        assert experts.connect(timeout_s=10)
        with feed.changed:
            assert feed.changed.wait_for(lambda: "without []" in repr(experts), 10)
        yield experts
    finally:
        experts.close()


def test_slices_on_three_workers_tell_the_same_story(
    mixtral: Mixtral, checkpoint: Checkpoint
) -> None:
    table = everywhere(checkpoint, (0, 1, 2))
    workers = [
        WorkerServer(f"worker-{index}", checkpoint, units=held_by(table, index))
        for index in range(3)
    ]
    prompt = mixtral.tokenizer.encode_prompt("Once upon a time")
    expected = mixtral.generate_ids([prompt], [GREEDY])
    try:
        infos = tuple(worker.info for worker in workers)
        with connected(Placement(1, infos, table), checkpoint) as experts:
            assert with_experts(mixtral, experts).generate_ids([prompt], [GREEDY]) == expected
    finally:
        for worker in workers:
            worker.stop()


@pytest.mark.parametrize("loss", ["killed", "stalled"])
def test_a_lost_worker_whose_experts_have_copies_costs_no_token_and_little_time(
    mixtral: Mixtral, two_workers: list[WorkerServer], checkpoint: Checkpoint, loss: str
) -> None:
    """No placement comes to the rescue, and nobody waits for the worker to be back."""
    prompt = mixtral.tokenizer.encode_prompt("Once upon a time")
    expected = mixtral.generate_ids([prompt], [GREEDY])
    with behind_proxy(two_workers[1]) as (proxy, far):
        table = everywhere(checkpoint, (0,), (1,))
        placement = Placement(1, (two_workers[0].info, far), table)
        with connected(placement, checkpoint) as experts:
            seen = 0

            def lose(_index: int, _token_id: int) -> None:
                nonlocal seen
                seen += 1
                if seen == 10:
                    if loss == "stalled":
                        proxy.stall()
                    else:
                        two_workers[1].stop()

            started = time.monotonic()
            split = with_experts(mixtral, experts)
            assert split.generate_ids([prompt], [GREEDY], lose) == expected
            assert time.monotonic() - started < FAR_BELOW_S
            assert seen == GREEDY.max_tokens
            assert "worker-1" in repr(experts).partition("without")[2]


def test_a_worker_lost_between_two_micro_batches_costs_neither(
    two_workers: list[WorkerServer], checkpoint: Checkpoint
) -> None:
    """The first's lost rows are sent again, and answered, behind the second's."""
    local = LocalExperts(two_workers[0].held)
    with behind_proxy(two_workers[1]) as (proxy, far):
        table = everywhere(checkpoint, (0,), (1,))
        placement = Placement(1, (two_workers[0].info, far), table)
        with connected(placement, checkpoint) as experts:
            proxy.stall()
            halves = [many_rows(checkpoint, seed) for seed in (1, 2)]
            pending = [experts.dispatch(0, *half) for half in halves]
            assert all(rows.parts and len(rows.parts) == 2 for rows in pending)
            proxy.cut()
            for rows, half in zip(pending, halves, strict=True):
                expected = local.dispatch(0, *half).wait()
                assert (rows.wait() - expected).abs().max() <= 1e-4


def many_rows(checkpoint: Checkpoint, seed: int) -> tuple[torch.Tensor, Routing]:
    """Rows for all experts of a layer."""
    config = checkpoint.config
    scores_TE = random_rows(16, config.num_local_experts, seed=seed).softmax(-1)
    weights_TK, expert_ids_TK = scores_TE.topk(config.num_experts_per_tok)
    return random_rows(16, config.hidden_size, seed=seed), Routing(expert_ids_TK, weights_TK)


def test_a_new_worker_that_does_not_answer_holds_nobody_up(
    mixtral: Mixtral, two_workers: list[WorkerServer], checkpoint: Checkpoint
) -> None:
    """The handshake with it takes its whole timeout, beside the engine."""
    first = two_workers[0].info
    old = Placement(1, (first,), everywhere(checkpoint, (0,)))
    ids = [1, 5, 9]
    feed = PlacementFeed()
    with (
        behind_proxy(two_workers[1]) as (proxy, silent),
        connected(old, checkpoint, feed) as experts,
    ):
        proxy.stall()
        new = Placement(2, (first, silent), everywhere(checkpoint, (1,)))
        feed.put(new)
        started = time.monotonic()
        logits = with_experts(mixtral, experts).logits(ids)
        assert time.monotonic() - started < rpc.HANDSHAKE_TIMEOUT_S
        assert (logits - mixtral.logits(ids)).abs().max() <= 1e-4
        assert experts.placement is old


def test_a_full_worker_refuses_and_the_other_copy_answers(
    mixtral: Mixtral, two_workers: list[WorkerServer], checkpoint: Checkpoint
) -> None:
    infos = tuple(worker.info for worker in two_workers)
    table = everywhere(checkpoint, (0,), (1,))
    ids = [1, 5, 9]
    expected = mixtral.logits(ids)
    with connected(Placement(1, infos, table), checkpoint) as experts:
        full = two_workers[0].service._batcher
        full.max_waiting_bytes = 0
        full._compute_lock.acquire()
        someone = threading.Thread(target=full.compute, args=(0, *one_row(checkpoint)), daemon=True)
        someone.start()
        while not full._waiting:
            assert someone.is_alive()
        try:
            logits = with_experts(mixtral, experts).logits(ids)
        finally:
            full._compute_lock.release()
        assert (logits - expected).abs().max() <= 1e-4
        assert "without []" in repr(experts)
        assert 'outcome="busy"' in two_workers[0].metrics.exposition()
        someone.join(10)


def one_row(checkpoint: Checkpoint) -> tuple[torch.Tensor, Assignments]:
    """A row for expert 0 of layer 0."""
    routing = Routing(torch.tensor([[0]]), torch.tensor([[1.0]]))
    return torch.ones(1, checkpoint.config.hidden_size), assign(0, routing)


def test_a_flipped_bit_in_memory_is_found_and_dropped(checkpoint: Checkpoint) -> None:
    workers = [WorkerServer(f"worker-{index}", checkpoint) for index in range(2)]
    damaged = Unit(0, 3)
    matrix = workers[1].held[damaged].w2_DF
    assert isinstance(matrix, torch.Tensor)
    sign_and_exponent = matrix.view(torch.int32)
    sign_and_exponent[5, 7] ^= 1 << 30  # ever so large, whatever it was: no input hides it
    infos = tuple(worker.info for worker in workers)
    metrics = HeadMetrics()
    identity = rpc.Identity("head", workers[0].identity.fingerprint)
    check = CrossCheck(identity, metrics, share=1.0)
    try:
        x_TD = torch.randn(4, checkpoint.config.hidden_size)
        routing = Routing(torch.full((4, 1), 3), torch.ones(4, 1))
        for layer, outcome in ((1, "agreed"), (0, "damaged"), (0, "unanswered")):
            # unanswered: the worker holds the expert no more
            check.offer(x_TD, assign(layer, routing), lambda unit: (1, [infos[:1], infos[1:]]))
            wait_for_metric(metrics, f'cross_checks_total{{outcome="{outcome}"}} 1.0')
        assert damaged not in workers[1].held
        assert damaged in workers[0].held
    finally:
        check.close()
        for worker in workers:
            worker.stop()


def wait_for_metric(metrics: HeadMetrics, line: str) -> None:
    deadline = time.monotonic() + FAR_BELOW_S
    while line not in metrics.exposition():
        assert time.monotonic() < deadline, metrics.exposition()


def test_copies_that_disagree_with_sound_weights_are_unexplained(
    checkpoint: Checkpoint,
) -> None:
    """As by a processor that computes wrongly; nobody can say which of the two."""
    workers = [WorkerServer(f"worker-{index}", checkpoint) for index in range(2)]
    infos = tuple(worker.info for worker in workers)
    metrics = HeadMetrics()
    check = CrossCheck(rpc.Identity("head", workers[0].identity.fingerprint), metrics, share=0.5)
    wrong = workers[1].held
    wrong[Unit(0, 3)] = wrong[Unit(0, 4)]
    workers[1]._checksums[Unit(0, 3)] = checksum(wrong[Unit(0, 3)])
    try:
        x_TD = torch.randn(2, checkpoint.config.hidden_size)
        assignments = assign(0, Routing(torch.full((2, 1), 3), torch.ones(2, 1)))
        check.offer(x_TD, assignments, lambda unit: (1, [infos[:1], infos[1:]]))
        wait_for_metric(metrics, 'outcome="unexplained"} 1.0')
    finally:
        check.close()
        for worker in workers:
            worker.stop()


def test_a_worker_says_that_it_serves_no_more_before_it_ends(checkpoint: Checkpoint) -> None:
    worker = WorkerServer("worker-0", checkpoint, units=[])
    with grpc.insecure_channel(worker.address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        request = health_pb2.HealthCheckRequest(service=rpc.EXPERT_SERVICE)
        said = health.Watch(request, timeout=20)
        assert next(said).status == health_pb2.HealthCheckResponse.SERVING
        ending = threading.Thread(target=worker.service.end, args=(worker.server, 5.0))
        ending.start()
        assert next(said).status == health_pb2.HealthCheckResponse.NOT_SERVING
        said.cancel()
        ending.join(10)
        assert not ending.is_alive()


def test_only_a_worker_of_this_host_is_asked_by_its_pipe(
    two_workers: list[WorkerServer], checkpoint: Checkpoint, caplog: pytest.LogCaptureFixture
) -> None:
    """Both answer alike; a pipe leaves no stream at the worker's gRPC server."""
    routing = Routing(torch.tensor([[0, 1]]), torch.tensor([[0.5, 0.5]]))
    x_TD = torch.randn(1, checkpoint.config.hidden_size).to(checkpoint.dtype)
    caplog.set_level(logging.INFO, logger="cluster.expert.service")
    sums = []
    with behind_proxy(two_workers[1]) as (_, far):
        for info, num_streams in ((two_workers[0].info, 0), (far, 1)):
            caplog.clear()
            placement = Placement(1, (info,), everywhere(checkpoint, (0,)))
            with connected(placement, checkpoint) as experts:
                sums.append(experts.dispatch(0, x_TD, routing).wait())
            assert caplog.text.count("opened") == num_streams
    assert torch.equal(*sums)

"""The split over real gRPC, without Ray: what it computes, and what it does when a worker fails."""

import logging
import math
import queue
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import grpc
import pytest
import torch
import transformers
from torch import Tensor

from cluster import PROTOCOL_VERSION, rpc, wire
from cluster.errors import ExpertFailedError, ExpertsUnavailableError, HandshakeError
from cluster.head.dispatch import RemoteExperts
from cluster.head.feed import PlacementFeed
from cluster.head.probe import pass_through_every_expert
from cluster.head.stream import WorkerStream
from cluster.placement import held_by
from model import TINY, Mixtral
from model.experts import Assignments, Experts, LocalExperts, weighted_sums
from model.sampling_params import SamplingParams
from model.units import Unit
from model.weights import Checkpoint
from protos import expert_pb2, peer_pb2
from tests.cluster_fakes import DEADLINE_S
from tests.integration.workers import WorkerServer, behind_proxy, placement_on, remote_experts
from tests.oracle import Oracle

GREEDY = SamplingParams(max_tokens=60, temperature=0.0)


@pytest.fixture
def feed() -> PlacementFeed:
    return PlacementFeed()


@pytest.fixture
def remote(
    feed: PlacementFeed, checkpoint: Checkpoint, two_workers: list[WorkerServer]
) -> Iterator[RemoteExperts]:
    """Experts on two workers, connected."""
    feed.put(placement_on(two_workers, checkpoint))
    experts = remote_experts(feed, checkpoint)
    assert experts.connect(timeout_s=10)
    yield experts
    experts.close()


def with_experts(mixtral: Mixtral, experts: Experts) -> Mixtral:
    return Mixtral(mixtral.decoder, experts, mixtral.tokenizer, mixtral.chat)


def test_logits_are_those_of_transformers_on_both_paths(
    mixtral: Mixtral, remote: RemoteExperts, stories: list[str]
) -> None:
    ids = mixtral.tokenizer.encode_prompt(" ".join(stories[:2]))[:200]
    assert len(ids) == 200
    reference = transformers.AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    with torch.inference_mode():
        expected = reference(torch.tensor([ids])).logits[0]
    for model in (mixtral, with_experts(mixtral, remote)):
        assert (model.logits(ids) - expected).abs().max() <= 1e-4


def test_greedy_ids_are_the_oracles_on_both_paths(
    mixtral: Mixtral, remote: RemoteExperts, oracle: Oracle
) -> None:
    prompt = mixtral.tokenizer.encode_prompt("Once upon a time")
    expected = oracle.greedy(prompt, GREEDY.max_tokens)
    for model in (mixtral, with_experts(mixtral, remote)):
        assert model.generate_ids([prompt], [GREEDY]) == [expected]


def test_workers_may_hold_their_experts_in_different_forms(
    mixtral: Mixtral, checkpoint: Checkpoint
) -> None:
    rough = Checkpoint(TINY, dtype=torch.float32, expert_quantization="int4")
    each = (rough, checkpoint)
    workers = [WorkerServer(f"worker-{index}", own) for index, own in enumerate(each)]
    placement = placement_on(workers, checkpoint)
    feed = PlacementFeed()
    feed.put(placement)
    experts = remote_experts(feed, checkpoint)
    mixed = LocalExperts(
        {
            unit: each[worker].load_unit(unit)
            for worker in range(2)
            for unit in held_by(placement.table, worker)
        }
    )
    try:
        assert experts.connect(timeout_s=10)
        here, there = (with_experts(mixtral, own).logits([1, 5, 9]) for own in (mixed, experts))
        assert (here - there).abs().max() <= 1e-4
        assert (here - mixtral.logits([1, 5, 9])).abs().max() > 1e-3
    finally:
        experts.close()
        for worker in workers:
            worker.stop()


def test_bfloat16_perplexity_is_the_same_on_both_paths(stories: list[str]) -> None:
    checkpoint = Checkpoint(TINY, dtype=torch.bfloat16)
    workers = [WorkerServer(f"worker-{index}", checkpoint) for index in range(2)]
    feed = PlacementFeed()
    feed.put(placement_on(workers, checkpoint))
    experts = remote_experts(feed, checkpoint)
    try:
        assert experts.connect(timeout_s=10)
        local = Mixtral.load(TINY, dtype="bfloat16")
        ids = local.tokenizer.encode_prompt(stories[0])
        here, there = (
            perplexity(model.logits(ids), ids) for model in (local, with_experts(local, experts))
        )
        # sums are float32 on both paths; only their order differs
        assert math.isclose(here, there, rel_tol=5e-3)
    finally:
        experts.close()
        for worker in workers:
            worker.stop()


def perplexity(logits_TV: torch.Tensor, ids: list[int]) -> float:
    loss = torch.nn.functional.cross_entropy(logits_TV[:-1], torch.tensor(ids[1:]))
    return float(loss.exp())


def test_the_probe_reaches_every_expert_of_the_placement(
    mixtral: Mixtral, remote: RemoteExperts, two_workers: list[WorkerServer]
) -> None:
    pass_through_every_expert(mixtral.decoder, remote)
    seen = {
        (sample.labels["layer"], sample.labels["expert"])
        for worker in two_workers
        for family in worker.metrics.registry.collect()
        for sample in family.samples
        if sample.name == "maestrale_expert_rows_total"
    }
    config = mixtral.config
    assert len(seen) == config.num_hidden_layers * config.num_local_experts


def test_a_worker_that_dies_costs_no_token(
    mixtral: Mixtral,
    remote: RemoteExperts,
    feed: PlacementFeed,
    two_workers: list[WorkerServer],
    checkpoint: Checkpoint,
) -> None:
    prompt = mixtral.tokenizer.encode_prompt("Once upon a time")
    expected = mixtral.generate_ids([prompt], [GREEDY])
    successor = WorkerServer("worker-1", checkpoint)
    seen = 0

    def replace_a_worker(_index: int, _token_id: int) -> None:
        nonlocal seen
        seen += 1
        if seen == 10:
            two_workers[1].stop()
            feed.put(placement_on([two_workers[0], successor], checkpoint, epoch=2))

    try:
        actual = with_experts(mixtral, remote).generate_ids([prompt], [GREEDY], replace_a_worker)
    finally:
        successor.stop()
    assert actual == expected


def test_a_cut_connection_to_a_living_worker_costs_no_token(
    mixtral: Mixtral, two_workers: list[WorkerServer], checkpoint: Checkpoint
) -> None:
    prompt = mixtral.tokenizer.encode_prompt("Once upon a time")
    expected = mixtral.generate_ids([prompt], [GREEDY])
    with behind_proxy(two_workers[1]) as (proxy, far):
        placement = placement_on(two_workers, checkpoint)
        feed = PlacementFeed()
        feed.put(replace(placement, workers=(placement.workers[0], far)))
        experts = remote_experts(feed, checkpoint)
        assert experts.connect(timeout_s=10)
        seen = 0

        def cut(_index: int, _token_id: int) -> None:
            nonlocal seen
            seen += 1
            if seen in (5, 20):
                proxy.cut()

        try:
            actual = with_experts(mixtral, experts).generate_ids([prompt], [GREEDY], cut)
        finally:
            experts.close()
        assert actual == expected
        assert proxy.num_cut >= 2


def test_a_lost_worker_without_successor_is_an_error_within_the_bound(
    mixtral: Mixtral, two_workers: list[WorkerServer], checkpoint: Checkpoint
) -> None:
    feed = PlacementFeed()
    feed.put(placement_on(two_workers, checkpoint))
    experts = remote_experts(feed, checkpoint, recovery_timeout_s=1.0)
    assert experts.connect(timeout_s=10)
    two_workers[1].stop()
    try:
        with pytest.raises(ExpertsUnavailableError, match=r"worker-1 at .*no replacement within"):
            with_experts(mixtral, experts).logits([1, 5, 9])
    finally:
        experts.close()


def test_a_worker_that_never_answers_is_an_error_within_the_deadline(
    mixtral: Mixtral, checkpoint: Checkpoint, two_workers: list[WorkerServer]
) -> None:
    with behind_proxy(two_workers[1]) as (proxy, far):
        placement = placement_on(two_workers, checkpoint)
        feed = PlacementFeed()
        feed.put(replace(placement, workers=(placement.workers[0], far)))
        experts = remote_experts(feed, checkpoint, timeout_s=0.5, recovery_timeout_s=0.5)
        assert experts.connect(timeout_s=10)
        proxy.stall()
        try:
            with pytest.raises(ExpertsUnavailableError, match="worker-1"):
                with_experts(mixtral, experts).logits([1, 5, 9])
        finally:
            experts.close()


@pytest.fixture
def channel(two_workers: list[WorkerServer]) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(two_workers[0].address, options=rpc.CHANNEL_OPTIONS) as channel:
        yield channel


def good_call(call_id: int = 1) -> bytes:
    return wire.joined(
        wire.encode_call(
            wire.Call(
                call_id=call_id,
                epoch=1,
                layer=0,
                x_RD=torch.ones(1, 192),
                assignments=Assignments(((Unit(0, 0), 1),), torch.tensor([0]), torch.tensor([1.0])),
            )
        )
    )


def test_a_lying_call_gets_its_reason_and_the_stream_goes_on(channel: grpc.Channel) -> None:
    wrong_dtype = wire.joined(
        wire.encode_call(
            replace(
                wire.decode_call(good_call(2), Checkpoint(TINY).config, torch.float32),
                x_RD=torch.ones(1, 192, dtype=torch.bfloat16),
            )
        )
    )
    too_short = good_call(3)[:-2]
    calls = [good_call(1), wrong_dtype, too_short, b"\xff\xff garbage", b"", good_call(4)]
    replies = channel.stream_stream(f"/{rpc.EXPERT_SERVICE}/Compute")(iter(calls), timeout=20)
    decoded = [wire.decode_reply(message) for message in replies]
    errors = [reply.error for reply in decoded]
    assert errors == [0] + 4 * [expert_pb2.ERROR_INVALID] + [0]
    assert "BFLOAT16" in decoded[1].message
    assert "bytes" in decoded[2].message
    assert decoded[5].call_id == 4


def test_an_expert_that_is_not_held_is_refused_by_name(checkpoint: Checkpoint) -> None:
    from cluster.expert.batcher import Batcher
    from cluster.expert.service import ExpertService
    from cluster.metrics import WorkerMetrics

    metrics = WorkerMetrics()
    identity = rpc.Identity("empty", rpc.fingerprint(checkpoint.config, "float32"))
    service = ExpertService(
        Batcher({}, metrics),
        checkpoint.config,
        torch.float32,
        torch.device("cpu"),
        identity,
        metrics,
        lambda unit: False,
    )
    server, address = rpc.new_server("127.0.0.1")
    service.add_to(server)
    server.start()
    try:
        with grpc.insecure_channel(address) as channel:
            compute = channel.stream_stream(f"/{rpc.EXPERT_SERVICE}/Compute")
            reply = wire.decode_reply(next(compute(iter([good_call()]), timeout=20)))
    finally:
        server.stop(None).wait()
    assert reply.error == expert_pb2.ERROR_NOT_HELD
    assert "expert 0 of layer 0" in reply.message


def test_the_end_of_a_cancelled_stream_is_logged(
    channel: grpc.Channel, caplog: pytest.LogCaptureFixture
) -> None:
    has_ended = threading.Event()

    def note(record: logging.LogRecord) -> bool:
        if "ended" in record.getMessage():
            has_ended.set()
        return True

    caplog.set_level(logging.INFO, "cluster.expert.service")
    caplog.handler.addFilter(note)
    messages: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
    messages.put(good_call())
    replies = channel.stream_stream(f"/{rpc.EXPERT_SERVICE}/Compute")(iter(messages.get, None))
    next(replies)
    replies.cancel()
    assert has_ended.wait(DEADLINE_S)
    messages.put(None)


def test_where_an_expert_has_one_copy_what_it_cannot_compute_fails_at_once(
    mixtral: Mixtral,
    remote: RemoteExperts,
    two_workers: list[WorkerServer],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    prompt = [1, 5, 9]
    expected = mixtral.logits(prompt)

    def fail(*args: object) -> None:
        raise MemoryError("no room for the rows")

    with monkeypatch.context() as patch:
        patch.setattr("cluster.expert.batcher.weighted_sums", fail)
        with pytest.raises(ExpertFailedError, match="no room for the rows"):
            with_experts(mixtral, remote).logits(prompt)
    # what the other worker had answered meanwhile is not taken for the next step's
    assert (with_experts(mixtral, remote).logits(prompt) - expected).abs().max() <= 1e-4


def test_a_worker_ends_when_it_can_compute_nothing_any_more(
    mixtral: Mixtral,
    remote: RemoteExperts,
    two_workers: list[WorkerServer],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An error of CUDA's stays; what only some rows, or too many of them, cause does not count."""
    are_all_failing = False

    def compute(held: Any, x_RD: Tensor, assignments: Assignments) -> Tensor:
        if are_all_failing or x_RD.any():
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return weighted_sums(held, x_RD, assignments)

    monkeypatch.setattr("cluster.expert.batcher.weighted_sums", compute)
    with pytest.raises(ExpertFailedError, match="illegal memory access"):
        with_experts(mixtral, remote).logits([1, 5, 9])
    assert [worker.num_broken for worker in two_workers] == [0, 0]
    are_all_failing = True
    with pytest.raises(ExpertFailedError, match="illegal memory access"):
        with_experts(mixtral, remote).logits([1, 5, 9])
    assert any(worker.num_broken for worker in two_workers)


def test_a_peer_of_another_version_is_refused_with_both_named(channel: grpc.Channel) -> None:
    hello = channel.unary_unary(
        f"/{rpc.EXPERT_SERVICE}/Hello",
        request_serializer=peer_pb2.HelloRequest.SerializeToString,
        response_deserializer=peer_pb2.HelloReply.FromString,
    )
    request = peer_pb2.HelloRequest(protocol=99, build="9.9.9", peer="stranger")
    with pytest.raises(grpc.RpcError) as error:
        hello(request, timeout=10)
    assert error.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    for part in (f"protocol {PROTOCOL_VERSION}", "99", "9.9.9", rpc.BUILD):
        assert part in error.value.details()


def test_a_worker_of_another_model_is_refused(two_workers: list[WorkerServer]) -> None:
    stranger = rpc.Identity("head", "another model")
    with pytest.raises(HandshakeError, match="another model"):
        WorkerStream(two_workers[0].info, stranger)


def test_a_restarted_worker_is_not_taken_for_the_one_before(
    two_workers: list[WorkerServer], checkpoint: Checkpoint
) -> None:
    identity = rpc.Identity("head", rpc.fingerprint(checkpoint.config, "float32"))
    before = replace(two_workers[0].info, incarnation=12345)
    with pytest.raises(ExpertsUnavailableError, match="replaced by another process"):
        WorkerStream(before, identity)

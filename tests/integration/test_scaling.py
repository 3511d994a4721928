"""Heads and workers come under load, go after it, and sleep, under real Ray Serve; no stream
notices.
"""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial

import grpc
import pytest
import torch

from cluster import rpc, wire
from cluster.client import Client
from model import Mixtral
from model.experts import assign
from model.router import Routing
from tests import faults
from tests.integration.conftest import Service
from tests.integration.test_service import until
from tests.streams import prompts

NUM_STREAMS = 12
MAX_TOKENS = 60
NUM_ROWS = 256
"""Of a call that keeps a worker busy for a while."""
TIMEOUT_S = 120.0

SETTINGS = {
    "num_workers": 1,
    "max_workers": 2,
    "max_heads": 2,
    "max_running_sequences": 4,  # so the others wait
    "scale_up_after_s": 0,
    "scale_down_after_s": 8,
    "sleep_after_s": 45,  # well after the last of the others has gone
}


@pytest.fixture(scope="module")
def scaling_service() -> Iterator[Service]:
    flags = [part for name, value in SETTINGS.items() for part in ("--set", f"{name}={value}")]
    with pytest.MonkeyPatch.context() as patch:
        # how often heads tell Serve what they were told, which is 10 s otherwise
        patch.setenv("RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S", "1")
        service = Service.start("--dtype", "float32", *flags)
    try:
        yield service
    finally:
        service.stop()


@contextmanager
def streams(client: Client, mixtral: Mixtral) -> Iterator[list[str]]:
    """Many at a time, over and over, until the block ends. Yields what was not as it should be."""
    texts = {p: mixtral.generate(p, max_tokens=MAX_TOKENS) for p in prompts(NUM_STREAMS)}
    is_over = threading.Event()
    failures: list[str] = []

    def tell(prompt: str) -> None:
        while not is_over.is_set():
            try:
                text = client.completions.create(
                    prompt=prompt, max_tokens=MAX_TOKENS, temperature=0
                )
            except Exception as error:
                failures.append(repr(error))
                return
            if text.choices[0].text != texts[prompt]:
                failures.append(text.choices[0].text)

    with ThreadPoolExecutor(NUM_STREAMS) as pool:
        for prompt in texts:
            pool.submit(tell, prompt)
        try:
            yield failures
        finally:
            is_over.set()


@contextmanager
def busy(address: str, mixtral: Mixtral) -> Iterator[None]:
    """Keep a worker that holds all experts computing, from two streams, while it answers."""
    config = mixtral.config
    generator = torch.Generator().manual_seed(0)
    scores_TE = torch.rand(NUM_ROWS, config.num_local_experts, generator=generator)
    weights_TK, expert_ids_TK = scores_TE.topk(config.num_experts_per_tok)
    call = wire.Call(
        call_id=1,
        epoch=1,
        layer=0,
        x_RD=torch.randn(NUM_ROWS, config.hidden_size, generator=generator),
        assignments=assign(0, Routing(expert_ids_TK, weights_TK)),
    )
    message, is_over = wire.joined(wire.encode_call(call)), threading.Event()

    def ask() -> None:
        with grpc.insecure_channel(address, rpc.CHANNEL_OPTIONS) as channel:
            compute = channel.stream_stream(f"/{rpc.EXPERT_SERVICE}/Compute")
            one_by_one = threading.Semaphore()

            def messages() -> Iterator[bytes]:
                while not is_over.is_set():
                    assert one_by_one.acquire(timeout=TIMEOUT_S)
                    yield message

            for reply in compute(messages()):
                one_by_one.release()
                if wire.decode_reply(reply).error:  # its experts have moved: that was the point
                    is_over.set()

    with ThreadPoolExecutor(2) as pool:
        for _ in range(2):
            pool.submit(ask)
        try:
            yield
        finally:
            is_over.set()


def test_heads_and_workers_come_under_load_and_go_after_it(
    scaling_service: Service, mixtral: Mixtral
) -> None:
    with scaling_service.client() as client:
        with streams(client, mixtral) as failures:
            until(lambda: client.cluster.status().heads_ready == 2, "a second head", TIMEOUT_S)
            (worker, *_) = client.cluster.status().workers
            with busy(worker.address, mixtral):
                until(
                    lambda: len(client.cluster.status().workers) == 2, "a second worker", TIMEOUT_S
                )
            grown = client.cluster.status()
        assert failures == []
        assert (grown.heads_expected, grown.heads_ready) == (2, 2)
        assert grown.scaling is not None
        assert " -> 2" in grown.scaling
        until(lambda: len(client.cluster.status().workers) == 1, "one worker again", TIMEOUT_S)
        until(lambda: client.cluster.status().heads_ready == 1, "one head again", TIMEOUT_S)
        shrunk = client.cluster.status()
        assert shrunk.scaling is not None
        assert "2 -> 1" in shrunk.scaling
        prompt = prompts(1)[0]
        reply = client.completions.create(prompt=prompt, max_tokens=MAX_TOKENS, temperature=0)
        assert reply.choices[0].text == mixtral.generate(prompt, max_tokens=MAX_TOKENS)


def test_without_requests_nothing_runs_until_the_next(
    scaling_service: Service, mixtral: Mixtral
) -> None:
    def processes() -> list[int]:
        """Of heads and workers."""
        pid = scaling_service.process.pid
        return [*faults.actors(pid, "HeadReplica"), *faults.actors(pid, "ExpertWorker")]

    with scaling_service.client() as client:
        assert processes()
        until(lambda: "asleep" in client.cluster.status().phase, "sleep", TIMEOUT_S)
        until(lambda: not processes(), "an end of all heads and workers", TIMEOUT_S)
        asleep = client.cluster.status()
        assert asleep.ready, "else nothing would send it the request that wakes it"
        assert (asleep.heads_ready, asleep.heads_expected, asleep.workers) == (0, 0, [])
        assert asleep.scaling is not None
        assert "no request for" in asleep.scaling
        with ThreadPoolExecutor(2) as pool:  # two wake it: one service is enough for both
            texts = list(pool.map(partial(completed, client), prompts(2)))
        assert texts == [mixtral.generate(p, max_tokens=MAX_TOKENS) for p in prompts(2)]
        awake = client.cluster.status()
        assert (awake.heads_ready, awake.heads_expected, len(awake.workers)) == (1, 1, 1)


def completed(client: Client, prompt: str) -> str:
    reply = client.completions.create(prompt=prompt, max_tokens=MAX_TOKENS, temperature=0)
    return reply.choices[0].text

"""Ingress and heads over real gRPC, without Ray: what breaks on the way costs no token."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import aclosing

import pytest

from cluster import rpc
from cluster.ingress.heads import HeadPool
from cluster.ingress.journal import Journal
from cluster.metrics import IngressMetrics
from cluster.placement import HeadInfo
from model import Mixtral
from model.sampling_params import SamplingParams
from tests.faults import Proxy
from tests.integration.heads import FINGERPRINT, HeadServer

PARAMS = SamplingParams(max_tokens=40, temperature=0.0)
DEADLINE_S = 60.0


@pytest.fixture
def one(mixtral: Mixtral) -> Iterator[HeadServer]:
    with HeadServer("one", mixtral).running() as server:
        yield server


@pytest.fixture
def other(mixtral: Mixtral) -> Iterator[HeadServer]:
    with HeadServer("other", mixtral).running() as server:
        yield server


@pytest.fixture(scope="module")
def prompts(mixtral: Mixtral, stories: list[str]) -> list[tuple[int, ...]]:
    return [tuple(mixtral.tokenizer.encode_prompt(story)[:12]) for story in stories[:4]]


@pytest.fixture(scope="module")
def alone(mixtral: Mixtral, prompts: list[tuple[int, ...]]) -> list[list[int]]:
    return mixtral.generate_ids(prompts, [PARAMS] * len(prompts))


def tell(
    heads: list[HeadInfo],
    prompts: list[tuple[int, ...]],
    after: int,
    disturb: Callable[[HeadPool], Awaitable[None]],
    *,
    silent_after_s: float = 30.0,
) -> tuple[list[list[int]], str]:
    """All prompts' ids from these heads, and the ingress's metrics.

    disturb: called once each has so many tokens.
    """
    metrics = IngressMetrics()

    async def scenario() -> list[list[int]]:
        pool = HeadPool(
            rpc.Identity("ingress", FINGERPRINT),
            metrics,
            silent_after_s=silent_after_s,
            wait_s=DEADLINE_S,
        )
        pool.update(heads)
        journals = [Journal(prompt, PARAMS) for prompt in prompts]
        has_some = [asyncio.Event() for _ in journals]

        async def read(journal: Journal, has_some: asyncio.Event) -> list[int]:
            ids: list[int] = []
            try:
                async with aclosing(pool.generate(journal)) as batches:
                    async for token_ids in batches:
                        ids += token_ids
                        if len(ids) >= after:
                            has_some.set()
            finally:
                has_some.set()  # a failure is to be seen, not waited for
            return ids

        async with asyncio.timeout(DEADLINE_S):
            tasks = [
                asyncio.create_task(read(*each)) for each in zip(journals, has_some, strict=True)
            ]
            for each in has_some:
                await each.wait()
            await disturb(pool)
            try:
                return await asyncio.gather(*tasks)
            finally:
                await pool.close()

    return asyncio.run(scenario()), metrics.exposition()


def test_a_cut_connection_to_the_only_head_costs_no_token(
    one: HeadServer, prompts: list[tuple[int, ...]], alone: list[list[int]]
) -> None:
    with Proxy(one.address) as proxy:

        async def cut(pool: HeadPool) -> None:
            proxy.cut()

        told, metrics = tell([one.info(proxy.address)], prompts, 5, cut)
    assert told == alone
    assert 'maestrale_replays_total{cause="lost"} 4.0' in metrics


def test_a_head_that_falls_silent_is_replaced_within_its_deadline(
    one: HeadServer, other: HeadServer, prompts: list[tuple[int, ...]], alone: list[list[int]]
) -> None:
    with Proxy(one.address) as proxy:

        async def stall(pool: HeadPool) -> None:
            proxy.stall()
            pool.update([one.info(proxy.address), other.info()])

        heads = [one.info(proxy.address)]
        told, metrics = tell(heads, prompts, 5, stall, silent_after_s=2.0)
    assert told == alone
    assert 'maestrale_replays_total{cause="lost"} 4.0' in metrics


def test_a_head_that_stops_is_replaced(
    one: HeadServer, other: HeadServer, prompts: list[tuple[int, ...]], alone: list[list[int]]
) -> None:
    async def stop(pool: HeadPool) -> None:
        await asyncio.to_thread(one.server.stop(0).wait)
        pool.update([one.info(), other.info()])

    told, _ = tell([one.info()], prompts, 5, stop)
    assert told == alone


def test_a_head_that_drains_hands_over_and_is_empty_at_once(
    one: HeadServer, other: HeadServer, prompts: list[tuple[int, ...]], alone: list[list[int]]
) -> None:
    async def drain(pool: HeadPool) -> None:
        one.service.drain()
        pool.update([one.info(), other.info()])
        while one.head.engine.load.num_requests:  # noqa: ASYNC110 (the engine tells nobody)
            await asyncio.sleep(0.01)

    told, metrics = tell([one.info()], prompts, 5, drain)
    assert told == alone
    assert 'cause="lost"' not in metrics
    assert 'maestrale_replays_total{cause="moved"}' in metrics


def test_a_head_of_another_model_is_not_used(one: HeadServer) -> None:
    async def scenario() -> None:
        pool = HeadPool(
            rpc.Identity("ingress", "another model"),
            IngressMetrics(),
            silent_after_s=30.0,
            wait_s=1.0,
        )
        pool.update([one.info()])
        with pytest.raises(Exception, match="no head replica"):
            await anext(pool.generate(Journal((1, 2), PARAMS)))
        await pool.close()

    asyncio.run(scenario())

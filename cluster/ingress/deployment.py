"""The Ray Serve deployment round the HTTP API."""

import asyncio
import logging
import os
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext, suppress
from functools import partial
from typing import Any

from fastapi import FastAPI
from ray import serve

from cluster import rpc
from cluster.config import ServeConfig
from cluster.context import context_of
from cluster.follow import follow
from cluster.ingress import admin, users_grpc
from cluster.ingress.answerer import Answerer
from cluster.ingress.api import create_app
from cluster.ingress.auth import Access, read_api_keys
from cluster.ingress.heads import HeadPool
from cluster.ingress.journal import Journal
from cluster.ingress.prepare import ApiSettings
from cluster.ingress.waking import Waker
from cluster.lenders import new_borrower
from cluster.lending.located import locate
from cluster.merging import merge
from cluster.metrics import IngressMetrics
from cluster.placement import ClusterView
from cluster.schema import LoadStatus, Readiness, WorkerStatus
from cluster.security import Security
from model.chat import ChatFormat
from model.config import MixtralConfig
from model.generation_defaults import GenerationDefaults
from model.tokenizer import Tokenizer

logger = logging.getLogger(__name__)


class Ingress:
    """One ingress. Serve builds its ASGI app by `__serve_build_asgi_app__`."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, config: ServeConfig, controller: Any, heads: Any
    ) -> None:
        """controller: handle of the Controller deployment. heads: that of the HeadReplica
        deployment, which Serve only deploys because somebody holds it; requests go by gRPC, and
        only who wakes a sleeping service calls it.
        """
        security = Security.load(config.network, "ingress", os.environ)
        borrower = partial(new_borrower, security=security)
        folder = (await asyncio.to_thread(locate, config.model, borrower)).folder
        model = MixtralConfig.from_folder(folder)
        defaults = GenerationDefaults.from_folder(folder)
        logger.info(
            "defaults of generation_config.json: %s; end tokens: %s",
            defaults,
            model.eos_token_ids,
        )
        tokenizer = Tokenizer.from_folder(folder)
        metrics = IngressMetrics()
        name = f"ingress-{serve.get_replica_context().replica_id.unique_id}"
        identity = rpc.Identity(name, rpc.fingerprint(model, config.dtype), security)
        access = Access.with_keys(
            read_api_keys(config.api_keys_file, os.environ),
            allow_open=config.allow_open_http,
            allowed_origins=config.allowed_origins,
        )
        waker = Waker(controller, heads) if config.sleep_after_s is not None else None
        self._app = create_app(
            Cluster(
                controller,
                HeadPool(
                    identity,
                    metrics,
                    silent_after_s=config.head_timeout_s,
                    wait_s=config.head_wait_s,
                    wake=waker or (lambda: None),
                ),
                metrics,
                identity,
                wait_s=config.head_wait_s,
                waker=waker,
            ),
            tokenizer,
            ChatFormat.from_folder(folder, tokenizer),
            ApiSettings(
                model_id=config.model_id(),
                max_model_len=context_of(config, model),
                vocab_size=model.vocab_size,
                eos_token_ids=model.eos_token_ids,
                labels=model.labels,
                problem_type=model.problem_type,
                pad_token_id=model.pad_token_id,
                defaults=defaults,
                num_drafts=config.num_drafts,
                max_concurrent_requests=-(-config.max_concurrent_requests // config.num_ingresses),
                max_body_bytes=config.max_body_bytes,
                sse_keep_alive_s=config.sse_keep_alive_s,
            ),
            metrics,
            access,
            beside=partial(_beside, config, metrics, access),
        )
        self._app.include_router(admin.router(controller.rebalance.remote, access))

    def __serve_build_asgi_app__(self) -> FastAPI:
        return self._app


@asynccontextmanager
async def _beside(
    config: ServeConfig, metrics: IngressMetrics, access: Access, answerer: Answerer
) -> AsyncIterator[None]:
    """What goes on while the app runs: the door for gRPC, and keys that change."""
    async with grpc_door(config, metrics, access)(answerer):
        if config.api_keys_file is None:
            yield
            return
        follower = asyncio.create_task(access.follow(config.api_keys_file, os.environ))
        try:
            yield
        finally:
            follower.cancel()
            await asyncio.gather(follower, return_exceptions=True)


def grpc_door(
    config: ServeConfig, metrics: IngressMetrics, access: Access
) -> Callable[[Answerer], AbstractAsyncContextManager[Any]]:
    """What opens the users' gRPC door, if there is to be one."""
    if config.grpc_port is None:
        return nullcontext
    host = f"[{config.grpc_host}]" if ":" in config.grpc_host else config.grpc_host
    credentials = None
    if config.grpc_certificate is not None and config.grpc_key is not None:
        credentials = users_grpc.credentials_of(config.grpc_certificate, config.grpc_key)
    return partial(
        users_grpc.serving,
        metrics=metrics,
        address=f"{host}:{config.grpc_port}",
        access=access,
        credentials=credentials,
        drain_s=config.drain_timeout_s / 2,  # Serve kills the ingress after all of it
    )


class Cluster:
    """The API's engine: the heads, as the controller last told. Owned by the event loop."""

    def __init__(
        self,
        controller: Any,
        heads: HeadPool,
        metrics: IngressMetrics,
        identity: rpc.Identity,
        *,
        wait_s: float,
        waker: Waker | None = None,
    ) -> None:
        """wait_s: how long a request waits for a controller that takes over from another, or a
        service that wakes. waker: of one that may sleep.
        """
        self._controller = controller
        self._heads = heads
        self._metrics = metrics
        self._identity = identity
        self._wait_s = wait_s
        self._waker = waker
        self._view: ClusterView | None = None
        self._changed = asyncio.Event()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        follower = asyncio.create_task(follow(self._controller, self._on_view))
        try:
            yield
        finally:
            follower.cancel()
            await asyncio.gather(follower, return_exceptions=True)
            if self._waker is not None:
                await self._waker.close()
            await self._heads.close()

    def generate(self, journal: Journal) -> AsyncGenerator[tuple[int, ...], None]:
        return self._heads.generate(journal)

    async def classify(self, prompt_ids: Sequence[int], client: str) -> tuple[float, ...]:
        return await self._heads.classify(prompt_ids, client)

    def readiness(self) -> Readiness:
        view = self._view
        if view is None:
            return Readiness(
                ready=False,
                phase="waiting for the controller",
                percent=0,
                epoch=0,
                heads_ready=0,
                heads_expected=0,
                workers=[],
            )
        placement, num_ready = view.placement, self._heads.num_ready
        # A head that was lost just now is still listed: requests wait for the next. One that the
        # controller does not list, since it has just started anew, still computes.
        is_ready = view.is_ready or (placement is not None and num_ready > 0)
        phase, percent = ("ready", 100) if is_ready else (view.phase, view.percent)
        if view.is_asleep:  # whoever sends requests where it is ready must go on
            is_ready, phase, percent = True, "asleep until the next request", 100
        return Readiness(
            ready=is_ready,
            phase=phase,
            percent=percent,
            error=view.error,
            epoch=placement.epoch if placement else 0,
            experts_missing=placement.num_missing if placement else 0,
            heads_ready=num_ready,
            heads_expected=view.heads_expected,
            scaling=view.scaling,
            workers=[
                WorkerStatus(
                    name=worker.name,
                    address=worker.address,
                    num_experts=placement.num_experts_of(index),
                    num_bytes=worker.num_bytes,
                )
                for index, worker in enumerate(placement.workers)
            ]
            if placement
            else [],
            loading=[
                LoadStatus(
                    worker=load.worker,
                    source="lender" if load.borrows else "disk",
                    loaded_bytes=load.progress.done_bytes,
                    total_bytes=load.progress.total_bytes,
                    bytes_per_s=load.progress.bytes_per_s,
                    left_s=load.progress.left_s,
                )
                for load in view.loading
            ],
        )

    async def settled(self) -> Readiness:
        if self._waker is not None:
            self._waker()
        with suppress(TimeoutError):
            async with asyncio.timeout(self._wait_s):
                while not self.readiness().ready and self._is_soon_ready:
                    await self._changed.wait()
        return self.readiness()

    @property
    def _is_soon_ready(self) -> bool:
        """Whether it may well be: the service has been changed, its controller replaced, or it
        wakes.
        """
        view = self._view
        if view is None:
            return True
        is_expected = view.takes_over is not False or self._waker is not None
        return is_expected and view.error is None

    async def metrics(self) -> str:
        view = self._view
        peers: list[tuple[str, str, str]] = []  # name, address, service
        if view is not None:
            peers += [(head.name, head.address, rpc.HEAD_SERVICE) for head in view.heads]
            workers = view.placement.workers if view.placement else ()
            peers += [(worker.name, worker.address, rpc.EXPERT_SERVICE) for worker in workers]
        texts = await asyncio.gather(
            *(
                rpc.scrape(address, service, self._identity.security)
                for _, address, service in peers
            )
        )
        own = {self._identity.name: self._metrics.exposition()}
        return merge(own | {name: text for (name, _, _), text in zip(peers, texts, strict=True)})

    def _on_view(self, view: ClusterView) -> None:
        self._view = view
        self._heads.update(view.heads)
        self._changed.set()
        self._changed = asyncio.Event()
        self._metrics.observe_sleep(view.is_asleep)
        if view.placement is not None:
            self._metrics.observe_placement(view.placement.epoch, view.placement.num_missing)

"""The Ray Serve deployment round the head: brings its parts up in order, and down again.

Serve decides how many there are and watches their health; requests come in by gRPC, not through
Serve. Loading happens on the engine's thread, so that the replica answers Serve meanwhile.
"""

import asyncio
import logging
import os
import threading
import time
from dataclasses import replace
from functools import partial
from typing import Any

import grpc
import torch
from ray import serve
from ray.util import get_node_ip_address

from cluster import rpc
from cluster.config import ServeConfig
from cluster.follow import DECIDED_AT, HEADS_WANTED, HeadReport, follow
from cluster.head.build import new_compiler, new_engine
from cluster.head.cross_check import CrossCheck
from cluster.head.dispatch import RemoteExperts
from cluster.head.engine import Engine
from cluster.head.feed import PlacementFeed
from cluster.head.probe import pass_through_every_expert
from cluster.head.service import HeadService
from cluster.head.stopwatch import Stopwatch
from cluster.lenders import new_borrower
from cluster.lending.located import locate
from cluster.metrics import HeadMetrics
from cluster.network import listen_host
from cluster.placement import ClusterView, HeadsWanted
from cluster.security import Security
from model.decoder import Decoder
from model.weights import Checkpoint, torch_dtype
from protos import head_pb2_grpc

logger = logging.getLogger(__name__)

DRAIN_S = 12.0
"""How long a head that Serve stops goes on with what no other head takes. Serve kills it after 20 s
(app.py), and has waited 2 s before it says so."""

STOP_GRACE_S = 2.0


class HeadReplica:
    """One head. Threads: Serve's event loop follows the controller, `engine` does all the work."""

    def __init__(self, config: ServeConfig, controller: Any) -> None:
        """controller: handle of the Controller deployment. Must run on the replica's event loop."""
        self._config = config
        self._name = f"head-{serve.get_replica_context().replica_id.unique_id}"
        self._controller = controller
        self._report = HeadReport(self._name)
        self._feed = PlacementFeed()
        self._metrics = HeadMetrics()
        self._wanted: HeadsWanted | None = None
        self._experts: RemoteExperts | None = None
        self._is_stopping = threading.Event()
        self._engine: Engine | None = None
        self._service: HeadService | None = None
        self._server: grpc.Server | None = None
        self._loop = asyncio.get_running_loop()
        self._follower = asyncio.create_task(follow(controller, self._on_view, self._report_now))
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def __repr__(self) -> str:
        return f"HeadReplica({self._name}, {self._report}, {self._engine})"

    def check_health(self) -> None:
        """Called by Serve; a head whose engine has ended is replaced."""
        if self._report.error:
            raise RuntimeError(self._report.error)

    async def awake(self) -> None:
        """Called by ingresses that find no head (`ingress/waking.py`): a call that waits makes
        Serve start one."""

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Called by Serve, whose policy (app.py) follows the controller in this way."""
        if self._wanted is None:
            return {}
        return {HEADS_WANTED: self._wanted.number, DECIDED_AT: self._wanted.decided_at}

    async def __del__(self) -> None:
        """Called by Serve before it ends the replica: let others take its requests, then stop."""
        self._is_stopping.set()
        if self._engine is not None and self._service is not None:
            self._say(HeadReport(self._name))  # without an address: not to be chosen any more
            self._service.drain()
            await self._drained(self._engine)
        self._follower.cancel()
        if self._server is not None:
            # before the engine: whoever has requests here must see a broken stream, which is
            # replayed, and not their errors
            await asyncio.to_thread(self._server.stop(0).wait, STOP_GRACE_S)
        if self._engine is not None:
            self._engine.stop()
        await asyncio.to_thread(self._thread.join, 2 * STOP_GRACE_S)

    async def _drained(self, engine: Engine) -> None:
        """Return when the engine has no request left, or has had its time."""
        deadline = time.monotonic() + DRAIN_S
        while (num_left := engine.load.num_requests) and self._thread.is_alive():
            if time.monotonic() > deadline:
                logger.warning("%s: stops with %d requests in progress", self._name, num_left)
                return
            await asyncio.sleep(0.05)

    def _on_view(self, view: ClusterView) -> None:
        self._wanted = view.heads_wanted or self._wanted
        if view.placement is not None:
            self._feed.put(view.placement)

    def _report_now(self) -> HeadReport:
        placement = self._experts.placement if self._experts else None
        num_requests = self._engine.load.num_requests if self._engine else 0
        return replace(
            self._report,
            stamp=placement.stamp if placement else (0, 0),
            totals=replace(self._metrics.totals, num_requests=num_requests),
        )

    def _run(self) -> None:
        """The engine thread's life."""
        try:
            self._serve()
        except BaseException as error:  # a panic of the grammar engine is no Exception
            # The thread's last word: Serve's health check and the controller pass it on.
            logger.exception("%s: the engine has ended", self._name)
            self._say(HeadReport(self._name, error=f"{type(error).__name__}: {error}"))

    def _serve(self) -> None:
        config = self._config
        security = Security.load(config.network, "head", os.environ)
        torch.set_num_threads(config.head_threads)
        located = locate(config.model, partial(new_borrower, security=security))
        checkpoint = Checkpoint(
            located.folder,
            files=located.weights,
            dtype=torch_dtype(config.dtype),
            device=config.device,
            attention_quantization=config.attention_quantization,
        )
        stopwatch = Stopwatch()
        decoder = Decoder(
            checkpoint.config,
            checkpoint.load_decoder(),
            attention=config.attention,
            phases=stopwatch,
        )
        metrics = self._metrics
        # ingresses hold no weights
        fingerprint = rpc.fingerprint(checkpoint.config, config.dtype)
        identity = rpc.Identity(self._name, fingerprint, security)
        fingerprint = rpc.fingerprint(checkpoint.config, config.dtype, checkpoint.sample())
        to_workers = rpc.Identity(self._name, fingerprint, security)
        self._experts = experts = RemoteExperts(
            self._feed,
            to_workers,
            timeout_s=config.expert_timeout_s,
            recovery_timeout_s=config.recovery_timeout_s,
            phases=stopwatch,
            metrics=metrics,
            cross_check=self._new_cross_check(to_workers, metrics),
            hedge_budget=config.hedge_budget,
        )
        try:
            while not experts.connect(timeout_s=1.0):
                if self._is_stopping.is_set():
                    return
            pass_through_every_expert(decoder, experts)
            grammars = new_compiler(checkpoint)
            self._engine = new_engine(config, decoder, experts, metrics, grammars, stopwatch)
            self._service = HeadService(self._engine, identity, metrics, grammars)
            self._server, address = rpc.new_server(
                listen_host(config.data_plane_host, get_node_ip_address()),
                security,
                metrics.observe_refusal,
            )
            head_pb2_grpc.add_HeadServicer_to_server(self._service, self._server)
            self._server.start()
            self._say(HeadReport(self._name, address=address))
            logger.info("%s: ready at %s with %s", self._name, address, self._engine)
            self._engine.run()
        finally:
            if self._server is not None:
                self._server.stop(0)  # nobody computes any more: let requests go elsewhere at once
            experts.close()

    def _new_cross_check(self, identity: rpc.Identity, metrics: HeadMetrics) -> CrossCheck | None:
        """None where it is not wanted, or copies differ since they are held in different forms."""
        share = self._config.cross_check_share
        if not share or len(set(self._config.worker_quantization)) > 1:
            return None
        return CrossCheck(identity, metrics, share=share)

    def _say(self, report: HeadReport) -> None:
        """Tell the controller at once, rather than with the next call of `follow`."""
        self._report = report
        asyncio.run_coroutine_threadsafe(self._tell(), self._loop)

    async def _tell(self) -> None:
        try:
            await self._controller.watch.remote(-1, self._report_now())
        except Exception as error:
            # `follow` repeats the report with its next call.
            logger.info("%s: the controller did not take the report: %r", self._name, error)

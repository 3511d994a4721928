"""Lenders: Ray actors that give the checkpoint's files to nodes that lack its folder.

The controller starts some on nodes that have it, as soon as there is a node that has not; they end
with the controller. Whoever lacks the folder finds them by their names.
"""

import asyncio
import logging
import os
import secrets
import time
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util import get_node_ip_address, list_named_actors

from cluster import rpc
from cluster.errors import ConfigurationError
from cluster.folders import checkpoint_folder, checkpoint_path
from cluster.lending.borrower import Borrower, LenderInfo
from cluster.lending.calls import LenderCalls
from cluster.lending.service import LenderService
from cluster.network import Network, listen_host
from cluster.nodes import NAMESPACE, alive_nodes, on_node, which_have
from cluster.security import Security
from protos.lender_pb2_grpc import add_LenderServicer_to_server

logger = logging.getLogger(__name__)

_PREFIX = "lender-"
"""Of the actors' names."""

MAX_LENDERS = 4
"""So that not all wait for one node's disk and network."""

LOOK_EVERY_S = 5.0
"""How often nodes that have come are asked, and lenders that have gone are replaced."""

START_TIMEOUT_S = 120.0
"""For a lender's process, and the sample of its weights."""

ANSWER_TIMEOUT_S = 5.0
"""For one that runs."""

REST_S = 10.0
"""Before another is started where one has failed; other nodes take its place meanwhile."""

NICENESS = 10
"""A lender takes the time of its node's processors that heads and workers leave."""


class Lender:
    """One of them. Ray's calls say where it is; files are asked for by gRPC."""

    def __init__(self, model: Path, weights: str, network: Network) -> None:
        """weights: `Checkpoint.sample` of the model on the controller's node.

        Raises ConfigurationError where this node's folder holds others.
        """
        # torch is not wanted before
        from model.weights import Checkpoint

        os.nice(NICENESS)
        folder = checkpoint_folder(model)
        found = Checkpoint(folder).sample()
        if found != weights:
            raise ConfigurationError(
                f"{folder} holds other weights here ({found}) than on the controller's node "
                f"({weights}), so they are not lent: give all nodes the same files"
            )
        self._server, address = rpc.new_server(
            listen_host(network.host, get_node_ip_address()),
            Security.load(network, "worker", os.environ),
        )
        add_LenderServicer_to_server(LenderService(folder, weights), self._server)
        self._server.start()
        self._info = LenderInfo(address, model, weights)
        logger.info("lending %s at %s", folder, address)

    def info(self) -> LenderInfo:
        return self._info


class Lenders:
    """The controller's lenders. Owned by its event loop."""

    def __init__(self, model: Path, weights: str, network: Network) -> None:
        """model: one that nodes may lack."""
        self._model = model
        self._arguments = model, weights, network
        self._has_folder: dict[str, bool] = {}
        """By node, of those that have answered."""
        self._lenders: dict[str, Any] = {}
        """Handles, by node."""
        self._rests_until: dict[str, float] = {}
        """Nodes whose lender has failed."""

    def __repr__(self) -> str:
        return f"Lenders({self._model}, on {len(self._lenders)} nodes)"

    async def keep(self) -> None:
        """Have lenders where they are needed; never returns."""
        while True:
            try:
                await self._look_round()
            except RayError as error:
                logger.warning("who lacks %s is not known: %r", self._model, error)
            await asyncio.sleep(LOOK_EVERY_S)

    async def _look_round(self) -> None:
        """Ask nodes that are new; if any lacks the folder, see to the lenders."""
        nodes = await asyncio.to_thread(alive_nodes)
        unknown = nodes - self._has_folder.keys()
        answers = await asyncio.to_thread(which_have, self._model, unknown) if unknown else {}
        known = self._has_folder | answers
        self._has_folder = {node: has for node, has in known.items() if node in nodes}
        self._lenders = {node: each for node, each in self._lenders.items() if node in nodes}
        if all(self._has_folder.values()):
            return
        now = time.monotonic()
        able = [
            node
            for node, has in self._has_folder.items()
            if has and now >= self._rests_until.get(node, now)
        ]
        await asyncio.gather(*(self._have_one(node) for node in able[:MAX_LENDERS]))

    async def _have_one(self, node: str) -> None:
        """A lender on that node; one that does not answer is replaced, in a while."""
        is_new = node not in self._lenders
        if is_new:
            self._lenders[node] = self._start(node)
        try:
            call = self._lenders[node].info.remote()
            await asyncio.wait_for(call, START_TIMEOUT_S if is_new else ANSWER_TIMEOUT_S)
        except (TimeoutError, RayError) as error:
            logger.warning("the lender on node %s is lost: %s", node, error)
            ray.kill(self._lenders.pop(node))
            self._rests_until[node] = time.monotonic() + REST_S

    def _start(self, node: str) -> Any:
        """A handle of a new lender."""
        options = on_node(node) | {"name": _PREFIX + secrets.token_hex(8), "namespace": NAMESPACE}
        return ray.remote(Lender).options(**options).remote(*self._arguments)


def new_borrower(model: Path, security: Security, weights: str | None = None) -> Borrower:
    """What reads the files of a model that this node lacks. weights: as far as it is known."""
    return Borrower(
        LenderCalls(security),
        find_lenders,
        model,
        checkpoint_path(model),
        weights,
    )


def find_lenders() -> list[LenderInfo]:
    """Those that answer now, whatever they lend. Asks Ray, and blocks."""
    calls = []
    for actor in list_named_actors(all_namespaces=True):
        if actor["namespace"] == NAMESPACE and actor["name"].startswith(_PREFIX):
            try:
                handle = ray.get_actor(actor["name"], namespace=NAMESPACE)
            except ValueError:  # it has ended since it was listed
                continue
            calls.append(handle.info.remote())
    if not calls:
        return []
    answered, _ = ray.wait(calls, num_returns=len(calls), timeout=ANSWER_TIMEOUT_S)
    found = []
    for answer in answered:
        try:
            found.append(ray.get(answer))
        except RayError as error:
            logger.info("a lender does not answer: %r", error)
    return found

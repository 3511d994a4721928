"""The nodes of the Ray cluster, and which of them have the checkpoint's folder. Blocks.

A model whose folder is on this node, or that is no folder (embedded, on the Hub), asks no other.
"""

import asyncio
import logging
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, TypeVar

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.errors import ConfigurationError, FilesUnavailableError
from cluster.folders import lacks_folder

logger = logging.getLogger(__name__)

T = TypeVar("T")

NAMESPACE = "maestrale"
"""Ray namespace of our actors."""

ASK_TIMEOUT_S = 30.0
"""For a node to say whether it has a folder: a process may have to start there."""

RUN_TIMEOUT_S = 120.0
"""For what is run on another node."""

LOOK_EVERY_S = 2.0
"""How often to look for a node that has the folder, where none has: nodes join a cluster one by
one, some only when somebody asks for what they have."""


def this_node() -> str:
    """Its id."""
    return str(ray.get_runtime_context().get_node_id())


def alive_nodes() -> set[str]:
    """The ids of all nodes."""
    return {str(node["NodeID"]) for node in ray.nodes() if node["Alive"]}


def on_node(node: str) -> dict[str, Any]:
    """Ray's options for what must run on that node and takes nothing of it."""
    return {
        "num_cpus": 0,
        "scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=False),
    }


def which_have(model: Path, nodes: Collection[str]) -> dict[str, bool]:
    """Whether these nodes have the folder; without those that do not answer."""
    own = this_node()
    asked = {
        ray.remote(lacks_folder).options(max_retries=0, **on_node(node)).remote(model): node
        for node in nodes
        if node != own
    }
    found = {own: not lacks_folder(model)} if own in nodes else {}
    answered, silent = (
        ray.wait(list(asked), num_returns=len(asked), timeout=ASK_TIMEOUT_S) if asked else ([], [])
    )
    for answer in answered:
        try:
            found[asked[answer]] = not ray.get(answer)
        except RayError as error:
            logger.warning(
                "node %s does not say whether it has %s: %r", asked[answer], model, error
            )
    for answer in silent:
        logger.warning("node %s does not say whether it has %s", asked[answer], model)
        ray.cancel(answer, force=True)
    return found


def run_where_it_is(model: Path | None, function: Callable[..., T], *arguments: Any) -> T:
    """Run it on this node if it has the model's folder, else on one that has.

    Raises what it raises, FilesUnavailableError where no node has the folder, or ConfigurationError
    where the one that has it fails.
    """
    if not lacks_folder(model) or not ray.is_initialized():
        return function(*arguments)
    nodes = alive_nodes()
    having = [node for node, has in which_have(model, nodes).items() if has]
    if not having:
        raise FilesUnavailableError(
            f"model {model} is neither a folder on any of the {len(nodes)} nodes, nor a Hugging "
            "Face Hub id (organisation/name): put it on one of them, or give another path"
        )
    task = ray.remote(function).options(max_retries=0, **on_node(having[0]))
    try:
        result: T = ray.get(task.remote(*arguments), timeout=RUN_TIMEOUT_S)
    except RayTaskError as error:
        raise error.cause from error
    except RayError as error:
        raise ConfigurationError(f"node {having[0]}, which has {model}, failed: {error}") from error
    return result


async def run_where_it_will_be(
    model: Path | None,
    function: Callable[..., T],
    *arguments: Any,
    on_missing: Callable[[str], None],
) -> T:
    """`run_where_it_is`, as soon as a node has the folder. on_missing: told why it waits."""
    while True:
        try:
            return await asyncio.to_thread(run_where_it_is, model, function, *arguments)
        except FilesUnavailableError as error:
            logger.warning("waiting for another node: %s", error)
            on_missing(str(error))
            await asyncio.sleep(LOOK_EVERY_S)

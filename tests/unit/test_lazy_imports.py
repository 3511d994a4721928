"""Nothing reaches for more than it needs: text for no torch, unit tests for no network, no Ray."""

import asyncio
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import model

TEXT_ONLY = """
import importlib, sys
for name in ("model", "model.errors", "model.config", "model.labels", "model.sampling_params",
             "model.tokenizer", "model.chat", "model.grammar"):
    importlib.import_module(name)
    heavy = {"torch", "ray", "grpc", "transformers", "fastapi"} & set(sys.modules)
    assert not heavy, f"importing {name} imports {heavy}"
"""


def test_the_modules_that_handle_text_do_not_import_torch() -> None:
    root = Path(model.__file__).parents[1]
    ran = subprocess.run(
        [sys.executable, "-c", TEXT_ONLY], cwd=root, capture_output=True, text=True, timeout=60
    )
    assert ran.returncode == 0, ran.stderr


# --- the guard of this folder (conftest.py) ---


@pytest.mark.parametrize("verb", ["connect", "connect_ex", "bind"])
def test_the_network_is_out_of_reach(verb: str) -> None:
    with (
        socket.socket() as unconnected,
        pytest.raises(pytest.fail.Exception, match=f"called socket.{verb}"),
    ):
        getattr(unconnected, verb)(("127.0.0.1", 0))


def test_ray_cannot_be_started() -> None:
    import ray

    with pytest.raises(pytest.fail.Exception, match=r"called ray\.init"):
        ray.init()


def test_an_event_loop_still_runs() -> None:
    async def answer() -> int:
        return await asyncio.to_thread(lambda: 42)

    assert asyncio.run(answer()) == 42

"""The unit suite touches no network and no Ray: whoever tries fails, by name. And its yardstick."""

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch


@pytest.fixture(autouse=True, scope="module")
def no_network_and_no_ray() -> Iterator[None]:
    """Refuse every connect and bind, and Ray's start. (asyncio's socketpair needs neither.)"""
    with pytest.MonkeyPatch.context() as patch:
        # first: importing ray imports urllib3, which once binds a socket to learn of IPv6
        patch.setattr("ray.init", _refuse("ray.init"))
        for verb in ("connect", "connect_ex", "bind"):
            patch.setattr(socket.socket, verb, _refuse(f"socket.{verb}"))
        yield


def _refuse(what: str) -> Any:
    def refuse(*args: Any, **kwargs: Any) -> None:
        # pytest's own failure is no Exception, so no `except` on the way can swallow it
        pytest.fail(f"a unit test called {what}; it belongs in tests/integration")

    return refuse


@pytest.fixture(scope="session")
def reference(tiny_folder: Path) -> Any:
    """transformers' own Mixtral with the tiny checkpoint's weights, in float32."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)

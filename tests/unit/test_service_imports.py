"""A process loads only what it needs: the ingress no torch, the command line hardly anything."""

import subprocess
import sys
from pathlib import Path

import pytest

import cluster

CHECK = """
import importlib, sys
importlib.import_module(sys.argv[1])
loaded = set(sys.argv[2:]) & set(sys.modules)
assert not loaded, f"importing {sys.argv[1]} imports {sorted(loaded)}"
"""


@pytest.mark.parametrize(
    ("module", "must_not_load"),
    [
        ("cluster.ingress.api", ["torch", "ray", "grpc", "protos"]),
        ("cluster.ingress.heads", ["torch", "ray", "fastapi"]),
        ("cluster.ingress.users_grpc", ["torch", "ray"]),
        ("cluster.ingress.text", ["torch", "ray", "grpc", "fastapi"]),
        ("cluster.ingress.structured", ["torch", "ray", "grpc", "fastapi", "llguidance"]),
        ("cluster.cli", ["torch", "ray", "grpc", "fastapi", "numpy", "httpx"]),
        ("cluster.bench.http", ["torch", "ray", "grpc", "fastapi", "numpy", "model"]),
        ("cluster.placement", ["torch", "ray", "grpc", "numpy"]),
    ],
)
def test_importing_a_part_does_not_load_what_others_need(
    module: str, must_not_load: list[str]
) -> None:
    root = Path(cluster.__file__).parents[1]
    ran = subprocess.run(
        [sys.executable, "-c", CHECK, module, *must_not_load],
        cwd=root,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr

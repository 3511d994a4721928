"""What importing the SDK imports, and what it leaves for later."""

import subprocess
import sys
from pathlib import Path

LOADED = "import sys, cluster.client; print(*sys.modules)"
BUILT = """
import cluster.client, cluster.schema
for name, found in vars(cluster.schema).items():
    if getattr(found, "__pydantic_complete__", False):
        print(name)
"""


def told(program: str) -> list[str]:
    """What a program prints in a process of its own."""
    root = Path(__file__).parents[3]
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=True
    )
    return done.stdout.split()


def test_the_client_needs_only_httpx_and_pydantic() -> None:
    loaded = told(LOADED)
    packages = {name.partition(".")[0] for name in loaded}
    heavy = {"torch", "ray", "grpc", "google", "numpy", "fastapi", "transformers", "asyncio"}
    assert packages.isdisjoint(heavy | {"model", "protos"})
    assert packages.isdisjoint({"rich", "pygments", "click"})  # httpx would import them
    ours = {".".join(name.split(".")[:2]) for name in loaded if name.startswith("cluster.")}
    assert ours == {"cluster.client", "cluster.errors", "cluster.schema"}


def test_httpx_is_whole_for_others_who_import_it_later() -> None:
    program = "import cluster.client, httpx; print(callable(httpx.main)); import httpx._main"
    assert told(program) == ["True"]


def test_bodies_are_loaded_and_built_when_they_are_used() -> None:
    """A tenth of a second that most programs never need."""
    bodies = {name for name in told(LOADED) if name.startswith("cluster.schema.")}
    assert bodies == {"cluster.schema.replies", "cluster.schema.tools"}
    assert told(BUILT) == []

"""What importing the SDK imports."""

import subprocess
import sys
from pathlib import Path


def test_the_client_needs_only_httpx_and_pydantic() -> None:
    program = "import sys, cluster.client; print(*sorted(sys.modules), sep='\\n')"
    root = Path(__file__).parents[3]
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=True
    )
    loaded = done.stdout.split()
    packages = {name.partition(".")[0] for name in loaded}
    heavy = {"torch", "ray", "grpc", "google", "numpy", "fastapi", "transformers", "asyncio"}
    assert packages.isdisjoint(heavy | {"model", "protos"})
    ours = {".".join(name.split(".")[:2]) for name in loaded if name.startswith("cluster.")}
    assert ours == {"cluster.client", "cluster.errors", "cluster.schema"}

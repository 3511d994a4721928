"""Any engine's server under the same load, from Maestrale's own load generator."""

import json
import socket
import sys
from pathlib import Path
from typing import Any

import httpx

from tests.bench.peers.engines.engine import Engine
from tests.bench.peers.errors import PeerError
from tests.bench.peers.plan import Measured, Plan, Row
from tests.bench.peers.processes import Command, run, wait_until, watched

WARMUP_REQUESTS = 2


def measure(engine: Engine, plan: Plan, precision: str, scratch: Path, limit_s: float) -> Measured:
    """Start the engine's server, load it, stop it. Raises PeerError."""
    port = free_port()
    found = engine.server(plan, precision, port)
    if found is None:
        raise PeerError("has no server to measure")
    command, ready_path = found
    url = f"http://127.0.0.1:{port}"
    with watched(command, scratch / "server.log") as watch:
        wait_until(lambda: answers(url + ready_path), watch, "answer when ready", limit_s)
        result = scratch / "http.json"
        arguments = [sys.executable, "-m", "cluster.cli", "bench", "http", "--url", url]
        arguments += ["--model", "bench", "--concurrency", str(plan.callers)]
        arguments += ["--requests", str(plan.requests), "--warmup", str(WARMUP_REQUESTS)]
        arguments += ["--input-tokens", str(plan.input_tokens), "--vocab-size", "32000"]
        arguments += ["--output-tokens", str(plan.output_tokens), "--json", str(result)]
        run(Command(arguments), scratch / "client.log", limit_s)
        watch.sample()
    report = json.loads(result.read_text(encoding="utf-8"))
    return Measured([row_of(report, plan)], watch.peak_bytes)


def row_of(report: dict[str, Any], plan: Plan) -> Row:
    """The figures of a load run. Raises PeerError when requests failed."""
    summary = report["points"][0]["summary"]
    if summary["errors"]:
        raise PeerError(f"requests failed: {summary['errors']}")
    measures = summary["measures"]
    return Row(
        phase="http",
        size=plan.callers,
        tokens_per_s=summary["output_tokens_per_s"],
        ttft_s=measures["ttft"]["p50"],
        tpot_s=measures["tpot"]["p50"],
    )


def answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])

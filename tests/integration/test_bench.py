"""`maestrale bench` on real processes: workers over gRPC, and a server over HTTP."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cluster.bench.dispatch import PARTS, DispatchPlan, measure
from cluster.bench.workers import Holding, running_workers
from cluster.errors import BenchError
from model.weights import Checkpoint
from tests.integration.conftest import Service


def bench(*flags: str) -> str:
    ran = subprocess.run(
        [sys.executable, "-m", "cluster.cli", "bench", *flags],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def test_the_engine_is_measured_on_workers(tmp_path: Path, checkpoint: Checkpoint) -> None:
    file = tmp_path / "rows.json"
    flags = "--workers 2 --sequences 2 --prefill 40 --new-tokens 4 --rounds 1 --dtype float32"
    shown = bench("engine", *flags.split(), "--profile", "--json", str(file))
    assert "transfer" in shown
    found = json.loads(file.read_text())
    decode, prefill = found["rows"]
    assert (decode["phase"], decode["sequences"], decode["workers"]) == ("decode", 2, 2)
    assert (prefill["phase"], prefill["prompt_tokens"]) == ("prefill", 40)
    parts = {"packing", "transfer", "experts", "unpacking"}
    assert parts <= decode["step_s"].keys()
    assert all(decode["step_s"][part] > 0 for part in parts)
    half_of_them = checkpoint.expert_bytes * len(checkpoint.config.expert_units) // 2
    assert len(found["memory"]["worker_pss_bytes"]) == 2
    assert all(held >= half_of_them for held in found["memory"]["worker_pss_bytes"])


def test_a_dispatch_is_measured_over_every_transport() -> None:
    wanted = DispatchPlan(
        rows=[1, 3],
        hidden_size=64,
        dtype="bfloat16",
        transports=["pipe", "tcp", "unix"],
        num_threads=1,
        rounds=5,
        num_warmup=2,
    )
    rows = measure(wanted, lambda _: None)
    assert [(row.transport, row.num_rows) for row in rows] == [
        ("pipe", 1),
        ("tcp", 1),
        ("unix", 1),
        ("pipe", 3),
        ("tcp", 3),
        ("unix", 3),
    ]
    for row in rows:
        assert row.sent_bytes == row.num_rows * 64 * 2
        assert 0 < row.beyond.p50 <= row.beyond.p99
        assert row.parts.keys() == set(PARTS)
        assert row.parts["worker"] > 0


def no_checkpoint() -> Holding:
    raise FileNotFoundError("nothing there")


def test_a_worker_that_cannot_start_says_why() -> None:
    with (
        pytest.raises(BenchError, match="worker 0 cannot start: FileNotFoundError: nothing there"),
        running_workers([no_checkpoint], num_threads=1),
    ):
        pass


@pytest.mark.parametrize("load", [["--concurrency", "1,2"], ["--rate", "20"]])
@pytest.mark.parametrize("chat", [[], ["--chat"]])
def test_a_served_model_is_measured_over_http(
    service: Service, tmp_path: Path, load: list[str], chat: list[str]
) -> None:
    file, page = tmp_path / "run.json", tmp_path / "run.html"
    flags = ["--requests", "5", "--input-tokens", "8-16", "--output-tokens", "6"]
    flags += ["--goodput", "ttft:60000", "--json", str(file), "--html", str(page)]
    bench("http", "--url", service.url, *load, *chat, *flags)
    points: list[dict[str, Any]] = json.loads(file.read_text())["points"]
    assert [point["load"] for point in points] == ([1, 2] if "--rate" not in load else [20])
    for point in points:
        assert point["summary"]["num_ok"] == 5
        assert point["summary"]["num_counted"] == 0
        assert point["summary"]["good_share"] == 1
        assert all(request["output_tokens"] == 6 for request in point["requests"])
    assert page.read_text().startswith("<!doctype html>")

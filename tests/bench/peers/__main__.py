"""Measure Maestrale and its peers by turns. Stop it at any time: started again, it goes on.

python -m tests.bench.peers [--rounds 5] [--engines NAME,...] [--precisions bf16,...]
"""

import argparse
import json
import os
import platform
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from model.config import MixtralConfig
from tests.bench.make_checkpoint import CACHE, SHAPES, make_checkpoint
from tests.bench.peers import http
from tests.bench.peers.engines.engine import Engine
from tests.bench.peers.engines.in_process import Transformers, Vllm
from tests.bench.peers.engines.llamacpp import LlamaCpp
from tests.bench.peers.engines.maestrale import Maestrale, commit
from tests.bench.peers.errors import PeerError
from tests.bench.peers.plan import PRECISIONS, Measured, Plan
from tests.bench.peers.processes import Command, run, wait_until_idle
from tests.bench.peers.results import Result, Results, Task
from tests.bench.peers.table import Report

SPLIT, AGAIN = "Maestrale, head + 2 workers", "Maestrale, head + 2 workers, again"

KINDS = ("limits", "engine", "http")


def all_engines() -> list[Engine]:
    """In the order of a round."""
    return [
        Maestrale(SPLIT, num_workers=2, serves=True),
        Maestrale("Maestrale, one process", num_workers=0),
        LlamaCpp(),
        Vllm(),
        Transformers(),
        Maestrale(AGAIN, num_workers=2, serves=True, only_bf16=True),
    ]


def main() -> None:
    arguments = parse()
    # whoever ends this ends what it runs, and keeps what is finished
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    checkpoint = make_checkpoint(arguments.shape, arguments.layers)
    plan = replace(
        Plan(checkpoint=checkpoint, threads=len(os.sched_getaffinity(0))),
        **{
            name: getattr(arguments, name)
            for name in ("sequences", "prefill", "prompt_tokens", "new_tokens", "requests")
        },
    )
    engines = [e for e in all_engines() if is_wanted(e.name, arguments.engines)]
    failures: dict[str, str] = {}
    versions: dict[str, str] = {}
    for engine in engines:
        try:
            versions[engine.name] = engine.prepare(plan)
        except PeerError as error:
            say(f"{engine.name} cannot be prepared: {error}")
            failures[engine.name] = f"cannot be prepared: {error}"
    key = {"commit": commit(), "machine": machine(), "plan": asdict(plan)}
    results = Results(arguments.results, key)
    tasks = tasks_of([e for e in engines if e.name in versions], plan, arguments)
    runner = Runner(engines, plan, versions, arguments)
    say(f"{len(tasks)} measurements in each of {arguments.rounds} rounds; {key['machine']}")
    try:
        for round_number in range(arguments.rounds):
            for number, task in enumerate(tasks, 1):
                what = f"round {round_number + 1}/{arguments.rounds}, {number}/{len(tasks)}: {task}"
                if results.has(task, round_number):
                    say(f"{what}: done before")
                elif str(task) in failures:
                    say(f"{what}: failed in an earlier round, not tried again")
                else:
                    say(what)
                    started = time.monotonic()
                    try:
                        results.add(runner.measure(task, round_number))
                    except PeerError as error:
                        failures[str(task)] = str(error)
                        say(f"  failed: {error}")
                    say(f"  {time.monotonic() - started:.0f} s")
    except KeyboardInterrupt:
        say("interrupted: the same command goes on from here")
    config = MixtralConfig.from_folder(checkpoint)
    print(Report(plan, config, engines, results.all, failures, (SPLIT, AGAIN)).markdown())


class Runner:
    """Carries out one task at a time."""

    def __init__(
        self,
        engines: Sequence[Engine],
        plan: Plan,
        versions: dict[str, str],
        arguments: argparse.Namespace,
    ) -> None:
        self._engines = {engine.name: engine for engine in engines}
        self._plan = plan
        self._versions = versions
        self._limit_s: float = arguments.limit
        self._patience_s: float = arguments.patience

    def measure(self, task: Task, round_number: int) -> Result:
        """Raises PeerError."""
        busy_percent = wait_until_idle(self._patience_s)
        with tempfile.TemporaryDirectory(prefix="maestrale-bench-") as folder:
            try:
                measured, figures = self._run(task, Path(folder))
            except (OSError, ValueError, LookupError, TypeError) as error:
                raise PeerError(f"its result cannot be read: {error!r}") from error
        for row in measured.rows:
            say(f"  {row.phase} {row.size}: {row.tokens_per_s:.2f} tokens/s")
        return Result(
            task=task,
            round=round_number,
            rows=measured.rows,
            figures=figures,
            peak_bytes=measured.peak_bytes,
            above_idle_bytes=measured.above_idle_bytes,
            busy_percent=busy_percent,
            version=self._versions.get(task.engine, ""),
        )

    def _run(self, task: Task, scratch: Path) -> tuple[Measured, list[dict[str, Any]]]:
        """What an engine gave, or figures of the machine."""
        if task.kind == "limits":
            file = scratch / "limits.json"
            arguments = [sys.executable, "-m", "tests.bench.peers.limits", str(file)]
            peak_bytes = run(Command(arguments), scratch / "limits.log", self._limit_s)
            return Measured([], peak_bytes), json.loads(file.read_text(encoding="utf-8"))
        engine = self._engines[task.engine]
        measure = engine.measure if task.kind == "engine" else partial(http.measure, engine)
        measured = measure(self._plan, task.precision, scratch, self._limit_s)
        missing = self._plan.cases(task.kind) - {(row.phase, row.size) for row in measured.rows}
        if missing:
            raise PeerError(f"said nothing of {sorted(missing)}")
        return measured, []


def tasks_of(engines: Sequence[Engine], plan: Plan, arguments: argparse.Namespace) -> list[Task]:
    """What one round does, engines by turns."""
    tasks = [Task("limits")] if "limits" in arguments.kinds else []
    for kind in ("engine", "http"):
        for precision in PRECISIONS:
            if kind not in arguments.kinds or precision not in arguments.precisions:
                continue
            for engine in engines:
                if precision not in engine.precisions:
                    continue
                # what HTTP adds is the same at each precision
                is_served = precision == PRECISIONS[0] and engine.server(plan, precision, 0)
                if kind == "engine" or is_served:
                    tasks.append(Task(kind, engine.name, precision))
    return tasks


def machine() -> str:
    """What the figures belong to."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    facts = dict(line.split(":", 1) for line in lines if ":" in line)
    facts = {name.strip(): value.strip() for name, value in facts.items()}
    flags = set(facts.get("flags", "").split())
    extensions = [f for f in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f in flags]
    gib = psutil.virtual_memory().total / 2**30
    cores = len(os.sched_getaffinity(0))
    model = facts.get("model name", platform.machine())
    return f"{platform.node()}, {cores} cores of {model} ({' '.join(extensions)}), {gib:.0f} GiB"


def is_wanted(name: str, wanted: Sequence[str]) -> bool:
    return not wanted or any(word.lower() in name.lower() for word in wanted)


def say(text: str) -> None:
    """On standard error: standard output has the tables alone."""
    print(text, file=sys.stderr, flush=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)

    def words(text: str) -> tuple[str, ...]:
        return tuple(text.split(","))

    def numbers(text: str) -> tuple[int, ...]:
        return tuple(int(number) for number in text.split(","))

    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="mixtral-8x7b")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--engines", type=words, default=(), help="parts of names; all")
    parser.add_argument("--precisions", type=words, default=PRECISIONS)
    parser.add_argument("--kinds", type=words, default=KINDS, help=",".join(KINDS))
    parser.add_argument("--sequences", type=numbers, default=Plan.sequences)
    parser.add_argument("--prefill", type=numbers, default=Plan.prefill)
    parser.add_argument("--prompt-tokens", type=int, default=Plan.prompt_tokens)
    parser.add_argument("--new-tokens", type=int, default=Plan.new_tokens)
    parser.add_argument("--requests", type=int, default=Plan.requests, help="over HTTP")
    parser.add_argument("--limit", type=float, default=3600, help="seconds of one measurement")
    parser.add_argument("--patience", type=float, default=600, help="seconds for others to end")
    parser.add_argument("--results", type=Path, default=CACHE / "results.jsonl")
    return parser.parse_args()


if __name__ == "__main__":
    main()

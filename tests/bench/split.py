"""What does the split cost? Decode with all experts in this process, and with two workers.

Each worker is a process of its own with one thread, reached over gRPC on loopback; Ray, Serve and
HTTP are left out. The two paths alternate within one run; compare the ratio, not the absolute
numbers. Prints one table for RESULTS.md.

    python -m tests.bench.split [--model FOLDER] [--dtype float32] [--tokens 64] [--rounds 5]
"""

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from cluster.head.dispatch import PlacementFeed, RemoteExperts
from cluster.placement import Placement, WorkerInfo
from model import TINY, Mixtral
from model.sampling_params import SamplingParams
from model.weights import Checkpoint, torch_dtype
from tests.integration.workers import WorkerServer, remote_experts, table_of

BATCHES = (1, 8, 32)
NUM_WORKERS = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=TINY)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--worker", help="run as this worker (internal)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    checkpoint = Checkpoint(arguments.model, dtype=torch_dtype(arguments.dtype))
    if arguments.worker:
        serve_as_worker(arguments.worker, checkpoint)
        return
    compare(checkpoint, arguments)


def serve_as_worker(name: str, checkpoint: Checkpoint) -> None:
    """Answer until standard input ends, which it does when the benchmark does."""
    server = WorkerServer(name, checkpoint)
    print(server.address, server.identity.incarnation, flush=True)
    sys.stdin.read()
    server.stop()


def compare(checkpoint: Checkpoint, arguments: argparse.Namespace) -> None:
    processes = [start_worker(index, arguments) for index in range(NUM_WORKERS)]
    experts = connect(processes, checkpoint)
    try:
        local = Mixtral.load(arguments.model, dtype=arguments.dtype)
        split = Mixtral(local.decoder, experts, local.tokenizer, local.chat)
        table = Table(title=f"decode, {arguments.model.name}, {arguments.dtype}, tokens per second")
        for heading in ("sequences", "one process", "head + 2 workers", "ratio"):
            table.add_column(heading, justify="right")
        for batch in BATCHES:
            rates: dict[str, list[float]] = {"local": [], "split": []}
            for _ in range(arguments.rounds):
                rates["local"].append(tokens_per_second(local, batch, arguments.tokens))
                rates["split"].append(tokens_per_second(split, batch, arguments.tokens))
            here, there = statistics.median(rates["local"]), statistics.median(rates["split"])
            table.add_row(str(batch), f"{here:.1f}", f"{there:.1f}", f"{there / here:.2f}")
        Console().print(table)
    finally:
        experts.close()
        for process in processes:
            process.communicate()


def start_worker(index: int, arguments: argparse.Namespace) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.bench.split", "--worker", f"worker-{index}"]
    command += ["--model", str(arguments.model), "--dtype", arguments.dtype]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def connect(processes: list[subprocess.Popen[str]], checkpoint: Checkpoint) -> RemoteExperts:
    workers = []
    for index, process in enumerate(processes):
        assert process.stdout is not None
        address, incarnation = process.stdout.readline().split()
        workers.append(WorkerInfo(f"worker-{index}", address, int(incarnation), 0))
    feed = PlacementFeed()
    feed.put(Placement(1, tuple(workers), table_of(checkpoint, NUM_WORKERS)))
    experts = remote_experts(feed, checkpoint)
    assert experts.connect(timeout_s=30), "the workers cannot be reached"
    return experts


def tokens_per_second(model: Mixtral, num_sequences: int, num_tokens: int) -> float:
    """Decode that many sequences together; the first token, from the prompt, does not count."""
    prompts = [[1, 5 + index] for index in range(num_sequences)]
    params = [SamplingParams(max_tokens=num_tokens, temperature=0.0)] * num_sequences
    first_done = 0.0
    seen = 0

    def note(_index: int, _token_id: int) -> None:
        nonlocal first_done, seen
        seen += 1
        if seen == num_sequences:
            first_done = time.perf_counter()

    model.generate_ids(prompts, params, note)
    return num_sequences * (num_tokens - 1) / (time.perf_counter() - first_done)


if __name__ == "__main__":
    main()

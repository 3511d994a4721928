"""A program: 2 callers, then 40, then 2, on a Ray that adds and removes nodes; prints a timeline.

Runs on a host of its own, since Ray's provider of local nodes wants fixed ports. All nodes are on
that host: one type for heads, one for expert workers. The model's experts take most of a step, and
a head's KV cache holds few sequences, so that both sides have to grow. Prints JSON.
"""

import json
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray

from cluster.app import running
from cluster.client import Client
from cluster.config import MIB, ServeConfig

PHASES = ((2, 60.0), (40, 150.0), (2, 300.0))
"""Callers, and for how long at most, seconds. The last ends when all has shrunk."""
PROMPT_TOKENS, NEW_TOKENS = 32, 64
PAUSE_S = 25.0
"""Between a caller's streams, for reading. Without it two of them would keep three workers on two
cores busy enough to be kept."""
SAMPLE_S = 1.0
MOST_HEADS, MOST_WORKERS = 2, 3

CONFIG = ServeConfig(
    dtype="float32",
    num_workers=1,
    max_workers=MOST_WORKERS,
    num_heads=1,
    max_heads=MOST_HEADS,
    scale_up_after_s=5,
    scale_down_after_s=30,
    kv_cache_bytes=8 * MIB,  # of about twenty sequences
    max_running_sequences=32,
    head_resources={"maestrale_head": 1},
    worker_resources={"maestrale_expert": 1},
)

NODES: dict[str, dict[str, Any]] = {
    "ray.head.default": {"resources": {"CPU": 2}, "max_workers": 0},
    "heads": {"resources": {"CPU": 1, "maestrale_head": 1}, "max_workers": MOST_HEADS},
    "experts": {"resources": {"CPU": 1, "maestrale_expert": 1}, "max_workers": MOST_WORKERS},
}


@contextmanager
def autoscaling_ray(folder: Path) -> Iterator[None]:
    """Ray's head node, which starts other nodes on this host as they are asked for."""
    lists = ("initialization", "setup", "head_setup", "worker_setup")
    content: dict[str, Any] = {
        "cluster_name": "local",
        "max_workers": MOST_HEADS + MOST_WORKERS,
        "upscaling_speed": 10.0,
        "idle_timeout_minutes": 0.25,
        "provider": {
            "type": "fake_multinode",
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
            "use_node_id_as_ip": True,  # all have one address
        },
        "available_node_types": {
            name: {"min_workers": 0, "node_config": {}, **kind} for name, kind in NODES.items()
        },
        "head_node_type": "ray.head.default",
        "auth": {},
        "docker": {},
        "file_mounts": {},
        "cluster_synced_files": [],
        "file_mounts_sync_continuously": False,
        "rsync_exclude": [],
        "rsync_filter": [],
        "head_start_ray_commands": [],
        "worker_start_ray_commands": [],
        **{f"{name}_commands": [] for name in lists},
    }
    file = folder / "nodes.json"
    file.write_text(json.dumps(content), encoding="utf-8")
    command = ["ray", "start", "--head", "--block", "--num-cpus=2", "--include-dashboard=false"]
    command += ["--object-store-memory=100000000", f"--autoscaling-config={file}"]
    environ = {"RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1"}
    environ |= {"RAY_enable_autoscaler_v2": "0", "RAY_SERVE_PROXY_USE_GRPC": "1"}
    # how often heads tell Serve what they were told, which is 10 s otherwise
    environ["RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S"] = "1"
    with (folder / "ray.log").open("w") as log:
        process = subprocess.Popen(command, env=os.environ | environ, stdout=log, stderr=log)
        try:
            while subprocess.run(["ray", "health-check"], stderr=log, check=False).returncode:
                assert process.poll() is None, f"Ray has ended: see {log.name}"
            yield
        finally:
            process.terminate()
            process.wait(timeout=60)


@dataclass
class Load:
    """Callers that come and go, each with one stream after the other."""

    client: Client
    vocab_size: int
    wanted: int = 0
    num_tokens: int = 0
    num_ended: int = 0
    failures: list[str] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def run(self, number: int, is_over: threading.Event) -> None:
        """One of them, while so many are wanted."""
        rng = random.Random(number)
        while not is_over.wait(PAUSE_S if number < self.wanted else 0.1):
            if number >= self.wanted:
                continue
            prompt = rng.choices(range(300, self.vocab_size), k=PROMPT_TOKENS)
            error = None
            try:
                self._tell(prompt)
            except Exception as failure:
                error = repr(failure)
            with self._lock:
                self.num_ended += 1
                self.failures += [error] if error else []

    def _tell(self, prompt: list[int]) -> None:
        num_tokens = 0
        with self.client.completions.create(
            prompt=prompt,
            max_tokens=NEW_TOKENS,
            temperature=0,
            stream=True,
            ignore_eos=True,
            return_token_ids=True,
        ) as chunks:
            for chunk in chunks:
                new = len(chunk.choices[0].token_ids or ())
                num_tokens += new
                with self._lock:
                    self.num_tokens += new
        if num_tokens != NEW_TOKENS:
            raise ValueError(f"a stream ended after {num_tokens} tokens")


def record(client: Client, load: Load) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Go through the phases; what there was in each second, and every decision."""
    started = time.monotonic()
    timeline: list[dict[str, Any]] = []
    decisions: list[dict[str, Any]] = []
    num_tokens, told = 0, None
    for number, (callers, limit_s) in enumerate(PHASES):
        load.wanted = callers
        begun = time.monotonic()
        while (now := time.monotonic()) - begun < limit_s:
            status = client.cluster.status()
            after_s = round(now - started, 1)
            sample = {
                "s": after_s,
                "callers": callers,
                "heads": status.heads_ready,
                "workers": len(status.workers),
                "nodes": sum(node["Alive"] for node in ray.nodes()),
                "tokens_per_s": (load.num_tokens - num_tokens) / SAMPLE_S,
            }
            num_tokens = load.num_tokens
            timeline.append(sample)
            if status.scaling != told:
                told = status.scaling
                decisions.append({"s": after_s, "decision": told})
            is_last = number == len(PHASES) - 1
            if is_last and (sample["heads"], sample["workers"], sample["nodes"]) == (1, 1, 3):
                break
            # nothing is waited for: this is the pace of the samples
            time.sleep(max(0.0, SAMPLE_S - (time.monotonic() - now)))
    return timeline, decisions


def main(model: Path, folder: Path) -> None:
    config = CONFIG.model_copy(update={"model": model})
    is_over = threading.Event()
    most = max(callers for callers, _ in PHASES)
    with (
        autoscaling_ray(folder),
        running(config, port=0, address="auto") as client,
        ThreadPoolExecutor(most) as pool,
    ):
        load = Load(client, vocab_size=32000)
        try:
            for number in range(most):
                pool.submit(load.run, number, is_over)
            timeline, decisions = record(client, load)
        finally:
            is_over.set()
    told = {
        "timeline": timeline,
        "decisions": decisions,
        "num_ended": load.num_ended,
        "failures": load.failures,
    }
    json.dump(told, sys.stdout)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))

"""Starting, failing, being killed, and leaving nothing behind."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from model import Mixtral
from tests import faults
from tests.integration.conftest import Service
from tests.integration.test_service import PROMPT, until


def run(*arguments: str, timeout_s: float = 100) -> subprocess.CompletedProcess[str]:
    """The command line, to its end."""
    return subprocess.run(
        [sys.executable, "-m", "cluster.cli", *arguments],
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


def listening(processes: list[psutil.Process]) -> list[str]:
    """What these processes listen on: ports and socket files."""
    found = []
    for process in processes:
        for kind in ("inet", "unix"):
            for connection in process.net_connections(kind):
                if connection.status == psutil.CONN_LISTEN:
                    found.append(f"port {connection.laddr.port}")
                elif kind == "unix" and connection.laddr:
                    found.append(connection.laddr)
    return found


IN_BFLOAT16 = 6 * 8 * 3 * 192 * 224 * 2
"""Bytes of all experts of the tiny checkpoint: layers, experts, matrices, their sizes, bytes."""


@pytest.mark.parametrize(
    ("signum", "flags", "held_bytes"),
    [
        (signal.SIGINT, ("--dtype", "float32"), 2 * IN_BFLOAT16),
        (signal.SIGTERM, ("--experts", "int4", "--attention-weights", "int8"), 0.35 * IN_BFLOAT16),
    ],
    ids=["SIGINT", "SIGTERM quantised"],
)
def test_it_answers_holds_what_was_asked_for_and_leaves_nothing_after_a_signal(
    signum: signal.Signals, flags: tuple[str, ...], held_bytes: float
) -> None:
    """SIGINT goes to the whole process group, as a terminal's Ctrl-C does."""
    service = Service.start(*flags)
    try:
        with service.client() as client:
            held = sum(worker.num_bytes for worker in client.cluster.status().workers)
            question = [{"role": "user", "content": "What does a cow say?"}]
            answer = client.chat.completions.create(messages=question, temperature=0)
        everything = faults.descendants(service.process.pid)
        names = {name for process in everything for name in process.cmdline()[:1]}
        for part in ("ExpertWorker", "HeadReplica", "Ingress", "Controller"):
            assert any(part in name for name in names), names
        sockets = listening(everything)
        files = [name for name in sockets if name.startswith("/") and os.path.exists(name)]
        assert files
    finally:
        code = service.stop(signum)

    assert code == 0
    assert 0 < held <= held_bytes
    assert answer.choices[0].message.content == "A cow says moo."
    _, alive = psutil.wait_procs(everything, timeout=10)
    assert not alive
    assert not [name for name in files if os.path.exists(name)]


def test_a_killed_worker_is_replaced_and_the_stream_goes_on(
    service: Service, mixtral: Mixtral
) -> None:
    """Runs on the shared service: it must be as good as new afterwards."""
    expected = mixtral.generate(PROMPT, max_tokens=400)
    with service.client() as client:
        before = client.cluster.status()
        assert len(before.workers) == 2
        victim = faults.listener(service.process.pid, before.workers[1].address)
        text = ""
        with client.completions.create(
            prompt=PROMPT, max_tokens=400, temperature=0, stream=True
        ) as chunks:
            for index, chunk in enumerate(chunks):
                text += chunk.choices[0].text
                if index == 5:
                    faults.kill(victim)
        assert text == expected

        def is_whole_again() -> bool:
            now = client.cluster.status()
            return now.epoch > before.epoch and now.phase == "ready" and len(now.workers) == 2

        until(is_whole_again, "the placement after the kill")


def test_a_port_in_use_is_said_before_anything_starts() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        ended = run("serve", "--port", port)
    assert ended.returncode == 1
    assert f"cannot listen on 127.0.0.1:{port}" in ended.stderr
    assert "--port" in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize("missing", [("config.json",), ("tokenizer.model", "tokenizer.json")])
def test_a_missing_checkpoint_file_is_named(
    tmp_path: Path, tiny_folder: Path, missing: tuple[str, ...]
) -> None:
    copy_checkpoint(tiny_folder, tmp_path, without=missing)
    ended = run("serve", "--model", str(tmp_path), "--port", "0")
    assert ended.returncode == 1
    assert missing[0] in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_broken_weight_file_stops_the_start_and_says_why(
    tmp_path: Path, tiny_folder: Path
) -> None:
    copy_checkpoint(tiny_folder, tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1_000_000])
    ended = run("serve", "--model", str(tmp_path), "--port", "0")
    assert ended.returncode == 1
    assert "model.safetensors" in ended.stderr
    assert "Traceback" not in ended.stderr


def copy_checkpoint(source: Path, target: Path, *, without: tuple[str, ...] = ()) -> None:
    for file in source.iterdir():
        if file.name not in without:
            (target / file.name).write_bytes(file.read_bytes())


def test_inspect_names_every_part_of_a_checkpoint(tiny_folder: Path) -> None:
    ended = run("inspect", str(tiny_folder))
    assert ended.returncode == 0, ended.stderr
    for part in ("7,581,120 parameters", "embeddings", "experts", "nf4", "a worker of 2"):
        assert part in ended.stdout


def test_a_quantised_copy_is_used_like_any_checkpoint(tmp_path: Path, tiny_folder: Path) -> None:
    copy = tmp_path / "copy"
    ended = run(
        "quantize", str(tiny_folder), str(copy), "--mode", "int8", "--attention-weights", "int8"
    )
    assert ended.returncode == 0, ended.stderr
    assert "s left" in ended.stderr  # progress: bytes, rate, time left
    at_load = ("--experts", "int8", "--attention-weights", "int8")
    told = [
        run("generate", "--local", "--prompt", PROMPT, "--max-tokens", "9", *flags)
        for flags in (("--model", str(copy)), at_load)
    ]
    assert told[0].stdout.startswith(f"{PROMPT}, there was a"), told[0].stderr
    assert told[0].stdout == told[1].stdout, told[1].stderr


def test_the_demo_tells_a_story_and_ends() -> None:
    ended = run("demo", "--max-tokens", "40")
    assert ended.returncode == 0, ended.stderr
    assert "Once upon a time, there was a" in ended.stdout
    for part in ("loading experts", "ready, 100 %", "Placement, epoch 1", "first token after"):
        assert part in ended.stdout
    for worker in ("maestrale-worker-0", "maestrale-worker-1"):
        assert f"{worker} computed" in ended.stdout


def test_generate_local_needs_no_server(mixtral: Mixtral) -> None:
    ended = run(
        "generate", "--local", "--dtype", "float32", "--prompt", PROMPT, "--max-tokens", "9"
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout == PROMPT + mixtral.generate(PROMPT, max_tokens=9) + "\n"


def test_generate_asks_a_server(service: Service, mixtral: Mixtral) -> None:
    ended = run("generate", "--url", service.url, "--prompt", PROMPT, "--max-tokens", "9")
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout == PROMPT + mixtral.generate(PROMPT, max_tokens=9) + "\n"


def test_generate_without_a_server_says_where_it_looked() -> None:
    ended = run("generate", "--url", "http://127.0.0.1:9")
    assert ended.returncode == 1
    assert "http://127.0.0.1:9" in ended.stderr
    assert "Traceback" not in ended.stderr

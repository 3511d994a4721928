"""ray up, serve deploy, serve status, ray down; heads and experts on hosts of their own."""

import json
import shutil
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml

from model import Mixtral
from tests.cluster.conftest import (
    KEY,
    MODEL,
    PORT,
    READY_TIMEOUT_S,
    ROOT,
    Cluster,
    install,
    until,
)

PROMPT = "Once upon a time"
STREAM = """
import sys
from cluster.client import Client
with Client(sys.argv[1], api_key=sys.argv[2], timeout=300) as client:
    with client.completions.create(
        prompt={prompt!r}, max_tokens={tokens}, temperature=0, stream=True
    ) as chunks:
        for chunk in chunks:
            for choice in chunk.choices:
                print(choice.text, end="", flush=True)
"""
SERVED = {
    "model": str(MODEL),
    "dtype": "float32",
    "data_plane_host": "node",
    "tls_folder": "~/maestrale-secrets/tls",
    "api_keys_file": "~/maestrale-secrets/api-keys",
    "head_resources": {"maestrale_head": 1},
    "worker_resources": {"maestrale_expert": 1},
    "head_cpus": 0,
    "expert_copies": 2,
}


def deploy(cluster: Cluster, **changes: object) -> None:
    """The tiny model, by a file with these settings beside the others."""
    args = SERVED | changes
    application = {"name": "maestrale", "import_path": "cluster.app:build", "args": args}
    document = {
        "proxy_location": "HeadOnly",
        "http_options": {"host": "0.0.0.0", "port": PORT},
        "applications": [application],
    }
    (cluster.head.home / "serve.yaml").write_text(yaml.safe_dump(document))
    cluster.on_head("serve deploy ~/serve.yaml")


@pytest.fixture(scope="module")
def served(cluster: Cluster) -> Cluster:
    """Deployed and ready."""
    deploy(cluster)
    ready = f"curl -sf --retry 1000 --retry-delay 1 --retry-all-errors {cluster.url}/ready"
    cluster.caller.run(f"{ready} --retry-max-time {READY_TIMEOUT_S}", timeout_s=READY_TIMEOUT_S + 9)
    return cluster


def stream(cluster: Cluster, tokens: int) -> subprocess.Popen[str]:
    """A completion that is under way, called from the fourth host."""
    (cluster.caller.home / "stream.py").write_text(STREAM.format(prompt=PROMPT, tokens=tokens))
    command = cluster.caller.command(f"python ~/stream.py {cluster.url} {KEY}")
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def said_here(tokens: int) -> str:
    """The same completion, computed in this process."""
    return Mixtral.load(dtype="float32").generate(PROMPT, max_tokens=tokens, temperature=0)


def workers_by_address(cluster: Cluster) -> dict[str, list[str]]:
    """Names of the workers that `/ready` tells of, by the host they are on."""
    status = json.loads(cluster.caller.run(f"curl -s {cluster.url}/ready"))
    found: dict[str, list[str]] = {}
    for worker in status["workers"]:
        found.setdefault(worker["address"].rpartition(":")[0], []).append(worker["name"])
    return found


@pytest.mark.timeout(900)
def test_heads_and_experts_are_where_they_belong(served: Cluster) -> None:
    assert "RUNNING" in served.on_head("serve status")
    assert workers_by_address(served).keys() == {host.address for host in served.experts}


def test_the_host_that_lacks_the_model_has_borrowed_it(served: Cluster) -> None:
    having, lacking = served.experts
    assert not (having.home / ".cache" / "maestrale" / "checkpoints").exists()
    (copied,) = (lacking.home / ".cache" / "maestrale" / "checkpoints").iterdir()
    names = {path.name for path in copied.iterdir()}
    assert "config.json" in names
    assert "model.safetensors" not in names


@pytest.mark.timeout(300)
def test_a_fourth_host_is_answered_as_one_process_would(served: Cluster) -> None:
    answer, problems = stream(served, 40).communicate(timeout=120)
    assert answer == said_here(40), problems


@pytest.mark.timeout(600)
def test_a_host_of_experts_that_is_cut_off_fails_no_request(served: Cluster) -> None:
    assert workers_by_address(served).keys() == {host.address for host in served.experts}
    lost = served.experts[0]
    under_way = stream(served, 200)
    assert under_way.stdout is not None
    begun = under_way.stdout.read(20)
    lost.cut_off()
    try:
        rest, problems = under_way.communicate(timeout=400)
        assert begun + rest == said_here(200), problems
        assert stream(served, 40).communicate(timeout=60)[0] == said_here(40)
        until(lambda: lost.address not in workers_by_address(served), "its worker to be given up")
    finally:
        lost.reconnect()
    until(lambda: lost.address in workers_by_address(served), "the host to be used again")
    assert stream(served, 40).communicate(timeout=60)[0] == said_here(40)


@pytest.mark.timeout(900)
def test_another_version_takes_over_under_streams(served: Cluster, tmp_path: Path) -> None:
    """Its workers one after the other, each beside a copy of all that it holds."""
    old = json.loads(served.caller.run(f"curl -s {served.url}/ready"))["workers"]
    expected = said_here(120)
    is_over = threading.Event()

    def tell() -> int:
        """Streams that were as they should be, one after the other."""
        number = 0
        while not is_over.is_set():
            answer, problems = stream(served, 120).communicate(timeout=300)
            assert answer == expected, problems
            number += 1
        return number

    def has_version(version: str) -> bool:
        ask = f'curl -s -H "Authorization: Bearer {KEY}" {served.url}/version'
        return version in served.caller.run(ask)

    def are_workers_new() -> bool:
        ready = json.loads(served.caller.run(f"curl -s {served.url}/ready"))
        now = {worker["address"] for worker in ready["workers"]}
        return len(now - {worker["address"] for worker in old}) == len(old)

    with ThreadPoolExecutor(3) as pool:
        tellers = [pool.submit(tell) for _ in range(3)]
        try:
            code = another_version(tmp_path, "9.9.9")
            for host in (served.head, *served.experts):
                install(host, code)
            deploy(served, max_concurrent_requests=100)  # Serve replaces what has changed
            until(lambda: has_version("9.9.9"), "an ingress of the other version")
            until(are_workers_new, "workers of the other version")
        finally:
            is_over.set()
        assert all(teller.result() for teller in tellers)


def another_version(folder: Path, version: str) -> Path:
    """This code under another version, as an installation would have it."""
    for package in ("model", "cluster", "protos"):
        shutil.copytree(ROOT / package, folder / package)
    about = folder / f"maestrale-{version}.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: maestrale\nVersion: {version}\n")
    return folder


@pytest.mark.timeout(300)
def test_ray_down_leaves_nothing(served: Cluster) -> None:
    served.ray("down -y", timeout_s=200)
    for host in (served.head, *served.experts):
        until(lambda host=host: not host.run("pgrep -x raylet || true"), f"{host.name} to be idle")

"""ray up, serve deploy, serve status, ray down; heads and experts on hosts of their own."""

import json
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
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
import sys, time
from cluster.client import Client
longest, last = 0.0, None
with Client(sys.argv[1], api_key=sys.argv[2], timeout=300) as client:
    with client.completions.create(
        prompt={prompt!r}, max_tokens={tokens}, temperature=0, stream=True
    ) as chunks:
        for chunk in chunks:
            now = time.monotonic()
            longest, last = max(longest, now - (last or now)), now
            for choice in chunk.choices:
                print(choice.text, end="", flush=True)
print(longest, file=sys.stderr)
"""
SERVED = {
    "model": str(MODEL),
    "dtype": "float32",
    "data_plane_host": "node",
    "tls_folder": "~/maestrale-secrets/tls",
    "api_keys_file": "~/maestrale-secrets/api-keys",
    "head_resources": {"maestrale_head": 1},
    "worker_resources": {"maestrale_expert": 1},
    "worker_cpus": 0,
    "expert_copies": 2,
}


PARTS = {"HeadReplica", "Ingress", "Controller", "ExpertWorker"}
AWAY_S = 60.0


def deploy(cluster: Cluster, **changes: object) -> None:
    """The tiny model, by a file with these settings beside the others."""
    args = SERVED | changes
    application = {"name": "maestrale", "import_path": "cluster.app:build", "args": args}
    document = {
        "proxy_location": "EveryNode",
        "http_options": {"host": "0.0.0.0", "port": PORT},
        "applications": [application],
    }
    (cluster.ray_head.home / "serve.yaml").write_text(yaml.safe_dump(document))
    cluster.on_head("serve deploy ~/serve.yaml")


@pytest.fixture(scope="module")
def served(cluster: Cluster) -> Cluster:
    """Deployed and ready."""
    deploy(cluster)
    ready = f"curl -sf --retry 1000 --retry-delay 1 --retry-all-errors {cluster.url}/ready"
    cluster.caller.run(f"{ready} --retry-max-time {READY_TIMEOUT_S}", timeout_s=READY_TIMEOUT_S + 9)
    return cluster


def stream(cluster: Cluster, tokens: int) -> subprocess.Popen[str]:
    """A completion that is under way, called from the last host; says on standard error how many
    seconds lay between two chunks at most.
    """
    (cluster.caller.home / "stream.py").write_text(STREAM.format(prompt=PROMPT, tokens=tokens))
    command = cluster.caller.command(f"python ~/stream.py {cluster.url} {KEY}")
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def said_here(tokens: int) -> str:
    """The same completion, computed in this process."""
    return Mixtral.load(dtype="float32").generate(PROMPT, max_tokens=tokens, temperature=0)


@contextmanager
def streaming(cluster: Cluster) -> Iterator[list[list[float]]]:
    """Inside, three callers stream again and again; all that they read is as it should be.

    Yields for each of them what it has read: of each stream the longest time between two chunks.
    """
    expected = said_here(120)
    is_over = threading.Event()
    told: list[list[float]] = [[], [], []]

    def tell(gaps_s: list[float]) -> None:
        while not is_over.is_set():
            answer, report = stream(cluster, 120).communicate(timeout=300)
            assert answer == expected, report
            gaps_s.append(float(report))

    with ThreadPoolExecutor(len(told)) as pool:
        tellers = [pool.submit(tell, gaps_s) for gaps_s in told]
        try:
            yield told
        finally:
            is_over.set()
        for teller in tellers:
            teller.result()


def nodes(cluster: Cluster) -> set[tuple[str, str]]:
    """Of all nodes that there have been: Ray's id, and whether it is ALIVE."""
    listed = json.loads(cluster.on_head("ray list nodes --format json"))
    return {(node["node_id"], node["state"]) for node in listed}


def is_healthy(cluster: Cluster) -> bool:
    """Serve has all replicas and proxies that it wants."""
    status = yaml.safe_load(cluster.on_head("serve status"))
    deployments = status["applications"]["maestrale"]["deployments"].values()
    states = [each["status"] for each in deployments] + list(status["proxies"].values())
    return status["applications"]["maestrale"]["status"] == "RUNNING" and set(states) == {"HEALTHY"}


def is_ready(cluster: Cluster) -> bool:
    return bool(cluster.caller.run(f"curl -sf -m 5 {cluster.url}/ready || true"))


def workers(cluster: Cluster) -> set[tuple[str, str]]:
    """Names and addresses of the workers that `/ready` tells of."""
    status = json.loads(cluster.caller.run(f"curl -s {cluster.url}/ready"))
    return {(worker["name"], worker["address"]) for worker in status["workers"]}


def hosts_with_workers(cluster: Cluster) -> set[str]:
    """Addresses of the hosts that they are on."""
    return {address.rpartition(":")[0] for _, address in workers(cluster)}


@pytest.mark.timeout(900)
def test_heads_and_experts_are_where_they_belong(served: Cluster) -> None:
    assert "RUNNING" in served.on_head("serve status")
    assert hosts_with_workers(served) == {host.address for host in served.experts}
    for host, parts in (
        (served.ray_head, set()),
        (served.door, {"HeadReplica", "Ingress", "Controller"}),
        *((host, {"ExpertWorker"}) for host in served.experts),
    ):
        titles = host.run("ps -eo args")
        found = set(re.findall(r"ray::(?:ServeReplica:maestrale:)?(\w+)", titles))
        assert found & PARTS == parts, titles


def test_the_host_that_lacks_the_model_has_borrowed_it(served: Cluster) -> None:
    having, lacking = served.experts
    assert not (having.home / ".cache" / "maestrale" / "checkpoints").exists()
    (copied,) = (lacking.home / ".cache" / "maestrale" / "checkpoints").iterdir()
    names = {path.name for path in copied.iterdir()}
    assert "config.json" in names
    assert "model.safetensors" not in names


@pytest.mark.timeout(300)
def test_another_host_is_answered_as_one_process_would(served: Cluster) -> None:
    answer, problems = stream(served, 40).communicate(timeout=120)
    assert answer == said_here(40), problems


@pytest.mark.timeout(600)
def test_a_host_of_experts_that_is_cut_off_fails_no_request(served: Cluster) -> None:
    assert hosts_with_workers(served) == {host.address for host in served.experts}
    lost = served.experts[0]
    under_way = stream(served, 200)
    assert under_way.stdout is not None
    begun = under_way.stdout.read(20)
    lost.cut_off()
    try:
        rest, problems = under_way.communicate(timeout=400)
        assert begun + rest == said_here(200), problems
        assert stream(served, 40).communicate(timeout=60)[0] == said_here(40)
        until(lambda: lost.address not in hosts_with_workers(served), "its worker to be given up")
    finally:
        lost.reconnect()
    until(lambda: lost.address in hosts_with_workers(served), "the host to be used again")
    assert stream(served, 40).communicate(timeout=60)[0] == said_here(40)


@pytest.mark.timeout(900)
def test_rays_head_node_may_be_away_for_a_minute(served: Cluster) -> None:
    """Streams go on and requests are answered meanwhile; afterwards all is as it was."""
    until(lambda: is_healthy(served), "all to be healthy before")
    before = nodes(served), workers(served)
    hosts_of_experts = hosts_with_workers(served)
    assert {state for _, state in before[0]} == {"ALIVE"}
    with streaming(served) as told:
        until(lambda: all(told), "the first streams")
        served.ray_head.cut_off()
        try:
            told_before = [len(gaps_s) for gaps_s in told]
            time.sleep(AWAY_S)  # what is tried: nothing ends it sooner
            told_meanwhile = [
                len(gaps_s) - begun for gaps_s, begun in zip(told, told_before, strict=True)
            ]
        finally:
            served.ray_head.reconnect()
        until(lambda: is_healthy(served), "all to be healthy again")
    print(
        f"\n{sum(map(len, told))} streams, {sum(told_meanwhile)} of them ended while Ray's head "
        f"node was away; {max(map(max, told)):.2f} s between two chunks at most"
    )
    # the first may have begun before, the second has not
    assert min(told_meanwhile) >= 2
    assert (nodes(served), workers(served)) == before  # nothing had to be started again

    served.experts[0].run("pkill -9 -f ray::[E]xpertWorker")
    until(lambda: len(workers(served) - before[1]) == 1, "another worker in its place")
    until(lambda: hosts_with_workers(served) == hosts_of_experts, "its experts")
    served.door.run("pkill -9 -f ServeReplica:maestrale:[I]ngress")
    until(lambda: is_ready(served), "another ingress, and its door to hear of it")
    assert stream(served, 40).communicate(timeout=60)[0] == said_here(40)


@pytest.mark.timeout(900)
def test_another_version_takes_over_under_streams(served: Cluster, tmp_path: Path) -> None:
    """Its workers one after the other, each beside a copy of all that it holds."""
    old = workers(served)

    def has_version(version: str) -> bool:
        ask = f'curl -s -H "Authorization: Bearer {KEY}" {served.url}/version'
        return version in served.caller.run(ask)

    def are_workers_new() -> bool:
        return len(workers(served) - old) == len(old)

    with streaming(served) as told:
        code = another_version(tmp_path, "9.9.9")
        for host in served.hosts:
            install(host, code)
        deploy(served, max_concurrent_requests=100)  # Serve replaces what has changed
        until(lambda: has_version("9.9.9"), "an ingress of the other version")
        until(are_workers_new, "workers of the other version")
    assert all(told)


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
    for host in served.hosts:
        until(lambda host=host: not host.run("pgrep -x raylet || true"), f"{host.name} to be idle")

"""ray up, serve deploy, serve status, ray down; heads and experts on hosts of their own."""

import json
import subprocess

import pytest
import yaml

from model import Mixtral
from tests.cluster.conftest import KEY, PORT, READY_TIMEOUT_S, Cluster, until

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
    "dtype": "float32",
    "data_plane_host": "node",
    "tls_folder": "~/maestrale-secrets/tls",
    "api_keys_file": "~/maestrale-secrets/api-keys",
    "head_resources": {"maestrale_head": 1},
    "worker_resources": {"maestrale_expert": 1},
    "head_cpus": 0,
    "expert_copies": 2,
}


@pytest.fixture(scope="module")
def served(cluster: Cluster) -> Cluster:
    """The tiny model, deployed and ready."""
    document = {
        "proxy_location": "HeadOnly",
        "http_options": {"host": "0.0.0.0", "port": PORT},
        "applications": [{"name": "maestrale", "import_path": "cluster.app:build", "args": SERVED}],
    }
    (cluster.head.home / "serve.yaml").write_text(yaml.safe_dump(document))
    cluster.on_head("serve deploy ~/serve.yaml")
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


@pytest.mark.timeout(300)
def test_ray_down_leaves_nothing(served: Cluster) -> None:
    served.ray("down -y", timeout_s=200)
    for host in (served.head, *served.experts):
        until(lambda host=host: not host.run("pgrep -x raylet || true"), f"{host.name} to be idle")

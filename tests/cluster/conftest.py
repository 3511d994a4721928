"""Four hosts of a cluster and a fifth that calls them, driven by Ray's own commands."""

import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from model import TINY
from tests.cluster.hosts import Host, hosts, missing

ROOT = Path(__file__).parents[2]
CALLER = 5
PORT = 8000
MODEL = Path("~/tiny")
KEY = "a-key-of-the-test"
UP_TIMEOUT_S = 400
READY_TIMEOUT_S = 240


@dataclass(frozen=True)
class Cluster:
    """A cluster that is up, and the host it is operated and called from."""

    ray_head: Host
    """Ray's head node, on which nothing of the service runs."""
    door: Host
    """Where head replica, ingress and controller are."""
    experts: tuple[Host, ...]
    caller: Host
    file: Path

    @property
    def hosts(self) -> tuple[Host, ...]:
        return (self.ray_head, self.door, *self.experts)

    @property
    def url(self) -> str:
        return f"http://{self.door.address}:{PORT}"

    def ray(self, verb: str, *arguments: str, timeout_s: float = 120) -> str:
        """Run one of Ray's own commands on the caller's host."""
        words = " ".join([verb, str(self.file), *arguments])
        return self.caller.run(f"RAY_UP_enable_autoscaler_v2=0 ray {words}", timeout_s=timeout_s)

    def on_head(self, text: str, *, timeout_s: float = 120) -> str:
        return self.ray_head.run(f"RAY_AUTH_MODE=token {text}", timeout_s=timeout_s)


def until(condition: Callable[[], bool], what: str, timeout_s: float = 240) -> None:
    """Ask every second whether it is so."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout_s} s for {what}"
        time.sleep(1)


@pytest.fixture(scope="session", autouse=True)
def _hosts_can_be_made() -> None:
    """Namespaces need root and tools that not every machine has: says which are missing."""
    if reason := missing():
        pytest.skip(reason)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("hosts")
    with hosts(folder, [1, 2, 3, 4, CALLER]) as (ray_head, door, *experts, caller):
        for host, offered in (
            (ray_head, {}),
            (door, {"maestrale_head": 1}),
            *((host, {"maestrale_expert": 1}) for host in experts),
        ):
            (host.home / "resources.json").write_text(json.dumps(offered))
            (host.home / "num-cpus").write_text("2" if host is door else "0")
        for host in (ray_head, door, *experts, caller):
            settle_in(host)
        for host in (door, experts[0]):  # the second host of experts borrows
            shutil.copytree(TINY, host.home / MODEL.name)
        caller.run("ray get-auth-token --generate > /dev/null; chmod 600 ~/.ray/auth_token")
        caller.run("maestrale certs --out ~/maestrale-secrets/tls", timeout_s=120)
        (caller.home / "maestrale-secrets" / "api-keys").write_text(KEY)
        file = folder / "cluster.yaml"
        file.write_text(yaml.safe_dump(_as_deployed_here(ray_head, [door, *experts])))
        running = Cluster(ray_head, door, tuple(experts), caller, file)
        running.ray("up -y --no-config-cache", timeout_s=UP_TIMEOUT_S)
        yield running


def settle_in(host: Host) -> None:
    """What an installation would leave: the packages are this interpreter's, the code is this."""
    (host.home / "maestrale").symlink_to(sys.prefix)
    install(host, ROOT)
    variables = f"PYTHONPATH={host.home / 'code'} RAY_USAGE_STATS_ENABLED=0"
    profile = f"export PATH={sys.prefix}/bin:$PATH {variables}\n"
    for name in (".bash_profile", ".bashrc"):
        (host.home / name).write_text(profile)


def install(host: Host, code: Path) -> None:
    """Have processes that start from now on run this code, in place of what there was."""
    link = host.home / "code"
    link.unlink(missing_ok=True)
    link.symlink_to(code)


def _as_deployed_here(head: Host, workers: list[Host]) -> dict[str, Any]:
    """deploy/ray-onpremise.yaml with these hosts, nothing to install, and little memory."""
    text = (ROOT / "deploy" / "ray-onpremise.yaml").read_text()
    deployed: dict[str, Any] = yaml.safe_load(text.replace("/etc/maestrale/", "~/"))
    small = "--object-store-memory=100000000 --node-ip-address"
    starts = {
        "head_start_ray_commands": f" {small}={head.address}",
        "worker_start_ray_commands": (
            f' --num-cpus="$(cat ~/num-cpus)" {small}="$(hostname -I | cut -d\' \' -f1)"'
        ),
    }
    for name, more in starts.items():
        deployed[name] = [
            command + more if " start " in command else command for command in deployed[name]
        ]
    return deployed | {
        "provider": {
            "type": "local",
            "head_ip": head.address,
            "worker_ips": [worker.address for worker in workers],
        },
        "auth": {"ssh_user": "root", "ssh_private_key": str(head.key)},
        "file_mounts": {path: path for path in ("~/.ray/auth_token", "~/maestrale-secrets")},
        "setup_commands": deployed["setup_commands"][1:2],
    }

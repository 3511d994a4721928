"""Hosts on one machine: each with an address, a process table, a home and an SSH server of its own.

A host is a network, PID, mount and UTS namespace, joined to the others by a bridge. Needs root,
iproute2, openssh-server and rsync. Whatever goes wrong, nothing stays behind.
"""

import os
import shlex
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

BRIDGE = "mstr-bridge"
SUBNET = "10.77.0"
TOOLS = ("ip", "sshd", "ssh", "ssh-keygen", "rsync", "unshare")


def missing() -> str | None:
    """What keeps hosts from being made here, or None."""
    if os.geteuid() != 0:
        return "root is needed to make network namespaces"
    lacking = [tool for tool in TOOLS if shutil.which(tool) is None]
    return (
        f"{', '.join(lacking)} not found: apt install iproute2 openssh-server rsync"
        if lacking
        else None
    )


@dataclass(frozen=True)
class Host:
    """One of them. Root's home there is a folder here."""

    number: int
    folder: Path
    key: Path

    @property
    def name(self) -> str:
        return f"mstr-h{self.number}"

    @property
    def address(self) -> str:
        return f"{SUBNET}.{self.number}"

    @property
    def home(self) -> Path:
        return self.folder / "home"

    def command(self, text: str) -> list[str]:
        """What runs a line of shell there, from here."""
        options = (
            "StrictHostKeyChecking=no",
            "UserKnownHostsFile=/dev/null",
            "LogLevel=ERROR",
            "ConnectTimeout=5",
            "BatchMode=yes",
        )
        flags = [word for option in options for word in ("-o", option)]
        line = f"bash --login -c {shlex.quote(text)}"
        return ["ssh", "-i", str(self.key), *flags, f"root@{self.address}", line]

    def run(self, text: str, *, timeout_s: float = 60) -> str:
        """Run a line of shell there; returns its output. Raises AssertionError when it fails."""
        done = subprocess.run(
            self.command(text), capture_output=True, text=True, timeout=timeout_s, check=False
        )
        assert done.returncode == 0, (
            f"{self.name}: {text}: {done.stdout[-4000:]}{done.stderr[-4000:]}"
        )
        return done.stdout

    def cut_off(self) -> None:
        """Pull the cable."""
        _run("ip", "link", "set", _cable(self.number), "down")

    def reconnect(self) -> None:
        _run("ip", "link", "set", _cable(self.number), "up")


@contextmanager
def hosts(folder: Path, numbers: Sequence[int]) -> Iterator[list[Host]]:
    """Hosts that answer SSH, until the block is left; then everything on them is ended."""
    key = folder / "key"
    _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key))
    with ExitStack() as cleanup:
        _run("ip", "link", "add", BRIDGE, "type", "bridge")
        cleanup.callback(_run, "ip", "link", "del", BRIDGE)
        _run("ip", "addr", "add", f"{SUBNET}.254/24", "dev", BRIDGE)
        _run("ip", "link", "set", BRIDGE, "up")
        yield [cleanup.enter_context(_host(Host(n, folder / f"h{n}", key))) for n in numbers]


@contextmanager
def _host(host: Host) -> Iterator[Host]:
    for part in ("home", "ray"):
        (host.folder / part).mkdir(parents=True)
    cable = _cable(host.number)
    with ExitStack() as cleanup:
        _run("ip", "netns", "add", host.name)
        cleanup.callback(_run, "ip", "netns", "del", host.name)
        _run("ip", "link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", host.name)
        # a connection that has yet to time out keeps a namespace, and its end of the cable, alive
        cleanup.callback(_run, "ip", "link", "del", cable)
        _run("ip", "link", "set", cable, "master", BRIDGE, "up")
        inside = ("ip", "-n", host.name)
        _run(*inside, "addr", "add", f"{host.address}/24", "dev", "eth0")
        _run(*inside, "link", "set", "lo", "up")
        _run(*inside, "link", "set", "eth0", "up")
        _run(*inside, "route", "add", "default", "via", f"{SUBNET}.254")
        log = cleanup.enter_context((host.folder / "sshd.log").open("w"))
        server = subprocess.Popen(
            [
                "ip",
                "netns",
                "exec",
                host.name,
                "unshare",
                "--pid",
                "--fork",
                "--mount",
                "--uts",
                "--mount-proc",
                "--kill-child",
                "sh",
                "-ec",
                _boot(host),
            ],
            stdout=log,
            stderr=log,
        )
        cleanup.callback(server.wait)
        cleanup.callback(server.kill)  # ends all on the host at once, as losing power would
        _wait_for_ssh(host, server)
        yield host


def _boot(host: Host) -> str:
    """What the first process of a host does."""
    options = {
        "ListenAddress": host.address,
        "HostKey": host.key,
        "AuthorizedKeysFile": f"{host.key}.pub",
        "StrictModes": "no",
        "PermitRootLogin": "yes",
        "PidFile": "none",
        "UsePAM": "no",
        "MaxStartups": "100",
    }
    flags = " ".join(f"-o {name}={value}" for name, value in options.items())
    return f"""
        hostname {host.name}
        mkdir -p /run/sshd /tmp/ray
        sed 's|:/root:|:{host.home}:|' /etc/passwd > {host.folder}/passwd
        mount --bind {host.folder}/passwd /etc/passwd
        mount --bind {host.folder}/ray /tmp/ray
        mount -t tmpfs tmpfs /dev/shm
        exec {shutil.which("sshd")} -D -e -f /dev/null {flags}
    """


def _wait_for_ssh(host: Host, server: subprocess.Popen[bytes]) -> None:
    for _ in range(50):
        assert server.poll() is None, (host.folder / "sshd.log").read_text()
        if subprocess.run(host.command("true"), capture_output=True, check=False).returncode == 0:
            return
    raise AssertionError(f"{host.name} does not answer SSH")


def _cable(number: int) -> str:
    return f"mstr-v{number}"


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{shlex.join(command)}: {done.stderr}"

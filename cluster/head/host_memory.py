"""How much memory of the host this process may still take: what is free, and what its cgroups let
it have.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple


class _Names(NamedTuple):
    """Of a cgroup's files, and of the page cache in the last that the kernel gives up first."""

    limit: str
    usage: str
    stat: str
    cache: str


_V1 = _Names("memory.limit_in_bytes", "memory.usage_in_bytes", "memory.stat", "total_inactive_file")
_V2 = _Names("memory.max", "memory.current", "memory.stat", "inactive_file")


def free_host_bytes(root: Path = Path("/")) -> int:
    """Bytes that could be allocated now. root: where proc and sys are.

    Of a cgroup with a limit, what it does not use; files that were read and are only cached count
    as unused, as they do for the kubelet. A cgroup's limit holds for all below it.
    Raises OSError where the kernel does not say.
    """
    meminfo = _numbers(root / "proc/meminfo")
    if "MemAvailable:" not in meminfo:
        raise OSError("/proc/meminfo does not say how much memory is available: set kv_cache_bytes")
    return max(0, min([meminfo["MemAvailable:"] * 1024, *_left_in_cgroups(root)]))


def _left_in_cgroups(root: Path) -> Iterator[int]:
    for folder, names in _cgroups(root):
        try:
            limit = (folder / names.limit).read_text(encoding="ascii").strip()
            if limit == "max":
                continue
            used = int((folder / names.usage).read_text(encoding="ascii"))
            yield int(limit) - used + _numbers(folder / names.stat).get(names.cache, 0)
        except FileNotFoundError:
            continue  # the root has no limit; nor can a container see what lies above its own


def _cgroups(root: Path) -> Iterator[tuple[Path, _Names]]:
    """This process's cgroup and those above it, of either version."""
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        mount, names = root / "sys/fs/cgroup", _V2
        if "memory" in controllers.split(","):
            mount, names = mount / "memory", _V1
        elif controllers:
            continue
        own = Path(path.lstrip("/"))
        for part in (own, *own.parents):
            yield mount / part, names


def _numbers(file: Path) -> dict[str, int]:
    """The first number of each line, by the word before it."""
    lines = (line.split() for line in file.read_text(encoding="ascii").splitlines())
    return {words[0]: int(words[1]) for words in lines if len(words) > 1}

"""A container's own limit counts, not only what its host has left."""

from pathlib import Path

import pytest

from cluster.head.host_memory import free_host_bytes

V1 = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
V2 = "memory.max", "memory.current", "inactive_file"


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text + "\n")


def host(root: Path, cgroup: str | None) -> None:
    """With a million KiB available, and this line of proc/self/cgroup."""
    write(
        root, {"proc/meminfo": "MemTotal: 9000000 kB\nHugePages_Total:\nMemAvailable: 1000000 kB"}
    )
    if cgroup is not None:
        write(root, {"proc/self/cgroup": cgroup})


def limit(
    folder: Path, names: tuple[str, str, str], most: int | str, used: int, cache: int
) -> None:
    write(
        folder,
        {
            names[0]: str(most),
            names[1]: str(used),
            "memory.stat": f"anon 5\ncache 3\n{names[2]} {cache}",
        },
    )


@pytest.mark.parametrize("cgroup", [None, "0::/", "0::/a/b", "7:cpu:/a\n4:memory:/a"])
def test_without_a_limit_all_that_the_host_has_is_free(tmp_path: Path, cgroup: str | None) -> None:
    host(tmp_path, cgroup)
    limit(tmp_path / "sys/fs/cgroup/a", V2, "max", 700, 0)
    limit(tmp_path / "sys/fs/cgroup/memory/a", V1, 0x7FFFFFFFFFFFF000, 700, 0)
    assert free_host_bytes(tmp_path) == 1_024_000_000


@pytest.mark.parametrize(
    ("cgroup", "names", "folder"),
    [
        ("0::/", V2, ""),
        ("0::/system.slice/maestrale.service", V2, "system.slice/maestrale.service"),
        ("0::/pod/container", V2, "pod"),
        ("5:cpu,cpuacct:/\n4:memory:/\n0::/", V1, "memory"),
        ("4:memory:/docker/0123", V1, "memory"),  # its own is all that it sees
        ("4:memory:/a", V1, "memory/a"),
    ],
)
def test_a_limit_leaves_what_is_not_used_and_what_is_only_cached(
    tmp_path: Path, cgroup: str, names: tuple[str, str, str], folder: str
) -> None:
    host(tmp_path, cgroup)
    limit(tmp_path / "sys/fs/cgroup" / folder, names, 5_000, 3_000, 700)
    assert free_host_bytes(tmp_path) == 2_700
    limit(tmp_path / "sys/fs/cgroup" / folder, names, 5_000, 5_100, 0)
    assert free_host_bytes(tmp_path) == 0


def test_a_limit_above_the_hosts_memory_changes_nothing(tmp_path: Path) -> None:
    host(tmp_path, "0::/")
    limit(tmp_path / "sys/fs/cgroup", V2, 1 << 40, 0, 0)
    assert free_host_bytes(tmp_path) == 1_024_000_000


def test_a_kernel_that_says_nothing_is_told_of(tmp_path: Path) -> None:
    write(tmp_path, {"proc/meminfo": "MemTotal: 9000000 kB"})
    with pytest.raises(OSError, match="set kv_cache_bytes"):
        free_host_bytes(tmp_path)


def test_this_host_has_memory() -> None:
    assert free_host_bytes() > 0

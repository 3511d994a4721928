"""How much memory a process has to itself, as Linux counts it."""

from pathlib import Path


def pss_bytes(pid: int) -> int | None:
    """Proportional set size without the page cache: files and libraries, which other processes
    share and the system can drop, are left out. None where the system does not say."""
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return None
    kib = {
        name: int(rest.split()[0])
        for name, _, rest in (line.partition(":") for line in text.splitlines())
        if name.startswith("Pss_")
    }
    if "Pss_Anon" not in kib:  # before Linux 5.4
        return None
    return (kib["Pss_Anon"] + kib["Pss_Shmem"]) * 1024


def above(now_bytes: int | None, idle_bytes: int | None) -> int | None:
    """What has come on top of an idle process."""
    return None if now_bytes is None or idle_bytes is None else now_bytes - idle_bytes

"""One engine at a time, as a process with a time limit; nothing that it starts outlives it."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests.bench.peers.errors import PeerError

SAMPLE_S = 5.0
"""Between two looks at memory: each takes a core for a few hundredths of a second."""

STOP_TIMEOUT_S = 60.0
"""For a server that was asked to end, before it is made to."""

_POLL_S = 0.5
IDLE_PERCENT = 10.0
"""CPU time of others, of all cores, that does not yet disturb."""


@dataclass(frozen=True)
class Command:
    arguments: Sequence[str]
    environ: Mapping[str, str] = field(default_factory=dict)
    """On top of this process's own."""
    output: Path | None = None
    """Where standard output goes; to the log, with standard error, if left out."""


@dataclass
class Watched:
    """A running process with all that it has started."""

    process: subprocess.Popen[bytes]
    log: Path
    peak_bytes: int = 0
    """Highest sum of the proportional set sizes, mapped files included."""
    _known: dict[int, psutil.Process] = field(default_factory=dict)

    def sample(self) -> None:
        """Look at the memory of all its processes, and remember them."""
        try:
            parent = psutil.Process(self.process.pid)
            family = [parent, *parent.children(recursive=True)]
        except psutil.NoSuchProcess:
            return
        self._known |= {process.pid: process for process in family}
        self.peak_bytes = max(self.peak_bytes, sum(pss_bytes(p.pid) for p in family))

    def tail(self, num_characters: int = 2000) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")[-num_characters:]

    def stop(self) -> None:
        """Ask it to end, then make it end, then whatever it left behind."""
        self.sample()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        # psutil tells a process from another that got its number since
        left = [process for process in self._known.values() if process.is_running()]
        for process in left:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        psutil.wait_procs(left, timeout=STOP_TIMEOUT_S)


def run(command: Command, log: Path, limit_s: float) -> int:
    """Run it to its end; returns the highest memory seen, bytes.

    Raises PeerError with the end of its log when it fails or takes longer.
    """
    with watched(command, log) as watch:
        deadline = time.monotonic() + limit_s
        while watch.process.poll() is None:
            if time.monotonic() > deadline:
                raise PeerError(f"took longer than {limit_s:.0f} s: {watch.tail(500)}")
            watch.sample()
            try:
                watch.process.wait(SAMPLE_S)
            except subprocess.TimeoutExpired:
                continue
        if watch.process.returncode:
            raise PeerError(f"ended with status {watch.process.returncode}: {watch.tail()}")
        return watch.peak_bytes


@contextmanager
def watched(command: Command, log: Path) -> Iterator[Watched]:
    """The process while the block runs."""
    with log.open("ab") as errors, (command.output or log).open("ab") as output:
        process = subprocess.Popen(
            [str(argument) for argument in command.arguments],
            env=os.environ | dict(command.environ),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=errors,
            start_new_session=True,  # Ctrl-C is for us, who then end it
        )
        watch = Watched(process, log)
        try:
            yield watch
        finally:
            watch.stop()


def wait_until(is_true: Callable[[], bool], watch: Watched, what: str, limit_s: float) -> None:
    """Wait for what a process is to do. Raises PeerError when it ends first, or never does."""
    deadline = time.monotonic() + limit_s
    while not is_true():
        if watch.process.poll() is not None:
            raise PeerError(f"ended before {what}: {watch.tail()}")
        if time.monotonic() > deadline:
            raise PeerError(f"no {what} after {limit_s:.0f} s: {watch.tail(500)}")
        time.sleep(_POLL_S)  # another program, which cannot tell us


def wait_until_idle(patience_s: float) -> float:
    """Wait until nobody else computes; returns the CPU use of the last second, percent of all."""
    deadline = time.monotonic() + patience_s
    said = False
    while True:
        busy = psutil.cpu_percent(interval=1.0)
        if busy <= IDLE_PERCENT or time.monotonic() > deadline:
            return busy
        if not said:
            said = True
            print(f"  others use {busy:.0f} % of the CPU; waiting", file=sys.stderr, flush=True)


def pss_bytes(pid: int) -> int:
    """Proportional set size, mapped files included; 0 when the process has ended."""
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii")
    except OSError:
        return 0
    found = [line.split()[1] for line in text.splitlines() if line.startswith("Pss:")]
    return int(found[0]) * 1024 if found else 0

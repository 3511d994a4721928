"""What this machine can do: how fast it reads memory, and how fast it multiplies matrices.

python -m tests.bench.peers.limits LIMITS.json
"""

import json
import mmap
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.bench.peers.roofline import Limits

BUFFER_BYTES = 1 << 30
"""Many times any cache."""

PASSES = 7
"""The best of so many: what disturbs only ever slows."""

ENOUGH_S = 5.0
"""No further pass after this."""

MATRIX = (256, 4096, 14336)
"""Rows, inputs and outputs of the product: a prompt through one of Mixtral's matrices."""


@dataclass(frozen=True)
class Figure:
    """One measurement of the machine."""

    what: str
    """"memory" (bytes/s) or "matrix" (operations/s)."""
    kind: str
    """Pages or dtype."""
    threads: int
    per_s: float


def main() -> None:
    num_threads = torch.get_num_threads()
    counts = sorted({1, num_threads})
    figures = [*memory_figures(counts), *matrix_figures(counts)]
    Path(sys.argv[1]).write_text(json.dumps([asdict(f) for f in figures]), encoding="utf-8")


def limits_of(figures: list[Figure]) -> Limits:
    """The best of each: what no engine on this machine can pass with these means."""

    def best(what: str) -> float:
        return max(figure.per_s for figure in figures if figure.what == what)

    return Limits(bytes_per_s=best("memory"), operations_per_s=best("matrix"))


def memory_figures(thread_counts: list[int]) -> Iterator[Figure]:
    for kind, advice in (("plain pages", mmap.MADV_NOHUGEPAGE), ("huge pages", mmap.MADV_HUGEPAGE)):
        memory = mmap.mmap(-1, BUFFER_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory.madvise(advice)
        values = torch.frombuffer(memory, dtype=torch.int64)
        values.fill_(1)  # before this there are no pages
        ways: list[Callable[[], Tensor]] = [values.sum, values.view(torch.float32).amax]
        for threads in thread_counts:
            torch.set_num_threads(threads)
            seconds = min(best_s(way) for way in ways)
            yield Figure("memory", kind, threads, BUFFER_BYTES / seconds)


def matrix_figures(thread_counts: list[int]) -> Iterator[Figure]:
    num_rows, inputs, outputs = MATRIX
    for dtype, threads in product((torch.bfloat16, torch.float32), thread_counts):
        torch.set_num_threads(threads)
        rows, weights = (torch.randn(n, inputs).to(dtype) for n in (num_rows, outputs))
        seconds = best_s(partial(F.linear, rows, weights))
        kind = str(dtype).removeprefix("torch.")
        yield Figure("matrix", kind, threads, 2 * num_rows * inputs * outputs / seconds)


def best_s(work: Callable[[], Tensor]) -> float:
    """Shortest time of a few passes, after one that warms up."""
    work()
    seconds: list[float] = []
    while len(seconds) < PASSES and sum(seconds) < ENOUGH_S:
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


if __name__ == "__main__":
    main()

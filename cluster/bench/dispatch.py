"""`bench dispatch`: what one dispatch to a worker costs beyond the worker's computing.

The real `RemoteExperts` here, the real service in a process of its own, and experts too small to
compute for long. Transports take turns, for a shared machine drifts.
"""

import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch

from cluster.bench.summary import Distribution, distribution
from cluster.bench.workers import Holding, connected, running_workers
from cluster.head.dispatch import RemoteExperts
from cluster.head.stopwatch import Stopwatch
from cluster.planning import plan
from model.config import MixtralConfig
from model.experts import ExpertWeights
from model.phases import Phase
from model.router import Routing
from model.weights import torch_dtype

TRANSPORTS = ("tcp", "unix")
INTERMEDIATE_SIZE = 8
ANSWER_TIMEOUT_S = 30.0
PARTS = ("pack", "wait", "add", "worker")


@dataclass(frozen=True, kw_only=True)
class DispatchPlan:
    """What to measure."""

    rows: Sequence[int]
    """Of one dispatch."""
    hidden_size: int
    dtype: str
    transports: Sequence[str]
    """Of TRANSPORTS."""
    num_threads: int
    rounds: int
    num_warmup: int = 100


@dataclass(frozen=True)
class DispatchRow:
    """One transport and number of rows. Seconds."""

    transport: str
    num_rows: int
    sent_bytes: int
    """Of rows, one way; sums come back in float32."""
    beyond: Distribution
    """Round trip without the worker's own time."""
    parts: dict[str, float]
    """Medians by PARTS. pack, wait and add are the whole round trip; a worker may begin to compute
    while its caller still packs, so the wait can be shorter than the worker's own time."""


@dataclass(frozen=True)
class SmallExperts:
    """One layer of experts that take little computing. Called in the worker's process."""

    hidden_size: int
    dtype: str

    @property
    def config(self) -> MixtralConfig:
        return MixtralConfig(
            hidden_size=self.hidden_size,
            intermediate_size=INTERMEDIATE_SIZE,
            num_hidden_layers=1,
            dtype=self.dtype,
        )

    @property
    def torch_dtype(self) -> torch.dtype:
        dtype = torch_dtype(self.dtype)
        assert dtype is not None
        return dtype

    def __call__(self) -> Holding:
        generator = torch.Generator().manual_seed(0)

        def matrix(rows: int, columns: int) -> torch.Tensor:
            return torch.randn(rows, columns, generator=generator).to(self.torch_dtype)

        held = {
            unit: ExpertWeights(
                matrix(2 * INTERMEDIATE_SIZE, self.hidden_size),
                matrix(self.hidden_size, INTERMEDIATE_SIZE),
            )
            for unit in self.config.expert_units
        }
        return Holding(self.config, self.torch_dtype, held)


class _TripWatch(Stopwatch):
    """A stopwatch that also keeps what the worker says of its own time."""

    worker_s = 0.0

    def reveal(self, seconds: float, was: Phase, really: Phase) -> None:
        self.worker_s = seconds

    def trip(self, whole_s: float) -> dict[str, float]:
        """Seconds of the round trip that has just ended: PARTS, and `beyond` the worker."""
        phases = self.take()
        return {
            "pack": phases["packing"],
            "wait": phases["transfer"],
            "add": phases["unpacking"],
            "worker": self.worker_s,
            "beyond": whole_s - self.worker_s,
        }


def measure(wanted: DispatchPlan, on_progress: Callable[[str], None]) -> list[DispatchRow]:
    """Carry out a plan. Raises ConfigError for a dtype or size, or BenchError."""
    torch.set_num_threads(wanted.num_threads)
    maker = SmallExperts(wanted.hidden_size, wanted.dtype)
    config = maker.config
    table = plan(
        num_layers=1, num_experts=config.num_local_experts, expert_bytes=[0], budgets=[None]
    )
    watch = _TripWatch()
    on_progress("starting a worker")
    with ExitStack() as stack:
        socket = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "worker"
        (worker,) = stack.enter_context(
            running_workers([maker], num_threads=wanted.num_threads, unix_socket=str(socket))
        )
        addresses = {"tcp": worker.address, "unix": f"unix:{socket}"}
        experts = {}
        for transport in wanted.transports:
            experts[transport] = connected(
                [worker],
                table,
                (config, maker.torch_dtype),
                watch,
                timeout_s=ANSWER_TIMEOUT_S,
                addresses=[addresses[transport]],
            )
            stack.callback(experts[transport].close)
        found = []
        for num_rows in wanted.rows:
            on_progress(f"{num_rows} rows")
            found += _compare(experts, num_rows, wanted, config, watch)
        return found


@torch.inference_mode()
def _compare(
    experts: dict[str, RemoteExperts],
    num_rows: int,
    wanted: DispatchPlan,
    config: MixtralConfig,
    watch: _TripWatch,
) -> list[DispatchRow]:
    """The same rows over each transport, in turn."""
    generator = torch.Generator().manual_seed(num_rows)
    dtype = torch_dtype(wanted.dtype)
    x_TD = torch.randn(num_rows, wanted.hidden_size, generator=generator).to(dtype)
    scores_TE = torch.rand(num_rows, config.num_local_experts, generator=generator)
    weights_TK, expert_ids_TK = scores_TE.topk(config.num_experts_per_tok)
    routing = Routing(expert_ids_TK, weights_TK)
    seen: dict[str, list[dict[str, float]]] = {transport: [] for transport in experts}
    for round_number in range(wanted.num_warmup + wanted.rounds):
        for transport, remote in experts.items():
            watch.take()
            started = time.perf_counter()
            remote.dispatch(0, x_TD, routing).wait()
            whole_s = time.perf_counter() - started
            if round_number >= wanted.num_warmup:
                seen[transport].append(watch.trip(whole_s))
    rows = []
    for transport, trips in seen.items():
        beyond = distribution(trip["beyond"] for trip in trips)
        assert beyond is not None
        parts = {name: median(trip[name] for trip in trips) for name in PARTS}
        rows.append(DispatchRow(transport, num_rows, x_TD.nbytes, beyond, parts))
    return rows

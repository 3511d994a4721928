"""What the command line shows to people: progress, tables, a story. Decides nothing."""

import time
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from rich.console import Console
from rich.table import Table
from rich.text import Text

from cluster.config import GIB, MIB
from cluster.schema import Readiness, Rebalancing
from model.progress import Progress

if TYPE_CHECKING:
    from cluster.client import Client, Sample
    from model.inspect import Inspection

# What is shown holds paths, addresses and models' words: brackets and colons in them are no markup.
_console = partial(Console, highlight=False, soft_wrap=True, markup=False, emoji=False)
console = _console()
errors = _console(stderr=True)

STORY_PROMPT = "Once upon a time"
# A story that ends well. In float32 it is the same on every machine.
STORY_SAMPLING: dict[str, Any] = {"temperature": 0.5, "top_p": 0.95, "seed": 8}
STORY_DTYPE: Final = "float32"


class BytesLine:
    """One line that is written over: what has come, how fast, and how long the rest takes."""

    def __init__(self, what: str, total_bytes: int) -> None:
        self._what = what
        self._progress = Progress(total_bytes)
        self._started = time.monotonic()
        self._shown_s = -1.0

    def add(self, num_bytes: int) -> None:
        """Note that so many bytes have come; shows at most four times a second."""
        elapsed_s = time.monotonic() - self._started
        self._progress = self._progress.after(num_bytes, elapsed_s=elapsed_s)
        is_last = self._progress.done_bytes >= self._progress.total_bytes
        if elapsed_s - self._shown_s >= 0.25 or is_last:
            self._shown_s = elapsed_s
            line = f"\r{self._what}: {self._progress}   "
            errors.print(line, end="\n" if is_last else "")


def print_certificates(folder: Path, written: list[Path]) -> None:
    """What was written where, and what it takes to use it."""
    for path in written:
        console.print(f"wrote {path}")
    if not written:
        console.print(f"{folder} is complete: nothing was written")
    console.print(
        f"In the configuration: tls_folder: {folder.absolute()}\n"
        "Copy ca.pem, ROLE.pem and ROLE-key.pem of the roles that run there to each node (ingress, "
        "head, worker), and keep ca-key.pem off the nodes: whoever has it can make identities.\n"
        "To renew one, delete its two files and run this again; processes take new files with "
        "their next connection."
    )


def size(num_bytes: float) -> str:
    """A number of bytes as people read it."""
    if num_bytes >= GIB:
        return f"{num_bytes / GIB:,.1f} GiB"
    return f"{num_bytes / MIB:,.1f} MiB"


def print_inspection(found: "Inspection") -> None:
    """What is in a checkpoint, and the memory it takes."""
    config = found.config
    console.print(
        f"{found.folder}: {found.layout}, {found.num_files} files, {', '.join(found.dtypes)}, "
        f"{found.num_parameters:,} parameters, {size(found.num_bytes)}"
    )
    console.print(
        f"{config.num_hidden_layers} layers of {config.num_local_experts} experts, "
        f"{config.num_experts_per_tok} per token; one expert: "
        f"{found.num_parameters_per_expert:,} parameters, {size(found.num_bytes_per_expert)}"
    )
    parts = _table("part", "parameters", "size")
    for part in found.parts:
        parts.add_row(part.name, f"{part.num_parameters:,}", size(part.num_bytes))
    console.print(parts)
    memory = _table(
        "held as", "a head", "attention too", "an expert", f"a worker of {found.num_workers}"
    )
    for row in found.memory:
        columns = row.head_bytes, row.quantized_head_bytes, row.expert_bytes, row.worker_bytes
        memory.add_row(row.form, *map(size, columns))
    console.print(memory)


def _table(first: str, *others: str) -> Table:
    """A table whose first column is text and whose others are numbers."""
    table = Table(first)
    for heading in others:
        table.add_column(heading, justify="right")
    return table


class ProgressLines:
    """One line per news of the start, with the time since its beginning."""

    def __init__(self) -> None:
        self._started = time.monotonic()

    def show(self, phase: str, percent: int) -> None:
        self.line(f"{phase}, {percent} %" if percent else phase)

    def line(self, text: str) -> None:
        elapsed = f"{time.monotonic() - self._started:6.1f} s"
        console.print(Text.assemble((elapsed, "dim"), f"  {text}"))


def print_status(readiness: Readiness) -> None:
    """How far a service is, who holds what, and what is being loaded."""
    state = "ready" if readiness.ready else f"{readiness.phase}, {readiness.percent} %"
    console.print(
        f"{state}; {readiness.heads_ready} of {readiness.heads_expected} heads, "
        f"{len(readiness.workers)} workers"
    )
    for line in filter(None, (readiness.error, readiness.scaling)):
        console.print(line)
    if readiness.workers:
        print_placement(readiness)
    for load in readiness.loading:
        elapsed_s = load.loaded_bytes / load.bytes_per_s if load.bytes_per_s else 0.0
        progress = Progress(load.total_bytes, load.loaded_bytes, elapsed_s)
        console.print(f"{load.worker} loads from {load.source}: {progress}")


def print_placement(readiness: Readiness) -> None:
    table = Table(title=f"Placement, epoch {readiness.epoch}", title_justify="left")
    for heading in ("worker", "address", "experts", "MiB"):
        table.add_column(heading, justify="left" if heading in ("worker", "address") else "right")
    for worker in readiness.workers:
        mib = f"{worker.num_bytes / MIB:,.1f}"
        table.add_row(worker.name, worker.address, str(worker.num_experts), mib)
    console.print(table)


def print_rebalancing(found: Rebalancing) -> None:
    """What moves, and how even the layers are before and after."""
    if not found.moves:
        console.print("Nothing to move: the placement is as good as it gets for this load.")
        return
    moves = _table("worker", "layer", "expert", "slice")
    for move in found.moves:
        part = f"{move.slice_number} of {move.num_slices}" if move.num_slices > 1 else ""
        moves.add_row(move.worker, str(move.layer), str(move.expert), part)
    console.print(moves)
    shares = _table("layer", "busiest worker / mean", "afterwards")
    for layer, each in enumerate(zip(found.busiest_before, found.busiest_after, strict=True)):
        shares.add_row(str(layer), *(f"{share:.2f}" for share in each))
    console.print(shares)
    verb = "are being loaded" if found.adopted else "would be loaded"
    console.print(
        f"{len(found.moves)} experts {verb}; {found.gain:.1%} less time expected for experts"
    )


def tell_story(client: "Client", max_tokens: int) -> None:
    started = time.perf_counter()
    first = 0.0
    num_tokens = 0
    console.print(STORY_PROMPT, end="", style="bold")
    with client.completions.create(
        prompt=STORY_PROMPT,
        max_tokens=max_tokens,
        stream=True,
        stream_options={"include_usage": True},
        **STORY_SAMPLING,
    ) as chunks:
        for chunk in chunks:
            first = first or time.perf_counter() - started
            for choice in chunk.choices:
                console.print(choice.text, end="")
            if chunk.usage is not None:
                num_tokens = chunk.usage.completion_tokens
    took = time.perf_counter() - started
    console.print("\n")
    rate = (num_tokens - 1) / (took - first) if num_tokens > 1 else 0.0
    console.print(
        f"first token after {first * 1000:.0f} ms, then {rate:.1f} tokens per second "
        f"({num_tokens} tokens in {took:.1f} s)"
    )


def print_rows(metrics: Iterable["Sample"]) -> None:
    """Rows that each worker has computed, the probe of every expert included."""
    rows: dict[str, int] = {}
    for sample in metrics:
        if sample.name == "maestrale_expert_rows_total":
            worker = sample.labels["process"]
            rows[worker] = rows.get(worker, 0) + int(sample.value)
    for worker, count in sorted(rows.items()):
        console.print(f"{worker} computed {count:,} rows")

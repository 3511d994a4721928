"""What is measured. Part of every result's key: other numbers are other results."""

from dataclasses import dataclass
from pathlib import Path

PRECISIONS = ("bf16", "8 bit", "4 bit")
"""Of the experts at least; each engine says what else it quantises."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Sizes and lengths, tokens unless another unit is named."""

    checkpoint: Path
    sequences: tuple[int, ...] = (1, 8, 32)
    """Sequences that are decoded at a time."""
    prefill: tuple[int, ...] = (512, 2048)
    """Lengths of prompts that are computed, one at a time."""
    prompt_tokens: int = 4
    """Of every sequence that is decoded."""
    new_tokens: int = 8
    """Of every sequence that is decoded, after the first."""
    callers: int = 16
    """Streams over HTTP at a time."""
    requests: int = 16
    """Over HTTP, all callers together."""
    input_tokens: int = 32
    """Of a request over HTTP."""
    output_tokens: int = 16
    """Of a request over HTTP."""
    pass_tokens: int = 512
    """At most in one pass of an engine that can be told so: Maestrale's and llama.cpp's default."""
    threads: int = 2
    """Cores of the machine."""

    def cases(self, kind: str) -> set[tuple[str, int]]:
        """Phase and size of every row that an engine, or its server ("http"), is to give."""
        if kind == "http":
            return {("http", self.callers)}
        decode = {("decode", size) for size in self.sequences}
        return decode | {("prefill", size) for size in self.prefill}


@dataclass(frozen=True)
class Measured:
    """What one process, or one server, gave."""

    rows: "list[Row]"
    peak_bytes: int
    """Highest proportional set size of all its processes, files that they map included."""
    above_idle_bytes: int | None = None
    """What its processes hold on top of idle ones; None where the engine does not say."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One figure of one round."""

    phase: str
    """"decode", "prefill" or "http"."""
    size: int
    """Sequences, tokens or callers."""
    tokens_per_s: float
    """New tokens of all sequences, or tokens of the prompt."""
    ttft_s: float | None = None
    """Median time to the first token, over HTTP."""
    tpot_s: float | None = None
    """Median time per token after the first, over HTTP."""

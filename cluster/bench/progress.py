"""One line on standard error that is written over while a benchmark runs."""

import sys
import time
from types import TracebackType
from typing import Self

from cluster.bench.summary import Record

_SHOW_EVERY_S = 0.25


def overwrite(text: str) -> None:
    """A line that the next one covers, whoever prints it; nothing where nobody watches."""
    if sys.stderr.isatty():
        print(f"{text:<79}", end="\r", file=sys.stderr, flush=True)


class ProgressLine:
    """Counts records. Use by `with`; writes only where standard error is a terminal, but for the
    last state, which always stays."""

    def __init__(self, what: str, total: int | None) -> None:
        """total: records to come, if that is known."""
        self._what = what
        self._total = total
        self._num_records = 0
        self._num_failed = 0
        self._num_tokens = 0
        self._started = time.monotonic()
        self._shown = self._started

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        overwrite("")
        print(self, file=sys.stderr, flush=True)

    def __str__(self) -> str:
        seconds = time.monotonic() - self._started
        of_total = f"/{self._total}" if self._total else ""
        failed = f", {self._num_failed} failed" if self._num_failed else ""
        rate = self._num_tokens / seconds if seconds else 0.0
        return (
            f"{self._what}: {self._num_records}{of_total} requests{failed}, {seconds:.1f} s, "
            f"{rate:.1f} tokens out/s"
        )

    def add(self, record: Record) -> None:
        self._num_records += 1
        self._num_failed += record.error is not None
        self._num_tokens += record.output_tokens
        now = time.monotonic()
        if now - self._shown >= _SHOW_EVERY_S:
            self._shown = now
            overwrite(str(self))

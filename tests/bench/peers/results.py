"""Every finished measurement, one line of JSON each; a run that starts again skips them."""

import json
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tests.bench.peers.plan import Row


@dataclass(frozen=True)
class Task:
    """One process to run: an engine at a precision, or the machine's limits."""

    kind: str
    """"engine", "http" or "limits"."""
    engine: str = ""
    precision: str = ""

    def __str__(self) -> str:
        return " ".join(filter(None, (self.engine or "machine", self.precision, self.kind)))


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a task gave in one round."""

    task: Task
    round: int
    rows: list[Row]
    figures: list[dict[str, Any]]
    """Of the machine's limits."""
    peak_bytes: int
    above_idle_bytes: int | None
    busy_percent: float
    """CPU that others used just before."""
    version: str


class Results:
    """The results of one key: the same code, machine and plan."""

    def __init__(self, file: Path, key: dict[str, Any]) -> None:
        """Reads what the file has under this key; a line that was cut is not a result."""
        self._file = file
        # as it will be read back, so that tuples and lists compare
        self._key: dict[str, Any] = json.loads(json.dumps(key, default=str))
        self.all: list[Result] = []
        if file.exists():
            for line in file.read_text(encoding="utf-8").splitlines():
                try:
                    content = json.loads(line)
                except ValueError:
                    continue
                if content.pop("key") == self._key:
                    self.all.append(_result_of(content))

    def has(self, task: Task, round_number: int) -> bool:
        return any(result.task == task and result.round == round_number for result in self.all)

    def add(self, result: Result) -> None:
        """Keep it, on disk first."""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        line = json.dumps({"key": self._key, "at": now} | asdict(result))
        self._file.parent.mkdir(parents=True, exist_ok=True)
        # a line that an earlier run was stopped in must not swallow this one
        is_cut = self._file.exists() and not self._file.read_bytes().endswith(b"\n")
        with self._file.open("a", encoding="utf-8") as file:
            file.write(("\n" if is_cut else "") + line + "\n")
        self.all.append(result)


def _result_of(content: dict[str, Any]) -> Result:
    del content["at"]
    task, rows = Task(**content.pop("task")), [Row(**row) for row in content.pop("rows")]
    return Result(task=task, rows=rows, **content)

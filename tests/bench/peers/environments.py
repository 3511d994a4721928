"""Each peer in a virtual environment of its own, made once and kept."""

import json
import os
import re
import subprocess
import sys
import time
import venv
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.bench.make_checkpoint import CACHE
from tests.bench.peers.errors import PeerError

ENVIRONMENTS = CACHE / "envs"
MARKER = "installed.json"

PRINT_REQUIREMENTS = """
import importlib.metadata, sys
print(*importlib.metadata.requires(sys.argv[1]), sep="\\n")
"""


@dataclass(frozen=True)
class Environment:
    """What to install. Another recipe, another installation."""

    name: str
    packages: tuple[str, ...]
    trimmed: str | None = None
    """A package whose requirements are installed without those that begin with `without`."""
    without: tuple[str, ...] = ()

    @property
    def folder(self) -> Path:
        return ENVIRONMENTS / self.name

    @property
    def python(self) -> str:
        return str(self.folder / "bin" / "python")

    def ensure(self) -> None:
        """Install what is missing, with progress on screen. Raises PeerError."""
        recipe = json.dumps(asdict(self))
        marker = self.folder / MARKER
        if marker.exists() and marker.read_text(encoding="utf-8") == recipe:
            return
        if not (self.folder / "bin" / "python").exists():
            venv.create(self.folder, with_pip=True)
        # one by one, so that an earlier pin decides what a later package finds
        for package in self.packages:
            self.pip("install", package)
        if self.trimmed:
            self.pip("install", "--no-deps", self.trimmed)
            self.pip("install", *self.packages, *self._requirements())
        marker.write_text(recipe, encoding="utf-8")

    def pip(self, *arguments: str, environ: Mapping[str, str] | None = None) -> None:
        """Raises PeerError with the end of pip's output."""
        command = [self.python, "-m", "pip", *arguments, "--progress-bar", "off"]
        narrate(command, self.name, environ)

    def _requirements(self) -> list[str]:
        """What the trimmed package asks for, without what is left out."""
        name = re.split(r"[=<>]", self.trimmed or "")[0]
        command = [self.python, "-c", PRINT_REQUIREMENTS, name]
        lines = subprocess.check_output(command, text=True).splitlines()
        return [
            line for line in lines if "extra ==" not in line and not line.startswith(self.without)
        ]


def narrate(command: Sequence[str], name: str, environ: Mapping[str, str] | None = None) -> None:
    """Run a long command with its latest line on one line of the screen. Raises PeerError."""
    started = time.monotonic()
    lines: list[str] = []
    with subprocess.Popen(
        command,
        env=os.environ | dict(environ or {}),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                lines.append(line.rstrip())
                text = f"{name}: {time.monotonic() - started:4.0f} s  {lines[-1].strip()}"
                print(f"\r{text[:110]:<110}", end="", file=sys.stderr, flush=True)
        except BaseException:
            process.terminate()
            raise
    print(file=sys.stderr)
    if process.returncode:
        raise PeerError(f"{' '.join(command[:6])} ... failed: " + "\n".join(lines[-8:]))

"""Prometheus' text format, in which servers tell their metrics, to samples. No I/O.

Follows https://prometheus.io/docs/instrumenting/exposition_formats/.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Sample:
    """One number of one process, as it stood."""

    name: str
    """Says kind and unit: `..._total`, `..._seconds`, `..._bytes`."""
    labels: Mapping[str, str]
    """`process` says whose it is."""
    value: float


_SAMPLE = re.compile(
    r"(?P<name>[a-z_:][a-z0-9_:]*)(?:\s*\{(?P<labels>.*)\}\s*|\s+)(?P<value>\S+)(?:\s+-?[0-9]+)?",
    re.ASCII | re.IGNORECASE,
)
_LABEL = re.compile(
    r'\s*(?P<name>[a-z_][a-z0-9_]*)\s*=\s*"(?P<value>(?:[^"\\]|\\.)*)"\s*(?:,|$)',
    re.ASCII | re.IGNORECASE,
)
_ESCAPED = re.compile(r"\\(.)")


def read_exposition(text: str) -> list[Sample]:
    """All samples, in order. Raises ValueError naming the first line that is none."""
    lines = (line.strip() for line in text.split("\n"))
    return [_sample(line) for line in lines if line and not line.startswith("#")]


def _sample(line: str) -> Sample:
    found = _SAMPLE.fullmatch(line)
    if found is None:
        raise ValueError(f"{line[:200]!r} is no sample of a metric")
    try:
        return Sample(found["name"], _labels(found["labels"] or ""), float(found["value"]))
    except ValueError as error:
        raise ValueError(f"{line[:200]!r} is no sample of a metric: {error}") from error


def _labels(text: str) -> dict[str, str]:
    labels, place = {}, 0
    while place < len(text.rstrip()):
        found = _LABEL.match(text, place)
        if found is None:
            raise ValueError(f"no label at {text[place:]!r}")
        labels[found["name"]] = _ESCAPED.sub(_unescape, found["value"])
        place = found.end()
    return labels


def _unescape(found: re.Match[str]) -> str:
    return "\n" if found[1] == "n" else found[1]

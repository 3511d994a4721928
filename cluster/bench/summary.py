"""What was seen of each request, and the numbers of a whole run. Pure: no clock, no I/O."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from cluster.errors import ConfigurationError


@dataclass(frozen=True, kw_only=True)
class Record:
    """One request. Times are seconds of one clock."""

    intended_s: float
    """When it should have been sent. Everything counts from here: a load generator that a slow
    server holds up must not hide it (coordinated omission)."""
    sent_s: float
    chunks_s: tuple[float, ...]
    """When each piece of the answer came."""
    ended_s: float
    input_tokens: int | None
    """None: neither the server nor the prompt says."""
    output_tokens: int
    is_counted: bool = False
    """The server sent no usage: each chunk counts as a token."""
    error: str | None = None
    """Kind of failure, from a small set; None when all went well."""
    message: str = ""

    @property
    def ttft_s(self) -> float | None:
        """Time to first token."""
        return self.chunks_s[0] - self.intended_s if self.chunks_s else None

    @property
    def tpot_s(self) -> float | None:
        """Time per output token after the first."""
        if not self.chunks_s or self.output_tokens < 2:
            return None
        return (self.chunks_s[-1] - self.chunks_s[0]) / (self.output_tokens - 1)

    @property
    def gaps_s(self) -> list[float]:
        """Silences between chunks."""
        return [after - before for before, after in pairwise(self.chunks_s)]

    @property
    def e2e_s(self) -> float:
        """Until the answer's end."""
        return self.ended_s - self.intended_s


@dataclass(frozen=True)
class Distribution:
    """Some values in short."""

    mean: float
    p50: float
    p90: float
    p99: float
    max: float


def percentile(ascending: Sequence[float], percent: float) -> float:
    """The value below which `percent` of the sorted values lie, interpolated linearly."""
    position = (len(ascending) - 1) * percent / 100
    below = int(position)
    above = min(below + 1, len(ascending) - 1)
    share = position - below
    return ascending[below] * (1 - share) + ascending[above] * share


def distribution(values: Iterable[float]) -> Distribution | None:
    """None when there are no values."""
    ascending = sorted(values)
    if not ascending:
        return None
    return Distribution(
        mean=sum(ascending) / len(ascending),
        p50=percentile(ascending, 50),
        p90=percentile(ascending, 90),
        p99=percentile(ascending, 99),
        max=ascending[-1],
    )


@dataclass(frozen=True)
class Limits:
    """What a request must keep to be a good one; seconds, None: no limit."""

    ttft_s: float | None = None
    tpot_s: float | None = None
    e2e_s: float | None = None

    @classmethod
    def parse(cls, text: str) -> "Limits | None":
        """`ttft:500 tpot:50`, in milliseconds; None for an empty text.

        Raises ConfigurationError.
        """
        limits: dict[str, float] = {}
        for item in text.replace(",", " ").split():
            name, _, milliseconds = item.partition(":")
            try:
                limit_s = float(milliseconds) / 1000
            except ValueError:
                limit_s = 0.0
            if name not in ("ttft", "tpot", "e2e") or not limit_s > 0:
                raise ConfigurationError(
                    f"goodput limit {item!r}; write ttft:500, tpot:50 or e2e:10000 (milliseconds)"
                )
            limits[f"{name}_s"] = limit_s
        return cls(**limits) if limits else None

    def are_kept_by(self, record: Record) -> bool:
        """A measure that the request does not have, such as the second token's, breaks none."""
        if record.error is not None:
            return False
        pairs = (
            (record.ttft_s, self.ttft_s),
            (record.tpot_s, self.tpot_s),
            (record.e2e_s, self.e2e_s),
        )
        return all(
            measured is None or limit is None or measured <= limit for measured, limit in pairs
        )


MEASURES = {
    "ttft": "first token",
    "tpot": "per token after",
    "gap": "between chunks",
    "e2e": "whole answer",
}


@dataclass(frozen=True, kw_only=True)
class Summary:
    """The numbers of one run. Rates are per second of `duration_s`."""

    num_ok: int
    errors: Mapping[str, int]
    """Failed requests by kind."""
    duration_s: float
    """From the first request's intended time to the last answer's end."""
    requests_per_s: float
    """Of those that went well, as are tokens."""
    input_tokens_per_s: float
    output_tokens_per_s: float
    measures: Mapping[str, Distribution | None]
    """Seconds, by the names of MEASURES, over the requests that went well."""
    good_requests_per_s: float | None
    """Requests within the limits, if there are any."""
    good_share: float | None
    """Of all requests, failed ones included."""
    num_counted: int
    """Requests whose output tokens are their chunks."""
    num_without_input: int
    """Requests whose input tokens are unknown, and count as none."""
    max_late_s: float
    """The latest that a request was sent after its intended time: above a few milliseconds the
    load generator itself is what was measured."""

    @property
    def num_failed(self) -> int:
        return sum(self.errors.values())


def summarise(records: Sequence[Record], limits: Limits | None = None) -> Summary:
    """The numbers of a run of at least one request."""
    good = [record for record in records if record.error is None]
    duration_s = max(r.ended_s for r in records) - min(r.intended_s for r in records)
    seconds = max(duration_s, 1e-9)
    num_within = sum(limits.are_kept_by(record) for record in records) if limits else None
    return Summary(
        num_ok=len(good),
        errors=dict(Counter(r.error for r in records if r.error is not None).most_common()),
        duration_s=duration_s,
        requests_per_s=len(good) / seconds,
        input_tokens_per_s=sum(r.input_tokens or 0 for r in good) / seconds,
        output_tokens_per_s=sum(r.output_tokens for r in good) / seconds,
        measures={
            "ttft": distribution(r.ttft_s for r in good if r.ttft_s is not None),
            "tpot": distribution(r.tpot_s for r in good if r.tpot_s is not None),
            "gap": distribution(gap_s for r in good for gap_s in r.gaps_s),
            "e2e": distribution(r.e2e_s for r in good),
        },
        good_requests_per_s=None if num_within is None else num_within / seconds,
        good_share=None if num_within is None else num_within / len(records),
        num_counted=sum(r.is_counted for r in good),
        num_without_input=sum(r.input_tokens is None for r in good),
        max_late_s=max(r.sent_s - r.intended_s for r in records),
    )

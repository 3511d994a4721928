"""When a request is worth sending again, and how long to wait first.

Pure: the time and the chance are arguments. The rules are openai-python's.
"""

import math
from collections.abc import Mapping
from email.utils import parsedate_to_datetime

import httpx

MAX_RETRIES = 2
FIRST_WAIT_S = 0.5
MAX_WAIT_S = 8.0
MAX_ASKED_WAIT_S = 120.0
"""A server that asks for more is not waited for; the usual waits apply."""
JITTER = 0.25
"""Part of a wait that chance may take off, so that callers turned away together spread out."""

_RETRIED_STATUSES = frozenset({408, 409, 429})


def is_worth_it(outcome: httpx.Response | httpx.RequestError) -> bool:
    """Whether the same request may fare better later. The server's x-should-retry decides."""
    if isinstance(outcome, httpx.Response):
        told = outcome.headers.get("x-should-retry", "").strip().lower()
        if told in ("true", "false"):
            return bool(told == "true")
        status = outcome.status_code
        return status in _RETRIED_STATUSES or status >= 500
    return isinstance(
        outcome,
        httpx.TimeoutException | httpx.NetworkError | httpx.RemoteProtocolError | httpx.ProxyError,
    )


def wait_s(
    headers: Mapping[str, str] | None, num_retries: int, *, now_s: float, chance: float
) -> float:
    """Seconds before the next try.

    headers:     of the answer, if one came: what it asks for counts, up to two minutes.
    num_retries: those made before.
    now_s:       Unix time.
    chance:      in [0, 1).
    """
    asked_s = None if headers is None else _asked_wait_s(headers, now_s)
    if asked_s is not None and 0 < asked_s <= MAX_ASKED_WAIT_S:
        return asked_s
    # the exponent is bounded, for a float is, too
    longest_s = min(FIRST_WAIT_S * 2.0 ** min(num_retries, 100), MAX_WAIT_S)
    return longest_s * (1 - JITTER * chance)


def _asked_wait_s(headers: Mapping[str, str], now_s: float) -> float | None:
    """By retry-after-ms, or Retry-After in seconds or as a date. None if neither can be read."""
    milliseconds = _number(headers.get("retry-after-ms"))
    if milliseconds is not None:
        return milliseconds / 1000
    retry_after = headers.get("retry-after")
    seconds = _number(retry_after)
    if seconds is not None or retry_after is None:
        return seconds
    try:
        return parsedate_to_datetime(retry_after).timestamp() - now_s
    except (ValueError, OverflowError):
        return None


def _number(text: str | None) -> float | None:
    try:
        number = float(text) if text is not None else math.nan
    except ValueError:
        return None
    return number if math.isfinite(number) else None

"""Where to, with which key and how patiently: a client's settings, checked. Pure; no I/O.

For blocking and asynchronous clients alike.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import httpx

from cluster.client.retry import MAX_RETRIES
from cluster.errors import ConfigurationError

DEFAULT_BASE_URL = "http://127.0.0.1:8000"
DEFAULT_TIMEOUT_S = 600.0
"""As openai's; a long completion that is not streamed is one silent wait."""
MAX_CONNECT_S = 5.0
"""A server that is there accepts at once; a wrong address should not cost ten minutes."""

LIMITS = httpx.Limits(max_connections=None, max_keepalive_connections=20)
"""No bound on connections: the server bounds its load and says so with 429, while a full pool
would make calls wait without a word."""

Timeout = float | httpx.Timeout | None
"""Seconds without a byte from the server, or a bound for each phase, or None to wait as long as it
takes. Unless it is httpx's, a connection has 5 s at most to come about."""


@dataclass(frozen=True, slots=True)
class Settings:
    """A client's settings, checked."""

    root: str
    """Server's address with neither `/v1` nor trailing slash."""
    timeout: httpx.Timeout
    max_retries: int
    headers: dict[str, str] = field(repr=False)
    """Sent with every request; the key is in here."""


def settings(
    *,
    base_url: str | None,
    api_key: str | None,
    timeout: Timeout,
    max_retries: int = MAX_RETRIES,
    environ: Mapping[str, str],
) -> Settings:
    """Check what the caller gave and fill the gaps from the environment.

    Raises ConfigurationError naming the argument or variable at fault, never the key.
    """
    if base_url is not None:
        root = _root(base_url, "base_url")
    else:
        root = _root(environ.get("MAESTRALE_BASE_URL") or DEFAULT_BASE_URL, "MAESTRALE_BASE_URL")
    if api_key is not None:
        headers = _headers(api_key, "api_key")
    else:
        headers = _headers(environ.get("MAESTRALE_API_KEY", ""), "MAESTRALE_API_KEY")
    return Settings(
        root=root,
        timeout=checked_timeout(timeout),
        max_retries=_max_retries(max_retries),
        headers=headers,
    )


def changed(settings: Settings, **changes: Any) -> Settings:
    """The same settings but for those named as in `settings`. Raises as it does."""
    checks: dict[str, Callable[[Any], dict[str, Any]]] = {
        "base_url": lambda given: {"root": _root(given, "base_url")},
        "api_key": lambda given: {"headers": _headers(given, "api_key")},
        "timeout": lambda given: {"timeout": checked_timeout(given)},
        "max_retries": lambda given: {"max_retries": _max_retries(given)},
    }
    for name, given in changes.items():
        settings = replace(settings, **checks[name](given))
    return settings


def checked_timeout(timeout: Timeout) -> httpx.Timeout:
    """As httpx's. Raises ConfigurationError."""
    if isinstance(timeout, httpx.Timeout):
        return timeout
    if timeout is None:
        return httpx.Timeout(None, connect=MAX_CONNECT_S)
    if not (timeout > 0 and math.isfinite(timeout)):
        raise ConfigurationError(f"timeout is {timeout}; give seconds above 0, or None for no end")
    return httpx.Timeout(timeout, connect=min(timeout, MAX_CONNECT_S))


def _max_retries(max_retries: int) -> int:
    if max_retries < 0:
        raise ConfigurationError(f"max_retries is {max_retries}; give 0 for none, or more")
    return max_retries


def _root(base_url: str, source: str) -> str:
    wanted = f"write it as {DEFAULT_BASE_URL}, with or without /v1"
    try:
        url = httpx.URL(base_url)
    except httpx.InvalidURL as error:
        raise ConfigurationError(f"{source} is not a URL ({error}); {wanted}") from error
    # Never quoted: a URL with user and password may land in a log.
    if url.userinfo:
        raise ConfigurationError(f"{source} holds a user or password; use api_key, and {wanted}")
    if url.scheme not in ("http", "https") or not url.host or url.query or url.fragment:
        raise ConfigurationError(f"{source} is {base_url!r}; {wanted}")
    return str(url).rstrip("/").removesuffix("/v1").rstrip("/")


def _headers(api_key: str, source: str) -> dict[str, str]:
    if not api_key:
        return {}
    # Checked here because the HTTP library quotes a header that it refuses, key and all.
    if not all("!" <= char <= "~" for char in api_key):
        raise ConfigurationError(
            f"{source} holds a blank, a line end or a character outside ASCII; "
            "a key is visible ASCII characters only"
        )
    return {"Authorization": f"Bearer {api_key}"}

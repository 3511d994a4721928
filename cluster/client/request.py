"""What goes out: where to, with which headers and which body. Pure; no I/O, no environment.

For blocking and asynchronous clients alike.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
from pydantic import BaseModel, TypeAdapter

from cluster.errors import ConfigurationError

DEFAULT_BASE_URL = "http://127.0.0.1:8000"
DEFAULT_TIMEOUT_S = 600.0
"""As openai's; a long completion that is not streamed is one silent wait."""
MAX_CONNECT_S = 5.0
"""A server that is there accepts at once; a wrong address should not cost ten minutes."""

LIMITS = httpx.Limits(max_connections=None, max_keepalive_connections=20)
"""No bound on connections: the server bounds its load and says so with 429, while a full pool
would make calls wait without a word."""

Prompt = str | Sequence[int] | Sequence[str] | Sequence[Sequence[int]]
"""Text or token ids; one prompt or several."""
Message = Mapping[str, Any] | BaseModel
"""A turn as a dict, or the message of an earlier reply as it came."""

_JSON: TypeAdapter[Any] = TypeAdapter(Any)


@dataclass(frozen=True, slots=True)
class Settings:
    """A client's settings, checked."""

    root: str
    """Server's address with neither `/v1` nor trailing slash."""
    timeout: httpx.Timeout
    headers: dict[str, str] = field(repr=False)
    """Sent with every request; the key is in here."""


def settings(
    *, base_url: str | None, api_key: str | None, timeout: float, environ: Mapping[str, str]
) -> Settings:
    """Check what the caller gave and fill the gaps from the environment.

    Raises ConfigurationError naming the argument or variable at fault, never the key.
    """
    if not (timeout > 0 and math.isfinite(timeout)):
        raise ConfigurationError(f"timeout is {timeout}; give a number of seconds above 0")
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
        timeout=httpx.Timeout(timeout, connect=min(timeout, MAX_CONNECT_S)),
        headers=headers,
    )


def request_body(extra: Mapping[str, Any], **named: Any) -> bytes:
    """JSON of the parameters that were given: named ones unless None, extra ones as they are."""
    body = {name: value for name, value in named.items() if value is not None}
    return _JSON.dump_json({**body, **extra})


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

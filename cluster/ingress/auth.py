"""Who may use the API: keys, and over HTTP pages of which other sites, as ASGI middleware.

Keys are known here by their digests only, and stand in no log.
"""

import asyncio
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from hmac import compare_digest
from pathlib import Path
from typing import NoReturn

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from cluster.errors import ConfigurationError, RequestError
from cluster.ingress.errors import error_response
from cluster.network import is_loopback
from cluster.schema import RESUMED_TOKENS

logger = logging.getLogger(__name__)

KEYS_VARIABLE = "MAESTRALE_API_KEYS"
OPEN_PATHS = ("/health", "/ready")
"""For probes, which have no key and learn no secret."""

READ_EVERY_S = 5.0
"""How soon a changed file of keys holds."""

_KEY = re.compile(r"[A-Za-z0-9._~+/=-]+")  # what a bearer token may consist of (RFC 6750)
_ADMIN = "admin"


@dataclass(frozen=True)
class ApiKey:
    """A key as its operator gives it out."""

    text: str = field(repr=False)
    is_admin: bool = False
    """Whether it may also be used to change the cluster."""


def read_api_keys(file: Path | None, environ: Mapping[str, str]) -> list[ApiKey]:
    """The keys of a file (one a line, `#` begins a comment), or of MAESTRALE_API_KEYS (commas).

    The word `admin` behind a key marks one that may also change the cluster.
    Both together where both are given. Raises ConfigurationError, which shows no key, for a file
    that cannot be read or holds none, and for what cannot be a key.
    """
    keys = []
    for entry in environ.get(KEYS_VARIABLE, "").split(","):
        if not entry.strip():
            continue
        key = _key_of(entry)
        if key is None:
            raise ConfigurationError(f"{KEYS_VARIABLE} holds something that is no key")
        keys.append(key)
    if file is None:
        return keys
    try:
        lines = file.expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"cannot read the API keys in {file}: {error}") from error
    in_file = []
    for number, line in enumerate(lines, start=1):
        entry = line.partition("#")[0]
        if not entry.strip():
            continue
        key = _key_of(entry)
        if key is None:
            raise ConfigurationError(
                f"line {number} of {file} is no key: letters, digits and . _ ~ + / = - only, "
                f"and then perhaps the word {_ADMIN}"
            )
        in_file.append(key)
    if not in_file:
        raise ConfigurationError(f"{file} holds no API key")
    return keys + in_file


def _key_of(entry: str) -> ApiKey | None:
    """What a line gives, or None if that is no key."""
    key, *marks = entry.split()
    if not _KEY.fullmatch(key) or marks not in ([], [_ADMIN]):
        return None
    return ApiKey(key, is_admin=bool(marks))


@dataclass
class Access:
    """Who may use the API. Owned by the event loop."""

    digests: tuple[bytes, ...] = field(default=(), repr=False)
    """Of the keys; none: no key is needed."""
    admin_digests: tuple[bytes, ...] = field(default=(), repr=False)
    """Of those that may change the cluster."""
    allow_open: bool = True
    """Without keys, answer also those who come from a network."""
    allowed_origins: tuple[str, ...] = ()
    """Sites whose pages may call from a browser; `*` is all."""

    @classmethod
    def with_keys(
        cls, keys: list[ApiKey], *, allow_open: bool, allowed_origins: tuple[str, ...]
    ) -> "Access":
        """Only these keys, or anybody where there is none."""
        access = cls(allow_open=allow_open, allowed_origins=allowed_origins)
        access.admit_only(keys)
        return access

    def admit_only(self, keys: list[ApiKey]) -> bool:
        """Take these keys from now on, and no others; says whether that changes anything."""
        before = self.digests, self.admin_digests
        self.digests = tuple(_digest(key.text) for key in keys)
        self.admin_digests = tuple(_digest(key.text) for key in keys if key.is_admin)
        return (self.digests, self.admin_digests) != before

    async def follow(self, file: Path, environ: Mapping[str, str]) -> NoReturn:
        """Take whatever keys the file holds, until cancelled. While it cannot be read, or holds
        what is no key, or none, the keys stay as they are.
        """
        told = ""
        while True:
            await asyncio.sleep(READ_EVERY_S)
            try:
                keys = await asyncio.to_thread(read_api_keys, file, environ)
            except ConfigurationError as error:
                if str(error) != told:
                    logger.error("the API keys stay as they were: %s", error)
                told = str(error)
                continue
            told = ""
            if self.admit_only(keys):
                logger.info("%s has changed: it holds %d API keys now", file, len(keys))

    def refusal(self, key: str | None, is_local: bool) -> RequestError | None:
        """Why a caller with this key may not use it, or None.

        is_local: whether the request came in where only this machine can reach us.
        """
        if not self.digests:
            if self.allow_open or is_local:
                return None
            return RequestError(
                403,
                "this server has no API keys and therefore answers on loopback only: its operator "
                f"must set api_keys_file, {KEYS_VARIABLE} or allow_open_http",
                kind="permission_error",
            )
        if key is not None and _is_among(key, self.digests):
            return None
        return RequestError(
            401,
            "no API key was given: send it as a bearer token in the Authorization header"
            if key is None
            else "the API key is not one of this server's",
            kind="authentication_error",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )

    def admin_refusal(self, key: str | None, is_local: bool) -> RequestError | None:
        """Why a caller with this key, who may use the API, may not change the cluster, or None.

        `allow_open` opens the model to a network, not the cluster. is_local: as for `refusal`.
        """
        if is_local and not self.digests:
            return None
        if key is not None and _is_among(key, self.admin_digests):
            return None
        return RequestError(
            403,
            "this changes the cluster and needs an API key that its operator has marked as "
            f"{_ADMIN}; a server without keys answers it on loopback only",
            kind="permission_error",
        )

    def tell_browsers(self, app: ASGIApp) -> ASGIApp:
        """The app, with each of its answers marked as one that pages of allowed sites may read,
        whatever it tells; preflights are answered here.
        """
        if not self.allowed_origins:
            return app
        return CORSMiddleware(
            app,
            allow_origins=self.allowed_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],  # SDKs send many of their own
            expose_headers=["X-Request-Id", "Retry-After", RESUMED_TOKENS],
        )


ANYBODY = Access()
"""Everybody who can connect."""


class KeyCheck:
    """ASGI middleware that lets requests with a key pass: a bearer token, or `x-api-key`.

    What passes by `x-api-key` goes on as if it were a bearer token, so that whatever tells callers
    apart by their keys need not know both.
    """

    def __init__(self, app: ASGIApp, *, access: Access) -> None:
        self._app = app
        self._access = access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            key = key_in(Headers(scope=scope))
            refusal = (
                None if _is_open(scope) else self._access.refusal(key, came_by_loopback(scope))
            )
            if refusal is not None:
                await error_response(refusal, scope["path"])(scope, receive, send)
                return
            if key is not None:
                MutableHeaders(scope=scope)["Authorization"] = f"Bearer {key}"
        await self._app(scope, receive, send)


def key_in(headers: Mapping[str, str]) -> str | None:
    """The key that a request shows; the bearer token goes before `x-api-key`.

    headers: by names in lower case.
    """
    scheme, _, token = headers.get("authorization", "").strip().partition(" ")
    if scheme.lower() == "bearer" and token.strip():
        return token.strip()
    return headers.get("x-api-key") or None


def _is_open(scope: Scope) -> bool:
    path = scope["path"].removeprefix(scope.get("root_path", ""))
    return path.rstrip("/") in OPEN_PATHS


def came_by_loopback(scope: Scope) -> bool:
    """Whether the request came in at a loopback address of ours."""
    host = (scope.get("server") or ("",))[0]
    try:
        return is_loopback(host)
    except ValueError:
        return False


def _is_among(key: str, digests: tuple[bytes, ...]) -> bool:
    """Whether a key has one of the digests, in a time that does not tell how near it came."""
    given = _digest(key)
    is_among = False
    for digest in digests:
        is_among |= compare_digest(given, digest)
    return is_among


def _digest(key: str) -> bytes:
    return sha256(key.encode("utf-8", errors="surrogatepass")).digest()

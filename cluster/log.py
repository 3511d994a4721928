"""Logging of the processes we start ourselves (Ray and Serve set up their own); lines about
requests; rare warnings.
"""

import logging
import re
import threading
import time
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


def set_up(*, verbose: bool) -> None:
    """Warnings and worse to standard error; with `verbose`, our own progress too."""
    logging.basicConfig(format=FORMAT, level=logging.WARNING)
    if verbose:
        for package in ("cluster", "model"):
            logging.getLogger(package).setLevel(logging.INFO)


_request_id: ContextVar[str] = ContextVar("request_id", default="")
_MAX_ID_CHARS = 128
_INSANE = re.compile(r"[^A-Za-z0-9._-]")


@contextmanager
def about_request(request_id: str) -> Iterator[None]:
    """Within, also in tasks that begin there, lines of RequestLoggers name this request.

    request_id: may be anything that a caller thought of.
    """
    token = _request_id.set(_INSANE.sub("?", request_id[:_MAX_ID_CHARS]))
    try:
        yield
    finally:
        _request_id.reset(token)


class RequestLogger(logging.LoggerAdapter[logging.Logger]):
    """Writes lines about a request, with its X-Request-Id in front where it is known."""

    def process(
        self, msg: Any, kwargs: MutableMapping[str, Any]
    ) -> tuple[Any, MutableMapping[str, Any]]:
        request_id = _request_id.get()
        return (f"request {request_id}: {msg}" if request_id else msg), kwargs


class RareWarnings:
    """Warnings that a peer can provoke at will: at most one of a kind every ten seconds.

    Thread-safe. Kinds must come from a small fixed set.
    """

    EVERY_S = 10.0
    MAX_CHARS = 1_000
    """Of a message; it may quote what the peer sent."""

    def __init__(
        self, logger: logging.Logger, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._logger = logger
        self._clock = clock
        self._lock = threading.Lock()
        self._last: dict[str, tuple[float, int]] = {}
        """Of each kind when it was last logged, and how many have gone unsaid since."""

    def warn(self, kind: str, message: str) -> None:
        """Log the message, with how many of its kind have gone unsaid, or count it."""
        now = self._clock()
        with self._lock:
            logged_at, num_unsaid = self._last.get(kind, (now - self.EVERY_S, 0))
            is_due = now - logged_at >= self.EVERY_S
            self._last[kind] = (now, 0) if is_due else (logged_at, num_unsaid + 1)
        if is_due:
            more = f" (and {num_unsaid} more since the last such line)" if num_unsaid else ""
            self._logger.warning("%s%s", message[: self.MAX_CHARS], more)

"""Imports httpx without its own command line, before anything else here imports it.

httpx imports that, with rich and pygments, wherever these are installed, as they are with ours: a
quarter of the time that importing the SDK takes (tests/bench/RESULTS.md). `httpx.main` then says
that it cannot run, as it does where they are not installed.
"""

import sys

_COMMAND_LINE = "httpx._main"

if "httpx" not in sys.modules:
    sys.modules[_COMMAND_LINE] = None  # type: ignore[assignment]  # Python's word for "not to be had"
    try:
        import httpx  # noqa: F401
    finally:
        del sys.modules[_COMMAND_LINE]

"""Calls of tools in an answer's text, as they come. No tokens, no HTTP.

A model of Mistral's writes a marker, then a JSON list:

    [TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Nice"}}, ...]

Calls in that form are told while they are written. What is written otherwise, or behind them, is
told at the end: as calls where it can be read as such, else as the text that it is.
"""

import json
import re
import secrets
import string
from dataclasses import dataclass, replace
from typing import Any, Literal

from model.chat import CALLS_MARKER
from model.stop import overlap

_ALPHABET = string.ascii_letters + string.digits
_HEAD = re.compile(r'\s*{\s*"name"\s*:\s*"([^"\\]*)"\s*,\s*"arguments"\s*:\s*(?={)')
_FIRST_HEAD = re.compile(r"\s*\[" + _HEAD.pattern)
_TAIL = re.compile(r'\s*(?:,\s*"id"\s*:\s*"[^"\\]*"\s*)?}\s*([,\]])')

_BRACKETS = " \t\r\n{}[],"
"""What is left of a list of calls that is told, or was cut off between them."""

_State = Literal["content", "head", "arguments", "tail", "behind", "dropped"]
"""Where a reader is: before the marker; before a call's arguments; in them; behind them; behind the
list of calls; in calls that are not wanted."""


def new_call_id() -> str:
    """An id in the only form that Mistral's templates take: nine letters or digits."""
    return "".join(secrets.choice(_ALPHABET) for _ in range(9))


@dataclass(frozen=True)
class CallRules:
    """How calls are found in a request's answers."""

    names: frozenset[str]
    """Functions that may be called; a call of another is text."""
    marker_id: int | None = None
    """Of the token that means CALLS_MARKER; None where it is text."""
    begins_with_calls: bool = False
    """Whether the prompt ends with the marker already."""
    only_one: bool = False
    """Whether calls after the first are dropped."""


@dataclass(frozen=True)
class CallDelta:
    """What is new of a call.

    index: of the call, in its answer. id and name: with the call's first delta, and only there.
    """

    index: int
    id: str | None = None
    name: str | None = None
    arguments: str = ""


class CallReader:
    """Parts one answer's text into content and calls. Owned by one stream."""

    def __init__(self, rules: CallRules) -> None:
        self._rules = rules
        self._marker = "" if rules.begins_with_calls else CALLS_MARKER
        self._state: _State = "head" if rules.begins_with_calls else "content"
        self._held = ""  # text that is neither content nor part of a call yet
        self._depth = 0  # brackets of the arguments that are open
        self._is_in_string = False
        self._is_escaped = False
        self.num_calls = 0

    def push(self, text: str) -> tuple[str, list[CallDelta]]:
        """Content and calls that became certain with this text."""
        self._held += text
        content = ""
        calls: list[CallDelta] = []
        before: _State | None = None
        while self._held and self._state != before:
            before = self._state
            match before:
                case "content":
                    content += self._read_content()
                case "head" if self._is_prose():
                    content += self._marker
                    self._state = "content"
                case "head":
                    calls += self._read_head()
                case "arguments":
                    calls += self._read_arguments()
                case "tail":
                    self._read_tail()
                case "behind":
                    pass
                case "dropped":
                    self._take(len(self._held))
        return content, calls

    def flush(self) -> tuple[str, list[CallDelta]]:
        """What was held back, when no text follows any more."""
        held = self._take(len(self._held))
        if self._state == "content":
            return held, []
        if not self.num_calls:
            calls = self._read_otherwise(held) or None
            text = self._marker + held
        else:
            calls = self._read_rest(held)
            text = held if held.strip(_BRACKETS) else ""
        if calls is None:
            return text, []
        self.num_calls += len(calls)
        return "", calls

    def _take(self, num_characters: int) -> str:
        taken, self._held = self._held[:num_characters], self._held[num_characters:]
        return taken

    def _read_content(self) -> str:
        """Text before the marker, of which no part gets out."""
        at = self._held.find(CALLS_MARKER)
        if at < 0:
            return self._take(len(self._held) - overlap(self._held, CALLS_MARKER))
        content = self._take(at)
        self._take(len(CALLS_MARKER))
        self._marker, self._state = CALLS_MARKER, "head"
        return content

    def _is_prose(self) -> bool:
        """Whether what follows the marker cannot be a call."""
        return not self.num_calls and self._held.lstrip()[:1] not in ("", "[", "{")

    def _read_head(self) -> list[CallDelta]:
        """The next call up to its arguments, where it is there."""
        found = (_HEAD if self.num_calls else _FIRST_HEAD).match(self._held)
        if found is None or found[1] not in self._rules.names:
            return []
        self._take(found.end())
        self._state = "arguments"
        self.num_calls += 1
        return [CallDelta(self.num_calls - 1, id=new_call_id(), name=found[1])]

    def _read_arguments(self) -> list[CallDelta]:
        """What there is of a call's arguments, up to the bracket that closes them."""
        end = len(self._held)
        for at, character in enumerate(self._held):
            if self._is_in_string:
                is_quote = character == '"' and not self._is_escaped
                self._is_escaped = character == "\\" and not self._is_escaped
                self._is_in_string = not is_quote
                continue
            self._is_in_string = character == '"'
            self._depth += (character in "{[") - (character in "}]")
            if not self._depth:
                end, self._state = at + 1, "tail"
                break
        return [CallDelta(self.num_calls - 1, arguments=self._take(end))]

    def _read_tail(self) -> None:
        """What closes a call."""
        found = _TAIL.match(self._held)
        if found is not None:
            self._take(found.end())
            if found[1] == "]":
                self._state = "behind"
            else:
                self._state = "dropped" if self._rules.only_one else "head"

    def _read_otherwise(self, text: str) -> list[CallDelta] | None:
        """Calls in another form of JSON than the usual one; None if one of them is none."""
        try:
            given = json.loads(text)
        except (ValueError, RecursionError):
            return None
        return self._calls(given if isinstance(given, list) else [given])

    def _read_rest(self, text: str) -> list[CallDelta] | None:
        """The same of what follows a call that has been told."""
        begun = {"tail": '[{"": 0', "head": "[0,"}.get(self._state)
        try:
            given = json.loads(begun + text) if begun else None
        except (ValueError, RecursionError):
            return None
        return None if given is None else self._calls(given[1:])

    def _calls(self, given: list[Any]) -> list[CallDelta] | None:
        """Those that are wanted beside the calls told already; None if one of them is none."""
        calls = [self._call(each) for each in given]
        if not all(calls):
            return None
        kept = calls[: 1 - self.num_calls] if self._rules.only_one else calls
        return [replace(call, index=n) for n, call in enumerate(kept, self.num_calls) if call]

    def _call(self, given: Any) -> CallDelta | None:
        """A whole call of what was read, or None if it is none."""
        if not isinstance(given, dict):
            return None
        name = given.get("name")
        if not isinstance(name, str) or name not in self._rules.names:  # a list has no hash
            return None
        arguments = given.get("arguments", {})
        if not isinstance(arguments, dict):
            return None
        text = json.dumps(arguments, ensure_ascii=False)
        text = text.encode(errors="backslashreplace").decode()  # half a pair stays an escape
        return CallDelta(0, id=new_call_id(), name=name, arguments=text)

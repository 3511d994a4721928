"""What form an answer must have: plain data, its limits, and the text that the engine compiles.

The engine (llguidance) reads a dialect of Lark; every kind of request becomes such a text here.
Its own limits bound the work of most hostile texts. The checks here bound the rest: what they
refuse was measured to take seconds, or to overflow the stack.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from itertools import chain
from typing import Any, Literal, get_args

from model.errors import GrammarError

GrammarKind = Literal["json_object", "json_schema", "regex", "choice", "grammar", "tool_calls"]

MAX_TEXT_BYTES: dict[str, int] = {
    "json_object": 0,
    "json_schema": 65_536,
    "regex": 8_192,
    "choice": 65_536,
    "grammar": 16_384,
    "tool_calls": 65_536,
}
"""UTF-8 bytes of a spec's text, by kind."""
MAX_SCHEMA_DEPTH = 64
"""Nested objects and lists of a schema."""
MAX_SCHEMA_PROPERTIES = 500
"""Different property names of a schema; compiling one object takes their number squared."""
MAX_MULTIPLE = 10_000
"""Least common multiple of a schema's multipleOf: an automaton has that many states."""
MAX_EBNF_RULES = 500

_OPTIONS = '%llguidance {"no_forcing": true}'
"""The model, not the engine, decides how allowed text is cut into tokens."""
_WHITESPACE = r"[ \t\n]{1,32}"
"""Between JSON's tokens, at most once. Bounded, so that a model cannot pad an answer for ever."""
_JSON_KEYWORD = re.compile(r"%json[ \t\r\n]*")
"""What a schema within a grammar follows."""


@dataclass(frozen=True)
class GrammarSpec:
    """The form that an answer must have. Hashable, so that compiled grammars can be cached.

    kind and text:
        json_object   any JSON object; text is empty
        json_schema   JSON that fits the schema in text
        regex         text that a regular expression matches as a whole: Rust's syntax, where `\\d`
                      and `\\w` are ASCII's; no look-around, no back-references
        choice        one of the strings of a JSON list
        grammar       text of a grammar: Lark in llguidance's dialect, beginning with rule `start`,
                      or EBNF (GBNF: `root ::= ...`)
    continues_text:   the answer goes on in the prompt's text, so that a space before its first
                      word belongs to it; otherwise that space is dropped, as StreamDecoder does.

    Raises GrammarError where text is longer than MAX_TEXT_BYTES or is not valid Unicode.
    """

    kind: GrammarKind
    text: str = ""
    continues_text: bool = False

    def __post_init__(self) -> None:
        if self.kind not in get_args(GrammarKind):
            raise GrammarError(f"{self.kind!r} is no kind of grammar: {get_args(GrammarKind)}")
        try:
            num_bytes = len(self.text.encode())
        except UnicodeEncodeError as error:
            raise GrammarError(f"it is not valid Unicode at character {error.start}") from error
        if num_bytes > MAX_TEXT_BYTES[self.kind]:
            raise GrammarError(
                f"it has {num_bytes} bytes; at most {MAX_TEXT_BYTES[self.kind]} are allowed"
            )

    @classmethod
    def one_of(cls, choices: Sequence[str], *, continues_text: bool = False) -> "GrammarSpec":
        """A spec of kind choice."""
        return cls("choice", json.dumps(list(choices)), continues_text)

    @classmethod
    def for_calls(
        cls, functions: Sequence[tuple[str, Mapping[str, Any]]], *, only_one: bool
    ) -> "GrammarSpec":
        """A spec of kind tool_calls: a JSON list of calls, at least one, after CALLS_MARKER.

        functions: that may be called: the name, and the schema that the arguments must fit.
        """
        text = json.dumps({"functions": list(functions), "only_one": only_one}, ensure_ascii=False)
        return cls("tool_calls", text)


def engine_text(spec: GrammarSpec) -> str:
    """The Lark text for `spec`. Raises GrammarError; imports the engine's library."""
    match spec.kind:
        case "json_object":
            return _json_rule({"type": "object"})
        case "json_schema":
            return _json_rule(_checked_schema(spec.text))
        case "regex":
            return _regex_rule(spec.text)
        case "choice":
            return _choice_rule(spec.text)
        case "grammar":
            return f"{_checked_grammar(spec.text)}\n{_OPTIONS}\n"
        case "tool_calls":
            return _calls_rules(spec.text)


def _json_rule(schema: dict[str, Any]) -> str:
    return f"start: {_json_atom(schema)}\n{_OPTIONS}\n"


def _json_atom(schema: dict[str, Any]) -> str:
    options = {"whitespace_pattern": _WHITESPACE}  # takes the place of the caller's, if any
    return f"%json {json.dumps(schema | {'x-guidance': options})}"


def _calls_rules(text: str) -> str:
    """A rule per function, so that references within a schema stay within it."""
    wanted = _parse_json(text)
    rules, names = [], []
    for index, (name, schema) in enumerate(wanted["functions"]):
        opening = json.dumps(f'{{"name": {json.dumps(name)}, "arguments": ')
        try:
            arguments = _json_atom(_checked_schema(json.dumps(schema, ensure_ascii=False)))
        except GrammarError as error:
            raise GrammarError(f"parameters of {name}: {error}") from error
        rules.append(f'call_{index}: {opening} arguments_{index} "}}"')
        rules.append(f"arguments_{index}: {arguments}")
        names.append(f"call_{index}")
    more = "" if wanted["only_one"] else '(", " call)*'
    heads = [f'start: "[" call {more} "]"', f"call: {' | '.join(names)}"]
    return "\n".join([*heads, *rules, _OPTIONS, ""])


def _regex_rule(regex: str) -> str:
    from llguidance import regex_to_lark

    if (len(regex) - len(regex.rstrip("\\"))) % 2:
        raise GrammarError("it ends in a lone backslash")
    return f"start: /{regex_to_lark(regex, 'dw')}/\n{_OPTIONS}\n"


def _choice_rule(text: str) -> str:
    choices = _parse_json(text)
    if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
        raise GrammarError("choices must be a list of strings")
    if not choices:
        raise GrammarError("there is no choice")
    # in capitals it is one terminal, which compiles six times faster than a rule of alternatives
    return f"start: CHOICE\nCHOICE: {' | '.join(map(json.dumps, choices))}\n{_OPTIONS}\n"


def _checked_grammar(text: str) -> str:
    if "<[" in text:
        raise GrammarError('"<[" names token ids, which is not allowed; for text write "<" "["')
    _check_inline_schemas(text)
    if not re.search(r"^\s*[\w-]+\s*::=", text, re.MULTILINE):
        return text
    if text.count("::=") > MAX_EBNF_RULES:
        raise GrammarError(f"it has more than {MAX_EBNF_RULES} rules")
    from llguidance.gbnf_to_lark import gbnf_to_lark

    try:
        return gbnf_to_lark(text)
    except Exception as error:  # the library raises nothing narrower
        raise GrammarError(f"it is not EBNF: {error}") from error


def _check_inline_schemas(text: str) -> None:
    """Hold every `%json {...}` of a grammar to the limits of a schema. Raises GrammarError."""
    end = 0
    while keyword := _JSON_KEYWORD.search(text, end):
        try:
            schema, end = json.JSONDecoder().raw_decode(text, keyword.end())
        except (ValueError, RecursionError) as error:
            raise GrammarError(
                '"%json" must be followed by a schema in JSON; for text write "%" "json"'
            ) from error
        _within_limits(schema)


def _parse_json(text: str) -> Any:
    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    try:
        return json.loads(text, parse_constant=refuse)
    except RecursionError as error:
        raise GrammarError("it is nested too deeply") from error
    except ValueError as error:
        raise GrammarError(f"it is not JSON: {error}") from error


def _checked_schema(text: str) -> dict[str, Any]:
    return _within_limits(_parse_json(text))


def _within_limits(schema: Any) -> dict[str, Any]:
    if not isinstance(schema, dict):
        raise GrammarError("a schema must be a JSON object")
    names: set[str] = set()
    multiple = 1
    for node in _objects(schema):
        properties, required = node.get("properties"), node.get("required")
        names.update(properties if isinstance(properties, dict) else ())
        if isinstance(required, list):
            names.update(name for name in required if isinstance(name, str))
        divisor = node.get("multipleOf")
        if isinstance(divisor, int | float) and not isinstance(divisor, bool):
            multiple = math.lcm(multiple, _digits(divisor))
    if len(names) > MAX_SCHEMA_PROPERTIES:
        raise GrammarError(
            f"it has {len(names)} different property names; at most {MAX_SCHEMA_PROPERTIES} are "
            "allowed"
        )
    if multiple > MAX_MULTIPLE:
        raise GrammarError(
            f"the least common multiple of all multipleOf is above {MAX_MULTIPLE}: too big"
        )
    return schema


def _objects(schema: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Every object in a schema. Raises GrammarError below MAX_SCHEMA_DEPTH."""
    level: list[Any] = [schema]
    for _ in range(MAX_SCHEMA_DEPTH):
        yield from (node for node in level if isinstance(node, dict))
        children = (node.values() if isinstance(node, dict) else node for node in level)
        level = [node for node in chain.from_iterable(children) if isinstance(node, dict | list)]
        if not level:
            return
    raise GrammarError(f"it is nested more than {MAX_SCHEMA_DEPTH} deep")


def _digits(number: float) -> int:
    """The significant digits of a number as an integer: 25 for 0.25 and for 2500."""
    digits = "".join(map(str, Decimal(repr(number)).as_tuple().digits)).rstrip("0")
    return int(digits or 1)

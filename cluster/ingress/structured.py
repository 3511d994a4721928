"""The form of an answer that a request asks for, from OpenAI's and vLLM's fields to a GrammarSpec.

Knows schema and specs; compiles nothing.
"""

import json
from typing import Any

from cluster.errors import RequestError
from cluster.schema import GenerationRequest, ResponseFormat, StructuredOutputs
from model.errors import GrammarError
from model.grammar_spec import GrammarKind, GrammarSpec

_KIND_OF: dict[str, GrammarKind] = {
    "json": "json_schema",
    "regex": "regex",
    "choice": "choice",
    "grammar": "grammar",
    "json_object": "json_object",
}
"""By vLLM's name."""


def grammar_spec(
    response_format: ResponseFormat | None,
    structured_outputs: StructuredOutputs | None,
    *,
    continues_text: bool,
) -> GrammarSpec | None:
    """The form that a request asks for, or None where any text will do.

    continues_text: see GrammarSpec; true for completions, false for chat.
    Raises RequestError (400) that names the field.
    """
    asked = [*_of_response_format(response_format), *_of_structured_outputs(structured_outputs)]
    if not asked:
        return None
    if len(asked) > 1:
        raise _refused("structured_outputs", "response_format asks for a form, too; give only one")
    field, kind, value = asked[0]
    try:
        return GrammarSpec(kind, _text(kind, value), continues_text)
    except GrammarError as error:
        raise _refused(field, str(error)) from error
    except RecursionError as error:
        raise _refused(field, "it is nested too deeply") from error


def form_field(body: GenerationRequest) -> str | None:
    """The field by which a request asks for a form, if it does."""
    asked = [
        *_of_response_format(body.response_format),
        *_of_structured_outputs(body.structured_outputs),
    ]
    return asked[0][0] if asked else None


def _of_response_format(wanted: ResponseFormat | None) -> list[tuple[str, GrammarKind, Any]]:
    """Field, kind and value; empty where nothing is asked for."""
    if wanted is None or wanted.type == "text":
        return []
    schema = wanted.json_schema.json_schema if wanted.json_schema else wanted.value
    kind: GrammarKind = "json_object" if schema is None else "json_schema"
    return [("response_format", kind, schema)]


def _of_structured_outputs(wanted: StructuredOutputs | None) -> list[tuple[str, GrammarKind, Any]]:
    """Field, kind and value; empty where nothing is asked for."""
    asked = wanted.wanted if wanted else {}
    return [("structured_outputs", _KIND_OF[name], value) for name, value in asked.items()]


def _text(kind: GrammarKind, value: Any) -> str:
    """The spec's text. vLLM takes a schema as JSON text, too."""
    if kind == "json_object":
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _refused(field: str, problem: str) -> RequestError:
    return RequestError(400, f"{field}: {problem}", param=field)

"""What response_format and structured_outputs ask for, and how wrong ones are refused."""

import json
from typing import Any

import pytest
from pydantic import ValidationError

from cluster.errors import RequestError
from cluster.ingress.structured import grammar_spec
from cluster.schema import ResponseFormat, StructuredOutputs
from model.grammar_spec import GrammarSpec

SCHEMA = {"type": "object", "properties": {"né": {"type": "integer"}}}


def spec_of(response_format: Any = None, structured_outputs: Any = None) -> GrammarSpec | None:
    return grammar_spec(
        response_format and ResponseFormat.model_validate(response_format),
        structured_outputs and StructuredOutputs.model_validate(structured_outputs),
        continues_text=False,
    )


@pytest.mark.parametrize(
    ("response_format", "expected"),
    [
        (None, None),
        ({"type": "text"}, None),
        ({"type": "json_object"}, GrammarSpec("json_object")),
        ({"type": "json_object", "value": {}}, GrammarSpec("json_schema", "{}")),
        (
            {
                "type": "json_schema",
                "json_schema": {"name": "x", "schema": SCHEMA, "strict": True},
            },
            GrammarSpec("json_schema", json.dumps(SCHEMA, ensure_ascii=False)),
        ),
    ],
)
def test_response_format(response_format: Any, expected: GrammarSpec | None) -> None:
    assert spec_of(response_format) == expected


@pytest.mark.parametrize(
    ("structured_outputs", "expected"),
    [
        ({"regex": "a+"}, GrammarSpec("regex", "a+")),
        ({"choice": ["é", "b"]}, GrammarSpec("choice", '["é", "b"]')),
        ({"grammar": 'start: "a"'}, GrammarSpec("grammar", 'start: "a"')),
        ({"json_object": True}, GrammarSpec("json_object")),
        ({"json": {"type": "null"}}, GrammarSpec("json_schema", '{"type": "null"}')),
        ({"json": '{"type": "null"}'}, GrammarSpec("json_schema", '{"type": "null"}')),
        ({"json_object": False, "regex": "a", "choice": None}, GrammarSpec("regex", "a")),
        ({"json_object": False}, None),
    ],
)
def test_structured_outputs(structured_outputs: Any, expected: GrammarSpec | None) -> None:
    assert spec_of(None, structured_outputs) == expected


def test_the_spec_knows_whether_the_answer_continues_text() -> None:
    wanted = StructuredOutputs(regex="a")
    assert grammar_spec(None, wanted, continues_text=True) == GrammarSpec("regex", "a", True)


@pytest.mark.parametrize(
    ("model", "body", "problem"),
    [
        (ResponseFormat, {"type": "xml"}, "type"),
        (ResponseFormat, {"type": "json_schema"}, "json_schema must be given"),
        (ResponseFormat, {"type": "text", "json_schema": {"name": "x", "schema": {}}}, "only then"),
        (ResponseFormat, {"type": "json_schema", "json_schema": {"schema": {}}}, "name"),
        (StructuredOutputs, {"regex": "a", "choice": ["a"]}, "only one of regex, choice"),
        (StructuredOutputs, {"choice": []}, "choice"),
        (StructuredOutputs, {"choice": ["a"] * 5_001}, "5000"),
        (StructuredOutputs, {"structural_tag": "x"}, "structural_tag"),
    ],
)
def test_what_breaks_the_schema_is_refused(model: Any, body: Any, problem: str) -> None:
    with pytest.raises(ValidationError, match=problem):
        model.model_validate(body)


@pytest.mark.parametrize(
    ("response_format", "structured_outputs", "field", "problem"),
    [
        ({"type": "json_object"}, {"regex": "a"}, "structured_outputs", "give only one"),
        (None, {"regex": "a" * 9_000}, "structured_outputs", "9000 bytes; at most 8192"),
        (None, {"grammar": "\ud800"}, "structured_outputs", "not valid Unicode"),
        (
            {
                "type": "json_schema",
                "json_schema": {"name": "x", "schema": {"title": "x" * 70_000}},
            },
            None,
            "response_format",
            "at most 65536",
        ),
    ],
)
def test_what_is_too_much_is_refused_with_its_field(
    response_format: Any, structured_outputs: Any, field: str, problem: str
) -> None:
    with pytest.raises(RequestError, match=problem) as refused:
        spec_of(response_format, structured_outputs)
    assert refused.value.status == 400
    assert refused.value.param == field
    assert refused.value.message.startswith(field)

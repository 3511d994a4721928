"""The form that a request may ask for: OpenAI's response_format, vLLM's structured_outputs."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

MAX_STRUCTURED_CHOICES = 5_000
"""Strings that structured_outputs.choice may list."""


class JsonSchemaFormat(BaseModel):
    """A schema that the answer must fit. It is always enforced, whatever `strict` says."""

    name: str = Field(min_length=1, max_length=64)
    description: str | None = None
    json_schema: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(BaseModel):
    """OpenAI's response_format."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None
    value: dict[str, Any] | None = None
    """With json_object, the schema that the object must fit: TGI's way, and huggingface_hub's."""

    @model_validator(mode="after")
    def _schema_goes_with_its_type(self) -> "ResponseFormat":
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema must be given with type json_schema, and only then")
        if self.value is not None and self.type != "json_object":
            raise ValueError("value is only allowed with type json_object")
        return self


class StructuredOutputs(BaseModel):
    """vLLM's structured_outputs: at most one of these. Empty, it asks for nothing."""

    model_config = ConfigDict(extra="forbid")

    json_schema: dict[str, Any] | str | None = Field(default=None, alias="json")
    regex: str | None = None
    choice: (
        Annotated[list[str], Field(fail_fast=True, min_length=1, max_length=MAX_STRUCTURED_CHOICES)]
        | None
    ) = None
    grammar: str | None = None
    json_object: bool | None = None

    @model_validator(mode="after")
    def _at_most_one(self) -> "StructuredOutputs":
        if len(self.wanted) > 1:
            raise ValueError(f"only one of {', '.join(self.wanted)} can be given")
        return self

    @property
    def wanted(self) -> dict[str, Any]:
        """What is asked for, by the name that the request gives it."""
        given = self.model_dump(by_alias=True, exclude_none=True)
        return {name: value for name, value in given.items() if value is not False}

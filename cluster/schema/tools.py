"""Tools that a model may call: how a request offers them, and how calls are told.

Only functions are served.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

MAX_TOOLS = 128
"""Functions that a request may offer, and calls that a message may hold."""

FunctionName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,128}$")]
"""As long as OpenAI's Responses API and Anthropic's take them; chat's are half as long there."""


class _Part(BaseModel):
    """Built when first used, like replies, of which some are parts."""

    model_config = ConfigDict(defer_build=True)


class FunctionDefinition(_Part):
    """What the model is told of a function."""

    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    """JSON schema of an object. Left out: the function takes no arguments."""
    strict: bool | None = None
    """Enforced wherever a call is: with tool_choice `required` or a function's name."""

    @field_validator("parameters")
    @classmethod
    def _are_an_object(cls, schema: dict[str, Any] | None) -> dict[str, Any] | None:
        if schema is not None and schema.get("type", "object") != "object":
            raise ValueError(f"must be the schema of an object, not of {schema['type']!r}")
        return schema


class Tool(_Part):
    """A tool that the model may call."""

    type: Literal["function"] = "function"
    function: FunctionDefinition


class FunctionChoice(_Part):
    name: FunctionName


class ToolChoice(_Part):
    """The one function that must be called."""

    type: Literal["function"] = "function"
    function: FunctionChoice


class FunctionCall(_Part):
    name: FunctionName
    arguments: str
    """JSON, as the model wrote it: it may be cut off where max_tokens ends it."""


class ToolCall(_Part):
    """A call that the assistant asks for, in a reply and in the history of a later request."""

    id: str = Field(min_length=1, max_length=256)
    type: Literal["function"] = "function"
    function: FunctionCall


class FunctionCallDelta(_Part):
    name: str | None = Field(default=None, exclude_if=lambda name: name is None)
    arguments: str = ""
    """What is new of them."""


class ToolCallDelta(_Part):
    """What is new of a call. Id, type and name come once, first."""

    index: int
    """Of the call, in its message."""
    id: str | None = Field(default=None, exclude_if=lambda given: given is None)
    type: Literal["function"] | None = Field(default=None, exclude_if=lambda given: given is None)
    function: FunctionCallDelta

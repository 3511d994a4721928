"""OpenAI's Responses API: its request, its response and the events of its stream.

Nothing is stored: what refers to an earlier response is refused.
"""

import json
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    Discriminator,
    Field,
    Tag,
    field_validator,
    model_validator,
)

from cluster.schema.answer_form import ResponseFormat
from cluster.schema.content import AsList, Text, TextOrList
from cluster.schema.replies import ContentLogprob, Reply
from cluster.schema.requests import MAX_LOGPROBS, ModelRequest
from cluster.schema.tools import MAX_TOOLS, FunctionName

NOT_SUPPORTED_IN_RESPONSES: dict[str, tuple[Any, ...]] = {
    "background": (False,),
    "max_tool_calls": (),
    "prompt": (),
    "truncation": ("disabled",),
}
"""See NOT_SUPPORTED."""

MAX_ITEMS = 9_999
"""With instructions, as many messages as chat takes."""
MAX_METADATA = 16
"""Pairs that a request may have echoed; OpenAI's bound, as are those of keys and values."""

T = TypeVar("T")


def _repeatable(given: T) -> T:
    """Refuse what cannot come back with the response.

    Python reads infinities and half a surrogate pair, and pydantic takes values too deep for it to
    write.
    """
    try:
        text = json.dumps(given, ensure_ascii=False, allow_nan=False, default=BaseModel.model_dump)
        text.encode()
    except (ValueError, RecursionError) as error:
        raise ValueError("holds what JSON cannot, or is nested too deeply") from error
    return given


class InputText(BaseModel):
    """A part of a message. Only text is served."""

    type: Literal["input_text", "output_text"]
    text: str


Words = Annotated[
    Text | Annotated[list[InputText], Field(fail_fast=True, max_length=1_000), AsList], TextOrList
]
"""Text, as such or in parts."""


class InputMessage(BaseModel):
    """One turn: the user's, a system message, or what the model has said before."""

    role: Literal["user", "assistant", "system", "developer"]
    content: Words


class InputCall(BaseModel):
    """A call that the model has asked for."""

    type: Literal["function_call"]
    call_id: str = Field(min_length=1, max_length=256)
    name: FunctionName
    arguments: str


class InputCallOutput(BaseModel):
    """What a call has come to."""

    type: Literal["function_call_output"]
    call_id: str = Field(min_length=1, max_length=256)
    output: Words


def _kind_of(item: Any) -> str:
    given = item.get("type") if isinstance(item, dict) else getattr(item, "type", None)
    return str(given or "message")


InputItem = Annotated[
    Annotated[InputMessage, Tag("message")]
    | Annotated[InputCall, Tag("function_call")]
    | Annotated[InputCallOutput, Tag("function_call_output")],
    Discriminator(
        _kind_of,
        custom_error_type="item_type",
        custom_error_message="an item must be a message, function_call or function_call_output",
    ),
]


class FunctionTool(BaseModel):
    """A function that the model may call. Tools that a server would run are not served."""

    type: Literal["function"]
    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class NamedTool(BaseModel):
    """The one function that must be called."""

    type: Literal["function"]
    name: FunctionName


class TextFormat(BaseModel):
    """The form of the answer: chat's response_format, laid flat."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = Field(default=None, min_length=1, max_length=64)
    description: Annotated[str | None, AfterValidator(_repeatable)] = None
    json_schema: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None

    @model_validator(mode="after")
    def _schema_goes_with_its_type(self) -> "TextFormat":
        is_wanted = self.type == "json_schema"
        if any((part is not None) != is_wanted for part in (self.name, self.json_schema)):
            raise ValueError("name and schema must be given with type json_schema, and only then")
        return self

    def response_format(self) -> ResponseFormat:
        """What chat calls it."""
        fields = self.model_dump(by_alias=True, exclude={"type"}, exclude_none=True)
        return ResponseFormat.model_validate(
            {"type": self.type, "json_schema": fields if self.type == "json_schema" else None}
        )


class TextConfig(BaseModel):
    format: TextFormat | None = None


class ResponsesRequest(ModelRequest):
    """Body of POST /v1/responses."""

    not_supported = NOT_SUPPORTED_IN_RESPONSES

    input: Annotated[
        Text
        | Annotated[
            list[InputItem], Field(fail_fast=True, min_length=1, max_length=MAX_ITEMS), AsList
        ],
        TextOrList,
    ]
    instructions: str | None = None
    """A system message that goes before the input."""
    stream: bool = False
    max_output_tokens: int | None = Field(default=None, ge=1)
    """Left out: the rest of the context."""
    temperature: float = Field(default=1.0, ge=0.0, le=2.0, allow_inf_nan=False)
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    text: TextConfig = TextConfig()
    include: list[Literal["message.output_text.logprobs"]] = Field(default_factory=list)
    top_logprobs: int = Field(default=0, ge=0, le=MAX_LOGPROBS, strict=True)
    """Report those of so many likeliest tokens beside each token's own."""
    metadata: dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]] = (
        Field(default={}, max_length=MAX_METADATA)
    )
    """Comes back with the response."""
    tools: list[FunctionTool] = Field(default_factory=list, fail_fast=True, max_length=MAX_TOOLS)
    tool_choice: Literal["auto", "none", "required"] | NamedTool = "auto"
    parallel_tool_calls: bool = True
    previous_response_id: str | None = None
    conversation: Any = None

    @field_validator("previous_response_id", "conversation", mode="before")
    @classmethod
    def _nothing_is_stored(cls, _given: Any) -> None:
        raise ValueError("responses are not stored here; send the whole conversation as input")

    @field_validator("tools")
    @classmethod
    def _come_back(cls, tools: list[FunctionTool]) -> list[FunctionTool]:
        return _repeatable(tools)


Status = Literal["in_progress", "completed", "incomplete"]


class OutputText(Reply):
    """The text of an answer."""

    type: Literal["output_text"] = "output_text"
    text: str
    annotations: list[Any] = Field(default_factory=list)
    logprobs: list[ContentLogprob] = Field(default_factory=list)


class OutputMessage(Reply):
    """An answer in words."""

    id: str
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"
    status: Status
    content: list[OutputText]


class OutputCall(Reply):
    """A call that the model asks for."""

    id: str
    type: Literal["function_call"] = "function_call"
    status: Status
    call_id: str
    name: str
    arguments: str
    """JSON; cut off where max_output_tokens ends it."""


OutputItem = OutputMessage | OutputCall


class InputTokensDetails(Reply):
    cached_tokens: int
    """Found in the cache instead of being computed."""
    cache_write_tokens: int = 0


class OutputTokensDetails(Reply):
    reasoning_tokens: int = 0


class ResponseUsage(Reply):
    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails = OutputTokensDetails()
    total_tokens: int


class ResponseError(Reply):
    code: str
    message: str


class IncompleteDetails(Reply):
    reason: Literal["max_output_tokens"] = "max_output_tokens"


class Response(Reply):
    """Reply of /v1/responses; some events of a stream have it as it then stands."""

    id: str
    object: Literal["response"] = "response"
    created_at: int
    """Unix time, seconds."""
    completed_at: int | None = None
    status: Status | Literal["failed"]
    error: ResponseError | None = None
    incomplete_details: IncompleteDetails | None = None
    model: str
    output: list[OutputItem]
    usage: ResponseUsage | None = None
    instructions: str | None
    max_output_tokens: int | None
    temperature: float
    top_p: float
    top_logprobs: int
    text: dict[str, Any]
    metadata: dict[str, str]
    parallel_tool_calls: bool
    tool_choice: Literal["auto", "none", "required"] | NamedTool
    tools: list[FunctionTool]
    truncation: Literal["disabled"] = "disabled"
    background: Literal[False] = False
    previous_response_id: None = None
    store: Literal[False] = False
    """Nothing is stored, whatever the request says."""


class StreamEvent(Reply):
    """One event of a stream, with the fields of its own type."""

    type: str
    sequence_number: int
    """From 0, without a gap."""

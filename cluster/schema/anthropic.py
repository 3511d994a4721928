"""Anthropic's Messages API: its requests, its message, the events of its stream, its errors."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, model_validator

from cluster.schema.content import AsList, Text, TextOrList
from cluster.schema.replies import Reply
from cluster.schema.requests import MAX_STOP_STRINGS, ModelRequest, StopString
from cluster.schema.tools import MAX_TOOLS, FunctionName

NOT_SUPPORTED_IN_MESSAGES: dict[str, tuple[Any, ...]] = {
    "container": (),
    "mcp_servers": ([],),
    "output_format": (),
    "thinking": ({"type": "disabled"},),
}
"""See NOT_SUPPORTED. output_format is what older clients call output_config.format."""

MAX_TURNS = 9_999
"""With a system prompt, as many messages as chat takes."""


class TextBlock(BaseModel):
    """Text in a turn."""

    type: Literal["text"] = "text"
    text: str


Words = Annotated[
    Text | Annotated[list[TextBlock], Field(fail_fast=True, max_length=1_000), AsList], TextOrList
]
"""Text, as such or in blocks."""


class ToolUseBlock(BaseModel):
    """A call that the model has asked for."""

    type: Literal["tool_use"] = "tool_use"
    id: str = Field(min_length=1, max_length=256)
    name: FunctionName
    input: dict[str, Any]


class ToolResultBlock(BaseModel):
    """What a call has come to."""

    type: Literal["tool_result"]
    tool_use_id: str = Field(min_length=1, max_length=256)
    content: Words = ""


Block = Annotated[TextBlock | ToolUseBlock | ToolResultBlock, Field(discriminator="type")]


class Turn(BaseModel):
    """One turn. Turns of one role that follow each other count as one."""

    role: Literal["user", "assistant", "system"]
    content: Annotated[
        Text | Annotated[list[Block], Field(fail_fast=True, max_length=1_000), AsList], TextOrList
    ]

    @model_validator(mode="after")
    def _blocks_are_their_roles(self) -> "Turn":
        whose = {"tool_use": "assistant", "tool_result": "user"}
        for block in self.content if isinstance(self.content, list) else ():
            if whose.get(block.type, self.role) != self.role:
                raise ValueError(f"a {block.type} block cannot be in a turn of {self.role}")
        return self


class MessagesTool(BaseModel):
    """A function that the model may call. Tools that a server would run are not served."""

    type: Literal["custom"] | None = None
    name: FunctionName
    description: str | None = None
    input_schema: dict[str, Any]


class MessagesToolChoice(BaseModel):
    """Whether to call tools: as the model likes, at least one, the one named, or not at all."""

    type: Literal["auto", "any", "tool", "none"]
    name: FunctionName | None = None
    disable_parallel_tool_use: bool = False

    @model_validator(mode="after")
    def _name_goes_with_its_type(self) -> "MessagesToolChoice":
        if (self.type == "tool") != (self.name is not None):
            raise ValueError("name must be given with type tool, and only then")
        return self


class JsonFormat(BaseModel):
    """A schema that the answer must fit."""

    type: Literal["json_schema"]
    json_schema: dict[str, Any] = Field(alias="schema")


class OutputConfig(BaseModel):
    format: JsonFormat | None = None


class Metadata(BaseModel):
    user_id: str | None = None


class CountTokensRequest(ModelRequest):
    """Body of POST /v1/messages/count_tokens."""

    not_supported = NOT_SUPPORTED_IN_MESSAGES

    messages: Annotated[list[Turn], Field(fail_fast=True, min_length=1, max_length=MAX_TURNS)]
    system: Words | None = None
    tools: list[MessagesTool] = Field(default_factory=list, fail_fast=True, max_length=MAX_TOOLS)
    tool_choice: MessagesToolChoice | None = None


class MessagesRequest(CountTokensRequest):
    """Body of POST /v1/messages."""

    max_tokens: int = Field(ge=1)
    stream: bool = False
    stop_sequences: list[StopString] = Field(
        default_factory=list, fail_fast=True, max_length=MAX_STOP_STRINGS
    )
    temperature: float = Field(default=1.0, ge=0.0, le=2.0, allow_inf_nan=False)
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    top_k: int = Field(default=0, ge=-1, lt=2**31)
    """0 or -1 keeps all tokens."""
    output_config: OutputConfig = OutputConfig()
    metadata: Metadata = Metadata()


class TokenCount(Reply):
    """Reply of /v1/messages/count_tokens."""

    input_tokens: int


class MessageUsage(Reply):
    input_tokens: int
    """Of the prompt, without those that were found in the cache."""
    cache_creation_input_tokens: int = 0
    cache_read_input_tokens: int
    """Of the prompt, found in the cache instead of being computed."""
    output_tokens: int


StopReason = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]


class AnthropicMessage(Reply):
    """Reply of /v1/messages."""

    id: str
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"
    model: str
    content: list[TextBlock | ToolUseBlock]
    stop_reason: StopReason | None = None
    """None only at a stream's beginning."""
    stop_sequence: str | None = None
    usage: MessageUsage


class MessageEvent(Reply):
    """One event of a stream, with the fields of its own type."""

    type: str


class AnthropicErrorDetail(Reply):
    type: str
    message: str


class AnthropicError(Reply):
    """Body of every error reply, and of an error event in a stream."""

    type: Literal["error"] = "error"
    error: AnthropicErrorDetail

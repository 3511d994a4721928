"""Anthropic's Messages API: its requests, its message, the events of its stream, its errors."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from cluster.schema.content import AsList, Text, TextOrList
from cluster.schema.replies import Reply
from cluster.schema.requests import MAX_STOP_STRINGS, ModelRequest, StopString

NOT_SUPPORTED_IN_MESSAGES: dict[str, tuple[Any, ...]] = {
    "container": (),
    "mcp_servers": ([],),
    "thinking": ({"type": "disabled"},),
    "tool_choice": ({"type": "none"}, {"type": "auto"}),
    "tools": ([],),
}
"""See NOT_SUPPORTED."""

MAX_TURNS = 9_999
"""With a system prompt, as many messages as chat takes."""


class TextBlock(BaseModel):
    """A block of a turn. Only text is served."""

    type: Literal["text"]
    text: str


Content = Annotated[
    Text | Annotated[list[TextBlock], Field(fail_fast=True, max_length=1_000), AsList], TextOrList
]


class Turn(BaseModel):
    """One turn. Turns of one role that follow each other count as one."""

    role: Literal["user", "assistant", "system"]
    content: Content


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
    system: Content | None = None


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


class AnswerBlock(Reply):
    type: Literal["text"] = "text"
    text: str


StopReason = Literal["end_turn", "max_tokens", "stop_sequence"]


class AnthropicMessage(Reply):
    """Reply of /v1/messages."""

    id: str
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"
    model: str
    content: list[AnswerBlock]
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

"""What requests with a conversation ask: chat completions, and its token ids."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, Field, ValidationInfo, field_validator, model_validator

from cluster.schema.requests import (
    MAX_LOGPROBS,
    NOT_SUPPORTED,
    GenerationRequest,
    ModelRequest,
    TokenIds,
)
from cluster.schema.tools import MAX_TOOLS, Tool, ToolCall, ToolChoice

NOT_SUPPORTED_IN_CHAT: dict[str, tuple[Any, ...]] = {
    **NOT_SUPPORTED,
    "add_special_tokens": (False,),
    "audio": (),
    "chat_template": (),
    "documents": ([],),
    "modalities": (["text"],),
    "web_search_options": (),
}
"""In a conversation the template writes the special tokens; and it is the checkpoint's own."""


class ContentPart(BaseModel):
    """A part of a message's content. Only text is served."""

    type: Literal["text"]
    text: str


class ChatMessage(BaseModel):
    """One turn of a conversation."""

    role: str = Field(min_length=1, max_length=64)
    content: str | Annotated[list[ContentPart], Field(fail_fast=True, max_length=1_000)] | None = (
        None
    )
    """Left out only beside tool_calls."""
    tool_calls: Annotated[list[ToolCall], Field(fail_fast=True, max_length=MAX_TOOLS)] | None = None
    """What the assistant has asked for."""
    tool_call_id: str | None = Field(default=None, min_length=1, max_length=256)
    """In a turn of a tool, the call that it answers."""
    name: str | None = Field(default=None, max_length=256)

    @field_validator("role")
    @classmethod
    def _by_its_older_name(cls, role: str) -> str:
        """OpenAI's newer word for the system's turns, which no template of Mixtral's knows."""
        return "system" if role == "developer" else role

    @model_validator(mode="after")
    def _says_something(self) -> "ChatMessage":
        if self.content is None and not self.tool_calls:
            raise ValueError("content: must be given, except beside tool_calls")
        return self

    @property
    def text(self) -> str | None:
        if self.content is None or isinstance(self.content, str):
            return self.content
        return "\n".join(part.text for part in self.content)


Messages = Annotated[list[ChatMessage], Field(fail_fast=True, min_length=1, max_length=10_000)]


class Rendering(BaseModel):
    """How the chat template is to render a conversation."""

    tools: Annotated[list[Tool], Field(fail_fast=True, max_length=MAX_TOOLS)] = []
    """What the model may call, where its chat template tells it of tools."""
    continue_final_message: bool = False
    """Go on within the last message, instead of answering it."""
    add_generation_prompt: bool | None = None
    """End with what opens the assistant's turn. Left out: yes, but for continue_final_message."""
    chat_template_kwargs: Annotated[dict[str, Any], Field(max_length=64)] = {}
    """More variables for the chat template."""

    @field_validator("add_generation_prompt")
    @classmethod
    def _ends_in_one_way(cls, opens: bool | None, others: ValidationInfo) -> bool | None:
        if opens and others.data.get("continue_final_message"):
            raise ValueError("not allowed with continue_final_message: true")
        return opens

    @property
    def opens_turn(self) -> bool:
        """Whether the prompt ends with what opens the assistant's turn."""
        if self.add_generation_prompt is None:
            return not self.continue_final_message
        return self.add_generation_prompt


class ChatCompletionRequest(GenerationRequest, Rendering):
    """Body of POST /v1/chat/completions."""

    not_supported = NOT_SUPPORTED_IN_CHAT

    messages: Messages
    tool_choice: Literal["auto", "none", "required"] | ToolChoice = "auto"
    """Whether to call tools: as the model likes, not at all, at least one, or the one named."""
    parallel_tool_calls: bool = True
    """Whether an answer may hold several calls."""
    max_tokens: int | None = Field(default=None, ge=1)
    """Left out: the rest of the context."""
    max_completion_tokens: int | None = Field(default=None, ge=1)
    """OpenAI's newer name of max_tokens; wins where both are given."""
    logprobs: bool = False
    """Report each token's log-probability, the model's own: before penalties, bias, temperature."""
    top_logprobs: int = Field(default=0, ge=0, le=MAX_LOGPROBS, strict=True)
    """Report those of so many likeliest tokens in its place, too."""

    @field_validator("top_logprobs")
    @classmethod
    def _needs_logprobs(cls, number: int, others: ValidationInfo) -> int:
        if number and not others.data.get("logprobs"):
            raise ValueError("only allowed with logprobs: true")
        return number


class TokenizeRequest(ModelRequest, Rendering):
    """Body of POST /tokenize: a text, or a conversation."""

    not_supported: ClassVar[dict[str, tuple[Any, ...]]] = {"chat_template": ()}

    prompt: str | None = None
    messages: Messages | None = None
    """Instead of the prompt."""
    add_special_tokens: bool | None = None
    """Begin a text with the begin token; left out: yes. A conversation has what its chat template
    writes."""
    return_token_strs: bool = False
    """Report how the vocabulary spells each token."""

    @field_validator("messages")
    @classmethod
    def _is_the_only_one(
        cls, messages: list[ChatMessage] | None, others: ValidationInfo
    ) -> list[ChatMessage] | None:
        if messages is not None and others.data.get("prompt") is not None:
            raise ValueError("not allowed beside a prompt")
        return messages


class DetokenizeRequest(ModelRequest):
    """Body of POST /detokenize."""

    not_supported: ClassVar[dict[str, tuple[Any, ...]]] = {}

    tokens: TokenIds

"""What travels over HTTP: OpenAI's and vLLM's requests and replies, as far as they are spoken.

Shared by ingress and SDK. Bounds of request fields live here and nowhere else.
"""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

MAX_CHOICES = 128
"""Completions one request may ask for: prompts x n. Also the texts it may have classified."""
MAX_STOP_STRINGS = 16
MAX_STOP_TOKENS = 64
MAX_SEED = 2**63 - 1
MAX_STRUCTURED_CHOICES = 5_000
"""Strings that structured_outputs.choice may list."""

TokenId = Annotated[int, Field(ge=0, strict=True)]
TokenIds = Annotated[list[TokenId], Field(fail_fast=True)]
"""fail_fast: the first wrong item refuses the list; a long one must not cost seconds to refuse."""
Prompts = (
    str
    | TokenIds
    | Annotated[list[str], Field(fail_fast=True, max_length=MAX_CHOICES)]
    | Annotated[list[TokenIds], Field(fail_fast=True, max_length=MAX_CHOICES)]
)
"""Text or token ids, of one prompt or of several."""
StopString = Annotated[str, Field(min_length=1, max_length=1_000)]

NOT_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "logit_bias": ({},),
    "logprobs": (False,),
    "presence_penalty": (0,),
    "response_format": ({"type": "text"},),
    "structured_outputs": ({},),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
}
"""Fields of OpenAI's and vLLM's that would change the answer but are not served yet, with the
values that ask for nothing. Any other value is refused rather than silently ignored."""

NOT_SUPPORTED_TO_CLASSIFY: dict[str, tuple[Any, ...]] = {
    "activation": (True,),
    "add_special_tokens": (True,),
    "messages": ([],),
    "softmax": (True,),
    "stream": (False,),
    "truncate_prompt_tokens": (),
}
"""The same for classification; the first and the fourth are older names of use_activation."""


class StreamOptions(BaseModel):
    """Options of a streamed reply."""

    include_usage: bool = False


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

    @model_validator(mode="after")
    def _schema_goes_with_its_type(self) -> "ResponseFormat":
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema must be given with type json_schema, and only then")
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


class ModelRequest(BaseModel):
    """What all requests to the model share. Unknown fields are ignored."""

    model_config = ConfigDict(extra="allow")
    not_supported: ClassVar[dict[str, tuple[Any, ...]]]

    model: str | None = None
    """Served model id; the one model there is when left out."""
    user: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _null_is_the_default(cls, data: Any) -> Any:
        """Clients send null for what they leave open."""
        if isinstance(data, dict):
            return {key: value for key, value in data.items() if value is not None}
        return data

    def first_unsupported(self) -> str | None:
        """Name of a field that asks for something not served yet, or None."""
        for name, value in (self.model_extra or {}).items():
            if name in self.not_supported and not any(
                # a bool is not a number here: logprobs: 0 asks for something, false does not
                value == off and isinstance(value, bool) == isinstance(off, bool)
                for off in self.not_supported[name]
            ):
                return name
        return None


class GenerationRequest(ModelRequest):
    """What completions and chat completions share."""

    not_supported = NOT_SUPPORTED

    n: int = Field(default=1, ge=1, le=MAX_CHOICES)
    temperature: float = Field(default=1.0, ge=0.0, le=2.0, allow_inf_nan=False)
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    top_k: int = Field(default=0, ge=-1, lt=2**31)
    """0 or -1 keeps all tokens."""
    min_p: float = Field(default=0.0, ge=0.0, le=1.0)
    typical_p: float = Field(default=1.0, gt=0.0, le=1.0)
    repetition_penalty: float = Field(default=1.0, ge=0.01, le=100.0)
    min_tokens: int = Field(default=0, ge=0, lt=2**31)
    """New tokens before an end token or one of stop_token_ids may come."""
    ignore_eos: bool = False
    """Go on past the model's own end tokens."""
    stop_token_ids: Annotated[list[TokenId], Field(fail_fast=True, max_length=MAX_STOP_TOKENS)] = []
    """Ids that end the answer like the model's own end tokens; they are not part of the text."""
    seed: int | None = Field(default=None, ge=-MAX_SEED - 1, le=MAX_SEED)
    """Left out: drawn by the server."""
    stop: (
        StopString
        | Annotated[list[StopString], Field(fail_fast=True, max_length=MAX_STOP_STRINGS)]
        | None
    ) = None
    stream: bool = False
    stream_options: StreamOptions | None = None

    @field_validator("stream_options")
    @classmethod
    def _needs_a_stream(
        cls, options: StreamOptions | None, others: ValidationInfo
    ) -> StreamOptions | None:
        if options is not None and not others.data.get("stream"):
            raise ValueError("only allowed with stream: true")
        return options

    @property
    def stop_strings(self) -> tuple[str, ...]:
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


class CompletionRequest(GenerationRequest):
    """Body of POST /v1/completions."""

    prompt: Prompts
    max_tokens: int = Field(default=16, ge=1)


class ContentPart(BaseModel):
    """A part of a message's content. Only text is served."""

    type: Literal["text"]
    text: str


class ChatMessage(BaseModel):
    """One turn of a conversation."""

    role: str = Field(min_length=1, max_length=64)
    content: str | Annotated[list[ContentPart], Field(fail_fast=True, max_length=1_000)]

    @property
    def text(self) -> str:
        if isinstance(self.content, str):
            return self.content
        return "\n".join(part.text for part in self.content)


class ChatCompletionRequest(GenerationRequest):
    """Body of POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(fail_fast=True, min_length=1, max_length=10_000)]
    max_tokens: int | None = Field(default=None, ge=1)
    """Left out: the rest of the context."""
    max_completion_tokens: int | None = Field(default=None, ge=1)
    """OpenAI's newer name of max_tokens; wins where both are given."""


class ClassifyRequest(ModelRequest):
    """Body of POST /classify and /v1/classify."""

    not_supported = NOT_SUPPORTED_TO_CLASSIFY

    input: Prompts
    use_activation: bool = True
    """Left true, the reply has probabilities; false asks for the score head's logits."""


class Reply(BaseModel):
    """Base of replies: a newer server may send more than this client knows."""

    model_config = ConfigDict(extra="allow")


class Usage(Reply):
    """Tokens of a request, over all its choices."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class CompletionChoice(Reply):
    index: int
    text: str
    finish_reason: str | None = None
    """stop or length"""
    logprobs: Any = None


class Completion(Reply):
    """Reply of /v1/completions, and each chunk of its stream."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    """Unix time, seconds."""
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


class AssistantMessage(Reply):
    role: Literal["assistant"] = "assistant"
    content: str


class ChatChoice(Reply):
    index: int
    message: AssistantMessage
    finish_reason: str | None = None
    """stop or length"""
    logprobs: Any = None


class ChatCompletion(Reply):
    """Reply of /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage | None = None


class ChatDelta(Reply):
    role: Literal["assistant"] | None = None
    content: str | None = None


class ChatChunkChoice(Reply):
    index: int
    delta: ChatDelta
    finish_reason: str | None = None
    """stop or length"""
    logprobs: Any = None


class ChatCompletionChunk(Reply):
    """One chunk of a streamed chat completion."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None


class ClassificationResult(Reply):
    """What was found out about one input."""

    index: int
    label: str
    """The likeliest."""
    probs: list[float]
    """Of every label, in the order of their ids."""
    num_classes: int


class Classification(Reply):
    """Reply of /classify."""

    id: str
    object: Literal["list"] = "list"
    created: int
    """Unix time, seconds."""
    model: str
    data: list[ClassificationResult]
    usage: Usage


class Model(Reply):
    """A served model."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "maestrale"
    max_model_len: int
    """Prompt and completion together, tokens."""


class ModelList(Reply):
    object: Literal["list"] = "list"
    data: list[Model]


class WorkerStatus(Reply):
    """One expert worker, as the controller sees it."""

    name: str
    address: str
    num_experts: int
    num_bytes: int


class Readiness(Reply):
    """Reply of GET /ready; HTTP 200 when `ready`, else 503."""

    ready: bool
    phase: str
    percent: int
    error: str | None = None
    epoch: int
    heads_ready: int
    heads_expected: int
    workers: list[WorkerStatus]


class ErrorDetail(Reply):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(Reply):
    """Body of every error reply, and of an error event in a stream."""

    error: ErrorDetail

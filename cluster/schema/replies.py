"""What comes back over HTTP: OpenAI's and vLLM's replies, their chunks and errors."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from cluster.schema.tools import ToolCall, ToolCallDelta

RESUMED_TOKENS = "X-Resumed-Tokens"
"""Header of a stream that goes on with an answer: behind how many ids. Its lack tells a caller that
the server does not know resume_token_ids, and begins anew."""


class Reply(BaseModel):
    """Base of replies: a newer server may send more than this client knows."""

    # built when first used: the SDK must be quick to import
    model_config = ConfigDict(extra="allow", defer_build=True)

    _request_id: str | None = None
    """In the SDK: the X-Request-Id of the answer that it came in."""


class PromptTokensDetails(Reply):
    cached_tokens: int
    """Of the prompts, found in the cache instead of being computed."""


class Usage(Reply):
    """Tokens of a request, over all its choices."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails | None = None


class CompletionLogprobs(Reply):
    """One entry per token. A token without text of its own, like the end token, is ""; one that is
    not whole characters is spelled `bytes:\\xe2`. No log-probability is below -9999."""

    tokens: list[str]
    token_logprobs: list[float | None]
    """None for a prompt's first token."""
    top_logprobs: list[dict[str, float] | None]
    """The likeliest tokens in its place, and the token itself."""
    text_offset: list[int]
    """Where in the choice's text the token begins, characters."""


class TokenLogprob(Reply):
    token: str
    """Spelled as in CompletionLogprobs."""
    logprob: float
    bytes: list[int]
    """The token's UTF-8."""


class ContentLogprob(TokenLogprob):
    """Of one token of a message, with the likeliest tokens in its place."""

    top_logprobs: list[TokenLogprob]


class ChatLogprobs(Reply):
    content: list[ContentLogprob]


class PromptLogprob(Reply):
    """Of one token that could stand in a place of the prompt."""

    logprob: float
    rank: int
    """1 for the likeliest."""
    decoded_token: str


PromptLogprobs = list[dict[int, PromptLogprob] | None]
"""For each token of a prompt, by id: the token's own and the likeliest. None for the first."""


class CompletionChoice(Reply):
    index: int
    text: str
    finish_reason: str | None = None
    """stop or length"""
    stop_reason: str | int | None = None
    """The stop string, or the id of stop_token_ids, that ended it; None for an end of its own."""
    logprobs: CompletionLogprobs | None = None
    prompt_logprobs: PromptLogprobs | None = None
    prompt_token_ids: list[int] | None = None
    """In a stream, with the choice's first chunk."""
    token_ids: list[int] | None = None
    """Of the answer; in a stream, those that are new."""


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
    content: str | None
    """None beside tool calls that nothing was said to."""
    tool_calls: list[ToolCall] | None = Field(default=None, exclude_if=lambda given: given is None)


class ChatChoice(Reply):
    index: int
    message: AssistantMessage
    finish_reason: str | None = None
    """stop, length or tool_calls"""
    stop_reason: str | int | None = None
    """The stop string, or the id of stop_token_ids, that ended it; None for an end of its own."""
    logprobs: ChatLogprobs | None = None
    token_ids: list[int] | None = None


class ChatCompletion(Reply):
    """Reply of /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage | None = None
    prompt_logprobs: PromptLogprobs | None = None
    prompt_token_ids: list[int] | None = None


class ChatDelta(Reply):
    role: Literal["assistant"] | None = None
    content: str | None = None
    tool_calls: list[ToolCallDelta] | None = Field(
        default=None, exclude_if=lambda given: given is None
    )


class ChatChunkChoice(Reply):
    index: int
    delta: ChatDelta
    finish_reason: str | None = None
    """stop, length or tool_calls"""
    stop_reason: str | int | None = None
    logprobs: ChatLogprobs | None = None
    token_ids: list[int] | None = None
    """Those that are new."""


class ChatCompletionChunk(Reply):
    """One chunk of a streamed chat completion."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None
    prompt_token_ids: list[int] | None = None
    """With the first chunk."""


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
    root: str | None = None
    """The same as id: there are no adapters."""
    max_model_len: int
    """Prompt and completion together, tokens."""


class ModelList(Reply):
    object: Literal["list"] = "list"
    data: list[Model]


class Tokens(Reply):
    """Reply of /tokenize."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class Text(Reply):
    """Reply of /detokenize."""

    prompt: str


class TokenizerInfo(Reply):
    """Reply of /tokenizer_info, in the words of a tokenizer_config.json."""

    tokenizer_class: str = "LlamaTokenizer"
    """transformers' class for this kind of tokenizer: SentencePiece's BPE with byte fallback."""
    vocab_size: int
    model_max_length: int
    add_bos_token: bool = True
    add_eos_token: bool = False
    bos_token: str
    bos_token_id: int
    eos_token: str
    eos_token_id: int
    chat_template: str


class Version(Reply):
    version: str


class Load(Reply):
    """Reply of /load."""

    server_load: int
    """Requests in progress, of the ingress that answers."""


class Alive(Reply):
    """Reply of /health."""

    status: Literal["ok"] = "ok"


class WorkerStatus(Reply):
    """One expert worker, as the controller sees it."""

    name: str
    address: str
    num_experts: int
    num_bytes: int


class LoadStatus(Reply):
    """A worker that is loading experts. Sizes as they are held once loaded."""

    worker: str
    source: Literal["disk", "lender"]
    """lender: other nodes, since its own lacks the checkpoint's folder."""
    loaded_bytes: int
    total_bytes: int
    bytes_per_s: float
    left_s: float | None
    """Null while no byte has come."""


class Readiness(Reply):
    """Reply of GET /ready; HTTP 200 when `ready`, else 503."""

    ready: bool
    phase: str
    percent: int
    error: str | None = None
    epoch: int
    experts_missing: int = 0
    """Experts that nobody holds now; rows for them wait until they are loaded again."""
    heads_ready: int
    heads_expected: int
    scaling: str | None = None
    """The last change of the number of heads or workers, and why."""
    workers: list[WorkerStatus]
    loading: list[LoadStatus] = []


class Move(Reply):
    """An expert, or a slice of one, that a worker is to load."""

    worker: str
    layer: int
    expert: int
    slice_number: int = 0
    num_slices: int = 1


class Rebalancing(Reply):
    """Reply of POST /admin/rebalance: what moves, and what that is expected to be good for."""

    moves: list[Move]
    busiest_before: list[float]
    """Of each layer: the busiest worker's expected load, relative to the workers' mean."""
    busiest_after: list[float]
    gain: float
    """Share of the experts' time that is expected to be saved."""
    adopted: bool
    """False for a dry run, and where nothing is to move."""


class ErrorDetail(Reply):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(Reply):
    """Body of every error reply, and of an error event in a stream."""

    error: ErrorDetail

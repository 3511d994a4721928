"""What calls take, by name. The meaning, the bounds and the defaults are those of `cluster.schema`.

What is left out, or None, is not sent, so the server's defaults hold.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Required, TypedDict

from pydantic import BaseModel

from cluster.client.settings import Timeout

Prompt = str | Sequence[int] | Sequence[str] | Sequence[Sequence[int]]
"""Text or token ids; one prompt or several."""
Message = Mapping[str, Any] | BaseModel
"""A turn as a dict, or the message of an earlier reply as it came."""


class Options(TypedDict, total=False):
    """How one call is made, whatever it asks for."""

    extra_headers: Mapping[str, str]
    """Sent too, and instead of the client's own of the same name."""
    extra_query: Mapping[str, str | int | float | bool]
    extra_body: Mapping[str, Any]
    """Fields of the request that have no parameter here, sent as they are."""
    timeout: Timeout
    """Instead of the client's."""


class GenerationParams(Options, total=False):
    """What completions and chat completions share."""

    model: str | None
    user: str | None
    stream_options: Mapping[str, bool] | None
    n: int | None
    best_of: int | None
    seed: int | None
    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    typical_p: float | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    logit_bias: Mapping[int, float] | Mapping[str, float] | None
    bad_words: Sequence[str] | None
    allowed_token_ids: Sequence[int] | None
    response_format: Mapping[str, Any] | None
    structured_outputs: Mapping[str, Any] | None
    min_tokens: int | None
    max_tokens: int | None
    ignore_eos: bool | None
    stop: str | Sequence[str] | None
    stop_token_ids: Sequence[int] | None
    include_stop_str_in_output: bool | None
    prompt_logprobs: int | None
    return_token_ids: bool | None
    return_tokens_as_token_ids: bool | None
    truncate_prompt_tokens: int | None
    resume_token_ids: Sequence[int] | None
    priority: int | None
    cache_salt: str | None
    num_speculative_tokens: int | None


class CompletionParams(GenerationParams, total=False):
    """Of `completions.create`."""

    prompt: Required[Prompt]
    add_special_tokens: bool | None
    echo: bool | None
    logprobs: int | None


class Rendering(TypedDict, total=False):
    """How a conversation becomes a prompt."""

    tools: Sequence[Mapping[str, Any]] | None
    continue_final_message: bool | None
    add_generation_prompt: bool | None
    chat_template_kwargs: Mapping[str, Any] | None


class ChatParams(GenerationParams, Rendering, total=False):
    """Of `chat.completions.create`."""

    messages: Required[Sequence[Message]]
    tool_choice: str | Mapping[str, Any] | None
    parallel_tool_calls: bool | None
    max_completion_tokens: int | None
    logprobs: bool | None
    top_logprobs: int | None


class TokenizeParams(Options, Rendering, total=False):
    """Of `tokenize`: a prompt or messages."""

    prompt: str | None
    messages: Sequence[Message] | None
    model: str | None
    user: str | None
    add_special_tokens: bool | None
    return_token_strs: bool | None


class DetokenizeParams(Options, total=False):
    """Of `detokenize`."""

    tokens: Required[Sequence[int]]
    model: str | None
    user: str | None


class ClassifyParams(Options, total=False):
    """Of `classify`."""

    input: Required[Prompt]
    model: str | None
    user: str | None
    use_activation: bool | None

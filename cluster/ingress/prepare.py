"""From a request's body to work for the heads: checked, tokenised, one journal per choice.

Knows schema and text; knows no HTTP, no engine and no stream. Every refusal is a RequestError.
"""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cluster.errors import RequestError
from cluster.ingress.journal import Journal
from cluster.schema import (
    MAX_CHOICES,
    ChatCompletionRequest,
    ClassifyRequest,
    CompletionRequest,
    GenerationRequest,
    ModelRequest,
    Usage,
)
from model.chat import ChatFormat, Message
from model.config import GenerationDefaults
from model.errors import PromptError
from model.labels import trim_padding
from model.sampling_params import SamplingParams
from model.tokenizer import Tokenizer

_SAMPLING_FIELDS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
"""Fields that `generation_config.json` may have a default for."""


@dataclass(frozen=True, kw_only=True)
class ApiSettings:
    """What the API is told of the model and its limits."""

    model_id: str
    max_model_len: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    defaults: GenerationDefaults
    """What the checkpoint's makers recommend, for fields that a request leaves open."""
    labels: tuple[str, ...] | None = None
    """Of a model that classifies; None for one that generates."""
    problem_type: str | None = None
    """What a classifier was trained for, if it says so (see labels.PROBLEM_TYPES)."""
    pad_token_id: int | None = None
    max_concurrent_requests: int
    """Of this ingress."""
    max_body_bytes: int


@dataclass(frozen=True)
class Work:
    """A request, checked and tokenised: one journal per choice, prompt-major."""

    body: GenerationRequest
    journals: list[Journal]
    num_prompt_tokens: int
    continues_text: bool
    """Whether the answer goes on in the prompt's text (completions) or starts afresh (chat)."""

    def usage(self) -> Usage:
        num_emitted = sum(len(journal.emitted_ids) for journal in self.journals)
        return Usage(
            prompt_tokens=self.num_prompt_tokens,
            completion_tokens=num_emitted,
            total_tokens=self.num_prompt_tokens + num_emitted,
        )


class Preparer:
    """Turns bodies into work for one served model. Immutable."""

    def __init__(self, tokenizer: Tokenizer, chat: ChatFormat, settings: ApiSettings) -> None:
        self._tokenizer = tokenizer
        self._chat = chat
        self._settings = settings

    def completion(self, body: CompletionRequest) -> Work:
        """Work of a plain completion. Raises RequestError."""
        prompts = [self._prompt_ids(given, "prompt") for given in _prompts(body.prompt, "prompt")]
        journals = self._journals(body, prompts, body.max_tokens, "max_tokens")
        return Work(body, journals, sum(len(prompt) for prompt in prompts), continues_text=True)

    def chat(self, body: ChatCompletionRequest) -> Work:
        """Work of a chat completion. Raises RequestError."""
        messages = [Message(message.role, message.text) for message in body.messages]
        self._check_length(sum(len(message.content) for message in messages), "messages")
        try:
            prompt = tuple(self._chat.encode(messages))
        except PromptError as error:
            raise RequestError(400, str(error), param="messages") from error
        max_tokens = body.max_completion_tokens or body.max_tokens
        field = "max_completion_tokens" if body.max_completion_tokens else "max_tokens"
        journals = self._journals(body, [prompt], max_tokens, field)
        return Work(body, journals, len(prompt), continues_text=False)

    def check_model(self, model_id: str | None) -> None:
        """Refuse a model that is not the one that is served."""
        if model_id is not None and model_id != self._settings.model_id:
            raise RequestError(
                404,
                f"the model {model_id!r} is not served here; there is {self._settings.model_id!r}",
                kind="not_found_error",
                param="model",
                code="model_not_found",
            )

    def classification(self, body: ClassifyRequest) -> list[Sequence[int]]:
        """Ids of the inputs, without padding at their ends. Raises RequestError."""
        context = self._settings.max_model_len
        prompts = []
        for given in _prompts(body.input, "input"):
            prompt = trim_padding(self._prompt_ids(given, "input"), self._settings.pad_token_id)
            if len(prompt) > context:
                raise RequestError(
                    400,
                    f"an input has {len(prompt)} tokens, the context is {context}",
                    param="input",
                    code="context_length_exceeded",
                )
            prompts.append(prompt)
        return prompts

    def check(self, body: ModelRequest) -> None:
        """Refuse a request that cannot be served, whatever its prompt."""
        self.check_model(body.model)
        model_id, classifies = self._settings.model_id, self._settings.labels is not None
        if classifies and not isinstance(body, ClassifyRequest):
            message = f"{model_id} classifies and does not generate: use /v1/classify"
            raise RequestError(400, message, param="model", code="unsupported")
        if not classifies and isinstance(body, ClassifyRequest):
            message = f"{model_id} generates and has no score head to classify with"
            raise RequestError(400, message, param="model", code="unsupported")
        unsupported = body.first_unsupported()
        if unsupported:
            raise RequestError(
                400, f"{unsupported} is not supported yet", param=unsupported, code="unsupported"
            )

    def _prompt_ids(self, prompt: str | list[int], field: str) -> tuple[int, ...]:
        if not prompt:
            raise RequestError(400, f"{field}: must not be empty", param=field)
        if isinstance(prompt, str):
            self._check_length(len(prompt), field)
            try:
                return tuple(self._tokenizer.encode_prompt(prompt))
            except PromptError as error:
                raise RequestError(400, f"{field}: {error}", param=field) from error
        vocab_size = self._settings.vocab_size
        if max(prompt) >= vocab_size:
            raise RequestError(
                400,
                f"{field}: token id {max(prompt)} is out of vocabulary ({vocab_size} ids)",
                param=field,
            )
        return tuple(prompt)

    def _asked(self, body: GenerationRequest, name: str) -> Any:
        """A sampling field: the request's, else the checkpoint's default, else OpenAI's."""
        default = getattr(self._settings.defaults, name)
        return getattr(body, name) if name in body.model_fields_set or default is None else default

    def _check_length(self, num_characters: int, param: str) -> None:
        """Refuse what is too long whatever its tokens, before the event loop counts them."""
        context = self._settings.max_model_len
        if num_characters > context * self._tokenizer.longest_piece:
            raise RequestError(
                400,
                f"{num_characters:,} characters cannot fit into the context of {context} tokens",
                param=param,
                code="context_length_exceeded",
            )

    def _journals(
        self,
        body: GenerationRequest,
        prompts: Sequence[tuple[int, ...]],
        max_tokens: int | None,
        max_tokens_field: str,
    ) -> list[Journal]:
        """One journal per prompt and choice. None for max_tokens: the rest of the context."""
        if len(prompts) * body.n > MAX_CHOICES:
            raise RequestError(
                400, f"{len(prompts)} prompts x n={body.n} exceed {MAX_CHOICES} choices", param="n"
            )
        context = self._settings.max_model_len
        if max_tokens is not None and max_tokens > context:
            raise RequestError(
                400,
                f"{max_tokens_field}: {max_tokens} exceeds the context of {context} tokens",
                param=max_tokens_field,
            )
        unknown = [t for t in body.stop_token_ids if t >= self._settings.vocab_size]
        if unknown:
            raise RequestError(
                400, f"stop_token_ids: {unknown[0]} is out of vocabulary", param="stop_token_ids"
            )
        sampling = {name: self._asked(body, name) for name in _SAMPLING_FIELDS}
        sampling["top_k"] = max(sampling["top_k"], 0)
        own_ends = () if body.ignore_eos else self._settings.eos_token_ids
        seed = body.seed if body.seed is not None else secrets.randbits(63)
        journals = []
        for prompt in prompts:
            room = context - len(prompt)
            if room < 1:
                raise RequestError(
                    400,
                    f"the prompt has {len(prompt)} tokens; the context of {context} must also "
                    "hold at least one new token",
                    param="messages" if isinstance(body, ChatCompletionRequest) else "prompt",
                    code="context_length_exceeded",
                )
            for choice in range(body.n):
                params = SamplingParams(
                    max_tokens=min(room, max_tokens or room),
                    seed=seed,
                    choice=choice,
                    stop_token_ids=(*own_ends, *body.stop_token_ids),
                    min_tokens=body.min_tokens,
                    typical_p=body.typical_p,
                    **sampling,
                )
                journals.append(Journal(prompt, params))
        return journals


def _prompts(
    prompt: str | list[int] | list[str] | list[list[int]], field: str
) -> list[str | list[int]]:
    """All prompts of a body's field, whichever of the four forms it has."""
    if isinstance(prompt, str):
        return [prompt]
    ids = [item for item in prompt if isinstance(item, int)]
    if ids:
        return [ids]
    if not prompt:
        raise RequestError(400, f"{field}: must not be empty", param=field)
    return [item for item in prompt if not isinstance(item, int)]

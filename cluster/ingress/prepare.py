"""From a request's body to work for the heads: checked, tokenised, one journal per choice.

Knows schema and text; knows no HTTP, no engine and no stream. Every refusal is a RequestError.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from cluster.errors import RequestError
from cluster.ingress.journal import Journal
from cluster.ingress.prompts import PromptReader, prompts_of
from cluster.ingress.resume import resume
from cluster.ingress.sampling import sampling_params
from cluster.ingress.structured import form_field, grammar_spec
from cluster.ingress.text import TextRules
from cluster.ingress.tools import ToolUse, shown_tools, tool_use
from cluster.schema import (
    MAX_CHOICES,
    ChatCompletionRequest,
    ClassifyRequest,
    CompletionRequest,
    DetokenizeRequest,
    GenerationRequest,
    ModelRequest,
    PromptTokensDetails,
    TokenizeRequest,
    Usage,
)
from model.chat import ChatFormat
from model.generation_defaults import GenerationDefaults
from model.labels import trim_padding
from model.tokenizer import Tokenizer

NO_TOOLS = ToolUse()


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
    num_drafts: int = 0
    """Tokens to guess ahead in a step, for requests that leave it open."""
    max_concurrent_requests: int
    """Of this ingress."""
    max_body_bytes: int
    sse_keep_alive_s: float = 15.0
    """How long a stream may be silent, seconds; then a comment is sent."""


@dataclass(frozen=True)
class Work:
    """A request, checked and tokenised: one journal per choice that is drawn, prompt-major."""

    body: GenerationRequest
    journals: list[Journal]
    rules: TextRules
    echoes: tuple[str | None, ...]
    """For each prompt, what its choices' texts begin with."""
    form_field: str | None = None
    """The field that gives the answers a form, if one does."""

    @property
    def prompts(self) -> list[Journal]:
        """The first journal of each prompt."""
        return self.journals[:: self.body.num_drawn]

    def echo(self, index: int) -> str | None:
        """What the text of a journal's choice begins with."""
        return self.echoes[index // self.body.num_drawn]

    def usage(self, num_emitted: int) -> Usage:
        """After so many tokens of answers. A prompt counts once, however many choices it has."""
        num_prompt = sum(len(journal.prompt_ids) for journal in self.prompts)
        num_cached = sum(journal.num_reused or 0 for journal in self.prompts)
        return Usage(
            prompt_tokens=num_prompt,
            completion_tokens=num_emitted,
            total_tokens=num_prompt + num_emitted,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=num_cached),
        )


class Preparer:
    """Turns bodies into work for one served model. Immutable."""

    def __init__(self, tokenizer: Tokenizer, chat: ChatFormat, settings: ApiSettings) -> None:
        self._tokenizer = tokenizer
        self._chat = chat
        self._settings = settings
        self._read = PromptReader(
            tokenizer, chat, vocab_size=settings.vocab_size, max_model_len=settings.max_model_len
        )

    def completion(self, body: CompletionRequest, client: str) -> Work:
        """Work of a plain completion; client is who asks. Raises RequestError, SamplingError."""
        given = prompts_of(body.prompt, "prompt")
        if len(given) * body.num_drawn > MAX_CHOICES:  # before they cost anything
            field = "n" if body.best_of is None else "best_of"
            raise RequestError(
                400,
                f"{len(given)} prompts x {field}={body.num_drawn} exceed {MAX_CHOICES} choices",
                param=field,
            )
        echoed = body.logprobs if body.echo else None
        of_prompt = [number for number in (body.prompt_logprobs, echoed) if number is not None]
        return self._work(
            body,
            client,
            [
                self._read.ids(prompt, "prompt", has_begin=body.add_special_tokens)
                for prompt in given
            ],
            echoes=[self._read.text(prompt) for prompt in given] if body.echo else None,
            continues_text=True,
            max_tokens=body.max_tokens,
            num_logprobs=body.logprobs,
            num_prompt_logprobs=max(of_prompt, default=None),
        )

    def chat(self, body: ChatCompletionRequest, client: str) -> Work:
        """Work of a chat completion; client is who asks. Raises RequestError, SamplingError."""
        use = tool_use(body, self._chat)
        return self._work(
            body,
            client,
            [self._chat_ids(body, use)],
            echoes=None,
            continues_text=body.continue_final_message,
            max_tokens=body.max_completion_tokens or body.max_tokens,
            num_logprobs=body.top_logprobs if body.logprobs else None,
            num_prompt_logprobs=body.prompt_logprobs,
            use=use,
        )

    def chat_ids(self, body: ChatCompletionRequest) -> tuple[int, ...]:
        """Ids of the prompt of a chat completion, also where the context does not hold them.

        Raises RequestError, also for more characters than could be tokens of the context.
        """
        return self._chat_ids(body, tool_use(body, self._chat))

    def tokens(self, body: TokenizeRequest) -> tuple[int, ...]:
        """Ids of a text or a conversation. Raises RequestError."""
        self._check_supported(body)
        if body.messages is None:
            if body.prompt is None:
                raise RequestError(
                    400, "prompt: a prompt or messages must be given", param="prompt"
                )
            has_begin = body.add_special_tokens is not False
            return self._read.ids(body.prompt, "prompt", has_begin=has_begin)
        if body.add_special_tokens:
            raise RequestError(
                400,
                "add_special_tokens: a conversation has what its chat template writes",
                param="add_special_tokens",
            )
        return self._read.chat_ids(body.messages, body, shown=shown_tools(body.tools, self._chat))

    def text(self, body: DetokenizeRequest) -> str:
        """Text of ids. Raises RequestError."""
        self._check_supported(body)
        context = self._settings.max_model_len
        if len(body.tokens) > context:
            raise RequestError(
                400,
                f"{len(body.tokens)} tokens exceed the context of {context}",
                param="tokens",
                code="context_length_exceeded",
            )
        self._read.check_ids(body.tokens, "tokens")
        return self._tokenizer.decode(body.tokens)

    def check_model(self, model_id: str | None) -> None:
        """Refuse a model that is not the one that is served."""
        if model_id is not None and model_id != self._settings.model_id:
            raise RequestError(
                404,
                f"the model {model_id[:1_000]!r} is not served here; there is "
                f"{self._settings.model_id!r}",
                kind="not_found_error",
                param="model",
                code="model_not_found",
            )

    def classification(self, body: ClassifyRequest) -> list[Sequence[int]]:
        """Ids of the inputs, without padding at their ends. Raises RequestError."""
        context = self._settings.max_model_len
        prompts = []
        for given in prompts_of(body.input, "input"):
            ids = self._read.ids(given, "input")
            prompt = trim_padding(ids, self._settings.pad_token_id)
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
        self._check_supported(body)
        model_id, classifies = self._settings.model_id, self._settings.labels is not None
        if classifies and not isinstance(body, ClassifyRequest):
            message = f"{model_id} classifies and does not generate: use /v1/classify"
            raise RequestError(400, message, param="model", code="unsupported")
        if not classifies and isinstance(body, ClassifyRequest):
            message = f"{model_id} generates and has no score head to classify with"
            raise RequestError(400, message, param="model", code="unsupported")

    def _chat_ids(self, body: ChatCompletionRequest, use: ToolUse) -> tuple[int, ...]:
        return self._read.chat_ids(
            body.messages, body, shown=use.shown, calls_tools=use.grammar is not None
        )

    def _check_supported(self, body: ModelRequest) -> None:
        self.check_model(body.model)
        unsupported = body.first_unsupported()
        if unsupported:
            raise RequestError(
                400, f"{unsupported} is not supported yet", param=unsupported, code="unsupported"
            )

    def _work(
        self,
        body: GenerationRequest,
        client: str,
        prompts: Sequence[tuple[int, ...]],
        *,
        echoes: Sequence[str] | None,
        continues_text: bool,
        max_tokens: int | None,
        num_logprobs: int | None,
        num_prompt_logprobs: int | None,
        use: ToolUse = NO_TOOLS,
    ) -> Work:
        """One journal per prompt and choice. max_tokens: None for the rest of the context; 0 for
        the prompt alone. echoes: texts of the prompts, where answers are to begin with them.
        """
        settings = self._settings
        kept = [self._truncated(body, prompt, max_tokens) for prompt in prompts]
        if echoes is not None:
            echoes = [
                text if ids == whole else self._tokenizer.decode(list(ids))
                for text, ids, whole in zip(echoes, kept, prompts, strict=True)
            ]
        chooses = body.num_drawn > body.n
        params = sampling_params(
            body,
            self._tokenizer,
            defaults=settings.defaults,
            eos_token_ids=settings.eos_token_ids,
            vocab_size=settings.vocab_size,
            logprobs=0 if chooses and num_logprobs is None else num_logprobs,
            prompt_logprobs=num_prompt_logprobs,
        )
        grammar = use.grammar or grammar_spec(
            body.response_format, body.structured_outputs, continues_text=continues_text
        )
        drafts = body.num_speculative_tokens
        journals = [
            Journal(
                prompt,
                replace(params, choice=choice, max_tokens=self._room(body, prompt, max_tokens)),
                client=client,
                priority=body.priority,
                cache_salt=body.cache_salt,
                grammar=grammar,
                num_drafts=settings.num_drafts if drafts is None else drafts,
            )
            for prompt in kept
            for choice in range(body.num_drawn)
        ]
        resume(body, journals, vocab_size=settings.vocab_size)
        own_ends = () if body.ignore_eos else settings.eos_token_ids
        rules = TextRules(
            continues_text=continues_text,
            stop_strings=body.stop_strings,
            stop_token_ids=frozenset(body.stop_token_ids).difference(own_ends),
            shows_stop=body.include_stop_str_in_output,
            num_logprobs=num_logprobs,
            is_prompt_only=max_tokens == 0,
            calls=use.rules,
        )
        return Work(
            body,
            journals,
            rules,
            tuple(echoes or [None] * len(kept)),
            form_field="tools" if use.grammar else form_field(body),
        )

    def _truncated(
        self, body: GenerationRequest, prompt: tuple[int, ...], max_tokens: int | None
    ) -> tuple[int, ...]:
        """What a request wants to keep of a prompt: its end."""
        match body.truncate_prompt_tokens:
            case None:
                return prompt
            case -1:
                return prompt[-max(1, self._settings.max_model_len - max(1, max_tokens or 1)) :]
            case number:
                return prompt[-number:]

    def _room(
        self, body: GenerationRequest, prompt: tuple[int, ...], max_tokens: int | None
    ) -> int:
        """New tokens at most, at least one: what is asked for, or less if the context ends."""
        context = self._settings.max_model_len
        if max_tokens is not None and max_tokens > context:
            is_newer = isinstance(body, ChatCompletionRequest) and body.max_completion_tokens
            field = "max_completion_tokens" if is_newer else "max_tokens"
            raise RequestError(
                400, f"{field}: {max_tokens} exceeds the context of {context} tokens", param=field
            )
        room = context - len(prompt)
        if room < 1:
            raise RequestError(
                400,
                f"the prompt has {len(prompt)} tokens; the context of {context} must also "
                "hold at least one new token",
                param="messages" if isinstance(body, ChatCompletionRequest) else "prompt",
                code="context_length_exceeded",
            )
        return room if max_tokens is None else min(room, max(1, max_tokens))

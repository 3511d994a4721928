"""What requests ask over HTTP, in the words of OpenAI's and vLLM's APIs, as far as they are spoken.

Bounds of request fields live here and nowhere else, but for what only the model and its vocabulary
can tell.
"""

import re
from typing import Annotated, Any, ClassVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from cluster.schema.answer_form import ResponseFormat, StructuredOutputs

MAX_CHOICES = 128
"""Completions one request may ask for: prompts x n. Also the texts it may have classified."""
MAX_STOP_STRINGS = 16
MAX_STOP_TOKENS = 64
MAX_SEED = 2**63 - 1
MAX_LOGPROBS = 20
"""Likeliest tokens that may be asked for beside each token; OpenAI's bound."""
MAX_LOGIT_BIASES = 1_024
MAX_BAD_WORDS = 128
MAX_ALLOWED_TOKENS = 65_536
MAX_PRIORITY = 1_000
MAX_DRAFTS = 16
"""Tokens that may be guessed ahead in a step."""

TokenId = Annotated[int, Field(ge=0, strict=True)]
TokenIds = Annotated[list[TokenId], Field(fail_fast=True)]
"""fail_fast: the first wrong item refuses the list; a long one must not cost seconds to refuse."""
Prompts = (
    str | TokenIds | Annotated[list[str | TokenIds], Field(fail_fast=True, max_length=MAX_CHOICES)]
)
"""Text or token ids, of one prompt or of several."""
StopString = Annotated[str, Field(min_length=1, max_length=1_000)]
BadWord = Annotated[str, Field(min_length=1, max_length=200)]


def _check_biases(given: Any) -> dict[int, float]:
    """By id. JSON's keys are text; the first wrong one refuses them all, as above."""
    if not isinstance(given, dict):
        raise ValueError('must be an object of token ids and their biases, as {"42": -100}')
    if len(given) > MAX_LOGIT_BIASES:
        raise ValueError(f"{len(given)} ids are more than {MAX_LOGIT_BIASES}")
    for key, bias in given.items():
        if not _DECIMAL.fullmatch(str(key)):
            raise ValueError(f"the key {str(key)[:80]!r} is not a token id")
        is_number = isinstance(bias, int | float) and not isinstance(bias, bool)
        if not (is_number and -100 <= bias <= 100):
            raise ValueError(f"the bias of token {key} must be a number in [-100, 100]")
    return {int(key): float(bias) for key, bias in given.items()}


_DECIMAL = re.compile(r"0|[1-9][0-9]{0,9}")
LogitBias = Annotated[dict[int, float], BeforeValidator(_check_biases)]


def _false_is_none(given: Any) -> Any:
    """Some clients switch a number off by false."""
    return None if given is False else given


NumLogprobs = Annotated[
    Annotated[int, Field(ge=0, le=MAX_LOGPROBS, strict=True)] | None,
    BeforeValidator(_false_is_none),
]

NOT_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "echo": (False,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "logprob_token_ids": (),
    "prompt_embeds": (),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
    "use_beam_search": (False,),
}
"""Fields of OpenAI's and vLLM's that would change the answer but are not served yet, with the
values that ask for nothing. Any other value is refused rather than silently ignored."""

IGNORED = frozenset(
    {
        "access_programs",
        "background_options",
        "cache_control",
        "context_management",
        "detokenize",
        "diagnostics",
        "early_stopping",
        "image",
        "inference_geo",
        "kv_transfer_params",
        "length_penalty",
        "metadata",
        "moderation",
        "output_config",
        "prediction",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "reasoning",
        "reasoning_effort",
        "request_id",
        "safety_identifier",
        "service_tier",
        "speed",
        "store",
        "stream_interval",
        "stream_options",
        "user_profile_id",
        "verbosity",
        "vllm_xargs",
        "workspace_id",
    }
)
"""Fields of OpenAI's, Anthropic's and vLLM's that are ignored like unknown ones where an API does
not take them, but counted by name."""

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
    """Send the usage in a last chunk without choices."""
    continuous_usage_stats: bool = False
    """With include_usage, send it as it stands in every other chunk, too."""


class ModelRequest(BaseModel):
    """What all requests to the model share. Unknown fields are ignored."""

    model_config = ConfigDict(extra="allow")
    not_supported: ClassVar[dict[str, tuple[Any, ...]]]

    model: str | None = None
    """Served model id; the one model there is when left out."""
    user: str | None = None
    """Who asks, where no key says so: heads serve the users, or keys, that wait evenly."""

    @model_validator(mode="before")
    @classmethod
    def _null_is_the_default(cls, data: Any) -> Any:
        """Clients send null for what they leave open."""
        if isinstance(data, dict):
            return {key: value for key, value in data.items() if value is not None}
        return data

    def ignored(self) -> list[str]:
        """Names of the fields that mean nothing here."""
        return [name for name in self.model_extra or {} if name not in self.not_supported]

    def first_unsupported(self) -> str | None:
        """Name of a field that asks for something not served yet, or None."""
        for name, value in (self.model_extra or {}).items():
            if name in self.not_supported and not any(
                value == off and isinstance(value, bool) == isinstance(off, bool)
                for off in self.not_supported[name]
            ):
                return name
        return None


class GenerationRequest(ModelRequest):
    """What completions and chat completions share."""

    not_supported = NOT_SUPPORTED

    stream: bool = False
    stream_options: StreamOptions | None = None
    n: int = Field(default=1, ge=1, le=MAX_CHOICES)
    """Answers to each prompt."""
    best_of: int | None = Field(default=None, ge=1, le=MAX_CHOICES)
    """Answers to draw, at least n, of which those n are returned, the best first, whose tokens are
    the likeliest on average. All of them count as usage. Not with stream."""
    seed: int | None = Field(default=None, ge=-MAX_SEED - 1, le=MAX_SEED)
    """Left out: drawn by the server."""

    temperature: float = Field(default=1.0, ge=0.0, le=2.0, allow_inf_nan=False)
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    top_k: int = Field(default=0, ge=-1, lt=2**31)
    """0 or -1 keeps all tokens."""
    min_p: float = Field(default=0.0, ge=0.0, le=1.0)
    typical_p: float = Field(default=1.0, gt=0.0, le=1.0)
    repetition_penalty: float = Field(default=1.0, ge=0.01, le=100.0)
    presence_penalty: float = Field(default=0.0, ge=-2.0, le=2.0)
    """Taken off the logits of all tokens that the answer holds."""
    frequency_penalty: float = Field(default=0.0, ge=-2.0, le=2.0)
    """Taken off a token's logit as often as the answer holds the token."""
    logit_bias: LogitBias = {}
    """Added to the logits of these ids."""
    bad_words: Annotated[list[BadWord], Field(fail_fast=True, max_length=MAX_BAD_WORDS)] = []
    """Words that must not come, at the beginning of a word or within one. As in vLLM a word is
    recognised by the tokens that the tokenizer makes of it, not by its letters."""
    allowed_token_ids: (
        Annotated[list[TokenId], Field(fail_fast=True, min_length=1, max_length=MAX_ALLOWED_TOKENS)]
        | None
    ) = None
    """Only these may be drawn; the end token is one of them only if it is named."""
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None

    min_tokens: int = Field(default=0, ge=0, lt=2**31)
    """New tokens before an end token or one of stop_token_ids may come."""
    ignore_eos: bool = False
    """Go on past the model's own end tokens."""
    stop_token_ids: Annotated[list[TokenId], Field(fail_fast=True, max_length=MAX_STOP_TOKENS)] = []
    """Ids that end the answer like the model's own end tokens."""
    stop: (
        StopString
        | Annotated[list[StopString], Field(fail_fast=True, max_length=MAX_STOP_STRINGS)]
        | None
    ) = None
    """Strings that end the answer."""
    include_stop_str_in_output: bool = False
    """Whether the text includes the stop string, or the text of the stop token, that ended it."""

    prompt_logprobs: NumLogprobs = None
    """Report the log-probabilities of the prompt's tokens and of so many likeliest ones in the
    place of each. Not with stream."""
    return_token_ids: bool = False
    """Report the ids of prompt and answer."""
    resume_token_ids: TokenIds = []
    """What a stream that broke off has told of its answer (see return_token_ids): it goes on behind
    these, whose text is not told again. All else must be asked for as it was, seed included.
    Only for one streamed choice without log-probabilities."""
    return_tokens_as_token_ids: bool = False
    """Spell tokens `token_id:42` in log-probabilities, so that none is like another."""
    truncate_prompt_tokens: int | None = Field(default=None, ge=-1, lt=2**31)
    """Keep only so many of the prompt's last tokens; with -1, so many that the answer fits."""

    priority: int = Field(default=0, ge=-MAX_PRIORITY, le=MAX_PRIORITY)
    """Lower goes first, among the requests of one client."""
    cache_salt: str = Field(default="", max_length=1_024)
    """Only requests with the same salt share computed prefixes, so that nobody can find out by a
    reply's speed what others have asked."""
    num_speculative_tokens: int | None = Field(default=None, ge=0, le=MAX_DRAFTS)
    """Tokens to guess ahead in a step, from what the text has said before. It changes when tokens
    come, never which. Left out: as the server is set."""

    @field_validator("stream_options")
    @classmethod
    def _needs_a_stream(
        cls, options: StreamOptions | None, others: ValidationInfo
    ) -> StreamOptions | None:
        if options is not None and not others.data.get("stream"):
            raise ValueError("only allowed with stream: true")
        return options

    @field_validator("best_of")
    @classmethod
    def _draws_enough_to_choose_from(
        cls, best_of: int | None, others: ValidationInfo
    ) -> int | None:
        if best_of is not None and best_of < others.data.get("n", 1):
            raise ValueError(f"{best_of} is less than n ({others.data['n']})")
        if best_of is not None and best_of > others.data.get("n", 1) and others.data.get("stream"):
            raise ValueError("cannot be streamed: the best is known when all have ended")
        return best_of

    @field_validator("truncate_prompt_tokens")
    @classmethod
    def _keeps_something(cls, number: int | None) -> int | None:
        if number == 0:
            raise ValueError("must be at least 1, or -1")
        return number

    @field_validator("prompt_logprobs")
    @classmethod
    def _needs_no_stream(cls, number: int | None, others: ValidationInfo) -> int | None:
        if number is not None and others.data.get("stream"):
            raise ValueError("not available with stream: true")
        return number

    @property
    def num_drawn(self) -> int:
        """Answers to draw for each prompt."""
        return self.best_of or self.n

    @property
    def stop_strings(self) -> tuple[str, ...]:
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


class CompletionRequest(GenerationRequest):
    """Body of POST /v1/completions."""

    prompt: Prompts
    add_special_tokens: bool = True
    """Begin a prompt that is text with the begin token."""
    echo: bool = False
    """Begin the text with the prompt, and the log-probabilities, if asked for, with those of its
    tokens."""
    max_tokens: int = Field(default=16, ge=0)
    """0 only with echo."""
    logprobs: NumLogprobs = None
    """Report each token's log-probability and those of so many likeliest ones in its place. All
    are the model's own, before penalties, bias and temperature."""

    @field_validator("max_tokens")
    @classmethod
    def _has_something_to_say(cls, number: int, others: ValidationInfo) -> int:
        if not number and not others.data.get("echo"):
            raise ValueError("must be at least 1, or 0 with echo: true")
        return number


class RebalanceRequest(BaseModel):
    """Body of POST /admin/rebalance."""

    model_config = ConfigDict(extra="forbid")

    dry_run: bool = False
    """Only say what would move."""


class ClassifyRequest(ModelRequest):
    """Body of POST /classify and /v1/classify."""

    not_supported = NOT_SUPPORTED_TO_CLASSIFY

    input: Prompts
    use_activation: bool = True
    """Left true, the reply has probabilities; false asks for the score head's logits."""

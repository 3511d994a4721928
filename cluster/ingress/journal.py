"""The ingress's record of one choice of a request: enough to tell its story, and to repeat it."""

from dataclasses import dataclass, field
from typing import Literal

from model.grammar_spec import GrammarSpec
from model.sampling_params import SamplingParams, TokenLogprobs

Finish = Literal["stop", "length"]


@dataclass(frozen=True)
class News:
    """What a head has sent of one choice at once.

    logprobs:        of token_ids, where the parameters ask for them.
    prompt_logprobs: of the prompt from its second token on, with the first tokens.
    num_reused:      with the first tokens, how many of the prompt's were found in the cache.
    """

    token_ids: tuple[int, ...]
    finish: Finish | None = None
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    num_reused: int | None = None


@dataclass(eq=False)
class Journal:
    """What was asked for, seed included, and what has come. Owned by the event loop."""

    prompt_ids: tuple[int, ...]
    params: SamplingParams
    client: str = ""
    """Who asks, not readable as a name or a key; clients share a head evenly."""
    priority: int = 0
    """Lower goes first among the requests of a client."""
    cache_salt: str = field(default="", repr=False)
    """Only requests with the same salt share computed prefixes."""
    grammar: GrammarSpec | None = None
    """The form that the answer must have."""
    num_drafts: int = 0
    """Tokens to guess ahead in a step."""

    emitted_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list, repr=False)
    """Of emitted_ids, where the parameters ask for them."""
    prompt_logprobs: tuple[TokenLogprobs, ...] = field(default=(), repr=False)
    num_reused: int | None = None
    """Tokens of the prompt that were found in the cache; None before the first token."""
    finish: Finish | None = None
    """Why the head ended it."""

    @property
    def known_ids(self) -> tuple[int, ...]:
        """The prompt and what has been emitted after it."""
        return (*self.prompt_ids, *self.emitted_ids)

    def record(self, news: News) -> None:
        """Append what a head has sent. Nothing may follow an end.

        What belongs to the prompt is the first head's to tell: another that goes on with the
        journal takes what was emitted for prompt, too.
        """
        assert self.finish is None, f"{news} after the end ({self.finish})"
        if not self.emitted_ids:
            self.prompt_logprobs = news.prompt_logprobs
        if self.num_reused is None and news.num_reused is not None:
            # a resumed answer begins with emitted ids, which a head may find in its cache as well
            self.num_reused = min(news.num_reused, len(self.prompt_ids))
        self.emitted_ids += news.token_ids
        self.logprobs += news.logprobs
        self.finish = news.finish

    def cut(self, num_tokens: int) -> None:
        """Forget the ids after so many: the answer ends there."""
        del self.emitted_ids[num_tokens:]
        del self.logprobs[num_tokens:]

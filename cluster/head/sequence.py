"""One request inside a head: what is known, what is computed, when it ends. Plain data."""

from collections.abc import Iterable
from collections.abc import Sequence as Ids
from dataclasses import dataclass, field, replace
from typing import Literal

from cluster.head.drafts import LookupDrafter
from model.blocks import BlockTable, Key
from model.grammar import GrammarMatcher
from model.row import Row
from model.sampling_params import SamplingParams, TokenLogprobs

Finish = Literal["stop", "length"]


@dataclass(eq=False)
class Sequence:
    """Token ids of one completion and how far its keys and values are computed.

        token_ids   |--- prompt ---|--- emitted ---|
                    |- num_computed -|- the next step's -|

    Owned by the engine's thread from `Engine.submit` on.
    """

    prompt_ids: Ids[int]
    params: SamplingParams
    emitted_ids: Ids[int] = ()
    """Of its completion, what another head has emitted before."""
    client: str = ""
    """Who asks; clients share a head evenly."""
    priority: int = 0
    """Lower goes first among the requests of a client."""
    cache_salt: str = ""
    """Only requests with the same salt share computed prefixes."""

    drafter: LookupDrafter | None = None
    """Guesses its next tokens, where the request wants that."""
    matcher: GrammarMatcher | None = None
    """Its place in a grammar, where the answer must have a form."""

    token_ids: list[int] = field(init=False)
    row: Row = field(init=False, repr=False)
    """The same for the sampler."""
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list, repr=False)
    """Of the prompt's tokens from the second on, as far as they are computed, where wanted."""
    num_computed: int = 0
    table: BlockTable = field(init=False, repr=False)
    """While it runs."""
    num_reused: int | None = None
    """Tokens of the prompt that were not computed when it began, since others had."""
    keys: list[Key] = field(default_factory=list, repr=False)
    """Of its full blocks; see `prefix.PrefixCache`, whose own the next two are as well."""
    num_published: int = 0
    has_published_prompt: bool = False
    arrival: int = 0
    """How many were added before it."""
    rank: tuple[float, int] = (0.0, 0)
    """Where it stands among the requests of its client; see `waiting.WaitingQueue`."""

    def __post_init__(self) -> None:
        self.token_ids = [*self.prompt_ids, *self.emitted_ids]
        self.row = Row(self.params, self.token_ids, len(self.prompt_ids))

    @property
    def max_len(self) -> int:
        """Tokens at most, prompt included."""
        return len(self.prompt_ids) + self.params.max_tokens

    @property
    def num_to_compute(self) -> int:
        return len(self.token_ids) - self.num_computed

    @property
    def num_emitted(self) -> int:
        return len(self.token_ids) - len(self.prompt_ids)

    @property
    def num_emitted_here(self) -> int:
        """Without what another head has emitted."""
        return self.num_emitted - len(self.emitted_ids)

    def follow(self, matcher: GrammarMatcher, end_ids: Iterable[int]) -> None:
        """Let the answer have a form, before anything is emitted here. It then ends where the form
        may end, with one of end_ids, whatever else ends it.

        Raises GrammarError where what was emitted before has another form.
        """
        matcher.accept(*self.emitted_ids)
        stop_token_ids = tuple(sorted({*self.params.stop_token_ids, *end_ids}))
        self.params = replace(self.params, stop_token_ids=stop_token_ids)
        self.row = Row(self.params, self.token_ids, len(self.prompt_ids))
        self.matcher = matcher

    def append(self, token_id: int) -> None:
        """One more token, known but not computed. Raises GrammarError if it must not come."""
        if self.matcher:
            self.matcher.accept(token_id)
        self.token_ids.append(token_id)

    @property
    def finish(self) -> Finish | None:
        """Why the sequence has ended, or None while it has not."""
        if self.num_emitted and self.token_ids[-1] in self.params.stop_token_ids:
            return "stop"
        return "length" if self.num_emitted >= self.params.max_tokens else None

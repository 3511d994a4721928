"""A thousand requests of all kinds through an engine whose cache is far too small for them."""

import gc
import random
import re
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Sequence as Many
from dataclasses import dataclass

import psutil
import pytest

from cluster.head.drafts import LookupDrafter
from cluster.head.events import Event
from cluster.head.sequence import Sequence
from model import Mixtral
from model.grammar import Grammar, GrammarCompiler
from model.grammar_spec import GrammarSpec
from model.sampling_params import SamplingParams
from tests.cluster_fakes import Head

pytestmark = pytest.mark.timeout(1_800)

NUM_REQUESTS = 1_000
AT_ONCE = 40
DEADLINE_S = 300.0
FORM = r"(Tom|Lily) (is|was) [1-9][0-9]? years old\."
MAX_GROWTH_BYTES = 48 << 20
"""Of the process between a tenth of the run and its end: what allocators keep, but no leak."""


@dataclass(frozen=True)
class Request:
    """Some choices of one prompt."""

    choices: list[Sequence]
    has_form: bool
    aborted_after: int | None
    """Its own events until it leaves."""


def make_request(
    rng: random.Random, stories: list[list[int]], grammar: Grammar, compiler: GrammarCompiler
) -> Request:
    story = [token_id for ids in rng.sample(stories, 4) for token_id in ids]
    if rng.random() < 0.3:
        story = [token_id for ids in stories[:4] for token_id in ids]  # a prefix that many share
    length = rng.randint(1, 500)
    has_form = rng.random() < 0.15
    num_choices = rng.choice([1, 1, 1, 2, 4])
    num_drafts = rng.choice([0, 0, 4])
    shared = {
        "max_tokens": rng.randint(1, min(60, 512 - length) if not has_form else 12),
        "temperature": rng.choice([0.0, 0.8]),
        "top_p": rng.choice([1.0, 0.9]),
        "presence_penalty": rng.choice([0.0, 0.5]),
        "frequency_penalty": rng.choice([0.0, 0.5]),
        "repetition_penalty": rng.choice([1.0, 1.2]),
        "logprobs": rng.choice([None, None, 3]),
        "seed": rng.randint(0, 100),
        "stop_token_ids": (2,),
    }
    choices = []
    for choice in range(num_choices):
        sequence = Sequence(
            story[:length],
            SamplingParams(choice=choice, **shared),
            client=rng.choice("abc"),
            priority=rng.choice([0, 0, 1]),
            drafter=LookupDrafter(num_drafts) if num_drafts else None,
        )
        if has_form:
            sequence.follow(grammar.matcher(), compiler.end_ids)
        choices.append(sequence)
    aborted_after = rng.randint(0, 20) if rng.random() < 0.2 else None
    return Request(choices, has_form, aborted_after)


class Ledger:
    """An outbox that keeps what is checked at the end, and says when a request is over."""

    def __init__(self, head: Head) -> None:
        self._head = head
        self._changed = threading.Condition()
        self.requests: dict[int, Request] = {}
        """By number: those that are in progress."""
        self._num_events: Counter[int] = Counter()
        self._num_open: Counter[int] = Counter()
        self.left: set[int] = set()
        self.emitted: dict[int, list[int]] = defaultdict(list)
        self.num_logprobs: Counter[int] = Counter()
        self.finish: dict[int, str | None] = {}
        self.errors: list[str] = []

    def add(self, number: int, request: Request) -> None:
        """Submit a request."""
        self.requests[number] = request
        self._num_open[number] = len(request.choices)
        for choice, sequence in enumerate(request.choices):
            self._head.engine.submit(self, self.key(number, choice), sequence)

    @staticmethod
    def key(number: int, choice: int) -> int:
        return number * 8 + choice

    def put(self, events: Many[Event]) -> None:
        with self._changed:
            for event in events:
                self._note(event)
            self._changed.notify_all()

    def wait_for(self, numbers: range) -> None:
        """Return once these requests are over."""
        with self._changed:
            is_over = self._changed.wait_for(
                lambda: all(n in self.left or not self._num_open[n] for n in numbers), DEADLINE_S
            )
        assert is_over, f"requests {numbers} are not all over"

    def _note(self, event: Event) -> None:
        number = event.key // 8
        self.emitted[event.key] += event.token_ids
        self.num_logprobs[event.key] += len(event.logprobs)
        if event.error:
            self.errors.append(event.error)
        if event.finish or event.error:
            self.finish[event.key] = event.finish
            self._num_open[number] -= 1
        self._num_events[number] += 1
        request = self.requests[number]
        after = request.aborted_after
        if after is not None and self._num_events[number] > after and number not in self.left:
            self.left.add(number)
            for choice in range(len(request.choices)):
                self._head.engine.abort(self, self.key(number, choice))


def check(ledger: Ledger, number: int, mixtral: Mixtral) -> int:
    """That a request got what it asked for. Returns its choices, none if it has left."""
    request = ledger.requests[number]
    if number in ledger.left:
        return 0
    for choice, sequence in enumerate(request.choices):
        key = ledger.key(number, choice)
        emitted = ledger.emitted.pop(key)
        assert 1 <= len(emitted) <= sequence.params.max_tokens
        assert ledger.finish.pop(key) == ("stop" if emitted[-1] == 2 else "length")
        if sequence.params.logprobs is not None:
            assert ledger.num_logprobs[key] == len(emitted)
        if request.has_form and emitted[-1] == 2:
            text = mixtral.tokenizer.decode(emitted[:-1])
            assert re.fullmatch(FORM, text), text
    return len(request.choices)


def test_a_thousand_requests_through_a_small_cache(mixtral: Mixtral, stories: list[str]) -> None:
    rng = random.Random(7)
    compiler = GrammarCompiler(mixtral.tokenizer, (2,))
    grammar = compiler.compile(GrammarSpec("regex", FORM))
    ids = [mixtral.tokenizer.encode_prompt(story) for story in stories]
    # 60 blocks of 16 tokens: not two of the longest at once
    head = Head(
        mixtral,
        num_blocks=60,
        block_size=16,
        max_running=16,
        max_tokens_per_step=128,
        max_model_len=512,
        grammars=compiler,
    )
    ledger = Ledger(head)
    process = psutil.Process()
    rss_early = num_choices = 0
    started = time.monotonic()
    with head.running():
        for first in range(0, NUM_REQUESTS, AT_ONCE):
            numbers = range(first, min(first + AT_ONCE, NUM_REQUESTS))
            for number in numbers:
                ledger.add(number, make_request(rng, ids, grammar, compiler))
            ledger.wait_for(numbers)
            num_choices += sum(check(ledger, number, mixtral) for number in numbers)
            ledger.requests.clear()
            if first == NUM_REQUESTS // 10 // AT_ONCE * AT_ONCE:
                gc.collect()
                rss_early = process.memory_info().rss
    seconds = time.monotonic() - started
    head.assert_all_free()
    gc.collect()
    growth = process.memory_info().rss - rss_early

    assert ledger.errors == []
    steps = head.metrics.steps
    num_preempted = sum(step.num_preempted for step in steps)
    print(
        f"\n{NUM_REQUESTS} requests in {seconds:.0f} s: {len(ledger.left)} aborted, {num_choices} "
        f"choices of the others; {len(steps)} steps, {num_preempted} preemptions, "
        f"{sum(step.num_reused for step in steps)} tokens reused, "
        f"{sum(step.num_accepted for step in steps)} of "
        f"{sum(step.num_drafted for step in steps)} drafts accepted; memory grew by "
        f"{growth / 2**20:.1f} MiB"
    )
    assert num_preempted > 0
    assert growth <= MAX_GROWTH_BYTES

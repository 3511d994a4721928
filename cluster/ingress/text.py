"""Token ids of one choice to what its reader gets, as it comes: text, and reports of its tokens."""

from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator
from contextlib import aclosing
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Literal

from cluster.ingress.journal import Finish, Journal
from cluster.ingress.logprobs import TokenReport, report, report_prompt
from cluster.ingress.tool_calls import CallDelta, CallReader, CallRules
from model.chat import CALLS_MARKER
from model.stop import StopMatcher
from model.tokenizer import StreamDecoder, Tokenizer

GenerateIds = Callable[[Journal], AsyncGenerator[tuple[int, ...], None]]
"""Runs a journal on a head; yields new ids as they come and records them."""


@dataclass(frozen=True)
class TextRules:
    """How the ids of a request's choices become text."""

    continues_text: bool
    """Whether an answer goes on in the prompt's text (completions) or starts afresh (chat)."""
    stop_strings: tuple[str, ...] = ()
    stop_token_ids: frozenset[int] = frozenset()
    """Those that the request names; the model's own end tokens are no reason to tell."""
    shows_stop: bool = False
    """Whether the text includes what stopped it."""
    num_logprobs: int | None = None
    """How many likeliest tokens to report beside each token; None reports no token."""
    is_prompt_only: bool = False
    """Whether the answer is left out. A head gives one token at least."""
    calls: CallRules | None = None
    """How calls of tools are found in an answer; None where all of it is text."""


@dataclass(frozen=True)
class TextDelta:
    """What is new of a choice.

    text:        of its content.
    finish:      why it ended, if it did.
    stop_reason: the stop string or the named stop token that ended it.
    reports:     of the tokens whose text is all shown now, where log-probabilities are asked for.
    token_ids:   of the answer; with those whose text is held back.
    tool_calls:  what is new of them, in order.
    """

    text: str
    finish: Finish | Literal["tool_calls"] | None = None
    stop_reason: str | int | None = None
    reports: tuple[TokenReport, ...] = ()
    token_ids: tuple[int, ...] = ()
    tool_calls: tuple[CallDelta, ...] = ()

    def in_order(self) -> Iterator[str | CallDelta]:
        """What goes on with the call before, then the text, then calls that begin."""
        begin = next((n for n, call in enumerate(self.tool_calls) if call.id is not None), None)
        yield from self.tool_calls[:begin]
        if self.text:
            yield self.text
        if begin is not None:
            yield from self.tool_calls[begin:]


def joined(deltas: Iterable[TextDelta]) -> TextDelta:
    """All deltas of a choice, of which the last has its end, as one."""
    deltas = list(deltas)
    return TextDelta(
        "".join(delta.text for delta in deltas),
        deltas[-1].finish,
        deltas[-1].stop_reason,
        tuple(each for delta in deltas for each in delta.reports),
        tuple(each for delta in deltas for each in delta.token_ids),
        _whole_calls(each for delta in deltas for each in delta.tool_calls),
    )


def in_order(deltas: Iterable[TextDelta]) -> list[str | CallDelta]:
    """The texts and calls of a choice, each in one piece, in the order in which they came."""
    parts: list[str | CallDelta] = []
    pieces = (piece for delta in deltas for piece in delta.in_order())
    for _, group in groupby(pieces, key=lambda each: -1 if isinstance(each, str) else each.index):
        own = list(group)
        texts = [each for each in own if isinstance(each, str)]
        calls = [each for each in own if not isinstance(each, str)]
        parts += ["".join(texts)] if texts else _whole_calls(calls)
    return parts


def _whole_calls(deltas: Iterable[CallDelta]) -> tuple[CallDelta, ...]:
    """Each call in one piece."""
    return tuple(
        replace(own[0], arguments="".join(each.arguments for each in own))
        for _, group in groupby(deltas, key=lambda each: each.index)
        if (own := list(group))
    )


async def generate_text(
    generate_ids: GenerateIds, journal: Journal, answer: "AnswerText"
) -> AsyncGenerator[TextDelta, None]:
    """Text of one choice; the last item has `finish`.

    A stop string ends the choice at the head, too: closing the ids' iterator aborts them there.
    """
    async with aclosing(generate_ids(journal)) as batches:
        async for _ in batches:
            delta = answer.read()
            if delta is not None:
                yield delta
                if delta.finish:
                    return


class AnswerText:
    """Reads the journal of one choice, whatever comes at once. Owned by one stream.

    A token is reported when all of its text is shown. So of the tokens that make up a stop string
    none is reported that the text does not show, nor is a stop token with a text of its own. An end
    token has no text, and is reported.
    """

    def __init__(
        self, tokenizer: Tokenizer, journal: Journal, rules: TextRules, echo: str | None = None
    ) -> None:
        """echo: the prompt's text, where the answer's is to begin with it."""
        self._tokenizer = tokenizer
        self._journal = journal
        self._rules = rules
        self._decoder = StreamDecoder(tokenizer, continues_text=rules.continues_text)
        self._matcher = StopMatcher(rules.stop_strings, shows_stop=rules.shows_stop)
        self._calls = CallReader(rules.calls) if rules.calls else None
        self._calls_marker_id = rules.calls.marker_id if rules.calls else None
        self._echo = echo
        self._num_read = 0  # ids of the journal that the text and the reports are made of
        self._num_told = 0  # ids of the journal that the reader has
        self._num_known = 0  # characters that are certain, but may be held back for a stop string
        self._num_shown = 0  # characters that the reader has
        self._held: deque[tuple[int, TokenReport]] = deque()
        """Reports, each with the number of characters that must be shown first."""
        self._is_stopped = False
        self._stop_token: int | None = None
        if journal.emitted_ids:  # its reader has what they say
            self.read()
            self._num_told = self._num_read

    def read(self) -> TextDelta | None:
        """What is new in the journal, which is cut where the answer ends.

        None while nothing can be told.
        """
        journal = self._journal
        text = self._read_prompt()
        if self._rules.is_prompt_only:
            journal.cut(0)
            return TextDelta(text, "length", reports=self._reports())
        while not self._is_stopped and self._num_read < len(journal.emitted_ids):
            text += self._read_next()
        journal.cut(self._num_read)
        finish: Finish | None = "stop" if self._is_stopped else journal.finish
        if finish and self._matcher.met is None:
            text += self._flush()
        if self._matcher.met is not None:
            finish = "stop"
        reports = self._reports()
        content, calls = self._parted(text, has_ended=finish is not None)
        if not (content or calls or reports or finish):
            return None
        has_calls = self._calls is not None and self._calls.num_calls > 0
        told, self._num_told = self._num_told, self._num_read
        return TextDelta(
            content,
            "tool_calls" if finish == "stop" and has_calls else finish,
            stop_reason=self._stop_token if self._matcher.met is None else self._matcher.met,
            reports=reports,
            token_ids=tuple(journal.emitted_ids[told:]),
            tool_calls=tuple(calls),
        )

    def _parted(self, text: str, *, has_ended: bool) -> tuple[str, list[CallDelta]]:
        """Content and calls of new text."""
        if self._calls is None:
            return text, []
        content, calls = self._calls.push(text)
        if has_ended:
            rest, more = self._calls.flush()
            content, calls = content + rest, calls + more
        return content, calls

    def _read_prompt(self) -> str:
        """The prompt's text, once, if it is to be shown."""
        text, self._echo = self._echo, None
        if text is None:
            return ""
        self._num_known = self._num_shown = len(text)
        journal, num_top = self._journal, self._rules.num_logprobs
        if num_top is not None:
            reports = report_prompt(
                self._tokenizer, journal.prompt_ids, journal.prompt_logprobs, num_top
            )
            self._held.extend((0, each) for each in reports)
        return text

    def _read_next(self) -> str:
        """Text that can be shown because of the next id."""
        journal, index = self._journal, self._num_read
        token_id = journal.emitted_ids[index]
        self._num_read += 1
        is_last = self._num_read == len(journal.emitted_ids)
        # the head may have stop tokens of its own, at which a grammar lets an answer end
        is_stop = token_id in journal.params.stop_token_ids
        if is_stop or (is_last and journal.finish == "stop"):
            self._is_stopped = True
            self._stop_token = token_id if token_id in self._rules.stop_token_ids else None
            if self._decoder.bytes_of(token_id) and not self._rules.shows_stop:
                return ""
        return self._push(index)

    def _push(self, index: int) -> str:
        journal, decoder = self._journal, self._decoder
        token_id, offset = journal.emitted_ids[index], self._num_known
        wants_report = self._rules.num_logprobs is not None
        one = report(decoder, token_id, journal.logprobs[index], offset) if wants_report else None
        text = decoder.push(token_id)
        if token_id == self._calls_marker_id:
            text += CALLS_MARKER  # a control token has no text of its own
        self._num_known += len(text)
        if one is not None:
            # a character that is not whole yet will be one more
            self._held.append((self._num_known + decoder.is_within_character, one))
        return self._show(text)

    def _show(self, text: str) -> str:
        shown, is_met = self._matcher.push(text)
        self._is_stopped = self._is_stopped or is_met
        self._num_shown += len(shown)
        return shown

    def _flush(self) -> str:
        """What was held back, when no token follows any more."""
        text = self._show(self._decoder.flush())
        if self._matcher.met is None:
            rest = self._matcher.flush()
            self._num_shown += len(rest)
            text += rest
        return text

    def _reports(self) -> tuple[TokenReport, ...]:
        """Of the tokens whose text is all shown, once."""
        reports = []
        while self._held and self._held[0][0] <= self._num_shown:
            reports.append(self._held.popleft()[1])
        return tuple(reports)

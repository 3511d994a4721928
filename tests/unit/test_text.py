"""Ids become text without a cut character, and no part of a stop string ever gets out."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cluster.ingress.journal import Finish, Journal, News
from cluster.ingress.merge import merge
from cluster.ingress.text import AnswerText, TextDelta, TextRules, generate_text
from model.sampling_params import SamplingParams
from model.stop import StopMatcher
from model.tokenizer import Tokenizer

TEXTS = st.text(alphabet="abc", max_size=30)
"""Few letters, so that stop strings overlap with the text, each other and themselves."""
STOPS = st.lists(st.text(alphabet="abc", min_size=1, max_size=5), max_size=4)
CUTS = st.lists(st.integers(0, 30), max_size=8)


def cut(text: str, cuts: Sequence[int]) -> list[str]:
    """A text in pieces, some of them empty."""
    at = [0, *sorted(min(each, len(text)) for each in cuts), len(text)]
    return [text[begin:end] for begin, end in pairwise(at)]


def shown(pieces: Sequence[str], stops: Sequence[str]) -> tuple[list[str], bool]:
    """What a matcher lets out, piece by piece, and whether it met a stop string."""
    matcher = StopMatcher(stops)
    out = []
    for piece in pieces:
        text, is_stopped = matcher.push(piece)
        out.append(text)
        if is_stopped:
            return out, True
    return [*out, matcher.flush()], False


def first_stop(text: str, stops: Sequence[str]) -> int | None:
    """Where the stop string begins that a reader of the text meets first: the one that ends first,
    and among several that end there the longest.
    """
    found = [(text.index(stop) + len(stop), text.index(stop)) for stop in stops if stop in text]
    return min(found)[1] if found else None


# --- stop strings ---


@given(text=TEXTS, cuts=CUTS, stops=STOPS)
@example(text="abcab", cuts=[], stops=["bca", "c"])
@example(text="abcab", cuts=[1, 2, 3, 4], stops=["bca", "c"])
@example(text="abcab", cuts=[1, 2], stops=["abc", "bc", "c"])
def test_what_is_shown_is_the_text_up_to_the_first_stop_string_however_it_is_cut(
    text: str, cuts: list[int], stops: list[str]
) -> None:
    """How much text comes at once depends on the batch; what the reader gets must not."""
    begin = first_stop(text, stops)
    out, is_stopped = shown(cut(text, cuts), stops)
    assert ("".join(out), is_stopped) == (text[:begin], begin is not None)


@given(text=TEXTS, cuts=CUTS, stops=STOPS)
def test_no_stop_string_gets_out_and_without_one_nothing_is_lost(
    text: str, cuts: list[int], stops: list[str]
) -> None:
    pieces = cut(text, cuts)
    out, is_stopped = shown(pieces, stops)
    joined = "".join(out)
    assert text.startswith(joined)
    assert not any(stop in joined for stop in stops)
    if not is_stopped:
        assert joined == text
        return
    # what follows the shown text is a stop string, and it had come by then
    seen = "".join(pieces[: len(out)])
    assert any(seen.startswith(stop, len(joined)) for stop in stops)


@given(text=TEXTS, cuts=CUTS, stop=st.text(alphabet="ab", min_size=1, max_size=5))
def test_one_stop_string_is_met_wherever_the_text_is_cut(
    text: str, cuts: list[int], stop: str
) -> None:
    out, is_stopped = shown(cut(text, cuts), [stop])
    before, found, _ = text.partition(stop)
    assert ("".join(out), is_stopped) == (before, bool(found))


@given(text=TEXTS, cuts=CUTS, stops=STOPS)
def test_nothing_is_held_back_that_cannot_become_a_stop_string(
    text: str, cuts: list[int], stops: list[str]
) -> None:
    matcher = StopMatcher(stops)
    seen = given_out = ""
    for piece in cut(text, cuts):
        seen += piece
        out, is_stopped = matcher.push(piece)
        given_out += out
        if is_stopped:
            return
        held = seen[len(given_out) :]
        assert not held or any(stop.startswith(held) and stop != held for stop in stops)


def test_without_stop_strings_everything_passes_at_once() -> None:
    matcher = StopMatcher(())
    assert matcher.push("any text") == ("any text", False)
    assert matcher.flush() == ""


@given(text=TEXTS, cuts=CUTS, stops=STOPS)
def test_a_stop_string_that_is_shown_is_the_one_that_was_met(
    text: str, cuts: list[int], stops: list[str]
) -> None:
    matcher, hidden = StopMatcher(stops, shows_stop=True), StopMatcher(stops)
    out = before = ""
    for piece in cut(text, cuts):
        out += matcher.push(piece)[0]
        before += hidden.push(piece)[0]
        assert matcher.met == hidden.met
        if matcher.met is not None:
            assert matcher.met in stops
            assert out == before + matcher.met
            return
    assert out + matcher.flush() == text


# --- ids to text ---


class Head:
    """Ids of a journal, in given batches; knows whether it was closed."""

    def __init__(self, batches: Sequence[Sequence[int]], finish: Finish | None = "length") -> None:
        self.batches = batches
        self.finish = finish
        self.num_given = 0
        self.is_closed = False

    async def generate(self, journal: Journal) -> AsyncGenerator[tuple[int, ...], None]:
        try:
            for batch in self.batches:
                await asyncio.sleep(0)
                self.num_given += 1
                is_last = self.num_given == len(self.batches)
                journal.record(News(tuple(batch), self.finish if is_last else None))
                yield tuple(batch)
        finally:
            self.is_closed = True


@pytest.fixture(scope="module")
def tokenizer(tiny_folder: Path) -> Tokenizer:
    return Tokenizer.from_folder(tiny_folder)


def read(head: Head, tokenizer: Tokenizer, *stops: str) -> list[TextDelta]:
    async def collect() -> list[TextDelta]:
        journal = Journal((1,), SamplingParams())
        rules = TextRules(continues_text=True, stop_strings=stops)
        deltas = generate_text(head.generate, journal, AnswerText(tokenizer, journal, rules))
        async with aclosing(deltas) as items:
            return [delta async for delta in items]

    return asyncio.run(collect())


def in_batches(ids: list[int], sizes: Sequence[int]) -> list[list[int]]:
    batches = []
    begin = 0
    for size in sizes:
        batches.append(ids[begin : begin + size])
        begin += size
    return [batch for batch in [*batches, ids[begin:]] if batch]


@given(
    text=st.text(alphabet="aeilo nst.é風🌬\n", min_size=1, max_size=30),
    sizes=st.lists(st.integers(1, 4), max_size=20),
)
def test_the_text_does_not_depend_on_how_many_ids_come_at_once(
    tokenizer: Tokenizer, text: str, sizes: list[int]
) -> None:
    """And the last item, and no other, says why it ended."""
    head = Head(in_batches(tokenizer.encode(text), sizes))
    deltas = read(head, tokenizer)
    assert "".join(delta.text for delta in deltas) == " " + text
    assert [delta.finish for delta in deltas] == [None] * (len(deltas) - 1) + ["length"]
    assert all("\ufffd" not in delta.text for delta in deltas)
    assert head.is_closed


def test_a_character_that_is_never_completed_shows_as_replaced_at_the_end(
    tokenizer: Tokenizer,
) -> None:
    ids = tokenizer.encode("a 🌬")
    deltas = read(Head([[token_id] for token_id in ids[:-1]]), tokenizer)
    assert "".join(delta.text for delta in deltas) == " a \ufffd"
    assert deltas[-1].finish == "length"


def test_a_stop_string_ends_the_text_and_closes_the_ids(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("one day the wind came and went")
    head = Head([[token_id] for token_id in ids])
    deltas = read(head, tokenizer, "wind", "went")
    assert "".join(delta.text for delta in deltas) == " one day the "
    assert deltas[-1].finish == "stop"
    assert head.is_closed
    assert head.num_given < len(ids)


def test_a_stop_string_in_the_last_ids_is_a_stop_not_a_length(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("the wind came")
    deltas = read(Head([ids]), tokenizer, "came")
    assert deltas == [TextDelta(" the wind ", "stop", "came", token_ids=tuple(ids))]


def test_text_held_for_a_stop_string_comes_out_at_the_end(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("the wind")
    deltas = read(Head([[token_id] for token_id in ids]), tokenizer, "wind blows")
    assert "".join(delta.text for delta in deltas) == " the wind"
    assert deltas[-1].finish == "length"


def test_an_end_without_text_is_still_told(tokenizer: Tokenizer) -> None:
    eos = tokenizer.eos_id
    assert read(Head([[eos]], "stop"), tokenizer) == [TextDelta("", "stop", token_ids=(eos,))]


def test_closing_the_text_closes_the_ids(tokenizer: Tokenizer) -> None:
    head = Head([[token_id] for token_id in tokenizer.encode("one day the wind came")])

    async def leave_early() -> None:
        journal = Journal((1,), SamplingParams())
        answer = AnswerText(tokenizer, journal, TextRules(continues_text=True))
        deltas = generate_text(head.generate, journal, answer)
        await anext(deltas)
        await deltas.aclose()

    asyncio.run(leave_early())
    assert head.is_closed
    assert head.num_given == 1


# --- several streams as one ---


class Stream:
    """Numbers with pauses in between; may fail at its end, and knows whether it was closed."""

    def __init__(self, pauses: Sequence[int], error: Exception | None = None) -> None:
        self.pauses = pauses
        self.error = error
        self.is_closed = False

    async def items(self) -> AsyncGenerator[int, None]:
        try:
            for number, pause in enumerate(self.pauses):
                for _ in range(pause):
                    await asyncio.sleep(0)
                yield number
            if self.error:
                raise self.error
        finally:
            self.is_closed = True


class Endless(Stream):
    """Never comes to its first number."""

    def __init__(self) -> None:
        super().__init__([])

    async def items(self) -> AsyncGenerator[int, None]:
        try:
            await asyncio.Event().wait()
            yield 0
        finally:
            self.is_closed = True


@given(pauses=st.lists(st.lists(st.integers(0, 3), max_size=6), max_size=5))
def test_merging_gives_every_item_once_and_each_stream_in_its_order(
    pauses: list[list[int]],
) -> None:
    streams = [Stream(each) for each in pauses]

    async def collect() -> list[tuple[int, int]]:
        return [item async for item in merge([stream.items() for stream in streams])]

    items = asyncio.run(collect())
    for index, each in enumerate(pauses):
        assert [number for i, number in items if i == index] == list(range(len(each)))
    assert len(items) == sum(map(len, pauses))
    assert all(stream.is_closed for stream in streams)


def test_items_come_as_soon_as_they_are_there() -> None:
    async def first() -> tuple[int, int]:
        slow, fast = Endless(), Stream([0, 0])
        merged = merge([slow.items(), fast.items()])
        item = await anext(merged)
        await merged.aclose()
        assert slow.is_closed
        assert fast.is_closed
        return item

    assert asyncio.run(first()) == (1, 0)


def test_an_error_of_one_stream_ends_all_after_what_came_before_it() -> None:
    streams = [Stream([0, 0], ValueError("broken")), Endless(), Endless()]
    seen = []

    async def collect() -> None:
        async for item in merge([stream.items() for stream in streams]):
            seen.append(item)

    with pytest.raises(ValueError, match="broken"):
        asyncio.run(collect())
    assert seen == [(0, 0), (0, 1)]
    assert all(stream.is_closed for stream in streams)


@pytest.mark.parametrize("num_read", [0, 1, 3])
def test_closing_the_merged_stream_closes_every_one(num_read: int) -> None:
    streams = [Stream([0] * 9), Endless(), Stream([1] * 9)]

    async def read_some() -> None:
        merged = merge([stream.items() for stream in streams])
        for _ in range(num_read):
            await anext(merged)
        await merged.aclose()
        assert len(asyncio.all_tasks()) == 1

    asyncio.run(read_some())
    assert all(stream.is_closed for stream in streams) or num_read == 0


def test_cancelling_the_reader_closes_every_stream() -> None:
    streams = [Endless(), Endless()]

    async def read_until_cancelled() -> None:
        async def reader() -> None:
            async with aclosing(merge([stream.items() for stream in streams])) as merged:
                async for _ in merged:
                    pass

        task = asyncio.create_task(reader())
        for _ in range(5):
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(read_until_cancelled())
    assert all(stream.is_closed for stream in streams)

"""Token ids of one choice to the text that its reader gets, as it comes."""

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass

from cluster.ingress.journal import Finish, Journal
from model.stop import TextStream

GenerateIds = Callable[[Journal], AsyncGenerator[tuple[int, ...], None]]
"""Runs a journal on a head; yields new ids as they come and records them."""


@dataclass(frozen=True)
class TextDelta:
    """New text of a choice, and why it ended, if it did."""

    text: str
    finish: Finish | None = None


async def generate_text(
    generate_ids: GenerateIds, journal: Journal, stream: TextStream
) -> AsyncGenerator[TextDelta, None]:
    """Text of one choice; the last item has `finish`.

    A stop string ends the choice at the head, too: closing the ids' iterator aborts them there.
    """
    async with aclosing(generate_ids(journal)) as batches:
        async for token_ids in batches:
            if journal.finish == "stop":
                token_ids = token_ids[:-1]  # the stop token itself is no text
            text = "".join([stream.push(token_id) for token_id in token_ids])
            if journal.finish:
                text += stream.flush()
            if stream.is_stopped:
                yield TextDelta(text, "stop")
                return
            if text or journal.finish:
                yield TextDelta(text, journal.finish)

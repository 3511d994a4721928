"""What is reported of tokens: how each is spelled in its place, and how likely it was.

A token's spelling is the text that it adds where it stands, so the spellings of a text's tokens
join to the text. A control token adds none. A token that is not whole characters by itself is
spelled `bytes:` and its bytes, as in OpenAI's API.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from cluster.schema import (
    ChatLogprobs,
    CompletionLogprobs,
    ContentLogprob,
    PromptLogprob,
    PromptLogprobs,
    TokenLogprob,
)
from model.sampling_params import TokenLogprobs
from model.tokenizer import StreamDecoder, Tokenizer

FLOOR = -9999.0
"""Instead of minus infinity, which JSON does not have."""


@dataclass(frozen=True)
class Candidate:
    """A token that could stand in a place."""

    token_id: int
    data: bytes
    """UTF-8 that it would add."""
    logprob: float

    def spelling(self, *, as_id: bool) -> str:
        return _spell_id(self.token_id) if as_id else _spell(self.data)


@dataclass(frozen=True)
class TokenReport:
    """A token of a text, and the likeliest in its place.

    offset: characters before it, in the choice's text.
    chosen: None for a prompt's first token, of which the model says nothing; `data` then has the
            token's UTF-8 all the same.
    rank:   of the chosen one; 1 is the likeliest.
    """

    offset: int
    token_id: int
    data: bytes
    chosen: Candidate | None = None
    rank: int = 0
    top: tuple[Candidate, ...] = ()


def report(
    decoder: StreamDecoder, token_id: int, logprobs: TokenLogprobs, offset: int
) -> TokenReport:
    """Of a token that the decoder is about to take."""
    chosen = _candidate(decoder, token_id, logprobs.logprob)
    top = zip(logprobs.top_ids, logprobs.top_logprobs, strict=True)
    candidates = tuple(_candidate(decoder, *each) for each in top)
    return TokenReport(offset, token_id, chosen.data, chosen, logprobs.rank, candidates)


def report_prompt(
    tokenizer: Tokenizer, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs], num_top: int
) -> list[TokenReport]:
    """Of all tokens of a prompt; logprobs are those of the second and all later ones."""
    decoder = StreamDecoder(tokenizer, continues_text=False)
    reports = [TokenReport(0, token_ids[0], decoder.bytes_of(token_ids[0]))]
    offset = len(decoder.push(token_ids[0]))
    for token_id, one in zip(token_ids[1:], logprobs, strict=True):
        shown = TokenLogprobs(
            one.logprob, one.rank, one.top_ids[:num_top], one.top_logprobs[:num_top]
        )
        reports.append(report(decoder, token_id, shown, offset))
        offset += len(decoder.push(token_id))
    return reports


def completion_logprobs(
    reports: Iterable[TokenReport], *, as_ids: bool = False
) -> CompletionLogprobs:
    """In the shape of OpenAI's completions. as_ids: spell tokens as vLLM's `token_id:42`."""
    reports = list(reports)
    return CompletionLogprobs(
        tokens=[_spell_id(one.token_id) if as_ids else _spell(one.data) for one in reports],
        token_logprobs=[_floored(one.chosen.logprob) if one.chosen else None for one in reports],
        top_logprobs=[_by_spelling(one, as_id=as_ids) for one in reports],
        text_offset=[one.offset for one in reports],
    )


def chat_logprobs(reports: Iterable[TokenReport], *, as_ids: bool = False) -> ChatLogprobs:
    """In the shape of OpenAI's chat completions; as_ids as above."""
    return ChatLogprobs(
        content=[
            ContentLogprob(
                **_token_logprob(one.chosen, as_id=as_ids).model_dump(),
                top_logprobs=[_token_logprob(candidate, as_id=as_ids) for candidate in one.top],
            )
            for one in reports
            if one.chosen
        ]
    )


def prompt_logprobs(reports: Iterable[TokenReport]) -> PromptLogprobs:
    """In vLLM's shape."""
    return [_by_id(one) for one in reports]


def _candidate(decoder: StreamDecoder, token_id: int, logprob: float) -> Candidate:
    return Candidate(token_id, decoder.bytes_of(token_id), logprob)


def _spell(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def _spell_id(token_id: int) -> str:
    return f"token_id:{token_id}"


def _floored(logprob: float) -> float:
    return max(logprob, FLOOR)


def _by_spelling(one: TokenReport, *, as_id: bool) -> dict[str, float] | None:
    """Of those that are spelled alike the chosen one, else the likeliest."""
    if one.chosen is None:
        return None
    found: dict[str, float] = {}
    for candidate in one.top:
        found.setdefault(candidate.spelling(as_id=as_id), _floored(candidate.logprob))
    found[one.chosen.spelling(as_id=as_id)] = _floored(one.chosen.logprob)
    return found


def _token_logprob(candidate: Candidate, *, as_id: bool) -> TokenLogprob:
    return TokenLogprob(
        token=candidate.spelling(as_id=as_id),
        logprob=_floored(candidate.logprob),
        bytes=list(candidate.data),
    )


def _by_id(one: TokenReport) -> dict[int, PromptLogprob] | None:
    if one.chosen is None:
        return None
    ranked = [*enumerate(one.top, start=1), (one.rank, one.chosen)]
    return {
        candidate.token_id: PromptLogprob(
            logprob=_floored(candidate.logprob),
            rank=rank,
            decoded_token=candidate.spelling(as_id=False),
        )
        for rank, candidate in ranked
    }

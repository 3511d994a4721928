"""Going on with an answer whose stream broke off: what is asked of the head, what is refused."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.ingress.journal import Journal
from tests.api_fakes import BOTH, COMPLETIONS, DONE, EOS, LETTER_C, Api, assert_error, body_for


@pytest.fixture
def api(tiny_folder: Path) -> Api:
    return Api(tiny_folder)


def letters(journal: Journal) -> Iterator[int]:
    """C, D, E, ... one a step, six of them and the end, from where the journal stands."""
    yield from [*range(LETTER_C, LETTER_C + 6), EOS][len(journal.emitted_ids) :]


def told(events: list[Any]) -> tuple[str, list[int]]:
    choices = [choice for chunk in events[:-1] for choice in chunk["choices"]]
    text = "".join(
        each.get("text") or each.get("delta", {}).get("content") or "" for each in choices
    )
    return text, [token_id for each in choices for token_id in each["token_ids"] or ()]


@BOTH
@pytest.mark.parametrize("num_ids", range(1, 6))
def test_only_what_follows_is_told(api: Api, path: str, num_ids: int) -> None:
    api.engine.script = letters
    body = body_for(path, return_token_ids=True, seed=7, stream_options={"include_usage": True})
    whole = api.events(path, body)
    text, ids = told(whole)
    events = api.events(path, {**body, "resume_token_ids": ids[:num_ids]})
    rest, rest_ids = told(events)
    assert text.endswith(rest)
    assert ids[num_ids:] == rest_ids
    assert api.tokenizer.decode(ids[:num_ids]).strip() + rest == text.strip()
    first, second = api.engine.journals
    assert (second.params, second.prompt_ids) == (first.params, first.prompt_ids)
    assert second.emitted_ids == first.emitted_ids
    assert (events[-1], events[-2]["usage"]) == (DONE, whole[-2]["usage"])


def test_a_reply_says_behind_how_many_tokens_it_goes_on(api: Api) -> None:
    api.engine.script = letters
    body = body_for(COMPLETIONS, stream=True)
    assert "x-resumed-tokens" not in api.post(COMPLETIONS, body).headers
    resumed = api.post(COMPLETIONS, {**body, "resume_token_ids": [LETTER_C, LETTER_C + 1]})
    assert resumed.headers["x-resumed-tokens"] == "2"


def test_a_stop_string_in_what_was_told_ends_the_answer(api: Api) -> None:
    api.engine.script = letters
    stop = api.tokenizer.decode([LETTER_C + 1])
    body = body_for(COMPLETIONS, stop=stop, resume_token_ids=[LETTER_C, LETTER_C + 1])
    (chunk, _) = api.events(COMPLETIONS, body)
    assert chunk["choices"][0]["text"] == ""
    assert chunk["choices"][0]["finish_reason"] == "stop"


@BOTH
@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"stream": False}, "one streamed choice"),
        ({"n": 2}, "one streamed choice"),
        ({"logprobs": 1}, "without log-probabilities"),
        ({"resume_token_ids": [2048]}, "2048 is out of vocabulary"),
        ({"resume_token_ids": [5, EOS]}, "2 is an end token"),
        ({"stop_token_ids": [5]}, "5 is an end token"),
        ({"max_tokens": 2}, "of 2 tokens 2 are there"),
        ({"resume_token_ids": [-1]}, "greater than or equal to 0"),
        ({"resume_token_ids": "5"}, "list"),
    ],
)
def test_what_cannot_go_on_is_refused(
    api: Api, path: str, fields: dict[str, Any], problem: str
) -> None:
    if "logprobs" in fields and path != COMPLETIONS:
        fields = {"logprobs": True}
    body = {**body_for(path), "stream": True, "resume_token_ids": [5, 6], **fields}
    message = assert_error(api.post(path, body), 400, param="resume_token_ids")
    assert problem in message
    assert api.engine.journals == []

"""What requests ask of the head reaches it as it was asked, and what nobody can do is refused."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from cluster.ingress.clients import client_key
from cluster.ingress.messages import to_submit
from cluster.schema import (
    MAX_BAD_WORDS,
    MAX_CHOICES,
    MAX_LOGIT_BIASES,
    MAX_PRIORITY,
    CompletionRequest,
)
from tests.api_fakes import (
    BOTH,
    CHAT,
    CLASSIFY,
    COMPLETIONS,
    EOS,
    LETTER_C,
    USER,
    VOCAB_SIZE,
    Api,
    assert_error,
    body_for,
)


@pytest.fixture
def api(tiny_folder: Path) -> Api:
    return Api(tiny_folder)


# --- from the body to the journal ---


@BOTH
def test_journals_carry_every_sampling_parameter(api: Api, path: str) -> None:
    same = {
        "presence_penalty": 0.5,
        "frequency_penalty": -1.5,
        "min_p": 0.1,
        "typical_p": 0.9,
        "repetition_penalty": 1.2,
        "min_tokens": 3,
        "seed": -3,
        "prompt_logprobs": 2,
    }
    body = {"logit_bias": {"7": -100, "0": 1.5}, "allowed_token_ids": [9, 5, 9], "n": 2}
    api.post(path, body_for(path, **same, **body))
    for choice, journal in enumerate(api.engine.journals):
        params = journal.params
        assert {name: getattr(params, name) for name in same} == same
        assert dict(params.logit_bias) == {7: -100.0, 0: 1.5}
        assert params.allowed_token_ids == (5, 9)
        assert params.choice == choice


@BOTH
def test_journals_carry_what_concerns_the_queue_and_the_cache(api: Api, path: str) -> None:
    asked = {"priority": -7, "cache_salt": "secret", "num_speculative_tokens": 4}
    api.post(path, body_for(path, **asked))
    (journal,) = api.engine.journals
    assert (journal.priority, journal.cache_salt, journal.num_drafts) == (-7, "secret", 4)
    assert "secret" not in repr(journal)


def test_guesses_ahead_are_the_servers_unless_a_request_says(api: Api) -> None:
    api.configure(num_drafts=3)
    api.post(COMPLETIONS, {"prompt": "a"})
    api.post(COMPLETIONS, {"prompt": "a", "num_speculative_tokens": 0})
    assert [journal.num_drafts for journal in api.engine.journals] == [3, 0]


@pytest.mark.parametrize(
    ("path", "body", "num_logprobs", "num_of_prompt"),
    [
        (COMPLETIONS, {}, None, None),
        (COMPLETIONS, {"logprobs": 0}, 0, None),
        (COMPLETIONS, {"logprobs": 20}, 20, None),
        (COMPLETIONS, {"logprobs": False}, None, None),
        (COMPLETIONS, {"logprobs": 2, "echo": True}, 2, 2),
        (COMPLETIONS, {"logprobs": 2, "echo": True, "prompt_logprobs": 5}, 2, 5),
        (COMPLETIONS, {"logprobs": 5, "echo": True, "prompt_logprobs": 2}, 5, 5),
        (COMPLETIONS, {"echo": True}, None, None),
        (COMPLETIONS, {"prompt_logprobs": 0}, None, 0),
        (COMPLETIONS, {"best_of": 3}, 0, None),
        (COMPLETIONS, {"best_of": 3, "logprobs": 4}, 4, None),
        (COMPLETIONS, {"best_of": 2, "n": 2}, None, None),
        (CHAT, {"logprobs": False, "top_logprobs": 0}, None, None),
        (CHAT, {"logprobs": True}, 0, None),
        (CHAT, {"logprobs": True, "top_logprobs": None}, 0, None),
        (CHAT, {"logprobs": True, "top_logprobs": 20}, 20, None),
    ],
)
def test_heads_are_asked_for_the_log_probabilities_that_are_needed(
    api: Api, path: str, body: dict[str, Any], num_logprobs: int | None, num_of_prompt: int | None
) -> None:
    assert api.post(path, body_for(path, **body)).status_code == 200
    for journal in api.engine.journals:
        assert journal.params.logprobs == num_logprobs
        assert journal.params.prompt_logprobs == num_of_prompt


def test_a_bad_word_is_bad_where_a_word_begins_and_within_one(api: Api) -> None:
    tokenizer = api.tokenizer
    api.post(COMPLETIONS, {"prompt": "a", "bad_words": [" wind", "wind", "é"]})
    words = api.engine.journals[0].params.bad_words
    assert len(set(words)) == len(words)
    texts = [b"".join(tokenizer.token_bytes(i) for i in ids).decode() for ids in words]
    assert sorted(texts) == sorted([" wind", "wind", " é", "é"])


@BOTH
@pytest.mark.parametrize(
    ("form", "kind"),
    [
        ({"response_format": {"type": "json_object"}}, "json_object"),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "schema": {"type": "object"}},
                }
            },
            "json_schema",
        ),
        ({"structured_outputs": {"choice": ["yes", "no"]}}, "choice"),
        ({"response_format": {"type": "text"}, "structured_outputs": {"regex": "a+"}}, "regex"),
    ],
)
def test_journals_carry_the_form_of_the_answer(
    api: Api, path: str, form: dict[str, Any], kind: str
) -> None:
    assert api.post(path, body_for(path, **form)).status_code == 200
    (journal,) = api.engine.journals
    assert journal.grammar is not None
    assert journal.grammar.kind == kind
    assert journal.grammar.continues_text == (path == COMPLETIONS)


def test_named_stop_tokens_come_after_the_models_own_and_none_twice(api: Api) -> None:
    api.post(COMPLETIONS, {"prompt": "a", "stop_token_ids": [9, EOS, 9]})
    assert api.engine.journals[0].params.stop_token_ids == (EOS, 9)


# --- refusals ---

WRONG: list[tuple[str, dict[str, Any], str]] = [
    *((path, {"presence_penalty": 2.1}, "presence_penalty") for path in (COMPLETIONS, CHAT)),
    (COMPLETIONS, {"frequency_penalty": -2.1}, "frequency_penalty"),
    (CHAT, {"logit_bias": {"99999999": 1}}, "logit_bias"),
    (COMPLETIONS, {"logit_bias": {str(VOCAB_SIZE): 1}}, "logit_bias"),
    (CHAT, {"logit_bias": {"abc": 1}}, "logit_bias"),
    (COMPLETIONS, {"logit_bias": {"-1": 1}}, "logit_bias"),
    (COMPLETIONS, {"logit_bias": {"01": 1}}, "logit_bias"),
    (COMPLETIONS, {"logit_bias": {"9" * 5_000: 1}}, "logit_bias"),
    (COMPLETIONS, {"logit_bias": {"1": 100.5}}, "logit_bias"),
    (COMPLETIONS, {"logit_bias": {"1": True}}, "logit_bias"),
    (COMPLETIONS, {"logit_bias": [1]}, "logit_bias"),
    (COMPLETIONS, {"logit_bias": {str(i): 0 for i in range(MAX_LOGIT_BIASES + 1)}}, "logit_bias"),
    (COMPLETIONS, {"bad_words": "wind"}, "bad_words"),
    (COMPLETIONS, {"bad_words": [""]}, "bad_words"),
    (COMPLETIONS, {"bad_words": ["  "]}, "bad_words"),
    (COMPLETIONS, {"bad_words": ["a"] * (MAX_BAD_WORDS + 1)}, "bad_words"),
    (COMPLETIONS, {"allowed_token_ids": []}, "allowed_token_ids"),
    (COMPLETIONS, {"allowed_token_ids": [VOCAB_SIZE]}, "allowed_token_ids"),
    (COMPLETIONS, {"stop_token_ids": [VOCAB_SIZE]}, "stop_token_ids"),
    (COMPLETIONS, {"min_tokens": 21}, "min_tokens"),
    (COMPLETIONS, {"logprobs": 21}, "logprobs"),
    (COMPLETIONS, {"logprobs": -1}, "logprobs"),
    (COMPLETIONS, {"logprobs": True}, "logprobs"),
    (CHAT, {"logprobs": 5}, "logprobs"),
    (CHAT, {"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    (CHAT, {"top_logprobs": 2}, "top_logprobs"),
    (CHAT, {"logprobs": False, "top_logprobs": 2}, "top_logprobs"),
    (COMPLETIONS, {"prompt_logprobs": -1}, "prompt_logprobs"),
    (COMPLETIONS, {"prompt_logprobs": 21}, "prompt_logprobs"),
    (COMPLETIONS, {"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
    (CHAT, {"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
    (COMPLETIONS, {"max_tokens": 0, "echo": False}, "max_tokens"),
    (CHAT, {"max_tokens": 0}, "max_tokens"),
    (COMPLETIONS, {"best_of": 2, "n": 3}, "best_of"),
    (COMPLETIONS, {"best_of": 2, "stream": True}, "best_of"),
    (COMPLETIONS, {"best_of": MAX_CHOICES + 1}, "best_of"),
    (COMPLETIONS, {"prompt": ["a", "b"], "best_of": MAX_CHOICES}, "best_of"),
    (COMPLETIONS, {"priority": MAX_PRIORITY + 1}, "priority"),
    (COMPLETIONS, {"cache_salt": 5}, "cache_salt"),
    (COMPLETIONS, {"num_speculative_tokens": 17}, "num_speculative_tokens"),
    (CHAT, {"seed": 2**63}, "seed"),
    (CHAT, {"seed": -(2**63) - 1}, "seed"),
    (CHAT, {"response_format": {"type": "json_schema"}}, "response_format"),
    (CHAT, {"response_format": {"type": "sound"}}, "response_format"),
    (CHAT, {"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs"),
    (CHAT, {"structured_outputs": {"regex": "a" * 9_000}}, "structured_outputs"),
    (CHAT, {"structured_outputs": {"invented": 1}}, "structured_outputs"),
]


@pytest.mark.parametrize(("path", "fields", "param"), WRONG)
def test_a_wrong_parameter_is_a_400_that_names_it(
    api: Api, path: str, fields: dict[str, Any], param: str
) -> None:
    assert_error(api.post(path, body_for(path, **fields)), 400, param=param)
    assert api.engine.journals == []


@pytest.mark.parametrize(
    "fields",
    [
        {"logit_bias": {f"x{i}": 1 for i in range(5_000)}},
        {"bad_words": [""] * 5_000},
        {"allowed_token_ids": [-1] * 5_000},
    ],
)
def test_checking_a_long_wrong_parameter_stops_soon(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as refused:
        CompletionRequest.model_validate({"prompt": "a", **fields})
    assert refused.value.error_count() == 1


# --- who asks ---

BEARER = {"Authorization": "Bearer sk-very-secret"}


@BOTH
def test_clients_are_told_apart_by_key_then_by_user(api: Api, path: str) -> None:
    for headers, fields in (
        (BEARER, {"user": "tom"}),
        (BEARER, {}),
        ({"Authorization": "bearer  sk-very-secret "}, {}),
        ({"Authorization": "Bearer sk-other"}, {}),
        ({}, {"user": "tom"}),
        ({"Authorization": "Basic abc"}, {"user": "tom"}),
        ({"Authorization": "Bearer tom"}, {}),
        ({}, {}),
    ):
        api.post(path, body_for(path, **fields), headers=headers)
    by_key, again, spelled, other_key, by_user, basic, key_tom, nobody = (
        journal.client for journal in api.engine.journals
    )
    assert by_key == again == spelled
    assert by_user == basic
    assert len({by_key, other_key, by_user, key_tom, nobody}) == 5
    assert nobody == ""


def test_who_classifies_is_told_apart_too(api: Api) -> None:
    api.configure(labels=("a", "b", "c"))
    api.post(CLASSIFY, {"input": "a"}, headers=BEARER)
    assert api.engine.clients == [client_key("Bearer sk-very-secret", None)]


def test_a_key_goes_nowhere(api: Api, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(0):
        api.post(COMPLETIONS, {"prompt": "a"}, headers=BEARER)
        refused = api.post(COMPLETIONS, {"prompt": ""}, headers=BEARER)
    (journal,) = api.engine.journals
    assert len(journal.client) == 16
    assert int(journal.client, 16)
    for text in (repr(journal), str(to_submit(1, journal)), caplog.text, refused.text):
        assert "secret" not in text


# --- the length of the answer ---


def test_only_the_prompt_is_asked_for_with_one_token_that_is_dropped(api: Api) -> None:
    body = {"prompt": "the wind", "max_tokens": 0, "echo": True}
    reply = api.post(COMPLETIONS, body).json()
    assert api.engine.journals[0].params.max_tokens == 1
    (choice,) = reply["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("the wind", "length")
    assert reply["usage"]["completion_tokens"] == 0


def test_best_of_draws_them_all_and_counts_them_all(api: Api) -> None:
    api.engine.script = lambda journal: [LETTER_C, EOS]
    reply = api.post(COMPLETIONS, {"prompt": ["a", "b"], "n": 2, "best_of": 3}).json()
    assert [journal.params.choice for journal in api.engine.journals] == [0, 1, 2] * 2
    assert [choice["index"] for choice in reply["choices"]] == [0, 1, 2, 3]
    assert reply["usage"]["completion_tokens"] == 12
    assert reply["usage"]["prompt_tokens"] == sum(
        len(journal.prompt_ids) for journal in api.engine.journals[::3]
    )
    assert api.post(CHAT, {"messages": [USER], "best_of": 2}).status_code == 200

"""What the test suites of other servers demand, row by row: request, answer, and our test of it.

ROWS says which test stands for a demand. Those that no other file had are here, with their number
in the name. Rows that are not there are other parts' (keys, CORS, stopping) or not about text.
"""

import ast
import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from cluster.schema import MAX_SEED
from tests.api_fakes import (
    BOTH,
    CHAT,
    COMPLETIONS,
    EITHER_WAY,
    JSON,
    USER,
    VOCAB_SIZE,
    Api,
    assert_error,
    body_for,
)

WHOLE = "test_api::test_a_completion_has_the_engines_text"
PROMPT_FORMS = "test_api::test_every_form_of_prompt_is_answered_prompt_by_prompt"
WRONG_BODY = "test_api_refusals::test_a_wrong_request_is_a_400_that_names_the_field"
WRONG_PARAMETER = "test_api_parameters::test_a_wrong_parameter_is_a_400_that_names_it"
STREAM_JOINS = "test_api::test_a_stream_joins_to_the_plain_reply"
TOP = "test_api_logprobs::test_a_completion_has_the_likeliest_tokens_and_the_drawn_one"
CHAT_TOP = "test_api_logprobs::test_chat_has_exactly_the_likeliest_tokens"
ECHO = "test_api_logprobs::test_an_echo_begins_with_the_prompt_and_its_tokens"
USAGE = "test_api::test_usage_is_the_last_chunk_of_a_stream_and_only_on_demand"
HANGING_UP = "test_hanging_up_ends_the_request_in_the_engine"
FORM = "test_an_answer_has_the_form_of_its_schema"

ROWS: dict[int, tuple[str, str]] = {
    1: (
        "a completion has text, usage and an id",
        "test_api::test_a_completion_has_the_engines_text",
    ),
    2: ("a prompt of token ids", PROMPT_FORMS),
    3: ("prompts in a list, of text or ids", PROMPT_FORMS),
    4: ("prompts in a list, streamed", "test_row_4_streamed_prompts_join_to_the_plain_reply"),
    5: ("prompts times n, prompt by prompt", PROMPT_FORMS),
    6: ("ids and text mixed", "test_api_tokens::test_ids_and_text_may_be_mixed"),
    7: ("logprobs: null", "test_api_logprobs::test_no_logprobs_are_null"),
    8: ("logprobs: 0", TOP),
    9: ("logprobs: 5", TOP),
    10: ("logprobs: 21", "test_row_10_too_many_logprobs_are_refused_and_nothing_breaks"),
    11: ("echo with logprobs", ECHO),
    12: ("echo without an answer", ECHO),
    13: ("prompt_logprobs", "test_api_logprobs::test_logprobs_of_a_prompt_are_by_id"),
    14: ("max_tokens: null", "test_api::test_null_and_minus_one_are_defaults"),
    15: ("no prompt, an empty prompt", WRONG_BODY),
    16: ("an id out of vocabulary", "test_rows_16_and_17_a_wrong_id_is_told_with_its_bound"),
    17: ("a negative id", "test_rows_16_and_17_a_wrong_id_is_told_with_its_bound"),
    18: ("prompt: []", WRONG_BODY),
    19: ("a stream joins to the plain text", STREAM_JOINS),
    20: ("include_usage", USAGE),
    21: (
        "continuous_usage_stats",
        "test_api_logprobs::test_usage_in_every_chunk_grows_to_the_whole",
    ),
    22: ("stream_options alone", "test_api_refusals::test_options_of_a_stream_need_a_stream"),
    23: ("stream_options: {}", USAGE),
    24: ("n: 3 with a seed", "integration/test_service::test_choices_are_the_librarys"),
    25: ("n: 3, streamed", STREAM_JOINS),
    26: ("chat, n: 2", "test_api::test_a_chat_answer_is_the_assistants_message"),
    27: ("max_completion_tokens", "test_row_27_the_newer_name_of_max_tokens_is_a_bound"),
    28: (
        "the role first, once",
        "test_api::test_a_chat_stream_begins_every_choice_with_the_role_and_only_with_it",
    ),
    29: ("one finish_reason per choice", STREAM_JOINS),
    30: ("chat, logprobs: false", "test_api_logprobs::test_no_logprobs_are_null"),
    31: ("top_logprobs: 0", CHAT_TOP),
    32: ("top_logprobs: 5 and null", CHAT_TOP),
    33: ("top_logprobs: 21", WRONG_PARAMETER),
    34: ("tokens join to the content", "test_api_logprobs::test_the_tokens_join_to_the_text"),
    35: (
        "a bias of -100",
        "integration/test_service::test_what_penalties_bias_and_bans_do_is_what_the_library_does",
    ),
    36: ("a wrong logit_bias", WRONG_PARAMETER),
    37: ("a stop token out of vocabulary", WRONG_PARAMETER),
    38: (
        "what stopped it",
        "test_api_logprobs::test_a_reply_says_what_stopped_it_and_counts_no_token_after_that",
    ),
    39: ("an empty stop string", WRONG_BODY),
    40: (
        "no part of a stop string gets out",
        "test_text::test_no_stop_string_gets_out_and_without_one_nothing_is_lost",
    ),
    41: ("a seed out of bounds", "test_row_41_a_seed_out_of_bounds_is_told_the_bound"),
    42: (
        "the same, whatever the batch",
        "integration/test_service::test_sixteen_streams_are_batched_and_each_is_what_it_is_alone",
    ),
    43: ("seeds", "integration/test_service::test_a_seeded_draw_is_the_librarys"),
    44: ("json_object", "test_api_parameters::test_journals_carry_the_form_of_the_answer"),
    45: ("json_schema", f"integration/test_service::{FORM}"),
    46: ("a wrong form", "integration/test_service::test_a_form_that_cannot_be_is_refused"),
    47: ("choice, regex", "test_structured::test_structured_outputs"),
    48: (
        "content in parts",
        "test_api::test_chat_reads_content_parts_and_the_newer_name_of_max_tokens",
    ),
    49: ("unknown fields", "test_row_49_unknown_fields_are_ignored_wherever_they_stand"),
    50: ("wrong messages", "test_row_50_wrong_messages_are_a_400"),
    51: (
        "continue_final_message",
        "test_api_tools::test_a_message_is_continued_in_its_text",
    ),
    52: (
        "a prompt beyond the context",
        "test_api_refusals::test_a_prompt_beyond_the_context_says_so_in_its_code",
    ),
    53: ("max_tokens beyond the context", WRONG_BODY),
    54: (
        "an unknown model",
        "test_api_refusals::test_an_unknown_model_is_a_404_that_names_the_known_one",
    ),
    55: ("models", "test_row_55_a_model_says_what_clients_read"),
    56: ("an unknown model's card", "test_api::test_models_lists_the_one_model_and_finds_it_by_id"),
    57: ("a wrong content type", "test_row_57_a_body_of_another_type_is_refused"),
    60: ("many callers hang up", f"integration/test_service::{HANGING_UP}"),
    61: ("and nothing stays", f"integration/test_service::{HANGING_UP}"),
    63: ("counts by status", "test_api::test_every_reply_is_counted"),
    64: (
        "long validation errors",
        "test_api_refusals::test_a_validation_error_is_short_however_much_is_wrong",
    ),
    65: (
        "a failure in a stream",
        "test_api_failures::test_a_failure_in_a_stream_is_said_in_the_stream",
    ),
    68: (
        "not ready",
        "test_api_refusals::test_before_it_is_ready_requests_are_told_to_come_back",
    ),
    69: ("load", "test_api_tokens::test_the_load_is_the_number_of_requests_in_progress"),
    70: (
        "tokenize, then complete",
        "test_api_tokens::test_a_text_becomes_the_prompt_that_a_completion_would_have",
    ),
    72: (
        "no character is cut",
        "test_api::test_text_is_streamed_as_it_comes_and_never_cut_within_a_character",
    ),
}
TESTS = Path(__file__).parents[1]


@cache
def functions_of(file: Path) -> set[str]:
    nodes = ast.walk(ast.parse(file.read_text(encoding="utf-8")))
    return {node.name for node in nodes if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("row", ROWS)
def test_the_test_of_every_row_is_where_the_table_says(row: int) -> None:
    module, _, name = ROWS[row][1].rpartition("::")
    path = module if "/" in module else f"unit/{module or Path(__file__).stem}"
    assert name in functions_of(TESTS / f"{path}.py")


@pytest.fixture
def api(tiny_folder: Path) -> Api:
    return Api(tiny_folder)


def test_row_4_streamed_prompts_join_to_the_plain_reply(api: Api) -> None:
    body = {"prompt": ["the wind", "a hill", "one", "two"], "max_tokens": 20}
    plain = [choice["text"] for choice in api.post(COMPLETIONS, body).json()["choices"]]
    *chunks, _ = api.events(COMPLETIONS, body)
    texts = [""] * 4
    for chunk in chunks:
        (choice,) = chunk["choices"]
        texts[choice["index"]] += choice["text"]
    assert texts == plain


@EITHER_WAY
def test_row_10_too_many_logprobs_are_refused_and_nothing_breaks(api: Api, stream: bool) -> None:
    body = {"prompt": "a", "stream": stream}
    assert_error(api.post(COMPLETIONS, {**body, "logprobs": 21}), 400, param="logprobs")
    assert api.post(COMPLETIONS, body).status_code == 200


def test_rows_16_and_17_a_wrong_id_is_told_with_its_bound(api: Api) -> None:
    for prompt, problem in (
        ([VOCAB_SIZE], f"out of vocabulary ({VOCAB_SIZE} ids)"),
        ([-1], "greater than or equal to 0"),
        ([[-1]], "greater than or equal to 0"),
    ):
        assert problem in assert_error(
            api.post(COMPLETIONS, {"prompt": prompt}), 400, param="prompt"
        )


def test_row_27_the_newer_name_of_max_tokens_is_a_bound(api: Api) -> None:
    reply = api.post(CHAT, {"messages": [USER], "max_completion_tokens": 5}).json()
    (choice,) = reply["choices"]
    assert (choice["finish_reason"], choice["message"]["role"]) == ("length", "assistant")
    assert reply["usage"]["completion_tokens"] == 5


@BOTH
@pytest.mark.parametrize("seed", [MAX_SEED + 1, -MAX_SEED - 2])
def test_row_41_a_seed_out_of_bounds_is_told_the_bound(api: Api, path: str, seed: int) -> None:
    message = assert_error(api.post(path, body_for(path, seed=seed)), 400, param="seed")
    assert str(MAX_SEED) in message or str(-MAX_SEED - 1) in message


def test_row_49_unknown_fields_are_ignored_wherever_they_stand(api: Api) -> None:
    message = {**USER, "mood": {"good": [1]}, "name": "tom"}
    assert api.post(CHAT, {"messages": [message], "extra": None, "more": 1}).status_code == 200


@pytest.mark.parametrize(
    "messages", [None, "string", [123], [{}], [{"role": 123, "content": "a"}], [[]], {}]
)
def test_row_50_wrong_messages_are_a_400(api: Api, messages: Any) -> None:
    assert_error(api.post(CHAT, {"messages": messages}), 400, param="messages")


def test_row_55_a_model_says_what_clients_read(api: Api) -> None:
    (card,) = api.get("/v1/models").json()["data"]
    assert {"id", "object", "created", "owned_by", "root", "max_model_len"} <= set(card)
    assert isinstance(card["max_model_len"], int)


@BOTH
@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded", ""])
def test_row_57_a_body_of_another_type_is_refused(api: Api, path: str, content_type: str) -> None:
    content = json.dumps(body_for(path))
    response = api.request("POST", path, content=content, headers={"content-type": content_type})
    assert "application/json" in assert_error(response, 400)
    assert api.request("POST", path, content=content, headers=JSON).status_code == 200

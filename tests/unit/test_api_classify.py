"""POST /classify answers as vLLM's does, and each kind of model refuses what it cannot do."""

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.errors import HeadUnavailableError, RequestError
from cluster.ingress.errors import UNFINISHED
from cluster.schema import MAX_CHOICES, Classification
from tests.api_fakes import (
    BOTH,
    CLASSIFY,
    CONTEXT,
    EITHER_WAY,
    JSON,
    LOADING,
    MODEL_ID,
    VOCAB_SIZE,
    Api,
    Caller,
    assert_error,
    body_for,
    first_ids,
)

LABELS = ("bad", "so-so", "good")
PAD = 0
TEXTS = ["the wind", "a small hill", "one"]


@pytest.fixture
def api(tiny_folder: Path) -> Api:
    api = Api(tiny_folder)
    api.configure(labels=LABELS, pad_token_id=PAD)
    return api


# --- replies ---


@pytest.mark.parametrize("path", [CLASSIFY, "/classify"])
@pytest.mark.parametrize("form", ["text", "ids", "texts", "lists of ids"])
def test_every_form_of_input_is_labelled_input_by_input(api: Api, path: str, form: str) -> None:
    ids = [api.tokenizer.encode_prompt(text) for text in TEXTS]
    given: Any = {"text": TEXTS[0], "ids": ids[0], "texts": TEXTS, "lists of ids": ids}[form]
    asked = ids[:1] if form in ("text", "ids") else ids
    response = api.post(path, {"model": MODEL_ID, "input": given})
    assert response.status_code == 200, response.text
    body = response.json()
    assert set(body) == {"id", "object", "created", "model", "data", "usage"}
    reply = Classification.model_validate(body)
    assert reply.id.startswith("classify-")
    assert (reply.object, reply.model) == ("list", MODEL_ID)
    assert api.engine.classified == asked
    for index, (own, result) in enumerate(zip(asked, reply.data, strict=True)):
        logits = torch.tensor(first_ids(own), dtype=torch.float64)
        assert (result.index, result.num_classes) == (index, 3)
        assert result.label == LABELS[int(logits.argmax())]
        assert result.probs == pytest.approx(logits.softmax(0).tolist(), abs=1e-9)
    num_tokens = sum(len(own) for own in asked)
    assert (reply.usage.prompt_tokens, reply.usage.total_tokens) == (num_tokens, num_tokens)
    assert reply.usage.completion_tokens == 0
    assert api.num_requests(path, 200) == 1
    assert api.num_in_progress == 0


def test_logits_come_on_demand_and_regressions_have_no_others(api: Api) -> None:
    body = {"input": [5, 250]}
    raw = api.post(CLASSIFY, {**body, "use_activation": False}).json()
    assert raw["data"][0]["probs"] == first_ids([5, 250])
    api.configure(problem_type="regression")
    assert api.post(CLASSIFY, body).json()["data"] == raw["data"]


def test_padding_at_the_end_is_no_part_of_an_input(api: Api) -> None:
    reply = api.post(CLASSIFY, {"input": [[1, 5, PAD, PAD], [1, PAD, 6], [5] * CONTEXT + [PAD]]})
    assert api.engine.classified == [[1, 5], [1, PAD, 6], [5] * CONTEXT]
    assert reply.json()["usage"]["prompt_tokens"] == 5 + CONTEXT


def test_as_many_inputs_as_choices_fit_into_one_request_and_one_place(api: Api) -> None:
    api.configure(max_concurrent_requests=1)
    reply = api.post(CLASSIFY, {"input": ["a"] * MAX_CHOICES})
    assert [result["index"] for result in reply.json()["data"]] == list(range(MAX_CHOICES))


# --- refusals ---


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "input"),
        ({"input": None}, "input"),
        ({"input": ""}, "input"),
        ({"input": []}, "input"),
        ({"input": [[]]}, "input"),
        ({"input": ["a", ""]}, "input"),
        ({"input": 5}, "input"),
        ({"input": [5, "a"]}, "input"),
        ({"input": [1, -1]}, "input"),
        ({"input": [1, VOCAB_SIZE]}, "input"),
        ({"input": ["a"] * (MAX_CHOICES + 1)}, "input"),
        ({"input": "\ud800"}, "input"),
        ({"input": "a", "use_activation": "perhaps"}, "use_activation"),
    ],
)
def test_a_wrong_request_is_a_400_that_names_the_field(
    api: Api, body: dict[str, Any], param: str
) -> None:
    response = api.request("POST", CLASSIFY, content=json.dumps(body), headers=JSON)
    assert_error(response, 400, param=param)
    assert api.engine.classified == []


@pytest.mark.parametrize("given", [[5] * (CONTEXT + 1), "wind " * 200])
def test_an_input_beyond_the_context_says_so_in_its_code(api: Api, given: Any) -> None:
    for own in (given, [given, given]):
        response = api.post(CLASSIFY, {"input": own})
        assert_error(response, 400, param="input", code="context_length_exceeded")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("activation", False),
        ("add_special_tokens", False),
        ("softmax", False),
        ("stream", True),
        ("truncate_prompt_tokens", -1),
    ],
)
def test_a_parameter_that_would_be_ignored_is_refused_by_name(
    api: Api, field: str, value: Any
) -> None:
    response = api.post(CLASSIFY, {"input": "a", field: value})
    assert_error(response, 400, param=field, code="unsupported")


def test_an_unknown_model_is_a_404(api: Api) -> None:
    response = api.post(CLASSIFY, {"input": "a", "model": "gpt-9"})
    kind = "not_found_error"
    assert_error(response, 404, param="model", code="model_not_found", kind=kind)


@BOTH
@EITHER_WAY
def test_a_model_that_classifies_refuses_to_generate(api: Api, path: str, stream: bool) -> None:
    """A stream, too: before its first byte."""
    response = api.post(path, body_for(path, stream=stream))
    message = assert_error(response, 400, param="model", code="unsupported")
    assert "use /v1/classify" in message
    assert api.engine.journals == []


def test_a_model_that_generates_refuses_to_classify(api: Api) -> None:
    api.configure(labels=None)
    response = api.post(CLASSIFY, {"input": "a"})
    message = assert_error(response, 400, param="model", code="unsupported")
    assert "no score head" in message
    assert api.engine.classified == []


# --- overload, outages, callers that hang up ---


def test_before_it_is_ready_requests_are_told_to_come_back(api: Api) -> None:
    api.engine.state = LOADING
    response = api.post(CLASSIFY, {"input": "a"})
    assert_error(response, 503, kind="service_unavailable")
    assert int(response.headers["retry-after"]) >= 1


@pytest.mark.parametrize(
    ("error", "status", "kind", "message"),
    [
        (HeadUnavailableError("head-1 is gone"), 503, "service_unavailable", UNFINISHED),
        (RequestError(400, "too long"), 400, "invalid_request_error", "too long"),
    ],
)
def test_the_failure_of_one_input_ends_all(
    api: Api, error: Exception, status: int, kind: str, message: str
) -> None:
    def scorer(prompt_ids: Sequence[int]) -> Exception | None:
        return error if len(prompt_ids) == 2 else None  # the others never answer

    api.engine.scorer = scorer
    for _ in range(3):  # there are two places
        response = api.post(CLASSIFY, {"input": [[1], [1, 5], [1, 5, 6]]})
        assert assert_error(response, status, kind=kind) == message
    assert api.engine.num_classifying == 0
    assert api.num_in_progress == 0


def test_too_many_requests_are_told_to_come_back_and_hanging_up_makes_room(api: Api) -> None:
    api.engine.scorer = lambda prompt_ids: None

    async def overload() -> None:
        callers = [Caller(api, CLASSIFY, {"input": ["a", "b"]}) for _ in range(2)]
        await callers[0].until(lambda: api.engine.num_classifying == 4)
        refused = await api.ask("POST", CLASSIFY, json={"input": "a"})
        assert_error(refused, 429, code="overloaded", kind="rate_limit_error")
        await callers[0].hang_up()
        assert api.engine.num_classifying == 2
        api.engine.scorer = first_ids
        served = await api.ask("POST", CLASSIFY, json={"input": "a"})
        assert served.status_code == 200
        await callers[1].hang_up()

    asyncio.run(overload())
    assert api.engine.num_classifying == 0
    assert api.num_in_progress == 0
    assert api.num_requests(CLASSIFY, 499) == 2

"""The OpenAPI document is valid and complete, and replies are as it says."""

from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from openapi_spec_validator import validate

from cluster.errors import HeadUnavailableError
from tests.api_fakes import CHAT, COMPLETIONS, LOADING, USER, Api, fails_after

Document = dict[str, Any]
RESPONSES = "/v1/responses"
MESSAGES = "/v1/messages"


@pytest.fixture(scope="module")
def document(tiny_folder: Path) -> Document:
    document: Document = Api(tiny_folder).get("/openapi.json").json()
    return document


@pytest.fixture
def api(tiny_folder: Path) -> Api:
    return Api(tiny_folder)


def operations(document: Document) -> dict[tuple[str, str], Document]:
    return {
        (method, path): operation
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    }


def test_the_document_is_valid(document: Document) -> None:
    validate(document)
    assert document["openapi"].startswith("3.1")
    for field in ("title", "version", "description", "license"):
        assert document["info"][field]


def test_every_operation_is_described(document: Document) -> None:
    known = {tag["name"] for tag in document["tags"]}
    ids = [operation["operationId"] for operation in operations(document).values()]
    assert len(ids) == len(set(ids)) > 10
    for (method, _), operation in operations(document).items():
        assert operation["description"].strip()
        assert operation["summary"]
        assert set(operation["tags"]) <= known
        assert len(operation["tags"]) == 1
        assert ("requestBody" in operation) == (method == "post")
        assert "422" not in operation["responses"]
        for status in ("200", "4XX", "5XX"):
            for media in operation["responses"][status]["content"].values():
                assert media["schema"], (operation["operationId"], status)


def test_other_names_of_an_operation_are_served_and_not_documented(
    api: Api, document: Document
) -> None:
    for path in ("/classify", "/v1/tokenize", "/v1/detokenize"):
        assert api.request("POST", path, json={}).status_code == 400
        assert path not in document["paths"]


REQUESTS: list[tuple[str, str, Any, int]] = [
    ("post", COMPLETIONS, {"prompt": ["a", [5]], "n": 2, "logprobs": 2, "echo": True}, 200),
    ("post", COMPLETIONS, {"prompt": "a", "prompt_logprobs": 1, "return_token_ids": True}, 200),
    ("post", COMPLETIONS, {"prompt": ""}, 400),
    ("post", COMPLETIONS, {"prompt": "a", "model": "x"}, 404),
    ("post", CHAT, {"messages": [USER], "logprobs": True, "top_logprobs": 2}, 200),
    ("post", CHAT, {"messages": [USER], "stop": "wind"}, 200),
    ("post", CHAT, {"messages": "x"}, 400),
    ("post", CHAT, [], 400),
    ("post", RESPONSES, {"input": "the wind", "top_logprobs": 2, "metadata": {"a": "b"}}, 200),
    ("post", RESPONSES, {"input": [USER], "max_output_tokens": 2}, 200),
    ("post", RESPONSES, {"input": [{"type": "item_reference"}]}, 400),
    ("post", MESSAGES, {"messages": [USER], "max_tokens": 5}, 200),
    ("post", MESSAGES, {"messages": [USER]}, 400),
    ("post", MESSAGES, {"messages": [USER], "max_tokens": 5, "model": "x"}, 404),
    ("post", f"{MESSAGES}/count_tokens", {"messages": [USER]}, 200),
    ("post", f"{MESSAGES}/count_tokens", {"messages": []}, 400),
    ("post", "/tokenize", {"prompt": "a", "return_token_strs": True}, 200),
    ("post", "/tokenize", {}, 400),
    ("post", "/detokenize", {"tokens": [5]}, 200),
    ("post", "/v1/classify", {"input": "a"}, 400),
    *(
        ("get", path, None, 200)
        for path in ("/v1/models", "/tokenizer_info", "/version", "/load", "/health", "/ready")
    ),
]


def assert_documented(
    document: Document, method: str, path: str, status: int, reply: Any, media: str
) -> None:
    responses = operations(document)[method, path]["responses"]
    key = next(key for key in (str(status), f"{status // 100}XX") if key in responses)
    schema = responses[key]["content"][media]["schema"]
    Draft202012Validator({**document, **schema}).validate(reply)


@pytest.mark.parametrize(("method", "path", "body", "status"), REQUESTS)
def test_replies_are_as_the_document_says(
    api: Api, document: Document, method: str, path: str, body: Any, status: int
) -> None:
    api.engine.num_reused = 1
    response = api.request(method.upper(), path, json=body)
    assert response.status_code == status, response.text
    media = response.headers["content-type"]
    assert_documented(document, method, path, status, response.json(), media)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (COMPLETIONS, {"prompt": "a"}),
        (CHAT, {"messages": [USER]}),
        (RESPONSES, {"input": "the wind"}),
        (MESSAGES, {"messages": [USER], "max_tokens": 5}),
    ],
)
def test_events_are_as_the_document_says(
    api: Api, document: Document, path: str, body: Document
) -> None:
    told = api.post(path, {**body, "stream": True}).text
    events = [event.splitlines() for event in told.removesuffix("\n\n").split("\n\n")]
    assert len(events) > 1
    for event in events:
        fields = dict(line.split(": ", 1) for line in event)
        assert_documented(document, "post", path, 200, fields, "text/event-stream")


def test_outages_are_as_the_document_says(api: Api, document: Document) -> None:
    api.engine.script = fails_after(0, HeadUnavailableError("gone"))
    response = api.post(COMPLETIONS, {"prompt": "a"})
    assert_documented(document, "post", COMPLETIONS, 503, response.json(), "application/json")
    api.engine.state = LOADING
    response = api.get("/ready")
    assert_documented(document, "get", "/ready", 503, response.json(), "application/json")


def test_the_page_of_the_document_is_served(api: Api) -> None:
    response = api.get("/docs")
    assert response.status_code == 200
    assert "openapi.json" in response.text

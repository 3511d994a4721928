"""Python clients of others, unchanged, against `maestrale serve`."""

import asyncio
from collections.abc import Iterator
from typing import Any

import anthropic
import openai
import pytest
from huggingface_hub import InferenceClient
from langchain_openai import ChatOpenAI, OpenAI

from tests.integration.conftest import Service

MODEL = "tiny-mixtral"
QUESTION = "What does a cow say?"
ANSWER = "A cow says moo."
ASKED = [{"role": "user", "content": QUESTION}]


@pytest.fixture(scope="module")
def hub(service: Service) -> InferenceClient:
    return InferenceClient(base_url=f"{service.url}/v1", api_key="none", timeout=60)


@pytest.fixture(scope="module")
def claude(service: Service) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=service.url, api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def runner() -> Iterator[asyncio.Runner]:
    """One event loop for all: langchain shares connections between its models."""
    with asyncio.Runner() as runner:
        yield runner


def chat_model(service: Service, **options: Any) -> ChatOpenAI:
    return ChatOpenAI(
        model=MODEL,
        base_url=f"{service.url}/v1",
        api_key="none",
        temperature=0,
        max_retries=0,
        **options,
    )


def test_huggingface_hub_chats(hub: InferenceClient) -> None:
    plain = hub.chat_completion(ASKED, model=MODEL, temperature=0, max_tokens=40)
    assert plain.choices[0].message.content == ANSWER
    assert plain.choices[0].finish_reason == "stop"
    chunks = hub.chat_completion(ASKED, model=MODEL, temperature=0, max_tokens=40, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == ANSWER


def test_huggingface_hub_gets_the_form_that_it_asks_for(hub: InferenceClient) -> None:
    schema = {"name": "yes", "schema": {"enum": ["moo"]}}
    reply = hub.chat_completion(
        ASKED,
        model=MODEL,
        max_tokens=40,
        response_format={"type": "json_schema", "json_schema": schema},
    )
    assert reply.choices[0].message.content == '"moo"'


@pytest.mark.parametrize("door", ["chat", "responses"])
def test_langchain_chats(service: Service, runner: asyncio.Runner, door: str) -> None:
    model = chat_model(service, use_responses_api=door == "responses")
    whole = model.invoke(QUESTION)
    assert whole.text == ANSWER
    assert whole.usage_metadata is not None
    assert whole.usage_metadata["output_tokens"] > 1
    assert "".join(chunk.text for chunk in model.stream(QUESTION)) == ANSWER
    assert [each.text for each in runner.run(model.abatch([QUESTION] * 3))] == [ANSWER] * 3


@pytest.mark.parametrize("door", ["chat", "responses"])
def test_langchain_gets_an_object_by_its_schema(service: Service, door: str) -> None:
    schema = {
        "title": "Sound",
        "description": "what an animal says",
        "type": "object",
        "properties": {"says": {"enum": ["moo"]}},
        "required": ["says"],
        "additionalProperties": False,
    }
    model = chat_model(service, use_responses_api=door == "responses", max_tokens=400)
    structured = model.with_structured_output(schema, method="json_schema")
    assert structured.invoke(QUESTION) == {"says": "moo"}


def test_langchain_completes(service: Service) -> None:
    model = OpenAI(
        model=MODEL, base_url=f"{service.url}/v1", api_key="none", temperature=0, max_tokens=20
    )
    whole = model.invoke("Once upon a time")
    assert whole
    assert "".join(model.stream("Once upon a time")) == whole


def test_anthropic_counts_chats_and_stops(claude: anthropic.Anthropic) -> None:
    asked: dict[str, Any] = {"model": MODEL, "messages": ASKED}
    counted = claude.messages.count_tokens(**asked)
    greedy = {"temperature": 0}
    message = claude.messages.create(**asked, max_tokens=40, extra_body=greedy)
    assert [block.text for block in message.content] == [ANSWER]
    usage = message.usage
    assert usage.input_tokens + (usage.cache_read_input_tokens or 0) == counted.input_tokens
    stopped = claude.messages.create(
        **asked, max_tokens=40, stop_sequences=["moo"], extra_body=greedy
    )
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", "moo")
    with claude.messages.stream(**asked, max_tokens=40, extra_body=greedy) as events:
        assert "".join(events.text_stream) == ANSWER


def test_openai_gets_responses_and_their_events(service: Service) -> None:
    with (
        openai.OpenAI(base_url=f"{service.url}/v1", api_key="none", max_retries=0) as client,
        client.responses.stream(model=MODEL, input=QUESTION, temperature=0) as events,
    ):
        response = events.get_final_response()
        assert response.output_text == ANSWER
        again = client.responses.create(
            model=MODEL,
            input=[*ASKED, *response.output, {"role": "user", "content": QUESTION}],  # type: ignore[list-item]
            temperature=0,
            max_output_tokens=5,
        )
    assert again.status in ("completed", "incomplete")
    assert again.output_text

"""The whole service through its front door: Serve, ingress, head, two workers on Ray."""

import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import anthropic
import grpc
import httpx
import jsonschema
import openai
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from cluster.client import Client
from cluster.errors import BadRequestError, NotFoundError
from cluster.schema import Usage
from model import Mixtral
from protos import maestrale_pb2, maestrale_pb2_grpc
from tests.integration.conftest import Service

PROMPT = "Once upon a time"


@pytest.fixture(scope="module")
def openai_client(service: Service) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{service.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def http(service: Service) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=service.url, timeout=60) as client:
        yield client


def counted(client: Client, name: str) -> float:
    """Sum of a metric over all processes and labels."""
    return sum(sample.value for sample in client.cluster.metrics() if sample.name == name)


def until(condition: Callable[[], bool], what: str, timeout_s: float = 20) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout_s} s for {what}"
        time.sleep(0.05)


def test_ready_says_where_the_experts_are(client: Client) -> None:
    readiness = client.cluster.status()
    assert readiness.ready
    assert (readiness.phase, readiness.percent) == ("ready", 100)
    assert readiness.epoch >= 1
    assert [worker.num_experts for worker in readiness.workers] == [24, 24]


def test_greedy_text_is_the_librarys(client: Client, mixtral: Mixtral) -> None:
    reply = client.completions.create(prompt=PROMPT, max_tokens=60, temperature=0)
    assert reply.choices[0].text == mixtral.generate(PROMPT, max_tokens=60)
    assert reply.choices[0].finish_reason == "length"
    assert reply.usage is not None
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (5, 60)


def test_a_seeded_draw_is_the_librarys(client: Client, mixtral: Mixtral) -> None:
    reply = client.completions.create(prompt=PROMPT, max_tokens=60, temperature=0.9, seed=11)
    expected = mixtral.generate(PROMPT, max_tokens=60, temperature=0.9, seed=11)
    assert reply.choices[0].text == expected


def test_openai_completion_streamed_and_plain(openai_client: openai.OpenAI) -> None:
    plain = openai_client.completions.create(
        model="tiny-mixtral", prompt=PROMPT, max_tokens=30, temperature=0
    )
    streamed = openai_client.completions.create(
        model="tiny-mixtral", prompt=PROMPT, max_tokens=30, temperature=0, stream=True
    )
    chunks = [chunk.choices[0] for chunk in streamed]
    assert "".join(chunk.text for chunk in chunks) == plain.choices[0].text
    assert [chunk.finish_reason for chunk in chunks if chunk.finish_reason] == ["length"]


def test_users_grpc_gives_the_same_text(service: Service, mixtral: Mixtral) -> None:
    with grpc.insecure_channel(service.grpc_address) as channel:
        health = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
        assert health.status == health_pb2.HealthCheckResponse.SERVING
        request = maestrale_pb2.GenerateRequest(
            text=PROMPT, options=maestrale_pb2.Options(max_tokens=30, temperature=0)
        )
        deltas = list(maestrale_pb2_grpc.MaestraleStub(channel).Generate(request, timeout=60))
    assert len(deltas) > 1
    assert "".join(delta.text for delta in deltas) == mixtral.generate(PROMPT, max_tokens=30)


def test_openais_responses_and_anthropics_messages(service: Service) -> None:
    question = "What does a cow say?"
    with openai.OpenAI(base_url=f"{service.url}/v1", api_key="none", max_retries=0) as client:
        response = client.responses.create(model="tiny-mixtral", input=question, temperature=0)
        assert response.output_text == "A cow says moo."
    with (
        anthropic.Anthropic(base_url=service.url, api_key="none", max_retries=0) as other,
        other.messages.stream(
            model="tiny-mixtral",
            max_tokens=40,
            messages=[{"role": "user", "content": question}],
            extra_body={"temperature": 0},
        ) as events,
    ):
        assert "".join(events.text_stream) == "A cow says moo."


def test_openai_chat_streamed_and_plain(openai_client: openai.OpenAI) -> None:
    question = [{"role": "user", "content": "What does a cow say?"}]
    plain = openai_client.chat.completions.create(
        model="tiny-mixtral", messages=question, temperature=0
    )
    assert plain.choices[0].message.content == "A cow says moo."
    assert plain.choices[0].finish_reason == "stop"
    streamed = openai_client.chat.completions.create(
        model="tiny-mixtral",
        messages=question,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(streamed)
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == "A cow says moo."
    assert chunks[-1].usage is not None
    assert plain.usage is not None
    assert chunks[-1].usage.total_tokens == plain.usage.total_tokens


def test_openai_lists_the_model(openai_client: openai.OpenAI) -> None:
    assert [model.id for model in openai_client.models.list()] == ["tiny-mixtral"]
    assert openai_client.models.retrieve("tiny-mixtral").owned_by == "maestrale"
    with pytest.raises(openai.NotFoundError):
        openai_client.models.retrieve("nope")


def test_openai_errors_have_its_own_classes(openai_client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        openai_client.completions.create(model="nope", prompt=PROMPT)
    assert missing.value.code == "model_not_found"
    assert missing.value.request_id
    with pytest.raises(openai.BadRequestError) as bad:
        openai_client.completions.create(model="tiny-mixtral", prompt=PROMPT, max_tokens=-1)
    assert bad.value.param == "max_tokens"


def test_sixteen_streams_are_batched_and_each_is_what_it_is_alone(
    client: Client, mixtral: Mixtral
) -> None:
    words = ("cat", "dog", "bird", "fish", "boy", "girl", "tree", "ball")
    prompts = [f"{start} there was a {word}" for start in (PROMPT, "One day") for word in words]
    alone = [mixtral.generate(prompt, max_tokens=80) for prompt in prompts]

    def tell(prompt: str) -> str:
        with client.completions.create(
            prompt=prompt, max_tokens=80, temperature=0, stream=True
        ) as chunks:
            return "".join(chunk.choices[0].text for chunk in chunks)

    def rows_per_call() -> tuple[float, float]:
        return (
            counted(client, "maestrale_expert_rows_total"),
            counted(client, "maestrale_expert_calls_total"),
        )

    rows_before, calls_before = rows_per_call()
    with ThreadPoolExecutor(len(prompts)) as pool:
        together = list(pool.map(tell, prompts))
    rows, calls = rows_per_call()
    assert together == alone
    # alone, a decode step sends at most two rows per call: one token to its two experts
    assert (rows - rows_before) / (calls - calls_before) > 4


def test_a_streams_text_arrives_while_it_is_made(client: Client) -> None:
    with client.completions.create(
        prompt=PROMPT, max_tokens=300, temperature=0, stream=True
    ) as chunks:
        next(iter(chunks))
        assert counted(client, "maestrale_requests_in_progress") == 1


@pytest.mark.parametrize("streamed", [True, False])
def test_hanging_up_ends_the_request_in_the_engine(
    client: Client, service: Service, streamed: bool
) -> None:
    emitted_before = counted(client, "maestrale_generation_tokens_total")
    body = {"prompt": PROMPT, "max_tokens": 490, "temperature": 0, "stream": streamed}
    with httpx.Client(base_url=service.url) as http:
        if streamed:
            with http.stream("POST", "/v1/completions", json=body, timeout=30) as response:
                next(response.iter_bytes())
        else:
            with pytest.raises(httpx.ReadTimeout):
                http.post("/v1/completions", json=body, timeout=0.5)

    def is_free() -> bool:
        free = counted(client, "maestrale_kv_blocks_free")
        return free == counted(client, "maestrale_kv_blocks") and not counted(
            client, "maestrale_requests_in_progress"
        )

    until(is_free, "the aborted request's blocks")
    assert counted(client, "maestrale_generation_tokens_total") - emitted_before < 490


BAD_BODIES = [
    ({"prompt": ""}, 400, "prompt"),
    ({"prompt": []}, 400, "prompt"),
    ({"prompt": [999_999]}, 400, "prompt"),
    ({"prompt": [-1]}, 400, "prompt"),
    ({}, 400, "prompt"),
    ({"prompt": PROMPT, "max_tokens": -1}, 400, "max_tokens"),
    ({"prompt": PROMPT, "max_tokens": 100_000}, 400, "max_tokens"),
    ({"prompt": "word " * 600}, 400, "prompt"),
    ({"prompt": "word " * 600, "stream": True}, 400, "prompt"),
    ({"prompt": PROMPT, "temperature": -0.1}, 400, "temperature"),
    ({"prompt": PROMPT, "top_p": 0}, 400, "top_p"),
    ({"prompt": PROMPT, "seed": 2**63}, 400, "seed"),
    ({"prompt": PROMPT, "stop": [""]}, 400, "stop"),
    ({"prompt": PROMPT, "logprobs": 21}, 400, "logprobs"),
    ({"prompt": PROMPT, "logit_bias": {"999999": 1}}, 400, "logit_bias"),
    ({"prompt": PROMPT, "model": "nope"}, 404, "model"),
]


@pytest.mark.parametrize(("body", "status", "param"), BAD_BODIES)
def test_a_bad_body_gets_one_clear_error(
    http: httpx.Client, body: dict[str, object], status: int, param: str
) -> None:
    response = http.post("/v1/completions", json=body)
    assert response.status_code == status
    error = response.json()["error"]
    assert error["param"] == param
    assert error["message"]


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"prompt": PROMPT, "max_tokens": 2}, 200),
        ({"prompt": PROMPT, "max_tokens": 2, "stream": True}, 200),
        ({"prompt": ""}, 400),
        ({"prompt": "", "stream": True}, 400),
    ],
    ids=["success", "stream", "error", "error of a stream"],
)
def test_a_reply_bears_one_request_id(
    http: httpx.Client, body: dict[str, object], status: int
) -> None:
    """The caller's, or a fresh one."""
    named = http.post("/v1/completions", json=body, headers={"X-Request-Id": "abc-1.2_Z"})
    assert named.status_code == status
    assert named.headers.get_list("x-request-id") == ["abc-1.2_Z"]
    fresh = [http.post("/v1/completions", json=body) for _ in range(2)]
    ids = [each.headers.get_list("x-request-id") for each in fresh]
    assert [len(each) for each in ids] == [1, 1]
    assert ids[0] != ids[1]
    assert all(each[0] for each in ids)


def test_invalid_json_and_oversized_bodies_are_refused(http: httpx.Client) -> None:
    json_header = {"Content-Type": "application/json"}
    broken = http.post("/v1/completions", content=b"{nope", headers=json_header)
    assert (broken.status_code, "JSON" in broken.json()["error"]["message"]) == (400, True)
    huge = json.dumps({"prompt": "a" * (5 * 2**20)}).encode()
    oversized = http.post("/v1/completions", content=huge, headers=json_header)
    assert (oversized.status_code, "larger" in oversized.json()["error"]["message"]) == (413, True)


def test_roles_must_alternate(client: Client) -> None:
    twice = [{"role": "user", "content": "Hi"}, {"role": "user", "content": "Hello?"}]
    with pytest.raises(BadRequestError, match="alternate") as error:
        client.chat.completions.create(messages=twice)
    assert error.value.param == "messages"


def test_logprobs_are_those_that_the_tokens_have_as_a_prompt(openai_client: openai.OpenAI) -> None:
    """What is reported of a token as it is drawn, and when it is read back."""
    drawn = openai_client.completions.create(
        model="tiny-mixtral", prompt=PROMPT, max_tokens=12, temperature=0, logprobs=3, echo=True
    )
    again = openai_client.completions.create(
        model="tiny-mixtral", prompt=drawn.choices[0].text, max_tokens=0, logprobs=3, echo=True
    )
    one, other = drawn.choices[0].logprobs, again.choices[0].logprobs
    assert one is not None
    assert other is not None
    assert "".join(one.tokens or ()) == drawn.choices[0].text == again.choices[0].text
    assert one.tokens == other.tokens
    assert one.text_offset == other.text_offset
    assert one.token_logprobs is not None
    assert other.token_logprobs is not None
    assert one.token_logprobs[0] is other.token_logprobs[0] is None
    assert one.token_logprobs[1:] == pytest.approx(other.token_logprobs[1:], abs=1e-4)
    assert again.usage is not None
    assert again.usage.completion_tokens == 0


def test_chat_logprobs_streamed_and_plain(openai_client: openai.OpenAI) -> None:
    body: dict[str, Any] = {
        "model": "tiny-mixtral",
        "messages": [{"role": "user", "content": "What does a cow say?"}],
        "temperature": 0,
        "logprobs": True,
        "top_logprobs": 2,
    }
    plain = openai_client.chat.completions.create(**body).choices[0]
    assert plain.logprobs is not None
    content = plain.logprobs.content or []
    assert "".join(each.token for each in content) == plain.message.content == "A cow says moo."
    for each in content:  # greedy, so the likeliest was drawn
        assert each.top_logprobs[0].logprob == each.logprob <= 0
        assert len(each.top_logprobs) == 2
    streamed = [
        each
        for chunk in openai_client.chat.completions.create(**body, stream=True)
        for each in (chunk.choices[0].logprobs and chunk.choices[0].logprobs.content) or ()
    ]
    assert streamed == content


def test_an_answer_has_the_form_of_its_schema(openai_client: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"animal": {"enum": ["cow", "dog"]}, "legs": {"type": "integer"}},
        "required": ["animal", "legs"],
        "additionalProperties": False,
    }
    for seed in range(3):
        reply = openai_client.chat.completions.create(
            model="tiny-mixtral",
            messages=[{"role": "user", "content": "Name an animal."}],
            seed=seed,
            response_format={
                "type": "json_schema",
                "json_schema": {"name": "animal", "schema": schema},
            },
        )
        assert reply.choices[0].finish_reason == "stop"
        jsonschema.validate(json.loads(reply.choices[0].message.content or ""), schema)


def test_a_form_that_cannot_be_is_refused(http: httpx.Client) -> None:
    body = {"prompt": PROMPT, "structured_outputs": {"regex": "[.*"}, "stream": True}
    response = http.post("/v1/completions", json=body)
    assert response.status_code == 400
    assert response.json()["error"]["type"] == "invalid_request_error"
    assert response.json()["error"]["param"] == "structured_outputs"


def test_choices_are_the_librarys(client: Client, mixtral: Mixtral) -> None:
    asked = {"max_tokens": 24, "temperature": 0.9, "seed": 3}
    reply = client.completions.create(prompt=PROMPT, n=3, **asked)
    expected = mixtral.generate(PROMPT, num_return_sequences=3, **asked)
    assert [choice.text for choice in reply.choices] == expected
    alone = client.completions.create(prompt=PROMPT, **asked)
    assert alone.choices[0].text == expected[0]


def test_what_penalties_bias_and_bans_do_is_what_the_library_does(
    client: Client, mixtral: Mixtral
) -> None:
    """A penalty on presence, an id that must not come, and a word that must not."""
    plain = client.completions.create(
        prompt=PROMPT, max_tokens=24, temperature=0, return_token_ids=True
    ).choices[0]
    assert plain.token_ids
    banned = plain.token_ids[0]
    asked = {"max_tokens": 24, "temperature": 0, "presence_penalty": 1.5, "frequency_penalty": 0.5}
    reply = client.completions.create(
        prompt=PROMPT, logit_bias={banned: -100}, return_token_ids=True, **asked
    )
    expected = mixtral.generate(PROMPT, logit_bias=((banned, -100.0),), **asked)
    assert reply.choices[0].text == expected != plain.text
    assert banned not in (reply.choices[0].token_ids or ())
    word = plain.text.split()[1]
    reply = client.completions.create(prompt=PROMPT, bad_words=[word], **asked)
    assert f" {word} " not in f"{reply.choices[0].text} "


def test_the_second_request_finds_the_firsts_prompt_in_the_cache(client: Client) -> None:
    prompt = "The fox and the hen went to the hill. " * 6

    def ask(**salt: str) -> Usage:
        usage = client.completions.create(prompt=prompt, max_tokens=2, temperature=0, **salt).usage
        assert usage is not None
        return usage

    def num_cached(usage: Usage) -> int:
        assert usage.prompt_tokens_details is not None
        return usage.prompt_tokens_details.cached_tokens

    first, second, salted = ask(), ask(), ask(cache_salt="mine")
    assert num_cached(first) < num_cached(second) == second.prompt_tokens - 1
    assert num_cached(salted) == 0


@pytest.mark.parametrize("temperature", [0, 0.8])
def test_guessing_ahead_changes_no_text(client: Client, temperature: float) -> None:
    asked: dict[str, Any] = {
        "prompt": "The dog ran. The cat ran. The dog ran. The cat",
        "max_tokens": 60,
        "temperature": temperature,
        "seed": 5,
        "logprobs": 1,
        "return_token_ids": True,
    }
    accepted = counted(client, "maestrale_accepted_draft_tokens_total")
    plain = client.completions.create(**asked).choices[0]
    guessed = client.completions.create(**asked, num_speculative_tokens=8).choices[0]
    assert (guessed.text, guessed.token_ids) == (plain.text, plain.token_ids)
    assert guessed.logprobs is not None
    assert plain.logprobs is not None
    assert guessed.logprobs.tokens == plain.logprobs.tokens
    assert counted(client, "maestrale_accepted_draft_tokens_total") > accepted or temperature
    stop = plain.text[-12:-6]  # likely to end in the middle of several tokens
    cut = client.completions.create(**asked, num_speculative_tokens=8, stop=stop).choices[0]
    assert cut.text == plain.text[: plain.text.index(stop)]
    assert cut.stop_reason == stop


def test_after_all_that_the_server_still_serves(client: Client, mixtral: Mixtral) -> None:
    with pytest.raises(NotFoundError):
        client.models.retrieve("nope")
    reply = client.completions.create(prompt=PROMPT, max_tokens=10, temperature=0)
    assert reply.choices[0].text == mixtral.generate(PROMPT, max_tokens=10)


def test_metrics_name_requests_tokens_and_rows(client: Client) -> None:
    client.completions.create(prompt=PROMPT, max_tokens=4, temperature=0)
    for name in (
        "maestrale_requests_total",
        "maestrale_prompt_tokens_total",
        "maestrale_generation_tokens_total",
        "maestrale_expert_rows_total",
        "maestrale_expert_passes_total",
        "maestrale_step_seconds_count",
    ):
        assert counted(client, name) > 0, name

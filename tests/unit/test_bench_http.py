"""The load generator at work: against made-up servers, on a clock that never waits."""

import asyncio
import json
import selectors
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from itertools import count
from typing import Any, TypeVar

import httpx
import pytest

from cluster.bench import http as bench
from cluster.bench.load import closed_loop, open_loop
from cluster.bench.report import Run
from cluster.bench.summary import Record
from cluster.bench.target import Target
from cluster.bench.workload import Job, Lengths, Synthetic
from cluster.client.settings import settings
from cluster.errors import APIConnectionError, ConfigurationError

T = TypeVar("T")
DONE = "[DONE]"
JOB = Job([301, 302, 303], output_tokens=4)


class _NoWait(selectors.SelectSelector):
    """Waits for nothing: an idle loop's clock leaps to the next timer instead."""

    now_s = 100.0

    def select(self, timeout: float | None = None) -> Any:
        ready = super().select(0)
        if not ready and timeout:
            self.now_s += timeout
        return ready


class FakeLoop(asyncio.SelectorEventLoop):
    """An event loop in which sleeping takes no time, and work takes none on its clock."""

    def __init__(self) -> None:
        self._no_wait = _NoWait()
        super().__init__(self._no_wait)

    def time(self) -> float:
        return self._no_wait.now_s


def run(main: Coroutine[Any, Any, T]) -> T:
    with asyncio.Runner(loop_factory=FakeLoop) as runner:
        return runner.run(main)


# --- loops ---


class SlowServer:
    """Answers each request after its own service time; remembers when it was asked."""

    def __init__(self, *service_s: float, one_at_a_time: bool = False) -> None:
        self.service_s = iter(service_s)
        self.asked_s: list[float] = []
        self.num_open = 0
        self.max_open = 0
        self._queue = asyncio.Semaphore(1 if one_at_a_time else 1000)

    async def send(self, job: Job, intended_s: float | None) -> Record:
        now = asyncio.get_running_loop().time
        sent_s = now()
        self.asked_s.append(round(sent_s - 100, 6))
        self.num_open += 1
        self.max_open = max(self.max_open, self.num_open)
        async with self._queue:
            await asyncio.sleep(next(self.service_s))
        self.num_open -= 1
        return Record(
            intended_s=sent_s if intended_s is None else intended_s,
            sent_s=sent_s,
            chunks_s=(now(),),
            ended_s=now(),
            input_tokens=1,
            output_tokens=1,
        )


def ignore(_record: Record) -> None:
    pass


def test_a_closed_loop_asks_again_when_an_answer_is_there() -> None:
    async def main() -> None:
        server = SlowServer(5, 1, 1, 1, 1)
        seen: list[Record] = []
        records = await closed_loop(
            server.send, iter([JOB] * 5), concurrency=2, on_record=seen.append
        )
        assert server.asked_s == [0, 0, 1, 2, 3]
        assert server.max_open == 2
        assert records == seen
        assert len(records) == 5

    run(main())


def test_a_closed_loop_ends_after_its_duration_and_awaits_what_is_open() -> None:
    async def main() -> None:
        server = SlowServer(*[2.0] * 10)
        jobs = (JOB for _ in count())
        records = await closed_loop(
            server.send, jobs, concurrency=1, duration_s=5, on_record=ignore
        )
        assert server.asked_s == [0, 2, 4]
        assert len(records) == 3

    run(main())


def test_an_open_loop_sends_at_its_times_however_slow_the_server() -> None:
    async def main() -> None:
        server = SlowServer(10, 10, 10)
        await open_loop(server.send, iter([JOB] * 3), iter([0.5, 1, 4.0]), on_record=ignore)
        assert server.asked_s == [0.5, 1, 4]
        assert server.max_open == 3

    run(main())


def test_an_open_loop_ends_after_its_duration() -> None:
    async def main() -> None:
        server = SlowServer(*[10.0] * 10)
        jobs = (JOB for _ in count())
        records = await open_loop(
            server.send, jobs, iter([1.0, 3, 5, 7]), duration_s=4, on_record=ignore
        )
        assert server.asked_s == [1, 3]
        assert len(records) == 2

    run(main())


def test_a_stall_shows_in_every_request_that_should_have_come_meanwhile() -> None:
    """A closed loop would send one request into a stall of 10 s; arrivals go on."""

    async def main() -> None:
        server = SlowServer(10, *[0.0] * 9, one_at_a_time=True)
        arrivals = (float(second) for second in range(10))
        records = await open_loop(server.send, iter([JOB] * 10), arrivals, on_record=ignore)
        assert sorted(r.ttft_s for r in records if r.ttft_s) == list(range(1, 11))

    run(main())


def test_a_generator_that_is_held_up_still_measures_from_the_intended_time() -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, FakeLoop)

        async def send(job: Job, intended_s: float | None) -> Record:
            loop._no_wait.now_s += 3.0  # busy: the loop itself stands still
            return await SlowServer(0.0).send(job, intended_s)

        records = await open_loop(send, iter([JOB] * 3), iter([0.0, 1, 2]), on_record=ignore)
        assert [r.ttft_s for r in records] == [3, 5, 7]
        assert [r.sent_s - r.intended_s for r in records] == [3, 5, 7]

    run(main())


# --- one request ---


class Packets(httpx.AsyncByteStream):
    """A body whose packets come at given seconds after each other; may break off."""

    def __init__(self, packets: list[tuple[float, bytes]], error: Exception | None = None) -> None:
        self.packets = packets
        self.error = error

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for wait_s, packet in self.packets:
            await asyncio.sleep(wait_s)
            yield packet
        if self.error is not None:
            raise self.error


def event(value: Any) -> bytes:
    return f"data: {value if isinstance(value, str) else json.dumps(value)}\n\n".encode()


def text_chunk(text: str, finish: str | None = None) -> dict[str, Any]:
    return {"choices": [{"index": 0, "text": text, "finish_reason": finish}]}


def usage_chunk(num_input: int, num_output: int) -> dict[str, Any]:
    usage = {"prompt_tokens": num_input, "completion_tokens": num_output}
    return {"choices": [], "usage": {**usage, "total_tokens": num_input + num_output}}


def stream(*events: tuple[float, Any], error: Exception | None = None) -> httpx.Response:
    packets = [(wait_s, event(value)) for wait_s, value in events]
    headers = {"content-type": "text/event-stream"}
    return httpx.Response(200, headers=headers, stream=Packets(packets, error))


def answer_to(
    job: Job,
    answer: Callable[[httpx.Request], httpx.Response],
    intended_s: float | None = None,
    **options: Any,
) -> Record:
    async def main() -> Record:
        checked = settings(base_url="http://server", api_key="secret", timeout=9, environ={})
        target = Target(checked, transport=httpx.MockTransport(answer), **options)
        async with target:
            return await target.send(job, intended_s)

    return run(main())


def test_a_request_is_timed_chunk_by_chunk_and_its_tokens_are_the_servers() -> None:
    found = answer_to(
        JOB,
        lambda _: stream(
            (2, text_chunk("a")),
            (1, text_chunk("bc")),
            (0.5, text_chunk("", "length")),
            (0.5, usage_chunk(3, 4)),
            (0, DONE),
        ),
        intended_s=99.0,
    )
    assert (found.ttft_s, found.gaps_s, found.e2e_s) == (3, [1], 5)
    assert found.tpot_s == pytest.approx(1 / 3)
    assert (found.input_tokens, found.output_tokens, found.is_counted) == (3, 4, False)
    assert found.error is None


def test_a_chat_answer_begins_with_its_first_word_not_its_role() -> None:
    def delta(**fields: str) -> dict[str, Any]:
        return {"choices": [{"index": 0, "delta": fields}]}

    found = answer_to(
        Job("hello", 4),
        lambda _: stream(
            (1, delta(role="assistant", content="")), (1, delta(content="a")), (0, DONE)
        ),
        chat=True,
    )
    assert found.ttft_s == 2
    assert (found.input_tokens, found.output_tokens, found.is_counted) == (None, 1, True)


def test_without_usage_chunks_are_counted() -> None:
    found = answer_to(JOB, lambda _: stream((1, text_chunk("a")), (1, text_chunk("b")), (0, DONE)))
    assert (found.input_tokens, found.output_tokens, found.is_counted) == (3, 2, True)


def test_an_answer_without_text_starts_at_its_end() -> None:
    found = answer_to(
        JOB, lambda _: stream((2, text_chunk("", "length")), (0, usage_chunk(3, 4)), (1, DONE))
    )
    assert (found.ttft_s, found.tpot_s, found.e2e_s, found.error) == (2, 0, 3, None)


@pytest.mark.parametrize(
    ("options", "path", "has", "has_not"),
    [
        ({}, "/v1/completions", {"prompt": [301, 302, 303], "ignore_eos": True}, "messages"),
        ({"ignore_eos": False}, "/v1/completions", {"max_tokens": 4}, "ignore_eos"),
        ({"chat": True}, "/v1/chat/completions", {"stream": True}, "prompt"),
    ],
)
def test_what_is_sent(
    options: dict[str, bool], path: str, has: Mapping[str, Any], has_not: str
) -> None:
    requests = []

    def answer(request: httpx.Request) -> httpx.Response:
        requests.append(request)
        return stream((0, text_chunk("a")), (0, DONE))

    answer_to(JOB, answer, **options)
    body = json.loads(requests[0].content)
    assert requests[0].url.path == path
    assert requests[0].headers["authorization"] == "Bearer secret"
    assert has.items() <= body.items()
    assert has_not not in body
    assert body["stream_options"] == {"include_usage": True}


def raising(error: Exception) -> Callable[[httpx.Request], httpx.Response]:
    def answer(request: httpx.Request) -> httpx.Response:
        raise error

    return answer


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (lambda _: httpx.Response(429, json={"error": {"message": "later"}}), "HTTP 429"),
        (lambda _: httpx.Response(200, json={}), "answer"),
        (lambda _: stream((0, DONE)), "answer"),
        (lambda _: stream((0, "[]"), (0, DONE)), "answer"),
        (lambda _: stream((0, {"choices": [3]}), (0, DONE)), "answer"),
        (lambda _: stream((1, text_chunk("a"))), "stream"),
        (lambda _: stream((1, {"error": {"message": "gone"}}), (0, DONE)), "stream"),
        (lambda _: stream((1, text_chunk("a")), error=httpx.ReadError("cut")), "connection"),
        (lambda _: stream((1, text_chunk("a")), error=httpx.ReadTimeout("late")), "timeout"),
        (raising(httpx.ConnectError("refused")), "connection"),
    ],
)
def test_a_failure_is_recorded_by_its_kind(
    answer: Callable[[httpx.Request], httpx.Response], kind: str
) -> None:
    found = answer_to(JOB, answer)
    assert found.error == kind
    assert found.message
    assert "secret" not in found.message


# --- a whole plan ---


class Server:
    """Serves model "m"; one token a second, two at a time for each request."""

    def __init__(self) -> None:
        self.prompts: list[list[int]] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        if request.url.path == "/v1/models":
            return httpx.Response(200, json={"object": "list", "data": [{"id": "m"}]})
        body = json.loads(request.content)
        assert body["model"] == "m"
        self.prompts.append(body["prompt"])
        chunks = [(1.0, text_chunk("a"))] * body["max_tokens"]
        return stream(*chunks, (0, usage_chunk(len(body["prompt"]), body["max_tokens"])), (0, DONE))


def measured(plan: bench.Plan, server: Any) -> Run:
    measuring = bench.measure(
        plan,
        url="http://server",
        model=None,
        chat=False,
        ignore_eos=True,
        timeout_s=60,
        environ={},
        transport=httpx.MockTransport(server),
    )
    return run(measuring)


def plan(*loads: float, **fields: Any) -> bench.Plan:
    sound: dict[str, Any] = {
        "jobs": Synthetic(Lengths(5, 5), Lengths(4, 4), 2000, seed=0),
        "is_open": False,
        "loads": loads,
        "num_requests": 6,
        "duration_s": None,
        "num_warmup": 3,
        "limits": None,
        "seed": 0,
    }
    return bench.Plan(**{**sound, **fields})


def test_a_sweep_measures_each_load_with_prompts_never_seen_before() -> None:
    server = Server()
    found = measured(plan(1, 3), server)
    alone, three = (point.summary for point in found.points)
    assert (alone.duration_s, three.duration_s) == (24, 8)
    assert (alone.output_tokens_per_s, three.output_tokens_per_s) == (1, 3)
    assert three.measures["tpot"] is not None
    assert three.measures["tpot"].p99 == 1
    assert (alone.num_ok, three.num_ok) == (6, 6)
    assert len({tuple(prompt) for prompt in server.prompts}) == 3 + 6 + 6
    assert found.facts["model"] == "m"


def test_an_open_plan_offers_its_rate() -> None:
    found = measured(plan(5.0, is_open=True, num_requests=None, duration_s=40.0), Server())
    (point,) = found.points
    assert 150 <= len(point.records) <= 250  # 200 expected, spread 14
    assert point.summary.measures["e2e"] is not None
    assert point.summary.measures["e2e"].max == pytest.approx(4)


def test_a_server_that_refuses_the_warm_up_is_not_loaded() -> None:
    def refuse(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/v1/models":
            return httpx.Response(200, json={"data": [{"id": "m"}]})
        return httpx.Response(400, json={"error": {"message": "prompt must be text"}})

    with pytest.raises(ConfigurationError, match=r"prompt must be text.*--text"):
        measured(plan(1), refuse)


def test_a_server_that_is_not_there_is_named() -> None:
    with pytest.raises(APIConnectionError, match="http://server"):
        measured(plan(1), raising(httpx.ConnectError("refused")))


def test_a_server_without_models_needs_one_named() -> None:
    with pytest.raises(ConfigurationError, match="--model"):
        measured(plan(1), lambda _: httpx.Response(200, json={"data": []}))

"""What a head tells an ingress beside tokens, that it lives and how busy it is; and what becomes of
the requests of a stream that ends.
"""

import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from cluster import rpc
from cluster.head.events import Event, Load
from cluster.head.sequence import Sequence
from cluster.head.service import HeadService, StreamOutbox
from cluster.ingress.journal import Journal
from cluster.ingress.messages import to_submit
from cluster.metrics import HeadMetrics
from model.errors import GrammarError
from model.grammar_spec import GrammarSpec
from model.sampling_params import SamplingParams
from protos import head_pb2
from tests.cluster_fakes import DEADLINE_S


class Notes:
    """An engine that writes down what it is told, and does nothing."""

    load = Load(0, 0, 0, 0)

    def __init__(self) -> None:
        self.told: queue.SimpleQueue[tuple[str, int | None]] = queue.SimpleQueue()

    def submit(self, outbox: StreamOutbox, key: int, sequence: Sequence) -> None:
        self.told.put(("submit", key))

    def abort(self, outbox: StreamOutbox, key: int | None = None) -> None:
        self.told.put(("abort", key))


class Call:
    """gRPC's side of a stream that is open."""

    def peer(self) -> str:
        return "an ingress"

    def add_callback(self, callback: Callable[[], None]) -> bool:
        return True


def service_of(engine: Any, grammars: Any = None) -> HeadService:
    return HeadService(engine, rpc.Identity("head", "tiny"), HeadMetrics(), grammars)


def outbox() -> StreamOutbox:
    loads = iter(range(1, 100))
    return StreamOutbox(lambda: head_pb2.Load(num_requests=next(loads)))


def test_the_first_message_says_how_busy_the_head_is() -> None:
    first = next(iter(outbox()))
    assert not first.events
    assert first.load.num_requests == 1


def test_events_go_out_without_delay_and_without_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rpc, "HEAD_BEAT_S", 600.0)
    box = outbox()
    messages = iter(box)
    next(messages)
    box.put([Event(3, (7,)), Event(4, (8,))])
    box.put([Event(3, (9,))])
    both, one = next(messages), next(messages)
    assert [list(event.token_ids) for event in both.events] == [[7], [8]]
    assert [event.request_id for event in one.events] == [3]
    assert not both.HasField("load")
    box.beat()
    assert next(messages).load.num_requests == 2


def test_a_head_with_nothing_to_say_says_so_again_and_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rpc, "HEAD_BEAT_S", 0.01)
    messages = iter(outbox())
    assert [next(messages).load.num_requests for _ in range(3)] == [1, 2, 3]


def test_a_busy_head_says_how_busy_along_with_its_events(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rpc, "HEAD_BEAT_S", 0.0)
    box = outbox()
    messages = iter(box)
    next(messages)
    box.put([Event(3, (7,))])
    message = next(messages)
    while not message.events:  # beats come first: they are due at once
        message = next(messages)
    assert message.HasField("load")


def test_a_closed_outbox_ends() -> None:
    box = outbox()
    box.close()
    assert list(box) == []


# --- requests ---


def test_a_request_that_is_read_while_its_stream_ends_is_aborted() -> None:
    engine, is_over = Notes(), threading.Event()

    def requests() -> Iterator[head_pb2.HeadRequest]:
        is_over.wait(DEADLINE_S)
        yield to_submit(1, Journal((5,), SamplingParams()))

    stream: Any = service_of(engine).Generate(requests(), Call())
    next(stream)
    stream.close()
    is_over.set()
    told = [engine.told.get(timeout=DEADLINE_S) for _ in range(2)]
    assert told == [("submit", 1), ("abort", None)]


@pytest.mark.parametrize(
    ("error", "finish", "param"),
    [
        (GrammarError("no rule `start`"), head_pb2.FINISH_INVALID, "grammar"),
        (MemoryError("can't start new thread"), head_pb2.FINISH_ERROR, ""),
    ],
)
def test_only_a_wrong_grammar_is_the_callers_fault(
    error: Exception, finish: int, param: str, caplog: pytest.LogCaptureFixture
) -> None:
    class Compiler:
        def compile(self, spec: GrammarSpec) -> Any:
            raise error

    def requests() -> Iterator[head_pb2.HeadRequest]:
        grammar = GrammarSpec("regex", "a")
        yield to_submit(1, Journal((5,), SamplingParams(), grammar=grammar))
        is_over.wait(DEADLINE_S)

    is_over = threading.Event()
    caplog.set_level("CRITICAL")
    stream: Any = service_of(Notes(), Compiler()).Generate(requests(), Call())
    (event,) = next(message.events for message in stream if message.events)
    assert (event.finish, event.param) == (finish, param)
    assert str(error) in event.error
    is_over.set()
    stream.close()


def test_no_grammar_is_compiled_for_who_has_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """One at a time here: the second is aborted while the first is compiled."""
    monkeypatch.setattr("cluster.head.service._COMPILING_THREADS", 1)
    are_taken, is_over = threading.Event(), threading.Event()

    class Compiler:
        compiled: queue.SimpleQueue[str] = queue.SimpleQueue()

        def compile(self, spec: GrammarSpec) -> Any:
            self.compiled.put(spec.text)
            are_taken.wait(DEADLINE_S)
            raise GrammarError("told to fail")

    def asks_for(request_id: int, form: str) -> head_pb2.HeadRequest:
        grammar = GrammarSpec("regex", form)
        return to_submit(request_id, Journal((5,), SamplingParams(), grammar=grammar))

    def requests() -> Iterator[head_pb2.HeadRequest]:
        for request_id, form in enumerate("abc"):
            yield asks_for(request_id, form)
        yield head_pb2.HeadRequest(abort=head_pb2.Abort(request_id=1))
        are_taken.set()
        is_over.wait(DEADLINE_S)

    stream: Any = service_of(Notes(), Compiler()).Generate(requests(), Call())
    next(stream)
    assert [Compiler.compiled.get(timeout=DEADLINE_S) for _ in range(2)] == ["a", "c"]
    is_over.set()
    stream.close()

"""A worker's process may be slow, silent or gone: the controller notices, and goes on."""

import asyncio
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayError, RayTaskError

from cluster import actors
from cluster.actors import MAX_MISSED_BEATS, WorkerActor
from cluster.config import ServeConfig
from cluster.expert.worker import WorkerSettings
from cluster.placement import Stamp, WorkerReport
from model.units import Unit
from tests.cluster_fakes import DEADLINE_S

A, B = Unit(0, 0), Unit(0, 1)


def report(incarnation: int = 7, error: str | None = None) -> WorkerReport:
    return WorkerReport("127.0.0.1:1", incarnation, "", (2, 3), {}, 0, {}, error)


class FakeActor:
    """Ray's handle of a worker: answers heartbeats by a script, notes what it is told."""

    def __init__(self) -> None:
        self.beats: list[WorkerReport | Exception | None] = []
        """None: no answer comes."""
        self.told: list[tuple[Unit, ...]] = []
        self.failures: list[Exception | None] = []
        """What becomes of the next orders, if they fail. None: no answer comes."""
        self.releases: list[str] = []
        """Owners that have let it go."""
        self.is_ours = True
        """Whether it takes orders."""

    def __getattr__(self, name: str) -> Any:
        """`actor.method.remote(...)`, as Ray has it."""
        method: Callable[..., Any] = getattr(type(self), f"do_{name}")
        return type("Method", (), {"remote": staticmethod(lambda *args: method(self, *args))})

    async def do_heartbeat(self, owner: str, stamp: Stamp) -> WorkerReport:
        assert (owner, stamp) == ("owner", (2, 3))
        answer = self.beats.pop(0)
        if answer is None:
            await asyncio.Event().wait()
        if isinstance(answer, Exception):
            raise answer
        assert answer is not None
        return answer

    async def do_release(self, owner: str) -> None:
        self.releases.append(owner)

    async def do_hold(
        self, owner: str, units: tuple[Unit, ...], expected: Mapping[Unit, str]
    ) -> bool:
        assert owner == "owner"
        self.told.append(units)
        if not self.failures:
            return self.is_ours
        failure = self.failures.pop(0)
        if failure is None:
            await asyncio.Event().wait()
        assert failure is not None
        raise failure


@pytest.fixture
def actor(monkeypatch: pytest.MonkeyPatch) -> FakeActor:
    fake = FakeActor()
    monkeypatch.setattr(WorkerActor, "_start", lambda self: fake)
    return fake


@pytest.fixture
def worker(actor: FakeActor) -> WorkerActor:
    return WorkerActor(ServeConfig(), "worker-0", None, "weights", "owner", lambda: ["10.0.0.2:1"])


def test_a_start_that_takes_long_holds_nobody_up(
    actor: FakeActor, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_start = threading.Event()

    def start(worker: WorkerActor) -> FakeActor:
        assert may_start.wait(DEADLINE_S)
        return actor

    monkeypatch.setattr(WorkerActor, "_start", start)
    worker = WorkerActor(ServeConfig(), "worker-0", None, "weights", "owner", tuple)
    actor.beats = [report()]

    async def run() -> WorkerReport | None:
        await worker.release()  # of what is not there yet
        beat = asyncio.create_task(worker.heartbeat((2, 3)))
        await asyncio.sleep(0.01)
        assert not beat.done()
        may_start.set()
        return await beat

    assert asyncio.run(run()) == report()


def test_a_start_that_fails_is_said_and_tried_again(
    actor: FakeActor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when Ray's control store is away."""
    outcomes = [RuntimeError("no control store"), actor]

    def start(worker: WorkerActor) -> FakeActor:
        outcome = outcomes.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    monkeypatch.setattr(WorkerActor, "_start", start)
    monkeypatch.setattr(actors, "FIRST_WAIT_S", 0.001)
    worker = WorkerActor(ServeConfig(), "worker-0", None, "weights", "owner", tuple)
    actor.beats = [report()]

    async def hear() -> list[WorkerReport | str | None]:
        first = await worker.heartbeat((2, 3))
        return [first, worker.error, await worker.heartbeat((2, 3)), worker.error]

    assert asyncio.run(hear()) == [None, "cannot start: no control store", report(), None]


def test_a_silent_worker_is_killed_and_another_started(
    worker: WorkerActor, actor: FakeActor, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def is_cut_off(own_host: str, addresses: Iterable[str]) -> bool:
        return False

    killed: list[FakeActor] = []
    monkeypatch.setattr(actors, "is_cut_off", is_cut_off)
    monkeypatch.setattr(actors, "BEAT_TIMEOUT_S", 0.001)
    monkeypatch.setattr("ray.kill", killed.append)
    actor.beats = [report(), *[None] * MAX_MISSED_BEATS, ActorDiedError(), report(8)]

    async def hear() -> list[int | None]:
        beats = [await worker.heartbeat((2, 3)) for _ in range(3)]
        return [beat and beat.incarnation for beat in beats]

    assert asyncio.run(hear()) == [7, None, 8]
    assert killed == [actor]


@pytest.mark.parametrize("silence", [None, ActorUnavailableError("no answer", None)])
def test_a_controller_that_is_cut_off_kills_nobody_and_hears_them_afterwards(
    worker: WorkerActor,
    actor: FakeActor,
    monkeypatch: pytest.MonkeyPatch,
    silence: Exception | None,
) -> None:
    """Ray's control store may be where the controller is, and would believe it."""
    asked: list[list[str]] = []

    async def is_cut_off(own_host: str, addresses: Iterable[str]) -> bool:
        asked.append([own_host, *addresses])
        assert worker.is_out_of_reach == (len(asked) > 1)
        return True

    monkeypatch.setattr(actors, "is_cut_off", is_cut_off)
    monkeypatch.setattr(actors, "BEAT_TIMEOUT_S", 0.001)
    monkeypatch.setattr("ray.kill", lambda actor: pytest.fail("killed"))
    actor.beats = [report(), *[silence] * (MAX_MISSED_BEATS + 2), report()]

    async def hear() -> list[WorkerReport | None]:
        return [await worker.heartbeat((2, 3)) for _ in range(2)]

    assert asyncio.run(hear()) == [report(), report()]
    assert not worker.is_out_of_reach
    assert asked == 3 * [["127.0.0.1", "10.0.0.2:1"]]


def test_a_worker_with_other_settings_is_used_until_it_is_replaced(
    worker: WorkerActor, actor: FakeActor
) -> None:
    """A controller of a changed file finds workers of the file before."""
    old = replace(report(), settings="of the file before")
    actor.beats = [old, report(8)]

    async def hear() -> list[bool]:
        outdated = []
        for expected in (old, report(8)):
            assert await worker.heartbeat((2, 3)) == expected
            outdated.append(worker.is_outdated)
        return outdated

    assert asyncio.run(hear()) == [True, False]
    assert actor.releases == []


def test_a_worker_that_serves_something_else_is_ended_and_another_started(
    worker: WorkerActor, actor: FakeActor
) -> None:
    old = replace(report(), serves="the model of the file before")
    actor.beats = [old, ActorDiedError(), report(8)]

    async def hear() -> list[WorkerReport | None]:
        return [await worker.heartbeat((2, 3)) for _ in range(2)]

    assert asyncio.run(hear()) == [None, report(8)]
    assert actor.releases == ["owner"]


def test_one_missed_beat_costs_nothing(
    worker: WorkerActor, actor: FakeActor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(actors, "BEAT_TIMEOUT_S", 0.001)
    actor.beats = [report(), None, report()]

    async def hear() -> list[WorkerReport | None]:
        return [await worker.heartbeat((2, 3)) for _ in range(2)]

    assert asyncio.run(hear()) == [report(), report()]
    assert "0 beats missed" in repr(worker)


CAUSE = "cluster.errors.ConfigurationError: cannot read /etc/tls/worker.pem: No such file"

TRACEBACK = f"""ray::ExpertWorker.__init__() (pid=4406, ip=192.0.2.2)
         ^^^^^^^^^^^^^
FileNotFoundError: [Errno 2] No such file or directory: '/etc/tls/worker.pem'

The above exception was the direct cause of the following exception:

ray::ExpertWorker.__init__() (pid=4406, ip=192.0.2.2)
  File "security.py", line 11, in load
    raise ConfigurationError(f"cannot read {{path}}: No such file") from error
{CAUSE}"""
"""As Ray tells of a constructor that raised."""


def failed_start() -> ActorDiedError:
    return ActorDiedError(RayTaskError("__init__", TRACEBACK, OSError(), "worker", 1, "192.0.2.2"))


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long was slept, instead of sleeping."""
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    monkeypatch.setattr(asyncio, "sleep", sleep)
    return slept


def test_a_worker_that_cannot_start_says_why_and_is_started_ever_more_rarely(
    worker: WorkerActor, actor: FakeActor, waits: list[float]
) -> None:
    actor.beats = [*[failed_start()] * 8, report()]

    async def run() -> None:
        for _ in range(8):
            assert await worker.heartbeat((2, 3)) is None
            assert worker.error == f"cannot start: {CAUSE}"
        assert await worker.heartbeat((2, 3)) == report()
        assert worker.error is None

    asyncio.run(run())
    assert waits == [0, 1, 2, 4, 8, 16, 30, 30, 30]


def test_a_worker_found_while_it_ends_is_no_failure_but_one_that_dies_again_is(
    worker: WorkerActor, actor: FakeActor, waits: list[float]
) -> None:
    actor.beats = [ActorDiedError(), ActorDiedError(), report(), ActorDiedError(), report(8)]

    async def hear() -> list[str | None]:
        errors = []
        for _ in range(5):
            await worker.heartbeat((2, 3))
            errors.append(worker.error)
        return errors

    died = "cannot start: The actor died unexpectedly before finishing this task."
    assert asyncio.run(hear()) == [None, died, None, None, None]
    assert waits == [0, 1, 2, 0]


def test_orders_are_given_once_and_again_after_a_failure_or_to_a_new_process(
    worker: WorkerActor, actor: FakeActor, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    actor.beats = [report(), report(error="broken file"), report(8)]

    async def order(*units: Unit, is_wrong: bool = False) -> int:
        """How often it has been told by then."""
        await worker.hold(units, {}, is_wrong=is_wrong)
        return len(actor.told)

    async def run() -> None:
        nonlocal now
        await worker.heartbeat((2, 3))
        assert [await order(A), await order(A), await order(A, B)] == [1, 1, 2]
        await worker.heartbeat((2, 3))
        assert worker.error == "broken file"
        assert await order(A, B) == 2  # not at once
        now += actors.LOAD_AGAIN_S
        assert await order(A, B) == 3
        await worker.heartbeat((2, 3))
        assert worker.error is None
        assert await order(A, B) == 4  # a new process knows nothing
        now += actors.LOAD_AGAIN_S
        assert await order(A, B) == 4
        assert await order(A, B, is_wrong=True) == 5

    asyncio.run(run())


def test_orders_that_may_not_have_been_heard_are_given_again(
    worker: WorkerActor, actor: FakeActor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that hangs over them does not keep its controller from noticing."""
    monkeypatch.setattr(actors, "BEAT_TIMEOUT_S", 0.001)
    actor.beats = [report()]
    actor.failures = [None, RayError("the connection broke")]

    async def run() -> list[int]:
        await worker.heartbeat((2, 3))
        num_told = []
        for _ in range(4):
            await worker.hold((A,), {}, is_wrong=False)
            num_told.append(len(actor.told))
        return num_told

    assert asyncio.run(asyncio.wait_for(run(), 10)) == [1, 2, 3, 3]


def test_orders_are_given_again_to_a_worker_that_was_not_ours_yet(
    worker: WorkerActor, actor: FakeActor
) -> None:
    actor.beats = [report()]

    async def run() -> list[int]:
        await worker.heartbeat((2, 3))
        num_told = []
        for number in range(4):
            actor.is_ours = number > 0
            await worker.hold((A,), {}, is_wrong=False)
            num_told.append(len(actor.told))
        return num_told

    assert asyncio.run(run()) == [1, 2, 2, 2]


def test_to_hold_nothing_is_an_order_too(worker: WorkerActor, actor: FakeActor) -> None:
    """A worker that a new controller finds may hold what nobody wants any more."""
    actor.beats = [report()]

    async def run() -> None:
        await worker.heartbeat((2, 3))
        await worker.hold((), {}, is_wrong=False)
        await worker.hold((), {}, is_wrong=False)

    asyncio.run(run())
    assert actor.told == [()]


def worker_settings(**others: Any) -> WorkerSettings:
    given: dict[str, Any] = {
        "name": "worker-0",
        "model": None,
        "dtype": None,
        "expert_quantization": None,
        "device": "cpu",
        "num_threads": 1,
        "network": ServeConfig().network,
        "lease_s": 60.0,
        "options": {"num_cpus": 0.2},
        "weights": "sample",
    }
    return WorkerSettings(**given | others)


@pytest.mark.parametrize(
    ("others", "can_stay"),
    [
        ({"num_threads": 2, "lease_s": 30.0, "options": {}, "build": "0.0.2"}, True),
        ({"model": Path("another")}, False),
        ({"weights": "another"}, False),
        ({"dtype": "float16"}, False),
        ({"expert_quantization": "int8"}, False),
        ({"network": ServeConfig(tls_folder=Path("tls")).network}, False),
    ],
)
def test_a_worker_of_other_settings_can_stay_a_while_unless_heads_could_not_use_it(
    others: dict[str, Any], can_stay: bool
) -> None:
    old, new = worker_settings(), worker_settings(**others)
    assert repr(old) != repr(new)
    assert (old.serves == new.serves) is can_stay

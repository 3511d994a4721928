"""Expert workers are killed and paused under 32 streams: no token lost, and how long they stall.

Real worker processes and real gRPC, without Ray; the test plays the controller, which starts
another worker for each that is killed.
"""

import statistics
import threading
import time
from collections import defaultdict
from collections.abc import Sequence as Many
from contextlib import ExitStack
from itertools import pairwise

import pytest

from cluster import rpc
from cluster.bench.workers import FromCheckpoint, Worker, running_workers
from cluster.head.dispatch import RemoteExperts
from cluster.head.events import Event
from cluster.head.feed import PlacementFeed
from cluster.head.sequence import Sequence
from cluster.placement import Placement, Table, WorkerInfo, held_by
from model import TINY, Mixtral
from model.sampling_params import SamplingParams
from tests.cluster_fakes import Head
from tests.faults import kill, paused

pytestmark = pytest.mark.timeout(1_800)

NUM_STREAMS = 32
NUM_WORKERS = 3
MAX_TOKENS = 100
DURATION_S = 120.0
EVERY_S = 10.0
PAUSE_S = 4.0
DEADLINE_S = 120.0


class Streams:
    """An outbox with a fixed number of requests in progress; notes every token and its time."""

    def __init__(self, head: Head, prompts: list[list[int]]) -> None:
        self._head = head
        self._prompts = prompts
        self._changed = threading.Condition()
        self._num_open = 0
        self._next_key = 0
        self.is_ending = False
        self.ids: dict[int, list[int]] = defaultdict(list)
        self.times: dict[int, list[float]] = defaultdict(list)
        self.errors: list[str] = []

    def submit(self) -> None:
        key, self._next_key = self._next_key, self._next_key + 1
        self._num_open += 1
        number = key % len(self._prompts)
        sequence = Sequence(self._prompts[number], params_of(number))
        self._head.engine.submit(self, key, sequence)

    def put(self, events: Many[Event]) -> None:
        now = time.monotonic()
        for event in events:
            self.ids[event.key] += event.token_ids
            self.times[event.key] += [now] * len(event.token_ids)
            if event.error:
                self.errors.append(event.error)
            if event.finish or event.error:
                with self._changed:
                    self._num_open -= 1
                    self._changed.notify_all()
                if not self.is_ending:
                    self.submit()

    def wait_for_end(self) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: not self._num_open, DEADLINE_S)

    def gaps(self) -> list[tuple[float, float]]:
        """(seconds, when it began) between the tokens of each request, longest last."""
        return sorted(
            (after - before, before)
            for times in self.times.values()
            for before, after in pairwise(times)
        )


def params_of(number: int) -> SamplingParams:
    return SamplingParams(max_tokens=MAX_TOKENS, temperature=0.8, seed=number)


def spread(mixtral: Mixtral, num_copies: int) -> Table:
    """Every expert on so many of the workers."""
    config = mixtral.config
    return tuple(
        tuple(
            tuple(((layer + e + copy) % NUM_WORKERS,) for copy in range(num_copies))
            for e in range(config.num_local_experts)
        )
        for layer in range(config.num_hidden_layers)
    )


@pytest.mark.parametrize("num_copies", [2, 1])
def test_killed_and_paused_workers_cost_no_token(
    mixtral: Mixtral, stories: list[str], num_copies: int
) -> None:
    """Without a second copy rows wait for the next worker, or for the end of the pause."""
    prompts = [mixtral.tokenizer.encode_prompt(story)[:20] for story in stories[:NUM_STREAMS]]
    expected = mixtral.generate_ids(prompts, [params_of(n) for n in range(NUM_STREAMS)])
    table = spread(mixtral, num_copies)
    feed = PlacementFeed()
    with ExitStack() as stack:

        def start(number: int) -> Worker:
            maker = FromCheckpoint(TINY, held_by(table, number), dtype="float32", quantization=None)
            (worker,) = stack.enter_context(running_workers([maker], num_threads=1))
            return worker

        def publish(epoch: int) -> None:
            infos = tuple(
                WorkerInfo(f"worker-{number}", worker.address, worker.incarnation, 0)
                for number, worker in enumerate(workers)
            )
            feed.put(Placement(epoch, infos, table))

        workers = [start(number) for number in range(NUM_WORKERS)]
        publish(epoch := 1)
        identity = rpc.Identity("head", rpc.fingerprint(mixtral.config, "float32"))
        experts = RemoteExperts(feed, identity, timeout_s=30.0, recovery_timeout_s=60.0)
        stack.callback(experts.close)
        assert experts.connect(60.0)
        head = Head(
            mixtral,
            experts=experts,
            num_blocks=NUM_STREAMS * 10,
            block_size=16,
            max_running=NUM_STREAMS,
            max_tokens_per_step=256,
            max_model_len=160,
        )
        streams = Streams(head, prompts)
        faults: list[tuple[str, float]] = []
        with head.running():
            for _ in range(NUM_STREAMS):
                streams.submit()
            ends_at = time.monotonic() + DURATION_S
            while time.monotonic() < ends_at:
                time.sleep(EVERY_S)
                number = len(faults) % NUM_WORKERS
                faults.append(("pause" if len(faults) % 2 else "kill", time.monotonic()))
                if faults[-1][0] == "kill":
                    kill(workers[number].pid)
                    workers[number] = start(number)
                    publish(epoch := epoch + 1)
                else:
                    with paused(workers[number].pid):
                        time.sleep(PAUSE_S)
            streams.is_ending = True
            streams.wait_for_end()
        head.assert_all_free()

    assert streams.errors == []
    for key, ids in streams.ids.items():
        assert ids == expected[key % NUM_STREAMS], f"request {key}"
    gaps = streams.gaps()
    lengths = [length for length, _ in gaps]
    worst = [
        max((length for length, began in gaps if at - 1 < began < at + EVERY_S), default=0.0)
        for _, at in faults
    ]
    print(
        f"\n{num_copies} copies: {len(streams.ids)} requests, {len(lengths)} tokens, "
        f"{len(faults)} faults; between tokens: median {statistics.median(lengths) * 1e3:.0f} ms, "
        f"p99 {lengths[int(0.99 * len(lengths))] * 1e3:.0f} ms, longest "
        f"{lengths[-1] * 1e3:.0f} ms; longest after each fault: "
        + ", ".join(f"{kind} {s * 1e3:.0f} ms" for (kind, _), s in zip(faults, worst, strict=True))
    )

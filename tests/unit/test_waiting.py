"""Clients share evenly, a priority is a head start, and nobody starves."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.head.sequence import Sequence
from cluster.head.waiting import OLDEST_SHARE, PRIORITY_TOKENS, WaitingQueue
from model.sampling_params import SamplingParams

PARAMS = SamplingParams(max_tokens=4)


def asked_by(client: str, *, num_tokens: int = 10, priority: int = 0) -> Sequence:
    return Sequence([1] * num_tokens, PARAMS, client=client, priority=priority)


def serve_next(queue: WaitingQueue) -> Sequence:
    sequence = next(queue.in_turn())
    queue.take(sequence)
    queue.charge(sequence, len(sequence.prompt_ids))
    return sequence


def test_one_client_is_served_in_the_order_of_arrival() -> None:
    queue = WaitingQueue()
    sequences = [asked_by("", num_tokens=n) for n in (5, 1, 300, 2, 5, 7, 7, 1, 1, 1, 1)]
    for sequence in sequences:
        queue.add(sequence)
    assert [serve_next(queue) for _ in sequences] == sequences
    assert len(queue) == 0


@settings(max_examples=20)
@given(
    sizes=st.lists(st.integers(1, 50), min_size=2, max_size=4),
    counts=st.lists(st.integers(20, 60), min_size=4, max_size=4),
)
def test_clients_with_much_to_do_are_served_alike(sizes: list[int], counts: list[int]) -> None:
    """However many requests each sends, and however long they are."""
    queue = WaitingQueue()
    for client, size in enumerate(sizes):
        for _ in range(counts[client] * 50 // size):
            queue.add(asked_by(str(client), num_tokens=size))
    served: Counter[str] = Counter()
    num_clients = len(sizes)
    waiting: Counter[str] = Counter(s.client for s in queue.in_turn())
    while len(waiting) == num_clients:
        sequence = serve_next(queue)
        served[sequence.client] += len(sequence.prompt_ids)
        waiting -= Counter([sequence.client])
        # the oldest has a turn of its own now and then
        slack = 2 * max(sizes) + sum(served.values()) / OLDEST_SHARE
        assert max(served.values()) - min(served[str(c)] for c in range(num_clients)) <= slack


def test_a_client_cannot_save_up_the_time_when_it_asked_for_nothing() -> None:
    queue = WaitingQueue()
    for _ in range(50):
        queue.add(asked_by("busy"))
    for _ in range(20):
        serve_next(queue)
    for _ in range(20):
        queue.add(asked_by("late"))
    served = Counter(serve_next(queue).client for _ in range(20))
    assert abs(served["busy"] - served["late"]) <= 4


def test_a_better_priority_goes_first_within_a_client() -> None:
    queue = WaitingQueue()
    patient, usual, urgent = (asked_by("a", priority=priority) for priority in (1, 0, -1))
    for sequence in (patient, usual, urgent):
        queue.add(sequence)
    assert [serve_next(queue) for _ in range(3)] == [urgent, usual, patient]


def test_a_priority_buys_no_share_of_another_client() -> None:
    queue = WaitingQueue()
    for _ in range(10):
        queue.add(asked_by("greedy", priority=-100))
        queue.add(asked_by("modest"))
    served = Counter(serve_next(queue).client for _ in range(10))
    assert abs(served["greedy"] - served["modest"]) <= 2


@given(
    priority=st.integers(0, 2),
    arrivals=st.lists(st.tuples(st.booleans(), st.integers(1, 2_000)), min_size=1, max_size=5),
)
def test_nobody_starves(priority: int, arrivals: list[tuple[bool, int]]) -> None:
    """Whatever keeps coming: new clients that were never served, or better priorities."""
    queue = WaitingQueue()
    patient = asked_by("patient", priority=priority)
    queue.charge(patient, 10_000)
    queue.add(patient)
    num_turns = num_served = 0
    longest = max(num_tokens for _, num_tokens in arrivals)
    while patient in queue:
        is_new, num_tokens = arrivals[num_turns % len(arrivals)]
        client = f"new {num_turns}" if is_new else "patient"
        queue.add(asked_by(client, num_tokens=num_tokens))
        num_served += len(serve_next(queue).prompt_ids)
        num_turns += 1
        # others overtake for its head start's worth of tokens, and then until the oldest's turn
        assert num_served <= priority * PRIORITY_TOKENS + 3 * OLDEST_SHARE * longest


def test_who_is_put_back_keeps_its_place() -> None:
    queue = WaitingQueue()
    first, second = asked_by("a"), asked_by("a")
    queue.add(first)
    queue.add(second)
    assert serve_next(queue) is first
    later = asked_by("a")
    queue.add(later)
    queue.put_back(first)
    assert [serve_next(queue) for _ in range(3)] == [first, second, later]


def test_who_is_passed_over_keeps_its_place_and_lets_others_go() -> None:
    queue = WaitingQueue()
    first, second, third = (asked_by("a") for _ in range(3))
    for sequence in (first, second, third):
        queue.add(sequence)
    turns = queue.in_turn()
    assert next(turns) is first
    assert next(turns) is second
    queue.take(second)
    assert next(turns) is third
    assert list(queue.in_turn()) == [first, third]


@given(
    clients=st.lists(st.sampled_from("abc"), max_size=12),
    are_taken=st.lists(st.booleans(), min_size=12, max_size=12),
)
def test_everybody_has_one_turn_whoever_is_taken_meanwhile(
    clients: list[str], are_taken: list[bool]
) -> None:
    queue = WaitingQueue()
    sequences = [asked_by(client) for client in clients]
    for sequence in sequences:
        queue.add(sequence)
    turns: list[Sequence] = []
    for sequence, is_taken in zip(queue.in_turn(), are_taken, strict=False):
        turns.append(sequence)
        if is_taken:
            queue.take(sequence)
            queue.charge(sequence, 10)
    for client in "abc":
        own = [sequence for sequence in sequences if sequence.client == client]
        assert [sequence for sequence in turns if sequence.client == client] == own
    passed_over = [s for s, is_taken in zip(turns, are_taken, strict=False) if not is_taken]
    assert set(queue.in_turn()) == set(passed_over)


def test_who_is_removed_does_not_come_up() -> None:
    queue = WaitingQueue()
    first, second = asked_by("a"), asked_by("b")
    queue.add(first)
    queue.add(second)
    queue.remove(first)
    assert first not in queue
    assert list(queue.in_turn()) == [second]
    with pytest.raises(KeyError):
        queue.remove(first)


def test_clients_that_came_once_are_forgotten() -> None:
    queue = WaitingQueue()
    for number in range(5_000):
        queue.add(asked_by(f"client {number}"))
        serve_next(queue)
    assert len(queue._served) <= 1_024


@pytest.mark.parametrize("num_tokens", [0, 200])
def test_a_client_that_was_forgotten_while_it_ran_comes_back_at_the_floor(num_tokens: int) -> None:
    queue = WaitingQueue()
    running = asked_by("running")
    queue.add(running)
    serve_next(queue)
    for number in range(1_100):  # until clients are forgotten
        queue.add(asked_by(f"client {number}", num_tokens=50))
        serve_next(queue)
    waiting = asked_by("waiting")
    queue.add(waiting)
    if num_tokens:
        queue.charge(running, num_tokens)
    queue.put_back(running)
    queue._oldest_from = 10**9  # by share alone
    expected = [waiting, running] if num_tokens else [running, waiting]
    assert [serve_next(queue), serve_next(queue)] == expected


def test_the_turn_of_the_oldest_goes_by_arrival_whatever_priority_others_claim() -> None:
    queue = WaitingQueue()
    patient = asked_by("patient")
    queue.charge(patient, 1_000_000)
    queue.add(patient)
    for _ in range(3):
        queue.add(asked_by("pushy", num_tokens=1, priority=-1_000))
    assert serve_next(queue) is patient  # nothing has been served out of turn yet

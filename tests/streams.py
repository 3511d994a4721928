"""Many streams at a time from a running service, with what a client sees of a disturbance."""

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from cluster.client import Client

WORDS = ("cat", "dog", "bird", "fish", "boy", "girl", "tree", "ball")
STARTS = ("Once upon a time", "One day", "In a big house", "Far away")


def prompts(count: int) -> list[str]:
    """Different beginnings of stories, at most 32."""
    return [f"{start} there was a {word}" for start in STARTS for word in WORDS][:count]


@dataclass
class Story:
    """What one stream told. gaps_s: between two chunks."""

    text: str = ""
    gaps_s: list[float] = field(default_factory=list)


def tell(
    client: Client, prompt: str, max_tokens: int, on_chunk: Callable[[], None] = lambda: None
) -> Story:
    """One greedy stream. Raises what the client raises when it fails."""
    story = Story()
    last = time.monotonic()
    with client.completions.create(
        prompt=prompt, max_tokens=max_tokens, temperature=0, stream=True
    ) as chunks:
        for chunk in chunks:
            now = time.monotonic()
            if story.text:
                story.gaps_s.append(now - last)
            last = now
            story.text += chunk.choices[0].text
            on_chunk()
    return story


def tell_until(
    client: Client, prompt: str, max_tokens: int, is_over: threading.Event
) -> list[Story]:
    """The same story, one stream after the other."""
    stories = []
    while not is_over.is_set():
        stories.append(tell(client, prompt, max_tokens))
    return stories


def tell_all(
    client: Client,
    prompts: Sequence[str],
    max_tokens: int,
    disturb: Callable[[], None],
    after: int,
) -> list[Story]:
    """All at once; `disturb` is called once, in the midst of them: after so many chunks of all.

    Raises AssertionError when there were not so many.
    """
    num_left = after
    counting = threading.Lock()

    def count() -> None:
        nonlocal num_left
        with counting:
            num_left -= 1
            is_time = num_left == 0
        if is_time:
            disturb()

    with ThreadPoolExecutor(len(prompts)) as pool:
        stories = list(pool.map(lambda prompt: tell(client, prompt, max_tokens, count), prompts))
    assert num_left <= 0, f"all streams ended {num_left} chunks before the disturbance"
    return stories


def percentile(values: Sequence[float], percent: float) -> float:
    """Nearest rank."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))]

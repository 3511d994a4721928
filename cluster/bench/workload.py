"""What a load generator asks for, and when. Pure: seeded, no clock, no I/O."""

import json
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any, Protocol

from cluster.errors import ConfigurationError

Prompt = str | Sequence[int]
"""Text, or token ids."""

FIRST_ID = 300
"""Lower ids are control tokens and single bytes in the tokenizers of Mistral's and Llama's line."""

_WORDS = """
the wind blew over a small house and all who lived there went to the sea with their old dog to look
for ships that come from far away in spring when days grow long
"""


@dataclass(frozen=True)
class Job:
    """One request to make."""

    prompt: Prompt
    output_tokens: int


class Jobs(Protocol):
    """A source of requests. The same number is always the same request."""

    def job(self, number: int) -> Job: ...


def jobs_from(jobs: Jobs, first: int, how_many: int | None) -> Iterator[Job]:
    """Requests number `first` and following; without end if how_many is None."""
    numbers = count(first) if how_many is None else range(first, first + how_many)
    return (jobs.job(number) for number in numbers)


@dataclass(frozen=True)
class Lengths:
    """A distribution of lengths in tokens: fixed (low == high), uniform, or log-normal."""

    low: int
    high: int
    sigma: float | None = None
    """Of the logarithm: log-normal with median `low`, cut to 1..high."""

    @classmethod
    def parse(cls, text: str) -> "Lengths":
        """`128`, `64-512` (uniform, both ends included) or `lognormal:256:0.5` (median, sigma).

        A log-normal length is cut at eight times the median. Raises ConfigurationError.
        """
        try:
            if text.startswith("lognormal:"):
                _, median_text, sigma_text = text.split(":")
                median, sigma = int(median_text), float(sigma_text)
                if median >= 1 and 0 < sigma < 10:
                    return cls(median, 8 * median, sigma)
            else:
                low_text, _, high_text = text.partition("-")
                low, high = int(low_text), int(high_text or low_text)
                if 1 <= low <= high:
                    return cls(low, high)
        except ValueError:
            pass
        raise ConfigurationError(
            f"{text!r} is no length in tokens; write 128, 64-512 or lognormal:256:0.5"
        )

    def draw(self, rng: random.Random) -> int:
        if self.sigma is None:
            return rng.randint(self.low, self.high)
        drawn = rng.lognormvariate(math.log(self.low), self.sigma)
        return min(max(1, round(drawn)), self.high)


@dataclass(frozen=True)
class Synthetic:
    """Random prompts: every request has another one, so no prefix cache helps a server."""

    input_lengths: Lengths
    output_lengths: Lengths
    vocab_size: int
    """Ids are drawn from FIRST_ID up to this."""
    seed: int
    as_text: bool = False
    """Words instead of ids; about one token each, the server counts."""

    def __post_init__(self) -> None:
        if self.vocab_size <= FIRST_ID:
            raise ConfigurationError(
                f"a vocabulary of {self.vocab_size} ids is too small: synthetic prompts use the "
                f"ids from {FIRST_ID} on"
            )

    def job(self, number: int) -> Job:
        rng = random.Random(f"{self.seed}/{number}")
        num_input = self.input_lengths.draw(rng)
        num_output = self.output_lengths.draw(rng)
        if self.as_text:
            return Job(" ".join(rng.choices(_WORDS.split(), k=num_input)), num_output)
        return Job(rng.choices(range(FIRST_ID, self.vocab_size), k=num_input), num_output)


@dataclass(frozen=True)
class Given:
    """Prompts of a file, over and over."""

    prompts: Sequence[Prompt]
    output_lengths: Lengths
    seed: int

    @classmethod
    def parse(cls, text: str, output_lengths: Lengths, seed: int) -> "Given":
        """One prompt a line: JSON objects with `prompt` (text or ids), or plain text.

        Raises ConfigurationError naming the line.
        """
        lines = [(n, line) for n, line in enumerate(text.splitlines(), 1) if line.strip()]
        if not lines:
            raise ConfigurationError("the file of prompts is empty")
        return cls([_prompt_of(line, number) for number, line in lines], output_lengths, seed)

    def job(self, number: int) -> Job:
        rng = random.Random(f"{self.seed}/{number}")
        return Job(self.prompts[number % len(self.prompts)], self.output_lengths.draw(rng))


def _prompt_of(line: str, number: int) -> Prompt:
    if not line.lstrip().startswith("{"):
        return line
    try:
        fields: Mapping[str, Any] = json.loads(line)
    except ValueError as error:
        raise ConfigurationError(f"line {number} of the prompts is no JSON: {error}") from error
    prompt = fields.get("prompt")
    if isinstance(prompt, list) and prompt and all(type(token_id) is int for token_id in prompt):
        return prompt
    if isinstance(prompt, str) and prompt:
        return prompt
    raise ConfigurationError(f"line {number} of the prompts has no `prompt` of text or token ids")


def poisson_arrivals(rate: float, seed: int) -> Iterator[float]:
    """Seconds from the start at which requests arrive, `rate` a second on average, without end."""
    rng = random.Random(f"arrivals/{seed}")
    now_s = 0.0
    while True:
        now_s += rng.expovariate(rate)
        yield now_s

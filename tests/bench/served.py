"""What the front end costs: the same streams from a served model, and from its engine alone.

In turns within each round, because a shared machine drifts, one load of 16 callers on
    bare    the head's engine in this process, its experts on worker processes
    served  `maestrale serve` with the same settings, over HTTP
    echo    a Serve deployment that only says a token as often as the served model did, by a handle:
            what a stream through Ray Serve costs that computes nothing

    python -m tests.bench.served [--model FOLDER] [--rounds 5] [--callers 16] [--requests 48]
"""

import argparse
import asyncio
import os
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch
from ray import serve
from rich.console import Console
from rich.table import Table

from cluster.app import running
from cluster.bench.load import Send, closed_loop
from cluster.bench.summary import Record, Summary, summarise
from cluster.bench.target import Target
from cluster.bench.workers import connected, makers_for, running_workers
from cluster.bench.workload import Job, Lengths, Synthetic, jobs_from
from cluster.client.settings import settings
from cluster.config import ServeConfig
from cluster.head.build import new_engine
from cluster.head.engine import Engine
from cluster.head.events import Event
from cluster.head.sequence import Sequence as EngineSequence
from cluster.head.stopwatch import Stopwatch
from cluster.metrics import HeadMetrics
from cluster.planning import plan
from model.decoder import Decoder
from model.sampling_params import SamplingParams
from model.weights import Checkpoint, torch_dtype

TIMEOUT_S = 600.0


@dataclass(frozen=True)
class Load:
    """What each of the three is put through."""

    jobs: Synthetic
    callers: int
    requests: int

    async def run(self, send: Send, first: int) -> Summary:
        """first: number of the first request; each number is another prompt."""
        jobs = jobs_from(self.jobs, first, self.requests)
        records = await closed_loop(
            send, jobs, concurrency=self.callers, on_record=lambda record: None
        )
        summary = summarise(records)
        if summary.errors:
            raise SystemExit(f"requests failed: {summary.errors}")
        return summary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--dtype")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--callers", type=int, default=16)
    parser.add_argument("--requests", type=int, default=48)
    parser.add_argument("--input-tokens", default="32")
    parser.add_argument("--output-tokens", default="64")
    wanted = parser.parse_args()
    config = ServeConfig(model=wanted.model, dtype=wanted.dtype)
    lengths = Lengths.parse(wanted.input_tokens), Lengths.parse(wanted.output_tokens)
    with bare_engine(config) as bare, served(config) as service:
        jobs = Synthetic(*lengths, vocab_size=bare.vocab_size, seed=1)
        load = Load(jobs, wanted.callers, wanted.requests)
        rounds = asyncio.run(all_rounds(load, bare, service, wanted.rounds))
    Console().print(as_table(rounds))


@dataclass
class Round:
    bare: Summary
    served: Summary
    echo: Summary
    front_cpu_s: float
    """Of Serve's proxy and the ingress, for each token of `served`."""

    def __str__(self) -> str:
        rates = (self.bare.output_tokens_per_s, self.served.output_tokens_per_s)
        return "bare {:.1f} tokens/s, served {:.1f}".format(*rates)


async def all_rounds(load: Load, bare: "Bare", service: "Served", number: int) -> list[Round]:
    target = Target(settings(base_url=service.url, api_key=None, timeout=TIMEOUT_S, environ={}))
    async with target:
        await target.find_model()
        warm_up = replace(load, requests=load.callers)
        await one_round(warm_up, bare, service, target, 0)
        rounds = []
        for index in range(number):
            first = load.callers + index * load.requests
            rounds.append(await one_round(load, bare, service, target, first))
            print(f"round {index + 1} of {number}: {rounds[-1]}", flush=True)
    return rounds


async def one_round(
    load: Load, bare: "Bare", service: "Served", target: Target, first: int
) -> Round:
    alone = await load.run(bare.send, first)
    before_s = service.front_cpu_s()
    over_http = await load.run(target.send, first)
    front_cpu_s = service.front_cpu_s() - before_s
    echoed = await load.run(service.echo(load.callers / over_http.output_tokens_per_s), first)
    num_tokens = over_http.output_tokens_per_s * over_http.duration_s
    return Round(alone, over_http, echoed, front_cpu_s / num_tokens)


class Bare:
    """An engine without a front end. Its callers are on an event loop, it on a thread."""

    def __init__(self, engine: Engine, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self._engine = engine
        self._keys = count()

    async def send(self, job: Job, _intended_s: float | None) -> Record:
        assert isinstance(job.prompt, list)
        loop = asyncio.get_running_loop()
        answer = _Answer(loop)
        params = SamplingParams(max_tokens=job.output_tokens, temperature=0.0)
        sent_s = loop.time()
        self._engine.submit(answer, next(self._keys), EngineSequence(job.prompt, params))
        await answer.ended.wait()
        return record(sent_s, answer.chunks_s, job)


@dataclass(eq=False)
class _Answer:
    """An outbox of one request."""

    loop: asyncio.AbstractEventLoop
    chunks_s: list[float] = field(default_factory=list)
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    def put(self, events: Sequence[Event]) -> None:
        self.loop.call_soon_threadsafe(self._take, events)

    def _take(self, events: Sequence[Event]) -> None:
        for event in events:
            if event.token_ids:
                self.chunks_s.append(self.loop.time())
            if event.finish or event.error:
                self.ended.set()


def record(sent_s: float, chunks_s: list[float], job: Job) -> Record:
    return Record(
        intended_s=sent_s,
        sent_s=sent_s,
        chunks_s=tuple(chunks_s),
        ended_s=chunks_s[-1],
        input_tokens=len(job.prompt),
        output_tokens=len(chunks_s),
        error=None if len(chunks_s) == job.output_tokens else "length",
    )


@contextmanager
def bare_engine(config: ServeConfig) -> Iterator[Bare]:
    torch.set_num_threads(config.head_threads)
    folder = config.checkpoint_folder()
    checkpoint = Checkpoint(folder, dtype=torch_dtype(config.dtype))
    table = plan(
        num_layers=checkpoint.config.num_hidden_layers,
        num_experts=checkpoint.config.num_local_experts,
        expert_bytes=[checkpoint.expert_bytes] * config.num_workers,
        budgets=[None] * config.num_workers,
    )
    makers = makers_for(folder, table, config.num_workers, dtype=config.dtype, quantization=None)
    stopwatch = Stopwatch()
    decoder = Decoder(checkpoint.config, checkpoint.load_decoder(), phases=stopwatch)
    with running_workers(makers, num_threads=config.worker_threads) as workers:
        experts = connected(
            workers,
            table,
            (checkpoint.config, checkpoint.dtype),
            stopwatch,
            timeout_s=TIMEOUT_S,
        )
        engine = new_engine(config, decoder, experts, HeadMetrics(), None, stopwatch)
        thread = threading.Thread(target=engine.run, daemon=True)
        thread.start()
        try:
            yield Bare(engine, checkpoint.config.vocab_size)
        finally:
            engine.stop()
            thread.join()
            experts.close()


class Served:
    """A service, and beside it on the same Ray an echo."""

    def __init__(self, url: str, echo: Any) -> None:
        self.url = url
        self._echo = echo

    def echo(self, gap_s: float) -> Send:
        async def send(job: Job, _intended_s: float | None) -> Record:
            sent_s, chunks_s = asyncio.get_running_loop().time(), []
            async for _ in self._echo.options(stream=True).remote(job.output_tokens, gap_s):
                chunks_s.append(asyncio.get_running_loop().time())
            return record(sent_s, chunks_s, job)

        return send

    def front_cpu_s(self) -> float:
        """Processor time so far of what stands between a caller and a head."""
        total_s = 0.0
        for process in psutil.Process(os.getpid()).children(recursive=True):
            title = "".join(process.cmdline()[:1])
            if "ProxyActor" in title or "maestrale:Ingress" in title:
                times = process.cpu_times()
                total_s += times.user + times.system
        return total_s


class Echo:
    """Says a token every so often."""

    async def __call__(self, num_tokens: int, gap_s: float) -> AsyncIterator[str]:
        for _ in range(num_tokens):
            await asyncio.sleep(gap_s)
            yield "a token"


@contextmanager
def served(config: ServeConfig) -> Iterator[Served]:
    with running(config, port=0) as client:
        deployment = serve.deployment(max_ongoing_requests=1_000)(Echo)
        echo = serve.run(deployment.bind(), name="echo", route_prefix=None)
        try:
            yield Served(client.base_url, echo)
        finally:
            serve.delete("echo")


def as_table(rounds: Sequence[Round]) -> Table:
    """Medians over the rounds, with the least and the most."""
    table = Table(title="served beside its engine alone")
    for heading in ("", "bare", "served", "served / bare", "echo"):
        table.add_column(heading, justify="right")

    def add(name: str, value: Callable[[Summary], float], scale: float = 1.0) -> None:
        columns = [
            [scale * value(summary) for summary in summaries]
            for summaries in zip(*((r.bare, r.served, r.echo) for r in rounds), strict=True)
        ]
        ratios = [b / a for a, b in zip(columns[0], columns[1], strict=True)]
        cells = [spread(column) for column in (columns[0], columns[1], ratios, columns[2])]
        table.add_row(name, *cells)

    add("tokens per second", lambda summary: summary.output_tokens_per_s)
    add("first token, ms", lambda summary: summary.measures["ttft"].p50, 1e3)  # type: ignore[union-attr]
    for percent in (50, 99):
        add(f"gap p{percent}, ms", lambda s, p=percent: getattr(s.measures["gap"], f"p{p}"), 1e3)
    front = [1e3 * one.front_cpu_s for one in rounds]
    table.add_row("proxy and ingress, CPU ms a token", "", spread(front), "", "")
    return table


def spread(values: Sequence[float]) -> str:
    return f"{median(values):.3g} ({min(values):.3g} to {max(values):.3g})"


if __name__ == "__main__":
    main()

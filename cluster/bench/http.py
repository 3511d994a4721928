"""`bench http`: a plan of loads, run one after another on one server."""

import asyncio
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import httpx

from cluster.bench.load import OnRecord, closed_loop, open_loop
from cluster.bench.progress import ProgressLine
from cluster.bench.report import Point, Run
from cluster.bench.summary import Limits, Record, summarise
from cluster.bench.target import Target
from cluster.bench.workload import Jobs, jobs_from, poisson_arrivals
from cluster.client.settings import settings
from cluster.errors import ConfigurationError


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to put a server through."""

    jobs: Jobs
    is_open: bool
    """Whether `loads` are requests a second (open loop), or callers at a time (closed loop)."""
    loads: Sequence[float]
    num_requests: int | None
    """Of each load. None: until `duration_s`."""
    duration_s: float | None
    num_warmup: int
    limits: Limits | None
    seed: int


async def measure(
    plan: Plan,
    *,
    url: str | None,
    model: str | None,
    chat: bool,
    ignore_eos: bool,
    timeout_s: float,
    environ: Mapping[str, str],
    transport: httpx.AsyncBaseTransport | None = None,
) -> Run:
    """Run a plan, with a line of progress on standard error.

    Raises ConfigurationError, or APIError where the server cannot be asked at all.
    """
    checked = settings(base_url=url, api_key=None, timeout=timeout_s, environ=environ)

    target = Target(checked, chat=chat, ignore_eos=ignore_eos, transport=transport)
    async with target:
        target.model = model or await target.find_model()
        return await _run(plan, target)


async def _run(plan: Plan, target: Target) -> Run:
    load_name = "offered/s" if plan.is_open else "callers"
    facts = {
        "server": target.root,
        "model": str(target.model),
        "loop": "open" if plan.is_open else "closed",
        "client": f"{platform.node()}, Python {platform.python_version()}",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    first = await _warm_up(plan, target)
    points = []
    for number, load in enumerate(plan.loads):
        with ProgressLine(f"{load:g} {load_name}", plan.num_requests) as line:
            records = await _one_load(plan, target, load, first, number, line.add)
        first += len(records)  # a prompt that was seen before might be cached by now
        points.append(Point(load, records, summarise(records, plan.limits)))
    return Run(facts, load_name, points)


async def _warm_up(plan: Plan, target: Target) -> int:
    """Requests that are not counted; returns how many. Raises where one fails: all would."""
    jobs = jobs_from(plan.jobs, 0, plan.num_warmup)
    records = await asyncio.gather(*(target.send(job, None) for job in jobs))
    for record in records:
        if record.error is not None:
            raise ConfigurationError(
                f"a warm-up request failed ({record.error}): {record.message}. Servers that refuse "
                "token ids need --text, those that refuse unknown fields --no-ignore-eos"
            )
    return len(records)


async def _one_load(
    plan: Plan, target: Target, load: float, first: int, number: int, on_record: OnRecord
) -> list[Record]:
    jobs = jobs_from(plan.jobs, first, plan.num_requests)
    if not plan.is_open:
        return await closed_loop(
            target.send,
            jobs,
            concurrency=int(load),
            duration_s=plan.duration_s,
            on_record=on_record,
        )
    records = await open_loop(
        target.send,
        jobs,
        poisson_arrivals(load, plan.seed + number),
        duration_s=plan.duration_s,
        on_record=on_record,
    )
    if not records:
        raise ConfigurationError(
            f"no request arrived in {plan.duration_s:g} s at {load:g} a second; raise --duration"
        )
    return records

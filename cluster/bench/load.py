"""Keeps a server busy: a fixed number of callers (closed loop), or arrivals whatever the server
does (open loop). Knows no HTTP; time is the event loop's."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator

from cluster.bench.summary import Record
from cluster.bench.workload import Job

Send = Callable[[Job, float | None], Awaitable[Record]]
"""Makes one request that should be sent at a time (None: now). Never raises for a failed one."""

OnRecord = Callable[[Record], None]


async def closed_loop(
    send: Send,
    jobs: Iterator[Job],
    *,
    concurrency: int,
    duration_s: float | None = None,
    on_record: OnRecord,
) -> list[Record]:
    """So many callers, each of whom asks again as soon as it has its answer.

    Ends with the jobs, or takes no more once the duration has passed; answers in progress are
    awaited.
    """
    loop = asyncio.get_running_loop()
    deadline_s = None if duration_s is None else loop.time() + duration_s
    records: list[Record] = []

    async def call_again_and_again() -> None:
        for job in jobs:  # one iterator for all callers
            record = await send(job, None)
            records.append(record)
            on_record(record)
            if deadline_s is not None and loop.time() >= deadline_s:
                return

    async with asyncio.TaskGroup() as callers:
        for _ in range(concurrency):
            callers.create_task(call_again_and_again())
    return records


async def open_loop(
    send: Send,
    jobs: Iterator[Job],
    arrivals_s: Iterator[float],
    *,
    duration_s: float | None = None,
    on_record: OnRecord,
) -> list[Record]:
    """Requests at the given seconds from now, however many are still unanswered.

    Ends as `closed_loop` does.
    """
    loop = asyncio.get_running_loop()
    started_s = loop.time()
    records: list[Record] = []

    async def call(job: Job, intended_s: float) -> None:
        record = await send(job, intended_s)
        records.append(record)
        on_record(record)

    async with asyncio.TaskGroup() as calls:
        for arrival_s, job in zip(arrivals_s, jobs, strict=False):
            if duration_s is not None and arrival_s > duration_s:
                break
            await asyncio.sleep(started_s + arrival_s - loop.time())
            calls.create_task(call(job, started_s + arrival_s))
    return records

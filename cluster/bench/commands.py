"""The verbs of `maestrale bench`. What needs httpx or torch is imported inside its verb."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from cluster.errors import ConfigurationError
from cluster.extras import need_server_extra
from cluster.options import DType

app = typer.Typer(help="Measure a server, the engine, or one round trip.", no_args_is_help=True)

Json = Annotated[Path | None, typer.Option("--json", help="Write all numbers to this file.")]


@app.command()
def http(
    url: Annotated[
        str | None, typer.Option(help="Server to measure; MAESTRALE_BASE_URL if left out.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Model id; the first that the server names.")
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Ask /v1/chat/completions.")] = False,
    concurrency: Annotated[
        str | None,
        typer.Option(help="Closed loop: callers at a time, or several: 1,8,32. (8 if left out)"),
    ] = None,
    rate: Annotated[
        str | None,
        typer.Option(help="Open loop: Poisson arrivals a second, or several: 1,2.5,4."),
    ] = None,
    requests: Annotated[
        int | None, typer.Option(min=1, help="Requests of each load. (100 if left out)")
    ] = None,
    duration: Annotated[
        float | None, typer.Option(help="Seconds of each load, instead of --requests.")
    ] = None,
    warmup: Annotated[
        int, typer.Option(min=0, help="Requests before the first load; not counted.")
    ] = 4,
    input_tokens: Annotated[
        str, typer.Option(help="Prompt lengths: 128, 64-512 or lognormal:256:0.5.")
    ] = "128",
    output_tokens: Annotated[str, typer.Option(help="Answer lengths, likewise.")] = "64",
    ignore_eos: Annotated[
        bool, typer.Option(help="Ask for answers of exactly that length (not OpenAI's own API).")
    ] = True,
    prompts: Annotated[
        Path | None,
        typer.Option(help="File of prompts, one a line: text, or JSON with `prompt`."),
    ] = None,
    text: Annotated[
        bool, typer.Option("--text", help="Prompts of words, for servers that refuse token ids.")
    ] = False,
    vocab_size: Annotated[
        int, typer.Option(help="Synthetic prompts use the ids from 300 up to this.")
    ] = 2000,
    seed: Annotated[int, typer.Option(help="Same seed, same prompts and arrivals.")] = 0,
    goodput: Annotated[
        str, typer.Option(help="Limits of a good request, ms: 'ttft:500 tpot:50 e2e:5000'.")
    ] = "",
    timeout: Annotated[float, typer.Option(help="Longest silence of the server, seconds.")] = 600,
    json_file: Json = None,
    html: Annotated[Path | None, typer.Option(help="Write a report with plots.")] = None,
) -> None:
    """Load any OpenAI-compatible server and measure its latency and throughput.

    An API key is read from MAESTRALE_API_KEY.
    """
    import asyncio

    from cluster.bench import http as bench
    from cluster.bench.page import page
    from cluster.bench.report import as_json, heading, notes, rates, times
    from cluster.bench.summary import Limits
    from cluster.bench.workload import Given, Lengths, Synthetic
    from cluster.console import console

    if concurrency is not None and rate is not None:
        raise ConfigurationError("--concurrency and --rate exclude each other")
    if requests is not None and duration is not None:
        raise ConfigurationError("--requests and --duration exclude each other")
    if duration is not None and not 0 < duration < float("inf"):
        raise ConfigurationError(f"--duration {duration} is no number of seconds above 0")
    num_requests = None if duration is not None else requests or 100
    loads: Sequence[float] = _callers(concurrency, num_requests) if rate is None else _numbers(rate)
    _check_writable(json_file, html)
    output_lengths = Lengths.parse(output_tokens)
    jobs = (
        Given.parse(_read(prompts), output_lengths, seed)
        if prompts is not None
        else Synthetic(
            Lengths.parse(input_tokens), output_lengths, vocab_size, seed, as_text=text or chat
        )
    )
    plan = bench.Plan(
        jobs=jobs,
        is_open=rate is not None,
        loads=loads,
        num_requests=num_requests,
        duration_s=duration,
        num_warmup=warmup,
        limits=Limits.parse(goodput),
        seed=seed,
    )
    measuring = bench.measure(
        plan,
        url=url,
        model=model,
        chat=chat,
        ignore_eos=ignore_eos,
        timeout_s=timeout,
        environ=os.environ,
    )
    run = asyncio.run(measuring)
    console.print(heading(run))
    console.print(rates(run).as_rich())
    console.print(times(run).as_rich())
    for line in notes(run):
        console.print(line, style="yellow")
    _write_json(json_file, as_json(run))
    if html is not None:
        _write(html, page(run))


@app.command()
def engine(
    model: Annotated[
        Path | None,
        typer.Option(help="Checkpoint folder or Hub id; the embedded tiny one if left out."),
    ] = None,
    workers: Annotated[
        str,
        typer.Option(help="Worker processes that hold the experts, or several to compare: 0,2."),
    ] = "0",
    sequences: Annotated[str, typer.Option(help="Sequences to decode at a time.")] = "1,8,32",
    prefill: Annotated[str, typer.Option(help="Lengths of prompts to compute, tokens.")] = "512",
    prompt_tokens: Annotated[
        int, typer.Option(min=1, help="Prompt of each sequence that is decoded.")
    ] = 32,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens that each decodes.")] = 64,
    experts: Annotated[
        str | None, typer.Option(help="Quantise experts: nf4, nf4-double, int8 or int4.")
    ] = None,
    dtype: DType = None,
    threads: Annotated[int, typer.Option(min=1, help="Compute threads of this process.")] = 1,
    worker_threads: Annotated[
        int | None, typer.Option(min=1, help="Compute threads of each worker; as many as here.")
    ] = None,
    slices: Annotated[
        int, typer.Option(min=1, help="Workers that each expert is cut over; divides --workers.")
    ] = 1,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds, after one that warms up.")] = 5,
    profile: Annotated[
        bool, typer.Option("--profile", help="Show where a step's time goes, by part.")
    ] = False,
    json_file: Json = None,
) -> None:
    """Measure decoding and prefill in this process: no HTTP, no Ray, synthetic prompts."""
    need_server_extra()
    _check_writable(json_file)
    from cluster.bench.engine import EnginePlan, measure
    from cluster.bench.engine_report import as_json, profile_tables, rates_table
    from cluster.bench.progress import overwrite
    from cluster.console import console, size
    from model import TINY
    from model.hub import resolve

    report = measure(
        EnginePlan(
            folder=TINY if model is None else resolve(model),
            dtype=dtype,
            quantization=experts,
            num_threads=threads,
            worker_threads=worker_threads or threads,
            workers=_integers(workers, least=0),
            num_slices=slices,
            sequences=_integers(sequences),
            prefill=_integers(prefill),
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            rounds=rounds,
            is_profiled=profile,
        ),
        overwrite,
    )
    overwrite("")
    console.print(rates_table(report))
    for table in profile_tables(report) if profile else ():
        console.print(table)
    if report.head_bytes is not None:
        held = [size(number) for number in report.worker_bytes if number is not None]
        console.print(f"memory above an idle process: head {size(report.head_bytes)}", end="")
        console.print(f", workers {', '.join(held)}" if held else "")
    _write_json(json_file, as_json(report, is_profiled=profile))


@app.command()
def dispatch(
    rows: Annotated[str, typer.Option(help="Rows of one dispatch, or several numbers.")] = "1,32",
    hidden: Annotated[int, typer.Option(min=1, help="Values of a row.")] = 4096,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "bfloat16",
    transport: Annotated[str, typer.Option(help="pipe; gRPC by tcp or unix.")] = "pipe,tcp",
    threads: Annotated[int, typer.Option(min=1, help="Compute threads of each process.")] = 1,
    rounds: Annotated[int, typer.Option(min=1, help="Round trips, after 100 more.")] = 1000,
    json_file: Json = None,
) -> None:
    """Measure what one round trip to a worker costs beyond the worker's own computing."""
    need_server_extra()
    _check_writable(json_file)
    from cluster.bench.dispatch import TRANSPORTS, DispatchPlan, measure
    from cluster.bench.dispatch_report import as_json, trips_table
    from cluster.bench.progress import overwrite
    from cluster.console import console

    transports = [name for name in TRANSPORTS if name in transport.split(",")]
    if set(transports) != set(transport.split(",")):
        raise ConfigurationError(
            f"--transport {transport!r}: must be some of {','.join(TRANSPORTS)}"
        )
    found = measure(
        DispatchPlan(
            rows=_integers(rows),
            hidden_size=hidden,
            dtype=dtype,
            transports=transports,
            num_threads=threads,
            rounds=rounds,
        ),
        overwrite,
    )
    overwrite("")
    console.print(trips_table(found))
    _write_json(json_file, as_json(found))


def _callers(concurrency: str | None, num_requests: int | None) -> Sequence[float]:
    """How many ask at a time, of each load. Raises ConfigurationError where some would never ask.

    num_requests: of each load; None for as many as come.
    """
    if concurrency is None:
        return [min(8, num_requests or 8)]
    numbers = _integers(concurrency)
    if num_requests is not None and max(numbers) > num_requests:
        raise ConfigurationError(
            f"{num_requests} requests cannot keep {max(numbers)} callers busy: raise --requests "
            "or lower --concurrency"
        )
    return numbers


def _numbers(text: str) -> list[float]:
    """Numbers above 0, separated by commas."""
    try:
        numbers = [float(item) for item in text.split(",")]
    except ValueError:
        numbers = [0.0]
    if not all(0 < number < float("inf") for number in numbers):
        raise ConfigurationError(f"{text!r} is no list of numbers above 0, such as 1,2.5,4")
    return numbers


def _integers(text: str, *, least: int = 1) -> list[int]:
    """Whole numbers, separated by commas."""
    try:
        numbers = [int(item) for item in text.split(",")]
    except ValueError:
        numbers = [least - 1]
    if min(numbers) < least:
        raise ConfigurationError(
            f"{text!r} is no list of whole numbers of at least {least}, such as 1,8,32"
        )
    return numbers


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"cannot read {file}: {error}") from error


def _check_writable(*files: Path | None) -> None:
    """Raise ConfigurationError now rather than when the numbers are there."""
    for file in files:
        if file is None:
            continue
        if file.is_dir():
            raise ConfigurationError(f"cannot write {file}: it is a folder")
        if not os.access(file if file.exists() else file.parent, os.W_OK):
            raise ConfigurationError(f"cannot write {file}")


def _write_json(file: Path | None, value: Any) -> None:
    if file is not None:
        _write(file, json.dumps(value, indent=1) + "\n")


def _write(file: Path, text: str) -> None:
    try:
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigurationError(f"cannot write {file}: {error}") from error

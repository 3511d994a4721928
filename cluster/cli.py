"""The command line. One verb per function; what needs torch or Ray is imported inside its verb."""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from cluster import log
from cluster.bench.commands import app as bench
from cluster.config import ServeConfig
from cluster.console import (
    STORY_DTYPE,
    STORY_PROMPT,
    BytesLine,
    ProgressLines,
    console,
    errors,
    print_certificates,
    print_inspection,
    print_placement,
    print_rebalancing,
    print_rows,
    tell_story,
)
from cluster.errors import ConfigurationError, MaestraleError
from cluster.extras import need_server_extra
from model.errors import ModelError

if TYPE_CHECKING:
    from cluster.configure import Settings

app = typer.Typer(
    help="Serve Mixtral: attention on head replicas, experts on Ray actors, gRPC in between.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.add_typer(bench, name="bench")
Model = Annotated[
    Path | None,
    typer.Option(
        "--model",
        help="Checkpoint folder or Hugging Face Hub id; the embedded tiny one if left out.",
    ),
]
Experts = Annotated[
    str | None, typer.Option("--experts", help="Quantise experts: nf4, nf4-double, int8 or int4.")
]
AttentionWeights = Annotated[
    str | None, typer.Option("--attention-weights", help="Quantise attention's matrices: the same.")
]
DType = Annotated[
    str | None, typer.Option("--dtype", help="float32, bfloat16 or float16; the checkpoint's own.")
]
Port = Annotated[int, typer.Option(min=0, max=65535, help="HTTP port; 0 takes a free one.")]
ConfigFile = Annotated[
    Path | None,
    typer.Option("--config", help="YAML file of settings; `maestrale config` writes one."),
]
Assignments = Annotated[
    list[str] | None,
    typer.Option("--set", help="Any other setting, as NAME=VALUE; may be given several times."),
]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Show logs and full traces.")]


@app.command()
def generate(
    prompt: Annotated[str, typer.Option(help="Text to continue.")] = STORY_PROMPT,
    local: Annotated[bool, typer.Option("--local", help="Compute in this process.")] = False,
    url: Annotated[
        str | None, typer.Option(help="Server to ask instead; MAESTRALE_BASE_URL if left out.")
    ] = None,
    model: Model = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="New tokens at most.")] = 128,
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy.")] = 0.0,
    top_k: Annotated[int, typer.Option(min=0, help="Keep the k likeliest; 0 keeps all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Keep this much probability mass.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Same seed, same text.")] = 0,
    dtype: DType = None,
    experts: Experts = None,
    attention_weights: AttentionWeights = None,
    verbose: Verbose = False,
) -> None:
    """Continue a text, on a server or with --local in this process."""
    log.set_up(verbose=verbose)
    sampling = {"max_tokens": max_tokens, "temperature": temperature, "top_p": top_p, "seed": seed}
    if local:
        if url:
            raise ConfigurationError("--local and --url exclude each other")
        held = {"expert_quantization": experts, "attention_quantization": attention_weights}
        pieces = _generate_here(
            prompt, model, {"dtype": dtype, **held}, {**sampling, "top_k": top_k}
        )
    else:
        if model or dtype or experts or attention_weights:
            raise ConfigurationError(
                "--model, --dtype, --experts and --attention-weights go with --local; "
                "a server has its own"
            )
        pieces = _generate_there(prompt, url, {**sampling, "top_k": top_k})
    console.print(prompt, end="", markup=False)
    for piece in pieces:
        console.print(piece, end="", markup=False)
    console.print()


def _generate_here(
    prompt: str, model: Path | None, loading: dict[str, Any], sampling: dict[str, Any]
) -> Iterator[str]:
    need_server_extra()
    from model import TINY, Mixtral

    return Mixtral.load(model or TINY, **loading).stream(prompt, **sampling)


def _generate_there(prompt: str, url: str | None, sampling: dict[str, Any]) -> Iterator[str]:
    from cluster.client import Client

    with (
        Client(url) as client,
        client.completions.create(prompt=prompt, stream=True, **sampling) as chunks,
    ):
        for chunk in chunks:
            for choice in chunk.choices:
                yield choice.text


@app.command()
def serve(
    model: Model = None,
    experts: Experts = None,
    attention_weights: AttentionWeights = None,
    served_model_name: Annotated[
        str | None, typer.Option(help="Model id that requests name; the folder's name.")
    ] = None,
    workers: Annotated[int | None, typer.Option(help="Expert workers; 2.")] = None,
    heads: Annotated[int | None, typer.Option(help="Head replicas; 1.")] = None,
    config_file: ConfigFile = None,
    assignments: Assignments = None,
    host: Annotated[str, typer.Option(help="Address to listen on for HTTP.")] = "127.0.0.1",
    port: Port = 8000,
    api_keys_file: Annotated[
        Path | None,
        typer.Option(help="Keys that callers must show, one a line; or set MAESTRALE_API_KEYS."),
    ] = None,
    allow_open_http: Annotated[
        bool, typer.Option("--allow-open-http", help="Serve a network without keys.")
    ] = False,
    grpc_port: Annotated[
        int | None, typer.Option(help="Port of the users' gRPC API; none if left out.")
    ] = None,
    dtype: DType = None,
    address: Annotated[
        str | None, typer.Option(help="Ray cluster to run on; a Ray of its own if left out.")
    ] = None,
    verbose: Verbose = False,
) -> None:
    """Serve a model over HTTP until interrupted.

    Settings: flags win over MAESTRALE_ variables, these over --config, that over the defaults.
    """
    log.set_up(verbose=verbose)
    need_server_extra()
    from cluster.app import running

    config = _settings(
        config_file,
        assignments,
        model=model,
        served_model_name=served_model_name,
        num_workers=workers,
        num_heads=heads,
        dtype=dtype,
        expert_quantization=experts,
        attention_quantization=attention_weights,
        api_keys_file=api_keys_file,
        allow_open_http=allow_open_http or None,
        grpc_port=grpc_port,
    ).config
    with (
        _stopped_by_signals(),
        running(
            config,
            host=host,
            port=port,
            address=address,
            verbose=verbose,
            on_phase=ProgressLines().show,
        ) as client,
    ):
        print_placement(client.cluster.status())
        door = f"{config.grpc_host}:{config.grpc_port}"
        by_grpc = f", by gRPC at {door}" if config.grpc_port else ""
        console.print(
            f"Serving {config.model_id()} at {client.base_url}/v1{by_grpc} (Ctrl-C stops)"
        )
        while True:
            signal.pause()


@app.command("config")
def show_config(config_file: ConfigFile = None, assignments: Assignments = None) -> None:
    """Write every setting with its meaning, unit, bounds and default, as a file for --config.

    The values are those in force: of --config, MAESTRALE_ variables and --set.
    """
    need_server_extra()
    from cluster.configure import as_file

    print(as_file(_settings(config_file, assignments)), end="")


@app.command()
def inspect(
    model: Annotated[Path, typer.Argument(help="Checkpoint folder or Hugging Face Hub id.")],
    workers: Annotated[int, typer.Option(min=1, help="Workers to spread the experts over.")] = 2,
) -> None:
    """Show what is in a checkpoint, and the memory it takes to serve it. Reads headers only."""
    need_server_extra()
    from model.hub import resolve
    from model.inspect import inspect as inspect_checkpoint

    print_inspection(inspect_checkpoint(resolve(model), num_workers=workers))


@app.command()
def quantize(
    source: Annotated[Path, typer.Argument(help="Checkpoint folder or Hugging Face Hub id.")],
    target: Annotated[Path, typer.Argument(help="Empty or new folder for the copy.")],
    mode: Annotated[str, typer.Option(help="nf4, nf4-double, int8 or int4.")] = "int4",
    attention_weights: AttentionWeights = None,
    dtype: DType = None,
) -> None:
    """Write a copy of a checkpoint with quantised experts, to be served like any other."""
    need_server_extra()
    from model.hub import resolve
    from model.quantized_copy import save_quantized
    from model.weights import Checkpoint, torch_dtype

    folder = resolve(source)
    as_copied = Checkpoint(
        folder,
        dtype=torch_dtype(dtype),
        expert_quantization=mode,
        attention_quantization=attention_weights,
    )
    num_experts = len(as_copied.config.expert_units)
    total = as_copied.decoder_bytes + num_experts * as_copied.expert_bytes
    save_quantized(
        Checkpoint(folder, dtype=torch_dtype(dtype)),
        target,
        mode,
        BytesLine(f"writing {target}", total).add,
        attention_mode=attention_weights,
    )


@app.command()
def rebalance(
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only show what would move, and what it would gain.")
    ] = False,
    url: Annotated[
        str | None, typer.Option(help="Server to ask; MAESTRALE_BASE_URL if left out.")
    ] = None,
) -> None:
    """Move experts to where they are best for the load of now, while they are served."""
    from cluster.client import Client

    with Client(url) as client:
        print_rebalancing(client.cluster.rebalance(dry_run=dry_run))


@app.command()
def certs(
    out: Annotated[Path, typer.Option(help="Folder to fill; what is there stays.")],
) -> None:
    """Make a certificate authority and an identity for each role, for mutual TLS."""
    need_server_extra()
    from cluster.certs import write_certificates

    print_certificates(out, write_certificates(out))


@app.command()
def demo(
    max_tokens: Annotated[int, typer.Option(min=1, help="Length of the story.")] = 160,
    port: Port = 0,
    verbose: Verbose = False,
) -> None:
    """Start everything with two expert workers, tell a story, stop everything."""
    log.set_up(verbose=verbose)
    need_server_extra()
    from cluster.app import running

    console.print("Maestrale demo: one head replica, two expert workers, gRPC in between")
    lines = ProgressLines()
    with (
        _stopped_by_signals(),
        running(
            ServeConfig(num_workers=2, dtype=STORY_DTYPE),
            port=port,
            verbose=verbose,
            on_phase=lines.show,
        ) as client,
    ):
        print_placement(client.cluster.status())
        tell_story(client, max_tokens)
        print_rows(client.cluster.metrics())
        lines.line("stopping")
    lines.line("stopped")


def _settings(file: Path | None, assigned: list[str] | None, **flags: Any) -> "Settings":
    """The settings in force. A flag of its own wins over --set."""
    from cluster.configure import assignments, gather

    given = {name: value for name, value in flags.items() if value is not None}
    return gather(file=file, environ=os.environ, flags=assignments(assigned or ()) | given)


@contextmanager
def _stopped_by_signals() -> Iterator[None]:
    """End the block in order on Ctrl-C or SIGTERM; a second signal does not cut that short."""

    def stop(signum: int, _frame: object) -> NoReturn:
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_IGN)
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    try:
        yield
    except KeyboardInterrupt:
        console.print("\nstopped")


def main() -> None:
    """Entry point. Errors of our own end in one line and exit code 1."""
    try:
        app()
    except (MaestraleError, ModelError) as error:
        if {"--verbose", "-v"} & set(sys.argv):
            raise
        errors.print(f"error: {error}", style="red", markup=False)
        sys.exit(1)


if __name__ == "__main__":
    main()

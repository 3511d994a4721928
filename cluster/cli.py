"""The command line. One verb per function; those that run a service are in `serving`.

What needs torch or Ray is imported inside its verb.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from cluster import log
from cluster.bench.commands import app as bench
from cluster.console import (
    STORY_PROMPT,
    BytesLine,
    console,
    errors,
    print_certificates,
    print_inspection,
    print_rebalancing,
    print_status,
)
from cluster.errors import ConfigurationError, MaestraleError
from cluster.extras import need_server_extra
from cluster.options import AttentionWeights, DType, Experts, Model, Verbose
from cluster.serving import demo, serve, show_config
from model.errors import ModelError

app = typer.Typer(
    help="Serve Mixtral: attention on head replicas, experts on Ray actors, gRPC in between.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.add_typer(bench, name="bench")


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
    console.print(prompt, end="")
    for piece in pieces:
        console.print(piece, end="")
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


app.command()(serve)
app.command("config")(show_config)


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
def status(
    url: Annotated[
        str | None, typer.Option(help="Server to ask; MAESTRALE_BASE_URL if left out.")
    ] = None,
) -> None:
    """Show how far a service is, which worker holds how much, and what is being loaded."""
    from cluster.client import Client

    with Client(url) as client:
        print_status(client.cluster.status())


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


app.command()(demo)


def main() -> None:
    """Entry point. Errors of our own end in one line and exit code 1."""
    try:
        app()
    except (MaestraleError, ModelError) as error:
        if {"--verbose", "-v"} & set(sys.argv):
            raise
        errors.print(f"error: {error}", style="red")
        sys.exit(1)


if __name__ == "__main__":
    main()

"""The verbs that run a service until they are stopped, and the one that writes its settings down.

What needs torch or Ray is imported inside its verb.
"""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from cluster import log
from cluster.config import ServeConfig
from cluster.console import (
    STORY_DTYPE,
    ProgressLines,
    console,
    print_placement,
    print_rows,
    tell_story,
)
from cluster.extras import need_server_extra
from cluster.options import AttentionWeights, DType, Experts, Model, Verbose

if TYPE_CHECKING:
    from cluster.configure import Settings

Port = Annotated[int, typer.Option(min=0, max=65535, help="HTTP port; 0 takes a free one.")]
ConfigFile = Annotated[
    Path | None,
    typer.Option("--config", help="YAML file of settings; `maestrale config` writes one."),
]
Assignments = Annotated[
    list[str] | None,
    typer.Option("--set", help="Any other setting, as NAME=VALUE; may be given several times."),
]


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


def show_config(config_file: ConfigFile = None, assignments: Assignments = None) -> None:
    """Write every setting with its meaning, unit, bounds and default, as a file for --config.

    The values are those in force: of --config, MAESTRALE_ variables and --set.
    """
    need_server_extra()
    from cluster.configure import as_file

    print(as_file(_settings(config_file, assignments)), end="")


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

"""The one place that wires all parts: a Serve application, and a local Ray to run it on.

`serve deploy` and `serve run` use `cluster.app:build`; the command line uses `running`.
"""

import logging
import math
import os
import shutil
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import ray
from ray import serve
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, HTTPOptions, ProxyLocation
from ray.serve.schema import ApplicationStatus

from cluster import rpc
from cluster.actors import alive_workers, worker_name
from cluster.client import Client
from cluster.config import ServeConfig
from cluster.context import context_of
from cluster.controller import Controller
from cluster.errors import APIError, ConfigurationError, FilesUnavailableError, StartError
from cluster.folders import lacks_folder
from cluster.follow import as_heads_were_told
from cluster.ingress.auth import KEYS_VARIABLE, read_api_keys
from cluster.network import is_loopback
from cluster.nodes import NAMESPACE, run_where_it_is
from model.config import MixtralConfig
from model.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

APP_NAME = "maestrale"

OnPhase = Callable[[str, int], None]
"""Called with what is being done at the start, and how many percent of it are."""

RELEASE_TIMEOUT_S = 10.0
"""How long workers may take to end once the application is deleted."""

SILENT_AFTER_S = 30.0
"""How long an ingress that is deployed may stay silent."""

PROXY_BY_GRPC = "RAY_SERVE_PROXY_USE_GRPC"
"""Set to 1 where Ray is started: Serve's proxy then takes an answer's tokens from the ingress by
gRPC rather than as Ray objects, for half of what a token costs both (tests/bench/RESULTS.md)."""

SMALL_CPUS = 0.01
"""What controller and ingresses take of a node: enough to keep them off a Ray head node that is
started with none (deploy/), which may then be away for a while."""

_MANY = 10_000
"""Serve's own bound on calls in progress; ours (429) lies below it."""


def build(config: ServeConfig) -> serve.Application:
    """The whole service as a Serve application; the import path for Serve's configuration files.

    Raises ConfigurationError, ConfigError or TokenizerError for a checkpoint that cannot be served.
    """
    try:
        run_where_it_is(config.model, check_checkpoint, config)
    except FilesUnavailableError as error:
        logger.warning("%s; the controller waits for a node that has it", error)
    # torch is only wanted in the replicas
    from cluster.head.replica import HeadReplica
    from cluster.ingress.deployment import Ingress

    controller = serve.deployment(
        name="Controller",
        num_replicas=1,
        max_ongoing_requests=_MANY,
        ray_actor_options={"num_cpus": SMALL_CPUS},
        logging_config={"enable_access_log": False},  # it is asked every two seconds
        health_check_period_s=5,
    )(Controller).bind(config)
    heads = serve.deployment(
        name="HeadReplica",
        **_number_of_heads(config),
        max_ongoing_requests=_MANY,
        ray_actor_options={
            "num_cpus": config.head_cpus,
            "num_gpus": config.head_gpus,
            "resources": config.head_resources,
        },
        health_check_period_s=5,
        graceful_shutdown_timeout_s=20,
    )(HeadReplica).bind(config, controller)
    return serve.deployment(
        name="Ingress",
        num_replicas=config.num_ingresses,
        max_ongoing_requests=_MANY,
        ray_actor_options={"num_cpus": SMALL_CPUS},
        health_check_period_s=5,
        graceful_shutdown_timeout_s=config.drain_timeout_s,
    )(serve.ingress()(Ingress)).bind(config, controller, heads)


def _number_of_heads(config: ServeConfig) -> dict[str, Any]:
    """Serve's options for it: fixed, or what the controller says, as soon as it says so."""
    if config.max_heads is None and config.sleep_after_s is None:
        return {"num_replicas": config.num_heads}
    return {
        "autoscaling_config": AutoscalingConfig(
            min_replicas=config.num_heads if config.sleep_after_s is None else 0,
            initial_replicas=config.num_heads,
            max_replicas=config.most_heads,
            upscale_delay_s=0,
            downscale_delay_s=0,
            policy=AutoscalingPolicy(policy_function=as_heads_were_told),
        )
    }


def check_checkpoint(config: ServeConfig) -> None:
    """Find out before anything is started whether the folder looks like a checkpoint."""
    folder = config.checkpoint_folder()
    model = MixtralConfig.from_folder(folder)
    tokenizer = Tokenizer.from_folder(folder)
    if tokenizer.vocab_size > model.vocab_size:
        raise ConfigurationError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size} ids, the model only "
            f"{model.vocab_size}"
        )
    context = context_of(config, model)
    if context < (config.max_model_len or model.max_position_embeddings):
        logger.warning(
            "kv_cache_bytes %s hold %d tokens, so requests may have no more, of the model's %d",
            f"{config.kv_cache_bytes:,}",
            context,
            model.max_position_embeddings,
        )
    most = rpc.max_step_tokens(model)
    if config.max_tokens_per_step > most:
        raise ConfigurationError(
            f"max_tokens_per_step {config.max_tokens_per_step} exceeds the {most} tokens of this "
            "model that a message between head and worker holds"
        )


def check_access(config: ServeConfig, host: str) -> list[str]:
    """The API keys, or "" where none is needed.

    Raises ConfigurationError unless there are some, or nobody but this machine can call, or it is
    said that anybody may. `serve deploy` binds its own host: there the ingress refuses callers.
    """
    keys = read_api_keys(config.api_keys_file, os.environ)
    if not (keys or config.allow_open_http or _is_local(host)):
        raise ConfigurationError(
            f"{host} is not loopback, so anybody on the network could use the model: give keys "
            f"with --api-keys-file or {KEYS_VARIABLE}, or say --allow-open-http"
        )
    return [key.text for key in keys] or [""]


@contextmanager
def running(
    config: ServeConfig,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    address: str | None = None,
    verbose: bool = False,
    on_phase: OnPhase = lambda phase, percent: None,
) -> Iterator[Client]:
    """Serve until the block is left; then stop everything that was started for it.

    port:     0 takes a free one.
    address:  of a Ray cluster to join; None starts a Ray of our own on this machine.
    on_phase: called with every news of the start.
    Raises ConfigurationError or ModelError before anything is started, StartError after.
    """
    if address is None or not lacks_folder(config.model):  # else `build` asks other nodes
        check_checkpoint(config)
    keys = check_access(config, host)
    port = free_port(host) if port == 0 else port
    check_port(host, port, "--port")
    if config.grpc_port is not None:
        check_port(config.grpc_host, config.grpc_port, "--grpc-port")
    on_phase("starting Ray", 0)
    with _ray(address, config, verbose=verbose):
        try:
            on_phase("starting Ray Serve", 0)
            serve.start(
                proxy_location=ProxyLocation.HeadOnly,
                http_options=HTTPOptions(host=host, port=port),
            )
            # Not `run`: the ingress answers long before all is healthy, and says how far it is.
            serve.run_many(
                [serve.RunTarget(target=build(config), name=APP_NAME, route_prefix="/")],
                wait_for_ingress_deployment_creation=False,
                wait_for_applications_running=False,
            )
            with Client(f"http://{_reachable(host)}:{port}", api_key=keys[0]) as client:
                _wait_until_ready(client, on_phase)
                yield client
        finally:
            _stop_serving()


def _wait_until_ready(client: Client, on_phase: OnPhase) -> None:
    """Return when the service is ready. Raises StartError when it never will be."""
    shown: tuple[str, int] | None = None
    answered = time.monotonic()
    while True:
        time.sleep(0.1)
        application = serve.status().applications[APP_NAME]
        has_failed = application.status == ApplicationStatus.DEPLOY_FAILED
        try:
            readiness = client.cluster.status()
        except APIError as error:
            # the proxy listens before the ingress is there
            if has_failed:
                raise StartError(application.message) from error
            is_silent = time.monotonic() - answered > SILENT_AFTER_S
            if is_silent and application.status == ApplicationStatus.RUNNING:
                raise StartError(
                    f"Serve has deployed everything, but the ingress does not answer: {error}; "
                    "does Serve run on this cluster already, with another host or port?"
                ) from error
            continue
        answered = time.monotonic()
        state = (readiness.phase, readiness.percent)
        if state != shown:
            on_phase(*state)
        shown = state
        if readiness.error or has_failed:
            raise StartError(readiness.error or application.message)
        if readiness.ready and application.status == ApplicationStatus.RUNNING:
            return


def check_port(host: str, port: int, flag: str) -> None:
    """Raise ConfigurationError unless something can listen there. flag: what says otherwise."""
    try:
        with socket.create_server((host, port), family=_family(host)):
            pass
    except OSError as error:
        shown = f"[{host}]" if ":" in host else host
        raise ConfigurationError(
            f"cannot listen on {shown}:{port}: {error.strerror or error}; "
            f"choose another with {flag}"
        ) from error


def free_port(host: str) -> int:
    """A port of `host` that nobody listens on now."""
    with socket.create_server((host, 0), family=_family(host)) as probe:
        port: int = probe.getsockname()[1]
        return port


def _family(host: str) -> socket.AddressFamily:
    """Of an address or a name to listen on; without being told, Python takes it for IPv4."""
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def _is_local(host: str) -> bool:
    """Whether only this machine can reach a server that is bound to `host`, as far as it shows."""
    try:
        return is_loopback(host)
    except ValueError:
        return host == "localhost"


def _reachable(host: str) -> str:
    """Where to reach a server that is bound to `host`."""
    if host in ("0.0.0.0", ""):
        return "127.0.0.1"
    return f"[{host}]" if ":" in host else host


@contextmanager
def _ray(address: str | None, config: ServeConfig, *, verbose: bool) -> Iterator[None]:
    """A Ray of our own, whose files go with it unless something failed; or somebody else's."""
    logging_level = logging.INFO if verbose else logging.ERROR
    logging.getLogger("ray.serve").setLevel(logging_level)
    if address is not None:
        ray.init(address, log_to_driver=verbose, logging_level=logging_level)
        try:
            yield
        finally:
            ray.shutdown()
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault(PROXY_BY_GRPC, "1")
    folder = tempfile.mkdtemp(prefix="maestrale-")
    keep_logs = False
    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(
            # Ray counts what it is told: as many processes as asked for must fit on this machine
            num_cpus=max(os.cpu_count() or 1, math.ceil(_cpus_wanted(config))),
            resources=_resources_wanted(config),
            include_dashboard=False,
            log_to_driver=verbose,
            logging_level=logging_level,
            _temp_dir=folder,
        )
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, on_sigterm)  # ray.init takes it for itself
        yield
    except StartError as error:
        keep_logs = True
        raise StartError(f"{error} (logs are kept in {folder})") from error
    finally:
        ray.shutdown()
        if not keep_logs:
            shutil.rmtree(folder, ignore_errors=True)


def _cpus_wanted(config: ServeConfig) -> float:
    large = config.most_workers * config.worker_cpus + config.most_heads * config.head_cpus
    return large + (config.num_ingresses + 1) * SMALL_CPUS


def _resources_wanted(config: ServeConfig) -> dict[str, float]:
    """The custom resources of all heads and workers: on one machine they all are this node's."""
    wanted: dict[str, float] = {}
    for each, count in (
        (config.head_resources, config.most_heads),
        (config.worker_resources, config.most_workers),
    ):
        for name, amount in each.items():
            wanted[name] = wanted.get(name, 0) + count * amount
    return wanted


def _stop_serving() -> None:
    """Delete the application and see its workers gone; a worker that lingers is killed.

    Serve itself stays: on a cluster others may use it, and our own Ray takes it along.
    """
    serve.delete(APP_NAME)
    deadline = time.monotonic() + RELEASE_TIMEOUT_S
    while (numbers := alive_workers(APP_NAME)) and time.monotonic() < deadline:
        time.sleep(0.1)
    for name in (worker_name(APP_NAME, number) for number in numbers):
        logger.warning("%s did not end by itself and is killed", name)
        with suppress(ValueError):  # it has ended since it was listed
            ray.kill(ray.get_actor(name, namespace=NAMESPACE))

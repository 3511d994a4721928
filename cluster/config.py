"""The service's settings: one frozen object, checked once, passed down as a value.

Serve configuration files give them under `args`; `maestrale serve` gathers them from a file, the
environment and flags (`cluster.configure`). Unknown keys are refused. Nothing below reads the
environment.
"""

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, model_validator

from cluster.folders import checkpoint_folder
from cluster.network import THE_NODES_OWN, Network, is_loopback
from cluster.schema import MAX_DRAFTS

MIB = 2**20
GIB = 2**30

Quantization = Literal["nf4", "nf4-double", "int8", "int4"]


def no_such_setting(name: str, known: Iterable[str]) -> str:
    """What to say of a name that is none of those known: which is nearest."""
    near = get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]}?" if near else "`maestrale config` lists them all"
    return f"there is no setting {name}: {hint}"


LIVE = (
    "num_workers",
    "max_workers",
    "num_heads",
    "max_heads",
    "scale_up_after_s",
    "scale_down_after_s",
    "rebalance_gain",
)
"""Settings that the controller changes while it runs."""


class ServeConfig(BaseModel):
    """Everything that `cluster.app.build` must know. Under each field: meaning, unit, reason.

    The texts under the fields are what `maestrale config` prints.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    model: Path | None = None
    """Checkpoint folder, or a Hugging Face Hub id, which every node fetches into its cache. A node
    that has no folder of this path reads it from one that has. None: the embedded tiny model."""
    served_model_name: str | None = Field(default=None, min_length=1)
    """Model id that requests name. None: the checkpoint folder's name."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Type of weights and activations. None: the checkpoint's own."""
    expert_quantization: Quantization | tuple[Quantization | None, ...] | None = None
    """How workers hold their experts. nf4 (bitsandbytes) and int4 (packed, the fast one on CPU)
    take a quarter of 16 bit, int8 half. None: as the checkpoint has them. A list: one for each
    worker, where they differ in memory."""
    attention_quantization: Quantization | None = None
    """How heads hold the matrices of attention; embeddings, norms, routers and LM head stay dense.
    None: as the checkpoint has them."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where heads and workers compute. cuda also needs head_gpus and worker_gpus."""

    attention: Literal["sdpa", "reference", "flash"] = "sdpa"
    """How heads compute attention. flash needs the cuda extra and a GPU; reference is slow."""

    num_workers: int = Field(default=2, ge=1, le=1024)
    """Expert workers. Two is the least that shows the split; Mixtral-8x7B in bfloat16 needs as
    many as its 90 GB of experts take."""
    num_heads: int = Field(default=1, ge=1, le=256)
    """Head replicas. Each holds all non-expert weights and a KV cache of its own."""
    max_workers: int | None = Field(default=None, ge=1, le=1024)
    """Expert workers, at most: where heads wait for workers that compute all the time, more are
    started, and let go when they idle, num_workers at least. None: no more than those."""
    max_heads: int | None = Field(default=None, ge=1, le=256)
    """Head replicas, at most: where their caches fill or sequences queue, more are started, and
    let go when they idle, num_heads at least. None: no more than those."""
    scale_up_after_s: float = Field(default=5.0, ge=0)
    """How long heads or workers must have too much to do before more are started, seconds: longer
    than one long prompt takes."""
    scale_down_after_s: float = Field(default=300.0, ge=0)
    """How long they must have too little to do before some are let go, seconds: starting them again
    takes minutes with a large model."""
    sleep_after_s: float | None = Field(default=None, gt=0)
    """How long no request must be in progress before all heads and workers are let go, seconds. The
    next request starts them again, and waits for them (head_wait_s). None: never."""
    num_ingresses: int = Field(default=1, ge=1, le=256)
    """Ingress replicas. They tokenise and stream, without touching torch."""

    worker_cpus: float = Field(default=0.2, ge=0)
    """CPUs that Ray reserves for a worker. Small by default so that a laptop holds them all."""
    worker_gpus: float = Field(default=0, ge=0)
    """GPUs that Ray reserves for a worker."""
    worker_threads: int = Field(default=1, ge=1)
    """Compute threads of a worker on CPU. More threads than cores over all workers cost dearly."""
    worker_memory_bytes: int | None = Field(default=None, ge=1)
    """Bytes of experts a worker may hold; while experts move, one more than fits. What is left is
    for copies of those with the most load. None: no bound, and no such copies."""
    expert_copies: int = Field(default=1, ge=1, le=16)
    """Copies of each expert, at least, on different workers. With 2 nothing waits when a worker
    dies; with 1 rows wait until its experts are loaded again."""
    expert_slices: int = Field(default=1, ge=1, le=64)
    """Workers that share each copy of an expert, each with an equal slice of its intermediate
    dimension; num_workers must be a multiple. For low latency with few workers: all of them work on
    every row, for one more message per row each."""
    rebalance_gain: float | None = Field(default=0.1, gt=0, lt=1)
    """Share of the experts' time that another placement must be expected to save before experts are
    moved. Expected from counted rows, whose noise is a few percent. None: only on demand."""
    head_cpus: float = Field(default=0.2, ge=0)
    """CPUs that Ray reserves for a head."""
    head_gpus: float = Field(default=0, ge=0)
    """GPUs that Ray reserves for a head."""
    head_threads: int = Field(default=1, ge=1)
    """Compute threads of a head on CPU."""
    worker_resources: dict[str, PositiveFloat] = {}
    """Ray's custom resources that a worker takes of its node. A name that only the nodes meant for
    experts offer (maestrale_expert in deploy/) keeps workers there, and makes Ray's autoscaler
    start nodes of that type. Empty: any node will do."""
    head_resources: dict[str, PositiveFloat] = {}
    """The same for a head (maestrale_head in deploy/)."""

    max_model_len: int | None = Field(default=None, ge=2)
    """Prompt and completion together, tokens. None: what the model was made for, or as many as
    kv_cache_bytes hold if that is less."""
    block_size: int = Field(default=16, ge=1)
    """Tokens per block of the KV cache. Smaller wastes less, larger costs fewer look-ups."""
    kv_cache_bytes: int | None = Field(default=1 * GIB, ge=1)
    """Bytes of KV cache per head, at most; never more than twice what max_running_sequences can
    fill. None: by the memory that is free when the workers are loaded, nine tenths of a GPU's or a
    quarter of a machine's."""
    max_running_sequences: int = Field(default=64, ge=1)
    """Sequences in one step of a head, at most."""
    max_tokens_per_step: int = Field(default=512, ge=1)
    """Tokens in one step of a head, at most; not below max_running_sequences, nor above what a
    message to a worker holds (16,364 of Mixtral-8x7B, 10,912 of 8x22B). A longer prompt is computed
    in chunks of this size, so it delays everybody's next token by one such step only."""
    max_micro_batches: int = Field(default=4, ge=1, le=8)
    """Parts of a step, at most, of which one's attention is computed while another's experts are.
    How many there are is tried out while it serves: more pay on slow links and for long prompts. 1:
    never more than one."""

    num_drafts: int = Field(default=0, ge=0, le=MAX_DRAFTS)
    """Tokens that a head guesses ahead in a step, at most, for requests that do not say
    (num_speculative_tokens): a guess that holds saves a round trip to the experts in every layer, a
    wrong one costs them rows. It pays for few callers whose texts repeat themselves. 0: none."""

    max_concurrent_requests: int = Field(default=256, ge=1)
    """Requests in progress over all ingresses; beyond it a caller gets 429 with Retry-After."""
    max_body_bytes: int = Field(default=4 * MIB, ge=1)
    """Size of a request body, at most."""
    sse_keep_alive_s: float = Field(default=15.0, gt=0)
    """Seconds without an event after which a stream carries a comment, so that proxies do not take
    it for dead. Below the shortest of their usual patience (HAProxy, 50 s) by a good margin."""
    drain_timeout_s: float = Field(default=20.0, ge=2)
    """How long requests may go on in an ingress that is replaced or stopped, seconds, half as long
    by gRPC; then they are broken off. Above the longest answer, where an upgrade is to break
    none; ending the service may then take as long."""

    api_keys_file: Path | None = None
    """File of keys, one a line, `#` begins a comment; callers of the HTTP API must show one, but
    for /health and /ready. Only a key with the word `admin` behind it may rebalance. Further keys
    come from MAESTRALE_API_KEYS, with commas between. Each ingress needs it at this path, and takes
    what it holds anew within five seconds of a change. None and no such variable: no key is
    needed, and only callers on loopback are answered."""
    allow_open_http: bool = False
    """Without keys, answer anybody who can reach the HTTP port, knowingly."""
    allowed_origins: tuple[str, ...] = ()
    """Sites whose pages may call from a browser (CORS), such as https://example.org; `*`: all."""

    grpc_port: int | None = Field(default=None, ge=1, le=65535)
    """Port of the users' gRPC API, on every node with an ingress. Ingresses on one node share it:
    the kernel gives each connection to one of them. None: no gRPC for users."""
    grpc_host: str = "127.0.0.1"
    """IP address that it listens on. Other than loopback needs grpc_certificate, or
    allow_plaintext_network."""
    grpc_certificate: Path | None = None
    """PEM file with the certificate chain that gRPC callers see, at this path on every node with an
    ingress; they need none themselves. None: their calls are not encrypted."""
    grpc_key: Path | None = None
    """PEM file with the certificate's private key."""

    data_plane_host: str = "127.0.0.1"
    """Address that heads and workers listen on for gRPC, and by which others reach them. On several
    hosts it must be `node`: the address by which Ray knows the node a process is on. Other than
    loopback needs one of the next three."""
    tls_folder: Path | None = None
    """Folder made by `maestrale certs`, for mutual TLS between ingresses, heads and workers. Each
    node needs ca.pem in it, and certificate and key of the roles that run there."""
    cluster_token_from: Path | Literal["environment"] | None = None
    """File with a secret that ingresses, heads and workers show each other, at the same path on
    every node; or `environment`, which takes MAESTRALE_CLUSTER_TOKEN of each process. Without TLS:
    it keeps strangers out, but crosses the network in the clear like all else."""
    allow_plaintext_network: bool = False
    """Let tokens and activations cross a network in the clear, and anybody on it connect,
    knowingly."""

    expert_timeout_s: float = Field(default=30.0, gt=0)
    """How long a head waits for a worker's answer before it takes the worker for lost, seconds, at
    most. Above the slowest honest answer: a full step on a slow CPU. Where another copy could
    answer, it waits eight times as long as the worker's slowest recent answer to such a call."""
    recovery_timeout_s: float = Field(default=60.0, gt=0)
    """How long rows that no connected worker can compute wait for one that can, seconds."""
    head_timeout_s: float = Field(default=10.0, ge=2)
    """How long a head may be silent before an ingress takes it for lost and lets another go on with
    its requests, seconds. A head that lives says something twice a second, but may starve on a busy
    machine. A broken connection is noticed at once, whatever this says."""
    head_wait_s: float = Field(default=60.0, gt=0)
    """How long a request waits for a head when there is none, seconds. Above the time that Serve
    takes to start a head anew; with sleep_after_s, all that heads and workers take to start."""
    cross_check_share: float = Field(default=0.001, ge=0, le=1)
    """Share of the rows for experts with several copies that a second copy computes as well, beside
    the answers, to find memory or a processor that has gone bad. 0: none."""
    lease_s: float = Field(default=60.0, ge=1)
    """Workers end by themselves when the controller has not renewed their lease for so long. Above
    the time that Serve takes to start a controller anew, also on a busy machine: streams go on
    without one, but not without workers."""

    @model_validator(mode="before")
    @classmethod
    def _check_names(cls, given: Any) -> Any:
        """Refuse an unknown setting with the nearest there is; pydantic would not suggest any."""
        for name in given if isinstance(given, dict) else ():
            if name not in cls.model_fields:
                raise ValueError(no_such_setting(str(name), cls.model_fields))
        return given

    @model_validator(mode="after")
    def _check_network(self) -> Self:
        host = self.data_plane_host
        try:
            is_safe = host != THE_NODES_OWN and is_loopback(host)
        except ValueError as error:
            raise ValueError(
                f"data_plane_host {host!r} is no IP address, nor {THE_NODES_OWN!r}"
            ) from error
        if self.tls_folder and self.cluster_token_from:
            raise ValueError(
                "tls_folder and cluster_token_from exclude each other: TLS does it all"
            )
        if not (
            is_safe or self.tls_folder or self.cluster_token_from or self.allow_plaintext_network
        ):
            raise ValueError(
                f"data_plane_host {self.data_plane_host} is not loopback: tokens and activations "
                "would cross the network in the clear, and anybody could connect. Set tls_folder "
                "(`maestrale certs` fills one), cluster_token_from, or, if that network is yours "
                "alone, allow_plaintext_network: true"
            )
        return self

    @model_validator(mode="after")
    def _check_users_grpc(self) -> Self:
        try:
            is_safe = is_loopback(self.grpc_host)
        except ValueError as error:
            raise ValueError(f"grpc_host {self.grpc_host!r} is no IP address") from error
        if (self.grpc_certificate is None) != (self.grpc_key is None):
            raise ValueError("grpc_certificate and grpc_key go together")
        if not (is_safe or self.grpc_certificate or self.allow_plaintext_network):
            raise ValueError(
                f"grpc_host {self.grpc_host} is not loopback: prompts, answers and keys would "
                "cross the network in the clear. Set grpc_certificate and grpc_key, or "
                "allow_plaintext_network: true if that network is yours alone"
            )
        return self

    @model_validator(mode="after")
    def _check_gpus(self) -> Self:
        if self.device == "cuda" and not (self.head_gpus and self.worker_gpus):
            raise ValueError("device: cuda needs head_gpus and worker_gpus above 0")
        return self

    @model_validator(mode="after")
    def _check_budget(self) -> Self:
        if self.max_tokens_per_step < self.max_running_sequences:
            raise ValueError(
                f"max_tokens_per_step ({self.max_tokens_per_step}) must not be below "
                f"max_running_sequences ({self.max_running_sequences}): a prompt would starve "
                "behind those that decode"
            )
        return self

    @model_validator(mode="after")
    def _check_workers(self) -> Self:
        listed = self.expert_quantization
        if isinstance(listed, tuple) and len(listed) != self.num_workers:
            raise ValueError(
                f"expert_quantization lists {len(listed)} workers, "
                f"num_workers is {self.num_workers}"
            )
        if self.num_workers % self.expert_slices:
            raise ValueError(
                f"num_workers is {self.num_workers}, no multiple of the {self.expert_slices} "
                "workers that expert_slices cuts each expert over"
            )
        if self.num_workers < self.expert_copies * self.expert_slices:
            raise ValueError(
                f"num_workers is {self.num_workers}, too few for {self.expert_copies} copies of "
                f"each expert in {self.expert_slices} slices"
            )
        return self

    @model_validator(mode="after")
    def _check_scaling(self) -> Self:
        if self.most_workers < self.num_workers:
            raise ValueError(
                f"max_workers is {self.max_workers}, below num_workers ({self.num_workers})"
            )
        if self.most_heads < self.num_heads:
            raise ValueError(f"max_heads is {self.max_heads}, below num_heads ({self.num_heads})")
        if self.most_workers > self.num_workers:
            if isinstance(self.expert_quantization, tuple):
                raise ValueError(
                    "max_workers needs workers that hold their experts alike: one "
                    "expert_quantization, not a list"
                )
            if self.expert_slices > 1:
                raise ValueError(
                    "max_workers and expert_slices exclude each other: a worker more or less would "
                    "cut every expert anew"
                )
        return self

    def with_live(self, changes: Mapping[str, Any]) -> Self:
        """With other values of LIVE settings. Raises ValueError for others, or wrong values."""
        for name in changes:
            if name not in LIVE:
                raise ValueError(f"{name} cannot change without a restart; {', '.join(LIVE)} can")
        return self.model_validate(self.model_dump() | dict(changes))

    @property
    def most_workers(self) -> int:
        """Workers that there may ever be."""
        return self.max_workers or self.num_workers

    @property
    def most_heads(self) -> int:
        """Heads that there may ever be."""
        return self.max_heads or self.num_heads

    @property
    def worker_quantization(self) -> tuple[Quantization | None, ...]:
        """How each worker holds its experts."""
        if isinstance(self.expert_quantization, tuple):
            return self.expert_quantization
        return (self.expert_quantization,) * self.most_workers

    @property
    def network(self) -> Network:
        """What a process needs to know of the data plane."""
        return Network(
            self.data_plane_host,
            self.tls_folder,
            self.cluster_token_from,
            self.allow_plaintext_network,
        )

    @property
    def lease_renewal_s(self) -> float:
        """Within which the controller renews, and a worker answers: three times within a lease, and
        soon enough to notice a worker that hangs."""
        return min(5.0, self.lease_s / 3)

    def checkpoint_folder(self) -> Path:
        """The folder to load from. Raises CheckpointError when there is no such model."""
        return checkpoint_folder(self.model)

    def model_id(self) -> str:
        """Name under which the model is served."""
        if self.served_model_name:
            return self.served_model_name
        return "tiny-mixtral" if self.model is None else self.model.expanduser().resolve().name

"""gRPC as every process of ours uses it: channels, servers, limits, the version handshake, metrics.

No torch: the ingress imports this.
"""

import hashlib
import logging
import secrets
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from importlib.metadata import version

import grpc

from cluster import PROTOCOL_VERSION
from cluster.errors import ConfigurationError, HandshakeError
from cluster.guard import Guard, WithToken, aio_interceptors
from cluster.security import Role, Security, TlsFiles, identity_of
from model.config import MixtralConfig
from protos import expert_pb2, head_pb2, peer_pb2

logger = logging.getLogger(__name__)

BUILD = version("maestrale")

EXPERT_SERVICE = expert_pb2.DESCRIPTOR.services_by_name["Expert"].full_name
HEAD_SERVICE = head_pb2.DESCRIPTOR.services_by_name["Head"].full_name

MAX_MESSAGE_BYTES = 256 * 2**20
"""Largest message on any stream; what `max_step_tokens` says comes of it."""

_HEADER_BYTES = 2**16
"""More than all of a message to or from a worker that does not grow with its rows."""

MAX_STREAMS = 64
"""Peers that may be connected to one server at a time; each holds a thread."""

_SHORT_CALLS = 4
"""Handshakes and metrics at a time, beside the streams."""

HEAD_BEAT_S = 0.5
"""A head says to every ingress at least this often that it is alive, and how busy it is."""

HANDSHAKE_TIMEOUT_S = 10.0
SCRAPE_TIMEOUT_S = 2.0

CHANNEL_OPTIONS: list[tuple[str, int]] = [
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    # Each channel has a connection of its own, so that a broken one never lingers in a shared pool.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_http_proxy", 0),
    # A peer that is paused or cut off answers no ping: the stream then breaks, instead of waiting.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.http2.max_pings_without_data", 0),
]
"""For channels and servers alike."""


def max_step_tokens(config: MixtralConfig) -> int:
    """Tokens of one step of which a message to a worker, and its answer, hold the rows: for each
    token at most 32 bits a value, and of each of its experts a row number and a weight.
    """
    row_bytes = 4 * config.hidden_size + 8 * config.num_experts_per_tok
    return (MAX_MESSAGE_BYTES - _HEADER_BYTES) // row_bytes


def new_incarnation() -> int:
    """A random number that tells this process from every other, 64 bits, never 0."""
    return secrets.randbits(64) or 1


def fingerprint(config: MixtralConfig, dtype: str | None, weights: str = "") -> str:
    """Digest of what two processes must agree on to exchange tokens or rows.

    dtype: what rows travel in, None for the checkpoint's own.
    weights: their `Checkpoint.sample`, for those who compute one model together.
    """
    facts = sorted(asdict(replace(config, dtype=dtype or config.dtype)).items())
    return hashlib.sha256(f"{facts}{weights}".encode()).hexdigest()[:16]


LOOPBACK_ONLY = Security()
"""No TLS, no token: for peers on the same machine."""

REFUSALS = (
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.UNAUTHENTICATED,
    grpc.StatusCode.PERMISSION_DENIED,
)
"""What a peer answers that will never take us as we are."""

_HINTS = (
    ("Hostname Verification", "its certificate is for another role"),
    ("certificate has expired", "its certificate has expired"),
    ("certificate signature failure", "its certificate is not signed by our CA"),
    ("CERTIFICATE_VERIFY_FAILED", "its certificate is not signed by our CA"),
    ("WRONG_VERSION_NUMBER", "it does not speak TLS, and we do"),
    ("Socket closed", "it ended, or wants TLS or another certificate than ours"),
)
"""What gRPC's messages mean between our processes."""


class Identity:
    """Who this process is, to its peers."""

    def __init__(
        self, name: str, model_fingerprint: str, security: Security = LOOPBACK_ONLY
    ) -> None:
        self.name = name
        self.fingerprint = model_fingerprint
        self.security = security
        self.incarnation = new_incarnation()
        self.pipe = ""
        """Name of the PipeServer that peers on this host may use in place of gRPC's stream."""

    def hello(self) -> peer_pb2.HelloRequest:
        """What to say when calling."""
        return peer_pb2.HelloRequest(
            protocol=PROTOCOL_VERSION, build=BUILD, peer=self.name, fingerprint=self.fingerprint
        )

    def answer(
        self, request: peer_pb2.HelloRequest, context: grpc.ServicerContext
    ) -> peer_pb2.HelloReply:
        """What to say when called; ends the call with FAILED_PRECONDITION on a mismatch."""
        mismatch = self.mismatch(request)
        if mismatch:
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, mismatch)
        return peer_pb2.HelloReply(
            protocol=PROTOCOL_VERSION,
            build=BUILD,
            peer=self.name,
            fingerprint=self.fingerprint,
            incarnation=self.incarnation,
            pipe=self.pipe,
        )

    def check(self, reply: peer_pb2.HelloReply) -> None:
        """Raise HandshakeError unless the answering peer matches."""
        mismatch = self.mismatch(reply)
        if mismatch:
            raise HandshakeError(mismatch)

    def mismatch(self, peer: peer_pb2.HelloRequest | peer_pb2.HelloReply) -> str | None:
        """Why this peer must be refused, or None."""
        if peer.protocol != PROTOCOL_VERSION:
            return (
                f"{self.name} (maestrale {BUILD}) speaks protocol {PROTOCOL_VERSION}, "
                f"{peer.peer or 'the peer'} (maestrale {peer.build or '?'}) speaks {peer.protocol}"
            )
        if peer.fingerprint != self.fingerprint:
            return (
                f"{self.name} serves model {self.fingerprint}, {peer.peer or 'the peer'} serves "
                f"{peer.fingerprint}: configuration, dtype or weights differ"
            )
        return None


def new_server(
    host: str,
    security: Security = LOOPBACK_ONLY,
    observe_refusal: Callable[[str], None] = lambda reason: None,
) -> tuple[grpc.Server, str]:
    """A gRPC server on a free port of `host`, not started yet, and its address.

    observe_refusal: called with the reason of each refusal (see Guard), from any thread.
    Raises ConfigurationError when nothing can listen there, or nothing may.
    """
    security.check_host(host)
    guard = Guard(security, observe_refusal)
    server = grpc.server(
        ThreadPoolExecutor(max_workers=MAX_STREAMS + _SHORT_CALLS, thread_name_prefix="grpc"),
        interceptors=[guard],
        options=CHANNEL_OPTIONS,
        maximum_concurrent_rpcs=MAX_STREAMS + _SHORT_CALLS,
    )
    bracketed = f"[{host}]" if ":" in host else host
    try:
        if security.tls is None:
            port = server.add_insecure_port(f"{bracketed}:0")
        else:
            credentials = _server_credentials(security.tls, guard.begin_handshake)
            port = server.add_secure_port(f"{bracketed}:0", credentials)
    except RuntimeError as error:
        raise ConfigurationError(f"cannot listen on {host}: {error}") from error
    return server, f"{bracketed}:{port}"


def new_channel(address: str, security: Security, to: Role) -> grpc.Channel:
    """A channel to a process of that role. Raises ConfigurationError if our files are unusable."""
    if security.tls is not None:
        credentials, options = _client_credentials(security.tls, to)
        return grpc.secure_channel(address, credentials, options=options)
    channel = grpc.insecure_channel(address, options=CHANNEL_OPTIONS)
    if security.token is not None:
        return grpc.intercept_channel(channel, WithToken(security.token))
    return channel


def new_aio_channel(address: str, security: Security, to: Role) -> grpc.aio.Channel:
    """The same for an event loop."""
    if security.tls is not None:
        credentials, options = _client_credentials(security.tls, to)
        return grpc.aio.secure_channel(address, credentials, options=options)
    interceptors = aio_interceptors(security.token) if security.token is not None else None
    return grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS, interceptors=interceptors)


def _server_credentials(tls: TlsFiles, on_connection: Callable[[], None]) -> grpc.ServerCredentials:
    """Of a server that asks for certificates, and reads its own anew for each connection."""
    newest = tls.read()

    def configuration() -> grpc.ServerCertificateConfiguration:
        return grpc.ssl_server_certificate_configuration(
            [(newest.key, newest.certificate)], newest.ca
        )

    def changed() -> grpc.ServerCertificateConfiguration | None:
        nonlocal newest
        on_connection()
        try:
            found = tls.read()
        except ConfigurationError as error:
            logger.warning("going on with the certificate that is known: %s", error)
            return None
        if found == newest:
            return None
        newest = found
        logger.info("certificate read anew from %s", tls.folder)
        return configuration()

    return grpc.dynamic_ssl_server_credentials(
        configuration(), changed, require_client_authentication=True
    )


def _client_credentials(
    tls: TlsFiles, to: Role
) -> tuple[grpc.ChannelCredentials, list[tuple[str, int | str]]]:
    """What to connect with, so that only a peer of that role is accepted."""
    pem = tls.read()
    credentials = grpc.ssl_channel_credentials(pem.ca, pem.key, pem.certificate)
    return credentials, [*CHANNEL_OPTIONS, ("grpc.ssl_target_name_override", identity_of(to))]


def describe(error: grpc.RpcError) -> str:
    """A gRPC error in one line: code and details."""
    code = getattr(error, "code", lambda: None)()
    details = getattr(error, "details", lambda: None)()
    name = code.name if isinstance(code, grpc.StatusCode) else type(error).__name__
    hint = next((f" ({hint})" for text, hint in _HINTS if text in (details or "")), "")
    return f"{name}: {details}{hint}" if details else name


async def scrape(address: str, service: str, security: Security = LOOPBACK_ONLY) -> str:
    """A peer's metrics as text; empty when it does not answer, or we cannot show who we are."""
    role: Role = "head" if service == HEAD_SERVICE else "worker"
    try:
        channel = new_aio_channel(address, security, role)
    except ConfigurationError as error:  # certificates are being renewed
        logger.warning("no metrics from %s: %s", address, error)
        return ""
    async with channel:
        call = channel.unary_unary(
            f"/{service}/Metrics",
            request_serializer=peer_pb2.MetricsRequest.SerializeToString,
            response_deserializer=peer_pb2.MetricsReply.FromString,
        )
        try:
            reply = await call(peer_pb2.MetricsRequest(), timeout=SCRAPE_TIMEOUT_S)
        except grpc.RpcError as error:
            logger.warning("no metrics from %s: %s", address, describe(error))
            return ""
        return str(reply.exposition)

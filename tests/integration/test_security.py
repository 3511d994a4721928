"""Real servers, real handshakes: who belongs to the cluster is let in, and nobody else."""

import asyncio
import shutil
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal

import grpc
import pytest

from cluster import rpc
from cluster.certs import LIFETIME, Authority, write_certificates
from cluster.errors import ExpertsUnavailableError, HandshakeError, MaestraleError
from cluster.head.routes import PlacementFeed
from cluster.head.stream import WorkerStream
from cluster.metrics import ServerMetrics
from cluster.placement import WorkerInfo
from cluster.security import Role, Security, TlsFiles
from model import Mixtral
from model.weights import Checkpoint
from protos import peer_pb2
from tests.integration.test_split import with_experts
from tests.integration.workers import WorkerServer, placement_on, remote_experts

TOKEN = "0123456789abcdef-correct"
OTHER_TOKEN = "0123456789abcdef-another"
HELLO = f"/{rpc.EXPERT_SERVICE}/Hello"
COMPUTE = f"/{rpc.EXPERT_SERVICE}/Compute"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Our cluster's certificates."""
    folder = tmp_path_factory.mktemp("ours")
    write_certificates(folder)
    return folder


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Those of another cluster."""
    folder = tmp_path_factory.mktemp("foreign")
    write_certificates(folder)
    return folder


def tls(folder: Path, role: Role) -> Security:
    return Security(tls=TlsFiles(folder, role))


def with_other(folder: Path, target: Path, name: str, source: Path, source_name: str) -> Path:
    """A copy of the folder in which one identity is another's."""
    shutil.copytree(folder, target)
    for suffix in ("", "-key"):
        shutil.copy(source / f"{source_name}{suffix}.pem", target / f"{name}{suffix}.pem")
    return target


def with_expired(folder: Path, target: Path, role: Role) -> Path:
    """A copy of the folder in which the certificate of this role has expired."""
    shutil.copytree(folder, target)
    authority = Authority.load(folder / "ca.pem", folder / "ca-key.pem")
    pems = authority.issue(role, datetime.now(UTC) - LIFETIME - timedelta(days=1))
    for suffix, pem in zip(("", "-key"), pems, strict=True):
        (target / f"{role}{suffix}.pem").write_bytes(pem)
    return target


class EchoServer:
    """Answers hello as a process of this model, and sends back what a stream brings."""

    def __init__(self, security: Security, plane: Literal["head", "expert"]) -> None:
        self.metrics = ServerMetrics(plane)
        self.identity = rpc.Identity("echo", "model", security)
        self.server, self.address = rpc.new_server(
            "127.0.0.1", security, self.metrics.observe_refusal
        )
        service, stream = {
            "head": (rpc.HEAD_SERVICE, "Generate"),
            "expert": (rpc.EXPERT_SERVICE, "Compute"),
        }[plane]
        answer = grpc.unary_unary_rpc_method_handler(
            self.identity.answer,
            request_deserializer=peer_pb2.HelloRequest.FromString,
            response_serializer=peer_pb2.HelloReply.SerializeToString,
        )
        export = grpc.unary_unary_rpc_method_handler(
            lambda _request, _context: peer_pb2.MetricsReply(exposition=self.metrics.exposition()),
            request_deserializer=peer_pb2.MetricsRequest.FromString,
            response_serializer=peer_pb2.MetricsReply.SerializeToString,
        )
        echo = grpc.stream_stream_rpc_method_handler(lambda messages, _context: messages)
        handlers = {"Hello": answer, "Metrics": export, stream: echo}
        self.server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(service, handlers),)
        )
        self.server.start()

    @property
    def info(self) -> WorkerInfo:
        return WorkerInfo("worker-0", self.address, self.identity.incarnation, 0)

    @property
    def refusals(self) -> dict[str, float]:
        """Their number by reason."""
        return {
            sample.labels["reason"]: sample.value
            for family in self.metrics.registry.collect()
            for sample in family.samples
            if sample.name == "maestrale_refused_peers_total"
        }


Start = Callable[..., EchoServer]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts echo servers, and stops them."""
    servers: list[EchoServer] = []

    def started(
        security: Security = rpc.LOOPBACK_ONLY, plane: Literal["head", "expert"] = "expert"
    ) -> EchoServer:
        servers.append(EchoServer(security, plane))
        return servers[-1]

    yield started
    for server in servers:
        server.server.stop(None).wait()


def connect(server: EchoServer, security: Security) -> None:
    """Open a head's stream to a worker. Raises what a head would see."""
    WorkerStream(server.info, rpc.Identity("head", "model", security)).close()


# --- those who belong here ---


@pytest.mark.parametrize("kind", ["tls", "token"])
def test_experts_behind_mutual_tls_or_a_token_compute_the_same(
    kind: str, folder: Path, mixtral: Mixtral, checkpoint: Checkpoint
) -> None:
    def security(role: Role) -> Security:
        return tls(folder, role) if kind == "tls" else Security(token=TOKEN)

    server = WorkerServer("worker-0", checkpoint, security("worker"))
    feed = PlacementFeed()
    feed.put(placement_on([server], checkpoint))
    experts = remote_experts(feed, checkpoint, security=security("head"))
    try:
        assert experts.connect(timeout_s=10)
        prompt = [1, 5, 9, 400]
        difference = with_experts(mixtral, experts).logits(prompt) - mixtral.logits(prompt)
        assert difference.abs().max() <= 1e-4
    finally:
        experts.close()
        server.stop()


@pytest.mark.parametrize("kind", ["tls", "token"])
def test_an_ingress_talks_to_heads_and_reads_metrics_the_same_way(
    kind: str, folder: Path, start: Start
) -> None:
    def security(role: Role) -> Security:
        return tls(folder, role) if kind == "tls" else Security(token=TOKEN)

    head, worker = start(security("head"), "head"), start(security("worker"))

    async def talk() -> tuple[bytes, list[str]]:
        ingress = security("ingress")
        async with rpc.new_aio_channel(head.address, ingress, "head") as channel:
            stream = channel.stream_stream(f"/{rpc.HEAD_SERVICE}/Generate")()
            await stream.write(b"a step")
            echoed = await stream.read()
            stream.cancel()
        texts = await asyncio.gather(
            rpc.scrape(head.address, rpc.HEAD_SERVICE, ingress),
            rpc.scrape(worker.address, rpc.EXPERT_SERVICE, ingress),
        )
        return echoed, texts

    echoed, texts = asyncio.run(talk())
    assert echoed == b"a step"
    assert all("maestrale_refused_peers" in text for text in texts)
    assert not head.refusals
    assert not worker.refusals


def test_a_server_takes_new_certificates_with_the_next_connection(
    folder: Path, foreign: Path, start: Start, tmp_path: Path
) -> None:
    files = tmp_path / "rotating"
    shutil.copytree(folder, files)
    server = start(tls(files, "worker"))
    connect(server, tls(folder, "head"))
    for path in foreign.iterdir():
        shutil.copy(path, files)
    connect(server, tls(foreign, "head"))
    with pytest.raises(ExpertsUnavailableError, match="not signed by our CA"):
        connect(server, tls(folder, "head"))


# --- those who do not ---


def test_a_caller_without_the_token_is_refused_and_counted(start: Start) -> None:
    server = start(Security(token=TOKEN))
    with pytest.raises(HandshakeError, match="shared token is missing"):
        connect(server, rpc.LOOPBACK_ONLY)
    for _ in range(2):
        with pytest.raises(HandshakeError, match="not our cluster's token"):
            connect(server, Security(token=OTHER_TOKEN))
    assert server.refusals == {"no_token": 1, "wrong_token": 2}
    connect(server, Security(token=TOKEN))


def test_a_stream_without_the_token_gets_nothing(start: Start) -> None:
    server = start(Security(token=TOKEN))
    with grpc.insecure_channel(server.address) as channel:
        replies = channel.stream_stream(COMPUTE)(iter([b"x" * 1000] * 10), timeout=10)
        with pytest.raises(grpc.RpcError) as error:
            next(replies)
    assert error.value.code() is grpc.StatusCode.UNAUTHENTICATED


def test_a_caller_of_the_wrong_role_is_refused_and_counted(folder: Path, start: Start) -> None:
    """Its certificate is our CA's, but an ingress has no business with a worker's experts."""
    server = start(tls(folder, "worker"))
    with pytest.raises(HandshakeError, match=r"from head, not from \['ingress.maestrale.internal"):
        connect(server, tls(folder, "ingress"))
    with rpc.new_channel(server.address, tls(folder, "ingress"), "worker") as channel:
        replies = channel.stream_stream(COMPUTE)(iter([b"rows"]), timeout=10)
        with pytest.raises(grpc.RpcError) as error:
            next(replies)
    assert error.value.code() is grpc.StatusCode.PERMISSION_DENIED
    assert server.refusals == {"wrong_role": 2}


def test_a_head_cannot_pose_as_a_worker(folder: Path, start: Start) -> None:
    server = start(tls(folder, "head"))
    with pytest.raises(ExpertsUnavailableError, match="certificate is for another role"):
        connect(server, tls(folder, "head"))


def test_peers_that_share_no_ca_do_not_connect(
    folder: Path, foreign: Path, start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.guard._Handshakes.GRACE_S", 0.0)
    server = start(tls(folder, "worker"))
    with pytest.raises(ExpertsUnavailableError, match="not signed by our CA"):
        connect(server, tls(foreign, "head"))
    # a stranger who trusts us, but whom we do not know
    stranger = with_other(folder, tmp_path / "stranger", "head", foreign, "head")
    with pytest.raises(ExpertsUnavailableError, match="wants TLS or another certificate"):
        connect(server, tls(stranger, "head"))
    connect(server, tls(folder, "head"))
    assert server.refusals == {"handshake": 2}


def test_a_caller_without_a_certificate_does_not_connect(folder: Path, start: Start) -> None:
    server = start(tls(folder, "worker"))
    credentials = grpc.ssl_channel_credentials((folder / "ca.pem").read_bytes())
    options = [("grpc.ssl_target_name_override", "worker.maestrale.internal")]
    channel = grpc.secure_channel(server.address, credentials, options)
    with channel, pytest.raises(grpc.RpcError) as error:
        channel.unary_unary(HELLO)(b"", timeout=10)
    assert "wants TLS or another certificate" in rpc.describe(error.value)


def test_an_expired_certificate_is_refused_on_either_side(
    folder: Path, start: Start, tmp_path: Path
) -> None:
    expired_worker = with_expired(folder, tmp_path / "worker", "worker")
    with pytest.raises(ExpertsUnavailableError, match="certificate has expired"):
        connect(start(tls(expired_worker, "worker")), tls(folder, "head"))
    expired_head = with_expired(folder, tmp_path / "head", "head")
    with pytest.raises(ExpertsUnavailableError, match="wants TLS or another certificate"):
        connect(start(tls(folder, "worker")), tls(expired_head, "head"))


def test_tls_and_plaintext_do_not_mix(folder: Path, start: Start) -> None:
    for plain in (rpc.LOOPBACK_ONLY, Security(token=TOKEN)):
        with pytest.raises(MaestraleError, match="wants TLS or another certificate"):
            connect(start(tls(folder, "worker")), plain)
        with pytest.raises(ExpertsUnavailableError, match="does not speak TLS, and we do"):
            connect(start(plain), tls(folder, "head"))


# --- garbage ---


def test_what_does_not_parse_ends_its_call_only_and_is_counted(start: Start) -> None:
    server = start()
    with grpc.insecure_channel(server.address) as channel:
        with pytest.raises(grpc.RpcError) as error:
            channel.unary_unary(HELLO)(b"\xff garbage", timeout=10)
        assert error.value.code() is grpc.StatusCode.INTERNAL
        with pytest.raises(grpc.RpcError) as error:
            channel.unary_unary(f"/{rpc.EXPERT_SERVICE}/Nothing")(b"", timeout=10)
        assert error.value.code() is grpc.StatusCode.UNIMPLEMENTED
    assert server.refusals == {"garbage": 1, "unknown_method": 1}
    connect(server, rpc.LOOPBACK_ONLY)


def test_nothing_listens_off_loopback_unprotected() -> None:
    with pytest.raises(MaestraleError, match="not loopback: set tls_folder"):
        rpc.new_server("0.0.0.0")

"""Real lenders: a checkpoint read from another process is the one on its disk, or refused."""

import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch

from cluster import rpc
from cluster.certs import write_certificates
from cluster.errors import FilesUnavailableError, LenderError
from cluster.head.feed import PlacementFeed
from cluster.lending import borrower as borrower_module
from cluster.lending.borrower import BorrowedFolder, Borrower, LenderInfo
from cluster.lending.calls import LenderCalls
from cluster.lending.located import locate
from cluster.lending.service import MAX_READ_BYTES, lent_files
from cluster.security import ROLES, Security, TlsFiles
from model import TINY, Mixtral
from model.experts import checksum
from model.quantized_copy import save_quantized
from model.tensor_files import digested
from model.tokenizer import Tokenizer
from model.units import Unit
from model.weights import Checkpoint
from protos import lender_pb2
from protos.lender_pb2_grpc import LenderStub, add_LenderServicer_to_server
from tests.fakes import random_tensors, small_config, write_checkpoint
from tests.integration.lending import lend
from tests.integration.test_split import with_experts
from tests.integration.workers import WorkerServer, placement_on, remote_experts

ELSEWHERE = Path("/not-on-this-node/tiny")


@contextmanager
def lender(
    folder: Path, weights: str, security: Security = rpc.LOOPBACK_ONLY
) -> Iterator[LenderInfo]:
    """One in this process."""
    server, address = lend(folder, weights, security)
    try:
        yield LenderInfo(address, ELSEWHERE, weights)
    finally:
        server.stop(0).wait()


@pytest.fixture
def borrow(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[Callable[..., BorrowedFolder]]:
    """Borrows from lenders, and gives up soon."""
    monkeypatch.setattr(borrower_module, "PATIENCE_S", 0.2)
    monkeypatch.setattr(borrower_module, "PAUSE_S", 0.05)
    with ExitStack() as cleanup:

        def borrow(
            *lenders: LenderInfo,
            weights: str | None = None,
            security: Security = rpc.LOOPBACK_ONLY,
        ) -> BorrowedFolder:
            calls = LenderCalls(security)
            cleanup.callback(calls.close)
            found = list(lenders)
            return BorrowedFolder(Borrower(calls, lambda: found, ELSEWHERE, ELSEWHERE, weights))

        yield borrow


@pytest.fixture
def located(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[[], Checkpoint]]:
    """The tiny checkpoint as a node has it that lacks the folder."""
    monkeypatch.setattr("cluster.lending.located.CACHE", tmp_path)
    with lender(TINY, Checkpoint(TINY).sample()) as info:
        calls = LenderCalls(rpc.LOOPBACK_ONLY)

        def located() -> Checkpoint:
            found = locate(ELSEWHERE, lambda model: Borrower(calls, lambda: [info], model, model))
            return Checkpoint(found.folder, files=found.weights, dtype=torch.float32)

        yield located
        calls.close()


def test_a_worker_that_borrows_gives_the_same_sums(
    located: Callable[[], Checkpoint], mixtral: Mixtral, checkpoint: Checkpoint
) -> None:
    borrowed = located()
    assert borrowed.folder != TINY
    assert borrowed.sample() == checkpoint.sample()
    worker = WorkerServer("worker-0", borrowed)
    feed = PlacementFeed()
    feed.put(placement_on([worker], checkpoint))
    remote = remote_experts(feed, checkpoint)
    try:
        assert remote.connect(timeout_s=10)
        prompt = "Once upon a time"
        expected = mixtral.generate(prompt, max_tokens=20)
        assert with_experts(mixtral, remote).generate(prompt, max_tokens=20) == expected
    finally:
        remote.close()
        worker.stop()


def test_a_head_and_an_ingress_have_all_that_they_read(located: Callable[[], Checkpoint]) -> None:
    borrowed = located()
    text = "Tom has a red ball."
    tokenizer = Tokenizer.from_folder(borrowed.folder)
    assert tokenizer.encode_prompt(text) == Tokenizer.from_folder(TINY).encode_prompt(text)
    found, expected = borrowed.load_decoder(), Checkpoint(TINY, dtype=torch.float32).load_decoder()
    assert torch.equal(found.embedding_VD, expected.embedding_VD)
    for layer, other in zip(found.layers, expected.layers, strict=True):
        assert torch.equal(layer.gate_ED, other.gate_ED)


def test_shards_slices_and_quantised_copies_are_read_as_from_disk(
    borrow: Callable[..., BorrowedFolder], tmp_path: Path
) -> None:
    content = small_config(intermediate_size=64, hidden_size=64)
    tensors = random_tensors(content)
    folder, copy = tmp_path / "shards", tmp_path / "int8"
    folder.mkdir()
    save_quantized(
        Checkpoint(write_checkpoint(folder, content, tensors, num_shards=3)), copy, "int8"
    )
    for path in (folder, copy):
        local = Checkpoint(path)
        with lender(path, local.sample()) as info:
            borrowed = Checkpoint(path, files=borrow(info))
            assert borrowed.sample() == local.sample()
            for unit in (Unit(0, 3), Unit(0, 1, 1, 2)):
                with digested() as here:
                    on_disk = checksum(local.load_unit(unit))
                with digested() as there:
                    assert checksum(borrowed.load_unit(unit)) == on_disk
                assert there.digest() == here.digest()


def test_a_lender_killed_during_a_load_is_replaced_by_another(
    borrow: Callable[..., BorrowedFolder], tmp_path: Path
) -> None:
    content = small_config(hidden_size=512, intermediate_size=2048)  # experts of 12 MiB
    write_checkpoint(tmp_path, content, random_tensors(content))
    local = Checkpoint(tmp_path)
    command = [sys.executable, "-m", "tests.integration.lending", str(tmp_path), local.sample()]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as killed:
        assert killed.stdout is not None
        lenders = [LenderInfo(killed.stdout.readline().strip(), ELSEWHERE, local.sample())]
        calls = LenderCalls(rpc.LOOPBACK_ONLY)
        borrower = Borrower(calls, lambda: lenders, ELSEWHERE, ELSEWHERE)
        borrowed = Checkpoint(tmp_path, files=BorrowedFolder(borrower))
        read = calls.read

        def read_and_kill(*arguments: Any) -> Iterator[bytes]:
            for piece in read(*arguments):
                yield piece
                if killed.poll() is None:
                    killed.kill()
                    killed.wait()
                    lenders.append(other)

        first, *others = local.config.expert_units
        with lender(tmp_path, local.sample()) as other:
            assert checksum(borrowed.load_unit(first)) == checksum(local.load_unit(first))
            calls.read = read_and_kill  # type: ignore[method-assign]
            for unit in others:
                assert checksum(borrowed.load_unit(unit)) == checksum(local.load_unit(unit))
        assert killed.returncode == -signal.SIGKILL
        calls.close()


def test_another_checkpoint_at_the_same_path_is_refused(
    borrow: Callable[..., BorrowedFolder],
) -> None:
    """Also where what is known of the lender is out of date."""
    with lender(TINY, "trained on") as info:
        stale = LenderInfo(info.address, ELSEWHERE, "w")
        for known in (info, stale):
            with pytest.raises(FilesUnavailableError, match=r"weights trained on, not w"):
                borrow(known, weights="w")


def test_files_that_change_while_they_are_lent_are_refused(
    borrow: Callable[..., BorrowedFolder], tmp_path: Path
) -> None:
    content = small_config()
    write_checkpoint(tmp_path, content, random_tensors(content))
    with lender(tmp_path, "w") as info:
        borrowed = borrow(info)
        write_checkpoint(tmp_path, content, random_tensors(content, seed=1))
        with (
            pytest.raises(OSError, match="has changed since this lender has started"),
            borrowed.open("model.safetensors") as file,
        ):
            file.read(8)


# --- what may be asked for ---


@pytest.fixture(scope="module")
def stub() -> Iterator[LenderStub]:
    with lender(TINY, "w") as info, grpc.insecure_channel(info.address) as channel:
        yield LenderStub(channel)


def refusal(stub: LenderStub, name: str, offset: int, length: int) -> grpc.StatusCode:
    request = lender_pb2.ReadRequest(weights="w", name=name, offset=offset, length=length)
    with pytest.raises(grpc.RpcError) as refused:
        list(stub.Read(request, timeout=10))
    code: grpc.StatusCode = refused.value.code()
    return code


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../tiny/config.json", str(TINY / "config.json"), "__init__.py", "\0"]
)
def test_only_files_of_the_checkpoint_can_be_read(stub: LenderStub, name: str) -> None:
    assert refusal(stub, name, 0, 1) == grpc.StatusCode.NOT_FOUND


def test_lengths_are_bounded(stub: LenderStub) -> None:
    num_bytes = (TINY / "config.json").stat().st_size
    for length in (0, MAX_READ_BYTES + 1, 2**32 - 1):
        code = refusal(stub, "model.safetensors", 0, length)
        assert code == grpc.StatusCode.INVALID_ARGUMENT
    for offset, length in ((num_bytes, 1), (0, num_bytes + 1), (2**64 - 1, 1)):
        assert refusal(stub, "config.json", offset, length) == grpc.StatusCode.OUT_OF_RANGE


def test_links_out_of_the_folder_and_other_files_are_not_lent(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("{}")
    folder = tmp_path / "model"
    shutil.copytree(TINY, folder)
    (folder / "model-00009.safetensors").symlink_to(secret)
    (folder / "params.json").symlink_to("config.json")  # stays within
    (folder / "notes.txt").write_text("mine")
    (folder / "sub").mkdir()
    (folder / "sub" / "config.json").write_text("{}")
    lent = lent_files(folder).keys()
    assert lent >= {"config.json", "model.safetensors", "params.json"}
    assert not lent & {"model-00009.safetensors", "notes.txt", "sub/config.json"}


def test_names_that_lead_elsewhere_are_not_taken_from_a_lender(tmp_path: Path) -> None:
    class Liar:
        def List(self, request: object, context: object) -> lender_pb2.ListReply:  # noqa: N802
            names = ("../x.safetensors.index.json", "/etc/passwd", "a/config.json", "..")
            return lender_pb2.ListReply(
                files=[lender_pb2.File(name=name, num_bytes=1) for name in names]
            )

        Read = List

    server, address = rpc.new_server("127.0.0.1")
    add_LenderServicer_to_server(Liar(), server)
    server.start()
    calls = LenderCalls(rpc.LOOPBACK_ONLY)
    try:
        with pytest.raises(LenderError, match="no file of a checkpoint"):
            calls.files(address, "w")
    finally:
        calls.close()
        server.stop(0).wait()


# --- who may ask ---


def test_every_role_of_the_cluster_may_borrow_and_no_stranger(
    borrow: Callable[..., BorrowedFolder], tmp_path: Path
) -> None:
    ours, foreign = tmp_path / "ours", tmp_path / "foreign"
    write_certificates(ours)
    write_certificates(foreign)
    with lender(TINY, "w", Security(tls=TlsFiles(ours, "worker"))) as info:
        for role in ROLES:
            borrowed = borrow(info, security=Security(tls=TlsFiles(ours, role)))
            assert borrowed.whole("config.json") == (TINY / "config.json").read_bytes()
        for security in (Security(tls=TlsFiles(foreign, "worker")), rpc.LOOPBACK_ONLY):
            with pytest.raises(FilesUnavailableError):
                borrow(info, security=security)


def test_the_clusters_token_is_shown_and_asked_for(borrow: Callable[..., BorrowedFolder]) -> None:
    token = Security(token="0123456789abcdef-correct")
    with lender(TINY, "w", token) as info:
        borrowed = borrow(info, security=token)
        assert borrowed.whole("config.json") == (TINY / "config.json").read_bytes()
        with pytest.raises(FilesUnavailableError, match="UNAUTHENTICATED"):
            borrow(info)

"""A borrowed file reads like the one on disk, whatever becomes of its lenders."""

import random
from collections.abc import Callable, Iterator, Mapping
from hashlib import sha256
from io import FileIO
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import FilesUnavailableError, LenderError
from cluster.lending import borrower as borrower_module
from cluster.lending.borrower import (
    PATIENCE_S,
    BorrowedFile,
    BorrowedFolder,
    Borrower,
    LenderInfo,
)
from cluster.lending.located import copied

MODEL = Path("~/models/mixtral")
FILE = "model.safetensors"
CONTENT = random.Random(5).randbytes(5000)


class Network:
    """Lenders by their addresses, time, and what each does with a read."""

    max_bytes = 700

    def __init__(self, *addresses: str) -> None:
        self.files_of = {address: {FILE: CONTENT} for address in addresses}
        self.weights = dict.fromkeys(addresses, "w")
        self.deliver: Callable[[str, bytes], Iterator[bytes]] = lambda lender, data: iter(
            (data[: len(data) // 2], data[len(data) // 2 :])
        )
        self.num_reads = 0
        self.asked: list[str] = []
        self.now = 0.0

    def lenders(self) -> list[LenderInfo]:
        return [LenderInfo(address, MODEL, self.weights[address]) for address in self.files_of]

    def files(self, address: str, weights: str) -> Mapping[str, BorrowedFile]:
        return {
            name: BorrowedFile(len(data), sha256(data).digest())
            for name, data in self._of(address).items()
        }

    def read(
        self, address: str, weights: str, name: str, offset: int, length: int
    ) -> Iterator[bytes]:
        assert weights == self.weights[address]
        assert 0 < length <= self.max_bytes
        self.num_reads += 1
        self.asked.append(address)
        data = self._of(address)[name][offset : offset + length]
        return self.deliver(address, data)

    def _of(self, address: str) -> dict[str, bytes]:
        if address not in self.files_of:
            raise LenderError(f"{address} is gone")
        return self.files_of[address]

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def borrower(network: Network, weights: str | None = None) -> Borrower:
    return Borrower(
        network,
        network.lenders,
        MODEL,
        MODEL.expanduser(),
        weights,
        clock=lambda: network.now,
        sleep=network.sleep,
    )


@pytest.fixture
def on_disk(tmp_path: Path) -> Path:
    (tmp_path / FILE).write_bytes(CONTENT)
    return tmp_path / FILE


steps = st.lists(
    st.one_of(
        st.tuples(st.just("seek"), st.integers(-100, 6000), st.sampled_from([0, 1, 2])),
        st.tuples(st.just("readinto"), st.integers(0, 3000)),
        st.tuples(st.just("read"), st.integers(-1, 3000)),
        st.tuples(st.just("tell")),
    ),
    max_size=30,
)


@given(steps=steps, ahead=st.sampled_from([1, 64, 1000, 10_000]), seed=st.integers(0, 99))
def test_any_sequence_of_steps_is_as_on_disk(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[object, ...]], ahead: int, seed: int
) -> None:
    file = tmp_path_factory.mktemp("disk") / FILE
    file.write_bytes(CONTENT)
    rng = random.Random(seed)
    network = Network("a", "b", "c")

    def deliver(lender: str, data: bytes) -> Iterator[bytes]:
        """Some give all in pieces, some break off, some say nothing."""
        while data:
            if rng.random() < 0.2:
                raise LenderError("broke off")
            size = rng.randint(0, len(data))
            yield data[:size]
            data = data[size:]

    network.deliver = deliver

    def did(opened: object, step: tuple[object, ...]) -> object:
        verb, *arguments = step
        if verb == "readinto":
            buffer = bytearray(arguments[0])  # type: ignore[call-overload]
            num_read = opened.readinto(buffer)  # type: ignore[attr-defined]
            return num_read, bytes(buffer)
        try:
            return getattr(opened, str(verb))(*arguments)
        except OSError:
            return OSError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(borrower_module, "AHEAD_BYTES", ahead)
        with FileIO(file) as local, BorrowedFolder(borrower(network)).open(FILE) as borrowed:
            for step in steps:
                assert did(borrowed, step) == did(local, step), step


def test_small_reads_that_follow_each_other_are_few_calls() -> None:
    network = Network("a")
    with BorrowedFolder(borrower(network)).open(FILE) as file:
        rows = []
        for row in range(50):
            file.seek(row * 100)
            rows.append(file.read(10))
    assert rows == [CONTENT[row * 100 :][:10] for row in range(50)]
    assert network.num_reads == -(-len(CONTENT) // network.max_bytes)


def test_where_a_lender_dies_the_next_goes_on_from_that_byte() -> None:
    network = Network("a", "b")
    given_by: dict[str, int] = {"a": 0, "b": 0}
    first: list[str] = []

    def deliver(lender: str, data: bytes) -> Iterator[bytes]:
        first.append(lender)
        for begin in range(0, len(data), 100):
            if lender == first[0] and given_by[lender] >= 1000:
                raise LenderError("killed")
            piece = data[begin : begin + 100]
            given_by[lender] += len(piece)
            yield piece

    network.deliver = deliver
    out = bytearray(len(CONTENT))
    borrower(network).read_into(FILE, 0, out)
    assert bytes(out) == CONTENT
    assert given_by[first[0]] == 1000
    assert sum(given_by.values()) == len(CONTENT)  # nothing came twice
    assert network.now == 0  # nobody waited


def test_a_lender_that_comes_while_all_are_away_is_asked() -> None:
    network = Network()
    waited = network.sleep

    def sleep(seconds: float) -> None:
        waited(seconds)
        if network.now > PATIENCE_S / 2:
            network.files_of["late"], network.weights["late"] = {FILE: CONTENT}, "w"

    reader = Borrower(
        network, network.lenders, MODEL, MODEL, clock=lambda: network.now, sleep=sleep
    )
    out = bytearray(10)
    reader.read_into(FILE, 20, out)
    assert bytes(out) == CONTENT[20:30]


def test_without_any_lender_it_is_said_what_was_looked_for_and_what_to_do() -> None:
    network = Network()
    with pytest.raises(FilesUnavailableError) as failure:
        borrower(network).files()
    assert str(MODEL.expanduser()) in str(failure.value)
    assert "there is none that has it" in str(failure.value)
    assert "Put the folder on this node" in str(failure.value)
    assert PATIENCE_S <= network.now < 2 * PATIENCE_S


def test_who_was_asked_and_why_each_failed_is_said() -> None:
    network = Network("a", "b")

    def deliver(lender: str, data: bytes) -> Iterator[bytes]:
        raise LenderError(f"{lender} is tired")

    network.deliver = deliver
    with pytest.raises(FilesUnavailableError, match=r"(?=.*a: a is tired)(?=.*b: b is tired)"):
        borrower(network).read_into(FILE, 0, bytearray(3))


@pytest.mark.parametrize("change", [b"", b"x", b"xy" * 500], ids=["too short", "longer", "long"])
def test_a_lender_that_gives_too_little_or_too_much_is_left(change: bytes) -> None:
    network = Network("bad", "good")

    def deliver(lender: str, data: bytes) -> Iterator[bytes]:
        yield data if lender == "good" else (data + change if change else data[:-1])

    network.deliver = deliver
    out, guard = bytearray(100), bytearray(100)
    whole = memoryview(out + guard)
    for _ in range(20):  # whichever is asked first
        borrower(network).read_into(FILE, 0, whole[:100])
        assert bytes(whole) == CONTENT[:100] + bytes(100)


def test_another_checkpoint_under_the_same_path_is_refused() -> None:
    network = Network("other")
    network.weights["other"] = "trained on"
    with pytest.raises(FilesUnavailableError, match="weights trained on, not w"):
        borrower(network, "w").files()
    assert network.asked == []


def test_who_knows_no_weights_stays_with_those_of_the_first_lender() -> None:
    network = Network("first")
    reader = borrower(network)
    reader.files()
    network.files_of = {"other": {FILE: bytes(5000)}}
    network.weights["other"] = "trained on"
    with pytest.raises(FilesUnavailableError, match="weights trained on, not w"):
        reader.read_into(FILE, 0, bytearray(10))


# --- small files are copied ---


SMALL = {"config.json": b"{}", "additional_chat_templates/tool_use.jinja": b"template"}


def test_small_files_are_copied_once(tmp_path: Path) -> None:
    network = Network("a")
    network.files_of["a"] = {FILE: CONTENT, **SMALL}
    folder = copied(BorrowedFolder(borrower(network)), tmp_path)
    there = {path for path in folder.rglob("*") if path.is_file()}
    assert {path.relative_to(folder).as_posix(): path.read_bytes() for path in there} == SMALL
    num_reads = network.num_reads
    assert copied(BorrowedFolder(borrower(network)), tmp_path) == folder
    assert network.num_reads == num_reads


def test_a_copy_that_was_damaged_is_made_again(tmp_path: Path) -> None:
    network = Network("a")
    network.files_of["a"] = dict(SMALL)
    folder = copied(BorrowedFolder(borrower(network)), tmp_path)
    (folder / "config.json").write_bytes(b"{")
    copied(BorrowedFolder(borrower(network)), tmp_path)
    assert (folder / "config.json").read_bytes() == b"{}"


def test_other_content_has_another_folder(tmp_path: Path) -> None:
    network = Network("a")
    folders = set()
    for content in (b"{}", b"{ }"):
        network.files_of["a"] = {"config.json": content}
        folders.add(copied(BorrowedFolder(borrower(network)), tmp_path))
    assert len(folders) == 2


def test_content_that_is_not_what_was_listed_is_not_copied(tmp_path: Path) -> None:
    network = Network("a")
    network.files_of["a"] = dict(SMALL)
    network.deliver = lambda lender, data: iter((bytes(len(data)),))
    with pytest.raises(FilesUnavailableError, match="not what it was when"):
        copied(BorrowedFolder(borrower(network)), tmp_path)
    assert not any(path.is_file() for path in tmp_path.rglob("*"))

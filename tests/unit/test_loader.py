"""What a worker holds is what it was told to, whole and checked against the manifest."""

import json
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cluster.errors import ManifestError
from cluster.expert import loader as loader_module
from cluster.expert.batcher import Batcher, NotHeldError
from cluster.expert.loader import Loader
from cluster.manifest import CACHE, FILE, Manifest
from cluster.metrics import WorkerMetrics
from model.experts import Assignments, ExpertWeights, checksum
from model.tensor_files import digested
from model.units import Unit
from model.weights import Checkpoint, OnBytes
from tests.faults import corrupt

A, B, C = Unit(0, 0), Unit(0, 1), Unit(1, 0)


class Disk:
    """Units to be read, one at a time when told to."""

    def __init__(self) -> None:
        self.digests = {A: "a", B: "b", C: "c"}
        self.read: list[Unit] = []
        self.before_read: Callable[[Unit], None] = lambda unit: None
        self.progress: list[tuple[int, int]] = []
        """Bytes that have come, and that are left."""

    def load(self, unit: Unit, on_bytes: OnBytes) -> tuple[ExpertWeights, str]:
        self.before_read(unit)
        self.read.append(unit)
        for part_bytes in (32, 16):
            on_bytes(part_bytes)
        return ExpertWeights(torch.zeros(4, 2), torch.zeros(2, 2)), self.digests[unit]


def settled(loader: Loader) -> Loader:
    """The loader once its thread has ended."""
    for thread in threading.enumerate():
        if thread.name == "loader":
            thread.join(10)
    return loader


@pytest.fixture
def disk() -> Disk:
    return Disk()


@pytest.fixture
def held() -> dict[Unit, ExpertWeights]:
    return {}


@pytest.fixture
def loader(disk: Disk, held: dict[Unit, ExpertWeights]) -> Loader:
    return Loader(
        disk.load,
        held,
        lambda unit: [Path("/models/tiny/first.safetensors")],
        lambda unit: 48,
        lambda num_bytes, left_bytes: disk.progress.append((num_bytes, left_bytes)),
    )


def test_exactly_what_is_asked_for_is_held_in_that_order(
    loader: Loader, disk: Disk, held: dict[Unit, ExpertWeights]
) -> None:
    loader.hold([C, A], {})
    assert settled(loader).digests == {C: "c", A: "a"}
    assert disk.read == [C, A]
    assert loader.num_bytes == 2 * 12 * 4
    loader.hold([A, B], {})
    assert settled(loader).digests == {A: "a", B: "b"}
    assert held.keys() == {A, B}
    assert disk.read == [C, A, B]


def test_progress_is_of_all_that_is_wanted_and_ends_with_it(loader: Loader, disk: Disk) -> None:
    seen: list[tuple[int, int]] = []

    def look(unit: Unit) -> None:
        progress = loader.progress
        assert progress is not None
        seen.append((progress.done_bytes, progress.total_bytes))
        if len(seen) == 2:  # more is wanted meanwhile
            loader.hold([A, B, C], {})

    disk.before_read = look
    assert loader.progress is None
    loader.hold([A, B], {})
    assert settled(loader).progress is None
    assert seen == [(0, 96), (48, 96), (96, 144)]
    assert disk.progress == [(32, 64), (16, 48), (32, 64), (16, 48), (32, 16), (16, 0)]
    loader.hold([A], {})
    loader.hold([A, B], {})  # what was held before does not count
    assert settled(loader).progress is None
    assert seen[3:] == [(0, 48)]


def test_what_is_no_longer_wanted_when_it_arrives_is_not_kept(
    loader: Loader, disk: Disk, held: dict[Unit, ExpertWeights]
) -> None:
    disk.before_read = lambda unit: loader.hold([B], {}) if unit == A else None
    loader.hold([A], {})
    assert settled(loader).digests == {B: "b"}
    assert held.keys() == {B}


def test_a_failure_to_load_what_is_no_longer_wanted_stops_nothing(
    loader: Loader, disk: Disk, held: dict[Unit, ExpertWeights]
) -> None:
    def fail(unit: Unit) -> None:
        if unit == A:
            loader.hold([B], {})
            raise OSError("the disk is broken there")

    disk.before_read = fail
    loader.hold([A], {})
    assert settled(loader).error is None
    assert held.keys() == {B}


def test_a_unit_that_is_not_what_was_loaded_first_is_refused_with_both_digests(
    loader: Loader, disk: Disk, held: dict[Unit, ExpertWeights]
) -> None:
    loader.hold([A, B], {A: "a", B: "another"})
    assert settled(loader).error is not None
    for part in (
        "ManifestError: expert 1 of layer 0",
        "tiny/first.safetensors",
        "digest b,",
        "another",
        "stop the service",
        str(CACHE),
    ):
        assert part in str(loader.error)
    assert held.keys() == {A}
    disk.digests[B] = "another"  # the file is mended
    loader.hold([A, B], {B: "another"})
    assert settled(loader).error is None
    assert held.keys() == {A, B}


def test_a_held_unit_that_proves_wrong_is_read_again(loader: Loader, disk: Disk) -> None:
    loader.hold([A], {})
    settled(loader)
    disk.digests[A] = "right"
    loader.hold([A], {A: "right"})
    assert settled(loader).digests == {A: "right"}


def test_a_unit_that_has_changed_in_memory_is_dropped_and_read_again(
    loader: Loader, disk: Disk, held: dict[Unit, ExpertWeights]
) -> None:
    loader.hold([A], {})
    settled(loader)
    assert not loader.drop_if_damaged(A)
    damaged = held[A]
    assert isinstance(damaged.w2_DF, torch.Tensor)
    corrupt(damaged.w2_DF)
    assert loader.drop_if_damaged(A)
    assert settled(loader).digests == {A: "a"}
    assert held[A] is not damaged
    assert disk.read == [A, A]
    assert not loader.drop_if_damaged(A)


def test_a_sound_unit_that_is_dropped_while_it_is_looked_at_is_not_called_damaged(
    loader: Loader, monkeypatch: pytest.MonkeyPatch
) -> None:
    loader.hold([A], {})
    settled(loader)

    def checksum_late(weights: ExpertWeights) -> int:
        loader.hold([], {})
        return checksum(weights)

    monkeypatch.setattr(loader_module, "checksum", checksum_late)
    assert not loader.drop_if_damaged(A)


def test_a_call_whose_expert_is_dropped_while_it_waits_is_told_so() -> None:
    class Vanishing(dict[Unit, ExpertWeights]):
        """There when looked for, gone when taken."""

        def __contains__(self, key: object) -> bool:
            return True

    batcher = Batcher(Vanishing(), WorkerMetrics())
    one_row = Assignments(((A, 1),), torch.tensor([0]), torch.tensor([1.0]))
    with pytest.raises(NotHeldError, match="expert 0 of layer 0"):
        batcher.compute(0, torch.ones(1, 2), one_row)


def test_the_manifest_notes_what_it_sees_first_and_knows_it_ever_after(tmp_path: Path) -> None:
    manifest = Manifest.of(tmp_path, tmp_path / "cache")
    assert manifest.path == tmp_path / FILE
    assert manifest.sound({A: "a", B: "b"}, "int4") == {A: "a", B: "b"}
    again = Manifest.of(tmp_path, tmp_path / "cache")
    assert again.sound({A: "a", B: "wrong", C: "c"}, None) == {A: "a", C: "c"}
    assert again.expected([A, B, C, Unit(5, 5)], None) == {A: "a", B: "b", C: "c"}
    assert json.loads(manifest.path.read_text())["digests"] == {"0.0": "a", "0.1": "b", "1.0": "c"}
    assert [file.name for file in tmp_path.iterdir()] == [FILE]


def test_slices_have_digests_of_their_own_by_the_way_they_are_read(tmp_path: Path) -> None:
    manifest = Manifest.of(tmp_path, tmp_path)
    half = Unit(0, 0, 1, 2)
    manifest.sound({A: "a"}, None)
    manifest.sound({half: "dense"}, None)
    manifest.sound({half: "quantised"}, "int4")
    assert manifest.expected([A, half], None) == {A: "a", half: "dense"}
    assert manifest.expected([half], "int4") == {half: "quantised"}


def test_a_folder_that_cannot_be_written_has_its_manifest_in_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: False)
    paths = {Manifest.of(tmp_path / name / "model", tmp_path / "cache").path for name in "ab"}
    assert {path.parent for path in paths} == {tmp_path / "cache"}
    assert len(paths) == 2


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"format": "2"}'])
def test_a_file_that_is_no_manifest_is_refused_by_name(tmp_path: Path, content: str) -> None:
    (tmp_path / FILE).write_text(content)
    with pytest.raises(ManifestError, match=rf"{FILE} is no manifest.*delete it"):
        Manifest.of(tmp_path, tmp_path)


def test_the_digest_is_of_the_stored_bytes_whatever_they_become(
    tmp_path: Path, tiny_folder: Path
) -> None:
    def digest(checkpoint: Checkpoint, unit: Unit) -> str:
        with digested() as found:
            checkpoint.load_unit(unit)
        return found.hexdigest()

    stored = Checkpoint(tiny_folder)
    expected = digest(stored, A)
    assert digest(stored, A) == expected
    assert digest(stored, B) != expected
    assert digest(Checkpoint(tiny_folder, dtype=torch.float32), A) == expected
    assert digest(Checkpoint(tiny_folder, expert_quantization="int8"), A) == expected
    for file in tiny_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    name = "model.layers.0.block_sparse_moe.experts.0.w2.weight"
    begin = stored.files.open("model.safetensors").tensors[name].begin
    weights = bytearray((tmp_path / "model.safetensors").read_bytes())
    weights[begin] ^= 1
    (tmp_path / "model.safetensors").write_bytes(weights)
    damaged = Checkpoint(tmp_path)
    assert digest(damaged, A) != expected
    assert digest(damaged, B) == digest(stored, B)

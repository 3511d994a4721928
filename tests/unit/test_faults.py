"""The faults happen as they say: else a test that survives them shows nothing."""

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch

from model.tensor_files import SafetensorsFile
from tests import faults

NORM = "model.norm.weight"


@pytest.fixture
def victim() -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-c", "import time; time.sleep(60)"]
    with subprocess.Popen(command) as process:
        yield process
        process.kill()


def test_a_killed_process_is_dead_by_that_signal(victim: subprocess.Popen[bytes]) -> None:
    faults.kill(victim.pid)
    assert victim.wait(10) == -9


def test_a_process_is_killed_with_all_below_it() -> None:
    child = "import time; print(flush=True); time.sleep(60)"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        (below,) = faults.descendants(process.pid)
        faults.kill_all(process.pid)
        assert process.wait(10) == -9
        assert psutil.wait_procs([below], timeout=10)[1] == []


def test_a_paused_process_is_stopped_until_the_end(victim: subprocess.Popen[bytes]) -> None:
    process = psutil.Process(victim.pid)
    with faults.paused(victim.pid):
        # what the kernel says, a moment after the signal
        deadline = time.monotonic() + 10
        while process.status() != psutil.STATUS_STOPPED and time.monotonic() < deadline:
            time.sleep(0.001)
        assert process.status() == psutil.STATUS_STOPPED
    assert process.status() != psutil.STATUS_STOPPED


def test_killing_names_its_victims_and_passes_an_error_on(
    victim: subprocess.Popen[bytes],
) -> None:
    victims = [None, victim.pid]
    is_empty = threading.Event()

    def pick() -> int | None:
        if not victims:
            is_empty.set()
            raise RuntimeError("nobody is left")
        return victims.pop(0)

    with (
        pytest.raises(RuntimeError, match="nobody is left"),
        faults.killing(pick, every_s=0.01) as killed,
    ):
        assert is_empty.wait(10)
    assert killed == [victim.pid]
    assert victim.wait(10) == -9


@pytest.mark.parametrize("byte", [0, -1])
def test_a_corrupt_copy_differs_in_one_bit_of_one_tensor(
    tmp_path: Path, tiny_folder: Path, byte: int
) -> None:
    copy = faults.corrupt_copy(tiny_folder, tmp_path / "copy", NORM, byte=byte)
    changed = []
    for name, stored in SafetensorsFile(copy / "model.safetensors").tensors.items():
        one, other = (
            read(folder / "model.safetensors", name, stored.num_bytes)
            for folder in (tiny_folder, copy)
        )
        if not torch.equal(one, other):
            changed.append(name)
            differing = (one ^ other).nonzero().flatten().tolist()
            assert differing == [range(stored.num_bytes)[byte]]
            assert (one ^ other)[byte] == 1
    assert changed == [NORM]


def read(path: Path, name: str, num_bytes: int) -> torch.Tensor:
    file = SafetensorsFile(path)
    stored = file.tensors[name]
    out = torch.empty(num_bytes // stored.dtype.itemsize, dtype=stored.dtype)
    file.read(name, 0, out)
    return out.view(torch.uint8)


def test_a_corrupt_tensor_differs_in_one_bit() -> None:
    tensor = torch.ones(2, 3)
    faults.corrupt(tensor, byte=4, bit=7)
    assert tensor.flatten().tolist() != [1.0] * 6
    faults.corrupt(tensor, byte=4, bit=7)
    assert tensor.flatten().tolist() == [1.0] * 6


def test_a_slow_disk_reads_the_same_later(tiny_folder: Path) -> None:
    path = tiny_folder / "model.safetensors"
    num_bytes = SafetensorsFile(path).tensors[NORM].num_bytes
    expected = read(path, NORM, num_bytes)
    started = time.monotonic()
    with faults.slow_disk(0.05):
        assert torch.equal(read(path, NORM, num_bytes), expected)
    assert time.monotonic() - started >= 0.05

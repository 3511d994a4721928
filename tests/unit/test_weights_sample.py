"""A sample tells other weights of the same shapes apart, on whichever node they lie."""

import shutil
from pathlib import Path

import pytest
import torch

from cluster import rpc
from model.config import MixtralConfig
from model.errors import CheckpointError
from model.tensor_files import weights_sample
from tests.fakes import random_tensors, small_config, write_checkpoint


def test_the_same_files_elsewhere_have_the_same_sample(tmp_path: Path) -> None:
    content = small_config()
    folder = tmp_path / "a"
    folder.mkdir()
    write_checkpoint(folder, content, random_tensors(content))
    elsewhere = Path(shutil.copytree(folder, tmp_path / "b"))
    assert weights_sample(elsewhere) == weights_sample(folder)


@pytest.mark.parametrize("part", ["self_attn", "experts", "lm_head"])
def test_weights_trained_on_have_another(tmp_path: Path, part: str) -> None:
    content = small_config()
    tensors = random_tensors(content)
    before = weights_sample(write_checkpoint(tmp_path, content, tensors))
    trained = {
        name: tensor + 1e-3 * torch.randn_like(tensor) if part in name else tensor
        for name, tensor in tensors.items()
    }
    assert weights_sample(write_checkpoint(tmp_path, content, trained)) != before


def test_files_of_any_size_have_one(tmp_path: Path) -> None:
    samples = set()
    for num_bytes in (0, 1, 4096, 4097, 10**6):
        (tmp_path / "model.safetensors").write_bytes(bytes(num_bytes))
        samples.add(weights_sample(tmp_path))
    assert len(samples) == 5


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        weights_sample(tmp_path)


def test_head_and_worker_of_other_weights_refuse_each_other() -> None:
    config = MixtralConfig.from_dict(small_config())
    head = rpc.Identity("head", rpc.fingerprint(config, None, "a"))
    worker = rpc.Identity("worker", rpc.fingerprint(config, None, "b"))
    refusal = head.mismatch(worker.hello())
    assert refusal is not None
    assert "weights differ" in refusal

"""A sample tells other weights of the same shapes apart, on whichever node they lie."""

import shutil
from pathlib import Path

import pytest
import torch

from cluster import rpc
from model.config import MixtralConfig
from model.errors import CheckpointError
from model.quantized_copy import save_quantized
from model.tensor_files import sampled
from model.weight_folder import LocalFolder
from model.weights import Checkpoint
from tests.fakes import random_tensors, small_config, write_checkpoint


def test_the_same_files_elsewhere_have_the_same_sample(tmp_path: Path) -> None:
    content = small_config()
    folder = tmp_path / "a"
    folder.mkdir()
    write_checkpoint(folder, content, random_tensors(content))
    elsewhere = Path(shutil.copytree(folder, tmp_path / "b"))
    assert Checkpoint(elsewhere).sample() == Checkpoint(folder).sample()


@pytest.mark.parametrize("part", ["self_attn", "experts", "lm_head"])
def test_weights_trained_on_have_another(tmp_path: Path, part: str) -> None:
    content = small_config()
    tensors = random_tensors(content)
    before = Checkpoint(write_checkpoint(tmp_path, content, tensors)).sample()
    trained = {
        name: tensor + 1e-3 * torch.randn_like(tensor) if part in name else tensor
        for name, tensor in tensors.items()
    }
    after = Checkpoint(write_checkpoint(tmp_path, content, trained)).sample()
    assert after != before


def test_files_of_any_size_have_one(tmp_path: Path) -> None:
    file, samples = tmp_path / "model.safetensors", set()
    for num_bytes in (0, 1, 4096, 4097, 10**6):
        file.write_bytes(bytes(num_bytes))
        samples.add(sampled(LocalFolder(tmp_path), [file.name]))
    assert len(samples) == 5


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        sampled(LocalFolder(tmp_path), ["model.safetensors"])


def test_head_and_worker_of_other_weights_refuse_each_other() -> None:
    config = MixtralConfig.from_dict(small_config())
    head = rpc.Identity("head", rpc.fingerprint(config, None, "a"))
    worker = rpc.Identity("worker", rpc.fingerprint(config, None, "b"))
    refusal = head.mismatch(worker.hello())
    assert refusal is not None
    assert "weights differ" in refusal


def test_a_quantised_copy_is_sampled_with_all_that_it_holds(tmp_path: Path) -> None:
    content = small_config()
    source = Checkpoint(write_checkpoint(tmp_path, content, random_tensors(content)))
    copy = tmp_path / "copy"
    save_quantized(source, copy, "int8", attention_mode="int8")
    before = Checkpoint(copy).sample()
    for name in ("experts-000-003.safetensors", "attention-000.safetensors"):
        file = copy / name
        sound = file.read_bytes()
        file.write_bytes(sound[:-1] + bytes([sound[-1] ^ 1]))
        assert Checkpoint(copy).sample() != before
        file.write_bytes(sound)
    assert Checkpoint(copy).sample() == before

"""Every layout of a checkpoint gives the same bits, and damage to any of them is refused."""

import json
import shutil
import zipfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from model.config import MixtralConfig
from model.decoder import Decoder
from model.errors import CheckpointError, ConfigError
from model.generation_defaults import GenerationDefaults
from model.layouts import Layout
from model.progress import Progress
from model.tensor_files import SafetensorsFile
from model.units import Unit
from model.weights import Checkpoint
from tests.fakes import (
    fused,
    mistrals,
    params,
    random_tensors,
    small_config,
    write_checkpoint,
    write_release,
)

# head_dim is not hidden / heads, and no two sizes are the same: a wrong axis cannot pass
CONFIG = small_config(num_hidden_layers=2, head_dim=6, torch_dtype="bfloat16")


@pytest.fixture(scope="module")
def tensors() -> dict[str, Tensor]:
    return {name: tensor.bfloat16() for name, tensor in random_tensors(CONFIG).items()}


def per_expert(folder: Path, tensors: dict[str, Tensor]) -> Path:
    return write_checkpoint(folder, CONFIG, tensors)


def per_expert_shards(folder: Path, tensors: dict[str, Tensor]) -> Path:
    return write_checkpoint(folder, CONFIG, tensors, num_shards=3)


def fused_file(folder: Path, tensors: dict[str, Tensor]) -> Path:
    return write_checkpoint(folder, CONFIG, fused(CONFIG, tensors))


def fused_shards(folder: Path, tensors: dict[str, Tensor]) -> Path:
    return write_checkpoint(folder, CONFIG, fused(CONFIG, tensors), num_shards=3)


def mistrals_file(folder: Path, tensors: dict[str, Tensor]) -> Path:
    renamed = mistrals(CONFIG, tensors, stacked=False)
    return write_release(folder, CONFIG, renamed, files=["consolidated.safetensors"])


def mistrals_shards(folder: Path, tensors: dict[str, Tensor]) -> Path:
    files = [f"consolidated-{i:05}-of-00002.safetensors" for i in (1, 2)]
    return write_release(folder, CONFIG, mistrals(CONFIG, tensors, stacked=False), files=files)


def mistrals_pickles(folder: Path, tensors: dict[str, Tensor]) -> Path:
    files = [f"consolidated.{i:02}.pt" for i in range(3)]
    return write_release(folder, CONFIG, mistrals(CONFIG, tensors, stacked=True), files=files)


def stacked_safetensors(folder: Path, tensors: dict[str, Tensor]) -> Path:
    renamed = mistrals(CONFIG, tensors, stacked=True)
    return write_release(folder, CONFIG, renamed, files=["consolidated.safetensors"])


Writer = Callable[[Path, dict[str, Tensor]], Path]

WRITERS: dict[Writer, Layout] = {
    per_expert: Layout.PER_EXPERT,
    per_expert_shards: Layout.PER_EXPERT,
    fused_file: Layout.FUSED,
    fused_shards: Layout.FUSED,
    mistrals_file: Layout.MISTRAL,
    mistrals_shards: Layout.MISTRAL,
    mistrals_pickles: Layout.MISTRAL_STACKED,
    stacked_safetensors: Layout.MISTRAL_STACKED,
}

every_layout = pytest.mark.parametrize("write", WRITERS, ids=lambda write: write.__name__)


def all_weights(checkpoint: Checkpoint) -> Iterator[tuple[str, Tensor]]:
    """Everything that a head and its workers would load, by name."""
    decoder = checkpoint.load_decoder()
    yield "embedding", decoder.embedding_VD
    yield "final norm", decoder.final_norm_D
    yield "head", decoder.lm_head_VD
    for number, layer in enumerate(decoder.layers):
        for name in ("attention_norm_D", "wqkv", "wo", "experts_norm_D", "gate_ED"):
            yield f"layer {number} {name}", getattr(layer, name)
        for expert_id in range(4):
            weights = checkpoint.load_unit(Unit(number, expert_id))
            yield f"layer {number} expert {expert_id} w13", weights.w13_2FD
            yield f"layer {number} expert {expert_id} w2", weights.w2_DF


# --- layouts ---


@every_layout
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_layout_gives_the_same_bits(
    tmp_path: Path, tensors: dict[str, Tensor], write: Writer, dtype: torch.dtype
) -> None:
    checkpoint = Checkpoint(write(tmp_path, tensors), dtype=dtype)
    assert checkpoint.layout is WRITERS[write]
    loaded = dict(all_weights(checkpoint))
    assert loaded["embedding"].equal(tensors["model.embed_tokens.weight"].to(dtype))
    for layer in range(2):
        attention = f"model.layers.{layer}.self_attn"
        qkv = torch.cat([tensors[f"{attention}.{name}_proj.weight"] for name in "qkv"])
        assert loaded[f"layer {layer} wqkv"].equal(qkv.to(dtype))
        for expert_id in range(4):
            expert = f"model.layers.{layer}.block_sparse_moe.experts.{expert_id}"
            w13 = torch.cat([tensors[f"{expert}.{name}.weight"] for name in ("w1", "w3")])
            name = f"layer {layer} expert {expert_id}"
            assert loaded[f"{name} w13"].equal(w13.to(dtype)), name
            assert loaded[f"{name} w2"].equal(tensors[f"{expert}.w2.weight"].to(dtype)), name
    (tmp_path / "plain").mkdir()
    plain = Checkpoint(write_checkpoint(tmp_path / "plain", CONFIG, tensors), dtype=dtype)
    for name, expected in all_weights(plain):
        assert loaded[name].equal(expected), name


@every_layout
def test_logits_of_every_layout_equal_the_oracles(
    tmp_path: Path, tensors: dict[str, Tensor], write: Writer
) -> None:
    from model.experts import LocalExperts
    from model.generate import Mixtral
    from tests.oracle import Oracle

    checkpoint = Checkpoint(write(tmp_path, tensors), dtype=torch.float32)
    experts = checkpoint.load_experts(checkpoint.config.expert_units)
    decoder = Decoder(checkpoint.config, checkpoint.load_decoder())
    # the tokenizer and the chat format have no part in logits
    mixtral = Mixtral(decoder, LocalExperts(experts), None, None)  # type: ignore[arg-type]
    ids = [1, 7, 3, 3, 22, 0, 15]
    # another order of float32 sums: the differences seen are below 2e-6
    torch.testing.assert_close(
        mixtral.logits(ids), Oracle(CONFIG, tensors).logits(ids), atol=2e-5, rtol=0
    )


@pytest.mark.parametrize("original_format", [True, False])
def test_what_transformers_saves_is_read_in_both_its_formats(
    tmp_path: Path, original_format: bool
) -> None:
    from transformers import MixtralConfig as TheirConfig
    from transformers import MixtralForCausalLM

    fields = {k: v for k, v in CONFIG.items() if k not in ("model_type", "torch_dtype")}
    model = MixtralForCausalLM(TheirConfig(**fields))
    model.save_pretrained(tmp_path, save_original_format=original_format)
    checkpoint = Checkpoint(tmp_path)
    assert checkpoint.layout is (Layout.PER_EXPERT if original_format else Layout.FUSED)
    theirs = model.state_dict()
    for layer in range(2):
        for expert_id in range(4):
            ours = checkpoint.load_unit(Unit(layer, expert_id))
            name = f"model.layers.{layer}.mlp.experts"
            assert ours.w13_2FD.equal(theirs[f"{name}.gate_up_proj"][expert_id])
            assert ours.w2_DF.equal(theirs[f"{name}.down_proj"][expert_id])
    assert checkpoint.load_decoder().lm_head_VD.equal(theirs["lm_head.weight"])


def test_hugging_faces_files_go_before_mistrals(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    mistrals_pickles(tmp_path, tensors)
    per_expert(tmp_path, tensors)
    assert Checkpoint(tmp_path).layout is Layout.PER_EXPERT


def test_safetensors_go_before_pickles(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    mistrals_pickles(tmp_path, tensors)
    mistrals_shards(tmp_path, tensors)
    assert Checkpoint(tmp_path).layout is Layout.MISTRAL


def test_a_worker_reads_its_own_expert_of_a_fused_tensor_alone(
    tmp_path: Path, tensors: dict[str, Tensor]
) -> None:
    stored = fused(CONFIG, tensors)
    for name in ("gate_up_proj", "down_proj"):
        stored[f"model.layers.1.mlp.experts.{name}"][2] = torch.nan  # read, it would be refused
    checkpoint = Checkpoint(write_checkpoint(tmp_path, CONFIG, stored))
    checkpoint.load_experts([Unit(1, 1), Unit(1, 3)])
    with pytest.raises(CheckpointError, match="gate_up_proj holds values that are not finite"):
        checkpoint.load_unit(Unit(1, 2))


@every_layout
def test_bytes_to_load_are_known_before(
    tmp_path: Path, tensors: dict[str, Tensor], write: Writer
) -> None:
    checkpoint = Checkpoint(write(tmp_path, tensors), dtype=torch.float32)
    arrived: list[int] = []
    checkpoint.load_decoder(arrived.append)
    assert sum(arrived) == checkpoint.decoder_bytes
    arrived.clear()
    checkpoint.load_unit(Unit(0, 0), arrived.append)
    assert sum(arrived) == checkpoint.expert_bytes


# --- surplus tensors ---


@every_layout
def test_a_surplus_tensor_is_refused_by_file_and_name(
    tmp_path: Path, tensors: dict[str, Tensor], write: Writer
) -> None:
    write(tmp_path, tensors | {"model.layers.0.self_attn.q_proj.bias": torch.zeros(24)})
    with pytest.raises(CheckpointError, match=r"(model|consolidated).*: .*\.bias"):
        Checkpoint(tmp_path)


def test_more_layers_or_experts_than_configured_are_refused(
    tmp_path: Path, tensors: dict[str, Tensor]
) -> None:
    per_expert(tmp_path, tensors)
    for field, named in (("num_hidden_layers", r"layers\.1\."), ("num_local_experts", "experts")):
        fewer = CONFIG | {field: CONFIG[field] - 1}
        (tmp_path / "config.json").write_text(json.dumps(fewer))
        with pytest.raises(CheckpointError, match=named):
            Checkpoint(tmp_path)


def test_a_shard_with_a_tensor_that_the_index_hides_is_refused(
    tmp_path: Path, tensors: dict[str, Tensor]
) -> None:
    per_expert_shards(tmp_path, tensors)
    shard = tmp_path / "model-00002-of-00003.safetensors"
    save_file(load_file(shard) | {"model.extra": torch.zeros(1)}, shard)
    with pytest.raises(CheckpointError, match=rf"{shard.name}: model\.extra"):
        Checkpoint(tmp_path).load_decoder()


def test_harmless_surplus_is_left_alone(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    inv_freq = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(3)}
    per_expert(tmp_path, tensors | inv_freq)
    assert Checkpoint(tmp_path).load_unit(Unit(0, 0))


def test_a_copy_of_tied_embeddings_is_left_alone(
    tmp_path: Path, tensors: dict[str, Tensor]
) -> None:
    write_checkpoint(tmp_path, CONFIG | {"tie_word_embeddings": True}, tensors)
    decoder = Checkpoint(tmp_path).load_decoder()
    assert decoder.lm_head_VD is decoder.embedding_VD


# --- params.json ---


def test_params_mean_what_config_json_means() -> None:
    from_params = MixtralConfig.from_params(params(CONFIG))
    assert from_params == MixtralConfig.from_dict(CONFIG)


def test_params_leave_out_what_mixtral_8x7bs_left_out() -> None:
    given = params(CONFIG)
    del given["rope_theta"], given["max_seq_len"]
    config = MixtralConfig.from_params(given)
    assert (config.rope_theta, config.max_position_embeddings) == (1e6, 32_768)
    assert (config.sliding_window, config.eos_token_ids) == (None, (2,))


def test_a_window_written_as_text_is_read() -> None:
    assert MixtralConfig.from_params(params(CONFIG) | {"sliding_window": "8"}).sliding_window == 8


def test_end_tokens_of_the_generation_config_go_before_a_releases(tmp_path: Path) -> None:
    (tmp_path / "params.json").write_text(json.dumps(params(CONFIG)))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 5]}))
    assert MixtralConfig.from_folder(tmp_path).eos_token_ids == (2, 5)


@pytest.mark.parametrize("missing", sorted(params(CONFIG).keys() - {"rope_theta", "max_seq_len"}))
def test_a_missing_param_is_named(missing: str) -> None:
    given = params(CONFIG)
    del given[missing]
    with pytest.raises(ConfigError, match=rf"params\.json: {missing} is"):
        MixtralConfig.from_params(given)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"moe": {"num_experts": 4, "num_experts_per_tok": 2, "num_shared_experts": 1}}, "shared"),
        ({"moe": {"num_experts": 4}}, "num_experts_per_tok"),
        ({"moe": 8}, "moe"),
        ({"yarn": {"factor": 4}}, "yarn"),
        ({"quantization": {"qformat_weight": "fp8_e4m3"}}, "quantization"),
        ({"sliding_window": "wide"}, "sliding_window"),
        ({"dim": "16"}, "hidden_size"),
        ({"rope_theta": -1.0}, "rope_theta"),
        ({"tied_embeddings": 1}, "tie_word_embeddings"),
    ],
)
def test_params_that_cannot_be_served_are_refused_by_name(
    changes: dict[str, Any], named: str
) -> None:
    with pytest.raises(ConfigError, match=named):
        MixtralConfig.from_params(params(CONFIG) | changes)


# --- generation_config.json ---


def test_generation_defaults_are_the_files(tmp_path: Path) -> None:
    assert GenerationDefaults.from_folder(tmp_path) == GenerationDefaults()
    file = tmp_path / "generation_config.json"
    file.write_text('{"temperature": 0.7, "top_p": 0.95, "top_k": 40, "max_new_tokens": 9}')
    expected = GenerationDefaults(temperature=0.7, top_p=0.95, top_k=40, max_tokens=9)
    assert GenerationDefaults.from_folder(tmp_path) == expected
    file.write_text('{"do_sample": false, "temperature": 0.7}')
    assert GenerationDefaults.from_folder(tmp_path) == GenerationDefaults(temperature=0.0)


@pytest.mark.parametrize(
    ("field", "value"),
    [("temperature", -1), ("temperature", True), ("top_p", 1.5), ("top_p", "0.9"), ("top_k", 1.5)],
)
def test_a_generation_default_out_of_range_is_named(tmp_path: Path, field: str, value: Any) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({field: value}))
    with pytest.raises(ConfigError, match=rf"generation_config\.json: {field}"):
        GenerationDefaults.from_folder(tmp_path)


# --- damage ---


class Payload:
    """What a hostile pickle would do: name a function and its arguments."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.target,))


def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(
    tmp_path: Path, tensors: dict[str, Tensor]
) -> None:
    mistrals_pickles(tmp_path, tensors)
    target = tmp_path / "ran"
    torch.save({"norm.weight": Payload(target)}, tmp_path / "consolidated.00.pt")
    with pytest.raises(CheckpointError, match=r"consolidated\.00\.pt cannot be loaded"):
        Checkpoint(tmp_path)
    assert not target.exists()


@pytest.mark.parametrize(
    "content",
    [
        [torch.ones(2)],
        {"norm.weight": 1.0},
        {3: torch.ones(2)},
        {"norm.weight": torch.ones(4, 4).T},
        {"norm.weight": torch.eye(4).to_sparse()},
    ],
    ids=["list", "number", "number as name", "transposed", "sparse"],
)
def test_a_pickle_of_anything_but_plain_tensors_is_refused(tmp_path: Path, content: Any) -> None:
    (tmp_path / "params.json").write_text(json.dumps(params(CONFIG)))
    torch.save(content, tmp_path / "consolidated.00.pt")
    with pytest.raises(CheckpointError, match=r"consolidated\.00\.pt"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize(
    "header",
    [
        b"[]",
        b"{",
        b"\xff",
        b"[" * 50_000,
        b'{"a": 3}',
        b'{"a": {}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 8]}}',
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0]}}',
        b'{"a": {"dtype": "F32", "shape": [-2], "data_offsets": [8, 0]}}',
        b'{"a": {"dtype": "F32", "shape": [true], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F99", "shape": [2], "data_offsets": [0, 8]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}',
        b'{"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},'
        b' "b": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},'
        b' "a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}',
    ],
)
def test_an_unsound_header_is_refused(tmp_path: Path, header: bytes) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(CheckpointError, match=r"x\.safetensors is not a sound"):
        SafetensorsFile(file)


@pytest.mark.parametrize("length", [2**64 - 1, 2**40, 100_000_001])
def test_a_header_longer_than_the_file_is_never_allocated(tmp_path: Path, length: int) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes(length.to_bytes(8, "little") + bytes(16))
    with pytest.raises(CheckpointError, match=str(length)):
        SafetensorsFile(file)


def test_a_file_that_is_cut_after_it_was_opened_is_refused(
    tmp_path: Path, tensors: dict[str, Tensor]
) -> None:
    checkpoint = Checkpoint(per_expert(tmp_path, tensors))
    checkpoint.load_unit(Unit(0, 0))
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: the file ends within"):
        checkpoint.load_decoder()
        list(all_weights(checkpoint))


@pytest.fixture(scope="module")
def sound_pickle(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes, list[int]]:
    """A release in one `.pt` file, its bytes, and which of them are not a tensor's values."""
    folder = tmp_path_factory.mktemp("pickle")
    small = small_config()
    stored = mistrals(small, random_tensors(small), stacked=True)
    write_release(folder, small, stored, files=["consolidated.00.pt"])
    file = folder / "consolidated.00.pt"
    content = file.read_bytes()
    is_value = bytearray(len(content))
    with zipfile.ZipFile(file) as archive:
        for entry in archive.infolist():
            if "/data/" in entry.filename:
                begin = content.index(archive.read(entry))
                is_value[begin : begin + entry.file_size] = b"\1" * entry.file_size
    return folder, content, [i for i, flag in enumerate(is_value) if not flag]


def load_small(folder: Path) -> list[Tensor]:
    checkpoint = Checkpoint(folder)
    decoder = checkpoint.load_decoder()
    layer = decoder.layers[0]
    experts = checkpoint.load_experts(Unit(0, expert_id) for expert_id in range(4)).values()
    outer = [decoder.embedding_VD, decoder.final_norm_D, decoder.lm_head_VD]
    inner = [layer.attention_norm_D, layer.wqkv, layer.wo, layer.experts_norm_D, layer.gate_ED]
    return outer + inner + [t for expert in experts for t in (expert.w13_2FD, expert.w2_DF)]


@given(flips=st.lists(st.tuples(st.integers(0), st.integers(1, 255)), min_size=1, max_size=3))
def test_flipped_bytes_of_a_pickle_are_refused_or_change_nothing(
    sound_pickle: tuple[Path, bytes, list[int]], flips: list[tuple[int, int]]
) -> None:
    folder, content, header_bytes = sound_pickle
    (folder / "consolidated.00.pt").write_bytes(content)
    sound = load_small(folder)
    damaged = bytearray(content)
    for number, bits in flips:
        damaged[header_bytes[number % len(header_bytes)]] ^= bits
    (folder / "consolidated.00.pt").write_bytes(damaged)
    with suppress(CheckpointError):
        assert all(map(torch.equal, load_small(folder), sound))


def test_values_that_begin_further_on_than_they_were_written_are_refused(
    sound_pickle: tuple[Path, bytes, list[int]],
) -> None:
    folder, content, _ = sound_pickle
    file = folder / "consolidated.00.pt"
    file.write_bytes(content)
    with zipfile.ZipFile(file) as archive:
        entry = next(e for e in archive.infolist() if e.filename.endswith("/data/0"))
    damaged = bytearray(content)
    damaged[entry.header_offset + 28] ^= 4  # the length of its padding
    file.write_bytes(damaged)
    with pytest.raises(CheckpointError, match="data/0 does not lie where"):
        Checkpoint(folder)


@pytest.mark.parametrize("kept", [0, 4, 100, 0.5, 0.99, -1])
def test_a_cut_pickle_is_refused_by_name(
    tmp_path: Path, sound_pickle: tuple[Path, bytes, list[int]], kept: float
) -> None:
    folder, content, _ = sound_pickle
    shutil.copy(folder / "params.json", tmp_path)
    length = int(kept * len(content)) if isinstance(kept, float) else kept
    (tmp_path / "consolidated.00.pt").write_bytes(content[:length])
    with pytest.raises(CheckpointError, match=r"consolidated\.00\.pt"):
        load_small(tmp_path)


# --- progress ---


def test_progress_tells_bytes_rate_and_time_left() -> None:
    progress = Progress(total_bytes=6_000_000_000)
    assert (progress.bytes_per_s, progress.left_s, str(progress)) == (0, None, "0.0 of 6.0 GB")
    progress = progress.after(1_000_000_000, elapsed_s=2.5).after(500_000_000, elapsed_s=3.0)
    assert (progress.bytes_per_s, progress.left_s) == (500_000_000, 9.0)
    assert str(progress) == "1.5 of 6.0 GB, 500 MB/s, 9 s left"
    assert progress.after(9_000_000_000, elapsed_s=4.0).left_s == 0

"""A checkpoint is read exactly as it lies there, or refused by file, field and tensor."""

import json
import struct
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from model.config import MixtralConfig
from model.errors import CheckpointError, ConfigError
from model.units import Unit
from model.weights import Checkpoint
from tests.fakes import random_tensors, small_config, write_checkpoint

CONFIG = small_config()
CLASSIFIES: dict[str, Any] = {"architectures": ["MixtralForSequenceClassification"]}
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
W2 = "model.layers.0.block_sparse_moe.experts.3.w2.weight"


@pytest.fixture
def tensors() -> dict[str, Tensor]:
    return random_tensors(CONFIG)


# --- config.json ---


def test_old_and_new_spelling_mean_the_same() -> None:
    old = small_config(rope_theta=5e5, torch_dtype="float16", head_dim=4)
    new = {key: value for key, value in old.items() if key not in ("rope_theta", "torch_dtype")}
    new |= {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}, "dtype": "float16"}
    assert MixtralConfig.from_dict(new) == MixtralConfig.from_dict(old)
    assert (MixtralConfig.from_dict(new).rope_theta, MixtralConfig.from_dict(new).dtype) == (
        5e5,
        "float16",
    )


def test_what_a_file_leaves_out_is_mixtral_8x7bs() -> None:
    from transformers import MixtralConfig as Reference

    ours, theirs = MixtralConfig.from_dict({"model_type": "mixtral"}), Reference()
    shared = {field.name for field in fields(ours)} - {"head_dim", "rope_theta", "dtype"}
    for name in shared - {"eos_token_ids", "labels"}:
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.head_dim == theirs.hidden_size // theirs.num_attention_heads
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
    assert ours.eos_token_ids == (theirs.eos_token_id,)
    assert ours.labels is None
    classifier = MixtralConfig.from_dict({"model_type": "mixtral"} | CLASSIFIES)
    assert classifier.labels == tuple(theirs.id2label.values())


def test_heads_share_the_hidden_size_unless_told_otherwise() -> None:
    assert MixtralConfig.from_dict(small_config()).head_dim == 4
    assert MixtralConfig.from_dict(small_config(head_dim=None)).head_dim == 4
    assert MixtralConfig.from_dict(small_config(head_dim=6)).head_dim == 6


def test_key_value_heads_of_null_are_as_many_as_query_heads() -> None:
    assert MixtralConfig.from_dict(small_config(num_key_value_heads=None)).num_key_value_heads == 4
    left_out = small_config(num_attention_heads=8)
    del left_out["num_key_value_heads"]
    assert MixtralConfig.from_dict(left_out).num_key_value_heads == 8


def test_experts_may_be_counted_under_their_newer_name() -> None:
    newer = small_config(num_experts=4)
    del newer["num_local_experts"]
    assert MixtralConfig.from_dict(newer) == MixtralConfig.from_dict(small_config())


@pytest.mark.parametrize("window", [None, 8])
def test_a_sliding_window_is_null_or_a_number(window: int | None) -> None:
    assert MixtralConfig.from_dict(small_config(sliding_window=window)).sliding_window == window


@pytest.mark.parametrize(
    ("name", "value"),
    [("num_experts", 8), ("dtype", "bfloat16"), ("rope_parameters", {"rope_theta": 1e6})],
)
def test_two_spellings_that_differ_are_refused(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=name):
        MixtralConfig.from_dict(small_config(**{name: value}))


def test_what_transformers_writes_is_read_as_it_was_meant(tmp_path: Path) -> None:
    from transformers import MixtralConfig as Reference

    theirs = Reference(
        vocab_size=24,
        hidden_size=16,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=5,
        pad_token_id=3,
        router_aux_loss_coef=0.02,
        id2label={0: "bad", 1: "so-so", 2: "good"},
        problem_type="single_label_classification",
        architectures=["MixtralForSequenceClassification"],
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 5e4},
    )
    theirs.save_pretrained(tmp_path)
    ours = MixtralConfig.from_folder(tmp_path)
    assert (ours.num_key_value_heads, ours.head_dim) == (2, 4)
    assert (ours.sliding_window, ours.tie_word_embeddings, ours.rope_theta) == (5, True, 5e4)
    assert (ours.pad_token_id, ours.router_aux_loss_coef) == (3, 0.02)
    assert ours.labels == ("bad", "so-so", "good")
    assert ours.problem_type == "single_label_classification"


def test_only_a_classifier_has_labels() -> None:
    named = small_config(id2label={"1": "good", "0": "bad"}, num_labels=7)
    assert MixtralConfig.from_dict(named).labels is None
    assert MixtralConfig.from_dict(named | CLASSIFIES).labels == ("bad", "good")
    counted = small_config(num_labels=3, **CLASSIFIES)
    assert MixtralConfig.from_dict(counted).labels == ("LABEL_0", "LABEL_1", "LABEL_2")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("id2label", {}),
        ("id2label", {"1": "bad", "2": "good"}),
        ("id2label", ["bad", "good"]),
        ("num_labels", 0),
        ("num_labels", 2.0),
        ("num_labels", "two"),
        ("num_labels", 10**12),
        ("problem_type", "ranking"),
    ],
)
def test_labels_that_make_no_sense_are_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=field):
        MixtralConfig.from_dict(small_config(**{field: value}, **CLASSIFIES))


def test_unknown_keys_and_nulls_change_nothing() -> None:
    plain = MixtralConfig.from_dict(small_config())
    noisy = small_config(router_jitter_noise=0.1, eos_token_id=None, rope_scaling=None)
    assert MixtralConfig.from_dict(noisy) == plain


@pytest.mark.parametrize(("eos", "expected"), [(5, (5,)), ([5, 7], (5, 7))])
def test_end_tokens_of_the_generation_config_go_first(
    tmp_path: Path, eos: Any, expected: tuple[int, ...]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(small_config(eos_token_id=3)))
    assert MixtralConfig.from_folder(tmp_path).eos_token_ids == (3,)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    assert MixtralConfig.from_folder(tmp_path).eos_token_ids == expected


def test_sizes_add_up_to_mixtral_8x7bs() -> None:
    config = MixtralConfig()
    assert config.num_expert_parameters == 3 * 4_096 * 14_336
    assert config.kv_bytes_per_token(2) == 128 * 1_024


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b'"mixtral"', b"\xff\xfe{}"])
def test_a_file_that_is_no_json_object_is_refused_by_name(
    tmp_path: Path, name: str, content: bytes
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(small_config()))
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=name.replace(".", r"\.")):
        MixtralConfig.from_folder(tmp_path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json does not exist"):
        MixtralConfig.from_folder(tmp_path)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_type": "mistral"}, "model_type is 'mistral'"),
        ({"model_type": None}, "model_type"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope type 'linear'"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope type 'yarn'"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"rope_scaling": {"rope_type": "llama3"}}, "rope_scaling"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ({"num_local_experts": 10**9}, "num_local_experts"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"num_experts_per_tok": 5}, "num_experts_per_tok"),
        ({"num_experts_per_tok": 0}, "num_experts_per_tok"),
        ({"head_dim": 5}, "head_dim"),
        ({"torch_dtype": "int8"}, "dtype 'int8'"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config"),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        MixtralConfig.from_dict(small_config(**changes))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_size", "wide"),
        ("hidden_size", 0),
        ("vocab_size", 1.5),
        ("num_hidden_layers", -1),
        ("num_attention_heads", 0),
        ("num_key_value_heads", 0),
        ("num_local_experts", "8"),
        ("sliding_window", 0),
        ("rope_theta", "large"),
        ("rms_norm_eps", -1e-5),
        ("rope_scaling", ["linear"]),
        ("tie_word_embeddings", "no"),
        ("bos_token_id", "<s>"),
        ("eos_token_id", [2, None]),
        ("eos_token_id", -1),
        ("eos_token_id", []),
        ("pad_token_id", "<pad>"),
        ("pad_token_id", -2),
        ("pad_token_id", True),
        ("router_aux_loss_coef", "much"),
        ("router_aux_loss_coef", -1),
        ("router_aux_loss_coef", True),
        ("router_aux_loss_coef", float("inf")),
    ],
)
def test_a_value_of_the_wrong_kind_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=field):
        MixtralConfig.from_dict(small_config(**{field: value}))


# --- weights that are read ---


def load_all(folder: Path, **options: Any) -> None:
    """Everything that a head and its workers would load."""
    checkpoint = Checkpoint(folder, **options)
    checkpoint.load_decoder()
    checkpoint.load_experts(Unit(0, expert_id) for expert_id in range(4))


@pytest.mark.parametrize("num_shards", [1, 3])
def test_weights_are_those_of_the_files(
    tmp_path: Path, tensors: dict[str, Tensor], num_shards: int
) -> None:
    checkpoint = Checkpoint(write_checkpoint(tmp_path, CONFIG, tensors, num_shards=num_shards))
    decoder = checkpoint.load_decoder()
    layer = decoder.layers[0]
    prefix = "model.layers.0"
    q, k, v = layer.wqkv.split(layer.qkv_sizes)
    for name, actual in {
        "model.embed_tokens": decoder.embedding_VD,
        "model.norm": decoder.final_norm_D,
        "lm_head": decoder.lm_head_VD,
        f"{prefix}.input_layernorm": layer.attention_norm_D,
        f"{prefix}.post_attention_layernorm": layer.experts_norm_D,
        f"{prefix}.self_attn.q_proj": q,
        f"{prefix}.self_attn.k_proj": k,
        f"{prefix}.self_attn.v_proj": v,
        f"{prefix}.self_attn.o_proj": layer.wo,
        f"{prefix}.block_sparse_moe.gate": layer.gate_ED,
    }.items():
        assert actual.equal(tensors[f"{name}.weight"]), name
    for expert_id in range(4):
        expert = f"{prefix}.block_sparse_moe.experts.{expert_id}"
        weights = checkpoint.load_unit(Unit(0, expert_id))
        w1, w3 = weights.w13_2FD.chunk(2)
        assert w1.equal(tensors[f"{expert}.w1.weight"])
        assert w3.equal(tensors[f"{expert}.w3.weight"])
        assert weights.w2_DF.equal(tensors[f"{expert}.w2.weight"])


def test_tied_embeddings_need_no_head(tmp_path: Path) -> None:
    config = small_config(tie_word_embeddings=True)
    folder = write_checkpoint(tmp_path, config, random_tensors(config))
    decoder = Checkpoint(folder).load_decoder()
    assert decoder.lm_head_VD is decoder.embedding_VD


@pytest.mark.parametrize("tied", [False, True])
def test_a_classifiers_head_is_its_score_head(
    tmp_path: Path, tensors: dict[str, Tensor], tied: bool
) -> None:
    config = small_config(num_labels=3, tie_word_embeddings=tied, **CLASSIFIES)
    del tensors["lm_head.weight"]
    tensors["score.weight"] = torch.randn(3, 16)
    checkpoint = Checkpoint(write_checkpoint(tmp_path, config, tensors))
    assert checkpoint.load_decoder().lm_head_VD.equal(tensors["score.weight"])


def test_the_head_must_be_the_one_that_the_architecture_has(
    tmp_path: Path, tensors: dict[str, Tensor]
) -> None:
    """Both in one file, none at all, and a classifier's weights under a generator's name."""
    classifier = small_config(**CLASSIFIES)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight is a tensor that"):
        Checkpoint(write_checkpoint(tmp_path, classifier, tensors)).load_decoder()
    del tensors["lm_head.weight"]
    with pytest.raises(CheckpointError, match=r"no tensor score\.weight"):
        Checkpoint(write_checkpoint(tmp_path, classifier, tensors)).load_decoder()
    tensors["score.weight"] = torch.randn(2, 16)
    with pytest.raises(CheckpointError, match=r"score\.weight .* MixtralForSequenceClass"):
        Checkpoint(write_checkpoint(tmp_path, CONFIG, tensors)).load_decoder()


def test_a_worker_loads_its_experts_from_their_files_alone(
    tmp_path: Path, tensors: dict[str, Tensor]
) -> None:
    experts = {name: tensor for name, tensor in tensors.items() if ".experts.2." in name}
    checkpoint = Checkpoint(write_checkpoint(tmp_path, CONFIG, experts))
    assert list(checkpoint.load_experts([Unit(0, 2)])) == [Unit(0, 2)]
    with pytest.raises(CheckpointError):
        checkpoint.load_decoder()


def test_a_head_loads_without_any_expert(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    others = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    checkpoint = Checkpoint(write_checkpoint(tmp_path, CONFIG, others))
    assert checkpoint.load_decoder().embedding_VD.equal(tensors["model.embed_tokens.weight"])
    with pytest.raises(CheckpointError, match=r"experts\.0\.w1\.weight"):
        checkpoint.load_unit(Unit(0, 0))


def test_files_that_are_not_asked_for_may_be_missing(
    tmp_path: Path, tensors: dict[str, Tensor]
) -> None:
    write_checkpoint(tmp_path, CONFIG, tensors, num_shards=3)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    for name in tensors:
        if ".experts.1." in name:
            index["weight_map"][name] = "elsewhere.safetensors"
    save_file(
        {n: t for n, t in tensors.items() if ".experts.1." in n}, tmp_path / "elsewhere.safetensors"
    )
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    for shard in tmp_path.glob("model-*.safetensors"):
        shard.unlink()
    assert Checkpoint(tmp_path).load_experts([Unit(0, 1)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_come_in_the_dtype_asked_for_and_their_bytes_are_counted(
    tmp_path: Path, tensors: dict[str, Tensor], dtype: torch.dtype
) -> None:
    arrived: list[int] = []
    checkpoint = Checkpoint(write_checkpoint(tmp_path, CONFIG, tensors), dtype=dtype)
    weights = checkpoint.load_unit(Unit(0, 0), arrived.append)
    assert weights.w13_2FD.dtype == weights.w2_DF.dtype == dtype
    assert sum(arrived) == weights.num_bytes == checkpoint.expert_bytes


def test_weights_outlive_their_file(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    folder = write_checkpoint(tmp_path, CONFIG, tensors)
    weights = Checkpoint(folder).load_unit(Unit(0, 3))
    with (folder / "model.safetensors").open("r+b") as file:
        file.write(bytes((folder / "model.safetensors").stat().st_size))
    assert weights.w2_DF.equal(tensors[W2])


# --- weights that are refused ---


def spoilt(tensor: Tensor, *, value: float) -> Tensor:
    tensor = tensor.clone()
    tensor.view(-1)[-1] = value
    return tensor


@pytest.mark.parametrize("num_shards", [1, 3])
@pytest.mark.parametrize("name", [Q_PROJ, W2, "lm_head.weight", "model.norm.weight"])
@pytest.mark.parametrize("damage", ["missing", "transposed", "longer", "nan", "inf", "integer"])
def test_a_damaged_tensor_is_refused_by_name(
    tmp_path: Path, tensors: dict[str, Tensor], name: str, damage: str, num_shards: int
) -> None:
    tensor = tensors.pop(name)
    match damage:
        case "transposed":
            tensors[name] = tensor[None].transpose(0, -1).contiguous()
        case "longer":
            tensors[name] = torch.cat((tensor, tensor[:1]))
        case "nan":
            tensors[name] = spoilt(tensor, value=torch.nan)
        case "inf":
            tensors[name] = spoilt(tensor, value=-torch.inf)
        case "integer":
            tensors[name] = tensor.to(torch.int32)
    folder = write_checkpoint(tmp_path, CONFIG, tensors, num_shards=num_shards)
    with pytest.raises(CheckpointError, match=name) as refused:
        load_all(folder)
    if damage != "missing":
        assert ".safetensors: " in str(refused.value)


def test_a_value_too_large_for_the_dtype_is_refused(
    tmp_path: Path, tensors: dict[str, Tensor]
) -> None:
    tensors[W2] = spoilt(tensors[W2], value=1e6)
    folder = write_checkpoint(tmp_path, CONFIG, tensors)
    load_all(folder, dtype=torch.bfloat16)
    with pytest.raises(CheckpointError, match=W2):
        load_all(folder, dtype=torch.float16)


@pytest.mark.parametrize("field", ["hidden_size", "intermediate_size", "vocab_size"])
def test_a_size_beyond_all_memory_is_refused_as_a_wrong_shape(
    tmp_path: Path, tensors: dict[str, Tensor], field: str
) -> None:
    write_checkpoint(tmp_path, CONFIG, tensors)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {field: 4 * 10**30}))
    with pytest.raises(CheckpointError, match="has shape"):
        load_all(tmp_path)


def test_an_8_bit_float_without_its_scale_is_refused(
    tmp_path: Path, tensors: dict[str, Tensor]
) -> None:
    tensors[W2] = tensors[W2].to(torch.float8_e4m3fn)
    with pytest.raises(CheckpointError, match=W2):
        load_all(write_checkpoint(tmp_path, CONFIG, tensors))


@pytest.mark.parametrize("num_shards", [1, 3])
@pytest.mark.parametrize("kept", [0, 4, 8, 100, -1])
def test_a_truncated_file_is_refused_by_name(
    tmp_path: Path, tensors: dict[str, Tensor], kept: int, num_shards: int
) -> None:
    folder = write_checkpoint(tmp_path, CONFIG, tensors, num_shards=num_shards)
    last = sorted(folder.glob("*.safetensors"))[-1]
    last.write_bytes(last.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=last.name):
        load_all(folder)


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(CheckpointError, match="holds no weights"):
        Checkpoint(tmp_path)


def test_a_missing_shard_is_refused_by_name(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    folder = write_checkpoint(tmp_path, CONFIG, tensors, num_shards=3)
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-00003\.safetensors does not exist"):
        load_all(folder)


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"lm_head.weight": 7}}']
)
def test_an_index_that_is_none_is_refused_by_name(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"index\.json is not an index"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("leads_to", ["../outside.safetensors", "sub/inside.safetensors", "..", ""])
def test_an_index_may_not_lead_out_of_the_folder(
    tmp_path: Path, tensors: dict[str, Tensor], leads_to: str
) -> None:
    folder = tmp_path / "checkpoint"
    (folder / "sub").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    for file in (tmp_path / "outside.safetensors", folder / "sub" / "inside.safetensors"):
        save_file(tensors, file)
    index = {"weight_map": dict.fromkeys(tensors, leads_to)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="plain file name"):
        Checkpoint(folder)


def test_an_absolute_path_in_an_index_is_refused(
    tmp_path: Path, tensors: dict[str, Tensor]
) -> None:
    folder = write_checkpoint(tmp_path, CONFIG, tensors, num_shards=2)
    index_file = folder / "model.safetensors.index.json"
    file = str(folder / "model-00001-of-00002.safetensors")
    index_file.write_text(json.dumps({"weight_map": dict.fromkeys(tensors, file)}))
    with pytest.raises(CheckpointError, match="plain file name"):
        Checkpoint(folder)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    """A folder whose weight file each example overwrites, and that file's sound bytes."""
    folder = write_checkpoint(tmp_path_factory.mktemp("sound"), CONFIG, random_tensors(CONFIG))
    return folder, (folder / "model.safetensors").read_bytes()


@given(flips=st.lists(st.tuples(st.integers(0), st.integers(1, 255)), min_size=1, max_size=3))
def test_flipped_header_bytes_are_refused_or_change_nothing(
    sound: tuple[Path, bytes], flips: list[tuple[int, int]]
) -> None:
    folder, content = sound
    header_size = 8 + struct.unpack("<Q", content[:8])[0]
    damaged = bytearray(content)
    for offset, bits in flips:
        damaged[offset % header_size] ^= bits
    (folder / "model.safetensors").write_bytes(damaged)
    with suppress(CheckpointError):
        load_all(folder)
        checkpoint = Checkpoint(folder)
        for name, tensor in random_tensors(CONFIG).items():
            assert checkpoint.load_tensor(name).equal(tensor), name

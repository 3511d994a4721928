"""Write a checkpoint with Mixtral-8x7B's layer shapes, any number of layers, and random weights.

For benchmarks of what the shapes decide: bytes read and operations. The tokenizer is Mixtral's own.
Standard deviations keep activations near 1, so that logits stay finite and tokens spread over the
experts. Tensors are drawn one by one from their names, so a run that was interrupted goes on with
the shards that are missing, and a folder that is finished is left as it is.

    python -m tests.bench.make_checkpoint [--layers 2] [--shape mixtral-8x7b|...] [--out FOLDER]
"""

import argparse
import json
import os
import shutil
import zlib
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from cluster.console import BytesLine
from model.config import MixtralConfig
from model.layouts import Layout, Source, sources

CACHE = Path.home() / ".cache" / "maestrale" / "bench"

SHAPES: dict[str, dict[str, int]] = {
    "mixtral-8x7b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    # attention and experts take about as long: `ping_pong`
    "balanced": {
        "hidden_size": 1024,
        "intermediate_size": 1024,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
    },
    # experts take most of a step: tests/cluster/load_step.py
    "experts": {
        "hidden_size": 512,
        "intermediate_size": 4096,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
    },
    # a quick pass through every engine, and through the tests
    "tiny": {
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
}

SHARD_BYTES = 1_000_000_000
"""A shard takes tensors until it has this many bytes; no more than one shard is in memory."""

DTYPE = torch.bfloat16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="mixtral-8x7b")
    parser.add_argument("--out", type=Path, help="folder to write; one in the cache if left out")
    arguments = parser.parse_args()
    folder = make_checkpoint(arguments.shape, arguments.layers, arguments.out)
    print(folder)


def make_checkpoint(shape: str, num_layers: int, folder: Path | None = None) -> Path:
    """Write what is missing of such a checkpoint; returns its folder, by default in the cache.

    Raises ValueError when the folder holds a checkpoint of another configuration.
    """
    folder = folder or CACHE / "checkpoints" / f"{shape}-{num_layers}-layers"
    content = config_content(shape, num_layers)
    config_file = folder / "config.json"
    if config_file.exists() and json.loads(config_file.read_text(encoding="utf-8")) != content:
        raise ValueError(f"{folder} holds another checkpoint; remove it or give another folder")
    table = sources(MixtralConfig.from_dict(content), Layout.PER_EXPERT)
    shards = shards_of(table)
    missing = {name: tensors for name, tensors in shards.items() if not (folder / name).exists()}
    index_file = folder / "model.safetensors.index.json"
    if not missing and index_file.exists():
        return folder
    num_bytes = sum(bytes_of(source) for names in missing.values() for source in names.values())
    free_bytes = shutil.disk_usage(first_existing(folder)).free
    if num_bytes * 1.05 > free_bytes:
        raise ValueError(f"{folder} needs {num_bytes:,} bytes, but {free_bytes:,} are free there")
    folder.mkdir(parents=True, exist_ok=True)
    write(config_file, json.dumps(content, indent=2))
    write_tokenizer(folder)
    if missing:
        line = BytesLine(f"writing {folder}", num_bytes)
        for name, tensors in missing.items():
            write_shard(folder / name, tensors, line)
    # last, so that nothing takes a half-written folder for a checkpoint
    weight_map = {tensor: name for name, tensors in shards.items() for tensor in tensors}
    total_bytes = sum(bytes_of(source) for source in table.values())
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    write(index_file, json.dumps(index, indent=2))
    return folder


def config_content(shape: str, num_layers: int) -> dict[str, Any]:
    """The content of `config.json`."""
    return SHAPES[shape] | {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "vocab_size": 32000,
        "num_hidden_layers": num_layers,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 32768,
        "rope_theta": 1e6,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "sliding_window": None,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "bfloat16",
    }


def shards_of(table: dict[str, Source]) -> dict[str, dict[str, Source]]:
    """Which file holds which tensors, by file name."""
    shards: list[dict[str, Source]] = []
    room = 0
    for name, source in table.items():
        if bytes_of(source) > room:
            shards.append({})
            room = SHARD_BYTES
        shards[-1][name] = source
        room -= bytes_of(source)
    return {
        f"model-{index:05}-of-{len(shards):05}.safetensors": tensors
        for index, tensors in enumerate(shards, 1)
    }


def bytes_of(source: Source) -> int:
    return source.num_elements * DTYPE.itemsize


def write_shard(file: Path, tensors: dict[str, Source], line: BytesLine) -> None:
    """Draw the tensors and write them; the file is there when it is whole."""
    drawn: dict[str, Tensor] = {}
    for name, source in tensors.items():
        drawn[name] = random_tensor(name, source)
        line.add(bytes_of(source))
    unfinished = file.with_suffix(".part")
    save_file(drawn, unfinished, metadata={"format": "pt"})
    os.replace(unfinished, file)


def random_tensor(name: str, source: Source) -> Tensor:
    """Norms are ones; embeddings have deviation 1; a matrix keeps the size of what it multiplies.

    The name is the seed.
    """
    if source.part == "norms":
        return torch.ones(source.shape, dtype=DTYPE)
    deviation = 1.0 if source.part == "embeddings" else source.shape[-1] ** -0.5
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return torch.empty(source.shape, dtype=DTYPE).normal_(0.0, deviation, generator=generator)


def write_tokenizer(folder: Path) -> None:
    """Mixtral-8x7B's own tokenizer, as SentencePiece's file and as the `tokenizers` library's."""
    from transformers import LlamaTokenizer

    original = files("mistral_common") / "data" / "tokenizer.model.v1"
    (folder / "tokenizer.model").write_bytes(original.read_bytes())
    LlamaTokenizer.from_pretrained(folder).save_pretrained(folder)
    # what the published checkpoints say of it, which transformers' own file leaves out
    config_file = folder / "tokenizer_config.json"
    content = json.loads(config_file.read_text(encoding="utf-8"))
    content |= {"add_bos_token": True, "add_eos_token": False, "legacy": True}
    write(config_file, json.dumps(content, indent=2))


def write(file: Path, text: str) -> None:
    file.write_text(text + "\n", encoding="utf-8")


def first_existing(folder: Path) -> Path:
    """The folder, or the nearest one above that exists: where its bytes will lie."""
    return next(path for path in (folder, *folder.absolute().parents) if path.exists())


if __name__ == "__main__":
    main()

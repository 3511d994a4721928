"""Quantised copies of a checkpoint: written once, read back into the same bits.

    config.json                        the source's (or made of Mistral's params.json), its dtype
                                       that of the copy
    tokenizer files, chat template, generation_config.json    as in the source
    model.safetensors.index.json       the tensors that are no expert's, by the per-expert layout's
    model-LLL.safetensors, ...         names: one file per layer, and model-outer for the rest
    experts-LLL-EEE.safetensors        one expert's parts: `w13.codes`, `w13.scales`, `w2.codes`...
    quantization.json                  format, version and mode; written last, so a copy that was
                                       interrupted does not pass for one

Writing holds one layer's attention or one expert at a time. How matrices are quantised is
`quantize`'s business.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from model.config import MixtralConfig
from model.errors import CheckpointError, QuantizationError
from model.experts import ExpertWeights, Matrix
from model.quantize import (
    check_parts,
    matrix,
    part_specs,
    quantize,
    quantized_bytes,
    require,
)
from model.tensor_files import SafetensorsFile

if TYPE_CHECKING:
    from model.weights import Checkpoint

FORMAT = "maestrale-quantized"
VERSION = 1
MARKER = "quantization.json"

_COPIED = (
    "generation_config.json",
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
_OUTER_FILE = "model-outer.safetensors"
_Shapes = dict[str, tuple[int, int]]


class QuantizedCopy:
    """The experts of a quantised copy, opened for reading. Not thread-safe."""

    def __init__(self, folder: Path, config: MixtralConfig) -> None:
        """Raises CheckpointError when the marker is not one that this version can read."""
        self.mode = _read_marker(folder / MARKER)
        self._folder = folder
        self._shapes = _expert_shapes(config)

    @staticmethod
    def is_at(folder: Path) -> bool:
        """Whether the folder is a quantised copy."""
        return (folder / MARKER).exists()

    def load_expert(
        self, layer: int, expert_id: int, *, dtype: torch.dtype, device: torch.device
    ) -> ExpertWeights:
        """One expert of one layer, for rows of that dtype.

        Raises CheckpointError naming file and part; QuantizationError without the mode's library.
        """
        file = SafetensorsFile(self._folder / _expert_file(layer, expert_id))
        known = {
            f"{name}.{part}"
            for name, shape in self._shapes.items()
            for part in part_specs(self.mode, shape)
        }
        if file.tensors.keys() != known:
            raise CheckpointError(
                f"{file.path} holds {sorted(file.tensors)}, {self.mode} has {sorted(known)}"
            )
        loaded = {
            name: self._load(file, name, shape, dtype, device)
            for name, shape in self._shapes.items()
        }
        return ExpertWeights(w13_2FD=loaded["w13"], w2_DF=loaded["w2"])

    def _load(
        self,
        file: SafetensorsFile,
        name: str,
        shape: tuple[int, int],
        dtype: torch.dtype,
        device: torch.device,
    ) -> Matrix:
        parts: dict[str, Tensor] = {}
        for part, spec in part_specs(self.mode, shape).items():
            stored = file.tensors[f"{name}.{part}"]
            if (stored.dtype, stored.shape) != (spec.dtype, spec.shape):
                raise CheckpointError(
                    f"{file.path}: {name}.{part} is {stored.dtype} of shape {stored.shape}, "
                    f"{self.mode} has {spec.dtype} of shape {spec.shape}"
                )
            run = torch.empty(stored.shape, dtype=stored.dtype)
            file.read(f"{name}.{part}", 0, run.view(-1))
            parts[part] = run
        try:
            check_parts(parts, self.mode, shape)
        except ValueError as error:
            raise CheckpointError(f"{file.path}: {name}.{error}") from error
        on_device = {part: tensor.to(device) for part, tensor in parts.items()}
        return matrix(on_device, self.mode, shape, dtype)


def save_quantized(
    source: "Checkpoint",
    target: Path,
    mode: str,
    on_bytes: Callable[[int], None] = lambda num_bytes: None,
) -> None:
    """Write the copy of a checkpoint, in the checkpoint's dtype, its experts quantised.

    on_bytes: called with the size of each tensor or expert as it is written.
    Raises QuantizationError for the mode, CheckpointError for the source or a target in use.
    """
    require(mode)
    if source.quantization is not None:
        raise QuantizationError(f"{source.folder} is read as {source.quantization} already")
    try:
        target.mkdir(parents=True, exist_ok=True)
        if any(target.iterdir()):
            raise CheckpointError(f"{target} is not empty; a copy needs a folder of its own")
        _copy_files(source, target)
        _write_decoder(source, target, on_bytes)
        for layer in range(source.config.num_hidden_layers):
            for expert_id in range(source.config.num_local_experts):
                parts = _quantize_expert(source.load_expert(layer, expert_id), mode)
                save_file(parts, target / _expert_file(layer, expert_id))
                on_bytes(sum(part.nbytes for part in parts.values()))
        marker = {"format": FORMAT, "version": VERSION, "mode": mode}
        (target / MARKER).write_text(json.dumps(marker) + "\n", encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"{target} cannot be written: {error}") from error


def expert_bytes(config: MixtralConfig, mode: str) -> int:
    """Memory of one quantised expert. Raises QuantizationError for an unknown mode."""
    return sum(quantized_bytes(mode, shape) for shape in _expert_shapes(config).values())


def _expert_shapes(config: MixtralConfig) -> _Shapes:
    hidden, inner = config.hidden_size, config.intermediate_size
    return {"w13": (2 * inner, hidden), "w2": (hidden, inner)}


def _expert_file(layer: int, expert_id: int) -> str:
    return f"experts-{layer:03}-{expert_id:03}.safetensors"


def _quantize_expert(weights: ExpertWeights, mode: str) -> dict[str, Tensor]:
    """All parts of an expert, as they are named in its file."""
    parts: dict[str, Tensor] = {}
    for name, weight in (("w13", weights.w13_2FD), ("w2", weights.w2_DF)):
        assert isinstance(weight, Tensor), "save_quantized has looked"
        for part, tensor in quantize(weight, mode).items():
            parts[f"{name}.{part}"] = tensor.cpu().contiguous()
    return parts


def _copy_files(source: "Checkpoint", target: Path) -> None:
    for name in _COPIED:
        if (source.folder / name).is_file():
            shutil.copyfile(source.folder / name, target / name)
    config_file = source.folder / "config.json"
    if config_file.is_file():
        content: dict[str, Any] = json.loads(config_file.read_text(encoding="utf-8"))
    else:
        content = {"model_type": "mixtral", **asdict(source.config)}
        content["eos_token_id"] = list(content.pop("eos_token_ids"))
    content.pop("torch_dtype", None)
    content["dtype"] = str(source.dtype).removeprefix("torch.")
    (target / "config.json").write_text(json.dumps(content, indent=2), encoding="utf-8")


def _write_decoder(source: "Checkpoint", target: Path, on_bytes: Callable[[int], None]) -> None:
    file_of = {
        name: _decoder_file(name)
        for name, stored in source.sources.items()
        if stored.part != "experts"
    }
    for file_name in sorted(set(file_of.values())):
        names = [name for name, its_file in file_of.items() if its_file == file_name]
        save_file({name: source.load_tensor(name).cpu() for name in names}, target / file_name)
        on_bytes((target / file_name).stat().st_size)
    index = {"metadata": {}, "weight_map": file_of}
    (target / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def _decoder_file(tensor_name: str) -> str:
    """`model.layers.7. ...` goes to layer 7's file, everything else to one of its own."""
    pieces = tensor_name.split(".")
    return f"model-{int(pieces[2]):03}.safetensors" if pieces[1] == "layers" else _OUTER_FILE


def _read_marker(file: Path) -> str:
    try:
        marker = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} cannot be read as JSON: {error}") from error
    if not isinstance(marker, dict) or marker.get("format") != FORMAT:
        raise CheckpointError(f"{file} does not say {FORMAT!r} as its format")
    if marker.get("version") != VERSION:
        raise CheckpointError(
            f"{file} is of version {marker.get('version')!r}, this is for version {VERSION}: "
            "quantise the checkpoint again"
        )
    mode = str(marker.get("mode"))
    try:
        part_specs(mode, (1, 1))
    except QuantizationError as error:
        raise CheckpointError(f"{file}: {error}") from error
    return mode

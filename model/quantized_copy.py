"""Quantised copies of a checkpoint: written once, read back into the same bits.

    config.json                        the source's (or made of Mistral's params.json), its dtype
                                       that of the copy
    tokenizer files, chat template, generation_config.json    as in the source
    model.safetensors.index.json       the tensors that stay dense, by the per-expert layout's
    model-LLL.safetensors, ...         names: one file per layer, and model-outer for the rest
    experts-LLL-EEE.safetensors        one expert's parts: `w13.codes`, `w13.scales`, `w2.codes`...
    attention-LLL.safetensors          one layer's, where attention is quantised: `wqkv.codes`...
    quantization.json                  format, version, modes of experts and attention; written
                                       last, so a copy that was interrupted does not pass for one

Writing holds one layer's attention or one expert at a time. How matrices are quantised is
`quantize`'s business.
"""

import json
import shutil
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from model.config import MixtralConfig
from model.errors import CheckpointError, QuantizationError
from model.experts import ExpertWeights
from model.linear import Matrix
from model.quantize import (
    check_parts,
    cut,
    matrix,
    part_specs,
    quantize,
    quantized_bytes,
    require,
)
from model.tensor_files import SafetensorsFile
from model.units import Unit
from model.weight_folder import WeightFolder

if TYPE_CHECKING:
    from model.weights import Checkpoint

FORMAT = "maestrale-quantized"
VERSION = 2
MARKER = "quantization.json"

_COPIED = (
    "generation_config.json",
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "additional_chat_templates/tool_use.jinja",
)
_OUTER_FILE = "model-outer.safetensors"
_Shapes = dict[str, tuple[int, int]]


class QuantizedCopy:
    """What a quantised copy holds in fewer bits, opened for reading. Not thread-safe."""

    def __init__(self, folder: Path, config: MixtralConfig, files: WeightFolder) -> None:
        """folder: with the marker. files: with the weights.

        Raises CheckpointError when the marker is not one that this version can read.
        """
        self.expert_mode, self.attention_mode = _read_marker(folder / MARKER)
        self._files = files
        self._config = config

    @classmethod
    def at(cls, folder: Path, config: MixtralConfig, files: WeightFolder) -> "QuantizedCopy | None":
        """The copy in this folder; None where there is none. Raises CheckpointError."""
        return cls(folder, config, files) if (folder / MARKER).exists() else None

    @property
    def names(self) -> set[str]:
        """The files of all that is held in fewer bits."""
        found = {self.file_of(unit) for unit in self._config.expert_units}
        if self.attention_mode is not None:
            found |= set(map(_attention_file, range(self._config.num_hidden_layers)))
        return found

    def file_of(self, unit: Unit) -> str:
        """The file that a unit is read from."""
        return _expert_file(unit.layer, unit.expert_id)

    def load_unit(self, unit: Unit, *, dtype: torch.dtype, device: torch.device) -> ExpertWeights:
        """One expert of one layer, or a slice of it, for rows of that dtype.

        Raises CheckpointError naming file and part; QuantizationError without the mode's library,
        or where groups of weights do not end where the slice does.
        """
        mode, shapes = self.expert_mode, _expert_shapes(self._config)
        parts = _load_parts(self._files, self.file_of(unit), mode, shapes)
        if unit.num_slices > 1:
            begin, end = unit.bounds(self._config.intermediate_size)
            gate, up = (
                cut(parts["w13"], mode, shapes["w13"], axis=0, begin=first + begin, end=first + end)
                for first in (0, self._config.intermediate_size)
            )
            parts["w13"] = {name: torch.cat((gate[name], up[name])) for name in gate}
            parts["w2"] = cut(parts["w2"], mode, shapes["w2"], axis=1, begin=begin, end=end)
            hidden = self._config.hidden_size
            shapes = {"w13": (2 * (end - begin), hidden), "w2": (hidden, end - begin)}
        loaded = _matrices(parts, mode, shapes, dtype=dtype, device=device)
        return ExpertWeights(w13_2FD=loaded["w13"], w2_DF=loaded["w2"])

    def load_attention(
        self, layer: int, *, dtype: torch.dtype, device: torch.device
    ) -> tuple[Matrix, Matrix]:
        """wqkv and wo of a layer, for rows of that dtype; only where there is an attention_mode.

        Raises CheckpointError naming file and part; QuantizationError without the mode's library.
        """
        assert self.attention_mode is not None, "this copy's attention is dense"
        shapes = _attention_shapes(self._config)
        parts = _load_parts(self._files, _attention_file(layer), self.attention_mode, shapes)
        loaded = _matrices(parts, self.attention_mode, shapes, dtype=dtype, device=device)
        return loaded["wqkv"], loaded["wo"]


def save_quantized(
    source: "Checkpoint",
    target: Path,
    mode: str,
    on_bytes: Callable[[int], None] = lambda num_bytes: None,
    *,
    attention_mode: str | None = None,
) -> None:
    """Write the copy of a checkpoint, in the checkpoint's dtype, its experts quantised.

    attention_mode: of attention's matrices; None leaves them dense.
    on_bytes: called with sizes as they are written.
    Raises QuantizationError for a mode, CheckpointError for the source or a target in use.
    """
    for each in filter(None, (mode, attention_mode)):
        require(each)
    already = source.expert_quantization or source.attention_quantization
    if already is not None:
        raise QuantizationError(f"{source.folder} is read as {already} already")
    try:
        target.mkdir(parents=True, exist_ok=True)
        if any(target.iterdir()):
            raise CheckpointError(f"{target} is not empty; a copy needs a folder of its own")
        _copy_files(source, target)
        quantized_parts = ("experts", "attention") if attention_mode else ("experts",)
        _write_dense(source, target, quantized_parts, on_bytes)
        for layer in range(source.config.num_hidden_layers):
            prefix = f"model.layers.{layer}"
            if attention_mode is not None:
                q, k, v, o = (f"{prefix}.self_attn.{name}_proj.weight" for name in "qkvo")
                weights = {"wqkv": source.load_tensor(q, k, v), "wo": source.load_tensor(o)}
                on_bytes(_write_parts(target / _attention_file(layer), weights, attention_mode))
            for expert_id in range(source.config.num_local_experts):
                expert = f"{prefix}.block_sparse_moe.experts.{expert_id}"
                w1, w2, w3 = (f"{expert}.{name}.weight" for name in ("w1", "w2", "w3"))
                weights = {"w13": source.load_tensor(w1, w3), "w2": source.load_tensor(w2)}
                on_bytes(_write_parts(target / _expert_file(layer, expert_id), weights, mode))
        marker = {
            "format": FORMAT,
            "version": VERSION,
            "experts": mode,
            "attention": attention_mode,
        }
        (target / MARKER).write_text(json.dumps(marker) + "\n", encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"{target} cannot be written: {error}") from error


def expert_bytes(config: MixtralConfig, mode: str) -> int:
    """Memory of one quantised expert. Raises QuantizationError for an unknown mode."""
    return sum(quantized_bytes(mode, shape) for shape in _expert_shapes(config).values())


def attention_bytes(config: MixtralConfig, mode: str) -> int:
    """Memory of one layer's quantised attention. Raises QuantizationError for an unknown mode."""
    return sum(quantized_bytes(mode, shape) for shape in _attention_shapes(config).values())


def _expert_shapes(config: MixtralConfig) -> _Shapes:
    hidden, inner = config.hidden_size, config.intermediate_size
    return {"w13": (2 * inner, hidden), "w2": (hidden, inner)}


def _attention_shapes(config: MixtralConfig) -> _Shapes:
    hidden, q_size = config.hidden_size, config.num_attention_heads * config.head_dim
    kv_size = config.num_key_value_heads * config.head_dim
    return {"wqkv": (q_size + 2 * kv_size, hidden), "wo": (hidden, q_size)}


def _expert_file(layer: int, expert_id: int) -> str:
    return f"experts-{layer:03}-{expert_id:03}.safetensors"


def _attention_file(layer: int) -> str:
    return f"attention-{layer:03}.safetensors"


def _write_parts(file: Path, weights: Mapping[str, Tensor], mode: str) -> int:
    """Write all parts of these matrices; returns their bytes."""
    parts: dict[str, Tensor] = {}
    for name, weight in weights.items():
        for part, tensor in quantize(weight, mode).items():
            parts[f"{name}.{part}"] = tensor.cpu().contiguous()
    save_file(parts, file)
    return sum(part.nbytes for part in parts.values())


def _matrices(
    parts: Mapping[str, dict[str, Tensor]],
    mode: str,
    shapes: _Shapes,
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> dict[str, Matrix]:
    """Sound parts as matrices, on the device."""
    return {
        name: matrix({part: t.to(device) for part, t in parts[name].items()}, mode, shape, dtype)
        for name, shape in shapes.items()
    }


def _load_parts(
    files: WeightFolder, name: str, mode: str, shapes: _Shapes
) -> dict[str, dict[str, Tensor]]:
    """The parts of all matrices of a file that `_write_parts` wrote."""
    path = files.path / name
    file = SafetensorsFile(path, files)
    known = {f"{name}.{part}" for name in shapes for part in part_specs(mode, shapes[name])}
    if file.tensors.keys() != known:
        raise CheckpointError(f"{path} holds {sorted(file.tensors)}, {mode} has {sorted(known)}")
    return {name: _load_parts_of(file, name, mode, shape) for name, shape in shapes.items()}


def _load_parts_of(
    file: SafetensorsFile, name: str, mode: str, shape: tuple[int, int]
) -> dict[str, Tensor]:
    parts: dict[str, Tensor] = {}
    for part, spec in part_specs(mode, shape).items():
        stored = file.tensors[f"{name}.{part}"]
        if (stored.dtype, stored.shape) != (spec.dtype, spec.shape):
            raise CheckpointError(
                f"{file.path}: {name}.{part} is {stored.dtype} of shape {stored.shape}, "
                f"{mode} has {spec.dtype} of shape {spec.shape}"
            )
        run = torch.empty(stored.shape, dtype=stored.dtype)
        file.read(f"{name}.{part}", 0, run.view(-1))
        parts[part] = run
    try:
        check_parts(parts, mode, shape)
    except ValueError as error:
        raise CheckpointError(f"{file.path}: {name}.{error}") from error
    return parts


def _copy_files(source: "Checkpoint", target: Path) -> None:
    for name in _COPIED:
        if (source.folder / name).is_file():
            (target / name).parent.mkdir(exist_ok=True)
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


def _write_dense(
    source: "Checkpoint", target: Path, without: Collection[str], on_bytes: Callable[[int], None]
) -> None:
    """Write all tensors but those of some parts of the model."""
    file_of = {
        name: _dense_file(name)
        for name, stored in source.sources.items()
        if stored.part not in without
    }
    for file_name in sorted(set(file_of.values())):
        names = [name for name, its_file in file_of.items() if its_file == file_name]
        save_file({name: source.load_tensor(name).cpu() for name in names}, target / file_name)
        on_bytes((target / file_name).stat().st_size)
    index = {"metadata": {}, "weight_map": file_of}
    (target / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def _dense_file(tensor_name: str) -> str:
    """`model.layers.7. ...` goes to layer 7's file, everything else to one of its own."""
    pieces = tensor_name.split(".")
    return f"model-{int(pieces[2]):03}.safetensors" if pieces[1] == "layers" else _OUTER_FILE


def _read_marker(file: Path) -> tuple[str, str | None]:
    """The modes of experts and attention."""
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
    expert_mode, attention_mode = str(marker.get("experts")), marker.get("attention")
    if attention_mode is not None:
        attention_mode = str(attention_mode)
    try:
        for mode in filter(None, (expert_mode, attention_mode)):
            part_specs(mode, (1, 1))
    except QuantizationError as error:
        raise CheckpointError(f"{file}: {error}") from error
    return expert_mode, attention_mode

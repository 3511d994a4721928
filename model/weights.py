"""Reading a checkpoint, tensor by tensor: a head takes all but the experts, a worker only its own.

What a file calls a tensor is `layouts`' business, how its bytes are read `tensor_files`'. Nothing
is read that is not asked for, and every tensor goes straight to where it is kept.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from model import layouts
from model.config import DTYPES, MixtralConfig
from model.errors import CheckpointError, ConfigError, QuantizationError
from model.experts import ExpertWeights
from model.labels import ARCHITECTURE
from model.linear import Weight
from model.packed_half import packed_if_faster
from model.quantize import cut, matrix, quantize, quantized, require
from model.quantized_copy import QuantizedCopy, attention_bytes, expert_bytes
from model.tensor_files import StoredTensor, WeightFile, WeightFiles, sampled
from model.units import Unit
from model.weight_folder import LocalFolder, WeightFolder

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # fp8 needs scales

Sources = tuple[layouts.Source, ...]

OnBytes = Callable[[int], None]
"""Called with the size of each tensor as it arrives, for progress."""


def ignore_bytes(num_bytes: int) -> None:
    """An OnBytes for callers that show no progress."""


def torch_dtype(name: str | None) -> torch.dtype | None:
    """torch's dtype by its name; None (the checkpoint's own) for None. Raises ConfigError."""
    if name is None:
        return None
    if name not in DTYPES:
        raise ConfigError(f"dtype {name!r} is not one of {', '.join(DTYPES)}")
    dtype: torch.dtype = getattr(torch, name)
    return dtype


@dataclass(frozen=True)
class LayerWeights:
    """Attention, norms and router of one layer; q, k and v stacked into one matrix."""

    attention_norm_D: Tensor
    wqkv: Weight
    qkv_sizes: tuple[int, int, int]
    wo: Weight
    experts_norm_D: Tensor
    gate_ED: Tensor


@dataclass(frozen=True)
class DecoderWeights:
    """Everything of a Mixtral that is not an expert."""

    embedding_VD: Tensor
    layers: tuple[LayerWeights, ...]
    final_norm_D: Tensor
    lm_head_VD: Weight
    """Of a sequence classifier: its score head, with a row for each label."""


class Checkpoint:
    """A checkpoint folder, opened for reading. Not thread-safe."""

    def __init__(
        self,
        folder: Path,
        *,
        files: WeightFolder | None = None,
        dtype: torch.dtype | None = None,
        device: str | torch.device = "cpu",
        expert_quantization: str | None = None,
        attention_quantization: str | None = None,
    ) -> None:
        """files: where the weights are, if not in the folder like all else.
        dtype: what to convert to; None keeps the configuration's.
        expert_quantization, attention_quantization: in which of `quantize.MODES` to hold experts,
            and q, k, v and o of attention; None for a quantised copy's own, and none for any other.

        Raises ConfigError or CheckpointError, naming the file; the latter also for tensors that no
        Mixtral of this configuration has. Raises QuantizationError for a mode that cannot be had.
        """
        self.folder = folder
        self.config = MixtralConfig.from_folder(folder)
        self.dtype = dtype or getattr(torch, self.config.dtype)
        self.device = torch.device(device)
        files = files or LocalFolder(folder)
        self._copy = QuantizedCopy.at(folder, self.config, files)
        held = (self._copy.expert_mode, self._copy.attention_mode) if self._copy else (None, None)
        self.expert_quantization = _agreed_mode(
            expert_quantization, held[0], f"{folder} holds its experts"
        )
        self.attention_quantization = _agreed_mode(
            attention_quantization, held[1], f"{folder} holds its attention"
        )
        self.files = WeightFiles(files)
        self.layout = layouts.detect(self.files.file_of, is_mistrals=self.files.is_mistrals)
        self.sources = layouts.sources(self.config, self.layout)
        self._known = {source.stored_name for source in self.sources.values()}
        self._checked: set[str] = set()
        for name, file_name in self.files.file_of.items():
            self._refuse_surplus(self.files.path(file_name), [name])

    @property
    def expert_bytes(self) -> int:
        """Bytes of one (layer, expert) once loaded."""
        if self.expert_quantization is not None:
            return expert_bytes(self.config, self.expert_quantization)
        return self.config.num_expert_parameters * self.dtype.itemsize

    @property
    def decoder_bytes(self) -> int:
        """Bytes of everything but the experts once loaded."""
        not_dense, quantized_bytes = {"experts"}, 0
        if self.attention_quantization is not None:
            not_dense.add("attention")
            per_layer = attention_bytes(self.config, self.attention_quantization)
            quantized_bytes = self.config.num_hidden_layers * per_layer
        dense = (source for source in self.sources.values() if source.part not in not_dense)
        return sum(source.num_elements for source in dense) * self.dtype.itemsize + quantized_bytes

    def sample(self) -> str:
        """A digest of samples from all files that weights are read from: it tells a model from the
        same trained on. Raises CheckpointError for a file that cannot be read.
        """
        names = set(self.files.file_of.values())
        return sampled(self.files.folder, names | self._copy.names if self._copy else names)

    def stored(self, name: str) -> StoredTensor:
        """How a tensor, named as in the per-expert layout, is stored; reads only its file's header.

        Raises CheckpointError when it is missing or not what the configuration says.
        """
        source = self.sources[name]
        return self._file_with(source).tensors[source.stored_name]

    def load_decoder(self, on_bytes: OnBytes = ignore_bytes) -> DecoderWeights:
        """Everything but the experts. Raises CheckpointError naming file and tensor."""
        config = self.config
        q_size = config.num_attention_heads * config.head_dim
        kv_size = config.num_key_value_heads * config.head_dim

        def load(name: str) -> Tensor:
            return self._load((self.sources[name],), on_bytes)

        layers = []
        for layer in range(config.num_hidden_layers):
            prefix = f"model.layers.{layer}"
            wqkv, wo = self.load_attention(layer, on_bytes)
            layers.append(
                LayerWeights(
                    attention_norm_D=load(f"{prefix}.input_layernorm.weight"),
                    wqkv=wqkv,
                    qkv_sizes=(q_size, kv_size, kv_size),
                    wo=wo,
                    experts_norm_D=load(f"{prefix}.post_attention_layernorm.weight"),
                    gate_ED=load(f"{prefix}.block_sparse_moe.gate.weight"),
                )
            )
        embedding_VD = load("model.embed_tokens.weight")
        head = layouts.head_name(config)
        lm_head_VD = packed_if_faster(load(head)) if head else embedding_VD
        final_norm_D = load("model.norm.weight")
        return DecoderWeights(embedding_VD, tuple(layers), final_norm_D, lm_head_VD)

    def load_unit(self, unit: Unit, on_bytes: OnBytes = ignore_bytes) -> ExpertWeights:
        """One expert of one layer, or a slice of it; the slices' outputs add up to the expert's.

        Of a slice only its own bytes are read. Where w2 has to be quantised or is stored quantised,
        all of it is read, so that a slice has the very codes and scales that the whole expert has.

        Raises CheckpointError naming file and tensor; QuantizationError where a mode's groups of
        weights do not end where the slice does.
        """
        if self._copy is not None:
            weights = self._copy.load_unit(unit, dtype=self.dtype, device=self.device)
            on_bytes(weights.num_bytes)
            return weights
        w1, w2, w3 = (
            self.sources[
                f"model.layers.{unit.layer}.block_sparse_moe.experts.{unit.expert_id}.{name}.weight"
            ]
            for name in ("w1", "w2", "w3")
        )
        begin, end = unit.bounds(self.config.intermediate_size)
        mode = self.expert_quantization
        w13_2FD = self._load_matrix(
            (w1.rows(begin, end), w3.rows(begin, end)) if unit.num_slices > 1 else (w1, w3),
            mode,
            on_bytes,
        )
        if unit.num_slices == 1:
            return ExpertWeights(w13_2FD, self._load_matrix((w2,), mode, on_bytes))
        if mode is None:
            w2_DF = self._load_matrix((w2.columns(begin, end),), mode, on_bytes)
            return ExpertWeights(w13_2FD, w2_DF)
        whole = self._load((w2,), ignore_bytes)
        parts = cut(
            quantize(whole, mode), mode, (w2.shape[0], w2.shape[1]), axis=1, begin=begin, end=end
        )
        w2_DF = matrix(parts, mode, (w2.shape[0], end - begin), self.dtype)
        on_bytes(w2_DF.nbytes)
        return ExpertWeights(w13_2FD, w2_DF)

    def files_of(self, unit: Unit) -> list[Path]:
        """The files that a unit is read from."""
        if self._copy is not None:
            return [self.files.path(self._copy.file_of(unit))]
        prefix = f"model.layers.{unit.layer}.block_sparse_moe.experts.{unit.expert_id}"
        stored = (
            self.sources[f"{prefix}.{name}.weight"].stored_name for name in ("w1", "w2", "w3")
        )
        return sorted({self.files.path(self.files.file_of[name]) for name in stored})

    def load_attention(self, layer: int, on_bytes: OnBytes = ignore_bytes) -> tuple[Weight, Weight]:
        """q, k and v of a layer as one matrix, and o. Raises CheckpointError naming the tensor."""
        if self._copy is not None and self._copy.attention_mode is not None:
            wqkv, wo = self._copy.load_attention(layer, dtype=self.dtype, device=self.device)
            on_bytes(wqkv.nbytes + wo.nbytes)
            return wqkv, wo
        q, k, v, o = (
            self.sources[f"model.layers.{layer}.self_attn.{name}_proj.weight"] for name in "qkvo"
        )
        mode = self.attention_quantization
        return (
            self._load_matrix((q, k, v), mode, on_bytes),
            self._load_matrix((o,), mode, on_bytes),
        )

    def load_experts(
        self, units: Iterable[Unit], on_bytes: OnBytes = ignore_bytes
    ) -> dict[Unit, ExpertWeights]:
        """Several experts or slices."""
        return {unit: self.load_unit(unit, on_bytes) for unit in units}

    def load_tensor(self, *names: str) -> Tensor:
        """The tensors of these names in the per-expert layout, dense, one below the other.

        Raises CheckpointError.
        """
        return self._load(tuple(self.sources[name] for name in names), ignore_bytes)

    def _load_matrix(self, sources: Sources, mode: str | None, on_bytes: OnBytes) -> Weight:
        """These as one matrix, packed or quantised before the next is read."""
        if mode is None:
            return packed_if_faster(self._load(sources, on_bytes))
        weight = quantized(self._load(sources, ignore_bytes), mode)
        on_bytes(weight.nbytes)
        return weight

    def _load(self, sources: Sources, on_bytes: OnBytes) -> Tensor:
        """These, one below the other in one. Each is read straight into its place."""
        for source in sources:
            self._file_with(source)  # a wrong configuration is refused before memory is asked for
        num_rows = [source.shape[0] for source in sources]
        loaded = torch.empty(
            (sum(num_rows), *sources[0].shape[1:]), dtype=self.dtype, device=self.device
        )
        for source, place in zip(sources, loaded.split(num_rows), strict=True):
            self._fill(place, source)
            on_bytes(place.nbytes)
        return loaded

    def _fill(self, place: Tensor, source: layouts.Source) -> None:
        file, name = self._file_with(source), source.stored_name
        stored_dtype = file.tensors[name].dtype
        if place.device.type == "cpu" and place.dtype == stored_dtype and source.turn is None:
            file.read(name, source.offset, place, source.row_stride)
        else:
            run = torch.empty(source.run_shape, dtype=stored_dtype)
            file.read(name, source.offset, run, source.row_stride)
            place.copy_(source.turn(run) if source.turn else run)
        # smallest and largest, not isfinite(): that would take half as much memory again
        extremes = torch.stack(place.aminmax())
        if not extremes.isfinite().all():
            raise CheckpointError(f"{file.path}: {name} holds values that are not finite")

    def _file_with(self, source: layouts.Source) -> WeightFile:
        """The open file with this tensor, once its description is found to be right."""
        name = source.stored_name
        file_name = self.files.file_of.get(name)
        if file_name is None:
            raise CheckpointError(f"{self.folder}: the checkpoint has no tensor {name}")
        try:
            file = self.files.open(file_name)
        except CheckpointError as error:
            raise CheckpointError(f"{error} (it should hold {name})") from error
        if file_name not in self._checked:
            self._refuse_surplus(file.path, file.tensors)
            self._checked.add(file_name)
        stored = file.tensors.get(name)
        if stored is None:
            raise CheckpointError(f"{file.path} has no tensor {name}, though the index says so")
        if stored.shape != source.stored_shape:
            raise CheckpointError(
                f"{file.path}: {name} has shape {stored.shape}, "
                f"the configuration says {source.stored_shape}"
            )
        if stored.dtype not in _FLOATS:
            raise CheckpointError(f"{file.path}: {name} is {stored.dtype}, not a floating type")
        return file

    def _refuse_surplus(self, path: Path, names: Iterable[str]) -> None:
        for name in names:
            if name not in self._known and not layouts.is_harmless(name, self.config):
                hint = f"; is config.json to name {ARCHITECTURE}?" if name == layouts.SCORE else ""
                raise CheckpointError(
                    f"{path}: {name} is a tensor that the configured Mixtral does not have "
                    f"(layout: {self.layout.value}){hint}"
                )


def _agreed_mode(wanted: str | None, held: str | None, holds: str) -> str | None:
    """The mode for a part of the model: what a copy holds it in, or what is wanted.

    Raises QuantizationError when these differ or the wanted mode cannot be had.
    """
    if wanted is None:
        return held
    require(wanted)
    if held not in (None, wanted):
        raise QuantizationError(f"{holds} as {held}, not as {wanted}")
    return wanted

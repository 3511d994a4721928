"""Where each layout of a checkpoint keeps each tensor: names and shapes. No files, no torch.

The model asks for tensors by the names of Hugging Face's per-expert layout; the table made here
says what to read instead. Every answer is one run of one stored tensor, perhaps with its axes
turned afterwards; a run is contiguous, but for columns of a matrix.

Shape letters: L layers, D hidden, F intermediate, E experts, V vocabulary, H head dimension.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from enum import Enum
from math import prod
from typing import Any, Literal

from model.config import MixtralConfig

LM_HEAD = "lm_head.weight"
SCORE = "score.weight"
"""The head of a sequence classifier, in the place of the LM head."""

Part = Literal["embeddings", "attention", "norms", "routers", "experts", "head"]


class Layout(Enum):
    """The ways in which a Mixtral is stored; the value is for people."""

    PER_EXPERT = "Hugging Face, one tensor per expert"
    FUSED = "Hugging Face, the experts of a layer fused"
    MISTRAL = "Mistral's release, one tensor per expert"
    MISTRAL_STACKED = "Mistral's release, the experts of a layer stacked"


@dataclass(frozen=True)
class Source:
    """Where one tensor of the model lies: a run of a stored tensor's elements, row by row."""

    part: Part
    shape: tuple[int, ...]
    """As the model wants it."""
    stored_name: str
    stored_shape: tuple[int, ...]
    """Of the whole stored tensor."""
    run_shape: tuple[int, ...]
    """Of the run, as stored."""
    offset: int = 0
    """Elements of the stored tensor before the run."""
    row_stride: int | None = None
    """Elements from one row of the run to the next; None where nothing lies between them."""
    turn: Callable[[Any], Any] | None = None
    """Makes the wanted tensor of the stored run; None where they are the same."""

    @property
    def num_elements(self) -> int:
        return prod(self.shape)

    def rows(self, begin: int, end: int) -> "Source":
        """Some rows of the wanted matrix, of one that is stored as it is wanted."""
        assert self.turn is None, self.stored_name
        columns = self.run_shape[1]
        shape = (end - begin, columns)
        offset = self.offset + begin * columns
        return replace(self, shape=shape, run_shape=shape, offset=offset)

    def columns(self, begin: int, end: int) -> "Source":
        """Some columns of the wanted matrix, which are rows where it is stored the other way."""
        if self.turn is not None:
            assert self.turn is _transpose, self.stored_name
            as_stored = replace(self, turn=None).rows(begin, end)
            return replace(as_stored, shape=as_stored.run_shape[::-1], turn=self.turn)
        rows, row_stride = self.run_shape
        shape = (rows, end - begin)
        offset = self.offset + begin
        return replace(self, shape=shape, run_shape=shape, offset=offset, row_stride=row_stride)


def detect(stored_names: Iterable[str], *, is_mistrals: bool) -> Layout:
    """Which layout the names of a checkpoint's tensors speak of.

    is_mistrals: they come from `consolidated*` files.
    """
    if is_mistrals:
        is_stacked = any(".block_sparse_moe." in name for name in stored_names)
        return Layout.MISTRAL_STACKED if is_stacked else Layout.MISTRAL
    return Layout.FUSED if any(".mlp." in name for name in stored_names) else Layout.PER_EXPERT


def is_harmless(stored_name: str, config: MixtralConfig) -> bool:
    """Whether a tensor that the model does not ask for may be there all the same.

    Old files carry RoPE's constants, and those with tied embeddings sometimes a copy as the head.
    """
    if stored_name.endswith("rotary_emb.inv_freq"):
        return True
    return config.tie_word_embeddings and stored_name in (LM_HEAD, "output.weight")


def head_name(config: MixtralConfig) -> str | None:
    """The name of the matrix after the last norm; None where it is that of the embeddings."""
    if config.labels is not None:
        return SCORE
    return None if config.tie_word_embeddings else LM_HEAD


def sources(config: MixtralConfig, layout: Layout) -> dict[str, Source]:
    """Where every tensor of the model lies, by its name in the per-expert layout."""
    hidden, inner, vocab = config.hidden_size, config.intermediate_size, config.vocab_size
    q_size = config.num_attention_heads * config.head_dim
    kv_size = config.num_key_value_heads * config.head_dim
    is_mistrals = layout in (Layout.MISTRAL, Layout.MISTRAL_STACKED)
    table: dict[str, Source] = {}

    def whole(
        part: Part,
        name: str,
        stored_name: str,
        *shape: int,
        turn: Callable[[Any], Any] | None = None,
    ) -> None:
        table[name] = Source(part, shape, stored_name, shape, shape, turn=turn)

    def outer(part: Part, name: str, mistrals_name: str, *shape: int) -> None:
        whole(part, name, mistrals_name if is_mistrals else name, *shape)

    outer("embeddings", "model.embed_tokens.weight", "tok_embeddings.weight", vocab, hidden)
    outer("norms", "model.norm.weight", "norm.weight", hidden)
    if config.labels is not None:
        whole("head", SCORE, SCORE, len(config.labels), hidden)
    elif not config.tie_word_embeddings:
        outer("head", LM_HEAD, "output.weight", vocab, hidden)

    pairs_to_halves = _pairs_to_halves(config.head_dim) if is_mistrals else None
    router = {
        Layout.PER_EXPERT: "block_sparse_moe.gate.weight",
        Layout.FUSED: "mlp.gate.weight",
        Layout.MISTRAL: "feed_forward.gate.weight",
        Layout.MISTRAL_STACKED: "block_sparse_moe.gate.weight",
    }[layout]
    for layer in range(config.num_hidden_layers):
        ours = f"model.layers.{layer}"
        theirs = f"layers.{layer}" if is_mistrals else ours
        attention = f"{theirs}.attention.w" if is_mistrals else f"{theirs}.self_attn."
        suffix = "" if is_mistrals else "_proj"
        for letter, rows, columns in (
            ("q", q_size, hidden),
            ("k", kv_size, hidden),
            ("v", kv_size, hidden),
            ("o", hidden, q_size),
        ):
            whole(
                "attention",
                f"{ours}.self_attn.{letter}_proj.weight",
                f"{attention}{letter}{suffix}.weight",
                rows,
                columns,
                turn=pairs_to_halves if letter in "qk" else None,
            )
        for name, mistrals_name in (
            ("input_layernorm", "attention_norm"),
            ("post_attention_layernorm", "ffn_norm"),
        ):
            stored_name = mistrals_name if is_mistrals else name
            whole("norms", f"{ours}.{name}.weight", f"{theirs}.{stored_name}.weight", hidden)
        gate = f"{ours}.block_sparse_moe.gate.weight"
        whole("routers", gate, f"{theirs}.{router}", config.num_local_experts, hidden)
        for expert_id in range(config.num_local_experts):
            for matrix in ("w1", "w2", "w3"):
                name = f"{ours}.block_sparse_moe.experts.{expert_id}.{matrix}.weight"
                shape = (hidden, inner) if matrix == "w2" else (inner, hidden)
                table[name] = _expert(config, layout, theirs, expert_id, matrix, shape)
    return table


def _expert(
    config: MixtralConfig,
    layout: Layout,
    layer: str,
    expert_id: int,
    matrix: str,
    shape: tuple[int, int],
) -> Source:
    hidden, inner, experts = config.hidden_size, config.intermediate_size, config.num_local_experts
    size = hidden * inner
    if layout is Layout.FUSED and matrix == "w2":  # (E, D, F)
        stored = f"{layer}.mlp.experts.down_proj"
        stored_shape: tuple[int, ...] = (experts, hidden, inner)
        return Source("experts", shape, stored, stored_shape, shape, expert_id * size)
    if layout is Layout.FUSED:  # (E, 2F, D): of each expert first all of w1, then all of w3
        stored = f"{layer}.mlp.experts.gate_up_proj"
        stored_shape = (experts, 2 * inner, hidden)
        offset = (2 * expert_id + (matrix == "w3")) * size
        return Source("experts", shape, stored, stored_shape, shape, offset)
    if layout is Layout.MISTRAL_STACKED:  # (E * F, D), also w2, which the model wants as (D, F)
        stored = f"{layer}.block_sparse_moe.{matrix}"
        turn = _transpose if matrix == "w2" else None
        run_shape = (inner, hidden)
        stored_shape = (experts * inner, hidden)
        return Source(
            "experts", shape, stored, stored_shape, run_shape, expert_id * size, turn=turn
        )
    block = "feed_forward" if layout is Layout.MISTRAL else "block_sparse_moe"
    stored = f"{layer}.{block}.experts.{expert_id}.{matrix}.weight"
    return Source("experts", shape, stored, shape, shape)


def _transpose(stored: Any) -> Any:
    return stored.T


def _pairs_to_halves(head_dim: int) -> Callable[[Any], Any]:
    """Mistral's RoPE turns rows (0, 1), (2, 3), ... of a head together; ours (i, i + H/2).

    So with H = 6 the rows 0 1 2 3 4 5 of every head become 0 2 4 1 3 5.
    """

    def reorder(stored: Any) -> Any:
        pairs = stored.unflatten(0, (-1, head_dim // 2, 2))
        return pairs.transpose(1, 2).flatten(0, 2)

    return reorder

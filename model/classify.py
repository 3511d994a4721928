"""Sequence classification: a Mixtral with a score head in place of the LM head.

Loads what transformers saves of a MixtralForSequenceClassification. A sequence's logits are those
after its last token that is not padding.

Shape suffixes: S sequences, C labels.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model import layouts, steps
from model.decoder import Decoder
from model.errors import ConfigError, PromptError
from model.experts import Experts, LocalExperts
from model.hub import resolve
from model.tokenizer import Tokenizer
from model.weights import Checkpoint, OnBytes, ignore_bytes, torch_dtype

_SCORE = "score.weight"
_DEFAULT_NUM_LABELS = 2  # transformers' own, which it leaves out of config.json


@dataclass(frozen=True)
class Classified:
    """logits_SC: float32. labels: each sequence's likeliest; with one label (regression) the logit
    is the answer, and the label says only what is measured.
    """

    logits_SC: Tensor
    labels: tuple[str, ...]


@dataclass(frozen=True)
class _Head:
    """What config.json says about the labels."""

    labels: tuple[str, ...]
    pad_token_id: int | None


class Classifier:
    """A decoder that ends in a score head, and its experts. Keeps no request's state."""

    def __init__(
        self,
        decoder: Decoder,
        experts: Experts,
        labels: Sequence[str],
        *,
        pad_token_id: int | None = None,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        """decoder: its last matrix is (labels, hidden). tokenizer: needed for texts only."""
        self.decoder = decoder
        self.experts = experts
        self.labels = tuple(labels)
        self.pad_token_id = pad_token_id
        self.tokenizer = tokenizer
        self.config = decoder.config

    def __repr__(self) -> str:
        return f"Classifier({', '.join(self.labels)})"

    @classmethod
    def load(
        cls,
        model: Path | str,
        *,
        dtype: str | None = None,
        device: str = "cpu",
        on_bytes: OnBytes = ignore_bytes,
    ) -> "Classifier":
        """Load a checkpoint with all its experts, and its tokenizer where there is one.

        model: a folder, or a Hugging Face Hub id.
        dtype: float32, bfloat16 or float16; None for the checkpoint's own.
        Raises ModelError naming what is missing or wrong.
        """
        folder = resolve(model)
        head = _read_head(folder)
        checkpoint = _ScoredCheckpoint(
            folder, len(head.labels), dtype=torch_dtype(dtype), device=device
        )
        tokenizer_files = (folder / "tokenizer.model", folder / "tokenizer.json")
        has_tokenizer = any(file.is_file() for file in tokenizer_files)
        return cls(
            Decoder(checkpoint.config, checkpoint.load_decoder(on_bytes)),
            LocalExperts(checkpoint.load_experts(checkpoint.config.expert_units, on_bytes)),
            head.labels,
            pad_token_id=head.pad_token_id,
            tokenizer=Tokenizer.from_folder(folder) if has_tokenizer else None,
        )

    def classify(
        self, inputs: Sequence[str] | steps.Ids, *, attention_mask: steps.Ids | None = None
    ) -> Classified:
        """Classify texts or token ids, all in one pass.

        attention_mask: 0 where ids are padded, 1 elsewhere; padding at the end needs none.
        Raises PromptError for a sequence that is empty, out of vocabulary or too long.
        """
        sequences = [
            self._without_trailing_padding(ids)
            for ids in steps.drop_padding(self._encode(inputs), attention_mask)
        ]
        for ids in sequences:
            steps.check_prompt(self.config, ids, max_tokens=0)
        if not sequences:
            return Classified(torch.empty(0, len(self.labels)), ())
        logits_SC = steps.whole_pass(self.decoder, self.experts, sequences, last_only=True)
        best: list[int] = logits_SC.argmax(dim=-1).tolist()
        return Classified(logits_SC, tuple(self.labels[label_id] for label_id in best))

    def _encode(self, inputs: Sequence[str] | steps.Ids) -> steps.Ids:
        if isinstance(inputs, Tensor):
            return inputs
        encoded: list[Sequence[int]] = []
        for own in inputs:
            if not isinstance(own, str):
                encoded.append(own)
            elif self.tokenizer:
                encoded.append(self.tokenizer.encode_prompt(own))
            else:
                raise PromptError("this checkpoint has no tokenizer: classify token ids")
        return encoded

    def _without_trailing_padding(self, ids: list[int]) -> list[int]:
        length = len(ids)
        while length > 1 and ids[length - 1] == self.pad_token_id:
            length -= 1
        return ids[:length]


class _ScoredCheckpoint(Checkpoint):
    """A checkpoint that has score.weight where others have lm_head.weight."""

    def __init__(
        self, folder: Path, num_labels: int, *, dtype: torch.dtype | None, device: str
    ) -> None:
        super().__init__(folder, dtype=dtype, device=device)
        self.config = replace(self.config, tie_word_embeddings=False)
        shape = (num_labels, self.config.hidden_size)
        self.sources["lm_head.weight"] = layouts.Source("head", shape, _SCORE, shape, shape)

    def _refuse_surplus(self, path: Path, names: Iterable[str]) -> None:
        super()._refuse_surplus(path, [name for name in names if name != _SCORE])


def _read_head(folder: Path) -> _Head:
    file = folder / "config.json"
    try:
        config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        id2label = config.get("id2label")
        if id2label is None:
            num_labels = config.get("num_labels", _DEFAULT_NUM_LABELS)
            id2label = {str(i): f"LABEL_{i}" for i in range(num_labels)}
        labels = tuple(str(id2label[str(i)]) for i in range(len(id2label)))
        pad_token_id = config.get("pad_token_id")
    except FileNotFoundError as error:
        raise ConfigError(f"{file} does not exist; is {folder} a checkpoint?") from error
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(f"{file} cannot be read as a configuration: {error}") from error
    except (KeyError, TypeError) as error:
        raise ConfigError(f"{file}: id2label must name the labels 0, 1, ...: {error!r}") from error
    if not labels:
        raise ConfigError(f"{file}: id2label names no label")
    return _Head(labels, pad_token_id)

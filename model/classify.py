"""Sequence classification: a Mixtral with a score head in place of the LM head.

Loads what transformers saves of a MixtralForSequenceClassification. A sequence's logits are those
after its last token that is not padding.

Shape suffixes: S sequences, C labels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from model import steps
from model.config import MixtralConfig
from model.decoder import Decoder
from model.errors import ConfigError, PromptError
from model.experts import Experts, LocalExperts
from model.hub import resolve
from model.labels import ARCHITECTURE, trim_padding
from model.tokenizer import Tokenizer
from model.weights import Checkpoint, OnBytes, ignore_bytes, torch_dtype


@dataclass(frozen=True)
class Classified:
    """logits_SC: float32. labels: each sequence's likeliest; with one label (regression) the logit
    is the answer, and the label says only what is measured.
    """

    logits_SC: Tensor
    labels: tuple[str, ...]


class Classifier:
    """A decoder that ends in a score head, and its experts. Keeps no request's state."""

    def __init__(
        self, decoder: Decoder, experts: Experts, *, tokenizer: Tokenizer | None = None
    ) -> None:
        """tokenizer: needed for texts only. Raises ConfigError for a decoder that generates."""
        self.labels = _labels_of(decoder.config)
        self.decoder = decoder
        self.experts = experts
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
        checkpoint = Checkpoint(folder, dtype=torch_dtype(dtype), device=device)
        _labels_of(checkpoint.config)  # before minutes go into loading
        tokenizer_files = (folder / "tokenizer.model", folder / "tokenizer.json")
        has_tokenizer = any(file.is_file() for file in tokenizer_files)
        return cls(
            Decoder(checkpoint.config, checkpoint.load_decoder(on_bytes)),
            LocalExperts(checkpoint.load_experts(checkpoint.config.expert_units, on_bytes)),
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
            trim_padding(ids, self.config.pad_token_id)
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
        if isinstance(inputs, str):  # also a sequence of texts, of one character each
            raise PromptError("inputs must be a list of texts, not one text")
        encoded: list[Sequence[int]] = []
        for own in inputs:
            if not isinstance(own, str):
                encoded.append(own)
            elif self.tokenizer:
                encoded.append(self.tokenizer.encode_prompt(own))
            else:
                raise PromptError("this checkpoint has no tokenizer: classify token ids")
        return encoded


def _labels_of(config: MixtralConfig) -> tuple[str, ...]:
    if config.labels is None:
        raise ConfigError(
            "the checkpoint generates and has no score head: config.json's architectures do not "
            f"name {ARCHITECTURE}; load it with model.Mixtral"
        )
    return config.labels

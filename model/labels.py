"""What a sequence classifier's scores are about: its labels, its last token, its probabilities.

Plain Python, so that the ingress needs no torch for it.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from model.errors import ConfigError

ARCHITECTURE = "MixtralForSequenceClassification"
"""What config.json's `architectures` says of a checkpoint with a score head."""

PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")
"""What a score head may have been trained for, as transformers spells it."""

_DEFAULT_NUM_LABELS = 2  # transformers' own, which it leaves out of config.json
_MAX_LABELS = 100_000
"""A damaged file must not fill memory with names."""


def read_labels(config: Mapping[str, Any]) -> tuple[str, ...] | None:
    """The labels by a `config.json`, in the order of their ids; None for a model that generates.

    Names come from id2label, else they are LABEL_0 and so on, num_labels of them.
    Raises ConfigError naming the field.
    """
    architectures = config.get("architectures")
    if not isinstance(architectures, list) or ARCHITECTURE not in architectures:
        return None
    id2label = config.get("id2label")
    if id2label is None:
        num_labels = config.get("num_labels")
        if num_labels is None:
            num_labels = _DEFAULT_NUM_LABELS
        if type(num_labels) is not int or not 1 <= num_labels <= _MAX_LABELS:
            raise ConfigError(
                f"num_labels must be a whole number between 1 and {_MAX_LABELS}, not {num_labels!r}"
            )
        return tuple(f"LABEL_{i}" for i in range(num_labels))
    names = {str(i): name for i, name in id2label.items()} if isinstance(id2label, dict) else {}
    if not names or names.keys() != {str(i) for i in range(len(names))}:
        raise ConfigError(f"id2label must name the labels 0, 1, ..., not {str(id2label)[:200]}")
    return tuple(str(names[str(i)]) for i in range(len(names)))


def trim_padding(token_ids: Sequence[int], pad_token_id: int | None) -> Sequence[int]:
    """The ids without padding at their end; the first id stays whatever it is."""
    length = len(token_ids)
    while length > 1 and token_ids[length - 1] == pad_token_id:
        length -= 1
    return token_ids[:length]


def probabilities(logits: Sequence[float], problem_type: str | None) -> list[float]:
    """How likely each label is. A regression's logits are its answer, and come as they are.

    Labels that do not exclude each other, and one alone, are judged each by itself (sigmoid);
    otherwise they share a probability of 1 (softmax).
    """
    if problem_type == "regression":
        return list(logits)
    if problem_type == "multi_label_classification" or len(logits) == 1:
        return [_sigmoid(logit) for logit in logits]
    highest = max(logits)
    weights = [math.exp(logit - highest) for logit in logits]
    total = sum(weights)
    return [weight / total for weight in weights]


def _sigmoid(logit: float) -> float:
    """1 / (1 + exp(-logit)), without overflow."""
    shrunk = math.exp(-abs(logit))
    return (1.0 if logit >= 0 else shrunk) / (1.0 + shrunk)

"""A classifier's logits are transformers', and its labels those of config.json."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from model import Mixtral
from model.classify import Classifier
from model.config import MixtralConfig
from model.errors import CheckpointError, ConfigError, PromptError
from model.quantized_copy import save_quantized
from model.weights import Checkpoint
from tests.fakes import small_config
from tests.reference import pad_left, save_reference

LABELS = {0: "bad", 1: "so-so", 2: "good"}
TOLERANCE = 1e-5
"""Of float32 logits of up to 4; measured: 7e-7."""
PAD = 0
SEQUENCES = [[1, 5, 9, 7, 3], [1, 4], [1, 8, 8, 2, 6, 7, 23, 11, 12]]


def save_classifier(folder: Path, **changes: Any) -> Any:
    """A random classifier of transformers', saved there."""
    config = small_config(pad_token_id=PAD, id2label=LABELS, num_hidden_layers=2) | changes
    return save_reference(folder, config, kind="MixtralForSequenceClassification")


def padded(*, left: bool) -> tuple[torch.Tensor, torch.Tensor]:
    ids, mask = pad_left([own if left else own[::-1] for own in SEQUENCES], PAD)
    return (ids, mask) if left else (ids.flip(1), mask.flip(1))


def assert_same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= TOLERANCE


@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
@pytest.mark.parametrize(
    "changes",
    [{}, {"tie_word_embeddings": True}, {"sliding_window": 3, "num_experts_per_tok": 1}],
    ids=str,
)
def test_logits_and_labels_equal_transformers(
    tmp_path: Path, left: bool, changes: dict[str, Any]
) -> None:
    reference = save_classifier(tmp_path, **changes)
    ids, mask = padded(left=left)
    with torch.inference_mode():
        expected = reference(ids, attention_mask=mask).logits
    classifier = Classifier.load(tmp_path)

    for result in (
        classifier.classify(SEQUENCES),
        classifier.classify(ids, attention_mask=mask),
    ):
        assert_same(result.logits_SC, expected)
        assert list(result.labels) == [LABELS[int(i)] for i in expected.argmax(-1)]


def test_a_quantised_copy_classifies_too(tmp_path: Path) -> None:
    source, copy = tmp_path / "source", tmp_path / "copy"
    save_classifier(source)
    save_quantized(Checkpoint(source), copy, "int8")
    logits_SC = Classifier.load(source).classify(SEQUENCES).logits_SC
    quantised_SC = Classifier.load(copy).classify(SEQUENCES).logits_SC
    assert 0 < (quantised_SC - logits_SC).abs().max() < 0.1
    assert MixtralConfig.from_folder(copy) == MixtralConfig.from_folder(source)


def test_padding_at_the_end_needs_no_mask(tmp_path: Path) -> None:
    save_classifier(tmp_path)
    classifier = Classifier.load(tmp_path)
    ids, _ = padded(left=False)
    assert_same(classifier.classify(ids).logits_SC, classifier.classify(SEQUENCES).logits_SC)


def test_a_text_is_classified_as_its_ids(tmp_path: Path, tiny_folder: Path) -> None:
    save_classifier(tmp_path, vocab_size=2_048)
    (tmp_path / "tokenizer.model").write_bytes((tiny_folder / "tokenizer.model").read_bytes())
    classifier = Classifier.load(tmp_path, dtype="float32")
    assert classifier.tokenizer
    texts = ["The cat saw a tree.", "Tom"]
    ids = [classifier.tokenizer.encode_prompt(text) for text in texts]
    assert classifier.classify(texts).logits_SC.equal(classifier.classify(ids).logits_SC)


def test_labels_without_names_are_numbered_as_transformers_does(tmp_path: Path) -> None:
    save_classifier(tmp_path, id2label={0: "LABEL_0", 1: "LABEL_1"})
    assert "id2label" not in json.loads((tmp_path / "config.json").read_text())
    assert Classifier.load(tmp_path).labels == ("LABEL_0", "LABEL_1")


def test_what_cannot_be_classified_is_refused(tmp_path: Path) -> None:
    save_classifier(tmp_path)
    classifier = Classifier.load(tmp_path)
    assert classifier.classify([]).labels == ()
    with pytest.raises(PromptError, match="no tokenizer"):
        classifier.classify(["Tom"])
    with pytest.raises(PromptError, match="a list of texts"):
        classifier.classify("Tom")
    with pytest.raises(PromptError, match="token id 24"):
        classifier.classify([[1, 24]])
    with pytest.raises(PromptError, match="holds no tokens"):
        classifier.classify([[1], []])


def test_a_checkpoint_without_a_fitting_score_head_is_refused(
    tmp_path: Path, tiny_folder: Path
) -> None:
    with pytest.raises(ConfigError, match="no score head"):
        Classifier.load(tiny_folder)
    with pytest.raises(ConfigError, match="does not exist"):
        Classifier.load(tmp_path)
    save_classifier(tmp_path)
    with pytest.raises(ConfigError, match="sequence classifier"):
        Mixtral.load(tmp_path)
    config_file = tmp_path / "config.json"
    config = json.loads(config_file.read_text())
    config_file.write_text(json.dumps(config | {"id2label": {"0": "bad", "1": "good"}}))
    with pytest.raises(CheckpointError, match=r"score.weight has shape \(3, 16\)"):
        Classifier.load(tmp_path)
    config_file.write_text(json.dumps(config | {"id2label": {"1": "bad", "2": "good"}}))
    with pytest.raises(ConfigError, match="id2label"):
        Classifier.load(tmp_path)

"""A classifier behind the whole service: its scores are the library's, over two workers."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import torch
from safetensors.torch import load_file, save_file

from cluster.client import Client
from cluster.errors import BadRequestError
from model import TINY
from model.classify import Classifier
from tests.integration.conftest import Service

LABELS = ("bad", "so-so", "good")
TOLERANCE = 1e-5
"""Of float32 logits of about 1."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint with a random score head in place of its LM head."""
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny-classifier"
    shutil.copytree(TINY, folder)
    tensors = load_file(folder / "model.safetensors")
    hidden_size = tensors.pop("lm_head.weight").shape[1]
    score_CD = torch.randn(len(LABELS), hidden_size, generator=torch.Generator().manual_seed(0))
    tensors["score.weight"] = score_CD * hidden_size**-0.5
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "architectures": ["MixtralForSequenceClassification"],
        "id2label": dict(enumerate(LABELS)),
        "pad_token_id": 0,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def classifying(folder: Path) -> Iterator[Service]:
    service = Service.start("--model", str(folder), "--dtype", "float32", "--workers", "2")
    try:
        yield service
    finally:
        service.stop()


def test_a_classifier_is_served_as_the_library_computes_it(
    classifying: Service, folder: Path, stories: list[str]
) -> None:
    """One service for all of it: starting one takes seconds."""
    library = Classifier.load(folder, dtype="float32")
    texts = [story[:length] for story, length in zip(stories, (5, 300, 40, 900), strict=False)]
    expected = library.classify(texts)
    with classifying.client() as client:
        assert_ready(client)
        raw = client.classify(input=texts, use_activation=False)
        logits_SC = torch.tensor([result.probs for result in raw.data])
        assert (logits_SC - expected.logits_SC).abs().max() <= TOLERANCE
        reply = client.classify(input=texts, model="tiny-classifier")
        probs_SC = torch.tensor([result.probs for result in reply.data])
        assert (probs_SC - expected.logits_SC.softmax(-1)).abs().max() <= TOLERANCE
        assert [result.label for result in reply.data] == list(expected.labels)
        ids = [library.tokenizer.encode_prompt(text) for text in texts]  # type: ignore[union-attr]
        padded = [[*own, 0, 0] for own in ids]
        again = client.classify(input=padded, use_activation=False)
        again_SC = torch.tensor([result.probs for result in again.data])
        assert (again_SC - expected.logits_SC).abs().max() <= TOLERANCE
        assert again.usage.prompt_tokens == sum(len(own) for own in ids)
        with pytest.raises(BadRequestError, match="use /v1/classify"):
            client.completions.create(prompt="a")
    refused = httpx.post(
        f"{classifying.url}/v1/chat/completions",
        json={"messages": [{"role": "user", "content": "a"}], "stream": True},
        timeout=60,
    )
    assert refused.status_code == 400
    assert refused.headers["content-type"] == "application/json"
    classic = httpx.post(f"{classifying.url}/classify", json={"input": texts[0]}, timeout=60)
    assert classic.json()["data"][0]["label"] == expected.labels[0]


def assert_ready(client: Client) -> None:
    """Only once every expert has computed for the probe; both workers hold half of them."""
    readiness = client.cluster.status()
    assert readiness.ready
    assert [worker.num_experts for worker in readiness.workers] == [24, 24]

"""What several tests share: the tiny checkpoint, loaded once, and the oracle beside it."""

import json
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from model import TINY, Mixtral
from model.tokenizer import Tokenizer
from tests.oracle import Oracle

torch.set_num_threads(1)  # tests share few cores, and sums then run in one order

# no deadline: a shared machine stalls now and then, and a slow example is not a wrong one;
# the same examples every time, so that a red run is its change's fault
settings.register_profile("maestrale", deadline=None, max_examples=25, derandomize=True)
settings.load_profile("maestrale")


@pytest.fixture(scope="session")
def tiny_folder() -> Path:
    """The embedded checkpoint."""
    return TINY


@pytest.fixture(scope="session")
def mixtral(tiny_folder: Path) -> Mixtral:
    """The embedded checkpoint in float32, where token ids can be compared."""
    return Mixtral.load(tiny_folder, dtype="float32")


@pytest.fixture(scope="session")
def oracle(tiny_folder: Path) -> Oracle:
    return Oracle.from_folder(tiny_folder)


@pytest.fixture(scope="session")
def stories() -> list[str]:
    """The held-out stories: text like the tiny checkpoint's training text, never trained on."""
    file = Path(__file__).parent / "data" / "heldout.jsonl"
    return [json.loads(line)["text"] for line in file.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="session")
def mixtral_tokenizer_file() -> Path:
    """The tokenizer of Mistral's own Mixtral-8x7B, as mistral-common ships it."""
    return Path(str(files("mistral_common") / "data" / "tokenizer.model.v1"))


@pytest.fixture(scope="session")
def mixtral_tokenizer(mixtral_tokenizer_file: Path) -> Tokenizer:
    return Tokenizer(mixtral_tokenizer_file)

"""A folder is itself, an id is fetched once in its best form, and every failure says what to do."""

import fnmatch
import sys
from pathlib import Path
from typing import Any

import httpx
import huggingface_hub
import pytest
from huggingface_hub import errors

from model.errors import CheckpointError
from model.hub import resolve


class FakeHub:
    """A repository with these files: stands in for huggingface_hub.snapshot_download."""

    def __init__(self, cache: Path, files: list[str]) -> None:
        self.cache = cache
        self.files = files
        self.fetched: list[str] = []

    def __call__(self, repo_id: str, *, allow_patterns: list[str]) -> str:
        for file in self.files:
            wanted = any(fnmatch.fnmatch(file, pattern) for pattern in allow_patterns)
            if wanted and not (self.cache / file).exists():
                (self.cache / file).parent.mkdir(exist_ok=True)
                (self.cache / file).touch()
                self.fetched.append(file)
        return str(self.cache)


def fail_with(error: Exception) -> Any:
    def download(repo_id: str, **options: Any) -> str:
        raise error

    return download


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeHub:
    fake = FakeHub(tmp_path, [])
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake)
    return fake


def test_a_folder_is_itself_also_where_its_path_looks_like_an_id(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.files = ["model.safetensors"]
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve("org/name") == Path("org/name")
    assert resolve(tmp_path / "org") == tmp_path / "org"
    assert hub.fetched == []


def test_a_home_folder_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mixtral").mkdir()
    assert resolve("~/mixtral") == tmp_path / "mixtral"


def test_only_files_that_are_read_are_fetched(hub: FakeHub, tmp_path: Path) -> None:
    read = [
        "additional_chat_templates/tool_use.jinja",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
    ]
    others = ["README.md", "consolidated.00.pt", "consolidated.safetensors", "pytorch_model.bin"]
    hub.files = [*read, *others, "run.py"]
    assert resolve("org/name") == tmp_path
    assert sorted(hub.fetched) == read


def test_a_quantised_copy_is_fetched_whole(hub: FakeHub) -> None:
    hub.files = [
        "attention-000.safetensors",
        "config.json",
        "experts-000-000.safetensors",
        "model-000.safetensors",
        "quantization.json",
    ]
    resolve("org/name")
    assert sorted(hub.fetched) == hub.files


@pytest.mark.parametrize(
    ("files", "taken"),
    [
        (["consolidated.00.pt", "consolidated.safetensors"], "consolidated.safetensors"),
        (["consolidated.00.pt"], "consolidated.00.pt"),
    ],
)
def test_a_release_without_hugging_faces_files_is_fetched_in_its_best_form(
    hub: FakeHub, files: list[str], taken: str
) -> None:
    hub.files = ["params.json", *files]
    resolve("org/name")
    assert hub.fetched == ["params.json", taken]


def test_a_repository_without_weights_is_refused(hub: FakeHub) -> None:
    hub.files = ["config.json", "pytorch_model.bin"]
    with pytest.raises(CheckpointError, match=r"org/name .*holds no weights"):
        resolve("org/name")


@pytest.mark.parametrize(
    "name", ["mixtral", "/no/such/folder", "a/b/c", "../name", "org/", "./name", "org/na me"]
)
def test_what_is_neither_folder_nor_id_is_refused_without_the_network(
    hub: FakeHub, name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="neither a folder nor"):
        resolve(name)
    assert hub.fetched == []


RESPONSE = httpx.Response(404, request=httpx.Request("GET", "https://hub.invalid/org/name"))


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (errors.OfflineModeIsEnabled("offline"), "HF_HUB_OFFLINE"),
        (errors.LocalEntryNotFoundError("nothing cached"), "give the path of a folder"),
        (errors.GatedRepoError("gated", response=RESPONSE), "accept their terms"),
        (errors.RepositoryNotFoundError("404", response=RESPONSE), "no such model"),
        (errors.HfHubHTTPError("503", response=RESPONSE), "try again"),
        (OSError(28, "No space left on device"), "No space left"),
        (ConnectionError("reset"), "try again"),
        (RuntimeError("a bug of theirs"), "a bug of theirs"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_every_failure_says_what_was_tried_and_what_to_do(
    monkeypatch: pytest.MonkeyPatch, error: Exception, advice: str
) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail_with(error))
    with pytest.raises(CheckpointError, match=rf"org/name is no folder.*Hub.*{advice}"):
        resolve("org/name")


def test_without_the_library_a_hub_id_is_refused_by_its_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(CheckpointError, match="package huggingface_hub is needed"):
        resolve("org/name")

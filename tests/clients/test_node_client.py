"""OpenAI's client for Node, unchanged, against `maestrale serve`."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.integration.conftest import Service

PACKAGE = "openai@^6"
SCRIPT = Path(__file__).with_name("openai_client.mjs")


@pytest.fixture(scope="module")
def found(service: Service, tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """What the client's script has seen."""
    if shutil.which("npm") is None:
        pytest.skip("npm is missing: install Node.js to try OpenAI's client for it")
    folder = tmp_path_factory.mktemp("node")
    npm = ["npm", "install", "--silent", "--no-audit", "--no-fund", "--prefix", str(folder)]
    subprocess.run([*npm, PACKAGE], check=True, timeout=300)
    script = folder / SCRIPT.name
    script.write_bytes(SCRIPT.read_bytes())  # beside node_modules, where imports are looked for
    ran = subprocess.run(
        ["node", str(script), f"{service.url}/v1"],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)  # type: ignore[no-any-return]


def test_node_lists_and_finds_models(found: dict[str, object]) -> None:
    assert found["models"] == ["tiny-mixtral"]
    assert found["missing"] == [404, "NotFoundError"]


def test_node_completes(found: dict[str, object]) -> None:
    assert found["completion"] == found["streamedCompletion"]
    assert found["tokens"] == 20


def test_node_chats(found: dict[str, object]) -> None:
    assert found["chat"] == found["streamedChat"] == found["response"] == "A cow says moo."
    assert found["usage"] == found["streamedUsage"]


def test_node_gets_the_form_that_it_asks_for(found: dict[str, object]) -> None:
    assert json.loads(str(found["form"])) == {"animal": "cow"}


def test_node_sees_an_error_as_its_own(found: dict[str, object]) -> None:
    assert found["invalid"] == [400, "BadRequestError", "temperature"]


def test_node_can_abort_a_stream(found: dict[str, object]) -> None:
    assert found["aborted"] is True

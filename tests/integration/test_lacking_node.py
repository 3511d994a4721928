"""A node that lacks the model's folder serves from one that has it, on a real Ray."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from model import TINY, Mixtral
from tests.integration.lacking_node import MAX_TOKENS, MODEL, PROMPT


def test_heads_and_workers_need_no_folder_on_their_node(tmp_path: Path, mixtral: Mixtral) -> None:
    having, lacking = tmp_path / "having", tmp_path / "lacking"
    having.mkdir()
    lacking.mkdir()
    shutil.copytree(TINY, having / MODEL.name)
    ended = subprocess.run(
        [sys.executable, "-m", "tests.integration.lacking_node", str(lacking)],
        env=os.environ | {"HOME": str(having)},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-8000:]
    told = json.loads(ended.stdout.splitlines()[-1])
    assert told["text"] == mixtral.generate(PROMPT, max_tokens=MAX_TOKENS)
    assert told["loaded"].keys() == {"lender"}
    copied = {path.name for path in (lacking / ".cache" / "maestrale").rglob("*")}
    assert "config.json" in copied
    assert "model.safetensors" not in copied

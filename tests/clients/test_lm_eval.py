"""EleutherAI's harness gets the same log-likelihoods over HTTP as from transformers in process."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

from model import TINY
from tests.integration.conftest import Service

NUM_STORIES = 12
TASK = """
task: stories
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: loglikelihood
doc_to_text: "{{{{beginning}}}}"
doc_to_target: "{{{{ending}}}}"
target_delimiter: ""
metric_list:
  - metric: perplexity
    aggregation: perplexity
    higher_is_better: false
"""


def test_log_likelihoods_over_http_are_those_of_transformers(
    service: Service, stories: list[str], tmp_path: Path
) -> None:
    documents = []
    for story in stories[:NUM_STORIES]:
        half = story.index(" ", len(story) // 2)
        documents.append({"beginning": story[:half], "ending": story[half:]})
    file = tmp_path / "stories.jsonl"
    file.write_text("".join(json.dumps(each) + "\n" for each in documents))
    (tmp_path / "stories.yaml").write_text(TASK.format(file=file))
    over_http = likelihoods(
        tmp_path,
        "local-completions",
        f"model=tiny-mixtral,base_url={service.url}/v1/completions,tokenizer={TINY},"
        "tokenizer_backend=huggingface,tokenized_requests=True,num_concurrent=4,max_length=1024",
    )
    in_process = likelihoods(tmp_path, "hf", f"pretrained={TINY},dtype=float32,add_bos_token=False")
    assert len(over_http) == NUM_STORIES
    for ours, theirs in zip(over_http, in_process, strict=True):
        assert math.isclose(ours, theirs, abs_tol=1e-3), (over_http, in_process)


def likelihoods(folder: Path, model: str, arguments: str) -> list[float]:
    """What the harness finds for each document, in their order."""
    output = folder / model
    command = [sys.executable, "-m", "lm_eval", "run", "--model", model]
    command += ["--model_args", arguments, "--tasks", "stories", "--include_path", str(folder)]
    command += [
        "--device",
        "cpu",
        "--batch_size",
        "1",
        "--log_samples",
        "--output_path",
        str(output),
    ]
    environ = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder / "cache")}
    found = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr[-3_000:]
    (samples,) = output.rglob("samples_stories_*.jsonl")
    rows = [json.loads(line) for line in samples.read_text().splitlines()]
    rows.sort(key=lambda row: row["doc_id"])
    return [float(row["resps"][0][0][0]) for row in rows]

"""A program: serve on two nodes of which one lacks the model's folder; print what was told.

The folder is named by `~`, and each node has a home of its own. Head and workers are where the
folder is not. Prints JSON.
"""

import json
import sys
from pathlib import Path

from ray.cluster_utils import Cluster

from cluster.app import running
from cluster.config import ServeConfig

MODEL = Path("~/model")
PROMPT, MAX_TOKENS = "Once upon a time", 30


def main(lacking_home: str) -> None:
    """HOME is that of the node that has the folder."""
    node = {"include_dashboard": False, "object_store_memory": 100_000_000}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 4, **node})
    cluster.add_node(num_cpus=4, resources={"lacking": 10}, env_vars={"HOME": lacking_home}, **node)
    config = ServeConfig(
        model=MODEL,
        dtype="float32",
        worker_resources={"lacking": 1},
        head_resources={"lacking": 1},
    )
    try:
        with running(config, port=0, address=cluster.address) as client:
            reply = client.completions.create(prompt=PROMPT, max_tokens=MAX_TOKENS, temperature=0)
            loaded = {
                sample.labels["source"]: sample.value
                for sample in client.cluster.metrics()
                if sample.name == "maestrale_expert_loaded_bytes_total"
            }
            status = client.cluster.status()
    finally:
        cluster.shutdown()
    told = {
        "text": reply.choices[0].text,
        "loaded": loaded,
        "held": sum(worker.num_bytes for worker in status.workers),
    }
    json.dump(told, sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1])

"""A program: serve with two heads, let Serve stop one under streams, print what was told as JSON.

Of its own, since it must be the process that started Ray to reach the replica as Serve does.
"""

import json
import sys

import ray
from ray.util import list_named_actors

from cluster.app import running
from cluster.config import ServeConfig
from tests.integration.test_service import until
from tests.streams import prompts, tell_all


def main(num_streams: int, max_tokens: int) -> None:
    config = ServeConfig(dtype="float32", num_heads=2)
    with running(config, port=0) as client:
        until(lambda: client.cluster.status().heads_ready == 2, "the second head", timeout_s=120)
        name = next(
            actor["name"]
            for actor in list_named_actors(all_namespaces=True)
            if "#HeadReplica#" in actor["name"]
        )
        replica = ray.get_actor(name, namespace="serve")
        stopped = []

        def stop_one() -> None:
            # what Serve's own controller calls when it takes a replica away
            stopped.append(replica.perform_graceful_shutdown.remote())

        after = 20 * num_streams
        stories = tell_all(client, prompts(num_streams), max_tokens, stop_one, after)
        ray.get(stopped)
        until(lambda: client.cluster.status().heads_ready == 1, "the head to go")
        replays = {
            sample.labels["cause"]: sample.value
            for sample in client.cluster.metrics()
            if sample.name == "maestrale_replays_total"
        }
    json.dump({"texts": [story.text for story in stories], "replays": replays}, sys.stdout)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))

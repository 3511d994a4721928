"""A program: serve with two heads, do under streams what an operator does, print what was told.

Two changed files are deployed, the second with other settings of workers; workers come and go by
settings that change; then Serve stops a head. A program of its own, since it must be the process
that started Ray to reach replicas as Serve does. Prints JSON.
"""

import json
import sys
from functools import partial

import ray
from ray import serve
from ray.serve.schema import ApplicationStatus
from ray.util import list_named_actors

from cluster.app import APP_NAME, build, running
from cluster.config import ServeConfig
from tests.integration.test_service import until
from tests.streams import prompts, tell_all


def main(num_streams: int, max_tokens: int) -> None:
    config = ServeConfig(dtype="float32", num_heads=2)
    with running(config, port=0) as client:
        until(lambda: client.cluster.status().heads_ready == 2, "the second head", timeout_s=120)
        after = 20 * num_streams
        texts = {}
        old = {worker.address for worker in client.cluster.status().workers}
        changed = config.model_copy(update={"max_running_sequences": 32})
        of_workers = changed.model_copy(update={"lease_s": 45.0})

        def deploy(config: ServeConfig) -> None:
            # what `serve deploy` of a file with other `args` does: every replica is replaced
            target = serve.RunTarget(target=build(config), name=APP_NAME, route_prefix="/")
            serve.run_many(
                [target],
                wait_for_ingress_deployment_creation=False,
                wait_for_applications_running=False,
            )

        def is_deployed() -> bool:
            status = serve.status().applications[APP_NAME].status
            return status == ApplicationStatus.RUNNING and client.cluster.status().heads_ready == 2

        def are_workers_new() -> bool:
            addresses = {worker.address for worker in client.cluster.status().workers}
            return len(addresses - old) == config.num_workers

        for when, disturb in (
            ("a file deployed", partial(deploy, changed)),
            ("while it is", lambda: None),
        ):
            stories = tell_all(client, prompts(num_streams), max_tokens, disturb, after)
            texts[when] = [story.text for story in stories]
        until(is_deployed, "all replicas of the changed file", timeout_s=120)
        kept = {worker.address for worker in client.cluster.status().workers} == old
        stories = tell_all(
            client, prompts(num_streams), max_tokens, partial(deploy, of_workers), after
        )
        texts["a file for other workers"] = [story.text for story in stories]
        until(are_workers_new, "both workers' successors", timeout_s=120)
        until(is_deployed, "all replicas of that file", timeout_s=120)

        name = next(
            actor["name"]
            for actor in list_named_actors(all_namespaces=True)
            if "#HeadReplica#" in actor["name"]
        )
        replica = ray.get_actor(name, namespace="serve")
        controller = serve.get_deployment_handle("Controller", APP_NAME)
        for num_workers in (3, 1):

            def change(num_workers: int = num_workers) -> None:
                # what Serve does with the `user_config` of a file that is deployed
                controller.reconfigure.remote({"num_workers": num_workers})

            stories = tell_all(client, prompts(num_streams), max_tokens, change, after)
            texts[f"{num_workers} workers"] = [story.text for story in stories]
            until(
                lambda wanted=num_workers: len(client.cluster.status().workers) == wanted,
                f"{num_workers} workers",
                timeout_s=60,
            )
        controller.reconfigure.remote({"dtype": "bfloat16"})
        until(lambda: client.cluster.status().error is not None, "the refusal")
        refusal = client.cluster.status().error
        stopped = []

        def stop_one() -> None:
            # what Serve's own controller calls when it takes a replica away
            stopped.append(replica.perform_graceful_shutdown.remote())

        stories = tell_all(client, prompts(num_streams), max_tokens, stop_one, after)
        texts["a head stopped"] = [story.text for story in stories]
        ray.get(stopped)
        until(lambda: client.cluster.status().heads_ready == 1, "the head to go")
        replays = {
            sample.labels["cause"]: sample.value
            for sample in client.cluster.metrics()
            if sample.name == "maestrale_replays_total"
        }
    told = {
        "texts": texts,
        "replays": replays,
        "refusal": refusal,
        "are_workers_kept": kept,
    }
    json.dump(told, sys.stdout)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))

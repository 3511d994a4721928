"""The end of a service: no worker stays, whatever becomes of the others meanwhile."""

import pytest

from cluster import app
from cluster.actors import NAMESPACE


def test_a_worker_that_ends_by_itself_after_all_does_not_save_the_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    names = [f"{app.APP_NAME}-worker-{index}" for index in range(2)]
    listed = [{"namespace": NAMESPACE, "name": name} for name in names]
    killed: list[str] = []

    def get_actor(name: str, namespace: str) -> str:
        if name == names[0]:
            raise ValueError(f"no actor {name} in {namespace}")
        return name

    monkeypatch.setattr(app, "RELEASE_TIMEOUT_S", 0.0)
    monkeypatch.setattr(app, "list_named_actors", lambda all_namespaces: listed)
    monkeypatch.setattr("ray.serve.delete", lambda name: None)
    monkeypatch.setattr("ray.get_actor", get_actor)
    monkeypatch.setattr("ray.kill", killed.append)
    app._stop_serving()
    assert killed == names[1:]

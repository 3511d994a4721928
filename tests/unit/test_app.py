"""The start and the end of a service: what cannot work is refused, and no worker stays."""

import pytest

from cluster import actors, app, rpc
from cluster.actors import NAMESPACE
from cluster.config import ServeConfig
from cluster.errors import ConfigurationError
from model import TINY
from model.config import MixtralConfig


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
    monkeypatch.setattr(actors, "list_named_actors", lambda all_namespaces: listed)
    monkeypatch.setattr("ray.serve.delete", lambda name: None)
    monkeypatch.setattr("ray.get_actor", get_actor)
    monkeypatch.setattr("ray.kill", killed.append)
    app._stop_serving()
    assert killed == names[1:]


def test_a_step_that_fits_no_message_is_refused_before_anything_starts() -> None:
    most = rpc.max_step_tokens(MixtralConfig.from_folder(TINY))
    app.check_checkpoint(ServeConfig(max_tokens_per_step=most))
    with pytest.raises(
        ConfigurationError, match=f"max_tokens_per_step {most + 1} exceeds the {most} tokens"
    ):
        app.check_checkpoint(ServeConfig(max_tokens_per_step=most + 1))

"""A head replica's threads, one by one: no Serve, no Ray."""

from types import SimpleNamespace
from typing import Any

import pytest

from cluster.follow import HeadReport
from cluster.head.replica import HeadReplica


@pytest.mark.parametrize("kind", [RuntimeError, BaseException])
def test_whatever_ends_the_engine_is_reported(kind: type[BaseException]) -> None:
    """What a library in Rust raises when it panics is no Exception."""
    said: list[HeadReport] = []

    def serve() -> None:
        raise kind("out of bounds")

    replica: Any = SimpleNamespace(_name="head", _serve=serve, _say=said.append)
    HeadReplica._run(replica)
    assert said == [HeadReport("head", error=f"{kind.__name__}: out of bounds")]
    replica._report = said[0]
    with pytest.raises(RuntimeError, match="out of bounds"):
        HeadReplica.check_health(replica)

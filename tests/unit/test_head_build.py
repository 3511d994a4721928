"""How an engine is put together from a configuration."""

import logging

import pytest

from cluster.config import ServeConfig
from cluster.head.build import new_engine
from cluster.metrics import HeadMetrics
from model import Mixtral


@pytest.mark.parametrize(("kv_cache_bytes", "warns"), [(1, True), (2**30, False)])
def test_a_cache_that_holds_less_than_a_request_may_have_is_warned_of(
    mixtral: Mixtral, caplog: pytest.LogCaptureFixture, kv_cache_bytes: int, warns: bool
) -> None:
    config = ServeConfig(kv_cache_bytes=kv_cache_bytes, max_running_sequences=1, max_model_len=64)
    with caplog.at_level(logging.WARNING, "cluster.head.build"):
        new_engine(config, mixtral.decoder, mixtral.experts, HeadMetrics())
    warned = f"may have 64 tokens, but the KV cache holds {config.block_size}" in caplog.text
    assert warned == warns

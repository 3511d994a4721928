"""A request may be as long as the model and the KV cache take, and whoever asks learns it."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.config import GIB, ServeConfig
from cluster.context import context_of
from cluster.errors import ConfigurationError
from cluster.head.build import new_engine
from cluster.head.sequence import Sequence
from cluster.metrics import HeadMetrics
from model import Mixtral
from model.config import MixtralConfig
from model.sampling_params import SamplingParams
from tests.cluster_fakes import MemoryOutbox

MIXTRAL_8X7B = MixtralConfig(max_position_embeddings=32_768)


def test_what_the_cache_holds_bounds_the_context_that_is_left_out() -> None:
    assert context_of(ServeConfig(), MIXTRAL_8X7B) == GIB // (128 * 1024)  # 128 KiB a token
    assert context_of(ServeConfig(kv_cache_bytes=4 * GIB), MIXTRAL_8X7B) == 32_768
    assert context_of(ServeConfig(kv_cache_bytes=None), MIXTRAL_8X7B) == 32_768
    assert context_of(ServeConfig(dtype="float32"), MIXTRAL_8X7B) == 4_096


def test_a_sliding_window_needs_no_more_than_it_sees() -> None:
    windowed = replace(MIXTRAL_8X7B, sliding_window=4_096)
    assert context_of(ServeConfig(), windowed) == 32_768


@pytest.mark.parametrize(
    ("fields", "what"),
    [
        ({"max_model_len": 16_384}, r"16384 tokens needs 2,147,483,648 bytes.* room for 8192"),
        ({"kv_cache_bytes": 1}, "room for 0 tokens"),
        ({"max_model_len": 32_769}, "exceeds the model's 32768 positions"),
    ],
)
def test_what_cannot_be_served_is_refused_with_the_numbers(
    fields: dict[str, int], what: str
) -> None:
    with pytest.raises(ConfigurationError, match=what):
        context_of(ServeConfig(**fields), MIXTRAL_8X7B)  # type: ignore[arg-type]


@given(num_blocks=st.integers(2, 40), num_prompt=st.integers(1, 30))
def test_whoever_asks_for_all_that_is_left_gets_it(
    mixtral: Mixtral, num_blocks: int, num_prompt: int
) -> None:
    """The head takes it: it fits into the cache that is there."""
    token_bytes = mixtral.config.kv_bytes_per_token(4)
    config = ServeConfig(dtype="float32", kv_cache_bytes=num_blocks * 16 * token_bytes)
    context = context_of(config, mixtral.config)
    engine = new_engine(config, mixtral.decoder, mixtral.experts, HeadMetrics())
    params = SamplingParams(max_tokens=context - num_prompt, temperature=0.0)
    outbox = MemoryOutbox(lambda event: engine.stop())
    engine.submit(outbox, 0, Sequence([300] * num_prompt, params))
    engine.run()
    assert outbox.events[0].error is None
    assert outbox.events[0].token_ids

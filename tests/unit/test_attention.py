"""All attention backends agree, and a sliding window needs no more blocks than it can see."""

import random
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from cluster.head.scheduler import Scheduler
from cluster.head.sequence import Sequence
from model.attention import attention_backend
from model.batch import Span, build_batch
from model.blocks import BlockPool, BlockTable, blocks_of_sequence
from model.config import MixtralConfig
from model.decoder import Decoder
from model.errors import ConfigError
from model.experts import LocalExperts
from model.kv_cache import KVCache
from model.sampling_params import SamplingParams
from model.weights import Checkpoint
from tests.fakes import random_tensors, small_config, write_checkpoint
from tests.oracle import Oracle

CPU = torch.device("cpu")
CONFIG = MixtralConfig(
    vocab_size=8,
    hidden_size=32,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    dtype="float32",
)


def varlen_by_hand(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ends_q: Tensor,
    ends_k: Tensor,
    longest_q: int,
    longest_k: int,
    *,
    causal: bool,
    window_size: tuple[int, int],
) -> Tensor:
    """What flash-attn's documentation says of flash_attn_varlen_func, sequence by sequence."""
    assert causal
    assert ends_q.dtype == ends_k.dtype == torch.int32
    lengths_q, lengths_k = ends_q.diff(), ends_k.diff()
    assert (int(lengths_q.max()), int(lengths_k.max())) == (longest_q, longest_k)
    assert (int(ends_q[-1]), int(ends_k[-1])) == (q.shape[0], k.shape[0])
    outputs = []
    for index in range(len(lengths_q)):
        own_q = q[ends_q[index] : ends_q[index + 1]].transpose(0, 1)
        own_k = k[ends_k[index] : ends_k[index + 1]].transpose(0, 1)
        own_v = v[ends_k[index] : ends_k[index + 1]].transpose(0, 1)
        num_q, num_k = own_q.shape[1], own_k.shape[1]
        distance = torch.arange(num_q)[:, None] + num_k - num_q - torch.arange(num_k)
        mask = distance >= 0
        if window_size[0] >= 0:
            mask &= distance <= window_size[0]
        outputs.append(
            torch.nn.functional.scaled_dot_product_attention(
                own_q, own_k, own_v, attn_mask=mask, enable_gqa=True
            ).transpose(0, 1)
        )
    return torch.cat(outputs)


@pytest.fixture
def fake_flash(monkeypatch: pytest.MonkeyPatch) -> None:
    """flash-attn's kernel, written by hand for the CPU."""
    module: Any = ModuleType("flash_attn")
    module.flash_attn_varlen_func = varlen_by_hand
    monkeypatch.setitem(sys.modules, "flash_attn", module)


def scattered(seed: int, window: int | None) -> tuple[list[Span], KVCache]:
    """Spans of random lengths on shuffled blocks of a cache full of random keys and values."""
    rng = random.Random(seed)
    num_blocks, block_size = 40, 4
    free = rng.sample(range(num_blocks), num_blocks)
    spans = []
    for _ in range(rng.randint(1, 5)):
        num_new = rng.choice((1, 1, rng.randint(2, 9)))
        start = rng.randint(0, 20)
        first = 0 if window is None else max(0, start - window + 1) // block_size
        need = -(-(start + num_new) // block_size) - first
        blocks = [free.pop() for _ in range(need)]
        spans.append(Span([0] * num_new, start, blocks, first_block=first))
    cache = KVCache(
        CONFIG, num_blocks=num_blocks, block_size=block_size, dtype=torch.float32, device=CPU
    )
    generator = torch.Generator().manual_seed(seed)
    cache.keys[0].normal_(generator=generator)
    cache.values[0].normal_(generator=generator)
    return spans, cache


@pytest.mark.usefixtures("fake_flash")
@pytest.mark.parametrize("window", [None, 1, 3, 8])
@pytest.mark.parametrize("seed", range(6))
def test_all_backends_attend_as_the_formula_says(seed: int, window: int | None) -> None:
    spans, cache = scattered(seed, window)
    batch = build_batch(spans, block_size=cache.block_size, device=CPU)
    q_TNH = torch.randn(batch.num_tokens, 4, 8, generator=torch.Generator().manual_seed(seed))
    outputs = []
    for name in ("reference", "sdpa", "flash"):
        backend = attention_backend(name, window)
        outputs.append(backend.attend(q_TNH, backend.plan(batch), cache, 0))
    reference, sdpa, flash = outputs
    torch.testing.assert_close(sdpa, reference, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(flash, reference, atol=1e-5, rtol=1e-5)


def test_flash_without_its_package_says_what_to_install() -> None:
    with pytest.raises(ConfigError, match=r"maestrale\[cuda\]"):
        attention_backend("flash", None)


def test_an_unknown_backend_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="sdpa, reference, flash"):
        attention_backend("eager", None)


@given(
    block_size=st.integers(1, 8),
    window=st.integers(1, 30),
    max_new=st.integers(1, 20),
    max_len=st.integers(1, 200),
    data=st.data(),
)
def test_a_sequence_never_holds_more_blocks_than_reckoned(
    block_size: int, window: int, max_new: int, max_len: int, data: st.DataObject
) -> None:
    start = data.draw(st.integers(0, max_len - 1))
    end = min(max_len, start + data.draw(st.integers(1, max_new)))
    first = max(0, start - window + 1)
    num_held = -(-end // block_size) - first // block_size
    most = blocks_of_sequence(max_len, block_size, window=window, max_new=max_new)
    assert num_held <= most <= -(-max_len // block_size)


@pytest.mark.parametrize("chunk", [1, 5, 16])
@pytest.mark.parametrize("attention", ["sdpa", "reference"])
def test_a_rolling_cache_computes_what_the_whole_one_does(
    tmp_path: Path, attention: str, chunk: int
) -> None:
    window, block_size, length = 7, 4, 60
    config = small_config(sliding_window=window, num_hidden_layers=2)
    tensors = random_tensors(config)
    write_checkpoint(tmp_path, config, tensors)
    checkpoint = Checkpoint(tmp_path)
    decoder = Decoder(checkpoint.config, checkpoint.load_decoder(), attention=attention)
    experts = LocalExperts(checkpoint.load_experts(checkpoint.config.expert_units))
    need = blocks_of_sequence(length, block_size, window=window, max_new=chunk)
    assert need * block_size < length
    cache = KVCache(
        checkpoint.config,
        num_blocks=need,
        block_size=block_size,
        dtype=torch.float32,
        device=CPU,
    )
    ids = [(7 * position) % config["vocab_size"] for position in range(length)]
    table = BlockTable(BlockPool(num_blocks=need, block_size=block_size))
    logits = []
    for start in range(0, length, chunk):
        new = ids[start : start + chunk]
        table.drop_before(start - window + 1)
        assert table.grow(start + len(new))
        span = Span(new, start, table.blocks, num_logits=len(new), first_block=table.first)
        batch = build_batch([span], block_size=block_size, device=CPU)
        logits.append(decoder.forward(batch, cache, experts))
    expected = Oracle(config, tensors).logits(ids)
    torch.testing.assert_close(torch.cat(logits), expected, atol=1e-4, rtol=1e-4)


def test_a_long_sequence_holds_no_more_blocks_than_its_window_needs() -> None:
    pool = BlockPool(num_blocks=10, block_size=4)
    scheduler = Scheduler(pool, max_running=4, max_tokens_per_step=8, sliding_window=16)
    sequence = Sequence(list(range(500)), SamplingParams(max_tokens=500))
    assert scheduler.can_ever_fit(sequence)
    scheduler.add(sequence)
    most = blocks_of_sequence(1_000, 4, window=16, max_new=8)
    assert most <= 7
    while sequence.num_emitted < 100:
        step = scheduler.schedule()
        assert len(sequence.table.blocks) <= most
        for chunk in step.chunks:
            if chunk.samples:
                sequence.append(7)
        scheduler.commit(step.chunks)

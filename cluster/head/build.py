"""Putting a head's engine together from a configuration: how large its cache is, what it can do."""

import logging

import torch

from cluster.config import ServeConfig
from cluster.context import context_of
from cluster.head.engine import Engine
from cluster.head.host_memory import free_host_bytes
from cluster.head.masks import GrammarMasks
from cluster.head.micro_batches import MicroBatches
from cluster.head.scheduler import Scheduler
from cluster.head.stopwatch import Stopwatch
from cluster.metrics import HeadMetrics
from model.blocks import BlockPool
from model.decoder import Decoder
from model.errors import ModelError
from model.experts import Experts
from model.grammar import GrammarCompiler
from model.tokenizer import Tokenizer
from model.weights import Checkpoint

logger = logging.getLogger(__name__)

_SHARE_OF_FREE_MEMORY = {"cpu": 0.25, "cuda": 0.9}
"""How much of the memory that is free the KV cache takes where no size is given. A machine's own
memory is also its workers' and other heads'; a GPU's is the head's alone."""


def new_engine(
    config: ServeConfig,
    decoder: Decoder,
    experts: Experts,
    metrics: HeadMetrics,
    grammars: GrammarCompiler | None = None,
    stopwatch: Stopwatch | None = None,
) -> Engine:
    """An engine with an empty KV cache. Logs how many tokens the cache holds.

    stopwatch: told of a step's phases by decoder and experts.
    """
    max_model_len = context_of(config, decoder.config)
    num_blocks = _num_blocks(config, decoder, max_model_len)
    cache = decoder.new_cache(num_blocks=num_blocks, block_size=config.block_size)
    logger.info("%s", cache)
    scheduler = Scheduler(
        BlockPool(num_blocks=num_blocks, block_size=config.block_size),
        max_running=config.max_running_sequences,
        max_tokens_per_step=config.max_tokens_per_step,
        sliding_window=decoder.config.sliding_window,
    )
    return Engine(
        decoder,
        cache,
        scheduler,
        experts,
        metrics,
        max_model_len=max_model_len,
        grammars=GrammarMasks(grammars) if grammars else None,
        stopwatch=stopwatch,
        micro_batches=MicroBatches(config.max_micro_batches) if stopwatch else None,
    )


def new_compiler(checkpoint: Checkpoint) -> GrammarCompiler | None:
    """What gives answers a form; None, with the reason logged, where this model cannot have one."""
    config = checkpoint.config
    if config.labels is not None:
        return None
    try:
        tokenizer = Tokenizer.from_folder(checkpoint.folder)
        end_ids = config.eos_token_ids or (tokenizer.eos_id,)
        return GrammarCompiler(tokenizer, end_ids, vocab_size=config.vocab_size)
    except ModelError as error:
        logger.warning("answers cannot be given a form: %s", error)
        return None


def _num_blocks(config: ServeConfig, decoder: Decoder, max_model_len: int) -> int:
    """Of the KV cache: what its bytes hold, but never more than all running sequences at full
    length can fill twice, once for themselves and once with prefixes of others.
    """
    block_bytes = config.block_size * decoder.config.kv_bytes_per_token(decoder.dtype.itemsize)
    num_bytes = config.kv_cache_bytes
    if num_bytes is None:
        share = _SHARE_OF_FREE_MEMORY[decoder.device.type]
        num_bytes = int(share * _free_bytes(decoder.device))
    useful_blocks = 2 * config.max_running_sequences * -(-max_model_len // config.block_size)
    return max(1, min(num_bytes // block_bytes, useful_blocks))


def _free_bytes(device: torch.device) -> int:
    """Memory that could be allocated now."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return free_host_bytes()

"""How long a request may be: what the model was made for, and what the KV cache holds."""

from cluster.config import ServeConfig
from cluster.errors import ConfigurationError
from model.blocks import blocks_of_sequence
from model.config import MixtralConfig


def context_of(config: ServeConfig, model: MixtralConfig) -> int:
    """Tokens of prompt and completion together that are served.

    Where max_model_len is left out it is no more than kv_cache_bytes hold, so that whoever asks for
    all that is left of it can have it. With kv_cache_bytes left out only the head will know.
    Raises ConfigurationError where max_model_len is more than the model or the cache takes.
    """
    longest = model.max_position_embeddings
    if config.max_model_len and config.max_model_len > longest:
        raise ConfigurationError(
            f"max_model_len {config.max_model_len} exceeds the model's {longest} positions"
        )
    wanted = config.max_model_len or longest
    if config.kv_cache_bytes is None:
        return wanted
    token_bytes = model.kv_bytes_per_token(4 if (config.dtype or model.dtype) == "float32" else 2)
    num_blocks = config.kv_cache_bytes // (config.block_size * token_bytes)
    needed = blocks_of_sequence(
        wanted, config.block_size, window=model.sliding_window, max_new=config.max_tokens_per_step
    )
    if needed <= num_blocks:
        return wanted
    held = num_blocks * config.block_size
    if config.max_model_len or held < 2:
        raise ConfigurationError(
            f"a request of {wanted} tokens needs {needed * config.block_size * token_bytes:,} "
            f"bytes of KV cache, kv_cache_bytes is {config.kv_cache_bytes:,}, which is room for "
            f"{held} tokens: raise it, or lower max_model_len"
        )
    return held

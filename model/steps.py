"""Running the decoder over whole sequences: prompts to their ends, or one pass over all tokens.

Token ids only. Every sequence of a call shares each forward pass, and the cache is made for them.
"""

from collections.abc import Collection, Iterator, Sequence

from torch import Tensor

from model.batch import Span, build_batch
from model.blocks import BlockPool
from model.config import MixtralConfig
from model.decoder import Decoder, Trace
from model.errors import PromptError, SamplingError
from model.experts import Experts
from model.kv_cache import KVCache
from model.row import Row
from model.sampler import NOTHING_ALLOWED, sample
from model.sampling_params import SamplingParams

_BLOCK_SIZE = 16

Ids = Sequence[Sequence[int]] | Tensor
"""Token ids of several sequences: lists of any lengths, or a matrix."""


def check_prompt(config: MixtralConfig, token_ids: Sequence[int], max_tokens: int) -> None:
    """Raise PromptError for a prompt that is empty, out of vocabulary or too long."""
    if not len(token_ids):
        raise PromptError("the prompt holds no tokens")
    out_of_range = [t for t in token_ids if not 0 <= t < config.vocab_size]
    if out_of_range:
        raise PromptError(
            f"token id {out_of_range[0]} is out of vocabulary ({config.vocab_size} ids)"
        )
    if len(token_ids) + max_tokens > config.max_position_embeddings:
        raise PromptError(
            f"{len(token_ids)} prompt tokens and {max_tokens} new ones exceed the context of "
            f"{config.max_position_embeddings} tokens"
        )


def drop_padding(ids: Ids, attention_mask: Ids | None = None) -> list[list[int]]:
    """The tokens of each row that its mask does not hide; without a mask, all of them."""
    rows = _rows(ids)
    if attention_mask is None:
        return rows
    masks = _rows(attention_mask)
    if [len(row) for row in rows] != [len(mask) for mask in masks]:
        raise PromptError("the attention mask does not have the shape of the token ids")
    return [
        [token_id for token_id, is_seen in zip(row, mask, strict=True) if is_seen]
        for row, mask in zip(rows, masks, strict=True)
    ]


def _rows(matrix: Ids) -> list[list[int]]:
    if isinstance(matrix, Tensor):
        rows: list[list[int]] = matrix.tolist()
        return rows
    return [list(row) for row in matrix]


def complete(
    decoder: Decoder,
    experts: Experts,
    prompts: Sequence[Sequence[int]],
    params: Sequence[SamplingParams],
    ended: Collection[int] = (),
) -> Iterator[dict[int, int]]:
    """Run all prompts to their ends; each step yields {prompt index: new token id}.

    ended: prompts that the caller wants no more of; read after every step, so it may grow.
    Raises SamplingError where parameters forbid every token.
    """
    rooms = [len(prompt) + p.max_tokens for prompt, p in zip(prompts, params, strict=True)]
    cache, blocks = _new_cache(decoder, rooms)
    known = [list(prompt) for prompt in prompts]
    rows = [Row(p, ids, len(ids)) for p, ids in zip(params, known, strict=True)]
    num_computed = [0] * len(prompts)
    running = list(range(len(prompts)))
    while running:
        spans = [Span(known[i][num_computed[i] :], num_computed[i], blocks[i]) for i in running]
        batch = build_batch(spans, block_size=_BLOCK_SIZE, device=decoder.device)
        logits_SV = decoder.forward(batch, cache, experts)
        emitted: dict[int, int] = {}
        sampled = sample(logits_SV, [rows[i] for i in running])
        for i, token_id in zip(running, sampled.token_ids, strict=True):
            if token_id is None:
                raise SamplingError("bad_words", NOTHING_ALLOWED)
            emitted[i] = token_id
            num_computed[i] = len(known[i])
            known[i].append(token_id)
        yield emitted
        running = [
            i
            for i, token_id in emitted.items()
            if token_id not in params[i].stop_token_ids
            and len(known[i]) - len(prompts[i]) < params[i].max_tokens
            and i not in ended
        ]


def whole_pass(
    decoder: Decoder,
    experts: Experts,
    sequences: Sequence[Sequence[int]],
    *,
    last_only: bool = False,
    trace: Trace | None = None,
) -> Tensor:
    """Logits after every token of every sequence, or only after each one's last: (rows, V)."""
    cache, blocks = _new_cache(decoder, [len(ids) for ids in sequences])
    spans = [
        Span(ids, start=0, blocks=own, num_logits=1 if last_only else len(ids))
        for ids, own in zip(sequences, blocks, strict=True)
    ]
    batch = build_batch(spans, block_size=_BLOCK_SIZE, device=decoder.device)
    return decoder.forward(batch, cache, experts, trace)


def _new_cache(decoder: Decoder, rooms: Sequence[int]) -> tuple[KVCache, list[list[int]]]:
    """A cache for sequences of at most these lengths, in tokens, and each one's blocks."""
    num_blocks = max(1, sum(-(-room // _BLOCK_SIZE) for room in rooms))
    pool = BlockPool(num_blocks=num_blocks, block_size=_BLOCK_SIZE)
    blocks = [pool.allocate(pool.blocks_for(room)) or [] for room in rooms]
    return decoder.new_cache(num_blocks=num_blocks, block_size=_BLOCK_SIZE), blocks

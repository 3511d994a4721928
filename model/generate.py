"""A whole Mixtral in one process: the library's front door, and the yardstick for the split.

Every prompt of a call runs in one batch from start to end; requests that join and leave between
steps are the service's business.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from model import TINY
from model.batch import Span, build_batch
from model.blocks import BlockPool
from model.chat import ChatFormat, Message
from model.config import DTYPES
from model.decoder import Decoder
from model.errors import ConfigError, PromptError
from model.experts import Experts, LocalExperts
from model.kv_cache import KVCache
from model.sampler import sample
from model.sampling_params import SamplingParams
from model.tokenizer import StreamDecoder, Tokenizer
from model.weights import Checkpoint, OnBytes, ignore_bytes

BLOCK_SIZE = 16


def torch_dtype(name: str | None) -> torch.dtype | None:
    """torch's dtype by its name; None (the checkpoint's own) for None. Raises ConfigError."""
    if name is None:
        return None
    if name not in DTYPES:
        raise ConfigError(f"dtype {name!r} is not one of {', '.join(DTYPES)}")
    dtype: torch.dtype = getattr(torch, name)
    return dtype


class Mixtral:
    """A decoder, its experts and its tokenizer."""

    def __init__(
        self, decoder: Decoder, experts: Experts, tokenizer: Tokenizer, chat: ChatFormat
    ) -> None:
        self.decoder = decoder
        self.experts = experts
        self.tokenizer = tokenizer
        self.chat = chat
        self.config = decoder.config

    @classmethod
    def load(
        cls,
        folder: Path | str = TINY,
        *,
        dtype: str | None = None,
        device: str = "cpu",
        on_bytes: OnBytes = ignore_bytes,
    ) -> "Mixtral":
        """Load a checkpoint with all its experts.

        dtype: float32, bfloat16 or float16; None for the checkpoint's own.
        Raises ModelError naming what is missing or wrong.
        """
        folder = Path(folder)
        checkpoint = Checkpoint(folder, dtype=torch_dtype(dtype), device=device)
        config = checkpoint.config
        everything = [
            (layer, expert_id)
            for layer in range(config.num_hidden_layers)
            for expert_id in range(config.num_local_experts)
        ]
        tokenizer = Tokenizer.from_folder(folder)
        return cls(
            Decoder(config, checkpoint.load_decoder(on_bytes)),
            LocalExperts(checkpoint.load_experts(everything, on_bytes)),
            tokenizer,
            ChatFormat.from_folder(folder, tokenizer),
        )

    def generate(self, prompt: str, **params: float) -> str:
        """Continue a text; `params` are SamplingParams' fields. Greedy unless told otherwise."""
        return "".join(self.stream(prompt, **params))

    def answer(self, messages: Sequence[Message], **params: float) -> str:
        """The assistant's next turn; `params` as in `generate`."""
        ids = self.chat.encode(messages)
        emitted = self.generate_ids([ids], [self._params(params)])[0]
        return self.tokenizer.decode(emitted)

    def stream(self, prompt: str, **params: float) -> Iterator[str]:
        """Continue a text, piece by piece as it comes."""
        decoder = StreamDecoder(self.tokenizer, continues_text=bool(prompt))
        steps = self._steps([self.tokenizer.encode_prompt(prompt)], [self._params(params)])
        for emitted in steps:
            yield decoder.push(emitted[0])
        yield decoder.flush()

    def generate_ids(
        self,
        prompts: Sequence[Sequence[int]],
        params: Sequence[SamplingParams],
        on_token: Callable[[int, int], None] | None = None,
    ) -> list[list[int]]:
        """New token ids of each prompt, end token included.

        on_token: called with (prompt index, token id) as tokens come.
        Raises PromptError for a prompt that is empty, out of vocabulary or too long.
        """
        outputs: list[list[int]] = [[] for _ in prompts]
        for emitted in self._steps(prompts, params):
            for index, token_id in emitted.items():
                outputs[index].append(token_id)
                if on_token:
                    on_token(index, token_id)
        return outputs

    def logits(self, token_ids: Sequence[int]) -> Tensor:
        """Logits after every token of one sequence, (tokens, vocabulary) float32."""
        self._check_prompt(token_ids, max_tokens=0)
        cache, pool = self._new_cache([len(token_ids)])
        blocks = pool.allocate(pool.num_blocks) or []
        span = Span(token_ids, start=0, blocks=blocks, num_logits=len(token_ids))
        batch = build_batch([span], block_size=BLOCK_SIZE, device=self.decoder.device)
        return self.decoder.forward(batch, cache, self.experts)

    def _params(self, fields: dict[str, float]) -> SamplingParams:
        defaults = {"temperature": 0.0, "stop_token_ids": self.config.eos_token_ids}
        return SamplingParams(**(defaults | fields))  # type: ignore[arg-type]

    def _steps(
        self, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams]
    ) -> Iterator[dict[int, int]]:
        """Run all prompts to their ends; each step yields {prompt index: new token id}."""
        for prompt, p in zip(prompts, params, strict=True):
            self._check_prompt(prompt, p.max_tokens)
        rooms = [len(prompt) + p.max_tokens for prompt, p in zip(prompts, params, strict=True)]
        cache, pool = self._new_cache(rooms)
        blocks = [pool.allocate(pool.blocks_for(room)) or [] for room in rooms]
        known = [list(prompt) for prompt in prompts]
        num_computed = [0] * len(prompts)
        running = list(range(len(prompts)))
        while running:
            spans = [Span(known[i][num_computed[i] :], num_computed[i], blocks[i]) for i in running]
            batch = build_batch(spans, block_size=BLOCK_SIZE, device=self.decoder.device)
            logits_SV = self.decoder.forward(batch, cache, self.experts)
            positions = [len(known[i]) for i in running]
            token_ids = sample(logits_SV, [params[i] for i in running], positions)
            emitted = dict(zip(running, token_ids, strict=True))
            for i, token_id in emitted.items():
                num_computed[i] = len(known[i])
                known[i].append(token_id)
            yield emitted
            running = [
                i
                for i, token_id in emitted.items()
                if token_id not in params[i].stop_token_ids
                and len(known[i]) - len(prompts[i]) < params[i].max_tokens
            ]

    def _check_prompt(self, token_ids: Sequence[int], max_tokens: int) -> None:
        config = self.config
        if not token_ids:
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

    def _new_cache(self, rooms: Sequence[int]) -> tuple[KVCache, BlockPool]:
        """A cache with room for sequences of these lengths, in tokens."""
        num_blocks = max(1, sum(-(-room // BLOCK_SIZE) for room in rooms))
        cache = KVCache(
            self.config,
            num_blocks=num_blocks,
            block_size=BLOCK_SIZE,
            dtype=self.decoder.dtype,
            device=self.decoder.device,
        )
        return cache, BlockPool(num_blocks=num_blocks, block_size=BLOCK_SIZE)

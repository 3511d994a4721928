"""A whole Mixtral in one process: the library's front door, and the yardstick for the split.

Every prompt of a call runs in one batch from start to end; requests that join and leave between
steps are the service's business. The batch is flat (see `batch.py`), so prompts of different
lengths need no padding, and a token's position is its own sequence's. Who has padded input all the
same hands its attention mask along: the padding is dropped.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, overload

from torch import Tensor

from model import TINY, beam, steps
from model.chat import ChatFormat, Message
from model.decoder import Decoder, Trace
from model.errors import ConfigError, SamplingError
from model.experts import Experts, LocalExperts
from model.hub import resolve
from model.labels import ARCHITECTURE
from model.loss import ModelOutput, load_balancing_loss, next_token_loss
from model.sampling_params import SamplingParams
from model.stop import TextEnds, TextOptions
from model.tokenizer import Tokenizer
from model.weights import Checkpoint, OnBytes, ignore_bytes, torch_dtype

EarlyStopping = bool | Literal["never"]

OnText = Callable[[int, str], None]
"""Called with the index of a text and its new piece."""


class Mixtral:
    """A decoder, its experts and its tokenizer."""

    def __init__(
        self,
        decoder: Decoder,
        experts: Experts,
        tokenizer: Tokenizer,
        chat: ChatFormat,
    ) -> None:
        self.decoder = decoder
        self.experts = experts
        self.tokenizer = tokenizer
        self.chat = chat
        self.config = decoder.config

    @classmethod
    def load(
        cls,
        model: Path | str = TINY,
        *,
        dtype: str | None = None,
        device: str = "cpu",
        expert_quantization: str | None = None,
        attention_quantization: str | None = None,
        attention: str = "sdpa",
        on_bytes: OnBytes = ignore_bytes,
    ) -> "Mixtral":
        """Load a checkpoint with all its experts.

        model:     a folder, or a Hugging Face Hub id.
        dtype:     float32, bfloat16 or float16; None for the checkpoint's own.
        expert_quantization, attention_quantization: of quantize.MODES; None as the checkpoint has
                   experts, and the matrices of attention.
        attention: one of attention.BACKENDS.
        Raises ModelError naming what is missing or wrong.
        """
        folder = resolve(model)
        checkpoint = Checkpoint(
            folder,
            dtype=torch_dtype(dtype),
            device=device,
            expert_quantization=expert_quantization,
            attention_quantization=attention_quantization,
        )
        if checkpoint.config.labels is not None:
            raise ConfigError(
                f"{folder} holds a sequence classifier ({ARCHITECTURE}), which generates "
                "nothing; load it with model.classify.Classifier"
            )
        tokenizer = Tokenizer.from_folder(folder)
        return cls(
            Decoder(checkpoint.config, checkpoint.load_decoder(on_bytes), attention=attention),
            LocalExperts(checkpoint.load_experts(checkpoint.config.expert_units, on_bytes)),
            tokenizer,
            ChatFormat.from_folder(folder, tokenizer),
        )

    @overload
    def generate(
        self,
        prompt: str,
        *,
        num_return_sequences: None = None,
        num_beams: int = 1,
        length_penalty: float = 1.0,
        early_stopping: EarlyStopping = False,
        stop: str | Sequence[str] = (),
        on_text: OnText | None = None,
        **params: Any,
    ) -> str: ...

    @overload
    def generate(
        self,
        prompt: str,
        *,
        num_return_sequences: int,
        num_beams: int = 1,
        length_penalty: float = 1.0,
        early_stopping: EarlyStopping = False,
        stop: str | Sequence[str] = (),
        on_text: OnText | None = None,
        **params: Any,
    ) -> list[str]: ...

    def generate(
        self,
        prompt: str,
        *,
        num_return_sequences: int | None = None,
        num_beams: int = 1,
        length_penalty: float = 1.0,
        early_stopping: EarlyStopping = False,
        stop: str | Sequence[str] = (),
        on_text: OnText | None = None,
        **params: Any,
    ) -> str | list[str]:
        """Continue a text. Greedy unless told otherwise.

        num_return_sequences: return a list of that many texts: when sampling, choices 0, 1, ... of
                              the seed; with beams, the best first.
        num_beams:            above 1, search with so many beams; length_penalty and early_stopping
                              belong to it (see `beam.BeamParams`).
        stop:                 strings that end the text; they are not part of it.
        on_text:              called with (index of the text, new piece) as pieces come; with
                              beams, once for every text, at the end.
        params:               SamplingParams' fields.
        Raises SamplingError naming the parameter, or PromptError.
        """
        prompts = [self.tokenizer.encode_prompt(prompt)]
        options = TextOptions(stop, continues_text=bool(prompt))
        num_texts = _check_count(num_return_sequences)
        if num_beams != 1:
            beams = beam.BeamParams(
                num_beams=num_beams, length_penalty=length_penalty, early_stopping=early_stopping
            )
            pieces = self._beam_texts(prompts[0], self._params(params), beams, num_texts, options)
        elif (length_penalty, early_stopping) != (1.0, False):
            raise SamplingError("num_beams", "length_penalty and early_stopping want num_beams > 1")
        else:
            pieces = self._texts(
                prompts * num_texts, _choices(self._params(params), num_texts), options
            )
        texts = [""] * num_texts
        for index, piece in pieces:
            texts[index] += piece
            if on_text and piece:
                on_text(index, piece)
        return texts[0] if num_return_sequences is None else texts

    def answer(
        self, messages: Sequence[Message], *, stop: str | Sequence[str] = (), **params: Any
    ) -> str:
        """The assistant's next turn; `stop` and `params` as in `generate`."""
        options = TextOptions(stop, continues_text=False)
        pieces = self._texts([self.chat.encode(messages)], [self._params(params)], options)
        return "".join([piece for _, piece in pieces])

    def stream(
        self, prompt: str, *, stop: str | Sequence[str] = (), **params: Any
    ) -> Iterator[str]:
        """Continue a text, piece by piece as it comes; `stop` and `params` as in `generate`."""
        options = TextOptions(stop, continues_text=bool(prompt))
        prompts = [self.tokenizer.encode_prompt(prompt)]
        for _, piece in self._texts(prompts, [self._params(params)], options):
            yield piece

    def generate_ids(
        self,
        prompts: steps.Ids,
        params: Sequence[SamplingParams],
        on_token: Callable[[int, int], None] | None = None,
        *,
        attention_mask: steps.Ids | None = None,
        num_return_sequences: int = 1,
    ) -> list[list[int]]:
        """New token ids of each prompt, end token included.

        on_token:             called with (output index, token id) as tokens come.
        attention_mask:       0 where a prompt is padded, 1 elsewhere.
        num_return_sequences: so many outputs for every prompt, one after the other: the choices
                              that follow the parameters' own.
        Raises PromptError for a prompt that is empty, out of vocabulary or too long, and
        SamplingError for parameters that name ids out of vocabulary, forbid every token, or ask
        for log-probabilities.
        """
        num_each = _check_count(num_return_sequences)
        each = [ids for ids in steps.drop_padding(prompts, attention_mask) for _ in range(num_each)]
        choices = [choice for p in params for choice in _choices(p, num_each)]
        self._check(each, choices)
        outputs: list[list[int]] = [[] for _ in each]
        for emitted in steps.complete(self.decoder, self.experts, each, choices):
            for index, token_id in emitted.items():
                outputs[index].append(token_id)
                if on_token:
                    on_token(index, token_id)
        return outputs

    def beam_search_ids(
        self,
        prompts: steps.Ids,
        params: Sequence[SamplingParams],
        beams: beam.BeamParams,
        *,
        attention_mask: steps.Ids | None = None,
    ) -> list[list[beam.Beam]]:
        """The num_beams best completions of each prompt, best first.

        attention_mask: 0 where a prompt is padded, 1 elsewhere.
        Raises PromptError as `generate_ids` does, and SamplingError for parameters that sample.
        """
        prompts = steps.drop_padding(prompts, attention_mask)
        self._check(prompts, params)
        searches = [beam.BeamSearch(ids, p, beams) for ids, p in zip(prompts, params, strict=True)]
        beam.run(self.decoder, self.experts, searches)
        return [search.finished for search in searches]

    def logits(self, token_ids: Sequence[int]) -> Tensor:
        """Logits after every token of one sequence, (tokens, vocabulary) float32."""
        return self.forward([token_ids]).logits_TV

    def forward(
        self,
        ids: steps.Ids,
        labels: steps.Ids | None = None,
        *,
        attention_mask: steps.Ids | None = None,
        output_hidden_states: bool = False,
        output_router_logits: bool = False,
    ) -> ModelOutput:
        """One pass over whole sequences, as transformers' forward, but flat: no row is padding.

        labels: of every token the id it should have been, usually `ids` again; they are shifted
                here. loss.IGNORED leaves a token out.
        attention_mask: 0 where ids (and labels) are padded, 1 elsewhere.
        With output_router_logits there is an aux_loss, and it is part of the loss.
        Raises PromptError as `generate_ids` does. Computes no gradients.
        """
        sequences = steps.drop_padding(ids, attention_mask)
        for token_ids in sequences:
            steps.check_prompt(self.config, token_ids, max_tokens=0)
        trace = Trace() if output_hidden_states or output_router_logits else None
        logits_TV = steps.whole_pass(self.decoder, self.experts, sequences, trace=trace)
        loss = aux_loss = None
        if labels is not None:
            loss = next_token_loss(logits_TV, steps.drop_padding(labels, attention_mask))
        if trace and output_router_logits:
            aux_loss = load_balancing_loss(
                trace.router_logits, top_k=self.config.num_experts_per_tok
            )
            if loss is not None:
                loss = loss + self.config.router_aux_loss_coef * aux_loss
        return ModelOutput(
            logits_TV=logits_TV,
            loss=loss,
            aux_loss=aux_loss,
            hidden_states=tuple(trace.hidden_states) if trace and output_hidden_states else None,
            router_logits=tuple(trace.router_logits) if trace and output_router_logits else None,
        )

    def _params(self, fields: Mapping[str, Any]) -> SamplingParams:
        defaults: dict[str, Any] = {
            "temperature": 0.0,
            "stop_token_ids": self.config.eos_token_ids,
        }
        return SamplingParams(**(defaults | dict(fields)))

    def _check(self, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams]) -> None:
        for prompt, p in zip(prompts, params, strict=True):
            steps.check_prompt(self.config, prompt, p.max_tokens)
            p.check_vocabulary(self.config.vocab_size)
            for name in ("logprobs", "prompt_logprobs"):
                if getattr(p, name) is not None:
                    raise SamplingError(name, f"{name}: only served; here, `logits` has them all")

    def _texts(
        self,
        prompts: Sequence[Sequence[int]],
        params: Sequence[SamplingParams],
        options: TextOptions,
    ) -> Iterator[tuple[int, str]]:
        """Pieces of all prompts' texts as they come, with the prompt's index."""
        self._check(prompts, params)
        texts = [options.new_text(self.tokenizer) for _ in prompts]
        ended: set[int] = set()
        for emitted in steps.complete(self.decoder, self.experts, prompts, params, ended):
            for index, token_id in emitted.items():
                yield index, texts[index].push(token_id)
                if texts[index].is_stopped:
                    ended.add(index)
        for index, text in enumerate(texts):
            yield index, text.flush()

    def _beam_texts(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        beams: beam.BeamParams,
        num_texts: int,
        options: TextOptions,
    ) -> Iterator[tuple[int, str]]:
        """The best beams' texts, whole, with their rank."""
        if num_texts > beams.num_beams:
            raise SamplingError(
                "num_return_sequences",
                f"num_return_sequences ({num_texts}) must not exceed num_beams ({beams.num_beams})",
            )
        self._check([prompt], [params])

        ends = TextEnds(options.new_text(self.tokenizer), self.tokenizer)
        search = beam.BeamSearch(prompt, params, beams, ends)
        beam.run(self.decoder, self.experts, [search])
        for index, found in enumerate(search.finished[:num_texts]):
            text = options.new_text(self.tokenizer)
            pieces = [text.push(token_id) for token_id in found.token_ids]
            yield index, "".join(pieces) + text.flush()


def _choices(params: SamplingParams, num_choices: int) -> list[SamplingParams]:
    return [replace(params, choice=params.choice + i) for i in range(num_choices)]


def _check_count(num_return_sequences: int | None) -> int:
    if num_return_sequences is None:
        return 1
    if num_return_sequences < 1:
        raise SamplingError(
            "num_return_sequences",
            f"num_return_sequences must be at least 1, not {num_return_sequences}",
        )
    return num_return_sequences

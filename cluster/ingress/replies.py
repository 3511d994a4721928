"""Bodies of replies and of their chunks, of what one request's choices have become."""

import time
import uuid
from collections.abc import Iterator, Sequence
from typing import Protocol

from cluster.errors import RequestError
from cluster.ingress import sse
from cluster.ingress.errors import error_body
from cluster.ingress.journal import Journal
from cluster.ingress.logprobs import (
    chat_logprobs,
    completion_logprobs,
    prompt_logprobs,
    report_prompt,
)
from cluster.ingress.prepare import Work
from cluster.ingress.text import TextDelta
from cluster.schema import (
    AssistantMessage,
    ChatChoice,
    ChatChunkChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatDelta,
    ChatLogprobs,
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    FunctionCall,
    FunctionCallDelta,
    PromptLogprobs,
    StreamOptions,
    ToolCall,
    ToolCallDelta,
    Usage,
)
from model.tokenizer import Tokenizer

Chunk = Completion | ChatCompletionChunk


class Replies(Protocol):
    """Of one request. Usage is the caller's to add to chunks."""

    def opening(self) -> Sequence[Chunk]:
        """What a stream begins with."""
        ...

    def chunk(self, index: int, delta: TextDelta) -> Chunk:
        """What is new of a choice."""
        ...

    def closing(self) -> Chunk:
        """The chunk without choices that has the usage."""
        ...

    def whole(self, answers: Sequence[TextDelta]) -> Completion | ChatCompletion:
        """The reply that is not streamed, of all answers that were drawn."""
        ...


class ChunkForm:
    """A stream of OpenAI's chunks."""

    def __init__(self, work: Work, replies: Replies) -> None:
        options = work.body.stream_options or StreamOptions()
        self._work = work
        self._replies = replies
        self._has_usage = options.include_usage
        self._has_usage_everywhere = options.include_usage and options.continuous_usage_stats
        self._num_told = len(work.body.resume_token_ids)

    def opening(self) -> Iterator[bytes]:
        return map(self._event, self._replies.opening())

    def delta(self, index: int, delta: TextDelta) -> Iterator[bytes]:
        self._num_told += len(delta.token_ids)
        yield self._event(self._replies.chunk(index, delta))

    def closing(self) -> Iterator[bytes]:
        if self._has_usage:
            yield sse.event(self._with_usage(self._replies.closing()))
        yield sse.DONE

    def failure(self, error: RequestError) -> Iterator[bytes]:
        yield sse.event(error_body(error))
        yield sse.DONE

    def _event(self, chunk: Chunk) -> bytes:
        return sse.event(self._with_usage(chunk) if self._has_usage_everywhere else chunk)

    def _with_usage(self, chunk: Chunk) -> Chunk:
        return chunk.model_copy(update={"usage": self._work.usage(self._num_told)})


def best(work: Work, answers: Sequence[TextDelta]) -> list[tuple[Journal, TextDelta]]:
    """Of each prompt's answers the n best, the likeliest first; all of them if n were drawn."""
    num_drawn, n = work.body.num_drawn, work.body.n
    pairs = list(zip(work.journals, answers, strict=True))
    if num_drawn == n:
        return pairs
    chosen = []
    for first in range(0, len(pairs), num_drawn):
        ranked = sorted(pairs[first : first + num_drawn], key=lambda pair: -_mean_logprob(pair[0]))
        chosen += ranked[:n]
    return chosen


class CompletionReplies:
    """Of POST /v1/completions."""

    def __init__(self, work: Work, model_id: str, tokenizer: Tokenizer) -> None:
        self._work = work
        self._model_id = model_id
        self._tokenizer = tokenizer
        self._id = f"cmpl-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._begun: set[int] = set()

    def opening(self) -> list[Completion]:
        return []

    def chunk(self, index: int, delta: TextDelta) -> Completion:
        is_first = index not in self._begun
        self._begun.add(index)
        return self._reply([self._choice(index, self._work.journals[index], delta, is_first)])

    def closing(self) -> Completion:
        return self._reply([])

    def whole(self, answers: Sequence[TextDelta]) -> Completion:
        choices = [
            self._choice(index, journal, answer, is_first=True)
            for index, (journal, answer) in enumerate(best(self._work, answers))
        ]
        return self._reply(choices, _usage(self._work, answers))

    def _choice(
        self, index: int, journal: Journal, delta: TextDelta, is_first: bool
    ) -> CompletionChoice:
        returns_ids = self._work.body.return_token_ids
        return CompletionChoice(
            index=index,
            text=delta.text,
            finish_reason=delta.finish,
            stop_reason=delta.stop_reason,
            logprobs=self._logprobs(delta),
            prompt_logprobs=_prompt_logprobs(self._work, journal, self._tokenizer),
            prompt_token_ids=list(journal.prompt_ids) if returns_ids and is_first else None,
            token_ids=list(delta.token_ids) if returns_ids else None,
        )

    def _logprobs(self, delta: TextDelta) -> CompletionLogprobs | None:
        wanted = self._work.rules.num_logprobs is not None
        as_ids = self._work.body.return_tokens_as_token_ids
        return completion_logprobs(delta.reports, as_ids=as_ids) if wanted else None

    def _reply(self, choices: list[CompletionChoice], usage: Usage | None = None) -> Completion:
        return Completion(
            id=self._id, created=self._created, model=self._model_id, choices=choices, usage=usage
        )


class ChatReplies:
    """Of POST /v1/chat/completions."""

    def __init__(self, work: Work, model_id: str, tokenizer: Tokenizer) -> None:
        self._work = work
        self._model_id = model_id
        self._tokenizer = tokenizer
        self._id = f"chatcmpl-{uuid.uuid4().hex}"
        self._created = int(time.time())

    def opening(self) -> list[ChatCompletionChunk]:
        """Every choice begins with the role, and nothing else does."""
        role = ChatDelta(role="assistant", content="")
        chunks = [
            self._chunk([ChatChunkChoice(index=index, delta=role)])
            for index in range(len(self._work.journals))
        ]
        chunks[0].prompt_token_ids = self._prompt_ids()
        return chunks

    def chunk(self, index: int, delta: TextDelta) -> ChatCompletionChunk:
        choice = ChatChunkChoice(
            index=index,
            delta=_chat_delta(delta),
            finish_reason=delta.finish,
            stop_reason=delta.stop_reason,
            logprobs=self._logprobs(delta),
            token_ids=self._token_ids(delta),
        )
        return self._chunk([choice])

    def closing(self) -> ChatCompletionChunk:
        return self._chunk([])

    def whole(self, answers: Sequence[TextDelta]) -> ChatCompletion:
        return ChatCompletion(
            id=self._id,
            created=self._created,
            model=self._model_id,
            choices=[
                ChatChoice(
                    index=index,
                    message=_message(answer),
                    finish_reason=answer.finish,
                    stop_reason=answer.stop_reason,
                    logprobs=self._logprobs(answer),
                    token_ids=self._token_ids(answer),
                )
                for index, (_, answer) in enumerate(best(self._work, answers))
            ],
            usage=_usage(self._work, answers),
            prompt_logprobs=_prompt_logprobs(self._work, self._work.journals[0], self._tokenizer),
            prompt_token_ids=self._prompt_ids(),
        )

    def _chunk(self, choices: list[ChatChunkChoice]) -> ChatCompletionChunk:
        return ChatCompletionChunk(
            id=self._id, created=self._created, model=self._model_id, choices=choices
        )

    def _logprobs(self, delta: TextDelta) -> ChatLogprobs | None:
        wanted = self._work.rules.num_logprobs is not None
        as_ids = self._work.body.return_tokens_as_token_ids
        return chat_logprobs(delta.reports, as_ids=as_ids) if wanted else None

    def _token_ids(self, delta: TextDelta) -> list[int] | None:
        return list(delta.token_ids) if self._work.body.return_token_ids else None

    def _prompt_ids(self) -> list[int] | None:
        wanted = self._work.body.return_token_ids
        return list(self._work.journals[0].prompt_ids) if wanted else None


def _chat_delta(delta: TextDelta) -> ChatDelta:
    calls = [
        ToolCallDelta(
            index=call.index,
            id=call.id,
            type="function" if call.id else None,
            function=FunctionCallDelta(name=call.name, arguments=call.arguments),
        )
        for call in delta.tool_calls
    ]
    return ChatDelta(content=delta.text or None, tool_calls=calls or None)


def _message(answer: TextDelta) -> AssistantMessage:
    calls = [
        ToolCall(
            id=call.id or "",
            function=FunctionCall(name=call.name or "", arguments=call.arguments),
        )
        for call in answer.tool_calls
    ]
    content = answer.text if answer.text or not calls else None
    return AssistantMessage(content=content, tool_calls=calls or None)


def _usage(work: Work, answers: Sequence[TextDelta]) -> Usage:
    return work.usage(sum(len(answer.token_ids) for answer in answers))


def _mean_logprob(journal: Journal) -> float:
    """Log-probability of an answer, per token."""
    return sum(one.logprob for one in journal.logprobs) / max(1, len(journal.logprobs))


def _prompt_logprobs(work: Work, journal: Journal, tokenizer: Tokenizer) -> PromptLogprobs | None:
    num_top = work.body.prompt_logprobs
    if num_top is None:  # as in every stream
        return None
    reports = report_prompt(tokenizer, journal.prompt_ids, journal.prompt_logprobs, num_top)
    return prompt_logprobs(reports)

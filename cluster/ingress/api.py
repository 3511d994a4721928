"""The HTTP API: OpenAI's completions and chat completions over whatever engine it is given.

Knows schema, text and HTTP; knows neither gRPC nor Ray.
"""

import asyncio
import logging
import secrets
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Sequence
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse
from pydantic import BaseModel

from cluster.errors import RequestError
from cluster.ingress import errors, sse
from cluster.ingress.journal import Finish, Journal
from cluster.ingress.limits import BodyLimit, ConcurrencyLimit
from cluster.ingress.merge import merge
from cluster.ingress.request_log import RequestLog
from cluster.ingress.text import TextDelta, generate_text
from cluster.metrics import IngressMetrics
from cluster.schema import (
    MAX_CHOICES,
    AssistantMessage,
    ChatChoice,
    ChatChunkChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatCompletionRequest,
    ChatDelta,
    Completion,
    CompletionChoice,
    CompletionRequest,
    GenerationRequest,
    Model,
    ModelList,
    Readiness,
    Usage,
)
from model.chat import ChatFormat, Message
from model.config import GenerationDefaults
from model.errors import PromptError
from model.sampling_params import SamplingParams
from model.stop import TextStream
from model.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

T = TypeVar("T")

_SAMPLING_FIELDS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
"""Fields that `generation_config.json` may have a default for."""


class Engine(Protocol):
    """What the API needs of the cluster behind it."""

    def running(self) -> AbstractAsyncContextManager[None]:
        """Entered when the app starts, left when it stops."""
        ...

    def generate(self, journal: Journal) -> AsyncGenerator[tuple[int, ...], None]:
        """Run a journal; yields and records new ids. Closing the iterator aborts it.

        Raises HeadUnavailableError or RequestError.
        """
        ...

    def readiness(self) -> Readiness:
        """Whether requests can be served, and how far the start has come."""
        ...

    async def metrics(self) -> str:
        """Metrics of all processes as text."""
        ...


@dataclass(frozen=True, kw_only=True)
class ApiSettings:
    """What the API is told of the model and its limits."""

    model_id: str
    max_model_len: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    defaults: GenerationDefaults
    """What the checkpoint's makers recommend, for fields that a request leaves open."""
    max_concurrent_requests: int
    """Of this ingress."""
    max_body_bytes: int


def create_app(
    engine: Engine,
    tokenizer: Tokenizer,
    chat: ChatFormat,
    settings: ApiSettings,
    metrics: IngressMetrics,
) -> FastAPI:
    """The whole HTTP side as one ASGI app."""

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        async with engine.running():
            yield

    app = FastAPI(title="Maestrale", lifespan=lifespan)
    app.include_router(_Api(engine, tokenizer, chat, settings, metrics).router())
    errors.install(app)
    app.add_middleware(BodyLimit, max_bytes=settings.max_body_bytes)
    app.add_middleware(RequestLog, metrics=metrics)
    return app


@dataclass(frozen=True)
class _Work:
    """A request, checked and tokenised: one journal per choice, prompt-major."""

    body: GenerationRequest
    journals: list[Journal]
    num_prompt_tokens: int
    continues_text: bool
    """Whether the answer goes on in the prompt's text (completions) or starts afresh (chat)."""

    def usage(self) -> Usage:
        num_emitted = sum(len(journal.emitted_ids) for journal in self.journals)
        return Usage(
            prompt_tokens=self.num_prompt_tokens,
            completion_tokens=num_emitted,
            total_tokens=self.num_prompt_tokens + num_emitted,
        )


class _Api:
    """The endpoints. Owned by the event loop."""

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        chat: ChatFormat,
        settings: ApiSettings,
        metrics: IngressMetrics,
    ) -> None:
        self._engine = engine
        self._tokenizer = tokenizer
        self._chat = chat
        self._settings = settings
        self._metrics = metrics
        self._limit = ConcurrencyLimit(settings.max_concurrent_requests)
        metrics.in_progress.set_function(lambda: self._limit.num_open)
        self._created = int(time.time())

    def router(self) -> APIRouter:
        router = APIRouter()
        router.post("/v1/completions", response_model=Completion)(self.completions)
        router.post("/v1/chat/completions", response_model=ChatCompletion)(self.chat_completions)
        router.get("/v1/models")(self.models)
        router.get("/v1/models/{model_id:path}")(self.model)
        router.get("/health")(self.health)
        router.get("/ready", response_model=Readiness)(self.ready)
        router.get("/metrics", response_class=PlainTextResponse)(self.export)
        return router

    async def completions(self, body: CompletionRequest, request: Request) -> Response:
        """Continue one or several prompts."""
        self._check(body)
        prompts = [self._prompt_ids(prompt) for prompt in _prompts(body)]
        journals = self._journals(body, prompts, body.max_tokens, "max_tokens")
        num_tokens = sum(len(prompt) for prompt in prompts)
        work = _Work(body, journals, num_tokens, continues_text=True)
        new_id = f"cmpl-{uuid.uuid4().hex}"

        def reply(choices: list[CompletionChoice], usage: Usage | None) -> Completion:
            return Completion(
                id=new_id, created=now, model=self._settings.model_id, choices=choices, usage=usage
            )

        def chunk(index: int, delta: TextDelta) -> Completion:
            choice = CompletionChoice(index=index, text=delta.text, finish_reason=delta.finish)
            return reply([choice], None)

        now = int(time.time())
        if body.stream:
            return await self._stream(request, work, [], chunk, lambda usage: reply([], usage))
        texts = await _unless_disconnected(request, self._collect(work))
        choices = [
            CompletionChoice(index=index, text=delta.text, finish_reason=delta.finish)
            for index, delta in enumerate(texts)
        ]
        return JSONResponse(reply(choices, work.usage()).model_dump())

    async def chat_completions(self, body: ChatCompletionRequest, request: Request) -> Response:
        """Answer a conversation."""
        self._check(body)
        messages = [Message(message.role, message.text) for message in body.messages]
        self._check_length(sum(len(message.content) for message in messages), "messages")
        try:
            prompt = tuple(self._chat.encode(messages))
        except PromptError as error:
            raise RequestError(400, str(error), param="messages") from error
        max_tokens = body.max_completion_tokens or body.max_tokens
        field = "max_completion_tokens" if body.max_completion_tokens else "max_tokens"
        journals = self._journals(body, [prompt], max_tokens, field)
        work = _Work(body, journals, len(prompt), continues_text=False)
        new_id = f"chatcmpl-{uuid.uuid4().hex}"
        now = int(time.time())

        def chunk_of(choices: list[ChatChunkChoice], usage: Usage | None) -> ChatCompletionChunk:
            return ChatCompletionChunk(
                id=new_id, created=now, model=self._settings.model_id, choices=choices, usage=usage
            )

        def chunk(index: int, delta: TextDelta) -> ChatCompletionChunk:
            content = ChatDelta(content=delta.text) if delta.text else ChatDelta()
            choice = ChatChunkChoice(index=index, delta=content, finish_reason=delta.finish)
            return chunk_of([choice], None)

        if body.stream:
            role = ChatDelta(role="assistant", content="")
            first = [
                chunk_of([ChatChunkChoice(index=index, delta=role)], None)
                for index in range(len(journals))
            ]
            return await self._stream(
                request, work, first, chunk, lambda usage: chunk_of([], usage)
            )
        texts = await _unless_disconnected(request, self._collect(work))
        reply = ChatCompletion(
            id=new_id,
            created=now,
            model=self._settings.model_id,
            choices=[
                ChatChoice(
                    index=index,
                    message=AssistantMessage(content=delta.text),
                    finish_reason=delta.finish,
                )
                for index, delta in enumerate(texts)
            ],
            usage=work.usage(),
        )
        return JSONResponse(reply.model_dump())

    async def models(self) -> ModelList:
        """The one model that is served."""
        return ModelList(data=[self._model()])

    async def model(self, model_id: str) -> Model:
        """A served model by its id."""
        self._check_model(model_id)
        return self._model()

    async def health(self) -> dict[str, str]:
        """This process is alive."""
        return {"status": "ok"}

    async def ready(self) -> JSONResponse:
        """Whether a real forward pass has gone through every expert; 503 before."""
        readiness = self._engine.readiness()
        return JSONResponse(readiness.model_dump(), 200 if readiness.ready else 503)

    async def export(self) -> str:
        """Metrics of all processes, in Prometheus' text format."""
        return await self._engine.metrics()

    def _model(self) -> Model:
        return Model(
            id=self._settings.model_id,
            created=self._created,
            max_model_len=self._settings.max_model_len,
        )

    def _check_model(self, model_id: str | None) -> None:
        if model_id is not None and model_id != self._settings.model_id:
            raise RequestError(
                404,
                f"the model {model_id!r} is not served here; there is {self._settings.model_id!r}",
                kind="not_found_error",
                param="model",
                code="model_not_found",
            )

    def _check(self, body: GenerationRequest) -> None:
        """Refuse a request that cannot be served, whatever its prompt."""
        self._check_model(body.model)
        unsupported = body.first_unsupported()
        if unsupported:
            raise RequestError(
                400, f"{unsupported} is not supported yet", param=unsupported, code="unsupported"
            )
        readiness = self._engine.readiness()
        if not readiness.ready:
            raise RequestError(
                503,
                f"not ready yet: {readiness.phase}, {readiness.percent} %",
                kind="service_unavailable",
                headers={"Retry-After": "2"},
            )

    def _prompt_ids(self, prompt: str | list[int]) -> tuple[int, ...]:
        if not prompt:
            raise RequestError(400, "prompt: must not be empty", param="prompt")
        if isinstance(prompt, str):
            self._check_length(len(prompt), "prompt")
            return tuple(self._tokenizer.encode_prompt(prompt))
        vocab_size = self._settings.vocab_size
        if max(prompt) >= vocab_size:
            raise RequestError(
                400,
                f"prompt: token id {max(prompt)} is out of vocabulary ({vocab_size} ids)",
                param="prompt",
            )
        return tuple(prompt)

    def _asked(self, body: GenerationRequest, name: str) -> Any:
        """A sampling field: the request's, else the checkpoint's default, else OpenAI's."""
        default = getattr(self._settings.defaults, name)
        return getattr(body, name) if name in body.model_fields_set or default is None else default

    def _check_length(self, num_characters: int, param: str) -> None:
        """Refuse what is too long whatever its tokens, before the event loop counts them."""
        context = self._settings.max_model_len
        if num_characters > context * self._tokenizer.longest_piece:
            raise RequestError(
                400,
                f"{num_characters:,} characters cannot fit into the context of {context} tokens",
                param=param,
                code="context_length_exceeded",
            )

    def _journals(
        self,
        body: GenerationRequest,
        prompts: Sequence[tuple[int, ...]],
        max_tokens: int | None,
        max_tokens_field: str,
    ) -> list[Journal]:
        """One journal per prompt and choice. None for max_tokens: the rest of the context."""
        if len(prompts) * body.n > MAX_CHOICES:
            raise RequestError(
                400, f"{len(prompts)} prompts x n={body.n} exceed {MAX_CHOICES} choices", param="n"
            )
        context = self._settings.max_model_len
        if max_tokens is not None and max_tokens > context:
            raise RequestError(
                400,
                f"{max_tokens_field}: {max_tokens} exceeds the context of {context} tokens",
                param=max_tokens_field,
            )
        unknown = [t for t in body.stop_token_ids if t >= self._settings.vocab_size]
        if unknown:
            raise RequestError(
                400, f"stop_token_ids: {unknown[0]} is out of vocabulary", param="stop_token_ids"
            )
        sampling = {name: self._asked(body, name) for name in _SAMPLING_FIELDS}
        sampling["top_k"] = max(sampling["top_k"], 0)
        own_ends = () if body.ignore_eos else self._settings.eos_token_ids
        seed = body.seed if body.seed is not None else secrets.randbits(63)
        journals = []
        for prompt in prompts:
            room = context - len(prompt)
            if room < 1:
                raise RequestError(
                    400,
                    f"the prompt has {len(prompt)} tokens; the context of {context} must also "
                    "hold at least one new token",
                    param="messages" if isinstance(body, ChatCompletionRequest) else "prompt",
                    code="context_length_exceeded",
                )
            for choice in range(body.n):
                params = SamplingParams(
                    max_tokens=min(room, max_tokens or room),
                    seed=seed,
                    choice=choice,
                    stop_token_ids=(*own_ends, *body.stop_token_ids),
                    min_tokens=body.min_tokens,
                    typical_p=body.typical_p,
                    **sampling,
                )
                journals.append(Journal(prompt, params))
        return journals

    async def _deltas(self, work: _Work) -> AsyncGenerator[tuple[int, TextDelta], None]:
        """Text of all choices as it comes, each with its choice's index."""
        with self._limit.slot():
            self._metrics.observe_prompt(work.num_prompt_tokens)
            streams = [
                generate_text(
                    self._engine.generate,
                    journal,
                    TextStream(
                        self._tokenizer,
                        work.body.stop_strings,
                        continues_text=work.continues_text,
                    ),
                )
                for journal in work.journals
            ]
            async with aclosing(merge(streams)) as merged:
                async for index, delta in merged:
                    yield index, delta

    async def _collect(self, work: _Work) -> list[TextDelta]:
        """The whole text of every choice, with its finish."""
        texts = [""] * len(work.journals)
        finishes: list[Finish | None] = [None] * len(work.journals)
        async with aclosing(self._deltas(work)) as deltas:
            async for index, delta in deltas:
                texts[index] += delta.text
                finishes[index] = delta.finish or finishes[index]
        return [TextDelta(text, finish) for text, finish in zip(texts, finishes, strict=True)]

    async def _stream(
        self,
        request: Request,
        work: _Work,
        first: Sequence[BaseModel],
        chunk: Callable[[int, TextDelta], BaseModel],
        usage_chunk: Callable[[Usage], BaseModel],
    ) -> sse.EventStream:
        """A streamed reply. Waits for the first text, so that an early error has a real status."""
        deltas = self._deltas(work)
        try:
            index, delta = await _unless_disconnected(request, _first_of(deltas))
        except BaseException:
            await deltas.aclose()
            raise
        options = work.body.stream_options
        wants_usage = options is not None and options.include_usage

        async def events() -> AsyncGenerator[bytes, None]:
            async with aclosing(deltas) as rest:
                try:
                    for body in first:
                        yield sse.event(body)
                    yield sse.event(chunk(index, delta))
                    async for next_index, next_delta in rest:
                        yield sse.event(chunk(next_index, next_delta))
                    if wants_usage:
                        yield sse.event(usage_chunk(work.usage()))
                except Exception as error:
                    # The status is sent already: the stream itself must say that it failed.
                    yield sse.event(errors.error_body(errors.as_request_error(error)))
                yield sse.DONE

        return sse.EventStream(events())


def _prompts(body: CompletionRequest) -> list[str | list[int]]:
    """The prompts of a body, whichever of the four forms it has."""
    prompt = body.prompt
    if isinstance(prompt, str):
        return [prompt]
    ids = [item for item in prompt if isinstance(item, int)]
    if ids:
        return [ids]
    if not prompt:
        raise RequestError(400, "prompt: must not be empty", param="prompt")
    return [item for item in prompt if not isinstance(item, int)]


async def _first_of(deltas: AsyncGenerator[T, None]) -> T:
    return await anext(deltas)


async def _unless_disconnected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled when the caller hangs up first."""
    task = asyncio.create_task(work)
    watcher = asyncio.create_task(_disconnected(request))
    try:
        await asyncio.wait([task, watcher], return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise RequestError(499, "the caller has hung up", kind="client_closed_request")
        return task.result()
    finally:
        for pending in (task, watcher):
            pending.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass

"""The HTTP API over whatever engine it is given: OpenAI's completions and chat, vLLM's classify.

Knows schema, text and HTTP; knows neither gRPC nor Ray.
"""

import logging
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager
from typing import Protocol, TypeVar

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse
from pydantic import BaseModel

from cluster.errors import RequestError
from cluster.ingress import errors, sse
from cluster.ingress.classify import classification, classify_all
from cluster.ingress.disconnect import unless_disconnected
from cluster.ingress.journal import Finish, Journal
from cluster.ingress.limits import BodyLimit, ConcurrencyLimit
from cluster.ingress.merge import merge
from cluster.ingress.prepare import ApiSettings, Preparer, Work
from cluster.ingress.request_log import RequestLog
from cluster.ingress.text import TextDelta, generate_text
from cluster.metrics import IngressMetrics
from cluster.schema import (
    AssistantMessage,
    ChatChoice,
    ChatChunkChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatCompletionRequest,
    ChatDelta,
    Classification,
    ClassifyRequest,
    Completion,
    CompletionChoice,
    CompletionRequest,
    Model,
    ModelList,
    ModelRequest,
    Readiness,
    Usage,
)
from model.chat import ChatFormat
from model.stop import TextStream
from model.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

T = TypeVar("T")


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

    async def classify(self, prompt_ids: Sequence[int]) -> tuple[float, ...]:
        """Logits of a prompt, one for each label. Cancelling aborts it.

        Raises HeadUnavailableError or RequestError.
        """
        ...

    def readiness(self) -> Readiness:
        """Whether requests can be served, and how far the start has come."""
        ...

    async def metrics(self) -> str:
        """Metrics of all processes as text."""
        ...


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
        self._prepare = Preparer(tokenizer, chat, settings)
        self._settings = settings
        self._metrics = metrics
        self._limit = ConcurrencyLimit(settings.max_concurrent_requests)
        metrics.in_progress.set_function(lambda: self._limit.num_open)
        self._created = int(time.time())

    def router(self) -> APIRouter:
        router = APIRouter()
        router.post("/v1/completions", response_model=Completion)(self.completions)
        router.post("/v1/chat/completions", response_model=ChatCompletion)(self.chat_completions)
        for path in ("/classify", "/v1/classify"):
            router.post(path, response_model=Classification)(self.classify)
        router.get("/v1/models")(self.models)
        router.get("/v1/models/{model_id:path}")(self.model)
        router.get("/health")(self.health)
        router.get("/ready", response_model=Readiness)(self.ready)
        router.get("/metrics", response_class=PlainTextResponse)(self.export)
        return router

    async def completions(self, body: CompletionRequest, request: Request) -> Response:
        """Continue one or several prompts."""
        self._check(body)
        work = self._prepare.completion(body)
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
        texts = await unless_disconnected(request, self._collect(work))
        choices = [
            CompletionChoice(index=index, text=delta.text, finish_reason=delta.finish)
            for index, delta in enumerate(texts)
        ]
        return JSONResponse(reply(choices, work.usage()).model_dump())

    async def chat_completions(self, body: ChatCompletionRequest, request: Request) -> Response:
        """Answer a conversation."""
        self._check(body)
        work = self._prepare.chat(body)
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
                for index in range(len(work.journals))
            ]
            return await self._stream(
                request, work, first, chunk, lambda usage: chunk_of([], usage)
            )
        texts = await unless_disconnected(request, self._collect(work))
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

    async def classify(self, body: ClassifyRequest, request: Request) -> Response:
        """Label one or several texts."""
        self._check(body)
        prompts = self._prepare.classification(body)
        logits = await unless_disconnected(request, self._classify(prompts))
        reply = classification(self._settings, prompts, logits, use_activation=body.use_activation)
        return JSONResponse(reply.model_dump())

    async def models(self) -> ModelList:
        """The one model that is served."""
        return ModelList(data=[self._model()])

    async def model(self, model_id: str) -> Model:
        """A served model by its id."""
        self._prepare.check_model(model_id)
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

    def _check(self, body: ModelRequest) -> None:
        """Refuse a request that cannot be served, whatever its prompt."""
        self._prepare.check(body)
        readiness = self._engine.readiness()
        if not readiness.ready:
            raise RequestError(
                503,
                f"not ready yet: {readiness.phase}, {readiness.percent} %",
                kind="service_unavailable",
                headers={"Retry-After": "2"},
            )

    async def _classify(self, prompts: Sequence[Sequence[int]]) -> list[tuple[float, ...]]:
        with self._limit.slot():
            self._metrics.observe_prompt(sum(len(prompt) for prompt in prompts))
            return await classify_all(self._engine.classify, prompts)

    async def _deltas(self, work: Work) -> AsyncGenerator[tuple[int, TextDelta], None]:
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

    async def _collect(self, work: Work) -> list[TextDelta]:
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
        work: Work,
        first: Sequence[BaseModel],
        chunk: Callable[[int, TextDelta], BaseModel],
        usage_chunk: Callable[[Usage], BaseModel],
    ) -> sse.EventStream:
        """A streamed reply. Waits for the first text, so that an early error has a real status."""
        deltas = self._deltas(work)
        try:
            index, delta = await unless_disconnected(request, _first_of(deltas))
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


async def _first_of(deltas: AsyncGenerator[T, None]) -> T:
    return await anext(deltas)

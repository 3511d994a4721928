"""The HTTP API over whatever engine it is given: OpenAI's completions and chat, vLLM's classify.

Knows schema, text and HTTP; knows neither gRPC nor Ray.
"""

import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager
from typing import Protocol, TypeVar

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse

from cluster.errors import RequestError
from cluster.ingress import errors, sse
from cluster.ingress.auth import ANYBODY, Access
from cluster.ingress.classify import classification, classify_all
from cluster.ingress.clients import client_key
from cluster.ingress.disconnect import unless_disconnected
from cluster.ingress.journal import Journal
from cluster.ingress.limits import BodyLimit, ConcurrencyLimit
from cluster.ingress.merge import merge
from cluster.ingress.prepare import ApiSettings, Preparer, Work
from cluster.ingress.replies import ChatReplies, Chunk, CompletionReplies, Replies
from cluster.ingress.request_log import RequestLog
from cluster.ingress.text import AnswerText, TextDelta, generate_text, joined
from cluster.metrics import IngressMetrics
from cluster.schema import (
    ChatCompletion,
    ChatCompletionRequest,
    Classification,
    ClassifyRequest,
    Completion,
    CompletionRequest,
    Model,
    ModelList,
    ModelRequest,
    Readiness,
    StreamOptions,
)
from model.chat import ChatFormat
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

    async def classify(self, prompt_ids: Sequence[int], client: str) -> tuple[float, ...]:
        """Logits of a prompt, one for each label. Cancelling aborts it. client: who asks.

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
    access: Access = ANYBODY,
) -> FastAPI:
    """The whole HTTP side as one ASGI app. access: who may use it."""

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        async with engine.running():
            yield

    app = FastAPI(title="Maestrale", lifespan=lifespan)
    app.include_router(_Api(engine, tokenizer, chat, settings, metrics).router())
    errors.install(app)
    app.add_middleware(BodyLimit, max_bytes=settings.max_body_bytes)
    app.add_middleware(access.protect)
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
        work = self._prepare.completion(body, _client_of(request, body))
        replies = CompletionReplies(work, self._settings.model_id, self._tokenizer)
        return await self._answer(request, work, replies)

    async def chat_completions(self, body: ChatCompletionRequest, request: Request) -> Response:
        """Answer a conversation."""
        self._check(body)
        work = self._prepare.chat(body, _client_of(request, body))
        replies = ChatReplies(work, self._settings.model_id, self._tokenizer)
        return await self._answer(request, work, replies)

    async def classify(self, body: ClassifyRequest, request: Request) -> Response:
        """Label one or several texts."""
        self._check(body)
        prompts = self._prepare.classification(body)
        client = _client_of(request, body)
        logits = await unless_disconnected(request, self._classify(prompts, client))
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

    async def _classify(
        self, prompts: Sequence[Sequence[int]], client: str
    ) -> list[tuple[float, ...]]:
        with self._limit.slot():
            self._metrics.observe_prompt(sum(len(prompt) for prompt in prompts))
            return await classify_all(lambda prompt: self._engine.classify(prompt, client), prompts)

    async def _answer(self, request: Request, work: Work, replies: Replies) -> Response:
        if work.body.stream:
            return await self._stream(request, work, replies)
        answers = await unless_disconnected(request, self._collect(work))
        return JSONResponse(replies.whole(answers).model_dump())

    async def _deltas(self, work: Work) -> AsyncGenerator[tuple[int, TextDelta], None]:
        """Text of all choices as it comes, each with its choice's index."""
        with self._limit.slot():
            self._metrics.observe_prompt(sum(len(each.prompt_ids) for each in work.prompts))
            streams = [
                generate_text(
                    self._engine.generate,
                    journal,
                    AnswerText(self._tokenizer, journal, work.rules, work.echo(index)),
                )
                for index, journal in enumerate(work.journals)
            ]
            async with aclosing(merge(streams)) as merged:
                async for index, delta in merged:
                    yield index, delta

    async def _collect(self, work: Work) -> list[TextDelta]:
        """The whole answer of every choice."""
        answers: list[list[TextDelta]] = [[] for _ in work.journals]
        async with aclosing(self._deltas(work)) as deltas:
            async for index, delta in deltas:
                answers[index].append(delta)
        return [joined(answer) for answer in answers]

    async def _stream(self, request: Request, work: Work, replies: Replies) -> sse.EventStream:
        """A streamed reply. Waits for the first text, so that an early error has a real status."""
        deltas = self._deltas(work)
        try:
            index, delta = await unless_disconnected(request, _first_of(deltas))
        except BaseException:
            await deltas.aclose()
            raise
        options = work.body.stream_options or StreamOptions()
        has_usage = options.include_usage and options.continuous_usage_stats
        num_told = 0

        def event(chunk: Chunk) -> bytes:
            return sse.event(with_usage(chunk) if has_usage else chunk)

        def with_usage(chunk: Chunk) -> Chunk:
            return chunk.model_copy(update={"usage": work.usage(num_told)})

        async def events() -> AsyncGenerator[bytes, None]:
            nonlocal num_told
            async with aclosing(deltas) as rest:
                try:
                    for chunk in replies.opening():
                        yield event(chunk)
                    num_told = len(delta.token_ids)
                    yield event(replies.chunk(index, delta))
                    async for next_index, next_delta in rest:
                        num_told += len(next_delta.token_ids)
                        yield event(replies.chunk(next_index, next_delta))
                    if options.include_usage:
                        yield sse.event(with_usage(replies.closing()))
                except Exception as error:
                    # The status is sent already: the stream itself must say that it failed.
                    yield sse.event(errors.error_body(errors.as_request_error(error)))
                yield sse.DONE

        return sse.EventStream(events())


def _client_of(request: Request, body: ModelRequest) -> str:
    return client_key(request.headers.get("authorization"), body.user)


async def _first_of(deltas: AsyncGenerator[T, None]) -> T:
    return await anext(deltas)

"""The HTTP API over whatever engine it is given: OpenAI's completions and chat, vLLM's classify.

Knows schema, text and HTTP; knows neither gRPC nor Ray.
"""

import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from typing import Any

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse

from cluster.ingress import anthropic, errors, responses, sse, tokens
from cluster.ingress.answerer import Answerer, Engine
from cluster.ingress.auth import ANYBODY, Access, KeyCheck
from cluster.ingress.classify import classification
from cluster.ingress.clients import client_key
from cluster.ingress.disconnect import unless_disconnected
from cluster.ingress.document import GENERATION, MODELS, SERVICE, STREAMED, new_app
from cluster.ingress.limits import BodyLimit
from cluster.ingress.prepare import ApiSettings, Work
from cluster.ingress.replies import ChatReplies, ChunkForm, CompletionReplies, Replies
from cluster.ingress.request_log import RequestLog
from cluster.metrics import IngressMetrics
from cluster.schema import (
    RESUMED_TOKENS,
    Alive,
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
)
from model.chat import ChatFormat
from model.tokenizer import Tokenizer


def create_app(
    engine: Engine,
    tokenizer: Tokenizer,
    chat: ChatFormat,
    settings: ApiSettings,
    metrics: IngressMetrics,
    access: Access = ANYBODY,
    *,
    beside: Callable[[Answerer], AbstractAsyncContextManager[Any]] = nullcontext,
) -> FastAPI:
    """The whole HTTP side as one ASGI app.

    access: who may use it. beside: a door that is no HTTP, open while the app runs.
    """
    answerer = Answerer(engine, tokenizer, chat, settings, metrics)

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        async with engine.running(), beside(answerer):
            yield

    app = new_app(lifespan)
    app.include_router(_Api(answerer).router())
    app.include_router(tokens.router(answerer))
    app.include_router(responses.router(answerer))
    app.include_router(anthropic.router(answerer))
    errors.install(app)
    app.add_middleware(BodyLimit, max_bytes=settings.max_body_bytes)
    app.add_middleware(KeyCheck, access=access)
    app.add_middleware(RequestLog, metrics=metrics)
    app.add_middleware(access.tell_browsers)  # outermost: RequestLog answers, too
    return app


class _Api:
    """The endpoints. Owned by the event loop."""

    def __init__(self, answerer: Answerer) -> None:
        self._answerer = answerer
        self._settings = answerer.settings
        self._created = int(time.time())

    def router(self) -> APIRouter:
        router = APIRouter()
        for path, answer, reply in (
            ("/v1/completions", self.completions, Completion),
            ("/v1/chat/completions", self.chat_completions, ChatCompletion),
        ):
            router.post(path, response_model=reply, responses=STREAMED, tags=[GENERATION])(answer)
        for path, is_documented in (("/classify", False), ("/v1/classify", True)):
            router.post(
                path,
                response_model=Classification,
                tags=[GENERATION],
                include_in_schema=is_documented,
            )(self.classify)
        router.get("/v1/models", tags=[MODELS])(self.models)
        router.get("/v1/models/{model_id:path}", tags=[MODELS])(self.model)
        router.get("/health", tags=[SERVICE])(self.health)
        not_ready: dict[int | str, dict[str, Any]] = {
            503: {"model": Readiness, "description": "Not ready yet."}
        }
        router.get("/ready", response_model=Readiness, responses=not_ready, tags=[SERVICE])(
            self.ready
        )
        router.get("/metrics", response_class=PlainTextResponse, tags=[SERVICE])(self.metrics)
        return router

    async def completions(self, body: CompletionRequest, request: Request) -> Response:
        """Continue one or several prompts."""
        work = await self._answerer.completion(body, _client_of(request, body))
        replies = CompletionReplies(work, self._settings.model_id, self._answerer.tokenizer)
        return await self._answer(request, work, replies)

    async def chat_completions(self, body: ChatCompletionRequest, request: Request) -> Response:
        """Answer a conversation."""
        work = await self._answerer.chat(body, _client_of(request, body))
        replies = ChatReplies(work, self._settings.model_id, self._answerer.tokenizer)
        return await self._answer(request, work, replies)

    async def classify(self, body: ClassifyRequest, request: Request) -> Response:
        """Label one or several texts."""
        prompts = await self._answerer.classification(body)
        client = _client_of(request, body)
        logits = await unless_disconnected(request, self._answerer.classify(prompts, client))
        reply = classification(self._settings, prompts, logits, use_activation=body.use_activation)
        return JSONResponse(reply.model_dump())

    async def models(self) -> ModelList:
        """The one model that is served."""
        return ModelList(data=[self._model()])

    async def model(self, model_id: str) -> Model:
        """A served model by its id."""
        self._answerer.prepare.check_model(model_id)
        return self._model()

    async def health(self) -> Alive:
        """This process is alive."""
        return Alive()

    async def ready(self) -> JSONResponse:
        """Whether a real forward pass has gone through every expert; 503 before."""
        readiness = self._answerer.engine.readiness()
        return JSONResponse(readiness.model_dump(), 200 if readiness.ready else 503)

    async def metrics(self) -> str:
        """Metrics of all processes, in Prometheus' text format."""
        return await self._answerer.engine.metrics()

    def _model(self) -> Model:
        return Model(
            id=self._settings.model_id,
            root=self._settings.model_id,
            created=self._created,
            max_model_len=self._settings.max_model_len,
        )

    async def _answer(self, request: Request, work: Work, replies: Replies) -> Response:
        if work.body.stream:
            form = ChunkForm(work, replies)
            keep_alive_s = self._settings.sse_keep_alive_s
            deltas = self._answerer.deltas(work)
            stream = await sse.stream(request, deltas, form, keep_alive_s=keep_alive_s)
            if work.body.resume_token_ids:
                stream.headers[RESUMED_TOKENS] = str(len(work.body.resume_token_ids))
            return stream
        answers = await unless_disconnected(request, self._answerer.answers(work))
        return JSONResponse(replies.whole(answers).model_dump())


def _client_of(request: Request, body: ModelRequest) -> str:
    """Who asks; see client_key."""
    return client_key(request.headers.get("authorization"), body.user)

"""From a body to what its choices become, whatever protocol it came by.

Knows schema, text and the engine behind it; knows no HTTP and no protocol's replies.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, aclosing
from typing import Protocol, TypeVar

from cluster.errors import RequestError
from cluster.ingress.classify import classify_all
from cluster.ingress.journal import Journal
from cluster.ingress.limits import ConcurrencyLimit
from cluster.ingress.merge import merge
from cluster.ingress.prepare import ApiSettings, Preparer, Work
from cluster.ingress.prompts import is_long
from cluster.ingress.text import AnswerText, TextDelta, generate_text, joined
from cluster.log import RequestLogger
from cluster.metrics import IngressMetrics
from cluster.schema import (
    IGNORED,
    ChatCompletionRequest,
    ClassifyRequest,
    CompletionRequest,
    ModelRequest,
    Readiness,
)
from model.chat import ChatFormat
from model.tokenizer import Tokenizer

logger = RequestLogger(logging.getLogger(__name__))

T = TypeVar("T")


class Engine(Protocol):
    """What the ingress needs of the cluster behind it."""

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

    async def settled(self) -> Readiness:
        """The same, but not while it is about to change: a service that has been changed is ready
        again in a moment, and its callers are to notice nothing but that.
        """
        ...

    async def metrics(self) -> str:
        """Metrics of all processes as text."""
        ...


class Answerer:
    """What all doors to one served model share. Owned by the event loop.

    A door makes of its request a body in OpenAI's words, of that a Work (`completion`, `chat`), and
    of that its answers: all at once (`answers`) or as they come (`deltas`). Both hold a place
    among the requests in progress; both give the request up when they are cancelled or closed.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        chat: ChatFormat,
        settings: ApiSettings,
        metrics: IngressMetrics,
    ) -> None:
        self.engine = engine
        self.tokenizer = tokenizer
        self.settings = settings
        self.chat_format = chat
        self.prepare = Preparer(tokenizer, chat, settings)
        self._metrics = metrics
        self._limit = ConcurrencyLimit(settings.max_concurrent_requests)
        metrics.in_progress.set_function(lambda: self._limit.num_open)

    async def completion(self, body: CompletionRequest, client: str) -> Work:
        """Work of a plain completion; client is who asks. Raises RequestError, SamplingError."""
        await self._check(body)
        return await self.prepared(body, lambda: self.prepare.completion(body, client))

    async def chat(self, body: ChatCompletionRequest, client: str) -> Work:
        """Work of a chat completion; client is who asks. Raises RequestError, SamplingError."""
        await self._check(body)
        return await self.prepared(body, lambda: self.prepare.chat(body, client))

    async def classification(self, body: ClassifyRequest) -> list[Sequence[int]]:
        """Ids of what is to be classified. Raises RequestError."""
        await self._check(body)
        return await self.prepared(body, lambda: self.prepare.classification(body))

    async def prepared(self, body: ModelRequest, prepare: Callable[[], T]) -> T:
        """What `prepare` makes of a body. Raises what it raises, and RequestError.

        A long one holds a place meanwhile, so that overload costs nothing, and a thread instead of
        the event loop, which all streams share.
        """
        if not is_long(body):
            return prepare()
        with self._limit.slot():
            return await asyncio.to_thread(prepare)

    async def deltas(self, work: Work) -> AsyncGenerator[tuple[int, TextDelta], None]:
        """What is new of any choice as it comes, with the choice's index; each choice's last has
        `finish`. Raises RequestError, HeadUnavailableError.
        """
        with self._limit.slot():
            self._metrics.observe_prompt(sum(len(each.prompt_ids) for each in work.prompts))
            streams = [
                generate_text(
                    self.engine.generate,
                    journal,
                    AnswerText(self.tokenizer, journal, work.rules, work.echo(index)),
                )
                for index, journal in enumerate(work.journals)
            ]
            async with aclosing(merge(streams)) as merged:
                try:
                    async for index, delta in merged:
                        yield index, delta
                except RequestError as error:
                    if error.param == "grammar":  # what heads call a form, whoever asked for it
                        error.param = work.form_field
                    raise

    async def answers(self, work: Work) -> list[TextDelta]:
        """The whole answer of every choice that is drawn. Raises as `deltas` does."""
        answers: list[list[TextDelta]] = [[] for _ in work.journals]
        async with aclosing(self.deltas(work)) as deltas:
            async for index, delta in deltas:
                answers[index].append(delta)
        return [joined(answer) for answer in answers]

    async def classify(
        self, prompts: Sequence[Sequence[int]], client: str
    ) -> list[tuple[float, ...]]:
        """Logits of every prompt, one for each label. Raises as `deltas` does."""
        with self._limit.slot():
            self._metrics.observe_prompt(sum(len(prompt) for prompt in prompts))
            return await classify_all(lambda prompt: self.engine.classify(prompt, client), prompts)

    @property
    def num_in_progress(self) -> int:
        """Requests that hold a place."""
        return self._limit.num_open

    def note_ignored(self, body: ModelRequest) -> None:
        """Count the fields that a request gives and nothing here looks at."""
        ignored = body.ignored()
        if ignored:
            logger.debug("ignored fields: %s", ", ".join(ignored)[:200])
        for name in ignored:
            self._metrics.observe_ignored(name if name in IGNORED else "other")

    async def _check(self, body: ModelRequest) -> None:
        """Refuse a request that cannot be served, whatever its prompt."""
        self.prepare.check(body)
        self.note_ignored(body)
        if self.engine.readiness().ready:
            return
        with self._limit.slot():
            readiness = await self.engine.settled()
        if not readiness.ready:
            raise RequestError(
                503,
                f"not ready yet: {readiness.phase}, {readiness.percent} %",
                kind="service_unavailable",
                headers={"Retry-After": "2"},
            )

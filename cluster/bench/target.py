"""The server under load: one streamed request at a time out, a Record back. All HTTP is here."""

import asyncio
import json
from types import TracebackType
from typing import Any, Self

import httpx

from cluster.bench.summary import Record
from cluster.bench.workload import Job
from cluster.client import failures
from cluster.client.chunks import END_MARK
from cluster.client.reply import check_status, is_event_stream
from cluster.client.settings import LIMITS, Settings
from cluster.client.sse import EventDecoder
from cluster.errors import (
    APIError,
    APIResponseValidationError,
    APIStatusError,
    APIStreamError,
    APITimeoutError,
    ConfigurationError,
)


class Target:
    """Any server that speaks OpenAI's streamed completions. Belongs to one event loop."""

    def __init__(
        self,
        settings: Settings,
        *,
        chat: bool = False,
        ignore_eos: bool = True,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        """chat: ask /v1/chat/completions, with the prompt as the one message of a user.
        ignore_eos: ask for answers of exactly the wanted length, where the server knows how.
        """
        self.root = settings.root
        self.model: str | None = None
        self._is_chat = chat
        self._ignore_eos = ignore_eos
        self._http = httpx.AsyncClient(
            headers=settings.headers, timeout=settings.timeout, limits=LIMITS, transport=transport
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._http.aclose()

    async def find_model(self) -> str:
        """Ask for the first model that the server has, and use it. Raises APIError."""
        request = self._http.build_request("GET", f"{self.root}/v1/models")
        try:
            response = await self._http.send(request)
        except httpx.RequestError as error:
            raise failures.transport_error(error, request) from error
        check_status(response)
        try:
            self.model = str(response.json()["data"][0]["id"])
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise ConfigurationError(
                f"{self.root}/v1/models names no model; say which with --model"
            ) from error
        return self.model

    async def send(self, job: Job, intended_s: float | None) -> Record:
        """Make a request and read its answer to the end. A failure is in the record."""
        request = self._request(job)
        sent_s = asyncio.get_running_loop().time()
        answer = _Answer(job, sent_s if intended_s is None else intended_s, sent_s)
        try:
            response = await self._http.send(request, stream=True)
            try:
                await _read(response, answer)
            finally:
                await response.aclose()
        except httpx.RequestError as error:
            mapped = failures.transport_error(error, request)
            kind = "timeout" if isinstance(mapped, APITimeoutError) else "connection"
            return answer.record(kind, str(mapped))
        except APIStatusError as error:
            return answer.record(f"HTTP {error.status_code}", str(error))
        except APIError as error:
            kind = "stream" if isinstance(error, APIStreamError) else "answer"
            return answer.record(kind, str(error))
        if not answer.has_begun:
            return answer.record("answer", "the stream ended without a single choice")
        return answer.record()

    def _request(self, job: Job) -> httpx.Request:
        body: dict[str, Any] = {
            "model": self.model,
            "max_tokens": job.output_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self._ignore_eos:
            body["ignore_eos"] = True
        if self._is_chat:
            body["messages"] = [{"role": "user", "content": job.prompt}]
        else:
            body["prompt"] = job.prompt
        path = "/v1/chat/completions" if self._is_chat else "/v1/completions"
        return self._http.build_request("POST", self.root + path, json=body)


async def _read(response: httpx.Response, answer: "_Answer") -> None:
    """Take in a streamed answer. Raises httpx's errors and APIError."""
    if not is_event_stream(response):
        await response.aread()
        check_status(response)
        raise failures.not_a_stream(response)
    loop = asyncio.get_running_loop()
    decoder = EventDecoder()
    async for packet in response.aiter_bytes():
        now_s = loop.time()
        for data in decoder.feed(packet):
            if data == END_MARK:
                return
            try:
                answer.take(json.loads(data), now_s)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise APIResponseValidationError(
                    f"unreadable chunk {data[:200]!r}: {error!r}"
                ) from error
    raise failures.stream_broke_off(response, len(answer.chunks_s), None)


class _Answer:
    """What has come of one answer so far."""

    def __init__(self, job: Job, intended_s: float, sent_s: float) -> None:
        self.chunks_s: list[float] = []
        self._job = job
        self._intended_s = intended_s
        self._sent_s = sent_s
        self._textless_s: float | None = None
        self._usage: tuple[int, int] | None = None

    @property
    def has_begun(self) -> bool:
        return bool(self.chunks_s) or self._textless_s is not None

    def take(self, chunk: Any, now_s: float) -> None:
        """Note a chunk. Raises APIStreamError for an error event, others for a wrong shape."""
        if error := chunk.get("error"):
            raise failures.stream_failed(error)
        for choice in chunk.get("choices") or ():
            text = choice["delta"].get("content") if "delta" in choice else choice["text"]
            if text:
                self.chunks_s.append(now_s)
            else:  # a role, an end, or a token that makes no text
                self._textless_s = now_s
        if usage := chunk.get("usage"):
            self._usage = (int(usage["prompt_tokens"]), int(usage["completion_tokens"]))

    def record(self, error: str | None = None, message: str = "") -> Record:
        """The request's record; `error` is why it ends here."""
        if not self.chunks_s and self._textless_s is not None and error is None:
            self.chunks_s.append(self._textless_s)  # an answer without text: its end is its start
        prompt = self._job.prompt
        known_input = None if isinstance(prompt, str) else len(prompt)
        input_tokens, output_tokens = self._usage or (known_input, len(self.chunks_s))
        return Record(
            intended_s=self._intended_s,
            sent_s=self._sent_s,
            chunks_s=tuple(self.chunks_s),
            ended_s=asyncio.get_running_loop().time(),
            input_tokens=input_tokens,
            output_tokens=output_tokens,
            is_counted=self._usage is None,
            error=error,
            message=message,
        )

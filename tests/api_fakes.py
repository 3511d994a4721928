"""The HTTP API over a scripted engine, and callers that need no socket."""

import asyncio
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from shutil import copyfile
from typing import Any

import httpx
import pytest

from cluster.ingress.api import create_app
from cluster.ingress.auth import ANYBODY, Access
from cluster.ingress.journal import Journal, News
from cluster.ingress.prepare import ApiSettings
from cluster.metrics import IngressMetrics
from cluster.schema import Readiness
from model.chat import ChatFormat
from model.generation_defaults import GenerationDefaults
from model.sampling_params import TokenLogprobs
from model.tokenizer import Tokenizer

DEADLINE_S = 30.0
"""Longest wait for the app; only a hang comes near it."""

JSON = {"content-type": "application/json"}
COMPLETIONS = "/v1/completions"
CLASSIFY = "/v1/classify"
CHAT = "/v1/chat/completions"
MODEL_ID = "tiny"
CONTEXT = 64
VOCAB_SIZE = 2048
EOS = 2

USER = {"role": "user", "content": "the wind"}
DONE = "[DONE]"


Script = Callable[[Journal], Iterable[int | tuple[int, ...] | Exception]]
"""Of a journal the ids that its head will draw, some of them at once; an exception is raised in its
turn."""


def logprobs_of(token_id: int, num_top: int) -> TokenLogprobs:
    """What the scripted heads say of a token: it is the second likeliest, after the id below it;
    then come the ids below that. Odd ids are less likely than even ones, the tenth is impossible.
    """
    own = -0.75 if token_id % 2 else -0.5
    others = [(token_id - 1 - i) % VOCAB_SIZE for i in range(num_top)]
    logprobs = [-0.25 - 0.25 * i if i < 8 else float("-inf") for i in range(num_top)]
    top_ids, top = [*others[:1], token_id, *others[1:]], [*logprobs[:1], own, *logprobs[2:]]
    return TokenLogprobs(own, 2, tuple(top_ids[:num_top]), tuple(top[:num_top]))


LETTER_C = 70


def story(journal: Journal) -> Iterator[int | Exception]:
    """Prompt ids without the first, then as many letters as the choice's number, then the end."""
    yield from journal.prompt_ids[1:]
    yield from [LETTER_C] * journal.params.choice
    yield EOS


def fails_after(num_tokens: int, error: Exception) -> Script:
    """Some ids, then an error."""

    def script(journal: Journal) -> Iterator[int | Exception]:
        yield from [LETTER_C] * num_tokens
        yield error

    return script


def never_ends(journal: Journal) -> Iterator[int | Exception]:
    """Two ids, then a silence."""
    yield from [LETTER_C] * 2


Scorer = Callable[[Sequence[int]], Sequence[float] | Exception | None]
"""Of a prompt its logits; an exception is raised, and None never answers."""


def first_ids(prompt_ids: Sequence[int]) -> list[float]:
    """Three logits: the first two ids, in hundreds, and the length."""
    return [prompt_ids[0] / 100, prompt_ids[-1] / 100, float(len(prompt_ids))]


READY = Readiness(
    ready=True, phase="ready", percent=100, epoch=1, heads_ready=1, heads_expected=1, workers=[]
)
LOADING = Readiness(
    ready=False,
    phase="loading experts",
    percent=40,
    epoch=0,
    heads_ready=0,
    heads_expected=1,
    workers=[],
)


class ScriptedEngine:
    """Emits what its script says, one id a step. A script that ends early leaves a request open."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.state = READY
        self.is_running = False
        self.journals: list[Journal] = []
        """Every journal that was run, in order."""
        self.closed: list[Journal] = []
        """Those whose iterator has ended, for whatever reason."""
        self.scorer: Scorer = first_ids
        self.classified: list[list[int]] = []
        """Every prompt that was to be classified, in order."""
        self.num_classifying = 0
        self.clients: list[str] = []
        """Who asked for a prompt to be classified, each time."""
        self.num_reused = 0
        """Of every prompt, tokens that are in the cache."""

    @property
    def aborted(self) -> list[Journal]:
        """Those that were closed before their end."""
        return [journal for journal in self.closed if journal.finish is None]

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        self.is_running = True
        try:
            yield
        finally:
            self.is_running = False

    async def generate(self, journal: Journal) -> AsyncGenerator[tuple[int, ...], None]:
        self.journals.append(journal)
        try:
            for item in self.script(journal):
                await asyncio.sleep(0)  # so that streams take turns
                if isinstance(item, Exception):
                    raise item
                room = journal.params.max_tokens - len(journal.emitted_ids)
                token_ids = item[:room] if isinstance(item, tuple) else (item,)
                journal.record(self._news(journal, token_ids))
                yield token_ids
                if journal.finish:
                    return
            await asyncio.Event().wait()
        finally:
            self.closed.append(journal)

    def _news(self, journal: Journal, token_ids: tuple[int, ...]) -> News:
        params = journal.params
        is_first = not journal.emitted_ids
        is_last = len(journal.emitted_ids) + len(token_ids) >= params.max_tokens
        stops = token_ids[-1] in params.stop_token_ids
        num_top, num_prompt_top = params.logprobs, params.prompt_logprobs
        return News(
            token_ids,
            "stop" if stops else "length" if is_last else None,
            logprobs=(
                () if num_top is None else tuple(logprobs_of(each, num_top) for each in token_ids)
            ),
            prompt_logprobs=(
                tuple(logprobs_of(each, num_prompt_top) for each in journal.prompt_ids[1:])
                if is_first and num_prompt_top is not None
                else ()
            ),
            num_reused=self.num_reused if journal.num_reused is None else None,
        )

    async def classify(self, prompt_ids: Sequence[int], client: str) -> tuple[float, ...]:
        self.clients.append(client)
        self.classified.append(list(prompt_ids))
        self.num_classifying += 1
        try:
            await asyncio.sleep(0)  # so that prompts take turns
            scores = self.scorer(prompt_ids)
            if isinstance(scores, Exception):
                raise scores
            if scores is None:
                await asyncio.Event().wait()
            return tuple(scores or ())
        finally:
            self.num_classifying -= 1

    def readiness(self) -> Readiness:
        return self.state

    async def settled(self) -> Readiness:
        return self.state

    async def metrics(self) -> str:
        return "# every process\n"


def tools_folder(tiny_folder: Path, into: Path) -> Path:
    """The text side of the tiny checkpoint, with a chat template that knows tools."""
    for name in ("tokenizer.model", "tokenizer_config.json"):
        copyfile(tiny_folder / name, into / name)
    template = Path(__file__).parent / "data" / "tools_template.jinja"
    copyfile(template, into / "chat_template.jinja")
    return into


@cache
def text_side(folder: Path) -> tuple[Tokenizer, ChatFormat]:
    """What a checkpoint knows of text; parsing its template takes longest."""
    tokenizer = Tokenizer.from_folder(folder)
    return tokenizer, ChatFormat.from_folder(folder, tokenizer)


class Api:
    """The whole HTTP side over a scripted engine, spoken to without a socket."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer, self._chat = text_side(folder)
        self.engine = ScriptedEngine(story)
        self.metrics = IngressMetrics()
        self.settings = ApiSettings(
            model_id=MODEL_ID,
            max_model_len=CONTEXT,
            vocab_size=VOCAB_SIZE,
            eos_token_ids=(EOS,),
            defaults=GenerationDefaults(),
            max_concurrent_requests=2,
            max_body_bytes=20_000,
        )
        self.access = ANYBODY
        self.app = self._new_app()

    def _new_app(self) -> Any:
        return create_app(
            self.engine, self.tokenizer, self._chat, self.settings, self.metrics, self.access
        )

    def admit(self, access: Access) -> None:
        """Start again, for these callers."""
        self.access = access
        self.app = self._new_app()

    def configure(self, **changes: Any) -> None:
        """Start again with other settings."""
        self.settings = replace(self.settings, **changes)
        self.app = self._new_app()

    def request(self, method: str, path: str, **options: Any) -> httpx.Response:
        return asyncio.run(self.ask(method, path, **options))

    async def ask(self, method: str, path: str, **options: Any) -> httpx.Response:
        transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://ingress") as client:
            return await client.request(method, path, **options)

    def get(self, path: str, **options: Any) -> httpx.Response:
        return self.request("GET", path, **options)

    def post(self, path: str, body: dict[str, Any], **options: Any) -> httpx.Response:
        return self.request("POST", path, json=body, **options)

    def events(self, path: str, body: dict[str, Any]) -> list[Any]:
        """The events of a streamed reply; [DONE] as text."""
        response = self.post(path, {**body, "stream": True})
        assert response.status_code == 200, response.text
        assert response.headers["content-type"].startswith("text/event-stream")
        return events_of(response.content)

    @property
    def num_in_progress(self) -> float | None:
        return self.metrics.registry.get_sample_value("maestrale_requests_in_progress")

    def num_requests(self, endpoint: str, status: int) -> float | None:
        labels = {"endpoint": endpoint, "status": str(status)}
        return self.metrics.registry.get_sample_value("maestrale_requests_total", labels)


def events_of(content: bytes) -> list[Any]:
    """Bodies of server-sent events; [DONE] as text."""
    *events, rest = content.decode().split("\n\n")
    assert rest == ""
    assert all(event.startswith("data: ") for event in events)
    return [
        DONE if event == f"data: {DONE}" else json.loads(event.removeprefix("data: "))
        for event in events
    ]


def body_for(path: str, **fields: Any) -> dict[str, Any]:
    """A valid body for either endpoint, with these fields."""
    prompt = {"prompt": "the wind"} if path == COMPLETIONS else {"messages": [USER]}
    return {**prompt, "max_tokens": 20, **fields}


BOTH = pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
EITHER_WAY = pytest.mark.parametrize("stream", [False, True], ids=["plain", "streamed"])


def assert_error(
    response: httpx.Response,
    status: int,
    *,
    param: str | None = None,
    code: str | None = None,
    kind: str = "invalid_request_error",
) -> str:
    """OpenAI's nested object with exactly its four fields. Returns the message."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    body = response.json()
    assert set(body) == {"error"}
    error = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["param"], error["code"], error["type"]) == (param, code, kind)
    assert error["message"]
    message: str = error["message"]
    return message


class Caller:
    """One request, driven by hand, whose caller can hang up. Lives on one event loop.

    spec_version: of ASGI. From 2.4 on sending to a caller who is gone raises OSError.
    """

    def __init__(
        self, api: Api, path: str, body: dict[str, Any], *, spec_version: str = "2.3"
    ) -> None:
        self.sent: list[dict[str, Any]] = []
        self._body = json.dumps(body).encode()
        self._has_gone = asyncio.Event()
        self._raises = spec_version >= "2.4"
        self._is_read = False
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": spec_version},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "root_path": "",
            "query_string": b"",
            "headers": [(b"content-type", b"application/json"), (b"host", b"ingress")],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 2),
        }
        self._task = asyncio.create_task(api.app(scope, self._receive, self._send))

    @property
    def bodies(self) -> list[bytes]:
        """Parts of the reply's body, as they were sent."""
        return [message["body"] for message in self.sent if "body" in message]

    @property
    def error(self) -> BaseException | None:
        """What the app raised at its server; None also before it has ended."""
        ended = self._task.done() and not self._task.cancelled()
        return self._task.exception() if ended else None

    async def until(self, condition: Any, *, patience_s: float = 0.0) -> None:
        """Let the app work until something is so: a thousand turns of the event loop, and, where
        the app waits for a time to pass, so many seconds.
        """
        deadline = time.monotonic() + patience_s
        num_turns = 0
        while num_turns < 1_000 or time.monotonic() < deadline:
            if condition():
                return
            num_turns += 1
            await asyncio.sleep(0)
        pytest.fail(f"it never came to that; sent so far: {self.sent}")

    def leave(self) -> None:
        """Be gone; the app has yet to find out."""
        self._has_gone.set()

    async def cancel(self) -> None:
        """Have the server give the request up."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def hang_up(self) -> None:
        """Leave, and let the app find out. What it raises then is the server's to log."""
        self.leave()
        done, _ = await asyncio.wait([self._task], timeout=DEADLINE_S)
        assert done, "the request goes on without its caller"
        await asyncio.gather(self._task, return_exceptions=True)

    async def _receive(self) -> dict[str, Any]:
        if not self._is_read:
            self._is_read = True
            return {"type": "http.request", "body": self._body, "more_body": False}
        await self._has_gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: dict[str, Any]) -> None:
        if self._has_gone.is_set() and self._raises:
            raise OSError("the caller is gone")
        self.sent.append(message)
        await asyncio.sleep(0)

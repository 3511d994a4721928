"""The official clients, unchanged, over an app in this process. They need no socket."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anthropic
import httpx2
import openai

from tests.api_fakes import Api


@asynccontextmanager
async def _http(api: Api) -> AsyncIterator[httpx2.AsyncClient]:
    transport = httpx2.ASGITransport(api.app, raise_app_exceptions=False)
    async with httpx2.AsyncClient(transport=transport) as http:
        yield http


@asynccontextmanager
async def openai_client(api: Api) -> AsyncIterator[openai.AsyncOpenAI]:
    async with _http(api) as http:
        yield openai.AsyncOpenAI(
            base_url="http://ingress/v1", api_key="sesame", max_retries=0, http_client=http
        )


@asynccontextmanager
async def anthropic_client(api: Api) -> AsyncIterator[anthropic.AsyncAnthropic]:
    async with _http(api) as http:
        yield anthropic.AsyncAnthropic(
            base_url="http://ingress", api_key="sesame", max_retries=0, http_client=http
        )

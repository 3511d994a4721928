"""The OpenAPI document of the HTTP API: what FastAPI cannot know, said once for all doors.

Served at /openapi.json, and as a page at /docs.
"""

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from importlib.metadata import version
from typing import Any

from fastapi import FastAPI
from fastapi.routing import APIRoute

from cluster.schema import ErrorBody

DESCRIPTION = """\
Mixtral models behind the API of OpenAI, with the parameters of vLLM. A field that would change the
answer but is not served is refused; one that nothing knows is ignored.

A streamed reply is `text/event-stream`: events whose data are JSON, the last one `[DONE]`, with
comments while nothing happens. A failure before the first event has a status of its own; one after
it is an event with an `error`.
"""

GENERATION, TOKENS, MODELS, SERVICE = "generation", "tokens", "models", "service"
TAGS = [
    {"name": GENERATION, "description": "Texts, conversations and labels."},
    {"name": TOKENS, "description": "Text to token ids and back."},
    {"name": MODELS, "description": "What is served."},
    {"name": SERVICE, "description": "How the service is."},
]

ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorBody, "description": "The request is at fault: `error` says in what."},
    "5XX": {"model": ErrorBody, "description": "The service is at fault; 503 may be asked again."},
}
"""Of every operation; a door that tells errors otherwise says so on its routes."""

_EVENT = {
    "type": "object",
    "properties": {"event": {"type": "string"}, "data": {"type": "string"}},
    "required": ["data"],
}
"""Of one event: tools hold each to `schema`, as OpenAPI has no `itemSchema` before 3.2."""

STREAMED: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The whole reply or, with `stream: true`, its chunks as events.",
        "content": {"text/event-stream": {"schema": _EVENT}},
    }
}
"""Of operations whose reply can be streamed."""

_SECURITY = {"key": {"type": "http", "scheme": "bearer", "description": "A key, where one is set."}}


def new_app(lifespan: Callable[[FastAPI], AbstractAsyncContextManager[None]]) -> FastAPI:
    """An app without routes, whose document is complete when it has some."""
    app = FastAPI(
        title="Maestrale",
        summary="Serves Mixtral models",
        description=DESCRIPTION,
        version=version("maestrale"),
        license_info={"name": "Apache 2.0", "identifier": "Apache-2.0"},
        openapi_tags=TAGS,
        responses=ERRORS,
        generate_unique_id_function=_operation_id,
        separate_input_output_schemas=False,
        lifespan=lifespan,
    )
    whole = app.openapi

    def openapi() -> dict[str, Any]:
        is_new = app.openapi_schema is None
        document = whole()
        if is_new:
            _finish(document)
        return document

    app.openapi = openapi  # type: ignore[method-assign]
    return app


def _operation_id(route: APIRoute) -> str:
    return route.name


def _finish(document: dict[str, Any]) -> None:
    """Leave out FastAPI's own 422, which never comes, and tell of keys."""
    for path in document["paths"].values():
        for operation in path.values():
            operation["responses"].pop("422", None)
            operation["security"] = [{}, {"key": []}]
    components = document["components"]
    components["securitySchemes"] = _SECURITY
    for name in ("HTTPValidationError", "ValidationError"):
        components["schemas"].pop(name, None)

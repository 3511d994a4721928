"""Server-sent events, as OpenAI frames them."""

from pydantic import BaseModel

MEDIA_TYPE = "text/event-stream"
DONE = b"data: [DONE]\n\n"


def event(body: BaseModel) -> bytes:
    """One event with a JSON body."""
    return b"data: " + body.model_dump_json().encode() + b"\n\n"

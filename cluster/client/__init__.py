"""The SDK: a typed client of a Maestrale server.

    from cluster.client import Client

    with Client() as client:
        reply = client.completions.create(prompt="The wind", max_tokens=8)
        for chunk in client.chat.completions.create(messages=[...], stream=True):
            ...

Replies are the classes of `cluster.schema`, errors those under `APIError` in `cluster.errors`.
Needs httpx and pydantic; neither torch, Ray nor gRPC.
"""

from cluster.client.client import Client
from cluster.client.stream import Stream

__all__ = ["Client", "Stream"]

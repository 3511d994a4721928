"""Wakes a service that sleeps, when a request finds no head.

Two must hear of it: our controller, which has let heads and workers go, and Serve, which starts the
first head for a call that waits for one. Knows no Ray: the handles are given.
"""

import asyncio
import logging
from typing import Any

logger = logging.getLogger(__name__)

AGAIN_S = 1.0
"""Pause before a controller is called again that did not answer."""


class Waker:
    """Owned by the event loop."""

    def __init__(self, controller: Any, heads: Any) -> None:
        """Handles of the Controller and the HeadReplica deployment."""
        self._controller = controller
        self._heads = heads
        self._task: asyncio.Task[None] | None = None

    def __call__(self) -> None:
        """See to it that there will be heads; returns at once. A service that is awake stays so."""
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._wake())

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _wake(self) -> None:
        while True:
            try:
                # first, lest a head is told on its start that none is wanted
                await self._controller.wake.remote()
                await self._heads.awake.remote()
                return
            except Exception as error:
                # Whatever it is, requests wait: ask again.
                logger.warning("the service cannot be woken yet: %r", error)
                await asyncio.sleep(AGAIN_S)

"""What operators ask of the cluster over HTTP. Knows no Ray: what carries it out is given."""

import asyncio
import logging
from collections.abc import Awaitable, Callable

from fastapi import APIRouter, Depends, Request

from cluster.errors import RequestError
from cluster.ingress.auth import Access, came_by_loopback, key_in
from cluster.log import RequestLogger
from cluster.schema import RebalanceRequest, Rebalancing

logger = RequestLogger(logging.getLogger(__name__))

WAIT_S = 30.0
"""How long a plan may take. Planning takes seconds; a controller that starts anew, much longer."""

Rebalance = Callable[[bool], Awaitable[Rebalancing | None]]
"""Whether only to say what would move; returns that, or None while nothing is placed yet."""


def router(rebalance: Rebalance, access: Access) -> APIRouter:
    """POST /admin/rebalance, for those whom `access` lets change the cluster."""

    async def check(request: Request) -> None:
        key = key_in(request.headers)
        refusal = access.admin_refusal(key, came_by_loopback(request.scope))
        if refusal is not None:
            raise refusal

    routes = APIRouter(dependencies=[Depends(check)])

    @routes.post("/admin/rebalance", response_model=Rebalancing)
    async def admin_rebalance(body: RebalanceRequest) -> Rebalancing:
        """Move experts to where they are best for the load of now."""
        try:
            async with asyncio.timeout(WAIT_S):
                answer = await rebalance(body.dry_run)
        except Exception as error:
            # Whatever keeps the controller from answering, the plan is the same: ask again.
            logger.exception("the controller did not answer a call to rebalance")
            raise _unavailable("the controller does not answer; try again later") from error
        if answer is None:
            raise _unavailable("the experts are not placed yet")
        return answer

    return routes


def _unavailable(message: str) -> RequestError:
    headers = {"Retry-After": "2"}
    return RequestError(503, message, kind="service_unavailable", headers=headers)

"""What operators ask of the cluster over HTTP. Knows no Ray: what carries it out is given."""

from collections.abc import Awaitable, Callable

from fastapi import APIRouter

from cluster.errors import RequestError
from cluster.schema import RebalanceRequest, Rebalancing

Rebalance = Callable[[bool], Awaitable[Rebalancing | None]]
"""Whether only to say what would move; returns that, or None while nothing is placed yet."""


def router(rebalance: Rebalance) -> APIRouter:
    """POST /admin/rebalance."""
    routes = APIRouter()

    @routes.post("/admin/rebalance", response_model=Rebalancing)
    async def admin_rebalance(body: RebalanceRequest) -> Rebalancing:
        """Move experts to where they are best for the load of now."""
        answer = await rebalance(body.dry_run)
        if answer is None:
            raise RequestError(
                503,
                "the experts are not placed yet",
                kind="service_unavailable",
                headers={"Retry-After": "2"},
            )
        return answer

    return routes

"""Calls that the library may repeat."""

from typing import TypeVar

from nexus.ipc.outcome import CallFailure, Closed, Refused, Stale, Unknown
from nexus.ipc.peers import Client
from nexus.ipc.retry import RetryBudget, retry_until
from nexus.wire import ReplyStatus, Request

ReplyT = TypeVar("ReplyT")


def may_repeat(outcome: object) -> bool:
    """Whether another attempt can end better: the peer was busy, gone or cut off."""
    if isinstance(outcome, Refused):
        return outcome.status is ReplyStatus.BUSY
    return isinstance(outcome, Stale | Closed | Unknown)


async def call_until(
    client: Client, request: Request[ReplyT], budget: RetryBudget
) -> ReplyT | Refused | CallFailure:
    """Call, and call again within `budget` while the service is busy or being restarted.

    A request that is not declared idempotent is sent once, whatever the budget.
    """
    if not request.INFO.idempotent:
        return await client.call(request, budget.deadline)

    async def attempt() -> ReplyT | Refused | CallFailure:
        return await client.call(request, budget.deadline)

    return await retry_until(attempt, may_repeat, budget, client.tokens)

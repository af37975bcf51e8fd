"""Asking init for a route: bounded in time, attempts and mismatches.

asking --Routed, Denied, NotFound, Malformed--> done
asking --down, busy---------------------------> waiting (backoff) --> asking
asking --deadline, too many mismatches, init gone--> done
"""

from typing import Final

from nexus.abi import SERVICE_NAME_SIZE_MAX, LinkTerms, Nanos, ServiceId
from nexus.ipc.exchange import Answer, Exchange, close_if_any
from nexus.ipc.nonce import NonceMismatchBudget
from nexus.ipc.outcome import (
    CallFailure,
    Closed,
    Denied,
    Malformed,
    MismatchBudgetExceeded,
    NotFound,
    Refused,
    Routed,
    RouteRetryOutcome,
    TimedOut,
)
from nexus.ipc.retry import RetryBudget, RetryTokens, retry_until
from nexus.protocols.init import REPLY_NAME, InitStatus, Route
from nexus.protocols.init import Routed as RoutedReply
from nexus.wire import ReplyStatus

ROUTE_MISMATCHES: Final = NonceMismatchBudget(64)  # the reference's budget (core.md 4.3)


class RouteAttempt:
    """Reads init's answer about one name. Holds no clock and does no I/O."""

    def __init__(self, name: str) -> None:
        self.name = name

    def is_name_valid(self) -> bool:
        """Whether there can be a service of this name at all."""
        return 0 < len(self.name) <= SERVICE_NAME_SIZE_MAX and self.name.isascii()

    def on_answer(self, answer: Answer[RoutedReply]) -> RouteRetryOutcome:
        """init gave a route. A route without its capability is none."""
        reply = answer.reply
        if (answer.cap is None) is not (self.name == REPLY_NAME):
            return Malformed()
        return Routed(
            answer.cap,
            ServiceId(reply.service),
            reply.generation,
            LinkTerms(reply.depth, reply.size, reply.delegations),
            LinkTerms(reply.reply_depth, reply.reply_size, 0),
        )

    def on_refused(self, refused: Refused) -> RouteRetryOutcome | Refused:
        """init said no; what may pass by itself stays Refused."""
        match refused.status:
            case InitStatus.ROUTE_DENIED | ReplyStatus.DENIED:
                return Denied()
            case InitStatus.ROUTE_NOT_FOUND:
                return NotFound()
            case InitStatus.ROUTE_DOWN | ReplyStatus.BUSY:
                return refused
            case ReplyStatus.EXPIRED:
                return TimedOut()
            case _:
                return Malformed()

    def on_failed(self, failure: CallFailure) -> RouteRetryOutcome:
        """init did not answer; a route request cut off has changed nothing that matters."""
        match failure:
            case TimedOut() | Malformed() | MismatchBudgetExceeded():
                return failure
            case _:
                return Closed()


def route_is_pending(outcome: RouteRetryOutcome | Refused) -> bool:
    """Whether the name may have a route a little later."""
    return isinstance(outcome, Refused)


async def route_with_nonce_budgeted(
    control: Exchange,
    name: str,
    budget: RetryBudget,
    mismatches: NonceMismatchBudget,
    tokens: RetryTokens,
) -> RouteRetryOutcome:
    """A route to `name` over `control`, a link to init or to who answers in its place.

    *Bounds*: `budget` for time and attempts, `mismatches` for replies to something else per
    attempt, `tokens` for retries of this route over time.
    """
    attempt = RouteAttempt(name)
    if not attempt.is_name_valid():
        return NotFound()

    async def ask() -> RouteRetryOutcome | Refused:
        return await _ask(control, attempt, budget.deadline, mismatches)

    outcome = await retry_until(ask, route_is_pending, budget, tokens)
    return Closed() if isinstance(outcome, Refused) else outcome


async def _ask(
    control: Exchange, attempt: RouteAttempt, deadline: Nanos, mismatches: NonceMismatchBudget
) -> RouteRetryOutcome | Refused:
    answer = await control.ask(Route(attempt.name), deadline, mismatches=mismatches)
    if isinstance(answer, Refused):
        return attempt.on_refused(answer)
    if isinstance(answer, CallFailure):
        return attempt.on_failed(answer)
    outcome = attempt.on_answer(answer)
    if isinstance(outcome, Malformed):
        await close_if_any(answer.cap)
    return outcome

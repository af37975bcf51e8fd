"""The only retry loops of the tree: bounded in attempts, in time, and by a budget per route.

failed --(attempts left, tokens left, time left)--> waiting --(backoff over)--> trying
failed --(any of them used up)--------------------> given up
"""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final, TypeVar

from nexus.abi import Nanos, Now, SleepUntil

TOKEN: Final = 10  # a retry costs one token; a success gives a tenth of one back
TOKENS_MAX: Final = 10 * TOKEN  # ten retries in a row, then one per ten successes
BACKOFF_DOUBLINGS_MAX: Final = 16  # a backoff grows to 65536 times its first value at most

ResultT = TypeVar("ResultT")


@dataclass(frozen=True, kw_only=True, slots=True)
class RetryBudget:
    """What one operation may spend: attempts in all, the first pause in ns, the last moment."""

    attempts_max: int
    backoff: Nanos
    deadline: Nanos


class RetryTokens:
    """A route's share of retries: when most calls fail, retries stop instead of doubling load."""

    __slots__ = ("tokens",)

    def __init__(self) -> None:
        self.tokens = TOKENS_MAX

    def on_success(self) -> None:
        """A call was answered."""
        self.tokens = min(self.tokens + 1, TOKENS_MAX)

    def take(self) -> bool:
        """Whether one more retry is allowed; it is counted if so."""
        if self.tokens < TOKEN:
            return False
        self.tokens -= TOKEN
        return True


class Retry:
    """Decides about one operation. Tell it of each failure; it says when to try again."""

    __slots__ = ("_budget", "_tokens", "attempts")

    def __init__(self, budget: RetryBudget, tokens: RetryTokens) -> None:
        self._budget = budget
        self._tokens = tokens
        self.attempts = 1

    def on_failed(self, now: Nanos) -> Nanos | None:
        """When to try again, or None to give up."""
        budget = self._budget
        if self.attempts >= budget.attempts_max:
            return None
        pause = budget.backoff << min(self.attempts - 1, BACKOFF_DOUBLINGS_MAX)
        again = Nanos(now + pause)
        if again >= budget.deadline or not self._tokens.take():
            return None
        self.attempts += 1
        return again


async def retry_until(
    attempt: Callable[[], Awaitable[ResultT]],
    failed: Callable[[ResultT], bool],
    budget: RetryBudget,
    tokens: RetryTokens,
) -> ResultT:
    """Await `attempt` until its result is not `failed` or the budget is spent; the last result."""
    retry = Retry(budget, tokens)
    while True:
        result = await attempt()
        if not failed(result):
            tokens.on_success()
            return result
        again = retry.on_failed(await Now())
        if again is None:
            return result
        _ = await SleepUntil(again)

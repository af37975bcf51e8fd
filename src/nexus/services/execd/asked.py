"""A service that is asked for evidence, or to keep it, and that may be away.

    asked --answered--> the answer
          --refused, gone, late--> None, and why; after a late answer nobody asks for SILENCE_MAX

execd does its work without any of them; what is missing is said in the report.
"""

from typing import Final, TypeVar

from nexus.abi import Nanos, Now
from nexus.ipc import (
    CallFailure,
    Refused,
    RetryBudget,
    TimedOut,
    deadline_after,
    may_repeat,
    retry_until,
)
from nexus.runtime.program import Context, Unreachable
from nexus.wire import Protocol, Request

ASK_MAX: Final = Nanos(400_000_000)  # ns for one question; nobody else is served meanwhile
ATTEMPTS_MAX: Final = 4  # of a question that is cut off by a restart
BACKOFF: Final = Nanos(10_000_000)  # ns
SILENCE_MAX: Final = Nanos(5_000_000_000)  # ns without questions after one that was not answered
ABSENT: Final = "not in its uses"

ReplyT = TypeVar("ReplyT")


class Asked:
    """One such service. `why` is why the latest question has no answer, "" if it has."""

    def __init__(self, context: Context, name: str, protocol: Protocol) -> None:
        self._context = context
        self._protocol = protocol
        self._silent_until = Nanos(0)
        self.name = name
        self.why = ""

    @property
    def is_used(self) -> bool:
        """Whether the system file lets execd ask it at all."""
        config = self._context.config
        return self.name in config.uses and self.name not in config.posts

    async def ask(self, request: Request[ReplyT], until: Nanos) -> ReplyT | Refused | None:
        """The answer, also one that says no; None if there is none, and `why`.

        Each request that execd makes may be repeated: it reads, or writes whole reports.
        """
        if not self.is_used:
            self.why = ABSENT
            return None
        now = await Now()
        if now < self._silent_until:
            self.why = "it has just not answered"
            return None
        until = min(until, deadline_after(now, ASK_MAX))
        try:
            client = await self._context.client(self.name, self._protocol, until)
        except Unreachable as fault:
            self._silent_until = deadline_after(await Now(), SILENCE_MAX)
            self.why = "no way to it" if fault.outcome is None else type(fault.outcome).__name__
            return None
        budget = RetryBudget(attempts_max=ATTEMPTS_MAX, backoff=BACKOFF, deadline=until)

        async def attempt() -> ReplyT | Refused | CallFailure:
            return await client.call(request, until)

        outcome = await retry_until(attempt, may_repeat, budget, client.tokens)
        if isinstance(outcome, CallFailure):
            if isinstance(outcome, TimedOut):
                self._silent_until = deadline_after(await Now(), SILENCE_MAX)
            self.why = type(outcome).__name__
            return None
        self.why = f"refused, {outcome.status.name}" if isinstance(outcome, Refused) else ""
        return outcome

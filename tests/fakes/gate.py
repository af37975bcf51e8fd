"""Authorities that allow by a list, for services that ask one."""

from collections.abc import Awaitable, Callable, Mapping
from enum import IntEnum

from nexus.abi import Nanos, ServiceId, service_id
from nexus.ipc import Context
from nexus.protocols.policyd import Reason
from nexus.runtime import Call, Outcome
from nexus.wire import ReplyStatus


class ListGate:
    """Allows what the listed services ask for, and notes what it was asked."""

    def __init__(self, *allowed: ServiceId) -> None:
        self.allowed = set(allowed)
        self.asked: list[tuple[ServiceId, str, str]] = []
        self.hits = 0  # nothing is kept: every question is asked

    async def require(self, call: Call, right: str, target: str = "") -> None:
        self.asked.append((call.sender.service, right, target))
        if call.sender.service not in self.allowed:
            raise call.refuse(ReplyStatus.DENIED)


class RightsGate:
    """Allows the rights it was given by service: "right", or "right:/prefix/" for such targets.

    `unavailable` makes it as one whose policyd is gone. What was decided once is not asked again.
    """

    def __init__(self, rights: Mapping[str, list[str]]) -> None:
        self.rights = {service_id(name): set(given) for name, given in rights.items()}
        self.before_asking: Callable[[], Awaitable[object]] | None = None
        self.asked: list[tuple[ServiceId, str, str]] = []
        self.unavailable = False
        self._known: set[tuple[ServiceId, str, str]] = set()

    async def require(
        self,
        call: Call,
        right: str,
        target: str = "",
        *,
        otherwise: IntEnum = ReplyStatus.DENIED,
    ) -> None:
        outcome = await self.check(call.sender.service, right, target, call.deadline)
        if not outcome.allowed:
            raise call.refuse(otherwise)

    async def check(
        self,
        subject: ServiceId,
        right: str,
        target: str,
        deadline: Nanos,
        context: Context | None = None,
    ) -> Outcome:
        del deadline, context
        if self.unavailable:
            return Outcome(allowed=False, reason=Reason.UNAVAILABLE)
        question = (subject, right, target)
        if question not in self._known:
            if self.before_asking is not None:
                _ = await self.before_asking()
            self._known.add(question)
            self.asked.append(question)
        return Outcome(allowed=self._allows(subject, right, target), reason=Reason.POLICY)

    def _allows(self, subject: ServiceId, right: str, target: str) -> bool:
        for given in self.rights.get(subject, ()):
            name, _, prefix = given.partition(":")
            if name == right and target.startswith(prefix):
                return True
        return False

"""A service that asks policyd before it does anything, and tells what it was told."""

from typing import Annotated, Final

from nexus.abi import Now, ServiceId
from nexus.protocols.policy import RIGHT_SIZE_MAX
from nexus.protocols.policyd import TARGET_SIZE_MAX, Reason
from nexus.runtime import Call
from nexus.runtime.program import Context
from nexus.wire import U64, Message, Protocol, Request, Text


class Used(Message):
    """Whether it was allowed and why, and how long that took (ns)."""

    allowed: bool
    reason: Reason
    took: Annotated[int, U64()]


class Use(Request[Used], op=1, idempotent=True):
    """Is the caller allowed to?"""

    right: Annotated[str, Text(size_max=RIGHT_SIZE_MAX)]
    target: Annotated[str, Text(size_max=TARGET_SIZE_MAX)]


class UseFor(Request[Used], op=2, idempotent=True):
    """Is the service with this id allowed to? A guard should never ask so; a test does."""

    subject: Annotated[int, U64()]
    right: Annotated[str, Text(size_max=RIGHT_SIZE_MAX)]


class Require(Request[Used], op=3, idempotent=True):
    """Refused with DENIED unless the caller is allowed to."""

    right: Annotated[str, Text(size_max=RIGHT_SIZE_MAX)]


PROTOCOL: Final = Protocol("guard", number=1901, version=1, requests=(Use, UseFor, Require))


class Guard:
    """Serves PROTOCOL."""

    PROTOCOL = PROTOCOL

    def __init__(self, context: Context) -> None:
        self._authority = context.authority

    async def handle(self, call: Call, request: Use | UseFor | Require) -> Used:
        begun = await Now()
        if isinstance(request, Require):
            await self._authority.require(call, request.right, "guard")
            return Used(allowed=True, reason=Reason.POLICY, took=await Now() - begun)
        subject, target = call.sender.service, "guard"
        if isinstance(request, UseFor):
            subject = ServiceId(request.subject)
        else:
            target = request.target
        outcome = await self._authority.check(subject, request.right, target, call.deadline)
        return Used(outcome.allowed, outcome.reason, await Now() - begun)

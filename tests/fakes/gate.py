"""An authority that allows by a list, for services that ask one."""

from nexus.abi import ServiceId
from nexus.runtime import Call
from nexus.wire import ReplyStatus


class ListGate:
    """Allows what the listed services ask for, and notes what it was asked."""

    def __init__(self, *allowed: ServiceId) -> None:
        self.allowed = set(allowed)
        self.asked: list[tuple[ServiceId, str, str]] = []

    async def require(self, call: Call, right: str, target: str = "") -> None:
        self.asked.append((call.sender.service, right, target))
        if call.sender.service not in self.allowed:
            raise call.refuse(ReplyStatus.DENIED)

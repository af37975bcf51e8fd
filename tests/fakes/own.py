"""Services of one's own, as users write them: one on the ABI, one ordinary."""

from typing import Any, Final

import msgspec

from nexus.runtime import Call
from nexus.runtime.program import Context, OrdinaryContext
from nexus.wire import Protocol
from tests.fakes.adder import Add, Adder, AdderStatus, Give, Keep, Large, Later, Sum

PROTOCOL: Final = Protocol("own", number=1900, version=1, requests=(Add, Later, Keep, Give, Large))


class Settings(msgspec.Struct, forbid_unknown_fields=True):
    """What DoublingAdder takes."""

    offset: int = 0


class DoublingAdder:
    """Asks the adder it uses, and adds its offset."""

    PROTOCOL = PROTOCOL

    def __init__(self, context: Context) -> None:
        self.context = context
        self.offset = context.settings_as(Settings).offset
        self.adder: Any = None

    async def start(self) -> None:
        self.adder = await self.context.client("adder", PROTOCOL)

    async def handle(self, call: Call, request: Add) -> Sum:
        outcome = await self.adder.call(request, call.deadline)
        if not isinstance(outcome, Sum):
            raise call.refuse(AdderStatus.TOO_LARGE)
        self.context.log.info("added", value=outcome.value)
        return Sum(2 * outcome.value + self.offset)

    def facts(self) -> dict[str, int]:
        return {"offset": self.offset}


class Lazy:
    """Looks for the adder when it is asked, and not before."""

    PROTOCOL = PROTOCOL

    def __init__(self, context: Context) -> None:
        self.context = context

    async def handle(self, call: Call, request: Add) -> Sum:
        adder = await self.context.client("adder", PROTOCOL)
        outcome = await adder.call(request, call.deadline)
        assert isinstance(outcome, Sum)
        return outcome


class Plain(Adder):
    """The adder, as a service of one's own."""

    PROTOCOL = PROTOCOL

    def __init__(self, context: Context) -> None:
        super().__init__()
        self.context = context


async def ordinary(context: OrdinaryContext) -> int:
    """An ordinary program: a client of the adder that serves the same protocol."""
    adder = await context.client("adder", PROTOCOL)

    class Service:
        async def handle(self, call: Call, request: Add) -> Sum:
            outcome = await adder.call(request, call.deadline, call.context)
            if not isinstance(outcome, Sum):
                raise call.refuse(AdderStatus.TOO_LARGE)
            context.log.info("added", value=outcome.value)
            return Sum(outcome.value + 100)

        def facts(self) -> dict[str, int]:
            return {"ordinary": 1}

    return await context.serve(Service(), PROTOCOL)

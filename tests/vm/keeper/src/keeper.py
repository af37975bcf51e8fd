"""keeper: puts numbered values into statefsd, one at a time, and says when each is durable."""

from typing import Annotated, Final

from nexus.abi import ConsoleWrite, Nanos
from nexus.ipc import deadline_after
from nexus.protocols.statefsd import PROTOCOL as STATEFSD
from nexus.protocols.statefsd import Durability, Put, Stored
from nexus.runtime import Call
from nexus.runtime.program import Context, Unusable
from nexus.wire import U32, Message, Protocol, Request

KEYS: Final = 7
COUNT: Final = 150
PAUSE: Final = Nanos(1_000_000)
ASK_MAX: Final = Nanos(5_000_000_000)
REPEATS: Final = 60  # of the number in a value: some are larger than a sector


class Progress(Message):
    """Values that are durable."""

    count: Annotated[int, U32()]


class Ask(Request[Progress], op=1, idempotent=True):
    """How far are you?"""


PROTOCOL: Final = Protocol("keeper", number=1003, version=1, requests=(Ask,))


class Keeper:
    """Serves this protocol."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._count = 0
        self._at: Nanos | None = None

    def handle(self, _call: Call, _request: Ask) -> Progress:
        return Progress(self._count)

    def next_time(self) -> Nanos | None:
        return self._at

    async def start(self) -> None:
        _ = await self._context.client(STATEFSD.name, STATEFSD)
        self._at = await self._context.after(PAUSE)

    async def on_time(self, _now: Nanos) -> None:
        """The next value; each is written where the one KEYS before it was."""
        number = self._count + 1
        statefsd = await self._context.client(STATEFSD.name, STATEFSD)
        key = f"/state/keeper/{number % KEYS}".encode()
        value = f"{number} ".encode() * (REPEATS if number % 3 else 3 * REPEATS)
        deadline = deadline_after(await self._context.now(), ASK_MAX)
        outcome = await statefsd.call(Put(key, value, Durability.DURABLE, 0), deadline)
        if not isinstance(outcome, Stored):
            raise Unusable(f"value {number} is not kept: {outcome!r}")
        self._count = number
        await ConsoleWrite(f"keeper: kept {number}")
        self._at = None if number == COUNT else await self._context.after(PAUSE)

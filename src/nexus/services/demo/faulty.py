"""demo.faulty: fails in the way that its settings say, as a service of a bad system set may.

Owns nothing but the values it may write below its area. It says on the console what it is about to
do: those are the last words that a slot which was left is remembered by.
"""

from enum import StrEnum
from typing import Final, assert_never

import msgspec

from nexus.abi import NEVER, ConsoleWrite, Nanos, SleepUntil, Slot, VmoCreate, VmoWrite
from nexus.ipc import Refused, deadline_after
from nexus.protocols.hello import PROTOCOL, Greeting, HelloRequest
from nexus.protocols.statefsd import PROTOCOL as STATEFSD
from nexus.protocols.statefsd import Durability, Put, Stored
from nexus.runtime import Call
from nexus.runtime.program import Context, Unusable, program_of

WELL_FOR: Final = Nanos(300_000_000)  # ns; it is found healthy before it fails
ASK_MAX: Final = Nanos(2_000_000_000)  # ns for statefsd
PIECE_SIZE: Final = 256 * 1024  # bytes of memory taken at a time
PIECES_MAX: Final = 1024  # 256 MiB; every budget of a system ends before
TOUCHED: Final = b"\1"  # Linux gives zeros without memory behind them
VALUE_SIZE: Final = 4000  # bytes of a value
VALUES_MAX: Final = 65_536  # every quota ends before


class Failure(StrEnum):
    """How it fails."""

    NONE = "none"  # it is as good as any service
    NEVER_READY = "never ready"
    CRASHES = "crashes"  # again and again, as soon as it is started
    HANGS = "hangs"  # after it was healthy
    UNHEALTHY = "unhealthy"  # it says so, after it was healthy
    MEMORY = "memory"  # it takes all that it may have, and then some
    PRIVATE_MEMORY = "private memory"  # the same with memory of its own, which linux bounds
    DISK = "disk"  # it fills its area, and cannot go on then
    MIGRATION = "migration"  # it rewrites data for its version, and cannot go on then


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """[service.NAME.settings]. `keys` are those that a migration rewrites, in `area`, separated by
    spaces."""

    failure: Failure
    area: str = "/state/faulty/"
    keys: str = ""


class Faulty:
    """Serves nexus.protocols.hello, as far as it gets."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._settings = context.settings_as(Settings)
        self._fails_at: Nanos | None = None
        self._is_well = self._settings.failure is not Failure.NEVER_READY
        self._hoard: list[Slot | bytes] = []

    async def handle(self, _call: Call, _request: HelloRequest) -> Greeting:
        """The greeting of whoever still answers."""
        boot = self._context.boot
        return Greeting(boot.pid, boot.generation, [], [])

    def ready(self) -> bool:
        """What init's health probe is answered with."""
        return self._is_well

    def next_time(self) -> Nanos | None:
        """When it fails, if it was well before."""
        return self._fails_at

    async def start(self) -> None:
        """Fail now, or plan to."""
        if STATEFSD.name in self._context.config.uses:
            _ = await self._context.client(STATEFSD.name, STATEFSD)
        match self._settings.failure:
            case Failure.NONE:
                pass
            case Failure.NEVER_READY:
                await self._say("waiting for a sensor that does not answer")
            case Failure.CRASHES:
                await self._say("the calibration table has no entry for this sensor")
                raise KeyError("calibration")
            case Failure.DISK:
                await self._fill()
            case Failure.MIGRATION:
                await self._migrate()
            case Failure.HANGS | Failure.UNHEALTHY | Failure.MEMORY | Failure.PRIVATE_MEMORY:
                self._fails_at = await self._context.after(WELL_FOR)
            case _:
                assert_never(self._settings.failure)

    async def on_time(self, _now: Nanos) -> None:
        """It was well for long enough."""
        self._fails_at = None
        match self._settings.failure:
            case Failure.HANGS:
                await self._say("waiting for a lock that nobody gives back")
                _ = await SleepUntil(NEVER)
            case Failure.UNHEALTHY:
                await self._say("the pressure is out of range")
                self._is_well = False
            case _:
                await self._say("reading everything into memory")
                await self._take_memory()

    async def _take_memory(self) -> None:
        """As much as there is: the kernel refuses what is beyond the budget, and that ends it."""
        for number in range(PIECES_MAX):
            if self._settings.failure is Failure.PRIVATE_MEMORY:
                self._hoard.append(TOUCHED * PIECE_SIZE)
                continue
            piece = await VmoCreate(PIECE_SIZE)
            await VmoWrite(piece, 0, number.to_bytes(4, "little") * (PIECE_SIZE // 4))
            self._hoard.append(piece)
        raise Unusable(f"{PIECES_MAX} pieces of memory, and no end: give this service a budget")

    async def _fill(self) -> None:
        await self._say("writing down everything there is")
        for number in range(VALUES_MAX):
            outcome = await self._put(f"{self._settings.area}{number}", bytes(VALUE_SIZE))
            if isinstance(outcome, Refused):
                raise Unusable(f"no room for more than {number} values: {outcome.status.name}")

    async def _migrate(self) -> None:
        await self._say("migrating the data to another form")
        for key in self._settings.keys.split():
            outcome = await self._put(key, b"in another form, which nobody else can read")
            if isinstance(outcome, Refused):
                raise Unusable(f"{key} is not migrated: {outcome.status.name}")
        raise Unusable("the migrated data do not fit each other")

    async def _put(self, key: str, value: bytes) -> Stored | Refused:
        statefsd = await self._context.client(STATEFSD.name, STATEFSD)
        deadline = deadline_after(await self._context.now(), ASK_MAX)
        outcome = await statefsd.call(Put(key.encode(), value, Durability.DURABLE, 0), deadline)
        if isinstance(outcome, Stored | Refused):
            return outcome
        raise Unusable(f"statefsd does not answer: {outcome!r}")

    async def _say(self, text: str) -> None:
        self._context.log.warning(text)
        await ConsoleWrite(f"{self._context.name}: {text}")


main = program_of(Faulty, PROTOCOL)

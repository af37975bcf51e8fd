"""pump: runs the pump, and stops it when it may not run.

The interlock looks ten times a second. It fails safe: without a fresh reading the pump stands.
"""

from typing import Final

import msgspec

from nexus.abi import Nanos
from nexus.ipc import CallFailure, Client, Refused
from nexus.runtime import Call
from nexus.runtime.program import Context
from pump_station.level_protocol import PROTOCOL as LEVEL
from pump_station.level_protocol import Read, Reading
from pump_station.pump_protocol import OPERATE, GetState, PumpStatus, Start, State, Stop, StopReason

LOOK_EVERY: Final = Nanos(100_000_000)  # ns
ANSWER_MAX: Final = Nanos(50_000_000)  # ns the sensor may take
READING_AGE_MAX: Final = Nanos(500_000_000)  # ns; older is as good as none


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Levels in per mille: below `empty_below` it stops, from `start_above` on it may start."""

    empty_below: int
    start_above: int


class Pump:
    """Serves pump_station.pump_protocol. The pump stands after a restart."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._settings = context.settings_as(Settings)
        self._level: Client
        self._last: Reading | None = None
        self._running = False
        self._reason = StopReason.NOT_STARTED
        self._starts = 0
        self._look_at = context.boot.now

    async def start(self) -> None:
        """Find the sensor; without it the pump cannot be ready."""
        self._level = await self._context.client("level", LEVEL)

    async def handle(self, call: Call, request: Start | Stop | GetState) -> State:
        """The reply."""
        match request:
            case Start():
                await self._context.authority.require(call, OPERATE, "pump")
                self._start(call)
            case Stop():
                await self._context.authority.require(call, OPERATE, "pump")
                self._stop(StopReason.ASKED)
            case GetState():
                pass
        return self._state()

    def next_time(self) -> Nanos | None:
        """When the interlock looks again."""
        return self._look_at

    async def on_time(self, now: Nanos) -> None:
        """Read the level, and stop if that cannot be done or it is too low."""
        outcome = await self._level.call(Read(), Nanos(now + ANSWER_MAX))
        now = await self._context.now()
        self._look_at = Nanos(now + LOOK_EVERY)
        if not isinstance(outcome, Refused | CallFailure):
            self._last = outcome
        if not self._running:
            return
        if not self._is_fresh(now):
            self._stop(StopReason.SENSOR_LOST)
        elif self._level_now() < self._settings.empty_below:
            self._stop(StopReason.TANK_EMPTY)

    def _start(self, call: Call) -> None:
        if self._running:
            return
        if not self._is_fresh(call.now):
            raise call.refuse(PumpStatus.NO_SENSOR)
        if self._level_now() < self._settings.start_above:
            raise call.refuse(PumpStatus.TANK_EMPTY)
        self._running = True
        self._reason = StopReason.RUNNING
        self._starts += 1
        self._context.log.info("pump started", level=self._level_now())

    def _stop(self, reason: StopReason) -> None:
        if self._running:
            self._context.log.warning("pump stopped", reason=reason.name.lower())
        self._running = False
        self._reason = reason

    def _is_fresh(self, now: Nanos) -> bool:
        return self._last is not None and now - self._last.at <= READING_AGE_MAX

    def _level_now(self) -> int:
        return 0 if self._last is None else self._last.level

    def _state(self) -> State:
        return State(self._running, self._reason, self._level_now(), self._starts)

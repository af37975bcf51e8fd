"""level: a model of a tank that fills slowly."""

from typing import Final

import msgspec

from nexus.abi import Nanos
from nexus.runtime import Call
from nexus.runtime.program import Context
from pump_station.level_protocol import LEVEL_MAX, Fill, Filled, Read, Reading

SECOND: Final = 1_000_000_000  # ns
LEVEL_AT_START: Final = 400  # per mille


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How fast the tank fills, in per mille a second."""

    rises_per_second: int


class Level:
    """Serves pump_station.level_protocol. Keeps one number, which a restart may lose."""

    def __init__(self, context: Context) -> None:
        self._rise = context.settings_as(Settings).rises_per_second
        self._level = LEVEL_AT_START
        self._since = context.boot.now

    def handle(self, call: Call, request: Read | Fill) -> Reading | Filled:
        """The reply."""
        match request:
            case Read():
                return Reading(self._level_at(call.now), call.now)
            case Fill(level=level):
                self._level, self._since = level, call.now
                return Filled(level)

    def _level_at(self, now: Nanos) -> int:
        return min(LEVEL_MAX, self._level + self._rise * (now - self._since) // SECOND)

"""The gauge in the simulator: a pressure that swings, and a port that can fall silent."""

from typing import Final

from nexus.runtime import Call
from nexus.runtime.program import Context
from serial_gauge.protocol import PROTOCOL, Pressure, Read

PASCAL_LOW: Final = 100_000
PASCAL_SWING: Final = 5_000
PERIOD: Final = 10_000_000_000  # ns


class Gauge:
    """Serves serial_gauge.protocol without a serial port."""

    PROTOCOL = PROTOCOL

    def __init__(self, context: Context) -> None:
        self._begun = context.boot.now

    def handle(self, call: Call, _request: Read) -> Pressure:
        """A triangle between PASCAL_LOW and PASCAL_SWING above it."""
        phase = 2 * ((call.now - self._begun) % PERIOD)
        height = min(phase, 2 * PERIOD - phase)
        return Pressure(PASCAL_LOW + PASCAL_SWING * height // PERIOD, call.now, 0)

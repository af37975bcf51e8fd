"""pump protocol: start, stop, and how it stands."""

from enum import IntEnum
from typing import Annotated, Final

from nexus.wire import U16, U32, Bool, Message, Protocol, Request

OPERATE: Final = "pump.operate"  # the right that Start and Stop need


class PumpStatus(IntEnum):
    """Why the pump refuses. The numbers are wire format and are never reused."""

    TANK_EMPTY = 16  # the level is below `start_above`
    NO_SENSOR = 17  # there is no reading, or only an old one


class StopReason(IntEnum):
    """Why the pump stands, if it does."""

    NOT_STARTED = 0
    ASKED = 1
    TANK_EMPTY = 2
    SENSOR_LOST = 3
    RUNNING = 4  # it does not stand


class State(Message):
    """Whether it runs, why it stands if it does, the last level (per mille), and how often it was
    started."""

    running: Annotated[bool, Bool()]
    reason: StopReason
    level: Annotated[int, U16()]
    starts: Annotated[int, U32()]


class Start(Request[State], op=1, idempotent=True, refuses=PumpStatus):
    """Run. *Refuses*: NO_SENSOR, TANK_EMPTY; DENIED without the right pump.operate."""


class Stop(Request[State], op=2, idempotent=True):
    """Stand. DENIED without the right pump.operate."""


class GetState(Request[State], op=3, idempotent=True):
    """How it stands."""


PROTOCOL: Final = Protocol("pump", number=1001, version=1, requests=(Start, Stop, GetState))

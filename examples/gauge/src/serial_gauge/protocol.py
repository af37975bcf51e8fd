"""gauge protocol: the last pressure, and how many lines were no reading."""

from enum import IntEnum
from typing import Annotated, Final

from nexus.wire import U32, U64, Message, Protocol, Request

READING_AGE_MAX: Final = 2_000_000_000  # ns; the gauge prints ten lines a second


class GaugeStatus(IntEnum):
    """Why there is no pressure. The numbers are wire format and are never reused."""

    SILENT = 16  # nothing was read for READING_AGE_MAX


class Pressure(Message):
    """Pascal, when it was read (kernel clock, ns), and the lines that made no sense so far."""

    pascal: Annotated[int, U32()]
    at: Annotated[int, U64()]
    malformed: Annotated[int, U64()]


class Read(Request[Pressure], op=1, idempotent=True, refuses=GaugeStatus):
    """The last reading. *Refuses*: SILENT."""


PROTOCOL: Final = Protocol("gauge", number=1002, version=1, requests=(Read,))

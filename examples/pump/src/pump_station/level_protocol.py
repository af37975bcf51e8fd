"""level protocol: how full the tank is."""

from typing import Annotated, Final

from nexus.wire import U16, U64, Message, Protocol, Request

LEVEL_MAX: Final = 1000  # per mille


class Reading(Message):
    """The level in per mille of full, and when it was measured (kernel clock, ns)."""

    level: Annotated[int, U16(maximum=LEVEL_MAX)]
    at: Annotated[int, U64()]


class Read(Request[Reading], op=1, idempotent=True):
    """The last reading."""


class Filled(Message):
    """The level now."""

    level: Annotated[int, U16(maximum=LEVEL_MAX)]


class Fill(Request[Filled], op=2, idempotent=True):
    """Set the level of the model, for those who try it out."""

    level: Annotated[int, U16(maximum=LEVEL_MAX)]


PROTOCOL: Final = Protocol("level", number=1000, version=1, requests=(Read, Fill))

"""exportd protocol: what the service that speaks to the outside has sent and dropped.

What it exports goes out over its ports, as OpenMetrics and OTLP; this is its account.
"""

from enum import IntEnum
from typing import Annotated, Final, TypeAlias

from nexus.wire import U32, U64, Message, Protocol, Request, Text


class CollectorState(IntEnum):
    """Whether the collector takes what is sent."""

    NONE = 0  # none is declared
    AWAY = 1
    THERE = 2


class Stats(Message):
    """The account. A body is one OTLP request; sizes are bytes."""

    scrapes: Annotated[int, U64()]
    scrapes_refused: Annotated[int, U64()]
    collector: CollectorState
    bodies_sent: Annotated[int, U64()]
    bodies_queued: Annotated[int, U32()]
    bodies_dropped: Annotated[int, U64()]  # pushed out of the full queue, or refused for good
    size_queued: Annotated[int, U32()]
    failed: Annotated[int, U64()]  # attempts
    last_failure: Annotated[str, Text(size_max=96)]


class GetStats(Request[Stats], op=1, idempotent=True):
    """The account of this instance."""


ExportdRequest: TypeAlias = GetStats
PROTOCOL: Final = Protocol("exportd", number=13, version=1, requests=(GetStats,))

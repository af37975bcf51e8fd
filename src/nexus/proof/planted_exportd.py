"""What saboteurs break inside exportd, by rung: in the simulator in the process that simulates, on
linux in the interpreter of its own, whose entry is then `sabotaged`."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Final

from nexus.abi import Nanos
from nexus.proof.plants_init import unready_first
from nexus.proof.sabotage import replace
from nexus.protocols.metricsd import Series
from nexus.runtime.program import Main, program_of
from nexus.services.exportd.readings import NoReading, Readings
from nexus.services.exportd.service import Exportd

UNREADY: Final = 260  # probes of 20 ms each: past the readiness deadline of 4 s


def sabotaged(number: str) -> Main:
    """exportd with the fault of a rung."""
    plant(int(number))
    return program_of(Exportd)


def plant(number: int) -> None:
    """Break what turns this rung red."""
    _PLANTS[number]()


def _ready_late() -> None:
    """#38."""
    unready_first(Exportd, UNREADY)


def _page_of_the_start() -> None:
    """#130: what metricsd said at the start is on every page."""
    first: dict[int, list[Series]] = {}  # by instance

    async def opened(readings: Readings, until: Nanos) -> Any:
        held = await original_open(readings, until)
        try:
            first[id(readings)] = await original(readings, until)
        except NoReading:
            first[id(readings)] = []
        return held

    async def series(readings: Readings, until: Nanos) -> Any:
        _ = await original(readings, until)
        return first[id(readings)]

    original_open = replace(Readings, "open", opened)
    original = replace(Readings, "series", series)


_PLANTS: Final[Mapping[int, Callable[[], None]]] = MappingProxyType(
    {38: _ready_late, 130: _page_of_the_start}
)

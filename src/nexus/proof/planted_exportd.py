"""What saboteurs break inside exportd, by rung: in the simulator in the process that simulates, on
linux in the interpreter of its own, whose entry is then `sabotaged`."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Final

from nexus.abi import Nanos
from nexus.proof.plants_init import unready_first
from nexus.proof.sabotage import replace
from nexus.protocols.metricsd import Series
from nexus.runtime.program import Main, program_of
from nexus.services.exportd.readings import Readings
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


def _page_of_before() -> None:
    """#130: what metricsd says is on the next page, and on this one what it said before."""
    before: dict[int, list[Series]] = {}  # by instance

    async def series(readings: Readings, until: Nanos) -> list[Series]:
        now = await original(readings, until)
        said, before[id(readings)] = before.get(id(readings), []), now
        return said

    original = replace(Readings, "series", series)


_PLANTS: Final[Mapping[int, Callable[[], None]]] = MappingProxyType(
    {38: _ready_late, 130: _page_of_before}
)

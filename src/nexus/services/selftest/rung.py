"""What a rung is to the client that climbs it: a check that yields evidence, or fails."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeVar

from nexus.abi import AbiError, PeerGone, Status, Trap

if TYPE_CHECKING:
    from nexus.services.selftest.climb import Climb

Evidence = dict[str, object]
"""What was compared, as JSON: numbers and names that a reader can check."""

ResultT = TypeVar("ResultT")


class RungFailed(Exception):
    """The evidence did not agree; the text says what was expected and what was found."""


class RungAbsent(Exception):
    """There is nothing to climb here: what the rung is about does not exist on this ground. The
    runner knows whether that is so; where it is not, the missing line is red."""


def expect(found: ResultT, wanted: object, what: str) -> None:
    """Fail the rung unless `found` equals `wanted`."""
    if found != wanted:
        raise RungFailed(f"{what}: expected {wanted!r}, found {found!r}")


def require(holds: bool, what: str) -> None:
    """Fail the rung unless `holds`."""
    if not holds:
        raise RungFailed(what)


def expect_type(found: object, wanted: type[ResultT], what: str) -> ResultT:
    """Fail the rung unless `found` is a `wanted`; returns it."""
    if not isinstance(found, wanted):
        raise RungFailed(f"{what}: expected {wanted.__name__}, found {found!r}")
    return found


async def status_of_trap(trap: Trap[Any]) -> Status | None:
    """The status a trap is refused with, None if it is not."""
    try:
        _ = await trap
    except PeerGone as gone:
        raise RungFailed(f"{type(trap).__name__} met {gone}") from gone
    except AbiError as error:
        return error.status
    return None


async def refusal(trap: Trap[Any]) -> Status:
    """The status a trap is refused with; a trap that succeeds fails the rung."""
    status = await status_of_trap(trap)
    if status is None:
        raise RungFailed(f"{type(trap).__name__} succeeded, a refusal was due")
    return status


@dataclass(frozen=True, slots=True)
class Rung:
    """One row of the ladder as the client climbs it.

    With `stated` another service prints the marker: the client says what it measured, on a line
    of its own, and the runner compares the two. With `always` it is climbed in every boot, with
    `boot` in that one: what is done there is needed when the rung is met in a later one.
    """

    number: int
    check: "Callable[[Climb], Awaitable[Evidence]]"
    stated: bool = False
    always: bool = False
    boot: int | None = None


RUNG_LINE_SIZE_MAX: Final = 500  # bytes of a FAIL line; the console takes 512

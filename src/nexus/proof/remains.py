"""What a boot left on its disks, as the runner itself reads it while the system is down."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NamedTuple

from nexus.init.plan import Plan
from nexus.kernel.core import Hardware


class Kept(NamedTuple):
    """A value in a store, the number of the change that set it, and where its record lies."""

    value: bytes
    sequence: int
    offset: int  # bytes from the device's beginning
    size: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Remains:
    """The store on the disk of statefsd. `problem` says why there is none to be read, or is empty.

    `size` is that of the device; `first_block` are its first bytes.
    """

    problem: str = ""
    size: int = 0
    first_block: bytes = b""
    epoch: int = 0
    sequence: int = 0
    records: Mapping[bytes, Kept] = field(default_factory=dict)


IMAGE_SUFFIX: Final = ".img"


def image_of(state: Path, device: Hardware) -> Path:
    """Where the content of a block device is while the system is down."""
    return Path(device.path) if device.path else state / f"{device.name}{IMAGE_SUFFIX}"


NOTHING_LEFT: Final = Remains(problem="the system has no disk")


def remains_of(plan: Plan, state: Path) -> Remains:
    """What lies on the disk of statefsd in the state directory of a run."""
    return NOTHING_LEFT


def damage(plan: Plan, state: Path, left: Remains) -> Mapping[str, Any]:
    """Flip one byte of the record of rung 106; what was done, for the record of the run."""
    return {}

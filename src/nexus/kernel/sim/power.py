"""The power of the simulated device, and where it is cut.

A cut stops everything at one instant: no task, timer or device does anything after it. What is
left is what the disks, the boot memory and the secrets held by then.
"""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, NoReturn

from nexus.abi import BLOCK_SIZE
from nexus.kernel.core import PowerCut
from nexus.kernel.sim.clock import Clock
from nexus.kernel.sim.disk import Disk, DiskError

LINE_MAX: Final = 60  # characters of a console line in the reason of a cut


class Moment(StrEnum):
    """Where in a disk's operation the power goes. It is never told as done."""

    BEFORE = "before"  # the disk has not begun
    INSIDE = "inside"  # the disk has the first bytes of a write
    AFTER = "after"  # the disk is done


@dataclass(frozen=True, kw_only=True, slots=True)
class Cut:
    """When the power goes: at the `write`th write or the `flush`th flush (from 1) of a disk.

    Without `disk` those of all disks count. With `line` they count from the moment on at which
    the task of the name `task` writes that line to the console; if neither is given then, the
    line itself is the moment. `size` is how many bytes of a write reach the disk if the moment is
    INSIDE.
    """

    disk: str = ""
    write: int = 0
    flush: int = 0
    moment: Moment = Moment.AFTER
    size: int = 0
    task: str = ""
    line: str = ""

    def __post_init__(self) -> None:
        """Refuse what is no point in time; the caller is at fault."""
        assert not (self.write and self.flush), "one cut is at one operation"
        assert self.write >= 0 <= self.flush, "operations count from 1"
        assert self.write or self.flush or self.line, "a cut has a moment"
        assert self.moment is not Moment.INSIDE or self.write, "a write has an inside"
        assert bool(self.task) is bool(self.line), "a line is somebody's"


class Power:
    """The supply of one run. `on_cut` is told why, just before nothing is told any more."""

    __slots__ = ("_clock", "_counted", "_cuts", "_on_cut", "_seen", "off")

    def __init__(self, clock: Clock, on_cut: Callable[[str], None]) -> None:
        self._clock = clock
        self._on_cut = on_cut
        self._cuts: list[Cut] = []
        self._seen: list[bool] = []  # whether the line of a cut has been written
        self._counted: list[int] = []  # operations that count for it
        self.off = False

    def plan(self, cut: Cut) -> None:
        """Cut the power when that moment has come; the first of several ends the run."""
        self._cuts.append(cut)
        self._seen.append(not cut.line)
        self._counted.append(0)

    def cut(self, why: str) -> NoReturn:
        """Cut the power now. For the kernel and the world outside: no task survives to catch it."""
        self._on_cut(why)
        self.off = True
        raise PowerCut(self._clock.now, why)

    def on_line(self, task: str, line: str) -> None:
        """A console line was written."""
        for index, cut in enumerate(self._cuts):
            if self._seen[index] or (cut.task, cut.line) != (task, line):
                continue
            self._seen[index] = True
            if not cut.write and not cut.flush:
                self.cut(f"{task} has written {line[:LINE_MAX]!r}")

    def write(self, name: str, disk: Disk, block: int, data: bytes, *, durable: bool) -> None:
        """Write to a disk, as far as the power lasts. Raises DiskError."""
        due = self._due(name, write=True)
        if due is None:
            disk.write(block, data, durable=durable)
            return
        cut, why = due
        size = {Moment.BEFORE: 0, Moment.INSIDE: cut.size, Moment.AFTER: len(data)}[cut.moment]
        with suppress(DiskError):  # nobody is left to be told
            if size >= len(data):
                disk.write(block, data, durable=durable)
            elif size > 0:
                _begin_write(disk, block, data[:size])
        self.cut(why)

    def flush(self, name: str, disk: Disk) -> None:
        """Flush a disk, as far as the power lasts. Raises DiskError."""
        due = self._due(name, write=False)
        if due is None:
            disk.flush()
            return
        cut, why = due
        if cut.moment is Moment.AFTER:
            with suppress(DiskError):
                disk.flush()
        self.cut(why)

    def _due(self, name: str, *, write: bool) -> tuple[Cut, str] | None:
        """The cut whose operation this is. Every cut counts it, whichever is due."""
        found: tuple[Cut, str] | None = None
        for index, cut in enumerate(self._cuts):
            nth = cut.write if write else cut.flush
            if not nth or not self._seen[index] or cut.disk not in ("", name):
                continue
            self._counted[index] += 1
            if self._counted[index] == nth and found is None:
                what = "write" if write else "flush"
                inside = f", {cut.size} bytes of it" if cut.moment is Moment.INSIDE else ""
                found = cut, f"{cut.moment.value} {what} {nth} of {name}{inside}"
        return found


def _begin_write(disk: Disk, block: int, data: bytes) -> None:
    """Give a disk the first bytes of a write, in front of what stood behind them."""
    former = disk.read(block, -(-len(data) // BLOCK_SIZE))
    _ = disk.begin_write(block, data + former[len(data) :])

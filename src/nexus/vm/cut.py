"""A power cut: the machine is killed inside a write, and its disk put together as far as it lasted.

A killed QEMU alone is none: what it was told to write, our kernel writes. So the disk of statefsd
logs every write and flush, and afterwards it is made of what was there before, of all up to the
last flush that was finished when the word came, and of the beginning of the next write.
"""

import json
import time
from dataclasses import replace
from pathlib import Path
from threading import Event as Pause
from typing import Final

from nexus.abi import EventKind
from nexus.init.plan import Plan
from nexus.proof.remains import disk_of
from nexus.proof.runner import Job
from nexus.vm.qemu import Disk
from nexus.vm.writelog import count_of, entries_of, lasting, rebuilt

TORN_SIZE: Final = 512  # bytes of the write that reach the disk: one sector
WRITE_WAIT: Final = 5_000_000_000  # ns for the write that the power goes in
POLL: Final = 0.001  # seconds


class Cut:
    """The cut of one boot, where its job says so. `disks` are those of the boot, the one that loses
    its power logged."""

    def __init__(self, job: Job, plan: Plan, disks: tuple[Disk, ...], state: Path) -> None:
        self._line = job.cut_at
        self._task = job.cut_at.partition(":")[0]
        device = disk_of(plan)
        assert device is not None, "a system whose power is cut keeps something"
        (disk,) = (each for each in disks if each.name == device.name)
        self._image = disk.file
        self._before = b""
        self._log = state / f".{disk.name}-writes"
        _ = self._log.write_bytes(b"")
        self._known = -1  # entries in the log when the word came
        logged = replace(disk, log=self._log)
        self.disks = tuple(logged if each is disk else each for each in disks)

    def begin(self) -> None:
        """The machine is about to look at the disk."""
        self._before = self._image.read_bytes()

    @property
    def is_made(self) -> bool:
        """Whether the word came."""
        return self._known >= 0

    def is_word(self, line: bytes) -> bool:
        """Whether this event is the line at which the power goes."""
        if self._line.encode() not in line:
            return False
        event = json.loads(line)
        fields = event["f"]
        printed = (event["k"], fields.get("name"), fields.get("line"))
        return printed == (EventKind.CONSOLE.value, self._task, self._line)

    def wait(self) -> None:
        """The word came: let the machine run on into its next write."""
        self._known = count_of(self._log)
        until, pause = time.monotonic_ns() + WRITE_WAIT, Pause()
        while count_of(self._log) <= self._known and time.monotonic_ns() < until:
            _ = pause.wait(POLL)

    def leave(self) -> None:
        """The machine is gone: leave of the disk what has lasted."""
        entries = list(entries_of(self._log))
        kept = entries[: lasting(entries, self._known)]
        following = next((each for each in entries[len(kept) :] if each.is_write), None)
        torn = b"" if following is None else following.data[:TORN_SIZE]
        at = 0 if following is None else following.offset
        _ = self._image.write_bytes(rebuilt(self._before, kept, torn, at))
        self._log.unlink()

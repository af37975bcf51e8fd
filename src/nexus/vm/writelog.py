"""What a guest wrote to a disk, write by write: QEMU's log of it, and the disks a power cut leaves.

The log is of the format of Linux's dm-log-writes
(Documentation/admin-guide/device-mapper/log-writes.rst): a sector with magic, version, count and
sector size; then an entry each, a sector with where, how much and what kind, and its data. An entry
counts when the superblock does: what comes behind was cut off.

A disk may lose, at a power cut, what was written since the last flush, or any part of it. What was
there at a flush it keeps. A write with FUA is kept when it is done.
"""

import struct
from collections.abc import Iterable, Iterator, Sequence
from enum import IntFlag
from pathlib import Path
from typing import Final, NamedTuple

MAGIC: Final = 0x6A736677736872
VERSION: Final = 1
SUPERBLOCK: Final = struct.Struct("<QQQI")
ENTRY: Final = struct.Struct("<QQQQ")
SECTOR_SIZES: Final = (512, 4096)
UNIT: Final = 512  # bytes of what entries count in, whatever the log's own sector
ENTRIES_MAX: Final = 1_000_000
WRITE_SIZE_MAX: Final = 64 * 1024 * 1024  # bytes of one entry


class Kind(IntFlag):
    """Of an entry; 0 is a plain write."""

    FLUSH = 1
    FUA = 2
    DISCARD = 4
    MARK = 8


class WrongLog(Exception):
    """A file that is no such log."""


class Entry(NamedTuple):
    """One request to the disk. `offset` and `size` are bytes; what is discarded has no data."""

    kind: Kind
    offset: int
    size: int
    data: bytes

    @property
    def is_write(self) -> bool:
        """Whether it has bytes for the disk."""
        return bool(self.data)


class Cut(NamedTuple):
    """A disk as a power cut left it: after so many entries, without those of them that are
    dropped."""

    after: int
    dropped: tuple[int, ...]
    image: bytes


def count_of(file: Path) -> int:
    """How many entries a log has by now, while it grows; 0 before it has a superblock."""
    try:
        with file.open("rb") as opened:
            head = opened.read(SUPERBLOCK.size)
    except FileNotFoundError:
        return 0
    if len(head) < SUPERBLOCK.size:
        return 0
    magic, _, count, _ = SUPERBLOCK.unpack(head)
    return int(count) if magic == MAGIC else 0


def entries_of(file: Path) -> Iterator[Entry]:
    """The entries of a log, in order. Raises WrongLog and OSError."""
    with file.open("rb") as opened:
        head = opened.read(SUPERBLOCK.size)
        if len(head) < SUPERBLOCK.size:
            raise WrongLog("it is too short")
        magic, version, count, sector = SUPERBLOCK.unpack(head)
        if magic != MAGIC or version != VERSION or sector not in SECTOR_SIZES:
            raise WrongLog(f"magic {magic:#x}, version {version}, sectors of {sector} bytes")
        if count > ENTRIES_MAX:
            raise WrongLog(f"{count} entries, {ENTRIES_MAX} are expected at most")
        _ = opened.seek(sector)
        for number in range(count):
            block = opened.read(sector)
            if len(block) < sector:
                raise WrongLog(f"entry {number} is cut off")
            place, amount, flags, length = ENTRY.unpack_from(block)
            kind, size = Kind(flags & 0xF), amount * sector
            if size > WRITE_SIZE_MAX:
                raise WrongLog(f"entry {number} has {size} bytes, {WRITE_SIZE_MAX} at most")
            data = b""
            if Kind.MARK in kind:
                _ = opened.seek(-(-length // sector) * sector, 1)
                continue
            if Kind.DISCARD not in kind:
                data = opened.read(size)
                if len(data) < size:
                    raise WrongLog(f"entry {number} is cut off")
            yield Entry(kind, place * sector, size, data)


def cuts(before: bytes, entries: Sequence[Entry]) -> Iterator[Cut]:
    """Disks that a power cut could leave of one that was `before`: at every flush all that came
    earlier; and ahead of every flush, of what came since the last one, nothing, and each but one.

    Not every subset: that is what the simulated disk is for.
    """
    kept = bytearray(before)
    since: list[int] = []  # entries after the last flush
    yield Cut(0, (), bytes(kept))
    for number, entry in enumerate(entries):
        if Kind.FLUSH in entry.kind:
            yield from _without(kept, entries, since, number)
            for each in since:
                apply(kept, entries[each])
            since.clear()
            yield Cut(number + 1, (), bytes(kept))
        if entry.size:
            since.append(number)
    yield from _without(kept, entries, since, len(entries))


def _without(
    kept: bytes | bytearray, entries: Sequence[Entry], since: Sequence[int], after: int
) -> Iterator[Cut]:
    """Cuts with some of the unflushed entries dropped, the others done in their order."""
    loose = [each for each in since if Kind.FUA not in entries[each].kind]
    choices = [(each,) for each in loose] if len(loose) > 1 else []
    for dropped in (*choices, tuple(loose)) if loose else ():
        done = (entries[each] for each in since if each not in dropped)
        yield Cut(after, dropped, rebuilt(kept, done))


def lasting(entries: Sequence[Entry], known: int) -> int:
    """How many of the first `known` entries a power cut leaves for certain: to the last flush."""
    for number in range(min(known, len(entries)), 0, -1):
        if Kind.FLUSH in entries[number - 1].kind:
            return number
    return 0


def rebuilt(
    before: bytes | bytearray, kept: Iterable[Entry], torn: bytes = b"", at: int = 0
) -> bytes:
    """A disk that was `before`, after these entries and the beginning of one more."""
    image = bytearray(before)
    for entry in kept:
        apply(image, entry)
    apply(image, Entry(Kind(0), at, len(torn), torn))
    return bytes(image)


def apply(image: bytearray, entry: Entry) -> None:
    """Do what an entry says."""
    end = entry.offset + entry.size
    if end > len(image):
        raise WrongLog(f"a write ends at {end}, and the disk at {len(image)}")
    image[entry.offset : end] = entry.data or bytes(entry.size)

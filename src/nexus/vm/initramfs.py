"""An initramfs: a tree of files as the archive that Linux unpacks before process 1 runs.

The format is the kernel's "newc" (Documentation/driver-api/early-userspace/buffer-format.rst).
Device nodes are entries of the archive, so that no root is needed. The same tree gives the same
bytes: entries are sorted, and have no time and no owner but root. Archives may follow each other;
what a later one has lies over what an earlier one had.
"""

import stat
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Final, NamedTuple

MAGIC: Final = b"070701"
TRAILER: Final = "TRAILER!!!"
ALIGNMENT: Final = 4
FILE_SIZE_MAX: Final = 0xFFFF_FFFF  # bytes; a field has eight hexadecimal digits
NAME_SIZE_MAX: Final = 4095  # bytes, PATH_MAX without its end
HEADER_SIZE: Final = len(MAGIC) + 13 * 8


class Entry(NamedTuple):
    """One file: its type and permissions, its content or where a link leads, its device numbers."""

    mode: int
    data: bytes = b""
    device: tuple[int, int] = (0, 0)


class WrongArchive(Exception):
    """Bytes that are no archive of ours."""


class Tree:
    """Files by their paths, without the slash in front. Folders come by themselves."""

    def __init__(self) -> None:
        self._entries: dict[str, Entry] = {}

    def __iter__(self) -> Iterator[tuple[str, Entry]]:
        return iter(sorted(self._entries.items()))

    def __contains__(self, path: object) -> bool:
        return path in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    def folder(self, path: str, mode: int = 0o755) -> None:
        """A folder and those it is in."""
        self._put(path, Entry(stat.S_IFDIR | mode))

    def file(self, path: str, data: bytes, mode: int = 0o644) -> None:
        """A regular file."""
        if len(data) > FILE_SIZE_MAX:
            raise ValueError(f"{path} has {len(data)} bytes, {FILE_SIZE_MAX} fit")
        self._put(path, Entry(stat.S_IFREG | mode, data))

    def link(self, path: str, target: str) -> None:
        """A symbolic link."""
        self._put(path, Entry(stat.S_IFLNK | 0o777, target.encode()))

    def node(self, path: str, major: int, minor: int, mode: int = 0o600) -> None:
        """A character device."""
        self._put(path, Entry(stat.S_IFCHR | mode, device=(major, minor)))

    def _put(self, path: str, entry: Entry) -> None:
        pure = PurePosixPath(path)
        is_plain = path == str(pure) and path not in {"", "."} and ".." not in pure.parts
        if not is_plain or pure.is_absolute() or len(path.encode()) > NAME_SIZE_MAX:
            raise ValueError(f"{path!r} is no path in an archive")
        for parent in pure.parents[:-1]:
            above = self._entries.setdefault(str(parent), Entry(stat.S_IFDIR | 0o755))
            if not stat.S_ISDIR(above.mode):
                raise ValueError(f"{path!r} is below {str(parent)!r}, which is no folder")
        self._entries[path] = entry


def packed(tree: Tree) -> bytes:
    """The archive."""
    out = bytearray()
    for number, (path, entry) in enumerate(tree, start=1):
        _append(out, number, path, entry)
    _append(out, 0, TRAILER, Entry(0))
    return bytes(out)


def _append(out: bytearray, number: int, path: str, entry: Entry) -> None:
    name = path.encode() + b"\0"
    major, minor = entry.device
    # Number, mode, uid, gid, links, time, size, device it is on, device it is, name, checksum.
    size = len(entry.data)
    fields = (number, entry.mode, 0, 0, 1, 0, size, 0, 0, major, minor, len(name), 0)
    out += MAGIC + "".join(f"{field:08X}" for field in fields).encode() + name
    out += bytes(-len(out) % ALIGNMENT)
    out += entry.data
    out += bytes(-len(out) % ALIGNMENT)


def entries_of(data: bytes) -> Iterator[tuple[str, Entry]]:
    """What is in archives that follow each other, each in its order. Raises WrongArchive."""
    offset = 0
    while offset < len(data):
        if data[offset : offset + ALIGNMENT] == bytes(ALIGNMENT):
            offset += ALIGNMENT  # padding between two archives
            continue
        header = data[offset : offset + HEADER_SIZE]
        if len(header) < HEADER_SIZE or not header.startswith(MAGIC):
            raise WrongArchive(f"no header at {offset}")
        try:
            fields = [int(header[at : at + 8], 16) for at in range(len(MAGIC), HEADER_SIZE, 8)]
        except ValueError as error:
            raise WrongArchive(f"no number in the header at {offset}") from error
        mode, size, major, minor, name_size = (
            fields[1],
            fields[6],
            fields[9],
            fields[10],
            fields[11],
        )
        start = offset + HEADER_SIZE
        content = _aligned(start + name_size)
        if content + size > len(data):
            raise WrongArchive(f"the entry at {offset} is cut short")
        path = data[start : start + name_size - 1].decode()
        offset = _aligned(content + size)
        if path != TRAILER:
            yield path, Entry(mode, data[content : content + size], (major, minor))


def _aligned(offset: int) -> int:
    return -(-offset // ALIGNMENT) * ALIGNMENT

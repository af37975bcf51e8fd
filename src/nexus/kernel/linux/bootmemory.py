"""The root task's memory across boots: one small file in the state directory."""

import os
from contextlib import suppress
from pathlib import Path
from typing import Final

from nexus.abi import BOOT_MEMORY_SIZE_MAX, AbiError, Status

FILE_NAME: Final = "boot-memory"
NEW_NAME: Final = "boot-memory.new"

_READ: Final = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
_WRITE: Final = os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_CREAT | os.O_EXCL


class BootMemory:
    """Reads and replaces the file. A replacement is whole or does not happen: written beside,
    synced, renamed, and the directory synced."""

    __slots__ = ("directory",)

    def __init__(self, directory: Path | None) -> None:
        self.directory = directory

    def read(self) -> bytes:
        """The content as it is, nothing is checked: of a file that somebody else made larger the
        first BOOT_MEMORY_SIZE_MAX bytes, of none nothing.

        Refuses: Unsupported (no state directory, or one that cannot be read).
        """
        directory = self._directory()
        try:
            descriptor = os.open(directory / FILE_NAME, _READ)
        except FileNotFoundError:
            return b""
        try:
            content = b""
            while part := os.read(descriptor, BOOT_MEMORY_SIZE_MAX - len(content)):
                content += part
            return content
        finally:
            os.close(descriptor)

    def replace(self, data: bytes) -> None:
        """Store `data`. Where only the last step fails, the sync of the directory, a later boot
        may find either content.

        Refuses: NoSpace (disk full), Unsupported (no state directory, or one that cannot be
        written).
        """
        path = self._directory()
        _make_directory(path)
        directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            try:
                _write_new(directory, data)
                os.rename(NEW_NAME, FILE_NAME, src_dir_fd=directory, dst_dir_fd=directory)
            except OSError:
                _remove_new(directory)
                raise
            os.fsync(directory)
        finally:
            os.close(directory)

    def _directory(self) -> Path:
        if self.directory is None:
            raise AbiError(Status.UNSUPPORTED, "this run has no state directory")
        return self.directory


def _make_directory(path: Path) -> None:
    """Make a directory and those above it, and have each outlive a power cut."""
    if path.is_dir():
        return
    _make_directory(path.parent)
    path.mkdir(mode=0o700, exist_ok=True)
    above = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(above)
    finally:
        os.close(above)


def _write_new(directory: int, data: bytes) -> None:
    _remove_new(directory)  # of a boot that ended half way
    descriptor = os.open(NEW_NAME, _WRITE, 0o600, dir_fd=directory)
    try:
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(descriptor, rest) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove_new(directory: int) -> None:
    with suppress(FileNotFoundError):
        os.unlink(NEW_NAME, dir_fd=directory)

"""The root task's memory across boots: one small file in the state directory."""

import os
from pathlib import Path
from typing import Final

from nexus.abi import BOOT_MEMORY_SIZE_MAX, AbiError, Status
from nexus.kernel.linux.durable import (
    DIRECTORY_FLAGS,
    NEW_SUFFIX,
    make_directory,
    read_file,
    replace_file,
)

FILE_NAME: Final = "boot-memory"
NEW_NAME: Final = FILE_NAME + NEW_SUFFIX


class BootMemory:
    """Reads and replaces the file. A replacement is whole or does not happen."""

    __slots__ = ("directory",)

    def __init__(self, directory: Path | None) -> None:
        self.directory = directory

    def read(self) -> bytes:
        """The content as it is, nothing is checked: of a file that somebody else made larger the
        first BOOT_MEMORY_SIZE_MAX bytes, of none nothing.

        Refuses: Unsupported (no state directory, or one that cannot be read).
        """
        try:
            directory = os.open(self._directory(), DIRECTORY_FLAGS)
        except FileNotFoundError:
            return b""
        try:
            return read_file(directory, FILE_NAME, BOOT_MEMORY_SIZE_MAX)
        except FileNotFoundError:
            return b""
        finally:
            os.close(directory)

    def replace(self, data: bytes) -> None:
        """Store `data`. Where only the last step fails, the sync of the directory, a later boot
        may find either content.

        Refuses: NoSpace (disk full), Unsupported (no state directory, or one that cannot be
        written).
        """
        path = self._directory()
        make_directory(path)
        directory = os.open(path, DIRECTORY_FLAGS)
        try:
            replace_file(directory, FILE_NAME, data)
        finally:
            os.close(directory)

    def _directory(self) -> Path:
        if self.directory is None:
            raise AbiError(Status.UNSUPPORTED, "this run has no state directory")
        return self.directory

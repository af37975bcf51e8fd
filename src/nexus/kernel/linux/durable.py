"""Files that are replaced as a whole: written beside, synced, renamed, and the directory synced.

By the calls of a descriptor of the directory alone, so that a confined service whose filter knows
that descriptor can do it too.
"""

import os
from contextlib import suppress
from pathlib import Path
from typing import Final

NEW_SUFFIX: Final = ".new"

READ_FLAGS: Final = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
WRITE_FLAGS: Final = os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_CREAT | os.O_EXCL
DIRECTORY_FLAGS: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC


def make_directory(path: Path) -> None:
    """Make a directory and those above it, and have each outlive a power cut."""
    if path.is_dir():
        return
    make_directory(path.parent)
    path.mkdir(mode=0o700, exist_ok=True)
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Have what was made and renamed in it outlive a power cut. Raises OSError."""
    directory = os.open(path, DIRECTORY_FLAGS)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def read_file(directory: int, name: str, size_max: int) -> bytes:
    """The first `size_max` bytes of a file. Raises OSError."""
    descriptor = os.open(name, READ_FLAGS, dir_fd=directory)
    try:
        content = b""
        while part := os.read(descriptor, size_max - len(content)):
            content += part
        return content
    finally:
        os.close(descriptor)


def replace_file(directory: int, name: str, data: bytes) -> None:
    """Make `data` the content of a file. Raises OSError: then the old content is there, unless
    what failed is the last step, the sync of the directory, after which either may be found."""
    new = name + NEW_SUFFIX
    try:
        _write_new(directory, new, data)
        os.rename(new, name, src_dir_fd=directory, dst_dir_fd=directory)
    except OSError:
        _remove(directory, new)
        raise
    os.fsync(directory)


def _write_new(directory: int, name: str, data: bytes) -> None:
    _remove(directory, name)  # of a boot that ended half way
    descriptor = os.open(name, WRITE_FLAGS, 0o600, dir_fd=directory)
    try:
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(descriptor, rest) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(directory: int, name: str) -> None:
    with suppress(FileNotFoundError):
        os.unlink(name, dir_fd=directory)

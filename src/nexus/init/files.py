"""Reads a file that people write: never more than it may have, and never waiting for one.

A named pipe without a writer would make a reader wait for ever, a device may have no end: both
are refused once they are open, before the first byte is read.
"""

import os
import stat
from pathlib import Path
from typing import Final

KINDS: Final = (
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISSOCK, "a socket"),
)


class WrongFile(Exception):
    """A path leads to no file of the kind that is read: `rule` ends a sentence that begins with
    "a file", `found` is what is there instead."""

    def __init__(self, rule: str, found: str) -> None:
        super().__init__(f"expected a file {rule}, found {found}")
        self.rule = rule
        self.found = found


def read_whole(file: Path, size_max: int) -> bytes:
    """The bytes of a regular file, at most `size_max` of them. Raises WrongFile.

    It waits for nothing but the file system the file is on.
    """
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK
    try:
        descriptor = os.open(file, flags)
        try:
            return _read(descriptor, size_max)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise WrongFile("that can be read", error.strerror or str(error)) from error


def _read(descriptor: int, size_max: int) -> bytes:
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode):
        raise WrongFile("that is a regular file", _kind(found.st_mode))
    if found.st_size > size_max:
        raise WrongFile(f"of at most {size_max} bytes", f"{found.st_size} bytes")
    # the size is 0 for files of /proc, and no more than a guess for one that grows
    data = bytearray()
    while part := os.read(descriptor, size_max + 1 - len(data)):
        data += part
        if len(data) > size_max:
            raise WrongFile(f"of at most {size_max} bytes", "more")
    return bytes(data)


def _kind(mode: int) -> str:
    return next((kind for is_kind, kind in KINDS if is_kind(mode)), "something else")

"""What a command reads and writes for the one who gave it: files, and the standard streams.

Whatever is wrong with a place that a person named is said in a sentence. Nothing here waits for
another process to open the other end of a pipe.
"""

import os
import stat
import sys
from pathlib import Path
from typing import Final

from nexus.cli.errors import CommandFailed, UsageError

STANDARD_INPUT: Final = "-"
_READ: Final = os.O_RDONLY | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK


def open_input(file: Path, *, node: bool = False) -> int:
    """A descriptor of a file, with `node` also of a block device, for reading. Raises UsageError
    for what cannot be read and for what is neither."""
    try:
        descriptor = os.open(file, _READ)
    except OSError as error:
        raise UsageError(f"cannot read {file}: {error.strerror or error}") from error
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode) or (node and stat.S_ISBLK(mode)):
        return descriptor
    os.close(descriptor)
    if node:
        raise UsageError(f"{file} is no disk image: it is neither a file nor a block device")
    hint = f"; `{STANDARD_INPUT}` reads the standard input" if stat.S_ISFIFO(mode) else ""
    raise UsageError(f"cannot read {file}: it is no file{hint}")


def read_input(file: Path, size_max: int) -> bytes:
    """The first bytes of a file, or of the standard input if it is `-`: one more than `size_max`
    at most, which says that there are more. Raises UsageError."""
    if str(file) != STANDARD_INPUT:
        descriptor = open_input(file)
    elif sys.stdin is None:
        raise UsageError("the standard input is closed")
    else:
        descriptor = -1
    try:
        if descriptor < 0:
            return sys.stdin.buffer.read(size_max + 1)
        with os.fdopen(descriptor, "rb") as opened:
            return opened.read(size_max + 1)
    except OSError as error:
        raise UsageError(f"cannot read {file}: {error.strerror or error}") from error


def write_output(file: Path, data: bytes) -> None:
    """Make `data` what is in a file. Raises CommandFailed."""
    try:
        _ = file.write_bytes(data)
    except OSError as error:
        raise CommandFailed(f"cannot write {file}: {error.strerror or error}") from error

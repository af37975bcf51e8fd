"""One process per instance: held by the process that is init, for as long as it lives."""

import fcntl
import os
import time
from pathlib import Path
from threading import Event as Pause
from typing import Final

TAKE_MAX: Final = 300_000_000  # ns; a command that only looks holds the lock for a moment
TAKE_PAUSE: Final = 0.01  # seconds between two tries; flock has no deadline
PID_SIZE_MAX: Final = 32  # bytes


class AlreadyRuns(Exception):
    """The instance runs; `pid` is the process that is its init."""

    def __init__(self, pid: int) -> None:
        super().__init__(f"process {pid} holds it")
        self.pid = pid


def take(path: Path, wait: int = TAKE_MAX) -> int:
    """Take the lock within `wait` ns; its descriptor, to be kept open.

    Raises AlreadyRuns and OSError.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    deadline = time.monotonic_ns() + wait
    pause = Pause()
    while not _taken(descriptor, fcntl.LOCK_EX):
        if time.monotonic_ns() >= deadline:
            pid = _written(descriptor)
            os.close(descriptor)
            raise AlreadyRuns(pid)
        _ = pause.wait(TAKE_PAUSE)
    os.ftruncate(descriptor, 0)
    _ = os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
    return descriptor


def holder_of(path: Path) -> int | None:
    """The process that holds the lock now, or None when nobody does."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        return None if _taken(descriptor, fcntl.LOCK_SH) else _written(descriptor)
    finally:
        os.close(descriptor)


def _taken(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _written(descriptor: int) -> int:
    """The pid its holder wrote, 0 if it has not yet."""
    text = os.pread(descriptor, PID_SIZE_MAX, 0).strip()
    return int(text) if text.isdigit() else 0

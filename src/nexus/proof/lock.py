"""One proof run at a time: a parallel run waits for its turn or is refused, and never counts."""

import fcntl
import os
import stat
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from threading import Event as Pause
from typing import Final

WAIT_DEFAULT: Final = 180 * 10**9  # ns; the reference harness's wait (core.md 10.1)
POLL: Final = 0.05  # seconds between two looks at the lock; flock has no deadline
LOCK_NAME: Final = "prove.lock"


class LockRefused(Exception):
    """Another run holds the lock; the text is one sentence."""


def runtime_dir(environ: Mapping[str, str]) -> Path:
    """The directory of this user that only this user can write. Made if it is missing.

    Raises LockRefused when it belongs to somebody else, or cannot be had.
    """
    if "NEXUS_RUNTIME_DIR" in environ:
        path = Path(environ["NEXUS_RUNTIME_DIR"])
    elif "XDG_RUNTIME_DIR" in environ:
        path = Path(environ["XDG_RUNTIME_DIR"]) / "nexus"
    else:
        path = Path(f"/tmp/nexus-{os.getuid()}")  # noqa: S108 (owner and mode are checked below)
    if not path.is_absolute():
        raise LockRefused(f"the runtime directory {str(path)!r} is not an absolute path.")
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = path.lstat()
    except OSError as error:
        raise LockRefused(f"there is no runtime directory {path}: {error.strerror}.") from error
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise LockRefused(f"{path} is not a directory that only this user can write: remove it.")
    return path


@contextmanager
def run_lock(directory: Path, wait: int = WAIT_DEFAULT) -> Iterator[None]:
    """Hold the lock, waiting at most `wait` nanoseconds for it.

    Raises LockRefused if another run has it, and at the end if the file was removed or exchanged
    meanwhile: then another run may have held its own, and neither counts.
    """
    path = directory / LOCK_NAME
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise LockRefused(f"{path} cannot be opened: {error.strerror}.") from error
    try:
        if not _taken(descriptor, wait):
            holder = os.pread(descriptor, 32, 0).decode("ascii", "replace").strip()
            raise LockRefused(
                f"Another proof run (process {holder or 'unknown'}) holds {path}: "
                "runs share what they measure, so start this one again when that one has ended."
            )
        os.ftruncate(descriptor, 0)
        _ = os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        _check_same(descriptor, path)
        yield
        _check_same(descriptor, path)
    finally:
        os.close(descriptor)


def _check_same(descriptor: int, path: Path) -> None:
    """See that `path` still names the file that is locked."""
    try:
        same = os.path.samestat(os.fstat(descriptor), path.lstat())
    except FileNotFoundError:
        same = False
    if not same:
        raise LockRefused(f"{path} was removed or exchanged during the run, which does not count.")


def _taken(descriptor: int, wait: int) -> bool:
    deadline = time.monotonic_ns() + wait
    pause = Pause()
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic_ns() >= deadline:
                return False
            _ = pause.wait(POLL)
        else:
            return True

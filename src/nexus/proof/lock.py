"""Directories that only their user can write, and the locks in them: of proof runs, of systems.

A lock is flock(2), so it ends with its holder however that ends. Its file says who the holder is:
a process id, and when that process was started, because numbers are given out again. Whoever could
write in the directory could name another process there, or put another file in its place; so
nothing is believed that is not in a directory that check_private has passed.
"""

import fcntl
import os
import shutil
import stat
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Event as Pause
from typing import Final

ROOT_UID: Final = 0
OTHERS_WRITE: Final = stat.S_IWGRP | stat.S_IWOTH
PRIVATE_MODE: Final = 0o700
RUNTIME_VARIABLE: Final = "NEXUS_RUNTIME_DIR"

WAIT_DEFAULT: Final = 180 * 10**9  # ns; the reference harness's wait (core.md 10.1)
TAKE_MAX: Final = 300_000_000  # ns; a command that only looks holds a lock for a moment
POLL: Final = 0.01  # seconds between two tries; flock has no deadline
HOLDER_SIZE_MAX: Final = 64  # bytes; a process id and the time of its start
START_FIELD: Final = 19  # of /proc/PID/stat behind the command's name: starttime, in ticks
LOCK_NAME: Final = "prove.lock"
STATE_PREFIX: Final = ".state-"  # of folders that runs make here; no system is named so


class NotPrivate(Exception):
    """A directory that somebody else may write in; the text is one sentence."""


class LockRefused(Exception):
    """Another run holds the lock; the text is one sentence."""


class AlreadyHeld(Exception):
    """Somebody holds the lock; `pid` is the process, 0 if that cannot be said."""

    def __init__(self, pid: int) -> None:
        super().__init__(f"process {pid or 'unknown'} holds it")
        self.pid = pid


# ---------------------------------------------------------------- directories


def user_runtime(environ: Mapping[str, str], uid: int) -> Path:
    """The folder of a user's sockets and locks where NEXUS_RUNTIME_DIR names none."""
    if environ.get("XDG_RUNTIME_DIR"):
        return Path(environ["XDG_RUNTIME_DIR"]) / "nexus"
    ready = Path(f"/run/user/{uid}")
    with suppress(OSError):
        if ready.lstat().st_uid == uid:
            return ready / "nexus"
    return Path(f"/tmp/nexus-{uid}")  # noqa: S108 (check_private says whose it is)


def check_private(path: Path, uid: int, *, or_root: bool = False) -> None:
    """See that `path` is a directory, no link to one, of `uid` and writable by nobody else.

    `or_root`: one of root's will do, who could do all the same without it. Raises NotPrivate, and
    OSError if it is not there.
    """
    found = path.lstat()
    owners = (uid, ROOT_UID) if or_root else (uid,)
    if (
        not stat.S_ISDIR(found.st_mode)
        or found.st_uid not in owners
        or found.st_mode & OTHERS_WRITE
    ):
        raise NotPrivate(
            f"{path} is not a directory that only this user can write: remove it, "
            "or have it belong to you with mode 0700"
        )


def make_private(path: Path, uid: int, base: Path | None = None) -> None:
    """Have the directory `path`, and check it, what was made on the way to it, and from `base` on.

    What is made is for its user alone. Raises NotPrivate and OSError.
    """
    missing = [level for level in path.parents if not os.path.lexists(level)]
    within = () if base is None else (p for p in path.parents if p.is_relative_to(base))
    for level in within:
        if level not in missing:
            check_private(level, uid, or_root=True)
    for level in reversed(missing):
        level.mkdir(mode=PRIVATE_MODE, exist_ok=True)  # another command may make it meanwhile
        check_private(level, uid)
    path.mkdir(mode=PRIVATE_MODE, exist_ok=True)
    check_private(path, uid)


# ---------------------------------------------------------------- locks


def take(path: Path, wait: int = TAKE_MAX) -> int:
    """Take the lock of the file `path` within `wait` ns; its descriptor, to be kept open.

    The descriptor is of the file that `path` names when this returns, however often it was removed
    or exchanged before. Raises AlreadyHeld and OSError.
    """
    deadline = time.monotonic_ns() + wait
    while True:
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        descriptor = os.open(path, flags, 0o600)
        if not _locked_until(descriptor, deadline):
            pid = _holder_in(descriptor)
            os.close(descriptor)
            raise AlreadyHeld(pid)
        if is_same(descriptor, path):
            os.ftruncate(descriptor, 0)
            _ = os.pwrite(descriptor, f"{os.getpid()} {start_of(os.getpid())}\n".encode(), 0)
            return descriptor
        os.close(descriptor)
        if time.monotonic_ns() >= deadline:
            raise AlreadyHeld(0)


def take_directory(path: Path, wait: int = TAKE_MAX) -> int:
    """Take the lock of a directory itself, which no file in it can be removed to evade.

    Raises AlreadyHeld and OSError.
    """
    descriptor = _open_directory(path)
    if not _locked_until(descriptor, time.monotonic_ns() + wait):
        os.close(descriptor)
        raise AlreadyHeld(0)
    return descriptor


def holder_of(path: Path) -> int | None:
    """The process that holds the lock of the file `path` now; None when nobody does.

    0 if somebody does who cannot be named: the process in the file has ended, or is another one
    of the same number.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        return None if _locked(descriptor, fcntl.LOCK_SH) else _holder_in(descriptor)
    finally:
        os.close(descriptor)


def is_directory_held(path: Path) -> bool:
    """Whether somebody holds the lock of the directory itself."""
    try:
        descriptor = _open_directory(path)
    except OSError:
        return False
    try:
        return not _locked(descriptor, fcntl.LOCK_SH)
    finally:
        os.close(descriptor)


def is_same(descriptor: int, path: Path) -> bool:
    """Whether `path` still names what is open."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.lstat())
    except FileNotFoundError:
        return False


def start_of(pid: int) -> int:
    """When a process was started, in clock ticks since the machine was; 0 if there is none."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text("ascii", "replace")
        return int(text.rpartition(")")[2].split()[START_FIELD])
    except (OSError, ValueError, IndexError):
        return 0


def _open_directory(path: Path) -> int:
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)


def _locked_until(descriptor: int, deadline: int) -> bool:
    pause = Pause()
    while not _locked(descriptor, fcntl.LOCK_EX):
        if time.monotonic_ns() >= deadline:
            return False
        _ = pause.wait(POLL)
    return True


def _locked(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _holder_in(descriptor: int) -> int:
    """The process that the file names, if it is the one that wrote it; otherwise 0."""
    words = os.pread(descriptor, HOLDER_SIZE_MAX, 0).split()
    if len(words) != 2 or not all(word.isdigit() for word in words):
        return 0
    pid, start = (int(word) for word in words)
    return pid if start and start_of(pid) == start else 0


# ---------------------------------------------------------------- proof runs


def runtime_dir(environ: Mapping[str, str]) -> Path:
    """The directory of this user that only this user can write. Made if it is missing.

    Raises LockRefused when it belongs to somebody else, or cannot be had.
    """
    named = environ.get(RUNTIME_VARIABLE)
    path = user_runtime(environ, os.getuid()) if named is None else Path(named)
    if not path.is_absolute():
        raise LockRefused(f"the runtime directory {str(path)!r} is not an absolute path.")
    try:
        make_private(path, os.getuid())
    except OSError as error:
        raise LockRefused(f"there is no runtime directory {path}: {error.strerror}.") from error
    except NotPrivate as error:
        raise LockRefused(f"{error}.") from error
    return path


@contextmanager
def run_lock(directory: Path, wait: int = WAIT_DEFAULT) -> Iterator[None]:
    """One proof run at a time: hold the lock, waiting at most `wait` nanoseconds for it.

    What killed runs left of their states is removed: nobody uses it while the lock is held. Raises
    LockRefused if another run has the lock, or that cannot be removed, and at the end if the file
    was removed or exchanged meanwhile: then another run may have held its own, and neither counts.
    """
    path = directory / LOCK_NAME
    try:
        descriptor = take(path, wait)
    except OSError as error:
        raise LockRefused(f"{path} cannot be opened: {error.strerror}.") from error
    except AlreadyHeld as error:
        raise LockRefused(
            f"Another proof run (process {error.pid or 'unknown'}) holds {path}: "
            "runs share what they measure, so start this one again when that one has ended."
        ) from error
    try:
        _clear(directory)
        yield
        if not is_same(descriptor, path):
            raise LockRefused(
                f"{path} was removed or exchanged during the run, which does not count."
            )
    finally:
        os.close(descriptor)


def _clear(directory: Path) -> None:
    for left in directory.glob(f"{STATE_PREFIX}*"):
        try:
            if left.is_dir() and not left.is_symlink():
                shutil.rmtree(left)
            else:
                left.unlink()
        except OSError as error:
            raise LockRefused(
                f"{left}, which a killed run has left, cannot be removed ({error.strerror}): "
                "remove it, and unmount what is in it before."
            ) from error

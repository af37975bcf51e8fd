"""What control groups hold on this machine, tried: children that take more than they may."""

import os
import select
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Final, NamedTuple

from nexus.kernel.linux.groups import (
    FOLDER,
    MOUNT,
    OWN,
    PLACE,
    Group,
    Groups,
    delegated,
    usable,
)

ROOM: Final = 16 * 1024 * 1024  # bytes that a child may take
PIECE_SIZE: Final = 1024 * 1024
PIECES: Final = 128  # that it tries to take, well beyond
TASKS: Final = 4
FORKS: Final = 16  # that it tries, well beyond
SHARE: Final = 20  # percent of one CPU
SPIN: Final = 500_000_000  # ns that a child computes without end: five periods
SPENT_MAX: Final = 2 * SHARE  # percent; a period that has begun may be spent whole
TRY_TIME: Final = 20_000  # milliseconds a child may take
FORKED: Final = b"1"
NO_MORE: Final = b"0"


class Tried(NamedTuple):
    """Why each of these is not held, "" if it is."""

    memory: str
    objects: str
    tasks: str
    cpu: str


def ours() -> Path:
    """The part of the tree that is ours. Raises OSError, where none is."""
    given = delegated(os.environ)
    if given is None:
        if os.getpid() != 1 and os.getppid() != 1:
            raise OSError(
                f"nobody has given us any; {PLACE} names a delegated group,"
                f' "{OWN}" the one that we are in, and in a machine of `nexus vm run` all are ours'
            )
        why = usable(MOUNT)
        if why:
            raise OSError(why)
        given = MOUNT
    if (given / FOLDER).exists():
        raise OSError(f"a system that runs has them: {given / FOLDER}")
    return given


def tried() -> Tried:
    """What groups hold here."""
    try:
        groups = Groups(ours())
    except OSError as error:
        return Tried(str(error), str(error), str(error), str(error))
    try:
        groups.begin()
        return Tried(
            _killed(groups, _take_private),
            _killed(groups, _take_objects),
            _refused(groups),
            _slowed(groups),
        )
    except OSError as error:
        return Tried(str(error), str(error), str(error), str(error))
    finally:
        groups.end()


def _killed(groups: Groups, take: Callable[[], None]) -> str:
    """Why a child was not killed for its memory, or ""."""
    with _in_a_group(groups, 1, take) as (group, child):
        status = _ended(child)
        if status == -signal.SIGKILL and group.kills():
            return ""
    return f"a child took {PIECES * PIECE_SIZE} bytes where {ROOM} were allowed: {status}"


def _refused(groups: Groups) -> str:
    """Why a child that forks without end was not stopped, or somebody else was; "" if it was and
    nobody else."""
    told, tell = os.pipe()
    try:
        with _in_a_group(groups, TASKS, partial(_fork_on, tell)) as (group, _):
            made = b""
            while not made.endswith(NO_MORE):
                if not select.select([told], [], [], TRY_TIME / 1000)[0]:
                    return f"a child that forks without end did not come to one: {len(made)} forks"
                made += os.read(told, FORKS + 1)
            if made.count(FORKED) != TASKS - 1 or not group.refusals():
                return f"a child made {made.count(FORKED)} processes where {TASKS - 1} may be"
            if _ended(_forked(lambda: None)):
                return "while a child forks without end nobody else can"
    finally:
        os.close(told)
        os.close(tell)
    return ""


def _slowed(groups: Groups) -> str:
    """Why a child that never rests has more than its share, or ""."""
    with _in_a_group(groups, 1, _spin, SHARE) as (group, child):
        status = _ended(child)
        spent = group.spent()
    share = 100 * spent.usage * 1000 // SPIN
    if status == 0 and spent.throttled and share <= SPENT_MAX:
        return ""
    return f"a child had {share} percent of a CPU where {SHARE} were allowed"


@contextmanager
def _in_a_group(
    groups: Groups, tasks: int, work: Callable[[], None], share: int | None = None
) -> Iterator[tuple[Group, int]]:
    """A child that does this in a group of its own. It is ended, and whatever it has made."""
    group = groups.make("doctor", 0, tasks=tasks, room=ROOM)
    assert group is not None, "there is a part of ours"
    try:
        if share is not None:
            group.share(share)

        def live() -> None:
            _ = os.write(group.processes, b"0")
            work()

        child = _forked(live)
        try:
            yield group, child
        finally:
            group.end()
            _ = _ended(child)
    finally:
        group.remove()


def _forked(work: Callable[[], None]) -> int:
    """A child that ends with 0 when it has done this."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    return child


def _ended(child: int) -> int:
    """How a child ended, at once or in its time; 0 for one that was asked for before."""
    try:
        descriptor = os.pidfd_open(child)
    except ProcessLookupError:
        return 0
    try:
        look = select.poll()
        look.register(descriptor, select.POLLIN)
        if not look.poll(TRY_TIME):
            os.kill(child, signal.SIGKILL)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    finally:
        os.close(descriptor)


def _take_private() -> None:
    hoard = [b"\1" * PIECE_SIZE for _ in range(PIECES)]
    hoard.clear()


def _take_objects() -> None:
    for number in range(PIECES):
        descriptor = os.memfd_create(f"piece {number}")
        _ = os.write(descriptor, b"\1" * PIECE_SIZE)


def _fork_on(tell: int) -> None:
    """Fork as often as it goes, tell of each, and wait: they are to be there at the same time."""
    for _ in range(FORKS):
        try:
            if os.fork() == 0:
                signal.pause()
        except BlockingIOError:  # EAGAIN: there is no room for one more
            break
        _ = os.write(tell, FORKED)
    _ = os.write(tell, NO_MORE)
    signal.pause()


def _spin() -> None:
    until = time.monotonic_ns() + SPIN
    while time.monotonic_ns() < until:
        pass

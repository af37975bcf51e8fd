"""The process that becomes init: `python -m nexus.cli.boot JOB`, started or become by `nexus up`.

An interpreter of its own, so that nothing the command needs (typer, rich, a terminal) is in the
memory that every service is forked from.
"""

import os
import re
import signal
import socket
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Final

import msgspec

from nexus.abi import NEVER, Nanos
from nexus.bootctl import SlotBoot
from nexus.cli.places import LOCK_NAME, RECORD_NAME, Running
from nexus.cli.sink import Sink, Told, one_line
from nexus.init.errors import SystemFileError
from nexus.init.ground import Places, boot
from nexus.init.plan import Plan, load_plan, load_policy
from nexus.kernel.core import CannotRun
from nexus.kernel.linux.groups import delegated
from nexus.kernel.linux.harden import UID_FIRST
from nexus.kernel.linux.identity import ROWS
from nexus.kernel.linux.native import PR_SET_PDEATHSIG, prctl
from nexus.proof import lock
from nexus.protocols.ladder import Ground
from nexus.runtime.stamp import STAMP

EXIT_FAILED: Final = 1
MICROSECOND: Final = 1_000  # ns
WATCHDOG_USEC: Final = re.compile(r"[0-9]{1,20}")  # as systemd writes it: 64 bits
WATCHDOG_LEAST: Final = Nanos(1_000_000)  # ns; below it init would do nothing but answer it
REFUSED: Final = "refused"  # kind of the Told that says why nothing was booted
AWAITED: Final = "awaited"  # kind of the Told that names the services of a boot out of a slot
RUNS_ALREADY: Final = (
    "{title} runs already, as process {pid}: end it with `nexus down`, or give this one a name "
    "of its own with --instance"
)
UID_BLOCKS: Final[tuple[int, ...]] = (UID_FIRST, *range(65_536, 65_536 + 8 * ROWS, ROWS))
"""First user ids of the blocks, one per instance: no service may share an id with one of another
instance. Those behind the first are below 100000, where Debian's ranges for containers begin."""
UID_LOCKS: Final = Path("/run/nexus/.uids")
"""A lock per block. The machine has each id once, wherever a system keeps what it has to keep."""

STOP_SPARE: Final = 5_000_000_000  # ns; of an orderly end, beyond what the services may take
SIGNAL_BASE: Final = 128  # exit code of a system whose init was killed, as a shell counts


class NoUidsLeft(Exception):
    """Every block of user ids is taken by another instance."""

    def __init__(self) -> None:
        super().__init__(
            f"{len(UID_BLOCKS)} systems of root run here, and there are no user ids for another: "
            "end one with `nexus down`"
        )


class StateInUse(Exception):
    """Another init holds the state directory."""

    def __init__(self, state: Path) -> None:
        super().__init__(
            f"another running system holds the state directory {state}: end it with `nexus down`, "
            "or give this one a directory of its own"
        )


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """What to boot. `watcher` is the descriptor of the watching command's socket, or -1; `leashed`
    means that the system ends when the command does; `streams`, that lines go to stdout too.

    With `slot_boot` the loader has started this process, out of that slot. It is of the base system
    and may be of another release: what a job has that is not known here is left out of account.
    """

    running: Running
    home: str
    smp: int
    watcher: int
    leashed: bool
    streams: bool
    parent: int
    slot_boot: SlotBoot | None = None


def main(argv: Sequence[str]) -> int:
    """Boot, and stay init until the end; the exit code of the run."""
    job = msgspec.json.decode(argv[0], type=Job)
    watcher = None if job.watcher < 0 else socket.socket(fileno=job.watcher)
    if job.leashed:
        _leash(job.parent)
    sink = Sink(
        Path(job.running.log) / "console.log",
        watcher,
        sys.stdout.fileno() if job.streams else None,
    )
    try:
        return _boot(job, sink)
    except lock.AlreadyHeld as error:
        why = RUNS_ALREADY.format(title=job.running.title, pid=error.pid or "unknown")
    except (SystemFileError, NoUidsLeft, StateInUse, CannotRun, lock.NotPrivate) as error:
        why = str(error)
    except OSError as error:
        why = f"the system could not be booted: {error}"
    sink.tell(Told(REFUSED, job.running.title, one_line(why)))
    _ = sys.stderr.write(f"nexus: {why}\n")
    return EXIT_FAILED


def _boot(job: Job, sink: Sink) -> int:
    home = Path(job.home)
    with ExitStack() as stack:
        _ = stack.callback(os.close, lock.take(home / LOCK_NAME))
        _take_state(Path(job.running.state), stack)
        uid_first = _take_uids(UID_LOCKS, stack)
        plan = load_plan(Path(job.running.file))
        running = msgspec.structs.replace(
            job.running,
            digest=plan.digest,
            pid=os.getpid(),
            started=lock.start_of(os.getpid()),
            stop_ns=stop_max(plan),
        )
        if job.slot_boot is not None:
            running = msgspec.structs.replace(
                running,
                loader=job.parent,
                loader_started=lock.start_of(job.parent),
                slot=job.slot_boot.slot,
                set_version=STAMP.version,
                set_name=STAMP.name,
                set_digest=STAMP.digest,
            )
            names = " ".join(service.name for service in plan.services if not service.by)
            sink.tell(Told(AWAITED, plan.name, names))
        fresh = home / f"{RECORD_NAME}.new"
        _ = fresh.write_bytes(msgspec.json.encode(running))
        _ = fresh.replace(home / RECORD_NAME)
        ended = boot(
            plan,
            Ground.LINUX,
            seed=0,
            smp=job.smp,
            recorder=sink.record,
            limit=NEVER,
            places=Places(
                state=Path(running.state),
                runtime=Path(running.runtime),
                notify=os.environ.get("NOTIFY_SOCKET") if job.streams else None,
                uid_first=uid_first,
                groups=delegated(os.environ),
            ),
            policy_source=lambda: load_policy(Path(running.file)),
            plan_source=lambda: load_plan(Path(running.file)),
            watchdog=watchdog_of(os.environ, os.getpid()) if job.streams else None,
            slot_boot=job.slot_boot,
        ).exit
    return SIGNAL_BASE + ended.signal if ended.signal else ended.code


def stop_max(plan: Plan) -> int:
    """How long a command waits for the orderly end of a system, in ns."""
    return sum(service.stop_max for service in plan.services) + STOP_SPARE


def _take_state(state: Path, stack: ExitStack) -> None:
    """Two inits never share a state directory, whatever became of their lock files.

    Raises StateInUse.
    """
    try:
        held = lock.take_directory(state)
    except lock.AlreadyHeld as error:
        raise StateInUse(state) from error
    _ = stack.callback(os.close, held)


def _take_uids(locks: Path, stack: ExitStack) -> int | None:
    """The first of the user ids that this instance's services may have, and no other's.

    Only root gives any. Raises NoUidsLeft and NotPrivate.
    """
    if os.geteuid() != 0:
        return None
    lock.make_private(locks, 0, locks.parent)
    for index, first in enumerate(UID_BLOCKS):
        try:
            held = lock.take(locks / str(index), wait=0)
        except lock.AlreadyHeld:
            continue
        _ = stack.callback(os.close, held)
        return first
    raise NoUidsLeft


def watchdog_of(environ: Mapping[str, str], pid: int) -> Nanos | None:
    """How long the service manager may hear nothing, by sd_watchdog_enabled(3).

    None for no watchdog: none was asked for, it is another process's, or it makes no sense.
    """
    interval = environ.get("WATCHDOG_USEC", "")
    ours = environ.get("WATCHDOG_PID", str(pid)) == str(pid)
    if not ours or WATCHDOG_USEC.fullmatch(interval) is None:
        return None
    span = Nanos(int(interval) * MICROSECOND)
    return span if WATCHDOG_LEAST <= span < NEVER else None


def _leash(parent: int) -> None:
    """Have the kernel ask this process to end when the command ends."""
    _ = prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it ended before the line above
        os.kill(os.getpid(), signal.SIGTERM)


assert UID_FIRST + ROWS <= 65_534, "the first block ends below the user nobody"
assert UID_BLOCKS[-1] + ROWS <= 100_000

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

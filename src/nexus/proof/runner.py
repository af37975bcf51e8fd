"""Runs one boot in a child process and brings home what it left behind.

The system under proof lives in a process group of its own: a crash, a hang or a kill of it
cannot take the runner down, and at the deadline the whole group is killed.
"""

import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from threading import Event as Pause
from typing import Final

import nexus
from nexus.abi import Event
from nexus.bootctl.handover import EXIT_REBOOT, EXIT_SLOT_FAILED
from nexus.kernel.linux.native import PR_SET_PDEATHSIG, prctl
from nexus.proof.record import EVENT_SIZE_MAX, MalformedEvent, decode_event
from nexus.proof.trace import Ending, Trace
from nexus.protocols.ladder import Ground

EVENTS_MAX: Final = 400_000  # per boot; a traced selftest run has some ten thousand
EVENTS_SIZE_MAX: Final = 64 * 1024 * 1024  # bytes of them as they came; a flood is more
OUTPUT_SIZE_MAX: Final = 1024 * 1024  # bytes of raw output kept, the first ones
READ_SIZE: Final = 256 * 1024
STOP_GRACE: Final = 60.0  # seconds a simulated machine has to write its disks down; one takes 0.1
EXIT_GRACE: Final = 60.0  # seconds a boot has to exit after its last event; one takes 0.1
REAP_GRACE: Final = 2 * 10**9  # ns for killed processes to be gone
REAP_POLL: Final = 0.01  # seconds
PR_SET_CHILD_SUBREAPER: Final = 36  # prctl(2)
EXIT_RUN_OVER: Final = 103  # the root task had not exited at the bound of the kernel's clock
EXIT_HANG: Final = 104
EXIT_POWER_CUT: Final = 105  # where the job said


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What the child process has to boot. `limit` bounds its kernel clock, in nanoseconds.

    `state` is the directory of what lasts from one boot of the run to the next. With `cut_at` the
    power is cut (sim) inside the `cut_write`th write of a disk after selftest-client printed that
    line. A device with slots (`slots`) is booted by the loader, which says in `slot` what it chose.
    """

    ground: str
    system: str
    smp: int
    seed: int
    limit: int
    boot: int = 0
    state: str | None = None
    slots: bool = False
    slot: str = ""
    cut_at: str = ""
    cut_write: int = 0
    runner: int = 0  # process that started it, filled in by run_boot
    saboteur: int | None = None
    scenario: str | None = None
    trace: bool = False
    log: str | None = None


assert {EXIT_RUN_OVER, EXIT_HANG, EXIT_POWER_CUT}.isdisjoint({EXIT_REBOOT, EXIT_SLOT_FAILED})

CHILD: Final = (sys.executable, "-m", "nexus.proof.child")

Watch = Callable[[Event], bool]
"""Sees each event as it comes; True ends the boot there."""

Keep = Callable[[bytes], None]
"""Is given each encoded event, for the run record."""


def _ignore(_line: bytes) -> None:
    """Keep nothing."""


def run_boot(
    job: Job,
    *,
    timeout: int,
    watch: Watch,
    keep: Keep = _ignore,
    command: Sequence[str] = CHILD,
) -> Trace:
    """Boot, read until the end, `watch` or the deadline, and leave no process behind.

    `command` is given the descriptor of the event pipe and the job as JSON.
    """
    start = time.monotonic_ns()
    started = replace(job, runner=os.getpid())
    become_subreaper()
    reader, writer = os.pipe()
    try:
        arguments = [*command, str(writer), json.dumps(asdict(started))]
        child = subprocess.Popen(  # noqa: S603 (our own module, arguments made here)
            arguments,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            pass_fds=(writer,),
            env=_environment(),
            start_new_session=True,
        )
    except BaseException:  # whatever it was goes on; only the descriptor is given back
        os.close(reader)
        raise
    finally:
        os.close(writer)
    with child:
        reading = _Reading(child, reader, watch, keep, cuttable=bool(job.cut_at))
        try:
            reading.until(start + timeout)
            reading.close()
            if reading.stopped and job.ground == Ground.SIM:
                _stop(child)
        finally:
            reading.close()
            left_behind = _end_group(child)
    return reading.trace(job.boot, left_behind, time.monotonic_ns() - start)


def _environment() -> dict[str, str]:
    """The runner's own, with this package found first: the child runs the same code."""
    source = str(Path(nexus.__file__).parents[1])
    paths = [source, *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def become_subreaper() -> None:
    """Have orphans of a boot become our children, so that they can be counted and reaped."""
    _ = prctl(PR_SET_CHILD_SUBREAPER, 1)


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when the runner `parent` dies: nobody reads it then."""
    _ = prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the line above
        os.kill(os.getpid(), signal.SIGKILL)


class _Reading:
    """The two streams of a running boot: events, and raw output."""

    def __init__(
        self,
        child: "subprocess.Popen[bytes]",
        reader: int,
        watch: Watch,
        keep: Keep,
        *,
        cuttable: bool,
    ) -> None:
        assert child.stdout is not None
        self._child = child
        self._cuttable = cuttable
        self._reader = reader
        self._output = child.stdout
        self._watch = watch
        self._keep = keep
        self._rest = b""
        self._text = bytearray()
        self._events: list[Event] = []
        self._size = 0  # bytes of the events as they came
        self._dropped: int | None = None
        self._stopped = False
        self._timed_out = False

    def until(self, deadline: int) -> None:
        """Read until both streams end and the child has exited, at most to the deadline."""
        with selectors.DefaultSelector() as selector:
            _ = selector.register(self._reader, selectors.EVENT_READ, self._read_events)
            _ = selector.register(self._output, selectors.EVENT_READ, self._read_output)
            while selector.get_map() and not self._stopped:
                remaining = (deadline - time.monotonic_ns()) / 1e9
                if remaining <= 0:
                    self._timed_out = True
                    return
                for key, _mask in selector.select(min(remaining, 1.0)):
                    if not key.data():
                        _ = selector.unregister(key.fileobj)
                if self._child.poll() is not None and not selector.select(0):
                    break  # its output may be held open by something it left behind
        if self._stopped:
            return
        try:
            _ = self._child.wait(EXIT_GRACE)
        except subprocess.TimeoutExpired:
            self._timed_out = True

    @property
    def stopped(self) -> bool:
        """Whether `watch` has ended the boot."""
        return self._stopped

    def close(self) -> None:
        """Take no more events."""
        if self._reader >= 0:
            os.close(self._reader)
            self._reader = -1

    def trace(self, boot: int, left_behind: int, wall: int) -> Trace:
        status = self._child.returncode
        killed = self._timed_out
        cut = not killed and self._cuttable and status == EXIT_POWER_CUT
        ending = Ending(
            code=None if killed else 0 if cut else max(status, 0),
            cut=cut,
            signal=0 if killed or self._stopped else max(-status, 0),
            stopped=self._stopped,
            left_behind=left_behind,
            dropped=(self._dropped or 0),
            told_end=self._dropped is not None,
            wall=wall,
        )
        text = self._text.decode("utf-8", "replace")
        return Trace(tuple(self._events), text, ending, boot)

    def _read_events(self) -> bool:
        data = os.read(self._reader, READ_SIZE)
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            self._read_event(line)
            if self._stopped:
                return False
        if len(self._rest) > EVENT_SIZE_MAX:
            raise MalformedEvent(f"an event of more than {EVENT_SIZE_MAX} bytes")
        return bool(data)

    def _read_event(self, line: bytes) -> None:
        if line.startswith(b'{"dropped":'):
            self._dropped = int(json.loads(line)["dropped"]) + (self._dropped or 0)
            return
        event = decode_event(line)
        if len(self._events) >= EVENTS_MAX or self._size + len(line) > EVENTS_SIZE_MAX:
            self._dropped = (self._dropped or 0) + 1
            return
        self._size += len(line)
        self._events.append(event)
        self._keep(line)
        self._stopped = self._watch(event)

    def _read_output(self) -> bool:
        data = os.read(self._output.fileno(), READ_SIZE)
        self._text += data[: OUTPUT_SIZE_MAX - len(self._text)]
        return bool(data)


def _stop(child: "subprocess.Popen[bytes]") -> None:
    """Have a simulated machine leave what is on its disks: it is in no file before."""
    child.terminate()
    try:
        _ = child.wait(STOP_GRACE)
    except subprocess.TimeoutExpired:
        return  # it is killed then, and what it has left is nothing


def _end_group(child: "subprocess.Popen[bytes]") -> int:
    """Kill and reap whatever is left of the boot. How many processes besides the child were."""
    if child.poll() is None:
        os.killpg(child.pid, signal.SIGKILL)
        _ = child.wait()
    deadline = time.monotonic_ns() + REAP_GRACE
    count = 0
    pause = Pause()
    while time.monotonic_ns() < deadline:
        try:
            pid, _status = os.waitpid(-child.pid, os.WNOHANG)
        except ChildProcessError:
            break
        if pid:
            count += 1
            continue
        os.killpg(child.pid, signal.SIGKILL)
        _ = pause.wait(REAP_POLL)
    return count

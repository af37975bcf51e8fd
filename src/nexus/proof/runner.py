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
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from threading import Event as Pause
from typing import Final

import nexus
from nexus.abi import Event
from nexus.kernel.linux.native import PR_SET_PDEATHSIG, prctl
from nexus.proof.job import EXIT_HANG, EXIT_POWER_CUT, EXIT_RUN_OVER, Job
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

__all__ = ["EXIT_HANG", "EXIT_POWER_CUT", "EXIT_RUN_OVER", "Job"]  # beside what stands here

CHILD: Final = (sys.executable, "-m", "nexus.proof.child")
READY_MAX: Final = 1800.0  # seconds to bring and build an image on a slow line
EXIT_NOT_RUN: Final = 3  # of HOST without a job: something is missing, which its last line says
HOST: Final = (sys.executable, "-m", "nexus.vm.host")
"""What boots a job: the process of the system, or that of the machine which it has to itself."""
GO: Final = b"go\n"  # to a boot that was started ahead: the one before is over

Watch = Callable[[Event], bool]
"""Sees each event as it comes; True ends the boot there."""

Keep = Callable[[bytes], None]
"""Is given each encoded event, for the run record."""


class NotRun(Exception):
    """There is nothing here to boot with; the text is one sentence with the command that helps."""


def make_ready(ground: Ground) -> None:
    """Have everything there that a boot needs, before its clock starts. Raises NotRun, and
    RuntimeError where it is not the machine that is wanting: that would be red, and no skip."""
    if ground is not Ground.VM:
        return
    try:
        done = subprocess.run(  # noqa: S603 (our own module)
            HOST,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env=_environment(),
            timeout=READY_MAX,
            check=False,
        )
    except subprocess.TimeoutExpired:
        text = f"there was no image in {READY_MAX:.0f} s; try `nexus vm build`"
        raise NotRun(text) from None
    said = done.stderr.strip()
    if done.returncode == EXIT_NOT_RUN:
        raise NotRun(said.rpartition("\n")[2] or f"exit code {done.returncode}")
    if done.returncode:
        raise RuntimeError(f"nexus.vm.host ended with {done.returncode}: {said}")


def _ignore(_line: bytes) -> None:
    """Keep nothing."""


def run_boot(
    job: Job,
    *,
    timeout: int,
    watch: Watch,
    keep: Keep = _ignore,
    command: Sequence[str] = (),
) -> Trace:
    """Boot, read until the end, `watch` or the deadline, and leave no process behind.

    `command` is given the descriptor of the event pipe and the job as JSON; without one it is that
    of the job's ground.
    """
    return Boot(job, command).run(timeout=timeout, watch=watch, keep=keep)


class Boot:
    """A started boot. That of a job `ahead` waits in its machine, before it looks at a disk, until
    it is `run`."""

    def __init__(self, job: Job, command: Sequence[str] = ()) -> None:
        self._job = job
        self._start = time.monotonic_ns()
        become_subreaper()
        self._reader, writer = os.pipe()
        command = command or (HOST if job.ground == Ground.VM else CHILD)
        started = replace(job, runner=os.getpid())
        try:
            self._child = subprocess.Popen(  # noqa: S603 (our own module, arguments made here)
                [*command, str(writer), json.dumps(asdict(started))],
                stdin=subprocess.PIPE if job.ahead else subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                pass_fds=(writer,),
                env=_environment(),
                start_new_session=True,
            )
        except BaseException:  # whatever it was goes on; only the descriptor is given back
            os.close(self._reader)
            raise
        finally:
            os.close(writer)

    def run(self, *, timeout: int, watch: Watch, keep: Keep = _ignore) -> Trace:
        """Read until its end, `watch` or the deadline; `timeout` counts from here if it was
        `ahead`. No process is left behind."""
        job, child = self._job, self._child
        reader, self._reader = self._reader, -1
        with child:
            reading = _Reading(child, reader, watch, keep, cuttable=bool(job.cut_at))
            try:
                if job.ahead:
                    self._start = time.monotonic_ns()
                    self._go()
                reading.until(self._start + timeout)
                reading.close()
                if reading.stopped and job.ground != Ground.LINUX:
                    _stop(child)
            finally:
                reading.close()
                left_behind = _end_group(child)
        return reading.trace(job.boot, left_behind, time.monotonic_ns() - self._start)

    def drop(self) -> None:
        """No process of it stays, if it was not run."""
        if self._reader < 0:
            return
        os.close(self._reader)
        self._reader = -1
        with self._child as child:
            _ = _end_group(child)

    def _go(self) -> None:
        assert self._child.stdin is not None, "it was started with a pipe"
        with suppress(BrokenPipeError):  # it is gone, and says why on its output
            _ = self._child.stdin.write(GO)
            self._child.stdin.close()


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
    """Have a machine leave what is on its disks; a simulated one has it in no file before."""
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

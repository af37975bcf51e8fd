"""Runs programs written against the ABI on a kernel, from a test.

A test hands over coroutine functions taking a BootImage; the rig makes them the program table of
a fresh kernel, runs the root one to its end and returns what it returned. A kernel of real
processes is run in a forked child of the test, which becomes init and sends its outcome back over
a pipe; a simulated one runs in the test's own process. A program that raises fails the test with
the traceback of that task, whichever process it ran in.
"""

import ctypes
import json
import os
import pickle
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, Final, NoReturn, Protocol
from unittest import SkipTest

from nexus.abi import (
    HEAP_SIZE,
    INIT_NAME,
    AbiError,
    BootImage,
    ConsoleWrite,
    Event,
    EventKind,
    ExitInfo,
    HardwareKind,
    Nanos,
    Program,
    Programs,
    Recorder,
    Trap,
)
from nexus.kernel.core.limits import SystemLimits
from nexus.kernel.linux import LinuxKernel
from nexus.kernel.linux.harden import preload
from nexus.kernel.linux.secrets import forget_keys
from nexus.kernel.sim import SimKernel
from nexus.testing.outside import LinuxOutside, Place, SimOutside, new_place

RUN_TIME_MAX: Final = Nanos(
    90_000_000_000
)  # of the kernel's clock; 10 s is much, on a free machine
HOST_TIME_MAX: Final = 120.0  # seconds; then the whole process tree is killed
EXIT_FAILED: Final = 70  # EX_SOFTWARE: exit code of a task whose program raised
SIM_LATENESS_MAX: Final = Nanos(20_000)  # a few resumes of the cost model, no timer slack
LINUX_LATENESS_MAX: Final = Nanos(1_000_000)  # design.md section 3, promise 4
USER_NOBODY: Final = 65534  # an ordinary user that every Linux has, and that owns no file
REPORT_LINE: Final = "rig: task failed"
REPORT_SIZE_MAX: Final = 3000  # bytes of traceback, so that its JSON fits one console message
FRAMES_MAX: Final = 12  # innermost frames kept of a traceback

_PR_SET_DUMPABLE: Final = 4  # prctl(2)
_OUTCOME_HEADER_SIZE: Final = 8  # bytes of the length before a pickled outcome

assert HOST_TIME_MAX * 1e9 > RUN_TIME_MAX, "a kernel ends a run that is too long by itself"
assert REPORT_SIZE_MAX < 4096, "a report fits the evidence of one console line"

Main = Callable[[BootImage], Coroutine[Trap[Any], Any, object]]
"""A program as tests write it. Root's result is handed to the test; an int is an exit code."""

_LIBC: Final = ctypes.CDLL(None, use_errno=True)


class Kernel(Protocol):
    """What the rig needs of a kernel: its clock, and to be run once."""

    @property
    def now(self) -> Nanos: ...

    def run(self, root: Program, argument: bytes, *, until: Nanos) -> ExitInfo: ...


class MakeKernel(Protocol):
    """Makes a fresh kernel for one run, without a state directory."""

    def __call__(
        self, programs: Programs, *, recorder: Recorder, limits: SystemLimits
    ) -> Kernel: ...


class MakePlacedKernel(Protocol):
    """Makes a fresh kernel for one run in a place, and sets its `current` world outside."""

    def __call__(
        self, programs: Programs, *, recorder: Recorder, limits: SystemLimits, place: Place
    ) -> Kernel: ...


class TaskFailed(AssertionError):
    """A program raised; the text is the traceback of its task."""


class RunHung(AssertionError):
    """A run did not end in HOST_TIME_MAX and was killed."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """What one run left behind."""

    result: Any
    exit: ExitInfo
    events: tuple[Event, ...]

    def fields(self, kind: EventKind) -> list[Mapping[str, object]]:
        """The fields of every event of one kind, in order."""
        return [event.fields for event in self.events if event.kind is kind]


@dataclass
class Outcome:
    """Collected inside the process that runs the kernel; it has to survive pickling."""

    result: Any = None
    failures: list[str] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    exit: ExitInfo | None = None


@dataclass(frozen=True, kw_only=True)
class Rig:
    """One kind of kernel, ready to run programs.

    `lateness_max` bounds how late the median of several waits may end on an idle CPU.
    Runs in a place, with a world outside, need `make_placed`.
    A program that a kernel is to execute apart is handed over as a `Program`, with its entry.
    `forked` kernels turn the calling process into init and get a process of their own;
    `user` is the uid and gid that process takes first, None to keep the test's own.
    `time_max` bounds a run, in the kernel's own time. Events of `kinds` are kept; a test that
    measures memory keeps few.
    """

    name: str
    make_kernel: MakeKernel
    lateness_max: Nanos
    make_placed: MakePlacedKernel | None = None
    forked: bool = False
    user: int | None = None
    time_max: Nanos = RUN_TIME_MAX
    kinds: frozenset[EventKind] = frozenset(EventKind)
    apart: bool = True  # whether its kernel can start an interpreter of a program's own

    def require_apart(self) -> None:
        """Skip a case that needs an interpreter of its own where none can be started."""
        if not self.apart:
            raise SkipTest(f"user {self.user} cannot execute {sys.executable}")

    def place(self) -> AbstractContextManager[Place]:
        """A place for runs that keep something, or talk to the world outside."""
        return self._place_of_its_own() if self.forked else new_place(self.user)

    @contextmanager
    def _place_of_its_own(self) -> Iterator[Place]:
        """On Linux, where keys outlive every process of the run: they are its user's."""
        with new_place(self.user) as place:
            try:
                yield place
            finally:
                forgotten = _in_a_fork(
                    lambda: Outcome(result=forget_keys(place.state_dir)), user=self.user
                )
                assert not forgotten.failures, forgotten.failures

    def run(
        self,
        root: Main,
        *,
        programs: Mapping[str, Main | Program] | None = None,
        limits: SystemLimits | None = None,
        argument: bytes = b"",
        place: Place | None = None,
    ) -> Any:
        """Run `root` to its end and return its result."""
        run = self.observe(root, programs=programs, limits=limits, argument=argument, place=place)
        return run.result

    def observe(
        self,
        root: Main,
        *,
        programs: Mapping[str, Main | Program] | None = None,
        limits: SystemLimits | None = None,
        argument: bytes = b"",
        place: Place | None = None,
    ) -> Run:
        """Run `root` to its end and return its result with the kernel's evidence."""

        def work() -> Outcome:
            return self.run_here(root, programs or {}, limits or SystemLimits(), argument, place)

        outcome = _in_a_fork(work, user=self.user) if self.forked else work()
        if outcome.failures:
            raise TaskFailed("\n\n".join([f"on {self.name}:", *outcome.failures]))
        assert outcome.exit is not None, "a run without a failure has an exit"
        return Run(result=outcome.result, exit=outcome.exit, events=tuple(outcome.events))

    def run_here(
        self,
        root: Main,
        programs: Mapping[str, Main | Program],
        limits: SystemLimits,
        argument: bytes,
        place: Place | None = None,
    ) -> Outcome:
        """Run `root` in the calling process, whatever that does to it."""
        outcome = Outcome()

        async def root_main(boot: BootImage) -> int:
            try:
                outcome.result = await root(boot)
            except Exception as error:  # noqa: BLE001 (the outermost frame of a test program)
                outcome.failures.append(f"{boot.name}: {_describe(error)}")
                return EXIT_FAILED
            return 0

        def record(event: Event) -> None:
            # A kernel may hand over mappings of its own making; plain dicts can be pickled.
            if event.kind in self.kinds:
                outcome.events.append(event._replace(fields=dict(event.fields)))

        table = {
            name: main if isinstance(main, Program) else program(name, reporting(main))
            for name, main in programs.items()
        }
        if place is None:
            kernel = self.make_kernel(table, recorder=record, limits=limits)
        else:
            assert self.make_placed is not None, "this kernel has no world outside"
            kernel = self.make_placed(table, recorder=record, limits=limits, place=place)
        until = Nanos(kernel.now + self.time_max)
        try:
            outcome.exit = kernel.run(program(INIT_NAME, root_main), argument, until=until)
        except Exception:  # noqa: BLE001 (whatever a kernel raises is the test's failure)
            outcome.failures.append(f"the kernel raised:\n{traceback.format_exc()}")
        if place is not None and isinstance(kernel, SimKernel):
            keep_in(place, kernel)
        reports = _task_reports(outcome.events)
        if reports:
            # The first cause comes first: root usually fails because a child did.
            outcome.failures[:0] = reports
        return outcome


def sim_rig(*, seed: int, cpu_count: int, heap_size: int = HEAP_SIZE) -> Rig:
    """The simulated kernel; its clock moves only by what it models, so lateness is its own.

    `heap_size` bounds all tasks together, which no other kernel does.
    """

    def make_with(
        programs: Programs, recorder: Recorder, limits: SystemLimits, **placed: Any
    ) -> SimKernel:
        return SimKernel(
            programs,
            seed=seed,
            recorder=recorder,
            cpu_count=cpu_count,
            limits=limits,
            heap_size=heap_size,
            **placed,
        )

    def make(programs: Programs, *, recorder: Recorder, limits: SystemLimits) -> Kernel:
        return make_with(programs, recorder, limits, boot_memory=None)

    def make_placed(
        programs: Programs, *, recorder: Recorder, limits: SystemLimits, place: Place
    ) -> Kernel:
        kernel = make_with(programs, recorder, limits, **kept_in(place))
        place.current = SimOutside(kernel)
        return kernel

    return Rig(
        name=f"sim-smp{cpu_count}-seed{seed}",
        make_kernel=make,
        make_placed=make_placed,
        lateness_max=SIM_LATENESS_MAX,
    )


def kept_in(place: Place) -> dict[str, Any]:
    """What a simulated kernel finds in a place; it drives the devices there itself."""
    return {
        "boot_memory": place.memory,
        "hardware": place.hardware,
        "kernel_driven": [
            each.name for each in place.hardware if each.kind is not HardwareKind.EMPTY
        ],
        "disks": place.disks,
        "secrets": place.secrets,
    }


def keep_in(place: Place, kernel: SimKernel) -> None:
    """Leave in a place what a simulated kernel has kept."""
    place.memory = kernel.boot_memory
    place.disks = kernel.bus.disks
    place.secrets = kernel.secrets.kept


def linux_rig(*, harden: bool = True, user: int | None = None) -> Rig:
    """The Linux kernel backend, in a process of its own, as root or as another user."""

    def make(programs: Programs, *, recorder: Recorder, limits: SystemLimits) -> Kernel:
        return LinuxKernel(programs, recorder=recorder, limits=limits, harden=harden)

    def make_placed(
        programs: Programs, *, recorder: Recorder, limits: SystemLimits, place: Place
    ) -> Kernel:
        outside = LinuxOutside(place)
        place.current = outside
        return LinuxKernel(
            programs,
            recorder=recorder,
            limits=limits,
            harden=harden,
            state_dir=place.state_dir,
            runtime_dir=place.runtime_dir,
            notify_socket=outside.manager,
            hardware=place.hardware,
        )

    words = ["linux", *([] if harden else ["soft"]), *([] if user is None else ["user"])]
    return Rig(
        name="-".join(words),
        make_kernel=make,
        make_placed=make_placed,
        lateness_max=LINUX_LATENESS_MAX,
        forked=True,
        user=user,
        apart=user is None or _executable_by(user, Path(sys.executable)),
    )


def _executable_by(user: int, path: Path) -> bool:
    """Whether an ordinary user may execute a file, and reach it: its links, too."""
    places = {path.absolute(), path.resolve()}
    above = {parent for place in places for parent in place.parents}
    return all(
        each.stat().st_mode & 0o001 or (each.stat().st_uid == user and each.stat().st_mode & 0o100)
        for each in (*places, *above)
    )


def linux_rigs(*, harden: bool = True) -> tuple[Rig, ...]:
    """The Linux kernel as whoever runs the test, and as an ordinary user if that is root."""
    mine = linux_rig(harden=harden)
    return (mine,) if os.getuid() else (mine, linux_rig(harden=harden, user=USER_NOBODY))


def program(name: str, main: Main) -> Program:
    """A program table entry; the digest is that of its name, for a test has no file."""
    return Program(name=name, main=main, digest=sha256(name.encode()).hexdigest())  # type: ignore[arg-type]


def reporting(main: Main) -> Main:
    """The same program, which prints its traceback before it dies of an exception."""

    async def reporting_main(boot: BootImage) -> int | None:
        try:
            code = await main(boot)
        except Exception as error:  # noqa: BLE001 (the outermost frame of a test program)
            report = {"task": boot.name, "generation": boot.generation, "text": _describe(error)}
            try:
                await ConsoleWrite(REPORT_LINE, json.dumps(report).encode())
            except AbiError:
                return EXIT_FAILED  # the exit code alone fails the run
            return EXIT_FAILED
        return code if isinstance(code, int) else None

    return reporting_main


def _describe(error: BaseException) -> str:
    """A traceback without source lines: the sandbox opens no file."""
    frames = traceback.extract_tb(error.__traceback__)[-FRAMES_MAX:]
    lines = [f"  {Path(frame.filename).name}:{frame.lineno} in {frame.name}" for frame in frames]
    text = "\n".join([f"{type(error).__name__}: {error}", *lines])
    return text.encode("ascii", "backslashreplace").decode()[:REPORT_SIZE_MAX]


def _task_reports(events: Sequence[Event]) -> list[str]:
    """The tracebacks tasks have printed, and the failed tasks that could not print one."""
    reports = []
    printed = set()
    for event in events:
        if event.kind is EventKind.CONSOLE and event.fields.get("line") == REPORT_LINE:
            evidence = event.fields["evidence"]
            report = evidence if isinstance(evidence, dict) else json.loads(str(evidence))
            reports.append(f"{report['task']}: {report['text']}")
            printed.add(event.pid)
    reports += [
        f"{event.fields.get('name')}: failed and could not print why"
        for event in events
        if event.kind is EventKind.EXIT
        and event.fields.get("code") == EXIT_FAILED
        and event.fields.get("name") != INIT_NAME
        and event.pid not in printed
    ]
    return reports


def _in_a_fork(work: Callable[[], Outcome], *, user: int | None) -> Outcome:
    """Do `work` in a child process, which may do to itself whatever it likes."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        _work_and_exit(work, writer, user)
    os.close(writer)
    try:
        data = _read_outcome(reader, time.monotonic_ns() + int(HOST_TIME_MAX * 1e9))
        if data is None:
            kill_tree(pid)
            raise RunHung(f"a run took longer than {HOST_TIME_MAX:.0f} s")
    finally:
        os.close(reader)
        _, status = os.waitpid(pid, 0)
    if len(data) < _OUTCOME_HEADER_SIZE:
        raise TaskFailed(f"the process of the kernel ended with wait status {status:#x}")
    outcome: Outcome = pickle.loads(data[_OUTCOME_HEADER_SIZE:])  # noqa: S301 (from our own child)
    return outcome


def _work_and_exit(work: Callable[[], Outcome], writer: int, user: int | None) -> NoReturn:
    try:
        if user is not None:
            preload()  # the interpreter's own files may be root's alone
            drop_to(user)
        try:
            outcome = work()
        except BaseException:  # noqa: BLE001 (nothing may unwind into pytest's copy in the child)
            outcome = Outcome(failures=[traceback.format_exc()])
        try:
            data = pickle.dumps(outcome)
        except Exception:  # noqa: BLE001 (a result that cannot be pickled is the test's failure)
            data = pickle.dumps(Outcome(failures=[traceback.format_exc()]))
        left = memoryview(len(data).to_bytes(_OUTCOME_HEADER_SIZE, "little") + data)
        while left:
            left = left[os.write(writer, left) :]
    finally:
        os._exit(0)


def _read_outcome(reader: int, deadline: int) -> bytes | None:
    """Header and outcome, less if the writer died first, None if time ran out.

    Counted bytes and not end of file end it: without hardening services hold the pipe, too.
    """
    data = b""
    while True:
        size = _OUTCOME_HEADER_SIZE
        if len(data) >= size:
            size += int.from_bytes(data[:size], "little")
        if len(data) == size:
            return data
        left = (deadline - time.monotonic_ns()) / 1e9
        if left <= 0 or not select.select([reader], [], [], left)[0]:
            return None
        chunk = os.read(reader, min(size - len(data), 1 << 16))
        if not chunk:
            return b""
        data += chunk


def drop_to(user: int) -> None:
    """Become an ordinary user for good, as a login would: no groups, no capabilities."""
    os.setgroups([])
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)
    # Changing ids makes a process undumpable; one started by that user would not be.
    _LIBC.prctl(_PR_SET_DUMPABLE, 1, 0, 0, 0)


def children_of(pid: int) -> list[int]:
    """The direct children of a process, from /proc."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                stat = (entry / "stat").read_text()
            except OSError:
                continue  # it ended while we looked
            if int(stat.rpartition(")")[2].split()[1]) == pid:
                found.append(int(entry.name))
    return found


def kill_tree(pid: int) -> None:
    """SIGKILL a process of ours and all that it started, parents first so that none respawns."""
    os.kill(pid, signal.SIGSTOP)
    children = children_of(pid)
    os.kill(pid, signal.SIGKILL)
    for child in children:
        try:
            kill_tree(child)
        except ProcessLookupError:
            continue  # the death of its parent has already ended it

"""The Linux kernel backend: init's process, the tasks it forked, and what init alone decides.

The calling process becomes init: it drives the root task's coroutine, forks every spawned
program, stamps identities, keeps the shares and the classes, reads the kernel channels between
the root's traps and while it waits, and never blocks on a service. A forked child confines itself
by our code alone, in a few milliseconds that the spawn waits for; an interpreter of its own starts
and imports what it likes, so its spawn returns at once and the rest follows as events of its
channel, within a deadline (`Preparing`).

Decisions a test must be able to break are small methods looked up at each use:
`_next_generation`, `_spawn_reason`, `_give_back`, `_may_reuse`, `_decide_qos`, `_forget_ends`,
`_policy_raise`, `_boot_memory_replace`, `_remove_ports`.
"""

import faulthandler
import fcntl
import gc
import os
import resource
import select
import signal
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Final, NoReturn

from nexus.abi import (
    AUDIT_LINES_MAX,
    BLOCK_SIZE,
    CONSOLE_LINE_SIZE_MAX,
    ENTROPY_SIZE_MAX,
    EVIDENCE_SIZE_MAX,
    HEAP_SIZE,
    INIT_NAME,
    NO_WAIT,
    TASKS_MAX,
    VMO_SIZE_MAX,
    AbiError,
    AuditLines,
    AuditLog,
    BootImage,
    BootMemoryRead,
    BootMemoryReplace,
    BusEntry,
    BusScan,
    Entropy,
    Event,
    EventKind,
    ExitInfo,
    Grants,
    Isolation,
    Kill,
    Nanos,
    Notify,
    Pid,
    PolicyRaise,
    PolicyWord,
    Program,
    Programs,
    QosClass,
    Recorder,
    Rights,
    SecretBackend,
    Sender,
    Slot,
    Spawn,
    Spawned,
    SpawnLastError,
    SpawnReason,
    SpawnSpec,
    Status,
    StreamGrant,
    StreamRole,
    TaskInfo,
    TaskTable,
    Wait,
    service_id,
)
from nexus.kernel.core import (
    EXIT_CRASH,
    QOS_STATUS,
    Account,
    CannotRun,
    Hardware,
    OwnerShare,
    QosReason,
    QosRequest,
    RunOver,
    SpawnRefused,
    SystemLimits,
    SystemShares,
    audit_line,
    check_boot_memory,
    check_bus,
    check_console,
    check_cpu,
    check_notice,
    check_ports,
    check_spec,
    decide,
    doors_of,
    find_hardware,
    grants_fields,
    parse_evidence,
    ports_count,
)
from nexus.kernel.linux import channel as wire
from nexus.kernel.linux import outside, seccomp
from nexus.kernel.linux.bootmemory import BootMemory
from nexus.kernel.linux.child import CONTROL_TERMS, Birth, live
from nexus.kernel.linux.devices import FILE, Granted
from nexus.kernel.linux.driver import (
    AT_ONCE,
    CONTROL_SIZE,
    DESCRIPTOR,
    DESCRIPTORS_MAX,
    GONE_ERRORS,
    Driver,
    Exited,
    cookie_of,
)
from nexus.kernel.linux.grants import check_grants, open_granted
from nexus.kernel.linux.groups import Group, Groups
from nexus.kernel.linux.harden import (
    IMPORT_DATA_MAX,
    UID_FIRST,
    Confinement,
    Namespaces,
    memory_room,
    preload,
)
from nexus.kernel.linux.hardware import Bus, Made
from nexus.kernel.linux.identity import CREDENTIALS, NO_ID, ROWS, IdentityTable, IdentityView
from nexus.kernel.linux.mmio import MmioPage
from nexus.kernel.linux.native import MACHINE, SIOCOUTQ, signalfd, timerfd, timerfd_arm
from nexus.kernel.linux.notify import ServiceManager
from nexus.kernel.linux.objects import Endpoint, HolderLink, OwnerLink, make_pair
from nexus.kernel.linux.outside import SignalLink
from nexus.kernel.linux.seccomp import Stage
from nexus.kernel.linux.secrets import NO_SECRET, Secret, key_name, open_directory
from nexus.kernel.linux.sight import DRIVER_DESCRIPTORS, STANDARD_DESCRIPTORS, seen
from nexus.kernel.linux.stage2 import Handover, execute, hand_over
from nexus.kernel.linux.truesize import Truesize

# Six for each task (process, channel, both control links, and of these the other ends until they
# are handed over), and a service's own number.
DESCRIPTORS_WANTED: Final = 6 * TASKS_MAX + DESCRIPTORS_MAX
ROOT_SLOT: Final = Slot(1)  # of the root's own endpoint, as for every task
FORKS_MAX: Final = 32  # tries to get a number that is not burned
CONFIRM_MAX: Final = 5_000_000_000  # nanoseconds a task may keep a burned number in a shortage
BURNED_MAX: Final = ROWS // 4  # numbers at rest, above which it is one: a fork in four is lost
FORK_PAUSE: Final = 2  # milliseconds between two tries, in which confirmations may come
PREPARE_TIME: Final = 5_000_000_000  # nanoseconds a forked child may take to confine itself
EXEC_PREPARE_TIME: Final = 15_000_000_000  # and to start an interpreter and import, a second's work
LEAVE_TIME: Final = 1_000_000_000  # nanoseconds a child may take to end that says it cannot start
THREAD_END_TIME: Final = 1_000_000_000  # nanoseconds an ended thread may stay listed
THREAD_PAUSE: Final = 1_000_000  # nanoseconds between two looks at them
FRAMES_PER_TURN: Final = 64  # taken from one kernel channel before the others' turn
MUTED_TIME: Final = 10_000_000  # nanoseconds a channel is left alone that had more than that
UNREAD_MAX: Final = 16 * 1024  # bytes; about twenty small frames that a task has not read
OUTBOX_MAX: Final = ROWS + 16  # frames to one task: each burned number once, and an answer
NOTES_MAX: Final = 512  # events one task may have recorded about itself
LAST_FRAMES_MAX: Final = 4096  # taken from the channel of a dead task; its buffer holds fewer
EVENTS_PER_POLL: Final = 64
KILL_TIME: Final = 5_000_000_000  # nanoseconds until a killed task must be reapable
KERNEL_PID: Final = Pid(0)
ORPHANS_PARENT: Final = 1  # the process that Linux gives the children of a dead one
SIGNALS_READ: Final = 4096  # bytes of one read of a signalfd, some dozens of signals
ENDED_EARLY: Final = "the child ended before it was confined"

# Nice values of the classes. Not SCHED_FIFO, SCHED_RR or SCHED_IDLE: no class starves another.
NICE: Final = {
    QosClass.IDLE: 10,
    QosClass.NORMAL: 0,
    QosClass.INTERACTIVE: -5,
    QosClass.PERF_BURST: -10,
}


class Preparing:
    """What a child in an interpreter of its own is given when it has confined itself: its side
    of the links, its ports, devices and sockets. Until then init holds them, and until then
    nothing the child says is believed but why it cannot start.
    """

    __slots__ = ("birth", "degraded", "ends", "failed", "inherited")

    def __init__(self, birth: Birth, inherited: tuple[int, ...], degraded: tuple[str, ...]) -> None:
        self.birth = birth
        self.inherited = inherited  # descriptors to hand over
        self.degraded = degraded
        self.ends = ExitStack()  # closes them
        self.failed = ""  # why it will not run


class Child:
    """A task that was spawned: its process, its channel, what it had reserved."""

    __slots__ = (
        "channel",
        "dials",
        "doors",
        "exit",
        "frames",
        "group",
        "hardware",
        "killed",
        "links",
        "name",
        "notes",
        "outbox",
        "outside",
        "pid",
        "pidfd",
        "preparing",
        "program",
        "qos",
        "sender",
        "share",
        "traceback",
    )

    def __init__(
        self,
        spec: SpawnSpec,
        sender: Sender,
        pidfd: int,
        channel: socket.socket,
        share: OwnerShare,
        links: tuple[socket.socket, ...],
        group: Group | None = None,
    ) -> None:
        self.name = spec.name
        self.group = group
        self.program = spec.program
        self.hardware = tuple(grant.name for grant in spec.grants.hardware)
        self.doors = doors_of(spec.grants)
        self.dials = {
            grant.name: grant for grant in spec.grants.stream_ports if grant.role is StreamRole.DIAL
        }
        self.pid = sender.pid
        self.sender = sender
        self.qos = sender.qos
        self.pidfd = pidfd
        self.channel: socket.socket | None = channel
        self.share = share
        self.links = links  # init's ends of both control links, shut down at its death
        self.exit: ExitInfo | None = None
        self.preparing: Preparing | None = None  # until it runs, in an interpreter of its own
        self.killed = False  # by init, on purpose
        self.outbox: deque[bytes] = deque()  # at most one frame per burned number, and answers
        self.frames = 0  # taken from its channel
        self.notes = 0
        self.traceback = ""
        self.outside: dict[str, object] = {}  # what init saw of it before it ran


class RootPort:
    """The root task's way to the kernel: the kernel is in its process."""

    root = True

    def __init__(self, kernel: "LinuxKernel", fileno: int) -> None:
        self.fileno = fileno
        self._kernel = kernel

    def serve(self) -> None:
        """Do what waits."""
        self._kernel.serve()

    def console(self, line: str, evidence: bytes) -> None:
        """Record a checked line."""
        self._kernel.console(self._kernel.root, line, evidence)

    def set_qos(self, pid: Pid, raw: int) -> None:
        """Decide at once. Refuses as SetTaskQos."""
        self._kernel.set_qos(self._kernel.root, pid, raw)

    def dial(self, name: str) -> NoReturn:
        """The root task has no such port."""
        raise AbiError(Status.PERMISSION_DENIED, name)

    def note(self, kind: EventKind, fields: Mapping[str, object]) -> None:
        """Record an event about the root task."""
        self._kernel.note(self._kernel.root, kind, fields)

    def confirm(self, pid: int) -> None:
        """Nothing of a dead task is queued at the root."""
        self._kernel.confirmed(self._kernel.root.pid, pid)

    def trace(self, trap: type, status: int, size: int) -> None:
        """Record a trap of the root task."""
        root = self._kernel.root
        self._kernel.traced(root, INIT_NAME, wire.TRAP_NUMBER[trap], status, size)

    def flush(self) -> None:
        """Nothing is kept back."""


class LinuxKernel:
    """The ABI over Linux processes. One object serves one run.

    `cpus` is the set of processors for everything; SpawnSpec.cpu is an index into it.
    With `harden` False children keep their ids and limits, for debugging.

    `state_dir` holds what outlives a boot; without it BootMemory is Unsupported. `runtime_dir`
    holds the sockets of the ports; without it a task with ports cannot start. Both are made if
    they are not there. `notify_socket` is the value of NOTIFY_SOCKET, None without a manager, and
    `watchdog` the caller's descriptor of the machine's, -1 without one.
    `hardware` is the bus map: images without a path, and secrets, are in the state directory.
    `pages` are registers that this machine has to give to services, which only process 1 can.
    `groups` is the part of the tree of control groups that is ours, None for none.
    While `run` is running, SIGTERM, SIGINT and SIGHUP are messages to the root task.
    """

    def __init__(
        self,
        programs: Programs,
        *,
        recorder: Recorder,
        limits: SystemLimits | None = None,
        cpus: tuple[int, ...] | None = None,
        harden: bool = True,
        trace: bool = False,
        selftest: bool = False,
        state_dir: Path | None = None,
        runtime_dir: Path | None = None,
        notify_socket: str | None = None,
        uid_first: int = UID_FIRST,
        hardware: Sequence[Hardware] = (),
        pages: Sequence[MmioPage] = (),
        watchdog: int = -1,
        groups: Path | None = None,
    ) -> None:
        check_bus(hardware)
        self.programs: Programs = programs
        self.limits = limits if limits is not None else SystemLimits()
        self.cpus = tuple(sorted(os.sched_getaffinity(0))) if cpus is None else cpus
        self.harden = harden
        self.trace = trace
        self.selftest = selftest
        self.runtime_dir = runtime_dir
        self.uid_first = uid_first
        self.state_dir = state_dir
        self.bus = Bus(hardware, state_dir, pages)
        self.boot_memory = BootMemory(state_dir)
        self.groups = Groups(groups)
        self.manager = ServiceManager(notify_socket, watchdog)
        self.ports: dict[str, tuple[Path, ...]] = {}  # sockets of live tasks, by their name
        self.told: set[signal.Signals] = set()  # of the run's signals, those the root has taken
        self.shares = SystemShares(self.limits)
        self.children: dict[int, Child] = {}  # live ones, and dead ones nobody has waited for
        self.generations: dict[str, int] = {}
        self.names: dict[int, str] = {}  # of services, by id
        self.burned: dict[int, set[int]] = {}  # dead task's pid -> pids that have not confirmed
        self._burned_at: dict[int, int] = {}
        self.degraded: tuple[str, ...] = ()  # what every child of this run lacks
        self.forks_discarded = 0
        self.refused_frames = 0  # on kernel channels
        self.orphans = 0  # reaped
        self._ended = -1  # tells of the end of any child, in process 1
        self._newest = 0  # pid of the latest child, which may not be in `children` yet
        self._record = recorder
        self.testing = False  # while the self tests run
        self.tested: list[Event] = []  # what they caused
        self._started = False
        self._spawn_error = SpawnReason.NONE
        self._audit: deque[str] = deque()
        self._audit_dropped = 0
        self._muted: dict[int, int] = {}  # pid -> time its channel is listened to again
        self._deadlines: dict[int, int] = {}  # pid -> time by which it must be prepared, or gone
        self._by_descriptor: dict[int, Child] = {}
        self._may_renice = False

    @property
    def now(self) -> Nanos:
        """The kernel clock: CLOCK_MONOTONIC."""
        return Nanos(time.monotonic_ns())

    # ------------------------------------------------------------------ the run

    def run(self, root: Program, argument: bytes, *, until: Nanos) -> ExitInfo:
        """Become init and drive everything to the root task's exit; other tasks are killed.

        `until` is a time of the kernel clock, such as `kernel.now` plus a span. Raises RunOver
        when the clock passes it. All children are reaped and all descriptors closed on return,
        however it comes about.

        Raises CannotRun in a process with more than one thread: a fork takes only one along, and
        whatever the others hold locked. Timers and signal handlers of the caller rest meanwhile.
        """
        assert not self._started, "a kernel serves one run"
        check_threads()
        self._started = True
        with ExitStack() as stack:
            self._enter(stack, until)
            _ = stack.callback(self._end_all)
            for image in self.bus.make_images():
                self._event(EventKind.DEVICE, KERNEL_PID, _made_fields(image))
            if self.selftest:
                from nexus.kernel.linux.selftest import run_selftest  # it runs roots of ours

                run_selftest(self)
            return self.run_root(root, argument)

    def run_root(
        self,
        root: Program,
        argument: bytes,
        *,
        root_size: int | None = None,
        budget: int = HEAP_SIZE,
    ) -> ExitInfo:
        """Drive one root task in a kernel that has been entered, and end what it left behind.

        `root_size` (bytes of link shares) and `budget` (bytes of objects) are the root's own.
        """
        with ExitStack() as stack:
            size = self.limits.root_size if root_size is None else root_size
            boot = self._boot(root, argument, size, budget, stack)
            _ = stack.callback(self._kill_children)
            code, number = self.driver.run(root.main(boot))
            self._event(
                EventKind.EXIT,
                boot.pid,
                {
                    "name": INIT_NAME,
                    "generation": boot.generation,
                    "code": code,
                    "signal": number,
                },
            )
            return ExitInfo(boot.pid, code, number)

    def _enter(self, stack: ExitStack, until: Nanos) -> None:
        """Make what init needs for the run, each with its undoing."""
        preload()
        # First, so that it is undone last: no signal ends init while it has children.
        mask = outside.block_signals()
        _ = stack.callback(outside.restore_signals, mask, self.told)
        outside.rest_handlers(stack)
        self.until = until
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = min(max(soft, DESCRIPTORS_WANTED), hard)
        if not enough_descriptors():
            self.degraded = ("descriptors",)
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        _ = stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        affinity = os.sched_getaffinity(0)
        os.sched_setaffinity(0, self.cpus)
        _ = stack.callback(os.sched_setaffinity, 0, affinity)
        if signal.getsignal(signal.SIGCHLD) is not signal.SIG_DFL:
            # Ignored, Linux would reap our children before we do.
            former = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            _ = stack.callback(signal.signal, signal.SIGCHLD, former)
        enabled = gc.isenabled()
        gc.disable()
        gc.freeze()
        _ = stack.callback(gc.unfreeze)
        if enabled:
            _ = stack.callback(gc.enable)
        self.truesize = Truesize()
        self._may_renice = may_renice()
        self._null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        _ = stack.callback(os.close, self._null)
        self._epoll = select.epoll(flags=select.EPOLL_CLOEXEC)
        _ = stack.callback(self._epoll.close)
        if os.getpid() == ORPHANS_PARENT:
            self._hear_orphans(stack)
        self._timer = timerfd()
        _ = stack.callback(os.close, self._timer)
        self._epoll.register(self._timer, select.EPOLLIN)
        timerfd_arm(self._timer, until)
        self.table = IdentityTable()
        _ = stack.callback(self.table.close)
        self.view = IdentityView(self.table.descriptor)
        _ = stack.callback(self.view.close)
        _ = stack.callback(self.bus.close)
        _ = stack.callback(self.groups.end)
        self.groups.begin()
        self.namespaces: tuple[int, ...] = ()
        if self.harden and os.geteuid() == 0:
            namespaces = Namespaces()
            _ = stack.callback(namespaces.close)
            self.namespaces = namespaces.descriptors

    def _hear_orphans(self, stack: ExitStack) -> None:
        """Have the end of any child wake us: to process 1 Linux gives those of others too."""
        former = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
        _ = stack.callback(signal.pthread_sigmask, signal.SIG_SETMASK, former)
        self._ended = signalfd({signal.SIGCHLD})
        _ = stack.callback(os.close, self._ended)
        self._epoll.register(self._ended, select.EPOLLIN)

    def _reap_orphans(self) -> None:
        """Reap the children that are none of ours. Ours are reaped by whoever waits for them."""
        with suppress(BlockingIOError):
            while os.read(self._ended, SIGNALS_READ):
                pass
        ours = {*self.children, self._newest}
        for pid in children_of_init():
            if pid not in ours:
                with suppress(ChildProcessError):
                    result = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG)
                    self.orphans += result is not None

    def _boot(
        self, root: Program, argument: bytes, root_size: int, budget: int, stack: ExitStack
    ) -> BootImage:
        pid = Pid(os.getpid())
        generation = self._next_generation(INIT_NAME)
        self.generations[INIT_NAME] = generation
        self.root = Sender(service_id(INIT_NAME), pid, generation, QosClass.NORMAL)
        self.names[self.root.service] = INIT_NAME
        self.table.publish(self.root, os.getuid(), os.getgid())
        _ = stack.callback(self.table.clear, pid)
        _ = stack.callback(self._free_burned)
        self.shares.tasks.take(1)
        _ = stack.callback(self.shares.tasks.give, 1)
        share = self.shares.reserve(root_size, self.limits.root_endpoints)
        _ = stack.callback(self.shares.release, share)
        self.driver = Driver(
            me=self.root,
            view=self.view,
            port=RootPort(self, self._epoll.fileno()),
            share=share,
            budget=Account(f"budget of {INIT_NAME}", budget),
            truesize=self.truesize,
            trace=self.trace,
        )
        _ = stack.callback(self.driver.close)
        self.driver.handlers.update(
            {
                Spawn: self._spawn,
                SpawnLastError: self._spawn_last_error,
                Wait: self._wait,
                Kill: self._kill,
                TaskTable: self._task_table,
                Entropy: self._entropy,
                AuditLog: self._audit_log,
                PolicyRaise: self._policy_raise,
                BootMemoryRead: self._boot_memory_read,
                BootMemoryReplace: self._boot_memory_replace,
                Notify: self._notify,
                BusScan: self._bus_scan,
            }
        )
        share.endpoints.take(1)
        endpoint = Endpoint()
        self.driver.endpoint = self.driver.place(endpoint, ROOT_SLOT)
        if not self.testing:  # a self test's root must not take the system's signals
            self.driver.hear_signals(SignalLink(endpoint, self.told))
        self._event(
            EventKind.SPAWN,
            pid,
            {
                "name": INIT_NAME,
                "generation": generation,
                "program": root.name,
                "digest": root.digest,
                "qos": int(self.root.qos),
                "service": f"{self.root.service:016x}",
                "grants": grants_fields(Grants()),
            },
        )
        return BootImage(
            name=INIT_NAME,
            service=self.root.service,
            pid=pid,
            generation=generation,
            control=None,
            endpoint=self.driver.endpoint,
            now=self.now,
            argument=argument,
        )

    def _kill_children(self) -> None:
        """End and reap every task; their last lines are recorded."""
        for child in self.children.values():
            if child.exit is None:
                self._end(child)
        for child in list(self.children.values()):
            if child.exit is None:
                _ = _await_readable(child.pidfd, KILL_TIME)
                self._died(child)
            _ = self._reap(child)
        self._muted.clear()
        assert not self._deadlines, "nobody is being prepared any more"

    def _end_all(self) -> None:
        assert not self.children, "the root's end has reaped every task"

    # ------------------------------------------------------------------ the evidence stream

    def _event(self, kind: EventKind, pid: Pid, fields: Mapping[str, object]) -> None:
        event = Event(self.now, kind, pid, fields)
        if self.testing and kind is not EventKind.KERNEL:
            self.tested.append(event)  # of a self test: no evidence about the system
        else:
            self._record(event)

    def kernel_line(self, line: str, evidence: Mapping[str, object]) -> None:
        """Record a line of the kernel's own, with the evidence for it."""
        self._event(EventKind.KERNEL, KERNEL_PID, {"line": line, "evidence": dict(evidence)})

    def console(self, sender: Sender, line: str, evidence: bytes) -> None:
        """Record a line of a task. Refuses: InvalidArgument."""
        parsed = check_console(line, evidence)
        self._event(
            EventKind.CONSOLE,
            sender.pid,
            {
                "name": self.names[sender.service],
                "generation": sender.generation,
                "line": line,
                "evidence": parsed,
            },
        )

    def note(self, sender: Sender, kind: EventKind, fields: Mapping[str, object]) -> None:
        """Record what a task's driver noticed."""
        name = self.names[sender.service]
        if kind is EventKind.LINK:
            owner = fields.get("owner")
            known = self.names.get(owner) if isinstance(owner, int) else None
            fields = {**fields, "owner": known, "holder": name}
        elif kind is EventKind.REFUSED:
            fields = {**fields, "owner": name}
        elif kind is EventKind.DEVICE:
            fields = {**fields, "holder": name}
        self._event(kind, sender.pid, fields)

    def traced(self, sender: Sender, name: str, number: int, status: int, size: int) -> None:
        """Record a trap."""
        self._event(
            EventKind.TRAP,
            sender.pid,
            {
                "name": name,
                "generation": sender.generation,
                "trap": wire.TRAPS[number].__name__,
                "status": Status(status).name if status else "OK",
                "size": size,
            },
        )

    def resources(self) -> dict[str, int]:
        """What is in use in init's process and in the kernel's books: all of it comes back."""
        return {
            "tasks": sum(1 for child in self.children.values() if child.exit is None),
            "unreaped": sum(1 for child in self.children.values() if child.exit is not None),
            "reserved_size": self.shares.size.used,
            "reserved_endpoints": self.shares.endpoints.used,
            "reserved_tasks": self.shares.tasks.used,
            "burned": len(self.burned),
            "descriptors": _entries("/proc/self/fd") - 1,  # without the one that looks
            "children": _children_count(),
        }

    # ------------------------------------------------------------------ serving the tasks

    def serve(self) -> None:
        """Take what waits on the kernel channels, a bounded part of it, and note deaths.

        Raises RunOver.
        """
        if self._muted:
            self._listen_again()
        for descriptor, events in self._epoll.poll(0, EVENTS_PER_POLL):
            if descriptor == self._timer:
                self._on_timer()
                continue
            if descriptor == self._ended:
                self._reap_orphans()
                continue
            child = self._by_descriptor.get(descriptor)
            if child is None:
                continue  # it ended while this batch was served
            if descriptor == child.pidfd:
                self._died(child)
                continue
            if events & select.EPOLLOUT:
                self._send_out(child)
            if events & ~select.EPOLLOUT:
                self._read_channel(child)

    def _on_timer(self) -> None:
        now = time.monotonic_ns()
        if now >= self.until:
            raise RunOver(self.until)
        for pid in [pid for pid, at in self._deadlines.items() if at <= now]:
            self._too_late(self.children[pid])
        self._arm()

    def _arm(self) -> None:
        times = [self.until, *self._muted.values(), *self._deadlines.values()]
        timerfd_arm(self._timer, min(times))

    def _mute(self, child: Child) -> None:
        """Leave a channel alone for a while that had more frames than one turn takes."""
        assert child.channel is not None, "it has just been read"
        self._epoll.unregister(child.channel.fileno())
        self._muted[child.pid] = time.monotonic_ns() + MUTED_TIME
        self._arm()

    def _listen_again(self) -> None:
        now = time.monotonic_ns()
        for pid in [pid for pid, at in self._muted.items() if at <= now]:
            del self._muted[pid]
            child = self.children[pid]
            if child.channel is not None:
                self._epoll.register(child.channel.fileno(), self._interest(child))

    def _interest(self, child: Child) -> int:
        if child.outbox and child.preparing is None:
            return select.EPOLLIN | select.EPOLLOUT
        return select.EPOLLIN

    def _tell(self, child: Child, frame: bytes) -> None:
        """Queue a frame for a task and send what goes at once; nothing goes before the task's
        links do."""
        child.outbox.append(frame)
        if child.preparing is None:
            self._send_out(child)

    def _send_out(self, child: Child) -> None:
        if child.channel is None:
            child.outbox.clear()
            return
        waited = len(child.outbox)
        while child.outbox:
            try:
                _ = child.channel.send(child.outbox[0], socket.MSG_DONTWAIT)
            except BlockingIOError:
                break
            except OSError:
                child.outbox.clear()  # it is dead; its pidfd says so
                break
            _ = child.outbox.popleft()
        if child.pid not in self._muted and (waited > 1 or child.outbox):
            self._epoll.modify(child.channel.fileno(), self._interest(child))

    def _read_channel(self, child: Child) -> None:
        for _ in range(FRAMES_PER_TURN):
            if not self._read_frame(child):
                return
        self._mute(child)

    def _read_frame(self, child: Child) -> bool:
        """Take one frame from a task; False when there is none now."""
        channel = child.channel
        if channel is None:
            return False
        try:
            data, stamp, whole = _receive(channel)
        except BlockingIOError:
            return False
        except ConnectionResetError:
            return True
        if stamp is None and not data:
            self._close_channel(child)
            return False
        child.frames += 1
        if child.preparing is not None:
            self._hear(child, child.preparing, data, stamp)
            return True
        own = stamp is not None and stamp[0] == child.pid
        if not (whole and data and own and self._take_frame(child, data)):
            self.refused_frames += 1
        return True

    def _close_channel(self, child: Child) -> None:
        channel, child.channel = child.channel, None
        if channel is None:
            return
        if self._muted.pop(child.pid, None) is None:
            self._epoll.unregister(channel.fileno())
        del self._by_descriptor[channel.fileno()]
        channel.close()

    def _take_frame(self, child: Child, data: bytes) -> bool:
        """Act on a frame from a task, which may be hostile; False if it is malformed."""
        kind = data[0]
        if kind == wire.CONSOLE:
            return self._take_console(child, data)
        if kind == wire.SET_QOS and len(data) == wire.QOS_FRAME.size:
            if len(child.outbox) >= OUTBOX_MAX:
                return False  # it asks and asks and reads no answer
            _, pid, raw = wire.QOS_FRAME.unpack(data)
            self._answer_qos(child, Pid(pid), raw)
            return True
        if kind == wire.DIAL:
            return self._take_dial(child, data)
        if kind == wire.CONFIRM and len(data) == wire.PID_FRAME.size:
            self.confirmed(child.pid, wire.PID_FRAME.unpack(data)[1])
            return True
        if kind == wire.TRACE and self.trace:
            return self._take_traces(child, data)
        if kind == wire.CRASH:
            child.traceback = data[1 : wire.CRASH_SIZE_MAX + 1].decode(errors="replace")
            return True
        return kind == wire.NOTE and self._take_note(child, data)

    def _take_console(self, child: Child, data: bytes) -> bool:
        if len(data) < wire.CONSOLE_HEAD.size:
            return False
        size = wire.CONSOLE_HEAD.unpack_from(data)[1]
        text = data[wire.CONSOLE_HEAD.size :]
        if size > min(len(text), CONSOLE_LINE_SIZE_MAX) or len(text) - size > EVIDENCE_SIZE_MAX:
            return False
        try:
            self.console(child.sender, text[:size].decode(), text[size:])
        except (AbiError, UnicodeDecodeError):
            return False
        return True

    def _take_dial(self, child: Child, data: bytes) -> bool:
        """Begin a connection that a grant allows, and hand it over. Never waits."""
        grant = child.dials.get(data[1:].decode("ascii", "replace"))
        channel = child.channel
        if grant is None or channel is None or child.outbox:
            return False
        answer = bytearray(4)
        _ = fcntl.ioctl(channel.fileno(), SIOCOUTQ, answer)
        if int.from_bytes(answer, "little") > UNREAD_MAX:
            return False  # it asks and asks and reads no answer
        try:
            with outside.dial(grant) as sock:
                rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, DESCRIPTOR.pack(sock.fileno()))]
                frame = bytes((wire.DIAL_ANSWER, 0))
                _ = channel.sendmsg([frame], rights, socket.MSG_DONTWAIT)
        except OSError as error:
            if error.errno in GONE_ERRORS:
                return True  # it is dead; its pidfd says so
            self._tell(child, bytes((wire.DIAL_ANSWER, Status.NO_SPACE)))
        return True

    def _take_traces(self, child: Child, data: bytes) -> bool:
        body = len(data) - wire.TRACE_HEAD.size
        if body < 0 or body % wire.TRACE_RECORD.size:
            return False
        records = wire.TRACE_RECORD.iter_unpack(data[wire.TRACE_HEAD.size :])
        for number, status, size in records:
            if number >= len(wire.TRAPS) or status > max(Status):
                return False
            self.traced(child.sender, child.name, number, status, size)
        lost = wire.TRACE_HEAD.unpack_from(data)[1]
        if lost:
            self.kernel_line(f"KTRACE: {child.name} lost {lost}", {"lost": lost})
        return True

    def _take_note(self, child: Child, data: bytes) -> bool:
        if not 2 < len(data) <= wire.NOTE_SIZE_MAX + 2 or data[1] >= len(wire.NOTABLE):
            return False
        child.notes += 1
        if child.notes > NOTES_MAX:
            return False
        try:
            fields = parse_evidence(data[2:])
        except AbiError:
            return False
        self.note(child.sender, wire.NOTABLE[data[1]], fields)
        return True

    # ------------------------------------------------------------------ deaths and burned numbers

    def _died(self, child: Child) -> None:
        """A task's process has ended: record it, give back, and let its number rest."""
        self._remove_ports(child.name)
        for _ in range(LAST_FRAMES_MAX):
            if not self._read_frame(child):
                break
        self._close_channel(child)
        unborn = self._never_ran(child)
        self._epoll.unregister(child.pidfd)
        del self._by_descriptor[child.pidfd]
        result = os.waitid(os.P_PIDFD, child.pidfd, os.WEXITED | os.WNOWAIT | os.WNOHANG)
        assert result is not None, "the pidfd was readable"
        exited = result.si_code == os.CLD_EXITED
        code, number = (result.si_status, 0) if exited else (0, result.si_status)
        over_memory = self._weigh_up(child)
        child.exit = ExitInfo(child.pid, code, number, over_memory)
        fields: dict[str, object] = {
            "name": child.name,
            "generation": child.sender.generation,
            "code": code,
            "signal": number,
        }
        if child.traceback or unborn:
            fields["crash"] = child.traceback or unborn
        self._event(EventKind.EXIT, child.pid, fields)
        self._hang_up(child)
        self._give_back(child)
        self._burn(child)

    def _weigh_up(self, child: Child) -> bool:
        """Report what a task has died of if it was its memory, and let its group go; whether it
        was."""
        group, child.group = child.group, None
        if group is None:
            return False
        kills = 0
        with suppress(OSError):  # somebody else has removed it
            kills = group.kills()
            if kills:
                fields = group.taken().fields(child.name)
                self._event(EventKind.HEAP, child.pid, fields)
                self.kernel_line(f"KHEAP: {child.name} ended, over its memory", fields)
        group.remove()
        return kills > 0

    def _hang_up(self, child: Child) -> None:
        """Shut init's ends of the control links down: a dead task may have left copies of its
        own ends anywhere, even here. What it had sent stays readable."""
        for end in child.links:
            with suppress(OSError):  # closed before, or moved on
                end.shutdown(socket.SHUT_RDWR)

    def _give_back(self, child: Child) -> None:
        """What a task had reserved is free again."""
        self.shares.release(child.share)

    def _burn(self, child: Child) -> None:
        """Let nobody have the number until everyone alive now has read what it had sent."""
        alive = {other.pid for other in self.children.values() if other.exit is None}
        self.burned[child.pid] = {*alive, self.root.pid}
        self._burned_at[child.pid] = time.monotonic_ns()
        for pid in list(self.burned):
            self.confirmed(child.pid, pid)  # a dead task reads nothing any more
        frame = wire.PID_FRAME.pack(wire.PEER_DEAD, child.pid)
        for other in self.children.values():
            if other.exit is None:
                self._tell(other, frame)
        self.table.pulse()
        self.driver.peer_dead(child.pid)
        if len(self.burned) > BURNED_MAX:
            self._end_deaf()

    def _end_deaf(self) -> None:
        """Numbers run short: end the tasks that keep one from its next holder for too long.

        Not before: an honest task may leave an answer unread for as long as it likes.
        """
        late = time.monotonic_ns() - CONFIRM_MAX
        deaf: dict[int, int] = {}  # pid -> numbers it keeps
        for pid, waiting in self.burned.items():
            if self._burned_at[pid] <= late:
                for by in waiting:
                    deaf[by] = deaf.get(by, 0) + 1
        for by, count in deaf.items():
            child = self.children.get(by)
            if child is not None and child.exit is None:
                evidence = {"name": child.name, "pid": by, "numbers": count}
                self.kernel_line(f"KCONFIRM: {child.name} ended, it keeps {count}", evidence)
                self._end(child)

    def confirmed(self, by: int, pid: int) -> None:
        """A task has read everything that a dead one can have sent to it."""
        waiting = self.burned.get(pid)
        if waiting is None:
            return
        waiting.discard(by)
        if not waiting:
            del self.burned[pid], self._burned_at[pid]
            self.table.clear(pid)

    def _may_reuse(self, pid: int) -> bool:
        """Whether a number that Linux offers means nobody else. A row in use by another number
        counts as burned too."""
        return not self.table.burned(pid)

    def _free_burned(self) -> None:
        """Nobody is left who could read a message of a dead task."""
        for pid in self.burned:
            self.table.clear(pid)
        self.burned.clear()
        self._burned_at.clear()

    def _reap(self, child: Child) -> ExitInfo:
        assert child.exit is not None, "only the dead are reaped"
        _ = os.waitid(os.P_PIDFD, child.pidfd, os.WEXITED)
        os.close(child.pidfd)
        del self.children[child.pid]
        self.shares.tasks.give(1)
        return child.exit

    # ------------------------------------------------------------------ ports

    def _open_ports(self, spec: SpawnSpec, undo: ExitStack) -> tuple[socket.socket, ...]:
        """The listening sockets of a task's ports, in the order of its grants; undone, they are
        closed and their files removed.

        Refuses: SpawnRefused (invalid-payload, map-failed).
        """
        live = [child for child in self.children.values() if child.exit is None]
        check_ports(spec, {door for child in live for door in child.doors})
        _ = undo.callback(self._remove_ports, spec.name)
        opened: list[tuple[str, socket.SocketKind, StreamGrant | None]]
        opened = [(name, socket.SOCK_SEQPACKET, None) for name in spec.grants.ports]
        opened += [
            (grant.name, socket.SOCK_STREAM, grant if grant.role is StreamRole.TCP else None)
            for grant in spec.grants.stream_ports
            if grant.role is not StreamRole.DIAL
        ]
        listeners = []
        for name, kind, tcp in opened:
            try:
                listener = self._open_port(spec.name, name, kind, tcp)
            except (OSError, ValueError) as error:
                raise SpawnRefused(SpawnReason.MAP_FAILED, f"port {name}: {error}") from None
            _ = undo.callback(listener.close)
            listeners.append(listener)
        return tuple(listeners)

    def _open_port(
        self, owner: str, name: str, kind: socket.SocketKind, tcp: StreamGrant | None
    ) -> socket.socket:
        if tcp is not None:
            return outside.listen_tcp(tcp.address, tcp.port)
        if self.runtime_dir is None:
            raise SpawnRefused(SpawnReason.MAP_FAILED, "ports need a runtime directory")
        path = outside.socket_path(self.runtime_dir, name)
        listener = outside.listen(path, kind)
        self.ports[owner] = (*self.ports.get(owner, ()), path)
        return listener

    def _remove_ports(self, name: str) -> None:
        """The task of this name has ended, or did not start: nobody answers at its sockets."""
        for path in self.ports.pop(name, ()):
            outside.remove(path)

    # ------------------------------------------------------------------ spawn

    def _next_generation(self, name: str) -> int:
        """The number of this start of a service, from 1."""
        return self.generations.get(name, 0) + 1

    def _spawn(self, trap: Spawn) -> Spawned:
        spec = trap.spec
        self.serve()
        try:
            return self._start(spec)
        except SpawnRefused as refusal:
            self._spawn_error = self._spawn_reason(refusal)
            fields = _no_start(spec.name, spec.program, self._spawn_error, str(refusal))
            self._event(EventKind.SPAWN_FAILED, self.root.pid, fields)
            raise

    def _spawn_reason(self, refusal: SpawnRefused) -> SpawnReason:
        """The reason kept for SpawnLastError."""
        return refusal.reason

    def _spawn_last_error(self, trap: SpawnLastError) -> SpawnReason:  # noqa: ARG002
        reason, self._spawn_error = self._spawn_error, SpawnReason.NONE
        return reason

    def _start(self, spec: SpawnSpec) -> Spawned:
        live_names = {child.name for child in self.children.values() if child.exit is None}
        program = check_spec(spec, self.programs, live_names | {INIT_NAME})
        check_grants(spec.grants, program, harden=self.harden)
        devices = find_hardware(spec.grants, self.bus.present, self._live_hardware())
        self._check_windows(spec, devices)
        check_cpu(spec, len(self.cpus))
        held = self.driver.table.entries.get(spec.control)
        if held is None or not isinstance(held.object, Endpoint):
            raise SpawnRefused(
                SpawnReason.INVALID_PAYLOAD, f"slot {spec.control} is no endpoint of the spawner"
            )
        if not self.shares.tasks.free:
            raise SpawnRefused(SpawnReason.OOM, f"{self.shares.tasks.total} tasks")
        if self.driver.table.full:
            raise SpawnRefused(SpawnReason.CAP_TABLE_FULL, "no slot for the link to the child")
        if spec.endpoints > self.shares.endpoints.free:
            raise SpawnRefused(SpawnReason.ENDPOINT_QUOTA, f"{spec.endpoints} endpoints")
        with ExitStack() as undo:
            try:
                spawned = self._start_within(spec, program, devices, held.object, undo)
            except SpawnRefused:
                raise
            except (AbiError, OSError) as refusal:
                raise SpawnRefused(SpawnReason.OOM, str(refusal)) from None
            _ = undo.pop_all()
        return spawned

    def _check_windows(self, spec: SpawnSpec, devices: Sequence[Hardware]) -> None:
        """A window is inherited, and an interpreter of its own inherits nothing. Refuses:
        SpawnRefused (invalid-payload)."""
        windows = [each.name for each in devices if each.name in self.bus.windows]
        if windows and spec.grants.isolation is Isolation.EXEC:
            raise SpawnRefused(
                SpawnReason.INVALID_PAYLOAD,
                f"device {windows[0]} is a register window: it cannot be had with isolation = exec",
            )

    def _live_hardware(self) -> set[str]:
        """The devices that have a holder."""
        live = [child for child in self.children.values() if child.exit is None]
        return {name for child in live for name in child.hardware}

    def _start_within(
        self,
        spec: SpawnSpec,
        program: Program,
        devices: tuple[Hardware, ...],
        control: Endpoint,
        undo: ExitStack,
    ) -> Spawned:
        self.shares.tasks.take(1)
        _ = undo.callback(self.shares.tasks.give, 1)
        share = self.shares.reserve(spec.owner_size, spec.endpoints)
        _ = undo.callback(self.shares.release, share)
        service = service_id(spec.name)
        down = CONTROL_TERMS._replace(delegations=spec.delegations)
        near, far = make_pair(down, wall=True)
        link = HolderLink(near, service, down, self.truesize)
        try:
            slot = self.driver.put(link, Rights.SEND | Rights.MANAGE)
        except AbiError:
            near.close()
            far.close()
            raise
        _ = undo.callback(self.driver.drop, slot)
        _ = undo.callback(far.close)
        up_near, up_far = make_pair(CONTROL_TERMS, wall=True)
        _ = undo.callback(up_near.close)
        try:
            upward = self.driver.own(control, CONTROL_TERMS, up_far)
        except AbiError:
            up_far.close()
            raise
        _ = undo.callback(self._unsee, upward)
        sender = Sender(service, Pid(0), self._next_generation(spec.name), QosClass(spec.qos))
        # So that init knows its own link if the child sends it back (`Driver._classify`).
        upward.cookie = cookie_of(up_near)
        links = (upward.sock, near)
        ports = self._open_ports(spec, undo)
        with ExitStack() as granted:
            opened = [self.bus.open(device, granted) for device in devices]
            names = open_granted(spec.grants, granted)
            secret = NO_SECRET
            if spec.grants.secret is SecretBackend.FILE:
                secret = Secret(open_directory(self.state_dir, spec.name, granted))
            inherited = (
                *(end.fileno() for end in (up_near, far)),
                self.table.descriptor,
                *(port.fileno() for port in ports),
                *(number for device, number in opened if device.described),
                *names.values(),
            )
            described = tuple(device for device, _ in opened)
            birth = self._birth(spec, program, sender, share, described, tuple(names), secret)
            group = self._group(spec, sender.generation, undo)
            child, degraded = self._fork(birth, inherited, links, group)
            _ = granted.callback(self._forget_ends, up_near, far, *ports)
            if child.preparing is not None:
                child.preparing.ends = granted.pop_all()
        for owner, holder, terms in (
            (INIT_NAME, spec.name, CONTROL_TERMS),
            (spec.name, INIT_NAME, down),
        ):
            fields = {"owner": owner, "holder": holder, "depth": terms.depth, "size": terms.size}
            self._event(EventKind.LINK, child.pid, fields)
        for device in birth.devices:
            self._event(EventKind.DEVICE, child.pid, _opened_fields(device, spec.name))
        self.children[child.pid] = child
        self.generations[spec.name] = child.sender.generation
        if child.preparing is None:
            self._runs(child, birth, degraded)
        return Spawned(child.pid, service, child.sender.generation, slot, upward.link)

    def _group(self, spec: SpawnSpec, generation: int, undo: ExitStack) -> Group | None:
        """The control group of a task that is to be started. Refuses: SpawnRefused (map-failed)."""
        tasks = 1 + spec.grants.threads
        executed = spec.grants.isolation is Isolation.EXEC
        room = memory_room(spec) + IMPORT_DATA_MAX if executed else None  # until it is bounded
        try:
            group = self.groups.make(spec.name, generation, tasks=tasks, room=room)
        except OSError as error:
            raise SpawnRefused(SpawnReason.MAP_FAILED, f"control group: {error}") from None
        if group is not None:
            _ = undo.callback(group.remove)
        return group

    def _runs(self, child: Child, birth: Birth, degraded: tuple[str, ...]) -> None:
        """Record a task that was let go."""
        assert birth.program is not None, "init has a program to start"
        self._event(
            EventKind.SPAWN,
            child.pid,
            {
                "name": child.name,
                "generation": child.sender.generation,
                "program": birth.program.name,
                "digest": birth.program.digest,
                "qos": int(child.qos),
                "service": f"{child.sender.service:016x}",
                "grants": grants_fields(birth.spec.grants),
                "degraded": [*degraded, *self._unbounded(birth.spec)],
                "outside": child.outside,
                **({"set": birth.program.set_digest} if birth.program.set_digest else {}),
            },
        )

    def _unbounded(self, spec: SpawnSpec) -> tuple[str, ...]:
        """What the plan bounds for this task by name, and only a control group could hold."""
        return ("cpu_share",) if spec.cpu_share is not None and not self.groups else ()

    def _unsee(self, link: OwnerLink) -> None:
        """Undo of a spawn: the spawner hears no PeerGone of a link it never heard of."""
        self.driver.disown(link)

    def _forget_ends(self, *ends: socket.socket) -> None:
        """Close init's copies of what the child has: a copy would hide the child's death."""
        for end in ends:
            end.close()

    def _birth(
        self,
        spec: SpawnSpec,
        program: Program,
        sender: Sender,
        share: OwnerShare,
        devices: tuple[Granted, ...],
        names: tuple[str, ...],
        secret: Secret,
    ) -> Birth:
        """What a child takes along; its descriptors and its id follow when there is a process."""
        if self.harden and MACHINE in seccomp.MACHINES:
            executed = spec.grants.isolation is Isolation.EXEC
            # What holds a secret has numbers in its filter that only the child knows.
            if not spec.grants.secret:
                _ = seccomp.assembled(spec.grants, Stage.START if executed else Stage.FINAL)
        images = [device.block_count * BLOCK_SIZE for device in devices if device.backing == FILE]
        return Birth(
            spec=spec,
            program=program,
            me=sender,
            spawner=self.root.service,
            devices=devices,
            names=names,
            confinement=Confinement(
                parent=os.getpid(),
                uid=None,
                keep=(),
                null=self._null,
                namespaces=self.namespaces,
                enabled=self.harden,
                name=spec.name,
                budget=spec.budget,
                memory=spec.memory,
                grants=spec.grants,
                file_size=max([VMO_SIZE_MAX, *images]),
                secret=secret,
                key_name=key_name(self.state_dir, spec.name) if spec.grants.secret else "",
            ),
            share=share,
            truesize=self.truesize,
            trace=self.trace,
        )

    def _fork(
        self,
        birth: Birth,
        inherited: tuple[int, ...],
        links: tuple[socket.socket, ...],
        group: Group | None,
    ) -> tuple[Child, tuple[str, ...]]:
        """Fork until Linux gives a number that means nobody else, enter the child into the
        table, and let it go when it is prepared: a forked one now, an interpreter of its own
        when it says so. Refuses: SpawnRefused (oom, map-failed)."""
        spec = birth.spec
        executed = spec.grants.isolation is Isolation.EXEC
        for attempt in range(FORKS_MAX):
            if attempt:
                self._pause()
            mine, its = make_pair(CONTROL_TERMS, wall=False)
            try:
                pid = self._fork_once(birth, (its.fileno(), *inherited), group)
            except OSError as error:
                mine.close()
                its.close()
                raise SpawnRefused(SpawnReason.OOM, f"fork: {error}") from None
            its.close()
            self._newest = pid
            with ExitStack() as undo:
                # From here on every way out but the good one ends the child and reaps it.
                _ = undo.callback(_discard, pid, mine)
                pidfd = os.pidfd_open(pid)
                _ = undo.callback(os.close, pidfd)
                if not self._may_reuse(pid):
                    self.forks_discarded += 1
                    continue
                sender = birth.me._replace(pid=Pid(pid))
                child = Child(spec, sender, pidfd, mine, birth.share, links, group)
                if executed:
                    prepared = wire.Prepared(NO_ID, NO_ID, (), "")  # Linux stamps them later
                else:
                    prepared = self._prepared(mine, pidfd, pid)
                    if prepared.failed:
                        raise SpawnRefused(SpawnReason.MAP_FAILED, prepared.failed)
                    child.outside = seen(pid, self._granted(spec, inherited), _place(group))
                    _bound(group, spec)
                self.names[sender.service] = spec.name
                self.table.publish(sender, prepared.uid, prepared.gid)
                _ = undo.callback(self.table.clear, pid)
                degraded = (*prepared.degraded, *self.degraded)
                if not self._apply_qos(pid, sender.qos):
                    degraded = (*degraded, "qos")
                if executed:
                    self._hold_back(pid, group)
                self._epoll.register(pidfd, select.EPOLLIN)
                self._epoll.register(mine.fileno(), select.EPOLLIN)
                self._by_descriptor[pidfd] = self._by_descriptor[mine.fileno()] = child
                _ = undo.pop_all()
                if executed:
                    child.preparing = Preparing(birth, inherited, degraded)
                    self._must_by(child, EXEC_PREPARE_TIME)
                else:
                    self._tell(child, bytes((wire.GO,)))
                return child, degraded
        self._end_deaf()
        raise SpawnRefused(SpawnReason.OOM, f"{FORKS_MAX} numbers in a row are burned")

    def _granted(self, spec: SpawnSpec, inherited: tuple[int, ...]) -> int:
        """How many descriptors a child ought to have when it says that it is confined."""
        at_first = STANDARD_DESCRIPTORS + 1  # and the kernel channel
        if spec.grants.isolation is Isolation.EXEC:
            return at_first + (spec.grants.secret is SecretBackend.FILE)
        # The identity table is mapped and closed.
        return at_first + len(inherited) - 1 + DRIVER_DESCRIPTORS + ports_count(spec.grants)

    def _pause(self) -> None:
        """Give burned numbers a moment to be confirmed."""
        _ = self._epoll.poll(FORK_PAUSE / 1000, 1)
        self.serve()

    def _fork_once(self, birth: Birth, keep: tuple[int, ...], group: Group | None = None) -> int:
        """fork(2); the child never returns from here. Raises OSError."""
        for stream in (sys.stdout, sys.stderr):
            flush: Callable[[], object] = stream.flush
            _ = flush()  # or the child would write it a second time
        pid = os.fork()
        if pid:
            return pid
        me = birth.me._replace(pid=Pid(os.getpid()))
        spec, program = birth.spec, birth.program
        try:
            assert program is not None, "init has a program to start"
            if group is not None:
                _ = os.write(group.processes, b"0")  # whoever writes it
            if spec.cpu is not None:
                os.sched_setaffinity(0, (self.cpus[spec.cpu],))
            confinement = birth.confinement._replace(
                uid=self._uid_of(me.pid), keep=keep, grouped=group is not None
            )
            if spec.grants.isolation is Isolation.EXEC:
                confinement = confinement._replace(keep=keep[:1])  # the rest when it is confined
                execute(program.entry, program.path, confinement, ordinary=program.ordinary)
            live(birth._replace(me=me, confinement=confinement))
        finally:
            os._exit(EXIT_CRASH)  # whatever fails before: there is one init

    def _uid_of(self, pid: int) -> int | None:
        """The id a service runs under; None where init cannot give it one of its own."""
        return self.uid_first + pid % ROWS if os.geteuid() == 0 else None

    def _prepared(self, channel: socket.socket, pidfd: int, pid: int) -> wire.Prepared:
        """Wait for a forked child to have confined itself, and serve the other tasks meanwhile."""
        look = select.poll()
        look.register(channel, select.POLLIN)
        look.register(self._epoll, select.POLLIN)
        give_up = time.monotonic_ns() + PREPARE_TIME
        while not _await_readable(channel.fileno(), 0):
            left = give_up - time.monotonic_ns()
            if left <= 0:
                return _failed(_not_in_time(PREPARE_TIME))
            if look.poll(left / 1_000_000):
                self.serve()
        data, stamp, _ = _receive(channel)
        if not data:
            _ = _await_readable(pidfd, PREPARE_TIME)
            return _failed(ENDED_EARLY)
        return self._believed(data, stamp, pid)

    def _believed(self, data: bytes, stamp: tuple[int, int, int] | None, pid: int) -> wire.Prepared:
        """What a child's first frame means. Nothing it says is believed but that it could not:
        its ids are Linux's stamp."""
        try:
            prepared = wire.unpack_prepared(data)
        except (ValueError, TypeError, OverflowError, RecursionError):
            return _failed("the child spoke before it was confined")
        if prepared.failed:
            return prepared
        if stamp is None or stamp[0] != pid:
            return _failed("another process spoke for the child")
        return prepared._replace(uid=stamp[1], gid=stamp[2])

    # ------------------------------------------------------------------ interpreters of their own

    def _must_by(self, child: Child, span: int) -> None:
        """Give a child a time in nanoseconds to be prepared in, or to end in."""
        self._deadlines[child.pid] = time.monotonic_ns() + span
        self._arm()

    def _hear(
        self,
        child: Child,
        preparing: Preparing,
        data: bytes,
        stamp: tuple[int, int, int] | None,
    ) -> None:
        """A child speaks that is being prepared."""
        if preparing.failed:
            self.refused_frames += 1  # it was told once, and is ending
            return
        prepared = self._believed(data, stamp, child.pid)
        if not prepared.failed:
            self._let_go(child, preparing, prepared)
            return
        self._fails(child, preparing, prepared.failed)
        # It ends by itself, with an exit code that tells more than a signal does.
        self._must_by(child, LEAVE_TIME)

    def _let_go(self, child: Child, preparing: Preparing, prepared: wire.Prepared) -> None:
        """It is confined: it gets its identity's ids and everything else it is to have. Only
        now: it can neither be taken for another nor leave what it is given."""
        birth = preparing.birth
        assert child.channel is not None, "it has just been read"
        handover = Handover(
            birth.spec, child.sender, birth.spawner, birth.devices, birth.names, birth.trace
        )
        try:
            granted = self._granted(birth.spec, preparing.inherited)
            child.outside = seen(child.pid, granted, _place(child.group))
            _bound(child.group, birth.spec)
            _ = self._apply_qos(child.pid, child.sender.qos)
            self.table.set_ids(child.pid, prepared.uid, prepared.gid)
            hand_over(child.channel, handover, preparing.inherited)
        except OSError as error:
            self._fails(child, preparing, f"the child could not be let go: {error}")
            self._must_by(child, 0)
            return
        del self._deadlines[child.pid]
        child.preparing = None
        preparing.ends.close()
        self._runs(child, birth, (*prepared.degraded, *preparing.degraded))
        if child.outbox:
            self._send_out(child)

    def _too_late(self, child: Child) -> None:
        """A child is neither prepared nor gone in its time."""
        del self._deadlines[child.pid]
        preparing = child.preparing
        if child.exit is None and preparing is not None:
            self._fails(child, preparing, _not_in_time(EXEC_PREPARE_TIME))
            self._end(child)

    def _fails(self, child: Child, preparing: Preparing, why: str) -> None:
        """Record, once, why a child will never run. Its end is told as any task's."""
        if preparing.failed:
            return
        preparing.failed = why
        fields = _no_start(child.name, child.program, SpawnReason.MAP_FAILED, why)
        self._event(EventKind.SPAWN_FAILED, child.pid, fields)

    def _never_ran(self, child: Child) -> str:
        """A task has ended: take back what it was to be given, and why it never ran; empty if
        it did."""
        preparing, child.preparing = child.preparing, None
        if preparing is None:
            return ""
        _ = self._deadlines.pop(child.pid, None)
        preparing.ends.close()
        if not child.killed:
            self._fails(child, preparing, ENDED_EARLY)
        return preparing.failed or f"it had not imported {child.program} yet"

    # ------------------------------------------------------------------ the root's other traps

    def _wait(self, trap: Wait) -> ExitInfo:
        while True:
            self.serve()
            child = self.children.get(trap.pid)
            if child is None:
                raise AbiError(
                    Status.INVALID_ARGUMENT, f"pid {trap.pid} is no child, or was reaped"
                )
            if child.exit is not None:
                return self._reap(child)
            if trap.deadline == NO_WAIT:
                raise AbiError(Status.QUEUE_EMPTY, f"pid {trap.pid} is alive")
            if time.monotonic_ns() >= trap.deadline:
                raise self.driver.timed_out()
            self.driver.idle_until(trap.deadline)

    def _kill(self, trap: Kill) -> None:
        if trap.pid == self.root.pid:
            raise Exited(0, int(signal.SIGKILL))
        child = self.children.get(trap.pid)
        if child is None:
            raise AbiError(Status.INVALID_ARGUMENT, f"no task {trap.pid}")
        if child.exit is None:
            self._end(child)

    def _end(self, child: Child) -> None:
        """End a live task at once; its pidfd says when it is gone."""
        child.killed = True
        signal.pidfd_send_signal(child.pidfd, signal.SIGKILL)

    def _task_table(self, trap: TaskTable) -> tuple[TaskInfo, ...]:  # noqa: ARG002
        self.serve()
        root = self.root
        rows = [TaskInfo(root.pid, INIT_NAME, root.service, root.generation, root.qos)]
        for child in self.children.values():
            if child.exit is None:
                sender = child.sender
                rows.append(
                    TaskInfo(child.pid, child.name, sender.service, sender.generation, child.qos)
                )
        return tuple(sorted(rows))

    def _entropy(self, trap: Entropy) -> bytes:
        if not 1 <= trap.size <= ENTROPY_SIZE_MAX:
            raise AbiError(Status.INVALID_ARGUMENT, f"{trap.size} bytes of entropy")
        return os.urandom(trap.size)

    def _policy_raise(self, trap: PolicyRaise) -> PolicyWord:
        return self.table.raise_policy(available=bool(trap.available))

    def _boot_memory_read(self, trap: BootMemoryRead) -> bytes:  # noqa: ARG002
        return self.boot_memory.read()

    def _boot_memory_replace(self, trap: BootMemoryReplace) -> None:
        self.boot_memory.replace(check_boot_memory(trap.data))

    def _bus_scan(self, trap: BusScan) -> tuple[BusEntry, ...]:  # noqa: ARG002
        return self.bus.scan()

    def _notify(self, trap: Notify) -> None:
        self.manager.tell(check_notice(trap.text))

    def _audit_log(self, trap: AuditLog) -> AuditLines:  # noqa: ARG002
        self.serve()
        taken = AuditLines(tuple(self._audit), self._audit_dropped)
        self._audit.clear()
        self._audit_dropped = 0
        return taken

    # ------------------------------------------------------------------ classes

    def set_qos(self, caller: Sender, target: Pid, raw: int) -> None:
        """Decide a request, record the audit line, apply it. Refuses as SetTaskQos."""
        child = self.children.get(target)
        current = None
        if target == self.root.pid:
            current = self.root.qos
        elif child is not None and child.exit is None:
            current = child.qos
        request = QosRequest(caller.service, caller.pid, target, raw, current)
        reason = self._decide_qos(request)
        line = audit_line(request, reason)
        fields: dict[str, object] = {"line": line}
        if reason is QosReason.APPLIED and not self._apply_class(target, child, QosClass(raw)):
            fields["degraded"] = ["qos"]
        if len(self._audit) == AUDIT_LINES_MAX:
            _ = self._audit.popleft()
            self._audit_dropped += 1
        self._audit.append(line)
        self._event(EventKind.QOS, caller.pid, fields)
        if reason is not QosReason.APPLIED:
            raise AbiError(QOS_STATUS[reason], reason.value)

    def _decide_qos(self, request: QosRequest) -> QosReason:
        return decide(request)

    def _apply_class(self, target: Pid, child: Child | None, qos: QosClass) -> bool:
        """Note a task's class in the identity table; whether Linux schedules it so as well."""
        if child is None:
            self.root = self.root._replace(qos=qos)
        else:
            child.qos = qos
            child.sender = child.sender._replace(qos=qos)
        self.table.set_qos(target, qos)
        return self._apply_qos(target, qos)

    def _answer_qos(self, child: Child, target: Pid, raw: int) -> None:
        status = 0
        try:
            self.set_qos(child.sender, target, raw)
        except AbiError as refusal:
            status = int(refusal.status)
        self._tell(child, bytes((wire.QOS_ANSWER, status)))

    def _apply_qos(self, pid: int, qos: QosClass) -> bool:
        """Have Linux schedule a process by its class. Without the privilege nothing is done:
        an ordinary user could lower a process and never raise it again."""
        child = self.children.get(pid)
        if child is not None and child.group is not None:
            with suppress(OSError):  # it has just ended
                child.group.weigh(qos)
        if not self._may_renice:
            return qos is QosClass.NORMAL
        try:
            os.setpriority(os.PRIO_PROCESS, pid, NICE[qos])
        except OSError:
            return False
        return True

    def _hold_back(self, pid: int, group: Group | None) -> None:
        """What an interpreter of its own imports takes a second of a small machine: until it is
        prepared it takes none of that from who serves already, and is watched for it."""
        if group is not None:
            with suppress(OSError):  # it is bounded again when it is let go
                group.weigh(QosClass.IDLE)
        if self._may_renice:
            with suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, pid, NICE[QosClass.IDLE])


def _place(group: Group | None) -> bytes:
    """What the path of a task's group has to end with, b"" without one."""
    return b"" if group is None else group.place


def _bound(group: Group | None, spec: SpawnSpec) -> None:
    """Bound a confined child's group by the plan. Raises OSError."""
    if group is not None:
        group.bound(memory_room(spec), spec.cpu_share)
        group.weigh(QosClass(spec.qos))


NICE_LEAST: Final = -20  # the highest priority of all
NICE_CEILING: Final = 40  # setrlimit(2): with this RLIMIT_NICE a process may take it


def may_renice() -> bool:
    """Whether this process may raise a priority it has lowered, tried on itself."""
    nice = os.getpriority(os.PRIO_PROCESS, 0)
    if nice == NICE_LEAST:  # there is no higher one to try: Linux would take it for the same
        return os.geteuid() == 0 or resource.getrlimit(resource.RLIMIT_NICE)[0] >= NICE_CEILING
    try:
        os.setpriority(os.PRIO_PROCESS, 0, nice - 1)
        os.setpriority(os.PRIO_PROCESS, 0, nice)
    except OSError:
        return False
    return True


def enough_descriptors() -> bool:
    """Whether init may have the descriptors that a full system needs."""
    return resource.getrlimit(resource.RLIMIT_NOFILE)[1] >= DESCRIPTORS_WANTED


def check_threads() -> None:
    """Raises CannotRun if this process has more than one thread."""
    if _threads() == 1:
        return
    # A timer like others, but with a thread. Only where there is one: after a fork it would be
    # waited for in vain.
    faulthandler.cancel_dump_traceback_later()
    give_up = time.monotonic_ns() + THREAD_END_TIME
    while (count := _threads()) > 1:  # Linux may still list one that was joined
        if time.monotonic_ns() >= give_up:
            others = threading.enumerate()
            others.remove(threading.current_thread())
            named = f" ({', '.join(repr(other.name) for other in others)})" if others else ""
            raise CannotRun(
                f"init cannot fork: its process has {count} threads{named}; a module that it "
                f"imports must start none, a service may when it runs"
            )
        time.sleep(THREAD_PAUSE / 1e9)  # noqa: TID251 (a kernel's wait, before anything runs)


def _threads() -> int:
    return _entries("/proc/self/task")


def _receive(channel: socket.socket) -> tuple[bytes, tuple[int, int, int] | None, bool]:
    """Take a frame: its data, Linux's stamp (pid, uid, gid), whether it is whole. Descriptors
    that come with it are closed. Raises OSError."""
    data, ancillary, flags, _ = channel.recvmsg(wire.FRAME_SIZE_MAX, CONTROL_SIZE, AT_ONCE)
    stamp = None
    for _, kind, content in ancillary:
        if kind == socket.SCM_CREDENTIALS:
            stamp = CREDENTIALS.unpack(content)
        elif kind == socket.SCM_RIGHTS and len(content) >= DESCRIPTOR.size:
            os.close(DESCRIPTOR.unpack_from(content)[0])
    return data, stamp, not flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC)


def _no_start(name: str, program: str, reason: SpawnReason, detail: str) -> dict[str, object]:
    """The fields of SPAWN_FAILED."""
    return {"name": name, "program": program, "reason": reason.name.lower(), "detail": detail}


def _made_fields(image: Made) -> dict[str, object]:
    """The fields of DEVICE when init has made an image."""
    return {"name": image.name, "what": "made", "path": str(image.path), "size": image.size}


def _opened_fields(device: Granted, holder: str) -> dict[str, object]:
    """The fields of DEVICE when init has opened one for its holder."""
    return {
        "name": device.name,
        "what": "granted",
        "holder": holder,
        "backing": device.backing,
        "block_count": device.block_count,
        "writable": device.writable,
    }


def _not_in_time(span: int) -> str:
    return f"the child did not confine itself in time ({span // 1_000_000_000} s)"


def _failed(why: str) -> wire.Prepared:
    return wire.Prepared(0, 0, (), why)


def _entries(path: str) -> int:
    return sum(1 for _ in Path(path).iterdir())


def children_of_init() -> list[int]:
    """Processes whose parent is init, as Linux lists them. Raises FileNotFoundError where it does
    not."""
    listing = Path(f"/proc/self/task/{os.getpid()}/children")
    return [int(pid) for pid in listing.read_text().split()]


def _children_count() -> int:
    """How many children init has; -1 where Linux does not say."""
    try:
        return len(children_of_init())
    except FileNotFoundError:
        return -1


def _await_readable(descriptor: int, span: int) -> bool:
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(span / 1_000_000))


def _discard(pid: int, channel: socket.socket) -> None:
    """End a child that has not run anything of a service; its number is ours until it is
    reaped, so no descriptor is needed."""
    channel.close()
    os.kill(pid, signal.SIGKILL)
    _ = os.waitid(os.P_PID, pid, os.WEXITED)

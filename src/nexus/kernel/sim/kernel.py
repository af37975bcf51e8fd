"""The simulated kernel: one device in one process, under a virtual clock and one seed.

A resume of a task occupies its CPU for a seeded virtual duration and ends in a trap, which takes
effect at the end of it. The CPU with the earliest end goes next. Tasks are not preempted: one
that never reaches a trap is stopped by the host-side watchdog and reported as a hang.
"""

import traceback
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Final, NamedTuple, NoReturn

from nexus.abi import (
    AUDIT_LINES_MAX,
    BUDGET_SIZE_DEFAULT,
    CONTROL_LINK_SIZE,
    ENTROPY_SIZE_MAX,
    HEAP_SIZE,
    INIT_NAME,
    MESSAGE_SIZE_MAX,
    NO_WAIT,
    VMO_SIZE_MAX,
    AbiError,
    AuditLines,
    AuditLog,
    BlockFlush,
    BlockRead,
    BlockWrite,
    BootImage,
    BootMemoryRead,
    BootMemoryReplace,
    BusEntry,
    BusScan,
    Call,
    CapClone,
    CapClose,
    CapDerive,
    CapInfo,
    CapQuery,
    ClockMap,
    ConsoleWrite,
    DeviceDma,
    DeviceInfo,
    DeviceMap,
    DeviceQuery,
    DmaArea,
    EndpointClose,
    EndpointCreate,
    Entropy,
    EntropyDraw,
    Event,
    EventKind,
    Exit,
    ExitInfo,
    Fence,
    Grants,
    Kill,
    LinkCreate,
    LinkId,
    LinkTerms,
    Message,
    Nanos,
    NewLink,
    Notify,
    Now,
    PeerIdentity,
    Pid,
    PolicyRaise,
    PolicyRead,
    PolicyWord,
    PortClose,
    PortDial,
    PortPeer,
    PortSend,
    Program,
    Programs,
    QosClass,
    Recorder,
    Recv,
    ReplyRecv,
    Rights,
    SecretBackend,
    SecretQuery,
    SecretRead,
    SecretReplace,
    Send,
    Sender,
    SetTaskQos,
    Signal,
    SleepUntil,
    Slot,
    Spawn,
    Spawned,
    SpawnLastError,
    SpawnReason,
    SpawnSpec,
    Status,
    TaskCounters,
    TaskInfo,
    TaskQos,
    TaskStats,
    TaskTable,
    Trap,
    VmoCreate,
    VmoMap,
    VmoSeal,
    VmoShare,
    VmoWatch,
    VmoWrite,
    Wait,
    service_id,
)
from nexus.kernel.core import (
    EXIT_CODE_MAX,
    EXIT_CRASH,
    QOS_STATUS,
    Account,
    Hang,
    Hardware,
    Held,
    NoExitCode,
    OwnerShare,
    QosReason,
    QosRequest,
    RunOver,
    SpawnRefused,
    SystemLimits,
    SystemShares,
    audit_line,
    check_boot_memory,
    check_console,
    check_cpu,
    check_notice,
    check_ports,
    check_spec,
    decide,
    derive,
    end_coroutine,
    exit_code,
    grants_fields,
    well_typed,
)
from nexus.kernel.sim import log
from nexus.kernel.sim.bus import Bus
from nexus.kernel.sim.chance import Chance
from nexus.kernel.sim.clock import BOOT_GAP, WALL_START, Clock, MappedClock
from nexus.kernel.sim.disk import Disk
from nexus.kernel.sim.faults import FaultPoint, Faults
from nexus.kernel.sim.heap import TASK_CHARGE, Heap
from nexus.kernel.sim.inject import FaultyIpc, FaultyScheduler, Injector
from nexus.kernel.sim.ipc import Ipc, NoRoom
from nexus.kernel.sim.log import CHUNK_RECORDS, KEPT_EVENTS_MAX, RECORD_FIELDS, EventLog
from nexus.kernel.sim.objects import (
    BLOCKED,
    DEAD,
    PUT_OFF,
    READY,
    RUNNING,
    WAIT_CHILD,
    WAIT_SEND,
    WAIT_TIME,
    Blocked,
    Device,
    Endpoint,
    KernelObject,
    Link,
    Port,
    Task,
    Vmo,
)
from nexus.kernel.sim.ports import UID_SYSTEM, OnPeer, Ports, SimListener, SimPort
from nexus.kernel.sim.power import Cut, Power
from nexus.kernel.sim.sched import SLICE, Cpu, Scheduler
from nexus.kernel.sim.secret import Secrets
from nexus.kernel.sim.virtio import Window
from nexus.kernel.sim.watchdog import Spinning, Watchdog

HANG_LIMIT_S: Final = 5.0  # seconds of processor time in one step; a step takes microseconds
CONTROL_DEPTH: Final = 8  # messages; depth of the links between a task and its spawner
ROOT_SLOT: Final = Slot(1)  # of the root's own endpoint, as for every task
SIGKILL: Final = 9
KERNEL_PID: Final = Pid(0)  # in events that are about no task

CHUNK_LENGTH: Final = CHUNK_RECORDS * RECORD_FIELDS

Handler = Callable[[Task, Any], Any]

TRAPS: Final[tuple[type[Trap[Any]], ...]] = (
    Call,
    ReplyRecv,
    Recv,
    Send,
    SleepUntil,
    Now,
    EndpointCreate,
    EndpointClose,
    LinkCreate,
    CapClone,
    CapDerive,
    CapClose,
    CapQuery,
    VmoCreate,
    VmoWrite,
    VmoSeal,
    VmoMap,
    VmoShare,
    VmoWatch,
    Fence,
    ClockMap,
    Spawn,
    SpawnLastError,
    Wait,
    Kill,
    Exit,
    TaskTable,
    TaskQos,
    SetTaskQos,
    Entropy,
    ConsoleWrite,
    TaskStats,
    AuditLog,
    PolicyRead,
    PolicyRaise,
    BootMemoryRead,
    BootMemoryReplace,
    Notify,
    PortSend,
    PortClose,
    PortDial,
    PortPeer,
    BusScan,
    DeviceQuery,
    DeviceMap,
    DeviceDma,
    BlockRead,
    BlockWrite,
    BlockFlush,
    EntropyDraw,
    SecretQuery,
    SecretRead,
    SecretReplace,
)


class RootTerms(NamedTuple):
    """What a root task gets; the fields mean what they mean in a SpawnSpec."""

    qos: QosClass = QosClass.NORMAL
    cpu: int | None = None
    size: int | None = None  # None: SystemLimits.root_size
    budget: int = BUDGET_SIZE_DEFAULT


class SimKernel:
    """The ABI over a simulated device. One object serves one run.

    `recorder` gets each event; the same events stand in `log`, up to a named bound. `trace` adds
    an event for each trap. `hang_limit_s` is host time and only decides when a hang is reported.
    `boot_memory` is what an earlier boot stored, None for a system that cannot store; what this
    one has stored stands there afterwards. `uid` is the user who runs the system. While
    `disk_full` is set nothing more is stored.
    `hardware` is the bus map; those named in `kernel_driven` have no registers, as on linux.
    `disks` are in its block devices, blank ones where none is given. What is left after the run,
    however it ended, stands in `bus.disks`, `boot_memory` and `secrets.kept`.
    `wall_start` is what the machine's clock says at the start: for a later boot, what `next_wall`
    was after the earlier one.
    """

    def __init__(
        self,
        programs: Programs,
        *,
        seed: int,
        recorder: Recorder,
        cpu_count: int = 1,
        limits: SystemLimits | None = None,
        faults: Faults | None = None,
        trace: bool = False,
        selftest: bool = False,
        heap_size: int = HEAP_SIZE,
        hang_limit_s: float = HANG_LIMIT_S,
        boot_memory: bytes | None = b"",
        uid: int = UID_SYSTEM,
        hardware: Sequence[Hardware] = (),
        disks: Mapping[str, Disk] | None = None,
        kernel_driven: Collection[str] = (),
        secrets: Mapping[tuple[str, SecretBackend], bytes] | None = None,
        wall_start: int = WALL_START,
    ) -> None:
        self.programs: Programs = programs
        self.seed = seed
        self.limits = limits if limits is not None else SystemLimits()
        self.faults = faults
        self.selftest = selftest
        self.log: list[Event] = []
        self.events = 0  # recorded, kept or not
        self.steps = 0  # handled between two looks at the log's length; see _progress
        self.event_log = EventLog((*(trap.__name__ for trap in TRAPS), "Start"))
        self.chance = Chance(seed)
        self.clock = Clock(Nanos(self.chance.start), self._wake)
        self.mapped_clock = MappedClock(self.clock, wall_start)
        self.heap = Heap(self._report_heap, heap_size)
        self.scheduler, self.ipc = self._make_parts(cpu_count)
        self.ports = Ports(self.ipc, self._report_refused, uid)
        self.boot_memory = boot_memory
        self.disk_full = False
        self.power = Power(self.clock, self._report_cut)
        self.secrets = Secrets(secrets or {})
        self.bus = Bus(
            hardware,
            disks or {},
            kernel_driven,
            chance=self.chance,
            clock=self.clock,
            heap=self.heap,
            scheduler=self.scheduler,
            power=self.power,
            faults=faults,
            record=self._report_device,
            on_fault=self._report_device_fault,
        )
        self.notices: list[str] = []  # what Notify has said, in order
        self.policy = PolicyWord(0, available=False)
        self.uid = uid
        self.shares = SystemShares(self.limits)
        self.tasks: dict[Pid, Task] = {}  # live, and dead ones nobody has waited for
        self.generations: dict[str, int] = {}
        self.audit: deque[str] = deque(maxlen=AUDIT_LINES_MAX)
        self.audit_dropped = 0
        self.crashes: list[str] = []  # tracebacks of tasks that ended by an exception
        self.root: Task | None = None
        self.root_end: ExitInfo | None = None
        self.spawns = self.exits = 0
        self.testing = False  # the self tests run: of their events only KERNEL is evidence
        self.tested: Event | None = None  # the last event kept back while they run
        self._record = recorder
        self._trace = trace
        self._started = False
        self._actions: list[tuple[Nanos, Callable[[], None]]] = []  # before the root's start
        self._watchdog = Watchdog(self._progress, hang_limit_s)
        self.handlers: dict[type[Any], tuple[Handler, int]] = self._make_handlers()
        self.cost: Callable[[Task, int], int] | None = None  # an injected cost; None without faults
        if faults is not None:
            faults.begin(self.chance.faults, self.clock.now)
            Injector(self, faults).wire()

    def _make_parts(self, cpu_count: int) -> tuple[Scheduler, Ipc]:
        clock, event_log, heap, faults = self.clock, self.event_log, self.heap, self.faults
        told: Any = {"on_link": self._report_link, "on_refused": self._report_refused}
        if faults is None:
            scheduler = Scheduler(cpu_count, clock, event_log)
            return scheduler, Ipc(clock, scheduler, heap, event_log, **told)
        faulty = FaultyScheduler(cpu_count, clock, event_log, faults)
        return faulty, FaultyIpc(clock, faulty, heap, event_log, **told, faults=faults)

    # ---- running

    @property
    def now(self) -> Nanos:
        """The virtual clock. It starts at a large seeded time."""
        return self.clock.now

    @property
    def next_wall(self) -> int:
        """What the machine's clock says when it boots again, in nanoseconds since 1970."""
        return self.mapped_clock.wall() + BOOT_GAP

    def run(self, root: Program, argument: bytes, *, until: Nanos) -> ExitInfo:
        """Drive everything to the root task's exit. Other tasks are then killed.

        `until` is a time of the kernel clock, such as `kernel.now` plus a span. Raises RunOver
        when the clock passes it, Hang when a task never reaches its next trap, PowerCut.
        """
        assert not self._started, "a kernel serves one run"
        assert until > self.clock.now, "`until` is absolute: a span is added to kernel.now"
        self._started = True
        self.scheduler.start()
        if self.selftest:
            # Here, since the self tests drive this very kernel and so import it.
            from nexus.kernel.sim.selftest import run_selftest

            run_selftest(self)
        for time, action in self._actions:
            self.clock.call(time, action)
        return self.run_root(root, argument, until=until)

    def run_root(
        self, root: Program, argument: bytes, *, until: Nanos, terms: RootTerms | None = None
    ) -> ExitInfo:
        """Boot one root task and drive the system until it has exited and all is recycled."""
        with self._watchdog:
            try:
                self._boot(root, argument, terms if terms is not None else RootTerms())
                self.drive(until)
            finally:
                self._end_all()
        assert self.root_end is not None, "the drive ends with the root"
        return self.root_end

    # ---- what the world outside does

    def at(self, time: Nanos, action: Callable[[], None]) -> None:
        """Do something from outside at a virtual time, such as `kernel.now` plus a span.

        Between two steps of tasks, in the order of time and, at one time, of the calls of `at`:
        one seed gives one log. It takes no virtual time. What is due during the kernel's self
        tests is done after them.
        """
        if self._started and not self.testing:
            self.clock.call(time, action)
        else:
            self._actions.append((time, action))

    def signal(self, signal: Signal) -> None:
        """Send a signal to the root task; one that it has not received yet is not sent twice."""
        assert self._started, "before the run there is nobody to hear it: use at()"
        self.ipc.signal(signal)

    def cut_power(self, cut: Cut | None = None) -> None:
        """Stop the whole device: before anybody's next step, or when that moment has come.

        The run then raises PowerCut.
        """
        if cut is None:
            self.at(self.clock.now, lambda: self.power.cut("from outside"))
        else:
            self.power.plan(cut)

    def port(self, name: str) -> SimPort:
        """The outer side of a port, by its name, or for TCP "ADDRESS PORT"."""
        return SimPort(self.ports, name)

    def listen(self, address: str, port: int, on_connect: OnPeer | None = None) -> SimListener:
        """Have a process outside listen at an address."""
        listener = self.ports.listeners[address, port] = SimListener(on_connect)
        return listener

    def unlisten(self, address: str, port: int) -> None:
        """Nobody listens there any more; what was accepted lives on."""
        del self.ports.listeners[address, port]

    def freeze(self, name: str, until: Nanos) -> bool:
        """Stop the live task of this name until a virtual time, as SIGSTOP and SIGCONT do.

        It is stopped before its next step, and thawed by the latest of several. False: there is
        no such task.
        """
        task = self.living(name)
        if task is None:
            return False
        self.clock.call(self.clock.now, lambda: self._freeze(task, until))
        return True

    def living(self, name: str) -> Task | None:
        """The live task of this name."""
        alive = (task for task in self.tasks.values() if task.state != DEAD)
        return next((task for task in alive if task.name == name), None)

    def _freeze(self, task: Task, until: Nanos) -> None:
        if task.state == DEAD:
            return
        task.freezes += 1
        if not task.frozen:
            task.frozen = True
            self.scheduler.note(log.FROZEN, task.cpu, task.pid)
            if task.state == RUNNING:
                self.scheduler.take_off(task)
                task.state = PUT_OFF
                task.resume = self._resume_trap
            elif task.state == READY:
                self.scheduler.take_off(task)
                task.state = PUT_OFF
        self.clock.call(until, lambda: self._thaw(task))

    def _thaw(self, task: Task) -> None:
        task.freezes -= 1
        if task.state == DEAD or task.freezes:
            return
        task.frozen = False
        self.scheduler.note(log.THAWED, task.cpu, task.pid)
        if task.state == PUT_OFF:
            self.scheduler.ready(task)

    def _resume_trap(self, task: Task) -> Any:
        # It was stopped on its CPU, with a trap that had not taken effect yet.
        handler, task.code = self.handlers.get(task.trap.__class__) or self._handler_of(task)
        return handler(task, task.trap)

    def log_lines(self) -> Iterator[str]:
        """Every trap and scheduling decision as text: a function of seed and programs alone."""
        return self.event_log.lines()

    def drive(self, until: Nanos) -> None:
        """The loop: the earliest event next, until the root has exited."""
        clock = self.clock
        timers = clock.timers
        scheduler = self.scheduler
        smp = scheduler.smp
        cpu = smp[0]
        others = smp[1:]
        records = self.event_log.records
        handlers = self.handlers
        costs = self.chance.costs
        extra_cost = self.cost
        trace = self._trace
        code = status = 0
        while self.root_end is None:
            if others:
                cpu = smp[0]
                for other in others:
                    if other.at < cpu.at:
                        cpu = other
            now = cpu.at
            if timers and timers[0][0] <= now:
                if timers[0][0] >= until:
                    self._run_over(until)
                scheduler.current = None
                clock.fire()
                continue
            if now >= until:
                self._run_over(until)
            clock.now = now
            if others:
                scheduler.current = cpu
            task = cpu.task
            try:
                if task is None:
                    # The CPU looks for work; what it picks tries its trap again.
                    task = scheduler.tick(cpu)
                    if task is None:
                        continue
                    cpu.task = task
                    task.state = RUNNING
                    cpu.slice_end = now + SLICE  # type: ignore[assignment]  # a NewType's sum
                    code = task.code | 0x80
                    value = task.resume(task)
                else:
                    trap = task.trap
                    handler, code = handlers.get(trap.__class__) or self._handler_of(task)
                    task.code = code
                    value = handler(task, trap)
            except AbiError as refusal:
                assert task is not None, "a tick refuses nothing"
                if task.state == DEAD:
                    continue
                status = -int(refusal.status)
                value = refusal
                go_on = task.throw
            except Exception as error:  # goes on unless the task's own arguments caused it
                if task is None or not self._is_to_blame(task, error):
                    raise
                self._crashed(task, error)
                continue
            else:
                if value is BLOCKED:
                    cpu.task = None
                    continue
                status = task.took if value.__class__ is Message else 0
                go_on = task.send
            if now >= cpu.slice_end and scheduler.requeue(cpu, task):
                cpu.task = None
                task.value, task.error = (None, value) if status < 0 else (value, None)
                task.resume = self._resume_value
                continue
            records += (now, task.tag | cpu.tag | code, status)
            if len(records) >= CHUNK_LENGTH:
                self.event_log.pack()
                self.steps += 1
            if trace:
                self._trace_trap(task, value, status)
            try:
                task.trap = go_on(value)
            except StopIteration as stop:
                self._returned(task, stop.value)
                continue
            except Spinning:
                self._hang(task)
            except BaseException as error:  # noqa: BLE001 (a crash of a task is its exit)
                self._watchdog.pass_on()
                self._crashed(task, error)
                continue
            cost = next(costs)
            if extra_cost is not None:
                cost = extra_cost(task, cost)
            cpu.at = now + cost  # type: ignore[assignment]

    def tick(self, cpu: Cpu) -> Task | None:
        """One look of one CPU for work outside the loop, for the kernel's self tests."""
        self.scheduler.current = cpu
        return self.scheduler.tick(cpu)

    def _progress(self) -> object:
        return self.steps, len(self.event_log.records)

    def _run_over(self, until: Nanos) -> NoReturn:
        self.clock.now = until
        raise RunOver(until)

    def _hang(self, task: Task) -> NoReturn:
        self.record(EventKind.HANG, task.pid, {"name": task.name, "generation": task.generation})
        raise Hang(task.name, task.pid)

    def _handler_of(self, task: Task) -> tuple[Handler, int]:
        # A subclass of a trap is that trap; anything else a coroutine yields is a bug of its own.
        for base in type(task.trap).__mro__:
            known = self.handlers.get(base)
            if known is not None:
                self.handlers[type(task.trap)] = known
                return known
        return self._not_a_trap, len(TRAPS)

    def _not_a_trap(self, task: Task, trap: object) -> Blocked:
        what = type(trap).__name__
        self.end(task, EXIT_CRASH, 0, f"{task.name} awaited a {what}, which is no trap\n")
        return BLOCKED

    def _is_to_blame(self, task: Task, error: Exception) -> bool:
        # Values of the wrong type in a trap are the task's bug, and its crash as on real
        # processes. Whatever else a handler raises is a bug of this kernel.
        return (
            task.state != DEAD
            and not isinstance(error, AssertionError)
            and not well_typed(task.trap)
        )

    def _resume_value(self, task: Task) -> Any:
        if task.error is not None:
            raise task.error
        return task.value

    # ---- the evidence stream

    def record(self, kind: EventKind, pid: Pid, fields: dict[str, object]) -> None:
        """Record an event: to the recorder, to `log`, and as text into the event log."""
        if self.power.off:
            return  # nobody sees what a device without power does
        event = Event(self.clock.now, kind, pid, fields)
        if self.testing and kind is not EventKind.KERNEL:
            self.tested = event
            return
        if self.events < KEPT_EVENTS_MAX:
            self.log.append(event)
        self.event_log.event(event, self.events)
        self.events += 1
        self._record(event)

    def _trace_trap(self, task: Task, value: object, status: int) -> None:
        trap = task.trap
        if trap is None:
            return  # the first resume answers no trap
        size = len(value.data) if isinstance(value, Message) else 0
        if isinstance(trap, Send | PortSend) and not status:
            size = len(trap.data)
        self.record(
            EventKind.TRAP,
            task.pid,
            {
                "name": task.name,
                "generation": task.generation,
                "trap": type(trap).__name__,
                "status": Status(-status).name if status < 0 else "OK",
                "size": size,
            },
        )

    def _report_heap(self, account: Account, pid: Pid) -> None:
        self.record(EventKind.HEAP, pid, account.fields())

    def _report_link(self, link: Link, holder: Task) -> None:
        owner = link.endpoint.owner
        self.record(
            EventKind.LINK,
            owner.pid,
            {"owner": owner.name, "holder": holder.name, "depth": link.depth, "size": link.size},
        )

    def _report_refused(self, task: Task, reason: str) -> None:
        self.record(EventKind.REFUSED, task.pid, {"owner": task.name, "reason": reason})

    def _report_device(self, task: Task | None, fields: dict[str, object]) -> None:
        self.record(EventKind.DEVICE, KERNEL_PID if task is None else task.pid, fields)

    def _report_device_fault(self, task: Task | None, name: str, point: FaultPoint) -> None:
        assert self.faults is not None, "it was planned"
        fields: dict[str, object] = {
            "point": point.value,
            "count": self.faults.fired[point],
            "device": name,
        }
        self.record(EventKind.FAULT, KERNEL_PID if task is None else task.pid, fields)

    def _report_cut(self, why: str) -> None:
        self.record(EventKind.DEVICE, KERNEL_PID, {"name": "power", "what": "cut", "why": why})
        self.secrets.lose_power()

    # ---- tasks begin

    def _boot(self, root: Program, argument: bytes, terms: RootTerms) -> None:
        size = self.limits.root_size if terms.size is None else terms.size
        self.root_end = None
        self.shares.tasks.take(1)
        share = self.shares.reserve(size, self.limits.root_endpoints)
        task = self._new_task(INIT_NAME, root, terms.qos, share, terms.cpu, terms.budget)
        self.root = task
        self.heap.account.charge(TASK_CHARGE)
        endpoint = self.ipc.create_endpoint(task, at=ROOT_SLOT)
        self.ipc.hear_signals(endpoint)
        self._begin(task, root, argument, None, endpoint.slot)
        self.scheduler.ready(task)

    def _new_task(
        self,
        name: str,
        program: Program,
        qos: QosClass,
        share: OwnerShare,
        cpu: int | None,
        budget: int,
    ) -> Task:
        task = Task(
            pid=self.free_pid(),
            name=name,
            service=service_id(name),
            generation=self.next_generation(name),
            qos=QosClass(qos),
            program=program,
            share=share,
            budget=budget,
        )
        task.cpu = self.scheduler.place(cpu)
        task.pinned = cpu is not None
        return task

    def free_pid(self) -> Pid:
        """The lowest number no task has and no queued message carries."""
        burned = self.queued_pids()
        pid = 1
        while pid in self.tasks or pid in burned:
            pid += 1
        return Pid(pid)

    def queued_pids(self) -> set[Pid]:
        """The pids stamped on queued messages."""
        return {
            entry[1]
            for task in self.tasks.values()
            for link in task.links.values()
            for entry in link.queue
        }

    def next_generation(self, name: str) -> int:
        """The number of this start of a service, from 1."""
        return self.generations.get(name, 0) + 1

    def _begin(
        self,
        task: Task,
        program: Program,
        argument: bytes,
        control: Slot | None,
        endpoint: Slot,
        grants: Grants = Grants(),  # noqa: B008 (immutable)
        hardware: tuple[Slot, ...] = (),
    ) -> None:
        boot = BootImage(
            name=task.name,
            service=task.service,
            pid=task.pid,
            generation=task.generation,
            control=control,
            endpoint=endpoint,
            now=self.clock.now,
            argument=argument,
            ports=tuple(sorted(task.ports)),
            hardware=hardware,
        )
        coroutine = program.main(boot)
        task.coroutine = coroutine
        task.send = coroutine.send
        task.throw = coroutine.throw
        task.resume = _first_resume
        task.code = len(TRAPS)
        self.tasks[task.pid] = task
        self.generations[task.name] = task.generation
        self.publish(task)
        task.cpu.tasks += 1
        self.spawns += 1
        self.record(
            EventKind.SPAWN,
            task.pid,
            {
                "name": task.name,
                "generation": task.generation,
                "program": program.name,
                "digest": program.digest,
                "qos": int(task.qos),
                "service": f"{task.service:016x}",
                "grants": grants_fields(grants),
                **({"set": program.set_digest} if program.set_digest else {}),
            },
        )

    def publish(self, task: Task) -> None:
        """Enter a task's identity, before its first resume; messages are looked up there."""
        identity = Sender(task.service, task.pid, task.generation, task.qos)
        self.ipc.identities[task.pid] = identity

    def _spawn(self, task: Task, trap: Spawn) -> Spawned:
        self._require_root(task)
        spec = trap.spec
        try:
            return self._start(task, spec)
        except SpawnRefused as refusal:
            raise self.spawn_failed(task, spec, refusal) from None

    def spawn_failed(self, task: Task, spec: SpawnSpec, refusal: SpawnRefused) -> SpawnRefused:
        """Keep the reason for SpawnLastError and record it; the refusal is returned."""
        task.spawn_error = self.spawn_reason(refusal)
        self.record(
            EventKind.SPAWN_FAILED,
            task.pid,
            {
                "name": spec.name,
                "program": spec.program,
                "reason": task.spawn_error.name.lower(),
            },
        )
        return refusal

    def spawn_reason(self, refusal: SpawnRefused) -> SpawnReason:
        """The reason kept for SpawnLastError."""
        return refusal.reason

    def _start(self, parent: Task, spec: SpawnSpec) -> Spawned:
        names = {task.name for task in self.tasks.values() if task.state != DEAD}
        program = check_spec(spec, self.programs, names)
        check_ports(spec, self.ports.live)
        hardware = self.bus.find(spec.grants)
        held = parent.entries.get(spec.control)
        if held is None or not isinstance(held.object, Endpoint):
            raise SpawnRefused(
                SpawnReason.INVALID_PAYLOAD, f"slot {spec.control} is no endpoint of the spawner"
            )
        check_cpu(spec, len(self.scheduler.smp))
        if not self.shares.tasks.free:
            raise SpawnRefused(SpawnReason.OOM, f"{self.shares.tasks.total} tasks")
        if parent.table.full:
            raise SpawnRefused(SpawnReason.CAP_TABLE_FULL, "no slot for the link to the child")
        if spec.endpoints > self.shares.endpoints.free:
            raise SpawnRefused(SpawnReason.ENDPOINT_QUOTA, f"{spec.endpoints} endpoints")
        with ExitStack() as undo:
            try:
                spawned = self._start_within(parent, spec, program, held.object, hardware, undo)
            except AbiError as refusal:
                if isinstance(refusal, SpawnRefused):
                    raise
                raise SpawnRefused(SpawnReason.OOM, str(refusal)) from None
            _ = undo.pop_all()
        return spawned

    def _start_within(
        self,
        parent: Task,
        spec: SpawnSpec,
        program: Program,
        control: Endpoint,
        hardware: tuple[Hardware, ...],
        undo: ExitStack,
    ) -> Spawned:
        shares = self.shares
        shares.tasks.take(1)
        _ = undo.callback(shares.tasks.give, 1)
        share = shares.reserve(spec.owner_size, spec.endpoints)
        _ = undo.callback(shares.release, share)
        child = self._new_task(spec.name, program, spec.qos, share, spec.cpu, spec.budget)
        self.heap.charge(parent, TASK_CHARGE)
        _ = undo.callback(self.heap.refund, TASK_CHARGE)
        if not self.scheduler.has_room(child.cpu, child.qos):
            raise SpawnRefused(SpawnReason.OOM, "the run queue is full")
        _ = undo.callback(self._release_objects, child)
        terms = LinkTerms(CONTROL_DEPTH, CONTROL_LINK_SIZE, 0)
        control_slot, upward = self.ipc.place_link(control, terms, child, Rights.SEND)
        _ = undo.callback(self._unsee, upward)
        endpoint = self.ipc.create_endpoint(child)
        for name in spec.grants.ports:
            _ = self.ports.create(child, name)
        for stream in spec.grants.stream_ports:
            _ = self.ports.create(child, stream.name, stream)
        _ = undo.callback(self.bus.release, child)
        slots = tuple(self.bus.grant(child, each) for each in hardware)
        child.secret = SecretBackend(spec.grants.secret)
        down = terms._replace(delegations=spec.delegations)
        slot, _link = self.ipc.place_link(endpoint, down, parent, Rights.SEND | Rights.MANAGE)
        _ = undo.callback(self.ipc.close_slot, parent, slot)
        try:
            self._begin(
                child, program, spec.argument, control_slot, endpoint.slot, spec.grants, slots
            )
        except Exception as error:  # noqa: BLE001 (a program that cannot be started)
            raise SpawnRefused(SpawnReason.MAP_FAILED, repr(error)) from None
        self.scheduler.ready(child)
        return Spawned(child.pid, child.service, child.generation, slot, upward.id)

    def _unsee(self, link: Link) -> None:
        # Undo of a spawn: the spawner never heard of this link and hears no PeerGone of it.
        endpoint = link.endpoint
        if link.listed:
            endpoint.ready.remove(link)
        self.ipc.forget(link)

    def _spawn_last_error(self, task: Task, trap: SpawnLastError) -> SpawnReason:  # noqa: ARG002
        reason = task.spawn_error
        task.spawn_error = SpawnReason.NONE
        return reason

    # ---- tasks end

    def _returned(self, task: Task, value: object) -> None:
        try:
            code = exit_code(value)
        except NoExitCode as error:
            self._crashed(task, error)
        else:
            self.end(task, code, 0)

    def _crashed(self, task: Task, error: BaseException) -> None:
        text = "".join(traceback.format_exception(error))
        self.end(task, EXIT_CRASH, 0, text)

    def end(self, task: Task, code: int, number: int, crash: str | None = None) -> None:
        """A task is over: everything it had goes back, and whoever waits for it wakes."""
        cpu: Cpu = task.cpu
        self.scheduler.remove(task)
        task.state = DEAD
        if task.wait_link is not None:
            task.wait_link.waiter = None
            task.wait_link = None
        self.bus.release(task)  # first: nothing that its coroutine still does reaches a device
        self._close_coroutine(task)
        fields: dict[str, object] = {
            "name": task.name,
            "generation": task.generation,
            "code": code,
            "signal": number,
        }
        if crash is not None:
            task.crash = crash
            self.crashes.append(crash)
            fields[log.CRASH_KEY] = crash
        self.record(EventKind.EXIT, task.pid, fields)
        self.exits += 1
        self._release_objects(task)
        self.shares.release(task.share)
        if cpu.task is task:
            cpu.task = None
        end = ExitInfo(task.pid, code, number)
        task.value = end
        root = self.root
        if task is root:
            self.root_end = end
        elif root is not None and root.state == WAIT_CHILD and root.wait_pid == task.pid:
            self.scheduler.ready(root)

    def _close_coroutine(self, task: Task) -> None:
        coroutine = task.coroutine
        task.coroutine = None
        task.send = task.throw = _ended
        task.trap = None
        if coroutine is None:
            return
        try:
            end_coroutine(coroutine)
        except Spinning:
            self._hang(task)
        except BaseException:  # noqa: BLE001 (only the task's own code runs in there)
            self._watchdog.pass_on()  # the host's ends the run; the task's own is last words

    def _release_objects(self, task: Task) -> None:
        """Give back what a task's table holds; then everybody who waited for it wakes."""
        self.heap.sweep(task)
        woken = self.release_endpoints(task)
        for slot in list(task.table.slots()):
            held = self.heap.unhold(task, slot)
            if not task.table.aliases(held.object):
                woken += self.ipc.drop(held.object)
        self.heap.forget_maps(task)
        self.ipc.wake_all([waiter for waiter in woken if waiter is not task])

    def release_endpoints(self, task: Task) -> list[Task]:
        """Close every endpoint of a task; the tasks to wake."""
        woken: list[Task] = []
        for endpoint in list(task.endpoints.values()):
            _ = self.heap.unhold(task, endpoint.slot)
            woken += self.ipc.shut(endpoint)
        return woken

    def _end_all(self) -> None:
        root = self.root
        for task in [*self.tasks.values()]:
            if task.state != DEAD and task is not root:
                self.end(task, 0, SIGKILL)
        if root is not None and root.state != DEAD:
            self.end(root, 0, SIGKILL)
        for pid in list(self.tasks):
            self._reap(pid)
        self.root = None

    def _reap(self, pid: Pid) -> None:
        del self.tasks[pid]
        self.shares.tasks.give(1)
        self.heap.refund(TASK_CHARGE)

    def _wake(self, task: Task) -> None:
        # A timer came up for a task that waits.
        self.ipc.wake(task)

    # ---- what each trap does

    def _make_handlers(self) -> dict[type[Any], tuple[Handler, int]]:
        handlers: dict[type[Trap[Any]], Handler] = {
            Call: self._call,
            ReplyRecv: self._reply_recv,
            Recv: self._recv,
            Send: self._send,
            SleepUntil: self._sleep_until,
            Now: self._now,
            EndpointCreate: self._endpoint_create,
            EndpointClose: self._endpoint_close,
            LinkCreate: self._link_create,
            CapClone: self._cap_clone,
            CapDerive: self._cap_derive,
            CapClose: self._cap_close,
            CapQuery: self._cap_query,
            VmoCreate: self._vmo_create,
            VmoWrite: self._vmo_write,
            VmoSeal: self._vmo_seal,
            VmoMap: self._vmo_map,
            VmoShare: self._vmo_share,
            VmoWatch: self._vmo_watch,
            Fence: self._fence,
            ClockMap: self._clock_map,
            Spawn: self._spawn,
            SpawnLastError: self._spawn_last_error,
            Wait: self._wait,
            Kill: self._kill,
            Exit: self._exit,
            TaskTable: self._task_table,
            TaskQos: self._task_qos,
            SetTaskQos: self._set_task_qos,
            Entropy: self._entropy,
            ConsoleWrite: self._console_write,
            TaskStats: self._task_stats,
            AuditLog: self._audit_log,
            PolicyRead: self._policy_read,
            PolicyRaise: self._policy_raise,
            BootMemoryRead: self._boot_memory_read,
            BootMemoryReplace: self._boot_memory_replace,
            Notify: self._notify,
            PortSend: self._port_send,
            PortClose: self._port_close,
            PortPeer: self._port_peer,
            PortDial: self._port_dial,
            BusScan: self._bus_scan,
            DeviceQuery: self._device_query,
            DeviceMap: self._device_map,
            DeviceDma: self._device_dma,
            BlockRead: self._block,
            BlockWrite: self._block,
            BlockFlush: self._block,
            EntropyDraw: self._entropy_draw,
            SecretQuery: self._secret_query,
            SecretRead: self._secret_read,
            SecretReplace: self._secret_replace,
        }
        assert set(handlers) == set(TRAPS), "every trap has a handler"
        return {trap: (handlers[trap], code) for code, trap in enumerate(TRAPS)}

    def _require_root(self, task: Task) -> None:
        if task is not self.root:
            raise AbiError(Status.PERMISSION_DENIED, "only the root task may")

    # messages

    def _call(self, task: Task, trap: Call) -> Message | Blocked:
        trap.sent = False
        ipc = self.ipc
        link = task.links.get(trap.link)
        inbox = task.entries.get(trap.inbox)
        if inbox is not None and inbox.object.__class__ is Port:
            raise AbiError(Status.INVALID_ARGUMENT, "a port is no inbox of calls")
        if link is None or inbox is None or inbox.object is not link.endpoint:
            ipc.listen(task, (trap.inbox,), trap.link, MESSAGE_SIZE_MAX)  # says what is wrong
            raise AssertionError("a link of this endpoint, and yet not")
        task.filter = link
        task.size_max = MESSAGE_SIZE_MAX
        ipc.send(task, trap.slot, trap.data)
        trap.sent = True
        task.deadline = trap.deadline
        if link.queue or link.closed:
            return ipc.receive(task)
        return ipc.wait(task)

    def _reply_recv(self, task: Task, trap: ReplyRecv) -> Message | Blocked:
        ipc = self.ipc
        sources = trap.sources
        held = task.entries.get(sources[0]) if len(sources) == 1 else None
        if held is not None and held.object.__class__ is Endpoint:
            endpoint: Endpoint = held.object
            task.sources = (endpoint,)
            task.filter = None
            task.size_max = MESSAGE_SIZE_MAX
        else:
            ipc.listen(task, sources, None, MESSAGE_SIZE_MAX)
        trap.reply_status = None
        if trap.slot is not None:
            try:
                ipc.send(task, trap.slot, trap.data)
            except AbiError as refusal:
                trap.reply_status = int(refusal.status)
        task.deadline = trap.deadline
        if len(sources) == 1 and not task.sources[0].ready:
            return ipc.wait(task)
        return ipc.receive(task)

    def _recv(self, task: Task, trap: Recv) -> Message | Blocked:
        self.ipc.listen(task, trap.sources, trap.link, trap.size_max)
        task.deadline = trap.deadline
        return self.ipc.receive(task)

    def _send(self, task: Task, trap: Send) -> Blocked | None:
        task.deadline = trap.deadline
        return self.try_send(task)

    def try_send(self, task: Task) -> Blocked | None:
        """Send, or wait for room until the deadline. Tried again at every wake-up."""
        trap: Send = task.trap
        try:
            self.ipc.send(task, trap.slot, trap.data, trap.move)
        except NoRoom:
            deadline = trap.deadline
            if deadline == NO_WAIT:
                raise
            if deadline <= self.clock.now:
                task.timeouts += 1
                raise AbiError(Status.TIMED_OUT, "no room before the deadline") from None
            self.wait_for_room(task, trap.slot)
            return BLOCKED
        return None

    def wait_for_room(self, task: Task, slot: Slot) -> None:
        """Make a task wait until its link has room, its endpoint closes or its time is up."""
        link = task.entries[slot].object
        assert isinstance(link, Link), "only a link can be full"
        assert link.waiter is None, "a link has one holder, and a holder one trap"
        link.waiter = task
        task.wait_link = link
        task.state = WAIT_SEND
        task.resume = self.try_send
        self.clock.arm(task)

    # time

    def _now(self, task: Task, trap: Now) -> Nanos:  # noqa: ARG002
        return self.clock.now

    def _sleep_until(self, task: Task, trap: SleepUntil) -> Nanos | Blocked:
        task.deadline = trap.deadline
        return self._sleep(task)

    def _sleep(self, task: Task) -> Nanos | Blocked:
        if task.deadline <= self.clock.now:
            return self.clock.now
        task.state = WAIT_TIME
        task.resume = self._sleep
        self.clock.arm(task)
        return BLOCKED

    # endpoints, links, capabilities

    def _endpoint_create(self, task: Task, trap: EndpointCreate) -> Slot:  # noqa: ARG002
        return self.ipc.create_endpoint(task).slot

    def _endpoint_close(self, task: Task, trap: EndpointClose) -> None:
        held = task.table.require(trap.slot, Rights.MANAGE)
        if not isinstance(held.object, Endpoint):
            raise AbiError(Status.INVALID_ARGUMENT, f"slot {trap.slot} is no endpoint")
        self.ipc.close_slot(task, trap.slot)

    def _link_create(self, task: Task, trap: LinkCreate) -> NewLink:
        return self.ipc.create_link(task, task.table.get(trap.slot), trap.terms)

    def _cap_clone(self, task: Task, trap: CapClone) -> Slot:
        held = self._duplicable(task, trap.slot)
        return self.heap.hold(task, held.object, held.rights)

    def _cap_derive(self, task: Task, trap: CapDerive) -> Slot:
        held = self._duplicable(task, trap.slot)
        return self.heap.hold(task, held.object, derive(held.rights, trap.rights))

    def _duplicable(self, task: Task, slot: Slot) -> Held[KernelObject]:
        held = task.table.get(slot)
        if isinstance(held.object, Endpoint):
            raise AbiError(Status.PERMISSION_DENIED, "an endpoint has one slot")
        return held

    def _cap_close(self, task: Task, trap: CapClose) -> None:
        _ = task.table.get(trap.slot)
        self.ipc.close_slot(task, trap.slot)

    def _cap_query(self, task: Task, trap: CapQuery) -> CapInfo:
        held = task.table.require(trap.slot, Rights.MAP)
        object_ = held.object
        length = object_.length if isinstance(object_, Device) else object_.cost
        return CapInfo(object_.kind, held.rights, length)

    # memory

    def _vmo_create(self, task: Task, trap: VmoCreate) -> Slot:
        if not 1 <= trap.size <= VMO_SIZE_MAX:
            raise AbiError(Status.INVALID_ARGUMENT, f"a VMO of {trap.size} bytes")
        return self.heap.create_vmo(task, trap.size)

    def _vmo_write(self, task: Task, trap: VmoWrite) -> None:
        vmo = self._vmo(task, trap.slot, Rights.MANAGE)
        if vmo.sealed or vmo.shared:
            raise AbiError(Status.PERMISSION_DENIED, "the VMO is sealed, or shared")
        end = trap.offset + len(trap.data)
        if trap.offset < 0 or end > vmo.cost:
            raise AbiError(Status.INVALID_ARGUMENT, f"bytes {trap.offset} to {end} of {vmo.cost}")
        vmo.data[trap.offset : end] = trap.data

    def _vmo_seal(self, task: Task, trap: VmoSeal) -> None:
        vmo = self._vmo(task, trap.slot, Rights.MANAGE)
        if vmo.shared:
            raise AbiError(Status.PERMISSION_DENIED, "a shared VMO may change for ever")
        vmo.sealed = True

    def _vmo_map(self, task: Task, trap: VmoMap) -> memoryview:
        vmo = self._vmo(task, trap.slot, Rights.MAP)
        if not vmo.sealed:
            raise AbiError(Status.PERMISSION_DENIED, "only a sealed VMO is mapped")
        return self.heap.map_vmo(task, vmo)

    def _vmo_share(self, task: Task, trap: VmoShare) -> memoryview:
        vmo = self._vmo(task, trap.slot, Rights.MANAGE)
        if vmo.sealed or vmo.shared:
            raise AbiError(Status.PERMISSION_DENIED, "the VMO is sealed, or shared")
        vmo.shared = True
        return self.heap.view_vmo(task, vmo)

    def _vmo_watch(self, task: Task, trap: VmoWatch) -> memoryview:
        vmo = self._vmo(task, trap.slot, Rights.MAP)
        if not vmo.shared:
            raise AbiError(Status.PERMISSION_DENIED, "only a shared VMO is watched")
        return self.heap.view_vmo(task, vmo).toreadonly()

    def _fence(self, task: Task, trap: Fence) -> None:
        """One step of one task at a time: what is written is seen."""

    def _clock_map(self, task: Task, trap: ClockMap) -> MappedClock:  # noqa: ARG002
        return self.mapped_clock

    def _vmo(self, task: Task, slot: Slot, right: Rights) -> Vmo:
        object_ = task.table.get(slot).object
        if not isinstance(object_, Vmo):
            raise AbiError(Status.INVALID_ARGUMENT, f"slot {slot} is no VMO")
        _ = task.table.require(slot, right)
        return object_

    # other tasks

    def _wait(self, task: Task, trap: Wait) -> ExitInfo | Blocked:
        self._require_root(task)
        task.deadline = trap.deadline
        task.wait_pid = trap.pid
        return self._try_wait(task)

    def _try_wait(self, task: Task) -> ExitInfo | Blocked:
        pid = task.wait_pid
        child = None if pid is None else self.tasks.get(pid)
        if child is None or child is task:
            raise AbiError(Status.INVALID_ARGUMENT, f"pid {pid} is no child, or was reaped")
        if child.state == DEAD:
            end: ExitInfo = child.value
            self._reap(child.pid)
            return end
        if task.deadline <= self.clock.now:
            status = self.ipc.empty_status(task.deadline)
            if status is Status.TIMED_OUT:
                task.timeouts += 1
            raise AbiError(status, f"pid {pid} is alive")
        task.state = WAIT_CHILD
        task.resume = self._try_wait
        self.clock.arm(task)
        return BLOCKED

    def _kill(self, task: Task, trap: Kill) -> Blocked | None:
        self._require_root(task)
        victim = self.tasks.get(trap.pid)
        if victim is None:
            raise AbiError(Status.INVALID_ARGUMENT, f"no task {trap.pid}")
        if victim.state == DEAD:
            return None  # as SIGKILL to a process that nobody has waited for yet
        self.end(victim, 0, SIGKILL)
        return BLOCKED if victim is task else None

    def _exit(self, task: Task, trap: Exit) -> Blocked:
        if not 0 <= trap.code <= EXIT_CODE_MAX:
            raise AbiError(Status.INVALID_ARGUMENT, f"exit code {trap.code}")
        self.end(task, exit_code(trap.code), 0)
        return BLOCKED

    def _task_table(self, task: Task, trap: TaskTable) -> tuple[TaskInfo, ...]:  # noqa: ARG002
        self._require_root(task)
        return tuple(
            TaskInfo(row.pid, row.name, row.service, row.generation, row.qos)
            for _, row in sorted(self.tasks.items())
            if row.state != DEAD
        )

    # classes

    def _task_qos(self, task: Task, trap: TaskQos) -> QosClass:  # noqa: ARG002
        return task.qos

    def _set_task_qos(self, task: Task, trap: SetTaskQos) -> None:
        target = task if trap.pid is None else self.tasks.get(trap.pid)
        if target is not None and target.state == DEAD:
            target = None
        request = QosRequest(
            caller_service=task.service,
            caller_pid=task.pid,
            target_pid=task.pid if trap.pid is None else trap.pid,
            raw=trap.qos,
            current=None if target is None else target.qos,
        )
        reason = decide(request)
        if reason is QosReason.APPLIED and target is not None:
            qos = QosClass(trap.qos)
            if self.scheduler.set_qos(target, qos):
                identity = self.ipc.identities[target.pid]
                self.ipc.identities[target.pid] = identity._replace(qos=qos)
            else:
                reason = QosReason.SCHEDULER_QUEUE_FULL
        line = audit_line(request, reason)
        self.record(EventKind.QOS, task.pid, {"line": line})
        self._keep_audit(line)
        if reason is not QosReason.APPLIED:
            raise AbiError(QOS_STATUS[reason], reason.value)

    def _keep_audit(self, line: str) -> None:
        if len(self.audit) == AUDIT_LINES_MAX:
            self.audit_dropped += 1
        self.audit.append(line)  # the oldest one goes

    def _audit_log(self, task: Task, trap: AuditLog) -> AuditLines:  # noqa: ARG002
        self._require_root(task)
        taken = AuditLines(tuple(self.audit), self.audit_dropped)
        self.audit.clear()
        self.audit_dropped = 0
        return taken

    # devices and accounts

    def _entropy(self, task: Task, trap: Entropy) -> bytes:
        self._require_root(task)
        if not 1 <= trap.size <= ENTROPY_SIZE_MAX:
            raise AbiError(Status.INVALID_ARGUMENT, f"{trap.size} bytes of entropy")
        return self.chance.entropy(trap.size)

    def _console_write(self, task: Task, trap: ConsoleWrite) -> None:
        evidence = check_console(trap.line, trap.evidence)
        self.record(
            EventKind.CONSOLE,
            task.pid,
            {
                "name": task.name,
                "generation": task.generation,
                "line": trap.line,
                "evidence": evidence,
            },
        )
        self.power.on_line(task.name, trap.line)

    def _task_stats(self, task: Task, trap: TaskStats) -> TaskCounters:  # noqa: ARG002
        vmo_size = self.heap.vmo_size(task)
        budget = task.budget
        return TaskCounters(
            slots=task.table.used,
            endpoints=len(task.endpoints),
            links=len(task.links),
            reserved_size=task.share.size.used,
            queued=sum(len(link.queue) for link in task.links.values()),
            queued_size=sum(link.queued_size for link in task.links.values()),
            sent=task.sent,
            sent_size=task.sent_size,
            received=task.received,
            received_size=task.received_size,
            timeouts=task.timeouts,
            refused_identity=task.refused_identity,
            refused_caps=task.refused_caps,
            refused_oversize=task.refused_oversize,
            refused_links=task.refused_links,
            budget_used=budget.used,
            budget_free=budget.free,
            budget_total=budget.total,
            refused_size=budget.refused_size,
            refused_align=budget.refused_align,
            vmo_size=vmo_size,
        )

    # the policy page

    def _policy_read(self, task: Task, trap: PolicyRead) -> PolicyWord:  # noqa: ARG002
        return self.policy

    def _policy_raise(self, task: Task, trap: PolicyRaise) -> PolicyWord:
        self._require_root(task)
        self.policy = PolicyWord(self.policy.generation + 1, available=bool(trap.available))
        self._note(task, log.POLICY, self.policy.generation << 1 | self.policy.available)
        return self.policy

    # the world outside

    def _boot_memory_read(self, task: Task, trap: BootMemoryRead) -> bytes:  # noqa: ARG002
        self._require_root(task)
        return self._stored()

    def _boot_memory_replace(self, task: Task, trap: BootMemoryReplace) -> None:
        self._require_root(task)
        data = check_boot_memory(trap.data)
        _ = self._stored()
        if self.disk_full:
            raise AbiError(Status.NO_SPACE, "the disk is full")
        self.boot_memory = data
        self._note(task, log.BOOT_MEMORY, len(data))

    def _stored(self) -> bytes:
        if self.boot_memory is None:
            raise AbiError(Status.UNSUPPORTED, "this run has no state directory")
        return self.boot_memory

    def _notify(self, task: Task, trap: Notify) -> None:
        self._require_root(task)
        data = check_notice(trap.text)
        if data:
            self.notices.append(trap.text)
            self._note(task, log.NOTICE, len(data))

    def _port_send(self, task: Task, trap: PortSend) -> None:
        self.ports.send(task, trap.port, trap.link, trap.data)

    def _port_close(self, task: Task, trap: PortClose) -> None:
        self.ports.close(task, trap.port, trap.link)

    def _port_dial(self, task: Task, trap: PortDial) -> LinkId:
        return self.ports.dial(task, trap.port)

    def _port_peer(self, task: Task, trap: PortPeer) -> PeerIdentity:
        return self.ports.peer_of(task, trap.port, trap.link)

    # devices and secrets

    def _bus_scan(self, task: Task, trap: BusScan) -> tuple[BusEntry, ...]:  # noqa: ARG002
        self._require_root(task)
        return self.bus.scan()

    def _device_query(self, task: Task, trap: DeviceQuery) -> DeviceInfo:
        return self.bus.query(task, trap.slot)

    def _device_map(self, task: Task, trap: DeviceMap) -> Window:
        return self.bus.map_window(task, trap.slot, trap.offset, execute=trap.execute)

    def _device_dma(self, task: Task, trap: DeviceDma) -> DmaArea:
        return self.bus.dma(task, trap.slot)

    def _block(self, task: Task, trap: BlockRead | BlockWrite | BlockFlush) -> Blocked:
        return self.bus.block(task, trap)

    def _entropy_draw(self, task: Task, trap: EntropyDraw) -> bytes:
        return self.bus.entropy(task, trap.slot, trap.size)

    def _secret_query(self, task: Task, trap: SecretQuery) -> SecretBackend:  # noqa: ARG002
        return task.secret

    def _secret_read(self, task: Task, trap: SecretRead) -> bytes:  # noqa: ARG002
        return self.secrets.read(task)

    def _secret_replace(self, task: Task, trap: SecretReplace) -> None:
        self.secrets.replace(task, trap.data, full=self.disk_full)

    def _note(self, task: Task, code: int, detail: int) -> None:
        self.event_log.records += (self.clock.now, task.tag | code, detail)

    # ---- evidence from outside the system

    def heap_audit(self) -> tuple[int, int]:
        """What the heap says is used, and the sum over every live object."""
        return self.heap.account.used, self.heap.audit(list(self.tasks.values()))

    def resources(self) -> dict[str, int]:
        """What is in use in the whole system: all of it comes back."""
        tasks = [task for task in self.tasks.values() if task.state != DEAD]
        links = [link for task in tasks for link in task.links.values()]
        return {
            "tasks": len(tasks),
            "unreaped": len(self.tasks) - len(tasks),
            "slots": sum(task.table.used for task in tasks),
            "endpoints": self.ipc.endpoints_alive,
            "links": len(links),
            "connections": self.ports.connections,
            "devices": self.bus.held,
            "queued": sum(len(link.queue) for link in links),
            "queued_size": sum(link.queued_size for link in links),
            "reserved_size": self.shares.size.used,
            "reserved_endpoints": self.shares.endpoints.used,
            "vmo_size": sum(self.heap.vmo_size(task) for task in tasks),
            "heap_used": self.heap.account.used,
        }

    def stats(self) -> dict[str, int]:
        """What the kernel has counted in this run."""
        smp = self.scheduler.smp
        return {
            "spawns": self.spawns,
            "exits": self.exits,
            "links": self.ipc.serial,
            "events": self.events,
            "overflowed": self.scheduler.overflowed,
            "picks": sum(cpu.picks for cpu in smp),
            "steals": sum(cpu.steals for cpu in smp),
            "aged": sum(cpu.aged for cpu in smp),
            "resched_requests": sum(cpu.requests for cpu in smp),
            "resched_sent": sum(cpu.sent for cpu in smp),
            "resched_taken": sum(cpu.taken for cpu in smp),
            "resched_acknowledged": sum(cpu.acknowledged for cpu in smp),
            "heap_refused": self.heap.account.refused_count,
        }


def _first_resume(_task: Task) -> None:
    return None


def _ended(*_: object) -> NoReturn:
    raise AssertionError("the task has ended")

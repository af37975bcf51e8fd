"""Where a fault plan takes hold of a kernel: handlers are wrapped, wake-ups are put off.

A kernel without a plan is built from the plain parts and runs none of this.
"""

from functools import partial
from typing import TYPE_CHECKING, Any, Final

from nexus.abi import (
    MESSAGE_SIZE_MAX,
    NEVER,
    NO_WAIT,
    AbiError,
    Call,
    EventKind,
    Nanos,
    Pid,
    ReplyRecv,
    Send,
    Slot,
    Spawn,
    SpawnReason,
    Status,
    Trap,
)
from nexus.kernel.core import MESSAGE_SIZE, SpawnRefused
from nexus.kernel.sim.clock import Clock
from nexus.kernel.sim.faults import (
    DELIVERY_DELAY_MAX,
    FAILURES,
    SLOW_FACTOR,
    TIMER_DELAY_MAX,
    WAKE_DELAY_MAX,
    FaultPoint,
    Faults,
    Freeze,
)
from nexus.kernel.sim.heap import Heap
from nexus.kernel.sim.ipc import Ipc, OnLink, OnRefused
from nexus.kernel.sim.log import EventLog
from nexus.kernel.sim.objects import (
    BLOCKED,
    PUT_OFF,
    WAIT_SEND,
    WAIT_TIME,
    Blocked,
    Link,
    Task,
)
from nexus.kernel.sim.sched import Cpu, Scheduler

if TYPE_CHECKING:
    from nexus.kernel.sim.kernel import Handler, SimKernel

SIGKILL: Final = 9
_FAILING_POINTS: Final = (
    (FaultPoint.QUEUE_FULL, Status.QUEUE_FULL),
    (FaultPoint.NO_SPACE, Status.NO_SPACE),
    (FaultPoint.TIMED_OUT, Status.TIMED_OUT),
)


class FaultyScheduler(Scheduler):
    """A scheduler whose wake-ups may come late and whose signals may be lost."""

    __slots__ = ("faults",)

    def __init__(self, cpu_count: int, clock: Clock, event_log: EventLog, faults: Faults) -> None:
        super().__init__(cpu_count, clock, event_log)
        self.faults = faults

    def ready(self, task: Task) -> None:
        """Put a task into its run queue, now or a bounded while later."""
        if not self.faults.fires(FaultPoint.LATE_WAKE, self.clock.now):
            super().ready(task)
            return
        task.state = PUT_OFF
        later = Nanos(self.clock.now + self.faults.amount(WAKE_DELAY_MAX))
        self.clock.call(later, lambda: self._ready_late(task))

    def _ready_late(self, task: Task) -> None:
        if task.state == PUT_OFF:
            super().ready(task)

    def send_signal(self, cpu: Cpu) -> bool:
        """Send the interrupt, unless it gets lost."""
        if self.faults.fires(FaultPoint.LOST_SIGNAL, self.clock.now):
            return False
        return super().send_signal(cpu)


class FaultyIpc(Ipc):
    """Links whose messages may be seen late, and a place where a stamp can be forged."""

    __slots__ = ("faults",)

    def __init__(
        self,
        clock: Clock,
        scheduler: Scheduler,
        heap: Heap,
        event_log: EventLog,
        *,
        on_link: OnLink,
        on_refused: OnRefused,
        faults: Faults,
    ) -> None:
        super().__init__(clock, scheduler, heap, event_log, on_link=on_link, on_refused=on_refused)
        self.faults = faults

    def send(
        self, task: Task, slot: Slot, data: bytes | bytearray, move: Slot | None = None
    ) -> None:
        """Queue one message, and behind it the copies that the plan forges."""
        held = task.entries.get(slot)
        super().send(task, slot, data, move)
        if self.faults.plan.forge and held is not None and isinstance(held.object, Link):
            link = held.object
            for pid in self.faults.forged_pids(task.name, link.endpoint.owner.name):
                self._forge(link, bytes(data), pid)

    def _forge(self, link: Link, data: bytes, pid: Pid) -> None:
        charge = MESSAGE_SIZE + len(data)
        if self.room(link, len(data)) is None and charge <= self.account.free:
            self.account.used += charge
            link.queue.append((data, pid, None))
            link.queued_size += len(data)
            self.deliver(link)

    def deliver(self, link: Link) -> None:
        """Make a queued message seen, now or a bounded while later; order is kept."""
        if link.delayed:
            return
        if not self.faults.fires(FaultPoint.LATE_DELIVERY, self.clock.now):
            super().deliver(link)
            return
        link.delayed = True
        later = Nanos(self.clock.now + self.faults.amount(DELIVERY_DELAY_MAX))
        self.clock.call(later, lambda: self._deliver_late(link))

    def _deliver_late(self, link: Link) -> None:
        link.delayed = False
        if link.endpoint.alive and (link.queue or link.closed):
            super().deliver(link)


class Injector:
    """A plan over the traps of one kernel."""

    def __init__(self, kernel: "SimKernel", faults: Faults) -> None:
        self._kernel = kernel
        self._faults = faults

    def wire(self) -> None:
        """Wrap every trap's handler, the resume cost and the timers of the kernel."""
        handlers = self._kernel.handlers
        for trap, (handler, code) in list(handlers.items()):
            handlers[trap] = (self._wrapped(trap, handler), code)
        for freeze in self._faults.plan.freeze:
            time = Nanos(self._kernel.now + freeze.after)
            self._kernel.at(time, partial(self._freeze, freeze))
        self._kernel.cost = self._cost
        self._kernel.clock.late = self._lateness

    def _wrapped(self, kind: type[Trap[Any]], handler: "Handler") -> "Handler":
        def handle(task: Task, trap: Any) -> Any:
            status = self._failure(kind, task, trap)
            if status is not None:
                return self._fail(task, trap, status)
            if self._killed(task):
                return BLOCKED
            return handler(task, trap)

        return handle

    def _failure(self, kind: type[Trap[Any]], task: Task, trap: Any) -> Status | None:
        faults = self._faults
        now = self._kernel.clock.now
        if not _may_fail(kind, trap):
            return None
        root = task is self._kernel.root
        if faults.plan.nth:
            status = faults.nth_failure(kind, task.name, now, root=root)
            if status is not None:
                self._told(FaultPoint.NTH, task, kind, status)
                return status
        if root or faults.spares(task.name):
            return None
        allowed = FAILURES.get(kind, ())
        for point, status in _FAILING_POINTS:
            if status not in allowed or (status is Status.TIMED_OUT and not _has_time(trap)):
                continue
            if faults.fires(point, now):
                self._told(point, task, kind, status)
                return status
        return None

    def _killed(self, task: Task) -> bool:
        kernel = self._kernel
        if task is kernel.root or self._faults.spares(task.name):
            return False
        if not self._faults.fires(FaultPoint.KILL, kernel.clock.now):
            return False
        self._told(FaultPoint.KILL, task, type(task.trap), None)
        kernel.end(task, 0, SIGKILL)
        return True

    def _freeze(self, freeze: Freeze) -> None:
        kernel, faults = self._kernel, self._faults
        now = kernel.clock.now
        task = kernel.living(freeze.task)
        if not faults.freezes(now) or task is None:
            return
        faults.fired[FaultPoint.FREEZE] += 1
        self._told(FaultPoint.FREEZE, task, None, None)
        _ = kernel.freeze(freeze.task, Nanos(now + freeze.span))

    def _fail(self, task: Task, trap: Any, status: Status) -> Any:
        ipc = self._kernel.ipc
        if isinstance(trap, ReplyRecv):
            # A refused send does not refuse this trap: it goes on to receive.
            trap.reply_status = int(status)
            ipc.listen(task, trap.sources, None, MESSAGE_SIZE_MAX)
            task.deadline = trap.deadline
            return ipc.receive(task)
        if isinstance(trap, Call):
            trap.sent = False
            if status is Status.TIMED_OUT:
                ipc.listen(task, (trap.inbox,), trap.link, MESSAGE_SIZE_MAX)
                ipc.send(task, trap.slot, trap.data)
                trap.sent = True
        if status is Status.TIMED_OUT and _has_time(trap):
            task.deadline = trap.deadline
            return self._deaf(task)
        if isinstance(trap, Spawn):
            refusal = SpawnRefused(SpawnReason.OOM, "injected")
            raise self._kernel.spawn_failed(task, trap.spec, refusal)
        raise AbiError(status, "injected")

    def _deaf(self, task: Task) -> Blocked:
        # Nothing but the deadline, or the end of the endpoint a send waits for, ends this wait.
        kernel = self._kernel
        trap = task.trap
        if isinstance(trap, Send):
            held = task.table.get(trap.slot)
            if isinstance(held.object, Link):
                if not held.object.endpoint.alive:
                    raise AbiError(Status.NO_SUCH_ENDPOINT, "the endpoint is closed")
                held.object.waiter = task
                task.wait_link = held.object
        if task.deadline <= kernel.clock.now:
            if task.wait_link is not None:
                task.wait_link.waiter = None
                task.wait_link = None
            task.timeouts += 1
            raise AbiError(Status.TIMED_OUT, "injected")
        task.state = WAIT_SEND if task.wait_link is not None else WAIT_TIME
        task.resume = self._deaf
        kernel.clock.arm(task)
        return BLOCKED

    def _cost(self, task: Task, cost: int) -> int:
        if self._faults.fires(FaultPoint.SLOW_CPU, self._kernel.clock.now):
            self._told(FaultPoint.SLOW_CPU, task, None, None)
            return cost * SLOW_FACTOR
        return cost

    def _lateness(self) -> int:
        if self._faults.fires(FaultPoint.LATE_TIMER, self._kernel.clock.now):
            return self._faults.amount(TIMER_DELAY_MAX)
        return 0

    def _told(
        self, point: FaultPoint, task: Task, kind: type[Any] | None, status: Status | None
    ) -> None:
        fields: dict[str, object] = {
            "point": point.value,
            "count": self._faults.fired[point],
            "name": task.name,
        }
        if kind is not None:
            fields["trap"] = kind.__name__
        if status is not None:
            fields["status"] = status.name
        self._kernel.record(EventKind.FAULT, task.pid, fields)


def _may_fail(kind: type[Trap[Any]], trap: Any) -> bool:
    # Without a reply there is nothing in a ReplyRecv that its docstring lets a queue refuse.
    return kind is not ReplyRecv or trap.slot is not None


def _has_time(trap: Any) -> bool:
    deadline = getattr(trap, "deadline", NO_WAIT)
    return deadline not in (NO_WAIT, NEVER)

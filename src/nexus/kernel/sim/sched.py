"""Who runs where: run queues per CPU, classes with aging, bounded stealing, resched requests.

Strict priority between the classes, first in first out inside one, with one exception: a class
whose first task has waited for AGING_BOUND is served next. Tasks are not preempted; at a trap a
task that has had its slice goes to the end of its queue.
"""

from collections import deque
from typing import Final

from nexus.abi import NEVER, AbiError, Nanos, QosClass, Status
from nexus.kernel.sim import log
from nexus.kernel.sim.clock import Clock
from nexus.kernel.sim.log import EventLog
from nexus.kernel.sim.objects import CLASS_COUNT, PUT_OFF, READY, RUNNING, Task

CPUS_MAX: Final = 4
QUEUE_COUNT_MAX: Final = 64  # tasks per class and CPU (core.md 1.1)
SLICE: Final = Nanos(1_000_000)  # 1 ms (core.md 1.1)
TICK: Final = Nanos(1_000_000)  # a CPU looks for work by itself that often if a signal is lost
AGING_BOUND: Final = Nanos(50_000_000)  # 50 ms; a class waits no longer behind higher ones
SIGNAL_DELAY: Final = Nanos(1_000)  # 1 us, an inter-processor interrupt on a small machine
STEAL_COUNT_MAX: Final = 1  # tasks per tick (core.md 1.3)
IDLE: Final = NEVER  # a CPU's next event when it has nothing to do

_HIGHEST: Final = tuple(bits.bit_length() - 1 for bits in range(1 << CLASS_COUNT))

assert AGING_BOUND > SLICE, "aging is the exception"


class Cpu:
    """One CPU: what it runs, what waits for it, and its counters."""

    __slots__ = (
        "acknowledged",
        "aged",
        "at",
        "force_send_fail",
        "index",
        "mask",
        "online",
        "overflow",
        "pending",
        "picks",
        "queues",
        "requests",
        "sent",
        "signal",
        "slice_end",
        "steal_limit",
        "steals",
        "tag",
        "taken",
        "task",
        "tasks",
        "ticks",
    )

    def __init__(self, index: int) -> None:
        self.index = index
        self.tag = index << 8  # the CPU where log records carry it
        self.online = False
        self.at: Nanos = IDLE  # when its current resume ends, or when it looks for work
        self.task: Task | None = None
        self.slice_end: Nanos = Nanos(0)
        self.queues: tuple[deque[Task], ...] = tuple(deque() for _ in range(CLASS_COUNT))
        self.mask = 0  # bit n is set while queue n holds something
        self.overflow: deque[Task] = deque()  # woken while their queue was full
        self.tasks = 0  # live tasks that belong here
        self.steal_limit = QosClass.PERF_BURST  # the highest class it may steal
        # Resched requests: `pending` is a mailbox one deep, `signal` the interrupt itself.
        self.pending = False
        self.signal = False
        self.force_send_fail = False  # the counterfactual
        self.requests = self.sent = self.taken = self.acknowledged = 0
        self.ticks = self.picks = self.steals = self.aged = 0


class Scheduler:
    """The CPUs and the decisions between them."""

    __slots__ = ("clock", "cpus", "current", "event_log", "overflowed", "smp")

    def __init__(self, cpu_count: int, clock: Clock, event_log: EventLog) -> None:
        assert 1 <= cpu_count <= CPUS_MAX, f"1 to {CPUS_MAX} CPUs"
        self.clock = clock
        self.event_log = event_log
        self.cpus = tuple(Cpu(index) for index in range(CPUS_MAX))
        self.smp = self.cpus[:cpu_count]
        self.current: Cpu | None = None  # whose trap is being handled; None inside a timer
        self.overflowed = 0  # wake-ups that met a full queue, none of them lost

    # ---- coming up

    def start(self) -> None:
        """Let every CPU of the machine take its first tick, CPU 0 first."""
        for cpu in self.smp:
            cpu.at = Nanos(self.clock.now + cpu.index * SIGNAL_DELAY)

    def come_online(self, cpu: Cpu) -> None:
        """Set a CPU's bit; done by its own first tick."""
        cpu.online = True
        self.note(log.ONLINE, cpu, 0)

    def online_mask(self) -> int:
        """Bit n is set while CPU n is online."""
        return sum(1 << cpu.index for cpu in self.cpus if cpu.online)

    # ---- tasks become ready

    def ready(self, task: Task) -> None:
        """Put a task that was waiting into its run queue, and see that a CPU looks there.

        A full queue does not lose the task: it goes to the CPU's overflow list, which holds at
        most the tasks of the system and is looked at before each pick. A frozen task is held
        back until it thaws.
        """
        if task.frozen:
            task.state = PUT_OFF
            return
        cpu: Cpu = task.cpu
        task.state = READY
        task.queued_at = self.clock.now
        queue = cpu.queues[task.qos]
        if len(queue) < QUEUE_COUNT_MAX and not cpu.overflow:
            queue.append(task)
            cpu.mask |= 1 << task.qos
        else:
            cpu.overflow.append(task)
            self.overflowed += 1
            self.note(log.OVERFLOW, cpu, task.pid)
        if cpu.at == IDLE or len(self.smp) > 1:
            self._kick(cpu, task)

    def has_room(self, cpu: Cpu, qos: QosClass) -> bool:
        """Whether one more task of this class may queue on this CPU."""
        return len(cpu.queues[qos]) < QUEUE_COUNT_MAX

    def requeue(self, cpu: Cpu, task: Task) -> bool:
        """End a task's turn: to the tail of its queue. False if no other task waits here."""
        if not cpu.mask:
            return False
        task.state = READY
        task.queued_at = self.clock.now
        cpu.overflow.append(task)  # behind those that met a full queue before it
        self._drain(cpu)
        self.note(log.YIELD, cpu, task.pid)
        return True

    def remove(self, task: Task) -> None:
        """Take a task that has ended out of wherever it stands."""
        task.cpu.tasks -= 1
        self.take_off(task)

    def take_off(self, task: Task) -> None:
        """Take a task out of its run queue, or off its CPU."""
        cpu: Cpu = task.cpu
        if task.state == READY:
            queue = cpu.queues[task.qos]
            if task in queue:
                queue.remove(task)
                if not queue:
                    cpu.mask &= ~(1 << task.qos)
            elif task in cpu.overflow:
                cpu.overflow.remove(task)
        elif task.state == RUNNING and cpu.task is task:
            cpu.task = None

    def place(self, wanted: int | None) -> Cpu:
        """The CPU for a new task: the declared one, or the online one with fewest tasks.

        The declared one is known to exist.
        """
        if wanted is not None:
            return self.smp[wanted]
        return min(self.smp, key=lambda cpu: (not cpu.online, cpu.tasks, cpu.index))

    # ---- picking

    def tick(self, cpu: Cpu) -> Task | None:
        """One look of a CPU for work: the task to run, or None and the CPU is idle."""
        cpu.ticks += 1
        if not cpu.online:
            self.come_online(cpu)
        if cpu.signal:
            self.take_signal(cpu)
        elif cpu.pending:
            cpu.pending = False  # its signal was lost; this look for work is what it asked for
        if cpu.overflow:
            self._drain(cpu)
        mask = cpu.mask
        if not mask:
            task = self.steal(cpu) if len(self.smp) > 1 else None
            if task is None:
                cpu.at = IDLE
                return None
        else:
            qos = _HIGHEST[mask]
            if mask & (mask - 1):
                qos = self.aged(cpu, qos)
            queue = cpu.queues[qos]
            task = queue.popleft()
            if not queue:
                cpu.mask = mask & ~(1 << qos)
        cpu.picks += 1
        return task

    def aged(self, cpu: Cpu, qos: int) -> int:
        """The class to serve when several wait: the highest, or one that waited too long."""
        bound = self.clock.now - AGING_BOUND
        for lower in range(qos):
            queue = cpu.queues[lower]
            if queue and queue[0].queued_at <= bound:
                cpu.aged += 1
                return lower
        return qos

    def _drain(self, cpu: Cpu) -> None:
        # First come, first served among those that fit now.
        for _ in range(len(cpu.overflow)):
            task = cpu.overflow.popleft()
            if self.has_room(cpu, task.qos):
                cpu.queues[task.qos].append(task)
                cpu.mask |= 1 << task.qos
            else:
                cpu.overflow.append(task)

    # ---- stealing

    def steal(self, thief: Cpu) -> Task | None:
        """Move up to STEAL_COUNT_MAX tasks to an empty CPU; the first of them is returned."""
        stolen: Task | None = None
        for _ in range(STEAL_COUNT_MAX):
            task = self._steal_one(thief)
            if task is None:
                break
            if stolen is None:
                stolen = task
            else:
                thief.queues[task.qos].append(task)
                thief.mask |= 1 << task.qos
        return stolen

    def _steal_one(self, thief: Cpu) -> Task | None:
        for victim in self.smp:
            if victim is thief or not victim.mask or not victim.online:
                continue
            if victim.task is None:
                continue  # it is about to look for work itself: the task stays where it was
            for qos in range(CLASS_COUNT - 1, -1, -1):
                queue = victim.queues[qos]
                if not queue or not self.may_steal(thief, qos):
                    continue
                for index, task in enumerate(queue):
                    if not task.pinned:
                        del queue[index]
                        if not queue:
                            victim.mask &= ~(1 << qos)
                        self._moved(thief, victim, task)
                        return task
        return None

    def may_steal(self, thief: Cpu, qos: int) -> bool:
        """Whether a class is within the thief's limit."""
        return qos <= thief.steal_limit

    def _moved(self, thief: Cpu, victim: Cpu, task: Task) -> None:
        victim.tasks -= 1
        thief.tasks += 1
        task.cpu = thief
        thief.steals += 1
        self.note(log.STEAL, thief, task.pid)

    # ---- class changes

    def set_qos(self, task: Task, qos: QosClass) -> bool:
        """Change a task's class. False if it is queued and the target queue is full: then it
        stands at its exact old place with its old class."""
        cpu: Cpu = task.cpu
        source = cpu.queues[task.qos]
        if task.state != READY or qos == task.qos or task not in source:
            task.qos = qos  # running, waiting or in the overflow list: used when it queues
            return True
        index = source.index(task)
        del source[index]
        if not self.has_room(cpu, qos):
            self.put_back(source, index, task)
            return False
        if not source:
            cpu.mask &= ~(1 << task.qos)
        task.qos = qos
        cpu.queues[qos].append(task)
        cpu.mask |= 1 << qos
        return True

    def put_back(self, queue: deque[Task], index: int, task: Task) -> None:
        """Undo the removal of a task from its queue, at its exact old place."""
        queue.insert(index, task)

    # ---- resched requests

    def request_resched(self, index: int) -> None:
        """Ask a CPU to look for work: request, signal sent, signal taken, acknowledged.

        Refuses: InvalidArgument (no such CPU), Unsupported (not online); nothing is counted then.
        """
        if not self.in_range(index):
            raise AbiError(Status.INVALID_ARGUMENT, f"CPU {index} of {CPUS_MAX}")
        cpu = self.cpus[index]
        if not self.is_online(cpu):
            raise AbiError(Status.UNSUPPORTED, f"CPU {index} is not online")
        cpu.requests += 1
        cpu.pending = True
        self.note(log.RESCHED_REQUEST, cpu, cpu.requests)
        if not self.send_signal(cpu) and cpu.at == IDLE:
            # The request stays in the mailbox; the CPU's own next tick finds the work.
            cpu.at = Nanos((self.clock.now // TICK + 1) * TICK)

    def in_range(self, index: int) -> bool:
        """Whether a CPU of this number can exist."""
        return 0 <= index < CPUS_MAX

    def is_online(self, cpu: Cpu) -> bool:
        """Whether a CPU has come online."""
        return cpu.online

    def send_signal(self, cpu: Cpu) -> bool:
        """Send the interrupt; False if the send failed, and then nothing else happens."""
        if cpu.force_send_fail:
            return False
        cpu.sent += 1
        cpu.signal = True
        self.note(log.RESCHED_SENT, cpu, cpu.sent)
        if cpu.at == IDLE:
            cpu.at = Nanos(self.clock.now + SIGNAL_DELAY)
        return True

    def take_signal(self, cpu: Cpu) -> None:
        """The target's interrupt handler: count it, and acknowledge the request if there is one."""
        cpu.signal = False
        cpu.taken += 1
        self.note(log.RESCHED_TAKEN, cpu, cpu.taken)
        if cpu.pending:
            cpu.pending = False
            cpu.acknowledged += 1
            self.note(log.RESCHED_ACKNOWLEDGED, cpu, cpu.acknowledged)

    def _kick(self, home: Cpu, task: Task) -> None:
        current = self.current
        if home.at == IDLE:
            if current is None or current is home:
                home.at = self.clock.now  # its own timer, or its own trap: no signal is needed
            elif home.online and not home.pending:
                self.request_resched(home.index)
            return
        if task.pinned or home.task is None:
            return  # it must run there, or its CPU is about to look for work
        for cpu in self.smp:
            if cpu.at == IDLE and cpu.online and not cpu.pending:
                self.request_resched(cpu.index)
                return

    def note(self, code: int, cpu: Cpu, detail: int) -> None:
        """Log a scheduling decision about a CPU, with the CPU that took it as the pid's place."""
        by = self.current.index if self.current is not None else cpu.index
        self.event_log.records += (self.clock.now, by << 16 | cpu.tag | code, detail)

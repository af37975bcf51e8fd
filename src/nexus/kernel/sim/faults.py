"""Injected faults: a plan, what was reached, what fired. Nothing is wrapped without a plan."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from random import Random  # noqa: TID251 (handed in: the run's seeded stream of faults)
from typing import Any, Final

from nexus.abi import (
    NEVER,
    BlockFlush,
    BlockRead,
    BlockWrite,
    BootMemoryReplace,
    Call,
    CapClone,
    CapDerive,
    ConsoleWrite,
    EndpointCreate,
    EntropyDraw,
    LinkCreate,
    Nanos,
    Pid,
    PortSend,
    Recv,
    ReplyRecv,
    SecretRead,
    SecretReplace,
    Send,
    Spawn,
    Status,
    Trap,
    VmoCreate,
    Wait,
)

SLOW_FACTOR: Final = 20  # a resume on a slow CPU takes that much longer
WAKE_DELAY_MAX: Final = Nanos(2_000_000)  # 2 ms between a wake-up and the run queue
TIMER_DELAY_MAX: Final = Nanos(1_000_000)  # 1 ms; promise 4 of design.md section 3
DELIVERY_DELAY_MAX: Final = Nanos(5_000_000)  # 5 ms before a sent message can be received
DISK_DELAY_MAX: Final = Nanos(200_000_000)  # 200 ms; a worn flash chip that moves its blocks about
STUCK: Final = Nanos(60_000_000_000)  # a minute: no driver waits that long
CHANCE_ONE: Final = 1_000_000  # probabilities are given in parts of a million


class FaultPoint(StrEnum):
    """The named points."""

    NTH = "nth"  # a planned failure of the Nth occurrence of a trap
    FORGE = "forge"  # a copy of a message under a pid that is not the sender's
    QUEUE_FULL = "queue_full"
    NO_SPACE = "no_space"
    TIMED_OUT = "timed_out"  # a send with a deadline finds no room until it
    KILL = "kill"
    SLOW_CPU = "slow_cpu"
    LATE_WAKE = "late_wake"
    LATE_TIMER = "late_timer"
    LATE_DELIVERY = "late_delivery"
    FREEZE = "freeze"  # a task is stopped for a while, and goes on: SIGSTOP and SIGCONT
    LOST_SIGNAL = "lost_signal"  # a resched interrupt is not sent; the CPU's own tick finds it
    ENTROPY_SHORT = "entropy_short"  # fewer bytes than were asked for
    ENTROPY_NONE = "entropy_none"  # a request is answered with no bytes at all
    ENTROPY_CONSTANT = "entropy_constant"  # one byte, again and again
    ENTROPY_REPEAT = "entropy_repeat"  # the bytes of the request before
    BLOCK_ERROR = "block_error"  # a request fails, and nothing of it is done
    SLOW_DISK = "slow_disk"  # a request of a block device takes longer
    LOST_COMPLETION = "lost_completion"  # a request is done, and its driver is never told


DEVICE_POINTS: Final = frozenset(
    {
        FaultPoint.ENTROPY_SHORT,
        FaultPoint.ENTROPY_NONE,
        FaultPoint.ENTROPY_CONSTANT,
        FaultPoint.ENTROPY_REPEAT,
        FaultPoint.BLOCK_ERROR,
        FaultPoint.SLOW_DISK,
        FaultPoint.LOST_COMPLETION,
    }
)
"""The points that only a device of the bus reaches."""


FAILURES: Final[Mapping[type[Trap[Any]], tuple[Status, ...]]] = {
    EndpointCreate: (Status.NO_SPACE,),
    LinkCreate: (Status.NO_SPACE, Status.NO_SUCH_ENDPOINT),
    Send: (Status.QUEUE_FULL, Status.NO_SPACE, Status.TIMED_OUT, Status.NO_SUCH_ENDPOINT),
    Recv: (Status.NO_SPACE, Status.TIMED_OUT),
    Call: (Status.QUEUE_FULL, Status.NO_SPACE, Status.NO_SUCH_ENDPOINT, Status.TIMED_OUT),
    ReplyRecv: (Status.QUEUE_FULL, Status.NO_SPACE, Status.NO_SUCH_ENDPOINT),
    CapClone: (Status.NO_SPACE,),
    CapDerive: (Status.NO_SPACE,),
    VmoCreate: (Status.NO_SPACE,),
    Spawn: (Status.NO_SPACE,),
    Wait: (Status.TIMED_OUT, Status.QUEUE_EMPTY),
    ConsoleWrite: (Status.QUEUE_FULL,),
    BootMemoryReplace: (Status.NO_SPACE,),
    PortSend: (Status.QUEUE_FULL,),
    BlockRead: (Status.DEVICE_FAILED, Status.TIMED_OUT),
    BlockWrite: (Status.DEVICE_FAILED, Status.TIMED_OUT, Status.NO_SPACE),
    BlockFlush: (Status.DEVICE_FAILED, Status.TIMED_OUT),
    EntropyDraw: (Status.DEVICE_FAILED,),
    SecretRead: (Status.DEVICE_FAILED,),
    SecretReplace: (Status.DEVICE_FAILED, Status.NO_SPACE),
}
"""What an injected failure may answer, by trap: statuses its docstring names."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NthFailure:
    """The `nth` occurrence (from 1) of a trap by a task that is not the root fails.

    With `task` only traps of that name count, the root's too. `persistent`: all later ones fail.
    """

    trap: type[Trap[Any]]
    nth: int
    status: Status
    task: str | None = None
    persistent: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Forge:
    """Behind the `nth` message a task sends, the kernel queues a copy stamped with `pid`.

    With `receiver` only messages into that task's endpoints count.
    """

    task: str
    nth: int
    pid: Pid
    receiver: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Freeze:
    """The task of this name is stopped `after` the start of the run, in ns, for `span` ns.

    Nothing happens if no such task lives then.
    """

    task: str
    after: Nanos
    span: Nanos


@dataclass(frozen=True, kw_only=True, slots=True)
class NthRequest:
    """The `nth` request (from 1) that a device takes up suffers a fault of DEVICE_POINTS.

    Flushes are requests; those of the other kind of device do not count. `persistent`: so do all
    later ones. `span` is by how much a slow disk is slower.
    """

    device: str
    point: FaultPoint
    nth: int
    persistent: bool = False
    span: Nanos = STUCK


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What may go wrong in a run.

    `chances` are parts of a million per reach of a point; `tasks` limits kills and trap failures
    to these names. After `stop_at` (kernel clock) nothing fires. `span` counts it from the start
    of the run instead, since the clock starts at a seeded time.
    """

    nth: tuple[NthFailure, ...] = ()
    forge: tuple[Forge, ...] = ()
    freeze: tuple[Freeze, ...] = ()
    requests: tuple[NthRequest, ...] = ()
    chances: Mapping[FaultPoint, int] = field(default_factory=dict)
    tasks: frozenset[str] | None = None
    stop_at: Nanos = NEVER
    span: Nanos | None = None


class Faults:
    """A plan at work: one object per run."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.reached: dict[FaultPoint, int] = dict.fromkeys(FaultPoint, 0)
        self.fired: dict[FaultPoint, int] = dict.fromkeys(FaultPoint, 0)
        self.stop_at = plan.stop_at
        self.paused = False  # while the kernel's self tests run
        self._source: Random | None = None
        self._occurred = [0] * len(plan.nth)
        self._sent = [0] * len(plan.forge)
        self._taken_up = [0] * len(plan.requests)

    def begin(self, source: Random, start: Nanos) -> None:
        """Take the run's stream of choices and the clock it starts at."""
        assert self._source is None, "a Faults object serves one run"
        self._source = source
        if self.plan.span is not None:
            self.stop_at = Nanos(min(self.stop_at, start + self.plan.span))

    def fires(self, point: FaultPoint, now: Nanos) -> bool:
        """Whether a fault fires here and now. Counts the reach, and the firing."""
        chance = self.plan.chances.get(point, 0)
        if not chance or self.paused:
            return False
        self.reached[point] += 1
        assert self._source is not None, "begin() comes first"
        if now >= self.stop_at or self._source.randrange(CHANCE_ONE) >= chance:
            return False
        self.fired[point] += 1
        return True

    def spares(self, name: str) -> bool:
        """Whether a task is outside the plan for kills and trap failures."""
        return self.plan.tasks is not None and name not in self.plan.tasks

    def amount(self, bound: int) -> int:
        """A seeded size of a fault, 1 to `bound`."""
        assert self._source is not None, "begin() comes first"
        return self._source.randrange(1, bound + 1)

    def nth_failure(
        self, trap: type[Trap[Any]], name: str, now: Nanos, *, root: bool
    ) -> Status | None:
        """The planned status for this occurrence of a trap, None if it may go on."""
        answer: Status | None = None
        if self.paused:
            return answer
        for index, failure in enumerate(self.plan.nth):
            counts = name == failure.task if failure.task is not None else not root
            if failure.trap is not trap or not counts:
                continue
            self.reached[FaultPoint.NTH] += 1
            self._occurred[index] += 1
            occurred = self._occurred[index]
            due = occurred == failure.nth or (failure.persistent and occurred > failure.nth)
            if due and now < self.stop_at and answer is None:
                self.fired[FaultPoint.NTH] += 1
                answer = failure.status
        return answer

    def occurrences(self, index: int) -> int:
        """How often the trap of the plan's `index`-th NthFailure has occurred."""
        return self._occurred[index]

    def forged_pids(self, name: str, receiver: str) -> list[Pid]:
        """The pids under which a copy of this message is to be queued behind it."""
        pids: list[Pid] = []
        if self.paused:
            return pids
        for index, forge in enumerate(self.plan.forge):
            if name != forge.task or forge.receiver not in (None, receiver):
                continue
            self.reached[FaultPoint.FORGE] += 1
            self._sent[index] += 1
            if self._sent[index] == forge.nth:
                self.fired[FaultPoint.FORGE] += 1
                pids.append(forge.pid)
        return pids

    def of_request(
        self, device: str, points: Collection[FaultPoint], now: Nanos
    ) -> dict[FaultPoint, Nanos]:
        """What goes wrong with the request that a device takes up now, and by how much.

        `points` are those that this kind of request reaches.
        """
        found: dict[FaultPoint, Nanos] = {}
        if self.paused:
            return found
        for index, planned in enumerate(self.plan.requests):
            if planned.device != device or planned.point not in points:
                continue
            self.reached[planned.point] += 1
            self._taken_up[index] += 1
            count = self._taken_up[index]
            due = count == planned.nth or (planned.persistent and count > planned.nth)
            if due and now < self.stop_at:
                self.fired[planned.point] += 1
                found[planned.point] = planned.span
        for point in sorted(points):
            if point not in found and self.fires(point, now):
                slow = point is FaultPoint.SLOW_DISK
                found[point] = Nanos(self.amount(DISK_DELAY_MAX) if slow else 0)
        return found

    def freezes(self, now: Nanos) -> bool:
        """Whether a planned freeze may happen now. Counts the reach."""
        self.reached[FaultPoint.FREEZE] += 1
        return now < self.stop_at

    def counts(self) -> dict[str, tuple[int, int]]:
        """Per point how often it was reached and how often it fired."""
        return {point.value: (self.reached[point], self.fired[point]) for point in FaultPoint}

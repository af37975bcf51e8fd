"""The virtual clock and the timers that move it."""

from collections.abc import Callable
from heapq import heapify, heappop, heappush
from typing import Final

from nexus.abi import NEVER, Nanos
from nexus.kernel.sim.objects import DEAD, FIRST_WAIT, LAST_WAIT, Task

TIMERS_SLACK: Final = 1_024  # stale entries tolerated before the heap is rebuilt
WALL_START: Final = 1_767_225_600_000_000_000  # ns since 1970: 2026-01-01, a run's first boot
BOOT_GAP: Final = Nanos(1_000_000_000)  # ns from the end of a boot to the start of the next

Expiry = tuple[Nanos, int, "Task | Callable[[], None]"]


class Clock:
    """Virtual time in `now`, and a heap of what falls due.

    A task has one deadline at a time and usually one entry, which may stand earlier than the
    deadline: when it comes up it is entered again. So a wait that ends by a message costs no
    work here. Entries that no longer count are skipped, and swept out when they pile up.
    """

    __slots__ = ("_sequence", "late", "now", "timers", "wake")

    def __init__(self, start: Nanos, wake: Callable[[Task], None]) -> None:
        self.now = start
        self.wake = wake
        self.timers: list[Expiry] = []
        self.late: Callable[[], int] | None = None  # an injected lateness, ns; None without faults
        self._sequence = 0

    def arm(self, task: Task) -> None:
        """Make sure that the task is looked at when its deadline has come."""
        if task.deadline < task.timer_at:
            task.timer_at = task.deadline
            self.call(task.deadline, task)

    def call(self, at: Nanos, what: "Task | Callable[[], None]") -> None:
        """Enter something that falls due."""
        self._sequence += 1
        heappush(self.timers, (at, self._sequence, what))
        if len(self.timers) > TIMERS_SLACK:
            self._sweep()

    def fire(self) -> None:
        """Move the clock to the earliest entry and do what is due."""
        at, _, what = heappop(self.timers)
        if at > self.now:
            self.now = at
        if isinstance(what, Task):
            if what.timer_at == at:
                what.timer_at = NEVER
                if FIRST_WAIT <= what.state <= LAST_WAIT:
                    self.expire(what)
        else:
            what()

    def expire(self, task: Task) -> None:
        """Wake a waiting task if its deadline has come, whatever else runs or waits."""
        if task.deadline > self.now:
            self.arm(task)
            return
        lateness = self.late() if self.late is not None else 0
        if lateness:
            self.call(Nanos(self.now + lateness), lambda: self._expire_late(task))
        else:
            self.wake(task)

    def _expire_late(self, task: Task) -> None:
        if FIRST_WAIT <= task.state <= LAST_WAIT:
            if task.deadline <= self.now:
                self.wake(task)
            else:
                self.arm(task)

    def _sweep(self) -> None:
        # Deterministic: depends on the heap alone. Keeps order, as sequence numbers stay.
        kept = [entry for entry in self.timers if _counts(entry)]
        if 2 * len(kept) <= len(self.timers):
            self.timers[:] = kept
            heapify(self.timers)


class MappedClock:
    """The clocks as a task reads them without a trap."""

    __slots__ = ("_clock", "_wall_ahead")

    def __init__(self, clock: Clock, wall_start: int) -> None:
        self._clock = clock
        self._wall_ahead = wall_start - clock.now  # nanoseconds

    def monotonic(self) -> Nanos:
        """Virtual time."""
        return self._clock.now

    def wall(self) -> int:
        """Virtual time, on from what the machine's clock said at the start."""
        return self._clock.now + self._wall_ahead


def _counts(entry: Expiry) -> bool:
    at, _, what = entry
    return not isinstance(what, Task) or (what.timer_at == at and what.state != DEAD)

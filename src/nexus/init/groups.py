"""What follows an unexpected end: back-off, who is restarted with it, and when it is too often.

end -- within the group's intensity --> the others of its strategy are stopped in order,
    |                                   then all are due after the back-off, in start order
    -- more often than that ---------> give up, safe mode or shut down, as the plan says
"""

from collections import deque
from typing import TYPE_CHECKING, Final

from nexus.abi import Nanos
from nexus.init.plan import PlannedGroup
from nexus.init.reasons import UNCOUNTED, Reason
from nexus.init.record import Record
from nexus.init.system import Exceeded, Strategy
from nexus.protocols.init import TaskState

if TYPE_CHECKING:
    from nexus.init.supervisor import Supervisor

NO_DELAY: Final = Nanos(0)  # the next back-off is the declared one


class Group:
    """One group of the plan: its ends of late, and the members that are restarted just now."""

    def __init__(self, planned: PlannedGroup) -> None:
        self.planned = planned
        self._ends: deque[Nanos] = deque(maxlen=planned.restarts + 1)
        self.restarting: set[str] = set()
        self.due: Nanos | None = None  # when those that are restarted together may start

    def is_exceeded_by(self, now: Nanos) -> bool:
        """Count an end; whether more than `restarts` lie within `within` now."""
        self._ends.append(now)
        oldest = self._ends[0]
        full = len(self._ends) > self.planned.restarts
        return full and now - oldest <= self.planned.within

    def forget(self) -> None:
        """Nothing has ended yet."""
        self._ends.clear()

    def affected(self, name: str) -> tuple[str, ...]:
        """Who is restarted when `name` ends, itself included, in the order of start."""
        members = self.planned.members
        match self.planned.strategy:
            case Strategy.ONE:
                return (name,)
            case Strategy.ALL:
                return members
            case Strategy.REST:
                return members[members.index(name) :]


class Groups:
    """Every group of the plan, and the rules for the ends of their members."""

    def __init__(self, init: "Supervisor") -> None:
        self._init = init
        self._groups = [Group(planned) for planned in init.plan.groups]
        self._by_member = {name: group for group in self._groups for name in group.planned.members}

    async def on_end(self, record: Record) -> None:
        """An instance ended and nobody was stopping it: restart it, or do what is declared."""
        group = self._by_member[record.name]
        record.restarts += 1
        if record.reason in UNCOUNTED:
            delay = record.planned.backoff
        else:
            delay = self._next_delay(record, Nanos(record.died - record.started))
            if group.is_exceeded_by(self._init.now):
                await self._on_exceeded(group, record)
                return
        record.state = TaskState.BACKING_OFF
        due = self._init.restart_time(record, delay)
        others = self._others(group, record)
        if not others and not group.restarting:
            record.due = due
            return
        group.restarting |= {record.name, *(other.name for other in others)}
        group.due = due if group.due is None else max(due, group.due)
        record.due = None
        self._init.stops.begin(others, TaskState.BACKING_OFF, Reason.GROUP)

    async def on_no_start(self, record: Record, reason: Reason) -> None:
        """A start failed: tried again as after an end; nobody else is restarted for it.

        One that policyd did not decide says nothing against the service and is not counted.
        """
        record.reason = reason
        if await self._init.launches.on_no_start(record):
            return
        delay = self._next_delay(record, NO_DELAY)
        group = self._by_member[record.name]
        if reason is Reason.SPAWN and group.is_exceeded_by(self._init.now):
            await self._on_exceeded(group, record)
            return
        record.state = TaskState.BACKING_OFF
        record.due = self._init.restart_time(record, delay)

    def _next_delay(self, record: Record, lived: Nanos) -> Nanos:
        """The back-off doubles from end to end, and begins anew after a long enough life."""
        planned = record.planned
        if record.delay == NO_DELAY or lived >= planned.backoff_reset:
            record.delay = planned.backoff
        else:
            record.delay = Nanos(min(2 * record.delay, planned.backoff_max))
        return record.delay

    def _others(self, group: Group, record: Record) -> list[Record]:
        """Who else is restarted; not who is given up or left out."""
        names = group.affected(record.name)
        records = [self._init.records[name] for name in names if name != record.name]
        return [other for other in records if not other.is_out]

    async def _on_exceeded(self, group: Group, record: Record) -> None:
        """The group ended too often: what its plan says then."""
        planned = group.planned
        why = (
            f"{record.name}: more than {planned.restarts} restarts of its group "
            f"within {planned.within // 1_000_000} ms, the last for: {record.reason}"
        )
        if await self._init.trial.on_exceeded(record, why):
            record.state = TaskState.FAILED  # the system goes down for it, whatever is declared
            self._init.dirty.append(record.name)
            return
        await self._init.memory.on_exceeded(why)
        if planned.exceeded is Exceeded.SHUT_DOWN:
            record.state = TaskState.FAILED
            self._init.dirty.append(record.name)
            await self._init.say(f"init: gave up on {record.name}", why=why)
            self._init.shut_down()
        elif planned.exceeded is Exceeded.SAFE_MODE and not self._init.is_safe:
            record.state = TaskState.BACKING_OFF
            record.due = self._init.restart_time(record, record.planned.backoff_max)
            group.forget()
            await self._init.enter_safe_mode(why)
        else:  # also in safe mode, which nothing is left to fall back to
            await self._give_up(group, record, why)

    async def _give_up(self, group: Group, record: Record, why: str) -> None:
        """The service is not started again, nor those that are never without it."""
        others = self._others(group, record)
        record.state = TaskState.FAILED
        record.due = None
        self._init.stops.begin(others, TaskState.FAILED, Reason.GROUP)
        for each in (record, *others):
            group.restarting.discard(each.name)
            self._init.dirty.append(each.name)
            await self._init.say(f"init: gave up on {each.name}", why=why)

    def forget(self) -> None:
        """Safe mode is left: every group begins anew."""
        for group in self._groups:
            group.forget()

    def on_time(self) -> None:
        """Make those due that are restarted together, once all of them have ended."""
        for group in self._groups:
            if group.due is None:
                continue
            records = [self._init.records[name] for name in group.restarting]
            members = [each for each in records if not each.is_out]  # nobody waits for those
            if any(each.lives or self._init.stops.is_stopping(each) for each in members):
                continue
            for each in members:
                if each.state is TaskState.BACKING_OFF:
                    each.due = group.due
            group.restarting.clear()
            group.due = None

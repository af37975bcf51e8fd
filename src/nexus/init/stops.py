"""Ends in order: a set of services is asked to stop, and killed if they do not.

    wanted --nobody of the set needs it any more--> asked (Stop) --stop_max--> killed
           \\------------------------------------- hurry ------------------------/
    killed --KILL_MAX--> given up, said; anything --exit--> the state it was wanted in

A service is asked when everybody in the set that uses it, or starts in a later stage, has ended.
Those that have nothing to do with each other end at the same time.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from nexus.abi import Nanos
from nexus.init.reasons import Reason
from nexus.init.record import Record
from nexus.protocols.init import TaskState
from nexus.protocols.meta import Stop

if TYPE_CHECKING:
    from nexus.init.supervisor import Supervisor

KILL_MAX: Final = Nanos(2_000_000_000)  # ns; a killed task that is still there is given up
SHUTDOWN_MAX: Final = Nanos(20_000_000_000)  # ns; from its begin until everybody left is killed


@dataclass(slots=True)
class Wanted:
    """A service that is to end: what it is then, why, and until when the present step may take."""

    record: Record
    state: TaskState
    reason: Reason
    due: Nanos | None = None  # None: not asked yet
    killed: bool = False


class Stops:
    """Every service that is being stopped."""

    def __init__(self, init: "Supervisor") -> None:
        self._init = init
        self._wanted: dict[str, Wanted] = {}
        self._hurry: Nanos | None = None  # from this time on everybody is killed at once
        self._hurry_reason = Reason.STOP

    def __len__(self) -> int:
        return len(self._wanted)

    def is_stopping(self, record: Record) -> bool:
        """Whether it is to end, or its end is still to be seen to."""
        return record.name in self._wanted

    def of(self, record: Record) -> Wanted | None:
        """What a service that has just ended was to become."""
        return self._wanted.get(record.name)

    def begin(self, records: Iterable[Record], state: TaskState, reason: Reason) -> None:
        """Stop these; one that is being stopped already ends in the new state."""
        for record in records:
            former = self._wanted.get(record.name)
            if former is None:
                self._wanted[record.name] = Wanted(record, state, reason)
            else:
                former.state, former.reason = state, reason
            record.due = None
            record.probe_again = None
            self._init.grants.cancel(record)

    def hurry(self, at: Nanos, reason: Reason) -> None:
        """Kill from `at` on whatever is left then."""
        if self._hurry is None or at < self._hurry:
            self._hurry, self._hurry_reason = at, reason

    async def advance(self) -> None:
        """Do what is due for each, the last started first."""
        for wanted in reversed(self._in_start_order()):
            if not wanted.record.lives:
                self._finish(wanted, wanted.state)
        for wanted in reversed(self._in_start_order()):
            await self._advance(wanted)

    async def _advance(self, wanted: Wanted) -> None:
        init, record = self._init, wanted.record
        hurry = self._hurry is not None and init.now >= self._hurry  # whoever is to blame
        if wanted.killed:
            if wanted.due is not None and init.hearing.until >= wanted.due:
                await self._on_not_ended(wanted)
        elif hurry:
            await self._kill(wanted, self._hurry_reason)
        elif wanted.due is None:
            if self._is_needed(record):
                return
            wanted.due = Nanos(init.now + record.planned.stop_max)
            if not await init.ask(record, Stop(), wanted.due, _nothing):
                await self._kill(wanted, Reason.STOP)
        elif init.hearing.until >= wanted.due:
            await self._kill(wanted, Reason.STOP)

    def _is_needed(self, record: Record) -> bool:
        """Whether somebody of the set that uses it, or was started in a later stage, lives."""
        return any(
            other.record.planned.stage > record.planned.stage
            or any(link.sync and link.server == record.name for link in other.record.planned.uses)
            for other in self._wanted.values()
            if other.record.lives
        )

    async def _kill(self, wanted: Wanted, reason: Reason) -> None:
        await self._init.kill(wanted.record, reason)
        wanted.killed = True
        wanted.due = Nanos(self._init.now + KILL_MAX)

    async def _on_not_ended(self, wanted: Wanted) -> None:
        """A killed task is still there: nothing more can be done, and nobody waits for it."""
        record = wanted.record
        self._init.dirty.append(record.name)
        await self._init.say(f"init: no end of {record.name}", pid=record.pid)
        stopped = wanted.state is TaskState.STOPPED
        self._finish(wanted, TaskState.STOPPED if stopped else TaskState.FAILED)

    def _finish(self, wanted: Wanted, state: TaskState) -> None:
        wanted.record.state = state
        wanted.record.due = None
        del self._wanted[wanted.record.name]

    def _in_start_order(self) -> list[Wanted]:
        found = (self._wanted.get(name) for name in self._init.records)
        return [wanted for wanted in found if wanted is not None]

    def next_time(self) -> Nanos | None:
        """When the first of them is due."""
        times = [wanted.due for wanted in self._wanted.values() if wanted.due is not None]
        if self._hurry is not None and any(not each.killed for each in self._wanted.values()):
            times.append(self._hurry)
        return min(times, default=None)


async def _nothing(_reply: Any, _nonce: int) -> None:
    """Stopping needs no reading: the exit is what counts."""

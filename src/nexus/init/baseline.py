"""What every task holds once the system is ready: the accounts that later ones are compared with.

Asked for a little after `init: ready`, when what was still on its way has arrived. Every wait
here ends: a service is probed, late, or gone, and then nobody waits for it.
"""

from typing import TYPE_CHECKING, Any, Final

from nexus.abi import Nanos, TaskCounters, TaskTable
from nexus.init.desk import SETTLE_TIME
from nexus.init.record import NO_ACCOUNT, Record
from nexus.log.logger import DISCOVERY_WAIT, LOOK_PAUSE, LOOK_PAUSE_MAX
from nexus.protocols.init import Account, Health
from nexus.protocols.meta import GetStatus, ServiceStatus

if TYPE_CHECKING:
    from nexus.init.supervisor import Supervisor

ROUNDS_MAX: Final = 120  # more rounds of questions, while something is on its way
ROUND_PAUSE: Final = Nanos(50_000_000)  # ns; all of them are 6 s
SEARCHES: Final = 6  # for logd, of a service that the others keep from being answered at once
BINDS: Final = "binds"  # the fact that says how many links a runtime answers on
OWN_BIND: Final = 1  # init's own
QUEUED: Final = TaskCounters._fields.index("queued")

assert (
    sum(DISCOVERY_WAIT + min(LOOK_PAUSE << count, LOOK_PAUSE_MAX) for count in range(SEARCHES))
    <= ROUNDS_MAX * ROUND_PAUSE
), "who looks for logd that often is waited for"


class Baseline:
    """The accounts at `init: ready`."""

    def __init__(self, init: "Supervisor") -> None:
        self._init = init
        self._due: Nanos | None = None
        self._open: set[str] | None = None  # whose account is awaited, once asked for
        self._rounds = 0  # of questions that were not the last
        self.is_taken = False
        self.own = NO_ACCOUNT
        self.tasks = 0

    async def on_time(self) -> None:
        """Once every service is probed, keep every account and answer who waits."""
        init = self._init
        if self.is_taken or init.ready_at is None:
            return
        if self._open is not None:
            if not self._open:
                await self._end_when_at_rest()
            return
        waiting = init.desk.waiting_for_ready
        if any(
            record.health is Health.UNKNOWN
            and not record.faltered
            and not record.is_out
            and record.name not in waiting
            for record in init.records.values()
        ):
            self._due = None
            return
        if self._due is None:
            self._due = Nanos(init.now + SETTLE_TIME)
        if init.now < self._due:
            return
        self._due = None
        self._open = set()
        for record in init.records.values():
            if record.health is Health.OK and record.name not in waiting:
                await self._ask(record, self._open)

    def next_time(self) -> Nanos | None:
        """When the accounts are to be asked for."""
        return self._due

    async def _ask(self, record: Record, awaited: set[str]) -> None:
        """Ask a service what it holds now that the system is ready."""

        async def on_status(status: Any, _nonce: int) -> None:
            awaited.discard(record.name)
            if isinstance(status, ServiceStatus):
                record.at_ready = account_of(status)

        deadline = Nanos(self._init.now + record.planned.health_deadline)
        if await self._init.ask(record, GetStatus(), deadline, on_status):
            awaited.add(record.name)

    async def _end_when_at_rest(self) -> None:
        """No account is out any more: keep init's own with them, and answer who waits.

        They are asked for again, a bounded number of times, while a message waits somewhere or a
        client has a link and has not yet bound it: that is on its way, and not held.
        """
        init = self._init
        self.own = await init.own_account()
        accounts = [self.own, *(record.at_ready for record in init.records.values())]
        moving = any(map(_queued, accounts)) or any(map(self._is_unbound, init.records.values()))
        if moving and self._rounds < ROUNDS_MAX:
            self._rounds += 1
            self._open = None
            self._due = Nanos(init.now + ROUND_PAUSE)
            return
        self.is_taken = True
        self.tasks = len(await TaskTable())
        await init.desk.on_ready()

    def _is_unbound(self, record: Record) -> bool:
        """Whether a client of the service has not yet bound a link that it took."""
        taken = sum(
            max(1, row.taken)
            for row in self._init.links.rows
            if row.planned.server == record.name and self._init.records[row.planned.client].is_up
        )
        binds = next((fact.value for fact in record.at_ready.facts if fact.name == BINDS), None)
        return binds is not None and binds < taken + OWN_BIND


def account_of(status: ServiceStatus) -> Account:
    """What a service holds, by its own word and its kernel's."""
    return Account(generation=status.generation, counters=status.counters, facts=status.facts)


def _queued(account: Account) -> int:
    """Messages that waited for the task; 0 from a service that does not say."""
    return account.counters[QUEUED] if len(account.counters) > QUEUED else 0

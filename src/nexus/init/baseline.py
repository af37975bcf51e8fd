"""What every task holds once the system is ready: the accounts that later ones are compared with.

Asked for a little after `init: ready`, when what was still on its way has arrived. Every wait
here ends: a service is probed, late, or gone, and then nobody waits for it.
"""

from typing import TYPE_CHECKING, Any, Final

from nexus.abi import Nanos, TaskCounters, TaskTable
from nexus.init.desk import SETTLE_TIME
from nexus.init.record import NO_ACCOUNT, Record
from nexus.protocols.init import Account, Health
from nexus.protocols.meta import GetStatus, ServiceStatus

if TYPE_CHECKING:
    from nexus.init.supervisor import Supervisor

LOOKS_MAX: Final = 4  # at one account that is not at rest
QUEUED: Final = TaskCounters._fields.index("queued")


class Baseline:
    """The accounts at `init: ready`."""

    def __init__(self, init: "Supervisor") -> None:
        self._init = init
        self._due: Nanos | None = None
        self._open: set[str] | None = None  # whose account is awaited, once asked for
        self._turns = 0  # that init let pass because a message was waiting for it
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
                await self._end_when_quiet()
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

    async def _ask(self, record: Record, awaited: set[str], looks: int = LOOKS_MAX) -> None:
        """Ask a service what it holds now that the system is ready.

        Again, a few times, if a message was just waiting there: it is held by nobody for long.
        """

        async def on_status(status: Any, _nonce: int) -> None:
            awaited.discard(record.name)
            if not isinstance(status, ServiceStatus):
                return
            record.at_ready = account_of(status)
            if _queued(record.at_ready) and looks > 1:
                await self._ask(record, awaited, looks - 1)

        deadline = Nanos(self._init.now + record.planned.health_deadline)
        if await self._init.ask(record, GetStatus(), deadline, on_status):
            awaited.add(record.name)

    async def _end_when_quiet(self) -> None:
        """No account is out any more: keep init's own with them, and answer who waits.

        A message that waits for init is received first; there are a few such turns at most.
        """
        self.own = await self._init.own_account()
        if _queued(self.own) and self._turns < LOOKS_MAX:
            self._turns += 1
            return
        self.is_taken = True
        self.tasks = len(await TaskTable())
        await self._init.desk.on_ready()


def account_of(status: ServiceStatus) -> Account:
    """What a service holds, by its own word and its kernel's."""
    return Account(generation=status.generation, counters=status.counters, facts=status.facts)


def _queued(account: Account) -> int:
    """Messages that waited for the task; 0 from a service that does not say."""
    return account.counters[QUEUED] if len(account.counters) > QUEUED else 0

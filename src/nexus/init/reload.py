"""Settings that change while the system runs: the file is read again, and who can use them is told.

    asked --the file is another system, or none--> refused; nothing is told
    asked --a service's settings differ----------> told --Configured----> they are its settings
                                                        --NEEDS_RESTART-> they will be
                                                        --BAD_SETTINGS--> the old ones stay
                                                        --no answer-----> they will be
          --a service that does not run-----------> they will be, when it starts

Only settings change: everything else that differs is counted, and takes a restart of the system,
because the plan that was checked is the plan that runs. What a service is started with from now on
are the settings it took, or will take.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

import msgspec

from nexus.abi import Nanos
from nexus.init.errors import SystemFileError
from nexus.init.plan import NO_POLICY, Plan, PlannedService
from nexus.init.record import Record
from nexus.protocols.init import Reloading, ReloadOutcome, ReloadRow
from nexus.protocols.meta import SETTINGS_SIZE_MAX, Configure, Configured, MetaStatus
from nexus.wire import ReplyStatus

if TYPE_CHECKING:
    from nexus.init.desk import Later
    from nexus.init.supervisor import Supervisor

ANSWER_MAX: Final = Nanos(2_000_000_000)  # ns for a service to take new settings

PlanSource = Callable[[], Plan]
"""Reads the system file again. Raises SystemFileError or OSError."""


class BadSystemFile(Exception):
    """What the file is now is not this system; the text says why."""


class Round:
    """One reading of the file, until every service that was told has answered."""

    def __init__(self, later: "Later", ignored: int) -> None:
        self._later = later
        self._ignored = ignored
        self._open = 1  # questions, and the one who asks them
        self._rows: list[ReloadRow] = []

    def begin(self) -> None:
        """A service is told; `end` says how it went."""
        self._open += 1

    async def end(self, row: ReloadRow | None) -> None:
        """One outcome more; with the last one the answer is given."""
        if row is not None:
            self._rows.append(row)
        self._open -= 1
        if not self._open:
            self._rows.sort(key=lambda each: each.name)
            told = sum(each.outcome is not ReloadOutcome.AT_START for each in self._rows)
            await self._later.give(Reloading(told, self._ignored, self._rows))


class Reload:
    """Gives services the settings that changed."""

    def __init__(self, init: "Supervisor", source: PlanSource | None) -> None:
        self._init = init
        self._source = source

    def read(self) -> Plan:
        """The system file as it is now. Raises BadSystemFile."""
        if self._source is None:
            raise BadSystemFile("this run has no system file")
        try:
            plan = self._source()
        except (SystemFileError, OSError) as error:
            raise BadSystemFile(str(error)) from error
        if plan.name != self._init.plan.name:
            raise BadSystemFile(f"it is the system {plan.name}")
        return plan

    async def begin(self, plan: Plan, later: "Later") -> None:
        """Tell every service whose settings differ; `later` gets the outcomes of all."""
        ignored = other_changes(self._init.plan, plan)
        turn = Round(later, ignored)
        for record in self._init.records.values():
            found = plan.by_name.get(record.name)
            if found is not None and found.settings != record.planned.settings:
                await self._tell(record, found, turn)
        await self._init.say("init: settings read again", ignored=ignored)
        await turn.end(None)

    async def _tell(self, record: Record, found: PlannedService, turn: Round) -> None:
        turn.begin()
        added = {} if record.launch is None else record.launch.settings
        packed = msgspec.msgpack.encode({**dict(found.settings), **added})
        if len(packed) > SETTINGS_SIZE_MAX:
            await self._on_answer(record, found, turn, MetaStatus.NEEDS_RESTART)
            return

        async def on_answer(reply: Any, _nonce: int) -> None:
            await self._on_answer(record, found, turn, reply)

        deadline = Nanos(self._init.now + ANSWER_MAX)
        if record.slot is None:
            await self._on_answer(record, found, turn, ReloadOutcome.AT_START)
        elif not await self._init.ask(
            record, Configure(packed), deadline, on_answer, refusals=True
        ):
            await self._on_answer(record, found, turn, None)

    async def _on_answer(
        self, record: Record, found: PlannedService, turn: Round, answer: object
    ) -> None:
        outcome = outcome_of(answer)
        if outcome is not ReloadOutcome.REFUSED:
            record.planned = replace(record.planned, settings=found.settings)
        await self._init.say(f"init: settings of {record.name}", outcome=outcome.name.lower())
        await turn.end(ReloadRow(record.name, outcome))


def outcome_of(answer: object) -> ReloadOutcome:
    """What an answer to Configure means for the settings."""
    match answer:
        case Configured():
            return ReloadOutcome.IN_FORCE
        case MetaStatus.BAD_SETTINGS:
            return ReloadOutcome.REFUSED
        case MetaStatus.NEEDS_RESTART | ReplyStatus.UNSUPPORTED:
            return ReloadOutcome.NEEDS_RESTART
        case ReloadOutcome():
            return answer
        case _:
            return ReloadOutcome.NO_ANSWER


def other_changes(old: Plan, new: Plan) -> int:
    """How many services are new, gone or declared otherwise than in their settings, and one if the
    system around them is. The policy has a reload of its own."""
    changed = len(old.by_name.keys() ^ new.by_name.keys())
    for name in old.by_name.keys() & new.by_name.keys():
        before, after = old.by_name[name], new.by_name[name]
        changed += replace(before, settings=()) != replace(after, settings=())
    return changed + (_around(old) != _around(new))


def _around(plan: Plan) -> Plan:
    return replace(plan, services=(), policy=NO_POLICY)

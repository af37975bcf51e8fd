"""Services on demand: who may have one started, how it ends, and what its starter learns.

    ON_DEMAND --Launch: its starter's, its program's digest, EXEC of the requester--> grants decided
        ^          |-- not so: refused, and nothing is started
        |          v
        |       STARTING --> UP --> ended --asked for, or no crash, or not to be restarted--\\
        |                             \\--a crash, and it restarts: as `groups` says          |
        \\----------------------------------------------------------------------------------/

Only init forks, and only a service that runs execd asks it to. Nothing here trusts the starter's
word for what its requester may do: policyd is asked, as for every grant, and silence is a denial.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

import msgspec

from nexus.abi import Nanos, SpawnReason
from nexus.init.plan import sources_of
from nexus.init.programs import measured
from nexus.init.reasons import UNCOUNTED, Reason
from nexus.init.record import Launch as Launching
from nexus.init.record import Record
from nexus.protocols.init import (
    PROC_SPAWN,
    EndTask,
    InitStatus,
    Launch,
    Launched,
    LaunchedRow,
    LaunchedRows,
    TaskState,
)
from nexus.protocols.policyd import Decision, Exec, Verdict
from nexus.wire import ReplyStatus

if TYPE_CHECKING:
    from nexus.init.desk import Later
    from nexus.init.supervisor import Supervisor

EXEC_MAX: Final = Nanos(1_000_000_000)  # ns for policyd's answer; as for a grant
ARGUMENTS: Final = "arguments"  # a list of words, of the settings that a launch adds
ENVIRONMENT: Final = "environment"  # a table of words

Settings = dict[str, Any]


@dataclass(slots=True)
class Starting:
    """A launch that is being decided or started, and who waits for what comes of it."""

    launch: Launching
    later: "Later"


class Launches:
    """What is started on demand."""

    def __init__(self, init: "Supervisor") -> None:
        self._init = init
        self._sources = sources_of(init.plan)
        self._starting: dict[str, Starting] = {}

    # ------------------------------------------------------------------ starting

    def refusal(self, asker: Record, record: Record | None) -> InitStatus | None:
        """Why `asker` has no say in the starts of this service, or None."""
        if record is None:
            return InitStatus.ROUTE_NOT_FOUND
        return None if record.planned.by == asker.name else InitStatus.NOT_ON_DEMAND

    async def launch(self, record: Record, request: Launch, later: "Later") -> None:
        """Start the service if everything is as it should be; `later` is answered exactly once."""
        settings = _settings(request.settings)
        if settings is None:
            await later.refuse(ReplyStatus.MALFORMED)
        elif self._is_taken(record):
            await later.refuse(InitStatus.RUNS)
        elif self._init.is_going_down or record.state is TaskState.LEFT_OUT:
            await later.refuse(InitStatus.SPAWN_REFUSED)
        elif not self._is_program(record, request.digest):
            await later.refuse(InitStatus.BAD_PROGRAM)
        else:
            launch = Launching(
                requester=request.requester, settings=settings, restarts=request.restarts
            )
            starting = self._starting[record.name] = Starting(launch, later)
            await self._ask(record, starting)

    def _is_taken(self, record: Record) -> bool:
        """Whether the service runs, or is on its way."""
        return record.lives or record.launch is not None or record.name in self._starting

    def _is_program(self, record: Record, digest: str) -> bool:
        """Whether the files of the program are those of the plan, and of the starter's table."""
        planned = record.planned
        return digest == planned.program_digest == measured(self._sources[planned.program])

    async def _ask(self, record: Record, starting: Starting) -> None:
        """May the requester have it started? policyd says so, or the policy where there is none."""
        init = self._init
        requester = starting.launch.requester
        policyd = init.authority.policyd
        if policyd is None:
            subject = init.records.get(requester)
            allowed = subject is not None and init.authority.may(
                subject, PROC_SPAWN, target=record.name
            )
            await self._on_decided(record, starting, allowed=allowed)
            return

        async def on_decision(reply: Any, _nonce: int) -> None:
            allowed = isinstance(reply, Decision) and reply.verdict is Verdict.ALLOW
            await self._on_decided(record, starting, allowed=allowed)

        deadline = Nanos(init.now + EXEC_MAX)
        question = Exec(requester, record.name)
        if not init.authority.is_available or not await init.ask(
            policyd, question, deadline, on_decision
        ):
            await self._on_decided(record, starting, allowed=False)

    async def _on_decided(self, record: Record, starting: Starting, *, allowed: bool) -> None:
        if self._starting.get(record.name) is not starting:
            return
        if not allowed:
            del self._starting[record.name]
            self.note_denied(record)
            await starting.later.refuse(ReplyStatus.DENIED)
        elif self._init.is_going_down or record.state is TaskState.LEFT_OUT:
            _ = await self.on_no_start(record)
        else:
            record.launch = starting.launch
            await self._init.grants.decide(record)

    def note_denied(self, record: Record) -> None:
        """The record of the service says that a start of it was denied."""
        record.spawn_refused += 1
        record.spawn_reason = SpawnReason.DENIED_BY_POLICY

    async def on_started(self, record: Record) -> None:
        """An instance was spawned; if it is a launch's first, who asked for it learns its pid."""
        starting = self._starting.pop(record.name, None)
        if starting is None:
            return
        record.launch = replace(starting.launch, generation=record.generation)
        launched = Launched(record.pid, record.generation, record.planned.program_digest)
        await starting.later.give(launched)

    async def on_no_start(self, record: Record) -> bool:
        """No instance was started; whether that ends a launch, which is not tried again."""
        starting = self._starting.pop(record.name, None)
        if starting is None:
            return False
        record.launch = None
        record.due = None
        if record.state is not TaskState.LEFT_OUT:
            record.state = TaskState.ON_DEMAND
        await starting.later.refuse(InitStatus.SPAWN_REFUSED)
        return True

    async def on_time(self) -> None:
        """Who waits for the start of what is being stopped meanwhile waits no longer."""
        for name in list(self._starting):
            record = self._init.records[name]
            if self._init.is_going_down or record.state is TaskState.LEFT_OUT:
                _ = await self.on_no_start(record)

    # ------------------------------------------------------------------ ends

    async def on_end(self, record: Record, *, crashed: bool) -> None:
        """An instance has ended: for good, or it is started again as its entry says."""
        launch = record.launch
        again = record.reason in UNCOUNTED or (launch is not None and launch.restarts and crashed)
        if launch is None or not again:
            self._forget(record)
            return
        await self._init.groups.on_end(record)
        if record.state is TaskState.FAILED:
            record.launch = None  # given up: whoever wants it may have it started anew

    def _forget(self, record: Record) -> None:
        record.launch = None
        record.due = None
        record.state = TaskState.ON_DEMAND

    async def end(self, record: Record, request: EndTask) -> InitStatus | None:
        """End what was launched, for good; why not, or None."""
        launch = record.launch
        if launch is None or not launch.generation <= request.generation <= record.generation:
            return InitStatus.NO_SUCH_CHILD
        if record.lives:
            record.launch = None  # so that its end is one for good
            await self._init.instances.kill(record, Reason.ENDED)
        else:
            self._init.grants.cancel(record)
            self._forget(record)
        return None

    def rows(self, asker: Record) -> LaunchedRows:
        """What `asker` has started and what has not ended for good."""
        found = [
            (record, record.launch)
            for record in self._init.records.values()
            if record.planned.by == asker.name and record.launch is not None
        ]
        return LaunchedRows(
            [
                LaunchedRow(record.name, launch.requester, record.pid, launch.generation)
                for record, launch in found
                if launch.generation
            ]
        )


def _settings(data: bytes) -> Settings | None:
    """What a launch adds to the settings of the service; None is that it is no such table."""
    if not data:
        return {}
    try:
        added = msgspec.msgpack.decode(data, type=_Added)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None
    return {ARGUMENTS: added.arguments, ENVIRONMENT: added.environment}


class _Added(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The table that a launch adds."""

    arguments: list[str] = []
    environment: dict[str, str] = {}

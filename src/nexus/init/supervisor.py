"""init-lite: starts the services of a plan, wires them, watches them, and ends them in order.

    WAITING -> STARTING -> UP -> (control link closed) -> reaped -> BACKING_OFF -> STARTING ...
                                                             \\-> STOPPED, when going down

One task, one loop: a receive over the control endpoint and the reply inbox, bounded by the
earliest of init's own times. Nothing here waits for a service; what a service has not answered
yet is a row in `Asking`, and what has to happen later is a time in a `Record`.
"""

import json
from collections import deque
from typing import Any, Final

from nexus.abi import (
    CONTROL_LINK_SIZE,
    EVIDENCE_SIZE_MAX,
    INIT_NAME,
    LINK_DEPTH_DEFAULT,
    NEVER,
    NO_WAIT,
    AbiError,
    AuditLog,
    BootImage,
    CapClose,
    ConsoleWrite,
    EndpointCreate,
    Entropy,
    ExitInfo,
    Kill,
    LinkCreate,
    LinkId,
    LinkTerms,
    Message,
    Nanos,
    Now,
    PeerGone,
    Recv,
    Send,
    Slot,
    Spawn,
    SpawnLastError,
    SpawnSpec,
    Status,
    TaskStats,
    TaskTable,
    Wait,
)
from nexus.init.asking import Asking, Done
from nexus.init.desk import SETTLE_TIME, Desk
from nexus.init.links import LinkTable
from nexus.init.plan import Plan, PlannedService
from nexus.init.record import NO_ACCOUNT, NO_PID, Exit, Record, config_of
from nexus.ipc import Spans
from nexus.protocols.init import Account, Health, TaskState
from nexus.protocols.meta import Bind, Bound, GetStatus, Healthy, ServiceStatus, Stop
from nexus.protocols.meta import Health as Probe
from nexus.runtime import TRACE_SEED_SIZE

CONTROL_TERMS: Final = LinkTerms(LINK_DEPTH_DEFAULT, CONTROL_LINK_SIZE, 0)
REAP_PAUSE: Final = Nanos(1_000_000)  # ns; between looks at a task whose control link closed
REAP_MAX: Final = Nanos(200_000_000)  # ns; then it lives without one of its links: it is killed
PROBE_PAUSE: Final = Nanos(20_000_000)  # ns; between probes of a service that is not ready yet
STOP_MAX: Final = Nanos(1_000_000_000)  # ns; a service that is still there then is killed
KILL_MAX: Final = Nanos(2_000_000_000)  # ns; a killed task that is still there is given up
AUDIT_KEPT_MAX: Final = 256  # QoS audit lines of this boot that can be asked for
DRAIN_MAX: Final = 2 * (LINK_DEPTH_DEFAULT + 1)  # of a service: two links, each full, each ended

EXIT_CLEAN: Final = 0
EXIT_DIRTY: Final = 1

REASON_EXIT: Final = "exit"
REASON_ASKED: Final = "asked"
REASON_NO_ECHO: Final = "no echo"
REASON_CONTROL: Final = "control link closed"
REASON_ANSWERS: Final = "answers link closed"
REASON_STOP: Final = "stop deadline"


class Supervisor:
    """The whole state of init. `run` is its only way to act."""

    def __init__(self, boot: BootImage, plan: Plan, cpu_count: int) -> None:
        self.boot = boot
        self.plan = plan
        self.cpu_count = cpu_count
        self.now = boot.now
        self.records = {service.name: Record(planned=service) for service in plan.services}
        self.links = LinkTable(plan)
        self.ready_at: Nanos | None = None
        self.tasks_ready = 0
        self.baseline_done = False
        self._baseline_due: Nanos | None = None
        self._baseline_open: set[str] | None = None  # whose account is awaited, once asked for
        self.own_at_ready = NO_ACCOUNT
        self.audit: deque[str] = deque(maxlen=AUDIT_KEPT_MAX)
        self.audit_total = 0
        self.audit_dropped = 0
        self.lines_lost = 0
        self.dirty: list[str] = []
        self._inbox = Slot(0)
        self._by_control: dict[LinkId, Record] = {}
        self._by_answers: dict[LinkId, Record] = {}
        self._asking = Asking(Spans(b"", INIT_NAME, boot.generation))
        self._desk = Desk(self)
        self._stopping: list[Record] | None = None  # those left to stop, the next one last
        self._stop_due: Nanos | None = None

    async def run(self) -> int:
        """From `init: start` to `init: stopped`; 0 if every service ended cleanly, else 1."""
        self._inbox = await EndpointCreate()
        await self.say(
            "init: start", digest=self.checked_digest(), services=len(self.plan.services)
        )
        for planned in self.start_list():
            await self._start(self.records[planned.name])
        recv = Recv((self.boot.endpoint, self._inbox), NEVER)
        while True:
            await self._on_time()
            if self._is_over():
                return await self._end()
            recv.deadline = self._wake_time()
            try:
                message = await recv
            except PeerGone as gone:
                self.now = await Now()
                await self._on_gone(gone.link)
            except AbiError as error:
                if error.status not in _WOKEN:
                    raise
                self.now = await Now()
            else:
                self.now = message.now
                await self._on_message(message)

    # ------------------------------------------------------------------ decisions

    def checked_digest(self) -> str:
        """The digest of the plan that runs; a plan can only be made by checking it."""
        return self.plan.digest

    def start_list(self) -> tuple[PlannedService, ...]:
        """The services to start, in order."""
        return self.plan.services

    def placement(self, planned: PlannedService) -> int | None:
        """The CPU a service is placed on; the kernel's choice if this run has no such CPU."""
        if planned.cpu is None or planned.cpu >= self.cpu_count:
            return None
        return planned.cpu

    def is_ready(self) -> bool:
        """Whether every service is up and every planned link exists."""
        return all(record.is_up for record in self.records.values()) and not self.links.missing()

    def may_restart(self, record: Record) -> bool:
        """Whether a service that ended is started again."""
        return self._stopping is None and record.name != self.plan.ends_with

    def restart_time(self, record: Record) -> Nanos:
        """When a service that ended now is started again: its declared back-off from now."""
        return Nanos(self.now + record.planned.backoff)

    # ------------------------------------------------------------------ starting

    async def _start(self, record: Record) -> None:
        """Spawn the next instance and send it the echo request that makes it UP."""
        planned = record.planned
        record.due = None
        again = record.generation > 0
        await self.say(
            f"init: {'restart' if again else 'start'} {planned.name}",
            program=planned.program,
            digest=planned.program_digest,
        )
        record.argument = config_of(planned, await Entropy(TRACE_SEED_SIZE)).encoded()
        try:
            spawned = await Spawn(
                SpawnSpec(
                    name=planned.name,
                    program=planned.program,
                    control=self.boot.endpoint,
                    argument=record.argument,
                    qos=planned.qos,
                    cpu=self.placement(planned),
                    owner_size=planned.owner_size,
                    endpoints=planned.endpoints,
                    budget=planned.budget,
                    delegations=planned.delegations,
                )
            )
        except AbiError as error:
            record.spawn_refused += 1
            record.spawn_reason = await SpawnLastError()
            record.state = TaskState.BACKING_OFF
            record.due = self.restart_time(record)
            await self.say(
                f"init: no start of {planned.name}",
                status=error.status.name,
                reason=record.spawn_reason.name,
            )
            return
        record.state = TaskState.STARTING
        record.health = Health.UNKNOWN
        record.pid = spawned.pid
        record.generation = spawned.generation
        record.slot = spawned.slot
        record.control = spawned.link
        record.started = self.now = await Now()
        record.leaving = None
        record.kill_reason = ""
        record.probing = False
        record.probe_again = None
        record.deaf = None
        self._by_control[spawned.link] = record
        await self._bind(record)

    async def _bind(self, record: Record) -> None:
        """Move a link into the reply inbox to the new instance; Bound is its control echo."""
        try:
            link = await LinkCreate(self._inbox, CONTROL_TERMS)
        except AbiError as error:
            if error.status not in _NOT_NOW:
                raise
            await self._kill(record, REASON_NO_ECHO)
            return
        assert link.link is not None, "the inbox is init's own"

        async def on_bound(reply: Any, nonce: int) -> None:
            await self._on_bound(record, reply, nonce)

        record.answers = link.link
        self._by_answers[link.link] = record
        deadline = Nanos(self.now + record.planned.health_deadline)
        if not await self.ask(record, Bind(), deadline, on_bound, move=link.slot):
            await CapClose(link.slot)  # it is already gone, and its control link will say so

    async def _on_bound(self, record: Record, reply: Any, nonce: int) -> None:
        if not isinstance(reply, Bound) or reply.generation != record.generation:
            if record.leaving is None:
                await self._kill(record, REASON_NO_ECHO)
            return
        if record.state is not TaskState.STARTING:
            return
        record.state = TaskState.UP
        again = record.restarts > 0
        await self.say(
            f"init: {'back' if again else 'up'} {record.name}",
            pid=record.pid,
            service=f"0x{record.planned.service:016x}",
            generation=record.generation,
            echo_nonce=nonce,
        )
        await self._probe(record)

    # ------------------------------------------------------------------ readiness and health

    async def _check_ready(self) -> None:
        """Print `init: ready` once, the moment it is true."""
        if self.ready_at is not None or self._stopping is not None or not self.is_ready():
            return
        self.ready_at = self.now
        links = [
            [
                row.planned.client,
                row.planned.server,
                *row.terms,
                row.client_generation,
                row.server_generation,
            ]
            for row in self.links.rows
            if row.terms is not None
        ]
        await self.say("init: ready", links=links, grants=[])

    async def _probe(self, record: Record) -> None:
        """Ask the service whether it does its work. One question at a time."""
        record.probe_again = None
        if record.probing or not record.is_up:
            return

        async def on_health(reply: Any, nonce: int) -> None:
            await self._on_health(record, reply, nonce)

        deadline = Nanos(self.now + record.planned.health_deadline)
        await self._question(record, Probe(), deadline, on_health)

    async def _question(self, record: Record, request: Any, deadline: Nanos, done: Done) -> None:
        """Ask, and if there is no room for the question ask again a little later."""
        record.probing = await self.ask(record, request, deadline, done)
        if not record.probing:
            record.probe_again = Nanos(self.now + PROBE_PAUSE)

    async def _on_health(self, record: Record, reply: Any, nonce: int) -> None:
        record.probing = False
        if not self._is_healthy(record, reply):
            record.probe_again = Nanos(self.now + PROBE_PAUSE)
            return
        record.probe_nonce = nonce
        if record.name in self._desk.waiting_for_ready:
            await self._on_healthy(record, {})  # it listens to nothing but that answer now
            return

        async def on_status(status: Any, _nonce: int) -> None:
            await self._on_first_status(record, status)

        deadline = Nanos(self.now + record.planned.health_deadline)
        await self._question(record, GetStatus(), deadline, on_status)

    def _is_healthy(self, record: Record, reply: Any) -> bool:
        """Whether the answer is of this instance, started as it was."""
        return (
            isinstance(reply, Healthy)
            and reply.generation == record.generation
            and reply.digest == record.argument_digest
        )

    async def _on_first_status(self, record: Record, status: Any) -> None:
        """The service answered its probe and says how it is."""
        record.probing = False
        if not isinstance(status, ServiceStatus):
            record.probe_again = Nanos(self.now + PROBE_PAUSE)
            return
        await self._on_healthy(record, {fact.name: fact.value for fact in status.facts})

    async def _on_healthy(self, record: Record, facts: dict[str, int]) -> None:
        """The probe is answered, by this instance, with its nonce."""
        record.health = Health.OK
        await self.say(
            f"init: health {record.name} ok",
            nonce=record.probe_nonce,
            generation=record.generation,
            facts=facts,
        )

    async def _check_baseline(self) -> None:
        """Once every service is probed, keep every account and answer who waits.

        The accounts are asked for a little later, when what was still on its way has arrived.
        Every wait here ends: a service is probed, late, or gone, and then nobody waits for it.
        """
        if self.baseline_done or self.ready_at is None:
            return
        if self._baseline_open is not None:
            if not self._baseline_open:
                await self._end_baseline()
            return
        waiting = self._desk.waiting_for_ready
        if any(
            record.health is Health.UNKNOWN and not record.faltered and record.name not in waiting
            for record in self.records.values()
        ):
            self._baseline_due = None
            return
        if self._baseline_due is None:
            self._baseline_due = Nanos(self.now + SETTLE_TIME)
        if self.now < self._baseline_due:
            return
        self._baseline_due = None
        self._baseline_open = set()
        for record in self.records.values():
            if record.health is Health.OK and record.name not in waiting:
                await self._ask_baseline(record, self._baseline_open)

    async def _ask_baseline(self, record: Record, awaited: set[str]) -> None:
        """Ask a service what it holds now that the system is ready."""

        async def on_status(status: Any, _nonce: int) -> None:
            awaited.discard(record.name)
            if isinstance(status, ServiceStatus):
                record.at_ready = account_of(status)

        deadline = Nanos(self.now + record.planned.health_deadline)
        if await self.ask(record, GetStatus(), deadline, on_status):
            awaited.add(record.name)

    async def _end_baseline(self) -> None:
        """No account is out any more: keep init's own with them, and answer who waits."""
        self.baseline_done = True
        self.own_at_ready = await self.own_account()
        self.tasks_ready = len(await TaskTable())
        await self._desk.on_ready()

    # ------------------------------------------------------------------ ends and restarts

    async def _on_gone(self, link: LinkId) -> None:
        """A link of a service is closed. Its control link closes when it ends."""
        record = self._by_answers.pop(link, None)
        if record is not None:
            if record.answers == link:
                record.answers = None
                if record.lives:
                    record.deaf = self.now  # it is ending, or cannot be asked any more
            return
        record = self._by_control.pop(link, None)
        if record is None:
            return
        record.control = None
        await self._on_leaving(record)

    async def _on_leaving(self, record: Record) -> None:
        """An instance ends, or has lost a link it cannot be without: no more links, and reap it."""
        if record.leaving is None:
            record.leaving = record.died = self.now
            self.links.on_ended(record.name)
        await self._reap(record)

    async def _reap(self, record: Record) -> None:
        """Take the exit of a task whose control link closed, as soon as there is one."""
        assert record.leaving is not None, "only what is leaving is reaped"
        try:
            info = await Wait(record.pid, NO_WAIT)
        except AbiError as error:
            if error.status not in (Status.QUEUE_EMPTY, Status.TIMED_OUT):
                raise
            if self.now >= record.leaving + REAP_MAX and not record.kill_reason:
                await self._kill(record, REASON_CONTROL)
            return
        await self._on_exit(record, info)

    async def _on_exit(self, record: Record, info: ExitInfo) -> None:
        """The instance is gone: forget it, and plan the next one."""
        reason = record.kill_reason or REASON_EXIT
        record.last_exit = Exit(info, record.died, reason)
        for slot in (record.slot, record.replies):
            if slot is not None:
                await CapClose(slot)
        record.slot = record.replies = record.leaving = None
        if record.control is not None:  # whom it gave that link to is not the service
            _ = self._by_control.pop(record.control)
            record.control = None
        record.pid = NO_PID
        record.deaf = None
        record.faltered = self.ready_at is not None and not self.baseline_done
        self._desk.on_ended(record)
        await self._asking.forget(record)
        record.probe_again = None  # what was asked of it is not asked again
        if not self.may_restart(record):
            record.state = TaskState.STOPPED
            if (info.code or info.signal) and reason != REASON_ASKED:
                self.dirty.append(record.name)
            if self._stopping is None:
                self.shut_down()
            return
        record.state = TaskState.BACKING_OFF
        record.restarts += 1
        record.due = self.restart_time(record)
        await self.say(
            f"init: end of {record.name}",
            generation=record.generation,
            code=info.code,
            signal=info.signal,
            reason=reason,
            died=record.died,
        )

    async def _kill(self, record: Record, reason: str) -> None:
        """End an instance at once; its control link says when it is gone."""
        if not record.lives:
            return
        record.kill_reason = record.kill_reason or reason
        try:
            await Kill(record.pid)
        except AbiError as error:
            if error.status is not Status.INVALID_ARGUMENT:  # it has just ended by itself
                raise

    async def restart(self, record: Record) -> None:
        """Kill the running instance because somebody asked for it."""
        await self._kill(record, REASON_ASKED)

    # ------------------------------------------------------------------ going down

    def shut_down(self) -> None:
        """Begin to stop every service, the last started first."""
        if self._stopping is None:
            self._stopping = list(self.records.values())
            self._stop_due = None

    async def _advance_stop(self) -> None:
        """Ask the next service to stop; kill one that does not; give up on nothing earlier."""
        while self._stopping:
            record = self._stopping[-1]
            if not record.lives:
                record.state = TaskState.STOPPED
                record.due = None
                _ = self._stopping.pop()
                self._stop_due = None
                continue
            if self._stop_due is None:
                budget = min(STOP_MAX, record.planned.health_deadline)
                self._stop_due = Nanos(self.now + budget)
                if not await self.ask(record, Stop(), self._stop_due, _nothing):
                    await self._kill(record, REASON_STOP)
            if self.now < self._stop_due:
                return
            if record.kill_reason == REASON_STOP:
                self.dirty.append(record.name)
                await self.say(f"init: no end of {record.name}", pid=record.pid)
                _ = self._stopping.pop()
                self._stop_due = None
                continue
            await self._kill(record, REASON_STOP)
            record.kill_reason = REASON_STOP
            self._stop_due = Nanos(self.now + KILL_MAX)

    def _is_over(self) -> bool:
        return self._stopping is not None and not self._stopping

    async def _end(self) -> int:
        """Say how everything ended; the exit code."""
        await self._drain()
        await self.take_audit()
        stats = await TaskStats()
        exits = {
            record.name: [record.last_exit.info.code, record.last_exit.info.signal]
            for record in self.records.values()
            if record.last_exit is not None
        }
        await self.say(
            "init: stopped",
            exits=exits,
            dirty=self.dirty,
            restarts=sum(record.restarts for record in self.records.values()),
            tasks=len(await TaskTable()),
            slots=stats.slots,
            endpoints=stats.endpoints,
            links=stats.links,
            reserved_size=stats.reserved_size,
            queued=stats.queued,
            vmo_size=stats.vmo_size,
            strays=self._asking.strays,
            foreign=self._desk.foreign,
            lost=self._desk.lost,
            lines_lost=self.lines_lost,
        )
        return EXIT_DIRTY if self.dirty else EXIT_CLEAN

    async def _drain(self) -> None:
        """Receive what the ended services left behind: the ends of their links, late words."""
        recv = Recv((self.boot.endpoint, self._inbox), NO_WAIT)
        for _ in range(DRAIN_MAX * len(self.records)):
            try:
                message = await recv
            except PeerGone:
                continue
            except AbiError as error:
                if error.status not in (Status.QUEUE_EMPTY, *_WOKEN):
                    raise
                return
            if message.cap is not None:
                await CapClose(message.cap)

    # ------------------------------------------------------------------ time

    def _times(self, record: Record) -> list[Nanos]:
        """When this service needs init's attention next."""
        times = [time for time in (record.due, record.probe_again) if time is not None]
        deadline = record.planned.health_deadline
        if record.leaving is not None:
            times.append(Nanos(self.now + REAP_PAUSE))
        elif record.state is TaskState.STARTING:
            times.append(Nanos(record.started + deadline))
        elif self._is_late_due(record):
            times.append(self._late_time(record))
        if record.deaf is not None and record.leaving is None:
            times.append(Nanos(record.deaf + REAP_MAX))
        return times

    def _late_time(self, record: Record) -> Nanos:
        """When an unanswered probe makes the service late."""
        begun = max(record.started, self.ready_at or record.started)
        return Nanos(begun + record.planned.health_deadline)

    def _is_late_due(self, record: Record) -> bool:
        return record.is_up and record.health is Health.UNKNOWN and self.ready_at is not None

    def _wake_time(self) -> Nanos:
        """The earliest time anything is due; later than now, or at once."""
        times = [time for record in self.records.values() for time in self._times(record)]
        own = (
            self._stop_due,
            self._baseline_due,
            self._desk.next_time(),
            self._asking.next_time(),
        )
        times += [time for time in own if time is not None]
        return min(times, default=NEVER)

    async def _on_time(self) -> None:
        """Do everything whose time has come."""
        await self._asking.on_time(self.now)
        for record in self.records.values():
            await self._look_after(record)
        if self._stopping is not None:
            await self._advance_stop()
        await self._check_ready()
        await self._check_baseline()
        await self._desk.on_time()

    async def _look_after(self, record: Record) -> None:
        if record.leaving is not None:
            if self.now > record.leaving:
                await self._reap(record)
        elif record.state is TaskState.STARTING:
            if self.now >= record.started + record.planned.health_deadline:
                await self._kill(record, REASON_NO_ECHO)
                record.started = self.now  # look again after as long, should it not be gone
        elif record.due is not None and self.now >= record.due and self._stopping is None:
            await self._start(record)
        if record.deaf is not None and self.now >= record.deaf + REAP_MAX:
            record.deaf = None
            if record.leaving is None:
                await self._kill(record, REASON_ANSWERS)
                await self._on_leaving(record)
        if record.probe_again is not None and self.now >= record.probe_again:
            await self._probe(record)
        if self._is_late_due(record) and self.now >= self._late_time(record):
            record.health = Health.LATE
            await self.say(f"init: health {record.name} late", generation=record.generation)

    # ------------------------------------------------------------------ messages

    async def _on_message(self, message: Message) -> None:
        if message.source == self._inbox:
            if message.cap is not None:
                await CapClose(message.cap)
            await self._asking.on_message(message)
            return
        await self._desk.on_message(self._by_control.get(message.link), message)

    async def ask(
        self,
        record: Record,
        request: Any,
        deadline: Nanos,
        done: Done,
        *,
        move: Slot | None = None,
    ) -> bool:
        """Send a meta request to the present instance without waiting; whether it was sent."""
        if record.slot is None:
            return False
        nonce, frame = self._asking.frame(record, request, deadline, done)
        try:
            await Send(record.slot, frame, move=move, deadline=NO_WAIT)
        except AbiError as error:
            self._asking.withdraw(nonce)
            if error.status in _NOT_NOW:
                return False
            raise
        return True

    # ------------------------------------------------------------------ the record

    async def own_account(self) -> Account:
        """What init itself holds now."""
        return Account(generation=self.boot.generation, counters=list(await TaskStats()), facts=[])

    async def take_audit(self) -> None:
        """Move the kernel's audit lines into init's own record."""
        taken = await AuditLog()
        self.audit.extend(taken.lines)
        self.audit_total += len(taken.lines)
        self.audit_dropped += taken.dropped

    async def say(self, line: str, **evidence: Any) -> None:
        """A line on the console, its evidence next to it, cut to what the console takes."""
        try:
            await ConsoleWrite(line, evidence_of(evidence))
        except AbiError as error:
            if error.status is not Status.QUEUE_FULL:
                raise
            self.lines_lost += 1


_NOT_NOW: Final = (
    Status.QUEUE_FULL,
    Status.NO_SPACE,
    Status.NO_SUCH_ENDPOINT,
    Status.TIMED_OUT,
)
_WOKEN: Final = (Status.TIMED_OUT, Status.NO_SPACE)  # a full table empties with the next look


async def _nothing(_reply: Any, _nonce: int) -> None:
    """Stopping needs no reading: the exit is what counts."""


def account_of(status: ServiceStatus) -> Account:
    """What a service holds, by its own word and its kernel's."""
    return Account(generation=status.generation, counters=status.counters, facts=status.facts)


def evidence_of(fields: dict[str, Any]) -> bytes:
    """Evidence as JSON; if that is too long, the number of entries of each list and table.

    Then `counted` names the fields whose number stands for their content.
    """
    whole = _json(fields)
    if len(whole) <= EVIDENCE_SIZE_MAX:
        return whole
    counted = [name for name, value in fields.items() if isinstance(value, list | dict)]
    counts = _json({**fields, **{name: len(fields[name]) for name in counted}, "counted": counted})
    assert len(counts) <= EVIDENCE_SIZE_MAX, "what is neither list nor table is init's own"
    return counts


def _json(evidence: dict[str, Any]) -> bytes:
    return json.dumps(evidence, separators=(",", ":")).encode()

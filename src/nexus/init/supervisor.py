"""init-lite: starts the services of a plan, wires them, watches them, and ends them in order.

    WAITING -> STARTING -> UP -> (control link closed) -> reaped -> BACKING_OFF -> STARTING ...
       \\                                                    |-> STOPPED, when going down
        \\-> LEFT_OUT <- safe mode                           \\-> FAILED, given up

One task, one loop: a receive over the control endpoint and the reply inbox, bounded by the
earliest of init's own times. Nothing here waits for a service; what a service has not answered
yet is a row in `Asking`, and what has to happen later is a time in a `Record`.

This module has the loop and what concerns the system as a whole. Each rule has its own: whose
turn it is `stages`, whether it may have what the plan grants `grants`, and whether the machine has
that `bus`, how an instance begins and ends `instances`, what is started on demand `launches`,
whether it is well `watch`, up to when all that came was heard `hearing`, what follows its end
`groups` and who is told of it `reports`, how it is stopped `stops`, what outlives the boot
`memory`, which policy is in force `authority`, what the system holds once it is ready `baseline`,
whether the slot it was booted from is good `trial`.
"""

from collections import deque
from typing import Any, Final

from nexus.abi import (
    INIT_NAME,
    KERNEL,
    LINK_DEPTH_DEFAULT,
    NEVER,
    NO_WAIT,
    AbiError,
    AuditLog,
    BootImage,
    CapClose,
    EndpointCreate,
    ExitInfo,
    Message,
    Nanos,
    Now,
    PeerGone,
    Recv,
    Send,
    Signal,
    Slot,
    Status,
    TaskStats,
    TaskTable,
)
from nexus.bootctl.handover import EXIT_ENDED, EXIT_REBOOT, EXIT_SLOT_FAILED, EXIT_STOPPED, SlotBoot
from nexus.init.asking import Asking, Done
from nexus.init.authority import Authority, PolicySource
from nexus.init.baseline import Baseline
from nexus.init.bus import Bus
from nexus.init.console import Console
from nexus.init.desk import Desk
from nexus.init.grants import Grants
from nexus.init.groups import Groups
from nexus.init.hearing import Hearing
from nexus.init.instances import NOT_NOW, Instances
from nexus.init.launches import Launches
from nexus.init.links import LinkTable
from nexus.init.memory import BootMemory
from nexus.init.notifying import Notifier
from nexus.init.plan import Plan, PlannedService
from nexus.init.reasons import UNCOUNTED, Reason
from nexus.init.record import Record, resting_state
from nexus.init.reload import PlanSource, Reload
from nexus.init.reports import Reports, action_of
from nexus.init.stages import Stages
from nexus.init.stops import SHUTDOWN_MAX, Stops, Wanted
from nexus.init.trial import Trial
from nexus.init.watch import Watch
from nexus.ipc import Spans
from nexus.protocols.init import Account, SystemState, TaskState, TrialState

AUDIT_KEPT_MAX: Final = 256  # QoS audit lines of this boot that can be asked for
DRAIN_MAX: Final = 2 * (LINK_DEPTH_DEFAULT + 1)  # of a service: two links, each full, each ended;
# receives take turns between the two endpoints, so that many are enough for what waits at either

EXIT_CLEAN: Final = 0
EXIT_DIRTY: Final = 1


class Supervisor:
    """The whole state of init. `run` is its only way to act.

    `policy_source` reads the policy files again for SIGHUP, `plan_source` the system file for
    ReloadSettings; `watchdog` is how long the service
    manager outside may hear nothing before it takes init for dead; `slot_boot` is the slot that was
    booted, None where there are no slots.
    """

    def __init__(
        self,
        boot: BootImage,
        plan: Plan,
        cpu_count: int,
        *,
        policy_source: PolicySource | None = None,
        plan_source: PlanSource | None = None,
        watchdog: Nanos | None = None,
        slot_boot: SlotBoot | None = None,
    ) -> None:
        self.boot = boot
        self.plan = plan
        self.cpu_count = cpu_count
        self.slot_boot = slot_boot
        self.now = boot.now
        self.hearing = Hearing(boot.now, DRAIN_MAX * len(plan.services))
        self.records = {
            service.name: Record(planned=service, state=resting_state(service))
            for service in plan.services
        }
        self.links = LinkTable(plan)
        self.ready_at: Nanos | None = None
        self.audit: deque[str] = deque(maxlen=AUDIT_KEPT_MAX)
        self.audit_total = 0
        self.audit_dropped = 0
        self.dirty: list[str] = []  # services that did not end cleanly, or were given up
        self.is_safe = False
        self.safe_why = ""
        self.is_going_down = False
        self._is_orderly = True  # going down as somebody wished
        self.is_rebooting = False  # and to be booted again
        self.inbox = Slot(0)  # where services answer, once there is one
        self.asking = Asking(Spans(b"", INIT_NAME, boot.generation))
        self._policy_source = policy_source
        self.console = Console()
        self.say = self.console.say
        self.instances = Instances(self)
        self.kill = self.instances.kill
        self.desk = Desk(self)
        self.authority = Authority(self, plan.policy)
        self.grants = Grants(self)
        self.bus = Bus(self)
        self.launches = Launches(self)
        self.reload = Reload(self, plan_source)
        self.reports = Reports(self)
        self.stages = Stages(self)
        self.watch = Watch(self)
        self.groups = Groups(self)
        self.stops = Stops(self)
        self.trial = Trial(self, slot_boot)
        self.memory = BootMemory(self)
        self.baseline = Baseline(self)
        self.notifier = Notifier(self, watchdog)

    async def run(self) -> int:
        """From `init: start` to `init: stopped`; the exit code: 0 if every service ended cleanly,
        1 if not. Out of a slot it is one of bootctl's, for the loader; an end that nobody wished
        is 0 or 1 there too."""
        self.inbox = await EndpointCreate()
        await self.say(
            "init: start", digest=self.checked_digest(), services=len(self.plan.services)
        )
        why = await self.memory.begin()
        self.asking.begin_trace(Spans(self.memory.boot_id, INIT_NAME, self.boot.generation))
        if why:
            await self.enter_safe_mode(why)
        recv = Recv((self.boot.endpoint, self.inbox), NEVER)
        while True:
            await self._on_time()
            if self.is_going_down and not self.stops:
                return await self._end()
            recv.deadline = self._wake_time()
            try:
                message = await recv
            except PeerGone as gone:
                self.now = await Now()
                self.hearing.on_taken(self.now)
                await self.instances.on_gone(gone.link)
            except AbiError as error:
                if error.status not in _WOKEN:
                    raise
                begun, self.now = self.now, await Now()
                if error.status is Status.TIMED_OUT:
                    self.hearing.on_nothing(max(begun, min(recv.deadline, self.now)))
                else:
                    self.hearing.on_taken(self.now)
            else:
                self.now = message.now
                self.hearing.on_taken(self.now)
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
        """Whether every service is up and has had every planned link: of those that start with the
        system, and in safe mode of those that run then. A link that was lost with its server does
        not hold this up; the evidence of `init: ready` has those that exist, and #29 demands all.
        """
        out = {
            name
            for name, each in self.records.items()
            if each.is_demanded or each.state is TaskState.LEFT_OUT
        }
        missing = [
            row
            for row in self.links.missing()
            if row.planned.client not in out and row.planned.server not in out
        ]
        return not missing and all(
            record.is_up for name, record in self.records.items() if name not in out
        )

    def may_restart(self, record: Record) -> bool:
        """Whether a service that ended is started again."""
        return not self.is_going_down and record.name != self.plan.ends_with

    def restart_time(self, _record: Record, delay: Nanos) -> Nanos:
        """When a service that ended now is started again: after its back-off, from now."""
        return Nanos(self.now + delay)

    @property
    def state(self) -> SystemState:
        """Where the whole system is."""
        if self.is_going_down:
            return SystemState.STOPPING
        if self.is_safe:
            return SystemState.SAFE
        return SystemState.STARTING if self.ready_at is None else SystemState.READY

    # ------------------------------------------------------------------ ready

    async def _check_ready(self) -> None:
        """Print `init: ready` once, the moment it is true."""
        if self.ready_at is not None or self.is_going_down or not self.is_ready():
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
        await self.say(
            "init: ready",
            links=links,
            grants=self.grants.rows,
            boot=self.memory.boot,
            boot_id=self.memory.boot_id.hex(),
        )
        await self.bus.say_refused()

    # ------------------------------------------------------------------ ends

    async def on_exit(self, record: Record, info: ExitInfo) -> None:
        """What an exit leads to: nothing, the end of the system, or another start."""
        wanted = self.stops.of(record)
        await self._on_exit(record, info, wanted)
        action = action_of(
            record, is_going_down=self.is_going_down, is_safe=self.is_safe, now=self.now
        )
        self.reports.on_end(record, info, wanted=wanted is not None, action=action)
        await self.reports.on_time()

    async def _on_exit(self, record: Record, info: ExitInfo, wanted: Wanted | None) -> None:
        is_bad = bool(info.code or info.signal)
        if self.is_going_down or (wanted is None and not self.may_restart(record)):
            record.state = TaskState.STOPPED
            if is_bad and record.reason not in UNCOUNTED:
                self.dirty.append(record.name)
            if not self.is_going_down:
                self.shut_down(orderly=not is_bad or record.reason in UNCOUNTED)
            return
        await self.say(
            f"init: end of {record.name}",
            generation=record.generation,
            code=info.code,
            signal=info.signal,
            reason=record.reason,
            died=record.died,
        )
        if wanted is not None:
            record.state = wanted.state
            record.restarts += wanted.state is TaskState.BACKING_OFF
            record.launch = None  # what is stopped on demand is started anew by who wants it
            return
        if record.reason not in UNCOUNTED:
            self.memory.on_end(record.name, record.reason, info.code, info.signal)
        await self.trial.on_end(record, info)
        if record.is_demanded:
            await self.launches.on_end(record, crashed=is_bad)
        else:
            await self.groups.on_end(record)

    async def restart(self, record: Record) -> None:
        """Kill the running instance because somebody asked for it."""
        await self.instances.kill(record, Reason.ASKED)

    # ------------------------------------------------------------------ the whole system

    async def enter_safe_mode(self, why: str) -> None:
        """Only services marked `safe` run from now on; the others are stopped in order."""
        self.is_safe = True
        self.safe_why = why
        others = [
            record
            for record in self.records.values()
            if not record.planned.safe and record.state is not TaskState.FAILED
        ]
        self.stops.begin(others, TaskState.LEFT_OUT, Reason.SAFE)
        await self.stops.advance()
        await self.say(
            "init: safe mode",
            why=why,
            boots=self.memory.boots,
            unstable=self.memory.unstable,
            ends=self.memory.ends,
            left_out=[record.name for record in others],
        )

    async def leave_safe_mode(self) -> int:
        """Forget the crashes and start what was left out; how many services that are."""
        self.is_safe = False
        self.safe_why = ""
        self.groups.forget()
        await self.memory.on_left()
        records = [
            record
            for record in self.records.values()
            if record.state is TaskState.LEFT_OUT or self.stops.is_stopping(record)
        ]
        for state in (TaskState.WAITING, TaskState.ON_DEMAND):
            ready = [each for each in records if resting_state(each.planned) is state]
            self.stops.begin(ready, state, Reason.SAFE)
        for record in records:
            record.first_started = None
            record.is_settled = False
            record.delay = Nanos(0)
        await self.stops.advance()
        self.stages.begin()
        await self.say("init: safe mode left", services=[record.name for record in records])
        return len(records)

    def shut_down(self, *, orderly: bool = False) -> None:
        """Begin to stop every service, the last started first.

        `orderly` is that somebody wished it: then the boot does not count as a crash.
        """
        if self.is_going_down:
            return
        self.is_going_down = True
        self._is_orderly = orderly
        self.stops.begin(self.records.values(), TaskState.STOPPED, Reason.EXIT)
        self.stops.hurry(Nanos(self.now + SHUTDOWN_MAX), Reason.STOP)

    def reboot(self) -> None:
        """As shut_down, and then the loader boots again."""
        self.is_rebooting = True
        self.shut_down(orderly=True)

    async def _on_signal(self, signal: bytes) -> None:
        """The kernel passes on a signal from outside."""
        await self.say("init: signal", name=signal.decode(errors="replace"))
        if signal == Signal.HUP.encode():
            await self.authority.read_again(self._policy_source)
        elif signal in (Signal.TERM.encode(), Signal.INT.encode()):
            if self.is_going_down:
                self.stops.hurry(self.now, Reason.SIGNAL)
            self.shut_down(orderly=True)

    async def _end(self) -> int:
        """Say how everything ended; the exit code."""
        if self._is_orderly:
            await self.memory.on_orderly_end()
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
            strays=self.asking.strays,
            foreign=self.desk.foreign,
            lost=self.desk.lost,
            lines_lost=self.console.lost,
            memory_failed=self.memory.failed,
            reports_lost=self.reports.lost,
        )
        if self.trial.state is TrialState.FAILED:
            return EXIT_SLOT_FAILED
        if self.is_rebooting:
            return EXIT_REBOOT
        if self._is_orderly and self.slot_boot is not None:
            return EXIT_ENDED if self.dirty else EXIT_STOPPED
        return EXIT_DIRTY if self.dirty else EXIT_CLEAN

    async def _drain(self) -> None:
        """Receive what the ended services left behind: the ends of their links, late words."""
        recv = Recv((self.boot.endpoint, self.inbox), NO_WAIT)
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
        due = [] if record.due is None else [record.due]
        return due + self.instances.times(record) + self.watch.times(record)

    def _wake_time(self) -> Nanos:
        """The earliest time anything is due; later than now, or at once."""
        times = [time for record in self.records.values() for time in self._times(record)]
        own = (
            self.stops.next_time(),
            self.baseline.next_time(),
            self.desk.next_time(),
            self.memory.next_time(),
            self.notifier.next_time(),
            self.reports.next_time(),
            self.asking.next_time(),
            self.trial.next_time(),
        )
        times += [time for time in own if time is not None]
        return min(times, default=NEVER)

    async def _on_time(self) -> None:
        """Do everything whose time has come."""
        await self.asking.on_time(self.hearing.until)
        for record in self.records.values():
            await self._look_after(record)
        await self.stops.advance()
        self.groups.on_time()
        await self.grants.on_time()
        if not self.is_going_down:
            for record in self.stages.startable():
                await self.grants.decide(record)
        await self.memory.on_time()
        await self._check_ready()
        await self.trial.on_time()
        await self.baseline.on_time()
        await self.desk.on_time()
        await self.notifier.on_time()
        await self.launches.on_time()
        await self.reports.on_time()

    async def _look_after(self, record: Record) -> None:
        if record.due is not None and self.now >= record.due:
            await self.grants.decide(record)
        await self.instances.on_time(record)
        await self.watch.on_time(record)

    # ------------------------------------------------------------------ messages

    async def _on_message(self, message: Message) -> None:
        if message.source == self.inbox:
            if message.cap is not None:
                await CapClose(message.cap)
            await self.asking.on_message(message)
        elif message.sender.service == KERNEL and not message.sender.pid and not message.link:
            await self._on_signal(message.data)
        else:
            await self.desk.on_message(self.instances.of(message.link), message)

    async def ask(
        self,
        record: Record,
        request: Any,
        deadline: Nanos,
        done: Done,
        *,
        move: Slot | None = None,
        refusals: bool = False,
    ) -> bool:
        """Send a request to the present instance without waiting; whether it was sent."""
        if record.slot is None:
            return False
        nonce, frame = self.asking.frame(record, request, deadline, done, refusals=refusals)
        try:
            await Send(record.slot, frame, move=move, deadline=NO_WAIT)
        except AbiError as error:
            self.asking.withdraw(nonce)
            if error.status in NOT_NOW:
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


_WOKEN: Final = (Status.TIMED_OUT, Status.NO_SPACE)  # a full table empties with the next look

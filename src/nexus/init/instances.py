r"""The life of one instance: spawned, bound by its echo, known by its links, killed, reaped.

    Spawn -> STARTING --Bind answered--> UP --control link closed--> leaving --Wait--> exit
                 \--no echo in time--> killed

Two links tell init of its end: the control link it was born with, and the link into init's inbox
by which it answers. Without either it is of no use and is ended.
"""

from typing import TYPE_CHECKING, Any, Final

from nexus.abi import (
    CONTROL_LINK_SIZE,
    LINK_DEPTH_DEFAULT,
    NO_WAIT,
    AbiError,
    CapClose,
    Entropy,
    ExitInfo,
    Kill,
    LinkCreate,
    LinkId,
    LinkTerms,
    Nanos,
    Now,
    Spawn,
    SpawnLastError,
    SpawnSpec,
    Status,
    Wait,
)
from nexus.init.bus import Found
from nexus.init.reasons import Reason
from nexus.init.record import NO_PID, Exit, Record, config_of
from nexus.protocols.init import TaskState
from nexus.protocols.meta import Bind, Bound
from nexus.runtime import TRACE_SEED_SIZE

if TYPE_CHECKING:
    from nexus.init.supervisor import Supervisor

CONTROL_TERMS: Final = LinkTerms(LINK_DEPTH_DEFAULT, CONTROL_LINK_SIZE, 0)
REAP_PAUSE: Final = Nanos(1_000_000)  # ns; between looks at a task whose control link closed
REAP_MAX: Final = Nanos(200_000_000)  # ns; then it lives without one of its links: it is killed

NOT_NOW: Final = (
    Status.QUEUE_FULL,
    Status.NO_SPACE,
    Status.NO_SUCH_ENDPOINT,
    Status.TIMED_OUT,
)
"""Refusals of a message or a link to an instance that ends, or has no room just now."""


class Instances:
    """The present instance of every service."""

    def __init__(self, init: "Supervisor") -> None:
        self._init = init
        self._by_control: dict[LinkId, Record] = {}
        self._by_answers: dict[LinkId, Record] = {}

    def of(self, link: LinkId) -> Record | None:
        """Whose instance speaks by this control link."""
        return self._by_control.get(link)

    # ------------------------------------------------------------------ starting

    async def start(self, record: Record, found: Found) -> None:
        """Spawn the next instance and send it the echo request that makes it UP."""
        planned = record.planned
        absent = {"absent": list(found.absent)} if found.absent else {}
        record.due = None
        record.first_started = record.first_started or self._init.now
        again = record.generation > 0
        await self._init.say(
            f"init: {'restart' if again else 'start'} {planned.name}",
            program=planned.program,
            digest=planned.program_digest,
            **absent,
        )
        memory = self._init.memory
        seed = await Entropy(TRACE_SEED_SIZE)
        config = config_of(
            planned, seed, memory.boot, memory.boot_id, record.launch, self._init.trial.slot_boot
        )
        record.argument = config.encoded()
        try:
            spawned = await Spawn(
                SpawnSpec(
                    name=planned.name,
                    program=planned.program,
                    control=self._init.boot.endpoint,
                    argument=record.argument,
                    qos=planned.qos,
                    cpu=self._init.placement(planned),
                    owner_size=planned.owner_size,
                    endpoints=planned.endpoints,
                    budget=planned.budget,
                    delegations=planned.delegations,
                    grants=found.grants,
                    memory=planned.memory,
                    cpu_share=planned.cpu_share,
                )
            )
        except AbiError as error:
            record.spawn_refused += 1
            record.spawn_reason = await SpawnLastError()
            await self._init.say(
                f"init: no start of {planned.name}",
                status=error.status.name,
                reason=record.spawn_reason.name,
            )
            await self._init.groups.on_no_start(record, Reason.SPAWN)
            return
        self._init.now = await Now()
        record.begin_instance(spawned, self._init.now)
        record.hardware = tuple(each.name for each in found.grants.hardware)
        self._by_control[spawned.link] = record
        await self._init.launches.on_started(record)
        await self._bind(record)

    async def _bind(self, record: Record) -> None:
        """Move a link into the reply inbox to the new instance; Bound is its control echo."""
        try:
            link = await LinkCreate(self._init.inbox, CONTROL_TERMS)
        except AbiError as error:
            if error.status not in NOT_NOW:
                raise
            await self.kill(record, Reason.NO_ECHO)
            return
        assert link.link is not None, "the inbox is init's own"

        async def on_bound(reply: Any, nonce: int) -> None:
            await self._on_bound(record, reply, nonce)

        record.answers = link.link
        self._by_answers[link.link] = record
        deadline = Nanos(self._init.now + record.planned.health_deadline)
        if not await self._init.ask(record, Bind(), deadline, on_bound, move=link.slot):
            await CapClose(link.slot)  # it is already gone, and its control link will say so

    async def _on_bound(self, record: Record, reply: Any, nonce: int) -> None:
        if not isinstance(reply, Bound) or reply.generation != record.generation:
            if record.leaving is None:
                await self.kill(record, Reason.NO_ECHO)
            return
        if record.state is not TaskState.STARTING:
            return
        record.state = TaskState.UP
        again = record.restarts > 0 or record.was_up
        record.was_up = True
        await self._init.say(
            f"init: {'back' if again else 'up'} {record.name}",
            pid=record.pid,
            service=f"0x{record.planned.service:016x}",
            generation=record.generation,
            echo_nonce=nonce,
        )
        await self._init.watch.probe(record)

    # ------------------------------------------------------------------ ends

    async def on_gone(self, link: LinkId) -> None:
        """A link of a service is closed. Its control link closes when it ends."""
        record = self._by_answers.pop(link, None)
        if record is not None:
            if record.answers == link:
                record.answers = None
                if record.lives:
                    record.deaf = self._init.now  # it is ending, or cannot be asked any more
            return
        record = self._by_control.pop(link, None)
        if record is None:
            return
        record.control = None
        await self._on_leaving(record)

    async def _on_leaving(self, record: Record) -> None:
        """An instance ends, or has lost a link it cannot be without: no more links, and reap it."""
        if record.leaving is None:
            record.leaving = record.died = self._init.now
            self._init.links.on_ended(record.name)
            await self._init.authority.on_doubt(record)
        await self._reap(record)

    async def _reap(self, record: Record) -> None:
        """Take the exit of a task whose control link closed, as soon as there is one."""
        assert record.leaving is not None, "only what is leaving is reaped"
        try:
            info = await Wait(record.pid, NO_WAIT)
        except AbiError as error:
            if error.status not in (Status.QUEUE_EMPTY, Status.TIMED_OUT):
                raise
            if self._init.now >= record.leaving + REAP_MAX and not record.kill_reason:
                await self.kill(record, Reason.CONTROL)
            return
        await self._on_exit(record, info)

    async def _on_exit(self, record: Record, info: ExitInfo) -> None:
        """The instance is gone: forget it, and see what follows."""
        wanted = self._init.stops.of(record)
        record.reason = record.kill_reason or (wanted.reason if wanted is not None else Reason.EXIT)
        if info.over_memory:  # a large one takes long to go, and may be killed again meanwhile
            record.reason = Reason.MEMORY
        record.last_exit = Exit(info, record.died)
        for slot in (record.slot, record.replies):
            if slot is not None:
                await CapClose(slot)
        record.slot = record.replies = record.leaving = None
        if record.control is not None:  # whom it gave that link to is not the service
            _ = self._by_control.pop(record.control)
            record.control = None
        record.pid = NO_PID
        record.deaf = None
        record.faltered = self._init.ready_at is not None and not self._init.baseline.is_taken
        self._init.desk.on_ended(record)
        await self._init.asking.forget(record)
        record.probe_again = None  # what was asked of it is not asked again
        record.probing = False
        record.answered = record.well_since = None
        await self._init.on_exit(record, info)

    async def kill(self, record: Record, reason: Reason) -> None:
        """End an instance at once; its control link says when it is gone."""
        if not record.lives:
            return
        record.kill_reason = record.kill_reason or reason
        await self._init.authority.on_doubt(record)
        try:
            await Kill(record.pid)
        except AbiError as error:
            if error.status is not Status.INVALID_ARGUMENT:  # it has just ended by itself
                raise

    # ------------------------------------------------------------------ time

    def times(self, record: Record) -> list[Nanos]:
        """When this instance needs init's attention next."""
        times = []
        if record.leaving is not None:
            times.append(Nanos(self._init.now + REAP_PAUSE))
        elif record.state is TaskState.STARTING:
            times.append(Nanos(record.started + record.planned.health_deadline))
        if record.deaf is not None and record.leaving is None:
            times.append(Nanos(record.deaf + REAP_MAX))
        return times

    async def on_time(self, record: Record) -> None:
        """Reap what has ended; end what does not answer its echo, or cannot answer any more."""
        now, heard = self._init.now, self._init.hearing.until
        if record.leaving is not None:
            if now > record.leaving:
                await self._reap(record)
        elif (
            record.state is TaskState.STARTING
            and heard >= record.started + record.planned.health_deadline
        ):
            await self.kill(record, Reason.NO_ECHO)
            record.started = now  # look again after as long, should it not be gone
        if record.deaf is not None and heard >= record.deaf + REAP_MAX:
            record.deaf = None
            if record.leaving is None:
                await self.kill(record, Reason.ANSWERS)
                await self._on_leaving(record)

"""init's side of its protocol: who asks, what may be asked, and the answers.

A request is taken for the instance whose control link it came by, and only if the kernel says
that this instance sent it. Answers go over the link the instance moved here with Bind, without
waiting: one that its caller has no room for is lost and counted.
"""

from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, Any, Final, NamedTuple, assert_never

from nexus.abi import (
    INIT_NAME,
    LINK_DEPTH_DEFAULT,
    AbiError,
    CapClose,
    LinkCreate,
    LinkTerms,
    Message,
    Nanos,
    Now,
    Pid,
    QosClass,
    Slot,
    Status,
    TaskTable,
    service_id,
)
from nexus.init.authority import BadPolicy
from nexus.init.links import LinkState
from nexus.init.record import NO_ACCOUNT, Record
from nexus.init.reload import BadSystemFile
from nexus.ipc.bulk import Bulk, BulkFault, accept_bulk, offer_bulk
from nexus.protocols.init import (
    AUDIT_LINE_SIZE_MAX,
    AUDIT_ROWS_MAX,
    LINK_ROWS_MAX,
    PROC_SPAWN,
    PROOF_CONTROL,
    PROTOCOL,
    REASON_TEXT_SIZE_MAX,
    REPLY_NAME,
    SYSTEM_CONTROL,
    SYSTEM_OBSERVE,
    SYSTEM_REBOOT,
    Account,
    AuditRows,
    AwaitReady,
    Ending,
    EndTask,
    GetAudit,
    GetLaunched,
    GetLinks,
    GetPolicy,
    GetResources,
    GetRouteCounts,
    GetService,
    GetSystem,
    GetTasks,
    InitRequest,
    InitStatus,
    Launch,
    LeaveSafeMode,
    LinkRow,
    LinkRows,
    Noted,
    NoteDenied,
    PolicyGiven,
    PolicyTaken,
    Ready,
    Reboot,
    Rebooting,
    ReloadSettings,
    Resources,
    Restart,
    Restarting,
    Route,
    RouteCounts,
    Routed,
    SafeModeLeft,
    ServiceRecord,
    SetPolicy,
    Shutdown,
    ShuttingDown,
    SystemInfo,
    TaskRow,
    TaskRows,
    TaskState,
)
from nexus.protocols.meta import PROTOCOL as META
from nexus.protocols.meta import Bind, Bound, GetStatus, ServiceStatus
from nexus.protocols.policy import AUTHORITY
from nexus.runtime.server import send_reply
from nexus.wire import (
    FRAME_KIND,
    HEADER_SIZE,
    OP_INDEX,
    PREFIX_SIZE,
    REPLY_BIT,
    Codec,
    RemoteProtocolError,
    ReplyStatus,
    answer,
    encode,
    unpack_header,
)

if TYPE_CHECKING:
    from nexus.init.supervisor import Supervisor

SETTLE_TIME: Final = Nanos(5_000_000)  # ns; init takes what has just arrived before it counts
HELD_MAX: Final = 4 * LINK_DEPTH_DEFAULT  # answers that wait; what four callers can have queued
RESOURCES_MAX: Final = Nanos(500_000_000)  # ns; then a silent service's account stays empty

INIT_SERVICE: Final = service_id(INIT_NAME)


class Refused(Exception):
    """The request gets a status instead of an answer."""

    def __init__(self, status: IntEnum) -> None:
        super().__init__(status.name)
        self.status = status


class Moving(NamedTuple):
    """An answer and the capability that moves with it."""

    reply: object
    slot: Slot


class Grant(NamedTuple):
    """The answer to a Route, the link that moves with it, and the row that it fills."""

    reply: Routed
    slot: Slot | None
    row: LinkState | None


@dataclass(slots=True, eq=False)  # two equal requests are two answers: each is itself only
class Held:
    """An answer that waits: for everybody's readiness, or until `due` for an account.

    `about` is whose account, which `Asking` brings by then; None with a `due` is init's own,
    taken when `due` comes.
    """

    record: Record
    generation: int
    header: bytes
    about: Record | None
    due: Nanos | None


class Later:
    """An answer that is given later, exactly once, if its caller is still the same instance."""

    def __init__(self, desk: "Desk", record: Record, header: bytes) -> None:
        self._desk = desk
        self._record = record
        self._generation = record.generation
        self._header = header

    async def give(self, reply: object) -> None:
        """Answer the request."""
        await self._end(answer(self._header, ReplyStatus.OK, encode(reply)))

    async def refuse(self, status: IntEnum) -> None:
        """Refuse the request."""
        await self._end(answer(self._header, status))

    async def _end(self, frame: bytes | bytearray) -> None:
        await self._desk.on_later(self, self._record, self._generation, frame)


def rights_for(request: InitRequest) -> tuple[str, ...]:
    """The rights of which a request needs one; Route needs none."""
    match request:
        case Route():
            return ()
        case AwaitReady():
            return (PROOF_CONTROL,)
        case GetPolicy() | SetPolicy():
            return (AUTHORITY,)
        case Launch() | NoteDenied() | EndTask() | GetLaunched():
            return (PROC_SPAWN,)
        case Restart() | Shutdown() | LeaveSafeMode() | ReloadSettings():
            return (SYSTEM_CONTROL, PROOF_CONTROL)
        case Reboot():
            return (SYSTEM_REBOOT, SYSTEM_CONTROL, PROOF_CONTROL)
        case _:
            return (SYSTEM_OBSERVE, PROOF_CONTROL)


def target_of(request: InitRequest) -> str:
    """What a right must be bound to, if it is: the service that is asked about."""
    match request:
        case GetService() | GetResources() | GetRouteCounts() | Restart():
            return request.name
        case Launch() | NoteDenied() | EndTask():
            return request.name
        case _:
            return ""


class Desk:
    """Serves nexus.protocols.init."""

    def __init__(self, init: "Supervisor") -> None:
        self._init = init
        self._held: list[Held] = []
        self._later: set[Later] = set()
        self.foreign = 0  # requests whose sender is not the instance of that control link
        self.unanswerable = 0  # requests with no way back
        self.lost = 0  # answers whose caller had no room or was gone

    # ------------------------------------------------------------------ a message

    async def on_message(self, record: Record | None, message: Message) -> None:
        """Take one message from the control endpoint."""
        if record is None or not record.is_sender(message.sender):
            self.foreign += 1
            await self._drop(message.cap)
            return
        data = message.data
        if len(data) > OP_INDEX and data[0] == FRAME_KIND and data[OP_INDEX] & REPLY_BIT:
            self.unanswerable += 1  # answering an answer could go on for ever
            await self._drop(message.cap)
            return
        codec = PROTOCOL.dispatch.get(data[:PREFIX_SIZE]) or META.dispatch.get(data[:PREFIX_SIZE])
        if codec is not None and codec.request_type is Bind and message.cap is not None:
            await self._bind(record, message, codec)
            return
        moves = codec is not None and codec.moves and codec.request_type is not Bind
        back = record.replies if message.cap is None or moves else message.cap
        if back is None:
            self.unanswerable += 1
            await self._drop(message.cap)
            return
        await self._serve(record, message, codec, back)
        if not moves:  # what moved in is closed by whoever took it
            await self._drop(message.cap)

    async def _bind(self, record: Record, message: Message, codec: Codec) -> None:
        """Keep the moved link as the way back, in place of an earlier one, if it works."""
        assert message.cap is not None, "Bind without a capability is served as malformed"
        try:
            _ = codec.decode_request(message.data[HEADER_SIZE:])
        except RemoteProtocolError:
            record.routes.malformed += 1
            _ = await self._send(message.cap, answer(message.data, ReplyStatus.MALFORMED))
            await CapClose(message.cap)
            return
        bound = encode(Bound(self._init.boot.generation))
        if await self._send(message.cap, answer(message.data, ReplyStatus.OK, bound)):
            await self._drop(record.replies)
            record.replies = message.cap
        else:
            await CapClose(message.cap)

    async def _serve(
        self, record: Record, message: Message, codec: Codec | None, back: Slot
    ) -> None:
        """Decode, authorise, act, answer."""
        if codec is not None and codec.request_type is Route:
            await self._serve_route(record, message, codec, back)
            return
        if codec is not None and codec.request_type is SetPolicy:
            await self._serve_set_policy(record, message, codec, back)
            return
        try:
            request = self._decoded(record, message, codec)
            self._authorise(record, request)
            reply = await self._answered(record, message, request)
        except Refused as refused:
            _ = await self._send(back, answer(message.data, refused.status))
            return
        moving: Slot | None = None
        if isinstance(reply, Moving):
            reply, moving = reply
        if reply is not None:
            frame = answer(message.data, ReplyStatus.OK, encode(reply))
            _ = await self._send(back, frame, move=moving)

    async def _serve_set_policy(
        self, record: Record, message: Message, codec: Codec, back: Slot
    ) -> None:
        """As `_serve`, with the memory that moved in, which is closed whatever comes of it."""
        cap = message.cap
        try:
            request = self._decoded(record, message, codec)
            assert isinstance(request, SetPolicy), "the prefix named it"
            self._authorise(record, request)
            bulk = await accept_bulk(cap, 0, request.size)
            cap = None
            reply = await self._set_policy(bulk)
        except Refused as refused:
            await self._drop(cap)
            _ = await self._send(back, answer(message.data, refused.status))
            return
        _ = await self._send(back, answer(message.data, ReplyStatus.OK, encode(reply)))

    async def _serve_route(
        self, record: Record, message: Message, codec: Codec, back: Slot
    ) -> None:
        """As `_serve`, with a fresh link that moves with the answer, or is closed again."""
        try:
            request = self._decoded(record, message, codec)
            assert isinstance(request, Route), "the prefix named it"
            grant = await self._route(record, request)
        except Refused as refused:
            _ = await self._send(back, answer(message.data, refused.status))
            return
        header = unpack_header(message.data)
        assert header is not None, "it was decoded"
        if header.deadline <= await Now():  # who asked waits no more, and would let the link go
            await self._drop(grant.slot)
            _ = await self._send(back, answer(message.data, ReplyStatus.EXPIRED))
            return
        record.routes.ok += 1
        frame = answer(message.data, ReplyStatus.OK, encode(grant.reply))
        sent = await self._send(back, frame, move=grant.slot)
        if grant.row is not None and sent:
            terms = LinkTerms(grant.reply.depth, grant.reply.size, grant.reply.delegations)
            self._init.links.on_taken(grant.row, terms, record.generation, grant.reply.generation)

    def _decoded(self, record: Record, message: Message, codec: Codec | None) -> InitRequest:
        data = message.data
        header = unpack_header(data)
        if header is None or codec is None or codec.request_type not in PROTOCOL.codecs:
            record.routes.malformed += 1
            broken = header is None or header.kind != FRAME_KIND or header.status
            is_bind = codec is not None and codec.request_type is Bind  # without its capability
            raise Refused(ReplyStatus.MALFORMED if broken or is_bind else ReplyStatus.UNSUPPORTED)
        try:
            request: InitRequest = codec.decode_request(data[HEADER_SIZE:])
        except RemoteProtocolError as error:
            record.routes.malformed += 1
            raise Refused(ReplyStatus.MALFORMED) from error
        if header.deadline <= message.now:
            raise Refused(ReplyStatus.EXPIRED)
        return request

    def _authorise(self, record: Record, request: InitRequest) -> None:
        """Everything but Route needs a right, as the policy in force gives them."""
        target = target_of(request)
        if not self._init.authority.may(record, *rights_for(request), target=target):
            raise Refused(ReplyStatus.DENIED)

    async def _send(
        self, slot: Slot, frame: bytes | bytearray, *, move: Slot | None = None
    ) -> bool:
        """Queue an answer without waiting; whether it was sent. What was not is counted."""
        sent = await send_reply(slot, frame, move=move)
        self.lost += not sent
        return sent

    async def _drop(self, cap: Slot | None) -> None:
        if cap is not None:
            await CapClose(cap)

    # ------------------------------------------------------------------ routes

    async def _route(self, asker: Record, request: Route) -> Grant:
        """A route: the answer, and the fresh link that is to move with it."""
        tally = asker.routes
        if request.name == REPLY_NAME:
            return Grant(self._own_route(asker), None, None)
        provider = self.find(request.name)
        refusal = self.route_refusal(asker, provider)
        if refusal is not None:
            self._count(asker, refusal)
            raise Refused(refusal)
        assert provider is not None, "route_refusal refuses what is not there"
        row = self._init.links.find(asker.name, provider.name)
        assert row is not None, "route_refusal refuses what is not planned"
        if not self._init.links.has_room(row):
            tally.busy += 1
            raise Refused(ReplyStatus.BUSY)
        planned = row.planned
        assert provider.slot is not None, "route_refusal refuses what has no task"
        terms = LinkTerms(planned.depth, planned.size, planned.delegations)
        try:
            link = await LinkCreate(provider.slot, terms)
        except AbiError as error:
            if error.status not in (Status.NO_SPACE, Status.NO_SUCH_ENDPOINT):
                raise
            tally.down += 1  # it is ending, or has not yet seen the end of its former clients
            raise Refused(InitStatus.ROUTE_DOWN) from error
        reply = Routed(
            service=provider.planned.service,
            generation=provider.generation,
            depth=planned.depth,
            size=planned.size,
            delegations=planned.delegations,
            reply_depth=planned.reply_depth,
            reply_size=planned.reply_size,
        )
        return Grant(reply, link.slot, row)

    def find(self, name: str) -> Record | None:
        """The service of that name."""
        return self._init.records.get(name)

    def route_refusal(self, asker: Record, provider: Record | None) -> InitStatus | None:
        """Why there is no route, or None."""
        if provider is None:
            return InitStatus.ROUTE_NOT_FOUND
        if self._init.links.find(asker.name, provider.name) is None:
            return InitStatus.ROUTE_DENIED
        if provider.slot is None or provider.leaving is not None:
            return InitStatus.ROUTE_DOWN
        return None

    def _own_route(self, asker: Record) -> Routed:
        """`@reply`: the caller's own identity, and no terms, for no link is made."""
        return Routed(
            service=asker.planned.service,
            generation=asker.generation,
            depth=0,
            size=0,
            delegations=0,
            reply_depth=0,
            reply_size=0,
        )

    def _count(self, asker: Record, refusal: InitStatus) -> None:
        tally = asker.routes
        match refusal:
            case InitStatus.ROUTE_NOT_FOUND:
                tally.not_found += 1
            case InitStatus.ROUTE_DENIED:
                tally.denied += 1
            case InitStatus.ROUTE_DOWN:
                tally.down += 1
            case _:
                raise AssertionError("no route is refused with it")

    # ------------------------------------------------------------------ the other requests

    async def _answered(
        self, record: Record, message: Message, request: InitRequest
    ) -> object | None:
        """The answer, a Moving one too, or None if it waits."""
        match request:
            case Route() | SetPolicy():
                raise AssertionError("what moves a capability is served before")
            case AwaitReady():
                return await self._await_ready(record, message)
            case GetTasks():
                return await self._tasks()
            case GetLinks():
                return self._links(request.first)
            case GetRouteCounts():
                tally = self._known(request.name).routes
                return RouteCounts(
                    ok=tally.ok,
                    not_found=tally.not_found,
                    denied=tally.denied,
                    down=tally.down,
                    busy=tally.busy,
                    malformed=tally.malformed,
                )
            case Restart():
                return await self._restart(request.name)
            case GetService():
                return self._service(self._known(request.name))
            case GetAudit():
                return await self._audit(request.first)
            case GetResources():
                return await self._resources(record, message, request.name)
            case Shutdown():
                running = sum(each.lives for each in self._init.records.values())
                self._init.shut_down(orderly=True)
                return ShuttingDown(services=running)
            case Reboot():
                if self._init.slot_boot is None:
                    raise Refused(InitStatus.NO_SLOTS)
                running = sum(each.lives for each in self._init.records.values())
                self._init.reboot()
                return Rebooting(services=running)
            case GetPolicy():
                return await self._policy()
            case GetSystem():
                return self._system()
            case LeaveSafeMode():
                if not self._init.is_safe or self._init.is_going_down:
                    raise Refused(InitStatus.NOT_IN_SAFE_MODE)
                return SafeModeLeft(services=await self._init.leave_safe_mode())
            case Launch():
                self._check_launch(record, request.name)
                later = self._defer(record, message)
                await self._init.launches.launch(self._known(request.name), request, later)
                return None
            case NoteDenied():
                self._check_launch(record, request.name)
                self._init.launches.note_denied(self._known(request.name))
                return Noted()
            case EndTask():
                return await self._end_task(record, request)
            case GetLaunched():
                return self._init.launches.rows(record)
            case ReloadSettings():
                await self._reload(record, message)
                return None
            case _:
                assert_never(request)

    async def _reload(self, record: Record, message: Message) -> None:
        """Answered when every service that is told has answered, or did not in time."""
        reload = self._init.reload
        try:
            plan = reload.read()
        except BadSystemFile as error:
            await self._init.say("init: settings not read", error=str(error)[:400])
            raise Refused(InitStatus.BAD_SYSTEM_FILE) from error
        await reload.begin(plan, self._defer(record, message))

    # ------------------------------------------------------------------ services on demand

    def _check_launch(self, record: Record, name: str) -> None:
        refusal = self._init.launches.refusal(record, self.find(name))
        if refusal is not None:
            raise Refused(refusal)

    async def _end_task(self, record: Record, request: EndTask) -> Ending:
        if self._init.launches.refusal(record, self.find(request.name)) is not None:
            raise Refused(InitStatus.NO_SUCH_CHILD)
        refusal = await self._init.launches.end(self._known(request.name), request)
        if refusal is not None:
            raise Refused(refusal)
        return Ending()

    def _defer(self, record: Record, message: Message) -> Later:
        """Answer later, as far as there is room for answers that wait."""
        if len(self._later) >= HELD_MAX or message.cap is not None:
            raise Refused(ReplyStatus.BUSY)
        later = Later(self, record, message.data[:HEADER_SIZE])
        self._later.add(later)
        return later

    async def on_later(
        self, later: Later, record: Record, generation: int, frame: bytes | bytearray
    ) -> None:
        """A deferred answer is given."""
        assert later in self._later, "a deferred answer is given once"
        self._later.remove(later)
        if record.replies is None or record.generation != generation:
            self.lost += 1
            return
        _ = await self._send(record.replies, frame)

    def _known(self, name: str) -> Record:
        record = self._init.records.get(name)
        if record is None:
            raise Refused(InitStatus.ROUTE_NOT_FOUND)
        return record

    async def _await_ready(self, record: Record, message: Message) -> Ready | None:
        if self._init.baseline.is_taken:
            return self._ready()
        _ = self._hold(record, message, about=None, due=None)
        return None

    def _ready(self) -> Ready:
        init = self._init
        assert init.ready_at is not None, "the baseline comes after `init: ready`"
        return Ready(
            digest=init.checked_digest(),
            services=len(init.records),
            links=len(init.links.rows),
            at=init.ready_at,
        )

    async def _tasks(self) -> TaskRows:
        table = await TaskTable()
        by_name = {task.name: task for task in table}
        own = by_name.get(INIT_NAME)
        rows = [
            TaskRow(
                name=INIT_NAME,
                pid=self._init.boot.pid,
                service=INIT_SERVICE,
                generation=self._init.boot.generation,
                qos=QosClass.NORMAL if own is None else own.qos,
                state=TaskState.UP,
            )
        ]
        for record in self._init.records.values():
            task = by_name.get(record.name)
            rows.append(
                TaskRow(
                    name=record.name,
                    pid=Pid(0) if task is None else task.pid,
                    service=record.planned.service,
                    generation=record.generation if task is None else task.generation,
                    qos=record.planned.qos if task is None else task.qos,
                    state=record.state,
                )
            )
        return TaskRows(live=len(table), rows=rows)

    def _links(self, first: int) -> LinkRows:
        rows = self._init.links.rows
        return LinkRows(
            total=len(rows),
            grants=self._init.grants.count,
            rows=[
                LinkRow(
                    client=row.planned.client,
                    server=row.planned.server,
                    depth=row.planned.depth,
                    size=row.planned.size,
                    delegations=row.planned.delegations,
                    client_generation=row.client_generation,
                    server_generation=row.server_generation,
                    taken=row.taken,
                )
                for row in rows[first : first + LINK_ROWS_MAX]
            ],
        )

    async def _restart(self, name: str) -> Restarting:
        record = self._known(name)
        if not record.lives or record.leaving is not None:
            raise Refused(InitStatus.ROUTE_DOWN)
        reply = Restarting(pid=record.pid, generation=record.generation)
        await self._init.restart(record)
        return reply

    def _service(self, record: Record) -> ServiceRecord:
        last = record.last_exit
        return ServiceRecord(
            state=record.state,
            health=record.health,
            pid=record.pid,
            generation=record.generation,
            restarts=record.restarts,
            died=record.died,
            exit_code=0 if last is None else last.info.code,
            exit_signal=0 if last is None else last.info.signal,
            reason=record.reason,
            spawn_refused=record.spawn_refused,
            spawn_reason=record.spawn_reason,
            probe_nonce=record.probe_nonce,
            program_digest=record.planned.program_digest,
        )

    async def _audit(self, first: int) -> AuditRows:
        init = self._init
        await init.take_audit()
        oldest = init.audit_total - len(init.audit)
        begin = max(first, oldest)
        kept = list(init.audit)[begin - oldest : begin - oldest + AUDIT_ROWS_MAX]
        return AuditRows(
            first=begin,
            total=init.audit_total,
            dropped=init.audit_dropped,
            lines=[line[:AUDIT_LINE_SIZE_MAX] for line in kept],
        )

    # ------------------------------------------------------------------ policy and system

    async def _policy(self) -> Moving:
        """The policy in force, in memory that its taker can only read."""
        authority = self._init.authority
        encoded = authority.policy.encoded()
        slot = await offer_bulk(encoded)
        if slot is None:
            raise Refused(ReplyStatus.BUSY)
        return Moving(PolicyGiven(size=len(encoded), generation=authority.generation), slot)

    async def _set_policy(self, bulk: Bulk | BulkFault) -> PolicyTaken:
        authority = self._init.authority
        if isinstance(bulk, BulkFault):
            await self._init.say("init: policy refused", error=bulk.value)
            raise Refused(InitStatus.BAD_POLICY)
        try:
            policy = authority.read(bulk)
        except BadPolicy as error:
            await self._init.say("init: policy refused", error=str(error)[:400])
            raise Refused(InitStatus.BAD_POLICY) from error
        finally:
            await bulk.release()
        await authority.put_in_force(policy)
        return PolicyTaken(generation=authority.generation)

    def _system(self) -> SystemInfo:
        init = self._init
        slot = init.slot_boot
        return SystemInfo(
            name=init.plan.name,
            digest=init.checked_digest(),
            state=init.state,
            why=init.safe_why[:REASON_TEXT_SIZE_MAX],
            started=init.boot.now,
            ready=init.ready_at or 0,
            now=init.now,
            boots=init.memory.boots,
            boot_id=init.memory.boot_id,
            policy_generation=init.authority.generation,
            policy_digest=init.authority.digest,
            policy_available=init.authority.is_available,
            slot="" if slot is None else slot.slot,
            set_version=0 if slot is None else slot.version,
            set_digest="" if slot is None else slot.digest,
            trial=init.trial.state,
        )

    # ------------------------------------------------------------------ accounts

    async def _resources(self, record: Record, message: Message, name: str) -> Resources | None:
        init = self._init
        if name == INIT_NAME:
            _ = self._hold(record, message, about=None, due=Nanos(init.now + SETTLE_TIME))
            return None
        about = self._known(name)
        held = self._hold(record, message, about=about, due=Nanos(init.now + RESOURCES_MAX))

        async def on_status(reply: Any, _nonce: int) -> None:
            if held in self._held:  # its asker is still there
                await self._give_account(held, reply)

        assert held.due is not None, "an account is not waited for without end"
        if await init.ask(about, GetStatus(), held.due, on_status):
            return None
        self._held.remove(held)
        return await self._accounts(about.at_ready, NO_ACCOUNT)

    async def _give_account(self, held: Held, status: ServiceStatus | None) -> None:
        self._held.remove(held)
        init = self._init
        if held.about is None:
            accounts = await self._accounts(init.baseline.own, await init.own_account())
            await self._release(held, accounts)
            return
        now = NO_ACCOUNT
        if status is not None:
            now = Account(
                generation=status.generation, counters=status.counters, facts=status.facts
            )
        await self._release(held, await self._accounts(held.about.at_ready, now))

    async def _accounts(self, ready: Account, now: Account) -> Resources:
        return Resources(
            ready=ready,
            now=now,
            tasks_ready=self._init.baseline.tasks,
            tasks_now=len(await TaskTable()),
        )

    # ------------------------------------------------------------------ answers that wait

    @property
    def waiting_for_ready(self) -> set[str]:
        """The services that wait in AwaitReady, and so may not answer a probe."""
        return {held.record.name for held in self._held if held.due is None}

    def _hold(
        self, record: Record, message: Message, *, about: Record | None, due: Nanos | None
    ) -> Held:
        if len(self._held) >= HELD_MAX or message.cap is not None:
            raise Refused(ReplyStatus.BUSY)
        held = Held(record, record.generation, message.data[:HEADER_SIZE], about, due)
        self._held.append(held)
        return held

    async def _release(self, held: Held, reply: object) -> None:
        """Give a held answer, if its caller is still the same instance."""
        if held.record.replies is None or held.record.generation != held.generation:
            self.lost += 1
            return
        frame = answer(held.header, ReplyStatus.OK, encode(reply))
        _ = await self._send(held.record.replies, frame)

    async def on_ready(self) -> None:
        """Everybody who waits in AwaitReady gets the answer."""
        waiting = [held for held in self._held if held.due is None]
        self._held = [held for held in self._held if held.due is not None]
        for held in waiting:
            await self._release(held, self._ready())

    def on_ended(self, record: Record) -> None:
        """An instance ended: what it waits for is dropped."""
        self._held = [held for held in self._held if held.record is not record]

    def next_time(self) -> Nanos | None:
        """When the first account of init itself is to be taken."""
        return min(
            (held.due for held in self._held if held.about is None and held.due is not None),
            default=None,
        )

    async def on_time(self) -> None:
        """Give the accounts of init itself that are due."""
        for held in [each for each in self._held if each.about is None]:
            if held.due is not None and held.due <= self._init.now:
                await self._give_account(held, None)

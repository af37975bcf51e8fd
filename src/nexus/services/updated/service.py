"""updated: brings a signed system set to the standby slot, has it tried, and keeps or leaves it.

Owns the boot-control record while the system runs, both slots, and /state/boot/ in statefs. It
trusts the anchor on the boot device, init's word that a trial is healthy, and policyd about who may
what; the bytes that come it trusts in nothing. The slot that runs is never written, and nothing is
staged or switched to while that one is not proven good. What it does is in the audit, request by
request: pieces as their sum. Nothing secret goes through it. Decision: docs/adr/0024.
"""

from collections.abc import Awaitable
from contextlib import suppress
from typing import Any, Final, TypeAlias, assert_never

from nexus.abi import INIT_NAME, Clock, ClockMap, Nanos, Now, ServiceId, service_id
from nexus.bootctl import NO_TRACE, BootRecord, Reason, SlotName
from nexus.ipc import Bulk, accept_bulk, deadline_after, nested_deadline
from nexus.protocols.logd import Level
from nexus.protocols.meta import HEALTH_ANSWER
from nexus.protocols.updated import (
    COMMIT_RIGHT,
    HISTORY_PAGE,
    METADATA_SIZE_MAX,
    PROTOCOL,
    READ_RIGHT,
    REASONS_PAGE,
    ROLLBACK_RIGHT,
    SLOTS_TARGET,
    STAGE_RIGHT,
    SWITCH_RIGHT,
    TAIL_SIZE_MAX,
    Begin,
    BeginInline,
    Begun,
    Chunk,
    ChunkInline,
    Commit,
    Committed,
    Events,
    Finish,
    GetHistory,
    GetReasons,
    GetUpdate,
    MetadataTaken,
    PutMetadata,
    ReasonRow,
    Reasons,
    ReportHealth,
    Rollback,
    RolledBack,
    Slot,
    SlotRow,
    SlotState,
    Staged,
    Switch,
    Switched,
    Taken,
    Update,
    UpdatedRequest,
    UpdatedStatus,
)
from nexus.runtime import Call, Deferred, Refusal
from nexus.runtime.authority import AUDIT_SCOPE
from nexus.runtime.program import Context
from nexus.services.updated.config import DISTRIBUTIONS, PYTHON, Settings
from nexus.services.updated.engine import NAMES, Engine, Rules
from nexus.services.updated.faults import Declined
from nexus.services.updated.kept import SLOTS, Asker
from nexus.services.updated.places import STATEFSD_NAME, StateMemory, open_devices, reboot
from nexus.wire import ReplyStatus

START_MAX: Final = Nanos(1_500_000_000)  # ns; inside the readiness deadline
WORK_MAX: Final = Nanos(1_500_000_000)  # ns for one request, whatever its deadline
SWITCH_MAX: Final = Nanos(10_000_000_000)  # ns; statefsd may copy SNAPSHOT_SIZE_MAX before
SETTLE_MAX: Final = Nanos(400_000_000)  # ns of one attempt to put right what a start could not
SETTLE_PAUSE: Final = Nanos(500_000_000)  # ns before the first of them, doubling
SETTLE_PAUSE_MAX: Final = Nanos(16_000_000_000)  # ns
SYNC_AFTER: Final = Nanos(1_000_000_000)  # ns; what came of a slow transfer is kept so often
REBOOT_MAX: Final = Nanos(500_000_000)  # ns for init's answer
STOP_MAX: Final = Nanos(500_000_000)  # ns to keep how far a transfer came; else it is sent again
WAITING_MAX: Final = 4  # requests that wait for the end of a verification
INIT: Final = service_id(INIT_NAME)

# A probe that came right after a request, and an attempt before it, is answered in time; one that
# comes during a switch that copies data is not: systems with such data give `health` an `answer`.
assert WORK_MAX + SETTLE_MAX < HEALTH_ANSWER

Reply: TypeAlias = (
    Update
    | MetadataTaken
    | Begun
    | Taken
    | Staged
    | Switched
    | Committed
    | RolledBack
    | Reasons
    | Events
    | Deferred
)
QUIET: Final = (GetUpdate, GetReasons, GetHistory, PutMetadata, Chunk, ChunkInline)
"""Requests that are audited when they are refused; what they bring is in the audit of others."""


class Updated:
    """Serves nexus.protocols.updated."""

    PROTOCOL = PROTOCOL

    def __init__(self, context: Context) -> None:
        self._context = context
        self._settings = context.settings_as(Settings)
        self._services = {service_id(name): name for name in context.config.names}
        self._memory = StateMemory(context)
        self._engine: Engine
        self._is_begun = False  # whether there is an engine: requests may come before
        self._clock: Clock
        self._declined: Declined | None = None  # why the record could not be opened
        self._due: Nanos | None = None  # when to try again what is not settled
        self._pause = SETTLE_PAUSE
        self._sync_due: Nanos | None = None  # when to keep how far the transfer is
        self._section = bytearray()  # metadata that one caller puts together
        self._section_of = ServiceId(0)
        self._waiting: list[Deferred] = []  # for the end of a verification
        self._finisher = Asker()  # on whose behalf it goes on
        self._rebooting = False
        self._audited = 0
        self._pieces = 0
        self._bytes = 0

    # ------------------------------------------------------------------ hooks

    async def start(self) -> None:
        """Open the devices, the record and the history; what fails for now is tried again."""
        self._clock = await ClockMap()
        boot, slots = await open_devices(self._context)
        rules = Rules(
            release=not self._settings.development_keys,
            python=PYTHON,
            distributions=DISTRIBUTIONS,
        )
        slot = self._context.config.slot
        running = SlotName(slot) if slot else None
        self._engine = Engine(boot, slots, self._memory, rules, running)
        self._memory.until = await self._context.after(START_MAX)
        with suppress(Declined):  # the planned link is there also if there is no record to open
            _ = await self._memory.connect()
        self._is_begun = True
        await self._settle(START_MAX)

    def ready(self) -> bool:
        """Whether the record was read, and the history at statefsd; or there is no record."""
        return self._engine.opened or self._unprovisioned

    def stands_on(self) -> str:
        """What its readiness is worth."""
        return "not provisioned" if self._unprovisioned else "statefs"

    def evidence(self) -> dict[str, Any]:
        """With the line that it is ready: what the record and the history said."""
        if self._unprovisioned:
            return {"store": "", "slot": "", "sequence": 0}
        record = self._engine.record
        return {
            "store": STATEFSD_NAME,
            "statefsd_generation": self._memory.generation,
            "slot": self._engine.running,
            "sequence": record.sequence,
            "trying": "" if record.trying is None else record.trying,
            "tries_left": record.slot(self._engine.running).tries_left,
            "events": self._engine.history.last,
        }

    def facts(self) -> dict[str, int]:
        """What it has done in this instance's life, and how it stands."""
        facts = {
            "audited_total": self._audited,
            "pieces_total": self._pieces,
            "received_bytes_total": self._bytes,
            "statefsd_generation": self._memory.generation,
            "provisioned": int(not self._unprovisioned),
        }
        if self._engine.opened:
            record = self._engine.record
            facts["sequence"] = record.sequence
            facts["boots"] = record.boots
            facts["trial"] = int(record.trying is not None)
            facts["running_slot"] = int(SLOTS[self._engine.running])
            facts["history_unwritten"] = int(self._engine.history.unwritten)
        return facts

    def busy(self) -> bool:
        """Whether a verification goes on, or a reboot is to be asked for."""
        return self._is_begun and (self._rebooting or self._engine.verifying)

    async def on_idle(self) -> None:
        """Nobody asks just now: one small step."""
        if self._rebooting:
            await self._reboot()
        else:
            await self._verify_on()

    def next_time(self) -> Nanos | None:
        """When to try again what is not settled, or to keep how far a transfer is."""
        times = [time for time in (self._due, self._sync_due) if time is not None]
        return min(times, default=None)

    async def on_time(self, now: Nanos) -> None:
        """What is due of the two."""
        if self._sync_due is not None and self._sync_due <= now:
            self._sync_due = None
            await self._sync(SETTLE_MAX)
        if self._due is not None and self._due <= now:
            self._pause = min(Nanos(2 * self._pause), SETTLE_PAUSE_MAX)
            self._due = deadline_after(now, self._pause)
            await self._settle(SETTLE_MAX)

    async def on_stop(self) -> None:
        """An orderly end: what came of a transfer need not be sent again."""
        if self._engine.opened and self._engine.receiving:
            await self._sync(STOP_MAX)

    async def _sync(self, span: Nanos) -> None:
        """Keep how far the transfer is; what cannot be kept is sent again after a cut."""
        self._memory.until = deadline_after(await Now(), span)
        try:
            await self._engine.sync()
        except Declined as declined:
            fields = {"status": declined.status.name, "why": declined.detail}
            _ = self._context.log.write(Level.WARN, "transfer not kept", fields)

    # ------------------------------------------------------------------ requests

    async def handle(self, call: Call, request: UpdatedRequest) -> Reply:
        """The reply; every refusal and every change is audited."""
        most = SWITCH_MAX if isinstance(request, Switch) else WORK_MAX
        self._memory.until = nested_deadline(call.deadline, deadline_after(call.now, most))
        try:
            reply = await self._serve(call, request)
        except Declined as declined:
            call.note("why", declined.detail)
            self._audit(self._asker(call), request, declined.status.name, declined.detail)
            self._look_after(call.now)
            raise call.refuse(declined.status) from None
        except Refusal as refusal:
            self._audit(self._asker(call), request, refusal.status.name)
            raise
        if not isinstance(request, QUIET) and not isinstance(reply, Deferred):
            self._audit(self._asker(call), request, "OK", _said(reply))
        self._look_after(call.now)
        return reply

    async def _serve(self, call: Call, request: UpdatedRequest) -> Reply:
        match request:
            case GetUpdate():
                return await self._update(call)
            case PutMetadata():
                return await self._put_metadata(call, request)
            case Begin():
                return await self._begin(call, request)
            case BeginInline():
                return await self._begin_inline(call, request)
            case Chunk():
                return await self._chunk(call, request)
            case ChunkInline():
                return await self._chunk_inline(call, request)
            case Finish():
                return await self._finish(call)
            case Switch():
                return await self._switch(call, request)
            case ReportHealth():
                return await self._report_health(call, request)
            case Commit():
                return await self._commit(call, request)
            case Rollback():
                return await self._rollback(call, request)
            case GetReasons():
                return await self._reasons(call, request)
            case GetHistory():
                return await self._history(call, request)
            case _:
                assert_never(request)

    # ------------------------------------------------------------------ looking

    async def _update(self, call: Call) -> Update:
        await self._require(call, READ_RIGHT)
        engine = await self._open()
        record = engine.record
        return Update(
            sequence=record.sequence,
            boots=_u32(record.boots),
            active=SLOTS[record.active],
            trying=Slot.NONE if record.trying is None else SLOTS[record.trying],
            running=SLOTS[engine.running],
            floor=record.floor,
            time_floor=engine.time_floor,
            snapshot=_u32(record.snapshot),
            restoring=record.restore,
            slots=[_row(record, name, engine.capacity(name)) for name in SlotName],
            transfer=engine.transfer(),
            reasons=len(record.reasons),
            events=engine.history.last,
        )

    async def _reasons(self, call: Call, request: GetReasons) -> Reasons:
        await self._require(call, READ_RIGHT)
        engine = await self._open()
        latest = engine.record.reasons[::-1]
        rows = latest[request.index : request.index + REASONS_PAGE]
        return Reasons([_reason(each) for each in rows], len(latest))

    async def _history(self, call: Call, request: GetHistory) -> Events:
        await self._require(call, READ_RIGHT)
        engine = await self._open()
        return Events(*engine.history.page(request.before, HISTORY_PAGE))

    # ------------------------------------------------------------------ staging

    async def _put_metadata(self, call: Call, request: PutMetadata) -> MetadataTaken:
        await self._require(call, STAGE_RIGHT)
        sender = call.sender.service
        if request.offset == 0 and not self._has(sender, request):
            self._section = bytearray()
            self._section_of = sender
        size = len(self._section)
        if self._section_of != sender or request.offset > size:
            raise Declined(UpdatedStatus.OUT_OF_ORDER, f"metadata at {request.offset} of {size}")
        if request.offset + len(request.data) > METADATA_SIZE_MAX:
            raise Declined(UpdatedStatus.TOO_LARGE, f"more than {METADATA_SIZE_MAX} bytes")
        if not self._has(sender, request):
            self._section[request.offset :] = request.data
        return MetadataTaken(len(self._section))

    def _has(self, sender: ServiceId, request: PutMetadata) -> bool:
        """Whether these bytes have come already."""
        end = request.offset + len(request.data)
        return self._section_of == sender and self._section[request.offset : end] == request.data

    async def _begin(self, call: Call, request: Begin) -> Begun:
        await self._require(call, STAGE_RIGHT)
        if request.length > METADATA_SIZE_MAX:
            raise Declined(UpdatedStatus.TOO_LARGE, f"{request.length} bytes of metadata")
        bulk = await self._bulk(call, request.offset, request.length)
        section = bytes(bulk.view)
        await bulk.release()
        return await self._begun(call, section)

    async def _begin_inline(self, call: Call, request: BeginInline) -> Begun:
        await self._require(call, STAGE_RIGHT)
        if self._section_of != call.sender.service or len(self._section) != request.length:
            raise Declined(UpdatedStatus.INCOMPLETE, f"not {request.length} bytes of metadata")
        return await self._begun(call, bytes(self._section))

    async def _begun(self, call: Call, section: bytes) -> Begun:
        engine = await self._open()
        begun = await engine.begin(section, self._asker(call))
        if not engine.verifying:
            self._conclude(Declined(UpdatedStatus.ABANDONED, "another transfer was begun"))
        return begun

    async def _chunk(self, call: Call, request: Chunk) -> Taken:
        await self._require(call, STAGE_RIGHT)
        engine = await self._open()
        bulk = await self._bulk(call, request.start, request.length)
        try:
            taking = engine.take(request.offset, bulk.view)
            return await self._counted(taking, request.length, call.now)
        finally:
            await bulk.release()

    async def _chunk_inline(self, call: Call, request: ChunkInline) -> Taken:
        await self._require(call, STAGE_RIGHT)
        engine = await self._open()
        taking = engine.take(request.offset, request.data)
        return await self._counted(taking, len(request.data), call.now)

    async def _counted(self, taking: Awaitable[Taken], size: int, now: Nanos) -> Taken:
        taken = await taking
        self._pieces += 1
        self._bytes += size
        if taken.durable == taken.offset:
            self._sync_due = None
        elif self._sync_due is None:
            self._sync_due = deadline_after(now, SYNC_AFTER)
        return taken

    async def _bulk(self, call: Call, offset: int, length: int) -> Bulk:
        bulk = await accept_bulk(call.take_cap(), offset, length)
        if not isinstance(bulk, Bulk):
            raise Declined(UpdatedStatus.BAD_BULK, bulk.value)
        return bulk

    async def _finish(self, call: Call) -> Staged | Deferred:
        await self._require(call, STAGE_RIGHT)
        engine = await self._open()
        if len(self._waiting) >= WAITING_MAX:
            self._waiting = [each for each in self._waiting if each.deadline > call.now]
        if len(self._waiting) >= WAITING_MAX:
            raise call.refuse(ReplyStatus.BUSY)
        was_verifying = engine.verifying
        staged = await engine.finish(self._asker(call))
        if staged is not None:
            return staged
        if not was_verifying:
            self._finisher = self._asker(call)
        deferred = call.defer()
        self._waiting.append(deferred)
        return deferred

    async def _verify_on(self) -> None:
        """One step of a verification; its end is told to whoever waits."""
        self._memory.until = deadline_after(await Now(), WORK_MAX)
        try:
            staged = await self._engine.verify_step(self._finisher)
        except Declined as declined:
            self._audit(self._finisher, Finish(), declined.status.name, declined.detail)
            self._conclude(declined)
        else:
            if staged is None:
                return
            self._section = bytearray()
            self._audit(self._finisher, Finish(), "OK", _said(staged))
            self._context.log.info("set staged", version=staged.version, name=staged.name)
            self._conclude(staged)
        self._look_after(await Now())

    def _conclude(self, outcome: Staged | Declined) -> None:
        """Answer everybody who waits for the end of a verification."""
        waiting, self._waiting = self._waiting, []
        for deferred in waiting:
            if isinstance(outcome, Declined):
                deferred.refuse(outcome.status)
            else:
                deferred.reply(outcome)

    # ------------------------------------------------------------------ switching

    async def _switch(self, call: Call, request: Switch) -> Switched:
        await self._require(call, SWITCH_RIGHT)
        engine = await self._open()
        switched = await engine.switch(request.digest, request.tries, self._asker(call))
        self._rebooting = self._rebooting or request.reboot
        return switched

    async def _report_health(self, call: Call, request: ReportHealth) -> Committed:
        """init's word alone: nobody else has seen every service healthy."""
        if call.sender.service != INIT:
            raise call.refuse(ReplyStatus.DENIED)
        engine = await self._open()
        name = NAMES.get(request.slot)
        if name is None:
            raise Declined(UpdatedStatus.NOT_ON_TRIAL, "there is no such slot")
        return await engine.commit(name, request.digest, request.nonce, self._asker(call))

    async def _commit(self, call: Call, request: Commit) -> Committed:
        await self._require(call, COMMIT_RIGHT)
        engine = await self._open()
        return await engine.commit(engine.running, request.digest, 0, self._asker(call))

    async def _rollback(self, call: Call, request: Rollback) -> RolledBack:
        await self._require(call, ROLLBACK_RIGHT)
        engine = await self._open()
        name = NAMES.get(request.slot)
        if name is None:
            raise Declined(UpdatedStatus.NO_TARGET, "there is no such slot")
        back = await engine.rollback(name, self._asker(call))
        if request.reboot and engine.running is not name:
            self._rebooting = True
        return back

    async def _reboot(self) -> None:
        """What the reboot is for is durable, and answered: init may end the system."""
        self._rebooting = False
        why = await reboot(self._context, deadline_after(await Now(), REBOOT_MAX))
        if why:
            self._context.log.error("init does not reboot", why=why)

    # ------------------------------------------------------------------ what they share

    async def _require(self, call: Call, right: str) -> None:
        await self._context.authority.require(call, right, SLOTS_TARGET)

    def _asker(self, call: Call) -> Asker:
        sender = call.sender.service
        return Asker(
            subject=sender,
            name=INIT_NAME if sender == INIT else self._services.get(sender, ""),
            trace=call.context.trace,
            at=call.now,
            wall=max(0, self._clock.wall() - self._clock.monotonic() + call.now),
        )

    @property
    def _unprovisioned(self) -> bool:
        declined = self._declined
        return declined is not None and declined.status is UpdatedStatus.NO_BOOT_RECORD

    async def _open(self) -> Engine:
        """The engine, opened: now, if it could not be before. Raises Declined."""
        if not self._engine.opened:
            await self._open_now()
        await self._engine.sure()
        return self._engine

    async def _open_now(self) -> None:
        now = await Now()
        try:
            await self._engine.open(Asker(at=now, wall=self._clock.wall()))
        except Declined as declined:
            self._declined = declined
            raise
        self._declined = None
        self._check_running()

    def _check_running(self) -> None:
        """The record's running set is the one that the loader says it booted."""
        config, engine = self._context.config, self._engine
        found = engine.record.slot(engine.running).digest.hex()
        if config.set_digest and config.set_digest != found:
            self._context.log.error(
                "another set runs than the boot record says",
                runs=config.set_digest[:16],
                record=found[:16],
            )
        if engine.history.damaged:
            self._context.log.error("the history was damaged: a new one begins")

    async def _settle(self, span: Nanos) -> None:
        """Open what is not open, and write what is not written; come back for the rest."""
        now = await Now()
        self._memory.until = deadline_after(now, span)
        if not self._engine.opened:
            try:
                await self._open_now()
            except Declined as declined:
                fields = {"status": declined.status.name, "why": declined.detail}
                _ = self._context.log.write(Level.ERROR, "boot record not opened", fields)
        else:
            if self._engine.unrestored:
                await self._put_back(now)
            if self._engine.history.unwritten:
                await self._engine.history.write()
        self._look_after(await Now())

    async def _put_back(self, now: Nanos) -> None:
        """The way back of the data, once more."""
        try:
            await self._engine.put_back(Asker(at=now, wall=self._clock.wall()))
        except Declined as declined:
            fields = {"status": declined.status.name, "why": declined.detail}
            _ = self._context.log.write(Level.ERROR, "data not put back", fields)

    def _look_after(self, now: Nanos) -> None:
        """Come back where something is not settled; a device without a record stays as it is."""
        engine = self._engine
        settled = engine.opened and not (engine.history.unwritten or engine.unrestored)
        if settled or self._unprovisioned:
            self._due = None
            self._pause = SETTLE_PAUSE
        elif self._due is None or self._due <= now:
            self._due = deadline_after(now, self._pause)

    def _audit(self, asker: Asker, request: UpdatedRequest, status: str, detail: str = "") -> None:
        """One record of what was asked for, by whom, and how it ended."""
        self._audited += 1
        fields: dict[str, str | int] = {
            "op": type(request).__name__,
            "status": status.lower(),
            "subject": f"0x{asker.subject:016x}",
            "number": self._audited,
            "trace": asker.trace.hex(),
        }
        if asker.name:
            fields["asked_by"] = asker.name
        if detail:
            fields["detail"] = detail
        if isinstance(request, Finish):
            fields["bytes"] = self._bytes
        level = Level.INFO if status == "OK" else Level.WARN
        _ = self._context.log.write(level, "audit", fields, scope=AUDIT_SCOPE)


def _row(record: BootRecord, name: SlotName, capacity: int) -> SlotRow:
    info = record.slot(name)
    return SlotRow(
        slot=SLOTS[name],
        state=SlotState(info.state),
        tries_left=info.tries_left,
        version=info.version,
        name=info.name,
        digest=info.digest,
        size=info.size,
        capacity=capacity,
    )


def _reason(reason: Reason) -> ReasonRow:
    return ReasonRow(
        cause=reason.cause,
        slot=SLOTS[reason.slot],
        version=reason.version,
        boot=_u32(reason.boot),
        wall=reason.wall,
        trace=reason.trace,
        service=reason.service,
        detail=reason.detail,
        tail=reason.tail.encode()[-TAIL_SIZE_MAX:],
    )


def _said(reply: Reply) -> str:
    """What was done, for the audit."""
    match reply:
        case Begun() | Staged():
            return f"{reply.name} ({reply.version}) to slot {NAMES[reply.slot]}"
        case Switched() | Committed() | RolledBack():
            again = ", as before" if reply.repeated else ""
            return f"slot {NAMES[reply.slot]}, sequence {reply.sequence}{again}"
        case _:
            return ""


def _u32(number: int) -> int:
    return min(number, 0xFFFF_FFFF)


assert len(NO_TRACE) == len(Asker().trace)

"""statefsd: values under keys, which survive what they were promised to survive.

Owns its block device and the store on it. Trusts the kernel's word about who asks, policyd's about
what it may, and the device in nothing: what comes back is checked, what fails is said. Never falls
back to memory, never overwrites a device that holds something else, never calls a change durable
before the device has said so. Values appear in no log.

A change is staged, and answered when it is written: changes that arrive while others wait are
written with them, and nobody's change waits for anything but the device.
"""

import json
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import suppress
from hashlib import sha256
from typing import Any, Final, NamedTuple, Protocol, assert_never

from nexus.abi import BLOCK_SIZE, AbiError, ConsoleWrite, DeviceQuery, Nanos, ServiceId
from nexus.drivers import BlockDevice, DeviceFault, Fault, VirtioBlock, open_block
from nexus.drivers.crc import IS_FAST, SLOW
from nexus.ipc import Bulk, accept_bulk, offer_bulk
from nexus.ipc import Context as Trace
from nexus.log.line import FieldValue
from nexus.protocols.init import PROOF_CONTROL
from nexus.protocols.policyd import Reason
from nexus.protocols.statefsd import (
    BULK_VALUE_MAX,
    INLINE_VALUE_MAX,
    PROTOCOL,
    QUARANTINE_PAGE,
    SNAPSHOT_RIGHT,
    AreaUse,
    Batch,
    BulkValue,
    Calls,
    Delete,
    DropSnapshot,
    Durability,
    Get,
    GetArea,
    GetBulk,
    GetCalls,
    GetSnapshot,
    GetStore,
    Keys,
    ListKeys,
    Lost,
    Put,
    PutBulk,
    Restore,
    Snapshot,
    SnapshotKept,
    SnapshotState,
    StatefsdRequest,
    StatefsdStatus,
    Stored,
    Sync,
    Synced,
    Value,
    decode_changes,
)
from nexus.protocols.statefsd import Store as StoreReport
from nexus.runtime import Call, Deferred, Outcome, Refusal
from nexus.runtime.program import Context, Unusable, program_of
from nexus.services.statefsd.access import (
    ROOT_AREA,
    SPECIAL,
    area_fault,
    change_fault,
    key_fault,
    prefix_fault,
    right_for,
    snapshot_fault,
)
from nexus.services.statefsd.clients import Client, Clients
from nexus.services.statefsd.config import Settings, room_fault
from nexus.services.statefsd.engine import (
    Change,
    Damaged,
    Entry,
    OverQuota,
    ReadOnly,
    Store,
    StoreFull,
    Unopenable,
)
from nexus.services.statefsd.engine import snapshot as copies
from nexus.services.statefsd.engine.limits import area_of
from nexus.services.statefsd.group import Group, Waiting
from nexus.wire import RemoteProtocolError, ReplyStatus

U32_MAX: Final = (1 << 32) - 1
U64_MAX: Final = (1 << 64) - 1
MAINTAIN_EVERY: Final = 16  # groups; the store is tidied up though somebody always waits


class Disk(NamedTuple):
    """The granted device, opened: its name in the bus map, what is behind it, and the digest of
    its first block as it was found."""

    name: str
    backing: str
    device: BlockDevice
    first_block: str = ""


class Gate(Protocol):
    """What statefsd needs of runtime.Authority."""

    before_asking: Callable[[], Awaitable[object]] | None

    async def require(self, call: Call, right: str, target: str = "") -> None:
        """Raises the refusal of a caller that may not."""

    async def check(
        self,
        subject: ServiceId,
        right: str,
        target: str,
        deadline: Nanos,
        context: Trace | None = None,
    ) -> Outcome:
        """The decision."""


class Log(Protocol):
    """What statefsd needs of nexus.log.Logger."""

    def error(self, text: str, /, **fields: FieldValue) -> None:
        """Something is broken."""

    def warning(self, text: str, /, **fields: FieldValue) -> None:
        """Something is not as it should be."""


class Statefsd:
    """Serves nexus.protocols.statefsd.

    `open_disk` opens the granted device; `send_given` sends the answers given so far.
    """

    def __init__(
        self,
        settings: Settings,
        authority: Gate,
        log: Log,
        open_disk: Callable[[], Awaitable[Disk]],
        send_given: Callable[[], Awaitable[None]],
    ) -> None:
        self._limits = settings.limits
        self._refresh = settings.refresh
        self._restore = settings.restore
        self._authority = authority
        self._log = log
        self._open_disk = open_disk
        self._send_given = send_given
        self._disk: Disk
        self._opened: Store | None = None
        self._group = Group()
        self._clients = Clients()
        self._is_untidy = False  # the store may have something to tidy up
        self._in_packet = False  # requests of a packet are staged, and more of it are to come
        self._groups = 0
        self._tidied = 0  # the value of _groups at the last step of tidying up
        self._faults = 0  # of the device
        self._denied = 0
        self._told = 0  # damaged records that the log knows of
        self._mapped = 0  # offered values, taken from the memory of others
        self._reads = 0
        self._writes = 0
        authority.before_asking = self._before_asking

    # ------------------------------------------------------------------ hooks

    async def start(self) -> None:
        """Open the store. Raises Unusable; then nothing was written to the device."""
        if not IS_FAST:
            raise Unusable(SLOW)
        try:
            self._disk = await self._open_disk()
        except DeviceFault as fault:
            raise Unusable(f"cannot use its device: {fault}; see the machine's log") from fault
        name = self._disk.name
        try:
            store = await self._open_store(self._disk)
        except Unopenable as error:
            raise Unusable(
                f"{name} was not opened and not written to: {error}; look at it with "
                "`nexus state check IMAGE`, then give another device, or empty this one"
            ) from error
        except DeviceFault as fault:
            raise Unusable(f"cannot open the store on {name}: {fault}") from fault
        await self._bring_back(store)
        self._opened = store
        self._is_untidy = True
        if store.unfinished:
            self._log.warning("unfinished changes dropped", device=name, count=store.unfinished)
        self._tell_lost()

    async def _open_store(self, disk: Disk) -> Store:
        """As Store.open; a disk that the reserves leave nothing of is refused before that."""
        fault = room_fault(self._limits, disk.device.block_count * BLOCK_SIZE, 1)
        if fault is not None:
            raise Unusable(f"{disk.name} was not opened and not written to: {fault}")
        return await Store.open(disk.device, self._limits)

    def ready(self) -> bool:
        """Whether the store is open on the granted device."""
        return self._opened is not None

    async def on_ready(self) -> None:
        """Say what a device with registers was found to be; a full console hears nothing."""
        device = self._disk.device
        if not isinstance(device, VirtioBlock):
            return
        identity = device.identity
        evidence = {
            "magic": identity.magic,
            "version": identity.version,
            "device_id": identity.device_id,
            "features": identity.features,
            "block_count": device.block_count,
            "first_block": self._disk.first_block,
        }
        with suppress(AbiError):
            await ConsoleWrite("blk: virtio-blk up", json.dumps(evidence).encode())

    def busy(self) -> bool:
        """Whether changes wait to be written, or the store to be tidied up."""
        return bool(self._group) or self._is_untidy

    async def on_idle(self) -> None:
        """Nobody asks just now: write what was gathered, or tidy up one step."""
        if self._group:
            _ = await self._commit()
        else:
            _ = await self._tidy()

    async def on_batch(self) -> None:
        """The requests of a packet are staged: they are written together, and answered."""
        self._in_packet = False
        _ = await self._commit()

    async def on_stop(self) -> None:
        """An orderly end loses nothing, whatever was promised, and says so on the device."""
        store = self._opened
        if store is None or not store.writable:
            return
        if await self._commit(durable=True) is None:
            try:
                await store.close()
            except DeviceFault as fault:
                self._on_fault("close", fault)

    def evidence(self) -> dict[str, str | int]:
        """With the line that says it is ready."""
        store = self._store
        return {
            "device": self._disk.name,
            "backing": self._disk.backing,
            "epoch": store.epoch,
            "sequence": store.sequence,
        }

    def facts(self) -> dict[str, int]:
        """The store as it is, and what was done in this instance's life."""
        store = self._opened
        if store is None:
            return {"store_open": 0}
        return {
            "store_open": 1,
            "store_writable": int(store.writable),
            "epoch": store.epoch,
            "sequence": store.sequence,
            "durable": store.durable,
            "keys": store.key_count,
            "used": store.used,
            "capacity": store.capacity,
            "compactions_total": store.compactions,
            "quarantined_total": _natural(store.lost_count, U64_MAX),
            "quarantined_forgotten": store.forgotten,
            "checkpoint_left_out": store.left_out,
            "unfinished": store.unfinished,
            "device_faults_total": self._faults,
            "groups_total": self._groups,
            "reads_total": self._reads,
            "writes_total": self._writes,
            "denied_total": self._denied,
            "mappings_total": self._mapped,
            "clients": len(self._clients),
        }

    # ------------------------------------------------------------------ requests

    async def handle(
        self, call: Call, request: StatefsdRequest
    ) -> (
        Stored
        | Value
        | BulkValue
        | Keys
        | Synced
        | StoreReport
        | AreaUse
        | Calls
        | SnapshotKept
        | Deferred
    ):
        """The reply, now or when the change is written."""
        client = self._clients.heard(call.sender.service, call.message.data)
        match request:
            case Put():
                return await self._put(call, client, request)
            case PutBulk():
                return await self._put_bulk(call, client, request)
            case Get():
                return await self._get(call, client, request)
            case GetBulk():
                return await self._get_bulk(call, client, request)
            case Delete():
                return await self._delete(call, client, request)
            case ListKeys():
                return await self._list(call, client, request)
            case Sync():
                return await self._sync(call, request)
            case Batch():
                return await self._batch(call, client, request)
            case GetStore():
                return await self._report(call)
            case GetArea():
                return await self._area(call, client, request)
            case GetCalls():
                return await self._calls(call, request)
            case Snapshot():
                return await self._take_snapshot(call, request)
            case Restore():
                return await self._restore_snapshot(call, request)
            case DropSnapshot():
                await self._require_snapshot(call, [copies.AREA])
                return await self._on_copies(call, copies.drop(self._store, request.snapshot))
            case GetSnapshot():
                await self._require_snapshot(call, [copies.AREA])
                return await self._on_copies(call, copies.head_of(self._store))
            case _:
                assert_never(request)

    async def _put(self, call: Call, client: Client, request: Put) -> Stored | Deferred:
        _check(call, change_fault(request.key))
        if len(request.value) > INLINE_VALUE_MAX:
            raise call.refuse(StatefsdStatus.VALUE_TOO_LARGE)
        await self._require(call, request.key, writes=True)
        changes = [Change(request.key, request.value)]
        return await self._change(call, client, changes, request.durability, request.request_id)

    async def _put_bulk(self, call: Call, client: Client, request: PutBulk) -> Stored | Deferred:
        _check(call, change_fault(request.key))
        if request.length > BULK_VALUE_MAX:
            raise call.refuse(StatefsdStatus.VALUE_TOO_LARGE)
        await self._require(call, request.key, writes=True)
        bulk = await accept_bulk(call.take_cap(), request.offset, request.length)
        if not isinstance(bulk, Bulk):
            call.note("bulk", bulk.name.lower())
            raise call.refuse(StatefsdStatus.BAD_BULK)
        self._mapped += 1
        value = bytes(bulk.view)
        await bulk.release()
        changes = [Change(request.key, value)]
        return await self._change(call, client, changes, request.durability, request.request_id)

    async def _get(self, call: Call, client: Client, request: Get) -> Value:
        entry = await self._read(call, client, request.key)
        if len(entry.value) > INLINE_VALUE_MAX:
            raise call.refuse(StatefsdStatus.LARGE)
        return Value(entry.value, entry.sequence)

    async def _get_bulk(self, call: Call, client: Client, request: GetBulk) -> BulkValue:
        entry = await self._read(call, client, request.key)
        if entry.value:
            slot = await offer_bulk(entry.value)
            if slot is None:
                raise call.refuse(StatefsdStatus.NO_SPACE)
            call.give_cap(slot)
        return BulkValue(len(entry.value), entry.sequence)

    async def _delete(self, call: Call, client: Client, request: Delete) -> Stored | Deferred:
        _check(call, change_fault(request.key))
        await self._require(call, request.key, writes=True)
        store = self._store
        if not store.has(request.key) and (
            store.applied(call.sender.service, request.request_id) is None
        ):
            raise call.refuse(StatefsdStatus.NOT_FOUND)
        changes = [Change(request.key, None)]
        return await self._change(call, client, changes, request.durability, request.request_id)

    async def _batch(self, call: Call, client: Client, request: Batch) -> Stored | Deferred:
        try:
            changes = decode_changes(request.changes).changes
        except RemoteProtocolError:
            raise call.refuse(ReplyStatus.MALFORMED) from None
        for change in changes:
            _check(call, change_fault(change.key))
        if len({change.key for change in changes}) < len(changes):
            raise call.refuse(StatefsdStatus.INVALID_KEY)
        for key in {area_of(change.key): change.key for change in changes}.values():
            await self._require(call, key, writes=True)
        staged = [Change(change.key, change.value) for change in changes]
        return await self._change(call, client, staged, request.durability, request.request_id)

    async def _list(self, call: Call, client: Client, request: ListKeys) -> Keys:
        _check(call, prefix_fault(request.prefix))
        if request.after:
            _check(call, key_fault(request.after))
        area = area_of(request.prefix)
        if area == ROOT_AREA:
            visible = await self._visible(call, self._store.areas())
        else:
            await self._require(call, request.prefix, writes=False)
            visible = {area}
        if self._group:
            _ = await self._commit()
        keys, more = self._store.keys(
            request.prefix, request.after, request.count, visible.__contains__
        )
        self._on_read(client)
        return Keys(keys, more)

    async def _sync(self, call: Call, request: Sync) -> Synced:
        _check(call, area_fault(request.area))
        await self._require(call, request.area, writes=True)
        if not self._store.writable:
            raise call.refuse(StatefsdStatus.READ_ONLY)
        _check(call, await self._commit(durable=True))
        return Synced(self._store.durable)

    async def _report(self, call: Call) -> StoreReport:
        store = self._store
        latest = [
            lost if key_fault(lost.key) is None else lost._replace(key=b"")
            for lost in list(store.lost)[-QUARANTINE_PAGE:]
        ]
        areas = {area_of(lost.key) for lost in latest if lost.key}
        visible = await self._visible(call, areas)
        return StoreReport(
            device=self._disk.name,
            backing=self._disk.backing,
            epoch=store.epoch,
            sequence=store.sequence,
            durable=store.durable,
            keys=store.key_count,
            used=store.used,
            capacity=store.capacity,
            compactions=store.compactions,
            quarantined=_natural(store.lost_count, U32_MAX),
            lost=[
                Lost(
                    lost.key if lost.key and area_of(lost.key) in visible else b"",
                    _natural(lost.offset, U64_MAX),
                    _natural(lost.sequence, U64_MAX),
                )
                for lost in latest
            ],
            writable=store.writable,
        )

    async def _area(self, call: Call, client: Client, request: GetArea) -> AreaUse:
        _check(call, area_fault(request.area))
        await self._require(call, request.area, writes=False)
        use = self._store.usage(request.area)
        quota = self._limits.quotas.get(request.area, self._limits.quota)
        return AreaUse(use.size, use.keys, quota.size, quota.keys, client.reads, client.writes)

    async def _calls(self, call: Call, request: GetCalls) -> Calls:
        await self._authority.require(call, PROOF_CONTROL)
        sender = ServiceId(request.sender)
        seen = self._clients.latest(sender, request.count)
        return Calls(seen, self._clients.find(sender).total)

    # ------------------------------------------------------------------ snapshots

    async def _take_snapshot(self, call: Call, request: Snapshot) -> SnapshotKept:
        _check(call, snapshot_fault(request.areas))
        await self._require_snapshot(call, request.areas)
        return await self._on_copies(call, copies.take(self._store, request.areas))

    async def _restore_snapshot(self, call: Call, request: Restore) -> SnapshotKept:
        await self._require_snapshot(call, [copies.AREA])
        head = await self._on_copies(call, copies.head_of(self._store))
        if head.snapshot != request.snapshot or head.state is SnapshotState.NONE:
            raise call.refuse(StatefsdStatus.NO_SNAPSHOT)
        await self._require_snapshot(call, head.areas)
        kept = await self._on_copies(call, copies.restore(self._store, request.snapshot))
        self._log.warning("snapshot restored", snapshot=kept.snapshot, keys=kept.keys)
        return kept

    async def _on_copies(self, call: Call, work: Coroutine[Any, Any, copies.Head]) -> SnapshotKept:
        """What a step with the snapshot comes to; what waits to be written is written before."""
        if self._group:
            _ = await self._commit()
        self._is_untidy = True
        try:
            head = await work
        except copies.SnapshotExists:
            raise call.refuse(StatefsdStatus.SNAPSHOT_EXISTS) from None
        except copies.NoSnapshot:
            raise call.refuse(StatefsdStatus.NO_SNAPSHOT) from None
        except (copies.SnapshotDamaged, Damaged) as error:
            call.note("damage", str(error))
            raise call.refuse(StatefsdStatus.CORRUPTED) from None
        except StoreFull:
            raise call.refuse(StatefsdStatus.NO_SPACE) from None
        except ReadOnly:
            raise call.refuse(StatefsdStatus.READ_ONLY) from None
        except DeviceFault as fault:
            self._on_fault("snapshot", fault)
            raise call.refuse(StatefsdStatus.IO_ERROR) from None
        return _kept(head)

    async def _require_snapshot(self, call: Call, areas: Sequence[bytes]) -> None:
        for area in areas:
            await self._authority.require(call, SNAPSHOT_RIGHT, area.decode())

    async def _bring_back(self, store: Store) -> None:
        """Before anybody is served: end what a power cut left half done, and do what init says.

        A copy that is damaged is no way back, and no reason to serve nobody; but no trial begins
        without its way back. Raises Unusable.
        """
        if self._refresh:
            await self._take_again(store)
            return
        try:
            before = await copies.head_of(store)
            head = await copies.go_back(store, self._restore)
        except (copies.NoSnapshot, copies.SnapshotDamaged) as error:
            why = str(error) or "it is not kept"
            self._log.error("snapshot not restored", snapshot=self._restore, why=why)
            return
        except (StoreFull, ReadOnly, DeviceFault) as error:
            name = self._disk.name
            raise Unusable(f"cannot go back to the snapshot on {name}: {error!r}") from error
        if head.state is copies.State.RESTORED is not before.state:
            self._log.warning("snapshot restored", snapshot=head.number, keys=head.keys)

    async def _take_again(self, store: Store) -> None:
        """A set that migrates data is tried for the first time: copy them as they are now."""
        try:
            _ = await copies.resume(store)
            head = await copies.take_again(store, self._refresh)
        except (
            copies.NoSnapshot,
            copies.SnapshotDamaged,
            Damaged,
            StoreFull,
            ReadOnly,
            DeviceFault,
        ) as error:
            raise Unusable(
                f"cannot copy on {self._disk.name} what this set migrates, and there is no way "
                f"back without it: {error!r}"
            ) from error
        self._log.warning("snapshot taken again", snapshot=head.number, keys=head.keys)

    # ------------------------------------------------------------------ reading

    async def _read(self, call: Call, client: Client, key: bytes) -> Entry:
        """What is written under a key: nobody sees a change that may still be taken back."""
        _check(call, key_fault(key))
        await self._require(call, key, writes=False)
        if self._group.touches(key):
            _ = await self._commit()
        try:
            entry = await self._store.get(key)
        except Damaged:
            self._tell_lost()
            raise call.refuse(StatefsdStatus.CORRUPTED) from None
        except DeviceFault as fault:
            self._on_fault("read", fault)
            raise call.refuse(StatefsdStatus.IO_ERROR) from None
        if entry is None:
            raise call.refuse(StatefsdStatus.NOT_FOUND)
        self._on_read(client)
        return entry

    def _on_read(self, client: Client) -> None:
        client.reads += 1
        self._reads += 1

    # ------------------------------------------------------------------ changing

    async def _change(
        self,
        call: Call,
        client: Client,
        changes: list[Change],
        durability: Durability,
        request_id: int,
    ) -> Stored | Deferred:
        """Stage changes; they are answered when they are written."""
        if self._groups - self._tidied >= MAINTAIN_EVERY:
            _ = await self._tidy()
        sender = call.sender.service
        try:
            applied = self._store.stage(changes, client=sender, request_id=request_id)
        except OverQuota:
            raise call.refuse(StatefsdStatus.OVER_QUOTA) from None
        except StoreFull:
            raise call.refuse(StatefsdStatus.NO_SPACE) from None
        except ReadOnly:
            raise call.refuse(StatefsdStatus.READ_ONLY) from None
        durable = durability is Durability.DURABLE
        keys = [] if applied.repeated else [change.key for change in changes]
        size = sum(len(change.key) + len(change.value or b"") for change in changes)
        self._group.on_staged(keys, size, durable=durable)
        deferred = call.defer()
        self._group.waiting.append(
            Waiting(deferred, client, applied.sequence, repeated=applied.repeated)
        )
        self._in_packet = call.batched
        if self._group.is_full and not call.batched:
            _ = await self._commit()
        return deferred

    async def _commit(self, *, durable: bool = False) -> StatefsdStatus | None:
        """Write everything staged, and answer who waits for it; the status they were refused with.

        After a fault it is not known what the device has of it; the store has taken it back.
        """
        durable = durable or self._group.durable
        waiting = self._group.take()
        self._groups += 1
        self._is_untidy = True
        try:
            await self._store.commit(durable)
        except DeviceFault as fault:
            self._on_fault("write", fault)
            status = (
                StatefsdStatus.READ_ONLY
                if fault.fault is Fault.READ_ONLY  # so nothing was written
                else StatefsdStatus.IO_ERROR
            )
            for each in waiting:
                each.deferred.refuse(status)
            return status
        for each in waiting:
            self._on_written(each.client)
            each.deferred.reply(self._stored(each.sequence, repeated=each.repeated))
        return None

    def _stored(self, sequence: int, *, repeated: bool) -> Stored:
        return Stored(sequence, self._is_durable(sequence), repeated)

    def _is_durable(self, sequence: int) -> bool:
        """Whether this change survives a power cut, by the device's word."""
        return sequence <= self._store.durable

    def _on_written(self, client: Client) -> None:
        client.writes += 1
        self._writes += 1

    async def _tidy(self) -> bool:
        """One bounded step of what the store has to tidy up; whether there is more."""
        self._tidied = self._groups
        try:
            self._is_untidy = await self._store.maintain()
        except DeviceFault as fault:
            self._is_untidy = False
            self._on_fault("maintain", fault)
        return self._is_untidy

    async def _before_asking(self) -> None:
        """policyd is about to be asked: nobody's change waits for that, but those of one packet.

        They are written once: a packet of a caller with many areas is else as many device writes.
        """
        if self._group and not self._in_packet:
            _ = await self._commit()
            await self._send_given()

    # ------------------------------------------------------------------ authority

    async def _require(self, call: Call, path: bytes, *, writes: bool) -> None:
        """Go on only if the caller may use the area of `path`; a denial is written down."""
        area = area_of(path)
        right = right_for(area, writes=writes)
        try:
            await self._authority.require(call, right, area.decode())
        except Refusal:
            self._denied += 1
            self._log.warning(
                "access denied",
                path=path.decode(),
                client=f"0x{call.sender.service:016x}",
                right=right,
            )
            raise

    async def _visible(self, call: Call, areas: set[bytes]) -> set[bytes]:
        """Which of these areas the caller may look into.

        A right that reaches ROOT reaches every area without a right of its own, so that one
        question decides as a rule. What statefsd would not have taken as an area, and a foreign
        disk may have, nobody sees. Raises the refusal of a caller nobody can decide about.
        """
        special = set(SPECIAL)
        visible = {each for each in areas & special if await self._may_look(call, each)}
        ordinary = {each for each in areas - special if area_fault(each) is None}
        if ordinary and await self._may_look(call, ROOT_AREA):
            return visible | ordinary
        narrow = sorted(ordinary - {ROOT_AREA})
        return visible | {each for each in narrow if await self._may_look(call, each)}

    async def _may_look(self, call: Call, area: bytes) -> bool:
        right = right_for(area, writes=False)
        outcome = await self._authority.check(
            call.sender.service, right, area.decode(), call.deadline, call.context
        )
        if outcome.reason is Reason.UNAVAILABLE:
            raise call.refuse(ReplyStatus.DENIED)
        return outcome.allowed

    # ------------------------------------------------------------------ for people

    def _on_fault(self, what: str, fault: DeviceFault) -> None:
        """The device failed: said in the log, and counted."""
        self._faults += 1
        self._log.error(
            "device failed", device=self._disk.name, op=what, fault=fault.fault.name.lower()
        )

    def _tell_lost(self) -> None:
        """A record for every damaged record that the log does not know of yet."""
        store = self._store
        new, self._told = store.lost_count - self._told, store.lost_count
        for lost in list(store.lost)[-new:] if new else ():
            self._log.error(
                "record quarantined",
                key=lost.key.decode(errors="backslashreplace"),
                offset=lost.offset,
                sequence=lost.sequence,
            )

    @property
    def _store(self) -> Store:
        assert self._opened is not None, "requests are served when start is done"
        return self._opened


def _check(call: Call, fault: StatefsdStatus | None) -> None:
    """Go on only without a fault."""
    if fault is not None:
        raise call.refuse(fault)


def _kept(head: copies.Head) -> SnapshotKept:
    """What a reply says of a snapshot."""
    state = SnapshotState.NONE
    if head.is_kept:
        restored = head.state is copies.State.RESTORED
        state = SnapshotState.RESTORED if restored else SnapshotState.KEPT
    return SnapshotKept(
        head.number, state, [area for area, _ in head.areas], head.size, head.keys, head.sequence
    )


def _natural(number: int, most: int) -> int:
    """A number that the disk says, as the wire can carry it."""
    return min(max(number, 0), most)


def made(context: Context) -> Statefsd:
    """statefsd on the device the system file gives it."""

    async def open_disk() -> Disk:
        if not context.boot.hardware:
            raise Unusable('has no device: give it one in the system file, hardware = ["disk"]')
        (slot, *_) = context.boot.hardware
        info = await DeviceQuery(slot)
        device = await open_block(slot)
        first = await device.read(0, 1)
        return Disk(info.name, info.backing, device, sha256(first).hexdigest())

    settings = context.settings_as(Settings)
    return Statefsd(settings, context.authority, context.log, open_disk, context.send_given)


main: Final = program_of(made, PROTOCOL)

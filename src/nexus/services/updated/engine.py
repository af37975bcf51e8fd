"""The slots: stage, verify, switch, commit, roll back, over block devices and a Memory.

No IPC, no clock: who asks and when comes with each call, so that the power can be cut at every
write of it (nexus sim powercut ota). The order is the same everywhere: what is promised is durable
before it is promised, and the boot-control record is stored before anything follows from it.

    begin   trust moves forward in statefs -> the standby slot is EMPTY in the record
            -> the transfer is kept -> pieces go to the slot
    finish  read back, verified -> the record says STAGED -> the transfer is forgotten
    switch  data that the set migrates are copied -> the record says: try it
    commit  the record says so -> the copy is dropped
    back    the record says so, and whether the copy is to be restored -> statefsd restores it
            -> the record says that it is done -> the copy is dropped

A cut between two arrows leaves the older state of the record in force, and `open` puts away what
nobody refers to any more. Staging and switching are refused unless the running set is proven good.
"""

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Final

from msgspec.structs import replace

from nexus.abi import BLOCK_SIZE
from nexus.bootctl import (
    COUNT_MAX,
    EVIDENCE,
    NO_DIGEST,
    BootControl,
    BootRecord,
    BootRefused,
    Cause,
    NoAnchor,
    NoBootRecord,
    Reason,
    SlotInfo,
    SlotName,
    SlotState,
    check_settled,
    commit,
    restored,
    rollback,
    staged,
    staging,
    switch,
)
from nexus.drivers import BlockDevice, DeviceFault, Fault
from nexus.drivers.crc import extend
from nexus.protocols.updated import (
    DIGEST_SIZE,
    PIECE_UNIT,
    Begun,
    Committed,
    EventKind,
    Phase,
    RolledBack,
    Slot,
    Staged,
    Switched,
    Taken,
    Transfer,
    UpdatedStatus,
)
from nexus.services.updated.faults import OF_BOOT, OF_TRUST, Declined, device_failed
from nexus.services.updated.kept import (
    FORMAT,
    SLOTS,
    TRUST,
    Asker,
    Damaged,
    History,
    KeptTransfer,
    Memory,
    read_transfer,
    write_transfer,
)
from nexus.services.updated.source import SlotSource
from nexus.services.updated.verification import Verification, wrong_digest
from nexus.sets import SET_SIZE_MAX, Known, Manifest, SetRefused, read_manifest, unmet
from nexus.trust import Anchor, TrustState, Untrusted, decode_metadata
from nexus.trust.verify import resume, verify_metadata

SYNC_SIZE: Final = 16 * 1024 * 1024  # bytes that a power cut has sent again, at most
SYNC_LEAST: Final = (
    256 * 1024
)  # bytes; a disk that takes longer than REQUEST_MAX for them is broken
NAMES: Final[Mapping[Slot, SlotName]] = {slot: name for name, slot in SLOTS.items()}
OF_LOADER: Final[Mapping[int, EventKind]] = {
    **dict.fromkeys(EVIDENCE, EventKind.FAILED),
    Cause.ROLLED_BACK: EventKind.ROLLED_BACK,
}
"""Reasons that the loader writes, as events of the history."""

PASSING: Final = frozenset(
    {UpdatedStatus.IO_ERROR, UpdatedStatus.UNAVAILABLE, UpdatedStatus.NO_BOOT_RECORD}
)
"""Refusals that say nothing against the set."""

assert PIECE_UNIT == BLOCK_SIZE
assert SYNC_SIZE % BLOCK_SIZE == 0
assert len(NO_DIGEST) == DIGEST_SIZE


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """What this device takes. `python` and `distributions` are what the base system has."""

    release: bool  # keys for development are refused
    python: str
    distributions: Mapping[str, str] = field(default_factory=dict)


class Engine:
    """The slots of one device. One call at a time."""

    def __init__(
        self,
        boot: BootControl,
        slots: Mapping[SlotName, BlockDevice],
        memory: Memory,
        rules: Rules,
        running: SlotName | None = None,
    ) -> None:
        """`running` is the slot that the loader booted; None where the record's word has to do."""
        self._boot = boot
        self._slots = slots
        self._memory = memory
        self._rules = rules
        self._running = running
        self._record: BootRecord | None = None
        self._opened = False
        self._in_doubt = False  # a store failed: which record is in force has to be read
        self._trust: TrustState | None = None
        self._transfer: KeptTransfer | None = None
        self._phase = Phase.IDLE
        self._admitted = False  # its metadata were believed by this instance, and not only once
        self._offset = 0  # bytes of the transfer that are in the slot, durable or not
        self._sync_size = SYNC_SIZE
        self._hash = sha256()  # of the first `_hashed` bytes, as they came
        self._crc = 0  # CRC-32C of them
        self._hashed = 0
        self._check: Verification | None = None
        self._refused: Declined | None = None
        self.history = History(memory)

    # ------------------------------------------------------------------ opening

    @property
    def record(self) -> BootRecord:
        """The boot-control record in force."""
        assert self._record is not None, "it was opened"
        return self._record

    @property
    def opened(self) -> bool:
        """Whether record and history were read."""
        return self._opened

    @property
    def running(self) -> SlotName:
        """The slot this system was booted from, whatever is booted next."""
        assert self._running is not None, "it was opened"
        return self._running

    @property
    def verifying(self) -> bool:
        """Whether `verify_step` has something to do."""
        return self._check is not None

    @property
    def receiving(self) -> bool:
        """Whether bytes of a transfer may be in the slot that are not durable yet."""
        return self._phase is Phase.RECEIVING

    @property
    def time_floor(self) -> int:
        """s since 1970; 0 where nothing was seen yet."""
        return 0 if self._trust is None else self._trust.time_floor

    def capacity(self, name: SlotName) -> int:
        """Bytes of a slot."""
        return self._slots[name].block_count * BLOCK_SIZE

    async def open(self, asker: Asker) -> None:
        """Read what there is, and finish what a cut left. Raises Declined."""
        record = await self._load()
        await self.history.open()
        transfer = await read_transfer(self._memory)
        self._record = record
        if self._running is None:
            self._running = self._trial or record.active
        _ = await self.history.take_reasons(record, OF_LOADER)
        with suppress(Declined):  # `unrestored` says so, and staging waits for it
            await self.put_back(asker)
        await self._drop_copies()
        await self._take_up(transfer)
        with suppress(Declined, Untrusted):  # who begins is told; all the rest goes without
            _ = await self._known_trust()
        self._opened = True

    async def _load(self) -> BootRecord:
        try:
            return await self._boot.load()
        except NoBootRecord as error:
            raise Declined(UpdatedStatus.NO_BOOT_RECORD, str(error)) from error
        except DeviceFault as fault:
            raise device_failed("the boot device", fault) from fault

    @property
    def unrestored(self) -> bool:
        """Whether data are to be put back: never under services of the set that was left."""
        return self.record.restore and self._running is self.record.active

    async def put_back(self, asker: Asker) -> None:
        """The data are as before the trial: statefsd has seen to it, or does now.

        Where the copy is gone for good there is nothing to wait for: that is told, and updates go
        on. Raises Declined if it may be put back later.
        """
        if not self.unrestored:
            return
        await self.sure()
        snapshot = self.record.snapshot
        status, detail = 0, f"the data are as in copy {snapshot}"
        try:
            await self._memory.restore(snapshot)
        except Declined as declined:
            if declined.status is not UpdatedStatus.NO_SNAPSHOT:
                raise
            status, detail = declined.status, declined.detail
        await self._store(restored(self.record))
        await self.history.add(EventKind.RESTORED, self.record, asker, status=status, detail=detail)
        await self._drop_copies()

    async def _take_up(self, transfer: KeptTransfer | None) -> None:
        """Go on with a transfer that was cut off, if its slot still waits for it."""
        if transfer is None:
            return
        name = NAMES[transfer.slot]
        is_due = name is self.record.standby and self.record.trying is None
        fits = transfer.size <= self.capacity(name)
        if not (is_due and fits) or self.record.slot(name).state is not SlotState.EMPTY:
            await write_transfer(self._memory, None)
            return
        self._transfer = transfer
        self._phase = Phase.RECEIVING
        self._offset = transfer.durable

    # ------------------------------------------------------------------ staging

    async def begin(self, section: bytes, asker: Asker) -> Begun:
        """Who signed it and what may come; from where it goes on. Raises Declined."""
        await self.sure()
        self._check_settled()
        try:
            wanted = await self._trusted(section)
            self._check_wanted(wanted)
        except Declined as declined:
            if declined.status not in PASSING:
                await self.history.add(
                    EventKind.REFUSED,
                    self.record,
                    asker,
                    status=declined.status,
                    detail=declined.detail,
                )
            raise
        info = self.record.slot(self.record.standby)
        if info == _info_of(wanted):  # and not the same set under another floor
            return _begun(wanted, wanted.size, staged=True)
        self._admitted = True
        if self._goes_on(wanted) and info.state is SlotState.EMPTY:
            return _begun(wanted, self._offset, staged=False)
        await self._start(wanted, asker)
        return _begun(wanted, 0, staged=False)

    def _check_wanted(self, wanted: KeptTransfer) -> None:
        """There is a reason to have it, and room."""
        if wanted.digest == self.record.slot(self.record.active).digest:
            raise Declined(UpdatedStatus.ALREADY_RUNS, f"{wanted.name} is the set that runs")
        capacity = self.capacity(self.record.standby)
        if wanted.size > min(capacity, SET_SIZE_MAX):
            raise Declined(
                UpdatedStatus.TOO_LARGE,
                f"{wanted.name} has {wanted.size} bytes, slot {self.record.standby} {capacity}",
            )

    def _goes_on(self, wanted: KeptTransfer) -> bool:
        """Whether it is the transfer that is under way."""
        if self._transfer is None or self._phase not in (Phase.RECEIVING, Phase.VERIFYING):
            return False
        return replace(self._transfer, durable=0) == wanted

    async def _trusted(self, section: bytes) -> KeptTransfer:
        """The transfer that trusted metadata allows; what was seen with it is kept first."""
        try:
            trust = await self._known_trust()
            seen, target = verify_metadata(
                trust, decode_metadata(section), release=self._rules.release
            )
        except Untrusted as untrusted:
            raise Declined(OF_TRUST[untrusted.status], untrusted.detail) from untrusted
        if max(target.version, target.length) > COUNT_MAX:
            raise Declined(
                UpdatedStatus.MALFORMED_METADATA, "a number larger than a boot record counts"
            )
        if seen != trust:
            self._trust = None  # until it is known which one is kept
            await self._memory.put(TRUST, seen.encode())
        self._trust = seen
        return KeptTransfer(
            FORMAT,
            SLOTS[self.record.standby],
            target.version,
            target.name,
            target.sha256,
            target.length,
            target.floor,
            0,
        )

    async def _known_trust(self) -> TrustState:
        if self._trust is None:
            try:
                anchor = Anchor(await self._boot.read_anchor())
            except NoAnchor as error:
                raise Declined(UpdatedStatus.NO_ANCHOR, str(error)) from error
            except DeviceFault as fault:
                raise device_failed("the boot device", fault) from fault
            try:
                kept = await self._memory.get(TRUST)
            except Damaged as damaged:  # to forget what was seen is what an attacker would want
                raise Declined(UpdatedStatus.NO_ANCHOR, damaged.detail) from damaged
            self._trust = resume(anchor, kept, version_floor=self.record.floor)
        return self._trust.raised(self.record.floor)

    async def _start(self, wanted: KeptTransfer, asker: Asker) -> None:
        """Nothing that stands in the standby slot counts any more; then the transfer begins."""
        self._forget()
        if self.record.slot(self.record.standby) != SlotInfo():
            await self._store(staging(self.record))
        await write_transfer(self._memory, wanted)
        self._transfer = wanted
        self._phase = Phase.RECEIVING
        await self._tell(EventKind.BEGUN, wanted, asker)

    async def take(self, offset: int, data: bytes | memoryview) -> Taken:
        """The next piece, to the slot; one that has come already changes nothing."""
        transfer = self._transfer
        going = self._admitted and self._phase in (Phase.RECEIVING, Phase.VERIFYING)
        if transfer is None or not going:
            raise self._not_staging()
        size = len(data)
        if offset + size <= self._offset:
            return Taken(self._offset, transfer.durable)
        if offset != self._offset:
            raise Declined(
                UpdatedStatus.OUT_OF_ORDER,
                f"a piece at {offset}, the next one is at {self._offset}",
            )
        if offset + size > transfer.size:
            raise Declined(
                UpdatedStatus.TOO_LARGE, f"{offset + size} bytes, {transfer.size} were signed"
            )
        rest = size % BLOCK_SIZE
        if rest and offset + size != transfer.size:
            raise Declined(
                UpdatedStatus.OUT_OF_ORDER, f"a piece of {size} bytes is no whole blocks"
            )
        device = self._slots[NAMES[transfer.slot]]
        piece = bytes(data)  # a write from pages that are not there yet goes by the page, twice
        try:
            await _write(device, offset // BLOCK_SIZE, piece)
        except DeviceFault as fault:
            raise device_failed("the slot cannot be written", fault) from fault
        if self._hashed == offset:
            self._hash.update(piece)
            self._crc = extend(self._crc, piece)
            self._hashed += size
        self._offset += size
        if self._offset - transfer.durable >= self._sync_size:
            try:
                await self.sync()
            except Declined as declined:
                if declined.status is UpdatedStatus.IO_ERROR:
                    raise
                # The piece is in the slot; that it is durable is kept with a later one.
        return Taken(self._offset, self._transfer.durable if self._transfer else 0)

    async def sync(self) -> None:
        """Make what has come durable, and keep that: from there a cut-off transfer goes on."""
        transfer = self._transfer
        if transfer is None or self._phase is not Phase.RECEIVING:
            return
        if self._offset == transfer.durable:
            return
        try:
            await self._slots[NAMES[transfer.slot]].flush()
        except DeviceFault as fault:
            self._offset = transfer.durable  # of what came since nothing is known
            if fault.fault is Fault.TIMED_OUT:  # a slow disk: less at a time, or it never ends
                self._sync_size = max(SYNC_LEAST, self._sync_size // 4)
            raise device_failed("the slot cannot be flushed", fault) from fault
        kept = replace(transfer, durable=self._offset)
        await write_transfer(self._memory, kept)
        self._transfer = kept

    async def finish(self, asker: Asker) -> Staged | None:
        """Begin to verify what has come; None as long as `verify_step` has to go on.

        The outcome if there is one: it is staged, or Declined is raised again.
        """
        await self.sure()
        if self._phase is Phase.REFUSED and self._refused is not None:
            raise self._refused
        if self._phase is Phase.VERIFYING:
            return None
        transfer = self._transfer
        if transfer is None or self._phase is Phase.STAGED:
            info = self.record.slot(self.record.standby)
            if info.state is not SlotState.STAGED:
                raise self._not_staging()
            return _staged(self.record, self.record.standby)
        if not self._admitted:
            raise self._not_staging()
        if self._offset < transfer.size:
            raise Declined(
                UpdatedStatus.INCOMPLETE, f"{self._offset} of {transfer.size} bytes have come"
            )
        await self.sync()
        known = None
        if self._hashed == transfer.size:
            known = Known(sha256=self._hash.digest(), crc=self._crc)
            if known.sha256 != transfer.digest:
                declined = wrong_digest(known.sha256, transfer.digest)
                await self._refuse(declined, asker)
                raise declined
        source = SlotSource(self._slots[NAMES[transfer.slot]], transfer.size)
        self._check = Verification(source, transfer, known=known)
        self._phase = Phase.VERIFYING
        return None

    async def verify_step(self, asker: Asker) -> Staged | None:
        """A small step of verifying; the outcome of the last one, or Declined."""
        check, transfer = self._check, self._transfer
        assert check is not None, "it is verifying"
        assert transfer is not None, "it is verifying"
        try:
            manifest = await check.step()
            if manifest is None:
                return None
            self._check_manifest(manifest, transfer)
            _ = await self._migrated(manifest)
            await self.sure()
            info = _info_of(transfer)
            if self.record.slot(NAMES[transfer.slot]) != info:  # a store in doubt had come through
                await self._change(lambda record: staged(record, info))
        except Declined as declined:
            await self._refuse(declined, asker)
            raise
        self._check = None
        self._phase = Phase.STAGED
        await self._tell(EventKind.STAGED, transfer, asker)
        await self._drop_transfer()
        return _staged(self.record, NAMES[transfer.slot])

    def _check_manifest(self, manifest: Manifest, transfer: KeptTransfer) -> None:
        """What the set says of itself is what was signed, and the base system has what it needs."""
        if (manifest.version, manifest.name) != (transfer.version, transfer.name):
            raise Declined(
                UpdatedStatus.WRONG_MANIFEST,
                f"the set is {manifest.name} ({manifest.version}), signed was "
                f"{transfer.name} ({transfer.version})",
            )
        lacking = unmet(manifest.base, self._rules.python, self._rules.distributions)
        if lacking:
            raise Declined(UpdatedStatus.WRONG_BASE, f"it needs {lacking[0]}")

    async def _refuse(self, declined: Declined, asker: Asker) -> None:
        """The transfer is over, and its slot stays empty; unless it may be tried again as it is."""
        transfer = self._transfer
        self._check = None
        if declined.status in PASSING:
            self._phase = Phase.RECEIVING
            return
        self._phase = Phase.REFUSED
        self._refused = declined
        if transfer is None:
            return
        await self._tell(
            EventKind.REFUSED, transfer, asker, status=declined.status, detail=declined.detail
        )
        await self._drop_transfer()

    async def _drop_transfer(self) -> None:
        """Forget it in statefs too; what cannot be forgotten now is put away by `open`."""
        try:
            await write_transfer(self._memory, None)
        except Declined:
            return

    def _forget(self) -> None:
        self._transfer = None
        self._phase = Phase.IDLE
        self._offset = 0
        self._hash = sha256()
        self._crc = 0
        self._hashed = 0
        self._check = None
        self._refused = None

    def _not_staging(self) -> Declined:
        return Declined(UpdatedStatus.NOT_STAGING, "no transfer was begun")

    def transfer(self) -> Transfer:
        """How far the transfer is, for people."""
        transfer, refused = self._transfer, self._refused
        if transfer is None:
            return Transfer(Phase.IDLE, Slot.NONE, 0, "", NO_DIGEST, 0, 0, 0, 0, "")
        verified = 0 if self._check is None else self._check.done
        if self._phase is Phase.STAGED:
            verified = transfer.size
        return Transfer(
            self._phase,
            transfer.slot,
            transfer.version,
            transfer.name,
            transfer.digest,
            transfer.size,
            self._offset,
            verified,
            0 if refused is None else refused.status,
            "" if refused is None else refused.detail,
        )

    # ------------------------------------------------------------------ switching

    async def switch(self, digest: bytes, tries: int, asker: Asker) -> Switched:
        """Have the staged set of this digest tried from the next boot on. Raises Declined."""
        await self.sure()
        record = self.record
        trying = record.trying
        if trying is not None and self._trial is None and record.slot(trying).digest == digest:
            return _switched(record, trying, repeated=True)
        self._check_settled()
        info = record.slot(record.standby)
        if info.state is not SlotState.STAGED or info.digest != digest:
            raise Declined(
                UpdatedStatus.NOT_STAGED, f"slot {record.standby} does not hold that set"
            )
        try:
            areas = await self._migrated(await self._manifest(record.standby))
            snapshot = await self._copied(areas)
        except Declined as declined:
            if declined.status not in PASSING:
                await self._note(
                    EventKind.REFUSED,
                    record.standby,
                    asker,
                    declined.detail,
                    status=declined.status,
                )
            raise
        copied = f"; a copy of {', '.join(areas)} is kept" if areas else ""
        tried = f"{info.name} is tried, {tries} times at most{copied}"
        reason = self._reason(Cause.SWITCHED, record.standby, asker, tried)
        await self._change(lambda found: switch(found, tries, reason, snapshot=snapshot))
        await self._note(EventKind.SWITCHED, record.standby, asker, tried)
        return _switched(self.record, record.standby, repeated=False)

    async def commit(self, name: SlotName, digest: bytes, nonce: int, asker: Asker) -> Committed:
        """The set on trial is healthy: it is what is booted from now on. Raises Declined."""
        await self.sure()
        info = self.record.slot(name)
        if info.digest != digest:
            raise Declined(UpdatedStatus.NOT_ON_TRIAL, f"slot {name} holds another set")
        is_done = name is self.record.active and info.state is SlotState.GOOD
        if self._trial is None and is_done:
            return Committed(nonce, SLOTS[name], info.version, self.record.sequence, True)
        proven = f"{info.name} is proven good"
        reason = self._reason(Cause.COMMITTED, name, asker, proven)
        await self._change(lambda found: commit(found, name, reason))
        await self._note(EventKind.COMMITTED, name, asker, proven)
        await self._drop_copies()
        return Committed(nonce, SLOTS[name], info.version, self.record.sequence, False)

    async def rollback(self, target: SlotName, asker: Asker) -> RolledBack:
        """Boot `target` from now on. Raises Declined."""
        await self.sure()
        record = self.record
        if record.trying is target:
            raise Declined(UpdatedStatus.NO_TARGET, f"slot {target} is what is tried")
        if record.trying is None and record.active is target:
            return _rolled_back(record, repeated=True)
        if record.trying is None:
            await self._check_way_back(target)
        left = record.trying or record.active
        given_up = f"{record.slot(left).name or 'it'} is given up"
        reason = self._reason(Cause.GIVEN_UP, left, asker, given_up)
        await self._change(lambda found: rollback(found, reason))
        await self._note(EventKind.ROLLED_BACK, left, asker, given_up)
        if not self.record.restore:
            await self._drop_copies()
        return _rolled_back(self.record, repeated=False)

    async def _check_way_back(self, target: SlotName) -> None:
        """The set in the other slot was good once, and knows the data as they are now."""
        if self.record.slot(target).state is not SlotState.GOOD:
            raise Declined(UpdatedStatus.NO_TARGET, f"slot {target} holds no set that was good")
        older, newer = await self._manifest(target), await self._manifest(self.record.active)
        _ = _raised(newer, older)

    async def _copied(self, areas: list[str]) -> int:
        """A copy of these areas, for the way back; 0 if there are none."""
        if not areas:
            return 0
        await self._memory.keep_only(0)  # a cut may have left one, and it takes the room
        return await self._memory.snapshot(areas)

    async def _migrated(self, manifest: Manifest) -> list[str]:
        """The areas whose data this set migrates. Raises Declined if it knows an older schema."""
        return _raised(await self._manifest(self.record.active), manifest)

    async def _manifest(self, name: SlotName) -> Manifest:
        """The manifest of the set in a slot."""
        size = self.record.slot(name).size
        if size > self.capacity(name):
            raise Declined(UpdatedStatus.BAD_SET, f"slot {name} is smaller than its set")
        try:
            return await read_manifest(SlotSource(self._slots[name], size))
        except SetRefused as refused:
            raise Declined(UpdatedStatus.BAD_SET, f"slot {name}: {refused}") from refused
        except DeviceFault as fault:
            raise device_failed(f"slot {name}", fault) from fault

    # ------------------------------------------------------------------ what they share

    @property
    def _trial(self) -> SlotName | None:
        """The slot that is on trial now, not merely going to be."""
        name = self.record.trying
        if name is None or self.record.slot(name).state is not SlotState.TRYING:
            return None
        return name

    def _check_settled(self) -> None:
        """Go on only if the running set is proven good, and nothing is unfinished."""
        if self._trial is not None:
            name = self.record.slot(self._trial).name
            raise Declined(UpdatedStatus.UNPROVEN, f"{name} is on trial: wait for its health")
        try:
            check_settled(self.record)
        except BootRefused as refused:
            raise _of_boot(refused) from refused
        if self.running is not self.record.active:
            raise Declined(
                UpdatedStatus.PENDING,
                f"slot {self.record.active} is booted next, and this is slot {self.running} still",
            )

    async def sure(self) -> None:
        """After a store that failed: find out which record is in force."""
        if self._in_doubt:
            self._record = await self._load()
            self._in_doubt = False

    async def _change(self, transition: "Callable[[BootRecord], BootRecord]") -> None:
        try:
            changed = transition(self.record)
        except BootRefused as refused:
            raise _of_boot(refused) from refused
        await self._store(changed)

    async def _store(self, record: BootRecord) -> None:
        """Durable on the boot device first; only then it is ours."""
        self._in_doubt = True
        try:
            self._record = await self._boot.store(record)
        except DeviceFault as fault:
            raise device_failed("the boot device", fault) from fault
        self._in_doubt = False

    async def _drop_copies(self) -> None:
        """Copies that no trial needs go; one that stays, `open` puts away, or the next copy."""
        try:
            await self._memory.keep_only(self.record.snapshot)
        except Declined:
            return

    def _reason(self, cause: Cause, name: SlotName, asker: Asker, detail: str) -> Reason:
        return Reason(
            cause=cause,
            slot=name,
            version=self.record.slot(name).version,
            boot=self.record.boots,
            wall=asker.wall,
            trace=asker.trace,
            service=asker.name,
            detail=detail,
        )

    async def _note(
        self, kind: EventKind, name: SlotName, asker: Asker, detail: str, *, status: int = 0
    ) -> None:
        info = self.record.slot(name)
        await self.history.add(
            kind,
            self.record,
            asker,
            slot=name,
            version=info.version,
            name=info.name,
            status=status,
            detail=detail,
        )

    async def _tell(
        self,
        kind: EventKind,
        transfer: KeptTransfer,
        asker: Asker,
        *,
        status: int = 0,
        detail: str = "",
    ) -> None:
        await self.history.add(
            kind,
            self.record,
            asker,
            slot=NAMES[transfer.slot],
            version=transfer.version,
            name=transfer.name,
            status=status,
            detail=detail,
        )


async def _write(device: BlockDevice, block: int, data: bytes | memoryview) -> None:
    """Write a piece; the last one's last block is filled up with zeros."""
    rest = len(data) % BLOCK_SIZE
    whole = len(data) - rest
    if whole:
        await device.write(block, memoryview(data)[:whole])
    if rest:
        tail = bytes(memoryview(data)[whole:]).ljust(BLOCK_SIZE, b"\0")
        await device.write(block + whole // BLOCK_SIZE, tail)


def _info_of(transfer: KeptTransfer) -> SlotInfo:
    """What the record says of the slot once this set is staged there."""
    return SlotInfo(
        state=SlotState.STAGED,
        version=transfer.version,
        name=transfer.name,
        digest=transfer.digest,
        size=transfer.size,
        floor=transfer.floor,
    )


def _raised(now: Manifest, new: Manifest) -> list[str]:
    """Areas of which `new` knows a newer schema than `now`. One it knows an older of is refused."""
    for area, version in now.schemas.items():
        if new.schemas.get(area, 0) < version:
            raise Declined(
                UpdatedStatus.SCHEMA_OLDER,
                f"{area} has schema {version}, {new.name} knows {new.schemas.get(area, 0)}",
            )
    return [area for area, version in new.schemas.items() if version > now.schemas.get(area, 0)]


def _of_boot(refused: BootRefused) -> Declined:
    return Declined(OF_BOOT[refused.status], refused.status.value)


def _begun(wanted: KeptTransfer, offset: int, *, staged: bool) -> Begun:
    return Begun(
        wanted.slot, wanted.version, wanted.name, wanted.digest, wanted.size, offset, staged
    )


def _staged(record: BootRecord, name: SlotName) -> Staged:
    info = record.slot(name)
    return Staged(SLOTS[name], info.version, info.name, info.digest, info.size, record.sequence)


def _switched(record: BootRecord, name: SlotName, *, repeated: bool) -> Switched:
    tries = record.slot(name).tries_left
    return Switched(SLOTS[name], tries, record.snapshot, record.sequence, repeated)


def _rolled_back(record: BootRecord, *, repeated: bool) -> RolledBack:
    return RolledBack(SLOTS[record.active], record.sequence, record.restore, repeated)

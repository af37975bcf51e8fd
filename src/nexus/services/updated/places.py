"""What updated stands on: its three devices, statefsd, and init, which boots again.

Nothing here keeps a copy or stands in for what is not there: every failure is Declined. A write
counts when statefsd says that it is durable.
"""

from collections.abc import Mapping, Sequence
from typing import Final

from nexus.abi import CapClose, DeviceQuery, Nanos
from nexus.bootctl import BootControl, BootRecord, SlotName, open_boot
from nexus.drivers import BlockDevice, DeviceFault, open_block
from nexus.ipc import (
    Answer,
    Bulk,
    CallFailure,
    Client,
    Closed,
    Exchange,
    Refused,
    RetryBudget,
    Stale,
    accept_bulk,
    may_repeat,
    offer_bulk,
    retry_until,
)
from nexus.protocols.init import Reboot, Rebooting
from nexus.protocols.statefsd import (
    BULK_VALUE_MAX,
    INLINE_VALUE_MAX,
    SNAPSHOT_AREAS_MAX,
    BulkValue,
    Delete,
    DropSnapshot,
    Durability,
    Get,
    GetBulk,
    GetSnapshot,
    Put,
    PutBulk,
    Restore,
    Snapshot,
    SnapshotKept,
    SnapshotState,
    StatefsdStatus,
    Stored,
    Value,
)
from nexus.protocols.statefsd import PROTOCOL as STATEFSD
from nexus.protocols.updated import UpdatedStatus
from nexus.runtime.program import Context, Unreachable, Unusable
from nexus.services.updated.faults import Declined
from nexus.services.updated.kept import Damaged
from nexus.wire import Request

STATEFSD_NAME: Final = "statefsd"
BOOT_DEVICE: Final = "boot"
SLOT_DEVICES: Final[Mapping[SlotName, str]] = {SlotName.A: "slot-a", SlotName.B: "slot-b"}
ATTEMPTS_MAX: Final = 4  # of a call that a restart of the other service cut off
BACKOFF: Final = Nanos(10_000_000)  # ns before the second one


class GrantedBoot:
    """bootctl.BootControl on the granted device, whichever backend its record is in."""

    def __init__(self, device: BlockDevice) -> None:
        self._device = device
        self._found: BootControl | None = None

    async def load(self) -> BootRecord:
        """As BootControl."""
        self._found, record = await open_boot(self._device)
        return record

    async def store(self, record: BootRecord) -> BootRecord:
        """As BootControl."""
        return await self._backend.store(record)

    async def create(self, record: BootRecord) -> BootRecord:
        """As BootControl."""
        return await self._backend.create(record)

    async def read_anchor(self) -> bytes:
        """As BootControl."""
        return await self._backend.read_anchor()

    async def write_anchor(self, data: bytes) -> None:
        """As BootControl."""
        await self._backend.write_anchor(data)

    @property
    def _backend(self) -> BootControl:
        assert self._found is not None, "a record is loaded first"
        return self._found


async def open_devices(context: Context) -> tuple[BootControl, dict[SlotName, BlockDevice]]:
    """The boot device and the slots, found by the names the system file gives them.

    Raises Unusable.
    """
    granted = {(await DeviceQuery(slot)).name: slot for slot in context.boot.hardware}
    names = [BOOT_DEVICE, *SLOT_DEVICES.values()]
    if missing := [name for name in names if name not in granted]:
        raise Unusable(
            f"has no device {' and no '.join(missing)}: give it them in the system file, "
            f"hardware = {names}"
        )
    found = {}
    for name in names:
        try:
            found[name] = await open_block(granted[name])
        except DeviceFault as fault:
            raise Unusable(f"cannot use its device {name}: {fault}; see the machine's log") from (
                fault
            )
    slots: dict[SlotName, BlockDevice] = {slot: found[name] for slot, name in SLOT_DEVICES.items()}
    return GrantedBoot(found[BOOT_DEVICE]), slots


class StateMemory:
    """kept.Memory at statefsd. `until` is when the request that is served has to be over."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self.until = Nanos(0)
        self.generation = 0  # of the instance of statefsd that answered last; 0 before

    async def connect(self) -> Client:
        """The way to it, found once."""
        try:
            return await self._context.client(STATEFSD_NAME, STATEFSD, self.until)
        except Unreachable as fault:
            raise _unavailable(f"no way to {STATEFSD_NAME}") from fault

    async def get(self, key: bytes) -> bytes | None:
        """As Memory.get."""
        match await self._ask(Get(key)):
            case Answer(reply=Value(value=value)):
                return value
            case Refused(StatefsdStatus.NOT_FOUND):
                return None
            case Refused(StatefsdStatus.CORRUPTED):
                raise Damaged(key)
            case Refused(StatefsdStatus.LARGE):
                return await self._get_bulk(key)
            case other:
                raise _refused(other)

    async def _get_bulk(self, key: bytes) -> bytes:
        match await self._ask(GetBulk(key)):
            case Answer(reply=BulkValue(length=length), cap=cap):
                bulk = await accept_bulk(cap, 0, length)
                if not isinstance(bulk, Bulk):
                    raise _unavailable(f"{STATEFSD_NAME}: {bulk.value}")
                value = bytes(bulk.view)
                await bulk.release()
                return value
            case Refused(StatefsdStatus.CORRUPTED):
                raise Damaged(key)
            case other:
                raise _refused(other)

    async def put(self, key: bytes, value: bytes | None) -> None:
        """As Memory.put."""
        if value is None:
            outcome = await self._ask(Delete(key, Durability.DURABLE, 0))
            if outcome == Refused(StatefsdStatus.NOT_FOUND):
                return
        elif len(value) <= INLINE_VALUE_MAX:
            outcome = await self._ask(Put(key, value, Durability.DURABLE, 0))
        else:
            assert len(value) <= BULK_VALUE_MAX, "what is kept has limits"
            request = PutBulk(key, 0, len(value), Durability.DURABLE, 0)
            outcome = await self._ask(request, value)
        if not isinstance(outcome, Answer) or not isinstance(outcome.reply, Stored):
            raise _refused(outcome)
        if not outcome.reply.durable:
            raise _unavailable(f"{STATEFSD_NAME}: not durable")

    async def snapshot(self, areas: Sequence[str]) -> int:
        """As Memory.snapshot."""
        wanted = [area.encode() for area in areas]
        if len(wanted) > SNAPSHOT_AREAS_MAX:
            raise _no_copy(f"{len(wanted)} areas, and one copy has {SNAPSHOT_AREAS_MAX}")
        match await self._ask(Snapshot(wanted)):
            case Answer(reply=SnapshotKept(snapshot=number)):
                return number
            case Refused(StatefsdStatus.SNAPSHOT_EXISTS):
                # There was none before; so the first attempt took it, and was cut off after that.
                kept = await self._kept()
                if kept.state is not SnapshotState.KEPT or set(kept.areas) != set(wanted):
                    raise _unavailable(f"{STATEFSD_NAME} keeps another copy")
                return kept.snapshot
            case Refused(
                StatefsdStatus.NO_SPACE
                | StatefsdStatus.OVER_QUOTA
                | StatefsdStatus.CORRUPTED
                | StatefsdStatus.INVALID_KEY
                | StatefsdStatus.KEY_TOO_LONG as status
            ):
                raise _no_copy(f"{', '.join(areas)}: {STATEFSD_NAME}: {status.name}")
            case other:
                raise _refused(other)

    async def restore(self, snapshot: int) -> None:
        """As Memory.restore: statefsd did it before it served anybody, and says so."""
        match await self._ask(Restore(snapshot)):
            case Answer():
                return
            case Refused(StatefsdStatus.NO_SNAPSHOT | StatefsdStatus.CORRUPTED as status):
                raise _no_copy(f"{snapshot}: {STATEFSD_NAME}: {status.name}")
            case other:
                raise _refused(other)

    async def keep_only(self, snapshot: int) -> None:
        """As Memory.keep_only."""
        kept = await self._kept()
        if kept.state is SnapshotState.NONE or kept.snapshot == snapshot:
            return
        outcome = await self._ask(DropSnapshot(kept.snapshot))
        if not isinstance(outcome, Answer):
            raise _refused(outcome)

    async def _kept(self) -> SnapshotKept:
        outcome = await self._ask(GetSnapshot())
        if not isinstance(outcome, Answer) or not isinstance(outcome.reply, SnapshotKept):
            raise _refused(outcome)
        return outcome.reply

    async def _ask(self, request: Request[object], bulk: bytes = b"") -> Answer[object] | Refused:
        """The reply, or Refused; `bulk` moves along as a sealed VMO. Raises Declined.

        Asking again is right for every request updated makes: it writes whole values, one at a
        time, and an instance that has ended does nothing any more.
        """
        client = await self.connect()
        budget = RetryBudget(attempts_max=ATTEMPTS_MAX, backoff=BACKOFF, deadline=self.until)

        async def attempt() -> Answer[object] | Refused | CallFailure:
            slot = None
            if bulk:
                slot = await offer_bulk(bulk)
                if slot is None:
                    raise _unavailable("no memory for a VMO")
            outcome = await client.ask(request, self.until, move=slot)
            if slot is not None and isinstance(outcome, Closed | Stale):
                await CapClose(slot)
            return outcome

        outcome = await retry_until(attempt, may_repeat, budget, client.tokens)
        self.generation = client.generation
        if isinstance(outcome, CallFailure):
            raise _unavailable(f"{STATEFSD_NAME}: {type(outcome).__name__}")
        return outcome


async def reboot(context: Context, until: Nanos) -> str:
    """Have init end the run and be booted again; why not, or "" when it does."""
    control = await context.peers.control(until)
    if not isinstance(control, Exchange):
        return type(control).__name__
    outcome = await control.call(Reboot(), until)
    if isinstance(outcome, Rebooting):
        return ""
    return outcome.status.name if isinstance(outcome, Refused) else type(outcome).__name__


def _unavailable(why: str) -> Declined:
    return Declined(UpdatedStatus.UNAVAILABLE, why)


def _no_copy(why: str) -> Declined:
    return Declined(UpdatedStatus.NO_SNAPSHOT, f"no copy to go back to: {why}")


def _refused(outcome: object) -> Declined:
    """A refusal that is no answer for us: the device, the quota, the policy."""
    assert isinstance(outcome, Refused), f"{outcome!r} to a request of another kind"
    full = outcome.status in (StatefsdStatus.NO_SPACE, StatefsdStatus.OVER_QUOTA)
    status = UpdatedStatus.NO_SPACE if full else UpdatedStatus.UNAVAILABLE
    return Declined(status, f"{STATEFSD_NAME}: {outcome.status.name}")

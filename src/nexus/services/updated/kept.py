"""What updated keeps in statefs, below /state/boot/: trust, a transfer that is not over, history.

What decides which slot is booted is on the boot device and never here: who empties statefs loses
the history, has a transfer begin anew, and has seen no metadata, but for the anchor and the floor.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Annotated, Final, Protocol

import msgspec

from nexus.bootctl import BootRecord, Reason, SlotName, clip
from nexus.protocols.updated import (
    DETAIL_SIZE_MAX,
    DIGEST_SIZE,
    HISTORY_KEPT,
    NAME_SIZE_MAX,
    PIECE_UNIT,
    Event,
    EventKind,
    Slot,
    UpdatedStatus,
)
from nexus.services.updated.faults import Declined
from nexus.wire import (
    U8,
    U64,
    Blob,
    List,
    Message,
    RemoteProtocolError,
    Text,
    encode,
    strict_decoder,
)

ROOT: Final = b"/state/boot/"
TRUST: Final = ROOT + b"trust"
TRANSFER: Final = ROOT + b"transfer"
HISTORY: Final = ROOT + b"history"
FORMAT: Final = 1
BOOTS_MAX: Final = 0xFFFF_FFFF  # of an event; what a device lives to see
SEEN_SIZE: Final = 16  # bytes of a digest of a reason; enough to know it again
SEEN_MAX: Final = 8  # reasons: more than a record has

SLOTS: Final[Mapping[SlotName, Slot]] = {SlotName.A: Slot.A, SlotName.B: Slot.B}


class Damaged(Declined):
    """A value was damaged, and statefsd has set it aside; a new one replaces it."""

    def __init__(self, key: bytes) -> None:
        super().__init__(UpdatedStatus.UNAVAILABLE, f"{key.decode()} was damaged")


class Memory(Protocol):
    """Values by key, and copies of other services' data, all of it in statefs.

    What is written is durable on return. Everything raises Declined.
    """

    async def get(self, key: bytes) -> bytes | None:
        """The value, None if there is none. Raises Damaged."""
        ...

    async def put(self, key: bytes, value: bytes | None) -> None:
        """Set a value, or with None drop it."""
        ...

    async def snapshot(self, areas: Sequence[str]) -> int:
        """Copy these areas as they are now; the number of the copy, from 1.

        Raises Declined(NO_SNAPSHOT) where there is no room for it.
        """
        ...

    async def restore(self, snapshot: int) -> None:
        """Be sure that the areas are as in that copy. Asking again changes nothing.

        Raises Declined(NO_SNAPSHOT) where there is no such copy that is whole.
        """
        ...

    async def keep_only(self, snapshot: int) -> None:
        """Drop every copy but this one; 0 for none. Asking again changes nothing."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Asker:
    """On whose behalf something is done, and when: for reasons and the history."""

    subject: int = 0  # service id; 0 for updated itself
    name: str = ""  # of the service, if it is known
    trace: bytes = bytes(16)
    at: int = 0
    wall: int = 0


class KeptTransfer(Message):
    """A transfer that was begun: which set, to which slot, and how much of it is durable there."""

    format: Annotated[int, U8(minimum=FORMAT, maximum=FORMAT)]
    slot: Slot
    version: Annotated[int, U64()]
    name: Annotated[str, Text(size_min=1, size_max=NAME_SIZE_MAX)]
    digest: Annotated[bytes, Blob(size_min=DIGEST_SIZE, size_max=DIGEST_SIZE)]
    size: Annotated[int, U64(minimum=1)]
    floor: Annotated[int, U64()]
    durable: Annotated[int, U64()]


class KeptHistory(Message):
    """The latest events, oldest first, and the reasons of the boot record that are among them."""

    format: Annotated[int, U8(minimum=FORMAT, maximum=FORMAT)]
    last: Annotated[int, U64()]  # number of the latest event ever
    events: Annotated[list[Event], List(count_max=HISTORY_KEPT)]
    seen: Annotated[
        list[Annotated[bytes, Blob(size_min=SEEN_SIZE, size_max=SEEN_SIZE)]],
        List(count_max=SEEN_MAX),
    ]


_decode_transfer: Final = strict_decoder(KeptTransfer)
_decode_history: Final = strict_decoder(KeptHistory)


async def read_transfer(memory: Memory) -> KeptTransfer | None:
    """The transfer that is not over; one that cannot be read counts as none."""
    try:
        data = await memory.get(TRANSFER)
    except Damaged:
        return None
    if data is None:
        return None
    try:
        kept: KeptTransfer = _decode_transfer(data)
    except RemoteProtocolError:
        return None
    is_whole = kept.durable == kept.size or kept.durable % PIECE_UNIT == 0
    return kept if is_whole and kept.durable <= kept.size and kept.slot is not Slot.NONE else None


async def write_transfer(memory: Memory, transfer: KeptTransfer | None) -> None:
    """Keep it, or with None that there is none."""
    await memory.put(TRANSFER, None if transfer is None else bytes(encode(transfer)))


class History:
    """The latest events. An event that cannot be written waits in memory for the next try.

    Nothing that was done depends on its being written: the boot record alone says what is the case,
    and each step that risks something has its reason there before.
    """

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self._kept = KeptHistory(FORMAT, 0, [], [])
        self.unwritten = False  # statefs does not have the latest event yet
        self.damaged = False  # what was there could not be read, and a new one was begun

    @property
    def last(self) -> int:
        """Number of the latest event."""
        return self._kept.last

    async def open(self) -> None:
        """Read what is kept. Raises Declined when it cannot be had."""
        try:
            data = await self._memory.get(HISTORY)
            if data is not None:
                self._kept = _decode_history(data)
        except (Damaged, RemoteProtocolError):
            self.damaged = True

    def page(self, before: int, count: int) -> tuple[list[Event], bool]:
        """Events below a number (0: all), the latest first, and whether there are older ones."""
        older = [each for each in self._kept.events if not before or each.number < before]
        return older[-count:][::-1], len(older) > count

    async def add(
        self,
        kind: EventKind,
        record: BootRecord,
        asker: Asker,
        *,
        slot: SlotName | None = None,
        version: int = 0,
        name: str = "",
        status: int = 0,
        detail: str = "",
    ) -> None:
        """One more event; the oldest beyond HISTORY_KEPT goes."""
        event = Event(
            number=self._kept.last + 1,
            kind=kind,
            status=status,
            slot=Slot.NONE if slot is None else SLOTS[slot],
            version=version,
            name=clip(name, NAME_SIZE_MAX),
            boot=min(record.boots, BOOTS_MAX),
            at=asker.at,
            wall=asker.wall,
            subject=asker.subject,
            trace=asker.trace,
            detail=clip(detail, DETAIL_SIZE_MAX),
        )
        self._kept = KeptHistory(
            FORMAT, event.number, [*self._kept.events, event][-HISTORY_KEPT:], self._kept.seen
        )
        await self.write()

    async def take_reasons(self, record: BootRecord, kinds: Mapping[int, EventKind]) -> int:
        """Add what the loader wrote into the boot record since: how many reasons that were.

        `kinds` says by cause which event a reason is; the others are our own.
        """
        seen = set(self._kept.seen)
        new = [each for each in record.reasons if each.cause in kinds and _known(each) not in seen]
        self._kept = msgspec.structs.replace(
            self._kept, seen=[_known(each) for each in record.reasons][-SEEN_MAX:]
        )
        for reason in new:
            await self.add(
                kinds[reason.cause],
                record,
                Asker(trace=reason.trace, wall=reason.wall, name=reason.service),
                slot=reason.slot,
                version=reason.version,
                name=record.slot(reason.slot).name,
                detail=_told(reason),
            )
        return len(new)

    async def write(self) -> None:
        """Write what is not written yet; `unwritten` says whether it could be."""
        self.unwritten = True
        try:
            await self._memory.put(HISTORY, bytes(encode(self._kept)))
        except Declined:
            return
        self.unwritten = False


def _known(reason: Reason) -> bytes:
    """A reason's fingerprint."""
    parts = (reason.cause, reason.slot, reason.version, reason.boot, reason.wall, reason.detail)
    return sha256(repr(parts).encode()).digest()[:SEEN_SIZE]


def _told(reason: Reason) -> str:
    cause = reason.cause.name.lower().replace("_", " ")
    return ": ".join(part for part in (cause, reason.service, reason.detail) if part)

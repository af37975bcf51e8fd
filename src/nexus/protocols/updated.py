"""updated protocol: a signed system set comes to the standby slot, is tried, and kept or left.

An update is metadata (nexus.trust) and a set file (nexus.sets). Begin says who signed it and what
it may be; the file follows in pieces, in order, and Finish reads it back from the slot before it
counts as staged. Switch has it tried at the next boot; what was written down before that is enough
for the loader to go back. A commit is durable when it is answered. Requests that change something
name what they want to be the case (the digest, the slot), so that asking again changes nothing:
the boot device knows no request ids, and two devices share no transaction.

Digests are SHA-256 of the whole set file. `wall` times are ns since 1970, 0 where no clock is set.
"""

from enum import IntEnum
from typing import Annotated, Final, TypeAlias

from nexus.wire import (
    INLINE_SIZE_MAX,
    U8,
    U16,
    U32,
    U64,
    Blob,
    Bool,
    List,
    Message,
    Protocol,
    Request,
    Text,
)

READ_RIGHT: Final = "update.read"
STAGE_RIGHT: Final = "update.stage"
SWITCH_RIGHT: Final = "update.switch"
COMMIT_RIGHT: Final = "update.commit"
ROLLBACK_RIGHT: Final = "update.rollback"
SLOTS_TARGET: Final = "slots"  # of every decision about them

DIGEST_SIZE: Final = 32  # bytes of a SHA-256
NAME_SIZE_MAX: Final = 48  # characters of a set's name, "1.2.0"; bootctl keeps as many
METADATA_SIZE_MAX: Final = 576 * 1024  # bytes of an update's metadata; as nexus.trust reads
PIECE_SIZE_MAX: Final = 1024 * 1024  # bytes of the file in one VMO, the largest there is
PIECE_UNIT: Final = 512  # bytes, a block: the pieces are multiples of it, but for the last
INLINE_PIECE_MAX: Final = 7 * 1024  # bytes of a piece in a frame; operator's envelope fits around
TRIES_MAX: Final = 16  # boots a set may need to become healthy; as nexus.bootctl gives
TRIES_DEFAULT: Final = 2
DETAIL_SIZE_MAX: Final = 200  # characters of a sentence for people
SERVICE_SIZE_MAX: Final = 48  # characters
TAIL_SIZE_MAX: Final = 1024  # bytes of the console, or the log, of a boot that failed
REASONS_PAGE: Final = 2  # reasons of one answer: each has a tail
HISTORY_PAGE: Final = 4  # events of one answer
HISTORY_KEPT: Final = 32  # events, the latest
TRACE_SIZE: Final = 16  # bytes
SERVICE_NAME: Final = "updated"

assert INLINE_PIECE_MAX % PIECE_UNIT == PIECE_SIZE_MAX % PIECE_UNIT == 0
assert INLINE_PIECE_MAX + 64 <= INLINE_SIZE_MAX


class UpdatedStatus(IntEnum):
    """Why updated refuses. The numbers are wire format and are never reused."""

    # How it stands with the slots.
    UNPROVEN = 16  # the running set is on trial: neither slot can be spared
    PENDING = 17  # a switch, or the way back, waits for its boot
    NOT_STAGED = 18  # the standby slot holds no verified set of that digest
    NOT_ON_TRIAL = 19  # there is no trial to commit, or it is another one
    NO_TARGET = 20  # the slot to go back to holds no set that was ever committed
    NO_BOOT_RECORD = 21  # the boot device holds no record that can be read: provision the device
    # How it goes with a transfer.
    NOT_STAGING = 22  # no transfer was begun, or updated has restarted since: begin again
    OUT_OF_ORDER = 23  # the piece does not begin where the file ends so far, or is not whole blocks
    INCOMPLETE = 24  # the file has not come whole
    TOO_LARGE = 25  # the set is larger than the slot, or the metadata than METADATA_SIZE_MAX
    BAD_BULK = 26  # no sealed VMO with MAP, or offset and length are not inside
    ABANDONED = 27  # another transfer was begun meanwhile
    # What it stands on.
    IO_ERROR = 28  # the slot or the boot device failed; what is durable is as before
    UNAVAILABLE = 29  # statefsd cannot be had now, or not in time
    NO_SPACE = 30  # statefs is full
    RESTORING = 31  # data of before a trial that failed are not back yet
    ALREADY_RUNS = 32  # it is the set that runs
    # Why an update is not trusted (nexus.trust.TrustStatus).
    MALFORMED_METADATA = 40
    METADATA_TRUNCATED = 41
    METADATA_TOO_LARGE = 42
    METADATA_TOO_MANY = 43  # files, keys, signatures, roots or sets
    METADATA_DUPLICATE = 44
    WRONG_KEY = 45
    BAD_SIGNATURE = 46
    THRESHOLD = 47  # signed by too few
    MIXED = 48  # signed, and not of one release
    REPLAYED = 49  # a whole older release
    ROLLED_BACK = 50  # newer on the outside, older inside
    EXPIRED_METADATA = 51  # it ended before a moment that somebody has signed since
    BELOW_FLOOR = 52  # the set's version
    DEVELOPMENT_KEY = 53
    NO_SET = 54  # the metadata names none
    NO_ANCHOR = 55  # what the device keeps itself, anchor or state, is not whole
    # Why a set is not taken.
    WRONG_DIGEST = 60  # what stands in the slot is not what was signed
    BAD_SET = 61  # the file is no system set in the strict form; the history says where
    WRONG_MANIFEST = 62  # version or name differ from what was signed
    WRONG_BASE = 63  # it needs another Python, or distributions that the base system has not
    SCHEMA_OLDER = 64  # it knows an older schema of some area's data than the device has
    NO_SNAPSHOT = 65  # it migrates data, and there is no room for a copy of them


class Slot(IntEnum):
    """A slot; the numbers are the reference system's (services.md 13.2)."""

    NONE = 0
    A = 1
    B = 2


class SlotState(IntEnum):
    """What a slot holds (nexus.bootctl.SlotState)."""

    EMPTY = 0  # nothing that can be booted; it may be being written
    STAGED = 1  # verified, never tried
    TRYING = 2
    GOOD = 3  # committed
    BAD = 4  # tried, and given up; or damaged


class Phase(IntEnum):
    """How far a transfer is."""

    IDLE = 0
    RECEIVING = 1
    VERIFYING = 2  # all is there, and is read back from the slot
    STAGED = 3
    REFUSED = 4  # `status` and `detail` say why; the slot is empty


Digest = Annotated[bytes, Blob(size_min=DIGEST_SIZE, size_max=DIGEST_SIZE)]
Name = Annotated[str, Text(size_max=NAME_SIZE_MAX)]
Detail = Annotated[str, Text(size_max=DETAIL_SIZE_MAX)]
Trace = Annotated[bytes, Blob(size_min=TRACE_SIZE, size_max=TRACE_SIZE)]


class SlotRow(Message):
    """A slot, as the boot-control record has it. Without a set the digest is zeros."""

    slot: Slot
    state: SlotState
    tries_left: Annotated[int, U8()]
    version: Annotated[int, U64()]
    name: Name
    digest: Digest
    size: Annotated[int, U64()]  # bytes of the set file
    capacity: Annotated[int, U64()]  # bytes of the slot


class Transfer(Message):
    """The transfer of an update, as far as it is."""

    phase: Phase
    slot: Slot
    version: Annotated[int, U64()]
    name: Name
    digest: Digest
    size: Annotated[int, U64()]  # bytes of the set file
    offset: Annotated[int, U64()]  # bytes that came
    verified: Annotated[int, U64()]  # bytes that were read back
    status: Annotated[int, U16()]  # UpdatedStatus of a refusal, else 0
    detail: Detail


class Update(Message):
    """How it stands with the slots and the transfer.

    `active` is proven good and is booted when nothing is tried; `trying` is to be tried, or is:
    then `running`, the slot of this boot, is the same. `sequence` is that of the boot-control
    record on the device.
    """

    sequence: Annotated[int, U64()]
    boots: Annotated[int, U32()]
    active: Slot
    trying: Slot
    running: Slot
    floor: Annotated[int, U64()]  # versions below it are not taken
    time_floor: Annotated[int, U64()]  # s since 1970: what expired before it is not taken
    snapshot: Annotated[int, U32()]  # of statefsd, for the way back; 0 if there is none
    restoring: Annotated[bool, Bool()]  # the way back was taken: statefsd restores it
    slots: Annotated[list[SlotRow], List(count_min=2, count_max=2)]
    transfer: Transfer
    reasons: Annotated[int, U8()]  # how many GetReasons has
    events: Annotated[int, U64()]  # number of the latest event of the history


class GetUpdate(Request[Update], op=1, idempotent=True, refuses=UpdatedStatus):
    """How it stands. The caller holds `update.read`, else DENIED. *Refuses*: NO_BOOT_RECORD."""


class MetadataTaken(Message):
    """So many bytes of the metadata are put together."""

    size: Annotated[int, U32(maximum=METADATA_SIZE_MAX)]


class PutMetadata(Request[MetadataTaken], op=2, idempotent=True, refuses=UpdatedStatus):
    """The next bytes of an update's metadata, for the caller's BeginInline; offset 0 begins anew.

    Kept for one caller, the latest. The caller holds `update.stage`, else DENIED.
    *Refuses*: OUT_OF_ORDER, TOO_LARGE.
    """

    offset: Annotated[int, U32()]
    data: Annotated[bytes, Blob(size_min=1, size_max=INLINE_PIECE_MAX)]


class Begun(Message):
    """The update is trusted, and its set may go to this slot: go on from `offset`.

    `offset` is not 0 where the transfer of the same set was cut off before; it is `size` where all
    of it has come. `staged`: it is verified too, and there is nothing left to do but switch.
    """

    slot: Slot
    version: Annotated[int, U64()]
    name: Name
    digest: Digest
    size: Annotated[int, U64()]
    offset: Annotated[int, U64()]
    staged: Annotated[bool, Bool()]


class Begin(Request[Begun], op=3, idempotent=True, refuses=UpdatedStatus, moves=True):
    """Begin or go on with a transfer. The metadata are `length` bytes from `offset` of the VMO.

    The standby slot is empty from now on, unless its set is the one asked for; a transfer of
    another set ends. The caller holds `update.stage`, else DENIED.
    *Refuses*: BAD_BULK, TOO_LARGE, UNPROVEN, PENDING, RESTORING, ALREADY_RUNS, NO_BOOT_RECORD,
    IO_ERROR, UNAVAILABLE, NO_SPACE, and every status of what is not trusted.
    """

    offset: Annotated[int, U32()]
    length: Annotated[int, U32()]


class BeginInline(Request[Begun], op=4, idempotent=True, refuses=UpdatedStatus):
    """As Begin, with the `length` bytes of metadata that the caller put together.

    *Refuses*: as Begin but BAD_BULK; INCOMPLETE where another size was put together.
    """

    length: Annotated[int, U32()]


class Taken(Message):
    """The file is there up to `offset`; what lies before `durable` survives a power cut."""

    offset: Annotated[int, U64()]
    durable: Annotated[int, U64()]


class Chunk(Request[Taken], op=5, idempotent=True, refuses=UpdatedStatus, moves=True):
    """The next piece of the file: `length` bytes from `start` of the sealed VMO.

    `offset` is where it belongs in the file. A piece that has come already changes nothing. All
    but the last are whole blocks (PIECE_UNIT). The caller holds `update.stage`, else DENIED.
    *Refuses*: NOT_STAGING, OUT_OF_ORDER, TOO_LARGE (beyond the size that was signed), BAD_BULK,
    IO_ERROR, UNAVAILABLE, NO_SPACE.
    """

    offset: Annotated[int, U64()]
    start: Annotated[int, U32()]
    length: Annotated[int, U32(minimum=1, maximum=PIECE_SIZE_MAX)]


class ChunkInline(Request[Taken], op=6, idempotent=True, refuses=UpdatedStatus):
    """As Chunk, with the piece in the frame. *Refuses*: as Chunk but BAD_BULK."""

    offset: Annotated[int, U64()]
    data: Annotated[bytes, Blob(size_min=1, size_max=INLINE_PIECE_MAX)]


class Staged(Message):
    """The standby slot holds this set, whole and verified; the boot-control record says so."""

    slot: Slot
    version: Annotated[int, U64()]
    name: Name
    digest: Digest
    size: Annotated[int, U64()]
    sequence: Annotated[int, U64()]


class Finish(Request[Staged], op=7, idempotent=True, refuses=UpdatedStatus):
    """Read the file back from the slot, compare it with what was signed, and check it strictly.

    Answered when that is done, or EXPIRED: it goes on, GetUpdate says how far it is, and whoever
    asks again gets the outcome. The caller holds `update.stage`, else DENIED.
    *Refuses*: NOT_STAGING, INCOMPLETE, ABANDONED, WRONG_DIGEST, BAD_SET, WRONG_MANIFEST,
    WRONG_BASE, SCHEMA_OLDER, BELOW_FLOOR, IO_ERROR, UNAVAILABLE, NO_SPACE, NO_BOOT_RECORD; BUSY
    when too many wait.
    """


class Switched(Message):
    """The set is tried at the next boot; this is durable. `repeated`: it was so before."""

    slot: Slot
    tries_left: Annotated[int, U8()]
    snapshot: Annotated[int, U32()]
    sequence: Annotated[int, U64()]
    repeated: Annotated[bool, Bool()]


class Switch(Request[Switched], op=8, idempotent=True, refuses=UpdatedStatus):
    """Have the staged set of this digest tried, in `tries` boots at most; with `reboot` at once.

    What it migrates is copied before (statefsd's snapshot), else it is not switched to.
    The caller holds `update.switch`, else DENIED.
    *Refuses*: UNPROVEN, PENDING (another set waits), RESTORING, NOT_STAGED, BELOW_FLOOR,
    BAD_SET (a slot cannot be read any more), SCHEMA_OLDER, NO_SNAPSHOT, NO_BOOT_RECORD, IO_ERROR,
    UNAVAILABLE.
    """

    digest: Digest
    tries: Annotated[int, U8(minimum=1, maximum=TRIES_MAX)]
    reboot: Annotated[bool, Bool()]


class Committed(Message):
    """The set is proven good; this is durable. `repeated`: it was before."""

    nonce: Annotated[int, U64()]
    slot: Slot
    version: Annotated[int, U64()]
    sequence: Annotated[int, U64()]
    repeated: Annotated[bool, Bool()]


class ReportHealth(Request[Committed], op=9, idempotent=True, refuses=UpdatedStatus):
    """Every service of the boot on trial is healthy, and stayed so: commit. DENIED to all but init.

    `nonce` comes back; slot and digest are those that init was booted with.
    *Refuses*: NOT_ON_TRIAL (it is not they that are on trial), NO_BOOT_RECORD, IO_ERROR.
    """

    nonce: Annotated[int, U64()]
    slot: Slot
    digest: Digest


class Commit(Request[Committed], op=10, idempotent=True, refuses=UpdatedStatus):
    """Commit the set of this digest, which runs on trial, by a person's word. `nonce` comes back 0.

    The caller holds `update.commit`, else DENIED. *Refuses*: as ReportHealth.
    """

    digest: Digest


class RolledBack(Message):
    """`slot` is booted from now on; this is durable. `repeated`: it was so before."""

    slot: Slot
    sequence: Annotated[int, U64()]
    restoring: Annotated[bool, Bool()]  # and the data that the other set may have changed
    repeated: Annotated[bool, Bool()]


class Rollback(Request[RolledBack], op=11, idempotent=True, refuses=UpdatedStatus):
    """Boot `slot` from now on: end a trial, take a switch back, or leave a committed set.

    With `reboot` at once, unless it runs already. The caller holds `update.rollback`, else DENIED.
    *Refuses*: NO_TARGET, RESTORING, SCHEMA_OLDER (data were migrated, and the copy is gone),
    NO_BOOT_RECORD, IO_ERROR.
    """

    slot: Slot
    reboot: Annotated[bool, Bool()]


class ReasonRow(Message):
    """Why a slot was left, or taken (nexus.bootctl.Reason): the boot device's own word, written
    before the step that it is about. `cause` is nexus.bootctl.Cause."""

    cause: Annotated[int, U8()]
    slot: Slot
    version: Annotated[int, U64()]
    boot: Annotated[int, U32()]
    wall: Annotated[int, U64()]
    trace: Trace
    service: Annotated[str, Text(size_max=SERVICE_SIZE_MAX)]
    detail: Detail
    tail: Annotated[bytes, Blob(size_max=TAIL_SIZE_MAX)]  # UTF-8, whole characters


class Reasons(Message):
    """Reasons from the asked one on, latest first; `total` are kept."""

    reasons: Annotated[list[ReasonRow], List(count_max=REASONS_PAGE)]
    total: Annotated[int, U8()]


class GetReasons(Request[Reasons], op=12, idempotent=True, refuses=UpdatedStatus):
    """The reasons that the boot device keeps; index 0 is the latest.

    The caller holds `update.read`, else DENIED. *Refuses*: NO_BOOT_RECORD.
    """

    index: Annotated[int, U8()]


class EventKind(IntEnum):
    """What an event of the history is about."""

    BEGUN = 1  # a transfer
    STAGED = 2
    REFUSED = 3  # a transfer, or its set; `status` says why
    SWITCHED = 4
    COMMITTED = 5
    ROLLED_BACK = 6  # by request, or by the loader: no tries were left
    FAILED = 7  # a boot of a trial; the reasons tell more
    RESTORED = 8  # statefsd had put the data back


class Event(Message):
    """An event of the history, which statefs keeps. `number` counts from 1 in the device's life.

    `subject` is the service that asked, 0 for updated itself; `at` is the kernel's clock in that
    boot.
    """

    number: Annotated[int, U64()]
    kind: EventKind
    status: Annotated[int, U16()]  # UpdatedStatus, 0 for none
    slot: Slot
    version: Annotated[int, U64()]
    name: Name
    boot: Annotated[int, U32()]
    at: Annotated[int, U64()]
    wall: Annotated[int, U64()]
    subject: Annotated[int, U64()]
    trace: Trace
    detail: Detail


class Events(Message):
    """Events before the asked one, latest first; `more` says that older ones are kept."""

    events: Annotated[list[Event], List(count_max=HISTORY_PAGE)]
    more: Annotated[bool, Bool()]


class GetHistory(Request[Events], op=13, idempotent=True, refuses=UpdatedStatus):
    """The latest events below the number `before`, 0 for the very latest.

    The caller holds `update.read`, else DENIED. *Refuses*: UNAVAILABLE.
    """

    before: Annotated[int, U64()]


UpdatedRequest: TypeAlias = (
    GetUpdate
    | PutMetadata
    | Begin
    | BeginInline
    | Chunk
    | ChunkInline
    | Finish
    | Switch
    | ReportHealth
    | Commit
    | Rollback
    | GetReasons
    | GetHistory
)
PROTOCOL: Final = Protocol(
    "updated",
    number=16,
    version=1,
    requests=(
        GetUpdate,
        PutMetadata,
        Begin,
        BeginInline,
        Chunk,
        ChunkInline,
        Finish,
        Switch,
        ReportHealth,
        Commit,
        Rollback,
        GetReasons,
        GetHistory,
    ),
)

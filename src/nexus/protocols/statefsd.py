"""statefsd protocol: values under path-like keys, which survive what they were promised to survive.

A key is `/state/AREA/...` or `/state/NAME`. AREA decides who may use it: `/state/keystore/` needs
the right `statefs.keystore`, `/state/boot/` needs `statefs.boot`, everything else `statefs.write`
to change and `statefs.read` to look; the target of the check is the area, "/state/AREA/", or
"/state/" for a key without one. Only a reply that says `durable` promises that the write survives
a power cut. Whole areas can be copied and brought back (Snapshot, Restore) with `statefs.snapshot`.
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
    strict_decoder,
)

ROOT: Final = "/state/"
KEY_SIZE_MAX: Final = 255  # bytes of a key (services.md 10.3)
AREA_SIZE_MAX: Final = 48  # bytes of the first segment: a service's name, and a policy target
INLINE_VALUE_MAX: Final = 7 * 1024  # bytes of a value in a frame
BULK_VALUE_MAX: Final = 64 * 1024  # bytes of a value in a VMO
LIST_MAX: Final = 24  # keys of a page: 24 of the longest fit one frame
BATCH_MAX: Final = 64  # changes of a batch
BATCH_SIZE_MAX: Final = INLINE_SIZE_MAX - 32  # bytes of a batch's packed changes
REQUESTS_KEPT: Final = 64  # request ids of a service, the latest; more than it has in flight
QUARANTINE_PAGE: Final = 16  # records of a page of what was lost
WIRE_KEY_MAX: Final = 300  # bytes a frame may carry, so that one too long has its own status
WIRE_VALUE_MAX: Final = 7 * 1024 + 256

KEYSTORE_RIGHT: Final = "statefs.keystore"
BOOT_RIGHT: Final = "statefs.boot"
WRITE_RIGHT: Final = "statefs.write"
READ_RIGHT: Final = "statefs.read"
SNAPSHOT_RIGHT: Final = "statefs.snapshot"
SNAPSHOT_AREA: Final = "/state/.snapshot/"  # where a snapshot's pages are; no key there is set
BOOT_AREA: Final = "/state/boot/"
SPECIAL_AREAS: Final = {
    "/state/keystore/": KEYSTORE_RIGHT,
    BOOT_AREA: BOOT_RIGHT,
    SNAPSHOT_AREA: SNAPSHOT_RIGHT,
}
SNAPSHOT_AREAS_MAX: Final = 8  # areas of a snapshot: data whose schema one update changes
SNAPSHOT_SIZE_MAX: Final = 8 * 1024 * 1024  # bytes of keys and values in one
SNAPSHOT_KEYS_MAX: Final = 16_384  # keys in one; as many as an area has by default

assert WIRE_VALUE_MAX + WIRE_KEY_MAX + 32 <= INLINE_SIZE_MAX
assert LIST_MAX * (KEY_SIZE_MAX + 3) + 32 <= INLINE_SIZE_MAX


class Durability(IntEnum):
    """What an answered write is promised."""

    ACCEPTED = 0  # survives the death of the client, and of statefsd as a rule; not a power cut
    DURABLE = 1  # survives a power cut


class StatefsdStatus(IntEnum):
    """Why statefsd refuses. The numbers are wire format and are never reused."""

    NOT_FOUND = 16
    VALUE_TOO_LARGE = 17  # beyond INLINE_VALUE_MAX or BULK_VALUE_MAX
    KEY_TOO_LONG = 18
    INVALID_KEY = 19  # not below /state/, an empty segment, `.`, `..`, a control character
    OVER_QUOTA = 20  # the area's bytes or keys
    NO_SPACE = 21  # the store is full but for what is reserved for others
    IO_ERROR = 22  # the device failed; whether the write was done is not known
    READ_ONLY = 23  # the device cannot be written, or failed before: restart or repair it
    BAD_BULK = 24  # no sealed VMO with MAP, or offset and length are not inside
    LARGE = 25  # to Get: the value does not fit a frame, use GetBulk
    CORRUPTED = 26  # the record was damaged and is quarantined; a Put replaces it
    SNAPSHOT_EXISTS = 27  # one is kept already: drop it first
    NO_SNAPSHOT = 28  # none of that number is kept


Key = Annotated[bytes, Blob(size_max=WIRE_KEY_MAX)]


class Stored(Message):
    """A change that is made. `sequence` is its number in the journal, the last one of what was
    done: a request id is recorded under a number too. It is that of the latest change if there
    was nothing to do."""

    sequence: Annotated[int, U64()]
    durable: Annotated[bool, Bool()]
    repeated: Annotated[bool, Bool()]  # the request id had been applied before; nothing was done


class Put(Request[Stored], op=1, idempotent=False, refuses=StatefsdStatus):
    """Set a key. With a `request_id` other than 0 the same request of one service is applied once,
    also across restarts of statefsd, among its last REQUESTS_KEPT.

    *Refuses*: VALUE_TOO_LARGE, KEY_TOO_LONG, INVALID_KEY, OVER_QUOTA, NO_SPACE,
    IO_ERROR, READ_ONLY.
    """

    key: Key
    value: Annotated[bytes, Blob(size_max=WIRE_VALUE_MAX)]
    durability: Durability
    request_id: Annotated[int, U64()]


class PutBulk(Request[Stored], op=2, idempotent=False, refuses=StatefsdStatus, moves=True):
    """As Put; the value is `length` bytes from `offset` of the sealed VMO that moves along.

    *Refuses*: as Put, BAD_BULK.
    """

    key: Key
    offset: Annotated[int, U32()]
    length: Annotated[int, U32()]
    durability: Durability
    request_id: Annotated[int, U64()]


class Value(Message):
    """A value and the sequence number of the change that set it."""

    value: Annotated[bytes, Blob(size_max=INLINE_VALUE_MAX)]
    sequence: Annotated[int, U64()]


class Get(Request[Value], op=3, idempotent=True, refuses=StatefsdStatus):
    """The value of a key. *Refuses*: NOT_FOUND, KEY_TOO_LONG, INVALID_KEY, LARGE, CORRUPTED,
    IO_ERROR."""

    key: Key


class BulkValue(Message):
    """The first `length` bytes of the sealed VMO that comes along."""

    length: Annotated[int, U32()]
    sequence: Annotated[int, U64()]


class GetBulk(Request[BulkValue], op=4, idempotent=True, refuses=StatefsdStatus, gives=True):
    """As Get, by VMO whatever the size; an empty value comes without one.

    *Refuses*: as Get but LARGE, NO_SPACE (no memory for the VMO).
    """

    key: Key


class Delete(Request[Stored], op=5, idempotent=False, refuses=StatefsdStatus):
    """Drop a key.

    *Refuses*: NOT_FOUND, KEY_TOO_LONG, INVALID_KEY, NO_SPACE, IO_ERROR, READ_ONLY.
    """

    key: Key
    durability: Durability
    request_id: Annotated[int, U64()]


class Keys(Message):
    """Keys in byte order; `more` says that there are further ones after the last."""

    keys: Annotated[list[Annotated[bytes, Blob(size_max=KEY_SIZE_MAX)]], List(count_max=LIST_MAX)]
    more: Annotated[bool, Bool()]


class ListKeys(Request[Keys], op=6, idempotent=True, refuses=StatefsdStatus):
    """The keys below `prefix` that come after `after`, of the areas the caller may look into.

    `prefix` is "/state/" or a whole path of segments that ends in "/". Below "/state/" areas are
    left out that the caller may not look into; in an area it may not look into it is DENIED.
    *Refuses*: INVALID_KEY, KEY_TOO_LONG.
    """

    prefix: Key
    after: Key  # b"" from the first on
    count: Annotated[int, U8(minimum=1, maximum=LIST_MAX)]


class Synced(Message):
    """Every change up to this number survives a power cut."""

    sequence: Annotated[int, U64()]


class Sync(Request[Synced], op=7, idempotent=True, refuses=StatefsdStatus):
    """Make everything accepted durable, whoever wrote it. The caller may write into `area`.

    *Refuses*: INVALID_KEY, KEY_TOO_LONG, IO_ERROR, READ_ONLY.
    """

    area: Key  # an area the caller may write, "/state/AREA/" or "/state/"


class Change(Message):
    """A change of a batch: a new value, or with None the end of a key."""

    key: Key
    value: Annotated[bytes, Blob(size_max=INLINE_VALUE_MAX)] | None


class Changes(Message):
    """The changes of a batch, in order; no key twice."""

    changes: Annotated[list[Change], List(count_min=1, count_max=BATCH_MAX)]


decode_changes: Final = strict_decoder(Changes)
"""The changes in Batch.changes; raises RemoteProtocolError for anything else."""


class Batch(Request[Stored], op=8, idempotent=False, refuses=StatefsdStatus):
    """All changes or none, also across a power cut. Deleting what is not there is no error.

    `changes` is an encoded Changes (`nexus.wire.encode`): its bound is that of the whole batch.
    The caller may write into every area it touches.
    *Refuses*: as Put; INVALID_KEY also for a key that is there twice; MALFORMED for bytes that are
    no Changes.
    """

    changes: Annotated[bytes, Blob(size_min=1, size_max=BATCH_SIZE_MAX)]
    durability: Durability
    request_id: Annotated[int, U64()]


class Lost(Message):
    """A damaged record that was set aside."""

    key: Annotated[bytes, Blob(size_max=KEY_SIZE_MAX)]  # b"" if it cannot be told
    offset: Annotated[int, U64()]  # bytes from the device's beginning
    sequence: Annotated[int, U64()]  # 0 if it cannot be told


class Store(Message):
    """The store as it is."""

    device: Annotated[str, Text(size_max=64)]  # its name in the bus map
    backing: Annotated[str, Text(size_max=32)]  # as abi.DeviceInfo
    epoch: Annotated[int, U64()]  # raised at every opening
    sequence: Annotated[int, U64()]  # of the last change
    durable: Annotated[int, U64()]  # of the last change that survives a power cut
    keys: Annotated[int, U32()]
    used: Annotated[int, U64()]  # bytes of live records
    capacity: Annotated[int, U64()]  # bytes that live records may take
    compactions: Annotated[int, U64()]
    quarantined: Annotated[int, U32()]  # damaged records, also those no longer listed
    lost: Annotated[list[Lost], List(count_max=QUARANTINE_PAGE)]  # the latest ones
    writable: Annotated[bool, Bool()]


class GetStore(Request[Store], op=9, idempotent=True):
    """The store as it is. The caller sees the keys of lost records it may look at."""


class AreaUse(Message):
    """What an area takes: live bytes as they stand in the journal, keys, and its quota."""

    size: Annotated[int, U64()]
    keys: Annotated[int, U32()]
    size_max: Annotated[int, U64()]
    keys_max: Annotated[int, U32()]
    reads: Annotated[int, U64()]  # the caller's own, of all areas, in this instance's life
    writes: Annotated[int, U64()]  # the same; a batch is one


class GetArea(Request[AreaUse], op=10, idempotent=True, refuses=StatefsdStatus):
    """What an area takes. The caller may look into it. *Refuses*: INVALID_KEY, KEY_TOO_LONG."""

    area: Key


class Seen(Message):
    """How statefsd saw a call: for the proof of deadlines and traces that are handed on."""

    sender: Annotated[int, U64()]
    deadline: Annotated[int, U64()]
    trace: Annotated[bytes, Blob(size_min=16, size_max=16)]
    parent: Annotated[bytes, Blob(size_min=8, size_max=8)]
    op: Annotated[int, U8()]
    number: Annotated[int, U64()]


class Calls(Message):
    """The latest calls, oldest first, and how many there were.

    Clients are remembered until 64 others were heard since.
    """

    seen: Annotated[list[Seen], List(count_max=32)]
    total: Annotated[int, U64()]


class GetCalls(Request[Calls], op=11, idempotent=True):
    """The latest calls of `sender`, a service id. DENIED without `proof.control`."""

    sender: Annotated[int, U64()]
    count: Annotated[int, U16(minimum=1, maximum=32)]


class SnapshotState(IntEnum):
    """How it stands with the snapshot."""

    NONE = 0
    KEPT = 1
    RESTORED = 2  # the areas went back to it; they may have changed since


class SnapshotKept(Message):
    """The snapshot that is kept, the only one; the number is that of the latest one that ever was.

    `size` are bytes of keys and values, `sequence` is the last change that is in it.
    """

    snapshot: Annotated[int, U32()]
    state: SnapshotState
    areas: Annotated[list[Key], List(count_max=SNAPSHOT_AREAS_MAX)]
    size: Annotated[int, U64()]
    keys: Annotated[int, U32()]
    sequence: Annotated[int, U64()]


class Snapshot(Request[SnapshotKept], op=12, idempotent=False, refuses=StatefsdStatus):
    """Copy these areas as they are now; durable when it is answered. Nobody is served meanwhile.

    While the copy is kept its areas keep the room that they take now, whatever others write; the
    copy takes as much again. Neither "/state/boot/" nor "/state/.snapshot/" is copied: what says
    how far an update is does not go back with it. The caller holds `statefs.snapshot` for each.
    *Refuses*: INVALID_KEY, KEY_TOO_LONG (what is no such area, or is there twice),
    SNAPSHOT_EXISTS, NO_SPACE (also for more than SNAPSHOT_SIZE_MAX and
    SNAPSHOT_KEYS_MAX), CORRUPTED (a record of them is
    damaged, and no copy could bring it back), IO_ERROR, READ_ONLY.
    """

    areas: Annotated[list[Key], List(count_min=1, count_max=SNAPSHOT_AREAS_MAX)]


class Restore(Request[SnapshotKept], op=13, idempotent=True, refuses=StatefsdStatus):
    """Make the areas of this snapshot what they were, durably; done already, nothing is changed.

    Changes that others made in them are gone; that a request id was applied is remembered all the
    same. statefsd does it itself, before it serves anybody, when its setting `restore` says so, and
    what a power cut leaves of it is brought to an end before anybody is served.
    The caller holds `statefs.snapshot` for each area.
    *Refuses*: NO_SNAPSHOT, CORRUPTED (what is kept is not what was copied; nothing was changed),
    NO_SPACE (the disk's limits were lowered since), IO_ERROR, READ_ONLY.
    """

    snapshot: Annotated[int, U32(minimum=1)]


class DropSnapshot(Request[SnapshotKept], op=14, idempotent=True, refuses=StatefsdStatus):
    """Give up this snapshot; dropping what is not kept changes nothing. What is kept now.

    The caller holds `statefs.snapshot` for "/state/.snapshot/".
    *Refuses*: CORRUPTED, IO_ERROR, READ_ONLY.
    """

    snapshot: Annotated[int, U32(minimum=1)]


class GetSnapshot(Request[SnapshotKept], op=15, idempotent=True, refuses=StatefsdStatus):
    """What is kept. The caller holds `statefs.snapshot` for "/state/.snapshot/".

    *Refuses*: CORRUPTED.
    """


StatefsdRequest: TypeAlias = (
    Put
    | PutBulk
    | Get
    | GetBulk
    | Delete
    | ListKeys
    | Sync
    | Batch
    | GetStore
    | GetArea
    | GetCalls
    | Snapshot
    | Restore
    | DropSnapshot
    | GetSnapshot
)
PROTOCOL: Final = Protocol(
    "statefsd",
    number=11,
    version=2,
    requests=(
        Put,
        PutBulk,
        Get,
        GetBulk,
        Delete,
        ListKeys,
        Sync,
        Batch,
        GetStore,
        GetArea,
        GetCalls,
        Snapshot,
        Restore,
        DropSnapshot,
        GetSnapshot,
    ),
)

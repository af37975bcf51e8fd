"""A snapshot: a copy of whole areas, in the store itself, that they can go back to.

    none --take--> taking --all pages written--> kept --restore--> restoring --> restored
      ^              |                             |                                |
      \\--------------+--dropping <-----------------+--------------------------------/

Between the copy and the boot that migrates others still write. So that boot takes it again, once,
before it serves anybody: kept --take_again--> taking again --> kept, and fresh. A cut in the midst
finds the areas as they were: nobody can have migrated them.

One at a time. Its pages are values in an area of their own, a stream of keys and values, so that
the format of the device knows nothing of it, and no change of it needs more than one commit. What
a power cut leaves of a state in the midst (taking, restoring, dropping) is brought to an end by
`resume` before anybody is served: nobody sees areas that are partly as they were.

While one is kept its areas keep the room that they took: whoever fills the store meanwhile, the
way back is open.
"""

from collections.abc import AsyncIterator, Iterator, Sequence
from enum import IntEnum
from struct import Struct
from typing import Annotated, Final, NamedTuple

import msgspec

from nexus.drivers.crc import crc32c, extend
from nexus.services.statefsd.engine.errors import Damaged, StoreFull
from nexus.services.statefsd.engine.limits import (
    AREA_NAME_MAX,
    KEY_SIZE_MAX,
    ROOT,
    VALUE_SIZE_MAX,
    area_of,
    is_path,
)
from nexus.services.statefsd.engine.store import Change, Store

AREA: Final = b"/state/.snapshot/"
HEAD: Final = AREA + b"head"
FORMAT: Final = 1
AREAS_MAX: Final = 8  # areas of a snapshot: data whose schema one update changes
SIZE_MAX: Final = 8 * 1024 * 1024  # bytes of keys and values; nobody is served meanwhile, which
KEYS_MAX: Final = 16_384  # is below a second on an idle machine: a readiness deadline is two
NUMBER_MAX: Final = 0xFFFF_FFFF
PAGE_SIZE: Final = 32 * 1024  # bytes of a page; less where a commit takes less
KEYS_PAGE: Final = 256  # keys looked up at a time
CHANGES_MAX: Final = 256  # of one commit while restoring

_RECORD: Final = Struct("<BI")  # bytes of key and value
_Count = Annotated[int, msgspec.Meta(ge=0, lt=1 << 62)]


class State(IntEnum):
    """How far it is. The numbers stand on disks and are never reused."""

    NONE = 0
    TAKING = 1
    KEPT = 2
    RESTORING = 3
    RESTORED = 4
    DROPPING = 5
    TAKING_AGAIN = 6


class Head(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What is kept of a snapshot besides its pages."""

    format: Annotated[int, msgspec.Meta(ge=FORMAT, le=FORMAT)]
    number: Annotated[int, msgspec.Meta(ge=0, le=NUMBER_MAX)]  # never that of an earlier one
    state: State
    areas: Annotated[
        list[
            tuple[Annotated[bytes, msgspec.Meta(max_length=len(ROOT) + AREA_NAME_MAX + 1)], _Count]
        ],
        msgspec.Meta(max_length=AREAS_MAX),
    ]  # each with the bytes that its live records took
    pages: _Count = 0
    size: _Count = 0  # bytes of the stream
    keys: _Count = 0
    crc: Annotated[int, msgspec.Meta(ge=0, lt=1 << 32)] = 0  # of the stream
    sequence: _Count = 0  # of the last change in it
    fresh: bool = False  # it was taken again

    @property
    def is_kept(self) -> bool:
        """Whether there is one that the areas can go back to, or went back to."""
        return self.state in (State.KEPT, State.TAKING_AGAIN, State.RESTORING, State.RESTORED)


_DECODER: Final = msgspec.msgpack.Decoder(Head)
NOTHING: Final = Head(FORMAT, 0, State.NONE, [])


class SnapshotExists(Exception):
    """Another one is kept: drop it first."""


class NoSnapshot(Exception):
    """None is kept with this number."""


class SnapshotDamaged(Exception):
    """What stands of it is not what was written: there is no way back to it."""


class Record(NamedTuple):
    """A key of a snapshot, and its value."""

    key: bytes
    value: bytes


async def head_of(store: Store) -> Head:
    """What is kept now. Raises SnapshotDamaged."""
    try:
        entry = await store.get(HEAD)
    except Damaged as error:
        raise SnapshotDamaged(str(error)) from error
    if entry is None:
        return NOTHING
    try:
        return _DECODER.decode(entry.value)
    except msgspec.DecodeError as error:
        raise SnapshotDamaged(f"its head cannot be read: {error}") from error


async def take(store: Store, areas: Sequence[bytes]) -> Head:
    """Copy these areas as they are: durable on return. Nothing may be staged.

    Raises SnapshotExists; StoreFull, also for more than SIZE_MAX or KEYS_MAX; Damaged for an area
    with a damaged record, which no copy could bring back; ReadOnly and DeviceFault.
    """
    former = await head_of(store)
    if former.is_kept:
        raise SnapshotExists
    if former.state is not State.NONE:
        former = await drop(store, former.number)
    rows = [(area, store.usage(area).size) for area in areas]
    head = Head(FORMAT, former.number + 1, State.TAKING, rows, sequence=store.sequence)
    await _write_head(store, head, durable=False)
    try:
        head = await _write_pages(store, head)
        await _write_head(store, head, durable=True)
    except (Damaged, StoreFull):
        _ = await drop(store, head.number)
        raise
    _hold(store, head)
    return head


async def take_again(store: Store, number: int) -> Head:
    """Have the snapshot be of the areas as they are now; done already, it does nothing.

    For a store that was just opened, before anybody is served. Raises NoSnapshot, and as `take`;
    then there is no copy, and `restore` knows that there is nothing to bring back.
    """
    head = await head_of(store)
    if head.number != number or head.state not in (State.KEPT, State.TAKING_AGAIN):
        raise NoSnapshot
    if head.state is State.KEPT and head.fresh:
        return head
    rows = [(area, store.usage(area).size) for area, _ in head.areas]
    head = Head(FORMAT, number, State.TAKING_AGAIN, rows, sequence=store.sequence, fresh=True)
    await _write_head(store, head, durable=False)
    await _delete_pages(store)
    head = await _write_pages(store, head)
    await _write_head(store, head, durable=True)
    _hold(store, head)
    return head


async def _write_pages(store: Store, head: Head) -> Head:
    """Everything into pages; the head of what is kept then."""
    pages = _Pages(min(PAGE_SIZE, store.value_max(_page_key(0))))
    keys = count = 0
    for area, _ in head.areas:
        for key in _keys(store, area):
            pages.add(key, await _value(store, key))
            keys += 1
            if keys > KEYS_MAX:
                raise StoreFull(f"a snapshot keeps {KEYS_MAX} keys at most")
            for page in pages.whole():
                await _write(store, [Change(_page_key(count), page)])
                count += 1
    for page in pages.rest():
        await _write(store, [Change(_page_key(count), page)])
        count += 1
    return msgspec.structs.replace(
        head, state=State.KEPT, pages=count, size=pages.size, keys=keys, crc=pages.crc
    )


class _Pages:
    """The stream of a snapshot as it is written, cut into pages."""

    def __init__(self, page_size: int) -> None:
        self._page_size = page_size
        self._pending = bytearray()
        self.size = 0
        self.crc = crc32c(b"")

    def add(self, key: bytes, value: bytes) -> None:
        """One more record. Raises StoreFull."""
        record = _RECORD.pack(len(key), len(value)) + key + value
        self._pending += record
        self.size += len(record)
        self.crc = extend(self.crc, record)
        if self.size > SIZE_MAX:
            raise StoreFull(f"a snapshot keeps {SIZE_MAX} bytes at most")

    def whole(self) -> list[bytes]:
        """The pages that are full."""
        size, count = self._page_size, len(self._pending) // self._page_size
        found = [bytes(self._pending[at * size : (at + 1) * size]) for at in range(count)]
        del self._pending[: count * size]
        return found

    def rest(self) -> list[bytes]:
        """The last page, if there is one."""
        return [bytes(self._pending)] if self._pending else []


async def restore(store: Store, number: int) -> Head:
    """Make the areas what they were; done already, it does nothing. Nothing may be staged.

    Everything is read and compared with its checksum before anything is changed. Raises
    NoSnapshot, SnapshotDamaged, StoreFull, ReadOnly and DeviceFault.
    """
    head = await head_of(store)
    if not head.is_kept or head.number != number:
        raise NoSnapshot
    if head.state is State.RESTORED:
        return head
    if head.state is State.TAKING_AGAIN:
        return await _forget(store, head)
    await _check_whole(store, head)
    head = msgspec.structs.replace(head, state=State.RESTORING)
    await _write_head(store, head, durable=True)
    await _drop_others(store, head)
    await _put_back(store, head, growing=False)
    await _put_back(store, head, growing=True)
    head = msgspec.structs.replace(head, state=State.RESTORED)
    await _write_head(store, head, durable=True)
    return head


async def _forget(store: Store, head: Head) -> Head:
    """Nobody was served since the copy was to be taken again: the areas are what they were."""
    await _delete_pages(store)
    head = Head(FORMAT, head.number, State.RESTORED, head.areas, sequence=head.sequence)
    await _write_head(store, head, durable=True)
    return head


async def _check_whole(store: Store, head: Head) -> None:
    """Raises SnapshotDamaged unless every page is what was written."""
    crc, size, keys = crc32c(b""), 0, 0
    for index in range(head.pages):
        page = await _page(store, index)
        crc, size = extend(crc, page), size + len(page)
    if (crc, size) != (head.crc, head.size):
        raise SnapshotDamaged("its pages are not those that were written")
    areas = {area for area, _ in head.areas}
    last = b""
    async for key, _ in _kept(store, head):
        if area_of(key) not in areas or not is_path(key):
            raise SnapshotDamaged("it holds a key of another area")
        if area_of(key) == area_of(last) and key <= last:
            raise SnapshotDamaged("its keys are not in order")
        last = key
        keys += 1
    if keys != head.keys:
        raise SnapshotDamaged(f"it holds {keys} keys, {head.keys} were written")


async def _drop_others(store: Store, head: Head) -> None:
    """Delete the keys that came since."""
    kept = {key async for key, _ in _kept(store, head)}
    gone = [key for area, _ in head.areas for key in _keys(store, area) if key not in kept]
    await _delete(store, gone)


async def _delete(store: Store, keys: Sequence[bytes]) -> None:
    """Delete keys, as many in a commit as surely fit."""
    count = min(CHANGES_MAX, store.commit_room // store.change_size(bytes(KEY_SIZE_MAX), b""))
    for at in range(0, len(keys), count):
        await _write(store, [Change(key, None) for key in keys[at : at + count]])


async def _put_back(store: Store, head: Head, *, growing: bool) -> None:
    """Write the values that differ: first those that take no more room than what is there."""
    changes: list[Change] = []
    room = 0
    async for key, value in _kept(store, head):
        former = await _former(store, key)
        if former == [value] or _grows(former, value) != growing:
            continue
        cost = store.change_size(key, value)
        if changes and (cost > room or len(changes) >= CHANGES_MAX):
            await _write(store, changes)
            changes = []
        if not changes:
            room = store.commit_room
        changes.append(Change(key, value))
        room -= cost
    if changes:
        await _write(store, changes)


async def drop(store: Store, number: int) -> Head:
    """There is no snapshot of this number any more, durably. Raises ReadOnly and DeviceFault."""
    head = await head_of(store)
    if head.number != number or head.state is State.NONE:
        return head
    head = msgspec.structs.replace(head, state=State.DROPPING)
    await _write_head(store, head, durable=False)
    return await _finish_drop(store, head)


async def _finish_drop(store: Store, head: Head) -> Head:
    """Delete whatever pages there are; their number is kept, so that no other has it."""
    await _delete_pages(store)
    store.hold({})
    head = Head(FORMAT, head.number, State.NONE, [])
    await _write_head(store, head, durable=True)
    return head


async def _delete_pages(store: Store) -> None:
    await _delete(store, [key for key in _keys(store, AREA) if key != HEAD])


async def resume(store: Store, number: int = 0) -> Head:
    """Bring to an end what was begun, and go back to the snapshot of this number, 0 for none.

    For a store that was just opened, before anybody is served: as `restore` otherwise.
    """
    head = await head_of(store)
    _hold(store, head)
    if head.state in (State.TAKING, State.DROPPING) and store.writable:
        head = await _finish_drop(store, head)
    if head.state is State.RESTORING:
        number = head.number  # half of it is done: there is no other way than on
    return await restore(store, number) if number else head


async def go_back(store: Store, number: int) -> Head:
    """What init asks for after a rollback, 0 for none: `resume`, but nothing that is not lost.

    A copy that was never taken again is of a trial that did not come so far: nobody was served in
    it, so the areas are what they were, with all that was written between the switch and the boot.
    """
    head = await resume(store)
    if not number or (head.number == number and head.state is State.NONE):
        return head  # it was given up when all was back, in an earlier instance of this boot
    if head.number == number and head.state is State.KEPT and not head.fresh:
        return await _forget(store, head)
    return await restore(store, number)


def _hold(store: Store, head: Head) -> None:
    """Keep the room that the areas need to become what they were."""
    if head.state in (State.KEPT, State.RESTORING):
        store.hold(dict(head.areas))


# ---------------------------------------------------------------- what is read and written


def _page_key(index: int) -> bytes:
    return AREA + b"page-%08d" % index


async def _page(store: Store, index: int) -> bytes:
    try:
        entry = await store.get(_page_key(index))
    except Damaged as error:
        raise SnapshotDamaged(str(error)) from error
    if entry is None:
        raise SnapshotDamaged(f"page {index} is missing")
    return entry.value


class _Stream:
    """The stream of a snapshot as it is read."""

    def __init__(self) -> None:
        self._pending = b""

    def feed(self, page: bytes) -> list[Record]:
        """The records that are whole with this page. Raises SnapshotDamaged."""
        data = self._pending + page
        found = []
        at = 0
        while len(data) - at >= _RECORD.size:
            key_size, value_size = _RECORD.unpack_from(data, at)
            if not 0 < key_size <= KEY_SIZE_MAX or value_size > VALUE_SIZE_MAX:
                raise SnapshotDamaged("it holds a record that is none")
            start = at + _RECORD.size
            stop = start + key_size + value_size
            if stop > len(data):
                break
            found.append(Record(data[start : start + key_size], data[start + key_size : stop]))
            at = stop
        self._pending = data[at:]
        return found

    def end(self) -> None:
        """There are no more pages. Raises SnapshotDamaged."""
        if self._pending:
            raise SnapshotDamaged("its last record is cut off")


async def _kept(store: Store, head: Head) -> AsyncIterator[Record]:
    """The records of a snapshot, in the order they were taken. Raises SnapshotDamaged."""
    stream = _Stream()
    for index in range(head.pages):
        for record in stream.feed(await _page(store, index)):
            yield record
    stream.end()


def _keys(store: Store, area: bytes) -> Iterator[bytes]:
    """The keys of an area, in order, each looked up when its turn comes."""

    def visible(found: bytes) -> bool:
        return found == area

    after = b""
    while True:  # ends: every turn begins behind the one before
        keys, more = store.keys(area, after, KEYS_PAGE, visible)
        yield from keys
        if not more:
            return
        after = keys[-1]


async def _value(store: Store, key: bytes) -> bytes:
    """The value of a key that is there. Raises Damaged."""
    entry = await store.get(key)
    assert entry is not None, "nobody changes anything meanwhile"
    return entry.value


async def _former(store: Store, key: bytes) -> list[bytes]:
    """The value that a key has now; none if there is no such key, or its record is damaged."""
    try:
        entry = await store.get(key)
    except Damaged:
        return []
    return [] if entry is None else [entry.value]


def _grows(former: list[bytes], value: bytes) -> bool:
    """Whether this value takes more room than what is there."""
    return not former or len(value) > len(former[0])


async def _write(store: Store, changes: Sequence[Change], *, durable: bool = False) -> None:
    """One commit of its own; the quota of an area is nothing to what was in it already."""
    _ = store.stage(changes, within_quota=False)
    await store.commit(durable)


async def _write_head(store: Store, head: Head, *, durable: bool) -> None:
    await _write(store, [Change(HEAD, msgspec.msgpack.encode(head))], durable=durable)

"""A checkpoint: every live record in the order of keys, and how it is found, read and written.

Behind the records stand their offsets in order, a hash table of them, and the meta, twice. Which
of its parts is damaged is told by checksums: of the order, the table and the meta in the
superblock, of each segment of records in the meta, of each record in itself. Order and table are
made anew from the records if they are damaged, so that one damaged spot costs one record at most.

In memory a checkpoint is a few large byte strings and two arrays, whatever the number of keys.
"""

import sys
from array import array
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from struct import Struct
from typing import Annotated, Final, NamedTuple, TypeAlias

import msgspec

from nexus.abi import BLOCK_SIZE
from nexus.drivers import BlockDevice, DeviceFault, Fault
from nexus.drivers.crc import crc32c, extend
from nexus.services.statefsd.engine.errors import Lost
from nexus.services.statefsd.engine.layout import (
    COUNTER_MAX,
    HASHES_MAX,
    META_SIZE_MAX,
    RECORD_COST,
    RECORD_HEAD_SIZE,
    SEGMENT_BLOCKS,
    SEGMENT_SIZE,
    STORE_BLOCKS_MAX,
    Sections,
    Superblock,
    blocks_of,
    sections_of,
)
from nexus.services.statefsd.engine.limits import (
    AREAS_MAX,
    CLIENTS_MAX,
    KEY_SIZE_MAX,
    LOST_MAX,
    REQUESTS_MAX,
    ROOT,
    area_of,
    is_path,
)
from nexus.services.statefsd.engine.record import (
    KEY_AT,
    KEY_SIZE_AT,
    OFFSET,
    VALUE_SIZE_AT,
    Kind,
    encode_record,
    has_whole_value,
    parse_head,
)

SEGMENTS_MAX: Final = STORE_BLOCKS_MAX // SEGMENT_BLOCKS // 2 + 1
PROBES_MAX: Final = 32  # slots of the table looked at; then the order is searched
SEGMENT_SHIFT: Final = 20
SEGMENT_MASK: Final = SEGMENT_SIZE - 1
OFFSET_MASK: Final = 0xFFFF_FFFF
STEP_SIZE: Final = 64 * 1024  # bytes written in a step
PIECE_WORDS: Final = STEP_SIZE // 8
STEP_RECORDS: Final = 512  # records copied in a step; about a millisecond
BAD_MAX: Final = 1 << 15  # damaged records that are told one by one; a whole segment of them
BAD_BLOCKS_MAX: Final = 64  # unreadable blocks that are taken for damage; more are a dead device

_PROBES: Final = range(PROBES_MAX)
_FIELDS: Final = Struct("<8xQ8xBB2xI").unpack_from  # sequence, kind, sizes of key and value
_PUT: Final = int(Kind.PUT)
_DAMAGED: Final = int(Kind.DAMAGED)

assert 1 << SEGMENT_SHIFT == SEGMENT_SIZE
assert array("I").itemsize == 4, "offsets stand as 32 bits"
assert array("Q").itemsize == 8, "slots stand as 64 bits"


class Entry(NamedTuple):
    """A value, and the sequence of the change that set it."""

    value: bytes
    sequence: int


_entry: Final[Callable[[tuple[bytes, int]], Entry]] = partial(tuple.__new__, Entry)


class Gone(NamedTuple):
    """A key was deleted since the checkpoint."""

    sequence: int


Held: TypeAlias = Entry | Gone | Lost
"""What is known of a key that changed since the checkpoint."""


Number: TypeAlias = Annotated[int, msgspec.Meta(ge=0, lt=COUNTER_MAX)]
Identity: TypeAlias = Annotated[int, msgspec.Meta(ge=0)]  # 64 bits, as msgpack's
Word: TypeAlias = Annotated[int, msgspec.Meta(ge=0, lt=1 << 32)]
Name: TypeAlias = Annotated[bytes, msgspec.Meta(max_length=KEY_SIZE_MAX)]


class Meta(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What a checkpoint says besides its records."""

    segments: Annotated[
        list[tuple[Number, Word]], msgspec.Meta(max_length=SEGMENTS_MAX)
    ]  # bytes and checksum of each
    areas: (
        Annotated[dict[Name, tuple[Number, Number]], msgspec.Meta(max_length=AREAS_MAX)] | None
    )  # bytes and keys; None: count them
    clients: Annotated[
        list[tuple[Identity, Annotated[list[Identity], msgspec.Meta(max_length=2 * REQUESTS_MAX)]]],
        msgspec.Meta(max_length=CLIENTS_MAX),
    ]  # client, then request id and sequence in turn
    lost: Annotated[
        list[tuple[Name, Number, Number]], msgspec.Meta(max_length=LOST_MAX)
    ]  # the latest damaged records
    lost_count: Number
    hashes: Annotated[
        list[tuple[Word, Number, Number]], msgspec.Meta(max_length=HASHES_MAX)
    ]  # key hash, offset, sequence of damaged records without key
    forgotten: Number  # such records beyond HASHES_MAX, ever


_DECODER: Final = msgspec.msgpack.Decoder(Meta)


class Checkpoint:
    """The checkpoint in force."""

    __slots__ = ("_bad", "_order", "_plain_size", "_segments", "_size", "_slots", "_table")

    def __init__(
        self,
        segments: list[bytes],
        order: "array[int]",
        table: "array[int]",
        bad: dict[int, Lost] | None = None,
    ) -> None:
        self._segments = segments
        self._order = order
        self._table = table
        self._slots = len(table)
        self._size = len(segments) * SEGMENT_SIZE
        self._bad = bad or {}  # damaged records, by offset
        self._plain_size = 0 if bad else self._size  # below it no record has to be looked up there

    def __len__(self) -> int:
        return len(self._order)

    def find(self, key: bytes, key_hash: int) -> int:
        """The offset of the record of a key, -1 if there is none."""
        slots, table = self._slots, self._table
        slot = key_hash % slots
        for _ in _PROBES:
            entry = table[slot]
            if not entry:
                return -1
            if entry >> 32 == key_hash:
                offset = (entry & OFFSET_MASK) - 1
                if self._size > offset >= 0:
                    segment = self._segments[offset >> SEGMENT_SHIFT]
                    at = offset & SEGMENT_MASK
                    if self._bad and offset in self._bad:
                        if self._bad[offset].key == key:
                            return offset
                    elif segment.startswith(key, at + KEY_AT) and segment[at + KEY_SIZE_AT] == len(
                        key
                    ):
                        return offset
            slot += 1
            if slot == slots:
                slot = 0
        return self._search(key)

    def read(self, key: bytes, key_hash: int) -> Entry | Lost | None:
        """The record of a key: `find` and `get` in one, as it goes for most keys."""
        entry = self._table[key_hash % self._slots]
        if not entry:
            return None
        offset = (entry & OFFSET_MASK) - 1
        if entry >> 32 == key_hash and offset < self._plain_size:
            segment = self._segments[offset >> SEGMENT_SHIFT]
            at = offset & SEGMENT_MASK
            if segment.startswith(key, at + KEY_AT):
                sequence, kind, key_size, value_size = _FIELDS(segment, at)
                if key_size == len(key) and kind == _PUT:
                    start = at + KEY_AT + key_size
                    return _entry((segment[start : start + value_size], sequence))
        offset = self.find(key, key_hash)
        return self.get(offset) if offset >= 0 else None

    def size_of(self, key: bytes, key_hash: int) -> int:
        """Bytes of key and value of the record of a key, -1 if there is none. As `read`."""
        entry = self._table[key_hash % self._slots]
        if not entry:
            return -1
        offset = (entry & OFFSET_MASK) - 1
        if entry >> 32 == key_hash and offset < self._plain_size:
            segment = self._segments[offset >> SEGMENT_SHIFT]
            at = offset & SEGMENT_MASK
            if segment.startswith(key, at + KEY_AT):
                _, _, key_size, value_size = _FIELDS(segment, at)
                if key_size == len(key):
                    size: int = key_size + value_size
                    return size
        offset = self.find(key, key_hash)
        return self.size_at(offset) if offset >= 0 else -1

    def _search(self, key: bytes) -> int:
        index = bisect_left(_Keys(self), key)
        if index < len(self._order) and self.key_at(index) == key:
            return self._order[index]
        return -1

    def get(self, offset: int) -> Entry | Lost:
        """The record at an offset that `find` gave."""
        if self._bad and offset in self._bad:
            return self._bad[offset]
        segment = self._segments[offset >> SEGMENT_SHIFT]
        at = offset & SEGMENT_MASK
        sequence, kind, key_size, value_size = _FIELDS(segment, at)
        start = at + KEY_AT + key_size
        value = segment[start : start + value_size]
        if kind == _DAMAGED:
            return lost_of(segment[at + KEY_AT : start], value, sequence)
        return _entry((value, sequence))

    def size_at(self, offset: int) -> int:
        """Bytes of key and value of the record at an offset that `find` gave."""
        if self._bad and offset in self._bad:
            return len(self._bad[offset].key) + OFFSET.size
        _, _, key_size, value_size = _FIELDS(
            self._segments[offset >> SEGMENT_SHIFT], offset & SEGMENT_MASK
        )
        size: int = key_size + value_size
        return size

    def key_at(self, index: int) -> bytes:
        """The key of the record at an index of the order."""
        return self._key_of_record(self._order[index])

    def _key_of_record(self, offset: int) -> bytes:
        if self._bad and offset in self._bad:
            return self._bad[offset].key
        segment = self._segments[offset >> SEGMENT_SHIFT]
        at = offset & SEGMENT_MASK
        size = segment[at + KEY_SIZE_AT : at + KEY_SIZE_AT + 1]
        return segment[at + KEY_AT : at + KEY_AT + ord(size or b"\0")]

    def key_of(self, key_hash: int) -> bytes:
        """The key with this hash, b"" if there is none."""
        slot = key_hash % self._slots
        for _ in _PROBES:
            entry = self._table[slot]
            offset = (entry & OFFSET_MASK) - 1
            if not entry:
                break
            if entry >> 32 == key_hash and self._size > offset >= 0:
                key = self._key_of_record(offset)
                if key:
                    return key
            slot = (slot + 1) % self._slots
        return b""

    def index_of(self, key: bytes) -> int:
        """The index of the first key that is not before `key`."""
        return bisect_left(_Keys(self), key)

    def offset_at(self, index: int) -> int:
        """The offset of the record at an index of the order."""
        return self._order[index]

    def raw_at(self, offset: int, epoch: int) -> bytes:
        """The bytes of a record as they go into the next checkpoint."""
        if self._bad and offset in self._bad:
            return damaged_record(self._bad[offset], epoch)
        segment = self._segments[offset >> SEGMENT_SHIFT]
        at = offset & SEGMENT_MASK
        size = int.from_bytes(segment[at + VALUE_SIZE_AT : at + KEY_AT], "little")
        return segment[at : at + KEY_AT + segment[at + KEY_SIZE_AT] + size]

    @property
    def memory(self) -> int:
        """Bytes it holds in memory."""
        return sum(map(len, self._segments)) + 4 * len(self._order) + 8 * self._slots


class _Keys:
    """The keys of a checkpoint in order, for bisect."""

    __slots__ = ("_checkpoint",)

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint

    def __len__(self) -> int:
        return len(self._checkpoint)

    def __getitem__(self, index: int) -> bytes:
        return self._checkpoint.key_at(index)


EMPTY: Final = Checkpoint([], array("I"), array("Q", [0]))


def damaged_record(lost: Lost, epoch: int) -> bytes:
    """The record that says that the record of this key was damaged."""
    return encode_record(lost.sequence, epoch, Kind.DAMAGED, lost.key, OFFSET.pack(lost.offset))


def lost_of(key: bytes, value: bytes, sequence: int) -> Lost:
    """What a record of kind DAMAGED says."""
    offset = OFFSET.unpack(value)[0] if len(value) == OFFSET.size else 0
    return Lost(key, offset, sequence)


# ---------------------------------------------------------------- the hash table


def slots_for(count: int) -> int:
    """Slots of the table of so many records: two of three are taken."""
    return count + count // 2 + 1


def insert(table: "array[int]", key_hash: int, offset: int) -> None:
    """Put a record into the table, unless all of its places are taken: the order has it too."""
    slots = len(table)
    slot = key_hash % slots
    for _ in _PROBES:
        if not table[slot]:
            table[slot] = (key_hash << 32) | (offset + 1)
            return
        slot += 1
        if slot == slots:
            slot = 0


def little(words: "array[int]") -> bytes:
    """The bytes of an array as they stand on the device."""
    if sys.byteorder == "big":
        words = words[:]
        words.byteswap()
    return words.tobytes()


# ---------------------------------------------------------------- reading


async def read_region(device: BlockDevice, block: int, count: int) -> bytes:
    """Blocks of the device; those that cannot be read are zeros, and so found damaged.

    Raises DeviceFault if more than BAD_BLOCKS_MAX of them cannot, or for another reason.
    """
    pieces = []
    for start in range(block, block + count, SEGMENT_BLOCKS):
        size = min(SEGMENT_BLOCKS, block + count - start)
        try:
            pieces.append(await device.read(start, size))
        except DeviceFault as fault:
            if fault.fault is not Fault.IO:
                raise
            pieces.append(await _read_around(device, start, size, fault))
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


async def _read_around(device: BlockDevice, block: int, count: int, first: DeviceFault) -> bytes:
    """Around the blocks that cannot be read: halves, again and again."""
    bad = 0
    pieces: dict[int, bytes] = {}
    ranges = [(block, count)]
    while ranges:
        start, size = ranges.pop()
        try:
            pieces[start] = await device.read(start, size)
        except DeviceFault as fault:
            if fault.fault is not Fault.IO:
                raise
            if size > 1:
                ranges += [(start, size // 2), (start + size // 2, size - size // 2)]
                continue
            bad += 1
            if bad > BAD_BLOCKS_MAX or bad == count > 1:
                raise first from fault
            pieces[start] = bytes(BLOCK_SIZE)
    return b"".join(pieces[start] for start in sorted(pieces))


async def _read_words(
    device: BlockDevice, typecode: str, block: int, count: int
) -> tuple["array[int]", int]:
    """An array that stands on the device, and its checksum. Read in pieces: it is large."""
    words = array(typecode)
    crc = crc32c(b"")
    size = words.itemsize * count
    for start in range(0, size, SEGMENT_SIZE):
        piece_size = min(SEGMENT_SIZE, size - start)
        data = await read_region(device, block + start // BLOCK_SIZE, blocks_of(piece_size))
        data = data[:piece_size]
        crc = extend(crc, data)
        words.frombytes(data)
    if sys.byteorder == "big":
        words.byteswap()
    return words, crc


class Loaded(NamedTuple):
    """A checkpoint as it was found, and what was wrong with it."""

    checkpoint: Checkpoint
    meta: Meta | None  # None if both copies are damaged
    lost: list[Lost]  # newly found
    hashes: dict[int, Lost]  # damaged records without a key, by the hash of it
    damaged: bool
    unlisted: int = 0  # damaged records beyond those in `lost`


async def load(device: BlockDevice, found: Superblock) -> Loaded:
    """The checkpoint a superblock names. Raises DeviceFault if the device fails altogether."""
    first = found.area_first(found.active)
    sections = sections_of(found)
    meta = await _load_meta(device, found, first, sections)
    segments = await _load_segments(device, found, first, meta)
    order, order_crc = await _read_words(device, "I", first + sections.order, found.count)
    table, table_crc = await _read_words(device, "Q", first + sections.table, found.slots)
    suspects = [
        index
        for index, segment in enumerate(segments)
        if meta is None or crc32c(segment) != meta.segments[index][1]
    ]
    has_order = order_crc == found.order_crc and _is_inside(order, segments)
    has_table = table_crc == found.table_crc
    if has_order and has_table and not suspects and meta is not None:
        checkpoint = Checkpoint(segments, order, table)
        if not _is_foreign(checkpoint):
            if meta.areas is not None and not _is_sum(meta.areas, segments, found.count):
                meta = msgspec.structs.replace(meta, areas=None)
            return Loaded(checkpoint, meta, [], {}, damaged=False)
        suspects = list(range(len(segments)))
    offset = first * BLOCK_SIZE
    return _mended(
        segments,
        order if has_order else None,
        table if has_table else None,
        suspects,
        meta,
        offset,
        found,
    )


async def _load_meta(
    device: BlockDevice, found: Superblock, first: int, sections: Sections
) -> Meta | None:
    size = sections.meta_copy - sections.meta
    for start in (sections.meta, sections.meta_copy):
        try:
            data = await device.read(first + start, size)
        except DeviceFault as fault:
            if fault.fault is not Fault.IO:
                raise
            continue
        data = data[: found.meta_size]
        if crc32c(data) != found.meta_crc:
            continue
        try:
            meta = _DECODER.decode(data)
        except msgspec.DecodeError:
            continue
        if _segment_sizes(meta, found.records_size):
            return meta
    return None


def _segment_sizes(meta: Meta, records_size: int) -> bool:
    """Whether the segments of a meta are those of so many bytes."""
    count = -(-records_size // SEGMENT_SIZE)
    sizes = [size for size, _ in meta.segments]
    if len(sizes) != count:
        return False
    whole = all(0 < size <= SEGMENT_SIZE for size in sizes)
    return whole and (not count or (count - 1) * SEGMENT_SIZE + sizes[-1] == records_size)


async def _load_segments(
    device: BlockDevice, found: Superblock, first: int, meta: Meta | None
) -> list[bytes]:
    segments = []
    for index in range(-(-found.records_size // SEGMENT_SIZE)):
        size = min(SEGMENT_SIZE, found.records_size - index * SEGMENT_SIZE)
        if meta is not None:
            size = meta.segments[index][0]
        data = await read_region(device, first + index * SEGMENT_BLOCKS, blocks_of(size))
        segments.append(data if len(data) == size else data[:size])
    return segments


def _is_inside(order: "array[int]", segments: list[bytes]) -> bool:
    """Whether every offset is one of a record's head."""
    if not order:
        return True
    last = max(order)
    if last >> SEGMENT_SHIFT >= len(segments):
        return False
    return (last & SEGMENT_MASK) + KEY_AT <= len(segments[last >> SEGMENT_SHIFT])


def _is_foreign(checkpoint: Checkpoint) -> bool:
    """Whether it has keys in what is no area, or out of order. Looks at a key of each area."""
    index = 0
    while index < len(checkpoint):
        key = checkpoint.key_at(index)
        area = area_of(key)
        if not is_path(key if area == ROOT else area[:-1]):
            return True
        behind = index + 1 if area == ROOT else checkpoint.index_of(area[:-1] + b"0")
        if behind <= index:
            return True
        index = behind
    return False


def _is_sum(areas: Mapping[bytes, tuple[int, int]], segments: list[bytes], count: int) -> bool:
    """Whether areas are areas, and together come to what the records are."""
    size = sum(map(len, segments)) + (RECORD_COST - RECORD_HEAD_SIZE) * count
    sums = tuple(map(sum, zip(*areas.values(), strict=True))) or (0, 0)
    names = all(area == ROOT or (is_path(area[:-1]) and area_of(area) == area) for area in areas)
    return names and sums == (size, count)


def _mended(
    segments: list[bytes],
    order: "array[int] | None",
    table: "array[int] | None",
    suspects: list[int],
    meta: Meta | None,
    area_offset: int,
    found: Superblock,
) -> Loaded:
    """A checkpoint without its damaged records."""
    bad: dict[int, Lost] = {}
    known = order is not None
    offsets = order if order is not None else array("I", _walk(segments))
    suspected = set(suspects)
    dropped: set[int] = set()  # nobody knows their key
    unlisted = 0
    last = b""
    for offset in offsets:
        if known and offset >> SEGMENT_SHIFT not in suspected:
            continue
        segment, at = segments[offset >> SEGMENT_SHIFT], offset & SEGMENT_MASK
        head = parse_head(segment, at, len(segment))
        if head is None or not last < head.key or not is_path(head.key):
            dropped.add(offset)
            if len(bad) < BAD_MAX:
                bad[offset] = Lost(b"", area_offset + offset, 0)
            else:
                unlisted += 1
            continue
        last = head.key
        if has_whole_value(segment, head):
            continue
        if len(bad) < BAD_MAX:
            bad[offset] = Lost(head.key, area_offset + offset, head.sequence)
        else:
            dropped.add(offset)
            unlisted += 1
    lost_keys: dict[int, Lost] = {}
    if table is not None and dropped:
        for entry in table:
            offset = (entry & OFFSET_MASK) - 1
            if offset in dropped and offset in bad:
                lost_keys[entry >> 32] = bad[offset]
    lost = list(bad.values())
    missing = max(0, found.count - len(offsets))
    if missing:
        lost.append(Lost(b"", area_offset, 0))
        unlisted += missing - 1
    if meta is None:
        lost.append(Lost(b"", area_offset + sections_of(found).meta * BLOCK_SIZE, 0))
    if dropped:
        offsets = array("I", (offset for offset in offsets if offset not in dropped))
    checkpoint = Checkpoint(segments, offsets, array("Q", [0]), bad)
    if table is None or len(dropped) > len(bad):
        table = array("Q", bytes(8 * slots_for(len(offsets))))
        for index, offset in enumerate(offsets):
            insert(table, crc32c(checkpoint.key_at(index)), offset)
    checkpoint = Checkpoint(segments, offsets, table, bad)
    return Loaded(checkpoint, meta, lost, lost_keys, damaged=True, unlisted=unlisted)


def _walk(segments: list[bytes]) -> Iterator[int]:
    """The offsets of the records that stand one behind the other in each segment."""
    for index, segment in enumerate(segments):
        at = 0
        while (head := parse_head(segment, at, len(segment))) is not None:
            yield index * SEGMENT_SIZE + at
            at = head.end


# ---------------------------------------------------------------- writing


class Overfull(Exception):
    """The records do not fit the area: what they were read from contradicts itself."""


class Builder:
    """Writes the next checkpoint into the other area, a bounded step at a time.

    It holds what was live at a sequence: the checkpoint in force, and the changes since, which
    nobody changes any more.
    """

    def __init__(
        self,
        old: Checkpoint,
        changes: Mapping[bytes, Held],
        keys: Sequence[bytes],
        *,
        first: int,
        blocks: int,
        epoch: int,
        count: int,
    ) -> None:
        self._old = old
        self._changes = changes
        self._keys = keys  # of the changes, in order
        self._first = first
        self._room = blocks
        self._epoch = epoch
        self._index = 0  # in the old order
        self._at = 0  # in the changed keys
        self._next_change = self._stop_of_run()
        self._segment = bytearray()
        self._segments: list[bytes] = []
        self._written = 0  # bytes of the segment
        self._order = array("I")
        self._table = array("Q", bytes(8 * slots_for(count)))
        self._tail_pieces: Iterator[bytes] | None = None  # of order and table, whole blocks each
        self._tail_written = 0  # bytes
        self._tail_first = 0  # block
        self.order_crc = 0
        self.table_crc = 0

    @property
    def has_records(self) -> bool:
        """Whether records are still to be copied."""
        return self._index < len(self._old) or self._at < len(self._keys)

    def _stop_of_run(self) -> int:
        """The index in the old order before which nothing changed."""
        if self._at == len(self._keys):
            return len(self._old)
        return self._old.index_of(self._keys[self._at])

    async def step(self, device: BlockDevice) -> bool:
        """Copy and write a bounded amount; False when everything but the meta is written."""
        if self.has_records:
            if self._copy():
                await self._close_segment(device)
            else:
                await self._write_segment(device)
            return True
        if self._segment:
            await self._close_segment(device)
            return True
        if self._tail_pieces is None:
            self._tail_first = blocks_of(self.records_size)
            self._tail_pieces = self._pieces_of_tail()
        piece = next(self._tail_pieces, None)
        if piece is None:
            return False
        await self._write(device, self._tail_first + self._tail_written // BLOCK_SIZE, piece)
        self._tail_written += len(piece)
        return True

    def _copy(self) -> bool:
        """Records into the segment, up to the bounds of a step; whether the segment is full."""
        old, order, table, segment = self._old, self._order, self._table, self._segment
        base = len(self._segments) * SEGMENT_SIZE
        size_max = self._written + STEP_SIZE
        for _ in range(STEP_RECORDS):
            if self._index < self._next_change:
                record = old.raw_at(old.offset_at(self._index), self._epoch)
            elif self._at < len(self._keys):
                changed = self._changed(self._keys[self._at])
                if changed is None:
                    self._pass_change()
                    continue
                record = changed
            else:
                break
            at = len(segment)
            if at + len(record) > SEGMENT_SIZE:
                return True
            segment += record
            order.append(base + at)
            key = record[KEY_AT : KEY_AT + record[KEY_SIZE_AT]]
            insert(table, crc32c(key), base + at)
            if self._index < self._next_change:
                self._index += 1
            else:
                self._pass_change()
            if at >= size_max:
                break
        return False

    def _changed(self, key: bytes) -> bytes | None:
        held = self._changes[key]
        if isinstance(held, Entry):
            return encode_record(held.sequence, self._epoch, Kind.PUT, key, held.value)
        if isinstance(held, Lost):
            return damaged_record(held, self._epoch)
        return None

    def _pass_change(self) -> None:
        key = self._keys[self._at]
        if self._index < len(self._old) and self._old.key_at(self._index) == key:
            self._index += 1  # the change takes the old record's place
        self._at += 1
        self._next_change = self._stop_of_run()

    async def _write_segment(self, device: BlockDevice) -> None:
        whole = len(self._segment) // BLOCK_SIZE * BLOCK_SIZE
        if whole > self._written:
            await self._write_piece(device, bytes(self._segment[self._written : whole]))

    async def _close_segment(self, device: BlockDevice) -> None:
        rest = bytes(self._segment[self._written :])
        if rest:
            await self._write_piece(device, rest.ljust(blocks_of(len(rest)) * BLOCK_SIZE, b"\0"))
        self._segments.append(bytes(self._segment))
        self._segment = bytearray()
        self._written = 0

    async def _write_piece(self, device: BlockDevice, piece: bytes) -> None:
        block = len(self._segments) * SEGMENT_BLOCKS + self._written // BLOCK_SIZE
        await self._write(device, block, piece)
        self._written += len(piece)

    async def _write(self, device: BlockDevice, block: int, data: bytes) -> None:
        if block + len(data) // BLOCK_SIZE > self._room:
            raise Overfull
        await device.write(self._first + block, data)

    def _pieces_of_tail(self) -> Iterator[bytes]:
        """Order and table as they are written, each from a new block on; takes their checksums."""
        self.order_crc = self.table_crc = crc32c(b"")
        for start in range(0, len(self._order), PIECE_WORDS):
            piece = little(self._order[start : start + PIECE_WORDS])
            self.order_crc = extend(self.order_crc, piece)
            yield piece.ljust(blocks_of(len(piece)) * BLOCK_SIZE, b"\0")
        for start in range(0, len(self._table), PIECE_WORDS):
            piece = little(self._table[start : start + PIECE_WORDS])
            self.table_crc = extend(self.table_crc, piece)
            yield piece.ljust(blocks_of(len(piece)) * BLOCK_SIZE, b"\0")

    @property
    def records_size(self) -> int:
        """Bytes of the records, up to the last one's end."""
        if not self._segments:
            return 0
        return (len(self._segments) - 1) * SEGMENT_SIZE + len(self._segments[-1])

    @property
    def segments(self) -> list[tuple[int, int]]:
        """Bytes and checksum of each segment."""
        return [(len(segment), crc32c(segment)) for segment in self._segments]

    @property
    def meta_room(self) -> int:
        """Bytes that one of the two copies of the meta may take."""
        used = self._tail_first + self._tail_written // BLOCK_SIZE
        return min((self._room - used) // 2 * BLOCK_SIZE, META_SIZE_MAX)

    async def write_meta(self, device: BlockDevice, meta: bytes) -> None:
        """Both copies of the meta."""
        data = meta.ljust(blocks_of(len(meta)) * BLOCK_SIZE, b"\0")
        start = self._tail_first + self._tail_written // BLOCK_SIZE
        await self._write(device, start, data)
        await self._write(device, start + len(data) // BLOCK_SIZE, data)

    def built(self) -> tuple[Checkpoint, int, int]:
        """The checkpoint, its count of records, and the slots of its table."""
        if len(self._order) >= len(self._table):
            raise Overfull
        checkpoint = Checkpoint(self._segments, self._order, self._table)
        return checkpoint, len(self._order), len(self._table)

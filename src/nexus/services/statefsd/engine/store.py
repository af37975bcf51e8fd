"""The store: what statefsd keeps, over a block device. Pure but for the device's operations.

A change is staged (checked, and visible at once), then committed with everything else that is
staged in one write to the journal, and by and by taken into a checkpoint, which frees the journal
it stood in. The superblock names the checkpoint and where the journal behind it begins: writing it
is what makes a new checkpoint the one in force.

    closed --open--> idle --stage--> staged --commit--> idle
                      |                 `--device fault--> taken back, read only until reopened
                      `--maintain--> building --step--> building --last step--> switched --> idle

Memory: the checkpoint's bytes, the changes behind it (at most the journal's ring holds), and while
the next checkpoint is built, that one too.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from heapq import merge
from typing import Final, NamedTuple, TypeAlias

import msgspec

from nexus.abi import BLOCK_SIZE, BLOCK_TRANSFER_MAX
from nexus.drivers import BlockDevice, DeviceFault, Fault
from nexus.drivers.crc import crc32c
from nexus.services.statefsd.engine import layout
from nexus.services.statefsd.engine.checkpoint import (
    EMPTY,
    Builder,
    Checkpoint,
    Entry,
    Gone,
    Held,
    Loaded,
    Meta,
    Overfull,
    load,
    lost_of,
    read_region,
)
from nexus.services.statefsd.engine.errors import (
    Damaged,
    Lost,
    OverQuota,
    ReadOnly,
    StoreFull,
    Unopenable,
)
from nexus.services.statefsd.engine.journal import (
    ENTRY_SIZE,
    FRAME_SIZE,
    NO_BLOCK,
    ROOM,
    Place,
    Read,
    Reader,
    Replay,
    encode_commit,
    encode_entry,
)
from nexus.services.statefsd.engine.layout import (
    COPIES,
    FORMAT_VERSION,
    HEAD_BLOCKS,
    NO_AREA,
    RECORD_COST,
    Superblock,
)
from nexus.services.statefsd.engine.limits import (
    AREAS_MAX,
    KEY_SIZE_MAX,
    ROOT,
    VALUE_SIZE_MAX,
    Quota,
    StoreLimits,
    area_of,
    is_path,
)
from nexus.services.statefsd.engine.record import OFFSET, REQUEST_KEY, Kind, encode_record
from nexus.services.statefsd.engine.requests import Requests

COMMIT_SHARE: Final = 4  # a commit takes at most that part of the ring: it always finds room
BUILD_AT: Final = 2  # the next checkpoint is begun when one part in so many of the ring is used
HURRY_AT: Final = (3, 4)  # from that part of the ring on every commit does a step of it
BLANK_SIZE: Final = 1024 * 1024  # bytes at either end that must be zeros before we format
REQUEST_SIZE: Final = layout.RECORD_HEAD_SIZE + REQUEST_KEY.size

assert COMMIT_SHARE > 2, "an empty ring has a free stretch of half its blocks"


class Change(NamedTuple):
    """A new value of a key, or with None its end."""

    key: bytes
    value: bytes | None


class Applied(NamedTuple):
    """A staged change's number, the last of a batch's. Repeated: it had been applied before."""

    sequence: int
    repeated: bool


class Usage(NamedTuple):
    """What an area takes: bytes of live records, keys."""

    size: int
    keys: int


class Area:
    """What an area takes, and what it may take."""

    __slots__ = ("has_place", "keys", "keys_max", "reserve", "size", "size_max")

    def __init__(self, quota: Quota, reserve: int, *, has_place: bool) -> None:
        self.size = 0
        self.keys = 0
        self.size_max = quota.size
        self.keys_max = quota.keys
        self.reserve = reserve
        self.has_place = has_place  # nobody else can take it

    @property
    def claimed(self) -> int:
        """Bytes nobody else can have: used, or reserved."""
        return max(self.size, self.reserve)


Undo: TypeAlias = tuple[bytes, Held | None, Area, int, int, Lost | None, int]
"""What one staged change replaced: key, what `_overlay` had of it, the area, by how many bytes and
keys it grew, what `_hashes` had of it, the key's hash. Bare, since every change makes one."""


class Unit:
    """Staged records that go into one commit."""

    __slots__ = ("entries", "first", "records", "requests", "size", "undo_count")

    def __init__(self, first: int) -> None:
        self.first = first
        self.size = FRAME_SIZE
        self.records: list[bytes] = []
        self.entries: list[bytes] = []
        self.requests: list[tuple[int, int, int]] = []  # client, request id, sequence
        self.undo_count = 0


class Mark(NamedTuple):
    """Where a checkpoint that is being built takes over from the journal."""

    sequence: int
    head: int  # block of the ring
    used: int  # blocks of the ring behind it
    chain: int


class Store:
    """An open store. One task uses it; no method is called while another one waits."""

    def __init__(self, device: BlockDevice, found: Superblock, limits: StoreLimits) -> None:
        self._device = device
        self._found = found
        self.limits = limits
        self.capacity = layout.capacity_of(found.area_blocks, limits)
        self.used = 0
        self.sequence = found.sequence  # of the last change, staged ones included
        self.durable = found.sequence  # of the last change that survives a power cut
        self.key_count = 0
        self.lost_count = 0
        self.forgotten = 0  # of those, the ones that answer "not found": too many without a key
        self.left_out = 0  # request ids and lost records the latest checkpoint had no room for
        self.unfinished = 0  # commits that a power cut cut short, dropped when this was opened
        self.lost: tuple[Lost, ...] = ()  # the latest
        self._is_writable = device.writable
        self._has_failed = False
        self._is_busy = False
        self._checkpoint: Checkpoint = EMPTY
        self._frozen: dict[bytes, Held] = {}  # changes that the next checkpoint takes in
        self._overlay: dict[bytes, Held] = {}  # changes since
        self._areas: dict[bytes, Area] = {}  # those with a reserve, and those that took something
        self._places = limits.places
        self._claimed = 0  # bytes used, and reserved and not used
        self._held: dict[bytes, int] = {}  # bytes that a snapshot keeps for its areas
        for area in limits.reserves:
            self._claimed += self._area(area).claimed
        self._requests = Requests(limits.clients_kept, limits.requests_kept)
        self._hashes: dict[int, Lost] = {}
        self._hashes_max = layout.hashes_max(found.area_blocks)
        self._names: dict[int, bytes] | None = None  # of the overlay by hash, while it is loaded
        self._units: list[Unit] = []  # staged
        self._undo: list[Undo] = []
        self._staged_requests: dict[tuple[int, int], int] = {}
        self._committed = found.sequence  # of the last change in the journal
        self._ring_blocks = found.ring_blocks
        self._commit_max = min(
            found.ring_blocks // COMMIT_SHARE * ROOM, BLOCK_TRANSFER_MAX // BLOCK_SIZE * ROOM
        )
        self._head = found.journal_block
        self._ring_used = 0
        self._place = Place(NO_BLOCK, 0, found.journal_chain)
        self._has_unflushed = False
        self._sealed = -1  # the sequence of the last seal
        self._builder: Builder | None = None
        self._mark = Mark(0, 0, 0, 0)
        self._mark_areas: dict[bytes, tuple[int, int]] = {}
        self._order: list[bytes] = []  # keys of `_overlay`, but for those in `_unsorted`
        self._unsorted: list[bytes] = []
        self._frozen_order: list[bytes] = []

    # ------------------------------------------------------------ opening

    @classmethod
    async def open(cls, device: BlockDevice, limits: StoreLimits) -> "Store":
        """The store on a device; a device that holds nothing but zeros is formatted.

        Raises Unopenable for anything else that is no store of ours, and DeviceFault. Damage is
        no reason not to open: it is listed in `lost`, and the next checkpoint is without it.
        """
        found = await _find_superblock(device)
        if layout.capacity_of(found.area_blocks, limits) <= 0:
            raise Unopenable(f"{device.block_count} blocks are too few for the store's limits")
        store = cls(device, found, limits)
        await store._load()
        return store

    async def _load(self) -> None:
        found = self._found
        lost: list[Lost] = []
        damaged = False
        count = True
        if found.active != NO_AREA:
            loaded = await load(self._device, found)
            self._checkpoint = loaded.checkpoint
            lost += loaded.lost
            self.lost_count += loaded.unlisted
            damaged = loaded.damaged
            count = self._take_meta(loaded)
        self.key_count = len(self._checkpoint)
        if count:
            self._count_areas()
        ring = await read_region(self._device, HEAD_BLOCKS, self._ring_blocks)
        replay = Reader(
            ring,
            HEAD_BLOCKS * BLOCK_SIZE,
            block=found.journal_block,
            chain=found.journal_chain,
            sequence=found.sequence,
            epoch=found.epoch,
            epoch_first=found.epoch_first,
        ).read()
        foreign = False
        for each in replay.records:
            record = each
            if record.key and record.kind is not Kind.REQUEST and not is_path(record.key):
                gone = Lost(b"", HEAD_BLOCKS * BLOCK_SIZE, record.sequence)
                record = record._replace(key=b"", key_hash=0, lost=gone)
                foreign = True
            told = self._told(record) if record.lost is not None and not record.key else record
            self._replay_one(told)
            if told.lost is not None:
                lost.append(told.lost)
        self._names = None
        self._take_position(replay)
        missed = [each for each in lost if not self._is_replaced(each)]
        self._take_lost(missed, replay.lost_unlisted)
        epoch = max(replay.epoch_max, found.epoch)
        if max(epoch, found.generation, found.compactions, self.sequence) >= layout.COUNTER_LAST:
            raise Unopenable("its counters are at their end: no store gets there by itself")
        await self._begin_epoch(epoch + 1)
        in_journal = foreign or replay.damaged
        del replay
        if in_journal and self.writable:
            await self._heal()
        elif damaged and self.writable:
            self._begin_build()  # the journal is sound: `maintain` and commits go on with it

    def _take_meta(self, loaded: Loaded) -> bool:
        """Take the meta of a checkpoint; whether its areas have to be counted."""
        for key_hash, hashed in loaded.hashes.items():
            self._keep_hash(key_hash, hashed)
        meta = loaded.meta
        if meta is None:
            return True
        self._requests.load(meta.clients)
        self.lost = tuple(
            Lost(key if is_path(key) else b"", offset, sequence)
            for key, offset, sequence in meta.lost[-self.limits.lost_kept :]
        )
        self.lost_count += meta.lost_count
        self.forgotten += meta.forgotten
        for key_hash, offset, sequence in meta.hashes:
            self._keep_hash(key_hash, Lost(b"", offset, sequence))
        if meta.areas is None or loaded.damaged:
            return True
        for area, (size, keys) in meta.areas.items():
            self._grow(self._area(area), size, keys)
        return False

    def _keep_hash(self, key_hash: int, lost: Lost) -> None:
        """Have a key answer that it is damaged though nobody knows it, if there is room."""
        if key_hash in self._hashes or len(self._hashes) < self._hashes_max:
            self._hashes[key_hash] = lost
        else:
            self.forgotten += 1

    def _count_areas(self) -> None:
        checkpoint = self._checkpoint
        for index in range(len(checkpoint)):
            size = RECORD_COST + checkpoint.size_at(checkpoint.offset_at(index))
            self._grow(self._area(area_of(checkpoint.key_at(index))), size, 1)

    def _is_replaced(self, lost: Lost) -> bool:
        """Whether its key was changed later: then nobody misses a damaged record."""
        held = self._overlay.get(lost.key)
        return held is not None and held.sequence > lost.sequence

    def _told(self, record: Read) -> Read:
        """A damaged record with its key, if a key that is there has the hash it had."""
        assert record.lost is not None
        key = self._checkpoint.key_of(record.key_hash) if record.key_hash else b""
        if record.key_hash and not key:
            if self._names is None:
                self._names = {crc32c(each): each for each in self._overlay}
            key = self._names.get(record.key_hash, b"")
        if not key:
            return record
        return record._replace(kind=Kind.PUT, key=key, lost=record.lost._replace(key=key))

    def _replay_one(self, record: Read) -> None:
        if record.lost is not None and not record.key:
            if record.key_hash:
                self._keep_hash(record.key_hash, record.lost)
            return
        if record.kind is Kind.REQUEST:
            if len(record.key) == REQUEST_KEY.size:
                client, request_id = REQUEST_KEY.unpack(record.key)
                self._requests.add(client, request_id, record.sequence)
            return
        held: Held
        if record.lost is not None:
            held = record.lost
        elif record.kind is Kind.PUT:
            held = Entry(record.value, record.sequence)
        elif record.kind is Kind.DAMAGED:
            held = lost_of(record.key, record.value, record.sequence)
        else:
            held = Gone(record.sequence)
        key_hash = crc32c(record.key)
        before = self._cost(record.key, key_hash)
        after = _cost_of(record.key, held)
        keys = bool(after) - bool(before)
        self._grow(self._area(area_of(record.key)), after - before, keys)
        self.key_count += keys
        if record.key not in self._overlay:
            self._unsorted.append(record.key)
        self._overlay[record.key] = held
        if self._names is not None:
            self._names[key_hash] = record.key
        if self._hashes:
            _ = self._hashes.pop(key_hash, None)

    def _take_position(self, replay: Replay) -> None:
        self.sequence = self._committed = replay.sequence
        self.unfinished = replay.unfinished
        self._head = replay.head
        self._place = replay.place
        start = self._found.journal_block
        self._ring_used = (self._head - start) % self._ring_blocks
        if not self._ring_used and replay.sequence > self._found.sequence:
            self._ring_used = self._ring_blocks

    def _take_lost(self, lost: list[Lost], unlisted: int) -> None:
        self.lost_count += len(lost) + unlisted
        self.lost = (*self.lost, *lost)[-self.limits.lost_kept :]

    async def _begin_epoch(self, epoch: int) -> None:
        """Make what was found durable, then raise the epoch: nothing dropped can come back.

        The superblock so says that everything before this epoch was durable.
        """
        if not self._device.writable:
            self.durable = self.sequence  # nobody can change it
            return
        try:
            await self._device.flush()
            await self._write_superblocks(self._found.raised(epoch, self.sequence + 1))
        except DeviceFault:
            self._has_failed = True  # what can be read is served; `writable` says the rest
            return
        self.durable = self.sequence

    async def _heal(self) -> None:
        """Write what is undamaged anew before anything else: commits must not go over damage."""
        try:
            self._begin_build()
            await self._finish_build()
        except DeviceFault:
            return  # read only now, and as it was: it is healed at the next opening

    async def _write_superblocks(self, found: Superblock) -> None:
        """Both copies, one after the other: one of them is whole at every instant."""
        data = found.encoded()
        for block in COPIES:
            await self._device.write(block, data, durable=True)
        self._found = found

    # ------------------------------------------------------------ what it is

    @property
    def writable(self) -> bool:
        """Whether changes can be made."""
        return self._is_writable and not self._has_failed

    @property
    def epoch(self) -> int:
        """The number of this opening."""
        return self._found.epoch

    @property
    def compactions(self) -> int:
        """Checkpoints ever made."""
        return self._found.compactions

    @property
    def format_version(self) -> int:
        """Of the format on the device."""
        return FORMAT_VERSION

    @property
    def memory(self) -> int:
        """Bytes of the checkpoint in memory; changes behind it and Python itself come on top."""
        return self._checkpoint.memory

    def usage(self, area: bytes) -> Usage:
        """What an area takes."""
        row = self._areas.get(area)
        return _NOTHING if row is None else Usage(max(0, row.size), max(0, row.keys))

    def areas(self) -> set[bytes]:
        """The areas with a key in them."""
        return {area for area, row in self._areas.items() if row.keys}

    # ------------------------------------------------------------ reading

    async def get(self, key: bytes) -> Entry | None:
        """The value of a key, staged changes included. Raises Damaged."""
        held = self._overlay.get(key)
        if held is None and self._frozen:
            held = self._frozen.get(key)
        if held is None:
            held = self._checkpoint.read(key, crc32c(key))
        if isinstance(held, Entry):
            return held
        if isinstance(held, Lost):
            raise Damaged(held)
        if held is None and self._hashes:
            lost = self._hashes.get(crc32c(key))
            if lost is not None:
                raise Damaged(lost)
        return None

    def has(self, key: bytes) -> bool:
        """Whether there is a record of a key, damaged or not."""
        return bool(self._cost(key, key_hash := crc32c(key))) or key_hash in self._hashes

    def applied(self, client: int, request_id: int) -> Applied | None:
        """What came of a request that was applied before, if that is remembered."""
        if not request_id:
            return None
        sequence = self._staged_requests.get((client, request_id))
        if sequence is None:
            sequence = self._requests.find(client, request_id)
        return None if sequence is None else Applied(sequence, repeated=True)

    def keys(
        self, prefix: bytes, after: bytes, count: int, visible: Callable[[bytes], bool]
    ) -> tuple[list[bytes], bool]:
        """Up to `count` keys that begin with `prefix`, behind `after`, in order, of visible areas.

        Also whether there are more. Keys whose record is damaged are listed too.
        """
        assert count >= 1
        found: list[bytes] = []
        start = prefix if not after or after < prefix else after + b"\0"
        seen: dict[bytes, bool] = {}
        while True:  # ends: every turn begins behind the area before
            for key in self._ordered(start):
                if not key.startswith(prefix):
                    return found, False
                area = area_of(key)
                if area not in seen:
                    seen[area] = visible(area)
                if not seen[area]:
                    if area == ROOT:
                        continue
                    start = area[:-1] + b"0"  # the byte after "/": behind the whole area
                    break
                if len(found) == count:
                    return found, True
                found.append(key)
            else:
                return found, False

    def _ordered(self, start: bytes) -> Iterator[bytes]:
        """Every live key from `start` on, in order."""
        if self._unsorted:
            self._order += self._unsorted
            self._order.sort()  # nearly sorted: one pass
            self._unsorted = []
        last = b""
        for key in merge(
            self._old_keys(start), _behind(self._order, start), _behind(self._frozen_order, start)
        ):
            if key == last:
                continue
            last = key
            held = self._overlay.get(key)
            if held is None:
                held = self._frozen.get(key)
            if not isinstance(held, Gone):
                yield key

    def _old_keys(self, start: bytes) -> Iterator[bytes]:
        checkpoint = self._checkpoint
        for index in range(checkpoint.index_of(start), len(checkpoint)):
            yield checkpoint.key_at(index)

    # ------------------------------------------------------------ changing

    def stage(
        self,
        changes: Iterable[Change],
        *,
        client: int = 0,
        request_id: int = 0,
        within_quota: bool = True,
    ) -> Applied:
        """Make changes, all or none, visible at once; `commit` makes them last.

        With a request id the same request of a client is applied once. A deletion of what is not
        there changes nothing. What is not bound to be `within_quota` is bound by the store alone.
        Raises OverQuota, StoreFull, ReadOnly; then nothing is changed.
        """
        if not self.writable:
            raise ReadOnly
        if request_id:
            before = self.applied(client, request_id)
            if before is not None:
                return before
        undo, overlay, frozen = self._undo, self._overlay, self._frozen
        size_of = self._checkpoint.size_of
        first = len(undo)
        records: list[bytes] = []
        entries: list[bytes] = []  # of the commit's directory
        sequence, claimed = self.sequence, self._claimed
        epoch = self._found.epoch
        area, row = ROOT, self._area(ROOT)  # of the change before
        for key, value in changes:
            assert 1 <= len(key) <= KEY_SIZE_MAX, "a key is 1 to KEY_SIZE_MAX bytes"
            key_hash = crc32c(key)
            old = overlay.get(key)
            if old is not None:
                cost = _cost_of(key, old)
            elif frozen:
                cost = self._cost(key, key_hash)
            else:
                size = size_of(key, key_hash)
                cost = RECORD_COST + size if size >= 0 else 0
            held: Held
            if value is None:
                if not cost and key_hash not in self._hashes:
                    continue
                sequence += 1
                held, after = Gone(sequence), 0
                record = encode_record(sequence, epoch, _DELETE, key, b"")
            else:
                assert len(value) <= VALUE_SIZE_MAX, "a value is at most VALUE_SIZE_MAX bytes"
                sequence += 1
                held = _entry((value, sequence))
                after = RECORD_COST + len(key) + len(value)
                record = encode_record(sequence, epoch, _PUT, key, value)
            records.append(record)
            entries.append(encode_entry(len(record), key_hash))
            keys = (after > 0) - (cost > 0)
            if area == ROOT or not key.startswith(area):
                area = area_of(key)
                row = self._areas.get(area) or self._area(area)
            hashed = self._hashes.pop(key_hash, None) if self._hashes else None
            undo.append((key, old, row, after - cost, keys, hashed, key_hash))
            if old is None:
                self._unsorted.append(key)
            overlay[key] = held
            if keys:
                self.key_count += keys
            if after != cost:
                self._grow(row, after - cost, keys)
        if request_id:
            request = REQUEST_KEY.pack(client, request_id)
            if records:  # it rides behind the last change, and has that one's number
                records[-1] += encode_record(sequence, epoch, Kind.REQUEST, request, b"")
                entries[-1] = encode_entry(len(records[-1]), undo[-1][-1])
            else:
                sequence += 1
                records.append(encode_record(sequence, epoch, Kind.REQUEST, request, b""))
                entries.append(encode_entry(REQUEST_SIZE, 0))
        size = len(records[0]) if len(records) == 1 else sum(map(len, records))
        size += ENTRY_SIZE * len(records)
        try:
            self._check(first, claimed, size, within_quota=within_quota)
        except (OverQuota, StoreFull):
            self._take_back(first)
            raise
        if records:
            unit = self._units[-1] if self._units else None
            if unit is None or unit.size + size > self._commit_max:
                unit = Unit(self.sequence + 1)
                self._units.append(unit)
            unit.records += records
            unit.entries += entries
            unit.size += size
            unit.undo_count += len(undo) - first
            self.sequence = sequence
            if request_id:
                unit.requests.append((client, request_id, sequence))
                self._staged_requests[client, request_id] = sequence
        return _applied((sequence, False))

    def _check(self, first: int, claimed: int, size: int, *, within_quota: bool) -> None:
        """Whether what was staged from `first` on is within every limit."""
        if size + FRAME_SIZE > self._commit_max:
            raise StoreFull(f"{size} bytes are more than one commit of this device takes")
        if self._claimed > self.capacity and self._claimed > claimed:
            raise StoreFull(f"{self.capacity} bytes are taken or reserved")
        if not within_quota:
            return
        undo = self._undo
        new_area = False
        if len(undo) - first == 1:
            _, _, row, grown, keys, _, _ = undo[first]
            if grown <= 0:
                return
            _check_area(row, grown, keys)
            new_area = keys > 0 and row.keys == 1 and not row.has_place
        else:
            sums: dict[Area, tuple[int, int]] = {}
            for _, _, row, size_each, keys_each, _, _ in undo[first:]:
                grown, keys = sums.get(row, (0, 0))
                sums[row] = grown + size_each, keys + keys_each
            for row, (grown, keys) in sums.items():
                _check_area(row, grown, keys)
                new_area = new_area or (row.keys == keys > 0 and not row.has_place)
        if new_area:
            room = self.limits.areas_max - len(self._places)
            if sum(row.keys > 0 and not row.has_place for row in self._areas.values()) > room:
                raise StoreFull(
                    f"{max(room, 0)} areas have keys in them, {len(self._places)} are kept"
                )

    def _cost(self, key: bytes, key_hash: int) -> int:
        """Bytes the live record of a key counts for; 0 if there is none."""
        held = self._overlay.get(key)
        if held is None and self._frozen:
            held = self._frozen.get(key)
        if held is not None:
            return _cost_of(key, held)
        size = self._checkpoint.size_of(key, key_hash)
        return RECORD_COST + size if size >= 0 else 0

    def _area(self, area: bytes) -> Area:
        row = self._areas.get(area)
        if row is None:
            quota = self.limits.quotas.get(area, self.limits.quota)
            reserve = max(self.limits.reserves.get(area, 0), self._held.get(area, 0))
            row = self._areas[area] = Area(quota, reserve, has_place=area in self._places)
        return row

    def hold(self, held: Mapping[bytes, int]) -> None:
        """Keep so many bytes for these areas, beside what the limits reserve; and for no others.

        Nobody else gets them from now on. An area that takes less than is held for it can take
        that much again, however full the store is.
        """
        former, self._held = self._held, dict(held)
        for area in former.keys() | held.keys():
            row = self._area(area)
            self._claimed -= row.claimed
            row.reserve = max(self.limits.reserves.get(area, 0), self._held.get(area, 0))
            self._claimed += row.claimed

    @property
    def commit_room(self) -> int:
        """Bytes that the changes of one commit may take, as `change_size` counts them."""
        return self._commit_max - FRAME_SIZE - REQUEST_SIZE

    def change_size(self, key: bytes, value: bytes) -> int:
        """Bytes a change takes in a commit."""
        return ENTRY_SIZE + layout.RECORD_HEAD_SIZE + len(key) + len(value)

    def value_max(self, key: bytes) -> int:
        """The largest value that one change of this key may have on this device."""
        return min(VALUE_SIZE_MAX, self.commit_room - self.change_size(key, b""))

    def _grow(self, row: Area, size: int, keys: int) -> None:
        """An area grows, or shrinks."""
        self.used += size
        self._claimed -= row.claimed if row.reserve else row.size
        row.size += size
        row.keys += keys
        self._claimed += row.claimed if row.reserve else row.size

    def _take_back(self, first: int) -> None:
        """Undo staged changes, from the `first` on."""
        while len(self._undo) > first:
            key, held, area, size, keys, hashed, key_hash = self._undo.pop()
            if held is None:
                del self._overlay[key]
                self._forget_order(key)
            else:
                self._overlay[key] = held
            if hashed is not None:
                self._hashes[key_hash] = hashed
            self.key_count -= keys
            self._grow(area, -size, -keys)
            if not (area.keys or area.reserve or any(each[2] is area for each in self._undo)):
                _ = self._areas.pop(area_of(key), None)

    def _forget_order(self, key: bytes) -> None:
        """A key is no longer in `_overlay`: the latest of `_unsorted`, or it was listed since."""
        if self._unsorted:
            assert self._unsorted[-1] == key, "changes are taken back in turn"
            _ = self._unsorted.pop()
        else:
            del self._order[bisect_left(self._order, key)]

    # ------------------------------------------------------------ committing

    async def commit(self, durable: bool) -> None:
        """Write everything staged; with `durable` all changes survive a power cut on return.

        Raises DeviceFault: then everything staged is taken back, and the store is read only until
        it is opened anew. What of it the device has then is not known.
        """
        assert not self._is_busy, "one method at a time"
        self._is_busy = True
        try:
            await self._commit(durable=durable)
        except DeviceFault:
            self._fail()
            raise
        finally:
            self._is_busy = False

    async def _commit(self, *, durable: bool) -> None:
        if self._has_failed and durable and self.durable < self.sequence:
            raise DeviceFault(Fault.IO, "failed before: open the store again")
        for unit in tuple(self._units):
            is_last = unit is self._units[-1]
            alone = durable and is_last and not self._has_unflushed
            await self._write_unit(unit, durable=alone)
            self._on_written(unit)
            if alone:
                self.durable = self._committed
            else:
                self._has_unflushed = True
        if durable and self.durable < self.sequence:
            await self._flush()
        limit, parts = HURRY_AT
        if self._ring_used * parts > self._ring_blocks * limit:
            if self._builder is None:
                self._begin_build()
            await self._step()

    async def _write_unit(self, unit: Unit, *, durable: bool) -> None:
        count = -(-unit.size // ROOM)
        block = self._find_room(count)
        if block is None:
            block = await self._make_room(count)
        found = self._found
        data, size, crc = encode_commit(
            block,
            self._place,
            found.epoch,
            found.epoch_first,
            unit.first,
            self.durable,
            unit.records,
            unit.entries,
        )
        await self._device.write(HEAD_BLOCKS + block, data, durable=durable)
        self._ring_used += (block - self._head) % self._ring_blocks + count
        self._head = block + count
        self._place = Place(block, size, crc)

    def _on_written(self, unit: Unit) -> None:
        """A unit is in the journal: it is not taken back any more."""
        del self._units[0]
        del self._undo[: unit.undo_count]
        self._committed = unit.first + len(unit.records) - 1
        for client, request_id, sequence in unit.requests:
            del self._staged_requests[client, request_id]
            self._requests.add(client, request_id, sequence)

    def _find_room(self, count: int) -> int | None:
        """The block of the ring where a commit of so many goes: behind the last, or at 0."""
        free = self._ring_blocks - self._ring_used
        rest = self._ring_blocks - self._head
        if count <= rest:
            return self._head if count <= free else None
        return 0 if rest + count <= free else None

    async def _make_room(self, count: int) -> int:
        """Finish the checkpoint that is being built, and if that is not enough, one more."""
        if self._builder is not None:
            await self._finish_build()
        block = self._find_room(count)
        if block is None:
            self._begin_build()
            await self._finish_build()
            block = self._find_room(count)
        assert block is not None, "a commit fits an empty ring"
        return block

    async def _finish_build(self) -> None:
        """All steps there are: as many as the checkpoint has pieces."""
        while self._builder is not None:
            await self._step()

    async def _flush(self) -> None:
        await self._device.flush()
        self._has_unflushed = False
        self.durable = self._committed

    def _fail(self) -> None:
        self._has_failed = True
        self._units.clear()
        self._take_back(0)
        self._staged_requests.clear()
        self.sequence = self._committed
        self._builder = None

    async def close(self) -> None:
        """Make everything durable, and say so on the device, where nothing else follows.

        A last commit that is damaged later can then be told from one that was never finished.
        """
        if not self.writable:
            return
        await self.commit(durable=True)
        if self._sealed == self.sequence:
            return
        block = self._find_room(1)
        if block is None:
            return
        found = self._found
        data, _, _ = encode_commit(
            block,
            self._place,
            found.epoch,
            found.epoch_first,
            self.sequence + 1,
            self.durable,
            [],
            [],
        )
        try:
            await self._device.write(HEAD_BLOCKS + block, data, durable=True)
        except DeviceFault:
            self._fail()
            raise
        self._sealed = self.sequence

    # ------------------------------------------------------------ checkpoints

    async def maintain(self) -> bool:
        """A bounded step of what there is to tidy up; whether there is more. Raises DeviceFault."""
        assert not self._is_busy, "one method at a time"
        if not self.writable:
            return False
        if self._builder is None:
            if self._ring_used * BUILD_AT < self._ring_blocks:
                return False
            self._begin_build()
        self._is_busy = True
        try:
            await self._step()
        except DeviceFault:
            self._fail()
            raise
        finally:
            self._is_busy = False
        return self._builder is not None

    def _begin_build(self) -> None:
        """Freeze what is committed: the next checkpoint takes it in. What is staged stays out."""
        assert self._builder is None
        assert not self._frozen
        frozen = self._overlay
        overlay: dict[bytes, Held] = {}
        keys = 0
        areas = {row: (row.size, row.keys) for row in self._areas.values()}
        first: dict[bytes, Held | None] = {}
        for key, held, row, size, key_delta, _, _ in self._undo:
            keys += key_delta
            size_now, keys_now = areas[row]
            areas[row] = size_now - size, keys_now - key_delta
            if key not in first:
                first[key] = held
        if first:
            undo: list[Undo] = []
            for each in self._undo:
                key = each[0]
                undo.append(each if key in overlay else (key, None, *each[2:]))
                overlay[key] = frozen[key]
            self._undo = undo
            for key, held in first.items():
                if held is None:
                    del frozen[key]
                else:
                    frozen[key] = held
        self._frozen, self._overlay = frozen, overlay
        self._frozen_order = sorted(frozen)
        self._order, self._unsorted = [], list(overlay)
        self._mark_areas = {
            area: areas[row] for area, row in self._areas.items() if areas[row] != (0, 0)
        }
        staged = {each[2] for each in self._undo}
        self._areas = {  # nobody makes it grow with areas that come and go
            area: row
            for area, row in self._areas.items()
            if row.keys or row.reserve or row in staged
        }
        found = self._found
        area = 0 if found.active != 0 else 1
        self._mark = Mark(self._committed, self._head, self._ring_used, self._place.chain)
        self._builder = Builder(
            self._checkpoint,
            frozen,
            self._frozen_order,
            first=found.area_first(area),
            blocks=found.area_blocks,
            epoch=found.epoch,
            count=self.key_count - keys,
        )

    async def _step(self) -> None:
        builder = self._builder
        assert builder is not None
        try:
            if await builder.step(self._device):
                return
            await self._switch(builder)
        except (Overfull, DeviceFault) as fault:
            self._fail()
            if isinstance(fault, DeviceFault):
                raise
            raise DeviceFault(Fault.NO_SPACE, "the records contradict their count") from fault

    async def _switch(self, builder: Builder) -> None:
        """Write the meta, make it all durable, and put the new checkpoint in force."""
        meta = self._encoded_meta(builder)
        await builder.write_meta(self._device, meta)
        await self._flush()
        checkpoint, count, slots = builder.built()
        found = self._found
        mark = self._mark
        await self._write_superblocks(
            replace(
                found,
                generation=found.generation + 1,
                compactions=found.compactions + 1,
                active=0 if found.active != 0 else 1,
                sequence=mark.sequence,
                journal_block=mark.head % self._ring_blocks,
                journal_chain=mark.chain,
                count=count,
                slots=slots,
                records_size=builder.records_size,
                meta_size=len(meta),
                order_crc=builder.order_crc,
                table_crc=builder.table_crc,
                meta_crc=crc32c(meta),
            )
        )
        self._checkpoint = checkpoint
        self._frozen = {}
        self._frozen_order = []
        self._ring_used -= mark.used
        self._builder = None

    def _encoded_meta(self, builder: Builder) -> bytes:
        """The meta as of the mark.

        There is room for all of it, but in a store that was filled under limits that left less:
        then it has fewer request ids and lost records, and `left_out` says how many.
        """
        areas: dict[bytes, tuple[int, int]] | None = self._mark_areas
        if len(self._mark_areas) > AREAS_MAX:
            areas = None  # they are counted when it is read
        staged = {key_hash: lost for *_, lost, key_hash in self._undo if lost is not None}
        hashes = {**self._hashes, **staged}
        requests, lost = self.limits.requests_kept, self.lost
        forgotten, ids = self.forgotten, self._requests.count
        while True:  # ends: every turn has fewer of something to keep
            clients = self._requests.packed(requests)
            meta = msgspec.msgpack.encode(
                Meta(
                    builder.segments,
                    areas,
                    clients,
                    [(each.key, each.offset, each.sequence) for each in lost],
                    self.lost_count,
                    [(key_hash, each.offset, each.sequence) for key_hash, each in hashes.items()],
                    forgotten,
                )
            )
            if len(meta) <= builder.meta_room:
                kept = sum(len(numbers) for _, numbers in clients) // 2
                self.left_out = ids - kept + len(self.lost) - len(lost)
                if not hashes and forgotten > self.forgotten:
                    self._hashes.clear()
                    self.forgotten = forgotten
                return meta
            if lost:
                lost = ()
            elif requests:
                requests //= 2
            elif areas is not None:
                areas = None
            elif hashes:
                forgotten += len(hashes)
                hashes = {}
            else:
                raise Overfull


_NOTHING: Final = Usage(0, 0)
# Two calls less for each change than by the classes' own constructors.
_entry: Final[Callable[[tuple[bytes, int]], Entry]] = partial(tuple.__new__, Entry)
_applied: Final[Callable[[tuple[int, bool]], Applied]] = partial(tuple.__new__, Applied)
_PUT: Final = int(Kind.PUT)
_DELETE: Final = int(Kind.DELETE)


def _check_area(row: Area, size: int, keys: int) -> None:
    """Whether an area may have grown by so much."""
    if (size > 0 and row.size > row.size_max) or (keys > 0 and row.keys > row.keys_max):
        raise OverQuota(
            f"{row.size} bytes and {row.keys} keys, of {row.size_max} and {row.keys_max}"
        )


def _cost_of(key: bytes, held: Held) -> int:
    if isinstance(held, Entry):
        return RECORD_COST + len(key) + len(held.value)
    if isinstance(held, Lost):
        return RECORD_COST + len(key) + OFFSET.size
    return 0


def _behind(keys: list[bytes], start: bytes) -> Iterator[bytes]:
    """The keys of a sorted list from `start` on."""
    for index in range(bisect_left(keys, start), len(keys)):
        yield keys[index]


# ---------------------------------------------------------------- what is on the device


async def _find_superblock(device: BlockDevice) -> Superblock:
    """The superblock in force. Formats a blank device; raises Unopenable for foreign content."""
    count = device.block_count
    fresh = layout.initial(count)
    if fresh is None:
        raise Unopenable(f"{count} blocks are too few: {layout.STORE_BLOCKS_MIN} are needed")
    head = await read_region(device, 0, HEAD_BLOCKS)
    blocks = [head[at * BLOCK_SIZE : (at + 1) * BLOCK_SIZE] for at in COPIES]
    found = [each for block in blocks if (each := layout.decode_superblock(block)) is not None]
    if found:
        newest = max(found, key=lambda each: each.generation)
        if newest.block_count > count:
            raise Unopenable(
                f"it is cut off: {newest.block_count} blocks, and the device has {count}"
            )
        return newest
    versions = [version for block in blocks if (version := layout.version_of(block)) is not None]
    if versions and max(versions) != FORMAT_VERSION:
        raise Unopenable(
            f"it has format version {max(versions)}, this program knows {FORMAT_VERSION}"
        )
    if versions:
        raise Unopenable("both superblocks contradict themselves")
    head = await device.read(0, HEAD_BLOCKS)  # what cannot be read is not blank, but a fault
    if not await _is_blank(device, head, fresh):
        if any(block.startswith(layout.MAGIC) for block in blocks):
            raise Unopenable("both superblocks are damaged")
        raise Unopenable("it holds something else than a store")
    if not device.writable:
        raise Unopenable("it is blank, and cannot be written")
    data = fresh.encoded()
    for block_at in COPIES:
        await device.write(block_at, data, durable=True)
    return fresh


async def _is_blank(device: BlockDevice, head: bytes, fresh: Superblock) -> bool:
    """Whether both ends hold zeros alone, but for the torn beginning of our own format."""
    expected = bytearray(HEAD_BLOCKS * BLOCK_SIZE)
    data = fresh.encoded()
    for at in COPIES:
        expected[at * BLOCK_SIZE : (at + 1) * BLOCK_SIZE] = data
    if any(byte not in (0, ours) for byte, ours in zip(head, expected, strict=True)):
        return False
    count = device.block_count
    size = BLANK_SIZE // BLOCK_SIZE
    first = await device.read(HEAD_BLOCKS, min(size, count - HEAD_BLOCKS))
    last = await device.read(max(HEAD_BLOCKS, count - size), min(size, count - HEAD_BLOCKS))
    return not first.strip(b"\0") and not last.strip(b"\0")

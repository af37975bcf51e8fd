"""The journal: commits in a ring of blocks, and how they are read after whatever happened.

A commit is one write: a header, its records, and a directory of them at its end, so that one
damaged spot costs one record at most, wherever it is. Blocks of the ring begin with a tag, which
no value can imitate: a reader that lost its way finds the next commit by it.

Sequence numbers count changes. That a request was applied has no number of its own: its record
rides behind the last change the request made, has that one's number, and shares its place in the
directory. Only a request that changed nothing has a number for itself.

What is not whole at the end of the journal was never acknowledged, or is damage: a later commit
says which. Each names the last sequence that was durable when it was written. What no commit
proves to have been durable is dropped; what one does is salvaged, or quarantined.

    reading --whole commit--> applied --> reading
            --not whole, proven durable--> salvaged, the rest quarantined --> reading
            --not whole, not proven--> end
            --no header, a later commit proves durable--> salvaged by directory --> reading
            --no header, nothing proven--> end
"""

from bisect import bisect_right
from dataclasses import dataclass, field
from itertools import accumulate
from struct import Struct
from typing import Final, NamedTuple

from nexus.abi import BLOCK_SIZE
from nexus.drivers.crc import crc32c
from nexus.services.statefsd.engine.errors import Lost
from nexus.services.statefsd.engine.layout import COUNTER_MAX, RECORD_HEAD_SIZE
from nexus.services.statefsd.engine.record import (
    KIND_AT,
    Head,
    Kind,
    has_whole_value,
    parse_head,
)

TAG_FIRST: Final = b"NXj\x01"  # of the first block of a commit
TAG_MORE: Final = b"NXj\x02"  # of its others
TAG_SIZE: Final = 4
ROOM: Final = BLOCK_SIZE - TAG_SIZE  # bytes of a commit in one block

_HEADER: Final = Struct("<IIIIIIIQQQQ")
_HEADER_BODY: Final = Struct("<IIIIIIQQQQ")  # the header behind its checksum
_ENTRY: Final = Struct("<II")  # size of a record, hash of its key
_FOOTER: Final = Struct("<QQII")  # epoch, first, count, checksum
_REQUEST: Final = bytes([Kind.REQUEST])
HEADER_SIZE: Final = _HEADER.size
FRAME_SIZE: Final = HEADER_SIZE + _FOOTER.size  # bytes of a commit besides records and entries
ENTRY_SIZE: Final = _ENTRY.size
NO_BLOCK: Final = 0xFFFF_FFFF
LOST_LISTED_MAX: Final = 4096  # records without a trace that are listed one by one


class Header(NamedTuple):
    """The header of a commit."""

    block: int  # of the ring; it says so itself: a misdirected write is no commit
    crc: int
    size: int  # bytes, from this header to the footer's end
    record_count: int  # 0 in a seal, which only says what is durable
    previous: int  # block of the commit before, or NO_BLOCK
    previous_size: int
    chain: int  # checksum of the commit before
    epoch: int
    epoch_first: int  # the first sequence of that epoch
    first: int  # sequence of the first record
    durable: int  # the last sequence that was durable when this was written

    @property
    def blocks(self) -> int:
        """How many blocks of the ring it takes."""
        return -(-self.size // ROOM)


@dataclass(frozen=True, slots=True)
class Place:
    """What a commit says of the one before it."""

    previous: int
    previous_size: int
    chain: int


def encode_entry(size: int, key_hash: int) -> bytes:
    """An entry of a commit's directory; the hash is 0 for what is no key."""
    return _ENTRY.pack(size, key_hash)


def encode_commit(
    block: int,
    place: Place,
    epoch: int,
    epoch_first: int,
    first: int,
    durable: int,
    records: list[bytes],
    entries: list[bytes],
) -> tuple[bytes, int, int]:
    """The blocks of a commit, its size in bytes, and its checksum for the next one's chain."""
    body = b"".join(records)
    directory = b"".join(entries)
    size = FRAME_SIZE + len(body) + len(directory)
    count = len(records)
    header = _HEADER_BODY.pack(
        block,
        size,
        count,
        place.previous,
        place.previous_size,
        place.chain,
        epoch,
        epoch_first,
        first,
        durable,
    )
    crc = crc32c(header)
    footer = directory + _FOOTER.pack(epoch, first, count, 0)[:-4]
    payload = b"".join(
        (
            crc.to_bytes(4, "little"),
            header,
            body,
            footer,
            crc32c(footer).to_bytes(4, "little"),
        )
    )
    return framed(payload), size, crc


def framed(payload: bytes) -> bytes:
    """A commit's bytes in tagged blocks."""
    if len(payload) <= ROOM:
        return TAG_FIRST + payload.ljust(ROOM, b"\0")
    pieces = [TAG_FIRST, payload[:ROOM]]
    for at in range(ROOM, len(payload), ROOM):
        pieces += (TAG_MORE, payload[at : at + ROOM])
    pieces.append(bytes(-len(payload) % ROOM))
    return b"".join(pieces)


def unframed(ring: bytes, block: int, count: int) -> bytes:
    """The bytes in `count` blocks, whatever their tags."""
    start = block * BLOCK_SIZE
    return b"".join(
        ring[at + TAG_SIZE : at + BLOCK_SIZE]
        for at in range(start, start + count * BLOCK_SIZE, BLOCK_SIZE)
    )


# ---------------------------------------------------------------- reading


class Read(NamedTuple):
    """A record of the journal as it is to be applied; a `lost` one instead of its value."""

    sequence: int
    kind: Kind
    key: bytes  # b"" if it cannot be told
    value: bytes
    key_hash: int  # 0 if there is none
    lost: Lost | None


@dataclass(slots=True)
class Replay:
    """The journal as it was found."""

    records: list[Read] = field(default_factory=list)
    sequence: int = 0  # of the last record, lost or not
    head: int = 0  # block of the ring where the next commit goes
    place: Place = field(default_factory=lambda: Place(NO_BLOCK, 0, 0))
    epoch_max: int = 0  # of every header in the ring, old ones too
    damaged: bool = False  # something was, though perhaps no record was lost by it
    unfinished: int = 0  # commits at the end that nobody was told of; dropped
    lost_unlisted: int = 0  # in gaps, beyond LOST_LISTED_MAX


def parse_header(ring: bytes, block: int) -> Header | None:
    """The header in a block, if there is an undamaged one."""
    at = block * BLOCK_SIZE
    if ring[at : at + TAG_SIZE] != TAG_FIRST:
        return None
    at += TAG_SIZE
    if at + HEADER_SIZE > len(ring) or crc32c(ring[at + 4 : at + HEADER_SIZE]) != int.from_bytes(
        ring[at : at + 4], "little"
    ):
        return None
    crc, own_block, size, count, previous, previous_size, chain, *counters = _HEADER.unpack_from(
        ring, at
    )
    epoch, epoch_first, first, durable = counters
    header = Header(
        block, crc, size, count, previous, previous_size, chain, epoch, epoch_first, first, durable
    )
    least = FRAME_SIZE + count * (RECORD_HEAD_SIZE + ENTRY_SIZE)
    if own_block != block or size < least or (block + header.blocks) * BLOCK_SIZE > len(ring):
        return None
    if not (epoch_first and first) or max(epoch, epoch_first, first, durable) >= COUNTER_MAX:
        return None
    return header


def headers_of(ring: bytes) -> list[Header]:
    """Every undamaged header in the ring, current or old."""
    found = []
    at = ring.find(TAG_FIRST)
    while at >= 0:
        if at % BLOCK_SIZE == 0:
            header = parse_header(ring, at // BLOCK_SIZE)
            if header is not None:
                found.append(header)
        at = ring.find(TAG_FIRST, at + 1)
    return found


class Reader:
    """Reads a ring from where a superblock says the journal begins.

    `epoch_first` is that of the superblock's epoch: everything before it was flushed before that
    superblock was written. Time and memory are bounded by the ring's size whatever stands in it.
    """

    def __init__(
        self,
        ring: bytes,
        offset: int,
        *,
        block: int,
        chain: int,
        sequence: int,
        epoch: int,
        epoch_first: int,
    ) -> None:
        self._ring = ring
        self._offset = offset  # of the ring, bytes from the device's beginning
        self._replay = Replay(sequence=sequence, head=block, place=Place(NO_BLOCK, 0, chain))
        headers = headers_of(ring)
        self._replay.epoch_max = max((each.epoch for each in headers), default=0)
        current = without_stale(headers, epoch, epoch_first)
        self._whole_at = {each.block for each in headers}
        self._by_block = {each.block: each for each in current}
        self._later = sorted(current, key=lambda each: (each.first, -each.epoch))
        self._firsts = [each.first for each in self._later]
        self._proofs = [*accumulate((each.durable for each in reversed(self._later)), max)]
        self._proofs.reverse()  # at each header: the highest `durable` of it and those behind it
        self._flushed = epoch_first - 1
        self._epoch = 0  # of the last commit read
        self._chain: int | None = chain  # None behind damage
        self._expected = sequence + 1
        self._room = len(ring) // BLOCK_SIZE  # blocks of commits still to come: none overlap
        self._list_room = LOST_LISTED_MAX

    def read(self) -> Replay:
        """Everything up to the end."""
        replay = self._replay
        while True:  # ends: every turn takes blocks of _room, which is the ring's size
            header = self._next() or self._resync()
            if header is None or not header.record_count:  # the next commit goes over a seal
                break
            self._room -= header.blocks
            if self._room < 0 or not self._take(header):
                break
        if self._is_proven(self._expected):  # nothing follows that a reader could go on with
            self._walk_gap(self._flushed + 1)
            self._expected = self._flushed + 1
        replay.sequence = self._expected - 1
        return replay

    def _next(self) -> Header | None:
        """The commit that follows the last one, where that ended or at the ring's beginning."""
        seal = None
        for block in (self._replay.head, 0):
            header = self._by_block.get(block)
            if header is not None and self._follows(header):
                if header.record_count:
                    return header
                seal = header  # the commit after it may have found no room behind it
        return seal

    def _follows(self, header: Header) -> bool:
        """Whether it is the next commit.

        Behind a commit that was read, its epoch and the number of its first record say so. Where
        a checkpoint made the journal begin no epoch is known: a commit that was dropped at an
        earlier opening has the right number too when the one written instead of it is damaged
        with all of its epoch. The chain tells them apart.
        """
        return (
            header.first == self._expected
            and header.epoch >= self._epoch
            and self._chain in (None, header.chain)
        )

    def _resync(self) -> Header | None:
        """The next commit behind damage, if it is proven that what is missing was durable."""
        if not self._is_proven(self._expected):
            return None
        for index in range(bisect_right(self._firsts, self._expected), len(self._later)):
            header = self._later[index]
            if header.epoch >= self._epoch:
                self._salvage_gap(header)
                self._expected = header.first
                self._chain = None
                self._replay.head = header.block
                return header
        return None

    def _take(self, header: Header) -> bool:
        """Apply a commit, or what is left of it if it is proven; whether reading goes on."""
        payload = unframed(self._ring, header.block, header.blocks)[: header.size]
        records = whole_records(payload, header)
        if records is None:
            if not self._is_proven(header.first):
                self._replay.unfinished += 1
                return False
            self._salvage(payload, header.block, header.first, header.record_count)
        else:
            self._replay.records += records
        self._expected = header.first + header.record_count
        self._epoch = header.epoch
        self._chain = header.crc
        self._replay.head = header.block + header.blocks
        self._replay.place = Place(header.block, header.size, header.crc)
        return True

    def _is_proven(self, sequence: int) -> bool:
        """Whether the superblock or a later commit says that this sequence was durable."""
        if sequence <= self._flushed:
            return True
        index = bisect_right(self._firsts, sequence)
        return index < len(self._proofs) and self._proofs[index] >= sequence

    # ------------------------------------------------------------ salvage

    def _salvage_gap(self, header: Header) -> None:
        """What can be had of commits whose headers are gone, before `header`."""
        damaged = self._payload_before(header)
        if damaged is None:
            self._walk_gap(header.first)
            return
        payload, block, first, count = damaged
        if first > self._expected:
            self._walk_gap(first)
        self._salvage(payload, block, first, count)

    def _payload_before(self, header: Header) -> tuple[bytes, int, int, int] | None:
        """The commit before `header`, by its footer: bytes, block, first sequence, count."""
        block, size = header.previous, header.previous_size
        count = -(-size // ROOM)
        if size < FRAME_SIZE or (block + count) * BLOCK_SIZE > len(self._ring):
            return None
        payload = self._unframed(block, count)[:size]
        footer = parse_footer(payload) if len(payload) == size else None
        if footer is None:
            return None
        first, records = footer
        if first < self._expected or first + records != header.first:
            return None
        return payload, block, first, records

    def _walk_gap(self, end: int) -> None:
        """Neither header nor footer: the records from the gap's beginning, one behind the other.

        A whole header there is another commit's, and so are the records behind it.
        """
        self._replay.damaged = True
        block = self._replay.head
        if block in self._whole_at:
            self._lose_range(self._expected, end, block)
            return
        ring_blocks = len(self._ring) // BLOCK_SIZE
        following = (each.block for each in self._later if each.block > block)
        payload = self._unframed(block, min(following, default=ring_blocks) - block)
        at, sequence = HEADER_SIZE, self._expected
        while sequence < end:
            head = parse_head(payload, at, len(payload))
            if head is None or head.sequence != sequence or head.epoch < self._epoch:
                break
            self._keep(payload, head, block, at)
            at = self._keep_rider(payload, head, block)
            sequence += 1
        self._lose_range(sequence, end, block)

    def _unframed(self, block: int, count: int) -> bytes:
        """Blocks looked at for salvage: all of them together no more than the ring has."""
        count = max(0, min(count, self._room))
        self._room -= count
        return unframed(self._ring, block, count)

    def _salvage(self, payload: bytes, block: int, first: int, count: int) -> None:
        """Every record of a damaged commit that is whole; the others are lost."""
        self._replay.damaged = True
        sizes = directory_of(payload, first, count)
        at = HEADER_SIZE
        for index in range(count):
            head = parse_head(payload, at, len(payload))
            if head is not None and head.sequence == first + index:
                self._keep(payload, head, block, at)
                end = self._keep_rider(payload, head, block)
                if sizes is not None:
                    if end < at + sizes[index][0]:
                        self._lose(b"", block, end, head.sequence, 0, Kind.REQUEST)
                    end = at + sizes[index][0]
                at = end
            elif sizes is not None:
                size, key_hash = sizes[index]  # with its request: repeated, it mends the loss
                self._lose(b"", block, at, first + index, key_hash)
                at += size
            else:
                self._lose_range(first + index, first + count, block)
                return

    def _keep_rider(self, payload: bytes, head: Head, block: int) -> int:
        """Also the request that rides behind a record; where what follows begins."""
        rider = rider_of(payload, head)
        if rider is None:
            return head.end
        self._keep(payload, rider, block, head.end)
        return rider.end

    def _keep(self, payload: bytes, head: Head, block: int, at: int) -> None:
        if has_whole_value(payload, head):
            value = payload[head.value_at : head.end]
            self._replay.records.append(
                Read(head.sequence, head.kind, head.key, value, 0, lost=None)
            )
        else:
            self._lose(head.key, block, at, head.sequence, 0, head.kind)

    def _lose(
        self,
        key: bytes,
        block: int,
        at: int,
        sequence: int,
        key_hash: int,
        kind: Kind = Kind.PUT,
    ) -> None:
        lines, rest = divmod(at, ROOM)
        offset = self._offset + (block + lines) * BLOCK_SIZE + TAG_SIZE + rest
        told = key if kind in (Kind.PUT, Kind.DAMAGED) else b""
        lost = Lost(told, offset, sequence)
        self._replay.records.append(Read(sequence, kind, told, b"", key_hash, lost))

    def _lose_range(self, start: int, end: int, block: int) -> None:
        """Sequences of which nothing is known but that they were durable."""
        count = max(0, end - start)
        listed = min(count, self._list_room)
        self._list_room -= listed
        for sequence in range(start, start + listed):
            self._lose(b"", block, 0, sequence, 0)
        self._replay.lost_unlisted += count - listed


def without_stale(headers: list[Header], epoch: int, epoch_first: int) -> list[Header]:
    """Without the commits behind whose first sequence a later epoch began.

    They were dropped at an opening, and must not come back when what was written instead of them
    ends just before them.
    """
    beginnings = {each.epoch: each.epoch_first for each in headers}
    beginnings[epoch] = epoch_first
    bounds: dict[int, int] = {}  # where a later epoch began, by epoch
    bound = COUNTER_MAX
    for each in sorted(beginnings, reverse=True):
        bounds[each] = bound
        bound = min(bound, beginnings[each])
    return [each for each in headers if each.first < bounds[each.epoch]]


def whole_records(payload: bytes, header: Header) -> list[Read] | None:
    """The records of a commit, if every one of them is whole; then it was written to its end."""
    records = []
    at = HEADER_SIZE
    for index in range(header.record_count):
        head = parse_head(payload, at, len(payload))
        if (
            head is None
            or head.sequence != header.first + index
            or head.epoch != header.epoch
            or not has_whole_value(payload, head)
        ):
            return None
        value = payload[head.value_at : head.end]
        records.append(Read(head.sequence, head.kind, head.key, value, 0, lost=None))
        at = head.end
        rider = rider_of(payload, head)
        if rider is not None:
            records.append(Read(rider.sequence, rider.kind, rider.key, b"", 0, lost=None))
            at = rider.end
    rest = len(payload) - _FOOTER.size - header.record_count * ENTRY_SIZE
    return records if at == rest else None  # a rider that is not whole is in between


def rider_of(payload: bytes, head: Head) -> Head | None:
    """The request that rides behind a record, if there is an undamaged one."""
    kind_at = head.end + KIND_AT
    if head.kind is Kind.REQUEST or payload[kind_at : kind_at + 1] != _REQUEST:
        return None
    rider = parse_head(payload, head.end, len(payload))
    if rider is None or rider.sequence != head.sequence or rider.epoch != head.epoch:
        return None
    return rider if rider.end == rider.value_at else None


def parse_footer(payload: bytes) -> tuple[int, int] | None:
    """First sequence and count by the footer at a commit's end, if it is undamaged."""
    at = len(payload) - _FOOTER.size
    _, first, count, crc = _FOOTER.unpack_from(payload, at)
    start = at - count * ENTRY_SIZE
    if start < HEADER_SIZE or crc32c(payload[start:-4]) != crc or first >= COUNTER_MAX:
        return None
    return first, count


def directory_of(payload: bytes, first: int, count: int) -> list[tuple[int, int]] | None:
    """Sizes and key hashes of a commit's records, if its directory is undamaged."""
    if parse_footer(payload) != (first, count):
        return None
    start = len(payload) - _FOOTER.size - count * ENTRY_SIZE
    return [_ENTRY.unpack_from(payload, start + index * ENTRY_SIZE) for index in range(count)]

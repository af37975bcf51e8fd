"""A ring of records in living memory: one task writes, another reads, and neither waits.

    header, 16 words          magic | capacity | reserve | commit | count | lost | 2 free | 8 marks
    area, `capacity` bytes    records, each on a multiple of 8: sequence u64, size u32, checksum u32
                              (with the sequence, see `checksum`), payload

Positions are bytes since the ring was made and never go back; position p lies at p % capacity, and
a record may run over the end. To put one, the writer stores `reserve` (what lies a lap before it is
gone from now on), the record, `commit` and `count`, in this order. It reserves for a few records at
once. A mark is the position of the first record that begins in its eighth of the area: where a
reader goes on that was overtaken.

A reader trusts nothing but what it has copied and whose checksum and sequence fit. That is what
makes a record whole where memory is weakly ordered too, and not the order of the stores.

Every sequence number ends in exactly one account: accepted, overwritten before it was read, or
damaged. Of a hostile writer only that writer's own records suffer.
"""

import struct
from collections.abc import Callable
from typing import Final
from zlib import crc32

RING_VERSION: Final = 1
RING_MAGIC: Final = int.from_bytes(b"NXRING\0" + bytes([RING_VERSION]), "little")
WORD_SIZE: Final = 8  # bytes
MARKS: Final = 8
HEADER_WORDS: Final = 8 + MARKS
RING_HEADER_SIZE: Final = HEADER_WORDS * WORD_SIZE  # bytes
UNIT: Final = MARKS * WORD_SIZE  # bytes; a capacity is a multiple, so that an eighth is whole words
RING_SIZE_MIN: Final = RING_HEADER_SIZE + 16 * UNIT  # bytes; a record of 128 fits
RECORD: Final = struct.Struct("<QII")  # sequence, size, checksum
RECORD_SIZE: Final = RECORD.size
SHARE: Final = 8  # a record takes at most this part of the area: one lap holds several
CHECK_MASK: Final = (1 << 32) - 1
RESERVE_PART: Final = 64  # so large a part of the area is reserved at once
SEQUENCE_MAX: Final = 1 << 62  # a larger one is no record's; sums of a few still fit 64 bits
PIECE_SIZE: Final = 8192  # bytes that are copied at once
PACKS_MAX: Final = 512  # sizes of records whose format is kept ready
DOUBTS_MAX: Final = 3  # drains that find the same place unreadable until it counts as damaged

MAGIC_WORD: Final = 0
CAPACITY_WORD: Final = 1
RESERVE_WORD: Final = 2
COMMIT_WORD: Final = 3
COUNT_WORD: Final = 4
LOST_WORD: Final = 5
MARK_WORD: Final = 8

assert RECORD_SIZE % WORD_SIZE == 0
assert MARK_WORD + MARKS == HEADER_WORDS

_pack = RECORD.pack
_unpack = RECORD.unpack_from


class NoRing(Exception):
    """The memory holds no ring of this version; the text says why."""


def _capacity_of(size: int) -> int:
    return (size - RING_HEADER_SIZE) // UNIT * UNIT


def payload_size_max(size: int) -> int:
    """The largest payload (bytes) that a ring in `size` bytes of memory takes."""
    return _capacity_of(size) // SHARE - RECORD_SIZE


def checksum(payload: bytes, number: int) -> int:
    """What goes with the payload of record `number`: its CRC-32, and the number added to that.

    The number as the seed of the CRC would be added to the first bytes: it cancels out in a payload
    that begins with it, and half of one record with half of the next fits. tests/property found it.
    """
    return crc32(payload) ^ number & CHECK_MASK


class RingWriter:
    """Makes a ring in `view`, which is all zeros or was a ring of this task's own."""

    __slots__ = (
        "_area",
        "_at",
        "_capacity",
        "_clear",
        "_eighth",
        "_lap",
        "_lost",
        "_mark_next",
        "_packs",
        "_size_max",
        "_words",
        "sequence",
    )

    def __init__(self, view: memoryview) -> None:
        assert len(view) >= RING_SIZE_MIN, "too small for a ring"
        self._capacity = _capacity_of(len(view))
        self._area = view[RING_HEADER_SIZE : RING_HEADER_SIZE + self._capacity]
        self._words = view[:RING_HEADER_SIZE].cast("Q")
        self._eighth = self._capacity // MARKS
        self._size_max = payload_size_max(len(view))
        self._lost = 0
        self._lap = 0  # the position at which this lap began
        self._at = 0  # where in the area the next record begins
        self._clear = 0  # up to there in the area a record is just stored: no reserving, no mark
        self._mark_next = 0
        self._packs: dict[int, tuple[Callable[..., None], int]] = {}
        self.sequence = 0  # records put so far, and the number of the next one
        for index in range(HEADER_WORDS):
            self._words[index] = 0
        self._words[CAPACITY_WORD] = self._capacity
        self._words[MAGIC_WORD] = RING_MAGIC

    def put(self, payload: bytes | bytearray) -> None:
        """Write a record over the oldest ones; one that is too large counts as lost."""
        size = len(payload)
        try:
            pack, step = self._packs[size]
        except KeyError:
            if size > self._size_max:
                self.lost(1)
                return
            pack, step = self._pack_of(size)
        at = self._at
        following = at + step
        sequence = self.sequence
        check = crc32(payload) ^ sequence & CHECK_MASK
        if following <= self._clear:
            pack(self._area, at, sequence, size, check, payload)
        else:
            self._make_way(at, following)
            if following <= self._capacity:
                pack(self._area, at, sequence, size, check, payload)
            else:
                self._put_around(at, _pack(sequence, size, check) + payload)
                self._lap += self._capacity
                following -= self._capacity
                self._clear = 0  # of this lap nothing is known
        self._at = following
        words = self._words
        words[COMMIT_WORD] = self._lap + following
        self.sequence = sequence = sequence + 1
        words[COUNT_WORD] = sequence

    def _pack_of(self, size: int) -> tuple[Callable[..., None], int]:
        """What stores a record of this size, and the bytes it takes with what fills it up.

        As many are kept as there are usual sizes.
        """
        found = (struct.Struct(f"<QII{size}s").pack_into, (RECORD_SIZE + size + 7) & ~7)
        if len(self._packs) < PACKS_MAX:
            self._packs[size] = found
        return found

    def _make_way(self, at: int, following: int) -> None:
        """Reserve what the record at `at` takes, and some more; mark the first one of an eighth."""
        position = self._lap + at
        reserved = max(self._lap + following, position + self._capacity // RESERVE_PART)
        self._words[RESERVE_WORD] = reserved
        if position >= self._mark_next:
            eighth = position // self._eighth
            self._words[MARK_WORD + eighth % MARKS] = position
            self._mark_next = (eighth + 1) * self._eighth
        # A record that ends at a mark's place or before it begins before it.
        self._clear = min(reserved, self._mark_next) - self._lap

    def _put_around(self, at: int, record: bytes) -> None:
        """Store a record that reaches the end of the area, or runs over it."""
        first = self._capacity - at
        piece = record[:first]
        self._area[at : at + len(piece)] = piece
        self._area[: len(record) - len(piece)] = record[first:]

    def lost(self, count: int) -> None:
        """Count records that never came into the ring; the reader sees the number."""
        self._lost += count
        self._words[LOST_WORD] = self._lost


class RingReader:
    """Reads the ring in `view`, from position `taken` on, where record `sequence` begins.

    Both are what an earlier reader of the same ring had reached; its accounts are not continued.
    accepted + overwritten + damaged = `sequence`, less the one it began with.
    """

    def __init__(self, view: memoryview, taken: int = 0, sequence: int = 0) -> None:
        if len(view) < RING_SIZE_MIN:
            raise NoRing(f"{len(view)} bytes are too few for a ring")
        self._view = view
        self._words = view[:RING_HEADER_SIZE].cast("Q")
        if self._words[MAGIC_WORD] != RING_MAGIC:
            raise NoRing("it does not begin as a ring of this version does")
        self._capacity = _capacity_of(len(view))
        if self._words[CAPACITY_WORD] != self._capacity:
            raise NoRing("its capacity is not that of its memory")
        self._size_max = payload_size_max(len(view))
        self._piece_size = max(PIECE_SIZE, RECORD_SIZE + self._size_max)
        self.taken = max(0, taken) & ~7  # the position (bytes) of the next record
        # Every record before it is accounted for. No number of a record comes near 64 bits.
        self.sequence = min(max(0, sequence), SEQUENCE_MAX)
        self.accepted = 0
        self.overwritten = 0
        self.damaged = 0
        # What a record at `taken` must have as its number; None after a jump: any not yet taken.
        self._number: int | None = self.sequence
        self._blamed_damage = False  # why the gap is there that the next record will show
        self._doubts = 0  # drains that found the record at `taken` unreadable

    @property
    def pending(self) -> int:
        """Bytes that were committed and not taken yet, at most what the ring holds."""
        return min(max(0, self._commit() - self.taken), self._capacity)

    @property
    def written(self) -> int:
        """Records the writer says it has put; killed just after the last one, one less."""
        return min(self._words[COUNT_WORD], SEQUENCE_MAX)

    @property
    def lost(self) -> int:
        """Records the writer says it could not put."""
        return min(self._words[LOST_WORD], SEQUENCE_MAX)

    def drain(self, count_max: int) -> list[bytes]:
        """At most `count_max` payloads, oldest first, in as many steps; a jump is a step.

        Fewer than that, while `pending`, is no end: call again. A record that cannot be read may be
        one that is not all visible yet: it is damaged when DOUBTS_MAX drains found it so.
        """
        payloads: list[bytes] = []
        steps = count_max
        while steps > 0:
            commit = self._commit()
            if commit <= self.taken:
                break
            if self._reserve(commit) - self.taken > self._capacity:
                self._jump(commit)
                steps -= 1
                continue
            if self._number == self.sequence:
                steps = self._take_some(commit, steps, payloads)
            else:
                steps -= 1
                payload = self._take(commit)
                if payload is not None:
                    payloads.append(payload)
            if self._doubts:
                break
        return payloads

    def _take_some(self, commit: int, steps: int, payloads: list[bytes]) -> int:
        """Take records as long as they follow each other well; the steps that are left.

        They are copied at once, and looked at when it is known that none was overwritten meanwhile.
        """
        base = self.taken
        piece = self._copy(base, min(commit - base, self._piece_size))
        newest = self._commit()
        if self._reserve(newest) - base > self._capacity:
            self._jump(newest)
            return steps - 1
        at, size_max, limit = 0, self._size_max, len(piece)
        last = limit - RECORD_SIZE
        before = len(payloads)
        unpack, checked, keep = _unpack, crc32, payloads.append
        for number in range(self.sequence, self.sequence + steps):
            if at > last:
                break
            found, size, check = unpack(piece, at)
            begin = at + RECORD_SIZE
            end = begin + size
            if found != number or size > size_max or end > limit:
                break
            payload = piece[begin:end]
            if checked(payload) ^ number & CHECK_MASK != check:
                break
            keep(payload)
            at = (end + 7) & ~7
        count = len(payloads) - before
        if count:
            self._doubts = 0
            self.accepted += count
            self.taken = base + at
            self._number = self.sequence = self.sequence + count
            return steps - count
        self._doubt(commit)
        return steps - 1

    def settle(self) -> None:
        """The writer has ended and nothing is pending: what it put and nobody saw is damaged.

        A count that does not fit into the memory is no evidence, and is left alone.
        """
        missing = self.written - self.sequence
        if not self.pending and 0 < missing <= self._capacity // RECORD_SIZE:
            self.damaged += missing
            self.sequence += missing
            self._number = self.sequence

    def _commit(self) -> int:
        return self._words[COMMIT_WORD] & ~7

    def _reserve(self, commit: int) -> int:
        return max(commit, self._words[RESERVE_WORD])

    def _take(self, commit: int) -> bytes | None:
        """The payload of the record at `taken`, which is behind us then; None if there is none."""
        header = self._copy(self.taken, RECORD_SIZE)
        number, size, check = _unpack(header)
        end = self.taken + ((RECORD_SIZE + size + 7) & ~7)
        fits = size <= self._size_max and end <= commit
        payload = self._copy(self.taken + RECORD_SIZE, size) if fits else b""
        if self._reserve(self._commit()) - self.taken > self._capacity:
            self._jump(self._commit())  # overwritten while it was copied
            return None
        if not (fits and self._fits(number, payload, check)):
            self._doubt(commit)
            return None
        self._doubts = 0
        self.taken = end
        self._number = number + 1
        if number < self.sequence:
            return None  # an earlier reader had it
        self._account(number - self.sequence)
        self.sequence = number + 1
        self.accepted += 1
        return payload

    def _fits(self, number: int, payload: bytes, check: int) -> bool:
        return self._is_due(number) and checksum(payload, number) == check

    def _is_due(self, number: int) -> bool:
        return number == self._number or (self._number is None and number < SEQUENCE_MAX)

    def _account(self, gap: int) -> None:
        """Records between the last one accounted for and the one that was found."""
        if self._blamed_damage:
            self.damaged += gap
        else:
            self.overwritten += gap
        self._blamed_damage = False

    def _doubt(self, commit: int) -> None:
        """The record at `taken` cannot be read: not yet, or never."""
        self._doubts += 1
        if self._doubts >= DOUBTS_MAX:
            self._blamed_damage = True
            self._jump(commit)

    def _jump(self, commit: int) -> None:
        """Go on at the oldest mark ahead that still holds, or at the newest position."""
        oldest = self._reserve(commit) - self._capacity
        marks = self._words[MARK_WORD:].tolist()
        ahead = [
            each for each in marks if max(oldest, self.taken + 1) <= each < commit and each % 8 == 0
        ]
        self.taken = min(ahead, default=max(commit, self.taken))
        self._number = None
        self._doubts = 0

    def _copy(self, position: int, size: int) -> bytes:
        at = RING_HEADER_SIZE + position % self._capacity
        first = RING_HEADER_SIZE + self._capacity - at
        if size <= first:
            return bytes(self._view[at : at + size])
        rest = size - first
        return bytes(self._view[at : at + first]) + bytes(
            self._view[RING_HEADER_SIZE : RING_HEADER_SIZE + rest]
        )

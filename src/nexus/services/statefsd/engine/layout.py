"""Where what stands on the device, and the superblock that says so (statefs-format.md).

block 0         superblock, first copy
block 8         superblock, second copy (4 KiB away: a torn physical sector takes one)
block 16        the journal's ring
behind it       area 0, area 1: the checkpoint in force stands in one, the next in the other
"""

from dataclasses import dataclass, replace
from struct import Struct
from typing import Final

from nexus.abi import BLOCK_SIZE
from nexus.drivers.crc import crc32c
from nexus.services.statefsd.engine.limits import (
    AREAS_MAX,
    CLIENTS_MAX,
    LOST_MAX,
    REQUESTS_MAX,
    VALUE_SIZE_MAX,
    StoreLimits,
)

FORMAT_VERSION: Final = 1
MAGIC: Final = b"NXSTATE\0"
COPIES: Final = (0, 8)  # blocks of the two superblocks
HEAD_BLOCKS: Final = 16  # before the ring
STORE_BLOCKS_MIN: Final = 128  # 64 KiB: a ring of 32 blocks and two areas of 40
STORE_BLOCKS_MAX: Final = 1 << 19  # 256 MiB; two checkpoints are kept in memory (memory_needed)
RING_SHARE: Final = 8  # the ring is that part of the store
RING_BLOCKS_MIN: Final = 32
RING_BLOCKS_MAX: Final = 8192  # 4 MiB; the longer it is, the longer an opening takes
SEGMENT_SIZE: Final = 1024 * 1024  # bytes; records of a checkpoint do not cross its bounds
SEGMENT_BLOCKS: Final = SEGMENT_SIZE // BLOCK_SIZE
RECORD_HEAD_SIZE: Final = 32  # bytes
HASHES_MAX: Final = 1024  # damaged records without a key, told by their key's hash
HASHES_SHARE: Final = 2  # and one for so many blocks of an area: a small store keeps fewer
META_SIZE_MAX: Final = 1024 * 1024  # bytes; the largest that StoreLimits can lead to is less
RECORD_COST: Final = RECORD_HEAD_SIZE + 16  # with its 4 bytes of order and 12 of the hash table
RECORD_SIZE_MAX: Final = RECORD_HEAD_SIZE + 255 + VALUE_SIZE_MAX
NO_AREA: Final = 2  # nothing was ever compacted: there is no checkpoint
COUNTER_MAX: Final = 1 << 62  # of sequences, epochs, generations: no image counts further
COUNTER_LAST: Final = COUNTER_MAX - (1 << 48)  # one that has come so far is not opened

_SUPERBLOCK: Final = Struct("<8sIIQQQQQIIIIQIIIIQIIII")
_CRC_AT: Final = 8
_CRC_END: Final = 12

assert _SUPERBLOCK.size <= BLOCK_SIZE
assert COPIES[1] * BLOCK_SIZE >= 4096
assert HEAD_BLOCKS + RING_BLOCKS_MIN + 2 * 40 <= STORE_BLOCKS_MIN


@dataclass(frozen=True, slots=True)
class Superblock:
    """What a superblock says. The checkpoint's own fields are all 0 without one."""

    generation: int  # the higher one of two copies is in force
    epoch: int  # of the latest opening
    epoch_first: int  # the first sequence of that epoch
    compactions: int
    block_count: int  # of the store; the device may be larger
    ring_blocks: int
    area_blocks: int
    active: int  # area of the checkpoint, or NO_AREA
    sequence: int  # of the last change in the checkpoint
    journal_block: int  # of the ring, where the first commit behind the checkpoint is or will be
    journal_chain: int  # what that commit gives as its predecessor's checksum
    count: int = 0  # records of the checkpoint
    slots: int = 0  # of its hash table
    records_size: int = 0  # bytes, the ends of segments included
    meta_size: int = 0  # bytes
    order_crc: int = 0
    table_crc: int = 0
    meta_crc: int = 0

    def area_first(self, area: int) -> int:
        """The first block of an area."""
        return HEAD_BLOCKS + self.ring_blocks + area * self.area_blocks

    def encoded(self) -> bytes:
        """The block, checksum included."""
        packed = _SUPERBLOCK.pack(
            MAGIC,
            0,
            FORMAT_VERSION,
            self.generation,
            self.epoch,
            self.epoch_first,
            self.compactions,
            self.block_count,
            self.ring_blocks,
            self.area_blocks,
            self.active,
            self.journal_block,
            self.sequence,
            self.journal_chain,
            self.count,
            self.slots,
            self.meta_size,
            self.records_size,
            self.order_crc,
            self.table_crc,
            self.meta_crc,
            0,
        ).ljust(BLOCK_SIZE, b"\0")
        checksum = crc32c(packed[_CRC_END:]).to_bytes(4, "little")
        return packed[:_CRC_AT] + checksum + packed[_CRC_END:]

    def raised(self, epoch: int, epoch_first: int) -> "Superblock":
        """The next one, of an opening."""
        return replace(self, generation=self.generation + 1, epoch=epoch, epoch_first=epoch_first)


def decode_superblock(data: bytes) -> Superblock | None:
    """What a block says if it is a whole superblock of this format, plausible in every field."""
    if version_of(data) != FORMAT_VERSION:
        return None
    (
        _,
        _,
        _,
        generation,
        epoch,
        epoch_first,
        compactions,
        block_count,
        ring_blocks,
        area_blocks,
        active,
        journal_block,
        sequence,
        journal_chain,
        count,
        slots,
        meta_size,
        records_size,
        order_crc,
        table_crc,
        meta_crc,
        _,
    ) = _SUPERBLOCK.unpack_from(data)
    found = Superblock(
        generation,
        epoch,
        epoch_first,
        compactions,
        block_count,
        ring_blocks,
        area_blocks,
        active,
        sequence,
        journal_block,
        journal_chain,
        count,
        slots,
        records_size,
        meta_size,
        order_crc,
        table_crc,
        meta_crc,
    )
    return found if _is_plausible(found) else None


def version_of(data: bytes) -> int | None:
    """The format version of an undamaged superblock of any version, None for anything else."""
    if data[:_CRC_AT] != MAGIC or len(data) != BLOCK_SIZE:
        return None
    if int.from_bytes(data[_CRC_AT:_CRC_END], "little") != crc32c(data[_CRC_END:]):
        return None
    return int.from_bytes(data[_CRC_END : _CRC_END + 4], "little")


def _is_plausible(found: Superblock) -> bool:
    counters = (found.generation, found.epoch, found.epoch_first, found.sequence, found.compactions)
    if not found.epoch_first or max(counters) >= COUNTER_MAX:  # sequences count from 1
        return False
    if not found.block_count >= STORE_BLOCKS_MIN:
        return False
    if found.block_count > STORE_BLOCKS_MAX or found.ring_blocks < RING_BLOCKS_MIN:
        return False
    if found.ring_blocks > RING_BLOCKS_MAX or found.journal_block > found.ring_blocks:
        return False
    if found.area_first(2) > found.block_count or found.active > NO_AREA or not found.area_blocks:
        return False
    if found.meta_size > META_SIZE_MAX:
        return False
    if found.active == NO_AREA:
        return not (found.count or found.slots or found.records_size or found.meta_size)
    return (
        found.count * RECORD_HEAD_SIZE <= found.records_size
        and found.slots > found.count
        and sections_of(found).end <= found.area_blocks
    )


def blocks_of(size: int) -> int:
    """Blocks that so many bytes take."""
    return -(-size // BLOCK_SIZE)


@dataclass(frozen=True, slots=True)
class Sections:
    """The parts of a checkpoint behind its records, in blocks from its area's beginning."""

    order: int
    table: int
    meta: int
    meta_copy: int
    end: int


def sections_of(found: Superblock) -> Sections:
    """Where the parts of a checkpoint begin."""
    order = blocks_of(found.records_size)
    table = order + blocks_of(4 * found.count)
    meta = table + blocks_of(8 * found.slots)
    size = blocks_of(found.meta_size)
    return Sections(order, table, meta, meta + size, meta + 2 * size)


def initial(block_count: int) -> Superblock | None:
    """The superblock of a new store on a device, a function of its size alone.

    So a format that a power cut tore is recognised. None if the device is too small.
    """
    if block_count < STORE_BLOCKS_MIN:
        return None
    total = min(block_count, STORE_BLOCKS_MAX)
    ring = max(RING_BLOCKS_MIN, min(RING_BLOCKS_MAX, total // RING_SHARE))
    area = (total - HEAD_BLOCKS - ring) // 2
    return Superblock(
        generation=1,
        epoch=1,
        epoch_first=1,
        compactions=0,
        block_count=total,
        ring_blocks=ring,
        area_blocks=area,
        active=NO_AREA,
        sequence=0,
        journal_block=0,
        journal_chain=0,
    )


MEMORY_FIXED: Final = 16 * 1024 * 1024  # bytes: meta, BAD_MAX damaged records, pieces of I/O
MEMORY_RING: Final = 12  # bytes for one of the ring: the smallest change takes 48 there, 500 here


def memory_needed(block_count: int) -> int:
    """Bytes that a store on a device of that size takes at most, opened and compacted when full.

    Python and the program come on top. Two checkpoints, with what arrays have in advance, and
    every change that the journal holds.
    """
    found = initial(block_count)
    if found is None:
        return 0
    return (
        found.area_blocks * BLOCK_SIZE * 9 // 4
        + found.ring_blocks * BLOCK_SIZE * MEMORY_RING
        + MEMORY_FIXED
    )


META_FIXED: Final = 64  # bytes of a checkpoint's meta besides its lists
META_AREA: Final = 96  # bytes: an area's name of at most 62, its size and its keys
META_CLIENT: Final = 16  # bytes: its number, and how long its list is
META_REQUEST: Final = 18  # bytes: two numbers
META_LOST: Final = 18 + 3 + 255
META_SEGMENT: Final = 11
META_HASH: Final = 24

assert META_SIZE_MAX >= META_FIXED + CLIENTS_MAX * (META_CLIENT + REQUESTS_MAX * META_REQUEST) + (
    META_SEGMENT * (STORE_BLOCKS_MAX // SEGMENT_BLOCKS // 2 + 1)
    + AREAS_MAX * META_AREA
    + LOST_MAX * META_LOST
    + HASHES_MAX * META_HASH
)


def hashes_max(area_blocks: int) -> int:
    """How many damaged records without a key a store keeps in mind."""
    return min(HASHES_MAX, area_blocks // HASHES_SHARE)


def meta_room(area_blocks: int, limits: StoreLimits) -> int:
    """Bytes that the meta of a checkpoint may take under these limits."""
    requests = limits.clients_kept * (META_CLIENT + limits.requests_kept * META_REQUEST)
    segments = META_SEGMENT * (area_blocks // SEGMENT_BLOCKS + 1)
    areas = max(limits.areas_max, len(limits.places))
    lists = areas * META_AREA + limits.lost_kept * META_LOST
    return META_FIXED + requests + segments + lists + hashes_max(area_blocks) * META_HASH


def capacity_of(area_blocks: int, limits: StoreLimits) -> int:
    """Bytes that live records may take: each RECORD_COST, its key and its value.

    Whatever fits it fits an area, with meta, padding, and a record that opens each segment.
    """
    size = (area_blocks - 4) * BLOCK_SIZE - 2 * meta_room(area_blocks, limits)
    if size > SEGMENT_SIZE:
        size -= (size // SEGMENT_SIZE + 1) * RECORD_SIZE_MAX
    return max(0, size)

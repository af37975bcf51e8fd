"""Records in bytes: each its size, its checksum and itself; damage is seen and skipped.

    part      magic u32 | crc32 of the rest of this header u32 | count u32 | size u32, and records
    record    size u32 | crc32 u32 | payload

A part is one value of the state store, and no larger than one in a frame may be. Reading takes any
bytes: of a part cut off anywhere it gives the whole records before the cut, of a damaged record
nothing, and goes on behind it; how many are missing is counted.
"""

import struct
from collections.abc import Iterable
from typing import Final, NamedTuple
from zlib import crc32

from nexus.protocols.statefsd import INLINE_VALUE_MAX

MAGIC: Final = int.from_bytes(b"NXM1", "little")
HEAD: Final = struct.Struct("<IIII")
CHECKED: Final = struct.Struct("<II")
RECORD: Final = struct.Struct("<II")
PART_SIZE_MAX: Final = 6 * 1024  # bytes; beside it a batch has room for the keys it deletes
RECORDS_MAX: Final = 64  # of one part (services.md 3.4)
PAYLOAD_SIZE_MAX: Final = PART_SIZE_MAX - HEAD.size - RECORD.size

assert PART_SIZE_MAX < INLINE_VALUE_MAX


class Unpacked(NamedTuple):
    """What was good, and how many records were not, or 1 for a part that is none."""

    payloads: list[bytes]
    lost: int


def pack(payloads: Iterable[bytes]) -> tuple[bytes, ...]:
    """Records in as many parts as they need; a record is never larger than a part."""
    parts: list[bytes] = []
    records: list[bytes] = []
    size = 0
    for payload in payloads:
        assert len(payload) <= PAYLOAD_SIZE_MAX, "its fields are bounded"
        cost = RECORD.size + len(payload)
        if records and (HEAD.size + size + cost > PART_SIZE_MAX or len(records) >= RECORDS_MAX):
            parts.append(_part(records, size))
            records, size = [], 0
        records.append(RECORD.pack(len(payload), crc32(payload)) + payload)
        size += cost
    if records:
        parts.append(_part(records, size))
    return tuple(parts)


def _part(records: list[bytes], size: int) -> bytes:
    checked = CHECKED.pack(len(records), size)
    return HEAD.pack(MAGIC, crc32(checked), len(records), size) + b"".join(records)


def unpack(part: bytes) -> Unpacked:
    """The records of a part, whatever its bytes are."""
    if len(part) < HEAD.size:
        return Unpacked([], 1)
    magic, check, count, size = HEAD.unpack_from(part)
    if magic != MAGIC or crc32(part[RECORD.size : HEAD.size]) != check:
        return Unpacked([], 1)
    found: list[bytes] = []
    at = HEAD.size
    end = min(len(part), HEAD.size + size)
    while at + RECORD.size <= end and len(found) < count:
        length, checksum = RECORD.unpack_from(part, at)
        payload = part[at + RECORD.size : at + RECORD.size + length]
        at += RECORD.size + length
        if at > end:
            break
        if crc32(payload) == checksum:
            found.append(payload)
    return Unpacked(found, count - len(found))


assert HEAD.size == RECORD.size + CHECKED.size

"""Records in bytes: each its size, its checksum and itself; damage is seen and skipped.

    part      magic u32 | crc32 of the rest of this header u32 | count u32 | size u32, and records
    record    size u32 | crc32 u32 | payload

The first record of a part says what the part is (Meta), the others are entries of a window. A part
is one value of the state store: the journal of the store makes it whole or absent, and what it
cannot vouch for, the checksums see. Reading takes any bytes: of a part cut off anywhere it gives
the whole records before the cut, of a damaged record nothing, and goes on behind it; how many are
missing is counted.

Keys, below ROOT: `wal/seg_N` for the segments of the WAL, `rollup/short/w_START_PART` and
`rollup/long/w_START_PART` for windows that are over, `wear` for what was written today.
"""

import re
import struct
from collections.abc import Iterable
from typing import Final, NamedTuple
from zlib import crc32

import msgspec

from nexus.protocols.metricsd import Resolution
from nexus.protocols.statefsd import INLINE_VALUE_MAX

ROOT: Final = "/state/observability/metricsd/"
WEAR_KEY: Final = f"{ROOT}wear"
MAGIC: Final = int.from_bytes(b"NXM1", "little")
HEAD: Final = struct.Struct("<IIII")
CHECKED: Final = struct.Struct("<II")
RECORD: Final = struct.Struct("<II")
PART_SIZE_MAX: Final = 6 * 1024  # bytes; beside it a batch has room for the keys it deletes
RECORDS_MAX: Final = 64  # entries of one part (services.md 3.4)
META_SIZE_MAX: Final = 96  # bytes
PAYLOAD_SIZE_MAX: Final = PART_SIZE_MAX - HEAD.size - META_SIZE_MAX - 2 * RECORD.size
PARTS_MAX: Final = 128  # of one window; SERIES_MAX in parts of 32 at least
SEGMENT: Final = re.compile(rf"{ROOT}wal/seg_([0-9]{{1,4}})\Z")
WINDOW: Final = re.compile(rf"{ROOT}rollup/(short|long)/w_([0-9]{{20}})_([0-9]{{1,3}})\Z")

assert PART_SIZE_MAX < INLINE_VALUE_MAX
assert HEAD.size == RECORD.size + CHECKED.size


class Meta(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True):
    """What a part is: the window it is of, which part of how many, and the number of the latest
    segment of the WAL when it was made."""

    sequence: int
    boot: int
    boot_id: bytes
    length: int
    number: int
    start: int
    part: int
    parts: int


class Unpacked(NamedTuple):
    """What was good, and how many records were not, or 1 for a part that is none."""

    payloads: list[bytes]
    lost: int


def segment_key(slot: int) -> str:
    """The key of a segment of the WAL."""
    return f"{ROOT}wal/seg_{slot}"


def window_key(resolution: Resolution, start: int, part: int) -> str:
    """The key of a part of a window that is over; in the order of their begin."""
    return f"{ROOT}rollup/{resolution.name.lower()}/w_{start:020}_{part}"


def chunks(payloads: Iterable[bytes]) -> list[list[bytes]]:
    """Entries, split as they fit into parts; one is never larger than a part."""
    found: list[list[bytes]] = []
    size = 0
    for payload in payloads:
        assert len(payload) <= PAYLOAD_SIZE_MAX, "its fields are bounded"
        size += RECORD.size + len(payload)
        if not found or size > PAYLOAD_SIZE_MAX or len(found[-1]) >= RECORDS_MAX:
            found.append([])
            size = RECORD.size + len(payload)
        found[-1].append(payload)
    return found


def part_of(meta: Meta, payloads: list[bytes]) -> bytes:
    """A part, as it is written."""
    head = _meta_encode(meta)
    assert len(head) <= META_SIZE_MAX
    records = [RECORD.pack(len(each), crc32(each)) + each for each in (head, *payloads)]
    body = b"".join(records)
    checked = CHECKED.pack(len(records), len(body))
    return HEAD.pack(MAGIC, crc32(checked), len(records), len(body)) + body


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
    for _ in range(count):
        if at + RECORD.size > end:
            break
        length, checksum = RECORD.unpack_from(part, at)
        payload = part[at + RECORD.size : at + RECORD.size + length]
        at += RECORD.size + length
        if at > end:
            break
        if crc32(payload) == checksum:
            found.append(payload)
    return Unpacked(found, count - len(found))


def meta_of(payload: bytes) -> Meta | None:
    """What the first record of a part says; None if it is none."""
    try:
        meta = _meta.decode(payload)
    except msgspec.DecodeError:
        return None
    numbers = (meta.sequence, meta.boot, meta.length, meta.number, meta.start, meta.part)
    if any(not 0 <= each < 1 << 63 for each in numbers) or meta.length == 0:
        return None
    return meta if meta.part < meta.parts <= PARTS_MAX else None


_meta: Final = msgspec.msgpack.Decoder(Meta)
_meta_encode: Final = msgspec.msgpack.Encoder().encode

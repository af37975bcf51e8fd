"""A record: the same bytes in a commit of the journal and in a checkpoint.

Its head names its sequence and epoch and has a checksum of its own, which covers the key and the
value's checksum: a record whose value is damaged still says whose value it was.
"""

from enum import IntEnum
from struct import Struct
from typing import Final, NamedTuple

from nexus.drivers.crc import crc32c
from nexus.services.statefsd.engine.layout import RECORD_HEAD_SIZE
from nexus.services.statefsd.engine.limits import VALUE_SIZE_MAX

_TAIL: Final = Struct("<IQQBBHI")  # the head behind its checksum
_HEAD: Final = Struct("<IIQQBBHI")
_pack: Final = _TAIL.pack
KIND_AT: Final = 24  # offsets in a record, for who looks at one field
KEY_SIZE_AT: Final = 25
VALUE_SIZE_AT: Final = 28
KEY_AT: Final = RECORD_HEAD_SIZE
CRC_SIZE: Final = 4

assert _HEAD.size == RECORD_HEAD_SIZE


class Kind(IntEnum):
    """What a record says. The numbers stand on disks and are never reused."""

    PUT = 1
    DELETE = 2
    REQUEST = 3  # a request id was applied: client and id are the key
    DAMAGED = 4  # the record of this key was damaged; the value is the offset it had


REQUEST_KEY: Final = Struct("<QQ")
OFFSET: Final = Struct("<Q")


class Head(NamedTuple):
    """The head of a record, found undamaged."""

    value_crc: int
    sequence: int
    epoch: int
    kind: Kind
    key: bytes
    value_at: int  # where its value begins
    end: int


def encode_record(sequence: int, epoch: int, kind: int, key: bytes, value: bytes) -> bytes:
    """The bytes of a record."""
    tail = _pack(crc32c(value), sequence, epoch, kind, len(key), 0, len(value)) + key
    return crc32c(tail).to_bytes(4, "little") + tail + value


def parse_head(data: bytes, at: int, end: int) -> Head | None:
    """The head of the record at `at`, if it is undamaged and the record ends before `end`."""
    if at + RECORD_HEAD_SIZE > end:
        return None
    head_crc, value_crc, sequence, epoch, kind, key_size, zero, value_size = _HEAD.unpack_from(
        data, at
    )
    value_at = at + RECORD_HEAD_SIZE + key_size
    stop = value_at + value_size
    if zero or not key_size or value_size > VALUE_SIZE_MAX or stop > end or not 1 <= kind <= 4:
        return None
    if crc32c(data[at + CRC_SIZE : value_at]) != head_crc:
        return None
    key = data[at + RECORD_HEAD_SIZE : value_at]
    return Head(value_crc, sequence, epoch, Kind(kind), key, value_at, stop)


def has_whole_value(data: bytes, head: Head) -> bool:
    """Whether the value behind a head is what its checksum says."""
    return crc32c(data[head.value_at : head.end]) == head.value_crc

"""The frame header: 48 bytes, little-endian, in front of a MessagePack body."""

import struct
from typing import Final, NamedTuple

from nexus.abi import MESSAGE_KIND_RESERVED, MESSAGE_SIZE_MAX, Nanos

HEADER: Final = struct.Struct("<BBBBHHQQ16s8s")
"""kind, version, op, flags, protocol, status, nonce, deadline, trace id, parent span id."""

PREFIX: Final = struct.Struct("<BBBBHH")
"""The first 8 bytes: kind, version, op, flags, protocol, status. The other 40 are the call's."""

HEADER_SIZE: Final = HEADER.size
PREFIX_SIZE: Final = PREFIX.size
NONCE_OFFSET: Final = 8
DEADLINE_OFFSET: Final = 16
TRACE_OFFSET: Final = 24
SPAN_OFFSET: Final = 40
OP_INDEX: Final = 2
FLAGS_INDEX: Final = 3
STATUS_OFFSET: Final = 6
FRAME_KIND: Final = 0x4E  # 'N'; what follows is a Nexus frame
BODY_SIZE_MAX: Final = MESSAGE_SIZE_MAX - HEADER_SIZE
REPLY_BIT: Final = 0x80  # a reply's op is the request's op with this bit
OP_MAX: Final = 0x7F
FLAG_BATCH: Final = 0x01  # the body is an array of requests, or of replies
FLAG_MASK: Final = FLAG_BATCH

assert PREFIX_SIZE == NONCE_OFFSET
assert SPAN_OFFSET + 8 == HEADER_SIZE
assert HEADER_SIZE == 48, "MESSAGE_SIZE_MAX in abi.limits counts on it"
assert BODY_SIZE_MAX == 8192
assert FRAME_KIND < MESSAGE_KIND_RESERVED


class Header(NamedTuple):
    """A decoded frame header. `deadline` is absolute; `trace` is W3C (16 bytes), `span` the
    caller's span (8 bytes), the parent of whatever the receiver does for it."""

    kind: int
    version: int
    op: int
    flags: int
    protocol: int
    status: int
    nonce: int
    deadline: Nanos
    trace: bytes
    span: bytes


def pack_header(header: Header) -> bytes:
    """The 48 bytes of a header."""
    return HEADER.pack(*header)


def unpack_header(data: bytes | bytearray) -> Header | None:
    """The header of a frame, or None if `data` is shorter than one."""
    if len(data) < HEADER_SIZE:
        return None
    return Header._make(HEADER.unpack_from(data))


def nonce_of(data: bytes | bytearray) -> int:
    """The nonce of a frame of at least 16 bytes."""
    return int.from_bytes(data[NONCE_OFFSET:DEADLINE_OFFSET], "little")


def status_of(data: bytes | bytearray) -> int:
    """The status of a frame of at least 8 bytes."""
    return int.from_bytes(data[STATUS_OFFSET:NONCE_OFFSET], "little")


def answer(request: bytes | bytearray, status: int, body: bytes = b"") -> bytearray:
    """The reply frame to `request`: its header with the reply bit and `status`, then `body`.

    A request shorter than a header is filled up with zeros, so that a caller whose frame was
    cut behind the nonce still finds its nonce in the answer.
    """
    frame = bytearray(request[:HEADER_SIZE].ljust(HEADER_SIZE, b"\0"))
    frame[0] = FRAME_KIND
    frame[OP_INDEX] |= REPLY_BIT
    frame[STATUS_OFFSET:NONCE_OFFSET] = status.to_bytes(2, "little")
    frame += body
    return frame

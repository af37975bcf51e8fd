"""A span as bytes: what is known at its beginning, and a tail with its end.

    head         trace 16 | span 8 | parent 8 | start u64 | name size u8 | attributes u8
    name, attributes: each key size u8, key, value size u8, value; all UTF-8
    tail         end u64 | status u8 | attributes u8, and those attributes

A span without a tail is open. Everything is little-endian.
"""

import struct
from collections.abc import Mapping
from typing import Final, NamedTuple

HEAD: Final = struct.Struct("<16s8s8sQBB")
TAIL: Final = struct.Struct("<QBB")
TEXT_SIZE_MAX: Final = 255  # bytes that a size of one byte can say
ATTRIBUTES_MAX: Final = 8  # at the beginning, and as many more at the end
NO_ATTRIBUTES: Final[dict[str, str]] = {}
EMPTY: Final = b""

_head = HEAD.pack
_tail = TAIL.pack


class SpanRecord(NamedTuple):
    """A span as its writer tells it; `end` is 0 and `status` 0 while it is open.

    Whether it may say so is not checked: neither names nor sizes nor who made the ids.
    """

    trace: bytes
    span: bytes
    parent: bytes
    start: int
    end: int
    status: int
    name: str
    attributes: list[tuple[str, str]]


def begin_span(
    trace: bytes,
    span: bytes,
    parent: bytes,
    start: int,
    name: bytes,
    attributes: Mapping[str, str] = NO_ATTRIBUTES,
) -> bytes:
    """The bytes of a span that begins; `name` is UTF-8. Too many or too long attributes are cut."""
    if not attributes:
        return _head(trace, span, parent, start, len(name), 0) + name
    texts, count = _packed(attributes)
    return _head(trace, span, parent, start, len(name), count) + name + texts


def end_span(
    begun: bytes, end: int, status: int, attributes: Mapping[str, str] = NO_ATTRIBUTES
) -> bytes:
    """The bytes of the same span when it has ended; further attributes come with it."""
    if not attributes:
        return begun + _tail(end, status, 0)
    texts, count = _packed(attributes)
    return begun + _tail(end, status, count) + texts


def decode_span(data: bytes) -> SpanRecord | None:
    """The span in `data`, or None if there is none; any bytes get an answer."""
    if len(data) < HEAD.size:
        return None
    trace, span, parent, start, name_size, count = HEAD.unpack_from(data)
    at = HEAD.size + name_size
    found: list[tuple[str, str]] = []
    end = status = 0
    try:
        name = data[HEAD.size : at].decode()
        at = _unpacked(data, at, count, found)
        if at != len(data):
            end, status, more = TAIL.unpack_from(data, at)
            at = _unpacked(data, at + TAIL.size, more, found)
    except (UnicodeDecodeError, IndexError, struct.error):
        return None
    if at != len(data):
        return None
    return SpanRecord(trace, span, parent, start, end, status, name, found)


def _packed(attributes: Mapping[str, str]) -> tuple[bytes, int]:
    pieces: list[bytes] = []
    for key, value in attributes.items():
        if len(pieces) == ATTRIBUTES_MAX:
            break
        name, text = _cut(key), _cut(value)
        pieces.append(b"%c%b%c%b" % (len(name), name, len(text), text))
    return EMPTY.join(pieces), len(pieces)


def _cut(text: str) -> bytes:
    """At most TEXT_SIZE_MAX bytes of UTF-8, without half a character at the end."""
    data = text.encode(errors="replace")
    if len(data) <= TEXT_SIZE_MAX:
        return data
    return data[:TEXT_SIZE_MAX].decode(errors="ignore").encode()


def _unpacked(data: bytes, at: int, count: int, found: list[tuple[str, str]]) -> int:
    """Read `count` attributes from `at` on; where they end. Raises where the bytes do."""
    for _ in range(count):
        middle = at + 1 + data[at]
        end = middle + 1 + data[middle]
        found.append((data[at + 1 : middle].decode(), data[middle + 1 : end].decode()))
        at = end
    return at

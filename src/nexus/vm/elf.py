"""What a program or library of another machine needs to run: read from its ELF header.

Enough of the format for what Debian ships for 64-bit little-endian machines (elf(5)).
"""

import struct
from typing import Final, NamedTuple

HEADER: Final = struct.Struct("<16sHHIQQQIHHHHHH")
SEGMENT: Final = struct.Struct("<IIQQQQQQ")
DYNAMIC: Final = struct.Struct("<qQ")
IDENTITY: Final = b"\x7fELF\x02\x01"  # 64 bits, little-endian
PT_LOAD: Final = 1
PT_DYNAMIC: Final = 2
PT_INTERP: Final = 3
DT_NULL: Final = 0
DT_NEEDED: Final = 1
DT_STRTAB: Final = 5
SEGMENTS_MAX: Final = 64
DYNAMIC_MAX: Final = 512  # entries; a large program has some thirty


class WrongElf(Exception):
    """A file that is none, or is damaged."""


class Needs(NamedTuple):
    """Names of libraries, and the path of the interpreter (empty for a library)."""

    libraries: tuple[str, ...]
    interpreter: str


class _Segment(NamedTuple):
    kind: int
    offset: int
    address: int
    size: int


def is_elf(data: bytes) -> bool:
    """Whether it is a program or library of a kind that this module reads."""
    return data.startswith(IDENTITY)


def needs_of(data: bytes) -> Needs:
    """What it needs. Raises WrongElf."""
    if not is_elf(data):
        raise WrongElf("no 64-bit little-endian ELF file")
    try:
        segments = _segments(data)
        interpreter = ""
        for segment in segments:
            if segment.kind == PT_INTERP:
                interpreter = _text(data, segment.offset)
        for segment in segments:
            if segment.kind == PT_DYNAMIC:
                return Needs(_libraries(data, segment, segments), interpreter)
    except (struct.error, ValueError) as error:
        raise WrongElf(str(error)) from error
    return Needs((), interpreter)  # static


def _segments(data: bytes) -> list[_Segment]:
    fields = HEADER.unpack_from(data)
    offset, size, count = fields[5], fields[9], fields[10]
    if count > SEGMENTS_MAX:
        raise WrongElf(f"{count} segments, {SEGMENTS_MAX} are expected at most")
    found = []
    for number in range(count):
        kind, _, start, address, _, length, _, _ = SEGMENT.unpack_from(data, offset + number * size)
        found.append(_Segment(kind, start, address, length))
    return found


def _libraries(data: bytes, dynamic: _Segment, segments: list[_Segment]) -> tuple[str, ...]:
    needed: list[int] = []
    strings = None
    for number in range(min(dynamic.size // DYNAMIC.size, DYNAMIC_MAX)):
        tag, value = DYNAMIC.unpack_from(data, dynamic.offset + number * DYNAMIC.size)
        if tag == DT_NULL:
            break
        if tag == DT_NEEDED:
            needed.append(value)
        elif tag == DT_STRTAB:
            strings = _offset(value, segments)
    if needed and strings is None:
        raise WrongElf("it names libraries and has no names")
    return tuple(_text(data, strings + each) for each in needed) if strings is not None else ()


def _offset(address: int, segments: list[_Segment]) -> int:
    """Where in the file that is which is loaded at an address."""
    for segment in segments:
        if segment.kind == PT_LOAD and 0 <= address - segment.address < segment.size:
            return segment.offset + address - segment.address
    raise WrongElf(f"nothing is loaded at {address:#x}")


def _text(data: bytes, offset: int) -> str:
    return data[offset : data.index(b"\0", offset)].decode()

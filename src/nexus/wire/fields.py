"""Bounded field types: `size: Annotated[int, U16()]`, `data: Annotated[bytes, Blob(size_max=256)]`.

Each is a msgspec.Meta, so the decoder refuses a value out of bounds before anything is kept.
"""

import sys
from typing import Final

from msgspec import Meta

F64_MAX: Final = sys.float_info.max
INT_MAX: Final = (1 << 63) - 1  # msgspec checks integer bounds only inside 64-bit signed range


def U8(*, minimum: int = 0, maximum: int = 0xFF) -> Meta:
    """An unsigned integer of 8 bits."""
    return Meta(ge=minimum, le=maximum)


def U16(*, minimum: int = 0, maximum: int = 0xFFFF) -> Meta:
    """An unsigned integer of 16 bits."""
    return Meta(ge=minimum, le=maximum)


def U32(*, minimum: int = 0, maximum: int = 0xFFFF_FFFF) -> Meta:
    """An unsigned integer of 32 bits."""
    return Meta(ge=minimum, le=maximum)


def U64(*, minimum: int = 0) -> Meta:
    """An unsigned integer of 64 bits; MessagePack has no larger one."""
    return Meta(ge=minimum)


def I64() -> Meta:
    """A signed integer of 64 bits."""
    return Meta(ge=-INT_MAX - 1, le=INT_MAX)


def F64() -> Meta:
    """A finite double; infinities and every NaN are refused."""
    return Meta(ge=-F64_MAX, le=F64_MAX)


def Bool() -> Meta:
    """True or False."""
    return Meta()


def Blob(*, size_max: int, size_min: int = 0) -> Meta:
    """Bytes, bounded by size."""
    return Meta(min_length=size_min, max_length=size_max)


def Text(*, size_max: int, size_min: int = 0, pattern: str | None = None) -> Meta:
    """A string, bounded by its number of characters."""
    return Meta(min_length=size_min, max_length=size_max, pattern=pattern)


def List(*, count_max: int, count_min: int = 0) -> Meta:
    """A list, bounded by count."""
    return Meta(min_length=count_min, max_length=count_max)

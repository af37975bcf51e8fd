"""How large a declared type can get on the wire. A type without a bound is refused here."""

from enum import Enum
from typing import Any, Final

import msgspec

INT_SIZES: Final = ((0x7F, 1), (0xFF, 2), (0xFFFF, 3), (0xFFFF_FFFF, 5))  # (largest, bytes)
INT_SIZE_MAX: Final = 9
FLOAT_SIZE: Final = 9
UTF8_SIZE_MAX: Final = 4  # bytes of one character


def encoded_size_max(declared: Any) -> int:
    """Bytes the encoding of any value of `declared` fits in; AssertionError if unbounded."""
    return _size_max(msgspec.inspect.type_info(declared))


def _size_max(info: msgspec.inspect.Type) -> int:
    match info:
        case msgspec.inspect.StructType(fields=fields):
            return _array_size(len(fields)) + sum(_size_max(field.type) for field in fields)
        case msgspec.inspect.IntType(ge=lowest, le=highest):
            return _int_size(lowest, highest)
        case msgspec.inspect.FloatType():
            return FLOAT_SIZE
        case msgspec.inspect.BoolType() | msgspec.inspect.NoneType():
            return 1
        case msgspec.inspect.StrType(max_length=int(count)):
            return _text_size(count * UTF8_SIZE_MAX)
        case msgspec.inspect.BytesType(max_length=int(size)):
            return size + (2 if size <= 0xFF else 3)
        case msgspec.inspect.ListType(item_type=item, max_length=int(count)):
            return _array_size(count) + count * _size_max(item)
        case msgspec.inspect.TupleType(item_types=items):
            return _array_size(len(items)) + sum(_size_max(item) for item in items)
        case msgspec.inspect.UnionType(types=types):
            return max(_size_max(each) for each in types)
        case msgspec.inspect.EnumType(cls=cls):
            return max(_value_size(member) for member in cls)
        case _:
            raise AssertionError(f"a field of type {info!r} has no bound on the wire")


def _int_size(lowest: float | None, highest: float | None) -> int:
    if lowest is None or lowest < 0 or highest is None:
        return INT_SIZE_MAX
    return next((size for largest, size in INT_SIZES if highest <= largest), INT_SIZE_MAX)


def _text_size(size: int) -> int:
    return size + (1 if size <= 31 else 2 if size <= 0xFF else 3)


def _array_size(count: int) -> int:
    return 1 if count <= 15 else 3


def _value_size(member: Enum) -> int:
    return len(msgspec.msgpack.encode(member))

"""Hypothesis strategies made from a protocol's declaration, and nothing else."""

from collections.abc import Callable
from typing import Any, Final

from hypothesis import strategies as st
from msgspec import inspect

from nexus.wire import (
    FLAG_BATCH,
    HEADER,
    REPLY_BIT,
    Codec,
    Protocol,
    ReplyStatus,
    encode,
)

INT_MIN: Final = -(1 << 63)
U64_MAX: Final = (1 << 64) - 1
LIST_COUNT_MAX: Final = 12  # elements drawn; the bound of the type still holds
SIZE_MAX: Final = 300  # bytes or characters drawn; beyond every short form of a length


def messages(declared: Any) -> st.SearchStrategy[Any]:
    """Values of a message class, within its bounds."""
    return _values(inspect.type_info(declared))


def _values(info: inspect.Type) -> st.SearchStrategy[Any]:
    match info:
        case inspect.StructType(cls=cls, fields=fields):
            return st.builds(cls, *(_values(field.type) for field in fields))
        case inspect.IntType(ge=lowest, le=highest):
            return st.integers(
                INT_MIN if lowest is None else int(lowest),
                U64_MAX if highest is None else int(highest),
            )
        case inspect.FloatType():
            return st.floats(allow_nan=False, allow_infinity=False)
        case inspect.BoolType():
            return st.booleans()
        case inspect.NoneType():
            return st.none()
        case inspect.StrType(min_length=shortest, max_length=longest, pattern=pattern):
            if pattern is not None:
                return st.from_regex(pattern, fullmatch=True).filter(_fits(shortest, longest))
            return st.text(
                st.characters(codec="utf-8"),
                min_size=shortest or 0,
                max_size=_drawn(longest, SIZE_MAX, shortest),
            )
        case inspect.BytesType(min_length=shortest, max_length=longest):
            return st.binary(min_size=shortest or 0, max_size=_drawn(longest, SIZE_MAX, shortest))
        case inspect.ListType(item_type=item, min_length=shortest, max_length=longest):
            return st.lists(
                _values(item),
                min_size=shortest or 0,
                max_size=_drawn(longest, LIST_COUNT_MAX, shortest),
            )
        case inspect.TupleType(item_types=items):
            return st.tuples(*(_values(item) for item in items))
        case inspect.UnionType(types=types):
            return st.one_of(*(_values(each) for each in types))
        case inspect.EnumType(cls=cls):
            return st.sampled_from(list(cls))
        case _:
            raise AssertionError(f"no strategy for {info!r}")


def _drawn(bound: int | None, drawn: int, least: int | None = None) -> int:
    """The largest size to draw: `drawn`, within the type's own bounds."""
    assert bound is not None, "wire refuses a type without a bound"
    return max(least or 0, min(bound, drawn))


def _fits(shortest: int | None, longest: int | None) -> Callable[[str], bool]:
    return lambda text: (shortest or 0) <= len(text) <= (len(text) if longest is None else longest)


def headers(codec: Codec, op: int, *, flags: int = 0) -> st.SearchStrategy[bytes]:
    """Headers of a request or reply of `codec`; everything that names the call is arbitrary."""
    kind, version, _, _, number, _ = _prefix(codec)
    return st.builds(
        lambda nonce, deadline, trace, span: HEADER.pack(
            kind, version, op, flags, number, 0, nonce, deadline, trace, span
        ),
        st.integers(0, U64_MAX),
        st.integers(0, U64_MAX),
        st.binary(min_size=16, max_size=16),
        st.binary(min_size=8, max_size=8),
    )


def request_frames(codec: Codec) -> st.SearchStrategy[bytes]:
    """Frames that a correct client sends, one request or a batch of up to two."""
    single = st.builds(_joined, headers(codec, codec.op), messages(codec.request_type))
    batch = st.builds(
        _joined,
        headers(codec, codec.op, flags=FLAG_BATCH),
        st.lists(messages(codec.request_type), min_size=1, max_size=min(2, codec.batch_count_max)),
    )
    return st.one_of(single, batch) if codec.batches else single


def reply_frames(codec: Codec) -> st.SearchStrategy[bytes]:
    """Frames that a correct server sends: the reply, or a declared refusal."""
    op = codec.op | REPLY_BIT
    reply = st.builds(_joined, headers(codec, op), messages(codec.reply_type))
    statuses = [int(status) for status in codec.statuses.values() if status is not ReplyStatus.OK]
    refusal = st.builds(_with_status, headers(codec, op), st.sampled_from(statuses))
    return st.one_of(reply, refusal)


def codecs(protocol: Protocol) -> st.SearchStrategy[Codec]:
    """One of the protocol's requests."""
    return st.sampled_from(list(protocol.codecs.values()))


def _joined(header: bytes, body: Any) -> bytes:
    return header + encode(body)


def _with_status(header: bytes, status: int) -> bytes:
    return header[:6] + status.to_bytes(2, "little") + header[8:]


def _prefix(codec: Codec) -> tuple[int, ...]:
    kind, version, op, flags = codec.prefix[:4]
    number = int.from_bytes(codec.prefix[4:6], "little")
    return kind, version, op, flags, number, 0

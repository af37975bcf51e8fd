from enum import IntEnum
from typing import Annotated, Any

import msgspec
import pytest

from nexus.wire import (
    BATCH_COUNT_MAX,
    BODY_SIZE_MAX,
    F64,
    FRAME_KIND,
    HEADER_SIZE,
    I64,
    INLINE_SIZE_MAX,
    OP_INDEX,
    REPLY_BIT,
    U8,
    U16,
    U64,
    Blob,
    Bool,
    Header,
    List,
    Message,
    Protocol,
    RemoteProtocolError,
    ReplyStatus,
    Request,
    Text,
    answer,
    encode,
    encoded_size_max,
    nonce_of,
    pack_header,
    status_of,
    unpack_header,
)
from tests.fakes.adder import ADDER, Add, AdderStatus, Large, Later, Sum


class Colour(IntEnum):
    """A closed set."""

    RED = 1
    BLUE = 300


class Inner(Message):
    """Nested."""

    flag: Annotated[bool, Bool()]
    colour: Colour


class Everything(Message):
    """One field of each kind."""

    small: Annotated[int, U8(minimum=1, maximum=5)]
    wide: Annotated[int, U64()]
    signed: Annotated[int, I64()]
    real: Annotated[float, F64()]
    data: Annotated[bytes, Blob(size_max=4, size_min=1)]
    name: Annotated[str, Text(size_max=3)]
    rows: Annotated[list[Inner], List(count_max=2)]
    maybe: Annotated[int, U16()] | None


class Ask(Request[Everything], op=1, idempotent=True):
    """Returns everything."""

    what: Everything


PROTOCOL = Protocol("everything", number=901, version=1, requests=(Ask,))
DECODE = PROTOCOL.codecs[Ask].decode_reply
GOOD = Everything(5, (1 << 64) - 1, -1, 0.5, b"x", "\u00e4bc", [Inner(True, Colour.BLUE)], None)


def fields(**changes: Any) -> bytes:
    """GOOD with raw values in place of some fields."""
    values = msgspec.to_builtins(GOOD, builtin_types=(bytes,))
    names = Everything.__struct_fields__
    for name, value in changes.items():
        values[names.index(name)] = value
    return encode(values)


def test_what_the_encoder_produces_is_decoded() -> None:
    assert DECODE(encode(GOOD)) == GOOD
    assert DECODE(fields()) == GOOD


@pytest.mark.parametrize(
    "body",
    [
        b"",
        encode(GOOD) + b"\0",
        encode(GOOD)[:-1],
        b"\x90",
        b"\xc0",
        b"\xdc\x00\x08" + encode(GOOD)[1:],
        encode(GOOD).replace(b"\x98\x05", b"\x98\xcc\x05", 1),
        encode(GOOD).replace(b"\xff" * 9, b"\xff" * 8, 1),
        encode(GOOD).replace(b"\xc4\x01x", b"\xc5\x00\x01x", 1),
        encode(GOOD).replace(b"\xa4", b"\xd9\x04", 1),
        fields(small=0),
        fields(small=6),
        fields(small=True),
        fields(small=2.0),
        fields(small="2"),
        fields(wide=-1),
        fields(signed=1 << 63),
        fields(real=1),
        fields(real=float("nan")),
        fields(real=float("inf")),
        encode(GOOD).replace(b"\xcb" + bytes.fromhex("3fe0000000000000"), b"\xca\x3f\0\0\0", 1),
        fields(data=b""),
        fields(data=b"12345"),
        fields(data="x"),
        fields(name="abcd"),
        fields(name=b"abc"),
        encode(GOOD).replace("\u00e4".encode(), b"\xff\xff", 1),
        fields(rows=[[True, 1]] * 3),
        fields(rows=[[True]]),
        fields(rows=[[True, 1, 1]]),
        fields(rows=[[1, 1]]),
        fields(rows=[[True, 2]]),
        fields(rows={"flag": True}),
        fields(maybe=1 << 16),
        fields(maybe=msgspec.msgpack.Ext(1, b"x")),
        b"\x91" * 100_000,
        b"\xdf\xff\xff\xff\xff",
        b"\xdd\xff\xff\xff\xff",
    ],
)
def test_anything_else_is_a_remote_protocol_error(body: bytes) -> None:
    assert body != encode(GOOD)

    with pytest.raises(RemoteProtocolError):
        DECODE(body)


def test_a_batch_holds_1_to_its_bound_requests() -> None:
    codec = ADDER.codecs[Add]

    assert codec.decode_requests(encode([Add(1, 2)] * 2)) == [Add(1, 2)] * 2
    assert codec.batch_count_max == BATCH_COUNT_MAX
    for wrong in ([], [Add(1, 2)] * (BATCH_COUNT_MAX + 1), Add(1, 2), [Add(1, 2), 3]):
        with pytest.raises(RemoteProtocolError):
            codec.decode_requests(encode(wrong))


def test_a_batch_is_only_as_long_as_its_largest_replies_fit_a_frame() -> None:
    codec = ADDER.codecs[Large]

    assert codec.batch_count_max == 1
    assert codec.batch_count_max * codec.reply_item_size_max < BODY_SIZE_MAX


def test_the_items_of_a_batch_reply_are_replies_or_declared_refusals() -> None:
    codec = ADDER.codecs[Add]

    items = codec.decode_items(encode([Sum(1), AdderStatus.TOO_LARGE, ReplyStatus.BUSY]), 3)

    assert items == [Sum(1), AdderStatus.TOO_LARGE, ReplyStatus.BUSY]
    for wrong in ([Sum(1)], [0, 4, 4], [6, 4, 4], [999, 4, 4]):
        with pytest.raises(RemoteProtocolError):
            codec.decode_items(encode(wrong), 3)
    assert codec.decode_replies(encode([Sum(1)]), 1) == [Sum(1)]
    with pytest.raises(RemoteProtocolError):
        codec.decode_replies(encode([4]), 1)


def test_a_header_is_48_bytes_and_comes_back_as_it_was() -> None:
    header = Header(FRAME_KIND, 1, 2, 0, 3, 4, 5, 6, bytes(range(16)), bytes(range(8)))  # type: ignore[arg-type]

    data = pack_header(header)

    assert len(data) == HEADER_SIZE == 48
    assert unpack_header(data) == header
    assert (nonce_of(data), status_of(data)) == (5, 4)
    assert unpack_header(data[:-1]) is None


@pytest.mark.parametrize("size", [1, 10, 16, 47, 48, 60])
def test_an_answer_returns_whatever_there_is_of_the_header(size: int) -> None:
    request = bytes([FRAME_KIND, 1, 2, 0, 3, 0, 0, 0]) + bytes(range(52))

    reply = answer(request[:size], ReplyStatus.MALFORMED)

    assert len(reply) == HEADER_SIZE
    assert reply[0] == FRAME_KIND
    assert reply[OP_INDEX] == (2 if size > OP_INDEX else 0) | REPLY_BIT
    assert status_of(reply) == ReplyStatus.MALFORMED
    assert reply[8:size] == request[8 : min(size, 48)]


def test_the_bound_of_a_message_is_never_less_than_its_encoding() -> None:
    largest = Everything(
        5, (1 << 64) - 1, -(1 << 63), 1e300, b"1234", "\U0001f600" * 3, [GOOD.rows[0]] * 2, 65535
    )

    assert len(encode(largest)) <= encoded_size_max(Everything) <= len(encode(largest)) + 6


def test_a_largest_blob_fits_a_frame() -> None:
    class Full(Message):
        """As large as it gets."""

        data: Annotated[bytes, Blob(size_max=INLINE_SIZE_MAX)]

    assert encoded_size_max(Full) <= BODY_SIZE_MAX


def test_a_field_without_a_bound_is_refused_at_declaration() -> None:
    class Endless(Message):
        """No bound."""

        data: bytes

    with pytest.raises(AssertionError, match="no bound"):
        encoded_size_max(Endless)


def test_a_declaration_is_checked() -> None:
    class Low(IntEnum):
        """A number that every protocol shares."""

        TAKEN = 3

    class Twice(Request[Sum], op=1, idempotent=True):
        """The op of Add."""

    class Shared(Request[Sum], op=9, idempotent=True, refuses=Low):
        """Refuses with a shared number."""

    with pytest.raises(AssertionError, match="given twice"):
        Protocol("x", number=1, version=1, requests=(Add, Twice))
    with pytest.raises(AssertionError, match="TAKEN"):
        Protocol("x", number=1, version=1, requests=(Shared,))
    with pytest.raises(AssertionError, match="no request"):
        Protocol("x", number=1, version=1, requests=(Sum,))
    with pytest.raises(AssertionError, match="may be repeated"):

        class Silent(Request[Sum], op=2):
            """Does not say whether it may be repeated."""


def test_a_declaration_is_kept_on_the_request_class() -> None:
    assert (Add.INFO.op, Add.INFO.idempotent, Add.INFO.moves) == (1, True, False)
    assert Add.INFO.reply is Sum
    assert Later.INFO.idempotent is False
    assert not hasattr(Sum, "INFO")
    assert ADDER.dispatch[ADDER.codecs[Add].prefix] is ADDER.codecs[Add]

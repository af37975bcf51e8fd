"""A line as it lies in a ring: a short form for what most lines are, and one for all.

    short  SHORT | level | size of the head, with these 3 bytes | scope SCOPE_END keys
           then MessagePack: [written, text, trace and span, value, ...]
    any    MessagePack: [level, written, scope, text, keys, [value, ...], trace, span]

The head of a short line is the same for every line of a level, scope and set of keys: the writer
keeps it ready, and a reader who has looked at one knows the others at a glance. So what follows it
is not looked at before somebody reads the line, and may be anything: a part that is not what it
should be is shown as UNREADABLE, or left out.

`written` is the writer's clock (ns, 0 if it had none), `keys` are the fields' keys in one string,
separated by KEY_SEPARATOR, so that a reader knows a whole set of them at a glance; `trace` and
`span` are empty if the line belongs to no call. A value that is no text is packed as it is, and
shown as str() shows it. Who has written it stands nowhere: that is the
kernel's to say.
"""

from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Annotated, Any, Final, TypeVar

import msgspec

from nexus.protocols.logd import SPAN_SIZE, TRACE_SIZE, Append, Field, Level
from nexus.wire import U8, U64, Blob

T = TypeVar("T")
KEY_SEPARATOR: Final = " "  # no key has one
LEVEL_INDEX: Final = 1  # of the byte that is the level, in both forms
SHORT: Final = 1  # the first byte of a short line; no array of 8 begins with it
HEAD_SIZE_INDEX: Final = 2  # of the byte behind the level: the size of a short line's head
HEAD_BEGIN: Final = 3
HEAD_SIZE_MAX: Final = 255  # bytes
SCOPE_END: Final = b"\x1f"  # no key has one, and no scope of a short line
PARTS: Final = 3  # of a short line before its values
UNREADABLE: Final = "?"  # stands for a text or a value that is none
PAYLOAD_OVERHEAD_MAX: Final = 96  # bytes besides scope, text, keys and values of a line of one key


class Payload(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, gc=False):
    """A line of a ring. What it may be beyond these types, logd looks at."""

    level: Annotated[int, U8(maximum=int(max(Level)))]
    written: Annotated[int, U64()]
    scope: str
    text: str
    keys: str
    values: list[str | int | float | bool | None]
    trace: Annotated[bytes, Blob(size_max=TRACE_SIZE)]
    span: Annotated[bytes, Blob(size_max=SPAN_SIZE)]

    @property
    def fields(self) -> list[Field]:
        """Keys and values, in order; what is too many of the one or the other is left out."""
        names = self.keys.split(KEY_SEPARATOR) if self.keys else []
        return [
            Field(key, value if type(value) is str else str(value))
            for key, value in zip(names, self.values, strict=False)
        ]


_encoder: Final = msgspec.msgpack.Encoder()
pack: Final = _encoder.encode
"""The bytes of a Payload, or of a tuple of what it has."""

pack_into: Final = _encoder.encode_into
"""The same, behind so many bytes of a bytearray, which ends with it then."""

_array: Final = msgspec.msgpack.Decoder(Payload).decode
_written: Final = msgspec.msgpack.Decoder(Annotated[int, U64()]).decode
_text: Final = msgspec.msgpack.Decoder(str).decode
_ids: Final = msgspec.msgpack.Decoder(bytes).decode
_value: Final = msgspec.msgpack.Decoder(str | int | float | bool | None).decode
_parts: Final = msgspec.msgpack.Decoder(list[msgspec.Raw]).decode

NO_PAYLOAD: Final = (msgspec.DecodeError, UnicodeDecodeError)


def unpack(data: bytes) -> Payload:
    """The Payload in these bytes, its keys sorted; raises one of NO_PAYLOAD."""
    return _short(data) if data[:1] == _SHORT else _array(data)


def head_of(level: int, scope: str, keys: Sequence[str]) -> bytes | None:
    """What a short line begins with; None if it cannot be one."""
    body = SCOPE_END.join((scope.encode(), KEY_SEPARATOR.join(keys).encode()))
    size = HEAD_BEGIN + len(body)
    if size > HEAD_SIZE_MAX or body.count(SCOPE_END) != 1:
        return None
    return bytes((SHORT, level, size)) + body


def _short(data: bytes) -> Payload:
    if len(data) < HEAD_BEGIN or not HEAD_BEGIN <= data[HEAD_SIZE_INDEX] <= len(data):
        raise msgspec.DecodeError("no head")
    size = data[HEAD_SIZE_INDEX]
    scope, end, names = data[HEAD_BEGIN:size].partition(SCOPE_END)
    level = data[LEVEL_INDEX]
    if not end or level > max(Level):
        raise msgspec.DecodeError("no head")
    try:
        parts = _parts(data[size:])
    except NO_PAYLOAD:
        parts = []
    keys = names.decode().split(KEY_SEPARATOR) if names else []
    values = [_or(_value, each, UNREADABLE) for each in parts[PARTS : PARTS + len(keys)]]
    values += [UNREADABLE] * (len(keys) - len(values))
    pairs = sorted(zip(keys, values, strict=True), key=itemgetter(0))
    written, text, ids, *_ = (*parts, _NOTHING, _NOTHING, _NOTHING)
    both = _or(_ids, ids, b"")
    if len(both) != TRACE_SIZE + SPAN_SIZE:
        both = b""
    return Payload(
        level=level,
        written=_or(_written, written, 0),
        scope=scope.decode(),
        text=_or(_text, text, UNREADABLE),
        keys=KEY_SEPARATOR.join(key for key, _ in pairs),
        values=[value for _, value in pairs],
        trace=both[:TRACE_SIZE],
        span=both[TRACE_SIZE:],
    )


def _or(decode: Callable[[msgspec.Raw], T], part: msgspec.Raw, otherwise: T) -> T:
    try:
        return decode(part)
    except NO_PAYLOAD:
        return otherwise


_SHORT: Final = bytes((SHORT,))
_NOTHING: Final = msgspec.Raw(b"")


def packed(request: Append, written: int = 0, trace: bytes = b"", span: bytes = b"") -> bytes:
    """The payload of a line that could be sent as `request`; its keys are keys."""
    keys = KEY_SEPARATOR.join(field.key for field in request.fields)
    values: Any = [field.value for field in request.fields]
    return pack(
        (int(request.level), written, request.scope, request.text, keys, values, trace, span)
    )


def sendable(payload: Payload) -> Append:
    """The request that brings this line as a message."""
    return Append(Level(payload.level), payload.scope, payload.text, payload.fields)

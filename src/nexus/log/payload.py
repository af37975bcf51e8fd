"""A line as it lies in a ring: one MessagePack array, made and read in one go.

    [level, written, scope, text, keys, [value, ...], trace, span]

`written` is the writer's clock (ns, 0 if it had none), `keys` are the fields' keys in one string,
separated by KEY_SEPARATOR, so that a reader knows a whole set of them at a glance; `trace` and
`span` are empty if the line belongs to no call. A value that is no text is packed as it is, and
shown as str() shows it. Who has written it stands nowhere: that is the
kernel's to say.
"""

from typing import Annotated, Any, Final

import msgspec

from nexus.protocols.logd import SPAN_SIZE, TRACE_SIZE, Append, Field, Level
from nexus.wire import U8, U64, Blob

KEY_SEPARATOR: Final = " "  # no key has one
LEVEL_INDEX: Final = 1  # of the byte that is the level: behind the head of an array of 8
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


pack: Final = msgspec.msgpack.Encoder().encode
"""The bytes of a Payload, or of a tuple of what it has."""

unpack: Final = msgspec.msgpack.Decoder(Payload).decode
"""The Payload in these bytes; raises one of NO_PAYLOAD."""

NO_PAYLOAD: Final = (msgspec.DecodeError, UnicodeDecodeError)


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

"""Declare a protocol once: messages, requests, statuses; everything else is derived. ::

class Entropy(Message):
    data: Annotated[bytes, Blob(size_max=256)]

class GetEntropy(Request[Entropy], op=1, idempotent=True, refuses=RngdStatus):
    size: Annotated[int, U16()]

PROTOCOL: Final = Protocol("rngd", number=7, version=1, requests=(GetEntropy,))
"""

from collections.abc import Callable
from enum import IntEnum
from typing import Any, ClassVar, Final, Generic, TypeVar, dataclass_transform, get_args, get_origin

import msgspec

from nexus.wire.bounds import encoded_size_max
from nexus.wire.frame import (
    BODY_SIZE_MAX,
    FLAG_BATCH,
    FRAME_KIND,
    OP_MAX,
    PREFIX,
    REPLY_BIT,
)

BATCH_COUNT_MAX: Final = 256  # requests in one packet; 64 already amortises the packet
BATCH_PREFIX_SIZE_MAX: Final = 3  # bytes of the array header in front of a batch
STATUS_ITEM_SIZE_MAX: Final = 3  # bytes of a status that stands for a reply in a batch


class RemoteProtocolError(Exception):
    """The peer sent bytes that its protocol does not allow."""


class ReplyStatus(IntEnum):
    """Statuses of a reply frame that every protocol shares; a protocol's own start at 16."""

    OK = 0
    MALFORMED = 1  # the body is not what the encoder of this request produces
    UNSUPPORTED = 2  # unknown protocol, version, op or flag
    EXPIRED = 3  # the deadline had passed when the request was taken from the queue
    DENIED = 4  # the caller may not
    BUSY = 5  # a bound of the server is reached; nothing was done
    REFUSED_ITEM = 6  # a batch holds refusals; they stand in the body


OWN_STATUS_MIN: Final = 16  # first number of a protocol's own statuses
STATUS_MAX: Final = 0xFFFF

ReplyT_co = TypeVar("ReplyT_co", covariant=True)


class RequestInfo:
    """What a request's class statement declared.

    `moves`: a capability may travel with it; `gives`: one may travel with its reply.
    """

    __slots__ = ("gives", "idempotent", "moves", "op", "refuses", "reply", "request")

    def __init__(
        self,
        request: type,
        op: int,
        reply: type,
        idempotent: bool,
        refuses: type[IntEnum] | None,
        moves: bool,
        gives: bool,
    ) -> None:
        self.request = request
        self.op = op
        self.reply = reply
        self.idempotent = idempotent
        self.refuses = refuses
        self.moves = moves
        self.gives = gives


@dataclass_transform(frozen_default=True, field_specifiers=(msgspec.field,))
class _Meta(msgspec.StructMeta):
    """Takes what RequestInfo holds from a class statement; the rest is msgspec's."""

    def __new__(
        mcls,
        name: str,
        bases: tuple[type, ...],
        namespace: dict[str, Any],
        *,
        op: int | None = None,
        idempotent: bool | None = None,
        refuses: type[IntEnum] | None = None,
        moves: bool = False,
        gives: bool = False,
        **options: Any,
    ) -> Any:
        cls = super().__new__(mcls, name, bases, namespace, **options)
        if op is not None:
            assert idempotent is not None, f"{name}: say whether it may be repeated"
            reply = next(
                get_args(base)[0]
                for base in namespace["__orig_bases__"]
                if get_origin(base) is Request
            )
            info = RequestInfo(cls, op, reply, idempotent, refuses, moves, gives)
            cls.INFO = info  # type: ignore[attr-defined]
        return cls


class Message(
    msgspec.Struct,
    metaclass=_Meta,
    array_like=True,
    frozen=True,
    gc=False,
    forbid_unknown_fields=True,
):
    """Base of every message: an array on the wire, exactly as many elements as fields."""


class Request(Message, Generic[ReplyT_co]):
    """Base of every request; `Request[Reply]` names what is returned."""

    INFO: ClassVar[RequestInfo]


encode: Final = msgspec.msgpack.Encoder().encode


DECODE_ERRORS: Final = (msgspec.DecodeError, UnicodeDecodeError)


def strict_decoder(declared: Any) -> Callable[[bytes], Any]:
    """A function that decodes exactly what the encoder produces for the type `declared`.

    It raises RemoteProtocolError for anything else. Encoding the value again refuses in one
    comparison what a decoder lets through: integers and lengths in a longer form than needed, an
    integer where a float belongs, left-out defaults. A closure, because each call runs it twice.
    """
    decode = msgspec.msgpack.Decoder(declared).decode
    encode_again = encode
    errors = DECODE_ERRORS

    def decode_strict(body: bytes) -> Any:
        try:
            value = decode(body)
        except errors as error:
            raise RemoteProtocolError(str(error)) from error
        if encode_again(value) != body:
            raise RemoteProtocolError("not in the form the encoder produces")
        return value

    return decode_strict


class Codec:
    """What is derived from one request of one protocol: prefixes, decoders, bounds, statuses.

    A prefix is the first 8 bytes of a header, which name everything but the call itself: a
    frame whose first 8 bytes are known needs no further look at its protocol, version or op.
    `decode_request` and `decode_reply` take a body and raise RemoteProtocolError. `batches`: many
    may go in one packet, which carries no capability in either direction.
    """

    __slots__ = (
        "_decode_items",
        "_decode_replies",
        "_decode_requests",
        "batch_count_max",
        "batch_prefix",
        "batch_reply_prefix",
        "batches",
        "decode_reply",
        "decode_request",
        "gives",
        "idempotent",
        "info",
        "moves",
        "op",
        "prefix",
        "reply_item_size_max",
        "reply_prefix",
        "reply_size_max",
        "reply_type",
        "request_size_max",
        "request_type",
        "statuses",
    )

    batch_count_max: int
    decode_reply: Callable[[bytes], Any]
    decode_request: Callable[[bytes], Any]
    reply_item_size_max: int
    reply_size_max: int
    request_size_max: int

    def __init__(self, info: RequestInfo, number: int, version: int) -> None:
        self.info = info
        self.op = info.op
        self.idempotent = info.idempotent
        self.moves = info.moves
        self.gives = info.gives
        self.batches = not (info.moves or info.gives)
        self.request_type = info.request
        self.reply_type = info.reply
        reply_op = info.op | REPLY_BIT
        self.prefix = PREFIX.pack(FRAME_KIND, version, info.op, 0, number, 0)
        self.reply_prefix = PREFIX.pack(FRAME_KIND, version, reply_op, 0, number, 0)
        self.batch_prefix = PREFIX.pack(FRAME_KIND, version, info.op, FLAG_BATCH, number, 0)
        self.batch_reply_prefix = PREFIX.pack(FRAME_KIND, version, reply_op, FLAG_BATCH, number, 0)
        self.statuses: dict[int, IntEnum] = {
            status: status for status in (*ReplyStatus, *(info.refuses or ()))
        }

    def __getattr__(self, name: str) -> Any:
        """Called for what is not derived yet, once. A program speaks a few requests of the many it
        imports, and deriving all of them takes longer than importing them."""
        derive = _DERIVED.get(name)
        if derive is None:
            raise AttributeError(f"a codec has no {name!r}")
        value = derive(self)
        setattr(self, name, value)
        return value

    def derive(self) -> None:
        """Derive everything now, for those who are forked from here."""
        for name in _DERIVED:
            _ = getattr(self, name)

    def decode_requests(self, body: bytes) -> list[Any]:
        """The requests of a batch, 1 to `batch_count_max`, or RemoteProtocolError."""
        requests: list[Any] = self._decode_requests(body)
        if not 1 <= len(requests) <= self.batch_count_max:
            raise RemoteProtocolError(f"a batch of {len(requests)} requests")
        return requests

    def decode_replies(self, body: bytes, count: int) -> list[Any]:
        """One reply per request of a batch, or RemoteProtocolError."""
        return self._counted(self._decode_replies(body), count)

    def decode_items(self, body: bytes, count: int) -> list[Any]:
        """One reply or declared status (an IntEnum) per request, or RemoteProtocolError."""
        items = self._counted(self._decode_items(body), count)
        return [
            item if type(item) is self.reply_type else self._item_status(item) for item in items
        ]

    def _counted(self, items: list[Any], count: int) -> list[Any]:
        if len(items) != count:
            raise RemoteProtocolError(f"{len(items)} answers to {count} requests")
        return items

    def _item_status(self, number: int) -> IntEnum:
        status = self.statuses.get(number)
        if status is None or status in (ReplyStatus.OK, ReplyStatus.REFUSED_ITEM):
            raise RemoteProtocolError(f"status {number} is no refusal of an item")
        return status


def _batch_count_max(codec: Codec) -> int:
    fitting = (BODY_SIZE_MAX - BATCH_PREFIX_SIZE_MAX) // codec.reply_item_size_max
    return max(1, min(BATCH_COUNT_MAX, fitting))


_DERIVED: Final[dict[str, Callable[[Codec], Any]]] = {
    "decode_request": lambda codec: strict_decoder(codec.info.request),
    "decode_reply": lambda codec: strict_decoder(codec.info.reply),
    "_decode_requests": lambda codec: strict_decoder(list[codec.info.request]),  # type: ignore[name-defined]
    "_decode_replies": lambda codec: strict_decoder(list[codec.info.reply]),  # type: ignore[name-defined]
    "_decode_items": lambda codec: strict_decoder(list[codec.info.reply | int]),  # type: ignore[name-defined]
    "request_size_max": lambda codec: min(encoded_size_max(codec.info.request), BODY_SIZE_MAX),
    "reply_size_max": lambda codec: min(encoded_size_max(codec.info.reply), BODY_SIZE_MAX),
    "reply_item_size_max": lambda codec: max(codec.reply_size_max, STATUS_ITEM_SIZE_MAX),
    "batch_count_max": _batch_count_max,
}


class Protocol:
    """A named set of requests. `number` is its id on the wire, unique in the tree.

    `dispatch` finds a request's codec by the first 8 bytes of its frame, `codecs` by its class.
    """

    def __init__(self, name: str, *, number: int, version: int, requests: tuple[type, ...]) -> None:
        assert 0 <= number <= 0xFFFF
        assert 1 <= version <= 0xFF
        self.name = name
        self.number = number
        self.version = version
        self.requests: tuple[RequestInfo, ...] = tuple(
            request.INFO for request in requests if issubclass(request, Request)
        )
        assert len(self.requests) == len(requests), f"{name}: lists what is no request"
        self.by_op = {info.op: info for info in self.requests}
        assert len(self.by_op) == len(self.requests), f"{name}: an op is given twice"
        assert all(1 <= op <= OP_MAX for op in self.by_op), f"{name}: ops are 1..127"
        for info in self.requests:
            for status in info.refuses or ():
                assert OWN_STATUS_MIN <= status <= STATUS_MAX, f"{name}: {status!r}"
        self.codecs: dict[type, Codec] = {
            info.request: Codec(info, number, version) for info in self.requests
        }
        self.dispatch: dict[bytes, Codec] = {codec.prefix: codec for codec in self.codecs.values()}

    @property
    def request_size_max(self) -> int:
        """Bytes of the largest body of a request."""
        return max(codec.request_size_max for codec in self.codecs.values())

    @property
    def reply_size_max(self) -> int:
        """Bytes of the largest body of a reply."""
        return max(codec.reply_size_max for codec in self.codecs.values())

    def derive(self) -> None:
        """Derive what is derived of every request now."""
        for codec in self.codecs.values():
            codec.derive()

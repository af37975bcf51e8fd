"""Declare a protocol once: messages, requests, statuses; everything else is derived.

    class Entropy(Message):
        data: Annotated[bytes, Blob(size_max=256)]

    class GetEntropy(Request[Entropy], op=1, idempotent=True, refuses=RngdStatus):
        size: Annotated[int, U16()]

    PROTOCOL: Final = Protocol("rngd", number=7, version=1, requests=(GetEntropy,))
"""

from enum import IntEnum
from typing import Any, ClassVar, Final, Generic, TypeVar, get_args, get_origin

import msgspec

from nexus.wire.frame import OP_MAX

BATCH_COUNT_MAX: Final = 256  # requests in one packet; 64 already amortises the packet


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

ReplyT = TypeVar("ReplyT")


class _Meta(msgspec.StructMeta):
    """Takes op, idempotent, refuses and moves from a class statement, leaves the rest to msgspec."""

    def __new__(  # noqa: PYI034 (a metaclass returns a class)
        mcls,
        name: str,
        bases: tuple[type, ...],
        namespace: dict[str, Any],
        *,
        op: int | None = None,
        idempotent: bool | None = None,
        refuses: type[IntEnum] | None = None,
        moves: bool = False,
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
            INFO[cls] = RequestInfo(cls, op, reply, idempotent, refuses, moves)
        return cls


class Message(
    msgspec.Struct, array_like=True, frozen=True, gc=False, forbid_unknown_fields=True
):
    """Base of every message: an array on the wire, exactly as many elements as fields."""


class Request(Message, Generic[ReplyT], metaclass=_Meta):
    """Base of every request; `Request[Reply]` names what is returned."""


class RequestInfo:
    """What a request's class statement declared. `moves`: a capability may travel with it."""

    __slots__ = ("idempotent", "moves", "op", "refuses", "reply", "request")

    def __init__(
        self,
        request: type,
        op: int,
        reply: type,
        idempotent: bool,  # noqa: FBT001
        refuses: type[IntEnum] | None,
        moves: bool,  # noqa: FBT001
    ) -> None:
        self.request = request
        self.op = op
        self.reply = reply
        self.idempotent = idempotent
        self.refuses = refuses
        self.moves = moves


INFO: Final[dict[type, RequestInfo]] = {}


class Protocol:
    """A named set of requests. `number` is its id on the wire, unique in the tree."""

    REGISTRY: ClassVar[dict[int, "Protocol"]] = {}

    def __init__(
        self, name: str, *, number: int, version: int, requests: tuple[type, ...]
    ) -> None:
        self.name = name
        self.number = number
        self.version = version
        self.requests = tuple(INFO[request] for request in requests)
        self.by_op = {info.op: info for info in self.requests}
        assert 0 <= number <= 0xFFFF
        assert 1 <= version <= 0xFF
        assert len(self.by_op) == len(self.requests), f"{name}: an op is given twice"
        assert all(1 <= op <= OP_MAX for op in self.by_op), f"{name}: ops are 1..127"
        for info in self.requests:
            for status in info.refuses or ():
                assert OWN_STATUS_MIN <= status <= STATUS_MAX, f"{name}: {status!r}"


_ENCODER: Final = msgspec.msgpack.Encoder()
encode: Final = _ENCODER.encode


def decode_strict(decoder: "msgspec.msgpack.Decoder[Any]", body: bytes) -> Any:
    """Decode exactly what the encoder produces; RemoteProtocolError for anything else."""
    try:
        value = decoder.decode(body)
    except (msgspec.DecodeError, msgspec.ValidationError, UnicodeDecodeError) as error:
        raise RemoteProtocolError(str(error)) from error
    if encode(value) != body:
        raise RemoteProtocolError("not in the form the encoder produces")
    return value

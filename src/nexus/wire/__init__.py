"""The thin layer over msgspec: frame header, bounded field types, request declarations."""

from nexus.wire.fields import F64, I64, U8, U16, U32, U64, Blob, Bool, List, Text
from nexus.wire.frame import (
    BODY_SIZE_MAX,
    FLAG_BATCH,
    FLAG_MASK,
    FRAME_KIND,
    HEADER,
    HEADER_SIZE,
    OP_MAX,
    REPLY_BIT,
    Header,
    pack_header,
    unpack_header,
)
from nexus.wire.protocol import (
    BATCH_COUNT_MAX,
    Message,
    Protocol,
    RemoteProtocolError,
    ReplyStatus,
    Request,
    RequestInfo,
    decode_strict,
    encode,
)

INLINE_SIZE_MAX = BODY_SIZE_MAX - 16  # bytes of one Blob; 16 covers its array and length prefixes

__all__ = [
    "BATCH_COUNT_MAX",
    "BODY_SIZE_MAX",
    "F64",
    "FLAG_BATCH",
    "FLAG_MASK",
    "FRAME_KIND",
    "HEADER",
    "HEADER_SIZE",
    "I64",
    "INLINE_SIZE_MAX",
    "OP_MAX",
    "REPLY_BIT",
    "U8",
    "U16",
    "U32",
    "U64",
    "Blob",
    "Bool",
    "Header",
    "List",
    "Message",
    "Protocol",
    "RemoteProtocolError",
    "ReplyStatus",
    "Request",
    "RequestInfo",
    "Text",
    "decode_strict",
    "encode",
    "pack_header",
    "unpack_header",
]

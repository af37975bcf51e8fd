"""How large the frames of a protocol can become, and what share a link of it needs."""

from collections.abc import Iterable

from nexus.abi import LINK_SIZE_MAX
from nexus.wire import BATCH_PREFIX_SIZE_MAX, BODY_SIZE_MAX, HEADER_SIZE, Protocol


def request_frame_size_max(protocol: Protocol) -> int:
    """Bytes of the largest frame a client of `protocol` may send, full batches included."""
    return _frame_size(
        (codec.request_size_max, codec.batch_count_max) for codec in protocol.codecs.values()
    )


def reply_frame_size_max(protocol: Protocol) -> int:
    """Bytes of the largest frame a server of `protocol` may answer with, batches included."""
    return _frame_size(
        (codec.reply_item_size_max, codec.batch_count_max) for codec in protocol.codecs.values()
    )


def link_size(depth: int, frame_size: int) -> int:
    """The share of a link: `depth` largest frames, at most LINK_SIZE_MAX, at least one frame."""
    return max(frame_size, min(LINK_SIZE_MAX, depth * frame_size))


def _frame_size(messages: Iterable[tuple[int, int]]) -> int:
    """The header and the largest body of messages given by size and count in a batch."""
    body = max(BATCH_PREFIX_SIZE_MAX + size * count for size, count in messages)
    return HEADER_SIZE + min(BODY_SIZE_MAX, body)

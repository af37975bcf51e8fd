"""rngd protocol: bounded draws of fresh entropy."""

from enum import IntEnum
from typing import Annotated, Final, TypeAlias

from nexus.wire import INLINE_SIZE_MAX, U16, Blob, Message, Protocol, Request

DRAW_SIZE_MAX: Final = 256  # bytes; getrandom(2) never short-reads at or below 256
DRAW_RIGHT: Final = "rng.entropy"

assert DRAW_SIZE_MAX <= INLINE_SIZE_MAX, "a full reply fits one frame"


class RngdStatus(IntEnum):
    """Why rngd refuses. The numbers are wire format and are never reused."""

    OVERSIZED = 16  # 0 bytes, or more than DRAW_SIZE_MAX
    UNAVAILABLE = 17  # no source, or one that failed its health tests
    RATE_LIMITED = 18  # the caller's bytes per second


class Entropy(Message):
    """Fresh bytes, exactly as many as were asked for."""

    data: Annotated[bytes, Blob(size_min=1, size_max=DRAW_SIZE_MAX)]


class GetEntropy(
    Request[Entropy],
    op=1,
    idempotent=True,  # a repeated draw wastes entropy and changes nothing else
    refuses=RngdStatus,
):
    """Draw `size` fresh bytes, 1 to DRAW_SIZE_MAX. The caller holds `rng.entropy`, else DENIED.

    The bound is looked at first, then the right, then the rate.
    *Refuses*: OVERSIZED, UNAVAILABLE, RATE_LIMITED.
    """

    size: Annotated[int, U16()]


RngdRequest: TypeAlias = GetEntropy
PROTOCOL: Final = Protocol("rngd", number=9, version=1, requests=(GetEntropy,))

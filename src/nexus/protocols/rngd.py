"""rngd protocol: bounded draws of fresh entropy."""

from enum import IntEnum
from typing import Annotated, Final, TypeAlias

from nexus.wire import INLINE_SIZE_MAX, U16, U64, Blob, List, Message, Protocol, Request, Text

DRAW_SIZE_MAX: Final = 256  # bytes; getrandom(2) never short-reads at or below 256
DRAW_RIGHT: Final = "rng.entropy"
CLIENTS_MAX: Final = 64  # accounts of clients; the least recently served gives way
BACKING_SIZE_MAX: Final = 32  # characters

assert DRAW_SIZE_MAX <= INLINE_SIZE_MAX, "a full reply fits one frame"


class RngdStatus(IntEnum):
    """Why rngd refuses. The numbers are wire format and are never reused."""

    OVERSIZED = 16  # 0 bytes, or more than DRAW_SIZE_MAX
    UNAVAILABLE = 17  # no source, one that failed its health tests, or none at hand in time
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

    The bound is looked at first, then the right, then the rate, and then the source; what a source
    could not give is charged to the rate all the same.
    *Refuses*: OVERSIZED, UNAVAILABLE, RATE_LIMITED.
    """

    size: Annotated[int, U16()]


class ClientRow(Message):
    """How many bytes one service was given, over all its restarts."""

    service: Annotated[int, U64()]
    given: Annotated[int, U64()]


class Source(Message):
    """Where the bytes come from, since rngd started. No byte of it is secret.

    `backing` is "virtio-mmio", "hwrng" or "getrandom", and empty while no device was opened. `fit`:
    the last start-up test passed and no health test has failed since. `delivered` bytes came from
    the device, those of start-up tests among them; `given` were answered to clients.
    """

    backing: Annotated[str, Text(size_max=BACKING_SIZE_MAX)]
    fit: bool
    start_tests_passed: Annotated[int, U64()]
    delivered: Annotated[int, U64()]
    given: Annotated[int, U64()]
    given_to_caller: Annotated[int, U64()]
    clients: Annotated[list[ClientRow], List(count_max=CLIENTS_MAX)]


class GetSource(Request[Source], op=2, idempotent=True):
    """What rngd says of its source. Nobody needs a right for it."""


RngdRequest: TypeAlias = GetEntropy | GetSource
PROTOCOL: Final = Protocol("rngd", number=9, version=1, requests=(GetEntropy, GetSource))

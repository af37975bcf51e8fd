"""Bytes the drivers of two tasks exchange: kernel frames on links, and the trailer of a
capability.

A kernel frame's first byte is MESSAGE_KIND_RESERVED or above, so no task can send one through
the ABI; a hostile one can by raw system calls, so a receiver trusts nothing in it.
"""

import struct
from typing import Final, NamedTuple

from nexus.abi import (
    LINK_DEPTH_MAX,
    LINK_SIZE_MAX,
    MESSAGE_KIND_RESERVED,
    MESSAGE_SIZE_MAX,
    VMO_SIZE_MAX,
    CapKind,
    LinkTerms,
    ServiceId,
)
from nexus.kernel.core import DELEGATIONS_MAX

FRAME_ATTACH: Final = MESSAGE_KIND_RESERVED  # holder to owner: the far end of a derived link
FRAME_DETACH: Final = MESSAGE_KIND_RESERVED + 1  # owner to holder: a delegation came back
FRAME_VOID: Final = MESSAGE_KIND_RESERVED + 2  # holder to owner, first: this link never moved

_ATTACH: Final = struct.Struct("<BxHIH8s")
_TRAILER: Final = struct.Struct("<BxHIHHQQ")
# kind, depth, size, delegations, delegations in use, owner, length

COOKIE_SIZE: Final = 8  # bytes; SO_COOKIE, the kernel's name of a socket
NO_COOKIE: Final = bytes(COOKIE_SIZE)
TRAILER_SIZE: Final = _TRAILER.size
WIRE_SIZE_MAX: Final = MESSAGE_SIZE_MAX + TRAILER_SIZE
RECEIVE_SIZE: Final = 8304  # bytes of a receive buffer: larger ones cost more per message

DETACH: Final = bytes((FRAME_DETACH,))
VOID: Final = bytes((FRAME_VOID,))

assert WIRE_SIZE_MAX <= RECEIVE_SIZE, "a whole message fits the buffer"


class Trailer(NamedTuple):
    """What the sender's driver says about the capability that moves; the kind of the descriptor
    itself is looked at, not believed."""

    kind: CapKind
    terms: LinkTerms = LinkTerms()
    attached: int = 0  # delegations in use
    owner: ServiceId = ServiceId(0)
    length: int = 0


def pack_attach(terms: LinkTerms, cookie: bytes = NO_COOKIE) -> bytes:
    """An ATTACH frame; the far end travels with it. `cookie` is the near end's SO_COOKIE."""
    return _ATTACH.pack(FRAME_ATTACH, terms.depth, terms.size, terms.delegations, cookie)


def unpack_attach(data: bytes) -> tuple[LinkTerms, bytes] | None:
    """Terms and cookie of an ATTACH frame, None if it is malformed."""
    if len(data) != _ATTACH.size:
        return None
    _, depth, size, delegations, cookie = _ATTACH.unpack(data)
    terms = _terms(depth, size, delegations)
    return None if terms is None else (terms, cookie)


def pack_trailer(trailer: Trailer) -> bytes:
    """The bytes appended to a message that a capability moves with."""
    depth, size, delegations = trailer.terms
    return _TRAILER.pack(
        trailer.kind, depth, size, delegations, trailer.attached, trailer.owner, trailer.length
    )


def unpack_trailer(data: bytes) -> Trailer | None:
    """The trailer at the end of `data`, None if there is no message before it or it is
    malformed."""
    if len(data) <= TRAILER_SIZE:
        return None
    kind, depth, size, delegations, attached, owner, length = _TRAILER.unpack_from(
        data, len(data) - TRAILER_SIZE
    )
    terms = _terms(depth, size, delegations)
    if terms is None or attached > delegations or length > VMO_SIZE_MAX:
        return None
    if kind not in (CapKind.LINK, CapKind.VMO):
        return None
    return Trailer(CapKind(kind), terms, attached, ServiceId(owner), length)


def _terms(depth: int, size: int, delegations: int) -> LinkTerms | None:
    if (
        1 <= depth <= LINK_DEPTH_MAX
        and 1 <= size <= LINK_SIZE_MAX
        and delegations <= DELEGATIONS_MAX
    ):
        return LinkTerms(depth, size, delegations)
    return None

"""Which keys there are, what area each is in, and which right it takes to use it.

Keys are compared byte by byte: nothing is normalised, so no two spellings are one key.
"""

from typing import Final

from nexus.protocols.statefsd import (
    AREA_SIZE_MAX,
    KEY_SIZE_MAX,
    READ_RIGHT,
    ROOT,
    SPECIAL_AREAS,
    WRITE_RIGHT,
    StatefsdStatus,
)
from nexus.services.statefsd.engine.limits import area_of

ROOT_AREA: Final = ROOT.encode()
SEPARATOR: Final = b"/"
REFUSED_SEGMENTS: Final = frozenset((b"", b".", b".."))
CONTROLS: Final = frozenset(map(chr, (*range(0x20), *range(0x7F, 0xA0))))

Refusal = StatefsdStatus | None


def key_fault(key: bytes) -> Refusal:
    """Why this is no key; None if it is one."""
    if len(key) > KEY_SIZE_MAX:
        return StatefsdStatus.KEY_TOO_LONG
    return None if _is_path(key) else StatefsdStatus.INVALID_KEY


def prefix_fault(prefix: bytes) -> Refusal:
    """Why this is nothing to list: neither ROOT nor a path of whole segments that ends in "/"."""
    if prefix == ROOT_AREA:
        return None
    if len(prefix) > KEY_SIZE_MAX:
        return StatefsdStatus.KEY_TOO_LONG
    if not prefix.endswith(SEPARATOR):
        return StatefsdStatus.INVALID_KEY
    return None if _is_path(prefix[:-1]) else StatefsdStatus.INVALID_KEY


def area_fault(area: bytes) -> Refusal:
    """Why this is no area: ROOT, or a prefix with one segment."""
    fault = prefix_fault(area)
    if fault is None and area_of(area) != area:
        return StatefsdStatus.INVALID_KEY
    return fault


def right_for(area: bytes, *, writes: bool) -> str:
    """The right it takes to write into an area, or to look into it."""
    return SPECIAL_AREAS.get(area.decode(), WRITE_RIGHT if writes else READ_RIGHT)


def is_special(area: bytes) -> bool:
    """Whether the area has a right of its own."""
    return area.decode() in SPECIAL_AREAS


def _is_path(key: bytes) -> bool:
    if not key.startswith(ROOT_AREA):
        return False
    try:
        text = key.decode()
    except UnicodeDecodeError:
        return False
    if not CONTROLS.isdisjoint(text):
        return False
    segments = key[len(ROOT_AREA) :].split(SEPARATOR)
    return REFUSED_SEGMENTS.isdisjoint(segments) and len(segments[0]) <= AREA_SIZE_MAX

"""Which keys there are, what area each is in, and which right it takes to use it.

Keys are compared byte by byte: nothing is normalised, so no two spellings are one key.
"""

from collections.abc import Sequence
from typing import Final

from nexus.protocols.statefsd import (
    AREA_SIZE_MAX,
    BOOT_AREA,
    KEY_SIZE_MAX,
    READ_RIGHT,
    ROOT,
    SNAPSHOT_AREA,
    SPECIAL_AREAS,
    WRITE_RIGHT,
    StatefsdStatus,
)
from nexus.services.statefsd.engine.limits import AREA_NAME_MAX, area_of, is_path

ROOT_AREA: Final = ROOT.encode()
SPECIAL: Final = {area.encode(): right for area, right in SPECIAL_AREAS.items()}
SEPARATOR: Final = b"/"

assert AREA_SIZE_MAX == AREA_NAME_MAX, "what a checkpoint may hold is what the protocol lets in"

Refusal = StatefsdStatus | None


def key_fault(key: bytes) -> Refusal:
    """Why this is no key; None if it is one."""
    if len(key) > KEY_SIZE_MAX:
        return StatefsdStatus.KEY_TOO_LONG
    return None if is_path(key) else StatefsdStatus.INVALID_KEY


def change_fault(key: bytes) -> Refusal:
    """Why this is no key that anybody may change: it is none, or a page of a snapshot."""
    fault = key_fault(key)
    if fault is None and area_of(key) == SNAPSHOT_AREA.encode():
        return StatefsdStatus.INVALID_KEY
    return fault


def snapshot_fault(areas: Sequence[bytes]) -> Refusal:
    """Why these are no areas that may be copied and brought back together."""
    for area in areas:
        fault = area_fault(area)
        if fault is not None:
            return fault
    kept = {SNAPSHOT_AREA.encode(), BOOT_AREA.encode()}
    if len(set(areas)) < len(areas) or not kept.isdisjoint(areas):
        return StatefsdStatus.INVALID_KEY
    return None


def prefix_fault(prefix: bytes) -> Refusal:
    """Why this is nothing to list: neither ROOT nor a path of whole segments that ends in "/"."""
    if prefix == ROOT_AREA:
        return None
    if len(prefix) > KEY_SIZE_MAX:
        return StatefsdStatus.KEY_TOO_LONG
    if not prefix.endswith(SEPARATOR):
        return StatefsdStatus.INVALID_KEY
    return None if is_path(prefix[:-1]) else StatefsdStatus.INVALID_KEY


def area_fault(area: bytes) -> Refusal:
    """Why this is no area: ROOT, or a prefix with one segment."""
    fault = prefix_fault(area)
    if fault is None and area_of(area) != area:
        return StatefsdStatus.INVALID_KEY
    return fault


def right_for(area: bytes, *, writes: bool) -> str:
    """The right it takes to write into an area, or to look into it."""
    return SPECIAL.get(area, WRITE_RIGHT if writes else READ_RIGHT)


def is_special(area: bytes) -> bool:
    """Whether the area has a right of its own."""
    return area in SPECIAL

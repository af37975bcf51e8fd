"""What a store may take, chosen by who opens it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

KEY_SIZE_MAX: Final = 255  # bytes; its length stands in one byte of a record
VALUE_SIZE_MAX: Final = 64 * 1024  # bytes; a record has to fit a checkpoint's segment many times
ROOT: Final = b"/state/"
AREA_NAME_MAX: Final = 48  # bytes of the first segment
REFUSED_SEGMENTS: Final = frozenset((b"", b".", b".."))
CONTROLS: Final = frozenset(map(chr, (*range(0x20), *range(0x7F, 0xA0))))
# No StoreLimits goes beyond these, so that a checkpoint whose meta does was not written by us.
AREAS_MAX: Final = 1024
CLIENTS_MAX: Final = 256
REQUESTS_MAX: Final = 128
LOST_MAX: Final = 256


@dataclass(frozen=True, kw_only=True, slots=True)
class Quota:
    """What an area may take: bytes as its live records take them, and keys."""

    size: int
    keys: int


@dataclass(frozen=True, kw_only=True, slots=True)
class StoreLimits:
    """The limits of a store. Lower ones than before lose nothing: only growth is refused."""

    quota: Quota  # of an area that is not in `quotas`
    quotas: Mapping[bytes, Quota]  # by area, as b"/state/boot/"
    reserves: Mapping[bytes, int]  # bytes nobody else may take, by area
    areas_max: int  # areas with a key in them; those of `places` count, used or not
    clients_kept: int  # whose request ids are remembered; the one longest silent is forgotten
    requests_kept: int  # request ids of a client, the latest
    lost_kept: int  # damaged records that are listed, the latest; all are counted
    areas_kept: frozenset[bytes] = frozenset()  # areas that have a place besides the named ones

    def __post_init__(self) -> None:
        assert min(self.areas_max, self.clients_kept, self.requests_kept, self.lost_kept) >= 1
        assert max(self.areas_max, len(self.places)) <= AREAS_MAX
        assert self.clients_kept <= CLIENTS_MAX
        assert self.requests_kept <= REQUESTS_MAX
        assert self.lost_kept <= LOST_MAX
        assert all(size >= 0 for size in self.reserves.values())

    @property
    def places(self) -> frozenset[bytes]:
        """The areas that can begin however many others there are."""
        return self.areas_kept.union(self.quotas, self.reserves)


def area_of(key: bytes) -> bytes:
    """The area of a key: b"/state/AREA/", or b"/state/" for a key without one."""
    end = key.find(b"/", len(ROOT))
    return key[: end + 1] if end >= 0 else ROOT


def is_path(key: bytes) -> bool:
    """Whether this is a key: UTF-8 without controls, below ROOT, of segments that are names."""
    if not key.startswith(ROOT):
        return False
    try:
        text = key.decode()
    except UnicodeDecodeError:
        return False
    if not CONTROLS.isdisjoint(text):
        return False
    segments = key[len(ROOT) :].split(b"/")
    return REFUSED_SEGMENTS.isdisjoint(segments) and len(segments[0]) <= AREA_NAME_MAX

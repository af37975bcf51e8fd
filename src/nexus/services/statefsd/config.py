"""statefsd's settings in the system file: how much each area may take, and what is kept for it.

An area is named by its first segment, "keystore" for /state/keystore/, and "/" for keys right
below /state/. Areas are separated by commas::

    [service.statefsd.settings]
    quota = "4MiB 16384"                    # of every area that is not named: bytes and keys
    quotas = "metricsd 8MiB 4096, / 64KiB 64"
    reserves = "keystore 256KiB, boot 64KiB" # kept free for these, however full the disk is

The area ".snapshot" is the copy that an update makes of data that it migrates: with a reserve of
its own there is always room for it. `refresh` and `restore` are init's: nobody writes them
into a system file: the snapshot that is taken again before the first boot of a trial serves, and
the one that the areas go back to after a rollback; 0 for none.
"""

import re
from collections.abc import Mapping
from typing import Annotated, Final

import msgspec

from nexus.abi import BLOCK_SIZE
from nexus.protocols.statefsd import (
    BULK_VALUE_MAX,
    KEY_SIZE_MAX,
    REQUESTS_KEPT,
    ROOT,
    SNAPSHOT_AREA,
    SNAPSHOT_AREAS_MAX,
    SNAPSHOT_KEYS_MAX,
    SNAPSHOT_SIZE_MAX,
    SPECIAL_AREAS,
)
from nexus.services.statefsd.access import area_fault
from nexus.services.statefsd.engine import limits as engine
from nexus.services.statefsd.engine.journal import ENTRY_SIZE, FRAME_SIZE, ROOM
from nexus.services.statefsd.engine.layout import (
    RECORD_COST,
    STORE_BLOCKS_MIN,
    capacity_of,
    initial,
)
from nexus.services.statefsd.engine.limits import Quota, StoreLimits
from nexus.services.statefsd.engine.snapshot import AREA as SNAPSHOT_PAGES
from nexus.services.statefsd.engine.snapshot import AREAS_MAX as COPIED_MAX
from nexus.services.statefsd.engine.snapshot import KEYS_MAX as COPY_KEYS_MAX
from nexus.services.statefsd.engine.snapshot import NUMBER_MAX
from nexus.services.statefsd.engine.snapshot import SIZE_MAX as COPY_SIZE_MAX
from nexus.services.statefsd.engine.store import COMMIT_SHARE, REQUEST_SIZE

QUOTA_DEFAULT: Final = "4MiB 16384"
QUOTAS_DEFAULT: Final = "keystore 1MiB 4096, boot 64KiB 256"
RESERVES_DEFAULT: Final = "keystore 256KiB, boot 64KiB"
AREAS_MAX: Final = 32  # areas with a key in them; a LIST asks policyd about each at worst
CLIENTS_KEPT: Final = 64  # whose request ids are remembered; as many as have accounts
LOST_KEPT: Final = 64  # damaged records that are listed by name
SIZE_MAX: Final = 1 << 40  # bytes
KEYS_MAX: Final = 1 << 24
LARGEST: Final = RECORD_COST + KEY_SIZE_MAX + BULK_VALUE_MAX  # bytes one record may take
UNITS: Final[Mapping[str, int]] = {"": 1, "B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}
AMOUNT: Final = re.compile(r"([0-9]{1,9})([A-Za-z]*)")

# The engine knows nothing of the protocol, and takes what the protocol admits.
assert ROOT.encode() == engine.ROOT
assert KEY_SIZE_MAX == engine.KEY_SIZE_MAX
assert BULK_VALUE_MAX == engine.VALUE_SIZE_MAX
assert SNAPSHOT_AREA.encode() == SNAPSHOT_PAGES
assert SNAPSHOT_AREAS_MAX == COPIED_MAX
assert SNAPSHOT_SIZE_MAX == COPY_SIZE_MAX
assert SNAPSHOT_KEYS_MAX == COPY_KEYS_MAX


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """[service.statefsd.settings]."""

    quota: str = QUOTA_DEFAULT
    quotas: str = QUOTAS_DEFAULT
    reserves: str = RESERVES_DEFAULT
    refresh: Annotated[int, msgspec.Meta(ge=0, le=NUMBER_MAX)] = 0
    restore: Annotated[int, msgspec.Meta(ge=0, le=NUMBER_MAX)] = 0

    def __post_init__(self) -> None:
        """Raises ValueError, which msgspec makes a ValidationError with the place in it."""
        _ = self.limits

    @property
    def default_quota(self) -> Quota:
        """Of an area that is not named."""
        words = self.quota.split()
        if len(words) != 2:
            raise ValueError(f'quota is "{self.quota}": say bytes and keys, as in "4MiB 16384"')
        return _quota(words[0], words[1])

    @property
    def area_quotas(self) -> dict[bytes, Quota]:
        """Of the named areas."""
        found: dict[bytes, Quota] = {}
        for words in _rows("quotas", self.quotas):
            if len(words) != 3:
                raise ValueError(
                    f'quotas has "{" ".join(words)}": say area, bytes and keys, '
                    'as in "metricsd 8MiB 4096"'
                )
            found[_area("quotas", words[0], found)] = _quota(words[1], words[2])
        return found

    @property
    def area_reserves(self) -> dict[bytes, int]:
        """Bytes kept free for the named areas."""
        found: dict[bytes, int] = {}
        for words in _rows("reserves", self.reserves):
            if len(words) != 2:
                raise ValueError(
                    f'reserves has "{" ".join(words)}": say area and bytes, as in "boot 64KiB"'
                )
            found[_area("reserves", words[0], found)] = _size(words[1])
        return found

    @property
    def limits(self) -> StoreLimits:
        """As the store takes them."""
        return StoreLimits(
            quota=self.default_quota,
            quotas=self.area_quotas,
            reserves=self.area_reserves,
            areas_max=AREAS_MAX,
            clients_kept=CLIENTS_KEPT,
            requests_kept=REQUESTS_KEPT,
            lost_kept=LOST_KEPT,
            areas_kept=frozenset(area.encode() for area in SPECIAL_AREAS),
        )


def disk_fault(settings: Mapping[str, object], size: int) -> str | None:
    """What is wrong with these settings on a disk of `size` bytes; None if nothing is."""
    try:
        limits = msgspec.convert(settings, Settings).limits
    except msgspec.ValidationError as error:
        return str(error)
    fault = room_fault(limits, size, LARGEST)
    found = initial(size // BLOCK_SIZE)
    if fault is None and found is not None:
        most = found.ring_blocks // COMMIT_SHARE * ROOM - FRAME_SIZE - 2 * ENTRY_SIZE - REQUEST_SIZE
        if most < LARGEST:
            return (
                f"a disk of {size} bytes takes no value of {BULK_VALUE_MAX}: it takes a larger one"
            )
    return fault


def room_fault(limits: StoreLimits, size: int, least: int) -> str | None:
    """Why a disk of `size` bytes has no `least` bytes beside what is reserved; None if it has."""
    found = initial(size // BLOCK_SIZE)
    if found is None:
        return f"{size} bytes are no disk for a store: from {STORE_BLOCKS_MIN * BLOCK_SIZE} on is"
    capacity = capacity_of(found.area_blocks, limits)
    reserved = sum(limits.reserves.values())
    if reserved + least <= capacity:
        return None
    return (
        f"a disk of {size} bytes keeps {capacity} bytes of records, too few for {reserved} "
        f"reserved ones and {least} beside: it takes a larger disk, or lower reserves"
    )


def _rows(what: str, text: str) -> list[list[str]]:
    rows = [row.split() for row in text.split(",")] if text.strip() else []
    if len(rows) > AREAS_MAX:
        raise ValueError(f"{what} names {len(rows)} areas: up to {AREAS_MAX} are possible")
    return rows


def _area(what: str, name: str, found: Mapping[bytes, object]) -> bytes:
    area = (ROOT if name == "/" else f"{ROOT}{name}/").encode()
    if area_fault(area) is not None:
        raise ValueError(f'{what} names "{name}", which is no area: it is one segment, or "/"')
    if area in found:
        raise ValueError(f'{what} names "{name}" twice')
    return area


def _quota(size: str, keys: str) -> Quota:
    if not re.fullmatch(r"[0-9]{1,8}", keys) or not 1 <= int(keys) <= KEYS_MAX:
        raise ValueError(f'"{keys}" is no number of keys: from 1 to {KEYS_MAX} is possible')
    return Quota(size=_size(size), keys=int(keys))


def _size(text: str) -> int:
    amount = AMOUNT.fullmatch(text)
    if amount is None or amount[2] not in UNITS:
        raise ValueError(f'"{text}" is no size: say it as 262144 or 256KiB')
    size = int(amount[1]) * UNITS[amount[2]]
    if not 1 <= size <= SIZE_MAX:
        raise ValueError(f"{text} is no size: from 1 byte to {SIZE_MAX >> 30}GiB is possible")
    return size

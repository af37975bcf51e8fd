"""logd's settings in the system file."""

import re
from collections.abc import Mapping
from typing import Final

import msgspec

from nexus.abi import ServiceId, service_id
from nexus.services.logd.journal import RECORD_SIZE_MAX
from nexus.services.logd.senders import CORE_MAX

RECORDS_DEFAULT: Final = 1024  # 40 s of one sender at full rate
RECORDS_MAX: Final = 65536
SIZE_DEFAULT: Final = 256 * 1024  # bytes; 1024 records of an average line each
SIZE_MIN: Final = 2 * RECORD_SIZE_MAX  # bytes; a ring of one record would be no ring
SIZE_MAX: Final = 64 * 1024 * 1024  # bytes
CORE_DEFAULT: Final = "policyd"  # whose audit must not be lost to a busy neighbour
CORE_RATE_DEFAULT: Final = 512  # records per second of each core sender
CORE_RATE_MAX: Final = 65536
UNITS: Final[Mapping[str, int]] = {"": 1, "B": 1, "KiB": 1024, "MiB": 1024 * 1024}
AMOUNT: Final = re.compile(r"([0-9]{1,9})([A-Za-z]*)")


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """[service.logd.settings]. `core` are names of senders, separated by spaces."""

    records: int = RECORDS_DEFAULT
    size: int | str = SIZE_DEFAULT
    core: str = CORE_DEFAULT
    core_rate: int = CORE_RATE_DEFAULT

    def __post_init__(self) -> None:
        """Raises ValueError, which msgspec makes a ValidationError with the place in it."""
        check_between("records", self.records, 1, RECORDS_MAX)
        check_between("size", self.size_bytes, SIZE_MIN, SIZE_MAX)
        check_between("core_rate", self.core_rate, 1, CORE_RATE_MAX)
        check_between("number of names in core", len(self.core_ids), 0, CORE_MAX)

    @property
    def size_bytes(self) -> int:
        """The size of the ring in bytes."""
        if isinstance(self.size, int):
            return self.size
        amount = AMOUNT.fullmatch(self.size)
        if amount is None or amount[2] not in UNITS:
            raise ValueError(f'size is "{self.size}": say it as 262144 or "256KiB"')
        return int(amount[1]) * UNITS[amount[2]]

    @property
    def core_ids(self) -> frozenset[ServiceId]:
        """The core senders as the kernel names them."""
        return frozenset(service_id(name) for name in self.core.split())


def check_between(what: str, value: int, least: int, most: int) -> None:
    """Raise ValueError with a sentence for people unless `least` <= `value` <= `most`."""
    if not least <= value <= most:
        raise ValueError(f"{what} is {value}: from {least} to {most} is possible")

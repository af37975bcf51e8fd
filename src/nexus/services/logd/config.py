"""logd's settings in the system file."""

import re
from collections.abc import Mapping
from typing import Final

import msgspec

from nexus.abi import ServiceId, service_id
from nexus.runtime.wear import BURSTS_PER_DAY
from nexus.services.logd.journal import RECORD_SIZE_MAX
from nexus.services.logd.senders import CORE_MAX
from nexus.services.logd.tail import SEGMENT_SIZE_MAX

RECORDS_DEFAULT: Final = 1024  # 40 s of one sender at full rate
RECORDS_MAX: Final = 65536
SIZE_DEFAULT: Final = 256 * 1024  # bytes; 1024 records of an average line each
SIZE_MIN: Final = 2 * RECORD_SIZE_MAX  # bytes; a ring of one record would be no ring
SIZE_MAX: Final = 64 * 1024 * 1024  # bytes
CORE_DEFAULT: Final = "policyd"  # whose audit must not be lost to a busy neighbour
CORE_RATE_DEFAULT: Final = 512  # records per second of each core sender
CORE_RATE_MAX: Final = 65536
STREAM_RATE_DEFAULT: Final = 4096  # records per second of each sender's streams; 1 % of a CPU
STREAM_RATE_MAX: Final = 1_000_000
TAIL_SIZE_DEFAULT: Final = 256 * 1024  # bytes on the device; about 2000 lines before a crash
TAIL_SIZE_MAX: Final = 4 * 1024 * 1024  # bytes; all of it is read at a start
TAIL_WRITTEN_DEFAULT: Final = 64 * 1024 * 1024  # bytes a day; a small flash bears it for decades
TAIL_WRITES_DEFAULT: Final = 20_000  # a day; one every 5 s, and some for what is important
TAIL_EVERY_DEFAULT: Final = 5  # seconds between two writes, and what a power cut may cost
TAIL_SIZE_MIN: Final = 4 * SEGMENT_SIZE_MAX  # bytes; of one segment there is always a next one
TAIL_WRITTEN_MIN: Final = 4 * BURSTS_PER_DAY * SEGMENT_SIZE_MAX  # bytes; an hour has some segments
TAIL_WRITTEN_MAX: Final = 1 << 40  # bytes
TAIL_WRITES_MAX: Final = 1_000_000
TAIL_EVERY_MAX: Final = 3600  # seconds
UNITS: Final[Mapping[str, int]] = {"": 1, "B": 1, "KiB": 1024, "MiB": 1024 * 1024}
AMOUNT: Final = re.compile(r"([0-9]{1,9})([A-Za-z]*)")


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """[service.logd.settings]. `core` are names of senders, separated by spaces.

    `stream_rate` is how many records of one sender's rings are taken in a second; what exceeds it
    waits in the ring. `tail_size` bytes of the latest records are kept in statefsd, if logd uses
    that, and written every `tail_every` seconds, at most `tail_written` bytes and `tail_writes`
    times a day; 0 bytes is no tail.
    """

    records: int = RECORDS_DEFAULT
    size: int | str = SIZE_DEFAULT
    core: str = CORE_DEFAULT
    core_rate: int = CORE_RATE_DEFAULT
    stream_rate: int = STREAM_RATE_DEFAULT
    tail_size: int | str = TAIL_SIZE_DEFAULT
    tail_written: int | str = TAIL_WRITTEN_DEFAULT
    tail_writes: int = TAIL_WRITES_DEFAULT
    tail_every: int = TAIL_EVERY_DEFAULT

    def __post_init__(self) -> None:
        """Raises ValueError, which msgspec makes a ValidationError with the place in it."""
        check_between("records", self.records, 1, RECORDS_MAX)
        check_between("size", self.size_bytes, SIZE_MIN, SIZE_MAX)
        check_between("core_rate", self.core_rate, 1, CORE_RATE_MAX)
        check_between("number of names in core", len(self.core_ids), 0, CORE_MAX)
        check_between("stream_rate", self.stream_rate, 1, STREAM_RATE_MAX)
        if self.tail_bytes:
            check_between("tail_size", self.tail_bytes, TAIL_SIZE_MIN, TAIL_SIZE_MAX)
        check_between("tail_written", self.tail_written_bytes, TAIL_WRITTEN_MIN, TAIL_WRITTEN_MAX)
        check_between("tail_writes", self.tail_writes, BURSTS_PER_DAY, TAIL_WRITES_MAX)
        check_between("tail_every", self.tail_every, 1, TAIL_EVERY_MAX)

    @property
    def size_bytes(self) -> int:
        """The size of the ring in bytes."""
        return amount_of("size", self.size)

    @property
    def tail_bytes(self) -> int:
        """The size of the persisted tail in bytes; 0 for none."""
        return amount_of("tail_size", self.tail_size)

    @property
    def tail_written_bytes(self) -> int:
        """Bytes of the tail that may be written in a day."""
        return amount_of("tail_written", self.tail_written)

    @property
    def core_ids(self) -> frozenset[ServiceId]:
        """The core senders as the kernel names them."""
        return frozenset(service_id(name) for name in self.core.split())


def amount_of(what: str, amount: int | str) -> int:
    """Bytes, as they are or with a unit. Raises ValueError."""
    if isinstance(amount, int):
        return amount
    found = AMOUNT.fullmatch(amount)
    if found is None or found[2] not in UNITS:
        raise ValueError(f'{what} is "{amount}": say it as 262144 or "256KiB"')
    return int(found[1]) * UNITS[found[2]]


def check_between(what: str, value: int, least: int, most: int) -> None:
    """Raise ValueError with a sentence for people unless `least` <= `value` <= `most`."""
    if not least <= value <= most:
        raise ValueError(f"{what} is {value}: from {least} to {most} is possible")

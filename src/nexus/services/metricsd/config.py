"""metricsd's settings in the system file. All of them may be changed while it runs (Configure).

Lowering a cap below what is in use takes nothing away: only new series are refused.
"""

import re
from collections.abc import Mapping
from typing import Final

import msgspec

from nexus.abi import Nanos, ServiceId, service_id
from nexus.protocols.metricsd import SENDER_ROWS_MAX

SERIES_DEFAULT: Final = 64  # in all (services.md 3.4)
SERIES_PER_SERVICE_DEFAULT: Final = 32  # half of all: nobody uses up the others' (W9)
SERIES_PER_METRIC_DEFAULT: Final = 16  # of one name and kind of one service
SERIES_MAX: Final = 4096
SPANS_OPEN_DEFAULT: Final = 256  # begun by message and not ended, of all senders
SPANS_OPEN_EACH_DEFAULT: Final = 64  # and of one (services.md 3.4)
SPANS_KEPT_DEFAULT: Final = 1024
SPANS_MAX: Final = 65536
RATE_DEFAULT: Final = 64  # requests per second and sender (services.md 3.4)
CORE_RATE_DEFAULT: Final = 512
RATE_MAX: Final = 65536
EXPORT_RATE_DEFAULT: Final = 16  # records per second; logd takes 24 of an ordinary sender
WINDOWS_DEFAULT: Final = 60  # kept of each resolution: 10 minutes and an hour
WINDOWS_MAX: Final = 1024
SEGMENTS_DEFAULT: Final = 8  # services.md 3.4
SEGMENTS_MAX: Final = 64
BYTES_PER_DAY_DEFAULT: Final = "64MiB"  # a card of 1 GiB that bears 3000 writes lasts 130 years
WRITES_PER_DAY_DEFAULT: Final = 40_000  # one in 2 s
CORE_NAMES_MAX: Final = SENDER_ROWS_MAX // 2  # the other rows are for everybody
SECOND: Final = 1_000_000_000
SIZE_UNITS: Final[Mapping[str, int]] = {"": 1, "B": 1, "KiB": 1 << 10, "MiB": 1 << 20}
TIME_UNITS: Final[Mapping[str, int]] = {"ms": 1_000_000, "s": SECOND, "min": 60 * SECOND}
AMOUNT: Final = re.compile(r"([0-9]{1,9})([A-Za-z]*)")
LEAST_TIME: Final = Nanos(10_000_000)  # ns; what is done more often is not done now and then
HOUR: Final = Nanos(3600 * SECOND)
SIZE_LEAST: Final = 24 * 16 * 1024  # bytes; an hour's share takes two writes
SIZE_MOST: Final = 512 << 20  # bytes


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """[service.metricsd.settings]. Times are texts such as "10s", sizes such as "64MiB"; `core`
    are names of senders, separated by spaces."""

    series: int = SERIES_DEFAULT
    series_per_service: int = SERIES_PER_SERVICE_DEFAULT
    series_per_metric: int = SERIES_PER_METRIC_DEFAULT
    rate: int = RATE_DEFAULT
    core: str = "policyd"
    core_rate: int = CORE_RATE_DEFAULT
    spans_open: int = SPANS_OPEN_DEFAULT
    spans_open_each: int = SPANS_OPEN_EACH_DEFAULT
    spans_kept: int = SPANS_KEPT_DEFAULT
    span_time_max: str = "60s"  # then a span that was not ended is TIMED_OUT
    read_every: str = "1s"
    export_every: str = "10s"
    export_rate: int = EXPORT_RATE_DEFAULT
    retention: bool = True
    short: str = "10s"
    long: str = "60s"
    windows: int = WINDOWS_DEFAULT
    wal_every: str = "5s"  # what a power cut may take, and the record that was being written
    segments: int = SEGMENTS_DEFAULT
    bytes_per_day: int | str = BYTES_PER_DAY_DEFAULT
    writes_per_day: int = WRITES_PER_DAY_DEFAULT

    def __post_init__(self) -> None:
        """Raises ValueError, which msgspec makes a ValidationError with the place in it."""
        for what, most in (
            ("series", SERIES_MAX),
            ("series_per_service", SERIES_MAX),
            ("series_per_metric", SERIES_MAX),
            ("rate", RATE_MAX),
            ("core_rate", RATE_MAX),
            ("spans_open", SPANS_MAX),
            ("spans_open_each", SPANS_MAX),
            ("spans_kept", SPANS_MAX),
            ("export_rate", RATE_MAX),
            ("windows", WINDOWS_MAX),
            ("segments", SEGMENTS_MAX),
            ("writes_per_day", 1 << 30),
        ):
            check_between(what, getattr(self, what), 1, most)
        for what in ("span_time_max", "read_every", "export_every", "short", "long", "wal_every"):
            check_between(what, time_of(what, getattr(self, what)), LEAST_TIME, HOUR)
        check_between("bytes_per_day", self.bytes_max, SIZE_LEAST, SIZE_MOST)
        check_between("number of names in core", len(self.core_ids), 0, CORE_NAMES_MAX)
        if self.long_ns % self.short_ns or self.long_ns == self.short_ns:
            raise ValueError(f"long is {self.long}: it is to be a multiple of short, {self.short}")
        if self.windows <= self.long_ns // self.short_ns:
            raise ValueError(
                f"windows is {self.windows}: a long one is made of "
                f"{self.long_ns // self.short_ns} short ones, so more are to be kept"
            )
        if self.wal_ns > self.short_ns:
            raise ValueError(
                f"wal_every is {self.wal_every}: it is to be no more than short, {self.short}"
            )

    @property
    def span_ns(self) -> Nanos:
        """How long a span may stay open."""
        return time_of("span_time_max", self.span_time_max)

    @property
    def read_ns(self) -> Nanos:
        """How often the pages are read."""
        return time_of("read_every", self.read_every)

    @property
    def export_ns(self) -> Nanos:
        """How often changed series go to the log."""
        return time_of("export_every", self.export_every)

    @property
    def short_ns(self) -> Nanos:
        """The length of a short window."""
        return time_of("short", self.short)

    @property
    def long_ns(self) -> Nanos:
        """The length of a long window."""
        return time_of("long", self.long)

    @property
    def wal_ns(self) -> Nanos:
        """How often the WAL is written: the window of what may be lost."""
        return time_of("wal_every", self.wal_every)

    @property
    def bytes_max(self) -> int:
        """Bytes that may be written in a day."""
        return size_of("bytes_per_day", self.bytes_per_day)

    @property
    def core_ids(self) -> frozenset[ServiceId]:
        """The core senders as the kernel names them."""
        return frozenset(service_id(name) for name in self.core.split())


def time_of(what: str, text: str) -> Nanos:
    """A time in ns. Raises ValueError."""
    amount = AMOUNT.fullmatch(text)
    if amount is None or amount[2] not in TIME_UNITS:
        raise ValueError(f'{what} is "{text}": say it as "500ms", "10s" or "2min"')
    return Nanos(int(amount[1]) * TIME_UNITS[amount[2]])


def size_of(what: str, size: int | str) -> int:
    """A size in bytes. Raises ValueError."""
    if isinstance(size, int):
        return size
    amount = AMOUNT.fullmatch(size)
    if amount is None or amount[2] not in SIZE_UNITS:
        raise ValueError(f'{what} is "{size}": say it as 65536 or "64KiB"')
    return int(amount[1]) * SIZE_UNITS[amount[2]]


def check_between(what: str, value: int, least: int, most: int) -> None:
    """Raise ValueError with a sentence for people unless `least` <= `value` <= `most`."""
    if not least <= value <= most:
        raise ValueError(f"{what} is {value}: from {least} to {most} is possible")

"""exportd's settings in the system file."""

from typing import Final

import msgspec

SERIES_DEFAULT: Final = 4096  # series of one page; metricsd has fewer
SERIES_MAX: Final = 65536
PAGE_SIZE_DEFAULT: Final = 1024 * 1024  # bytes; 4096 series of 200 bytes each, and some histograms
PAGE_SIZE_MAX: Final = 16 * 1024 * 1024  # bytes
EVERY_DEFAULT: Final = 10_000  # ms between two exports to a collector
EVERY_MIN: Final = 50  # ms
EVERY_MAX: Final = 3_600_000  # ms
PAUSE_DEFAULT: Final = 5_000  # ms; a collector that is back is noticed by then
PAUSE_MIN: Final = 10  # ms
QUEUE_COUNT_DEFAULT: Final = 64  # bodies; five minutes of a small system
QUEUE_SIZE_DEFAULT: Final = 512 * 1024  # bytes
QUEUE_SIZE_MAX: Final = 16 * 1024 * 1024  # bytes
QUEUE_COUNT_MAX: Final = 4096


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """[service.exportd.settings].

    A scrape has at most `series` series and `page_size` bytes, or it is refused. Every `every_ms`
    what is new goes to the collector, if one is declared; while that is away at most `queue_count`
    bodies and `queue_size` bytes wait, and it is tried again after `pause_max_ms` at the latest.
    """

    series: int = SERIES_DEFAULT
    page_size: int = PAGE_SIZE_DEFAULT
    every_ms: int = EVERY_DEFAULT
    pause_max_ms: int = PAUSE_DEFAULT
    queue_count: int = QUEUE_COUNT_DEFAULT
    queue_size: int = QUEUE_SIZE_DEFAULT

    def __post_init__(self) -> None:
        """Raises ValueError, which msgspec makes a ValidationError with the place in it."""
        ranges = (
            ("series", self.series, 1, SERIES_MAX),
            ("page_size", self.page_size, 4096, PAGE_SIZE_MAX),
            ("every_ms", self.every_ms, EVERY_MIN, EVERY_MAX),
            ("pause_max_ms", self.pause_max_ms, PAUSE_MIN, EVERY_MAX),
            ("queue_count", self.queue_count, 1, QUEUE_COUNT_MAX),
            ("queue_size", self.queue_size, 4096, QUEUE_SIZE_MAX),
        )
        for name, value, least, most in ranges:
            if not least <= value <= most:
                raise ValueError(f"{name} is {value}, not from {least} to {most}")

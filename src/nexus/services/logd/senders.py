"""Who has sent what: one row per sender, its rate, and what became of its records.

    unknown --heard--> row --64 others were heard since--> folded into the row of service 0

Core senders' rows never give way. A sender that comes back after its row was folded has a new row;
its records of before count where the old row went. So for every row, at any time: accepted = kept
+ overwritten.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Final, Optional

from nexus.abi import Nanos, ServiceId
from nexus.protocols.logd import (
    RATE_MAX,
    RATE_WINDOW_NS,
    SENDER_ROWS_MAX,
    LogdStatus,
    SenderRow,
)

OTHERS: Final = ServiceId(0)  # the row of all senders that gave way
CORE_MAX: Final = SENDER_ROWS_MAX // 2  # core senders; the other rows are for everybody


@dataclass(slots=True, eq=False)
class Row:
    """The account of one sender, and the window of its rate: from its first record, 1 s long."""

    service: ServiceId
    rate_max: int
    accepted: int = 0
    invalid_args: int = 0
    over_limit: int = 0
    rate_limited: int = 0
    overwritten: int = 0
    window_start: Nanos | None = None
    window_count: int = 0
    folded_into: Optional["Row"] = None

    @property
    def current(self) -> "Row":
        """The row in which this one's records count now."""
        return self if self.folded_into is None else self.folded_into

    def is_over_rate(self, now: Nanos) -> bool:
        """Whether the window that `now` is in is used up; a new one begins if the last is over."""
        if self.window_start is None or now - self.window_start >= RATE_WINDOW_NS:
            self.window_start = now
            self.window_count = 0
        return self.window_count >= self.rate_max

    def on_accepted(self) -> None:
        """A record of this sender is in the journal."""
        self.accepted += 1
        self.window_count += 1

    def on_refused(self, status: LogdStatus) -> None:
        """A record of this sender was refused, which uses up nothing of its rate."""
        match status:
            case LogdStatus.INVALID_ARGS:
                self.invalid_args += 1
            case LogdStatus.OVER_LIMIT:
                self.over_limit += 1
            case LogdStatus.RATE_LIMITED:
                self.rate_limited += 1

    def add(self, other: "Row") -> None:
        """Count from now on what `other` has counted so far."""
        self.accepted += other.accepted
        self.invalid_args += other.invalid_args
        self.over_limit += other.over_limit
        self.rate_limited += other.rate_limited
        self.overwritten += other.overwritten

    def told(self) -> SenderRow:
        """The row as it travels."""
        return SenderRow(
            self.service,
            self.accepted,
            self.invalid_args,
            self.over_limit,
            self.rate_limited,
            self.overwritten,
        )


class Senders:
    """At most SENDER_ROWS_MAX rows, the least recently heard first, and the one of the others."""

    def __init__(
        self, core: Collection[ServiceId] = (), core_rate: int = RATE_MAX, rate: int = RATE_MAX
    ) -> None:
        assert len(core) <= CORE_MAX, "there is always a row that may give way"
        self._core = frozenset(core)
        self._core_rate = core_rate
        self._rate = rate
        self._rows: dict[ServiceId, Row] = {}
        self._others = Row(OTHERS, 0)
        self._folded = 0  # rows that gave way

    def __len__(self) -> int:
        return len(self._rows)

    def is_core(self, service: ServiceId) -> bool:
        """Whether the system file names this sender as one that must be heard."""
        return service in self._core

    def heard(self, service: ServiceId) -> Row:
        """The row of a sender that has sent something now; the one heard longest ago gives way."""
        row = self._rows.pop(service, None)
        if row is None:
            if len(self._rows) >= SENDER_ROWS_MAX:
                self._fold(next(each for each in self._rows if each not in self._core))
            row = Row(service, self._core_rate if self.is_core(service) else self._rate)
        self._rows[service] = row
        return row

    def rows(self) -> list[Row]:
        """Every row, by service; the others' first, once somebody gave way."""
        rows = [self._rows[service] for service in sorted(self._rows)]
        return [self._others, *rows] if self._folded else rows

    def totals(self) -> Row:
        """The sum of all rows."""
        total = Row(OTHERS, 0)
        for row in (self._others, *self._rows.values()):
            total.add(row)
        return total

    def _fold(self, service: ServiceId) -> None:
        row = self._rows.pop(service)
        self._others.add(row)
        row.folded_into = self._others
        self._folded += 1

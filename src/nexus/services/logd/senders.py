"""Who has sent what: one row per sender, its rate, and what became of its records.

    unknown --heard--> row --64 others were heard since--> folded into the row of service 0

Core senders' rows never give way, and of the others those that have a stream open go last. A sender
that comes back after its row was folded has a new row; its records of before count where the old
row went. So for every row, at any time: accepted = kept + overwritten.
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
COUNT_MAX: Final = (1 << 64) - 1  # what an answer can tell; there a counter stays
CORE_STREAMS: Final = 4  # times the stream rate of others that a core sender has
CORE_MAX: Final = SENDER_ROWS_MAX // 2  # core senders; the other rows are for everybody


@dataclass(slots=True, eq=False)
class Row:
    """The account of one sender, and the windows of its rates: of messages, and of the records of
    its streams. A window is 1 s long, from the first record on."""

    service: ServiceId
    rate_max: int
    stream_rate_max: int = 0
    accepted: int = 0
    invalid_args: int = 0
    over_limit: int = 0
    rate_limited: int = 0
    overwritten: int = 0
    unread: int = 0
    damaged: int = 0
    streams: int = 0  # open ones
    window_start: Nanos | None = None
    window_count: int = 0
    stream_start: Nanos | None = None
    stream_count: int = 0
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
        """A message of this sender is in the journal."""
        self.accepted += 1
        self.window_count += 1

    def on_opened(self) -> None:
        """A stream of this sender is open, which uses up as much of its rate as a record."""
        self.streams += 1
        self.window_count += 1

    def stream_room(self, now: Nanos) -> int:
        """How many records of its streams the window that `now` is in still takes."""
        if self.stream_start is None or now - self.stream_start >= RATE_WINDOW_NS:
            self.stream_start = now
            self.stream_count = 0
        return max(0, self.stream_rate_max - self.stream_count)

    @property
    def stream_window_end(self) -> Nanos:
        """When the next window of its streams begins."""
        return Nanos((self.stream_start or 0) + RATE_WINDOW_NS)

    def on_missing(self, unread: int, damaged: int) -> None:
        """So many more of its streams were not read, or were no records. A ring may claim any
        number, again with each opening: the counters stay at their largest value."""
        self.unread = min(self.unread + unread, COUNT_MAX)
        self.damaged = min(self.damaged + damaged, COUNT_MAX)

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
        self.on_missing(other.unread, other.damaged)

    def told(self) -> SenderRow:
        """The row as it travels."""
        return SenderRow(
            self.service,
            self.accepted,
            self.invalid_args,
            self.over_limit,
            self.rate_limited,
            self.overwritten,
            self.unread,
            self.damaged,
        )


class Senders:
    """At most SENDER_ROWS_MAX rows, the least recently heard first, and the one of the others."""

    def __init__(
        self,
        core: Collection[ServiceId] = (),
        core_rate: int = RATE_MAX,
        rate: int = RATE_MAX,
        stream_rate: int = 0,
    ) -> None:
        assert len(core) <= CORE_MAX, "there is always a row that may give way"
        self._core = frozenset(core)
        self._core_rate = core_rate
        self._rate = rate
        self._stream_rate = stream_rate
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
                self._fold(self._first_out())
            row = self._new(service)
        self._rows[service] = row
        return row

    def set_rates(self, core: Collection[ServiceId], core_rate: int, stream_rate: int) -> None:
        """New settings: in force for every sender's next record."""
        assert len(core) <= CORE_MAX, "there is always a row that may give way"
        self._core = frozenset(core)
        self._core_rate = core_rate
        self._stream_rate = stream_rate
        for row in self._rows.values():
            row.rate_max = core_rate if self.is_core(row.service) else self._rate
            row.stream_rate_max = self._stream_rate_of(row.service)

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

    def _new(self, service: ServiceId) -> Row:
        rate = self._core_rate if self.is_core(service) else self._rate
        return Row(service, rate, self._stream_rate_of(service))

    def _stream_rate_of(self, service: ServiceId) -> int:
        return self._stream_rate * (CORE_STREAMS if self.is_core(service) else 1)

    def _first_out(self) -> ServiceId:
        """Who gives way: the one heard longest ago of those that have no stream, or else of all."""
        movable = [each for each in self._rows if each not in self._core]
        return next((each for each in movable if not self._rows[each].streams), movable[0])

    def _fold(self, service: ServiceId) -> None:
        row = self._rows.pop(service)
        self._others.add(row)
        row.folded_into = self._others
        self._folded += 1

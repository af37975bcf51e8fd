"""Who has asked what: one row per sender, its rate, and what became of its requests.

    unknown --heard--> row --SENDER_ROWS_MAX others were heard since--> folded into service 0

Core senders' rows never give way, nor does that of a sender whose page is open while there is
another. A sender that comes back after its row was folded has a new row: nobody is locked out by
those who came before (services.md W5).
"""

from collections.abc import Collection
from dataclasses import dataclass, fields
from typing import Final

from nexus.abi import Nanos, ServiceId
from nexus.protocols.metricsd import SENDER_ROWS_MAX, MetricsdStatus, SenderRow

OTHERS: Final = ServiceId(0)  # the row of all senders that gave way
COUNT_MAX: Final = (1 << 64) - 1  # what an answer can tell; there a counter stays
RATE_WINDOW: Final = Nanos(1_000_000_000)  # ns, from the first request of a window on
ROWS_MAX: Final = SENDER_ROWS_MAX - 1  # the answer has one more, the others'
EXACT_MAX: Final = 4 * ROWS_MAX  # senders whose rate is kept; those heard last are told


@dataclass(slots=True, eq=False)
class Row:
    """The account of one sender, and the window of its rate: from its first request, 1 s long."""

    service: ServiceId
    accepted: int = 0
    invalid_args: int = 0
    over_limit: int = 0
    rate_limited: int = 0
    spans: int = 0
    spans_lost: int = 0
    stray: int = 0
    window_start: Nanos | None = None
    window_count: int = 0

    def charge(self, now: Nanos, rate_max: int) -> bool:
        """Count one request; False if the window that `now` is in was used up before it."""
        if self.window_start is None or now - self.window_start >= RATE_WINDOW:
            self.window_start = now
            self.window_count = 0
        if self.window_count >= rate_max:
            return False
        self.window_count += 1
        return True

    def on_refused(self, status: MetricsdStatus) -> None:
        """A request of this sender was refused."""
        match status:
            case MetricsdStatus.INVALID_ARGS:
                self.invalid_args += 1
            case MetricsdStatus.OVER_LIMIT:
                self.over_limit += 1
            case MetricsdStatus.RATE_LIMITED:
                self.rate_limited += 1
            case MetricsdStatus.NOT_FOUND:
                pass  # an answer, and no fault of the request

    def add(self, other: "Row") -> None:
        """Count from now on what `other` has counted so far."""
        for name in COUNTS:
            setattr(self, name, min(getattr(self, name) + getattr(other, name), COUNT_MAX))

    def on_missing(self, spans: int, strays: int) -> None:
        """So many spans more were not read, and words belong to no series. A page may claim any
        number of spans, again with each opening."""
        self.spans_lost = min(self.spans_lost + spans, COUNT_MAX)
        self.stray = min(self.stray + strays, COUNT_MAX)

    def told(self, series: int) -> SenderRow:
        """The row as it travels."""
        return SenderRow(
            service=self.service, series=series, **{name: getattr(self, name) for name in COUNTS}
        )


COUNTS: Final = tuple(
    each.name
    for each in fields(Row)
    if each.name not in ("service", "window_start", "window_count")
)


class Senders:
    """At most EXACT_MAX rows, the least recently heard first, and the one of the others."""

    def __init__(self, core: Collection[ServiceId], core_rate: int, rate: int) -> None:
        self._rows: dict[ServiceId, Row] = {}
        self._others = Row(OTHERS)
        self.configure(core, core_rate, rate)

    def configure(self, core: Collection[ServiceId], core_rate: int, rate: int) -> None:
        """Use these rates from now on; windows that are used up stay so until they end."""
        assert len(core) < ROWS_MAX, "there is always a row that may give way"
        self._core = frozenset(core)
        self._core_rate = core_rate
        self._rate = rate

    def __len__(self) -> int:
        return len(self._rows)

    def is_core(self, service: ServiceId) -> bool:
        """Whether the system file names this sender as one that must be heard."""
        return service in self._core

    def rate_of(self, service: ServiceId) -> int:
        """Requests of this sender in one window."""
        return self._core_rate if self.is_core(service) else self._rate

    def heard(self, service: ServiceId) -> Row:
        """The row of a sender that asks something now; the one heard longest ago gives way."""
        row = self._rows.pop(service, None)
        if row is None:
            if len(self._rows) >= EXACT_MAX:
                gone = next(each for each in self._rows if each not in self._core)
                self._others.add(self._rows.pop(gone))
            row = Row(service)
        self._rows[service] = row
        return row

    def row(self, service: ServiceId) -> Row:
        """The row of a sender, heard or not; no other gives way for it beyond the bound."""
        row = self._rows.get(service)
        return self.heard(service) if row is None else row

    def rows(self) -> tuple[Row, list[Row]]:
        """The others' row, with those not heard lately, and the rows heard last, by service."""
        latest = list(self._rows)[-ROWS_MAX:]
        others = Row(OTHERS)
        others.add(self._others)
        for service in list(self._rows)[:-ROWS_MAX]:
            others.add(self._rows[service])
        return others, [self._rows[service] for service in sorted(latest)]

    def totals(self) -> Row:
        """The sum of all rows."""
        total = Row(OTHERS)
        for row in (self._others, *self._rows.values()):
            total.add(row)
        return total

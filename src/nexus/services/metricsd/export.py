"""Changed series and ended spans as records of the log: metricsd -> nexus-log -> logd.

    changed --its turn, budget left--> written --the log lost lines since--> changed
                      --no budget left--> changed, for the next turn

A series has one record per turn at most, with what it says then: after its last update the next
turn has it. What the log could not take is counted, and every series is told again.
"""

from collections.abc import Mapping
from typing import Final, Protocol

from nexus.abi import Nanos, service_id
from nexus.protocols.logd import FIELDS_SIZE_MAX, Level
from nexus.protocols.metricsd import Kind, Span
from nexus.services.metricsd.checks import MAKER_SIZE, maker_of
from nexus.services.metricsd.config import SECOND, Settings
from nexus.services.metricsd.series import Series, Table
from nexus.services.metricsd.spans import Kept

METRIC_EVENT: Final = "metric.v1"
SPAN_EVENT: Final = "span.v1"
SPAN_SHARE: Final = (
    4  # of the records, one in so many may be of a span: the journal is no trace store
)
UNTOLD: Final = frozenset(service_id(name) for name in ("logd", "metricsd"))
"""Whose spans the journal is not told of: they come of telling it, and would never end. So do those
of whom they have asked to write something down."""
UNTOLD_MAKERS: Final = frozenset(maker_of(service) for service in UNTOLD)

BUCKETS_SIZE_MAX: Final = 128  # characters of all buckets; beyond it only count and sum are told
FIELD_COST: Final = 2  # bytes of a field besides key and value, as logd counts


class Log(Protocol):
    """What metricsd needs of nexus.log.Logger."""

    def write(self, level: Level, text: str, fields: Mapping[str, str | int] | None = None) -> bool:
        """Write one line; whether there was room for it."""

    def counts(self) -> "Counts":
        """What became of the lines."""


class Counts(Protocol):
    """The account of a log, as far as it is looked at here."""

    @property
    def lost(self) -> int:
        """Lines that logd never had."""

    @property
    def refused(self) -> int:
        """Lines that logd did not take."""

    @property
    def bound(self) -> int:
        """How often a way to logd was found."""


class Exporter:
    """Writes what changed, `export_rate` records per second at most."""

    def __init__(self, log: Log, settings: Settings, table: Table, kept: Kept) -> None:
        self._log = log
        self._table = table
        self._kept = kept
        self.exported = 0  # records written
        self.lost = 0  # records the log lost or refused, and spans that were pushed out before
        self._log_lost = 0  # lines of the log that were lost when it was looked at last
        self._span_next = 1  # number of the first span that was not told
        self._next: Nanos | None = None  # when a new turn begins
        self._turn: list[int] = []  # series of this turn that are still to be told, reversed
        self._budget_at: Nanos | None = None
        self._budget = 0  # records that may be written now
        self._span_budget = 0  # of these, of spans
        self.configure(settings)

    def configure(self, settings: Settings) -> None:
        """Use these from the next turn on."""
        self._every = settings.export_ns
        self._rate = settings.export_rate

    @property
    def has_sink(self) -> bool:
        """Whether the log has found its way to logd."""
        return self._log.counts().bound > 0

    def on_time(self, now: Nanos) -> None:
        """Write what is due and fits the budget."""
        self._look_at_losses()
        if self._next is None or now >= self._next:
            self._next = Nanos(now + self._every)
            left = set(self._turn)
            changed = [
                each.number
                for each in self._table
                if each.number not in left and self._is_changed(each)
            ]
            self._turn = changed[::-1] + self._turn
        if self._budget_at is None or now - self._budget_at >= SECOND:
            self._budget_at = now
            self._budget = self._rate
            self._span_budget = max(1, self._rate // SPAN_SHARE)
        self._write_series()
        self._write_spans()

    def _look_at_losses(self) -> None:
        """If lines were lost since, nobody knows which: every series is told again."""
        counts = self._log.counts()
        lost = counts.lost + counts.refused
        if lost > self._log_lost:
            self.lost += lost - self._log_lost
            self._log_lost = lost
            for series in self._table:
                series.exported = None

    def _is_changed(self, series: Series) -> bool:
        return not series.passing and series.state != series.exported

    def _write_series(self) -> None:
        while self._turn and self._budget:
            series = self._table.by_number(self._turn[-1])
            if series is not None:
                if not self._write(f"metric {series.key.name}", metric_fields(series)):
                    return
                series.exported = series.state
            _ = self._turn.pop()

    def _write_spans(self) -> None:
        if self._turn:
            return  # series first: a span is told once, and later is as good
        for span in self._kept.since(self._span_next):
            if not self._budget or not self._span_budget:
                return
            self.lost += span.number - self._span_next
            self._span_next = span.number
            if _comes_of_telling(span):
                self._span_next = span.number + 1
                continue
            self._span_budget -= 1
            if not self._write(f"span {span.name}", span_fields(span)):
                return
            self._span_next = span.number + 1

    def _write(self, text: str, fields: Mapping[str, str | int]) -> bool:
        self._budget -= 1
        if not self._log.write(Level.INFO, text, fields):
            self._budget = 0  # no room; the account of the log has it
            return False
        self.exported += 1
        return True


def _comes_of_telling(span: Span) -> bool:
    """Whether logd or metricsd made this span, or the request that it served."""
    return span.service in UNTOLD or span.parent[:MAKER_SIZE] in UNTOLD_MAKERS


def metric_fields(series: Series) -> dict[str, str | int]:
    """What a record says of a series, in the order of its keys in the page of the guide."""
    fields: dict[str, str | int] = {
        "event": METRIC_EVENT,
        "kind": series.key.kind.name.lower(),
        "name": series.key.name,
        "owner": f"0x{series.key.service:016x}",
        "instance": series.instance.generation,
        "series": series.number,
    }
    if series.key.kind is Kind.HISTOGRAM:
        fields["count"] = series.count
        fields["sum"] = series.sum
        buckets = ",".join(str(each) for each in series.buckets)
        if len(buckets) <= BUCKETS_SIZE_MAX:
            fields["buckets"] = buckets
    else:
        fields["value"] = series.value
    if series.unit:
        fields["unit"] = series.unit
    if series.key.labels:
        fields["labels"] = labels_text(series.key.labels)
    if fields_size(fields) > FIELDS_SIZE_MAX:
        _ = fields.pop("buckets", None)
    return fields


def span_fields(span: Span) -> dict[str, str | int]:
    """What a record says of a span that has ended."""
    fields: dict[str, str | int] = {
        "event": SPAN_EVENT,
        "trace": span.trace.hex(),
        "span": span.span.hex(),
        "parent": span.parent.hex(),
        "name": span.name,
        "duration_ns": span.end - span.start,
        "status": span.status.name.lower(),
        "owner": f"0x{span.service:016x}",
        "instance": span.generation,
    }
    if span.attributes:
        told = labels_text([(each.key, each.value) for each in span.attributes])
        if fields_size(fields) + len(told.encode()) + len("attributes") < FIELDS_SIZE_MAX:
            fields["attributes"] = told
    return fields


def labels_text(labels: tuple[tuple[str, str], ...] | list[tuple[str, str]]) -> str:
    """Labels as OpenMetrics writes them, so that no value can pass for another label."""
    return ",".join(f'{key}="{_quoted(value)}"' for key, value in labels)


def _quoted(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def fields_size(fields: Mapping[str, str | int]) -> int:
    """Bytes that fields count for in a record."""
    return sum(len(key) + len(str(value).encode()) + FIELD_COST for key, value in fields.items())

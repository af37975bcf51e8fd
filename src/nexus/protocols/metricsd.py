"""metricsd protocol: create a series, update it, end a span, and read all of it back.

The fast way: a task opens its page (OpenPage) and creates a series once (CreateSeries); from then
on an update is a store into its own page (nexus.telemetry), and metricsd reads there. The message
way (Add, SetGauge, Observe, SpanStart, SpanEnd) is for tasks without a page. A series belongs to
the sender the kernel stamped; nobody can write into another's. Reading needs the right
`metrics.read`.

*Source*: services.md 3; the limits are defaults of [service.metricsd.settings].
"""

from enum import IntEnum
from typing import Annotated, Final, TypeAlias

from nexus.abi import SERVICE_NAME_SIZE_MAX
from nexus.wire import I64, U8, U16, U32, U64, Blob, List, Message, Protocol, Request, Text

METRICS_READ: Final = "metrics.read"  # the right that the Get requests need
NAME_SIZE_MAX: Final = 48  # characters of the name of a metric or a span
LABELS_MAX: Final = 8  # labels of a series, attributes of a span
KEY_SIZE_MAX: Final = 32  # characters
VALUE_SIZE_MAX: Final = 96  # characters
LABELS_SIZE_MAX: Final = (
    192  # bytes of UTF-8 of all keys and values of one series (services.md 3.4)
)
NAME_PATTERN: Final = r"^[a-zA-Z_][a-zA-Z0-9_.]*\Z"
KEY_PATTERN: Final = r"^[a-zA-Z_][a-zA-Z0-9_.]*\Z"
METRICS_PAGE_MAX: Final = 256 * 1024  # bytes of a page; all of it is read every second
BOUNDS_MAX: Final = 16  # buckets of a histogram, without the last one up to infinity
TRACE_SIZE: Final = 16  # bytes; W3C
SPAN_SIZE: Final = 8  # bytes; the first four are the low half of its maker's service id
SERIES_ROWS_MAX: Final = 16  # of one answer; fewer when they are large
WINDOW_ROWS_MAX: Final = 16
SPAN_ROWS_MAX: Final = 12
SENDER_ROWS_MAX: Final = 24

# What a request may carry at all: one just over a limit gets its own status, no broken frame.
NAME_WIRE_MAX: Final = 96
KEY_WIRE_MAX: Final = 64
VALUE_WIRE_MAX: Final = 256
LABELS_WIRE_MAX: Final = 16


class MetricsdStatus(IntEnum):
    """Why metricsd refuses. The numbers are wire format and are never reused."""

    INVALID_ARGS = 16  # a span of another maker, a secret-looking key, a kind that does not fit
    OVER_LIMIT = 17  # larger than allowed, or one series, span or page more than allowed
    RATE_LIMITED = 18  # the sender's events of this window are used up
    NOT_FOUND = 19  # no such span is open, no such series is known


class Kind(IntEnum):
    """What a series is. The numbers are wire format, and words of the page's directory."""

    COUNTER = 1  # U64, only grows, stays at its largest value
    GAUGE = 2  # I64
    HISTOGRAM = 3  # count and sum (U64) and a count per bucket


class SpanStatus(IntEnum):
    """How a span ended (OpenTelemetry's words)."""

    UNSET = 0
    OK = 1
    ERROR = 2
    TIMED_OUT = 3  # never ended: metricsd closed it
    LOST = 4  # its task ended before it did


class Label(Message):
    """A label of a series, or an attribute of a span."""

    key: Annotated[str, Text(size_min=1, size_max=KEY_WIRE_MAX)]
    value: Annotated[str, Text(size_max=VALUE_WIRE_MAX)]


Labels = Annotated[list[Label], List(count_max=LABELS_WIRE_MAX)]
Name = Annotated[str, Text(size_min=1, size_max=NAME_WIRE_MAX)]
Bounds = Annotated[list[Annotated[int, U64()]], List(count_max=BOUNDS_MAX)]
TraceId = Annotated[bytes, Blob(size_min=TRACE_SIZE, size_max=TRACE_SIZE)]
SpanId = Annotated[bytes, Blob(size_min=SPAN_SIZE, size_max=SPAN_SIZE)]


class PageOpened(Message):
    """metricsd reads the page from now on; until when a span may stay open (ns)."""

    span_time_max: Annotated[int, U64()]


class OpenPage(Request[PageOpened], op=1, idempotent=True, refuses=MetricsdStatus, moves=True):
    """Read my page, the shared VMO that moves along, instead of an earlier one of this instance.

    *Refuses*: INVALID_ARGS (no shared VMO, no page in it), OVER_LIMIT (larger than
    METRICS_PAGE_MAX, or one page too many), RATE_LIMITED.
    """


class SeriesCreated(Message):
    """The series, and the first of its words in the page: one for counter and gauge, for a
    histogram sequence, count, sum and one per bucket, the last up to infinity."""

    series: Annotated[int, U32()]
    word: Annotated[int, U32()]


class CreateSeries(Request[SeriesCreated], op=2, idempotent=True, refuses=MetricsdStatus):
    """A series of one's own, or the one there already is. `bounds` are for histograms, upwards.

    *Refuses*: INVALID_ARGS, OVER_LIMIT, RATE_LIMITED; NOT_FOUND without an open page.
    """

    kind: Kind
    name: Name
    labels: Labels
    bounds: Bounds
    unit: Annotated[str, Text(size_max=16)]


class Taken(Message):
    """The event is counted."""


class Add(Request[Taken], op=3, idempotent=False, refuses=MetricsdStatus):
    """Add to a counter, by message. *Refuses*: INVALID_ARGS, OVER_LIMIT, RATE_LIMITED."""

    name: Name
    labels: Labels
    value: Annotated[int, U64()]


class SetGauge(Request[Taken], op=4, idempotent=True, refuses=MetricsdStatus):
    """Set a gauge, by message. *Refuses*: as Add."""

    name: Name
    labels: Labels
    value: Annotated[int, I64()]


class Observe(Request[Taken], op=5, idempotent=False, refuses=MetricsdStatus):
    """One value (ns) for a histogram of the default buckets, by message. *Refuses*: as Add."""

    name: Name
    labels: Labels
    value: Annotated[int, U64()]


class SpanStart(Request[Taken], op=6, idempotent=False, refuses=MetricsdStatus):
    """Begin a span, by message. `parent` all zeros is none. *Refuses*: INVALID_ARGS (a span id
    that is not bound to the sender, or is open), OVER_LIMIT, RATE_LIMITED."""

    span: SpanId
    trace: TraceId
    parent: SpanId
    at: Annotated[int, U64()]
    name: Name
    attributes: Labels


class SpanEnd(Request[Taken], op=7, idempotent=False, refuses=MetricsdStatus):
    """End a span, by message. *Refuses*: NOT_FOUND, INVALID_ARGS, OVER_LIMIT, RATE_LIMITED."""

    span: SpanId
    at: Annotated[int, U64()]
    status: SpanStatus
    attributes: Labels


class Series(Message):
    """A series as metricsd last read it. `value` is a counter's or gauge's; a histogram has
    `count`, `sum` and `buckets`. `at` is when it was read (kernel clock), `since` when its
    instance began to count, never after `at`. `live` is false for a series of an instance that has
    ended. `service` 0 is metricsd's own, about what it refused."""

    series: Annotated[int, U32()]
    service: Annotated[int, U64()]
    generation: Annotated[int, U32()]
    kind: Kind
    name: Annotated[str, Text(size_max=NAME_SIZE_MAX)]
    unit: Annotated[str, Text(size_max=16)]
    labels: Annotated[list[Label], List(count_max=LABELS_MAX)]
    value: Annotated[int, I64()]
    count: Annotated[int, U64()]
    sum: Annotated[int, U64()]
    bounds: Bounds
    buckets: Annotated[list[Annotated[int, U64()]], List(count_max=BOUNDS_MAX + 1)]
    at: Annotated[int, U64()]
    live: bool
    since: Annotated[int, U64()]


class SeriesPage(Message):
    """Series in the order of their numbers; `next` is what to ask for then, 0 at the end."""

    next: Annotated[int, U32()]
    series: Annotated[list[Series], List(count_max=SERIES_ROWS_MAX)]


class GetSeries(Request[SeriesPage], op=8, idempotent=True):
    """Series with number >= `since`, of `service` unless 0, whose name begins with `name`; the
    pages are read now. Needs metrics.read."""

    since: Annotated[int, U32()]
    count: Annotated[int, U8(minimum=1, maximum=SERIES_ROWS_MAX)]
    service: Annotated[int, U64()]
    name: Annotated[str, Text(size_max=NAME_SIZE_MAX)]


class Window(Message):
    """A roll-up: what one series did from `start` (ns since 1970) on. Of a counter `sum` is the
    increase, `count` the readings that found one, `min` and `max` the smallest and the largest of
    them, `last` its value; of a gauge `count` is readings, `sum`, `min`, `max`, `last` their
    values; of a histogram `count` and `sum` are observations, `buckets` their counts, `min` and
    `max` the bounds of the lowest and the highest bucket among them, `last` all observations of
    that instance. `boot` is the number of the boot."""

    start: Annotated[int, U64()]
    boot: Annotated[int, U32()]
    count: Annotated[int, U64()]
    sum: Annotated[int, I64()]
    min: Annotated[int, I64()]
    max: Annotated[int, I64()]
    last: Annotated[int, I64()]
    buckets: Annotated[list[Annotated[int, U64()]], List(count_max=BOUNDS_MAX + 1)]


class WindowPage(Message):
    """Windows, oldest first; `next` is the `since` of the next page, 0 at the end."""

    next: Annotated[int, U64()]
    windows: Annotated[list[Window], List(count_max=WINDOW_ROWS_MAX)]


class Resolution(IntEnum):
    """Which roll-ups; how long they are is a setting: 10 s and 60 s if nothing else is said."""

    SHORT = 1
    LONG = 2


class GetHistory(Request[WindowPage], op=9, idempotent=True, refuses=MetricsdStatus):
    """The roll-ups of one series of `service` that begin at `since` (ns since 1970) or later, over
    restarts and boots. Needs metrics.read. *Refuses*: NOT_FOUND."""

    service: Annotated[int, U64()]
    name: Annotated[str, Text(size_max=NAME_SIZE_MAX)]
    labels: Labels
    resolution: Resolution
    since: Annotated[int, U64()]
    count: Annotated[int, U8(minimum=1, maximum=WINDOW_ROWS_MAX)]


class Span(Message):
    """A span. Times are the kernel's clock, `end` is 0 while it is open; `number` grows, `wall` is
    `start` in ns since 1970."""

    number: Annotated[int, U64()]
    trace: TraceId
    span: SpanId
    parent: SpanId
    service: Annotated[int, U64()]
    pid: Annotated[int, U32()]
    generation: Annotated[int, U32()]
    name: Annotated[str, Text(size_max=NAME_SIZE_MAX)]
    start: Annotated[int, U64()]
    end: Annotated[int, U64()]
    wall: Annotated[int, U64()]
    status: SpanStatus
    attributes: Annotated[list[Label], List(count_max=2 * LABELS_MAX)]


class SpanPage(Message):
    """Spans in the order of their numbers; `next` is what to ask for then, 0 at the end."""

    next: Annotated[int, U64()]
    spans: Annotated[list[Span], List(count_max=SPAN_ROWS_MAX)]


class GetSpans(Request[SpanPage], op=10, idempotent=True):
    """Spans with number >= `since`: of the trace `trace` unless empty, of `service` and of `pid`
    unless 0, whose name begins with `name`; the span rings are read first. Open ones come last,
    with end 0. Needs metrics.read."""

    since: Annotated[int, U64()]
    count: Annotated[int, U8(minimum=1, maximum=SPAN_ROWS_MAX)]
    trace: Annotated[bytes, Blob(size_max=TRACE_SIZE)]
    service: Annotated[int, U64()]
    pid: Annotated[int, U32()]
    name: Annotated[str, Text(size_max=NAME_SIZE_MAX)]


class SenderRow(Message):
    """What metricsd counts for one sender; service 0 collects the rows that gave way."""

    service: Annotated[int, U64()]
    series: Annotated[int, U16()]
    accepted: Annotated[int, U64()]
    invalid_args: Annotated[int, U64()]
    over_limit: Annotated[int, U64()]
    rate_limited: Annotated[int, U64()]
    spans: Annotated[int, U64()]
    spans_lost: Annotated[int, U64()]  # overwritten in the ring before they were read
    stray: Annotated[int, U64()]  # words written that belong to no series


class Stats(Message):
    """metricsd's own account. Sizes are bytes; `written_today` counts against `written_max`."""

    series: Annotated[int, U32()]
    series_max: Annotated[int, U32()]
    series_per_metric_max: Annotated[int, U32()]
    open_spans: Annotated[int, U32()]
    open_spans_max: Annotated[int, U32()]
    spans_kept: Annotated[int, U32()]
    spans_timed_out: Annotated[int, U64()]
    torn_reads: Annotated[int, U64()]  # groups of words that were read again
    torn_given_up: Annotated[int, U64()]  # and those that never came out equal; the old one stands
    exported: Annotated[int, U64()]
    export_lost: Annotated[int, U64()]
    segments: Annotated[int, U16()]
    segments_max: Annotated[int, U16()]
    windows_short: Annotated[int, U16()]
    windows_long: Annotated[int, U16()]
    windows_max: Annotated[int, U16()]
    written_today: Annotated[int, U64()]
    written_max: Annotated[int, U64()]
    write_refused: Annotated[int, U64()]  # writes left out for the sake of the budget
    recovered: Annotated[int, U32()]  # WAL records read back at the start
    recovery_lost: Annotated[int, U32()]  # and those that were not good
    settings_generation: Annotated[int, U32()]  # grows with each change without a restart
    denied: Annotated[int, U64()]
    rows: Annotated[list[SenderRow], List(count_max=SENDER_ROWS_MAX)]


class GetStats(Request[Stats], op=11, idempotent=True):
    """The counters; nobody needs a right for them."""


MetricsdRequest: TypeAlias = (
    OpenPage
    | CreateSeries
    | Add
    | SetGauge
    | Observe
    | SpanStart
    | SpanEnd
    | GetSeries
    | GetHistory
    | GetSpans
    | GetStats
)
PROTOCOL: Final = Protocol(
    "metricsd",
    number=14,
    version=2,
    requests=(
        OpenPage,
        CreateSeries,
        Add,
        SetGauge,
        Observe,
        SpanStart,
        SpanEnd,
        GetSeries,
        GetHistory,
        GetSpans,
        GetStats,
    ),
)

assert LABELS_MAX <= LABELS_WIRE_MAX
assert NAME_SIZE_MAX >= SERVICE_NAME_SIZE_MAX

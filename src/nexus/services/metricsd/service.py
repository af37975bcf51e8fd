"""metricsd: counters, gauges, histograms and spans of every service, bounded, read where they are.

Owns the table of series, the spans that are kept, and the history in /state/observability/metricsd.
Reads the pages of others and trusts nothing in them: what does not fit is counted and left out.
Trusts the kernel's word about a sender. Never waits for anybody while it takes in: its log and its
store are spoken to without waiting for an answer, and what they do not take is counted.

Order of checks: rate, shape, size, caps. Every request that makes or changes something uses up one
of its sender's `rate` requests per second, also one that is then refused.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any, Final, Protocol, assert_never

import msgspec

from nexus.abi import (
    CONTROL_LINK_SIZE,
    AbiError,
    CapClose,
    CapKind,
    CapQuery,
    ClockMap,
    ConsoleWrite,
    LinkId,
    Nanos,
    Slot,
    VmoWatch,
)
from nexus.ipc import Client, RetryBudget, RouteFailure
from nexus.protocols.metricsd import (
    METRICS_PAGE_MAX,
    METRICS_READ,
    PROTOCOL,
    Add,
    CreateSeries,
    GetHistory,
    GetSeries,
    GetSpans,
    GetStats,
    Kind,
    MetricsdRequest,
    MetricsdStatus,
    Observe,
    OpenPage,
    PageOpened,
    SenderRow,
    SeriesCreated,
    SeriesPage,
    SetGauge,
    Span,
    SpanEnd,
    SpanPage,
    SpanStart,
    SpanStatus,
    Stats,
    Taken,
    WindowPage,
)
from nexus.protocols.metricsd import Series as ToldSeries
from nexus.protocols.statefsd import PROTOCOL as STATEFSD
from nexus.runtime import BINDS_MAX, Call, Refusal
from nexus.runtime.program import Context, program_of
from nexus.services.metricsd import checks
from nexus.services.metricsd.config import Settings
from nexus.services.metricsd.export import Exporter, Log
from nexus.services.metricsd.history import History
from nexus.services.metricsd.pages import Page, read_values
from nexus.services.metricsd.requests import NAMES as REQUEST_NAMES
from nexus.services.metricsd.requests import Requests
from nexus.services.metricsd.senders import Row, Senders
from nexus.services.metricsd.series import (
    DEFAULT_BOUNDS,
    Caps,
    Instance,
    Key,
    Own,
    Series,
    Table,
    sorted_labels,
)
from nexus.services.metricsd.spans import Begun, Kept, OpenSpans
from nexus.telemetry import WORD_MAX, NoPage
from nexus.wire import HEADER_SIZE, encode

METRICS_TARGET: Final = "metrics"  # what metrics.read is asked for; there is one
PAGES_MAX: Final = 64  # open pages; more than the runtime keeps links
ANSWER_HEAD_SIZE: Final = 64  # bytes of an answer besides its rows
ANSWER_SIZE_MAX: Final = CONTROL_LINK_SIZE - HEADER_SIZE - ANSWER_HEAD_SIZE
"""Bytes of the rows of one answer: its frame fits the smallest link there is."""

SINK: Final = "logd"
STATEFSD_NAME: Final = "statefsd"
CONNECT_ATTEMPTS_MAX: Final = 3  # of one search for statefsd
CONNECT_BACKOFF: Final = Nanos(5_000_000)  # ns
OVERFLOW_NAME: Final = "nexus_overflow_updates_total"

TOLD: Final = (
    MetricsdStatus.INVALID_ARGS,
    MetricsdStatus.OVER_LIMIT,
    MetricsdStatus.RATE_LIMITED,
)
"""Refusals that the console hears of, each once."""

assert PAGES_MAX > BINDS_MAX, "a task without a link is refused before it has a page to offer"

Change = OpenPage | CreateSeries | Add | SetGauge | Observe | SpanStart | SpanEnd
"""What makes or changes something, and so uses up some of its sender's rate."""


class Gate(Protocol):
    """What metricsd needs of runtime.authority.Authority."""

    async def require(self, call: Call, right: str, target: str = "") -> None:
        """Raises the refusal of a caller that may not."""


class Metricsd:
    """Serves nexus.protocols.metricsd."""

    def __init__(
        self,
        settings: Settings,
        authority: Gate,
        own: Instance,
        log: Log,
        history: History | None = None,
        *,
        needs_log: bool = False,
    ) -> None:
        self._settings = settings
        self._authority = authority
        self._log = log
        self._needs_log = needs_log
        self._table = Table(_caps(settings))
        self._own = Own(self._table, own)
        self._requests = Requests(self._table)
        self._senders = Senders(settings.core_ids, settings.core_rate, settings.rate)
        self._open = OpenSpans(settings.spans_open, settings.spans_open_each)
        self._kept = Kept(settings.spans_kept)
        self._history = History(settings) if history is None else history
        self._history.remember(lambda key: self._table.find(key) is not None)
        self._exporter = Exporter(log, settings, self._table, self._kept)
        self._pages: dict[Instance, Page] = {}
        self._links: dict[LinkId, Instance] = {}  # over which an instance was heard
        self._told: set[MetricsdStatus] = set()  # refusals that the console knows of
        self._offset = 0  # ns from the kernel's clock to 1970
        self._next_read = Nanos(0)
        self._now = Nanos(0)
        self._denied = 0
        self._timed_out = 0
        self._lost = 0  # spans whose task ended before they did
        self._torn = 0  # of pages that are closed; the open ones count themselves
        self._given_up = 0
        self._generation = 1  # of the settings

    async def start(self) -> None:
        """Take the clocks: windows and spans are told in ns since 1970."""
        clock = await ClockMap()
        self._now = clock.monotonic()
        self._offset = clock.wall() - self._now
        self._next_read = Nanos(self._now + self._settings.read_ns)
        self._history.start(self._now, self._offset)

    async def handle(self, call: Call, request: MetricsdRequest) -> Any:
        """The reply; a refusal is accounted for before its sender hears of it."""
        self._now = max(self._now, call.now)
        match request:
            case GetSeries() | GetHistory() | GetSpans():
                return await self._read(call, request)
            case GetStats():
                return self._stats()
            case _:
                return await self._take(call, request)

    async def _take(
        self,
        call: Call,
        request: Change,
    ) -> PageOpened | SeriesCreated | Taken:
        """What makes or changes something, for the instance the kernel names."""
        instance = Instance.of(call.sender)
        row = self._senders.heard(instance.service)
        cap = call.take_cap()
        try:
            self._check_rate(call, row)
            self._meet(call.link, instance)
            reply = await self._taken(call, instance, row, request, cap)
        except Refusal as refusal:
            assert isinstance(refusal.status, MetricsdStatus)
            row.on_refused(refusal.status)
            await self._tell(call, refusal.status)
            raise
        finally:
            if cap is not None:
                await CapClose(cap)
        row.accepted += 1
        return reply

    async def _taken(
        self,
        call: Call,
        instance: Instance,
        row: Row,
        request: Change,
        cap: Slot | None,
    ) -> PageOpened | SeriesCreated | Taken:
        match request:
            case OpenPage():
                return await self._open_page(call, instance, cap)
            case CreateSeries():
                return self._create(call, instance, request)
            case Add() | SetGauge() | Observe():
                return self._update(call, instance, request)
            case SpanStart():
                return self._start_span(call, instance, row, request)
            case SpanEnd():
                return self._end_span(call, instance, request)
            case _:
                assert_never(request)

    def _check_rate(self, call: Call, row: Row) -> None:
        if not row.charge(call.now, self._senders.rate_of(row.service)):
            raise call.refuse(MetricsdStatus.RATE_LIMITED)

    # ------------------------------------------------------------------ pages

    async def _open_page(self, call: Call, instance: Instance, cap: Slot | None) -> PageOpened:
        if cap is None:
            raise call.refuse(MetricsdStatus.INVALID_ARGS)
        if instance not in self._pages and len(self._pages) >= PAGES_MAX:
            raise call.refuse(MetricsdStatus.OVER_LIMIT)
        try:
            info = await CapQuery(cap)
            if info.kind is CapKind.VMO and self._is_page_over_limit(info.length):
                raise call.refuse(MetricsdStatus.OVER_LIMIT)
            view = await VmoWatch(cap)
        except AbiError as error:
            raise call.refuse(MetricsdStatus.INVALID_ARGS) from error
        try:
            page = Page(instance, view, self._now)
        except NoPage as error:
            view.release()
            call.note("page", str(error))
            raise call.refuse(MetricsdStatus.INVALID_ARGS) from error
        await self._close_page(instance)
        self._pages[instance] = page
        return PageOpened(self._settings.span_ns)

    async def _close_page(self, instance: Instance) -> None:
        """Read the page for the last time."""
        page = self._pages.pop(instance, None)
        if page is None:
            return
        await self._read_pages([page])
        for series in self._live_of(instance):
            series.word = None
        self._torn += page.reader.torn
        self._given_up += page.reader.given_up
        page.close()

    async def _read_pages(self, pages: list[Page]) -> None:
        """Everything of these pages: values, and the spans that ended since."""
        await read_values(pages)
        for page in pages:
            page.give_values(self._live_of(page.instance), self._now)
            self._drain(page)
            self._senders.row(page.instance.service).on_missing(0, page.take_strays())
            self._count_overflow(page)

    def _live_of(self, instance: Instance) -> list[Series]:
        return [each for each in self._table.live_of(instance.service) if each.instance == instance]

    def _drain(self, page: Page) -> None:
        """Take the spans that ended, and close those that are open for too long."""
        row = self._senders.row(page.instance.service)
        for begun, end, status in page.take_spans():
            row.spans += 1
            self._keep_of_page(page, begun, end, status)
        for begun in page.take_overdue(Nanos(self._now - self._settings.span_ns)):
            self._timed_out += 1
            self._keep_of_page(page, begun, self._now, SpanStatus.TIMED_OUT)
        lost = page.take_spans_lost()
        row.on_missing(lost, 0)
        self._requests.on_unread(page.instance, lost, self._now)
        row.invalid_args += page.take_faulty()

    def _count_overflow(self, page: Page) -> None:
        """Updates of series that were refused: they are counted in one word of the page."""
        count = page.reader.overflow
        if count:
            key = Key(page.instance.service, Kind.COUNTER, OVERFLOW_NAME, ())
            series = self._table.visible(key, page.instance, page.began)
            series.set_value(count, self._now)

    # ------------------------------------------------------------------ series

    def _create(self, call: Call, instance: Instance, request: CreateSeries) -> SeriesCreated:
        page = self._pages.get(instance)
        fault = checks.worst(
            checks.series_fault(request.name, request.labels),
            checks.bounds_fault(request.kind, request.bounds),
        )
        if request.name in REQUEST_NAMES:
            fault = MetricsdStatus.INVALID_ARGS
        if fault is not None:
            raise call.refuse(fault)
        if page is None:
            raise call.refuse(MetricsdStatus.NOT_FOUND)
        key = self._key(instance, request.kind, request.name, request.labels)
        series = self._table.find(key)
        if series is not None and series.live and series.instance == instance:
            if not series.paged or series.bounds != tuple(request.bounds):
                raise call.refuse(MetricsdStatus.INVALID_ARGS)
            if series.word is not None:
                return SeriesCreated(series.number, series.word)
        made = series is None or not series.live or series.instance != instance
        bounds = tuple(request.bounds)
        series = self._made(call, key, instance, request.unit, bounds, page.began)
        word = page.allot(request.kind, len(request.bounds))
        if word is None:
            if made:
                self._table.end(series)
            self._own.on_series_refused(request.name, self._now)
            raise call.refuse(MetricsdStatus.OVER_LIMIT)
        series.word = word
        series.paged = True
        return SeriesCreated(series.number, word)

    def _made(
        self,
        call: Call,
        key: Key,
        instance: Instance,
        unit: str,
        bounds: tuple[int, ...],
        since: Nanos,
    ) -> Series:
        """The live series of this key, a new one if the caps allow."""
        series = self._table.find(key)
        if series is not None and series.live:
            if series.instance != instance:  # an end that was not yet heard of
                series.begin_anew(instance, since)
            return series
        if self._table.is_full_for(key):
            self._own.on_series_refused(key.name, self._now)
            raise call.refuse(MetricsdStatus.OVER_LIMIT)
        return self._table.add(key, instance, unit, bounds, since=since)

    def _key(self, instance: Instance, kind: Kind, name: str, labels: list[Any]) -> Key:
        """Whose series this is: the sender's by the kernel's word."""
        return Key(instance.service, kind, name, sorted_labels(labels))

    def _update(self, call: Call, instance: Instance, request: Add | SetGauge | Observe) -> Taken:
        fault = checks.series_fault(request.name, request.labels)
        if request.name in REQUEST_NAMES:
            fault = MetricsdStatus.INVALID_ARGS
        if fault is not None:
            raise call.refuse(fault)
        kind = _KINDS[type(request)]
        bounds = DEFAULT_BOUNDS if kind is Kind.HISTOGRAM else ()
        key = self._key(instance, kind, request.name, request.labels)
        found = self._table.find(key)
        if found is not None and found.instance == instance and found.paged:
            raise call.refuse(MetricsdStatus.INVALID_ARGS)  # it is updated in its page
        series = self._made(call, key, instance, "", bounds, self._now)
        match request:
            case Add():
                series.set_value(series.value + request.value, self._now)
            case SetGauge():
                series.set_value(request.value, self._now)
            case Observe():
                series.observe(request.value, self._now)
        return Taken()

    # ------------------------------------------------------------------ spans

    def _start_span(self, call: Call, instance: Instance, row: Row, request: SpanStart) -> Taken:
        if not self._is_bound(request.span, instance) or request.trace == checks.NO_TRACE:
            raise call.refuse(MetricsdStatus.INVALID_ARGS)
        fault = checks.series_fault(request.name, request.attributes)
        if fault is not None:
            raise call.refuse(fault)
        if self._open.is_open(instance, request.span):
            raise call.refuse(MetricsdStatus.INVALID_ARGS)
        if self._open.is_full_for(instance.service):
            raise call.refuse(MetricsdStatus.OVER_LIMIT)
        self._open.add(
            Begun(
                instance,
                request.span,
                request.trace,
                request.parent,
                request.name,
                Nanos(min(request.at, self._now)),  # or it would never be open for too long
                sorted_labels(request.attributes),
            )
        )
        row.spans += 1
        return Taken()

    def _end_span(self, call: Call, instance: Instance, request: SpanEnd) -> Taken:
        fault = checks.labels_fault(request.attributes)
        if fault is not None:
            raise call.refuse(fault)
        begun = self._open.take(instance, request.span)
        if begun is None:
            raise call.refuse(MetricsdStatus.NOT_FOUND)
        end = Nanos(min(request.at, WORD_MAX))
        self._keep(begun, end, request.status, sorted_labels(request.attributes))
        return Taken()

    def _keep(
        self,
        begun: Begun,
        end: Nanos,
        status: SpanStatus,
        more: tuple[tuple[str, str], ...] = (),
    ) -> None:
        _ = self._kept.add(begun, end, status, more, self._offset)

    def _keep_of_page(self, page: Page, begun: Begun, end: Nanos, status: SpanStatus) -> None:
        """A span that was read in a page, where the runtime records requests."""
        self._requests.on_ended(begun, status, self._now, page.began)
        self._keep(begun, end, status)

    # ------------------------------------------------------------------ reading

    async def _read(
        self, call: Call, request: GetSeries | GetHistory | GetSpans
    ) -> SeriesPage | WindowPage | SpanPage:
        try:
            await self._authority.require(call, METRICS_READ, METRICS_TARGET)
        except Refusal:
            self._denied += 1
            raise
        match request:
            case GetSeries():
                return await self._series_page(request)
            case GetHistory():
                return self._history_page(call, request)
            case GetSpans():
                return await self._span_page(request)

    async def _series_page(self, request: GetSeries) -> SeriesPage:
        """As many as fit; the pages are read for those that are told."""
        if request.since <= 1:
            self._say_own()
        wanted: list[Series] = []
        for series in self._table.since(max(1, request.since)):
            if self._wants(request, series.key.service, series.key.name):
                wanted.append(series)
                if len(wanted) > request.count:
                    break
        await self._refresh(wanted[: request.count])
        rows: list[ToldSeries] = []
        size = 0
        for series in wanted[: request.count]:
            row = series.told()
            size += len(encode(row))
            if size > ANSWER_SIZE_MAX:
                break
            rows.append(row)
        rest = wanted[len(rows) :]
        return SeriesPage(rest[0].number if rest else 0, rows)

    async def _refresh(self, wanted: list[Series]) -> None:
        """Read the words of these series now."""
        instances = {each.instance for each in wanted if each.live and each.word is not None}
        pages = [self._pages[each] for each in instances if each in self._pages]
        if pages:
            await read_values(pages)
        for page in pages:
            page.give_values([each for each in wanted if each.instance == page.instance], self._now)

    def _wants(self, request: GetSeries | GetSpans, service: int, name: str) -> bool:
        return request.service in (0, service) and name.startswith(request.name)

    def _history_page(self, call: Call, request: GetHistory) -> WindowPage:
        page = self._history.page(request, ANSWER_SIZE_MAX)
        if page is None:
            raise call.refuse(MetricsdStatus.NOT_FOUND)
        return page

    async def _span_page(self, request: GetSpans) -> SpanPage:
        """Spans that ended, then those that are open. The pages are read first."""
        pages = [
            page for page in self._pages.values() if request.service in (0, page.instance.service)
        ]
        await read_values(pages)
        for page in pages:
            self._drain(page)
        rows: list[Span] = []
        size = 0
        for span in self._spans_since(request):
            size += len(encode(span))
            if size > ANSWER_SIZE_MAX or len(rows) >= request.count:
                return SpanPage(span.number, rows)
            rows.append(span)
        return SpanPage(0, rows)

    def _spans_since(self, request: GetSpans) -> Iterator[Span]:
        """What is asked for, in order; an open span has the number it would have if it ended."""
        for span in self._kept.since(request.since):
            if self._asks_for(request, span):
                yield span
        number = self._kept.total
        for begun in self._all_open():
            number += 1
            span = begun.ended(number, Nanos(0), SpanStatus.UNSET, (), self._offset)
            if number >= request.since and self._asks_for(request, span):
                yield span

    def _all_open(self) -> Iterator[Begun]:
        yield from self._open
        for page in self._pages.values():
            yield from page.open_spans()

    def _asks_for(self, request: GetSpans, span: Span) -> bool:
        return (
            self._wants(request, span.service, span.name)
            and request.trace in (b"", span.trace)
            and request.pid in (0, span.pid)
        )

    def _stats(self) -> Stats:
        others, rows = self._senders.rows()
        history = self._history
        settings = self._settings
        torn, given_up = self._torn_counts()
        return Stats(
            series=len(self._table),
            series_max=settings.series,
            series_per_metric_max=settings.series_per_metric,
            open_spans=sum(1 for _ in self._all_open()),
            open_spans_max=settings.spans_open,
            spans_kept=len(self._kept),
            spans_timed_out=self._timed_out,
            torn_reads=torn,
            torn_given_up=given_up,
            exported=self._exporter.exported,
            export_lost=self._exporter.lost,
            settings_generation=self._generation,
            denied=self._denied,
            rows=[
                SenderRow(
                    row.service,
                    self._table.count_of(row.service),
                    row.accepted,
                    row.invalid_args,
                    row.over_limit,
                    row.rate_limited,
                    row.spans,
                    row.spans_lost,
                    row.stray,
                )
                for row in (others, *rows)
            ],
            **history.counts(),
        )

    def _torn_counts(self) -> tuple[int, int]:
        """Groups that were read again, and those that never came out equal; of all pages."""
        pages = self._pages.values()
        return (
            self._torn + sum(page.reader.torn for page in pages),
            self._given_up + sum(page.reader.given_up for page in pages),
        )

    # ------------------------------------------------------------------ time

    def next_time(self) -> Nanos:
        """When the pages are read next, or something is due in the history."""
        due = self._history.next_time()
        return self._next_read if due is None else min(due, self._next_read)

    async def on_time(self, now: Nanos) -> None:
        """Read the pages, close spans that never ended, roll up, export."""
        self._now = now
        if now >= self._next_read or self._history.is_window_over(now):
            self._next_read = Nanos(now + self._settings.read_ns)
            await self._read_pages(list(self._pages.values()))
            for begun in self._open.older_than(Nanos(now - self._settings.span_ns)):
                _ = self._open.take(begun.instance, begun.span)
                self._timed_out += 1
                self._keep(begun, now, SpanStatus.TIMED_OUT)
            self._say_own()
            for series in self._table:
                self._history.on_reading(series)
            self._exporter.on_time(now)
        await self._history.on_time(now)

    async def on_gone(self, link: LinkId) -> None:
        """The holder of a link is gone; with its last link the instance has ended."""
        instance = self._links.pop(link, None)
        if instance is not None and instance not in self._links.values():
            await self._end(instance)

    def _meet(self, link: LinkId, instance: Instance) -> None:
        """Remember who holds the link: the runtime says when it goes."""
        self._links[link] = instance

    async def _end(self, instance: Instance) -> None:
        """An instance has ended: what it wrote last is read, what it had open is lost."""
        page = self._pages.get(instance)
        unfinished: list[Begun] = []
        if page is not None:
            await self._read_pages([page])
            unfinished = page.open_spans()
        await self._close_page(instance)
        for begun in unfinished:
            assert page is not None, "they are open in it"
            self._lost += 1
            self._keep_of_page(page, begun, self._now, SpanStatus.LOST)
        for begun in self._open.of(instance):
            _ = self._open.take(instance, begun.span)
            self._lost += 1
            self._keep(begun, self._now, SpanStatus.LOST)
        for series in self._live_of(instance):
            self._history.on_reading(series)
            self._table.end(series)

    # ------------------------------------------------------------------ what it says of itself

    def ready(self) -> bool:
        """Whether there is a log to export to."""
        return not self._needs_log or self._exporter.has_sink

    def evidence(self) -> dict[str, Any]:
        """The sink and the limits, with the line that it is ready."""
        return {"sink": SINK, "limits": msgspec.to_builtins(self._settings)}

    def facts(self) -> dict[str, int]:
        """The sink, the limits, and what only grows; what is there now is told by GetStats."""
        settings = self._settings
        return {
            "log_sink_logd": int(self._exporter.has_sink),
            "series_max": settings.series,
            "series_per_service_max": settings.series_per_service,
            "series_per_metric_max": settings.series_per_metric,
            "rate_max": settings.rate,
            "spans_open_max": settings.spans_open,
            "spans_open_each_max": settings.spans_open_each,
            "spans_kept_max": settings.spans_kept,
            "windows_max": settings.windows,
            "segments_max": settings.segments,
            "bytes_per_day_max": settings.bytes_max,
            "writes_per_day_max": settings.writes_per_day,
            "settings_generation": self._generation,
            "exported_total": self._exporter.exported,
            "export_lost_total": self._exporter.lost,
        }

    def on_settings(self, settings: Mapping[str, Any]) -> None:
        """Use these limits from now on; what is there stays. Raises msgspec.ValidationError."""
        changed = msgspec.convert(settings, Settings)
        self._settings = changed
        self._table.caps = _caps(changed)
        self._senders.configure(changed.core_ids, changed.core_rate, changed.rate)
        self._open.total_max = changed.spans_open
        self._open.each_max = changed.spans_open_each
        self._kept.resize(changed.spans_kept)
        self._exporter.configure(changed)
        self._history.configure(changed)
        self._generation += 1

    def _say_own(self) -> None:
        """metricsd's own series: what it lost and refused."""
        torn, given_up = self._torn_counts()
        totals = self._senders.totals()
        for name, value in (
            ("nexus_export_lost_total", self._exporter.lost),
            ("nexus_torn_reads_total", torn),
            ("nexus_torn_given_up_total", given_up),
            ("nexus_spans_timed_out_total", self._timed_out),
            ("nexus_spans_unended_total", self._lost),
            ("nexus_spans_lost_total", totals.spans_lost),
            ("nexus_stray_words_total", totals.stray),
            *self._history.losses(),
        ):
            self._own.count(name, value, self._now)

    async def _tell(self, call: Call, status: MetricsdStatus) -> None:
        """Say on the console, once per reason, that something was refused."""
        if status in self._told or status not in TOLD:
            return
        reason = status.name.lower()
        evidence = {
            "sender": f"0x{call.sender.service:016x}",
            "reason": reason,
            "count": getattr(self._senders.totals(), reason),
        }
        try:
            await ConsoleWrite(f"metricsd: reject {reason}", json.dumps(evidence).encode())
        except AbiError:
            return  # a full console, next time
        self._told.add(status)

    # What follows decides by what a ladder row breaks; each is small for that.

    def _is_bound(self, span: bytes, instance: Instance) -> bool:
        """Whether the kernel's sender made this span id."""
        return checks.is_bound_to(span, instance.service)

    def _is_page_over_limit(self, size: int) -> bool:
        """Whether memory is larger than a page may be."""
        return size > METRICS_PAGE_MAX


_KINDS: Final = {Add: Kind.COUNTER, SetGauge: Kind.GAUGE, Observe: Kind.HISTOGRAM}


def _caps(settings: Settings) -> Caps:
    return Caps(
        total=settings.series,
        per_service=settings.series_per_service,
        per_metric=settings.series_per_metric,
    )


def made(context: Context) -> Metricsd:
    """metricsd as the system file wants it."""
    boot, config = context.boot, context.config
    settings = context.settings_as(Settings)

    async def connect(until: Nanos) -> Client | RouteFailure:
        budget = RetryBudget(
            attempts_max=CONNECT_ATTEMPTS_MAX, backoff=CONNECT_BACKOFF, deadline=until
        )
        return await context.peers.connect(STATEFSD_NAME, STATEFSD, budget)

    history = History(
        settings,
        boot=config.boot,
        boot_id=config.boot_id,
        connect=connect if STATEFSD_NAME in config.uses else None,
        log=context.log,
        generation=boot.generation,
    )
    return Metricsd(
        settings,
        context.authority,
        Instance(boot.service, boot.generation, boot.pid),
        context.log,
        history,
        needs_log=True,
    )


main: Final = program_of(made, PROTOCOL)

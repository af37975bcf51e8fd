"""bench/observe: what a counter, gauge, histogram, span and log record cost, beside their peers.

Everything runs in this process on one CPU, in slices of a few milliseconds, all variants in turn
and every other round in the opposite order; what is compared is CPU time, of all threads, within a
round. Of a log record it is the writer's and logd's: what was written is drained into a journal.
The doorbell is not in it: at most 100 a second, each about as much as a typed call.

A call is measured with its server's page and without, by the same means as in bench/ipc.
"""

import gc
import logging
import mmap
import os
import tempfile
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, NamedTuple

from bench.measure import Placement, Skipped, UnavailableError, pin
from bench.pairing import Spread, run_worker
from bench.report import CallCost, ObserveResult, ObserveRow, Target
from nexus.abi import (
    BootImage,
    ClockMap,
    LinkId,
    Nanos,
    Pid,
    QosClass,
    Sender,
    Slot,
    VmoCreate,
    VmoShare,
    service_id,
)
from nexus.ipc import Peers
from nexus.log import Logger
from nexus.metrics import Metrics
from nexus.protocols.metricsd import Kind, Label, Series
from nexus.services.exportd.exposition import Format, exposition
from nexus.services.logd.config import RECORDS_DEFAULT, SIZE_DEFAULT
from nexus.services.logd.journal import Journal
from nexus.services.logd.senders import Row
from nexus.services.logd.streams import Streams
from nexus.telemetry import PageReader, RingReader
from nexus.telemetry.page import BUCKETS
from nexus.wire import encode

NAME: Final = "bench.observed"
SLICE: Final = 4_000  # operations of one slice; a few ms of the slowest
LOG_SLICE: Final = 256  # records, fewer than the ring holds: none is overwritten
SLICES: Final = 12  # of each variant in a round, for each half second asked for
SERIES_COUNT: Final = 1_000  # of one scrape
PAGES: Final = 20  # that they are spread over
PAGE_SIZE: Final = 32 * 1024  # bytes
CALL_COST_MAX: Final = 1.10  # a typed call with its page, against one without
VALUE: Final = 3_000_000  # ns, in the middle of the buckets
LABELS: Final = {"method": "get", "code": "200"}
TARGETS: Final = (
    ("counter", "prometheus_client, cached child", 3.0),
    ("counter", "opentelemetry-sdk", 50.0),
    ("histogram", "prometheus_client, cached child", 3.0),
    ("span", "opentelemetry-sdk, BatchSpanProcessor", 20.0),
    ("log record", "logging, FileHandler", 10.0),
    ("log record", "structlog, orjson", 5.0),
)

Slice = Callable[[], int]
"""Does a slice of operations; how many."""


class Variant(NamedTuple):
    """One way to do one thing."""

    thing: str
    name: str
    slice: Slice


class _Clock:
    """As ClockMap gives it on Linux."""

    monotonic = staticmethod(time.monotonic_ns)
    wall = staticmethod(time.time_ns)


def _driven(program: Coroutine[Any, Any, Any]) -> list[memoryview]:
    """Run what only asks for shared memory and clocks; the memory it was given."""
    views: list[memoryview] = []
    size = 0
    answer: Any = None
    while True:
        try:
            trap = program.send(answer)
        except StopIteration:
            return views
        match trap:
            case ClockMap():
                answer = _Clock()
            case VmoCreate():
                size = trap.size
                answer = Slot(1)
            case VmoShare():
                answer = memoryview(mmap.mmap(-1, size))
                views.append(answer)
            case _:
                raise AssertionError(f"a bench has no answer to {trap!r}")


def _boot() -> BootImage:
    return BootImage(
        name=NAME,
        service=service_id(NAME),
        pid=Pid(7),
        generation=1,
        endpoint=Slot(2),
        control=None,
        argument=b"",
        now=Nanos(1),
    )


def _peers() -> Peers:
    return Peers(_boot(), bytes(16))


# ------------------------------------------------------------------ ours


class Ours:
    """The facade, its page and who reads it."""

    def __init__(self) -> None:
        self.metrics = Metrics(_peers(), ("metricsd",), page_size=PAGE_SIZE)
        self.counter = self.metrics.counter("requests_total", method="get", code="200")
        self.gauge = self.metrics.gauge("depth")
        self.histogram = self.metrics.histogram("took")
        (view,) = _driven(self.metrics.begin())
        self.reader = PageReader(view)
        page = self.metrics.recorder.page
        assert page is not None
        for series in (self.counter, self.gauge, self.histogram):
            buckets = series.size - BUCKETS
            word = self.reader.allot() if series.size == 1 else self.reader.allot_group(buckets)
            assert word is not None
            series.place(page, word)

    def count(self) -> int:
        """A counter's slice."""
        inc = self.counter.inc
        for _ in range(SLICE):
            inc()
        return SLICE

    def set(self) -> int:
        """A gauge's."""
        put = self.gauge.set
        for each in range(SLICE):
            put(each)
        return SLICE

    def observe(self) -> int:
        """A histogram's."""
        observe = self.histogram.observe
        for _ in range(SLICE):
            observe(VALUE)
        return SLICE

    def span(self) -> int:
        """A span's."""
        span = self.metrics.span
        for _ in range(SLICE):
            with span("work"):
                pass
        return SLICE

    def span_with_attributes(self) -> int:
        """A span's with two attributes."""
        span = self.metrics.span
        for _ in range(SLICE):
            with span("work", method="get", code="200"):
                pass
        return SLICE


class OursLog:
    """A logger, its ring, and a journal that takes in what is drained."""

    def __init__(self) -> None:
        self.log = Logger(_peers(), ("logd",))
        (view,) = _driven(self.log.begin())
        self.journal = Journal(RECORDS_DEFAULT, int(SIZE_DEFAULT))
        self.streams = Streams(self.journal)
        sender = Sender(service_id(NAME), Pid(7), 1, QosClass.NORMAL)
        row = Row(sender.service, 0)
        self.stream = self.streams.open(
            LinkId(1), sender, view, RingReader(view), row, is_core=False
        )

    def write(self) -> int:
        """Write and drain; all of it counts."""
        info = self.log.info
        for each in range(LOG_SLICE):
            info("request served", method="get", code=200, size=each)
        self.streams.drain_to_end(self.stream, Nanos(time.monotonic_ns()), time.time_ns())
        return LOG_SLICE

    def check(self) -> None:
        """Not one record was left out."""
        reader = self.stream.reader
        assert self.stream.refused == reader.overwritten == reader.damaged == reader.pending == 0
        assert self.stream.accepted == reader.sequence > 0


# ------------------------------------------------------------------ peers


def _prometheus() -> Iterator[Variant]:
    from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

    registry = CollectorRegistry()
    names = tuple(LABELS)
    counter = Counter("requests", "r", names, registry=registry).labels(**LABELS)
    gauge = Gauge("depth", "d", registry=registry)
    bounds = (0.001, 0.005, 0.02, 0.1)  # as ours, in seconds
    histogram = Histogram("took", "t", registry=registry, buckets=bounds)

    def count() -> int:
        inc = counter.inc
        for _ in range(SLICE):
            inc()
        return SLICE

    def put() -> int:
        put = gauge.set
        for each in range(SLICE):
            put(each)
        return SLICE

    def observe() -> int:
        observe = histogram.observe
        for _ in range(SLICE):
            observe(0.003)
        return SLICE

    name = "prometheus_client, cached child"
    yield Variant("counter", name, count)
    yield Variant("gauge", name, put)
    yield Variant("histogram", name, observe)


def _opentelemetry() -> Iterator[Variant]:
    from opentelemetry.sdk.metrics import MeterProvider
    from opentelemetry.sdk.metrics.export import InMemoryMetricReader
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import (
        BatchSpanProcessor,
        SpanExporter,
        SpanExportResult,
    )

    class Nowhere(SpanExporter):
        """An exporter that does nothing: what is measured is all that comes before it."""

        def export(self, spans: Any) -> SpanExportResult:  # noqa: ARG002 (the SDK's word)
            return SpanExportResult.SUCCESS

    meter = MeterProvider(metric_readers=[InMemoryMetricReader()]).get_meter("bench")
    counter = meter.create_counter("requests")
    gauge = meter.create_gauge("depth")
    histogram = meter.create_histogram("took")
    provider = TracerProvider()
    provider.add_span_processor(BatchSpanProcessor(Nowhere()))
    tracer = provider.get_tracer("bench")
    few = SLICE // 10

    def count() -> int:
        add = counter.add
        for _ in range(few):
            add(1, LABELS)
        return few

    def put() -> int:
        put = gauge.set
        for each in range(few):
            put(each)
        return few

    def observe() -> int:
        record = histogram.record
        for _ in range(few):
            record(VALUE)
        return few

    def span() -> int:
        start = tracer.start_as_current_span
        for _ in range(few):
            with start("work"):
                pass
        return few

    def span_with_attributes() -> int:
        start = tracer.start_as_current_span
        for _ in range(few):
            with start("work", attributes=LABELS):
                pass
        return few

    yield Variant("counter", "opentelemetry-sdk", count)
    yield Variant("gauge", "opentelemetry-sdk", put)
    yield Variant("histogram", "opentelemetry-sdk", observe)
    name = "opentelemetry-sdk, BatchSpanProcessor"
    yield Variant("span", name, span)
    yield Variant("span, 2 attributes", name, span_with_attributes)


def _logging(place: Path) -> Variant:
    logger = logging.getLogger("bench.observe")
    logger.propagate = False
    logger.setLevel(logging.INFO)
    handler = logging.FileHandler(place / "stdlib.log")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s %(message)s"))
    logger.addHandler(handler)

    def write() -> int:
        info = logger.info
        for each in range(LOG_SLICE):
            info("request served method=%s code=%d size=%d", "get", 200, each)
        return LOG_SLICE

    return Variant("log record", "logging, FileHandler", write)


def _structlog(place: Path) -> Variant:
    import orjson
    import structlog

    # https://www.structlog.org/en/stable/performance.html, to a file as BytesLogger is given.
    log = structlog.wrap_logger(
        structlog.BytesLogger((place / "structlog.log").open("wb")),
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.format_exc_info,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.JSONRenderer(serializer=orjson.dumps),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        cache_logger_on_first_use=True,
    ).bind()

    def write() -> int:
        info = log.info
        for each in range(LOG_SLICE):
            info("request served", method="get", code=200, size=each)
        return LOG_SLICE

    return Variant("log record", "structlog, orjson", write)


# ------------------------------------------------------------------ one scrape


class Scrape:
    """SERIES_COUNT counters in PAGES pages: read, answered, and written as OpenMetrics."""

    def __init__(self) -> None:
        self._readers: list[PageReader] = []
        self._words: list[tuple[PageReader, int]] = []
        for _ in range(PAGES):
            metrics = Metrics(_peers(), ("metricsd",), page_size=PAGE_SIZE)
            (view,) = _driven(metrics.begin())
            reader = PageReader(view)
            self._readers.append(reader)
            for _ in range(SERIES_COUNT // PAGES):
                word = reader.allot()
                assert word is not None
                self._words.append((reader, word))

    def read(self) -> list[Series]:
        """metricsd's part: a round over all pages, and the rows of its answers."""
        for reader in self._readers:
            reader.begin()
            reader.mark()
        for reader in self._readers:
            reader.copy()
        for reader in self._readers:
            assert not reader.settle()
            reader.give_up()
        labels = [Label(key, value) for key, value in LABELS.items()]
        return [
            Series(
                index,
                service_id(NAME),
                1,
                Kind.COUNTER,
                f"requests.{index}",
                "",
                labels,
                reader.counter(word),
                0,
                0,
                [],
                [],
                1,
                True,
                0,
            )
            for index, (reader, word) in enumerate(self._words)
        ]

    def run(self) -> int:
        """All of it but the calls between exportd and metricsd."""
        rows = self.read()
        assert len(encode(rows)) > SERIES_COUNT
        page = exposition(rows, {int(service_id(NAME)): NAME}, Format.OPENMETRICS)
        assert page.samples == SERIES_COUNT
        return 1


def _prometheus_scrape() -> Variant:
    from prometheus_client import CollectorRegistry, Counter
    from prometheus_client.openmetrics import exposition as theirs

    generate: Callable[[Any], bytes] = theirs.generate_latest

    registry = CollectorRegistry()
    counter = Counter("requests", "r", ("method", "code", "n"), registry=registry)
    for index in range(SERIES_COUNT):
        counter.labels(**LABELS, n=str(index)).inc()

    def scrape() -> int:
        assert generate(registry)
        return 1

    return Variant("scrape, 1000 series", "prometheus_client, generate_latest", scrape)


# ------------------------------------------------------------------ the run


def _cost(variant: Variant, slices: int) -> float:
    """ns of CPU of one operation."""
    count = 0
    begun = time.process_time_ns()
    for _ in range(slices):
        count += variant.slice()
    return (time.process_time_ns() - begun) / count


def _measure(
    variants: list[Variant], rounds: int, seconds: float, progress: Callable[[str], None]
) -> dict[tuple[str, str], list[float]]:
    found: dict[tuple[str, str], list[float]] = {(each.thing, each.name): [] for each in variants}
    slices = max(1, round(SLICES * seconds / 0.5))
    for variant in variants:
        _ = variant.slice()  # interpreters specialise, files are made
    for index in range(rounds):
        for variant in variants if index % 2 == 0 else reversed(variants):
            gc.collect()
            found[variant.thing, variant.name].append(_cost(variant, slices))
        progress(f"observe: round {index + 1} of {rounds}")
    return found


@contextmanager
def _on_one_cpu() -> Iterator[None]:
    before = os.sched_getaffinity(0)
    pin(min(before))
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _call_cost(rounds: int, seconds: float, progress: Callable[[str], None]) -> CallCost:
    """A typed call whose server counts, observes and records a span, against one that does not."""
    cpu = min(os.sched_getaffinity(0))
    place = Placement(client=cpu, server=cpu)
    times: dict[str, list[float]] = {"typed_observed": [], "typed": []}
    for index in range(rounds):
        for name in times if index % 2 == 0 else reversed(times):
            sample = run_worker(name, place, seconds)
            assert not isinstance(sample, Skipped)
            times[name].append(sample.p50_ns / 1000)
        progress(f"observe: calls, round {index + 1} of {rounds}")
    ratios = [a / b for a, b in zip(times["typed_observed"], times["typed"], strict=True)]
    return CallCost(
        "typed call",
        Spread.of(times["typed_observed"]),
        Spread.of(times["typed"]),
        Spread.of(ratios),
    )


def run(
    *, rounds: int, seconds: float, progress: Callable[[str], None]
) -> tuple[ObserveResult, list[Target]]:
    """Measure all; the rows, and the verdicts."""
    ours, log = Ours(), OursLog()
    mine = "**ours**"
    with tempfile.TemporaryDirectory() as name, _on_one_cpu():
        try:
            peers = [*_prometheus(), *_opentelemetry()]
            peers += [_logging(Path(name)), _structlog(Path(name)), _prometheus_scrape()]
        except ImportError as error:
            raise UnavailableError(f"{error.name} is missing: `make bench` installs it") from error
        variants = [
            Variant("counter", mine, ours.count),
            Variant("gauge", mine, ours.set),
            Variant("histogram", mine, ours.observe),
            Variant("span", mine, ours.span),
            Variant("span, 2 attributes", mine, ours.span_with_attributes),
            Variant("log record", mine, log.write),
            Variant("scrape, 1000 series", mine, Scrape().run),
            *peers,
        ]
        found = _measure(variants, rounds, seconds, progress)
        log.check()
    call = _call_cost(rounds, seconds, progress)
    rows = [
        ObserveRow(
            thing,
            name,
            Spread.of(times),
            Spread.of([a / b for a, b in zip(times, found[thing, mine], strict=True)]),
        )
        for (thing, name), times in sorted(
            found.items(), key=lambda each: _place(variants, each[0])
        )
    ]
    return ObserveResult(rounds, rows, call), _judge(rows, call)


def _place(variants: list[Variant], key: tuple[str, str]) -> tuple[int, int]:
    things = [each.thing for each in variants]
    names = [(each.thing, each.name) for each in variants]
    return things.index(key[0]), names.index(key)


def _judge(rows: list[ObserveRow], call: CallCost) -> list[Target]:
    ratios = {(row.thing, row.name): row.ratio for row in rows}
    targets = [
        Target(
            f"{thing}, times faster than {name}",
            bound,
            at_most=False,
            measured=ratios[thing, name],
            unit=" x",
        )
        for thing, name, bound in TARGETS
    ]
    targets.append(
        Target(
            "typed call with telemetry on, against off",
            CALL_COST_MAX,
            at_most=True,
            measured=call.ratio,
            unit=" x",
        )
    )
    return targets

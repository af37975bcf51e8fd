"""metricsd as its clients see it, on the tiny kernel."""

import json
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec
import pytest

from nexus.abi import INIT_NAME, Nanos, Pid, VmoCreate, VmoSeal, VmoShare, service_id
from nexus.ipc import Answer, Exchange, Refused
from nexus.protocols.logd import Level
from nexus.protocols.meta import Configure, Configured, MetaStatus
from nexus.protocols.metricsd import (
    METRICS_PAGE_MAX,
    NAME_SIZE_MAX,
    PROTOCOL,
    SERIES_ROWS_MAX,
    SPAN_ROWS_MAX,
    Add,
    CreateSeries,
    GetHistory,
    GetSeries,
    GetSpans,
    GetStats,
    Kind,
    Label,
    MetricsdStatus,
    Observe,
    OpenPage,
    PageOpened,
    Resolution,
    SenderRow,
    Series,
    SeriesCreated,
    SeriesPage,
    SetGauge,
    SpanEnd,
    SpanPage,
    SpanStart,
    SpanStatus,
    Stats,
    Taken,
)
from nexus.services.metricsd.config import Settings
from nexus.services.metricsd.requests import Requests
from nexus.services.metricsd.series import DEFAULT_BOUNDS, Caps, Instance, Key, Table
from nexus.services.metricsd.service import Metricsd
from nexus.services.metricsd.spans import Begun
from nexus.telemetry import PageWriter, called, page_shape
from nexus.wire import ReplyStatus, Request
from tests.fakes.gate import ListGate
from tests.fakes.pair import FAR, Pair

READER = service_id(INIT_NAME)
SECOND = 1_000_000_000
TRACE = bytes(range(1, 17))
NO_PARENT = bytes(8)
PAGE_SIZE = 32 * 1024
OWN = Instance(service_id("metricsd"), 1, Pid(1))


@dataclass
class Lines:
    """A log that keeps what it is given."""

    written: list[Mapping[str, str | int]] = field(default_factory=list)
    lost: int = 0
    refused: int = 0
    bound: int = 1

    def write(self, level: Level, text: str, fields: Mapping[str, str | int] | None = None) -> bool:
        del level, text
        self.written.append(fields or {})
        return True

    def counts(self) -> "Lines":
        return self


class System(Pair):
    """metricsd, with a log that keeps what it is given."""

    def __init__(self, **settings: Any) -> None:
        self.lines = Lines()
        self.metricsd = Metricsd(Settings(**settings), ListGate(READER), OWN, self.lines)
        super().__init__(self.metricsd, PROTOCOL)

    def asked(self, *requests: Request[Any], name: str = INIT_NAME) -> list[Any]:
        async def body(link: Exchange) -> list[Any]:
            return [await link.call(request, FAR) for request in requests]

        outcomes: list[Any] = self.client(body, name=name)
        return outcomes

    def console_lines(self) -> list[tuple[str, dict[str, Any]]]:
        return [(text, json.loads(evidence)) for _, text, evidence in self.kernel.console]


def span_of(name: str, number: int) -> bytes:
    return (service_id(name) & 0xFFFFFFFF).to_bytes(4, "little") + number.to_bytes(4, "little")


def number_of(span: bytes) -> int:
    return int.from_bytes(span, "little")


def add(name: str = "hits", value: int = 1, **labels: str) -> Add:
    return Add(name, [Label(*each) for each in labels.items()], value)


def start(span: bytes, name: str = "work", *attributes: Label) -> SpanStart:
    return SpanStart(span, TRACE, NO_PARENT, 100, name, list(attributes))


def series(since: int = 1, service: int = 0, name: str = "") -> GetSeries:
    return GetSeries(since, SERIES_ROWS_MAX, service, name)


def spans(since: int = 1, service: int = 0) -> GetSpans:
    return GetSpans(since, SPAN_ROWS_MAX, b"", service, 0, "")


def row_of(stats: Stats, name: str) -> SenderRow:
    (found,) = [each for each in stats.rows if each.service == service_id(name)]
    return found


def read(system: System, **wanted: Any) -> list[Series]:
    """Every series, as a reader asks for them."""
    found: list[Series] = []
    since = 1
    while since:
        (page,) = system.asked(series(since, **wanted))
        assert isinstance(page, SeriesPage)
        found += page.series
        since = page.next
    return found


def test_messages_make_series_of_the_sender_and_are_read_back() -> None:
    system = System()

    taken = system.asked(
        add(value=3, way="in"),
        add(value=4, way="in"),
        SetGauge("level", [], 5),
        SetGauge("level", [], -3),
        *(Observe("time", [], each * 1_000_000) for each in (1, 3, 15, 50, 500)),
        name="alpha",
    )

    assert taken == [Taken()] * 9
    counter, gauge, histogram = read(system, service=service_id("alpha"))
    assert (counter.name, counter.value, counter.labels) == ("hits", 7, [Label("way", "in")])
    assert (gauge.kind, gauge.value) == (Kind.GAUGE, -3)
    assert (histogram.count, histogram.sum) == (5, 569_000_000)
    assert histogram.buckets == [1, 1, 1, 1, 1]
    assert tuple(histogram.bounds) == DEFAULT_BOUNDS


def with_page(
    body: Callable[[Exchange, PageWriter], Awaitable[Any]],
) -> Callable[[Exchange], Awaitable[Any]]:
    """A client with an open page."""

    async def opened(link: Exchange) -> Any:
        slot = await VmoCreate(PAGE_SIZE)
        page = PageWriter(await VmoShare(slot))
        answer = await link.ask(OpenPage(), FAR, move=slot)
        assert isinstance(answer, Answer)
        assert isinstance(answer.reply, PageOpened)
        return await body(link, page)

    return opened


async def created(link: Exchange, kind: Kind, name: str, *bounds: int) -> SeriesCreated:
    made = await link.call(CreateSeries(kind, name, [], list(bounds), ""), FAR)
    assert isinstance(made, SeriesCreated), made
    return made


def test_what_is_stored_in_a_page_is_what_is_read_at_that_moment() -> None:
    system = System()

    async def body(link: Exchange, page: PageWriter) -> list[Any]:
        hits = await created(link, Kind.COUNTER, "hits")
        level = await created(link, Kind.GAUGE, "level")
        times = await created(link, Kind.HISTOGRAM, "times", 10, 20)
        page.words[hits.word] = 7
        page.signed[level.word] = -3
        for at, value in enumerate((3, 35, 1, 1, 1)):
            page.words[times.word + at] = value
        first = await link.call(series(service=READER), FAR)
        page.words[hits.word] = 8
        return [first, await link.call(series(service=READER), FAR)]

    first, second = system.client(with_page(body))

    hits, level, times = first.series
    assert (hits.value, level.value) == (7, -3)
    assert (times.count, times.sum, times.buckets) == (3, 35, [1, 1, 1])
    assert second.series[0].value == 8


def test_a_histogram_halted_in_the_middle_of_an_update_keeps_its_former_value() -> None:
    system = System()

    async def body(link: Exchange, page: PageWriter) -> Any:
        times = await created(link, Kind.HISTOGRAM, "times", 10)
        page.words[times.word] = 1  # and no bucket yet: being written
        return await link.call(series(service=READER), FAR), await link.call(GetStats(), FAR)

    page, stats = system.client(with_page(body))

    assert (page.series[0].count, page.series[0].buckets) == (0, [0, 0])
    assert stats.torn_reads > 0
    assert stats.torn_given_up == 1


def test_a_page_needs_shared_memory_with_a_page_in_it() -> None:
    system = System()

    async def body(link: Exchange) -> list[Any]:
        plain = await VmoCreate(PAGE_SIZE)
        await VmoSeal(plain)
        blank = await VmoCreate(PAGE_SIZE)
        _ = await VmoShare(blank)
        return [
            await link.call(OpenPage(), FAR),
            await link.ask(OpenPage(), FAR, move=plain),
            await link.ask(OpenPage(), FAR, move=blank),
            await link.call(CreateSeries(Kind.COUNTER, "hits", [], [], ""), FAR),
        ]

    bare, unshared, blank, created_without = system.client(body)

    assert bare == unshared == blank == Refused(MetricsdStatus.INVALID_ARGS)
    assert created_without == Refused(MetricsdStatus.NOT_FOUND)


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (add("1hits"), MetricsdStatus.INVALID_ARGS),
        (add(password="x"), MetricsdStatus.INVALID_ARGS),
        (add(Api_Key="x"), MetricsdStatus.INVALID_ARGS),
        (Add("hits", [Label("a", "1"), Label("a", "2")], 1), MetricsdStatus.INVALID_ARGS),
        (add("x" * (NAME_SIZE_MAX + 1)), MetricsdStatus.OVER_LIMIT),
        (add(a="x" * 96, b="x" * 95), MetricsdStatus.OVER_LIMIT),
        (add(a="x" * 97), MetricsdStatus.OVER_LIMIT),
        (start(span_of("beta", 1)), MetricsdStatus.INVALID_ARGS),
        (start(span_of("alpha", 1), "x" * 49), MetricsdStatus.OVER_LIMIT),
        (start(span_of("alpha", 1), "w", Label("token", "x")), MetricsdStatus.INVALID_ARGS),
        (SpanEnd(span_of("alpha", 9), 1, SpanStatus.OK, []), MetricsdStatus.NOT_FOUND),
        (CreateSeries(Kind.GAUGE, "g", [], [1], ""), MetricsdStatus.INVALID_ARGS),
        (CreateSeries(Kind.HISTOGRAM, "h", [], [2, 1], ""), MetricsdStatus.INVALID_ARGS),
        (CreateSeries(Kind.HISTOGRAM, "h", [], [], ""), MetricsdStatus.INVALID_ARGS),
    ],
)
def test_what_is_no_event_is_refused_by_its_fault_and_leaves_nothing(
    request_: Request[Any], status: MetricsdStatus
) -> None:
    system = System()

    (outcome,) = system.asked(request_, name="alpha")

    assert outcome == Refused(status)
    assert read(system, service=service_id("alpha")) == []
    (found,) = system.asked(spans())
    assert found == SpanPage(0, [])


def test_just_at_the_limits_everything_is_taken() -> None:
    system = System()

    outcomes = system.asked(
        add("x" * NAME_SIZE_MAX, 1, a="x" * 96, b="x" * 94),
        start(span_of("alpha", 1), "x" * NAME_SIZE_MAX),
        name="alpha",
    )

    assert outcomes == [Taken(), Taken()]


@pytest.mark.covers("metricsd.OVER_LIMIT")
def test_the_series_over_a_cap_is_refused_and_visible_and_the_others_go_on() -> None:
    system = System()

    outcomes = system.asked(*(add(number=str(each)) for each in range(17)), name="alpha")

    assert outcomes == [Taken()] * 16 + [Refused(MetricsdStatus.OVER_LIMIT)]
    assert len(read(system, service=service_id("alpha"), name="hits")) == 16
    (refused,) = read(system, name="nexus_series_refused_total")
    assert (refused.service, refused.value) == (0, 1)
    assert refused.labels == [Label("metric", "hits")]
    assert system.asked(add(number="0"), name="beta") == [Taken()]


@pytest.mark.covers("metricsd.RATE_LIMITED")
def test_the_request_over_the_rate_is_refused_until_the_window_is_over() -> None:
    system = System()

    async def body(link: Exchange) -> list[Any]:
        return [await link.call(add(), FAR) for _ in range(65)]

    outcomes = system.client(body, name="alpha")
    others = system.asked(add(), name="beta")
    system.kernel.now = Nanos(system.kernel.now + 1_000_000_000)
    later = system.asked(add(), name="alpha")

    assert outcomes == [Taken()] * 64 + [Refused(MetricsdStatus.RATE_LIMITED)]
    assert others == later == [Taken()]
    assert row_of(system.asked(GetStats())[0], "alpha").rate_limited == 1


@pytest.mark.covers("metricsd.INVALID_ARGS")
def test_each_reason_is_told_on_the_console_once_with_its_evidence() -> None:
    system = System()

    _ = system.asked(add(secret="x"), add(secret="x"), add("x" * 49), *([add()] * 63), name="alpha")

    lines = system.console_lines()
    assert [text for text, _ in lines] == [
        "metricsd: reject invalid_args",
        "metricsd: reject over_limit",
        "metricsd: reject rate_limited",
    ]
    assert lines[0][1]["sender"] == f"0x{service_id('alpha'):016x}"


@pytest.mark.covers("metricsd.NOT_FOUND")
def test_a_span_by_message_is_kept_with_its_duration_and_both_ends_attributes() -> None:
    system = System()
    span = span_of("alpha", 1)

    outcomes = system.asked(
        start(span, "work", Label("way", "in")),
        start(span),
        SpanEnd(span, 350, SpanStatus.OK, [Label("rows", "4")]),
        SpanEnd(span, 350, SpanStatus.OK, []),
        name="alpha",
    )

    assert outcomes == [
        Taken(),
        Refused(MetricsdStatus.INVALID_ARGS),
        Taken(),
        Refused(MetricsdStatus.NOT_FOUND),
    ]
    ((kept,),) = [page.spans for page in system.asked(spans())]
    assert (kept.span, kept.trace, kept.name) == (span, TRACE, "work")
    assert (kept.end - kept.start, kept.status) == (250, SpanStatus.OK)
    assert kept.attributes == [Label("way", "in"), Label("rows", "4")]
    assert kept.service == service_id("alpha")


def test_the_spans_of_a_task_that_ended_are_lost_and_its_series_are_gone() -> None:
    system = System()

    async def body(link: Exchange, page: PageWriter) -> None:
        hits = await created(link, Kind.COUNTER, "hits")
        ids = [span_of("alpha", number) for number in (1, 2)]
        page.words[hits.word] = 41
        done = page.spans.open(TRACE + ids[0], number_of(ids[0]), 10, called("done"))
        page.spans.close(done, 30, SpanStatus.OK)
        _ = page.spans.open(TRACE + ids[1], number_of(ids[1]), 20, called("cut"))
        page.words[hits.word] = 42  # and then it ends, before anybody has looked

    system.client(with_page(body), name="alpha")

    (found,) = system.asked(spans())
    assert [(each.name, each.status) for each in found.spans] == [
        ("done", SpanStatus.OK),
        ("cut", SpanStatus.LOST),
    ]
    (hits,) = read(system, service=service_id("alpha"))
    assert (hits.value, hits.live) == (42, False)


def test_of_a_span_in_a_page_only_what_a_message_could_say_is_told() -> None:
    """Its writer stores what it likes there; the facade's checks are not in its way."""
    system = System()

    async def body(_link: Exchange, page: PageWriter) -> None:
        whose = [span_of("alpha", number) for number in range(1, 5)] + [span_of("beta", 5)]
        names = ["good", "worse", "no name", "good", "good"]
        attributes = [{"kind": "bread"}, {"api_password": "x", "kind": "bread"}, {}, {}, {}]
        traces = [TRACE, TRACE, TRACE, bytes(16), TRACE]
        for span, name, told, trace in zip(whose, names, attributes, traces, strict=True):
            unit = page.spans.open(trace + span, number_of(span), 10, called(name, told))
            page.spans.close(unit, 30, SpanStatus.OK)

    system.client(with_page(body), name="alpha")

    found, stats = system.asked(spans(), GetStats())

    assert [(each.name, [one.key for one in each.attributes]) for each in found.spans] == [
        ("good", ["kind"]),
        ("worse", []),
    ]
    assert row_of(stats, "alpha").invalid_args == 4, "each is counted, and so are the attributes"


def test_an_attribute_at_a_spans_end_is_held_to_the_rules_of_its_beginning() -> None:
    system = System()
    span = span_of("alpha", 1)

    answers = system.asked(
        start(span),
        SpanEnd(span, 200, SpanStatus.OK, [Label("api_password", "x")]),
        SpanEnd(span, 300, SpanStatus.OK, [Label("kind", "bread")]),
        name="alpha",
    )
    (page,) = system.asked(spans())

    assert answers == [Taken(), Refused(MetricsdStatus.INVALID_ARGS), Taken()]
    (told,) = page.spans
    assert (told.end, told.attributes) == (300, [Label("kind", "bread")])


def test_a_service_that_floods_spans_pushes_out_its_own() -> None:
    system = System(spans_kept=8, rate=4096)
    for name, count in (("beta", 3), ("alpha", 40)):
        made = [span_of(name, number) for number in range(1, count + 1)]
        ends = [SpanEnd(each, 200, SpanStatus.OK, []) for each in made]
        _ = system.asked(
            *[each for pair in zip(map(start, made), ends, strict=True) for each in pair], name=name
        )

    (page,) = system.asked(spans())

    services = [each.service for each in page.spans]
    assert services.count(service_id("beta")) == 3
    assert len(services) == 8


def test_a_span_in_a_page_that_never_ends_times_out_once() -> None:
    system = System(span_time_max="1s")

    async def body(link: Exchange, page: PageWriter) -> Any:
        span = span_of(INIT_NAME, 1)
        unit = page.spans.open(TRACE + span, number_of(span), 10, called("stuck"))
        for at in (5, 10):
            await system.metricsd.on_time(Nanos(at * SECOND))
        page.spans.close(unit, 11 * SECOND, SpanStatus.OK)
        await system.metricsd.on_time(Nanos(15 * SECOND))
        return await link.call(spans(), FAR), await link.call(GetStats(), FAR)

    found, stats = system.client(with_page(body))

    (stuck,) = found.spans
    assert (stuck.status, stuck.end) == (SpanStatus.TIMED_OUT, 5 * SECOND)
    assert stats.spans_timed_out == 1


def test_a_span_by_message_that_never_ends_times_out_and_is_counted() -> None:
    system = System(span_time_max="1s")

    async def body(link: Exchange) -> Any:
        _ = await link.call(start(span_of(INIT_NAME, 1)), FAR)
        for at in (5, 10):
            await system.metricsd.on_time(Nanos(at * SECOND))
        return await link.call(spans(), FAR), await link.call(GetStats(), FAR)

    found, stats = system.client(body)

    assert [(each.status, each.end) for each in found.spans] == [(SpanStatus.TIMED_OUT, 5 * SECOND)]
    assert (stats.spans_timed_out, stats.open_spans) == (1, 0)


def test_the_cap_of_all_series_holds_and_the_names_of_the_refused_are_bounded() -> None:
    system = System(series=2, rate=4096)

    answers = system.asked(*[add(f"more{number}") for number in range(42)], name="alpha")

    assert answers[:2] == [Taken()] * 2
    assert answers[2:] == [Refused(MetricsdStatus.OVER_LIMIT)] * 40
    refused = [each for each in read(system) if each.name == "nexus_series_refused_total"]
    assert sum(each.value for each in refused) == 40
    assert len(refused) == 33, "32 by name, and the others together"


def test_a_counter_that_goes_back_in_its_page_is_not_believed() -> None:
    system = System()

    async def body(link: Exchange, page: PageWriter) -> list[int]:
        hits = await created(link, Kind.COUNTER, "hits")
        values = []
        for value in (7, 3, 8):
            page.words[hits.word] = value
            told = await link.call(series(service=READER), FAR)
            assert isinstance(told, SeriesPage)
            values.append(told.series[0].value)
        return values

    assert system.client(with_page(body)) == [7, 7, 8]


def test_nobody_reads_without_the_right() -> None:
    system = System()

    outcomes = system.asked(series(), spans(), name="alpha")

    assert outcomes == [Refused(ReplyStatus.DENIED)] * 2
    assert system.asked(GetStats())[0].denied == 2


def test_paging_skips_no_series() -> None:
    system = System(series=200, series_per_service=200, series_per_metric=200, rate=1000)

    _ = system.asked(
        *(add(number=f"{each:03}", pad="x" * (each % 80)) for each in range(150)), name="alpha"
    )

    found = read(system, service=service_id("alpha"))
    assert [each.labels[0].value for each in found] == [f"{each:03}" for each in range(150)]


def test_a_lowered_cap_refuses_new_series_only() -> None:
    system = System()

    _ = system.asked(add(number="0"), add(number="1"), name="alpha")
    system.metricsd.on_settings({"series_per_metric": 1})
    old, new = system.asked(add(number="0"), add(number="2"), name="alpha")

    assert (old, new) == (Taken(), Refused(MetricsdStatus.OVER_LIMIT))
    assert len(read(system, service=service_id("alpha"))) == 2


def test_what_is_stored_beyond_ones_own_words_is_counted_and_seen_by_nobody() -> None:
    system = System()

    async def body(link: Exchange, page: PageWriter) -> Any:
        hits = await created(link, Kind.COUNTER, "hits")
        page.words[hits.word + 5] = 99
        await system.metricsd.on_time(Nanos(10_000_000_000))
        return await link.call(series(service=READER), FAR), await link.call(GetStats(), FAR)

    page, stats = system.client(with_page(body))

    assert [each.value for each in page.series] == [0]
    assert row_of(stats, INIT_NAME).stray == 1


def test_what_changed_is_exported_with_labels_and_ids_and_only_then() -> None:
    system = System()

    async def body(link: Exchange) -> list[int]:
        _ = await link.call(add(value=3, way="in"), FAR)
        counts = []
        for at, value in ((20, 0), (40, 0), (60, 4)):
            if value:
                _ = await link.call(add(value=value, way="in"), FAR)
            await system.metricsd.on_time(Nanos(at * 1_000_000_000))
            counts.append(len(system.lines.written))
        return counts

    system.metricsd._next_read = Nanos(0)
    counts = system.client(body, name="alpha")

    assert counts == [1, 1, 2]
    first, second = system.lines.written
    assert first["event"] == "metric.v1"
    assert (first["kind"], first["name"], first["value"]) == ("counter", "hits", 3)
    assert first["labels"] == 'way="in"'
    assert first["owner"] == f"0x{service_id('alpha'):016x}"
    assert second["value"] == 7


def test_a_span_that_comes_of_telling_the_journal_is_not_told_to_it() -> None:
    """logd's tail is written by statefsd, whose span would be a record, and that one be written."""
    system = System()

    async def body(link: Exchange) -> None:
        parents = [span_of(name, 9) for name in ("logd", "metricsd", "alpha")]
        for number, parent in enumerate(parents, 1):
            span = span_of("statefsd", number)
            begun = SpanStart(span, TRACE, parent, 100, f"work{number}", [])
            _ = await link.call(begun, FAR)
            _ = await link.call(SpanEnd(span, 200, SpanStatus.OK, []), FAR)
        await system.metricsd.on_time(Nanos(20_000_000_000))

    system.client(body, name="statefsd")

    assert [each["name"] for each in system.lines.written] == ["work3"]
    assert system.metricsd._exporter.lost == 0


REQUESTS = ["nexus_requests_total", "nexus_request_errors_total", "nexus_spans_unread_total"]


def record(page: PageWriter, name: str, number: int, status: int, parent: bytes) -> None:
    """As alpha's runtime records a request that came out so."""
    unit = page.spans.open(TRACE + parent, number, 10, called(name))
    page.spans.close(unit, 30, status)


def own_number(number: int) -> int:
    return number_of(span_of("alpha", number))


def test_requests_are_counted_of_the_service_that_answered_them() -> None:
    """Not its own spans, and not what logd and metricsd ask of it; no record, no history."""
    system = System()
    asked = (
        ("alpha.GetLevel", SpanStatus.OK, "beta"),
        ("alpha.SetLevel", SpanStatus.ERROR, "beta"),
        ("alpha.SetLevel", SpanStatus.OK, "alpha"),
        ("alpha.work", SpanStatus.ERROR, "alpha"),
        ("work", SpanStatus.ERROR, "alpha"),
        ("alpha.GetLevel", SpanStatus.OK, "logd"),
        ("alpha.GetLevel", SpanStatus.ERROR, "metricsd"),
    )

    async def body(_link: Exchange, page: PageWriter) -> None:
        for number, (name, status, asker) in enumerate(asked, 1):
            record(page, name, own_number(number), status, span_of(asker, 99))
        await system.metricsd.on_time(Nanos(5 * SECOND))
        record(page, "alpha.GetLevel", own_number(8), SpanStatus.OK, span_of("beta", 100))
        await system.metricsd.on_time(Nanos(40 * SECOND))

    system.client(with_page(body), name="alpha")

    found = read(system, service=service_id("alpha"))
    history = [
        system.asked(GetHistory(each.service, each.name, [], Resolution.SHORT, 0, 9))[0]
        for each in found
    ]

    assert [(each.name, each.value) for each in found] == [(REQUESTS[0], 4), (REQUESTS[1], 1)]
    assert [each.kind for each in found] == [Kind.COUNTER] * 2
    assert history == [Refused(MetricsdStatus.NOT_FOUND)] * 2
    assert {each["event"] for each in system.lines.written} == {"span.v1"}


def test_a_series_that_nobody_has_read_yet_is_told_since_its_instance_began() -> None:
    table = Table(Caps(total=9, per_service=9, per_metric=9))
    key = Key(OWN.service, Kind.COUNTER, "n", ())
    told = []
    for generation, since in ((1, 10), (2, 50)):
        series = table.add(
            key,
            Instance(OWN.service, generation, Pid(100 + generation)),
            "",
            (),
            since=Nanos(since),
        )
        told.append(series.told())
        series.set_value(5, Nanos(since + 20))
        table.end(series)

    assert [(each.value, each.since, each.at) for each in told] == [(0, 10, 10), (0, 50, 50)]


def test_a_span_that_says_it_began_before_its_page_dates_no_series_back() -> None:
    table = Table(Caps(total=9, per_service=9, per_metric=9))
    requests = Requests(table)
    instance = Instance(OWN.service, 1, Pid(101))
    for start in (1, 30):
        begun = Begun(instance, bytes(8), bytes(16), bytes(8), "alpha.GetLevel", Nanos(start), ())
        requests.on_ended(begun, SpanStatus.OK, Nanos(50), Nanos(20))

    told = {each.key.name: each.told() for each in table.live_of(OWN.service)}

    assert (told[REQUESTS[0]].value, told[REQUESTS[0]].since) == (2, 20)


def test_requests_take_no_room_of_a_service_and_its_next_instance_begins_anew() -> None:
    system = System(series=1, series_per_service=1, series_per_metric=1)
    values: list[list[tuple[str, int, bool]]] = []

    async def body(link: Exchange, page: PageWriter) -> None:
        record(page, "alpha.GetLevel", own_number(1), SpanStatus.OK, span_of("beta", 99))
        await system.metricsd.on_time(Nanos((len(values) + 1) * 5 * SECOND))
        assert await link.call(add(), FAR) == Taken()

    for generation in (1, 2):
        system.client(with_page(body), name="alpha")
        rows = read(system, service=service_id("alpha"))
        values.append([(each.name, each.value, each.live) for each in rows])
        assert {each.generation for each in rows} == {generation}

    (stats,) = system.asked(GetStats())
    assert values == [[(REQUESTS[0], 1, False), (REQUESTS[1], 0, False), ("hits", 1, False)]] * 2
    assert stats.series == 0


def test_what_is_not_read_in_time_of_the_requests_is_told() -> None:
    system = System()
    many = 4 * page_shape(PAGE_SIZE).units

    async def body(_link: Exchange, page: PageWriter) -> None:
        for number in range(1, many + 1):
            record(page, "alpha.GetLevel", own_number(number), SpanStatus.OK, span_of("beta", 99))
        await system.metricsd.on_time(Nanos(5 * SECOND))

    system.client(with_page(body), name="alpha")

    found = {each.name: each.value for each in read(system, service=service_id("alpha"))}
    assert found[REQUESTS[2]] > many // 2
    assert found[REQUESTS[0]] + found[REQUESTS[2]] == many


def test_a_request_that_its_service_did_not_survive_is_an_error() -> None:
    system = System()

    async def body(_link: Exchange, page: PageWriter) -> None:
        _ = page.spans.open(TRACE + span_of("beta", 9), own_number(1), 10, called("alpha.SetLevel"))

    system.client(with_page(body), name="alpha")

    found = read(system, service=service_id("alpha"))
    assert [(each.name, each.value) for each in found] == [(REQUESTS[0], 1), (REQUESTS[1], 1)]


@pytest.mark.parametrize("name", REQUESTS)
def test_nobody_counts_requests_but_metricsd(name: str) -> None:
    system = System()

    async def body(link: Exchange, _page: PageWriter) -> Any:
        made = CreateSeries(Kind.COUNTER, name, [], [], "")
        return await link.call(made, FAR), await link.call(add(name), FAR)

    answers = system.client(with_page(body), name="alpha")

    assert answers == (Refused(MetricsdStatus.INVALID_ARGS),) * 2
    assert read(system, service=service_id("alpha")) == []


@pytest.mark.covers("meta.BAD_SETTINGS")
def test_settings_are_taken_whole_or_not_at_all() -> None:
    system = System()

    def told(**settings: Any) -> Configure:
        return Configure(msgspec.msgpack.encode(settings))

    outcomes = system.asked(
        told(series=99, rate=7), told(series=0), told(serious=9), Configure(b"\x01"), GetStats()
    )

    bad = Refused(MetaStatus.BAD_SETTINGS)
    assert outcomes[:4] == [Configured(), bad, bad, bad]
    assert (outcomes[4].series_max, outcomes[4].settings_generation) == (99, 2)
    assert system.asked(told(series=5), name="alpha") == [Refused(ReplyStatus.DENIED)]


@pytest.mark.covers("meta.NEEDS_RESTART")
def test_a_service_without_the_hook_needs_a_restart() -> None:
    async def body(link: Exchange) -> Any:
        return await link.call(Configure(msgspec.msgpack.encode({"a": 1})), FAR)

    assert Pair().client(body) == Refused(MetaStatus.NEEDS_RESTART)


def test_a_page_of_any_size_is_more_than_metricsd_reads_every_second() -> None:
    system = System()

    async def body(link: Exchange) -> list[Any]:
        answers = []
        for size in (METRICS_PAGE_MAX, METRICS_PAGE_MAX + 4096):
            slot = await VmoCreate(size)
            _ = PageWriter(await VmoShare(slot))
            answers.append(await link.ask(OpenPage(), FAR, move=slot))
        return answers

    largest, larger = system.client(body)

    assert isinstance(largest, Answer)
    assert larger == Refused(MetricsdStatus.OVER_LIMIT)


def test_pages_that_claim_more_lost_spans_than_a_number_says_end_nobody() -> None:
    system = System(rate=4096)
    newest = (((1 << 56) - 1) << 3) | 2  # the state of a span that has ended, by its unit

    async def body(link: Exchange) -> Any:
        for _ in range(260):
            slot = await VmoCreate(PAGE_SIZE)
            view = await VmoShare(slot)
            _ = PageWriter(view)
            states_at = page_shape(PAGE_SIZE).states_at
            view[states_at : states_at + 8] = newest.to_bytes(8, "little")
            answer = await link.ask(OpenPage(), FAR, move=slot)
            assert isinstance(answer, Answer)
        return await link.call(GetStats(), FAR)

    stats = system.client(body)

    assert isinstance(stats, Stats), stats
    assert row_of(stats, INIT_NAME).spans_lost == (1 << 64) - 1, "it stays there"


def test_spans_that_begin_or_end_beyond_all_time_are_told_and_end_nobody() -> None:
    system = System()
    system.metricsd._offset = 1_800_000_000_000_000_000
    far = (1 << 64) - 1
    ended, left_open = span_of("alpha", 1), span_of("alpha", 2)

    taken = system.asked(
        SpanStart(ended, TRACE, NO_PARENT, 100, "work", []),
        SpanEnd(ended, far, SpanStatus.OK, []),
        SpanStart(left_open, TRACE, NO_PARENT, far, "work", []),
        name="alpha",
    )
    (page,) = system.asked(spans())

    assert taken == [Taken()] * 3
    assert isinstance(page, SpanPage), page
    assert [each.span for each in page.spans] == [ended, left_open]
    first, second = page.spans
    assert first.wall + first.end - first.start < 1 << 64, "a collector takes 64 bits"
    assert second.start <= system.metricsd._now, "or it would never have been open for too long"

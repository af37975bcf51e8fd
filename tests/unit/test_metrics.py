"""The facade: handles that work at once, metricsd that is told later, and what is refused."""

from collections.abc import Callable
from typing import Any

import pytest

from nexus.abi import BootImage, Nanos, Now, Pid, SleepUntil, Slot, service_id
from nexus.ipc import Client, Peers, RetryBudget
from nexus.ipc import Context as Trace
from nexus.metrics import SERIES_MAX, Counter, Gauge, Histogram, Metrics
from nexus.metrics.series import GAUGE_MIN
from nexus.protocols.metricsd import (
    PROTOCOL as METRICSD,
)
from nexus.protocols.metricsd import (
    GetSeries,
    GetSpans,
    GetStats,
    Kind,
    Label,
    SeriesPage,
    SpanPage,
    SpanStatus,
)
from nexus.runtime import Call, Server
from nexus.runtime.program import Context, program_of
from nexus.services.metricsd.config import Settings
from nexus.services.metricsd.service import Metricsd
from nexus.telemetry import WORD_MAX, PageReader, PageWriter
from tests.fakes.adder import Add, AdderStatus, Sum
from tests.fakes.gate import ListGate
from tests.fakes.own import PROTOCOL
from tests.fakes.pair import FAR
from tests.unit.test_metricsd_service import OWN, Lines
from tests.unit.test_program import Around

READER = "app"
MS = 1_000_000


class Counting:
    """Counts what it adds; the sum of 13 is refused."""

    PROTOCOL = PROTOCOL

    def __init__(self, context: Context) -> None:
        self._metrics = context.metrics
        self._added = context.metrics.counter("added_total", way="up")
        self._last = context.metrics.gauge("last")
        self._sums = context.metrics.histogram("sums", bounds=(10, 20))

    def handle(self, call: Call, request: Add) -> Sum:
        total = request.a + request.b
        with self._metrics.span("adding", first=request.a) as span:
            span.set("total", total)
            if total == 13:
                raise call.refuse(AdderStatus.TOO_LARGE)
            self._added.inc()
            self._last.set(-total)
            self._sums.observe(total)
        return Sum(total)


class Watched(Around):
    """A service of one's own and a metricsd."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self._settings = Settings(**settings)
        self.start_metricsd()

    def start_metricsd(self) -> None:
        service = Metricsd(self._settings, ListGate(service_id(READER)), OWN, Lines())
        self.system.start("metricsd", lambda boot: Server(service, METRICSD, boot).run())

    def serve(self, own: Callable[[Context], Any] = Counting) -> None:
        _ = self.start(program_of(own), uses=("metricsd",), posts=("metricsd",))

    def pause(self, span: int) -> None:
        """Let everything run for `span` ns."""

        async def body(_peers: Peers) -> None:
            await SleepUntil(Nanos(await Now() + span))

        self.system.client(body, "sleeper")

    def read(self, request: Any) -> Any:
        async def body(peers: Peers) -> Any:
            budget = RetryBudget(attempts_max=3, backoff=Nanos(MS), deadline=FAR)
            found = await peers.connect("metricsd", METRICSD, budget)
            assert isinstance(found, Client), found
            return await found.call(request, FAR)

        return self.system.client(body, READER)

    def series(self) -> dict[str, Any]:
        page = self.read(GetSeries(1, 16, service_id("own"), ""))
        assert isinstance(page, SeriesPage), page
        return {each.name: each for each in page.series}

    def spans(self) -> list[Any]:
        page = self.read(GetSpans(1, 12, b"", service_id("own"), 0, ""))
        assert isinstance(page, SpanPage), page
        return page.spans


def alone() -> Peers:
    """The peers of a task that has none."""
    return Peers(
        BootImage(
            name="alone",
            service=service_id("alone"),
            pid=Pid(7),
            generation=1,
            endpoint=Slot(1),
            control=None,
            argument=b"",
            now=Nanos(1),
        ),
        bytes(16),
    )


def unbound() -> Metrics:
    """The metrics of a task that does not use metricsd."""
    return Metrics(alone())


def test_what_a_service_counts_is_read_from_its_page() -> None:
    watched = Watched()
    watched.serve()

    sums = watched.ask(Add(1, 2), Add(10, 5), Add(20, 5))
    watched.pause(200 * MS)
    sums += watched.ask(Add(2, 2))
    found = watched.series()

    assert sums == [Sum(3), Sum(15), Sum(25), Sum(4)]
    assert found["added_total"].value == 4
    assert found["last"].value == -4
    assert (found["sums"].count, found["sums"].sum) == (4, 47)
    assert found["sums"].buckets == [2, 1, 1]


def test_each_request_is_a_span_and_what_is_inside_belongs_to_it() -> None:
    watched = Watched()
    watched.serve()

    _ = watched.ask(Add(1, 2), Add(6, 7))
    watched.pause(200 * MS)
    spans = watched.spans()

    by_id = {each.span: each for each in spans}
    for each in spans:
        assert each.span[:4] == (service_id("own") & 0xFFFFFFFF).to_bytes(4, "little")
        assert each.end >= each.start
        if each.name == "adding":
            assert by_id[each.parent].name == "own.Add"
            assert by_id[each.parent].trace == each.trace
    assert sorted((each.name, each.status) for each in spans) == [
        ("adding", SpanStatus.OK),
        ("adding", SpanStatus.ERROR),
        ("own.Add", SpanStatus.OK),
        ("own.Add", SpanStatus.ERROR),
    ]
    (told,) = [each for each in spans if each.name == "own.Add" and each.status == SpanStatus.ERROR]
    assert [(each.key, each.value) for each in told.attributes] == [("refused", "TOO_LARGE")]


def test_a_request_of_no_trace_begins_one_and_is_charged_to_nobody() -> None:
    watched = Watched()
    watched.serve()

    async def nowhere(peers: Peers) -> Any:
        budget = RetryBudget(attempts_max=3, backoff=Nanos(MS), deadline=FAR)
        found = await peers.connect("own", PROTOCOL, budget)
        assert isinstance(found, Client), found
        return await found.call(Add(1, 2), FAR, Trace(bytes(16), bytes(8)))

    assert watched.system.client(nowhere) == Sum(3)
    watched.pause(200 * MS)
    spans = watched.spans()
    stats = watched.read(GetStats())

    around = {each.name: each for each in spans}
    assert any(around["own.Add"].trace)
    assert around["adding"].trace == around["own.Add"].trace
    assert around["adding"].parent == around["own.Add"].span
    (row,) = [each for each in stats.rows if each.service == service_id("own")]
    assert row.invalid_args == 0


def test_a_restarted_metricsd_is_found_again_and_counters_keep_their_values() -> None:
    watched = Watched()
    watched.serve()
    _ = watched.ask(Add(1, 2), Add(1, 3))
    watched.pause(200 * MS)
    before = watched.series()["added_total"].value

    watched.system.kill("metricsd")
    _ = watched.ask(Add(1, 4))
    watched.start_metricsd()
    for _ in range(8):
        watched.pause(500 * MS)
        _ = watched.ask(Add(1, 4))
    found = watched.series()

    assert before == 2
    assert found["added_total"].value == 11
    assert found["sums"].count == 11


def test_a_refused_series_counts_its_updates_as_overflow() -> None:
    metrics = unbound()
    counter = metrics.counter("x")
    memory = memoryview(bytearray(8192))
    page = PageWriter(memory)
    counter.wait()
    counter.inc(5)
    counter.inc(5)

    counter.refuse(page.count_overflow)
    counter.inc(7)

    assert page.overflow == 3
    counter.wait()
    counter.inc(2)
    counter.place(page, 0)
    assert page.words[0] == 2


def test_more_series_than_a_task_may_have_share_the_overflow() -> None:
    metrics = unbound()

    made = [metrics.counter("x", n=number) for number in range(SERIES_MAX + 3)]
    for each in made:
        each.inc()

    counts = metrics.counts()
    assert (counts.made, counts.crowded, counts.overflow_updates) == (SERIES_MAX, 3, 3)
    assert len({id(each) for each in made}) == SERIES_MAX + 1


def test_a_counter_only_grows_and_stays_at_its_largest_value() -> None:
    page = PageWriter(memoryview(bytearray(8192)))
    counter = Counter(Kind.COUNTER, "c", "", [])
    counter.place(page, 3)

    counter.inc(WORD_MAX - 1)
    counter.inc(5)

    assert page.words[3] == WORD_MAX
    with pytest.raises(AssertionError, match="only grows"):
        counter.inc(-1)


def test_a_gauge_is_signed_and_held_inside_its_limits() -> None:
    page = PageWriter(memoryview(bytearray(8192)))
    gauge = Gauge(Kind.GAUGE, "g", "", [])
    gauge.set(-5)
    gauge.place(page, 3)
    assert page.signed[3] == -5

    gauge.add(-2)
    assert page.signed[3] == -7
    gauge.set(1 << 70)
    assert page.signed[3] == WORD_MAX
    gauge.set(-(1 << 70))
    assert page.signed[3] == GAUGE_MIN


def test_a_histogram_moves_into_the_page_with_all_it_has_seen() -> None:
    memory = memoryview(bytearray(8192))
    page = PageWriter(memory)
    reader = PageReader(memory)
    word = reader.allot_group(3)
    assert word is not None
    histogram = Histogram(Kind.HISTOGRAM, "h", "", [], (10, 20))
    histogram.observe(10)

    histogram.place(page, word)
    histogram.observe(21)
    reader.begin()
    reader.mark()
    reader.copy()

    assert not reader.settle()
    group = reader.group(word)
    assert (group.count, group.sum, group.buckets) == (2, 31, [1, 0, 1])


@pytest.mark.parametrize("key", ["password", "api_key", "authToken", "session.secret"])
def test_a_label_that_looks_like_a_secret_is_refused_with_a_sentence(key: str) -> None:
    metrics = unbound()

    for make in (metrics.counter, metrics.gauge, metrics.histogram, metrics.span):
        with pytest.raises(ValueError, match="looks as if a secret came with it"):
            _ = make("x", **{key: "v"})  # type: ignore[arg-type] # a histogram's bounds are no label


@pytest.mark.parametrize("name", ["", "9x", "a b", "x" * 49, "a\n"])
def test_a_name_that_is_none_is_refused(name: str) -> None:
    metrics = unbound()

    for make in (metrics.counter, metrics.gauge, metrics.histogram, metrics.span):
        with pytest.raises(ValueError, match="is no name"):
            make(name)


@pytest.mark.parametrize("bounds", [(), (1, 1), (2, 1), (-1,), tuple(range(17))])
def test_bounds_that_do_not_rise_or_are_too_many_are_refused(bounds: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="rising numbers"):
        unbound().histogram("h", bounds=bounds)


def test_spans_nest_without_a_page_too_and_calls_belong_to_the_inner_one() -> None:
    peers = alone()
    metrics = Metrics(peers)
    root = peers.caller.trail

    with metrics.span("outer"):
        outer = peers.caller.trail
        with metrics.span("inner"):
            inner = peers.caller.trail
        assert peers.caller.trail == outer
    with metrics.span("next"):
        following = peers.caller.trail

    assert peers.caller.trail == root
    assert inner[:16] == outer[:16] != root[:16]
    assert len({root, outer, inner, following}) == 4
    assert following[:16] != outer[:16]


def test_an_attribute_of_a_span_may_be_called_as_a_parameter_is() -> None:
    metrics = Metrics(alone())

    with metrics.span("work", name="a", self="b") as first:
        pass
    with metrics.span("work", name="a", self="b") as again:
        pass

    assert first is again


def test_the_same_seed_makes_the_same_spans() -> None:
    def trails() -> list[bytes]:
        peers = alone()
        metrics = Metrics(peers)
        found = []
        for _ in range(5):
            with metrics.span("x"):
                found.append(peers.caller.trail)
        return found

    assert trails() == trails()


class Naming:
    """Counts files by their names, which are whatever somebody called them."""

    PROTOCOL = PROTOCOL

    def __init__(self, context: Context) -> None:
        self._files = context.metrics.counter(
            "files_total", file=b"a\xff".decode("utf-8", "surrogateescape")
        )

    def handle(self, _call: Call, request: Add) -> Sum:
        self._files.inc()
        return Sum(request.a)


def test_a_label_that_utf8_cannot_say_is_spelled_out_and_ends_nobody() -> None:
    watched = Watched()
    watched.serve(Naming)

    sums = watched.ask(Add(1, 2))
    watched.pause(200 * MS)

    assert sums == [Sum(1)]
    assert watched.series()["files_total"].labels == [Label("file", "a\\udcff")]
    assert watched.ask(Add(3, 2)) == [Sum(3)], "it lives"

"""Rungs about metricsd: what it refuses, what it reads, and what is left of it after its death."""

import zlib
from base64 import b64encode
from collections import Counter as Tally
from typing import Any, Final

from nexus.abi import CapClone, Nanos, Now, service_id
from nexus.ipc import CallFailure, Refused, RetryBudget, RetryTokens, retry_until
from nexus.protocols.logd import Record
from nexus.protocols.metricsd import (
    SERIES_ROWS_MAX,
    SPAN_ROWS_MAX,
    WINDOW_ROWS_MAX,
    Add,
    CreateSeries,
    GetHistory,
    GetSeries,
    GetSpans,
    GetStats,
    Kind,
    Label,
    MetricsdStatus,
    Resolution,
    SenderRow,
    Series,
    SeriesCreated,
    Span,
    SpanEnd,
    SpanStart,
    SpanStatus,
    Stats,
    Window,
    WindowPage,
)
from nexus.protocols.statefsd import LIST_MAX, GetCalls, ListKeys
from nexus.protocols.testsvc import UseMetrics
from nexus.protocols.timed import Sleep
from nexus.services.selftest.climb import CALL_WAIT, Climb
from nexus.services.selftest.log_rungs import (
    BURSTS_MAX,
    BURSTS_WAIT,
    WINDOW,
    status_name,
)
from nexus.services.selftest.own_memory import Shared, is_settled, open_page
from nexus.services.selftest.policy_rungs import fields_of, pages
from nexus.services.selftest.rung import Evidence, RungFailed, expect, expect_type, require
from nexus.telemetry.page import BUCKETS, COUNT, SUM
from nexus.wire import Request

METRICSD_NAME: Final = "metricsd"
RATE_WINDOW: Final = Nanos(1_000_000_000)  # ns; ladder #121
RATE_MAX: Final = 64  # events of one sender inside it (services.md 3.4)
REJECTED: Final = 3  # events of rung 121 beyond that: one of each kind
CAP: Final = 16  # series of one metric (services.md 3.4)
CAPPED: Final = "selftest.capped"
SECRET_NAME: Final = "selftest.secret"  # noqa: S105 (of a metric)
SECRET_KEY: Final = "api_token"  # noqa: S105 (a key that looks as if it had one)
RATED: Final = "selftest.rated"
AFTERWARDS: Final = "selftest.afterwards"
REFUSED_SERIES: Final = "nexus_series_refused_total"  # metricsd's own, of service 0
STOLEN: Final = "selftest.stolen"
WILD: Final = 0x5EED_0122_0000_07A1  # what is written where no series of ours is
NO_PARENT: Final = bytes(8)
POLLS_MAX: Final = 14  # with doubling pauses: 1 ms to 8 s
POLL_PAUSE: Final = Nanos(1_000_000)  # ns
POLLS_WAIT: Final = Nanos(10_000_000_000)  # ns; several of metricsd's turns, on a busy host
COUNTER: Final = "selftest.counter"
GAUGE: Final = "selftest.gauge"
LEVEL: Final = "selftest.level"  # a gauge whose history rung 128 compares
FIRST_LEVEL: Final = 5
SECOND_LEVEL: Final = 0  # what a gauge is, too, until its task has found its word
HISTOGRAM: Final = "selftest.histogram"
SPAN: Final = "selftest.sleep"
TIMED_SPAN: Final = "timed.Sleep"  # the runtime's span of the request that timed serves
FIRST_ADD: Final = 3  # ladder #123
SECOND_ADD: Final = 4
FIRST_SET: Final = 5  # ladder #124
SECOND_SET: Final = -3
OBSERVED: Final = (500_000, 3_000_000, 15_000_000, 50_000_000, 500_000_000)  # ns; ladder #125
REPEATED: Final = 3_000_000  # ns; what is observed while the snapshots are taken
REPEATED_BUCKET: Final = 1  # where that belongs
HALTS: Final = (1, 2)  # stores of an update: the count, and then the sum too
SNAPSHOTS: Final = 1_000  # ladder #125
SPAN_SLEEP: Final = Nanos(5_000_000)  # ns; ladder #126
EVENT: Final = "metric.v1"  # of a record that metricsd exports a series in
AREA: Final = b"/state/observability/metricsd/"
KEYS_MAX: Final = 96  # that are told; metricsd keeps fewer than that in this system
SEEN_MAX: Final = 32
SHORT_WINDOW: Final = Nanos(200_000_000)  # ns; as the system file has it, and the runner compares
LONG_WINDOW: Final = Nanos(1_200_000_000)  # ns
LOSS_MAX: Final = Nanos(500_000_000)  # ns; several times what a death of metricsd may cost here


async def metricsd_stats(climb: Climb) -> Stats:
    """metricsd's account."""
    return await climb.call(climb.client(METRICSD_NAME), GetStats())


def row_of(stats: Stats, service: int) -> SenderRow:
    """The row of a sender, all zero if there is none."""
    rows = [row for row in stats.rows if row.service == service]
    return rows[0] if rows else SenderRow(service, *[0] * (len(SenderRow.__struct_fields__) - 1))


def growth_of(before: SenderRow, after: SenderRow) -> dict[str, int]:
    """What a sender's row counts more."""
    names = ("accepted", "invalid_args", "over_limit", "rate_limited")
    return {name: getattr(after, name) - getattr(before, name) for name in names}


async def series_of(climb: Climb, name: str = "", service: int = 0) -> list[Series]:
    """Every series whose name begins so, of that service or of all; the pages are read now."""
    found: list[Series] = []
    since = 1
    for _ in range(PAGES_MAX):
        request = GetSeries(since, SERIES_ROWS_MAX, service, name)
        page = await climb.call(climb.client(METRICSD_NAME), request)
        found += page.series
        if page.next == 0:
            return found
        require(page.next > since, "a page leads on")
        since = page.next
    raise RungFailed(f"the series did not end within {PAGES_MAX} pages")


async def own_series(climb: Climb, name: str) -> Series:
    """The one live series of ours with this name."""
    found = await series_of(climb, name, climb.boot.service)
    living = [each for each in found if each.name == name and each.live]
    expect(len(living), 1, f"series {name}")
    return living[0]


async def spans_of(climb: Climb, trace: bytes) -> list[Span]:
    """Every span of a trace; the rings are read first."""
    page = await climb.call(
        climb.client(METRICSD_NAME), GetSpans(1, SPAN_ROWS_MAX, trace, 0, 0, "")
    )
    return page.spans


def _page(climb: Climb) -> Shared:
    return Shared(*climb.metrics.memory)


async def _status_of(climb: Climb, request: Request[Any]) -> str:
    outcome = await climb.client(METRICSD_NAME).call(request, await climb.ahead(CALL_WAIT))
    return status_name(outcome)


PAGES_MAX: Final = 256  # of one listing; more than metricsd has series


def _counter(name: str, *labels: Label) -> CreateSeries:
    return CreateSeries(Kind.COUNTER, name, list(labels), [], "")


# ------------------------------------------------------------------ what is refused


async def invalid_args(climb: Climb) -> Evidence:
    """#119, stated: a span id of another maker by message, a secret-looking key at creation."""
    me = climb.boot.service
    before = await metricsd_stats(climb)
    context = climb.new_context()
    maker = (service_id("timed") & 0xFFFF_FFFF).to_bytes(4, "little")
    now = await climb.ahead(Nanos(0))
    span = SpanStart(maker + context.span[4:], context.trace, NO_PARENT, now, STOLEN, [])
    series = _counter(SECRET_NAME, Label(SECRET_KEY, "x"))

    statuses = [await _status_of(climb, span), await _status_of(climb, series)]
    after = await metricsd_stats(climb)
    spans = await spans_of(climb, context.trace)
    made = await series_of(climb, SECRET_NAME)

    return {
        "statuses": statuses,
        "growth": growth_of(row_of(before, me), row_of(after, me)),
        "series": [before.series, after.series, len(made)],
        "spans": [before.open_spans, after.open_spans, len(spans)],
        "maker": [f"{service_id('timed'):016x}", span.span.hex()],
    }


async def over_limit(climb: Climb) -> Evidence:
    """#120, stated: of one metric 16 series are made and work, and the 17th is refused."""
    _ = await climb.pause(WINDOW)
    me = climb.boot.service
    before = await _refused_series(climb)
    start = await metricsd_stats(climb)

    outcomes = [await _create(climb, _counter(CAPPED, Label("n", str(n)))) for n in range(CAP + 1)]
    made = [each for each in outcomes if isinstance(each, SeriesCreated)]
    for number, each in enumerate(made):
        climb.metrics.page.words[each.word] = CAPPED_FIRST + number
    found = await series_of(climb, CAPPED, me)
    after = await metricsd_stats(climb)

    return {
        "statuses": [status_name(each) for each in outcomes],
        "values": [each.value for each in sorted(found, key=lambda each: each.value)],
        "labels": sorted(label.value for each in found for label in each.labels),
        "growth": growth_of(row_of(start, me), row_of(after, me)),
        "refused": [before, await _refused_series(climb)],
        "per_metric": after.series_per_metric_max,
    }


CAPPED_FIRST: Final = 1000  # value of the first of these series


async def _create(climb: Climb, request: CreateSeries) -> SeriesCreated | Refused | CallFailure:
    return await climb.client(METRICSD_NAME).call(request, await climb.ahead(CALL_WAIT))


async def _refused_series(climb: Climb) -> int:
    """What the visible overflow series of CAPPED says."""
    found = [
        each
        for each in await series_of(climb, REFUSED_SERIES)
        if each.service == 0
        and [(one.key, one.value) for one in each.labels] == [("metric", CAPPED)]
    ]
    require(len(found) <= 1, f"{len(found)} overflow series")
    return found[0].value if found else 0


async def rate_limited(climb: Climb) -> Evidence:
    """#121, stated: creations, openings and messages count together; another sender is served."""
    budget = RetryBudget(
        attempts_max=BURSTS_MAX, backoff=WINDOW, deadline=await climb.ahead(BURSTS_WAIT)
    )
    return await retry_until(
        lambda: _burst(climb),
        lambda seen: seen["took_ns"] >= RATE_WINDOW,
        budget,
        RetryTokens(),
    )


async def _burst(climb: Climb) -> dict[str, Any]:
    """As many events as a window takes, and then one of each kind."""
    _ = await climb.pause(WINDOW)
    me = climb.boot.service
    metricsd, memory = climb.client(METRICSD_NAME), _page(climb)
    climb.metrics.page.clear()
    before = row_of(await metricsd_stats(climb), me)
    start = await climb.ahead(Nanos(0))
    statuses: dict[str, list[str]] = {"create": [], "open": [], "add": []}
    order: list[str] = []
    for number in range(RATE_MAX + REJECTED):
        kind = ("create", "open", "add")[number % len(statuses)]
        if kind == "create":
            status = await _status_of(climb, _counter(RATED))
        elif kind == "open":
            until = await climb.ahead(CALL_WAIT)
            status = status_name(await open_page(metricsd, memory, until))
        else:
            status = await _status_of(climb, Add(f"{RATED}.message", [], 1))
        statuses[kind].append(status)
        order.append(status)
    other = await climb.moved(climb.testsvc, UseMetrics(), await CapClone(metricsd.peer.slot))
    took = await climb.ahead(Nanos(0)) - start
    after = row_of(await metricsd_stats(climb), me)
    return {
        "statuses": statuses,
        "refused_from": order.index("RATE_LIMITED") if "RATE_LIMITED" in order else len(order),
        "took_ns": took,
        "growth": growth_of(before, after),
        "other": other.status,
    }


async def security_rejects(climb: Climb) -> Evidence:
    """#122: after the window a series and a span work; a write beyond the page's series is counted
    and seen by nobody."""
    _ = await climb.pause(WINDOW)
    me, page = climb.boot.service, climb.metrics.page
    created = expect_type(
        await _create(climb, _counter(AFTERWARDS)), SeriesCreated, "a series after the window"
    )
    page.words[created.word] = 1
    context = climb.new_context()
    start = await climb.ahead(Nanos(0))
    begun = SpanStart(context.span, context.trace, NO_PARENT, start, AFTERWARDS, [])
    ended = SpanEnd(context.span, start + 1, SpanStatus.OK, [])
    statuses = [await _status_of(climb, begun), await _status_of(climb, ended)]
    spans = await spans_of(climb, context.trace)
    series = await own_series(climb, AFTERWARDS)

    before = row_of(await metricsd_stats(climb), me).stray
    page.words[len(page.words) - 1] = WILD
    everything = await series_of(climb)
    budget = RetryBudget(
        attempts_max=POLLS_MAX, backoff=POLL_PAUSE, deadline=await climb.ahead(POLLS_WAIT)
    )
    stats = await retry_until(
        lambda: metricsd_stats(climb),
        lambda seen: row_of(seen, me).stray == before,  # until metricsd has looked at every word
        budget,
        RetryTokens(),
    )
    stray = row_of(stats, me).stray
    everything += await series_of(climb)
    page.words[len(page.words) - 1] = 0
    seen = [each.series for each in everything if WILD in _numbers(each)]

    expect(statuses, ["OK", "OK"], "a span's start and end")
    expect([(each.span, each.end) for each in spans], [(context.span, start + 1)], "the span")
    expect(series.value, 1, "the series")
    require(stray > before, f"words that are nobody's: {before}, then {stray}")
    expect(seen, [], "series in which the wild write is seen")
    return {
        "statuses": statuses,
        "series": [series.series, series.value],
        "span": [context.span.hex(), spans[0].status.name],
        "stray": [before, stray],
        "looked_at": len(everything),
        "seen": seen,
    }


def _numbers(each: Series) -> tuple[int, ...]:
    return (each.value, each.count, each.sum, *each.buckets)


# ------------------------------------------------------------------ what is read


async def _settle(climb: Climb) -> None:
    """metricsd reads our page, and every series of it has its place there."""
    settled = await is_settled(climb.metrics, await climb.ahead(POLLS_WAIT))
    require(settled, f"metrics are not settled: {climb.metrics.counts()}")


async def counters(climb: Climb) -> Evidence:
    """#123: 3 and 4 are 7, in metricsd's answer and in the record it has sent to logd."""
    counter, level = climb.metrics.counter(COUNTER), climb.metrics.gauge(LEVEL)
    await _settle(climb)

    counter.inc(FIRST_ADD)
    level.set(FIRST_LEVEL)
    _ = await _windows_with(climb, COUNTER, FIRST_ADD)
    _ = await climb.pause(SHORT_WINDOW)  # what comes now is in another window: for rung 128
    counter.inc(SECOND_ADD)
    level.set(SECOND_LEVEL)
    series = await own_series(climb, COUNTER)
    total = FIRST_ADD + SECOND_ADD
    budget = RetryBudget(
        attempts_max=POLLS_MAX, backoff=POLL_PAUSE, deadline=await climb.ahead(POLLS_WAIT)
    )
    records = await retry_until(
        lambda: _exported(climb, COUNTER, total), lambda seen: not seen, budget, RetryTokens()
    )

    expect(series.value, total, "the counter, in metricsd's answer")
    require(bool(records), f"metricsd exported no {COUNTER} with {total}")
    return {
        "added": [FIRST_ADD, SECOND_ADD],
        "value": series.value,
        "series": series.series,
        "record": records[0].record,
        "sender": f"{records[0].service:016x}",
        "fields": fields_of(records[0]),
    }


async def _exported(climb: Climb, name: str, value: int) -> list[Record]:
    """The records of metricsd's that say so of a series of ours."""
    sender = service_id(METRICSD_NAME)
    found, _ = await pages(climb, key="name", value=name, service=sender)
    wanted = {"event": EVENT, "value": str(value), "owner": f"0x{climb.boot.service:016x}"}
    return [each for each in found if wanted.items() <= fields_of(each).items()]


async def gauges(climb: Climb) -> Evidence:
    """#124: 5 and then -3 are -3; the page as it is, for the runner to read itself."""
    gauge = climb.metrics.gauge(GAUGE)
    await _settle(climb)
    word = await _word_of(climb, Kind.GAUGE, GAUGE)

    gauge.set(FIRST_SET)
    first = await own_series(climb, GAUGE)
    gauge.set(SECOND_SET)
    second = await own_series(climb, GAUGE)
    _, view = climb.metrics.memory

    expect([first.value, second.value], [FIRST_SET, SECOND_SET], "the gauge")
    return {
        "set": [FIRST_SET, SECOND_SET],
        "values": [first.value, second.value],
        "word": word,
        "page": b64encode(zlib.compress(bytes(view), 9)).decode(),
    }


async def _word_of(climb: Climb, kind: Kind, name: str, bounds: tuple[int, ...] = ()) -> int:
    """Where a series of ours is in the page: metricsd says the same as often as it is asked."""
    request = CreateSeries(kind, name, [], list(bounds), "")
    return expect_type(await _create(climb, request), SeriesCreated, f"the place of {name}").word


async def histograms(climb: Climb) -> Evidence:
    """#125: five values are counted in five buckets; no reading, at whatever moment of an update,
    has another count than its buckets, or a sum of another moment."""
    histogram = climb.metrics.histogram(HISTOGRAM)
    await _settle(climb)
    word = await _word_of(climb, Kind.HISTOGRAM, HISTOGRAM, histogram.bounds)
    torn = (await metricsd_stats(climb)).torn_reads

    for value in OBSERVED:
        histogram.observe(value)
    first = await own_series(climb, HISTOGRAM)
    writer = _SlowWriter(climb, word)
    halted = [await _halted(climb, writer, stores) for stores in HALTS]
    torn = (await metricsd_stats(climb)).torn_reads - torn
    seen = Tally[tuple[int, int, int]]()
    for _ in range(SNAPSHOTS):
        seen[_figures(await _snapshot(climb, first.series, writer))] += 1
    last = await own_series(climb, HISTOGRAM)

    expect(first.buckets, [1] * len(OBSERVED), "the buckets")
    expect((first.count, first.sum), (len(OBSERVED), sum(OBSERVED)), "count and sum")
    wrong = [each for each in (*seen, *halted) if not _is_whole(each)]
    expect(wrong, [], "readings (count, sum of buckets, sum) of no moment")
    expect(last.count, len(OBSERVED) + writer.written, "observations in the end")
    require(torn > 0, "no reading was torn, though updates were halted")
    return {
        "bounds": list(first.bounds),
        "buckets": list(first.buckets),
        "count": first.count,
        "sum": first.sum,
        "snapshots": seen.total(),
        "different": len(seen),
        "wrong": len(wrong),
        "halted": [list(each) for each in halted],
        "written": writer.written,
        "last": [last.count, sum(last.buckets), last.sum],
        "torn": torn,
    }


def _figures(series: Series) -> tuple[int, int, int]:
    return series.count, sum(series.buckets), series.sum


def _is_whole(figures: tuple[int, int, int]) -> bool:
    """Whether these are of one moment: every observation behind the first five was REPEATED."""
    count, buckets, total = figures
    return count == buckets and total == sum(OBSERVED) + REPEATED * (count - len(OBSERVED))


class _SlowWriter:
    """Observes REPEATED in the page by the rules of nexus.telemetry.page, one store at a time, with
    a trap behind each: whoever reads may do so in between."""

    def __init__(self, climb: Climb, word: int) -> None:
        self._words = climb.metrics.page.words
        self._word = word
        self.written = 0

    def stores(self) -> list[tuple[int, int]]:
        """What is to be stored where, in this order."""
        words, word = self._words, self._word
        bucket = word + BUCKETS + REPEATED_BUCKET
        return [
            (word + COUNT, words[word + COUNT] + 1),
            (word + SUM, words[word + SUM] + REPEATED),
            (bucket, words[bucket] + 1),
        ]

    async def store(self, index: int, value: int) -> None:
        """One of them."""
        self._words[index] = value
        _ = await Now()

    async def observe(self) -> None:
        """All of them."""
        for index, value in self.stores():
            await self.store(index, value)
        self.written += 1


async def _halted(climb: Climb, writer: _SlowWriter, stores: int) -> tuple[int, int, int]:
    """What metricsd answers while the writer has stopped behind so many stores of an update."""
    todo = writer.stores()
    for index, value in todo[:stores]:
        await writer.store(index, value)
    seen = await own_series(climb, HISTOGRAM)
    for index, value in todo[stores:]:
        await writer.store(index, value)
    writer.written += 1
    _ = await own_series(climb, HISTOGRAM)  # the next halt shows this one, which was whole
    return _figures(seen)


async def _snapshot(climb: Climb, number: int, writer: _SlowWriter) -> Series:
    """A reading, asked for before an update and answered when it pleases metricsd."""
    metricsd = climb.client(METRICSD_NAME)
    request = GetSeries(number, 1, climb.boot.service, HISTOGRAM)
    started = await metricsd.start(request, await climb.ahead(CALL_WAIT))
    await writer.observe()
    page = await climb.finish(metricsd, started)
    expect(len(page.series), 1, f"series {HISTOGRAM}")
    return page.series[0]


async def spans(climb: Climb) -> Evidence:
    """#126: a span around a sleep of 5 ms, and timed's own inside it."""
    start = await climb.ahead(Nanos(0))
    with climb.metrics.span(SPAN) as span:
        until = await climb.ahead(SPAN_SLEEP)  # in the span: a busy machine comes between the two
        woken = await climb.call(climb.timed, Sleep(until))
    end = await climb.ahead(Nanos(0))
    budget = RetryBudget(
        attempts_max=POLLS_MAX, backoff=POLL_PAUSE, deadline=await climb.ahead(POLLS_WAIT)
    )
    found = await retry_until(
        lambda: spans_of(climb, span.context.trace),
        lambda seen: {each.name for each in seen if each.end} != {SPAN, TIMED_SPAN},
        budget,
        RetryTokens(),
    )
    by_name = {each.name: each for each in found}

    expect(sorted(by_name), [SPAN, TIMED_SPAN], "spans of the trace")
    own, child = by_name[SPAN], by_name[TIMED_SPAN]
    require(own.end - own.start >= SPAN_SLEEP, f"it lasted {own.end - own.start} ns")
    expect(child.parent, own.span, "parent of timed's span")
    return {
        "asked": [start, until, end],
        "woken": woken.now,
        "trace": span.context.trace.hex(),
        "own": _told(own),
        "child": _told(child),
    }


def _told(span: Span) -> dict[str, object]:
    return {
        "trace": span.trace.hex(),
        "span": span.span.hex(),
        "parent": span.parent.hex(),
        "service": f"{span.service:016x}",
        "pid": span.pid,
        "start": span.start,
        "end": span.end,
        "status": span.status.name,
    }


# ------------------------------------------------------------------ what stays


async def wal_active(climb: Climb) -> Evidence:
    """#127, stated: the keys of metricsd's area as statefsd lists them, and what statefsd heard of
    metricsd."""
    statefsd = climb.client("statefsd")
    keys: list[bytes] = []
    more = True
    while more:
        listed = await climb.call(statefsd, ListKeys(AREA, keys[-1] if keys else b"", LIST_MAX))
        keys += listed.keys
        more = listed.more and len(keys) < KEYS_MAX
    heard = await climb.call(statefsd, GetCalls(service_id(METRICSD_NAME), SEEN_MAX))
    return {
        "keys": [key.removeprefix(AREA).decode() for key in keys],
        "ops": sorted({seen.op for seen in heard.seen}),
        "senders": sorted({f"{seen.sender:016x}" for seen in heard.seen}),
        "total": heard.total,
    }


async def _windows(climb: Climb, name: str, resolution: Resolution) -> list[Window]:
    """Every window of this boot of a series of ours, the oldest first; the last may be open."""
    found: list[Window] = []
    since = 0
    for _ in range(PAGES_MAX):
        outcome = await climb.client(METRICSD_NAME).call(
            GetHistory(climb.boot.service, name, [], resolution, since, WINDOW_ROWS_MAX),
            await climb.ahead(CALL_WAIT),
        )
        if outcome == Refused(MetricsdStatus.NOT_FOUND):
            return []
        page = expect_type(outcome, WindowPage, f"the history of {name}")
        found += page.windows
        if page.next == 0:
            return [each for each in found if each.boot == climb.config.boot]
        since = page.next
    raise RungFailed(f"the history did not end within {PAGES_MAX} pages")


async def _windows_with(climb: Climb, name: str, total: int) -> list[Window]:
    """The windows of a counter, the open one too, once they hold all that was added."""
    budget = RetryBudget(
        attempts_max=POLLS_MAX, backoff=POLL_PAUSE, deadline=await climb.ahead(POLLS_WAIT)
    )
    found = await retry_until(
        lambda: _windows(climb, name, Resolution.SHORT),
        lambda seen: sum(each.sum for each in seen) < total,
        budget,
        RetryTokens(),
    )
    expect(sum(each.sum for each in found), total, f"what the windows of {name} hold")
    return found


async def retention(climb: Climb) -> Evidence:
    """#128: metricsd is killed, and the next one tells the history of before; long windows are what
    their short ones say; nothing grows beyond its bounds."""
    total = FIRST_ADD + SECOND_ADD
    metricsd = climb.client(METRICSD_NAME)
    _ = await _windows_with(climb, COUNTER, total)
    _ = await climb.pause(LONG_WINDOW)  # and all of that is in windows that are over
    before = await _histories(climb)
    _ = await climb.pause(LOSS_MAX)
    bounds = [_bounds_of(await metricsd_stats(climb))]
    old = await climb.task(METRICSD_NAME)

    _ = await climb.restart(METRICSD_NAME)
    record = await climb.up_again(METRICSD_NAME, old.generation + 1)
    _ = await metricsd.call(GetStats(), await climb.ahead(CALL_WAIT))  # ends with the old link
    budget = RetryBudget(
        attempts_max=POLLS_MAX, backoff=POLL_PAUSE, deadline=await climb.ahead(POLLS_WAIT)
    )
    after = await retry_until(  # it reads its history back while it serves
        lambda: _histories(climb), lambda seen: bool(_lost(before, seen)), budget, RetryTokens()
    )
    stats = await metricsd_stats(climb)
    bounds.append(_bounds_of(stats))
    await _found_again(climb)
    again = await own_series(climb, COUNTER)
    bounds.append(_bounds_of(await metricsd_stats(climb)))

    expect(_lost(before, after), [], "windows of before that are no longer told")
    expect(again.value, total, "the counter at the new metricsd")
    return {
        "generations": [old.generation, record.generation],
        "lengths": [SHORT_WINDOW, LONG_WINDOW],
        "before": before,
        "after": after,
        "added": [FIRST_ADD, SECOND_ADD],
        "set": [FIRST_LEVEL, SECOND_LEVEL],
        "recovered": stats.recovered,
        "recovery_lost": stats.recovery_lost,
        "bounds": bounds,
        "value": again.value,
    }


Histories = dict[str, dict[str, list[list[int]]]]


async def _histories(climb: Climb) -> Histories:
    return {name: await _history(climb, name) for name in (COUNTER, LEVEL)}


def _lost(before: Histories, after: Histories) -> list[list[int]]:
    """The windows that were told before and are not now."""
    return [
        row
        for name, told in before.items()
        for resolution, rows in told.items()
        for row in rows
        if row not in after[name][resolution]
    ]


async def _history(climb: Climb, name: str) -> dict[str, list[list[int]]]:
    """Start, count, sum, min, max, last of each window, by resolution."""
    return {
        resolution.name.lower(): [
            [each.start, each.count, each.sum, each.min, each.max, each.last]
            for each in await _windows(climb, name, resolution)
        ]
        for resolution in Resolution
    }


def _bounds_of(stats: Stats) -> list[int]:
    return [
        *(stats.segments, stats.segments_max),
        *(stats.windows_short, stats.windows_long, stats.windows_max),
        *(stats.written_today, stats.written_max),
    ]


async def _found_again(climb: Climb) -> None:
    """The library has found the new metricsd, and every series has its place there."""
    opened = climb.metrics.counts().opened

    async def flushed() -> bool:
        await climb.metrics.flush()
        counts = climb.metrics.counts()
        return counts.opened > opened and not counts.waiting

    budget = RetryBudget(
        attempts_max=POLLS_MAX, backoff=POLL_PAUSE, deadline=await climb.ahead(POLLS_WAIT)
    )
    found = await retry_until(flushed, lambda done: not done, budget, RetryTokens())
    require(found, f"metricsd was not found again: {climb.metrics.counts()}")

"""The metrics of one task: made at once, told to metricsd when the task is at leisure.

    no page --begin--> closed --OpenPage--> opening --PageOpened--> open --CreateSeries--> placed
       all series wait again <--metricsd is gone, or knows no page-- any of these

Making a series or a span is a plain function that never waits; only what a programmer got wrong,
such as a name, raises. `flush` posts without waiting for answers; the one thing it waits for,
under a bound and not often, is the way to metricsd.
"""

import re
from collections import deque
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Final, TypeVar

from nexus.abi import (
    NEVER,
    NO_WAIT,
    AbiError,
    CapClone,
    CapClose,
    ClockMap,
    Nanos,
    Now,
    Slot,
    Status,
    VmoCreate,
    VmoShare,
)
from nexus.ipc import (
    CallFailure,
    Client,
    Closed,
    Denied,
    NotFound,
    Peers,
    Posted,
    Poster,
    Refused,
    RetryBudget,
    RouteFailure,
    deadline_after,
)
from nexus.metrics.series import Counter, Gauge, Histogram, Series
from nexus.metrics.spans import Recorder, Span, Tracing
from nexus.protocols.metricsd import (
    BOUNDS_MAX,
    KEY_PATTERN,
    KEY_SIZE_MAX,
    LABELS_MAX,
    LABELS_SIZE_MAX,
    NAME_PATTERN,
    NAME_SIZE_MAX,
    PROTOCOL,
    VALUE_SIZE_MAX,
    CreateSeries,
    Kind,
    Label,
    MetricsdStatus,
    OpenPage,
    PageOpened,
    SeriesCreated,
)
from nexus.protocols.metricsd_keys import looks_secret
from nexus.telemetry import PageWriter, called

METRICSD_NAME: Final = "metricsd"
PAGE_SIZE_DEFAULT: Final = 32 * 1024  # bytes; about 1000 counters, 25 open spans, 100 ended ones
SERIES_MAX: Final = 512  # handles of one task; further ones share the overflow
SPAN_NAMES_MAX: Final = 256  # names, and names with attributes, that are kept ready
UNIT_SIZE_MAX: Final = 16  # characters
DEFAULT_BOUNDS: Final = (1_000_000, 5_000_000, 20_000_000, 100_000_000)  # ns (services.md 3.5)
ANSWER_WAIT: Final = Nanos(1_000_000_000)  # ns until a request without an answer is made again
DISCOVERY_WAIT: Final = Nanos(50_000_000)  # ns of one search for metricsd
LOOK_PAUSE: Final = Nanos(100_000_000)  # ns between two searches, doubling
LOOK_PAUSE_MAX: Final = Nanos(2_000_000_000)  # ns
DENIED_PAUSE: Final = Nanos(30_000_000_000)  # ns; a route that is denied comes with a new policy
FULL_PAUSE: Final = Nanos(5_000_000)  # ns until a full metricsd is tried again
RATE_PAUSE: Final = Nanos(1_000_000_000)  # ns; the window that refused is over then
ALIVE_PAUSE: Final = Nanos(1_000_000_000)  # ns between two looks whether metricsd still lives
ROUTE_ATTEMPTS_MAX: Final = 3  # of one search
ROUTE_BACKOFF: Final = Nanos(5_000_000)  # ns

NAME: Final = re.compile(NAME_PATTERN)
KEY: Final = re.compile(KEY_PATTERN)
FOR_GOOD: Final = (MetricsdStatus.INVALID_ARGS, MetricsdStatus.OVER_LIMIT)

LabelValue = str | int
SeriesT = TypeVar("SeriesT", bound=Series)
Key = tuple[Kind, str, tuple[tuple[str, str], ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricCounts:
    """What became of the series of one task; made = placed + waiting + refused."""

    made: int
    placed: int
    waiting: int
    refused: int
    crowded: int  # makings beyond SERIES_MAX or with values too large; not among those made
    overflow_updates: int
    opened: int  # how often metricsd has opened the page


class Metrics:
    """The metrics of one task.

    `uses` are the services it may ask init for; without metricsd among them series have values that
    nobody reads, and spans are not recorded. `due` says that `flush` has something to do.
    """

    def __init__(
        self,
        peers: Peers,
        uses: Collection[str] = (),
        *,
        page_size: int = PAGE_SIZE_DEFAULT,
        tracing: Tracing | None = None,
    ) -> None:
        self.recorder = Recorder(peers.caller if tracing is None else tracing)
        self.next_look = NEVER  # when flush is to be called even if it is not due
        self.wake = Nanos(0)  # when it is to be called if it is due
        self._peers = peers
        self._routed = METRICSD_NAME in uses
        self._page_size = page_size
        self._page: PageWriter | None = None
        self._slot: Slot | None = None
        self._view: memoryview | None = None
        self._series: dict[Key, Series] = {}
        self._todo: deque[Series] = deque()
        self._placed = 0
        self._refused = 0
        self._crowded = 0
        self._overflow = 0  # updates before there was a page
        self._spans: dict[str, list[Span]] = {}  # that have ended, to be used again
        self._attributed: dict[tuple[str, tuple[tuple[str, LabelValue], ...]], list[Span]] = {}
        self._poster: Poster[Series | None] | None = None
        self._opening = False
        self._is_open = False
        self._opened = 0
        self._flushing = False
        self._now = Nanos(0)
        self._again = Nanos(0)  # flush sends nothing before
        self._pause = LOOK_PAUSE
        self._answer_pause = FULL_PAUSE
        self.due = False
        self._crowd: dict[Kind, Series] = {
            Kind.COUNTER: Counter(Kind.COUNTER, "", "", []),
            Kind.GAUGE: Gauge(Kind.GAUGE, "", "", []),
            Kind.HISTOGRAM: Histogram(Kind.HISTOGRAM, "", "", [], ()),
        }
        for each in self._crowd.values():
            each.refuse(self._count_overflow)

    # ------------------------------------------------------------------ series

    def counter(self, name: str, unit: str = "", **labels: LabelValue) -> Counter:
        """The counter of this name and these labels, the same one each time."""
        return self._get(Counter, Kind.COUNTER, name, unit, (), labels)

    def gauge(self, name: str, unit: str = "", **labels: LabelValue) -> Gauge:
        """The gauge of this name and these labels."""
        return self._get(Gauge, Kind.GAUGE, name, unit, (), labels)

    def histogram(
        self,
        name: str,
        unit: str = "",
        bounds: tuple[int, ...] = DEFAULT_BOUNDS,
        **labels: LabelValue,
    ) -> Histogram:
        """The histogram of this name and these labels; `bounds` are inclusive and rise."""
        rises = all(low < high for low, high in pairwise((-1, *bounds)))
        if not 1 <= len(bounds) <= BOUNDS_MAX or not rises:
            raise ValueError(f"{name}: bounds are 1 to {BOUNDS_MAX} rising numbers from 0 on")
        return self._get(Histogram, Kind.HISTOGRAM, name, unit, bounds, labels)

    def _get(
        self,
        make: type[SeriesT],
        kind: Kind,
        name: str,
        unit: str,
        bounds: tuple[int, ...],
        labels: Mapping[str, LabelValue],
    ) -> SeriesT:
        texts = {each: _text(labels[each]) for each in sorted(labels)}
        key = (kind, name, tuple(texts.items()))
        found = self._series.get(key)
        if found is None:
            return self._make(make, key, unit, bounds, texts)
        assert isinstance(found, make), "its kind is part of the key"
        if found.bounds != bounds:
            raise ValueError(f"{name} has other bounds already: {found.bounds}")
        return found

    def _make(
        self,
        make: type[SeriesT],
        key: Key,
        unit: str,
        bounds: tuple[int, ...],
        labels: dict[str, str],
    ) -> SeriesT:
        kind, name, _ = key
        _check_name(name)
        _check_keys(name, labels)
        if len(unit) > UNIT_SIZE_MAX:
            raise ValueError(f"{name}: a unit has at most {UNIT_SIZE_MAX} characters")
        if len(self._series) >= SERIES_MAX or _is_too_large(labels):
            self._crowded += 1
            crowd = self._crowd[kind]
            assert isinstance(crowd, make), "there is one of each kind"
            return crowd
        rows = [Label(each, text) for each, text in labels.items()]
        series = make(kind, name, unit, rows, bounds)
        self._series[key] = series
        if self._page is not None:
            self._wait(series)
        return series

    def _wait(self, series: Series) -> None:
        series.wait()
        self._todo.append(series)
        self.due = True

    def _count_overflow(self, count: int) -> None:
        if self._page is None:
            self._overflow += count
        else:
            self._page.count_overflow(count)

    # ------------------------------------------------------------------ spans

    def span(self, name: str, /, **attributes: LabelValue) -> Span:
        """A span, for `with`. Attributes that are too many or too long are cut."""
        try:
            if not attributes:
                return self._spans[name].pop()
            return self._attributed[name, tuple(attributes.items())].pop()
        except (KeyError, IndexError):
            return self._make_span(name, attributes)

    def _make_span(self, name: str, attributes: dict[str, LabelValue]) -> Span:
        home: list[Span] = []
        if not attributes:
            if name not in self._spans:
                _check_name(name)
            if len(self._spans) < SPAN_NAMES_MAX:
                home = self._spans.setdefault(name, home)
            return Span(self.recorder, called(name), home)
        _check_name(name)
        _check_keys(name, attributes)
        if len(self._attributed) < SPAN_NAMES_MAX:
            home = self._attributed.setdefault((name, tuple(attributes.items())), home)
        texts = {each: str(value)[:VALUE_SIZE_MAX] for each, value in attributes.items()}
        return Span(self.recorder, called(name, texts), home)

    # ------------------------------------------------------------------ the page

    async def begin(self) -> None:
        """Make the page; once, before the task does anything else. Without room for it there is
        none, and the series keep their values for themselves."""
        if not self._routed or self._page is not None:
            return
        try:
            self._slot = await VmoCreate(self._page_size)
            view = await VmoShare(self._slot)
            clock = await ClockMap()
        except AbiError as error:
            if error.status not in (Status.NO_SPACE, Status.UNSUPPORTED):
                raise
            self._routed = False
            return
        self._view = view
        self._page = PageWriter(view)
        self._page.begin(clock.monotonic())
        self._page.count_overflow(self._overflow)
        self.recorder.begin(self._page, clock)
        for series in self._series.values():
            self._wait(series)
        self.due = True
        self.next_look = Nanos(0)

    @property
    def page(self) -> PageWriter:
        """The page that `begin` has made: for who writes there, or offers it, by other means."""
        assert self._page is not None
        return self._page

    @property
    def memory(self) -> tuple[Slot, memoryview]:
        """Where the page is."""
        assert self._slot is not None
        assert self._view is not None
        return self._slot, self._view

    def is_due(self, now: Nanos) -> bool:
        """Whether `flush` has something to do now."""
        return self._page is not None and (now >= self.next_look or (self.due and now >= self.wake))

    async def flush(self) -> None:
        """Post what waits and take the answers that are there; never waits for either."""
        if self._flushing or self._page is None:
            return
        self._flushing = True
        try:
            await self._work(self._page, await Now())
        finally:
            self._flushing = False
            self._plan()

    def _plan(self) -> None:
        """When to go on. The pauses double while nobody answers."""
        outstanding = self._outstanding > 0
        self.due = self.has_work or outstanding
        pause = self._answer_pause if outstanding else FULL_PAUSE
        self._answer_pause = min(Nanos(2 * pause), LOOK_PAUSE) if outstanding else FULL_PAUSE
        self.wake = max(self._again, deadline_after(self._now, pause if outstanding else NO_WAIT))

    @property
    def _outstanding(self) -> int:
        return 0 if self._poster is None else self._poster.outstanding

    async def _work(self, page: PageWriter, now: Nanos) -> None:
        self._now = now
        poster = self._poster
        if poster is not None:
            await poster.take(now)
            if now >= self.next_look and not self._outstanding:
                await poster.exchange.take(1)  # the end of its link is how its death shows
            if not poster.exchange.peer.alive:
                self._on_lost(page)
        if now >= self.next_look:
            self.next_look = deadline_after(now, ALIVE_PAUSE)
        if now < self._again or not self.has_work or not await self._ready(now):
            return
        assert self._poster is not None, "ready is bound"
        if self._is_open:
            await self._create(self._poster, now)
        elif not self._opening:
            await self._open(self._poster, now)

    @property
    def has_work(self) -> bool:
        """Whether something is to be posted."""
        return not self._is_open or bool(self._todo)

    async def _open(self, poster: Poster[Series | None], now: Nanos) -> None:
        """Give metricsd the page."""
        assert self._slot is not None
        try:
            given = await CapClone(self._slot)  # a VMO moves with MAP only
        except AbiError as error:
            if error.status is not Status.NO_SPACE:
                raise
            self._again = deadline_after(now, FULL_PAUSE)
            return
        posted = await poster.post(OpenPage(), now, None, move=given)
        self._opening = posted is Posted.SENT
        if posted is not Posted.SENT:
            await CapClose(given)
            self._again = deadline_after(now, FULL_PAUSE)

    async def _create(self, poster: Poster[Series | None], now: Nanos) -> None:
        while self._todo and now >= self._again:
            series = self._todo.popleft()
            request = CreateSeries(
                series.kind, series.name, series.labels, list(series.bounds), series.unit
            )
            posted = await poster.post(request, now, series)
            if posted is not Posted.SENT:
                self._todo.appendleft(series)
                self._again = max(self._again, deadline_after(now, FULL_PAUSE))

    def _on_ended(self, series: Series | None, outcome: object) -> None:
        """A request has its outcome."""
        if series is None:
            self._on_open_ended(outcome)
        elif self._is_open:
            self._on_create_ended(series, outcome)

    def _on_open_ended(self, outcome: object) -> None:
        self._opening = False
        match outcome:
            case PageOpened():
                self._is_open = True
                self._opened += 1
            case Refused(status) if status in FOR_GOOD:
                self._again = deadline_after(self._now, DENIED_PAUSE)
            case Refused():
                self._again = deadline_after(self._now, RATE_PAUSE)
            case _:
                self._again = deadline_after(self._now, LOOK_PAUSE)

    def _on_create_ended(self, series: Series, outcome: object) -> None:
        page = self._page
        assert page is not None
        match outcome:
            case SeriesCreated(word=word) if word + series.size <= len(page.words):
                series.place(page, word)
                self._placed += 1
            case SeriesCreated() | Refused(MetricsdStatus.INVALID_ARGS | MetricsdStatus.OVER_LIMIT):
                series.refuse(self._count_overflow)
                self._refused += 1
            case Refused(MetricsdStatus.NOT_FOUND):
                self._todo.append(series)
                self._begin_again(page)
            case _:
                self._todo.append(series)
                if isinstance(outcome, Refused):
                    self._again = max(self._again, deadline_after(self._now, RATE_PAUSE))

    def _on_lost(self, page: PageWriter) -> None:
        """That metricsd is gone."""
        poster = self._poster
        if poster is not None and (self._is_open or self._opening):
            self._begin_again(page)
            poster.abandon()

    def _begin_again(self, page: PageWriter) -> None:
        """Every series waits again, with its value; the words are nobody's."""
        self._is_open = self._opening = False
        self._todo.clear()
        for series in self._series.values():
            series.wait()
            self._todo.append(series)
        self._placed = 0
        self._refused = 0
        page.clear()

    # ------------------------------------------------------------------ the way to metricsd

    async def close(self) -> None:
        """Let go of metricsd; what is in the page stays readable."""
        if self._poster is not None:
            self._poster.abandon()
            await self._peers.discard(self._poster.exchange.peer)
            self._poster = None
        self._routed = self._is_open = self._opening = False

    async def _ready(self, now: Nanos) -> bool:
        """Whether there is a way to metricsd, after one bounded search for it."""
        if self._poster is not None and self._poster.exchange.peer.alive:
            return True
        if not self._routed:
            return False
        failure = await self._look(deadline_after(now, DISCOVERY_WAIT))
        if failure is None:
            self._pause = LOOK_PAUSE
            return True
        pause = DENIED_PAUSE if isinstance(failure, Denied | NotFound) else self._pause
        self._pause = min(Nanos(2 * self._pause), LOOK_PAUSE_MAX)
        self._again = deadline_after(await Now(), pause)
        return False

    async def _look(self, until: Nanos) -> RouteFailure | CallFailure | None:
        """Search for metricsd until `until`; None if it was found."""
        try:
            if self._poster is not None:
                client = self._poster.exchange
                assert isinstance(client, Client)
                return await client.renew(until)
            budget = RetryBudget(
                attempts_max=ROUTE_ATTEMPTS_MAX, backoff=ROUTE_BACKOFF, deadline=until
            )
            found = await self._peers.connect(METRICSD_NAME, PROTOCOL, budget)
        except AbiError as error:
            if error.status is not Status.NO_SPACE:
                raise
            return Closed()  # this task has no room for another capability now
        if not isinstance(found, Client):
            return found
        self._poster = Poster(found, self._on_ended, wait=ANSWER_WAIT)
        return None

    # ------------------------------------------------------------------ the account

    def counts(self) -> MetricCounts:
        """What became of every series so far."""
        made = len(self._series)
        overflow = self._overflow if self._page is None else self._page.overflow
        return MetricCounts(
            made=made,
            placed=self._placed,
            waiting=made - self._placed - self._refused,
            refused=self._refused,
            crowded=self._crowded,
            overflow_updates=overflow,
            opened=self._opened,
        )

    def facts(self) -> dict[str, int]:
        """The account in short, for a service's facts."""
        counts = self.counts()
        return {
            "metrics_placed": counts.placed,
            "metrics_refused": counts.refused + counts.crowded,
            "metrics_overflow_total": counts.overflow_updates,
        }


def _check_name(name: str) -> None:
    if NAME.match(name) is None or len(name) > NAME_SIZE_MAX:
        raise ValueError(
            f"{name!r} is no name of a metric or span: it begins with a letter or _, goes on with "
            f"letters, digits, _ and dots, and has at most {NAME_SIZE_MAX} characters"
        )


def _check_keys(name: str, keys: Collection[str]) -> None:
    if len(keys) > LABELS_MAX:
        raise ValueError(f"{name}: at most {LABELS_MAX} labels, and not {len(keys)}")
    for key in keys:
        if KEY.match(key) is None or len(key) > KEY_SIZE_MAX:
            raise ValueError(f"{name}: {key!r} is no key of a label")
        if looks_secret(key):
            raise ValueError(f"{name}: the label {key!r} looks as if a secret came with it")


def _text(value: LabelValue) -> str:
    """A label's value as it travels. What UTF-8 cannot say (half a surrogate pair, as names of
    files have) is spelled out."""
    text = str(value)
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode()


def _is_too_large(labels: Mapping[str, str]) -> bool:
    """Whether values that came at run time are larger than a series may have."""
    size = sum(len(key) + len(text.encode()) for key, text in labels.items())
    return size > LABELS_SIZE_MAX or any(len(each) > VALUE_SIZE_MAX for each in labels.values())

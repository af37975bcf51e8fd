"""exportd: what metricsd knows, for the outside: a page to scrape, and bodies for a collector.

Owns its stream ports, the connections at them, and the queue for the collector, all of which are
lost with it. It is told series and spans by metricsd and trusts nobody else: what comes in from
outside is a request for a page or an answer to a body, and reaches no other service. No peer's pace
holds it up, and nothing that it keeps for a peer is without a bound. Decision: docs/adr/0020.
"""

from typing import Final, assert_never

from nexus import __version__
from nexus.abi import (
    PORT_PEERS_MAX,
    AbiError,
    Clock,
    ClockMap,
    LinkId,
    Message,
    Nanos,
    Now,
    PortClose,
    PortDial,
    PortSend,
    Slot,
    Status,
    service_id,
)
from nexus.ipc import deadline_after
from nexus.protocols.exportd import (
    PROTOCOL,
    CollectorState,
    ExportdRequest,
    GetStats,
    Stats,
)
from nexus.protocols.meta import HEALTH_ANSWER
from nexus.protocols.metricsd import PROTOCOL as METRICSD
from nexus.runtime import Call
from nexus.runtime.program import Context
from nexus.runtime.ways import Ways
from nexus.services.exportd import otlp
from nexus.services.exportd.collector import Collector, Dial, Effect, HangUp, Transmit
from nexus.services.exportd.config import Settings
from nexus.services.exportd.exposition import chosen, exposition
from nexus.services.exportd.pages import Asked, Visit
from nexus.services.exportd.readings import METRICSD_NAME, NoReading, Readings

OPEN_MAX: Final = Nanos(1_000_000_000)  # ns for the way to metricsd at the start
SCRAPE_TIME_MAX: Final = Nanos(800_000_000)  # ns for reading all series; a probe waits behind it
EXPORT_TIME_MAX: Final = Nanos(800_000_000)  # ns for what goes to the collector, the same
SCRAPES_MAX: Final = 16  # in a second, of everybody; a scraper asks a few times in a minute
SCRAPE_WINDOW: Final = Nanos(1_000_000_000)  # ns
ANSWERS_SIZE_MAX: Final = 4 * 1024 * 1024  # bytes of answers that peers have not read, of all
BODY_SIZE_MAX: Final = 64 * 1024  # bytes; a collector takes megabytes
REMARKED_MAX: Final = 32  # metrics told to the log; exportd_series_left_out counts series of all
DIALS: Final = "dial"

assert SCRAPE_TIME_MAX + EXPORT_TIME_MAX < HEALTH_ANSWER, "a probe is answered in time"


class Exportd:
    """Serves nexus.protocols.exportd, and the ports of its entry in the system file."""

    PROTOCOL = PROTOCOL

    def __init__(self, context: Context) -> None:
        self._context = context
        self._settings = context.settings_as(Settings)
        self._readings = Readings(context, self._settings.series)
        self._visits: dict[LinkId, Visit] = {}
        self._scrapes = 0
        self._scrapes_refused = 0
        self._left_out = 0  # series of the last page that no scraper could have read
        self._missing = context.metrics.gauge("exportd_series_left_out")  # the same, for scrapers
        self._remarked: set[str] = set()  # metrics that the log was told of
        self._window = Nanos(0)
        self._in_window = 0
        streams = context.config.streams
        slots = context.boot.ports[len(context.boot.ports) - len(streams) :]
        ports = list(zip(streams.values(), slots, strict=True))
        self._collector_port = next((slot for role, slot in ports if role == DIALS), None)
        self._page_ports = frozenset(slot for role, slot in ports if role != DIALS)
        self._collector = Collector(
            "collector",
            count_max=self._settings.queue_count,
            size_max=self._settings.queue_size,
            pause_max=Nanos(self._settings.pause_max_ms * 1_000_000),
        )
        self._export_due: Nanos | None = None
        self._ways = Ways(context, {METRICSD_NAME: METRICSD})
        self._clock: Clock | None = None
        config = context.config
        names = {int(service_id(name)): name for name in config.names}
        self._origin = otlp.Origin(names, f"{config.boot_id.hex()[:12]}", __version__)

    async def start(self) -> None:
        """Its ports are open from the start; the way to metricsd is taken if it is there, and else
        looked for again."""
        self._clock = await ClockMap()
        await self._ways.start(OPEN_MAX)
        if self._collector_port is not None:
            self._export_due = deadline_after(await Now(), self._every)

    # ------------------------------------------------------------------ the runtime's side

    def handle(self, call: Call, request: ExportdRequest) -> Stats:
        """The account, for anybody."""
        del call
        match request:
            case GetStats():
                return self._stats()
            case _:
                assert_never(request)

    def ready(self) -> bool:
        """There is a port to be scraped at, or a collector to send to."""
        return bool(self._page_ports) or self._collector_port is not None

    def facts(self) -> dict[str, int]:
        """Who is here, and what became of what was asked."""
        return {
            "visits": len(self._visits),
            "scrapes_total": self._scrapes,
            "scrapes_refused_total": self._scrapes_refused,
            "series_left_out": self._left_out,
            "bodies_queued": self._collector.count,
            "bodies_sent_total": self._collector.sent,
            "bodies_dropped_total": self._collector.dropped,
        }

    def evidence(self) -> dict[str, object]:
        """Where it listens and what it dials."""
        return {"streams": dict(self._context.config.streams)}

    async def on_other(self, message: Message) -> None:
        """Bytes, or room, at one of the ports."""
        if message.source == self._collector_port:
            if message.link == self._collector.link:
                data = message.data
                effects = (
                    self._collector.on_data(data, message.now)
                    if data
                    else self._collector.on_room(message.now)
                )
                await self._act(effects, message.now)
            return
        if message.source not in self._page_ports:
            return
        visit = self._visits.get(message.link)
        if visit is None:
            await self._make_room(message.source)
            visit = Visit(message.source, message.link, message.now)
            self._visits[message.link] = visit
        if message.data:
            await self._serve(visit, visit.take(message.data, message.now), message.now)
        else:
            visit.waits = False
            await self._serve(visit, None, message.now)

    async def on_gone(self, link: LinkId) -> None:
        """A connection has ended."""
        if link == self._collector.link:
            now = await Now()
            await self._act(self._collector.on_gone(now), now)
            return
        _ = self._visits.pop(link, None)

    def next_time(self) -> Nanos | None:
        """The next deadline of a connection, of the collector, or the next export."""
        dues = [visit.due for visit in self._visits.values()]
        others = (self._collector.next_time(), self._export_due, self._ways.next_time())
        dues += [due for due in others if due is not None]
        return min(dues, default=None)

    async def on_time(self, now: Nanos) -> None:
        """End what is late, and export what is new."""
        for visit in list(self._visits.values()):
            if visit.is_late(now):
                self._scrapes_refused += visit.refused
                _ = await self._send(visit)
                await self._close(visit)
        await self._act(self._collector.on_time(now), now)
        await self._ways.on_time(now)
        if self._export_due is not None and self._export_due <= now:
            self._export_due = deadline_after(now, self._every)
            await self._export(now)

    # ------------------------------------------------------------------ the page

    async def _serve(self, visit: Visit, asked: Asked | None, now: Nanos) -> None:
        """Answer what is asked, send what can be, and go on with what was asked meanwhile.

        Each round answers one request that the peer has sent, and one answer at a time waits.
        """
        while True:  # each round answers one request that has come; it ends when none is left
            if asked is not None:
                await self._answer(visit, asked, now)
            self._scrapes_refused += visit.refused
            visit.refused = 0
            if not await self._send(visit):
                return
            if visit.over:
                await self._close(visit)
                return
            asked = visit.go_on(now) if visit.answered else None
            if asked is None and not visit.pending:
                return

    async def _answer(self, visit: Visit, asked: Asked, now: Nanos) -> None:
        """The page, or why there is none."""
        if not self._may_scrape(now):
            visit.answer(503, b"asked too often\n", now, fields=(("Retry-After", "1"),))
            return
        kind = chosen(asked.accept)
        try:
            rows = await self._readings.series(deadline_after(now, SCRAPE_TIME_MAX))
        except NoReading as fault:
            visit.answer(503, f"{fault}\n".encode(), now, fields=(("Retry-After", "1"),))
            return
        page = exposition(rows, self._origin.names, kind)
        self._left_out = page.left_out
        self._missing.set(page.left_out)
        self._remark(page.metrics_left_out)
        pending = sum(each.pending for each in self._visits.values())
        if len(page.text) > self._settings.page_size or (
            pending + len(page.text) > ANSWERS_SIZE_MAX
        ):
            visit.answer(503, b"the page is too large\n", now)
            return
        self._scrapes += 1
        visit.answer(200, page.text, now, kind=kind.value)

    def _remark(self, metrics: list[str]) -> None:
        """Say once of each metric that not all of its series can stand on the page: it is another's
        name as scrapers take names, or two of its own are one by their labels."""
        for metric in metrics:
            if metric not in self._remarked and len(self._remarked) < REMARKED_MAX:
                self._remarked.add(metric)
                self._context.log.warning(
                    "series left out of the page: their name or labels, made valid, are taken",
                    metric=metric,
                )

    def _may_scrape(self, now: Nanos) -> bool:
        """Whether a scrape fits this second."""
        if now >= self._window + SCRAPE_WINDOW:
            self._window, self._in_window = now, 0
        self._in_window += 1
        return self._in_window <= SCRAPES_MAX

    async def _send(self, visit: Visit) -> bool:
        """Send what the port takes; False if there is more, or nobody reads it."""
        while part := visit.part():
            if visit.waits:
                return False
            try:
                await PortSend(visit.port, visit.link, part)
            except AbiError as error:
                if error.status is Status.QUEUE_FULL:
                    visit.waits = True  # an empty message says when to go on
                else:
                    _ = self._visits.pop(visit.link, None)
                return False
            visit.on_sent(len(part))
        return True

    async def _make_room(self, port: Slot) -> None:
        """One more visitor is here: the next one finds a place too. Who holds the others and asks
        nothing, or nothing whole, gives way, the one that was silent for longest."""
        here = [visit for visit in self._visits.values() if visit.port == port]
        quiet = [visit for visit in here if visit.is_answered]
        if len(here) >= PORT_PEERS_MAX - 1 and quiet:
            await self._close(min(quiet, key=lambda each: each.heard))

    async def _close(self, visit: Visit) -> None:
        _ = self._visits.pop(visit.link, None)
        await _hang_up(visit.port, visit.link)

    # ------------------------------------------------------------------ the collector

    @property
    def _every(self) -> Nanos:
        return Nanos(self._settings.every_ms * 1_000_000)

    async def _export(self, now: Nanos) -> None:
        """Queue what is new since the last time, and every series as it stands."""
        until = deadline_after(now, EXPORT_TIME_MAX)
        clock = self._clock
        assert clock is not None, "start has made it"
        bodies: list[otlp.Body] = []
        try:
            spans = await self._readings.spans(until)
            bodies += otlp.traces(spans, self._origin, BODY_SIZE_MAX)
            rows = await self._readings.series(until)
            ahead = clock.wall() - clock.monotonic()
            bodies += otlp.metrics(rows, self._origin, ahead, BODY_SIZE_MAX)
        except NoReading:
            pass  # metricsd is away: its own restart is its own news, and what it told is sent
        now = await Now()
        for body in bodies:
            await self._act(self._collector.on_body(body, now), now)

    async def _act(self, effects: list[Effect], now: Nanos) -> None:
        """Do what the collector's machine says; what comes of it goes back to it."""
        port = self._collector_port
        was = self._collector.there
        while effects:
            assert port is not None, "without a collector nothing is queued"
            effect = effects.pop(0)
            match effect:
                case Dial():
                    effects += await self._dial(port, now)
                case Transmit():
                    await self._transmit(port)
                case HangUp():
                    await _hang_up(port, effect.link)
                case _:
                    assert_never(effect)
        if self._collector.there is not was:
            there = self._collector.there is CollectorState.THERE
            self._context.log.info(
                "collector is there" if there else "collector is away",
                why=self._collector.last_failure,
            )

    async def _dial(self, port: Slot, now: Nanos) -> list[Effect]:
        try:
            self._collector.on_dialled(await PortDial(port))
        except AbiError as error:
            return self._collector.on_no_dial(error.status.name, now)
        return []

    async def _transmit(self, port: Slot) -> None:
        """Send what the port takes; its room, or its end, are told."""
        link = self._collector.link
        while link is not None and (part := self._collector.part()):
            try:
                await PortSend(port, link, part)
            except AbiError:
                return
            self._collector.on_part_sent(len(part))

    # ------------------------------------------------------------------ the account

    def _stats(self) -> Stats:
        collector = self._collector
        there = CollectorState.NONE if self._collector_port is None else collector.there
        return Stats(
            scrapes=self._scrapes,
            scrapes_refused=self._scrapes_refused,
            collector=there,
            bodies_sent=collector.sent,
            bodies_queued=collector.count,
            bodies_dropped=collector.dropped,
            size_queued=collector.size,
            failed=collector.failed,
            last_failure=collector.last_failure,
        )


async def _hang_up(port: Slot, link: LinkId) -> None:
    try:
        await PortClose(port, link)
    except AbiError:
        return  # it is gone already

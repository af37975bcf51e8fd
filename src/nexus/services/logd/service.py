"""logd: the bounded journal of the system, read by id and only with the right to.

Owns the journal, the senders' accounts, the mappings of their rings, and the tail that it keeps in
statefsd. Trusts the kernel's word about a sender and nothing in a record or a ring; what could be
mistaken for the end of a record or a line is escaped when a record is read. Never refuses a good
record for want of room, never waits for anybody but policyd, and for that under the caller's
deadline: statefsd is posted to. Decides fairly: of each ring a bounded part, then the next, and
requests in between.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final, NoReturn, Protocol, assert_never

import msgspec

from nexus.abi import (
    AbiError,
    CapClose,
    CapKind,
    CapQuery,
    Clock,
    ClockMap,
    ConsoleWrite,
    LinkId,
    Nanos,
    Pid,
    QosClass,
    Sender,
    ServiceId,
    Slot,
    VmoWatch,
    service_id,
)
from nexus.ipc import Client, RetryBudget
from nexus.log.payload import packed
from nexus.protocols.logd import (
    FOLLOWERS_MAX,
    LOG_READ,
    PROTOCOL,
    RING_SIZE_MAX,
    THIS_BOOT,
    Append,
    Appended,
    Drain,
    Drained,
    Field,
    Follow,
    GetStats,
    LastRecords,
    Level,
    LogdRequest,
    LogdStatus,
    OpenStream,
    Query,
    Record,
    Records,
    Stats,
    StreamOpened,
)
from nexus.protocols.statefsd import PROTOCOL as STATEFSD
from nexus.runtime import Call, Deferred, Refusal
from nexus.runtime.program import Context, program_of
from nexus.runtime.wear import WearBudget
from nexus.services.logd.checks import claims_identity, is_over_limit
from nexus.services.logd.config import Settings
from nexus.services.logd.journal import Journal
from nexus.services.logd.reading import Wanted
from nexus.services.logd.senders import Row, Senders
from nexus.services.logd.store import LOOK_MAX, Look, TailStore
from nexus.services.logd.streams import Stream, Streams
from nexus.services.logd.tail import Ended, Tail
from nexus.telemetry.ring import NoRing, RingReader

EXECD_NAME: Final = "execd"  # who tells of crashes
JOURNAL_TARGET: Final = "journal"  # what log.read is asked for; there is one
STATEFSD_NAME: Final = "statefsd"
SCOPE: Final = "logd"  # of logd's own records
INSTANCE_BITS: Final = 40  # ids of one instance; a trillion records
TURN_EVERY: Final = 16  # requests between two turns for a ring, while somebody always asks
FOLLOW_MARGIN: Final = Nanos(20_000_000)  # ns before its deadline that a follower is answered
BOOTS_BACK_MAX: Final = 1 << 20  # boots before this one that can be told by their distance
TOLD_MAX: Final = 4  # earlier boots that logd says something of at its start
U32_MAX: Final = (1 << 32) - 1


class Gate(Protocol):
    """What logd needs of runtime.authority.Authority."""

    async def require(self, call: Call, right: str, target: str = "") -> None:
        """Raises the refusal of a caller that may not."""


@dataclass(slots=True, eq=False)
class Follower:
    """A request that waits for a record."""

    deferred: Deferred
    link: LinkId
    wanted: Wanted
    since: int
    count: int
    answer_at: Nanos


class Logd:
    """Serves nexus.protocols.logd.

    `me` is this instance, `boot` the number of this boot; `look` finds statefsd for the tail, and
    without it there is none.
    """

    def __init__(
        self,
        settings: Settings,
        authority: Gate,
        me: Sender | None = None,
        *,
        boot: int = 0,
        look: Look | None = None,
    ) -> None:
        self._authority = authority
        self._me = me or Sender(service_id(SCOPE), Pid(0), 1, QosClass.NORMAL)
        base = (self._me.generation - 1) << INSTANCE_BITS
        self._journal = Journal(settings.records, settings.size_bytes, base=base, boot=boot)
        self._senders = Senders(
            settings.core_ids, settings.core_rate, stream_rate=settings.stream_rate
        )
        self._streams = Streams(self._journal)
        self._streams.on_refused = self._on_stream_refused
        self._streams.on_taken = self._on_stream_taken
        self._followers: list[Follower] = []
        self._is_news = False  # a record came that a follower may wait for
        self._denied = 0
        self._served = 0
        self._clock: Clock | None = None
        self._told: set[LogdStatus] = set()  # refusals that the console knows of
        self._untold: dict[LogdStatus, ServiceId] = {}  # those that it is to hear of
        self._tail: Tail | None = None
        self._store: TailStore | None = None
        if look is not None and settings.tail_bytes:
            self._tail = Tail(
                boot=boot,
                instance=self._me.generation,
                size_max=settings.tail_bytes,
                every=Nanos(settings.tail_every * 1_000_000_000),
                budget=WearBudget(settings.tail_written_bytes, settings.tail_writes),
                trusted=settings.core_ids | {service_id(EXECD_NAME)},
            )
            self._tail.begin_after(base)
            self._store = TailStore(self._tail, look, self._on_told)

    # ------------------------------------------------------------------ hooks

    def facts(self) -> dict[str, int]:
        """The size of the ring, and what only grows; what is in it now is told by GetStats."""
        journal = self._journal
        return {
            "capacity_records": journal.records_max,
            "capacity_size": journal.size_max,
            "accepted_total": journal.total,
            "dropped_total": journal.dropped,
            "denied_total": self._denied,
            "streams": len(self._streams),
        }

    def busy(self) -> bool:
        """Whether a ring is to be drained, or somebody to be told."""
        return self._streams.busy or bool(self._untold) or self._is_news

    async def on_idle(self) -> None:
        """Nobody asks just now: one ring's turn, and who waits for news."""
        if self._untold:
            await self._tell_refusals()
        now = (await self._read_clock()).monotonic()
        self._turn(now)

    def next_time(self) -> Nanos | None:
        """When a ring is to be looked at, a follower answered, or the tail written."""
        due = self._streams.look_at
        for follower in self._followers:
            due = follower.answer_at if due is None else min(due, follower.answer_at)
        store = None if self._store is None else self._store.next_time()
        if store is not None:
            due = store if due is None else min(due, store)
        return due

    async def on_time(self, now: Nanos) -> None:
        """Look at the rings, answer who has waited long enough, drive the tail."""
        wall = self._wall(await self._read_clock(), now)
        self._streams.on_time(now)
        self._serve_followers(now)
        if self._store is not None:
            due = self._store.next_time()
            if due is not None and due <= now:
                await self._store.on_time(now, wall, self._journal.entries)

    def on_gone(self, link: LinkId) -> None:
        """The holder of a link is gone: its ring is read to its end."""
        if self._clock is not None:
            now = self._clock.monotonic()
            self._streams.end(link, now, self._wall(self._clock, now))
        self._followers = [each for each in self._followers if each.link != link]

    async def on_stop(self) -> None:
        """What the rings have comes into the journal, and the journal's end into the tail."""
        clock = await self._read_clock()
        now = clock.monotonic()
        wall = self._wall(clock, now)
        self._streams.drain_all(now, wall)
        if self._store is not None:
            await self._store.end(now, wall, self._journal.entries)

    def on_settings(self, settings: Mapping[str, Any]) -> None:
        """New bounds and rates, in force at once; the tail's are those of the start.

        Raises msgspec.ValidationError, and then nothing has changed.
        """
        new = msgspec.convert(settings, type=Settings)
        self._journal.resize(new.records, new.size_bytes)
        self._senders.set_rates(new.core_ids, new.core_rate, new.stream_rate)

    # ------------------------------------------------------------------ requests

    async def handle(
        self, call: Call, request: LogdRequest
    ) -> Appended | Records | Stats | Drained | StreamOpened | Deferred:
        """The reply; a refused record is accounted for before its sender hears of it."""
        clock = self._clock or await self._read_clock()
        self._served += 1
        if self._served % TURN_EVERY == 0:
            self._turn(call.now)
        match request:
            case Drain():
                return self._drain(call, clock)
            case Append():
                return await self._append(call, request, clock)
            case OpenStream():
                return await self._open_stream(call, request, clock)
            case Query():
                return await self._query(call, request)
            case Follow():
                return await self._follow(call, request)
            case LastRecords():
                return await self._last_records(call, request, clock)
            case GetStats():
                return self._stats(self._wall(clock, call.now))
            case _:
                assert_never(request)

    async def _append(self, call: Call, request: Append, clock: Clock) -> Appended:
        row = self._senders.heard(call.sender.service)
        refusal = self._refusal_of(call, request, row)
        if refusal is not None:
            await self._refuse(call, row, refusal)
        row.on_accepted()
        parent = call.parent
        payload = packed(request, 0, parent.trace, parent.span)
        wall = self._wall(clock, call.now)
        record = self._journal.append(call.sender, [payload], row, call.now, wall)
        self._on_taken(call.sender.service, [payload], call.now)
        return Appended(record, self._journal.dropped)

    def _refusal_of(self, call: Call, request: Append, row: Row) -> LogdStatus | None:
        """Why this is no record of the journal, in the order of the protocol."""
        if self._claims_identity(call, request):
            return LogdStatus.INVALID_ARGS
        if self._is_over_limit(request):
            return LogdStatus.OVER_LIMIT
        if row.is_over_rate(call.now):
            return LogdStatus.RATE_LIMITED
        return None

    async def _refuse(self, call: Call, row: Row, refusal: LogdStatus) -> NoReturn:
        """Count and tell a refusal, and raise it."""
        row.on_refused(refusal)
        if refusal not in self._told:
            self._untold[refusal] = call.sender.service
            await self._tell_refusals()
        raise call.refuse(refusal)

    async def _query(self, call: Call, request: Query) -> Records:
        await self._require_read(call)
        journal = self._journal
        wanted = Wanted(request.wanted)
        boot = self._boot_of(request.boot)
        if boot != journal.boot:
            return self._earlier_boot(request, boot, wanted)
        if self._tail is not None and request.since <= journal.base:
            page = self._tail.page(boot, request.since, request.count, wanted)
            if page.records or page.next:
                return self._records(page.records, page.next or journal.base + 1)
        page = journal.page(request.since, request.count, wanted)
        return self._records(page.records, page.next)

    def _boot_of(self, asked: int) -> int:
        """The number of a boot that may be told from this one; below 0 for one that never was."""
        boot = self._journal.boot
        return boot - (THIS_BOOT - asked) if asked >= THIS_BOOT - BOOTS_BACK_MAX else asked

    def _earlier_boot(self, request: Query, boot: int, wanted: Wanted) -> Records:
        """What the tail has of another boot."""
        ends = None if self._tail is None else self._tail.ends_of(boot)
        if self._tail is None or ends is None:
            return Records(request.since, 0, 0, 0, [])
        oldest, latest = ends
        page = self._tail.page(boot, request.since, request.count, wanted)
        return Records(page.next or latest + 1, oldest, latest, 0, page.records)

    def _records(self, records: list[Record], following: int) -> Records:
        journal = self._journal
        return Records(following, journal.oldest, journal.last, journal.dropped, records)

    async def _follow(self, call: Call, request: Follow) -> Records | Deferred:
        await self._require_read(call)
        wanted = Wanted(request.wanted)
        page = self._journal.page(request.since, request.count, wanted)
        if page.records or call.deadline - FOLLOW_MARGIN <= call.now:
            return self._records(page.records, page.next)
        if len(self._followers) >= FOLLOWERS_MAX:
            raise call.refuse(LogdStatus.OVER_LIMIT)
        deferred = call.defer()
        answer_at = Nanos(call.deadline - FOLLOW_MARGIN)
        self._followers.append(
            Follower(deferred, call.link, wanted, page.next, request.count, answer_at)
        )
        self._is_news = self._is_news or page.next <= self._journal.last
        return deferred

    async def _last_records(self, call: Call, request: LastRecords, clock: Clock) -> Records:
        await self._require_read(call)
        key = (request.service, request.pid, request.generation)
        wall = self._wall(clock, call.now)
        found = self._streams.last_records(key, request.count, call.now, wall)
        return self._records(found, self._journal.last + 1)

    async def _require_read(self, call: Call) -> None:
        try:
            await self._authority.require(call, LOG_READ, JOURNAL_TARGET)
        except Refusal:
            self._denied += 1
            raise

    def _stats(self, wall: int) -> Stats:
        journal, tail = self._journal, self._tail
        totals = self._senders.totals()
        rows = self._senders.rows()
        return Stats(
            total=journal.total,
            dropped=journal.dropped,
            capacity_records=journal.records_max,
            capacity_size=journal.size_max,
            used_records=len(journal),
            used_size=journal.size,
            invalid_args=totals.invalid_args,
            over_limit=totals.over_limit,
            rate_limited=totals.rate_limited,
            unread=totals.unread,
            damaged=totals.damaged,
            denied=self._denied,
            streams=len(self._streams),
            tail_records=0 if tail is None else min(tail.records, U32_MAX),
            tail_size=0 if tail is None else min(tail.size, U32_MAX),
            tail_written_today=0 if tail is None else tail.budget.written_today(wall),
            tail_written_max=0 if tail is None else tail.budget.bytes_per_day,
            tail_refused=0 if tail is None else tail.budget.refused,
            tail_lost=0 if tail is None else tail.lost,
            senders=len(self._senders),
            rows=[row.told() for row in rows],
        )

    # ------------------------------------------------------------------ streams

    async def _open_stream(self, call: Call, request: OpenStream, clock: Clock) -> StreamOpened:
        row = self._senders.heard(call.sender.service)
        found = await self._watched(call.take_cap())
        if isinstance(found, LogdStatus):
            await self._refuse(call, row, found)
        try:
            reader = RingReader(found, request.taken, request.sequence)
        except NoRing:
            await self._refuse(call, row, LogdStatus.INVALID_ARGS)
        if not self._streams.has_room(call.sender, call.link):
            await self._refuse(call, row, LogdStatus.OVER_LIMIT)
        if self._opens_too_fast(row, call.now):
            await self._refuse(call, row, LogdStatus.RATE_LIMITED)
        self._streams.end(call.link, call.now, self._wall(clock, call.now))
        is_core = self._senders.is_core(call.sender.service)
        _ = self._streams.open(call.link, call.sender, found, reader, row, is_core=is_core)
        return StreamOpened(reader.taken)

    async def _watched(self, slot: Slot | None) -> memoryview | LogdStatus:
        """The memory that came along, mapped; or why it is no ring's. The slot is closed."""
        if slot is None:
            return LogdStatus.INVALID_ARGS
        try:
            info = await CapQuery(slot)
            if info.kind is not CapKind.VMO:
                return LogdStatus.INVALID_ARGS
            if self._is_ring_over_limit(info.length):
                return LogdStatus.OVER_LIMIT
            return await VmoWatch(slot)
        except AbiError:
            return LogdStatus.INVALID_ARGS
        finally:
            await CapClose(slot)

    def _drain(self, call: Call, clock: Clock) -> Drained:
        stream = self._streams.of(call.link)
        if stream is None:
            raise call.refuse(LogdStatus.INVALID_ARGS)
        return self._streams.on_bell(stream, call.now, self._wall(clock, call.now))

    def _turn(self, now: Nanos) -> None:
        """One ring's turn, and who waits for news."""
        if self._clock is not None and self._streams.busy:
            self._streams.step(now, self._wall(self._clock, now))
        if self._is_news:
            self._serve_followers(now)

    def _on_stream_refused(self, status: LogdStatus, stream: Stream) -> None:
        if status not in self._told:
            self._untold[status] = stream.sender.service

    def _on_stream_taken(self, stream: Stream, payloads: list[bytes], now: Nanos) -> None:
        self._on_taken(stream.sender.service, payloads, now)

    def _on_taken(self, service: ServiceId, payloads: Iterable[bytes], now: Nanos) -> None:
        """Records are in the journal."""
        if self._followers:
            self._is_news = True
        if self._tail is not None:
            self._tail.on_records(service, payloads, now)

    # ------------------------------------------------------------------ followers

    def _serve_followers(self, now: Nanos) -> None:
        """Answer those that have what they wait for, and those whose time has come."""
        self._is_news = False
        for follower in list(self._followers):
            page = self._journal.page(follower.since, follower.count, follower.wanted)
            follower.since = page.next
            if page.records or follower.answer_at <= now:
                self._followers.remove(follower)
                follower.deferred.reply(self._records(page.records, page.next))
            elif page.next <= self._journal.last:
                self._is_news = True  # more than one look takes

    # ------------------------------------------------------------------ for people

    def _on_told(self, told: list[Ended]) -> None:
        """The device has said what is left of earlier boots: a record of our own about each."""
        assert self._clock is not None, "it was read by the clock"
        for ended in told[-TOLD_MAX:]:
            fields = {
                "boot": ended.boot,
                "records": ended.records,
                "lost": ended.lost,
                "left_out": ended.left_out,
                "end": "in order" if ended.in_order else "cut off",
            }
            self._write_own(Level.INFO, "earlier records", fields)

    def _write_own(self, level: Level, text: str, fields: Mapping[str, object]) -> None:
        assert self._clock is not None
        now = self._clock.monotonic()
        shown = [Field(key, str(value)) for key, value in fields.items()]
        payload = packed(Append(level, SCOPE, text, shown), now)
        row = self._senders.heard(self._me.service)
        row.accepted += 1
        wall = self._wall(self._clock, now)
        _ = self._journal.append(self._me, [payload], row, now, wall)
        self._on_taken(self._me.service, [payload], now)

    async def _tell_refusals(self) -> None:
        """Say on the console, once per reason, that a record was refused; a full one, next time."""
        for status, service in list(self._untold.items()):
            del self._untold[status]
            if status in self._told:
                continue
            reason = status.name.lower()
            evidence = {
                "sender": f"0x{service:016x}",
                "reason": reason,
                "count": self._count_of(status),
            }
            try:
                await ConsoleWrite(f"logd: reject {reason}", json.dumps(evidence).encode())
            except AbiError:
                return
            self._told.add(status)

    def _count_of(self, status: LogdStatus) -> int:
        """How often a record was refused for this reason, by anybody."""
        totals = self._senders.totals()
        match status:
            case LogdStatus.INVALID_ARGS:
                return totals.invalid_args
            case LogdStatus.OVER_LIMIT:
                return totals.over_limit
            case LogdStatus.RATE_LIMITED:
                return totals.rate_limited

    async def _read_clock(self) -> Clock:
        if self._clock is None:
            self._clock = await ClockMap()
        return self._clock

    def _wall(self, clock: Clock, now: Nanos) -> int:
        """The wall's clock at `now`, which was read a moment ago."""
        return max(0, clock.wall() - clock.monotonic() + now)

    # What follows decides by what a ladder row breaks; each is small for that.

    def _claims_identity(self, call: Call, request: Append) -> bool:
        """Whether the payload says who sends it."""
        return claims_identity(request, is_core=self._senders.is_core(call.sender.service))

    def _is_over_limit(self, request: Append) -> bool:
        """Whether it is larger than a record may be."""
        return is_over_limit(request)

    def _is_ring_over_limit(self, size: int) -> bool:
        """Whether memory is larger than a ring may be."""
        return size > RING_SIZE_MAX

    def _opens_too_fast(self, row: Row, now: Nanos) -> bool:
        """Whether the sender's records of this window are used up; a stream counts as one. What is
        in an earlier ring of the link is read at once, so it must not be more than a turn of it."""
        return row.is_over_rate(now) or not row.stream_room(now)


def made(context: Context) -> Logd:
    """logd as the system file wants it."""
    boot = context.boot

    async def look(until: Nanos) -> Client | None:
        budget = RetryBudget(attempts_max=1, backoff=LOOK_MAX, deadline=until)
        found = await context.peers.connect(STATEFSD_NAME, STATEFSD, budget)
        return found if isinstance(found, Client) else None

    return Logd(
        context.settings_as(Settings),
        context.authority,
        Sender(boot.service, boot.pid, boot.generation, QosClass.NORMAL),
        boot=context.config.boot,
        look=look if STATEFSD_NAME in context.config.uses else None,
    )


main: Final = program_of(made, PROTOCOL)

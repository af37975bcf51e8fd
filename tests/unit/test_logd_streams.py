"""Streams of logd: opening one, what becomes of each record, followers, last words."""

from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from nexus.abi import (
    INIT_NAME,
    CapClone,
    CapClose,
    LinkCreate,
    Nanos,
    Now,
    Pid,
    QosClass,
    Sender,
    ServiceId,
    SleepUntil,
    Slot,
    VmoCreate,
    VmoSeal,
    VmoShare,
    service_id,
)
from nexus.abi.types import LinkId
from nexus.ipc import Exchange, Refused
from nexus.ipc.exchange import Answer
from nexus.log.payload import packed
from nexus.protocols.logd import (
    EVERY_RECORD,
    FIELDS_SIZE_MAX,
    FOLLOWERS_MAX,
    PAGE_MAX,
    PROTOCOL,
    RATE_MAX,
    RING_SIZE_MAX,
    STREAMS_OF_ONE_MAX,
    TEXT_SIZE_MAX,
    THIS_BOOT,
    Append,
    Drain,
    Drained,
    Field,
    Follow,
    GetStats,
    LastRecords,
    Level,
    LogdStatus,
    OpenStream,
    Query,
    Records,
    SenderRow,
    Stats,
    StreamOpened,
)
from nexus.services.logd.config import Settings
from nexus.services.logd.journal import Journal
from nexus.services.logd.senders import Row
from nexus.services.logd.service import FOLLOW_MARGIN, Logd
from nexus.services.logd.streams import DRAIN_COUNT, LOOK_PAUSE, Streams
from nexus.telemetry.ring import (
    COMMIT_WORD,
    MARK_WORD,
    RECORD,
    RECORD_SIZE,
    RESERVE_WORD,
    RING_HEADER_SIZE,
    SEQUENCE_MAX,
    RingReader,
    RingWriter,
    checksum,
)
from nexus.wire import ReplyStatus
from tests.fakes.gate import ListGate
from tests.fakes.pair import FAR, Pair

SECOND = 1_000_000_000
READER = service_id(INIT_NAME)
RING = 16 * 1024


def line(text: str = "text", *fields: Field, level: Level = Level.INFO) -> bytes:
    return packed(Append(level, "pump", text, list(fields)))


def pair(**settings: Any) -> Pair:
    return Pair(Logd(Settings(**settings), ListGate(READER)), PROTOCOL)


async def shared(size: int = RING) -> tuple[Slot, memoryview]:
    slot = await VmoCreate(size)
    return slot, await VmoShare(slot)


async def opened(link: Exchange, slot: Slot | None, taken: int = 0, sequence: int = 0) -> Any:
    outcome = await link.ask(OpenStream(taken, sequence), FAR, move=slot)
    return outcome.reply if isinstance(outcome, Answer) else outcome


async def stream(link: Exchange, size: int = RING) -> RingWriter:
    slot, view = await shared(size)
    ring = RingWriter(view)
    assert await opened(link, slot) == StreamOpened(0)
    return ring


async def rung(link: Exchange) -> Drained:
    drained = await link.call(Drain(), FAR)
    assert isinstance(drained, Drained), drained
    return drained


async def every(link: Exchange) -> list[str]:
    """The texts of everything that is kept."""
    found: list[str] = []
    since = 1
    while True:
        page = await link.call(Query(THIS_BOOT, since, PAGE_MAX, EVERY_RECORD), FAR)
        assert isinstance(page, Records), page
        found += [record.text for record in page.records]
        if page.next > page.total:
            return found
        since = page.next


async def stats(link: Exchange) -> Stats:
    found = await link.call(GetStats(), FAR)
    assert isinstance(found, Stats)
    return found


def row(found: Stats, name: str = INIT_NAME) -> SenderRow:
    (one,) = [each for each in found.rows if each.service == service_id(name)]
    return one


async def wait(span: int) -> None:
    _ = await SleepUntil(Nanos(await Now() + span))


Body = Callable[[Exchange], Awaitable[Any]]


def done(body: Body, **settings: Any) -> Any:
    """The result of a reader's body against a fresh logd."""
    return pair(**settings).client(body, name=INIT_NAME)


# ------------------------------------------------------------------ opening


@pytest.mark.covers("logd.INVALID_ARGS", "logd.OVER_LIMIT")
def test_opening_refuses_what_is_no_ring_and_leaves_no_capability_behind() -> None:
    system = pair()

    async def body(link: Exchange) -> Any:
        slots = len(system.serving.table)
        outcomes = [await opened(link, None)]
        sealed = await VmoCreate(RING)
        await VmoSeal(sealed)
        outcomes.append(await opened(link, sealed))
        outcomes.append(await opened(link, (await shared())[0]))  # zeros are no ring
        way = await LinkCreate(await system.peers[INIT_NAME].inbox())
        outcomes.append(await opened(link, way.slot))
        large, view = await shared(RING_SIZE_MAX + 4096)
        _ = RingWriter(view)
        outcomes.append(await opened(link, large))
        assert len(system.serving.table) == slots
        return outcomes, row(await stats(link))

    outcomes, counted = system.client(body, name=INIT_NAME)

    assert outcomes == [Refused(LogdStatus.INVALID_ARGS)] * 4 + [Refused(LogdStatus.OVER_LIMIT)]
    assert (counted.invalid_args, counted.over_limit) == (4, 1)
    told = [text for _, text, _ in system.kernel.console]
    assert told == ["logd: reject invalid_args", "logd: reject over_limit"], "once per reason"


@pytest.mark.covers("logd.RATE_LIMITED")
def test_opening_a_stream_uses_up_the_senders_rate_as_a_record_does() -> None:
    async def body(link: Exchange) -> Any:
        slot, view = await shared()
        _ = RingWriter(view)
        outcomes = [await opened(link, await CapClone(slot)) for _ in range(RATE_MAX + 1)]
        append = await link.call(Append(Level.INFO, "s", "t", []), FAR)
        await wait(SECOND)
        return outcomes, append, await opened(link, slot), row(await stats(link))

    outcomes, append, later, counted = done(body)

    assert outcomes == [StreamOpened(0)] * RATE_MAX + [Refused(LogdStatus.RATE_LIMITED)]
    assert append == Refused(LogdStatus.RATE_LIMITED)
    assert later == StreamOpened(0)
    assert (counted.rate_limited, counted.accepted) == (2, 0)


def test_a_sender_has_so_many_streams_and_a_closed_link_frees_one() -> None:
    system = pair()

    async def body(link: Exchange) -> Any:
        peers = system.peers[INIT_NAME]
        outcomes = []
        links = []
        for _ in range(STREAMS_OF_ONE_MAX + 1):
            holder = next(each for each in system.kernel.tasks if each.name == INIT_NAME)
            slot = system.kernel.link(system.kernel.endpoint_of(system.serving), holder)
            other = await system.bind(
                peers, slot, system.serving, link.peer.terms, link.peer.reply_terms
            )
            memory, view = await shared()
            _ = RingWriter(view)
            links.append(other)
            outcomes.append(await opened(other, memory))
        await peers.discard(links[0].peer)
        await wait(LOOK_PAUSE)
        memory, view = await shared()
        _ = RingWriter(view)
        outcomes.append(await opened(links[-1], memory))
        return outcomes, (await stats(link)).streams

    outcomes, count = system.client(body, name=INIT_NAME)

    good = [StreamOpened(0)] * STREAMS_OF_ONE_MAX
    assert outcomes == [*good, Refused(LogdStatus.OVER_LIMIT), StreamOpened(0)]
    assert count == STREAMS_OF_ONE_MAX


@pytest.mark.covers("logd.INVALID_ARGS")
def test_a_doorbell_without_a_stream_is_refused() -> None:
    async def body(link: Exchange) -> Any:
        return await link.call(Drain(), FAR)

    assert done(body) == Refused(LogdStatus.INVALID_ARGS)


# ------------------------------------------------------------------ draining


def test_every_record_of_a_ring_ends_in_one_account() -> None:
    """Good ones, claims, too large ones, no records at all, and a lap of the ring."""

    async def body(link: Exchange) -> Any:
        ring = await stream(link)
        bad = [
            line("claim", Field("sender_service_id", "1")),
            line("key", Field("two words", "1")),
            line("x" * (TEXT_SIZE_MAX + 1)),
            line("fields", Field("fill", "x" * FIELDS_SIZE_MAX)),
            b"junk",
            line() + b"\0",
        ]
        for payload in bad:
            ring.put(payload)
        ring.put(line("good"))
        first = await rung(link)
        for number in range(1000):
            ring.put(line(f"{number}"))
        last = first
        while last.sequence < ring.sequence:
            last = await rung(link)
            await wait(LOOK_PAUSE)
        return first, last, ring.sequence, await stats(link), await every(link)

    first, last, sequence, found, texts = done(body)

    assert (first.accepted, first.refused, first.overwritten, first.sequence) == (1, 6, 0, 7)
    assert last.accepted + last.refused + last.overwritten == last.sequence == sequence == 1007
    assert last.overwritten > 0
    one = row(found)
    assert (one.invalid_args, one.over_limit, one.damaged) == (2, 2, 2)
    assert (one.accepted, one.unread) == (last.accepted, last.overwritten)
    assert texts[-1] == "999"
    assert len(texts) == last.accepted


def test_records_without_a_doorbell_are_found_while_others_come() -> None:
    async def body(link: Exchange) -> Any:
        ring = await stream(link)
        ring.put(line("first"))
        _ = await link.call(Drain(), FAR)
        ring.put(line("second"))
        await wait(2 * LOOK_PAUSE)
        return await every(link)

    assert done(body) == ["first", "second"]


def test_what_exceeds_the_rate_waits_and_nothing_newer_is_lost_for_it() -> None:
    async def body(link: Exchange) -> Any:
        ring = await stream(link)
        for number in range(25):
            ring.put(line(f"{number}"))
        at_once = await link.call(Drain(), FAR)
        await wait(SECOND // 2)
        later = await link.call(Drain(), FAR)
        await wait(2 * SECOND)
        return at_once, later, await link.call(Drain(), FAR)

    at_once, later, last = done(body, stream_rate=10)

    assert (at_once.accepted, later.accepted, last.accepted) == (10, 10, 25)
    assert (last.refused, last.overwritten) == (0, 0)


def test_a_ring_may_be_drained_on_by_another_logd() -> None:
    first, second = pair(), pair()
    memory: list[memoryview] = []

    async def begin(link: Exchange) -> Any:
        slot, view = await shared()
        memory.append(view)
        ring = RingWriter(view)
        _ = await opened(link, slot)
        for number in range(5):
            ring.put(line(f"{number}"))
        return await link.call(Drain(), FAR)

    async def go_on(link: Exchange) -> Any:
        slot, view = await shared()
        view[:] = memory[0]
        outcome = await opened(link, slot, before.taken, before.sequence)
        return outcome, await link.call(Drain(), FAR), await every(link)

    before = first.client(begin, name=INIT_NAME)
    outcome, drained, texts = second.client(go_on, name=INIT_NAME)

    assert before == Drained(before.taken, 5, 5, 0, 0)
    assert outcome == StreamOpened(before.taken)
    assert (drained.sequence, drained.accepted, texts) == (5, 0, [])


# ------------------------------------------------------------------ the machine itself


class Rings:
    """Streams over plain memory, with no kernel at all."""

    def __init__(self, count: int, rate: int = 1 << 20) -> None:
        self.journal = Journal(1 << 16, 1 << 24)
        self.streams = Streams(self.journal)
        self.rows = [Row(ServiceId(number), 24, rate) for number in range(count)]
        self.memory = [bytearray(RING) for _ in range(count)]
        self.writers = [RingWriter(memoryview(each)) for each in self.memory]
        self.now = 1_000
        for number in range(count):
            view = memoryview(self.memory[number]).toreadonly()
            _ = self.streams.open(
                LinkId(number),
                Sender(ServiceId(number), Pid(number), 1, QosClass.NORMAL),
                view,
                RingReader(view),
                self.rows[number],
                is_core=number == 0,
            )

    def step(self) -> None:
        self.streams.step(Nanos(self.now), 0)


def test_each_ring_has_its_turn_and_core_senders_come_first() -> None:
    rings = Rings(4)
    for number in (1, 2, 3, 0):
        for _ in range(10 if number == 0 else 150):
            rings.writers[number].put(line(f"{number}"))

    taken = []
    for _ in range(7):
        before = [row.accepted for row in rings.rows]
        rings.step()
        grown = [row.accepted - was for row, was in zip(rings.rows, before, strict=True)]
        taken.append(next(number for number, count in enumerate(grown) if count))
        assert max(grown) <= DRAIN_COUNT

    assert taken == [0, 1, 2, 3, 1, 2, 3]


def test_a_core_sender_that_comes_later_is_drained_before_those_that_wait() -> None:
    rings = Rings(4)
    for number in (1, 2, 3):
        for _ in range(150):
            rings.writers[number].put(line())
    for _ in range(4):
        rings.step()  # the core sender's, which is empty, and one turn of each other
    for _ in range(3 * DRAIN_COUNT):
        rings.writers[0].put(line())
    core = rings.streams.of(LinkId(0))
    assert core is not None
    _ = rings.streams.on_bell(core, Nanos(rings.now), 0)

    for _ in range(2):
        rings.step()

    assert rings.rows[0].accepted == 3 * DRAIN_COUNT, "what its doorbell left was next, all of it"
    assert [row.accepted for row in rings.rows[1:]] == [DRAIN_COUNT] * 3


def test_what_a_dead_writer_put_last_and_nobody_could_read_is_damaged() -> None:
    rings = Rings(2)
    for text in ("first", "second", "ruined"):
        rings.writers[1].put(line(text))
    at = rings.memory[1].index(b"ruined")
    rings.memory[1][at : at + 6] = b"RUINED"

    rings.streams.end(LinkId(1), Nanos(rings.now), 0)

    row = rings.rows[1]
    assert (row.accepted, row.damaged, row.unread) == (2, 1, 0), "no record after it shows the gap"


@given(st.data())
def test_whatever_a_hostile_writer_leaves_in_its_ring_only_its_own_records_suffer(
    data: st.DataObject,
) -> None:
    rings = Rings(2)
    for number in range(20):
        rings.writers[0].put(line(f"hostile {number}"))
        rings.writers[1].put(line(f"good {number}"))
    for _ in range(data.draw(st.integers(1, 12))):
        at = data.draw(st.integers(0, RING - 8))
        rings.memory[0][at : at + 8] = data.draw(st.binary(min_size=8, max_size=8))

    for _ in range(200):
        rings.now += LOOK_PAUSE
        rings.streams.on_time(Nanos(rings.now))
        rings.step()
    rings.streams.end(LinkId(0), Nanos(rings.now), 0)
    rings.streams.end(LinkId(1), Nanos(rings.now), 0)

    good, bad = rings.rows[1], rings.rows[0]
    assert (good.accepted, good.unread, good.damaged) == (20, 0, 0)
    assert bad.accepted <= 20
    assert len(rings.streams) == 0
    assert not rings.streams.busy


# ------------------------------------------------------------------ followers


def follow(since: int = 1, **wanted: Any) -> Follow:
    return Follow(since, PAGE_MAX, replace(EVERY_RECORD, **wanted))


def test_a_follower_is_answered_when_its_record_comes() -> None:
    system = pair()

    async def body(link: Exchange) -> Any:
        ring = await stream(link)
        started = await link.start(follow(level=Level.ERROR), FAR)
        ring.put(line("not wanted"))
        _ = await link.call(Drain(), FAR)
        await wait(SECOND)
        began = await Now()
        ring.put(line("wanted", level=Level.ERROR))
        _ = await link.call(Drain(), FAR)
        page = await link.finish(started)
        return page, await Now() - began

    page, took = system.client(body, name=INIT_NAME)

    assert isinstance(page, Records)
    assert [record.text for record in page.records] == ["wanted"]
    assert page.next == 3
    assert took < LOOK_PAUSE


def test_a_follower_of_nothing_has_an_empty_page_before_its_deadline() -> None:
    async def body(link: Exchange) -> Any:
        deadline = Nanos(await Now() + SECOND)
        page = await link.call(follow(), deadline)
        return page, deadline - await Now()

    page, left = done(body)

    assert isinstance(page, Records)
    assert page.records == []
    assert 0 < left <= FOLLOW_MARGIN


@pytest.mark.covers("logd.OVER_LIMIT")
def test_followers_are_bounded_and_those_that_are_gone_leave() -> None:
    system = pair()

    async def many(link: Exchange) -> Any:
        started = [await link.start(follow(), FAR) for _ in range(FOLLOWERS_MAX)]
        refused = await link.call(follow(), FAR)
        return len(started), refused

    async def again(link: Exchange) -> Any:
        return await link.call(follow(), Nanos(await Now() + SECOND))

    count, refused = system.client(many, name=INIT_NAME)
    later = system.client(again, name=INIT_NAME)

    assert (count, refused) == (FOLLOWERS_MAX, Refused(LogdStatus.OVER_LIMIT))
    assert isinstance(later, Records)


@pytest.mark.covers("wire.DENIED")
@pytest.mark.parametrize(
    "request_", [follow(), LastRecords(1, 1, 1, 1), Query(0, 1, 1, EVERY_RECORD)]
)
def test_nobody_reads_without_the_right(request_: Any) -> None:
    async def body(link: Exchange) -> Any:
        return await link.call(request_, FAR)

    assert pair().client(body, name="nobody") == Refused(ReplyStatus.DENIED)


# ------------------------------------------------------------------ last words


def test_the_last_words_of_a_task_are_read_from_its_ring_whatever_its_rate() -> None:
    system = pair(stream_rate=3)

    async def dies(link: Exchange) -> Any:
        ring = await stream(link)
        for number in range(40):
            ring.put(line(f"{number}"))
        return None

    async def reads(link: Exchange) -> Any:
        wanted = LastRecords(service_id("dying"), dying.sender.pid, 1, 5)
        return await link.call(wanted, FAR), await stats(link)

    dying = system.add_client(dies, name="dying")
    _ = system.kernel.run(dying)
    found, counted = system.client(reads, name=INIT_NAME)

    assert isinstance(found, Records)
    assert [record.text for record in found.records] == ["35", "36", "37", "38", "39"]
    assert counted.streams == 0, "what is gone leaves the table"
    assert row(counted, "dying").accepted == 40


def test_last_words_stay_though_the_journal_has_pushed_them_out() -> None:
    system = pair(records=20)

    async def dies(link: Exchange) -> Any:
        ring = await stream(link)
        ring.put(line("the last"))

    async def floods(link: Exchange) -> Any:
        ring = await stream(link)
        for _ in range(100):
            ring.put(line("flood"))
        while (await rung(link)).sequence < 100:
            await wait(LOOK_PAUSE)
        wanted = LastRecords(service_id("dying"), dying.sender.pid, 1, 5)
        return await link.call(wanted, FAR)

    dying = system.add_client(dies, name="dying")
    _ = system.kernel.run(dying)
    for name in ("one", "two"):
        _ = system.client(floods, name=name)
    found = system.client(floods, name=INIT_NAME)

    assert [record.text for record in found.records] == ["the last"]


def test_the_memory_of_a_ring_is_given_back_when_its_link_is_gone() -> None:
    system = pair()
    service: Any = system.service

    async def body(link: Exchange) -> Any:
        slot, view = await shared()
        _ = RingWriter(view)
        _ = await opened(link, slot)
        held = [each.view for each in service._streams._streams.values()]
        await CapClose(link.peer.slot)
        await wait(LOOK_PAUSE)
        return held

    (view,) = system.client(body, name=INIT_NAME)

    with pytest.raises(ValueError, match="released"):
        _ = view[0]


def forge(view: memoryview, number: int, *, lap: int = 0) -> None:
    """A ring whose only record says that it is this one, `lap` rounds after the beginning."""
    ring = RingWriter(view)
    capacity = payload_area(view)
    position = lap * capacity
    payload = line("forged")
    RECORD.pack_into(view, RING_HEADER_SIZE, number, len(payload), checksum(payload, number))
    begin = RING_HEADER_SIZE + RECORD_SIZE
    view[begin : begin + len(payload)] = payload
    words = view[:RING_HEADER_SIZE].cast("Q")
    words[MARK_WORD] = position
    words[RESERVE_WORD] = words[COMMIT_WORD] = position + (RECORD_SIZE + len(payload) + 7 & ~7)
    assert ring.sequence == 0


def payload_area(view: memoryview) -> int:
    """The bytes in which the records of a ring lie."""
    return (len(view) - RING_HEADER_SIZE) // 64 * 64


def test_a_ring_that_was_opened_at_the_last_number_there_is_ends_nobody() -> None:
    async def body(link: Exchange) -> Any:
        slot, view = await shared()
        forge(view, (1 << 64) - 1)
        _ = await opened(link, slot, 0, (1 << 64) - 1)
        return [await rung(link), await stats(link)]

    drained, _ = done(body)

    assert (drained.accepted, drained.sequence) == (0, SEQUENCE_MAX)


def test_rings_that_claim_to_have_lost_more_than_a_number_says_end_nobody() -> None:
    async def body(link: Exchange) -> Any:
        for _ in range(6):
            slot, view = await shared()
            forge(view, SEQUENCE_MAX - 1, lap=10)
            assert await opened(link, slot) == StreamOpened(0)
            assert (await rung(link)).overwritten == SEQUENCE_MAX - 1
        return await stats(link)

    found = done(body)

    assert row(found).unread == found.unread == (1 << 64) - 1, "it stays there"


def test_a_writer_that_goes_on_writing_is_drained_no_further_than_its_ring_is_large() -> None:
    view = memoryview(bytearray(RING))
    ring = RingWriter(view)
    streams = Streams(Journal(1024, 1 << 20))
    sender = Sender(ServiceId(5), Pid(1), 1, QosClass.NORMAL)
    account = Row(sender.service, RATE_MAX, 1 << 20)
    stream = streams.open(LinkId(3), sender, view, RingReader(view), account, is_core=False)

    def writes_on(*_taken: object) -> None:
        for _each in range(DRAIN_COUNT):
            ring.put(line())

    streams.on_taken = writes_on
    writes_on()

    streams.drain_to_end(stream, Nanos(1), 1)

    assert 0 < stream.accepted <= RING // RECORD_SIZE
    assert stream.reader.pending


def test_opening_a_ring_again_and_again_is_no_way_around_the_rate() -> None:
    async def body(link: Exchange) -> Any:
        outcomes = []
        for _ in range(4):
            slot, view = await shared()
            ring = RingWriter(view)
            for _ in range(40):
                ring.put(line())
            outcomes.append(await opened(link, slot))
        await wait(SECOND)
        slot, view = await shared()
        _ = RingWriter(view)
        outcomes.append(await opened(link, slot))
        return [outcomes, row(await stats(link)).rate_limited]

    outcomes, refused = done(body, stream_rate=50)

    good = [isinstance(each, StreamOpened) for each in outcomes]
    assert good[0]
    assert not good[3]
    assert good[4], "in the next window"
    assert refused == good[:4].count(False)
    assert all(
        each.status is LogdStatus.RATE_LIMITED for each in outcomes if isinstance(each, Refused)
    )

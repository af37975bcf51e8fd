"""The log of a task: what a line may be, and that none is lost without being counted."""

from collections.abc import Awaitable, Callable
from enum import IntEnum
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nexus.abi import Nanos, Now, SleepUntil, service_id
from nexus.ipc import OUTSTANDING_MAX, Peers
from nexus.log import (
    DISCOVERY_WAIT,
    QUEUE_MAX,
    RING_SIZE_DEFAULT,
    LogCounts,
    Logger,
    make_line,
)
from nexus.log.logger import (
    BELL_PAUSE,
    BELL_PAUSE_MAX,
    DENIED_PAUSE,
    LOOK_PAUSE,
    LOOK_PAUSE_MAX,
    SURE_SIZE,
)
from nexus.log.payload import SHORT, UNREADABLE, sendable, unpack
from nexus.protocols.init import REPLY_NAME
from nexus.protocols.logd import (
    EVERY_RECORD,
    FIELDS_MAX,
    FIELDS_SIZE_MAX,
    KEY_WIRE_MAX,
    PAGE_MAX,
    PROTOCOL,
    RATE_MAX,
    RATE_WINDOW_NS,
    SCOPE_SIZE_MAX,
    TEXT_SIZE_MAX,
    Append,
    Field,
    Level,
    Record,
)
from nexus.services.logd.checks import KEY, claims_identity, is_over_limit
from nexus.services.logd.config import Settings
from nexus.services.logd.reading import Wanted
from nexus.services.logd.service import Logd
from nexus.wire import Protocol, encode
from tests.fakes.gate import ListGate
from tests.fakes.pair import FAR
from tests.fakes.route import System
from tests.fakes.tinykernel import TinyKernel

MS = 1_000_000
SECOND = 1_000 * MS

VALUES = st.one_of(
    st.text(st.characters(exclude_categories=()), max_size=700),
    st.integers(),
    st.floats(),
    st.booleans(),
    st.none(),
)


# ------------------------------------------------------------------ one line


@given(
    st.text(st.characters(exclude_categories=()), max_size=400),
    st.text(st.characters(exclude_categories=()), max_size=100),
    st.dictionaries(st.text(max_size=80), VALUES, max_size=20),
)
def test_whatever_is_written_a_line_is_within_the_bounds_of_a_record(
    text: str, scope: str, fields: dict[str, Any]
) -> None:
    request, is_cut = make_line(Level.INFO, scope, text, fields)

    assert not is_over_limit(request)
    assert len(request.fields) <= FIELDS_MAX
    assert all(KEY.match(field.key) and len(field.key) <= KEY_WIRE_MAX for field in request.fields)
    codec = PROTOCOL.codecs[Append]
    assert codec.decode_request(encode(request)) == request
    if not is_cut:
        assert request.text == text.encode("utf-8", "backslashreplace").decode()
        assert len(request.fields) == len(fields)


def test_what_is_cut_is_marked_and_says_so() -> None:
    request, is_cut = make_line(
        Level.INFO,
        "s" * (SCOPE_SIZE_MAX + 1),
        "ü" * TEXT_SIZE_MAX,
        {"a": "x" * 300, "b": "y" * 300, "c": 1},
    )

    assert is_cut
    assert request.scope == "s" * (SCOPE_SIZE_MAX - 3) + "…"
    assert request.text == "ü" * ((TEXT_SIZE_MAX - 3) // 2) + "…"
    assert request.fields[0] == Field("a", "x" * 300)
    assert request.fields[1].value.endswith("y…")
    assert request.fields[-1] == Field("log.cut", "2")
    assert not is_over_limit(request)


def test_a_line_that_fits_is_sent_as_it_is_sorted_by_key() -> None:
    class Colour(IntEnum):
        RED = 3

    fields = {"z": None, "a": True, "m": 1.5, "big": 10**30, "colour": Colour.RED, "t": "a\nb"}
    request, _ = make_line(Level.WARN, "scope", "text", fields)

    assert [(field.key, field.value) for field in request.fields[:2]] == [
        ("a", "True"),
        ("big", f"{10**30 >> 36:#x}…"),
    ]
    assert [field.key for field in request.fields] == [
        "a",
        "big",
        "colour",
        "m",
        "t",
        "z",
        "log.cut",
    ]
    exact, is_cut = make_line(Level.WARN, "scope", "text", {"fill": "x" * (FIELDS_SIZE_MAX - 6)})
    assert not is_cut
    assert len(exact.fields) == 1


def test_a_key_nobody_may_spell_is_respelt_and_a_claim_is_left_to_logd() -> None:
    request, _ = make_line(Level.INFO, "s", "t", {"Peer Name": "x", "": "y"})

    assert {field.key for field in request.fields} == {"peer_name", "_"}
    claim = make_line(Level.INFO, "s", "t", {"sender_service_id": "0x1"}).request
    assert claims_identity(claim, is_core=False)


# ------------------------------------------------------------------ a system with logd


class LogSystem(System):
    """init, logd, and clients that log."""

    def __init__(self, *names: str, settings: Settings | None = None) -> None:
        self.settings = settings or Settings()
        self.logds: list[Logd] = []
        super().__init__(*names)

    def make(self, name: str) -> tuple[Any, Protocol]:
        self.logds.append(Logd(self.settings, ListGate(service_id("client"))))
        return self.logds[-1], PROTOCOL

    def records(self) -> list[Record]:
        """What the present logd keeps, read without a message."""
        journal = self.logds[-1]._journal
        found: list[Record] = []
        since = 0
        while since <= journal.last:
            page = journal.page(since, PAGE_MAX, Wanted(EVERY_RECORD))
            found += page.records
            since = page.next
        return found


Body = Callable[[LogSystem, Logger], Awaitable[Any]]


def logging(body: Body, *names: str, settings: Settings | None = None, **options: Any) -> Any:
    """The result of `body` and the counts of its log; all lines are accounted for."""
    system = LogSystem(*(names or ("logd",)), settings=settings)
    logs: list[Logger] = []

    async def main(peers: Peers) -> Any:
        options.setdefault("uses", ["logd"])
        logs.append(Logger(peers, **options))
        return await body(system, logs[0])

    result = system.client(main)
    return result, logs[0].counts()


def adds_up(counts: LogCounts) -> bool:
    return counts.written == (
        counts.acknowledged + counts.refused + counts.lost + counts.waiting + counts.outstanding
    )


def say(log: Logger, text: str) -> None:
    _ = log.write(Level.INFO, text)


async def settle(log: Logger) -> None:
    """Flush until nothing is due."""
    while log.due:
        await log.flush()
        _ = await SleepUntil(Nanos(await Now() + MS))


async def pass_time(span: int) -> None:
    _ = await SleepUntil(Nanos(await Now() + span))


def test_lines_reach_logd_in_order_with_level_scope_and_fields() -> None:
    async def body(system: LogSystem, log: Logger) -> Any:
        log.info("one", valve=3)
        log.error("two")
        log.debug("too fine")
        _ = log.write(Level.WARN, "three", {"log.kind": "x"}, scope="audit")
        await settle(log)
        return system.records()

    records, counts = logging(body)

    assert [(each.text, each.level, each.scope) for each in records] == [
        ("one", Level.INFO, "client"),
        ("two", Level.ERROR, "client"),
        ("three", Level.WARN, "audit"),
    ]
    assert records[0].fields == [Field("valve", "3")]
    assert records[0].service == service_id("client")
    assert (counts.written, counts.acknowledged, counts.filtered, counts.bound) == (3, 3, 1, 1)


def test_a_line_lies_in_the_ring_before_anybody_is_told() -> None:
    async def body(system: LogSystem, log: Logger) -> Any:
        await log.begin()
        sent = system.kernel.traps["Send"]
        for number in range(100):
            say(log, f"line {number}")
        silent = system.kernel.traps["Send"] - sent
        waiting = log.counts()
        await settle(log)
        return silent, waiting, [each.text for each in system.records()]

    (silent, held, texts), counts = logging(body)

    assert silent == 0
    assert (held.waiting, held.outstanding) == (100, 0)
    assert texts == [f"line {number}" for number in range(100)]
    assert (counts.acknowledged, counts.lost) == (100, 0)


def test_flush_waits_for_no_answer_and_rings_once() -> None:
    async def body(system: LogSystem, log: Logger) -> Any:
        log.info("find logd")
        await settle(log)
        await pass_time(BELL_PAUSE)
        system.kernel.tasks.remove(system.services["logd"])  # it hangs
        began = await Now()
        sent = system.kernel.traps["Send"]
        for number in range(2000):
            say(log, f"line {number}")
            await log.flush()
        took, rung = await Now() - began, system.kernel.traps["Send"] - sent
        system.kernel.tasks.append(system.services["logd"])
        held = log.counts()
        await settle(log)
        return took, rung, held

    (took, rung, held), counts = logging(body)

    assert took < MS
    assert rung == 1
    assert held.waiting == 2000, "nobody has said what became of them"
    assert counts.acknowledged + counts.lost_overwritten == 2001
    assert counts.lost_overwritten > 0
    assert adds_up(counts)


def test_by_message_flush_waits_for_no_answer_and_for_no_room() -> None:
    async def body(system: LogSystem, log: Logger) -> Any:
        log.info("find logd")
        await settle(log)
        system.kernel.tasks.remove(system.services["logd"])  # it hangs
        began = await Now()
        for number in range(QUEUE_MAX + OUTSTANDING_MAX + 5):
            say(log, f"line {number}")
            await log.flush()
            await pass_time(BELL_PAUSE_MAX // 100)
        took = await Now() - began
        system.kernel.tasks.append(system.services["logd"])
        held = log.counts()
        await settle(log)
        return took, held

    (_, held), counts = logging(body, settings=Settings(core="client"), ring_size=0)

    assert (held.outstanding, held.waiting, held.lost_full) == (OUTSTANDING_MAX, QUEUE_MAX, 5)
    assert adds_up(held)
    assert counts.acknowledged == 1 + QUEUE_MAX + OUTSTANDING_MAX
    assert counts.lost == 5


@pytest.mark.parametrize("ring_size", [0, RING_SIZE_DEFAULT])
def test_an_absent_logd_costs_one_bounded_look_now_and_then(ring_size: int) -> None:
    async def body(system: LogSystem, log: Logger) -> Any:
        system.router.down["logd"] = 1_000_000
        waits = []
        for number in range(2 * QUEUE_MAX):
            say(log, f"line {number}")
            began = await Now()
            await log.flush()
            waits.append(await Now() - began)
            await pass_time(10 * MS)
        return waits, system.router.asked["logd"], log.counts()

    (waits, asked, held), counts = logging(body, ring_size=ring_size)

    assert 0 < max(waits) <= DISCOVERY_WAIT
    looks = sum(wait > 0 for wait in waits)
    assert 3 <= looks <= 6, "0.1 s, doubling, for 1.3 s"
    assert asked <= 3 * looks
    in_queue = (QUEUE_MAX, QUEUE_MAX)
    assert (held.waiting, held.lost_unreachable) == ((2 * QUEUE_MAX, 0) if ring_size else in_queue)
    assert counts.lost_full == 0
    assert LOOK_PAUSE < LOOK_PAUSE_MAX < DENIED_PAUSE


def test_lines_written_before_logd_is_there_are_taken_when_it_is() -> None:
    async def body(system: LogSystem, log: Logger) -> Any:
        log.info("early")
        await log.flush()
        waiting = log.counts().waiting
        _ = system.start("logd")
        system.router.down["logd"] = 0
        await pass_time(LOOK_PAUSE)
        await settle(log)
        return waiting, [each.text for each in system.records()]

    def before(system: LogSystem, log: Logger) -> Awaitable[Any]:
        system.router.down["logd"] = 1000
        return body(system, log)

    (waiting, texts), counts = logging(before)

    assert (waiting, texts) == (1, ["early"])
    assert counts.acknowledged == 1


def test_lines_written_before_there_is_a_ring_come_first() -> None:
    async def body(system: LogSystem, log: Logger) -> Any:
        for number in range(QUEUE_MAX + 3):
            say(log, f"{number}")
        await log.begin()
        say(log, "after")
        await settle(log)
        return [each.text for each in system.records()]

    texts, counts = logging(body)

    assert texts == [*map(str, range(QUEUE_MAX)), "after"]
    assert (counts.acknowledged, counts.lost_full) == (QUEUE_MAX + 1, 3)


@pytest.mark.parametrize("how", ["denied", "unknown", "not used"])
def test_a_task_that_may_not_reach_logd_asks_seldom_and_counts_its_lines(how: str) -> None:
    async def body(system: LogSystem, log: Logger) -> Any:
        if how == "denied":
            system.router.denied.add("logd")
        for number in range(2 * QUEUE_MAX):
            say(log, f"line {number}")
            await log.flush()
            await pass_time(10 * MS)
        return system.router.asked["logd"]

    names = ("other",) if how == "unknown" else ("logd",)
    asked, counts = logging(body, *names, uses=[] if how == "not used" else ["logd"])

    assert asked == (0 if how == "not used" else 1)
    assert counts.lost_unreachable == (2 * QUEUE_MAX if how == "not used" else 0)
    assert counts.lost_unreachable + counts.waiting == 2 * QUEUE_MAX
    assert adds_up(counts)


def test_a_reply_route_that_is_not_ours_is_no_way_to_logd() -> None:
    async def body(system: LogSystem, log: Logger) -> Any:
        system.router.reply_of = service_id("mallory")
        log.info("line")
        await log.flush()
        return system.router.asked[REPLY_NAME], system.router.asked["logd"]

    asked, counts = logging(body)

    assert asked == (1, 0)
    assert (counts.waiting, counts.outstanding, counts.bound) == (1, 0, 0)


def test_a_restarted_logd_is_found_again_takes_what_the_old_one_had_not_and_no_slot_leaks() -> None:
    async def body(system: LogSystem, log: Logger) -> Any:
        task = system.kernel.tasks[-1]
        log.info("first")
        await settle(log)
        slots = len(task.table)
        seen = []
        for number in range(5):
            system.kernel.tasks.remove(system.services["logd"])  # it hangs with this line
            say(log, f"rung for {number}")
            await pass_time(BELL_PAUSE)
            await log.flush()
            system.kernel.tasks.append(system.services["logd"])
            system.kill("logd")
            _ = system.start("logd")
            say(log, f"after {number}")
            await settle(log)
            seen.append(([each.text for each in system.records()], len(task.table)))
        return slots, seen

    (slots, seen), counts = logging(body)

    assert seen == [([f"rung for {n}", f"after {n}"], slots) for n in range(5)]
    assert (counts.written, counts.acknowledged, counts.lost) == (11, 11, 0)
    assert counts.bound == 6


def test_every_refusal_of_logd_is_counted() -> None:
    async def body(_system: LogSystem, log: Logger) -> Any:
        log.info("claim", sender_service_id="0x1")
        for number in range(RATE_MAX + 3):
            say(log, f"line {number}")
        await settle(log)

    _, by_ring = logging(body)
    _, by_message = logging(body, ring_size=0)

    assert (by_ring.refused_other, by_ring.acknowledged) == (1, RATE_MAX + 3)
    assert (by_message.refused_invalid_args, by_message.refused_rate_limited) == (1, 3)
    assert by_message.acknowledged == RATE_MAX
    assert adds_up(by_ring)
    assert adds_up(by_message)


def test_what_exceeds_the_rate_of_streams_waits_in_the_ring() -> None:
    async def body(system: LogSystem, log: Logger) -> Any:
        await log.begin()
        began = await Now()
        for number in range(100):
            say(log, f"{number}")
        await settle(log)
        return [int(each.text) for each in system.records()], await Now() - began

    (numbers, took), counts = logging(body, settings=Settings(stream_rate=40))

    assert numbers == list(range(100))
    assert (counts.acknowledged, counts.lost) == (100, 0)
    assert 2 * RATE_WINDOW_NS <= took < 4 * RATE_WINDOW_NS


def test_close_gives_everything_back_and_counts_what_is_left() -> None:
    async def body(system: LogSystem, log: Logger) -> Any:
        task = system.kernel.tasks[-1]
        _ = await log._peers.control(Nanos(SECOND))
        slots = len(task.table)
        log.info("one")
        await settle(log)
        during = len(task.table)
        log.info("two")
        await log.close()
        log.info("three")
        await pass_time(MS)
        return slots, during, len(task.table), log.due, [each.text for each in system.records()]

    (before, during, after, due, texts), counts = logging(body)

    assert (during, after) == (before + 2, before)
    assert not due
    assert (counts.acknowledged, counts.lost_unknown, counts.lost_unreachable) == (1, 1, 1)
    assert texts == ["one", "two"], "logd reads a ring to its end though nobody hears of it"


def test_close_lets_go_of_a_logd_that_has_not_bound_its_link_yet() -> None:
    system = LogSystem()
    system.late["logd"] = FAR
    _ = system.start("logd")

    async def main(peers: Peers) -> Any:
        task = system.kernel.tasks[-1]
        log = Logger(peers, ["logd"])
        _ = await peers.control(Nanos(SECOND))
        slots = len(task.table)
        log.info("one")
        await log.flush()
        during = len(task.table)
        await log.close()
        return during - slots, len(task.table) - slots, len(peers.caller.correlator.in_flight)

    assert system.client(main) == (2, 0, 0), "the ring and the link, and then neither"


def test_what_a_task_had_written_when_it_died_is_read_from_its_ring() -> None:
    async def body(system: LogSystem, log: Logger) -> Any:
        log.info("told")
        await settle(log)
        log.info("last words", token="x1")
        log.error("and the very last")
        return len(system.records())

    system = LogSystem("logd")

    async def main(peers: Peers) -> Any:
        return await body(system, Logger(peers, ["logd"]))

    before = system.client(main)
    system.kernel.settle()

    assert before == 1
    assert [each.text for each in system.records()] == ["told", "last words", "and the very last"]


def test_lines_of_another_thread_are_taken_by_the_next_flush() -> None:
    async def body(system: LogSystem, log: Logger) -> Any:
        for number in range(QUEUE_MAX + 2):
            log.write_from_elsewhere(Level.WARN, f"{number}", {"n": number}, "thread")
        due = log.due
        await settle(log)
        return due, [(each.text, each.scope) for each in system.records()]

    (due, found), counts = logging(body)

    assert due
    assert found == [(f"{number}", "thread") for number in range(QUEUE_MAX)]
    assert (counts.written, counts.lost_full) == (QUEUE_MAX + 2, 2)
    assert adds_up(counts)


@given(
    st.lists(
        st.tuples(
            st.text(st.characters(exclude_categories=()), max_size=80),
            st.dictionaries(st.text(max_size=8), VALUES, max_size=4),
        ),
        max_size=8,
    )
)
def test_a_line_is_the_same_whether_it_takes_the_short_way_or_the_long_one(
    lines: list[tuple[str, dict[str, Any]]],
) -> None:
    """The second time a set of keys is known by heart."""
    log = Logger(Peers(TinyKernel().boot(TinyKernel().task("client")), b"seed"), ["logd"])

    for text, fields in lines:
        expected = make_line(Level.INFO, "client", text, fields).request
        for _ in range(2):
            assert log.write(Level.INFO, text, fields, scope="client")
        first, again = log._lines
        log._lines.clear()
        assert sendable(unpack(first)) == sendable(unpack(again)) == expected


def test_the_second_line_with_the_same_keys_is_a_short_one() -> None:
    log = Logger(Peers(TinyKernel().boot(TinyKernel().task("client")), b"seed"), ["logd"])

    for _ in range(2):
        log.info("line", code=200, method="get")

    assert [each[0] == SHORT for each in log._lines] == [False, True]


def test_a_field_may_be_called_as_a_parameter_is() -> None:
    log = Logger(Peers(TinyKernel().boot(TinyKernel().task("client")), b"seed"), ["logd"])

    for _ in range(2):
        log.info("line", text="a", self="b", fields="c")

    for each in log._lines:
        assert unpack(each).keys.split() == ["fields", "self", "text"]
        assert unpack(each).values == ["c", "b", "a"]


def test_short_lines_of_one_kind_that_wait_are_not_written_over_each_other() -> None:
    log = Logger(Peers(TinyKernel().boot(TinyKernel().task("client")), b"seed"), ["logd"])

    for code in range(4):
        log.info("line", code=code)

    assert [each[0] == SHORT for each in log._lines] == [False, True, True, True]
    assert [unpack(each).values for each in log._lines] == [["0"], [1], [2], [3]]


@pytest.mark.parametrize(
    ("text", "value"),
    [("x" * 1_000_000, 1), ("x" * 1_000_000, object()), ("x" * SURE_SIZE, 1), ("\ud800", 1)],
)
def test_a_line_that_is_no_short_one_leaves_nothing_to_the_next_of_its_kind(
    text: str, value: Any
) -> None:
    log = Logger(Peers(TinyKernel().boot(TinyKernel().task("client")), b"seed"), ["logd"])
    log.info("first", code=1)

    for _ in range(2):
        log.info(text, code=value)
    kept = sum(len(piece) for piece, _ in log._heads["client"][Level.INFO].values())
    log.info("last", code=2)

    assert kept < SURE_SIZE
    assert log._heads_count == 1
    last = unpack(log._lines[-1])
    assert (last.text, last.values) == ("last", [2])


def test_a_value_of_no_kind_that_a_field_has_costs_itself_and_no_more() -> None:
    log = Logger(Peers(TinyKernel().boot(TinyKernel().task("client")), b"seed"), ["logd"])

    log.info("line", one=1, two=2)
    log.info("line", one=cast("Any", [1]), two=cast("Any", object))

    assert [unpack(each).values for each in log._lines] == [["1", "2"], ["[1]", str(object)]]
    log.info("line", one=cast("Any", [1]), two=2)
    assert unpack(log._lines[-1]).values == [UNREADABLE, 2]


def test_a_log_of_a_level_writes_what_matters_as_much_or_more() -> None:
    async def body(system: LogSystem, log: Logger) -> Any:
        for write in (log.error, log.warning, log.info, log.debug, log.trace):
            write("line")
        await settle(log)
        return [each.level for each in system.records()]

    levels, counts = logging(body, level=Level.WARN)

    assert levels == [Level.ERROR, Level.WARN]
    assert (counts.written, counts.filtered) == (2, 3)

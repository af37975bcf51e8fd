"""logd as its clients see it, on the tiny kernel."""

import json
from typing import Any

import pytest

from nexus.abi import (
    INIT_NAME,
    BootImage,
    EventKind,
    Nanos,
    Now,
    SleepUntil,
    Spawn,
    SpawnSpec,
    Wait,
    service_id,
)
from nexus.ipc import Exchange, Peers, Refused, Way
from nexus.protocols.logd import (
    EVERY_RECORD,
    LOG_READ,
    PAGE_MAX,
    PROTOCOL,
    RATE_MAX,
    RATE_WINDOW_NS,
    SCOPE_SIZE_MAX,
    TEXT_SIZE_MAX,
    THIS_BOOT,
    Append,
    Appended,
    Field,
    GetStats,
    Level,
    LogdStatus,
    Query,
    Records,
    SenderRow,
    Stats,
)
from nexus.protocols.meta import GetStatus, ServiceStatus, Stop
from nexus.runtime import ServiceConfig
from nexus.services.logd import main
from nexus.services.logd.config import Settings
from nexus.services.logd.service import Logd
from nexus.testing.rig import sim_rig
from nexus.wire import ReplyStatus, Request
from tests.fakes.gate import ListGate
from tests.fakes.pair import FAR, TERMS, Pair
from tests.fakes.tinykernel import Task

SECOND = 1_000_000_000
READER = service_id(INIT_NAME)
CLAIM = Field("sender_service_id", "0x1")
TOO_LONG = "x" * (TEXT_SIZE_MAX + 1)


def line(text: str = "text", *fields: Field) -> Append:
    return Append(Level.INFO, "test", text, list(fields))


def query(since: int = 0, count: int = PAGE_MAX) -> Query:
    return Query(THIS_BOOT, since, count, EVERY_RECORD)


def pair(**settings: Any) -> Pair:
    return Pair(Logd(Settings(**settings), ListGate(READER)), PROTOCOL)


async def ask(link: Exchange, *requests: Request[Any]) -> list[Any]:
    return [await link.call(request, FAR) for request in requests]


def asked(system: Pair, *requests: Request[Any], name: str = INIT_NAME) -> list[Any]:
    """The outcomes of requests in a row, as a client that then ends."""
    outcomes: list[Any] = system.client(lambda link: ask(link, *requests), name=name)
    return outcomes


def row(stats: Stats, name: str) -> SenderRow:
    (found,) = [each for each in stats.rows if each.service == service_id(name)]
    return found


def console(system: Pair) -> list[tuple[str, dict[str, object]]]:
    return [(text, json.loads(evidence)) for _, text, evidence in system.kernel.console]


def test_a_record_has_an_id_and_the_kernels_word_for_its_sender() -> None:
    system = pair()

    first, second, page = asked(
        system, line("one", Field("token", "abc")), line("two"), query(2, count=1)
    )

    assert (first, second) == (Appended(1, 0), Appended(2, 0))
    assert isinstance(page, Records)
    (record,) = page.records
    client: Task = system.kernel.tasks[1]
    assert (record.record, record.text, record.service) == (2, "two", READER)
    assert (record.pid, record.generation) == (client.sender.pid, client.sender.generation)
    assert (page.next, page.oldest, page.total, page.dropped) == (3, 1, 2, 0)


@pytest.mark.covers("logd.INVALID_ARGS", "logd.OVER_LIMIT", "logd.RATE_LIMITED")
def test_each_refusal_has_its_status_its_counter_and_one_line_on_the_console() -> None:
    system = pair()

    outcomes = asked(
        system,
        line("claim", CLAIM),
        line("claim", CLAIM),
        line(TOO_LONG),
        *[line()] * RATE_MAX,
        line(),
        line(),
        GetStats(),
        name="client",
    )

    stats = outcomes.pop()
    assert outcomes == [
        Refused(LogdStatus.INVALID_ARGS),
        Refused(LogdStatus.INVALID_ARGS),
        Refused(LogdStatus.OVER_LIMIT),
        *[Appended(number, 0) for number in range(1, RATE_MAX + 1)],
        Refused(LogdStatus.RATE_LIMITED),
        Refused(LogdStatus.RATE_LIMITED),
    ]
    client = service_id("client")
    assert row(stats, "client") == SenderRow(client, RATE_MAX, 2, 1, 2, 0, 0, 0)
    assert (stats.invalid_args, stats.over_limit, stats.rate_limited) == (2, 1, 2)
    assert (stats.total, stats.used_records) == (RATE_MAX, RATE_MAX), "a refusal uses no id"
    assert console(system) == [
        (f"logd: reject {reason}", {"sender": f"0x{client:016x}", "reason": reason, "count": 1})
        for reason in ("invalid_args", "over_limit", "rate_limited")
    ]


def test_the_checks_have_an_order_and_the_first_two_use_up_nothing_of_the_rate() -> None:
    wrong_in_both_ways = line(TOO_LONG, CLAIM)
    outcomes = asked(
        pair(),
        *[wrong_in_both_ways, line(TOO_LONG)] * RATE_MAX,
        *[line()] * RATE_MAX,
        wrong_in_both_ways,
        line(TOO_LONG),
        line(),
    )

    assert (
        outcomes[: 2 * RATE_MAX]
        == [
            Refused(LogdStatus.INVALID_ARGS),
            Refused(LogdStatus.OVER_LIMIT),
        ]
        * RATE_MAX
    )
    assert all(isinstance(each, Appended) for each in outcomes[2 * RATE_MAX : 3 * RATE_MAX])
    assert outcomes[3 * RATE_MAX :] == [
        Refused(LogdStatus.INVALID_ARGS),
        Refused(LogdStatus.OVER_LIMIT),
        Refused(LogdStatus.RATE_LIMITED),
    ]


def test_one_senders_rate_is_not_anothers_and_comes_back_after_the_window() -> None:
    system = pair()

    spent = asked(system, *[line()] * (RATE_MAX + 1), name="busy")[-1]
    (mine,) = asked(system, line("mine"), name="other")
    began = system.kernel.now

    async def later(link: Exchange) -> Any:
        _ = await SleepUntil(Nanos(began + RATE_WINDOW_NS))
        return await link.call(line(), FAR)

    again = system.client(later, name="busy")

    assert spent == Refused(LogdStatus.RATE_LIMITED)
    assert isinstance(mine, Appended)
    assert isinstance(again, Appended)


def test_core_senders_have_the_rate_of_the_settings() -> None:
    system = pair(core="audit", core_rate=40)

    outcomes = asked(system, *[line()] * 41, name="audit")

    assert [type(each) for each in outcomes] == [Appended] * 40 + [Refused]


@pytest.mark.covers("wire.DENIED")
def test_reading_needs_the_right_and_a_denial_is_counted() -> None:
    gate = ListGate(READER)
    system = Pair(Logd(Settings(), gate), PROTOCOL)

    denied, stats = asked(system, query(), GetStats(), name="nobody")
    (allowed,) = asked(system, query())

    assert denied == Refused(ReplyStatus.DENIED)
    assert stats.denied == 1
    assert isinstance(allowed, Records)
    assert gate.asked == [
        (service_id("nobody"), LOG_READ, "journal"),
        (READER, LOG_READ, "journal"),
    ]


def test_the_account_is_exact_over_more_records_than_the_ring_holds() -> None:
    system = pair(records=10, core=f"{INIT_NAME} quiet", core_rate=1000)

    quiet = asked(system, *[line("quiet")] * 3, name="quiet")
    outcomes = asked(system, *[line(), line("claim", CLAIM), line(TOO_LONG)] * 20, GetStats())

    stats = outcomes.pop()
    assert [each.record for each in quiet] == [1, 2, 3]
    assert (stats.total, stats.dropped, stats.used_records) == (23, 13, 10)
    assert stats.total == stats.used_records + stats.dropped
    mine, theirs = row(stats, INIT_NAME), row(stats, "quiet")
    refused = mine.invalid_args + mine.over_limit + mine.rate_limited
    assert mine.accepted + refused == len(outcomes)
    assert (mine.accepted, mine.overwritten) == (20, 12)
    assert (theirs.accepted, theirs.overwritten) == (3, 1), "a quarter of 10 stays with others"
    assert outcomes[-3] == Appended(23, 13)


def test_the_status_says_how_large_the_ring_is() -> None:
    system = pair(records=100, size="64KiB")

    _, status = asked(system, line(), GetStatus())

    assert isinstance(status, ServiceStatus)
    facts = {fact.name: fact.value for fact in status.facts}
    assert (facts["capacity_records"], facts["capacity_size"]) == (100, 65536)
    totals = {name: value for name, value in facts.items() if name.endswith("_total")}
    assert totals == {"accepted_total": 1, "dropped_total": 0, "denied_total": 0}


def test_a_batch_of_records_is_held_to_the_same_rules() -> None:
    system = pair()

    async def body(link: Exchange) -> Any:
        return await link.call_many([line(), line("claim", CLAIM), line(TOO_LONG)] * 9, FAR)

    outcomes = system.client(body)

    expected = [
        Refused(LogdStatus.INVALID_ARGS),
        Refused(LogdStatus.OVER_LIMIT),
    ]
    assert [each for each in outcomes if isinstance(each, Refused)] == expected * 9
    assert [each.record for each in outcomes if isinstance(each, Appended)] == list(range(1, 10))


def test_the_largest_line_of_utf8_is_taken_whole() -> None:
    text = "€" * (TEXT_SIZE_MAX // 3)
    scope = "ß" * (SCOPE_SIZE_MAX // 2)

    taken, page = asked(pair(), Append(Level.WARN, scope, text, [Field("k", "é" * 254)]), query())

    assert taken == Appended(1, 0)
    (record,) = page.records
    assert (record.scope, record.text, record.fields) == (scope, text, [Field("k", "é" * 254)])


def booted(settings: dict[str, Any], body: Any) -> tuple[Any, list[str], int]:
    """logd's own main on the simulated kernel, with these settings and no policyd beside it."""

    async def root(boot: BootImage) -> Any:
        config = ServiceConfig(uses=[], posts=[], settings=settings, trace_seed=bytes(16))
        spec = SpawnSpec("logd", "logd", boot.endpoint, argument=config.encoded(), delegations=8)
        spawned = await Spawn(spec)
        peers = Peers(boot, bytes(16))
        bound = await peers.bind(
            Way(
                slot=spawned.slot,
                protocol=PROTOCOL,
                name="logd",
                service=spawned.service,
                generation=spawned.generation,
                terms=TERMS,
                reply_terms=TERMS,
            ),
            Nanos(await Now() + SECOND),
        )
        outcome = await body(bound) if isinstance(bound, Exchange) else bound
        if isinstance(bound, Exchange):
            _ = await bound.call(Stop(), Nanos(await Now() + SECOND))
        ended = await Wait(spawned.pid, Nanos(await Now() + SECOND))
        return outcome, ended.code

    run = sim_rig(seed=1, cpu_count=1).observe(root, programs={"logd": main})
    lines = [str(fields["line"]) for fields in run.fields(EventKind.CONSOLE)]
    outcome, code = run.result
    return outcome, lines, code


def test_the_program_reads_its_settings_and_denies_reading_without_a_policy() -> None:
    async def body(link: Exchange) -> Any:
        until = Nanos(await Now() + SECOND)
        return [await link.call(each, until) for each in (line(), query(), GetStats())]

    outcomes, lines, code = booted({"records": 77, "size": "32KiB"}, body)

    assert outcomes[:2] == [Appended(1, 0), Refused(ReplyStatus.DENIED)]
    assert (outcomes[2].capacity_records, outcomes[2].capacity_size) == (77, 32768)
    assert outcomes[2].denied == 1
    assert (lines, code) == ([], 0)


def test_settings_that_make_no_sense_end_it_with_a_sentence() -> None:
    async def body(link: Exchange) -> Any:
        return await link.call(GetStats(), Nanos(await Now() + SECOND))

    _, lines, code = booted({"records": 0}, body)

    (sentence,) = lines
    assert sentence.startswith("logd: settings: records is 0: from 1 to 65536 is possible; ")
    assert code == 2

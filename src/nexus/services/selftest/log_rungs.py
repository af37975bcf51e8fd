"""Rungs about the journal: what it refuses, how it is paged, who may read it."""

from typing import Any, Final

from nexus.abi import (
    CapClone,
    CapClose,
    EndpointClose,
    EndpointCreate,
    LinkCreate,
    LinkTerms,
    Nanos,
    SleepUntil,
    Slot,
    TaskStats,
    service_id,
)
from nexus.ipc import CallFailure, Refused, RetryBudget, RetryTokens, retry_until
from nexus.log import LogCounts, Logger
from nexus.protocols.logd import (
    EVERY_RECORD,
    FIELDS_SIZE_MAX,
    PAGE_MAX,
    RATE_MAX,
    RATE_WINDOW_NS,
    TEXT_SIZE_MAX,
    Append,
    Appended,
    Field,
    GetStats,
    Level,
    Query,
    SenderRow,
    Stats,
)
from nexus.protocols.policyd import TARGET_SIZE_MAX, Check, Decision, GetCounts
from nexus.protocols.testsvc import LogdAnswer, ReadLog
from nexus.services.selftest.climb import CALL_WAIT, Climb
from nexus.services.selftest.policy_rungs import PROBE_RIGHT, fields_of, find, pages
from nexus.services.selftest.routing_rungs import grown
from nexus.services.selftest.rung import Evidence, RungFailed, expect, expect_type, require
from nexus.wire import ReplyStatus

SCOPE: Final = "selftest"
LOGD_NAME: Final = "logd"
CLAIM: Final = Field("sender_service_id", "0x1")  # what no payload may say (services.md 1.5)
FIELD_COST: Final = 2  # bytes of a field besides its key and its value (protocols/logd.py)
WINDOW: Final = Nanos(RATE_WINDOW_NS + 50_000_000)  # ns; the limiter's window, and a little more
BURSTS_WAIT: Final = Nanos(30_000_000_000)  # ns for all of them
BURSTS_MAX: Final = 4  # tries to get a whole burst into one window, on a busy host
MIXED: Final = 200  # records of mixed size that paging has to find, each once
LARGE_EVERY: Final = 10  # of these, one large record more; 20 are inside this client's rate
LARGE_FIELD_SIZE: Final = 480  # bytes
DRAIN_POLLS_MAX: Final = 10  # with doubling pauses: 5 ms to 2.5 s
DRAIN_PAUSE: Final = Nanos(5_000_000)  # ns


def append(text: str, *fields: Field) -> Append:
    """A record of this client's."""
    return Append(Level.INFO, SCOPE, text, list(fields))


async def journal_stats(climb: Climb) -> Stats:
    """logd's account."""
    return await climb.call(climb.client("logd"), GetStats())


def row_of_sender(climb: Climb, stats: Stats, name: str | None = None) -> SenderRow:
    """The row of a sender, all zero if there is none."""
    wanted = service_id(climb.boot.name if name is None else name)
    rows = [row for row in stats.rows if row.service == wanted]
    return rows[0] if rows else SenderRow(wanted, *[0] * (len(SenderRow.__struct_fields__) - 1))


def status_name(outcome: object) -> str:
    """How a service answers: OK, or the name of its refusal."""
    if isinstance(outcome, CallFailure):
        raise RungFailed(f"a call ended with {outcome!r}")
    return outcome.status.name if isinstance(outcome, Refused) else ReplyStatus.OK.name


async def _status_of(climb: Climb, request: Append) -> str:
    """How logd answers: OK, or the name of its refusal."""
    return status_name(await climb.client("logd").call(request, await climb.ahead(CALL_WAIT)))


def growth_of(before: SenderRow, after: SenderRow) -> dict[str, int]:
    """What a sender's row counts more, by message or stream."""
    return {
        name: getattr(after, name) - getattr(before, name)
        for name in ("accepted", "invalid_args", "over_limit", "rate_limited")
    }


async def invalid_args(climb: Climb) -> Evidence:
    """#111, stated: an identity claim in the fields, and what logd counted for this client."""
    before = await journal_stats(climb)
    status = await _status_of(climb, append("who am I", CLAIM))
    after = await journal_stats(climb)
    first = await climb.call(climb.client("logd"), append("an id before"))
    again = await _status_of(climb, append("who am I", CLAIM))
    second = await climb.call(climb.client("logd"), append("an id after"))
    others = await _between(climb, first.record, second.record)
    return {
        "status": status,
        "again": again,
        "growth": growth_of(row_of_sender(climb, before), row_of_sender(climb, after)),
        "ids": second.record - first.record - 1 - others,
    }


async def _between(climb: Climb, first: int, second: int) -> int:
    """How many records of other senders stand between two of ours."""
    page = await climb.call(climb.client("logd"), page_from(climb, first + 1))
    mine = climb.boot.service
    return sum(record.record < second and record.service != mine for record in page.records)


async def over_limit(climb: Climb) -> Evidence:
    """#112, stated: fields of 512 bytes are taken, of 513 refused."""
    before = await journal_stats(climb)
    size = FIELDS_SIZE_MAX - len("fill") - FIELD_COST
    fits = await _status_of(climb, append("fits", Field("fill", "x" * size)))
    exceeds = await _status_of(climb, append("exceeds", Field("fill", "x" * (size + 1))))
    after = await journal_stats(climb)
    return {
        "statuses": [fits, exceeds],
        "sizes": [FIELDS_SIZE_MAX, FIELDS_SIZE_MAX + 1],
        "growth": growth_of(row_of_sender(climb, before), row_of_sender(climb, after)),
    }


async def rate_limited(climb: Climb) -> Evidence:
    """#113, stated: the 25th record of one window is refused while policyd's is taken.

    A burst that a busy host stretched over more than a window is made again.
    """
    _ = await SleepUntil(await climb.ahead(WINDOW))
    budget = RetryBudget(
        attempts_max=BURSTS_MAX, backoff=WINDOW, deadline=await climb.ahead(BURSTS_WAIT)
    )
    return await retry_until(
        lambda: _burst(climb),
        lambda seen: seen["took_ns"] >= RATE_WINDOW_NS,
        budget,
        RetryTokens(),
    )


async def _burst(climb: Climb) -> dict[str, Any]:
    """One record more than a window allows, and one of policyd's."""
    before = await journal_stats(climb)
    start = await climb.ahead(Nanos(0))
    statuses = [await _status_of(climb, append(f"burst {n}")) for n in range(RATE_MAX + 1)]
    _ = await climb.call(climb.client("policyd"), Check(PROBE_RIGHT, "in the same second"))
    after = await _after_policyd(climb, before)
    took = await climb.ahead(Nanos(0)) - start
    return {
        "statuses": statuses,
        "took_ns": took,
        "growth": growth_of(row_of_sender(climb, before), row_of_sender(climb, after)),
        "policyd": growth_of(
            row_of_sender(climb, before, "policyd"), row_of_sender(climb, after, "policyd")
        ),
    }


async def _after_policyd(climb: Climb, before: Stats) -> Stats:
    """STATS once policyd's audit record has come, which it sends after its answer."""
    had = row_of_sender(climb, before, "policyd").accepted
    budget = RetryBudget(
        attempts_max=DRAIN_POLLS_MAX, backoff=DRAIN_PAUSE, deadline=await climb.ahead(CALL_WAIT)
    )
    return await retry_until(
        lambda: journal_stats(climb),
        lambda seen: row_of_sender(climb, seen, "policyd").accepted == had,
        budget,
        RetryTokens(),
    )


# ------------------------------------------------------------------ reading


def page_from(climb: Climb, since: int, *, count: int = PAGE_MAX) -> Query:
    """Records of this boot from id `since` on."""
    return Query(climb.config.boot, since, count, EVERY_RECORD)


async def log_query(climb: Climb) -> Evidence:
    """#116: one record found by id and by field; 200 of mixed size paged without a gap; and no
    reading without the right."""
    logd = climb.client("logd")
    _ = await SleepUntil(await climb.ahead(WINDOW))
    token = f"{climb.boot.pid}.{await climb.ahead(Nanos(0))}"

    kept = expect_type(
        await climb.call(logd, append(f"token {token}", Field("token", token))),
        Appended,
        "acknowledgement",
    )
    by_id = (await climb.call(logd, page_from(climb, kept.record, count=1))).records
    by_field = await find(climb, "token", token)
    targets = await _audited(climb)
    paged, count = await pages(climb, kept.record)
    given = await CapClone(logd.peer.slot)
    refused = expect_type(
        await climb.moved(climb.testsvc, ReadLog(), given), LogdAnswer, "logd's answer to another"
    )

    expect([record.record for record in by_id], [kept.record], "found by its id")
    expect([record.record for record in by_field], [kept.record], "found by its field")
    (record,) = by_field
    expect(record.service, climb.boot.service, "its sender")
    expect(record.pid, climb.boot.pid, "its sender's pid")
    expect(record.text, f"token {token}", "its text")
    ids = [record.record for record in paged]
    found = [fields_of(record).get("target", "") for record in paged]
    expect([target for target in found if target in set(targets)], targets, "the paged records")
    expect(ids, list(range(ids[0], ids[0] + len(ids))), "the ids that paging saw")
    require(count > MIXED // PAGE_MAX, f"only {count} pages")
    expect(refused.status, int(ReplyStatus.DENIED), "status for a client without the right")
    expect(refused.records, 0, "records for a client without the right")
    return {"record": kept.record, "paged": len(ids), "pages": count, "mixed": len(targets)}


async def _audited(climb: Climb) -> list[str]:
    """Have policyd write audit records of mixed size; their targets, in order."""
    policyd = climb.client("policyd")
    before = await climb.call(policyd, GetCounts())
    targets = [
        f"page {n:03d} ".ljust(9 + n * 37 % (TARGET_SIZE_MAX - 9), "x") for n in range(MIXED)
    ]
    large = append("x" * TEXT_SIZE_MAX, Field("fill", "y" * LARGE_FIELD_SIZE))
    for number, target in enumerate(targets):
        _ = expect_type(await climb.call(policyd, Check(PROBE_RIGHT, target)), Decision, "decision")
        if number % LARGE_EVERY == 0:  # so that pages are full by size and not by count alone
            _ = expect_type(await climb.call(climb.client("logd"), large), Appended, "large record")
    budget = RetryBudget(
        attempts_max=DRAIN_POLLS_MAX, backoff=DRAIN_PAUSE, deadline=await climb.ahead(CALL_WAIT)
    )
    counts = await retry_until(
        lambda: climb.call(policyd, GetCounts()),
        lambda seen: seen.audited - before.audited < MIXED,
        budget,
        RetryTokens(),
    )
    require(counts.audited - before.audited >= MIXED, f"audited {counts.audited - before.audited}")
    return targets


# ------------------------------------------------------------------ the facade


async def sink_logd(climb: Climb) -> Evidence:
    """#117: one line over configured slots, one over routed discovery after invalid slots were
    refused; both found once, and no capability stays behind."""
    peers = climb.peers
    stamp = await climb.ahead(Nanos(0))
    tokens = [f"sink {kind} {stamp}" for kind in ("slots", "routed")]
    before = (await TaskStats()).slots

    routes = await climb.route_counts()
    configured, empty, refused = await _over_slots(climb, tokens[0])
    by_slots = await climb.route_counts()
    routed = Logger(peers, [LOGD_NAME], scope=SCOPE)
    refused_first = await routed.configure_sink_logd_slots(empty, empty, empty)
    routed.info(tokens[1], token=tokens[1])
    await _settled(climb, routed)
    by_route = routed.counts()
    await routed.close()
    looked_for = grown(by_slots, await climb.route_counts())
    after = (await TaskStats()).slots
    found = [len(await find(climb, "token", token)) for token in tokens]

    expect(refused, False, "slots of which one is missing")
    expect(refused_first, False, "slots that are all missing")
    expect(configured.acknowledged, 1, "acknowledged over the configured slots")
    expect(grown(routes, by_slots), {}, "routes asked for although slots were configured")
    expect(by_route.acknowledged, 1, "acknowledged over the routed link")
    expect(looked_for, {"ok": 2}, "routes asked for: logd and @reply")
    expect(found, [1, 1], "records found for the two lines")
    expect(after, before, "this task's capabilities")
    return {"records": found, "slots": after}


async def _over_slots(climb: Climb, token: str) -> tuple[LogCounts, Slot, bool]:
    """Log one line over slots handed to the facade. Its counts, a slot that is empty now, and
    what it said when one of the three was missing."""
    inbox = await EndpointCreate()
    send = await CapClone(climb.client(LOGD_NAME).peer.slot)
    way = await LinkCreate(inbox, LinkTerms(delegations=1))
    log = Logger(climb.peers, [], scope=SCOPE)
    empty = await CapClone(send)
    await CapClose(empty)
    refused = await log.configure_sink_logd_slots(send, empty, inbox)
    expect(await log.configure_sink_logd_slots(send, way.slot, inbox), True, "three good slots")
    log.info(token, token=token)
    await _settled(climb, log)
    counts = log.counts()
    await log.close()
    for slot in (send, way.slot):
        await CapClose(slot)
    await EndpointClose(inbox)
    return counts, empty, refused


async def _settled(climb: Climb, log: Logger) -> None:
    """Flush until nothing waits and no answer is open."""

    async def flushed() -> bool:
        await log.flush()
        return not log.due

    budget = RetryBudget(
        attempts_max=DRAIN_POLLS_MAX, backoff=DRAIN_PAUSE, deadline=await climb.ahead(CALL_WAIT)
    )
    settled = await retry_until(flushed, lambda done: not done, budget, RetryTokens())
    require(settled, f"the log is not settled: {log.counts()}")

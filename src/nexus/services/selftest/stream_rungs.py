"""Rungs about log streams: opened by rule, drained to the last record, each under its own name."""

from typing import Any, Final

from nexus.abi import LinkCreate, LinkTerms, Nanos, TaskCounters, TaskStats, service_id
from nexus.ipc import Client, Exchange, Peer, RetryBudget, RetryTokens, Started, retry_until
from nexus.ipc.exchange import ECHO
from nexus.protocols.logd import (
    FIELDS_SIZE_MAX,
    RATE_MAX,
    RATE_WINDOW_NS,
    RING_SIZE_MAX,
    Appended,
    Drain,
    Drained,
    GetStats,
    Record,
    Stats,
    StreamOpened,
)
from nexus.protocols.logd import PROTOCOL as LOGD
from nexus.protocols.meta import LogProbe
from nexus.protocols.testsvc import Place, Placed
from nexus.services.selftest.climb import CALL_WAIT, Climb
from nexus.services.selftest.log_rungs import (
    BURSTS_MAX,
    BURSTS_WAIT,
    CLAIM,
    DRAIN_PAUSE,
    DRAIN_POLLS_MAX,
    WINDOW,
    append,
    growth_of,
    journal_stats,
    page_from,
    row_of_sender,
    status_name,
)
from nexus.services.selftest.own_memory import RING_SIZE, OwnRing, open_stream, shared
from nexus.services.selftest.policy_rungs import find, pages
from nexus.services.selftest.rung import Evidence, expect, expect_type, require
from nexus.wire import ReplyStatus, answer, encode

BURST: Final = 600  # records of rung 115; the ring holds about 150 of them
REFUSED_EVERY: Final = 8  # of these one claims an identity and one is too large
PROBE_TERMS: Final = LinkTerms(8, 16 * 1024, 0)  # of the way back of STATS
PLACED: Final = 2  # messages that come of it: the forged answer, and that it was placed
PROBED: Final = ("policyd", "statefsd", "timed")
PROBE_TRIES_MAX: Final = 3


async def hardening(climb: Climb) -> Evidence:
    """#114: after the window a good record is taken; a stream is opened by the same rules."""
    logd = climb.client("logd")
    _ = await climb.pause(WINDOW)
    good = expect_type(await climb.call(logd, append("good again")), Appended, "a good record")
    before = await journal_stats(climb)
    shapes = await _misshapen_streams(climb)
    after = await journal_stats(climb)
    budget = RetryBudget(
        attempts_max=BURSTS_MAX, backoff=WINDOW, deadline=await climb.ahead(BURSTS_WAIT)
    )
    opened = await retry_until(
        lambda: _opened(climb),
        lambda seen: seen["took_ns"] >= RATE_WINDOW_NS,
        budget,
        RetryTokens(),
    )
    await reopen_stream(climb)
    return {
        "record": good.record,
        "shapes": shapes,
        "growth": growth_of(row_of_sender(climb, before), row_of_sender(climb, after)),
        "opened": opened,
        "streams": [before.streams, (await journal_stats(climb)).streams],
    }


async def _misshapen_streams(climb: Climb) -> dict[str, str]:
    """How logd answers to memory that is no ring, to a ring that is too large, and to one that
    could still be sealed, which is no living memory and does not even travel."""
    found: dict[str, str] = {}
    for name, size in (("no ring", RING_SIZE), ("too large", RING_SIZE_MAX + RING_SIZE)):
        memory = await shared(size)
        if name == "too large":
            _ = OwnRing(memory)
        outcome = await open_stream(climb.client("logd"), memory, await climb.ahead(CALL_WAIT))
        found[name] = status_name(outcome)
        await memory.close()
    return found


async def _opened(climb: Climb) -> dict[str, Any]:
    """The ring is offered once more often than a window has room for."""
    _ = await climb.pause(WINDOW)
    ring, before = climb.ring, await journal_stats(climb)
    start = await climb.ahead(Nanos(0))
    statuses = [
        status_name(
            await open_stream(climb.client("logd"), ring.memory, await climb.ahead(CALL_WAIT))
        )
        for _ in range(RATE_MAX + 1)
    ]
    took = await climb.ahead(Nanos(0)) - start
    after = await journal_stats(climb)
    return {
        "statuses": statuses,
        "took_ns": took,
        "rate_limited": row_of_sender(climb, after).rate_limited
        - row_of_sender(climb, before).rate_limited,
    }


async def reopen_stream(climb: Climb) -> None:
    """logd drains the client's own ring again, from where it stands."""
    _ = await climb.pause(WINDOW)
    ring = climb.ring
    outcome = await open_stream(
        climb.client("logd"), ring.memory, await climb.ahead(CALL_WAIT), *ring.drained
    )
    _ = expect_type(outcome, StreamOpened, "the ring, offered again")


async def stats_probe(climb: Climb) -> Evidence:
    """#115: STATS over a moved way back, next to a foreign answer; a burst that is larger than the
    ring is accounted for to the last record."""
    _ = await climb.pause(WINDOW)
    ring, logd = climb.ring, climb.client("logd")
    older = await _oldest_of_others(climb)
    before = row_of_sender(climb, await _probed(climb))
    start = expect_type(await climb.call(logd, Drain()), Drained, "the stream before")

    for number in range(BURST):
        _put_one(climb, number)
    drained = await _drained(climb, start.sequence + BURST)
    ring.drained = (drained.taken, ring.writer.sequence)
    correlator = climb.peers.caller.correlator
    foreign = correlator.foreign
    stats = await _probed(climb, forged=True)
    foreign = correlator.foreign - foreign
    after = row_of_sender(climb, stats)
    again = await _by_id(climb, older.record)

    growth = {
        name: getattr(after, name) - getattr(before, name)
        for name in (*growth_of(before, after), "unread", "damaged")
    }
    expect(sum(growth.values()), BURST, "accepted and dropped records, by STATS")
    expect(drained.sequence - start.sequence, BURST, "records of the stream, by logd")
    accounts = drained.accepted + drained.refused + drained.overwritten
    expect(accounts, drained.sequence, "what became of the stream's records")
    expect(again.text, older.text, "an older record of another sender")
    expect(foreign, 1, "foreign answers counted")
    return {
        "sent": BURST,
        "growth": growth,
        "drained": [drained.accepted, drained.refused, drained.overwritten, drained.sequence],
        "before": [start.accepted, start.refused, start.overwritten, start.sequence],
        "totals": [stats.total, stats.dropped, stats.used_records],
        "foreign": foreign,
        "older": [older.record, f"{older.service:016x}", again.record, f"{again.service:016x}"],
    }


def _put_one(climb: Climb, number: int) -> None:
    """One record of the burst: of some the fields claim an identity, or are too large."""
    ring = climb.ring
    if number % REFUSED_EVERY == 0:
        ring.put(f"burst {number}", CLAIM.key, CLAIM.value)
    elif number % REFUSED_EVERY == 1:
        ring.put(f"burst {number}", "fill", "x" * FIELDS_SIZE_MAX)
    else:
        ring.put(f"burst {number}", "number", str(number))


async def _drained(climb: Climb, sequence: int) -> Drained:
    """Ring the doorbell until logd has accounted for so many records of the stream."""
    budget = RetryBudget(
        attempts_max=DRAIN_POLLS_MAX, backoff=DRAIN_PAUSE, deadline=await climb.ahead(CALL_WAIT)
    )
    return await retry_until(
        lambda: climb.call(climb.client("logd"), Drain()),
        lambda seen: seen.sequence < sequence,
        budget,
        RetryTokens(),
    )


async def _probed(climb: Climb, *, forged: bool = False) -> Stats:
    """STATS by a reply capability that moves along, into the shared inbox; with `forged` an
    answer of demo.testsvc's to this very nonce waits there already, and says zero everywhere."""
    peers, logd = climb.peers, climb.client("logd")
    placing: Started[Placed] | None = None
    if forged:
        # The Place itself takes the next nonce, and the question the one after that.
        nonce = peers.caller.correlator.nonces.take() + 2
        header = LOGD.codecs[GetStats].prefix + ECHO.pack(nonce, 0, bytes(24))
        numbers: Any = dict.fromkeys(Stats.__struct_fields__, 0)
        nothing = Stats(**{**numbers, "rows": []})
        frame = bytes(answer(header, ReplyStatus.OK, encode(nothing)))
        queued = (await TaskStats()).queued
        placing = await climb.testsvc.start(Place([frame]), await climb.ahead(CALL_WAIT))
        budget = RetryBudget(
            attempts_max=DRAIN_POLLS_MAX, backoff=DRAIN_PAUSE, deadline=await climb.ahead(CALL_WAIT)
        )
        _ = await retry_until(
            _counters, lambda seen: seen.queued < queued + PLACED, budget, RetryTokens()
        )
    inbox = await peers.inbox()
    way = await LinkCreate(inbox, PROBE_TERMS)
    assert way.link is not None, "the inbox is ours"
    peer = Peer(
        logd.name,
        slot=logd.peer.slot,
        inbox=inbox,
        link=way.link,
        service=logd.peer.service,
        generation=logd.peer.generation,
        terms=PROBE_TERMS,
        reply_terms=PROBE_TERMS,
    )
    stats = await climb.moved(Exchange(peers.caller, LOGD, peer), GetStats(), way.slot)
    await climb.see_gone(inbox, way.link)
    if placing is not None:
        placed = await climb.finish(climb.testsvc, placing)
        expect((placed.sent, placed.refused), (1, 0), "forged answers in the inbox")
    return expect_type(stats, Stats, "STATS over a moved way back")


async def _counters() -> TaskCounters:
    return await TaskStats()


async def _oldest_of_others(climb: Climb) -> Record:
    """The first record that is kept of another sender."""
    found, _ = await pages(climb)
    others = [record for record in found if record.service != climb.boot.service]
    require(bool(others), "nobody else has a record")
    return others[0]


async def _by_id(climb: Climb, number: int) -> Record:
    page = await climb.call(climb.client("logd"), page_from(climb, number, count=1))
    expect([record.record for record in page.records], [number], "the record, by its id")
    return page.records[0]


async def core_services(climb: Climb) -> Evidence:
    """#118: three services write a probe each, under their own ids, and each total is one more."""
    found: dict[str, Any] = {}
    for name in PROBED:
        budget = RetryBudget(
            attempts_max=PROBE_TRIES_MAX,
            backoff=DRAIN_PAUSE,
            deadline=await climb.ahead(BURSTS_WAIT),
        )
        seen = await retry_until(
            lambda: _probe_of(climb, name),  # noqa: B023 (called before the next turn)
            lambda seen: (
                seen["growth"] != 1
            ),  # and it had something else to say, as one that is slow
            budget,
            RetryTokens(),
        )
        expect(seen["growth"], 1, f"growth of {name}'s total")
        expect(seen["service"], f"{service_id(name):016x}", f"sender of {name}'s probe")
        found[name] = seen
    return {"probes": found}


async def _probe_of(climb: Climb, name: str) -> dict[str, Any]:
    """Ask a service for one record with a fresh token, and find it."""
    client = climb.client(name)
    token = f"probe.{climb.boot.pid}.{await climb.ahead(Nanos(0))}"
    _ = await find(climb, "token", token)  # what this search makes others say is said now
    before = row_of_sender(climb, await journal_stats(climb), name)
    await ask_for_probe(climb, client, token)
    budget = RetryBudget(
        attempts_max=DRAIN_POLLS_MAX, backoff=DRAIN_PAUSE, deadline=await climb.ahead(CALL_WAIT)
    )
    records = await retry_until(
        lambda: find(climb, "token", token), lambda seen: not seen, budget, RetryTokens()
    )
    after = row_of_sender(climb, await journal_stats(climb), name)
    expect(len(records), 1, f"records with {name}'s token")
    (record,) = records
    return {
        "token": token,
        "record": record.record,
        "service": f"{record.service:016x}",
        "pid": record.pid,
        "generation": record.generation,
        "growth": after.accepted - before.accepted,
    }


async def ask_for_probe(climb: Climb, client: Client, token: str) -> None:
    """The service writes a record with this token into its own log."""
    _ = await climb.call(client, LogProbe(token))

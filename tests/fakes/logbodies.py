"""What clients of logd do on every kernel; each asserts in its own task and returns what it saw."""

from typing import Any

from nexus.abi import CapClose, LinkCreate, LinkTerms, Now, SleepUntil, Slot, TaskStats, service_id
from nexus.ipc import Refused
from nexus.log import Logger
from nexus.protocols.logd import (
    RATE_MAX,
    RATE_WINDOW_NS,
    TEXT_SIZE_MAX,
    Append,
    Appended,
    Field,
    Level,
    LogdStatus,
    SenderRow,
    Stats,
)
from tests.fakes.adder import ADDER, Add, Sum
from tests.fakes.logroot import MS, READER, SECOND, Task, ahead

SINK_TERMS = LinkTerms(8, 4096, 1)  # of a reply link that a sink is derived from
BURST = 40  # records in one window; more than RATE_MAX


def line(text: str = "burst", *fields: Field) -> Append:
    return Append(Level.INFO, "client", text, list(fields))


def row(stats: Stats, name: str = READER) -> SenderRow:
    rows = [each for each in stats.rows if each.service == service_id(name)]
    return rows[0] if rows else no_row(name)


def no_row(name: str) -> SenderRow:
    """The row of a sender that was never heard."""
    return SenderRow(service_id(name), *[0] * (len(SenderRow.__struct_fields__) - 1))


async def three_lines(task: Task) -> None:
    """Another sender, before the reader starts."""
    for text in ("one", "two", "three"):
        task.log.info("line", word=text)
    await task.settle()
    assert task.log.counts().acknowledged == 3, task.log.counts()


async def stats_probe(task: Task) -> Any:
    """STATS by moved reply capability, next to a forged zero and to an answer not yet taken."""
    logd = await task.client()
    mallory = await task.client("mallory", ADDER)
    _ = await task.ask(logd, line("the first"))
    waiting = await mallory.start(Add(20, 22), await ahead(5 * SECOND))
    before = await task.stats(logd)
    await task.have_sent("mallory", await task.forged_stats())
    again = await task.stats(logd)
    _ = await SleepUntil(await ahead(RATE_WINDOW_NS))
    outcomes = []
    for number in range(BURST):
        outcomes.append(await task.ask(logd, line()))
        if number % 4 == 0:
            outcomes.append(await task.ask(logd, line("claim", Field("sender", "0x1"))))
            outcomes.append(await task.ask(logd, line("x" * (TEXT_SIZE_MAX + 1))))
    await task.have_sent("mallory", await task.forged_stats())
    after = await task.stats(logd)

    assert again.total == before.total, "the forged zero was not taken for the answer"
    assert await mallory.finish(waiting) == Sum(42), "the answer that waited was not stolen"
    readings = (before.total, before.used_records, before.used_size, before.capacity_records)
    assert all(readings), readings
    was, now = row(before), row(after)
    sent = {
        "accepted": len([each for each in outcomes if not isinstance(each, Refused)]),
        "invalid_args": outcomes.count(Refused(LogdStatus.INVALID_ARGS)),
        "over_limit": outcomes.count(Refused(LogdStatus.OVER_LIMIT)),
        "rate_limited": outcomes.count(Refused(LogdStatus.RATE_LIMITED)),
    }
    counted = {name: getattr(now, name) - getattr(was, name) for name in sent}
    assert counted == sent
    assert sum(sent.values()) == len(outcomes)
    assert after.total - before.total == sent["accepted"]
    assert after.total == after.used_records + after.dropped
    assert all(each.accepted >= each.overwritten for each in after.rows)
    others = [
        each.fields[0].value
        for each in await task.records(logd)
        if each.service == service_id("other")
    ]
    foreign = task.peers.caller.correlator.foreign
    return {"sent": sent, "others": others, "foreign": foreign}


async def sinks(task: Task) -> Any:
    """Lines over configured slots and over routes; refused ones store nothing; no slot leaks."""
    logd = await task.client()
    inbox = await task.peers.inbox()
    reply = await LinkCreate(inbox, SINK_TERMS)
    used = await _slots()
    known = len(task.peers.caller.correlator.peers)
    log = Logger(task.peers, scope="sink")
    empty = Slot(90)
    refused = [
        await log.configure_sink_logd_slots(*slots)
        for slots in (
            (empty, reply.slot, inbox),
            (logd.peer.slot, empty, inbox),
            (logd.peer.slot, reply.slot, empty),
            (inbox, reply.slot, inbox),
            (logd.peer.slot, inbox, inbox),
            (logd.peer.slot, reply.slot, reply.slot),
            (logd.peer.slot, logd.peer.slot, inbox),
        )
    ]
    log.info("nothing is stored")
    nothing = log.counts().lost_unreachable
    after_refusals = await _slots()
    taken = await log.configure_sink_logd_slots(logd.peer.slot, reply.slot, inbox)
    for number in range(10):
        log.info("over slots", number=number)
        await log.flush()
    await task.settle(log)
    after_lines = await _slots()
    await log.close()
    assert len(task.peers.caller.correlator.peers) == known, "no way back is expected any more"
    task.log.info("over routes")
    await task.settle()
    during = await _slots()
    await task.log.close()
    after_close = await _slots()
    found = [each.text for each in await task.records(logd) if each.scope in ("sink", READER)]
    await CapClose(reply.slot)

    assert logd.rebinds == 0, "the slots' owner keeps his own way back"
    assert (after_refusals, after_lines, after_close) == (used, used, used)
    assert during == used + 2, "the routed link and the ring, while they are used"
    return {
        "refused": refused,
        "nothing": nothing,
        "taken": taken,
        "acknowledged": [log.counts().acknowledged, task.log.counts().acknowledged],
        "found": found,
    }


async def _slots() -> int:
    return (await TaskStats()).slots


async def restarts(task: Task) -> Any:
    """logd is killed and started again, with lines in flight: each is counted, none leaks."""
    log = task.log
    log.info("before")
    await task.settle()
    used = await _slots()
    links = (await TaskStats()).links
    for number in range(4):
        log.info("in flight", number=number)
        await log.flush()
        await task.restart_logd()
        log.info("after", number=number)
        await task.settle()
        await task.pause(5 * MS)
    counts = log.counts()
    logd = await task.client()
    texts = [(each.text, each.fields[0].value) for each in await task.records(logd)]
    await task.peers.discard(logd.peer)
    after = await TaskStats()

    assert counts.written == counts.acknowledged + counts.lost_unknown == 9, counts
    assert counts.bound == 5, counts
    assert after.slots == used
    assert after.links <= links + 1, "the end of the discarded link may still be on its way"
    return {"texts": texts, "waiting": counts.waiting + counts.outstanding}


async def slots_then_routes(task: Task) -> Any:
    """Configured slots serve until their logd is gone; then routing is what is left."""
    logd = await task.client()
    inbox = await task.peers.inbox()
    reply = await LinkCreate(inbox, SINK_TERMS)
    log = task.log
    taken = await log.configure_sink_logd_slots(logd.peer.slot, reply.slot, inbox)
    log.info("over slots")
    await task.settle()
    used = await _slots()
    await task.restart_logd()
    stale = await log.configure_sink_logd_slots(logd.peer.slot, reply.slot, inbox)
    log.info("over routes")
    await task.settle()
    assert await _slots() == used + 2, "the routed link and the ring; the way back is closed"
    counts = log.counts()
    again = await task.client()
    return {
        "taken": [taken, stale],
        "acknowledged": counts.acknowledged,
        "bound": counts.bound,
        "found": [each.text for each in await task.records(again)],
    }


async def flood(task: Task) -> Any:
    """One sender as fast as it can, for two windows; the ring holds a little more than one."""
    logd = await task.client()
    kept = []
    for _ in range(2):
        for _ in range(3 * RATE_MAX):
            _ = await task.ask(logd, line())
        theirs = [each for each in await task.records(logd) if each.service == service_id("other")]
        kept.append(len(theirs))
        _ = await SleepUntil(await ahead(RATE_WINDOW_NS))
    stats = await task.stats(logd)
    mine, other = row(stats), row(stats, "other")
    assert mine.accepted + mine.rate_limited == 6 * RATE_MAX
    assert mine.accepted == stats.used_records - kept[-1] + mine.overwritten
    return {"kept": kept, "other": [other.accepted, other.overwritten], "dropped": stats.dropped}


FLOOD = 1_000_000  # lines of one task, as fast as it can
FLOOD_FLUSH = 1000  # lines between two flushes, as a busy service's loop would
CALM_CALLS = 100  # of the task beside the flood
CALM_PAUSE = 20 * MS
CALM_MAX = 250 * MS  # what a call to logd may take during the flood, usually
CALM_WORST = 5 * SECOND  # and at worst, on a machine with other work


async def ring_flood(task: Task) -> Any:
    """A million lines into the own ring; what became of each, by both accounts."""
    log = task.log
    await log.begin()
    for number in range(FLOOD):
        log.info("flood", number=number)
        if number % FLOOD_FLUSH == 0:
            await log.flush()
    await task.settle()
    counts = log.counts()
    logd = await task.client()
    stats = await task.stats(logd)
    mine = row(stats)
    kept = await task.records(logd)
    assert counts.waiting == counts.outstanding == 0, counts
    return {
        "sent": counts.written,
        "ours": [counts.acknowledged, counts.refused, counts.lost_overwritten],
        "theirs": [mine.accepted, mine.invalid_args + mine.over_limit + mine.damaged, mine.unread],
        "others": [each.fields[0].value for each in kept if each.service == service_id("other")],
        "last": [each.fields[0].value for each in kept if each.text == "flood"][-1:],
        "used": [stats.used_records <= stats.capacity_records, stats.used_size],
        "capacity": stats.capacity_size,
        "total": [stats.total, stats.used_records + stats.dropped],
    }


async def calm(task: Task) -> None:
    """Somebody else, while the flood is on: each record is taken, each call in time."""
    logd = await task.client()
    took = []
    for number in range(CALM_CALLS):
        began = await Now()
        outcome = await logd.call(line(f"calm {number}"), await ahead(CALM_WORST))
        assert isinstance(outcome, Appended), outcome
        took.append(await Now() - began)
        await task.pause(CALM_PAUSE + SECOND // RATE_MAX)
    assert sorted(took)[CALM_CALLS * 9 // 10] < CALM_MAX, "nine of ten"

"""Rungs about calls: correlation, death, floods, strict decoding, and the library's own loop."""

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from nexus.abi import (
    CapClone,
    CapClose,
    EndpointClose,
    EndpointCreate,
    LinkCreate,
    LinkTerms,
    Nanos,
    Now,
    Recv,
    Send,
    TaskCounters,
    TaskStats,
)
from nexus.ipc import (
    Client,
    Exchange,
    MismatchBudgetExceeded,
    Peer,
    RetryBudget,
    RetryTokens,
    Started,
    TimedOut,
    Unknown,
    retry_until,
)
from nexus.protocols.execd import PROTOCOL as EXECD
from nexus.protocols.execd import GetPrograms
from nexus.protocols.interactive import PROTOCOL as INTERACTIVE
from nexus.protocols.interactive import HoldAt, RegisterFor
from nexus.protocols.keystored import PROTOCOL as KEYSTORED
from nexus.protocols.keystored import Get as GetKey
from nexus.protocols.logd import EVERY_RECORD, Query
from nexus.protocols.logd import PROTOCOL as LOGD
from nexus.protocols.meta import PROTOCOL as META
from nexus.protocols.meta import Bind, Configure, GetStatus, Health, Healthy, ServiceStatus
from nexus.protocols.metricsd import PROTOCOL as METRICSD
from nexus.protocols.metricsd import GetSeries
from nexus.protocols.policyd import PROTOCOL as POLICYD
from nexus.protocols.policyd import CheckFor
from nexus.protocols.rngd import PROTOCOL as RNGD
from nexus.protocols.rngd import GetEntropy
from nexus.protocols.statefsd import PROTOCOL as STATEFSD
from nexus.protocols.statefsd import GetCalls
from nexus.protocols.testsvc import PROTOCOL as TESTSVC
from nexus.protocols.testsvc import (
    Echo,
    Echoed,
    FillLink,
    FloodTimed,
    Hold,
    Place,
    Release,
    Released,
)
from nexus.protocols.timed import PROTOCOL as TIMED
from nexus.protocols.timed import Register, Seen, Sleep, Whoami
from nexus.protocols.updated import PROTOCOL as UPDATED
from nexus.protocols.updated import GetReasons
from nexus.runtime import Call, Server
from nexus.services.selftest.climb import CALL_WAIT, Climb
from nexus.services.selftest.end_rungs import state_of
from nexus.services.selftest.rung import (
    Evidence,
    RungFailed,
    expect,
    expect_type,
    require,
)
from nexus.wire import (
    FRAME_KIND,
    HEADER,
    HEADER_SIZE,
    REPLY_BIT,
    Codec,
    ReplyStatus,
    Request,
    encode,
    nonce_of,
    status_of,
)

if TYPE_CHECKING:
    from nexus.wire import Protocol

LOOPBACK_DATA: Final = b"there and back"
SLEEP_AHEAD: Final = Nanos(60_000_000)  # ns; long enough for the strays to be queued before
SHORT_WAIT: Final = Nanos(150_000_000)  # ns; for an answer that was thrown away
ROUND: Final = 8  # calls in flight at a time; a reply link holds as many answers
BUFFERED: Final = 16  # answers the library keeps for others
HOLD_FIRST: Final = 1
HOLD_LAST: Final = 99
DEATH_HOLD: Final = 7
MISMATCHES: Final = 65  # one more than the budget of a call
DEATH_WAIT: Final = Nanos(5_000_000_000)  # ns; ladder #68
DEATH_NOTICED_MAX: Final = Nanos(100_000_000)  # ns; ladder #68
HELD_POLLS_MAX: Final = 10  # with doubling pauses: 1 ms to 0.5 s
HELD_PAUSE: Final = Nanos(1_000_000)  # ns
FLOODS_MAX: Final = 3  # timed has two posts of its own, whose links it opens when it gets to it
FLOODS_WAIT: Final = Nanos(20_000_000_000)  # ns; each takes FLOOD_MS
FLOOD_PAUSE: Final = Nanos(10_000_000)  # ns
FLOOD_MS: Final = 1_000  # ladder #72
FLOOD_WARM_UP_MS: Final = 1
FLOOD_CALLS: Final = 200
FLOOD_CALL_WAIT: Final = Nanos(50_000_000)  # ns
LINK_TERMS: Final = LinkTerms(8, 16 * 1024, 0)
SMALL_MESSAGE: Final = 64  # bytes
LARGE_MESSAGE: Final = 8_000  # bytes; two fit 16 KiB, three do not
RAW_NONCE: Final = (1 << 61) + 1000  # no call of this run reaches it
FAR: Final = 1 << 62  # nor this


class LoopbackEcho:
    """The server end of #58: what it saw of the request."""

    def __init__(self) -> None:
        self.deadline = Nanos(0)

    def handle(self, call: Call, request: Any) -> Any:
        """Echo, and remember the deadline."""
        self.deadline = call.deadline
        assert isinstance(request, Echo), "nobody else has a link to this endpoint"
        return Echoed(request.data)


async def loopback(climb: Climb) -> Evidence:
    """#58: the library's client and server over an endpoint of our own."""
    before = (await TaskStats()).endpoints
    boot = climb.boot
    endpoint = await EndpointCreate()
    link = await LinkCreate(endpoint, LINK_TERMS)
    inbox = await climb.peers.inbox()
    way = await LinkCreate(inbox, LINK_TERMS)
    assert way.link is not None, "the inbox is ours"
    peer = Peer(
        "loopback",
        slot=link.slot,
        inbox=inbox,
        link=way.link,
        service=boot.service,
        generation=boot.generation,
        terms=LINK_TERMS,
        reply_terms=LINK_TERMS,
    )
    exchange = Exchange(climb.peers.caller, TESTSVC, peer)
    echo = LoopbackEcho()
    server = Server(echo, TESTSVC, replace(boot, endpoint=endpoint))
    deadline = await climb.ahead(CALL_WAIT)

    bind = await exchange.start(Bind(), deadline, move=way.slot)
    bound = await server.step(deadline)
    _ = await climb.finish(exchange, bind)
    started = await exchange.start(Echo(LOOPBACK_DATA), deadline)
    served = await server.step(deadline)
    reply = await climb.finish(exchange, started)
    await CapClose(link.slot)
    let_go = await server.step(await climb.ahead(Nanos(0)))
    await EndpointClose(endpoint)
    await climb.see_gone(inbox, way.link)
    after = (await TaskStats()).endpoints

    expect((bound, served, let_go), (True, True, False), "messages the server took")
    expect(reply, Echoed(LOOPBACK_DATA), "reply, matched by its nonce")
    expect(echo.deadline, deadline, "deadline the server saw")
    expect(after, before, "live endpoints")
    return {"deadline": deadline, "nonce": started.pending.nonce, "endpoints": after}


# ------------------------------------------------------------------ correlation


def _reply_frame(codec: Codec, nonce: int) -> bytes:
    """A reply to `nonce` that looks right and has no body."""
    _, version, op, _, number, _ = HEADER.unpack(
        codec.prefix + bytes(HEADER_SIZE - len(codec.prefix))
    )[:6]
    return HEADER.pack(
        FRAME_KIND, version, op | REPLY_BIT, 0, number, 0, nonce, 0, bytes(16), bytes(8)
    )


async def nonce_mismatch_counted(climb: Climb) -> Evidence:
    """#69: stale, duplicate and foreign replies are counted and never taken for the answer."""
    testsvc, timed = climb.testsvc, climb.timed
    correlator = climb.peers.caller.correlator
    deadline = await climb.ahead(CALL_WAIT)

    order = await _answered_in_reverse(climb)

    before = (correlator.stale, correlator.duplicate, correlator.foreign)
    answered = await testsvc.start(Echo(b"answered"), deadline)
    _ = await climb.finish(testsvc, answered)
    asleep = await timed.start(Sleep(await climb.ahead(SLEEP_AHEAD)), deadline)
    strays = [
        _reply_frame(TESTSVC.codecs[Echo], FAR),
        _reply_frame(TESTSVC.codecs[Echo], answered.pending.nonce),
        _reply_frame(TIMED.codecs[Sleep], asleep.pending.nonce),
    ]
    placing = await testsvc.start(Place(strays), deadline)
    woken = await climb.finish(timed, asleep)
    placed = await climb.finish(testsvc, placing)
    after = (correlator.stale, correlator.duplicate, correlator.foreign)
    counted = tuple(new - old for new, old in zip(after, before, strict=True))

    dropped = await _overflow(climb)
    exceeded = await _exceed(climb)

    expect(order, [2, 1], "order of the answers")
    expect(placed.sent, len(strays), "strays placed")
    require(woken.now >= woken.deadline, "the true answer was taken")
    expect(counted, (1, 1, 1), "stale, duplicate and foreign replies counted")
    expect(dropped, 2, "answers the bounded buffer dropped")
    expect(exceeded, MismatchBudgetExceeded(), f"{MISMATCHES} mismatches")
    return {"counted": list(counted), "dropped": dropped, "mismatches": MISMATCHES}


async def _answered_in_reverse(climb: Climb) -> list[int]:
    """Two calls whose answers come in the other order; both must end well."""
    testsvc = climb.testsvc
    deadline = await climb.ahead(CALL_WAIT)
    first = await testsvc.start(Hold(HOLD_FIRST), deadline)
    second = await testsvc.start(Hold(HOLD_FIRST + 1), deadline)
    order = [HOLD_FIRST + 1, HOLD_FIRST]
    release = await testsvc.start(Release(order), deadline)
    expect(await climb.finish(testsvc, first), Released(1), "first call")
    expect(await climb.finish(testsvc, second), Released(1), "second call")
    expect(await climb.finish(testsvc, release), Released(2), "release")
    return order


async def _overflow(climb: Climb) -> int:
    """More answers than the buffer holds; how many it dropped."""
    testsvc, timed = climb.testsvc, climb.timed
    buffer = climb.peers.caller.correlator.buffer
    before = buffer.drops
    started: list[Started[Echoed]] = []
    for count in (ROUND, ROUND, BUFFERED + 2 - 2 * ROUND):
        deadline = await climb.ahead(SHORT_WAIT)
        started += [await testsvc.start(Echo(b"kept"), deadline) for _ in range(count)]
        asleep = await timed.start(Sleep(await climb.ahead(SLEEP_AHEAD)), deadline)
        _ = await climb.finish(timed, asleep)
    outcomes = [await testsvc.finish(each) for each in started]
    lost = sum(isinstance(outcome, TimedOut) for outcome in outcomes)
    expect(sum(isinstance(outcome, Echoed) for outcome in outcomes), BUFFERED, "answers kept")
    dropped = buffer.drops - before
    expect(lost, dropped, "answers lost against answers counted")
    return dropped


async def _exceed(climb: Climb) -> object:
    """A call to which only strays come."""
    testsvc = climb.testsvc
    deadline = await climb.ahead(CALL_WAIT)
    held = await testsvc.start(Hold(HOLD_LAST), deadline)
    strays = [_reply_frame(TESTSVC.codecs[Echo], FAR + index) for index in range(MISMATCHES)]
    correlator = climb.peers.caller.correlator
    before = correlator.stale
    placing = await testsvc.start(Place(strays), deadline)
    outcome = await testsvc.finish(held)
    expect(correlator.stale - before, MISMATCHES, "strays counted")
    testsvc.forget(placing)  # its answer is lost if the strays still fill the link
    expect(await climb.call(testsvc, Release([HOLD_LAST])), Released(1), "release")
    return outcome


# ------------------------------------------------------------------ death and floods


async def peer_death_wakes(climb: Climb) -> Evidence:
    """#68: two tasks wait on demo.testsvc when it is killed; both learn it at once."""
    testsvc, interactive = climb.testsvc, climb.client("demo.interactive")
    deadline = await climb.ahead(DEATH_WAIT)
    generation = testsvc.generation
    link = await CapClone(testsvc.peer.slot)
    other = await interactive.start(HoldAt(DEATH_HOLD + 1), deadline, move=link)
    mine = await testsvc.start(Hold(DEATH_HOLD), deadline)
    await _held(climb, 2)
    before = await _queued()
    unread = await testsvc.start(Echo(b"sent before the death"), deadline)
    await _answer_queued(before)

    killed = await climb.restart("demo.testsvc")
    first = await testsvc.finish(unread)
    outcome = await testsvc.finish(mine)
    noticed = await climb.ahead(Nanos(0))
    seen = await climb.finish(interactive, other)
    record = await climb.up_again("demo.testsvc", generation + 1)
    links = [row for row in await climb.links() if row.server == "demo.testsvc"]

    expect(killed.generation, generation, "generation of the killed instance")
    expect(first, Echoed(b"sent before the death"), "what it had sent")
    expect(outcome, Unknown(), "our wait")
    expect(seen.cut_off, True, "the other task's wait")
    expect(record.exit_signal, 9, "signal in init's record")
    mine_after, other_after = noticed - record.died, seen.noticed - record.died
    for name, after in (("our", mine_after), ("the other task's", other_after)):
        require(after <= DEATH_NOTICED_MAX, f"{name} wait ended {after} ns after the death")
    expect([row.taken for row in links], [0], "links of the dead instance")
    _ = await climb.call(testsvc, Echo(b"again"))
    return {"after_ns": [mine_after, other_after], "died": record.died, "pid": killed.pid}


async def _held(climb: Climb, count: int) -> None:
    """demo.testsvc holds that many answers: both waits have begun."""
    budget = RetryBudget(
        attempts_max=HELD_POLLS_MAX, backoff=HELD_PAUSE, deadline=await climb.ahead(CALL_WAIT)
    )
    held = await retry_until(
        lambda: _answers_held(climb), lambda seen: seen != count, budget, RetryTokens()
    )
    expect(held, count, "answers held when the peer is killed")


async def _answer_queued(before: int) -> None:
    """One message more waits unread here: the answer was sent, and not received."""
    budget = RetryBudget(
        attempts_max=HELD_POLLS_MAX,
        backoff=HELD_PAUSE,
        deadline=Nanos(await Now() + CALL_WAIT),
    )
    queued = await retry_until(_queued, lambda seen: seen == before, budget, RetryTokens())
    expect(queued, before + 1, "messages queued unread when the peer is killed")


async def _queued() -> int:
    return (await TaskStats()).queued


async def _answers_held(climb: Climb) -> int:
    facts = {fact.name: fact.value for fact in (await climb.status(climb.testsvc)).facts}
    return facts["held"]


async def flood_isolation(climb: Climb) -> Evidence:
    """#72: a flooding client meets the bounds of its own link and costs nobody a deadline."""
    by_count = await _fill(climb, SMALL_MESSAGE)
    by_size = await _fill(climb, LARGE_MESSAGE)
    warm_up = FloodTimed(FLOOD_WARM_UP_MS)  # demo.testsvc finds the present instance of timed
    _ = await climb.call(climb.testsvc, warm_up)
    # timed may open a link of its own meanwhile, or the host be busy; what a flood does to others
    # it does each time.
    budget = RetryBudget(
        attempts_max=FLOODS_MAX, backoff=FLOOD_PAUSE, deadline=await climb.ahead(FLOODS_WAIT)
    )
    flood = await retry_until(
        lambda: _flood(climb), lambda found: not found.is_alone, budget, RetryTokens()
    )

    for index, outcome in enumerate(flood.seen):
        _ = expect_type(outcome, Seen, f"call {index} during the flood")
    expect(by_count, (8, 1, 0), "sent, QueueFull, NoSpace of a link nobody reads, small messages")
    expect(by_size, (2, 0, 1), "sent, QueueFull, NoSpace of a link nobody reads, large messages")
    expect(
        flood.after.reserved_size,
        flood.before.reserved_size,
        "timed's reservations after the flood",
    )
    expect(
        flood.after.budget_used, flood.before.budget_used, "timed's object account after the flood"
    )
    return flood.evidence


class Flood(NamedTuple):
    """timed's counters before a flood and after it, and what our calls met."""

    before: TaskCounters
    after: TaskCounters
    seen: list[object]
    evidence: Evidence

    @property
    def is_alone(self) -> bool:
        """Whether every call was answered, and timed has reserved nothing else meanwhile."""
        answered = all(isinstance(outcome, Seen) for outcome in self.seen)
        return answered and self.before.reserved_size == self.after.reserved_size


async def _flood(climb: Climb) -> Flood:
    testsvc, timed = climb.testsvc, climb.timed
    before = TaskCounters._make((await climb.status(timed)).counters)

    flood = await testsvc.start(
        FloodTimed(FLOOD_MS), await climb.ahead(Nanos(10 * FLOOD_MS * 1_000_000))
    )
    seen: list[object] = []
    worst = 0
    for index in range(FLOOD_CALLS):
        start = await climb.ahead(Nanos(0))
        seen.append(await timed.call(Whoami(index, ""), Nanos(start + FLOOD_CALL_WAIT)))
        worst = max(worst, await climb.ahead(Nanos(0)) - start)
        if not isinstance(seen[-1], Seen):
            break
    during = await timed.call(GetStatus(), await climb.ahead(CALL_WAIT))
    report = await climb.finish(testsvc, flood)
    after = TaskCounters._make((await climb.status(timed)).counters)

    held = TaskCounters._make(expect_type(during, ServiceStatus, "status in the flood").counters)
    require(report.sent > FLOOD_CALLS, f"the flood got only {report.sent} messages in")
    require(report.queue_full > 0, "the flood never met QueueFull")
    require(held.queued_size <= held.reserved_size, "timed's queued bytes exceed its budget")
    require(held.budget_used <= held.budget_total, "timed's objects exceed its budget")
    evidence: Evidence = {
        "flood": {"sent": report.sent, "queue_full": report.queue_full},
        "worst_call_ns": worst,
        "queued_size": held.queued_size,
    }
    return Flood(before, after, seen, evidence)


async def _fill(climb: Climb, size: int) -> tuple[int, int, int]:
    """What demo.testsvc meets on a link of timed's terms into an endpoint nobody reads."""
    endpoint = await EndpointCreate()
    link = await LinkCreate(endpoint, LINK_TERMS)
    report = await climb.moved(climb.testsvc, FillLink(size), link.slot)
    await EndpointClose(endpoint)
    return report.sent, report.queue_full, report.no_space


# ------------------------------------------------------------------ strict decoding


SAMPLES: Final[dict[str, Request[Any]]] = {
    "timed": Register(1),
    "demo.testsvc": Hold(1),
    "demo.interactive": RegisterFor(1),
    "policyd": CheckFor(1, "proof.probe", ""),
    "logd": Query(1, 1, 1, EVERY_RECORD),
    "rngd": GetEntropy(1),
    "statefsd": GetCalls(1, 1),
    "keystored": GetKey(b"x"),
    "metricsd": GetSeries(1, 1, 0, ""),
    "execd": GetPrograms(1),
    "updated": GetReasons(1),
    "exportd": Configure(b"x"),
}
"""A request of each service whose first field is an unsigned integer, here 1: one byte; or of
keystored, whose requests have none, one byte as bytes. exportd's own have no field at all: it gets
one that the runtime of every service takes."""


def _bad_bodies(good: bytes) -> dict[str, bytes]:
    """Four wrong bodies made from the right one. The first field's oversize value is -1, or more
    bytes than any field takes; of bytes it is the length that is not minimal."""
    array = good[:1]
    if good[1] == BIN8:
        longer = array + b"\xc5\x00" + good[2:]
        oversize = array + b"\xc5" + OVERSIZE.to_bytes(2, "big") + bytes(OVERSIZE)
    else:
        longer = array + b"\xcc\x01" + good[2:]
        oversize = array + b"\xd3" + b"\xff" * 8 + good[2:]
    return {
        "trailing byte": good + b"\x00",
        "extra element": bytes((good[0] + 1,)) + good[1:] + b"\x01",
        "non-minimal integer": longer,
        "oversize field": oversize,
    }


OVERSIZE: Final = 5000  # bytes
BIN8: Final = 0xC4  # MessagePack: up to 255 bytes follow a length of one byte


async def strict_decode(climb: Climb) -> Evidence:
    """#73: six malformed frames to each service; each is answered, counted, and changes nothing."""
    protocols: dict[str, Protocol] = {
        "timed": TIMED,
        "demo.testsvc": TESTSVC,
        "demo.interactive": INTERACTIVE,
        "policyd": POLICYD,
        "logd": LOGD,
        "rngd": RNGD,
        "statefsd": STATEFSD,
        "keystored": KEYSTORED,
        "metricsd": METRICSD,
        "execd": EXECD,
        "updated": UPDATED,
        "exportd": META,
    }
    answers: dict[str, list[str]] = {}
    for name, client in climb.clients.items():
        before = await climb.status(client)
        answers[name] = await _send_malformed(climb, client, protocols[name])
        after = await climb.status(client)
        health = await climb.call(client, Health())

        expect(after.malformed - before.malformed, 6, f"{name}'s malformed counter")
        expect(state_of(after.facts), state_of(before.facts), f"{name}'s state")
        expect(expect_type(health, Healthy, name).generation, client.generation, "health probe")
    return {"answers": answers}


async def _send_malformed(climb: Climb, client: Client, protocol: "Protocol") -> list[str]:
    """The statuses of the six answers, each with the nonce of its frame."""
    request = SAMPLES[client.name]
    good = encode(request)
    codec = protocol.codecs[type(request)]
    deadline = await climb.ahead(CALL_WAIT)

    def frame(nonce: int, body: bytes, *, version: int = protocol.version) -> bytes:
        return (
            HEADER.pack(
                FRAME_KIND,
                version,
                codec.op,
                0,
                protocol.number,
                0,
                nonce,
                deadline,
                climb.peers.caller.spans.root.trace,
                climb.peers.caller.spans.root.span,
            )
            + body
        )

    frames = {
        "unknown version": frame(RAW_NONCE, good, version=0xFE),
        "short header": frame(RAW_NONCE + 1, b"")[: HEADER_SIZE - 8],
    }
    for index, (what, body) in enumerate(_bad_bodies(good).items(), start=2):
        frames[what] = frame(RAW_NONCE + index, body)
    statuses = []
    for index, (what, data) in enumerate(frames.items()):
        await Send(client.peer.slot, data, deadline=deadline)
        reply = await Recv((client.peer.inbox,), deadline, link=client.peer.link)
        expect(nonce_of(reply.data), RAW_NONCE + index, f"nonce of the answer to: {what}")
        wanted = ReplyStatus.UNSUPPORTED if what == "unknown version" else ReplyStatus.MALFORMED
        if status_of(reply.data) != wanted:
            raise RungFailed(f"{client.name}, {what}: status {status_of(reply.data)}")
        statuses.append(wanted.name)
    return statuses

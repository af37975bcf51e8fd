"""Rungs about routes: how init answers, every outcome, and what a restart does to them."""

from typing import TYPE_CHECKING, Any, Final

from nexus.abi import CapClose, LinkTerms, Nanos, Send
from nexus.ipc import (
    ROUTE_MISMATCHES,
    Closed,
    Denied,
    Exchange,
    Malformed,
    MismatchBudgetExceeded,
    NonceMismatchBudget,
    NotFound,
    Peer,
    RetryBudget,
    RetryTokens,
    Routed,
    RouteRetryOutcome,
    Stale,
    TimedOut,
    Unknown,
    Way,
    route_with_nonce_budgeted,
)
from nexus.protocols.init import PROTOCOL as INIT
from nexus.protocols.init import REPLY_NAME, InitStatus, Route, RouteCounts
from nexus.protocols.logd import PROTOCOL as LOGD
from nexus.protocols.logd import GetStats
from nexus.protocols.testsvc import PROTOCOL as TESTSVC
from nexus.protocols.testsvc import Die, Echo, SessionStep, Step
from nexus.protocols.timed import PROTOCOL as TIMED
from nexus.protocols.timed import Whoami
from nexus.services.selftest.climb import CALL_WAIT, Climb, Session
from nexus.services.selftest.rung import Evidence, expect, expect_type, require
from nexus.wire import FRAME_KIND, HEADER, REPLY_BIT

if TYPE_CHECKING:
    from nexus.wire import Protocol, Request

UNKNOWN_NAME: Final = "no.such.service"
ROUTE_ATTEMPTS_MAX: Final = 3
ROUTE_BACKOFF: Final = Nanos(5_000_000)  # ns
SHORT_WAIT: Final = Nanos(100_000_000)  # ns; for the outcome that has to wait for a deadline
LATE_MAX: Final = Nanos(100_000_000)  # ns behind a deadline; a busy host, not another attempt
ATTEMPTS: Final = 3  # of a route that stays down
FEW_MISMATCHES: Final = NonceMismatchBudget(4)
STRAYS: Final = 5  # one more than FEW_MISMATCHES allows
DIE_CODE: Final = 0  # another code would be a dirty exit of the run
FAR: Final = 1 << 62  # a nonce that no call of this run reaches


async def _route(climb: Climb, name: str) -> RouteRetryOutcome:
    budget = RetryBudget(
        attempts_max=ROUTE_ATTEMPTS_MAX,
        backoff=ROUTE_BACKOFF,
        deadline=await climb.ahead(CALL_WAIT),
    )
    return await route_with_nonce_budgeted(
        climb.control, name, budget, ROUTE_MISMATCHES, RetryTokens()
    )


async def use_once(climb: Climb, name: str, protocol: "Protocol", request: "Request[Any]") -> int:
    """Resolve `name`, bind the link, make one call, let go; the generation that answered."""
    routed = expect_type(await _route(climb, name), Routed, f"route to {name}")
    assert routed.slot is not None, "only @reply has none"
    way = Way(
        slot=routed.slot,
        protocol=protocol,
        name=name,
        service=routed.service,
        generation=routed.generation,
        terms=routed.terms,
        reply_terms=routed.reply_terms,
    )
    bound = await climb.peers.bind(way, await climb.ahead(CALL_WAIT))
    exchange = expect_type(bound, Exchange, f"bind to {name}")
    _ = await climb.call(exchange, request)
    await CapClose(routed.slot)
    await climb.see_gone(exchange.peer.inbox, exchange.peer.link)
    return routed.generation


def grown(before: RouteCounts, after: RouteCounts) -> dict[str, int]:
    """By how much each counter of init grew, those that did."""
    return {
        name: getattr(after, name) - getattr(before, name)
        for name in RouteCounts.__struct_fields__
        if getattr(after, name) != getattr(before, name)
    }


async def routing(climb: Climb) -> Evidence:
    """#56: two services by name, one's own inbox by `@reply`, and a name that is none."""
    other, protocol, request = _other_of_two(climb)
    before = await climb.route_counts()

    timed = await use_once(climb, "timed", TIMED, Whoami(0, ""))
    second = await use_once(climb, other, protocol, request)
    own = expect_type(await _route(climb, REPLY_NAME), Routed, f"route to {REPLY_NAME}")
    unknown = await _route(climb, UNKNOWN_NAME)
    counted = grown(before, await climb.route_counts())

    expect(own.slot, None, f"capability of {REPLY_NAME}")
    expect((own.service, own.generation), (climb.boot.service, climb.boot.generation), REPLY_NAME)
    expect(unknown, NotFound(), "an unknown name")
    expect(counted, {"ok": 3, "not_found": 1}, "growth of init's route counters")
    expect(timed, (await climb.task("timed")).generation, "timed's generation in init's entry")
    expect(second, (await climb.task(other)).generation, f"{other}'s generation")
    return {"counters": counted, "names": ["timed", other], "generations": [timed, second]}


def _other_of_two(climb: Climb) -> "tuple[str, Protocol, Request[Any]]":
    """The second service to be found by name: logd where it is present."""
    if "logd" in climb.clients:
        return "logd", LOGD, GetStats()
    return "demo.testsvc", TESTSVC, Echo(b"once")


# ------------------------------------------------------------------ outcomes


def _frame(op: int, nonce: int, body: bytes, *, status: int = 0) -> bytes:
    """A frame of init's protocol, as demo.testsvc sends it in init's place."""
    return (
        HEADER.pack(
            FRAME_KIND,
            INIT.version,
            op | REPLY_BIT,
            0,
            INIT.number,
            status,
            nonce,
            0,
            bytes(16),
            bytes(8),
        )
        + body
    )


async def _play_router(climb: Climb, script: list[SessionStep]) -> tuple[Exchange, Session]:
    """demo.testsvc in init's place: it answers on the shared inbox as `script` says."""
    inbox = await climb.peers.inbox()
    session = await climb.start_session(inbox, script)
    peer = Peer(
        "demo.testsvc in init's place",
        slot=session.slot,
        inbox=inbox,
        link=session.link,
        service=session.sender.service,
        generation=session.sender.generation,
        terms=LinkTerms(),
        reply_terms=LinkTerms(),
    )
    return Exchange(climb.peers.caller, INIT, peer), session


async def _scripted(
    climb: Climb,
    script: list[SessionStep],
    *,
    wait: Nanos = CALL_WAIT,
    mismatches: NonceMismatchBudget = ROUTE_MISMATCHES,
    attempts: int = 1,
    end: bytes | None = None,
) -> tuple[RouteRetryOutcome, int, int]:
    """The outcome of a route asked of a scripted peer, how long it took, how far it was late."""
    router, session = await _play_router(climb, script)
    start = await climb.ahead(Nanos(0))
    deadline = Nanos(start + wait)
    budget = RetryBudget(attempts_max=attempts, backoff=ROUTE_BACKOFF, deadline=deadline)
    outcome = await route_with_nonce_budgeted(router, "timed", budget, mismatches, RetryTokens())
    end_time = await climb.ahead(Nanos(0))
    if end is not None:
        await Send(session.slot, end)
    done = await climb.finish(climb.testsvc, session.started)
    expect(done.steps, len(script), "steps of the answering peer's script")
    await CapClose(session.slot)
    if router.peer.alive:
        await climb.see_gone(session.endpoint, session.link)
    return outcome, end_time - start, end_time - deadline


async def route_outcomes(climb: Climb) -> Evidence:
    """#70: every outcome of a route provoked once, and a call cut off after the send."""
    before = await climb.route_counts()
    receive = SessionStep(Step.RECEIVE, b"")
    bad_answer = SessionStep(Step.ANSWER, _frame(Route.INFO.op, 0, b"\xc1"))
    down = SessionStep(
        Step.ANSWER, _frame(Route.INFO.op, 0, b"", status=int(InitStatus.ROUTE_DOWN))
    )
    stray = SessionStep(Step.SEND, _frame(Route.INFO.op, FAR, b""))

    routed = expect_type(await _route(climb, "timed"), Routed, "a planned route")
    assert routed.slot is not None, "a service's route has its link"
    await CapClose(routed.slot)
    denied = await _route(climb, climb.boot.name)
    not_found = await _route(climb, UNKNOWN_NAME)
    malformed, _, _ = await _scripted(climb, [receive, bad_answer, receive], end=b"\x01end")
    timed_out, waited, late = await _scripted(
        climb, [receive, receive], wait=SHORT_WAIT, end=b"\x01end"
    )
    exceeded, _, _ = await _scripted(
        climb,
        [receive, *[stray] * STRAYS, receive],
        mismatches=FEW_MISMATCHES,
        end=b"\x01end",
    )
    closed, _, _ = await _scripted(climb, [receive, SessionStep(Step.CLOSE, b"")])
    # One attempt more and the script would not come to its end message.
    spent, _, _ = await _scripted(
        climb, [*[receive, down] * ATTEMPTS, receive], attempts=ATTEMPTS, end=b"\x01end"
    )
    generation = (await climb.task("demo.testsvc")).generation
    cut_off = await climb.testsvc.call(Die(DIE_CODE), await climb.ahead(CALL_WAIT))
    record = await climb.up_again("demo.testsvc", generation + 1)
    counted = grown(before, await climb.route_counts())
    _ = await climb.call(climb.testsvc, Echo(b"again"))

    outcomes = [routed, denied, not_found, malformed, timed_out, exceeded, closed, cut_off]
    names = [type(outcome).__name__ for outcome in outcomes]
    kinds = (
        Routed,
        Denied,
        NotFound,
        Malformed,
        TimedOut,
        MismatchBudgetExceeded,
        Closed,
        Unknown,
    )
    expect(names, [kind.__name__ for kind in kinds], "the outcomes")
    require(late >= 0, f"TimedOut {-late} ns before the deadline")
    require(late <= LATE_MAX, f"TimedOut {late} ns after the deadline")
    expect(spent, Closed(), f"a route that stays down for {ATTEMPTS} attempts")
    expect(record.exit_code, DIE_CODE, "exit code of the peer that cut the call off")
    expect(counted, {"ok": 1, "denied": 1, "not_found": 1}, "growth of init's route counters")
    return {"outcomes": names, "counters": counted, "waited_ns": waited}


async def rebind_generation(climb: Climb) -> Evidence:
    """#71: timed is killed and restarted: Stale once, one re-resolve, then calls succeed."""
    timed = climb.timed
    _ = await climb.call(timed, Whoami(0, ""))
    old = (await climb.task("timed")).generation
    rebinds = timed.rebinds

    killed = await climb.restart("timed")
    _ = await climb.up_again("timed", old + 1)
    kept = await timed.call(Whoami(0, ""), await climb.ahead(CALL_WAIT))
    _ = await climb.call(timed, Whoami(0, ""))
    status = await climb.status(timed)
    row = await climb.task("timed")

    expect(killed.generation, old, "generation of the killed instance")
    expect(kept, Stale(), "first call over the kept route")
    expect(timed.rebinds - rebinds, 1, "rebinds")
    expect(row.generation, old + 1, "generation in init's table")
    expect(status.generation, old + 1, "generation in timed's own status")
    expect(timed.generation, old + 1, "generation of the route")
    require(row.pid != 0, "the new instance has a pid")
    return {"old": old, "new": row.generation, "rebinds": 1}

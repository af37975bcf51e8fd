"""demo.testsvc and demo.interactive: what they refuse, and why."""

from typing import Any

import pytest

from nexus.abi import LinkCreate, LinkTerms, Nanos, Slot
from nexus.ipc import Closed, Exchange, Refused
from nexus.protocols.init import InitStatus, TaskRows
from nexus.protocols.interactive import PROTOCOL as INTERACTIVE
from nexus.protocols.interactive import HoldAt, InteractiveStatus, RegisterFor
from nexus.protocols.testsvc import (
    HELD_COUNT_MAX,
    PROTOCOL,
    AskedInit,
    AskInit,
    Attack,
    Echo,
    Echoed,
    FloodTimed,
    Hold,
    RawSession,
    Release,
    Released,
    TestsvcStatus,
    UseKeys,
    UseState,
)
from nexus.protocols.timed import TimedStatus
from nexus.services.demo import testsvc
from nexus.services.demo.interactive import Interactive
from nexus.services.demo.testsvc import Testsvc
from nexus.wire import ReplyStatus, Request
from tests.fakes.pair import FAR, Pair


class RefusingTimed:
    """A client of a timed that has no timer left."""

    async def call(self, _request: Request[Any], _deadline: Nanos) -> Refused:
        return Refused(TimedStatus.OVER_LIMIT)


class UnreachablePeers:
    """The links of a task to which nobody answers."""

    async def bind(self, _slot: Slot, _protocol: object, **_terms: object) -> Closed:
        return Closed()


def outcome_of(service: Any, protocol: Any, request: Request[Any]) -> Any:
    """What a client gets for `request`."""

    async def ask(exchange: Exchange) -> Any:
        return await exchange.call(request, FAR)

    return Pair(service, protocol).client(ask)


def lone_testsvc() -> Testsvc:
    """A demo.testsvc that found no timed."""
    return Testsvc(None)  # type: ignore[arg-type]  # no request here reaches for its peers


def test_an_echo_comes_back() -> None:
    assert outcome_of(lone_testsvc(), PROTOCOL, Echo(b"x")) == Echoed(b"x")


def test_a_second_hold_with_one_token_is_refused() -> None:
    async def ask(exchange: Exchange) -> Any:
        _ = await exchange.start(Hold(1), FAR)
        return await exchange.call(Hold(1), FAR)

    assert Pair(lone_testsvc(), PROTOCOL).client(ask) == Refused(TestsvcStatus.TOO_MANY_HELD)


def test_more_holds_than_the_bound_are_refused() -> None:
    async def ask(exchange: Exchange) -> Any:
        for token in range(HELD_COUNT_MAX):
            _ = await exchange.start(Hold(token), FAR)
        return await exchange.call(Hold(HELD_COUNT_MAX), FAR)

    assert Pair(lone_testsvc(), PROTOCOL).client(ask) == Refused(TestsvcStatus.TOO_MANY_HELD)


def test_a_release_answers_the_held_in_its_own_order() -> None:
    async def ask(exchange: Exchange) -> Any:
        first = await exchange.start(Hold(1), FAR)
        second = await exchange.start(Hold(2), FAR)
        released = await exchange.call(Release([2, 1]), FAR)
        return released, await exchange.finish(first), await exchange.finish(second)

    assert Pair(lone_testsvc(), PROTOCOL).client(ask) == (Released(2), Released(1), Released(1))


def test_a_release_of_what_is_not_held_is_refused() -> None:
    refused = outcome_of(lone_testsvc(), PROTOCOL, Release([5]))
    assert refused == Refused(TestsvcStatus.NOT_HELD)


def test_a_raw_session_without_a_link_is_refused() -> None:
    refused = outcome_of(lone_testsvc(), PROTOCOL, RawSession(8, 100, []))
    assert refused == Refused(TestsvcStatus.NO_CAPABILITY)


@pytest.mark.parametrize("request_", [UseState(b"/state/testsvc/x", b"v"), UseKeys(b"x")])
def test_a_service_that_is_not_in_the_system_is_not_used(request_: UseState | UseKeys) -> None:
    refused = outcome_of(lone_testsvc(), PROTOCOL, request_)

    assert refused == Refused(TestsvcStatus.SESSION_BROKEN)


def test_a_flood_of_a_timed_that_was_never_found_is_refused() -> None:
    refused = outcome_of(lone_testsvc(), PROTOCOL, FloodTimed(1))
    assert refused == Refused(TestsvcStatus.SESSION_BROKEN)


class Control:
    """An init that answers with these, one after the other."""

    def __init__(self, *answers: Any) -> None:
        self.answers = list(answers)
        self.asked: list[str] = []

    async def call(self, request: Request[Any], _deadline: Nanos, _context: object) -> Any:
        self.asked.append(type(request).__name__)
        return self.answers.pop(0)


def asks_init(monkeypatch: pytest.MonkeyPatch, init: Control) -> Any:
    """What AskInit gets when init answers so."""

    class Peers:
        async def control(self, _deadline: Nanos) -> Control:
            return init

    monkeypatch.setattr(testsvc, "Exchange", Control)
    return outcome_of(Testsvc(Peers()), PROTOCOL, AskInit("nobody"))  # type: ignore[arg-type]


DENIED = Refused(ReplyStatus.DENIED)
NO_SUCH_TASK = Refused(InitStatus.ROUTE_NOT_FOUND)


@pytest.mark.parametrize(
    ("answers", "statuses", "last"),
    [
        ([DENIED] * 5, [ReplyStatus.DENIED] * 5, "Shutdown"),
        (
            [DENIED, DENIED, NO_SUCH_TASK],
            [*[ReplyStatus.DENIED] * 2, NO_SUCH_TASK.status],
            "Restart",
        ),
        ([TaskRows(0, [])], [ReplyStatus.OK], "GetTasks"),
    ],
    ids=["rights are asked for", "not for a restart", "not at all"],
)
def test_init_is_asked_up_to_the_first_that_it_does_not_deny(
    monkeypatch: pytest.MonkeyPatch, answers: list[Any], statuses: list[int], last: str
) -> None:
    init = Control(*answers)

    assert asks_init(monkeypatch, init) == AskedInit([int(status) for status in statuses])
    assert init.asked[-1] == last


def test_an_init_that_does_not_answer_is_no_denial(monkeypatch: pytest.MonkeyPatch) -> None:
    outcome = asks_init(monkeypatch, Control(DENIED, Closed()))
    assert outcome == Refused(TestsvcStatus.SESSION_BROKEN)


def test_an_attack_nobody_planted_is_refused() -> None:
    refused = outcome_of(lone_testsvc(), PROTOCOL, Attack("credentials", 1))
    assert refused == Refused(TestsvcStatus.NO_SUCH_ATTACK)


def test_a_registration_without_timed_is_refused() -> None:
    service = Interactive(None)  # type: ignore[arg-type]
    refused = outcome_of(service, INTERACTIVE, RegisterFor(1))
    assert refused == Refused(InteractiveStatus.TIMED_UNREACHABLE)


def test_what_timed_refuses_is_refused() -> None:
    service = Interactive(None)  # type: ignore[arg-type]
    service.timed = RefusingTimed()  # type: ignore[assignment]
    refused = outcome_of(service, INTERACTIVE, RegisterFor(1))
    assert refused == Refused(InteractiveStatus.TIMED_REFUSED)


def test_a_wait_without_a_link_is_refused() -> None:
    refused = outcome_of(Interactive(None), INTERACTIVE, HoldAt(1))  # type: ignore[arg-type]
    assert refused == Refused(InteractiveStatus.NO_CAPABILITY)


def test_a_wait_over_a_link_nobody_answers_is_refused() -> None:
    service = Interactive(UnreachablePeers())  # type: ignore[arg-type]

    async def ask(exchange: Exchange) -> Any:
        dead = await LinkCreate(exchange.peer.inbox, LinkTerms())
        return await exchange.ask(HoldAt(1), FAR, move=dead.slot)

    refused = Pair(service, INTERACTIVE).client(ask)

    assert refused == Refused(InteractiveStatus.TESTSVC_UNREACHABLE)

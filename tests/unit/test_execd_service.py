"""execd as its clients see it, on the tiny kernel: whose child it is, and each end once."""

from typing import Any, Final, cast

import pytest

from nexus.abi import INIT_NAME, Nanos, service_id
from nexus.ipc import Exchange, Refused, TimedOut
from nexus.protocols.execd import PROTOCOL, Ended, Kill, Killed, Reported, ReportExit, Wait
from nexus.protocols.init import Ending, EndTask
from nexus.runtime import ServiceConfig
from nexus.runtime.program import Context
from nexus.services.execd.config import Settings
from nexus.services.execd.service import Execd
from nexus.wire import ReplyStatus, Request
from tests.fakes.pair import FAR, SEED, Pair

STARTER: Final = "shell"
CHILD: Final = "demo"
PID: Final = 40


class Init(Exchange):
    """The control channel of init, which ends what it is asked to."""

    def __init__(self) -> None:
        self.ended: list[str] = []

    async def call(self, request: Any, *_: Any) -> Any:  # type: ignore[override] # a generator
        if isinstance(request, EndTask):
            self.ended.append(request.name)
            return Ending()
        return TimedOut()


class Log:
    """Keeps what is an error."""

    def __init__(self) -> None:
        self.errors: list[str] = []

    def error(self, text: str, /, **_: str | int) -> None:
        self.errors.append(text)


class Alone:
    """What execd finds when there is nobody but init: all of a Context that it asks for."""

    def __init__(self) -> None:
        self.config = ServiceConfig(uses=[], posts=[], settings={}, trace_seed=SEED)
        self.init = Init()
        self.log = Log()

    @property
    def peers(self) -> "Alone":
        return self

    async def control(self, _until: Nanos) -> Init:
        return self.init

    async def after(self, _span: Nanos) -> Nanos:
        return FAR


class Served(Execd):
    """execd that starts with its first request: the tiny kernel has no program around it."""

    async def handle(self, call: Any, request: Any) -> Any:
        if self._clock is None:
            await self.start()
        return await super().handle(call, request)


class System(Pair):
    """execd with one child of STARTER's."""

    def __init__(self) -> None:
        self.context = Alone()
        self.execd = Served(cast(Context, self.context), Settings())
        self.execd._children.on_started(CHILD, service_id(STARTER), PID, 1)
        super().__init__(self.execd, PROTOCOL)

    def ask(self, name: str, *requests: Request[Any]) -> list[Any]:
        async def body(link: Exchange) -> list[Any]:
            return [await link.call(each, FAR) for each in requests]

        outcomes: list[Any] = self.client(body, name=name)
        return outcomes

    def lines(self, start: str) -> list[str]:
        return [text for _, text, _ in self.kernel.console if text.startswith(start)]


def end_of(pid: int = PID, code: int = 1, generation: int = 1) -> ReportExit:
    return ReportExit(
        CHILD,
        pid,
        generation,
        code=code,
        signal=0,
        started=10,
        ended=20,
        digest="d",
        reason="exit",
        action="not started again",
        asked=False,
        again=False,
        lost=0,
    )


@pytest.mark.parametrize("stranger", ["other", INIT_NAME, CHILD])
def test_a_living_child_is_ended_by_nobody_but_its_starter(stranger: str) -> None:
    system = System()

    denied = system.ask(stranger, Kill(PID))
    spared = list(system.context.init.ended)
    killed = system.ask(STARTER, Kill(PID))

    assert denied == [Refused(ReplyStatus.DENIED)]
    assert spared == []
    assert killed == [Killed()]
    assert system.context.init.ended == [CHILD]


@pytest.mark.parametrize("stranger", ["other", INIT_NAME, CHILD])
def test_nobody_but_its_starter_waits_for_a_living_child(stranger: str) -> None:
    system = System()

    denied = system.ask(stranger, Wait(PID))

    assert denied == [Refused(ReplyStatus.DENIED)]
    assert system.execd.facts()["waiting"] == 0


@pytest.mark.parametrize("stranger", ["other", CHILD])
def test_how_a_child_ended_is_told_to_nobody_but_its_starter(stranger: str) -> None:
    system = System()
    _ = system.ask(INIT_NAME, end_of(code=0))

    denied = system.ask(stranger, Wait(PID), Kill(PID))
    told = system.ask(STARTER, Wait(PID))

    assert denied == [Refused(ReplyStatus.DENIED)] * 2, "not even that it is over"
    assert told == [Ended(PID, 1, 0, 0, 0)]


def test_an_end_that_is_reported_again_is_no_second_crash() -> None:
    system = System()

    outcomes = system.ask(INIT_NAME, end_of(), end_of(), end_of(PID + 1, generation=2), end_of())

    assert outcomes == [Reported(1), Reported(1), Reported(2), Reported(1)]
    facts = system.execd.facts()
    assert (facts["crashes_total"], facts["reports"]) == (2, 2)
    assert system.context.log.errors == ["crash", "crash"]
    assert len(system.lines("execd: crash report ")) == 2
    assert len(system.lines("execd: child exited ")) == 1

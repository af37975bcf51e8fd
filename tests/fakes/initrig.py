"""Small systems under init-lite on the simulated kernel, with a driver as the test's hands."""

import json
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, Final, TypeVar

import pytest

from nexus.abi import (
    INIT_NAME,
    NEVER,
    BootImage,
    CapClose,
    Event,
    EventKind,
    ExitInfo,
    Nanos,
    Now,
    PeerGone,
    Pid,
    Program,
    Recv,
    Send,
    Signal,
    SleepUntil,
    Slot,
    Trap,
)
from nexus.bootctl.handover import SlotBoot
from nexus.init import plan as plan_module
from nexus.init.authority import PolicySource
from nexus.init.ground import limits_of
from nexus.init.plan import Plan, make_plan
from nexus.init.programs import PROGRAMS, ProgramSource, load_program
from nexus.init.supervisor import Supervisor
from nexus.init.system import parse
from nexus.ipc import Client, Exchange, Peers, RetryBudget
from nexus.kernel.core.run import RunOver
from nexus.kernel.sim.faults import Faults
from nexus.kernel.sim.kernel import SimKernel
from nexus.protocols.init import AwaitReady, GetService, Ready, ServiceRecord
from nexus.protocols.meta import PROTOCOL as META
from nexus.protocols.meta import Bind, Bound, Fact, Healthy, ServiceStatus, Stop
from nexus.protocols.policyd import PROTOCOL as POLICYD
from nexus.protocols.testsvc import PROTOCOL as TESTSVC
from nexus.protocols.timed import PROTOCOL as TIMED
from nexus.runtime import Server, ServiceConfig, serve
from nexus.wire import HEADER_SIZE, PREFIX_SIZE, Message, Request, answer, encode

MS: Final = 1_000_000
SECOND: Final = 1_000 * MS
HEALTH: Final = 100 * MS
PATIENCE: Final = 20 * SECOND  # for what takes a moment on a free machine
ReplyT = TypeVar("ReplyT")
Main = Callable[[BootImage], Coroutine[Trap[Any], Any, int | None]]

SYSTEM = """
[system]
name = "test"
total_size = "8MiB"
owner_size = "256KiB"
ends_with = "driver"

[service.timed]
program = "timed"
restart = { backoff = "50ms" }
"""
DRIVER = """
[service.driver]
program = "driver"
capabilities = ["proof.control"]
uses = [{ name = "timed" }]
"""
OTHER = """
[service.other]
program = "other"
restart = { backoff = "30ms" }
health = { deadline = "100ms" }
"""


class Nothing:
    """A service that answers meta requests and knows no request of its own."""

    def handle(self, _call: Any, _request: Any) -> Any:
        raise AssertionError("nobody asks")


async def idle(boot: BootImage) -> int:
    """A service that does nothing well."""
    return await serve(Nothing(), TESTSVC, boot)


Script = Callable[[Request[Any], int], bytes | int | None]
"""The body of the answer to the nth request of its kind; None for no answer, or an exit code."""


async def play(boot: BootImage, script: Script, *, keeps_link: bool = True, thinks: int = 0) -> int:
    """A service that answers meta requests by hand; a script's None is the right answer to Bind.

    `thinks`: ns until it answers anything else, or ends as it is asked to.
    """
    back = Slot(0)
    counts: dict[type, int] = {}
    while True:
        try:
            message = await Recv((boot.endpoint,), NEVER)
        except PeerGone:
            continue
        codec = META.dispatch[message.data[:PREFIX_SIZE]]
        request = codec.decode_request(message.data[HEADER_SIZE:])
        nth = counts[type(request)] = counts.get(type(request), 0) + 1
        if isinstance(request, Bind):
            assert message.cap is not None
            back = message.cap
            await Send(back, answer(message.data, 0, encode(Bound(boot.generation))))
            if not keeps_link:
                await CapClose(back)
            continue
        if thinks:
            _ = await SleepUntil(Nanos(await Now() + thinks))
        if isinstance(request, Stop):
            return 0
        body = script(request, nth)
        if isinstance(body, int):
            _ = await SleepUntil(Nanos(await Now() + 20 * MS))
            return body
        if body is not None:
            await Send(back, answer(message.data, 0, body))


def healthy(boot: BootImage) -> bytes:
    return encode(Healthy(boot.generation, sha256(boot.argument).hexdigest(), 0, 0, 0, ""))


def status(boot: BootImage, facts: list[Fact] | None = None) -> bytes:
    account: Message = ServiceStatus(
        boot.generation, 0, 0, 0, 0, 0, 0, [], [], [] if facts is None else facts, []
    )
    return encode(account)


class Driver:
    """A client with `proof.control`: the test's hands inside the system."""

    def __init__(self, boot: BootImage) -> None:
        self.boot = boot
        self.peers = Peers(boot, bytes(16))
        self.server = Server(Nothing(), TESTSVC, boot, self.peers.caller)
        self.control: Exchange
        self.clients: dict[str, Client] = {}

    async def begin(self, *, ready: bool = True) -> None:
        """Answer the echo, take the planned links, wait for the system."""
        until = await self.ahead(PATIENCE)
        _ = await self.server.step(until)
        control = await self.peers.control(until)
        assert isinstance(control, Exchange), control
        self.control = control
        for name in ServiceConfig.of(self.boot).uses:
            await self.connect(name)
        if ready:
            started = await control.start(AwaitReady(), until)
            _ = await self.server.step(until)
            assert isinstance(await control.finish(started), Ready)

    async def connect(self, name: str) -> None:
        budget = RetryBudget(
            attempts_max=30, backoff=Nanos(MS), deadline=await self.ahead(PATIENCE)
        )
        client = await self.peers.connect(name, PROTOCOLS[name], budget)
        assert isinstance(client, Client), client
        self.clients[name] = client

    async def ahead(self, span: int) -> Nanos:
        return Nanos(await Now() + span)

    async def ask(self, request: Request[Any], wait: int = SECOND) -> Any:
        return await self.control.call(request, await self.ahead(wait))

    async def reply(self, request: Request[ReplyT], kind: type[ReplyT]) -> ReplyT:
        outcome = await self.ask(request)
        assert isinstance(outcome, kind), outcome
        return outcome

    async def pause(self, span: int) -> None:
        _ = await SleepUntil(await self.ahead(span))

    async def record(self, name: str) -> ServiceRecord:
        return await self.reply(GetService(name), ServiceRecord)


PROTOCOLS = {"timed": TIMED, "other": TESTSVC, "policyd": POLICYD}


@dataclass
class Run:
    """How a system ran: the plan, root's exit, the events, and what the driver returned."""

    plan: Plan
    ended: ExitInfo
    events: list[Event]
    result: Any
    kernel: SimKernel
    init: Supervisor

    def lines(self, prefix: str = "") -> list[str]:
        return [
            str(event.fields["line"])
            for event in self.events
            if event.kind is EventKind.CONSOLE and str(event.fields["line"]).startswith(prefix)
        ]

    def evidence(self, line: str) -> dict[str, Any]:
        (found,) = [event for event in self.events if event.fields.get("line") == line]
        evidence: Any = found.fields["evidence"]
        return dict(json.loads(evidence) if isinstance(evidence, str | bytes) else evidence)

    @property
    def memory(self) -> bytes:
        """What init left for the next boot."""
        assert self.kernel.boot_memory is not None
        return self.kernel.boot_memory

    def time(self, line: str) -> int:
        return next(event.time for event in self.events if event.fields.get("line") == line)

    def spawns(self, name: str) -> list[Event]:
        return [
            event
            for event in self.events
            if event.kind is EventKind.SPAWN and event.fields["name"] == name
        ]


NAMES: Final = ("driver", "other", "absent", "a", "b", "c", "d", "policyd", "updated", "statefsd")
"""Programs that a system text may name; a test gives their mains."""
SPOKEN: Final = ("policyd", "updated", "statefsd")  # those that speak what the real ones do


@pytest.fixture
def boot(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Run]:
    """Boots a system of timed, a driver and whatever else the text and `mains` name."""
    sources = {
        name: ProgramSource(
            name=name,
            module="nexus.services.timed",
            protocols=(f"nexus.protocols.{name}" if name in SPOKEN else "nexus.protocols.testsvc",),
        )
        for name in NAMES
    }
    monkeypatch.setattr(plan_module, "PROGRAMS", {**PROGRAMS, **sources})
    return boot_it


async def nothing(_driver: Driver) -> None:
    """A driver that only waits for the system."""


def boot_it(
    driver: Callable[[Driver], Coroutine[Trap[Any], Any, Any]] = nothing,
    *,
    text: str = SYSTEM + DRIVER,
    other: Main = idle,
    mains: Mapping[str, Main] | None = None,
    ready: bool = True,
    crashes: int = 0,
    seconds: int = 30,
    seed: int = 1,
    memory: bytes | None = None,
    signals: Sequence[tuple[int, Signal]] = (),
    policy_source: PolicySource | None = None,
    watchdog: Nanos | None = None,
    at: Sequence[tuple[int, Callable[[SimKernel], object]]] = (),
    cut: int | None = None,
    faults: Faults | None = None,
    slot_boot: SlotBoot | None = None,
) -> Run:
    """Run the system of `text`. `signals` and `at` are (ns after the start, what then).

    After `cut` ns the power fails: nothing is stopped, nothing is said.
    """
    results: list[Any] = []

    async def driver_main(boot: BootImage) -> int:
        hands = Driver(boot)
        await hands.begin(ready=ready)
        results.append(await driver(hands))
        return 0

    plan = make_plan(parse(text.encode(), Path("test.toml")))
    given = {"other": other, "driver": driver_main, **(mains or {})}
    programs = {
        "timed": load_program(PROGRAMS["timed"]),
        **{name: Program(name=name, main=main, digest="") for name, main in given.items()},
    }
    events: list[Event] = []
    kernel = SimKernel(
        programs,
        seed=seed,
        recorder=events.append,
        limits=limits_of(plan),
        boot_memory=memory,
        faults=faults,
        hardware=plan.hardware,
    )
    for after, signal in signals:
        kernel.at(Nanos(kernel.now + after), partial(kernel.signal, signal))
    for after, work in at:
        kernel.at(Nanos(kernel.now + after), partial(_do, work, kernel))
    inits: list[Supervisor] = []

    def init_main(boot: BootImage) -> Coroutine[Trap[Any], Any, int]:
        init = Supervisor(
            boot,
            plan,
            1,
            policy_source=policy_source,
            watchdog=watchdog,
            slot_boot=slot_boot,
        )
        inits.append(init)
        return init.run()

    root = Program(name=INIT_NAME, main=init_main, digest="")
    limit = Nanos(kernel.now + (seconds * SECOND if cut is None else cut))
    try:
        ended = kernel.run(root, b"", until=limit)
    except RunOver:
        assert cut is not None, "the run did not end"
        ended = ExitInfo(Pid(1), 0, 9)
    assert len(kernel.crashes) == crashes, kernel.crashes
    return Run(plan, ended, events, results[0] if results else None, kernel, inits[0])


def _do(work: Callable[[SimKernel], object], kernel: SimKernel) -> None:
    _ = work(kernel)


Boot = Callable[..., Run]

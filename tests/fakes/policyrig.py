"""A system with policyd, logd and a guarded service under the real init, on either kernel.

A script is the driver's; it may ask the test's process to stop, continue or kill a task by a
console line, and its result travels as the evidence of one, for on linux it is another process.
"""

import json
import mmap
import os
import signal
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import pytest

from nexus.abi import (
    BootImage,
    ConsoleWrite,
    Event,
    EventKind,
    ExitInfo,
    Nanos,
    Now,
    Programs,
    Recorder,
)
from nexus.init import plan as plan_module
from nexus.init.ground import init_program, limits_of
from nexus.init.plan import Plan, make_plan
from nexus.init.programs import PROGRAMS, ProgramSource, load_program
from nexus.init.system import parse
from nexus.ipc import Client, RetryBudget, call_until
from nexus.kernel.linux import LinuxKernel
from nexus.kernel.sim.kernel import SimKernel
from nexus.protocols.init import GetSystem, Restart, Restarting, SystemInfo
from nexus.protocols.logd import EVERY_RECORD, THIS_BOOT, Query, Records
from nexus.protocols.logd import PROTOCOL as LOGD
from nexus.protocols.policy import Policy
from nexus.protocols.policyd import PROTOCOL as POLICYD
from nexus.protocols.policyd import Counts, GetCounts, Reason
from nexus.protocols.rngd import PROTOCOL as RNGD
from nexus.runtime.program import program_of
from nexus.testing.rig import REPORT_LINE, program, reporting
from tests.fakes import initrig
from tests.fakes.guard import PROTOCOL as GUARD
from tests.fakes.guard import Guard, Use, Used
from tests.fakes.initrig import MS, PATIENCE, SECOND, Driver, Main

RESULT: Final = "driver: result"
OUTSIDE: Final = "driver: outside "
PAGE: Final = 16  # records of one Query
OBEYED: Final = memoryview(mmap.mmap(-1, mmap.PAGESIZE)).cast("Q")
"""How many orders the test's process has taken, for the driver, which is a fork of it."""

SYSTEM: Final = """
[system]
name = "policy"
total_size = "8MiB"
owner_size = "512KiB"
ends_with = "driver"

[group.deciding] # a test kills more often than a system should bear
restarts = 100
within = "30s"

[service.policyd]
program = "policyd"
group = "deciding"
capabilities = ["policy.authority"]
uses = { logd = { depth = 64, sync = false } }
restart = { backoff = "50ms", backoff_max = "100ms" }
health = { deadline = "2s", every = "250ms", answer = "500ms" }

[service.logd]
program = "logd"
stage = "core"
capabilities = ["policy.delegate"]
uses = { policyd = {} }

[service.logd.settings]
core = "policyd"

[service.guard]
program = "guard"
capabilities = ["policy.delegate"]
uses = { policyd = {}, logd = { sync = false } }
health = { deadline = "3s", every = "0s" }

[service.driver]
program = "driver"
capabilities = [
    "proof.control", "system.observe", "system.control", "policy.reload", "log.read",
    "store.read", "store.write", "store.list",
]
uses = { policyd = {}, logd = {}, guard = {} }
health = { deadline = "20s", every = "0s" }
"""


class Hands(Driver):
    """The driver: what scripts do in the system."""

    def client(self, name: str) -> Client:
        return self.clients[name]

    async def use(self, right: str, target: str = "t", wait: int = 2 * SECOND) -> Used:
        """What the guard was told about a right of the driver."""
        used = await self.client("guard").call(Use(right, target), await self.ahead(wait))
        assert isinstance(used, Used), used
        return used

    async def call(self, name: str, request: Any, wait: int = 3 * SECOND) -> Any:
        """The outcome; asked again when the service's instance has gone."""
        budget = RetryBudget(
            attempts_max=5, backoff=Nanos(10 * MS), deadline=await self.ahead(wait)
        )
        return await call_until(self.client(name), request, budget)

    async def outside(self, order: str) -> None:
        """Have the test's process do something to a task, and wait until it has."""
        before = OBEYED[0]
        await ConsoleWrite(OUTSIDE + order)
        until = await Now() + PATIENCE
        while OBEYED[0] == before:
            assert await Now() < until, "nobody obeys"
            await self.pause(MS)

    async def kill(self, name: str) -> None:
        assert isinstance(await self.ask(Restart(name)), Restarting)

    async def system(self) -> SystemInfo:
        return await self.reply(GetSystem(), SystemInfo)

    async def counts(self) -> Counts:
        found = await self.call("policyd", GetCounts())
        assert isinstance(found, Counts), found
        return found

    async def until(self, good: Callable[[], Awaitable[bool]], wait: int = PATIENCE) -> int:
        """Ask every 10 ms; how long it took until it was good."""
        begun = await Now()
        while not await good():
            assert await Now() < begun + wait, "it never was"
            await self.pause(10 * MS)
        return await Now() - begun

    async def until_allowed(self, right: str, wait: int = PATIENCE) -> int:
        async def good() -> bool:
            return (await self.use(right)).allowed

        return await self.until(good, wait)

    async def audits(self) -> list[dict[str, Any]]:
        """Every audit in logd, in the order of the journal, with its sender's generation."""
        found: list[dict[str, Any]] = []
        since = 1
        while True:
            page = await self.call("logd", Query(THIS_BOOT, since, PAGE, EVERY_RECORD))
            assert isinstance(page, Records), page
            for record in page.records:
                if record.scope in ("policyd.audit", "audit"):
                    fields = {each.key: each.value for each in record.fields}
                    found.append({**fields, "scope": record.scope, "instance": record.generation})
            if page.next > page.total:
                return found
            since = page.next


Script = Callable[[Hands], Awaitable[Any]]


def driver_of(script: Script) -> Main:
    async def main(boot: BootImage) -> int:
        hands = Hands(boot)
        await hands.begin()
        result = await script(hands)
        await ConsoleWrite(RESULT, json.dumps({"result": result}).encode())
        return 0

    return main


@dataclass
class Outcome:
    """How a system ran."""

    plan: Plan
    ended: ExitInfo
    events: list[Event]

    @property
    def result(self) -> Any:
        """What the script returned, as JSON gives it back."""
        for event in self.events:
            if event.kind is EventKind.CONSOLE and event.fields["line"] in (RESULT, REPORT_LINE):
                evidence: Any = event.fields["evidence"]
                if isinstance(evidence, str | bytes):
                    evidence = json.loads(evidence)
                assert "result" in evidence, evidence["text"]
                return evidence["result"]
        raise AssertionError(f"no result; the console said {self.lines()}")

    def lines(self) -> list[str]:
        return [
            str(event.fields["line"]) for event in self.events if event.kind is EventKind.CONSOLE
        ]


SOURCES: Final = {
    "guard": ProgramSource(
        name="guard", module="tests.fakes.guard", protocols=("tests.fakes.guard",)
    ),
    "driver": ProgramSource(
        name="driver", module="tests.fakes.policyrig", protocols=("nexus.protocols.testsvc",)
    ),
}


def plan_of(monkeypatch: pytest.MonkeyPatch, text: str) -> Plan:
    """The plan of a system whose guard and driver are this module's."""
    monkeypatch.setattr(plan_module, "PROGRAMS", {**PROGRAMS, **SOURCES})
    for name, protocol in (
        ("guard", GUARD),
        ("logd", LOGD),
        ("policyd", POLICYD),
        ("rngd", RNGD),
    ):
        monkeypatch.setitem(initrig.PROTOCOLS, name, protocol)
    return make_plan(parse(text.encode(), Path("policy-test.toml")))


def programs_of(script: Script, mains: Mapping[str, Main]) -> Programs:
    given = {"guard": program_of(Guard), "driver": reporting(driver_of(script)), **mains}
    return {
        **{name: load_program(PROGRAMS[name]) for name in ("policyd", "logd", "rngd")},
        **{name: program(name, main) for name, main in given.items()},
    }


def boot_sim(
    monkeypatch: pytest.MonkeyPatch,
    script: Script,
    *,
    text: str = SYSTEM,
    mains: Mapping[str, Main] | None = None,
    seed: int = 1,
    seconds: int = 60,
) -> Outcome:
    """Run the system on the simulated kernel."""
    plan = plan_of(monkeypatch, text)
    events: list[Event] = []

    def record(event: Event) -> None:
        events.append(event)
        carry_out(event, lambda *order: kernel.at(Nanos(kernel.now + 1), partial(obey, *order)))

    def obey(what: str, name: str) -> None:
        task = kernel.living(name)
        if task is None:
            return
        if what == "kill":
            kernel.end(task, 0, signal.SIGKILL)
        else:
            assert what == "freeze", what
            _ = kernel.freeze(name, Nanos(kernel.now + 30 * SECOND))

    kernel = SimKernel(
        programs_of(script, mains or {}), seed=seed, recorder=record, limits=limits_of(plan)
    )
    until = Nanos(kernel.now + seconds * SECOND)
    ended = kernel.run(init_program(plan, 1), b"", until=until)
    assert not kernel.crashes, kernel.crashes
    return Outcome(plan, ended, events)


def boot_linux(
    monkeypatch: pytest.MonkeyPatch,
    script: Script,
    *,
    text: str = SYSTEM,
    mains: Mapping[str, Main] | None = None,
    seconds: int = 60,
) -> Outcome:
    """Run the system on the Linux kernel backend, in the calling process."""
    plan = plan_of(monkeypatch, text)
    events: list[Event] = []
    pids: dict[str, int] = {}

    def record(event: Event) -> None:
        events.append(event)
        if event.kind is EventKind.SPAWN:
            pids[str(event.fields["name"])] = event.pid
        carry_out(event, obey)

    def obey(what: str, name: str) -> None:
        os.kill(pids[name], {"freeze": signal.SIGSTOP, "kill": signal.SIGKILL}[what])

    recorder: Recorder = record
    kernel = LinuxKernel(
        programs_of(script, mains or {}),
        recorder=recorder,
        limits=limits_of(plan),
        hardware=plan.hardware,
    )
    until = Nanos(kernel.now + seconds * SECOND)
    ended = kernel.run(init_program(plan, 1), b"", until=until)
    return Outcome(plan, ended, events)


def carry_out(event: Event, do: Callable[[str, str], None]) -> None:
    """What the driver wants of the outside with this event, and with whom, if it does; it goes on
    when that is done."""
    if event.kind is not EventKind.CONSOLE:
        return
    line = str(event.fields["line"])
    if line.startswith(OUTSIDE):
        do(*line.removeprefix(OUTSIDE).split())
        OBEYED[0] += 1


def told(used: Used) -> tuple[bool, str]:
    """What a Used says, in plain values."""
    return used.allowed, Reason(used.reason).name


def without(policy: Policy, name: str, right: str) -> Policy:
    """The policy with one right taken away."""
    kept = [each for each in policy.allow[name] if each.name != right]
    return Policy(
        services=policy.services, allow={**policy.allow, name: kept}, routes=policy.routes
    )

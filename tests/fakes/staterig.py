"""A small system with policyd, logd and statefsd on a disk, under the real init, on either kernel.

The driver's script and the bodies of further clients are written against the ABI alone.
"""

import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import pytest

from nexus.abi import BootImage, ConsoleWrite, Event, EventKind, ExitInfo, Nanos, Now, Programs
from nexus.init import plan as plan_module
from nexus.init.ground import init_program, limits_of
from nexus.init.plan import Plan, make_plan
from nexus.init.programs import PROGRAMS, ProgramSource, load_program
from nexus.init.system import parse
from nexus.kernel.core.run import RunOver
from nexus.kernel.linux import LinuxKernel
from nexus.kernel.sim.disk import Disk
from nexus.kernel.sim.kernel import SimKernel
from nexus.protocols.logd import EVERY_RECORD, THIS_BOOT, Query, Record, Records
from nexus.protocols.logd import PROTOCOL as LOGD
from nexus.protocols.meta import GetStatus, ServiceStatus
from nexus.protocols.policyd import PROTOCOL as POLICYD
from nexus.protocols.statefsd import PROTOCOL as STATEFSD
from nexus.testing.rig import REPORT_LINE, program, reporting
from tests.fakes import initrig
from tests.fakes.initrig import SECOND, Main
from tests.fakes.policyrig import PAGE, Hands, carry_out

RESULT: Final = "result of "
DISK_SIZE: Final = 4 << 20  # bytes

SYSTEM: Final = """
[system]
name = "state"
total_size = "8MiB"
owner_size = "512KiB"
ends_with = "driver"

[device.disk]
kind = "block"
size = "4MiB"

[group.keeping] # a test kills more often than a system should bear
restarts = 1000
within = "30s"

[service.policyd]
program = "policyd"
capabilities = ["policy.authority"]
uses = { logd = { depth = 64, sync = false } }

[service.logd]
program = "logd"
stage = "core"
capabilities = ["policy.delegate"]
uses = { policyd = {} }

[service.statefsd]
program = "statefsd"
group = "keeping"
hardware = ["disk"]
capabilities = ["policy.delegate", "device.mmio.blk"]
uses = { policyd = {}, logd = { sync = false } }
restart = { backoff = "2ms", backoff_max = "5ms" }
health = { deadline = "2s" }

[service.driver]
program = "driver"
capabilities = [
    "proof.control", "system.observe", "system.control", "log.read", "statefs.read",
    "statefs.write",
]
uses = { policyd = {}, logd = {}, statefsd = { depth = 64 } }
health = { deadline = "20s", every = "0s" }
"""

CLIENT: Final = """
[service.{name}]
program = "{name}"
capabilities = [{rights}]
uses = {{ statefsd = {{ depth = 64 }} }}
health = {{ deadline = "20s", every = "0s" }}
"""


def client_text(name: str, *rights: str) -> str:
    """The entry of a further client."""
    return CLIENT.format(name=name, rights=", ".join(f'"{right}"' for right in rights))


class StateHands(Hands):
    """What scripts do in the system."""

    async def state(self, request: Any, wait: int = 3 * SECOND) -> Any:
        """statefsd's answer, asked once: what a cut-off call has done is not known."""
        return await self.client("statefsd").call(request, await self.ahead(wait))

    async def facts(self, name: str = "statefsd") -> dict[str, int]:
        status = await self.call(name, GetStatus())
        assert isinstance(status, ServiceStatus), status
        return {fact.name: fact.value for fact in status.facts}

    async def records(self, scope: str) -> list[Record]:
        """Every record of a scope."""
        found: list[Record] = []
        since = 1
        while True:
            page = await self.call("logd", Query(THIS_BOOT, since, PAGE, EVERY_RECORD))
            assert isinstance(page, Records), page
            found += [record for record in page.records if record.scope == scope]
            if page.next > page.total:
                return found
            since = page.next


Script = Callable[[StateHands], Awaitable[Any]]


def main_of(script: Script) -> Main:
    """A program that runs a script, tells its result and serves until the end."""

    async def main(boot: BootImage) -> int:
        hands = StateHands(boot)
        await hands.begin(ready=boot.name == "driver")
        result = await script(hands)
        await ConsoleWrite(RESULT + boot.name, json.dumps({"result": result}).encode())
        return 0 if boot.name == "driver" else await hands.server.run()

    return main


@dataclass
class Outcome:
    """How a system ran, and what it left."""

    plan: Plan
    ended: ExitInfo
    events: list[Event]
    disk: Disk | None = None

    def result(self, name: str = "driver") -> Any:
        """What a script returned, as JSON gives it back."""
        for event in self.events:
            line = event.fields.get("line")
            if event.kind is EventKind.CONSOLE and line in (RESULT + name, REPORT_LINE):
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

    def evidence(self, line: str) -> list[dict[str, Any]]:
        """The evidence of each time this line was said."""
        found = []
        for event in self.events:
            if event.kind is EventKind.CONSOLE and event.fields["line"] == line:
                evidence: Any = event.fields["evidence"]
                found.append(
                    json.loads(evidence) if isinstance(evidence, str | bytes) else dict(evidence)
                )
        return found


def plan_of(monkeypatch: pytest.MonkeyPatch, text: str, names: Sequence[str]) -> Plan:
    """The plan of a system whose driver and clients are scripts."""
    sources = {
        name: ProgramSource(
            name=name, module="tests.fakes.staterig", protocols=("nexus.protocols.testsvc",)
        )
        for name in names
    }
    monkeypatch.setattr(plan_module, "PROGRAMS", {**PROGRAMS, **sources})
    for name, protocol in (("statefsd", STATEFSD), ("logd", LOGD), ("policyd", POLICYD)):
        monkeypatch.setitem(initrig.PROTOCOLS, name, protocol)
    return make_plan(parse(text.encode(), Path("state-test.toml")))


def programs_of(scripts: Mapping[str, Script]) -> Programs:
    return {
        **{name: load_program(PROGRAMS[name]) for name in ("policyd", "logd", "statefsd")},
        **{name: program(name, reporting(main_of(script))) for name, script in scripts.items()},
    }


def boot_sim(
    monkeypatch: pytest.MonkeyPatch,
    script: Script,
    *,
    text: str = SYSTEM,
    clients: Mapping[str, Script] | None = None,
    disk: Disk | None = None,
    kernel_driven: bool = False,
    seed: int = 1,
    seconds: int = 60,
    at: Sequence[tuple[int, Callable[[SimKernel], object]]] = (),
) -> Outcome:
    """Run the system on the simulated kernel. `at` are (ns after the start, what then)."""
    scripts = {"driver": script, **(clients or {})}
    plan = plan_of(monkeypatch, text, list(scripts))
    events: list[Event] = []

    def record(event: Event) -> None:
        events.append(event)
        carry_out(event, lambda *order: kernel.at(Nanos(kernel.now + 1), partial(obey, *order)))

    def obey(what: str, name: str) -> None:
        assert what == "kill", what
        task = kernel.living(name)
        if task is not None:
            kernel.end(task, 0, 9)

    kernel = SimKernel(
        programs_of(scripts),
        seed=seed,
        recorder=record,
        limits=limits_of(plan),
        hardware=plan.hardware,
        disks={} if disk is None else {"disk": disk},
        kernel_driven={"disk"} if kernel_driven else (),
    )
    for after, work in at:
        kernel.at(Nanos(kernel.now + after), partial(_do, work, kernel))
    until = Nanos(kernel.now + seconds * SECOND)
    try:
        ended = kernel.run(init_program(plan, 1), b"", until=until)
    except RunOver as over:
        lines = [each.fields["line"] for each in events if each.kind is EventKind.CONSOLE]
        raise AssertionError(f"the run did not end: {lines}") from over
    assert not kernel.crashes, kernel.crashes
    return Outcome(plan, ended, events, kernel.bus.disks["disk"])


def _do(work: Callable[[SimKernel], object], kernel: SimKernel) -> None:
    _ = work(kernel)


def boot_linux(
    monkeypatch: pytest.MonkeyPatch,
    script: Script,
    *,
    directory: Path,
    text: str = SYSTEM,
    clients: Mapping[str, Script] | None = None,
    seconds: int = 60,
    on_event: Callable[[Event, Mapping[str, int]], None] | None = None,
) -> Outcome:
    """Run the system on the Linux kernel, in the calling process; its disk is in `directory`.

    `on_event` hears of everything, with the pids of the tasks by name.
    """
    scripts = {"driver": script, **(clients or {})}
    plan = plan_of(monkeypatch, text, list(scripts))
    events: list[Event] = []
    pids: dict[str, int] = {}

    def record(event: Event) -> None:
        events.append(event)
        if event.kind is EventKind.SPAWN:
            pids[str(event.fields["name"])] = event.pid
        if on_event is not None:
            on_event(event, pids)

    kernel = LinuxKernel(
        programs_of(scripts),
        recorder=record,
        limits=limits_of(plan),
        hardware=plan.hardware,
        state_dir=directory,
    )
    until = Nanos(kernel.now + seconds * SECOND)
    ended = kernel.run(init_program(plan, 1), b"", until=until)
    return Outcome(plan, ended, events)


async def elapsed(since: Nanos) -> int:
    """Nanoseconds since then."""
    return await Now() - since

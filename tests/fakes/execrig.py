"""A system with policyd, logd, metricsd, statefsd and execd, under the real init, on either kernel.

Scripts are the driver's and the victims'; a victim dies as its script says.
"""

import json
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

import pytest

from nexus.abi import BootImage, ConsoleWrite, Event, EventKind, Nanos, Program
from nexus.init import plan as plan_module
from nexus.init.ground import init_program, limits_of
from nexus.init.plan import Plan, make_plan
from nexus.init.programs import PROGRAMS, ProgramSource, load_program
from nexus.init.system import parse
from nexus.kernel.core.run import RunOver
from nexus.kernel.linux import LinuxKernel
from nexus.kernel.sim.disk import Disk
from nexus.kernel.sim.kernel import SimKernel
from nexus.protocols.execd import PROTOCOL as EXECD
from nexus.protocols.execd import (
    Crash,
    Crashes,
    Ended,
    Exec,
    GetCrashes,
    GetReport,
    Report,
    Restart,
    Started,
    Variable,
    Wait,
)
from nexus.protocols.hello import PROTOCOL as HELLO
from nexus.protocols.logd import PROTOCOL as LOGD
from nexus.protocols.metricsd import PROTOCOL as METRICSD
from nexus.protocols.statefsd import PROTOCOL as STATEFSD
from nexus.protocols.testsvc import PROTOCOL as TESTSVC
from nexus.runtime import ServiceConfig
from nexus.runtime.program import Context, program_of
from nexus.testing.rig import program, reporting
from tests.fakes import initrig
from tests.fakes.initrig import MS, SECOND
from tests.fakes.policyrig import carry_out
from tests.fakes.staterig import RESULT, Outcome, StateHands

LOOK: Final = 20 * MS
SERVICES: Final = ("policyd", "logd", "metricsd", "statefsd", "execd")
DEMOS: Final = ("demo.hello", "demo.exit0", "demo.exit42")

HEAD: Final = """
[system]
name = "exec"
total_size = "16MiB"
owner_size = "1MiB"
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
group = "keeping"
capabilities = ["policy.delegate"]
uses = { policyd = {} }
restart = { backoff = "2ms", backoff_max = "5ms" }

[service.logd.settings]
core = "policyd execd" # whose records may have the pid of another task

[service.execd]
program = "execd"
group = "keeping"
capabilities = [
    "policy.delegate", "proc.spawn", "log.read", "metrics.read", "statefs.read", "statefs.write",
]
restart = { backoff = "2ms", backoff_max = "5ms" }
health = { deadline = "4s" }

[service.execd.settings]
told = "demo.hello"
"""
METRICSD_ENTRY: Final = """
[service.metricsd]
program = "metricsd"
group = "keeping"
capabilities = ["policy.delegate"]
uses = { policyd = {}, logd = { sync = false } }
restart = { backoff = "2ms", backoff_max = "5ms" }
"""
STATEFSD_ENTRY: Final = """
[service.statefsd]
program = "statefsd"
group = "keeping"
hardware = ["disk"]
capabilities = ["policy.delegate", "device.mmio.blk"]
uses = { policyd = {}, logd = { sync = false } }
restart = { backoff = "2ms", backoff_max = "5ms" }
health = { deadline = "2s" }
"""
DEMO_ENTRY: Final = """
[service."{name}"]
program = "{name}"
start = "demand"
by = "execd"
uses = {{ logd = {{ sync = false }} }}
restart = {{ backoff = "10ms", backoff_max = "20ms" }}
"""
DRIVER_ENTRY: Final = """
[service.driver]
program = "driver"
capabilities = [
    "proof.control", "system.observe", "system.control", "log.read", "proc.spawn", "crash.read",
]
uses = {{ {uses} }}
health = {{ deadline = "20s", every = "0s" }}
"""
CLIENT_ENTRY: Final = """
[service.{name}]
program = "{name}"
capabilities = [{rights}]
uses = {{ {uses} }}
health = {{ deadline = "20s", every = "0s" }}
restart = {{ backoff = "500ms" }}
"""


def system(
    *, without: Sequence[str] = (), clients: Mapping[str, Sequence[str]] | None = None
) -> str:
    """The system's text; `clients` are further scripts with their rights."""
    parts = [HEAD]
    if "metricsd" not in without:
        parts.append(METRICSD_ENTRY)
    if "statefsd" not in without:
        parts.append(STATEFSD_ENTRY)
    used = [name for name in ("policyd", "logd", "metricsd", "statefsd") if name not in without]
    parts[0] = parts[0].replace(
        'restart = { backoff = "2ms", backoff_max = "5ms" }\nhealth = { deadline = "4s" }',
        f"uses = {{ {_uses(used)} }}\n"
        'restart = { backoff = "2ms", backoff_max = "5ms" }\nhealth = { deadline = "4s" }',
    )
    parts += [DEMO_ENTRY.format(name=name) for name in DEMOS]
    for name, rights in (clients or {}).items():
        text = ", ".join(f'"{right}"' for right in rights)
        uses = _uses(["execd"] if rights else []) or ""
        posts = [each for each in ("logd", "metricsd") if each not in without]
        uses = ", ".join(
            part for part in (uses, *(f"{each} = {{ sync = false }}" for each in posts)) if part
        )
        parts.append(CLIENT_ENTRY.format(name=name, rights=text, uses=uses))
    ours = ["policyd", "logd", "execd", *DEMOS]
    parts.append(DRIVER_ENTRY.format(uses=_uses(ours)))
    return "".join(parts)


def _uses(names: Sequence[str]) -> str:
    return ", ".join(f'"{name}" = {{}}' for name in names)


class ExecHands(StateHands):
    """What the driver's script does in the system."""

    async def connect(self, name: str) -> None:
        if name not in DEMOS:  # nobody finds them before execd has started them
            await super().connect(name)

    async def find(self, name: str) -> None:
        """Connect to what execd has started."""
        await super().connect(name)

    async def start(
        self,
        program: str,
        *arguments: str,
        restart: Restart = Restart.NEVER,
        requester: str = "",
    ) -> Any:
        variables = [Variable("GREETING", "hello")]
        request = Exec(program, requester or self.boot.name, list(arguments), variables, restart)
        return await self.once("execd", request)

    async def once(self, name: str, request: Any, wait: int = 5 * SECOND) -> Any:
        return await self.client(name).call(request, await self.ahead(wait))

    async def started(self, program: str, *arguments: str, **options: Any) -> Started:
        child = await self.start(program, *arguments, **options)
        assert isinstance(child, Started), child
        return child

    async def ended(self, pid: int) -> Ended:
        ended = await self.once("execd", Wait(pid))
        assert isinstance(ended, Ended), ended
        return ended

    @property
    def boot_number(self) -> int:
        return ServiceConfig.of(self.boot).boot

    async def all_crashes(self, name: str = "") -> list[Crash]:
        """Every crash, page by page."""
        found: list[Crash] = []
        since = 0
        while True:
            page = await self.call("execd", GetCrashes(since, name))
            assert isinstance(page, Crashes), page
            found += page.rows
            if not page.next:
                return found
            since = page.next

    async def crashes(self, name: str = "") -> list[Crash]:
        page = await self.call("execd", GetCrashes(0, name))
        assert isinstance(page, Crashes), page
        return page.rows

    async def report(self, number: int) -> Report:
        report = await self.call("execd", GetReport(number))
        assert isinstance(report, Report), report
        return report

    async def crash_of(self, name: str, wait: int = 5 * SECOND) -> Report:
        """The report of the first crash of a service, once there is one."""

        async def good() -> bool:
            return bool(await self.crashes(name))

        _ = await self.until(good, wait)
        return await self.report((await self.crashes(name))[0].report)


def driver_of(script: Callable[[ExecHands], Any]) -> Any:
    """The driver's program."""

    async def main(boot: BootImage) -> int:
        hands = ExecHands(boot)
        await hands.begin(ready=False)  # victims die meanwhile
        result = await script(hands)
        await ConsoleWrite(RESULT + boot.name, json.dumps({"result": result}).encode())
        return 0

    return main


class Victim:
    """A service that writes what it is told to and then dies as its script says, in on_time."""

    def __init__(self, context: Context, die: Callable[[Context], Any]) -> None:
        self._context = context
        self._die = die
        self._at: Nanos | None = None

    async def on_ready(self) -> None:
        self._at = await self._context.after(Nanos(50 * MS))

    def next_time(self) -> Nanos | None:
        return self._at

    async def on_time(self, now: Nanos) -> None:
        context = self._context
        self._at = None
        if context.generation > 1:
            return
        if self._is_known():
            await self._die(context)
        else:
            self._at = Nanos(now + LOOK)

    def _is_known(self) -> bool:
        """Whether logd has its ring, and metricsd its page."""
        context = self._context
        has_page = "metricsd" not in context.config.uses or context.metrics.counts().opened > 0
        return context.log.counts().acknowledged > 0 and has_page

    def handle(self, _call: Any, _request: Any) -> Any:
        raise AssertionError("nobody asks")


def victim_of(die: Callable[[Context], Any]) -> Any:
    """The program of a victim; its first instance dies."""
    return program_of(lambda context: Victim(context, die), TESTSVC)


def plan_of(monkeypatch: pytest.MonkeyPatch, text: str, names: Sequence[str]) -> Plan:
    """The plan of a system whose driver and clients are scripts."""
    sources = {
        name: ProgramSource(
            name=name, module="tests.fakes.execrig", protocols=("nexus.protocols.testsvc",)
        )
        for name in names
    }
    monkeypatch.setattr(plan_module, "PROGRAMS", {**PROGRAMS, **sources})
    protocols = {"statefsd": STATEFSD, "logd": LOGD, "execd": EXECD, "metricsd": METRICSD}
    for name, protocol in {**protocols, **dict.fromkeys(DEMOS, HELLO)}.items():
        monkeypatch.setitem(initrig.PROTOCOLS, name, protocol)
    return make_plan(parse(text.encode(), Path("exec-test.toml")))


def programs_of(mains: Mapping[str, Any]) -> dict[str, Program]:
    return {
        **{name: load_program(PROGRAMS[name]) for name in (*SERVICES, *DEMOS)},
        **{
            name: program(name, reporting(main) if name == "driver" else main)
            for name, main in mains.items()
        },
    }


def boot_sim(
    monkeypatch: pytest.MonkeyPatch,
    script: Callable[[ExecHands], Any],
    *,
    text: str | None = None,
    victims: Mapping[str, Any] | None = None,
    absent: Sequence[str] = (),
    disk: Disk | None = None,
    seed: int = 1,
    seconds: int = 60,
    crashes: bool = False,
) -> Outcome:
    """Run the system on the simulated kernel. `crashes`: a task may end by an exception.

    The kernel has not got the programs that are `absent`, and refuses to start them.
    """
    mains = {"driver": driver_of(script), **(victims or {})}
    plan = plan_of(monkeypatch, system() if text is None else text, [*mains, *absent])
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
        programs_of(mains),
        seed=seed,
        recorder=record,
        limits=limits_of(plan),
        hardware=plan.hardware,
        disks={} if disk is None else {"disk": disk},
    )
    until = Nanos(kernel.now + seconds * SECOND)
    try:
        ended = kernel.run(init_program(plan, 1), b"", until=until)
    except RunOver as over:
        lines = [each.fields["line"] for each in events if each.kind is EventKind.CONSOLE]
        raise AssertionError(f"the run did not end: {lines}") from over
    assert crashes or not kernel.crashes, kernel.crashes
    return Outcome(plan, ended, events, kernel.bus.disks["disk"])


def boot_linux(
    monkeypatch: pytest.MonkeyPatch,
    script: Callable[[ExecHands], Any],
    *,
    directory: Path,
    text: str | None = None,
    victims: Mapping[str, Any] | None = None,
    seconds: int = 60,
) -> Outcome:
    """Run the system on the Linux kernel; what it keeps is in `directory`."""
    mains = {"driver": driver_of(script), **(victims or {})}
    plan = plan_of(monkeypatch, system() if text is None else text, list(mains))
    events: list[Event] = []
    pids: dict[str, int] = {}

    def record(event: Event) -> None:
        events.append(event)
        if event.kind is EventKind.SPAWN:
            pids[str(event.fields["name"])] = event.pid
        carry_out(event, obey)

    def obey(what: str, name: str) -> None:
        assert what == "kill", what
        os.kill(pids[name], signal.SIGKILL)

    kernel = LinuxKernel(
        programs_of(mains),
        recorder=record,
        limits=limits_of(plan),
        hardware=plan.hardware,
        state_dir=directory,
    )
    until = Nanos(kernel.now + seconds * SECOND)
    ended = kernel.run(init_program(plan, 1), b"", until=until)
    return Outcome(plan, ended, events)

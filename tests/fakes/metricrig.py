"""A small system with policyd, logd, statefsd and metricsd under the real init, booted again and
again on one disk, on the simulated kernel."""

import json
import signal
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

import pytest
from msgspec import structs

from nexus.abi import BootImage, ConsoleWrite, Event, EventKind, Nanos, Programs, service_id
from nexus.init import plan as plan_module
from nexus.init.ground import init_program, limits_of
from nexus.init.plan import Plan, make_plan
from nexus.init.programs import PROGRAMS, ProgramSource, load_program
from nexus.init.system import parse
from nexus.kernel.core import PowerCut
from nexus.kernel.linux import LinuxKernel
from nexus.kernel.sim.disk import Disk
from nexus.kernel.sim.kernel import SimKernel
from nexus.protocols.init import GetService, ServiceRecord
from nexus.protocols.logd import EVERY_RECORD, THIS_BOOT, Query, Record, Records
from nexus.protocols.logd import PROTOCOL as LOGD
from nexus.protocols.metricsd import (
    PROTOCOL,
    SERIES_ROWS_MAX,
    WINDOW_ROWS_MAX,
    GetHistory,
    GetSeries,
    GetStats,
    Resolution,
    Series,
    SeriesPage,
    Stats,
    Window,
    WindowPage,
)
from nexus.protocols.policyd import PROTOCOL as POLICYD
from nexus.protocols.statefsd import PROTOCOL as STATEFSD
from nexus.testing.rig import program, reporting
from tests.fakes import initrig
from tests.fakes.initrig import MS, SECOND, Main
from tests.fakes.policyrig import PAGE, carry_out
from tests.fakes.staterig import RESULT, Outcome, StateHands

REAL: Final = ("policyd", "logd", "statefsd", "metricsd")
DRIVER: Final = service_id("driver")
SETTINGS: Final = """
series = 128
series_per_service = 64
rate = 4096
read_every = "20ms"
export_every = "100ms"
short = "200ms"
long = "1s"
wal_every = "100ms"
windows = 16
segments = 4
"""
SYSTEM: Final = """
[system]
name = "metrics"
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
uses = {{ logd = {{ depth = 64, sync = false }} }}

[service.logd]
program = "logd"
stage = "core"
capabilities = ["policy.delegate"]
uses = {{ policyd = {{}} }}

[service.statefsd]
program = "statefsd"
group = "keeping"
hardware = ["disk"]
capabilities = ["policy.delegate", "device.mmio.blk"]
uses = {{ policyd = {{}}, logd = {{ sync = false }} }}
restart = {{ backoff = "2ms", backoff_max = "5ms" }}
health = {{ deadline = "2s" }}

[service.metricsd]
program = "metricsd"
group = "keeping"
capabilities = ["policy.delegate", "statefs.write", "statefs.read"]
uses = {{ policyd = {{}}, logd = {{ sync = false }}, statefsd = {{}} }}
restart = {{ backoff = "2ms", backoff_max = "5ms" }}
health = {{ deadline = "2s" }}

[service.metricsd.settings]
{settings}
{clients}
[service.driver]
program = "driver"
capabilities = [
    "proof.control", "system.observe", "system.control", "log.read", "statefs.read",
    "statefs.write", "metrics.read",
]
uses = {{ policyd = {{}}, logd = {{}}, statefsd = {{}}, metricsd = {{}} }}
health = {{ deadline = "20s", every = "0s" }}
"""
CLIENT: Final = """
[service.{name}]
program = "{name}"
capabilities = []
uses = {{ metricsd = {{}} }}
health = {{ deadline = "20s", every = "0s" }}
"""


class MetricHands(StateHands):
    """What scripts do in the system."""

    async def metricsd(self, request: Any) -> Any:
        return await self.call("metricsd", request, 10 * SECOND)

    async def stats(self) -> Stats:
        found = await self.metricsd(GetStats())
        assert isinstance(found, Stats), found
        return found

    async def series(self, name: str = "", service: int = 0) -> list[Series]:
        found: list[Series] = []
        since = 1
        while since:
            page = await self.metricsd(GetSeries(since, SERIES_ROWS_MAX, service, name))
            assert isinstance(page, SeriesPage), page
            found += page.series
            since = page.next
        return found

    async def history(
        self, name: str, resolution: Resolution = Resolution.SHORT, service: int = DRIVER
    ) -> list[Window]:
        """All windows of a series without labels."""
        found: list[Window] = []
        since = 0
        while True:
            page = await self.metricsd(
                GetHistory(service, name, [], resolution, since, WINDOW_ROWS_MAX)
            )
            if not isinstance(page, WindowPage):
                return found
            found += page.windows
            since = page.next
            if not since:
                return found

    async def service(self, name: str) -> ServiceRecord:
        return await self.reply(GetService(name), ServiceRecord)

    async def logged(self, key: str, value: str) -> list[Record]:
        """The records of this boot with that field."""
        wanted = structs.replace(EVERY_RECORD, key=key, value=value)
        page = await self.call("logd", Query(THIS_BOOT, 1, PAGE, wanted))
        assert isinstance(page, Records), page
        return page.records

    async def say(self, line: str, **evidence: Any) -> None:
        await ConsoleWrite(line, json.dumps(evidence).encode())

    async def nap(self, span: int = 100 * MS) -> None:
        await self.pause(span)


Script = Callable[[MetricHands], Awaitable[Any]]


def main_of(script: Script) -> Main:
    """A program that runs a script, tells its result and serves until the end."""

    async def main(boot: BootImage) -> int:
        hands = MetricHands(boot)
        await hands.begin(ready=boot.name == "driver")
        result = await script(hands)
        await ConsoleWrite(RESULT + boot.name, json.dumps({"result": result}).encode())
        return 0 if boot.name == "driver" else await hands.server.run()

    return main


def text_of(settings: str = "", clients: Sequence[str] = ()) -> str:
    """The system, with these settings of metricsd instead of the usual ones where they differ."""
    given = dict(line.split(" = ", 1) for line in SETTINGS.strip().splitlines())
    given |= dict(line.split(" = ", 1) for line in settings.strip().splitlines() if line)
    return SYSTEM.format(
        settings="\n".join(f"{key} = {value}" for key, value in given.items()),
        clients="".join(CLIENT.format(name=name) for name in clients),
    )


def plan_of(monkeypatch: pytest.MonkeyPatch, text: str, names: Sequence[str]) -> Plan:
    """The plan of a system whose driver and clients are scripts."""
    sources = {
        name: ProgramSource(
            name=name, module="tests.fakes.staterig", protocols=("nexus.protocols.testsvc",)
        )
        for name in names
    }
    monkeypatch.setattr(plan_module, "PROGRAMS", {**PROGRAMS, **sources})
    spoken = {"metricsd": PROTOCOL, "statefsd": STATEFSD, "logd": LOGD, "policyd": POLICYD}
    for name, protocol in spoken.items():
        monkeypatch.setitem(initrig.PROTOCOLS, name, protocol)
    return make_plan(parse(text.encode(), Path("metrics-test.toml")))


def programs_of(scripts: Mapping[str, Script]) -> Programs:
    return {
        **{name: load_program(PROGRAMS[name]) for name in REAL},
        **{name: program(name, reporting(main_of(script))) for name, script in scripts.items()},
    }


@dataclass
class SimMachine:
    """Boots the system on the simulated kernel, again and again, on what the last one left."""

    monkeypatch: pytest.MonkeyPatch
    text: str = field(default_factory=text_of)
    disks: dict[str, Disk] = field(default_factory=dict)
    boots: int = 0
    off: bool = False  # whether the power went in the latest boot

    def boot(
        self,
        script: Script,
        *,
        clients: Mapping[str, Script] | None = None,
        on_machine: Callable[[SimKernel], object] = lambda _kernel: None,
        files: Sequence[str] = (),
        seconds: int = 120,
    ) -> Outcome:
        """One boot, to the end of the script or to a power cut. `files` are what the system file
        is each time it is read again."""
        scripts = {"driver": script, **(clients or {})}
        plan = plan_of(self.monkeypatch, self.text, list(scripts))
        later = iter(files)

        def read_again() -> Plan:
            return make_plan(parse(next(later).encode(), Path("metrics-test.toml")))

        events: list[Event] = []

        def record(event: Event) -> None:
            events.append(event)
            carry_out(event, lambda *order: kernel.at(Nanos(kernel.now + 1), partial(obey, *order)))

        def obey(what: str, name: str) -> None:
            assert what == "kill", what
            task = kernel.living(name)
            if task is not None:
                kernel.end(task, 0, signal.SIGKILL)

        self.boots += 1
        kernel = SimKernel(
            programs_of(scripts),
            seed=self.boots,
            recorder=record,
            limits=limits_of(plan),
            hardware=plan.hardware,
            disks=self.disks,
        )
        _ = on_machine(kernel)
        until = Nanos(kernel.now + seconds * SECOND)
        ended: Any
        try:
            root = init_program(plan, 1, plan_source=read_again)
            ended = kernel.run(root, b"", until=until)
        except PowerCut:
            ended = None
        assert not kernel.crashes, kernel.crashes
        self.off = kernel.power.off
        self.disks = dict(kernel.bus.disks)
        if self.off:
            self.disks = {name: disk.survivors(()) for name, disk in self.disks.items()}
        return Outcome(plan, ended, events)


def boot_linux(
    monkeypatch: pytest.MonkeyPatch,
    script: Script,
    *,
    directory: Path,
    text: str,
    clients: Mapping[str, Script] | None = None,
    on_event: Callable[[Event, Mapping[str, int]], None] | None = None,
    seconds: int = 60,
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


def lines_of(outcome: Outcome) -> list[str]:
    """What the console said."""
    return [
        str(event.fields["line"]) for event in outcome.events if event.kind is EventKind.CONSOLE
    ]

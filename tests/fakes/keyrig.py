"""A system with keystored and all it stands on under the real init, on either kernel.

A machine is what lasts between boots: on sim its disks and secrets, on linux a state directory.
The driver runs a script, as in policyrig; it is `driver` or `other`, which has no right.
"""

import os
import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import pytest

from nexus.abi import BootImage, Event, EventKind, Nanos, Programs, SecretBackend
from nexus.init.ground import init_program, limits_of
from nexus.init.plan import Plan
from nexus.init.programs import PROGRAMS, load_program
from nexus.ipc import Refused
from nexus.kernel.core import PowerCut
from nexus.kernel.linux import LinuxKernel, secrets
from nexus.kernel.sim.disk import Disk
from nexus.kernel.sim.kernel import SimKernel
from nexus.protocols.keystored import PROTOCOL as KEYSTORED
from nexus.protocols.keystored import KeystoredStatus
from nexus.protocols.rngd import PROTOCOL as RNGD
from nexus.protocols.statefsd import PROTOCOL as STATEFSD
from nexus.testing.rig import program, reporting
from nexus.wire import ReplyStatus
from tests.fakes import initrig
from tests.fakes.initrig import MS, SECOND, Main
from tests.fakes.policyrig import (
    Hands,
    Outcome,
    Script,
    carry_out,
    driver_of,
    plan_of,
)

SYSTEM: Final = """
[system]
name = "keys"
total_size = "24MiB"
owner_size = "512KiB"
ends_with = "driver"

[device.noise]
kind = "entropy"

[device.disk]
kind = "block"
size = "4MiB"

[group.keys] # a test kills more often than a system should bear
restarts = 100
within = "30s"

[service.policyd]
program = "policyd"
capabilities = ["policy.authority"]
uses = { logd = { depth = 64, sync = false } }
restart = { backoff = "50ms", backoff_max = "100ms" }
health = { deadline = "2s", every = "250ms", answer = "500ms" }

[service.policyd.settings] # a test that looks for each decision asks many times at once
audit_rate = 1000
audit_places = 256

[service.logd]
program = "logd"
stage = "core"
capabilities = ["policy.delegate"]
uses = { policyd = {} }

[service.logd.settings]
records = 1024
size = 262_144
core = "policyd"
core_rate = 1000

[service.rngd]
program = "rngd"
capabilities = ["policy.delegate", "device.mmio.rng"]
hardware = ["noise"]
uses = { policyd = {}, logd = { sync = false } }
restart = { backoff = "50ms" }

[service.statefsd]
program = "statefsd"
owner_size = "4MiB"
capabilities = ["policy.delegate", "device.mmio.blk"]
hardware = ["disk"]
uses = { policyd = {}, logd = { sync = false } }
restart = { backoff = "50ms" }

[service.keystored]
program = "keystored"
group = "keys"
owner_size = "4MiB"
isolation = "exec"
secret = "file"
capabilities = [
    "policy.delegate", "statefs.keystore", "rng.entropy", "secret.file", "secret.keyring",
]
uses = { policyd = {}, logd = { sync = false }, rngd = {}, statefsd = {} }
restart = { backoff = "50ms", backoff_max = "100ms" }
health = { deadline = "5s" }

[service.other]
program = "guard"
capabilities = ["log.read"]
uses = { keystored = {} }
health = { deadline = "20s", every = "0s" }

[service.driver]
program = "driver"
owner_size = "1MiB"
capabilities = [
    "proof.control", "system.observe", "system.control", "log.read",
    "device.keygen", "device.pubkey.read", "crypto.sign", "device.key.rotate",
]
uses = { policyd = {}, logd = {}, keystored = {}, statefsd = {} }
health = { deadline = "60s", every = "0s" }
"""
DRAWING: Final = SYSTEM.replace('"device.keygen",', '"device.keygen", "rng.entropy",').replace(
    "keystored = {}, statefsd = {} }", "keystored = {}, statefsd = {}, rngd = {} }"
)
"""The driver may draw entropy too."""

assert DRAWING.count("rngd = {}") == SYSTEM.count("rngd = {}") + 1

REAL: Final = ("policyd", "logd", "rngd", "statefsd", "keystored")


async def idle(boot: BootImage) -> int:
    """A second client, with nothing to do."""
    hands = Hands(boot)
    await hands.begin(ready=False)
    return await hands.server.run()


async def asked(hands: Hands, *requests: Any) -> list[Any]:
    """What keystored answers: the name of a refusal, or the reply."""
    found = []
    for request in requests:
        outcome = await hands.call("keystored", request, 10 * SECOND)
        if isinstance(outcome, Refused):
            assert isinstance(outcome.status, KeystoredStatus | ReplyStatus)
            found.append(outcome.status.name)
        else:
            found.append(outcome)
    return found


@dataclass
class SimMachine:
    """Boots the system on the simulated kernel, again and again."""

    monkeypatch: pytest.MonkeyPatch
    seed: int = 1
    text: str = SYSTEM
    trace: bool = False
    disks: dict[str, Disk] = field(default_factory=dict)
    secrets: dict[tuple[str, SecretBackend], bytes] = field(default_factory=dict)
    kernels: list[SimKernel] = field(default_factory=list)

    @property
    def kernel(self) -> SimKernel:
        """Of the latest boot."""
        return self.kernels[-1]

    def boot(
        self,
        script: Script,
        *,
        mains: Mapping[str, Main] | None = None,
        on_event: Callable[[SimKernel, Event], None] = lambda _kernel, _event: None,
        on_machine: Callable[[SimKernel], None] = lambda _kernel: None,
        seconds: int = 120,
    ) -> Outcome:
        """One boot, to the end of the script or to a power cut."""
        plan = planned(self.monkeypatch, self.text)
        events: list[Event] = []

        def record(event: Event) -> None:
            events.append(event)
            carry_out(event, lambda *order: kernel.at(Nanos(kernel.now + 1), partial(obey, *order)))
            on_event(kernel, event)

        def obey(what: str, name: str) -> None:
            if what == "mark":
                return
            if what == "freeze":
                _ = kernel.freeze(name, Nanos(kernel.now + 30 * SECOND))
                return
            task = kernel.living(name)
            if task is not None:
                kernel.end(task, 0, signal.SIGKILL)

        kernel = SimKernel(
            programs_of(script, mains or {}),
            seed=self.seed,
            recorder=record,
            limits=limits_of(plan),
            hardware=plan.hardware,
            disks=self.disks,
            secrets=self.secrets,
            trace=self.trace,
        )
        self.kernels.append(kernel)
        on_machine(kernel)
        until = Nanos(kernel.now + seconds * SECOND)
        ended: Any
        try:
            ended = kernel.run(init_program(plan, 1), b"", until=until)
        except PowerCut:
            ended = None
        assert not kernel.crashes, kernel.crashes
        self.disks = dict(kernel.bus.disks)
        if kernel.power.off:
            self.disks = {name: disk.survivors(()) for name, disk in self.disks.items()}
        self.secrets = dict(kernel.secrets.kept)
        return Outcome(plan, ended, events)


@dataclass
class LinuxMachine:
    """Boots the system of `text` on the Linux kernel backend, in the calling process."""

    monkeypatch: pytest.MonkeyPatch
    state: Path
    text: str = SYSTEM
    entry: str = ""  # of keystored, if it is another one

    @property
    def secret_path(self) -> Path:
        """Where the kernel keeps keystored's secret."""
        return self.state / secrets.DIRECTORY / "keystored" / secrets.NAME

    @property
    def secret(self) -> bytes:
        """What it keeps; only root and keystored may look."""
        return self.secret_path.read_bytes()

    def boot(
        self,
        script: Script,
        *,
        mains: Mapping[str, Main] | None = None,
        obey: Callable[[str, int], None] | None = None,
        seconds: int = 120,
    ) -> Outcome:
        """One boot, to the end of the script; `obey` does further things that the driver orders."""
        plan = planned(self.monkeypatch, self.text)
        events: list[Event] = []
        pids: dict[str, int] = {}
        signals = {"freeze": signal.SIGSTOP, "kill": signal.SIGKILL}

        def record(event: Event) -> None:
            events.append(event)
            if event.kind is EventKind.SPAWN:
                pids[str(event.fields["name"])] = event.pid
            carry_out(event, act)

        def act(what: str, name: str) -> None:
            if what in signals:
                os.kill(pids[name], signals[what])
            elif what != "mark":
                assert obey is not None, what
                obey(what, pids[name])

        programs = dict(programs_of(script, mains or {}, executes=True))
        if self.entry:
            programs["keystored"] = replace(programs["keystored"], entry=self.entry)
        kernel = LinuxKernel(
            programs,
            recorder=record,
            limits=limits_of(plan),
            hardware=plan.hardware,
            state_dir=self.state,
        )
        until = Nanos(kernel.now + seconds * SECOND)
        ended = kernel.run(init_program(plan, 1), b"", until=until)
        return Outcome(plan, ended, events)


def planned(monkeypatch: pytest.MonkeyPatch, text: str) -> Plan:
    """The plan of the system, whose clients may speak with all of it."""
    for name, protocol in (("keystored", KEYSTORED), ("rngd", RNGD), ("statefsd", STATEFSD)):
        monkeypatch.setitem(initrig.PROTOCOLS, name, protocol)
    return plan_of(monkeypatch, text)


def programs_of(script: Script, mains: Mapping[str, Main], *, executes: bool = False) -> Programs:
    given = {"guard": reporting(idle), "driver": reporting(driver_of(script)), **mains}
    return {
        **{
            name: load_program(PROGRAMS[name], executes=executes)
            for name in REAL
            if name not in given
        },
        **{name: program(name, main) for name, main in given.items()},
    }


async def nap(hands: Hands, span: int = 100 * MS) -> None:
    """Let the others work."""
    await hands.pause(span)

"""A system with updated and all it stands on under the real init, on either kernel.

A machine is what lasts between boots: its disks, and init's memory. Before each boot the loader's
own `choose` decides over the very disks which slot it is. The driver runs a script, as policyrig's.
"""

import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

import pytest

from nexus.abi import BLOCK_SIZE, CapClose, Event, EventKind, ExitInfo, Nanos, Programs
from nexus.bootctl import BlockBoot, BootRecord, SlotName
from nexus.bootctl.handover import read_failure
from nexus.drivers import finished
from nexus.init.ground import init_program, limits_of
from nexus.init.programs import PROGRAMS, load_program
from nexus.ipc import (
    Answer,
    Closed,
    Refused,
    RetryBudget,
    Stale,
    may_repeat,
    offer_bulk,
    retry_until,
)
from nexus.kernel.core import PowerCut
from nexus.kernel.linux import LinuxKernel
from nexus.kernel.sim.disk import Disk
from nexus.kernel.sim.kernel import SimKernel
from nexus.loader.choose import Chosen, Ended, choose
from nexus.protocols.statefsd import PROTOCOL as STATEFSD
from nexus.protocols.updated import PROTOCOL as UPDATED
from nexus.protocols.updated import (
    Begin,
    BeginInline,
    Begun,
    Chunk,
    ChunkInline,
    Finish,
    PutMetadata,
)
from nexus.testing.rig import program, reporting
from tests.fakes import initrig
from tests.fakes.diskdevice import DiskDevice
from tests.fakes.initrig import MS, SECOND, Main
from tests.fakes.keyrig import idle
from tests.fakes.policyrig import (
    Hands,
    Outcome,
    Script,
    carry_out,
    driver_of,
    plan_of,
)
from tests.fakes.updates import BOOT_BLOCKS, SLOT_BLOCKS, Device, Made, Maker

SYSTEM: Final = """
[system]
name = "updates"
total_size = "24MiB"
owner_size = "512KiB"
ends_with = "driver"
trial_settle = "100ms"

[device.disk]
kind = "block"
size = "4MiB"

[device.boot]
kind = "block"
size = "64KiB"

[device.slot-a]
kind = "block"
size = "1MiB"

[device.slot-b]
kind = "block"
size = "1MiB"

[group.updates] # a test kills more often than a system should bear
restarts = 100
within = "30s"

[service.policyd]
program = "policyd"
capabilities = ["policy.authority"]
uses = { logd = { depth = 64, sync = false } }
restart = { backoff = "50ms", backoff_max = "100ms" }
health = { deadline = "2s", every = "250ms", answer = "500ms" }

[service.policyd.settings]
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
core = "policyd updated"
core_rate = 1000

[service.statefsd]
program = "statefsd"
owner_size = "4MiB"
capabilities = ["policy.delegate", "device.mmio.blk"]
hardware = ["disk"]
uses = { policyd = {}, logd = { sync = false } }
restart = { backoff = "50ms" }

[service.updated]
program = "updated"
group = "updates"
owner_size = "4MiB"
isolation = "exec"
hardware = ["boot", "slot-a", "slot-b"]
capabilities = [
    "policy.delegate", "statefs.boot", "statefs.snapshot", "device.mmio.blk", "system.reboot",
]
uses = { policyd = {}, logd = { sync = false }, statefsd = {} }
restart = { backoff = "50ms", backoff_max = "100ms" }
health = { deadline = "5s", answer = "12s" }

[service.other]
program = "guard"
capabilities = ["log.read"]
uses = { updated = {} }
health = { deadline = "20s", every = "0s" }

[service.driver]
program = "driver"
owner_size = "4MiB"
capabilities = [
    "proof.control", "system.observe", "system.control", "log.read", "statefs.read",
    "statefs.write", "update.read", "update.stage", "update.switch", "update.commit",
    "update.rollback",
]
uses = { policyd = {}, logd = {}, updated = {}, statefsd = {} }
health = { deadline = "60s", every = "0s" }
"""
REAL: Final = ("policyd", "logd", "statefsd", "updated")
DEVELOPMENT: Final = """
[service.updated.settings]
development_keys = true
"""

assert BOOT_BLOCKS * BLOCK_SIZE == 64 * 1024
assert SLOT_BLOCKS * BLOCK_SIZE == 1024 * 1024


@dataclass
class UpdateMachine:
    """Boots the system from the slot that the loader chooses, again and again."""

    monkeypatch: pytest.MonkeyPatch
    text: str = SYSTEM
    seed: int = 1
    maker: Maker = field(default_factory=Maker)
    disks: dict[str, Disk] = field(default_factory=dict)
    memory: bytes = b""
    ended: Ended | None = None
    was_cut: bool = False  # the latest boot ended without a word
    chosen: Chosen | None = None
    kernels: list[SimKernel] = field(default_factory=list)

    def __post_init__(self) -> None:
        """A new device, provisioned as of version 10."""
        device = Device(self.maker)
        self.first = device.first
        self.disks |= {
            "boot": device.boot_disk,
            **{f"slot-{name}": disk for name, disk in device.slot_disks.items()},
        }

    @property
    def slots(self) -> dict[SlotName, DiskDevice]:
        return {name: DiskDevice(self.disks[f"slot-{name}"]) for name in SlotName}

    def record(self) -> BootRecord:
        """The boot-control record as it is on the disk."""
        return finished(BlockBoot(DiskDevice(self.disks["boot"])).load())

    def slot_bytes(self, name: SlotName) -> bytes:
        return self.disks[f"slot-{name}"].image()

    def boot(
        self,
        script: Script,
        *,
        mains: Mapping[str, Main] | None = None,
        on_event: Callable[[SimKernel, Event], None] = lambda _kernel, _event: None,
        on_machine: Callable[[SimKernel], None] = lambda _kernel: None,
        loads: bool = True,
        seconds: int = 120,
    ) -> Outcome:
        """One boot, to the end of the script, a reboot or a power cut."""
        for name, protocol in (("updated", UPDATED), ("statefsd", STATEFSD)):
            self.monkeypatch.setitem(initrig.PROTOCOLS, name, protocol)
        plan = plan_of(self.monkeypatch, self.text)
        if loads:
            control = BlockBoot(DiskDevice(self.disks["boot"]))
            self.chosen = finished(choose(control, self.slots, self.ended))
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
            boot_memory=self.memory,
        )
        self.kernels.append(kernel)
        on_machine(kernel)
        slot_boot = self.chosen.boot if self.chosen is not None and loads else None
        root = init_program(plan, 1, slot_boot=slot_boot)
        until = Nanos(kernel.now + seconds * SECOND)
        ended: ExitInfo | None
        try:
            ended = kernel.run(root, b"", until=until)
        except PowerCut:
            ended = None
        assert not kernel.crashes, kernel.crashes
        self.disks = dict(kernel.bus.disks)
        if kernel.power.off:
            self.disks = {name: disk.survivors(()) for name, disk in self.disks.items()}
        self.memory = kernel.boot_memory or b""
        self.was_cut = ended is None
        if ended is None:
            self.ended = Ended()
        else:
            failure = read_failure(self.memory)
            self.ended = Ended(code=ended.code, signal=ended.signal, failure=failure)
        return Outcome(plan, ended, events)  # type: ignore[arg-type]


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


# ------------------------------------------------------------------ what scripts do


async def ask(hands: Hands, request: Any, wait: int = 20 * SECOND) -> Any:
    """updated's answer: the name of a refusal, or the reply."""
    outcome = await hands.call("updated", request, wait)
    return outcome.status.name if isinstance(outcome, Refused) else outcome


async def ask_with(hands: Hands, request: Any, data: bytes, wait: int = 5 * SECOND) -> Any:
    """The same, with bytes in a VMO; offered again to the next instance if this one is gone."""
    budget = RetryBudget(attempts_max=5, backoff=Nanos(10 * MS), deadline=await hands.ahead(wait))
    client = hands.client("updated")

    async def attempt() -> Any:
        slot = await offer_bulk(data)
        assert slot is not None
        outcome = await client.ask(request, budget.deadline, move=slot)
        if isinstance(outcome, Closed | Stale):
            await CapClose(slot)
        return outcome

    outcome = await retry_until(attempt, may_repeat, budget, client.tokens)
    if isinstance(outcome, Answer):
        return outcome.reply
    return outcome.status.name if isinstance(outcome, Refused) else outcome


async def begin(hands: Hands, made: Made) -> Any:
    """Begin with the metadata in a VMO."""
    return await ask_with(hands, Begin(0, len(made.metadata)), made.metadata)


async def begin_inline(hands: Hands, made: Made, piece: int = 4096) -> Any:
    """Begin with the metadata in pieces."""
    for at in range(0, len(made.metadata), piece):
        _ = await ask(hands, PutMetadata(at, made.metadata[at : at + piece]))
    return await ask(hands, BeginInline(len(made.metadata)))


async def stage(hands: Hands, made: Made, *, piece: int = 1024, inline: bool = False) -> Any:
    """Everything until it is staged, or the name of a refusal."""
    begun = await (begin_inline(hands, made) if inline else begin(hands, made))
    if not isinstance(begun, Begun):
        return begun
    for at in range(begun.offset, len(made.data), piece):
        data = made.data[at : at + piece]
        request = ChunkInline(at, data) if inline else Chunk(at, 0, len(data))
        taken = await (ask(hands, request) if inline else ask_with(hands, request, data))
        if isinstance(taken, str):
            return taken
    return await ask(hands, Finish())


@dataclass
class LinuxUpdateMachine:
    """The same system on the Linux kernel backend, in the calling process, on images in `state`.

    It boots without the loader, as of slot a. `pids` are of the latest instances.
    """

    monkeypatch: pytest.MonkeyPatch
    state: Path
    text: str = SYSTEM
    slot_blocks: int = SLOT_BLOCKS
    pids: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """A new device, provisioned as of version 10, that was booted once."""
        device = Device(slot_blocks=self.slot_blocks)
        _ = device.boot()
        self.maker = device.maker
        self.first = device.first
        disks = {"boot": device.boot_disk}
        disks |= {f"slot-{name}": disk for name, disk in device.slot_disks.items()}
        for name, disk in disks.items():
            content = disk.image()
            with (self.state / f"{name}.img").open("wb") as file:
                _ = file.write(content.rstrip(b"\0"))
                _ = file.truncate(len(content))

    def record(self) -> BootRecord:
        """The boot-control record as it is in the image."""
        disk = Disk(BOOT_BLOCKS, (self.state / "boot.img").read_bytes())
        return finished(BlockBoot(DiskDevice(disk)).load())

    def slot_bytes(self, name: SlotName) -> bytes:
        return (self.state / f"slot-{name}.img").read_bytes()

    def boot(
        self,
        script: Script,
        *,
        obey: Callable[[str, str], None] = lambda _what, _name: None,
        seconds: int = 120,
    ) -> Outcome:
        """One boot, to the end of the script; `obey` is what the driver orders from outside."""
        for name, protocol in (("updated", UPDATED), ("statefsd", STATEFSD)):
            self.monkeypatch.setitem(initrig.PROTOCOLS, name, protocol)
        plan = plan_of(self.monkeypatch, self.text)
        events: list[Event] = []

        def record(event: Event) -> None:
            events.append(event)
            if event.kind is EventKind.SPAWN:
                self.pids[str(event.fields["name"])] = event.pid
            carry_out(event, obey)

        kernel = LinuxKernel(
            programs_of(script, {}, executes=True),
            recorder=record,
            limits=limits_of(plan),
            hardware=plan.hardware,
            state_dir=self.state,
        )
        until = Nanos(kernel.now + seconds * SECOND)
        ended = kernel.run(init_program(plan, 1), b"", until=until)
        return Outcome(plan, ended, events)

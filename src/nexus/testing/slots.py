"""An updatable device in the simulator: each boot goes through the loader, as on a board.

    device = Slots(tmp_path, system, seed=1)         # provisioned with its first set
    bad = device.publish(worse, 2)                   # built and signed by whom it trusts
    _ = device.boot(updating(bad))                   # staged, switched, rebooted
    assert device.boot(judging).exit_code == EXIT_SLOT_FAILED
    assert device.boot(judging).slot.slot == "a"     # back, by itself

What is planned is the system file that stands in the slot. A simulated machine runs one copy of
the code, so a set brings its own programs as a table: `services` of a `Published` replaces those
of that name while its set runs, and every program's digest is stamped with the set's.
"""

from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

from nexus.abi import (
    BLOCK_SIZE,
    BootImage,
    Event,
    EventKind,
    Nanos,
    Program,
    SecretBackend,
    Trap,
)
from nexus.bootctl import (
    BlockBoot,
    BootRecord,
    SlotBoot,
    SlotInfo,
    SlotName,
    TrialFailure,
    read_failure,
)
from nexus.bootctl.handover import EXIT_REBOOT, EXIT_SLOT_FAILED
from nexus.bootctl.provision import provision
from nexus.bundle.build import Release, build
from nexus.drivers import finished
from nexus.init.ground import init_program, limits_of, programs_of
from nexus.init.plan import Plan, load_plan
from nexus.init.system import load
from nexus.kernel.core import PowerCut, RunOver
from nexus.kernel.sim import SimKernel
from nexus.kernel.sim.clock import WALL_START
from nexus.kernel.sim.disk import NOTHING, Choice, Disk
from nexus.kernel.sim.faults import Faults
from nexus.kernel.sim.power import Cut
from nexus.loader.choose import Chosen, Ended, SlotSource, choose
from nexus.loader.tree import tree_of
from nexus.proof.powercut import DiskDevice
from nexus.protocols.init import Reboot, TrialState
from nexus.protocols.updated import (
    COMMIT_RIGHT,
    INLINE_PIECE_MAX,
    READ_RIGHT,
    ROLLBACK_RIGHT,
    STAGE_RIGHT,
    SWITCH_RIGHT,
    BeginInline,
    ChunkInline,
    Finish,
    PutMetadata,
    Staged,
    Switch,
    Switched,
)
from nexus.sets import BytesSource
from nexus.testing.device import (
    RUN_MAX,
    TESTER,
    Device,
    Inside,
    Run,
    Scenario,
    SystemDied,
    copied,
    is_end,
    plan_with_tester,
    span_of,
)
from nexus.trust import Target, encode_metadata
from nexus.trust.sign import ROLES, RoleKeys, Signer, Term, first_root, release, signer_of

BOOT: Final = "boot"  # the devices' names in the system file
SLOTS: Final = {name: f"slot-{name.value}" for name in SlotName}
UPDATED: Final = "updated"  # the services' names
RIGHTS: Final = (READ_RIGHT, STAGE_RIGHT, SWITCH_RIGHT, COMMIT_RIGHT, ROLLBACK_RIGHT)
HEALTH: Final = 20_000_000_000  # ns a trial has, unless its set says another
ISSUED: Final = 1_790_000_000  # s since 1970; no clock is asked
LASTS: Final = 365 * 86_400  # s until a release ends
TAIL_LINES: Final = 24  # of a boot's console, for the reason; the record clips them once more
CALL_MAX: Final = "20s"  # of virtual time: a set is read back and unpacked
POLL: Final = "20ms"
POLLS_MAX: Final = 6_000  # looks at a trial: two minutes of virtual time

Main = Callable[[BootImage], Coroutine[Trap[Any], Any, int | None]]
NO_SERVICES: Final[Mapping[str, Main]] = {}


GOING_DOWN: Final = (EXIT_REBOOT, EXIT_SLOT_FAILED)


def _nothing(_disk: Disk) -> Choice:
    """Nothing that was cached survives."""
    return NOTHING


@dataclass(frozen=True, kw_only=True)
class Published:
    """A set that was built and signed: what an update brings, and the programs it runs."""

    version: int
    name: str
    floor: int
    metadata: bytes  # as PutMetadata takes it
    content: bytes  # the set file
    services: Mapping[str, Main] = field(default_factory=dict)  # by program

    @property
    def digest(self) -> bytes:
        """SHA-256 of the set file."""
        return sha256(self.content).digest()


class Publisher:
    """Who makes sets and signs them, with keys that are those of its name."""

    def __init__(self, name: str = "publisher") -> None:
        self._signers: dict[str, Signer] = {
            role: signer_of(sha256(f"nexus.testing.slots {name} {role}".encode()).digest())
            for role in ROLES
        }
        roles = {role: RoleKeys([each.public_key], 1) for role, each in self._signers.items()}
        self._files: Mapping[str, bytes] = first_root(
            roles, self._all, Term(ISSUED, ISSUED + LASTS), development=False
        )
        self._count = 0
        (self.root,) = self._files.values()  # the trust anchor

    @property
    def _all(self) -> list[Signer]:
        return list(self._signers.values())

    def publish(
        self,
        system: Path,
        version: int,
        *,
        health: int = HEALTH,
        schemas: Mapping[str, int] | None = None,
        floor: int = 0,
        services: Mapping[str, Main] = NO_SERVICES,
    ) -> Published:
        """The set of a system file as the next release. Raises what `nexus bundle build` does."""
        name = f"1.{version}.0"
        said = Release(version=version, name=name, health=health, schemas=schemas or {})
        content = build(system, said)
        target = Target(
            name=name,
            length=len(content),
            sha256=sha256(content).digest(),
            version=version,
            floor=floor,
        )
        self._count += 1
        issued = ISSUED + self._count
        self._files = release(self._files, target, self._all, Term(issued, issued + LASTS))
        return Published(
            version=version,
            name=name,
            floor=floor,
            metadata=encode_metadata(self._files),
            content=content,
            services=services,
        )


@dataclass(frozen=True, kw_only=True)
class Boot:
    """One boot: which slot, how it went, and what it left.

    `spawned` is each started service's program digest, stamped: `stamped` makes it.
    """

    slot: SlotBoot
    run: Run
    plan: Plan
    failure: TrialFailure | None
    finished: bool  # the scenario came to its end
    spawned: Mapping[str, str]

    @property
    def exit_code(self) -> int:
        """init's; 1 after a power cut."""
        return self.run.exit_code

    @property
    def console(self) -> tuple[str, ...]:
        """What was said."""
        return self.run.console


class Slots:
    """The device: its disks, secrets and clock, from boot to boot; `boots` are those that were.

    `home` is for the trees of its slots. It is provisioned with the set of `system`, version 1, and
    its disks are as large as that file says.
    """

    def __init__(
        self,
        home: Path,
        system: Path,
        *,
        seed: int,
        schemas: Mapping[str, int] | None = None,
        services: Mapping[str, Main] = NO_SERVICES,
    ) -> None:
        self._home = home
        self._seed = seed
        self._publisher = Publisher()
        self._sets: dict[str, Published] = {}  # by digest, hexadecimal
        self._ended: Ended | None = None  # how the boot before ended; None before the first
        self.boots: list[Boot] = []
        self.secrets: Mapping[tuple[str, SecretBackend], bytes] = {}
        self.boot_memory = b""
        self.wall = WALL_START
        self.disks = {
            each.name: Disk(each.size // BLOCK_SIZE)
            for each in load_plan(system).hardware
            if each.name in (BOOT, *SLOTS.values())
        }
        self.first = self.publish(system, 1, schemas=schemas, services=services)
        info = SlotInfo(
            version=self.first.version,
            name=self.first.name,
            digest=self.first.digest,
            size=len(self.first.content),
        )
        slot = DiskDevice(self.disks[SLOTS[SlotName.A]])
        source = BytesSource(self.first.content)
        root = self._publisher.root
        _ = finished(provision(self._control, slot, source, info, root, wall=self.wall))

    def publish(self, system: Path, version: int, **said: Any) -> Published:
        """As Publisher.publish, by whom the device trusts; the device knows its programs then."""
        made = self._publisher.publish(system, version, **said)
        self._sets[made.digest.hex()] = made
        return made

    # ------------------------------------------------------------------ what it holds

    @property
    def _control(self) -> BlockBoot:
        return BlockBoot(DiskDevice(self.disks[BOOT]))

    @property
    def record(self) -> BootRecord:
        """The boot-control record as it is on the boot device now."""
        return finished(self._control.load())

    def content(self, name: SlotName) -> bytes:
        """What stands in a slot, as many bytes as the record says that its set has."""
        return self.disks[SLOTS[name]].image()[: self.record.slot(name).size]

    # ------------------------------------------------------------------ booting

    def boot(
        self,
        scenario: Scenario,
        *,
        rights: tuple[str, ...] = (),
        within: str = RUN_MAX,
        cut: Cut | None = None,
        survivors: Callable[[Disk], Choice] = _nothing,
        on_machine: Callable[[SimKernel], None] | None = None,
        faults: Faults | None = None,
    ) -> Boot:
        """One boot, from the loader's choice to the end; with `cut` the power goes there.

        `survivors` says which cached writes of a disk a power cut leaves. `on_machine` is shown the
        machine before it runs, and `faults` are its kernel's. A system that goes down by itself
        before the scenario ends, as a failed trial does, is no error: `finished` is False then.
        What else the scenario raises is raised here, and the loader's NothingBootable.
        """
        chosen = self._choose()
        plan = plan_with_tester(load(self._tree(chosen) / chosen.manifest.system), RIGHTS + rights)
        inside = Inside(plan, scenario, stays=True)
        spawned: dict[str, str] = {}

        def record(event: Event) -> None:
            inside.record(event)
            if event.kind is EventKind.SPAWN:
                spawned[str(event.fields["name"])] = str(event.fields["digest"])

        kernel = SimKernel(
            {**self._programs(plan, chosen.boot), plan.by_name[TESTER].program: inside.program},
            seed=self._seed + len(self.boots),
            recorder=record,
            cpu_count=plan.smp,
            limits=limits_of(plan),
            boot_memory=self.boot_memory,
            hardware=plan.hardware,
            disks={name: copied(disk) for name, disk in self.disks.items()},
            secrets=self.secrets,
            wall_start=self.wall,
            faults=faults,
        )
        inside.kernel = kernel
        if cut is not None:
            kernel.power.plan(cut)
        if on_machine is not None:
            on_machine(kernel)
        root = init_program(plan, plan.smp, slot_boot=chosen.boot)
        until = Nanos(kernel.now + span_of(within))
        try:
            ended = kernel.run(root, plan.digest.encode(), until=until)
        except PowerCut as power:
            disks = {
                name: each.survivors(survivors(each)) for name, each in kernel.bus.disks.items()
            }
            run = inside.left(1, disks, power.why)
        except RunOver as over:
            raise (inside.raised or SystemDied(inside.told(str(over)))) from over
        else:
            run = inside.left(ended.code, kernel.bus.disks)
        self._keep(run)
        raised = inside.raised
        if raised is not None and not (run.exit_code in GOING_DOWN and is_end(raised)):
            raise raised
        made = Boot(
            slot=chosen.boot,
            run=run,
            plan=plan,
            failure=read_failure(run.boot_memory),
            finished=inside.finished,
            spawned=spawned,
        )
        self.boots.append(made)
        return made

    def _choose(self) -> Chosen:
        """What the loader boots now; the boot device says so before anything is started."""
        slots = {name: DiskDevice(self.disks[device]) for name, device in SLOTS.items()}
        return finished(choose(self._control, slots, self._ended, wall=self.wall))

    def _tree(self, chosen: Chosen) -> Path:
        name = SlotName(chosen.boot.slot)
        size = chosen.record.slot(name).size
        source = SlotSource(DiskDevice(self.disks[SLOTS[name]]), size)
        return tree_of(self._home, chosen.record, name, chosen.manifest, source)

    def _programs(self, plan: Plan, slot: SlotBoot) -> dict[str, Program]:
        """The programs of the set in a slot, each stamped with it."""
        own = self._sets[slot.digest].services
        return {
            name: replace(
                program,
                main=own.get(name, program.main),
                digest=stamped(program.digest, slot.digest),
            )
            for name, program in programs_of(plan).items()
        }

    def _keep(self, run: Run) -> None:
        """What outlives the boot, and what a loader on a board would have seen of its end."""
        self.disks = {**self.disks, **run.disks}
        self.secrets, self.boot_memory, self.wall = run.secrets, run.boot_memory, run.wall
        self._ended = Ended(
            code=None if run.cut else run.exit_code,
            failure=read_failure(run.boot_memory),
            tail="\n".join(run.console[-TAIL_LINES:]),
        )


def stamped(program_digest: str, set_digest: str) -> str:
    """The digest of a program that is of this set: no two sets have it, though the code be one."""
    return sha256(f"{program_digest} of {set_digest}".encode()).hexdigest()


# ---------------------------------------------------------------- what scenarios do


async def stage(device: Device, update: Published) -> Staged:
    """Bring an update to the standby slot, in pieces that fit a frame. Raises CallFailed."""
    for offset in range(0, len(update.metadata), INLINE_PIECE_MAX):
        piece = update.metadata[offset : offset + INLINE_PIECE_MAX]
        _ = await device.call(UPDATED, PutMetadata(offset, piece))
    begun = await device.call(UPDATED, BeginInline(len(update.metadata)), CALL_MAX)
    for offset in range(begun.offset, len(update.content), INLINE_PIECE_MAX):
        piece = update.content[offset : offset + INLINE_PIECE_MAX]
        _ = await device.call(UPDATED, ChunkInline(offset, piece), CALL_MAX)
    return await device.call(UPDATED, Finish(), CALL_MAX)


async def switch(device: Device, update: Published, *, tries: int = 1) -> Switched:
    """Have the staged set tried from the next boot on; this one goes on. Raises CallFailed."""
    return await device.call(UPDATED, Switch(update.digest, tries, False), CALL_MAX)


def updating(update: Published, *, tries: int = 1) -> Scenario:
    """The scenario of a boot that stages a set, has it tried, and reboots."""

    async def scenario(device: Device) -> None:
        _ = await stage(device, update)
        _ = await switch(device, update, tries=tries)
        await reboot(device)

    return scenario


async def reboot(device: Device) -> None:
    """Ask init for another boot, and wait for the end of this one."""
    _ = await device.init(Reboot())
    await until_end(device)


async def until_end(device: Device) -> None:
    """Wait until the system has gone down around the scenario."""
    await device.sleep("30s")
    raise AssertionError("the system goes on")


async def judging(device: Device) -> None:
    """The scenario of a boot that only waits until its trial, if it is one, is over."""
    for _ in range(POLLS_MAX):
        info = await device.system()
        if info.trial in (TrialState.NONE, TrialState.COMMITTED):
            return
        await device.sleep(POLL)
    raise AssertionError("nobody judged")

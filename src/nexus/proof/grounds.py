"""What the child process does on each ground: boot a system, or run the bare scenario.

Proof picks a ground here; nothing below knows which one it is on.
"""

import os
import signal
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Final

from nexus.abi import BLOCK_SIZE, Event, ExitInfo, Nanos, SecretBackend
from nexus.init.ground import Places, boot
from nexus.init.plan import Plan, load_plan
from nexus.kernel.core import Hang, Hardware, PowerCut, RunOver
from nexus.kernel.linux import LinuxKernel
from nexus.kernel.linux.groups import delegated
from nexus.kernel.sim import SimKernel
from nexus.kernel.sim.disk import NOTHING, Choice, Disk, Piece
from nexus.kernel.sim.power import Cut, Moment
from nexus.proof import scenario
from nexus.proof.loading import BOOT_MEMORY_NAME, WALL, slot_boot_of
from nexus.proof.remains import (
    IMAGE_SUFFIX,
    RUNTIME,
    SECRET_SUFFIX,
    image_of,
    kept_secret,
)
from nexus.proof.runner import EXIT_HANG, EXIT_POWER_CUT, EXIT_RUN_OVER, Job
from nexus.proof.scrape import SimScraper, port_of
from nexus.proof.scraper import kept_at
from nexus.proof.sink import EventSink
from nexus.protocols.ladder import Ground

EXIT_SIGNAL: Final = 128  # plus the signal that ended the root task, as a shell counts


@dataclass(frozen=True, kw_only=True, slots=True)
class BootEnd:
    """How a boot ended, and the simulated kernel's event log."""

    exit_code: int
    log_lines: Iterable[str] = ()


def boot_system(job: Job, sink: EventSink) -> BootEnd:
    """Boot a system file, the first time with the kernel's self-test in front. Of a device with
    slots it is that of the set the loader chose."""
    plan = load_plan(Path(job.system))
    ground = Ground(job.ground)
    assert job.state is not None, "a system is booted with a state directory"
    kept = Kept(Path(job.state))
    machines: list[SimKernel] = []
    stops: list[int] = []  # signals of a runner that has seen enough

    scrapers: list[SimScraper] = []

    def on_machine(kernel: SimKernel) -> None:
        machines.append(kernel)
        port = port_of(plan)
        if port is not None:
            keep = kept_at(kept.state, job.boot).write_bytes
            scrapers.append(SimScraper(kernel, port, keep))
        _ = signal.signal(signal.SIGTERM, stop)
        if job.cut_at:
            kernel.power.plan(cut_of(job))

    def stop(number: int, _frame: FrameType | None) -> None:
        """A system that has nothing more to say would otherwise run to its limit."""
        stops.append(number)
        (machine,) = machines
        machine.at(Nanos(machine.now + 1), lambda: machine.power.cut("the runner stopped the boot"))

    def record(event: Event) -> None:
        sink.record(event)
        for scraper in scrapers:
            scraper.on_event(event)

    try:
        booted = boot(
            plan,
            ground,
            seed=job.seed,
            smp=job.smp,
            recorder=record,
            limit=Nanos(job.limit),
            trace=job.trace,
            selftest=job.boot == 0,
            places=kept.on_linux() if ground is Ground.LINUX else kept.places(plan),
            on_machine=on_machine,
            slot_boot=slot_boot_of(job),
        )
    except (RunOver, Hang) as over:
        for machine in machines:
            kept.keep(machine, power_lasts=True)
        return _over(over)
    except PowerCut:
        (machine,) = machines
        kept.keep(machine, power_lasts=bool(stops))
        return BootEnd(exit_code=EXIT_POWER_CUT, log_lines=machine.log_lines())
    for machine in machines:
        kept.keep(machine, power_lasts=True)
    return BootEnd(exit_code=_code(booted.exit), log_lines=booted.log_lines)


def cut_of(job: Job) -> Cut:
    """Where the power goes in this boot."""
    task, _, _ = job.cut_at.partition(":")
    return Cut(write=job.cut_write, moment=Moment.INSIDE, size=CUT_SIZE, task=task, line=job.cut_at)


CUT_SIZE: Final = 3 * BLOCK_SIZE  # bytes of the write that reach the disk; it is a longer one


class Kept:
    """What a simulated machine keeps from boot to boot, as files in a directory. On linux the
    kernel finds what is kept by itself."""

    def __init__(self, state: Path) -> None:
        self.state = state

    def on_linux(self) -> Places:
        """The directory itself, and a place for sockets in it."""
        runtime = self.state / RUNTIME
        runtime.mkdir(mode=0o700, exist_ok=True)
        return Places(state=self.state, runtime=runtime, groups=delegated(os.environ))

    def places(self, plan: Plan) -> Places:
        """What earlier boots left, in the simulator."""
        memory, wall = self.state / BOOT_MEMORY_NAME, self.state / WALL
        return Places(
            boot_memory=memory.read_bytes() if memory.exists() else b"",
            wall=int(wall.read_text()) if wall.exists() else None,
            disks={each.name: self._disk(each) for each in plan.hardware if each.size},
            secrets={
                (name, SecretBackend[backend]): path.read_bytes()
                for path in sorted(self.state.glob(f"*{SECRET_SUFFIX}"))
                for name, _, backend in [path.stem.rpartition("-")]
            },
        )

    def _disk(self, device: Hardware) -> Disk:
        image = image_of(self.state, device)
        content = image.read_bytes() if image.exists() else b""
        return Disk(device.size // BLOCK_SIZE, content)

    def keep(self, machine: SimKernel, *, power_lasts: bool) -> None:
        """Leave it to the next boot: of a disk that lost its power what was on the medium, and
        the beginning of the write that was under way."""
        if not power_lasts:
            machine.secrets.lose_power()
        for name, disk in machine.bus.disks.items():
            image = disk.image() if power_lasts else disk.survivors(_torn(disk)).image()
            _ = (self.state / f"{name}{IMAGE_SUFFIX}").write_bytes(image)
        for (name, backend), data in machine.secrets.kept.items():
            _ = kept_secret(self.state, name, backend).write_bytes(data)
        _ = (self.state / WALL).write_text(str(machine.next_wall))
        if machine.boot_memory is not None:
            _ = (self.state / BOOT_MEMORY_NAME).write_bytes(machine.boot_memory)


def _torn(disk: Disk) -> Choice:
    """Nothing of the cache but the first bytes of the last write."""
    if not disk.pending:
        return NOTHING
    return (Piece(len(disk.pending) - 1, 0, min(CUT_SIZE, len(disk.pending[-1].data))),)


def boot_scenario(job: Job, sink: EventSink) -> BootEnd:
    """Run the conformance scenario on a bare kernel, with every trap recorded."""
    programs, root = scenario.programs(), scenario.root()
    try:
        if Ground(job.ground) is Ground.SIM:
            sim = SimKernel(
                programs, seed=job.seed, recorder=sink.record, cpu_count=job.smp, trace=True
            )
            ended = sim.run(root, b"", until=Nanos(sim.now + job.limit))
            return BootEnd(exit_code=_code(ended), log_lines=sim.log_lines())
        linux = LinuxKernel(programs, recorder=sink.record, trace=True)
        until = Nanos(time.clock_gettime_ns(time.CLOCK_MONOTONIC) + job.limit)
        return BootEnd(exit_code=_code(linux.run(root, b"", until=until)))
    except (RunOver, Hang) as over:
        return _over(over)


def _over(over: RunOver | Hang) -> BootEnd:
    _ = sys.stderr.write(f"{over}\n")
    return BootEnd(exit_code=EXIT_RUN_OVER if isinstance(over, RunOver) else EXIT_HANG)


def _code(ended: ExitInfo) -> int:
    return EXIT_SIGNAL + ended.signal if ended.signal else ended.code

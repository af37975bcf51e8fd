"""What the child process does on each ground: boot a system, or run the bare scenario.

Proof picks a ground here; nothing below knows which one it is on.
"""

import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from nexus.abi import ExitInfo, Nanos
from nexus.init.ground import Booted, Places, boot
from nexus.init.plan import load_plan
from nexus.kernel.core import Hang, RunOver
from nexus.kernel.linux import LinuxKernel
from nexus.kernel.sim import SimKernel
from nexus.proof import scenario
from nexus.proof.runner import EXIT_HANG, EXIT_RUN_OVER, Job
from nexus.proof.sink import EventSink
from nexus.protocols.ladder import Ground

EXIT_SIGNAL: Final = 128  # plus the signal that ended the root task, as a shell counts


@dataclass(frozen=True, kw_only=True, slots=True)
class BootEnd:
    """How a boot ended, and the simulated kernel's event log."""

    exit_code: int
    log_lines: Iterable[str] = ()


def boot_system(job: Job, sink: EventSink) -> BootEnd:
    """Boot a system file, the first time with the kernel's self-test in front."""
    plan = load_plan(Path(job.system))
    ground = Ground(job.ground)
    places = _places(job, ground)
    try:
        booted = boot(
            plan,
            ground,
            seed=job.seed,
            smp=job.smp,
            recorder=sink.record,
            limit=Nanos(job.limit),
            trace=job.trace,
            selftest=job.boot == 0,
            places=places,
        )
    except (RunOver, Hang) as over:
        return _over(over)
    _keep(job, booted)
    return BootEnd(exit_code=_code(booted.exit), log_lines=booted.log_lines)


def _places(job: Job, ground: Ground) -> Places:
    """What earlier boots left. On linux the kernel looks for it itself."""
    assert job.state is not None, "a system is booted with a state directory"
    state = Path(job.state)
    if ground is Ground.LINUX:
        return Places(state=state)
    memory = state / BOOT_MEMORY
    return Places(boot_memory=memory.read_bytes() if memory.exists() else b"")


def _keep(job: Job, booted: Booted) -> None:
    """Leave to the next boot what a simulated machine keeps. On linux it is where it was."""
    if booted.boot_memory is not None and job.state is not None:
        _ = (Path(job.state) / BOOT_MEMORY).write_bytes(booted.boot_memory)


BOOT_MEMORY: Final = "boot-memory"


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

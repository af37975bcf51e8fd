"""Where a plan runs: the only place that chooses a kernel."""

import os
from collections.abc import Coroutine, Iterable
from dataclasses import dataclass
from typing import Any

from nexus.abi import INIT_NAME, BootImage, ExitInfo, Nanos, Program, Programs, Recorder, Trap
from nexus.init.plan import ROOT_ENDPOINTS, Plan
from nexus.init.programs import PROGRAMS, load_program, program_digest
from nexus.init.supervisor import Supervisor
from nexus.kernel.core.limits import SystemLimits
from nexus.protocols.ladder import Ground


@dataclass(frozen=True, kw_only=True, slots=True)
class Booted:
    """How a boot ended. `log_lines` is the simulated kernel's event log, empty elsewhere."""

    exit: ExitInfo
    log_lines: Iterable[str] = ()


def programs_of(plan: Plan) -> Programs:
    """Every program the plan names, imported. On linux the services are forked from here."""
    names = {service.program for service in plan.services}
    return {name: load_program(PROGRAMS[name]) for name in sorted(names)}


def init_program(plan: Plan, cpu_count: int) -> Program:
    """init-lite for one plan on so many CPUs."""

    def main(boot: BootImage) -> Coroutine[Trap[Any], Any, int]:
        return Supervisor(boot, plan, cpu_count).run()

    return Program(name=INIT_NAME, main=main, digest=program_digest("nexus.init"))


def limits_of(plan: Plan) -> SystemLimits:
    """The totals of the plan, init's own share in them."""
    return SystemLimits(
        total_size=plan.total_size, root_size=plan.root_size, root_endpoints=ROOT_ENDPOINTS
    )


def boot(
    plan: Plan,
    ground: Ground,
    *,
    seed: int,
    smp: int,
    recorder: Recorder,
    limit: Nanos,
    trace: bool = False,
    selftest: bool = False,
) -> Booted:
    """Run a plan to its end, `limit` ns of the kernel's clock at most.

    `smp` is the number of simulated CPUs; on linux it bounds the set of CPUs the run uses.
    Raises nexus.kernel.core's RunOver and Hang, and what the kernel says about this machine.
    """
    root = init_program(plan, smp)
    if ground is Ground.SIM:
        return _boot_sim(plan, root, seed, smp, recorder, limit, trace=trace, selftest=selftest)
    return _boot_linux(plan, root, smp, recorder, limit, trace=trace, selftest=selftest)


def _boot_sim(
    plan: Plan,
    root: Program,
    seed: int,
    smp: int,
    recorder: Recorder,
    limit: Nanos,
    *,
    trace: bool,
    selftest: bool,
) -> Booted:
    from nexus.kernel.sim.kernel import SimKernel

    kernel = SimKernel(
        programs_of(plan),
        seed=seed,
        recorder=recorder,
        cpu_count=smp,
        limits=limits_of(plan),
        trace=trace,
        selftest=selftest,
    )
    ended = kernel.run(root, plan.digest.encode(), until=Nanos(kernel.now + limit))
    return Booted(exit=ended, log_lines=kernel.log_lines())


def _boot_linux(
    plan: Plan,
    root: Program,
    smp: int,
    recorder: Recorder,
    limit: Nanos,
    *,
    trace: bool,
    selftest: bool,
) -> Booted:
    from nexus.kernel.linux import LinuxKernel

    kernel = LinuxKernel(
        programs_of(plan),
        recorder=recorder,
        limits=limits_of(plan),
        cpus=tuple(sorted(os.sched_getaffinity(0)))[:smp],
        trace=trace,
        selftest=selftest,
    )
    ended = kernel.run(root, plan.digest.encode(), until=Nanos(kernel.now + limit))
    return Booted(exit=ended)

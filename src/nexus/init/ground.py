"""Where a plan runs: the only place that chooses a kernel."""

import os
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from nexus.abi import (
    INIT_NAME,
    NEVER,
    BootImage,
    ExitInfo,
    Nanos,
    Program,
    Programs,
    Recorder,
    SecretBackend,
    Trap,
)
from nexus.bootctl.handover import SlotBoot
from nexus.init.authority import PolicySource
from nexus.init.plan import ROOT_ENDPOINTS, Plan, sources_of
from nexus.init.programs import load_program, program_digest, protocols_of
from nexus.init.reload import PlanSource
from nexus.init.supervisor import Supervisor
from nexus.kernel.core.limits import SystemLimits
from nexus.protocols.ladder import Ground
from nexus.protocols.meta import PROTOCOL as META

if TYPE_CHECKING:
    from nexus.kernel.linux.mmio import MmioPage
    from nexus.kernel.sim.disk import Disk
    from nexus.kernel.sim.kernel import SimKernel


@dataclass(frozen=True, kw_only=True, slots=True)
class Booted:
    """How a boot ended. `log_lines` is the simulated kernel's event log, empty elsewhere, and
    `boot_memory` what its init left for the next boot."""

    exit: ExitInfo
    log_lines: Iterable[str] = ()
    boot_memory: bytes | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Places:
    """Where a system keeps what outlives a boot, and its sockets, and whom it tells.

    `notify` is the address of a service manager's socket, as NOTIFY_SOCKET gives it; services get
    user ids from `uid_first` on, when started by root; `pages` are registers that the machine has
    to give to services, `watchdog` is a descriptor of its watchdog, -1 for none, and `groups` the
    part of the tree of control groups that is the system's own. The simulated kernel has no file
    system: it begins with `boot_memory`, None for a system that keeps nothing, with what is on its
    `disks` and in its `secrets`, and with its machine's clock at `wall` (nanoseconds since 1970,
    None for a first boot).
    """

    state: Path | None = None
    runtime: Path | None = None
    notify: str | None = None
    uid_first: int | None = None
    pages: "Sequence[MmioPage]" = ()
    watchdog: int = -1
    groups: Path | None = None
    boot_memory: bytes | None = None
    disks: "Mapping[str, Disk]" = field(default_factory=dict)
    secrets: Mapping[tuple[str, SecretBackend], bytes] = field(default_factory=dict)
    wall: int | None = None


NOWHERE: Final = Places()


def programs_of(plan: Plan, *, executes: bool = False) -> Programs:
    """Every program the plan names, imported; see load_program for `executes`.

    On linux the services are forked from here. On sim everything is imported before time begins.
    """
    sources = sources_of(plan)
    return {name: load_program(source, executes=executes) for name, source in sources.items()}


def stamped(programs: Programs, slot_boot: SlotBoot) -> Programs:
    """The same programs, marked as those of the set that is booted."""
    return {
        name: replace(program, set_digest=slot_boot.digest) for name, program in programs.items()
    }


def init_program(
    plan: Plan,
    cpu_count: int,
    *,
    policy_source: PolicySource | None = None,
    plan_source: PlanSource | None = None,
    watchdog: Nanos | None = None,
    slot_boot: SlotBoot | None = None,
) -> Program:
    """init-lite for one plan on so many CPUs; see Supervisor for the others."""

    def main(boot: BootImage) -> Coroutine[Trap[Any], Any, int]:
        return Supervisor(
            boot,
            plan,
            cpu_count,
            policy_source=policy_source,
            plan_source=plan_source,
            watchdog=watchdog,
            slot_boot=slot_boot,
        ).run()

    return Program(name=INIT_NAME, main=main, digest=program_digest("nexus.init"))


def limits_of(plan: Plan) -> SystemLimits:
    """The totals of the plan, init's own share in them."""
    return SystemLimits(
        total_size=plan.total_size, root_size=plan.root_size, root_endpoints=ROOT_ENDPOINTS
    )


def _leave(_kernel: "SimKernel") -> None:
    """Leave the machine as it is."""


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
    places: Places = NOWHERE,
    policy_source: PolicySource | None = None,
    plan_source: PlanSource | None = None,
    watchdog: Nanos | None = None,
    slot_boot: SlotBoot | None = None,
    on_machine: "Callable[[SimKernel], None]" = _leave,
) -> Booted:
    """Run a plan to its end, `limit` ns of the kernel's clock at most (NEVER: no bound).

    `smp` is the number of simulated CPUs; on linux it bounds the set of CPUs the run uses, and
    `places` say where the run keeps things. `policy_source` reads the policy files again on
    SIGHUP, `plan_source` the system file for ReloadSettings; `watchdog` is the service manager's
    interval; `slot_boot` is what the loader says of the slot that is booted, None where there are
    no slots. `on_machine` is shown the simulated kernel before it runs: its power can be planned to
    fail, and what is left of it be read afterwards.
    Raises nexus.kernel.core's RunOver and Hang, and what the kernel says about this machine.
    """
    programs = programs_of(plan, executes=ground is not Ground.SIM)
    if slot_boot is not None:
        programs = stamped(programs, slot_boot)
    root = init_program(
        plan,
        smp,
        policy_source=policy_source,
        plan_source=plan_source,
        watchdog=watchdog,
        slot_boot=slot_boot,
    )
    if ground is Ground.SIM:
        return _boot_sim(
            plan,
            programs,
            root,
            seed,
            smp,
            recorder,
            limit,
            places,
            on_machine,
            trace=trace,
            selftest=selftest,
        )
    return _boot_linux(
        plan, programs, root, smp, recorder, limit, places, trace=trace, selftest=selftest
    )


def _until(now: Nanos, limit: Nanos) -> Nanos:
    """When a run of at most `limit` that begins now is over."""
    return NEVER if limit == NEVER else Nanos(now + limit)


def _boot_sim(
    plan: Plan,
    programs: Programs,
    root: Program,
    seed: int,
    smp: int,
    recorder: Recorder,
    limit: Nanos,
    places: Places,
    on_machine: "Callable[[SimKernel], None]",
    *,
    trace: bool,
    selftest: bool,
) -> Booted:
    from nexus.kernel.sim.clock import WALL_START
    from nexus.kernel.sim.kernel import SimKernel

    kernel = SimKernel(
        programs,
        seed=seed,
        recorder=recorder,
        cpu_count=smp,
        limits=limits_of(plan),
        trace=trace,
        selftest=selftest,
        boot_memory=places.boot_memory,
        hardware=plan.hardware,
        disks=places.disks,
        secrets=places.secrets,
        wall_start=WALL_START if places.wall is None else places.wall,
    )
    on_machine(kernel)
    ended = kernel.run(root, plan.digest.encode(), until=_until(kernel.now, limit))
    return Booted(exit=ended, log_lines=kernel.log_lines(), boot_memory=kernel.boot_memory)


def _boot_linux(
    plan: Plan,
    programs: Programs,
    root: Program,
    smp: int,
    recorder: Recorder,
    limit: Nanos,
    places: Places,
    *,
    trace: bool,
    selftest: bool,
) -> Booted:
    from nexus.kernel.linux import LinuxKernel
    from nexus.kernel.linux.harden import UID_FIRST

    for source in sources_of(plan).values():  # once here, and not in each who is forked
        for protocol in (META, *protocols_of(source)):
            protocol.derive()
    kernel = LinuxKernel(
        programs,
        recorder=recorder,
        limits=limits_of(plan),
        cpus=tuple(sorted(os.sched_getaffinity(0)))[:smp],
        trace=trace,
        selftest=selftest,
        state_dir=places.state,
        runtime_dir=places.runtime,
        notify_socket=places.notify,
        uid_first=UID_FIRST if places.uid_first is None else places.uid_first,
        hardware=plan.hardware,
        pages=places.pages,
        watchdog=places.watchdog,
        groups=places.groups,
    )
    ended = kernel.run(root, plan.digest.encode(), until=_until(kernel.now, limit))
    return Booted(exit=ended)

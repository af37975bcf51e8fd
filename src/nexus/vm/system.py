"""The system of a guest, booted by the same call as on any Linux; what is the guest's own about it
is where things are kept, and which registers it has to give.
"""

import json
import sys
import time
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Final

from nexus.abi import Event, EventKind, ExitInfo, HardwareKind, Nanos
from nexus.init.ground import Places, boot
from nexus.init.plan import Plan, load_plan, load_policy
from nexus.kernel.core import Hang, RunOver
from nexus.kernel.linux.mmio import MmioPage
from nexus.proof.job import EXIT_HANG, EXIT_RUN_OVER, Job
from nexus.proof.loading import slot_boot_of
from nexus.proof.sink import EventSink
from nexus.protocols.ladder import Ground
from nexus.vm.devices import let_go
from nexus.vm.guest import CONTROL_GROUPS, RUNTIME, service_crashed
from nexus.vm.slot import plant
from nexus.vm.witness import pages_note, seen_at

EXIT_SIGNAL: Final = 128  # plus the signal that ended the root task, as a shell counts


def boot_job(
    job: Job,
    sink: EventSink,
    pages: Iterable[tuple[MmioPage, str]],
    watchdog: tuple[int, int],
    *,
    is_plain: bool,
) -> int:
    """Boot the system of a job; the exit code. A plain boot is of no proof: nothing is planted.
    `watchdog` is the machine's, -1 for none, and in how many ns it has to hear of init."""
    if not is_plain:
        from nexus.proof.faultpoints import plant_fault_points

        plant_fault_points(Ground.VM, job.boot)
        if job.saboteur is not None:
            plant(job.saboteur)
    if job.scenario:
        from nexus.proof.grounds import boot_scenario

        return boot_scenario(job, sink).exit_code
    system = Path(job.system)
    plan = load_plan(system)
    assert job.state is not None, "a system is booted with a state directory"
    given = tuple(_taken(plan, pages))
    _tell(sink, pages_note(given))
    RUNTIME.mkdir(mode=0o700, exist_ok=True)
    descriptor, interval = watchdog
    try:
        booted = boot(
            plan,
            Ground.VM,
            seed=job.seed,
            smp=job.smp,
            recorder=partial(_recorded, sink),
            limit=Nanos(job.limit),
            trace=job.trace,
            selftest=not is_plain and job.boot == 0,
            places=Places(
                state=Path(job.state),
                runtime=RUNTIME,
                pages=given,
                watchdog=descriptor,
                groups=CONTROL_GROUPS,
            ),
            policy_source=(lambda: load_policy(system)) if is_plain else None,
            plan_source=(lambda: load_plan(system)) if is_plain else None,
            watchdog=None if descriptor < 0 else Nanos(interval),
            slot_boot=slot_boot_of(job),
        )
    except (RunOver, Hang) as over:
        _ = sys.stderr.write(f"{over}\n")
        return EXIT_RUN_OVER if isinstance(over, RunOver) else EXIT_HANG
    return _code(booted.exit)


def _recorded(sink: EventSink, event: Event) -> None:
    """An event, and behind one that claims something of the machine what is to be seen then."""
    sink.record(event)
    crash = event.fields.get("crash")
    if event.kind is EventKind.EXIT and crash:
        service_crashed(str(event.fields["name"]), str(crash))
    seen = seen_at(event)
    if seen is not None:
        _tell(sink, seen)


def _tell(sink: EventSink, note: Mapping[str, object]) -> None:
    told = {**note, "t": time.monotonic_ns()}
    sink.send(json.dumps(told, separators=(",", ":")).encode() + b"\n")


def _taken(plan: Plan, pages: Iterable[tuple[MmioPage, str]]) -> Iterable[MmioPage]:
    """The pages that devices of this plan are for, taken from Linux's driver."""
    kinds = {each.kind for each in plan.hardware if not each.path and not each.legacy}
    names = {each.name for each in plan.hardware if each.kind is HardwareKind.BLOCK}
    for page, transport in pages:
        if page.kind not in kinds or (page.name and page.name not in names):
            continue
        if transport:
            let_go(transport)
        yield page


def _code(ended: ExitInfo) -> int:
    return EXIT_SIGNAL + ended.signal if ended.signal else ended.code

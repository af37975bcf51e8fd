"""Which rungs a run has to climb, in which boot, and why the others are not run."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Final

from nexus.init.plan import Plan
from nexus.kernel.core.hardware import Hardware
from nexus.protocols.ladder import (
    BAD_BOOT,
    RUNGS,
    Ground,
    Mechanism,
    Phase,
    Rung,
    boot_of,
    last_boot,
)

BUILT: Final = frozenset(
    {
        Mechanism.DISK,
        Mechanism.VIRTIO,
        Mechanism.RESTART,
        Mechanism.POWER_CUT,
        Mechanism.SLOTS,
        Mechanism.WHY,
        Mechanism.DOCTOR,
        Mechanism.WATCHDOG,
        Mechanism.LOG_STREAMS,
        Mechanism.METRIC_PAGES,
    }
)
"""The mechanisms this tree has. A rung that needs another one is not_run, never passed."""

PHASES: Final = tuple(Phase)


@dataclass(frozen=True, kw_only=True, slots=True)
class Scope:
    """What decides the set: ground, CPUs, the services and kinds of devices of the system, and
    the last phase."""

    ground: Ground
    smp: int
    services: Collection[str]
    devices: Collection[str] = ()
    phase: Phase = Phase.END
    built: Collection[Mechanism] = BUILT


def kind_of(line: Hardware) -> str:
    """What a line of the bus map is to a row of the ladder."""
    return "legacy" if line.legacy else line.kind.name.lower()


def scope_of(plan: Plan, ground: Ground, smp: int, phase: Phase = Phase.END) -> Scope:
    """The scope of a run of this plan."""
    return Scope(
        ground=ground,
        smp=smp,
        services=[service.name for service in plan.services],
        devices=frozenset(map(kind_of, plan.hardware)),
        phase=phase,
    )


def reason_not_run(rung: Rung, scope: Scope) -> str | None:
    """Why `rung` is not run in this scope, or None if it is."""
    if scope.ground not in rung.grounds:
        return f"not on ground {scope.ground.value}"
    return _reason_anywhere(rung, scope)


def _reason_anywhere(rung: Rung, scope: Scope) -> str | None:
    """The same, whatever the ground."""
    if rung.phase is Phase.SMP and scope.smp < 2:
        return "SMP=1: there is no second CPU"
    missing = [name for name in rung.services if name not in scope.services]
    missing += [f"{kind} device" for kind in rung.devices if kind not in scope.devices]
    if missing:
        return f"not in this system: {', '.join(missing)}"
    unbuilt = [mechanism.value for mechanism in rung.mechanisms if mechanism not in scope.built]
    if unbuilt:
        return f"not built yet: {'; '.join(unbuilt)}"
    if PHASES.index(rung.phase) > PHASES.index(scope.phase):
        return f"behind RUN_PHASE={scope.phase.value}"
    return None


def not_run(scope: Scope) -> Mapping[int, str]:
    """Number and reason of every rung outside the scope."""
    reasons = ((rung.number, reason_not_run(rung, scope)) for rung in RUNGS)
    return {number: reason for number, reason in reasons if reason is not None}


def last_boot_of(scope: Scope) -> int:
    """The last boot that a run makes. selftest-client, which does not know its ground, has to come
    to the same number: so a row counts that is run on another ground."""
    return last_boot(row for row in RUNGS if _reason_anywhere(row, scope) is None)


def boots_of(scope: Scope) -> Mapping[int, int]:
    """The boot in which each rung of the scope is met, by its number."""
    last, outside = last_boot_of(scope), not_run(scope)
    return {row.number: boot_of(row, last) for row in RUNGS if row.number not in outside}


def is_cut(scope: Scope, boot: int) -> bool:
    """Whether a power cut ends this boot, as far as it is up to the runner."""
    cut = boot == BOOT_CUT and boot < last_boot_of(scope)
    has_power = scope.ground in {Ground.SIM, Ground.VM}  # a disk of its own that can lose it
    return cut and has_power and Mechanism.POWER_CUT in scope.built


def is_bad(scope: Scope, boot: int) -> bool:
    """Whether this boot is that of a bad set: init itself has to end it, and the loader goes on."""
    return boot == BAD_BOOT < last_boot_of(scope)


BOOT_CUT: Final = 1

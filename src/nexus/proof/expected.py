"""Which rungs a run has to climb, and why the others are not run."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Final

from nexus.protocols.ladder import RUNGS, Ground, Mechanism, Phase, Rung

BUILT: Final = frozenset({Mechanism.DOCTOR, Mechanism.WATCHDOG})
"""The mechanisms this tree has. A rung that needs another one is not_run, never passed."""

PHASES: Final = tuple(Phase)


@dataclass(frozen=True, kw_only=True, slots=True)
class Scope:
    """What decides the set: ground, CPUs, the services of the system, and the last phase."""

    ground: Ground
    smp: int
    services: Collection[str]
    phase: Phase = Phase.END
    built: Collection[Mechanism] = BUILT


def reason_not_run(rung: Rung, scope: Scope) -> str | None:
    """Why `rung` is not run in this scope, or None if it is."""
    if scope.ground not in rung.grounds:
        return f"not on ground {scope.ground.value}"
    if rung.phase is Phase.SMP and scope.smp < 2:
        return "SMP=1: there is no second CPU"
    missing = [name for name in rung.services if name not in scope.services]
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

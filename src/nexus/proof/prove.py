"""One proof run: plan, scope, boot, checks, verdict, record."""

import os
import platform
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import nexus
from nexus.abi import Event, EventKind
from nexus.init.errors import SystemFileError
from nexus.init.plan import Plan, load_plan
from nexus.proof.checks import CHECKS
from nexus.proof.expected import Scope, not_run
from nexus.proof.record import RecordWriter, default_path
from nexus.proof.request import Request, UsageError, check_smp
from nexus.proof.runner import Job, run_boot
from nexus.proof.sabotage import NoSuchSaboteur
from nexus.proof.saboteurs import find
from nexus.proof.trace import Trace
from nexus.proof.verdict import Case, Verdict, failed_rung_of, judge, rung_of
from nexus.protocols.ladder import RUNGS, Ground, Phase, Rung, rung

SIM_LIMIT: Final = 600 * 10**9  # ns of virtual time; a selftest run takes a few seconds of it


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """A run and its verdict."""

    request: Request
    smp: int
    plan: Plan
    trace: Trace
    verdict: Verdict
    record: Path


class Watcher:
    """Watches a boot as it goes and says where to stop it.

    At the line asked for, or where the last expected rung is decided: if that was asked for, if
    the run is cut at a phase, or if the system is not one that ends by itself. A service's
    statement is decided by init's line about it, which comes a little later.
    """

    def __init__(self, case: Case) -> None:
        outside = not_run(case.scope)
        self._undecided = {row.number for row in RUNGS if row.number not in outside}
        self._line = case.until or None
        self._line_seen = False
        ends = case.scope.phase is Phase.END and case.plan.ends_with is not None
        self._at_decision = case.until == "" or not ends
        self._awaited: set[str] = set()

    def __call__(self, event: Event) -> bool:
        """Whether the boot ends here."""
        if event.kind not in {EventKind.CONSOLE, EventKind.KERNEL}:
            return False
        text = str(event.fields.get("line", ""))
        self._awaited.discard(text)
        printed, failed = rung_of(text), failed_rung_of(text)
        if printed is not None:
            self._undecided.discard(printed.number)
            self._awaited |= _evidence_of(printed)
        elif failed is not None:
            self._undecided.discard(failed.number)
        self._line_seen = self._line_seen or text == self._line
        decided = self._line_seen if self._line is not None else not self._undecided
        return decided and not self._awaited and (self._at_decision or self._line_seen)


def _evidence_of(row: Rung) -> set[str]:
    """The line of init's that the check of a statement compares."""
    ready = row.marker == f"{row.printer}: ready"
    return {f"init: health {row.printer} ok"} if ready else set()


def plan_of(request: Request) -> Plan:
    """The plan, computed here from the system file. Raises UsageError."""
    file = request.system
    if not file.exists() and not file.is_absolute():
        file = Path(nexus.__file__).parents[2] / file
    try:
        return load_plan(file)
    except SystemFileError as error:
        raise UsageError(str(error)) from error


def prove(request: Request, directory: Path) -> Outcome:
    """Run and judge. Raises UsageError when nothing was run."""
    plan = plan_of(request)
    smp = request.smp or plan.smp
    check_smp(request, smp)
    if request.saboteur is not None:
        try:
            _ = find(request.saboteur, request.ground)
        except NoSuchSaboteur as error:
            raise UsageError(str(error)) from error
    services = [service.name for service in plan.services]
    scope = Scope(ground=request.ground, smp=smp, services=services, phase=request.phase)
    case = Case(scope=scope, plan=plan, checks=CHECKS, until=request.until)
    path = request.record or default_path(directory, request.ground.value)
    with RecordWriter(path) as record:
        record.entry("run", _header(request, plan, smp))
        trace = run_boot(
            _job(request, smp),
            timeout=request.timeout,
            watch=Watcher(case),
            keep=lambda line: record.event(0, line),
        )
        verdict = judge(case, trace)
        _keep_verdict(record, trace, verdict)
    return Outcome(request=request, smp=smp, plan=plan, trace=trace, verdict=verdict, record=path)


def _job(request: Request, smp: int) -> Job:
    system = request.system
    if not system.exists() and not system.is_absolute():
        system = Path(nexus.__file__).parents[2] / system
    return Job(
        ground=request.ground.value,
        system=str(system),
        smp=smp,
        seed=request.seed,
        limit=SIM_LIMIT if request.ground is Ground.SIM else request.timeout,
        saboteur=request.saboteur,
        log=None if request.log is None else str(request.log),
    )


def _header(request: Request, plan: Plan, smp: int) -> Mapping[str, Any]:
    return {
        "nexus": nexus.__version__,
        "python": sys.version.split()[0],
        "machine": platform.platform(),
        "cpus": sorted(os.sched_getaffinity(0)),
        "ground": request.ground.value,
        "system": plan.name,
        "plan_digest": plan.digest,
        "smp": smp,
        "seed": request.seed,
        "phase": request.phase.value,
        "until": request.until,
        "timeout_ns": request.timeout,
        "saboteur": request.saboteur,
    }


def _keep_verdict(record: RecordWriter, trace: Trace, verdict: Verdict) -> None:
    for result in verdict.results:
        record.entry(
            "rung",
            {
                "number": result.number,
                "marker": rung(result.number).marker,
                "state": result.state.value,
                "reason": result.reason,
                "time": result.time,
                "evidence": dict(result.evidence),
            },
        )
    record.entry("output", {"text": trace.output})
    record.entry(
        "verdict",
        {
            "exit_code": verdict.exit_code,
            "first_failed_phase": verdict.first_failed_phase,
            "missing_marker": verdict.missing_marker,
            "findings": list(verdict.findings),
            "events_left_out": record.left_out,
        },
    )

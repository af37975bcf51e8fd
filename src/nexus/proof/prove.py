"""One proof run: plan, scope, boots, checks, verdict, record."""

import hashlib
import os
import platform
import sys
from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import nexus
from nexus.abi import Event, EventKind
from nexus.init.errors import SystemFileError
from nexus.init.plan import Plan, load_plan
from nexus.proof.boot_remains import Made, boot_entry, boot_remains, slot_devices
from nexus.proof.every_check import EVERY_CHECK
from nexus.proof.expected import boots_of, is_cut, last_boot_of, scope_of
from nexus.proof.loading import keep_end
from nexus.proof.lock import STATE_PREFIX
from nexus.proof.record import RecordWriter, default_path
from nexus.proof.remains import RUNTIME, Remains, damage, remains_of
from nexus.proof.request import Request, UsageError, check_smp
from nexus.proof.runner import EXIT_HANG, EXIT_RUN_OVER, Boot, Job, Watch, make_ready
from nexus.proof.sabotage import NoSuchSaboteur
from nexus.proof.saboteurs import find
from nexus.proof.scrape import is_asked, port_of, scraped_of
from nexus.proof.scraper import kept_at, scrape
from nexus.proof.slots import prepare
from nexus.proof.timeline import marks_of, notes_of
from nexus.proof.trace import Trace
from nexus.proof.verdict import Case, Verdict, failed_rung_of, judge, rung_of
from nexus.protocols.ladder import SELFTEST, Ground, Phase, Rung, rung
from nexus.services.selftest.state_rungs import CUT_LINE, VICTIM_KEY

CUT_AT: Final = f"{SELFTEST}: {CUT_LINE}"
CUT_WRITE: Final = 1  # of a disk after that line: inside the batch that is written then
HEALTH: Final = "init: health "  # what init's line about a health probe begins with
SIM_LIMIT: Final = 120 * 10**9  # ns of virtual time; a boot takes some seconds of it


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """A run and its verdict."""

    request: Request
    smp: int
    plan: Plan
    traces: Sequence[Trace]
    verdict: Verdict
    record: Path

    @property
    def wall(self) -> int:
        """Nanoseconds of the runner's clock that the boots took."""
        return sum(trace.ending.wall for trace in self.traces)


class Watcher:
    """Watches a boot as it goes and says where to stop it.

    At the line asked for, or, in the last boot, where the last expected rung is decided: if that
    was asked for, if the run is cut at a phase, or if the system is not one that ends by itself. A
    service's statement is decided by init's line about it, which comes a little later, and some by
    what the client measured besides, where there is the client.
    """

    def __init__(self, case: Case, boot: int = 0) -> None:
        boots = boots_of(case.scope)
        self._undecided = {number for number, where in boots.items() if where == boot}
        self._line = case.until or None
        self._line_seen = False
        ends = case.scope.phase is Phase.END and case.plan.ends_with is not None
        last = boot == last_boot_of(case.scope)
        self._at_decision = last and (case.until == "" or not ends)
        self._awaited: set[str] = set()
        self._told: set[str] = set()  # such lines that came before they were awaited
        self._has_client = SELFTEST in case.plan.by_name

    def __call__(self, event: Event) -> bool:
        """Whether the boot ends here."""
        if event.kind not in {EventKind.CONSOLE, EventKind.KERNEL}:
            return False
        text = str(event.fields.get("line", ""))
        self._awaited.discard(text)
        if text.startswith((HEALTH, MEASURED)):
            self._told.add(text)
        printed, failed = rung_of(text), failed_rung_of(text)
        if printed is not None:
            if printed.number in self._undecided:  # it is met in this boot, and not yet
                self._awaited |= self._evidence_of(printed) - self._told
            self._undecided.discard(printed.number)
        elif failed is not None:
            self._undecided.discard(failed.number)
        self._line_seen = self._line_seen or text == self._line
        decided = self._line_seen if self._line is not None else not self._undecided
        return decided and not self._awaited and (self._at_decision or self._line_seen)

    def _evidence_of(self, row: Rung) -> set[str]:
        """The lines that the check of a statement compares: init's, and for some the client's."""
        ready = row.marker.startswith(f"{row.printer}: ready")
        awaited = {f"{HEALTH}{row.printer} ok"} if ready else set()
        if self._has_client and row.number in MEASURED_LATER:
            awaited.add(f"{MEASURED}{row.number}")
        return awaited


MEASURED: Final = f"{SELFTEST}: measured #"  # what the client's line about another's begins with
MEASURED_LATER: Final = frozenset(
    {35, 36, 37}
)  # rungs of bring-up that the client measures when it climbs


def plan_of(request: Request) -> Plan:
    """The plan, computed here from the system file. Raises UsageError."""
    try:
        return load_plan(_system_of(request))
    except SystemFileError as error:
        raise UsageError(str(error)) from error


def prove(request: Request, directory: Path) -> Outcome:
    """Run and judge. Raises UsageError and NotRun when nothing was run."""
    plan = plan_of(request)
    smp = request.smp or plan.smp
    check_smp(request, smp)
    if request.saboteur is not None:
        try:
            _ = find(request.saboteur, request.ground)
        except NoSuchSaboteur as error:
            raise UsageError(str(error)) from error
    make_ready(request.ground)
    scope = scope_of(plan, request.ground, smp, request.phase)
    path = request.record or default_path(directory, request.ground.value)
    written = (path,) if request.log is None else (path, request.log)
    case = Case(scope=scope, plan=plan, checks=EVERY_CHECK, until=request.until, written=written)
    with RecordWriter(path) as record:
        record.entry("run", _header(request, plan, smp))
        traces = _boots(request, case, record, directory)
        verdict = judge(case, *traces)
        _keep_verdict(record, traces, verdict)
    return Outcome(request=request, smp=smp, plan=plan, traces=traces, verdict=verdict, record=path)


def _boots(
    request: Request, case: Case, record: RecordWriter, directory: Path
) -> tuple[Trace, ...]:
    """Every boot of the run, oldest first, and between two of them what the runner does there."""
    traces: list[Trace] = []
    last = last_boot_of(case.scope)
    with ExitStack() as stack:
        state = Path(stack.enter_context(TemporaryDirectory(prefix=STATE_PREFIX, dir=directory)))
        made = _provisioned(request, case.plan, state)
        if made:
            sets = {each: [one.version, one.name, one.digest] for each, one in made.items()}
            record.entry("sets", sets)
        boots = stack.enter_context(closing(_started(request, case, state)))
        for number, boot in boots:
            trace = boot.run(
                timeout=request.timeout,
                watch=_watch(request, case, number, state),
                keep=partial(record.event, number),
            )
            left, boot_left = remains_of(case.plan, state), boot_remains(case.plan, state)
            goes_on = number < last and _goes_on(trace)
            if goes_on and number + 1 == boots_of(case.scope).get(CORRUPTION_RUNG):
                left = damage(case.plan, state, left, VICTIM_KEY)
            record.entry("remains", _remains_entry(number, left))
            if boot_left is not None:
                record.entry("boot remains", {"boot": number, **boot_entry(boot_left)})
                keep_end(state, trace)
            seed, scraped = seed_of(request.seed, number), scraped_of(state, number)
            earlier = tuple(traces)
            traces.append(
                replace(
                    trace,
                    notes=notes_of(state, number),
                    left=left,
                    earlier=earlier,
                    seed=seed,
                    scraped=scraped,
                    boot_left=boot_left,
                    made=made,
                )
            )
            record.entry("timeline", {"boot": number, "marks": marks_of(traces[-1])})
            for note in traces[-1].notes:
                record.entry("note", {"boot": number, "note": note})
            if scraped:
                record.entry("scraped", {"boot": number, "text": scraped.decode(errors="replace")})
            if not goes_on:
                break
    return tuple(traces)


def _started(request: Request, case: Case, state: Path) -> Generator[tuple[int, Boot], None, None]:
    """Every boot, started. What a machine does before it looks at its disks takes some seconds of
    one CPU, which a boot has to itself: the next one does that meanwhile, and waits."""
    last = last_boot_of(case.scope)
    boot: Boot | None = None
    following: Boot | None = None
    try:
        for number in range(last + 1):
            boot, following = following or Boot(_job(request, case, number, state)), None
            if request.ground is Ground.VM and number < last:
                following = Boot(replace(_job(request, case, number + 1, state), ahead=True))
            yield number, boot
    finally:
        for each in (boot, following):
            if each is not None:
                each.drop()


def _provisioned(request: Request, plan: Plan, state: Path) -> Mapping[str, Made]:
    """A device with slots has its first set, and the sets of the run are on its stick."""
    if slot_devices(plan) is None:
        return {}
    return prepare(plan, _system_of(request), request.ground, request.seed, state)


def _watch(request: Request, case: Case, boot: int, state: Path) -> Watch:
    """The watcher of a boot. On linux the runner scrapes exportd when the client says so; what the
    system prints meanwhile waits for it."""
    watcher, port = Watcher(case, boot), port_of(case.plan)
    if port is None or request.ground is not Ground.LINUX:
        return watcher
    path = state / RUNTIME / f"{port}.sock"

    def watch(event: Event) -> bool:
        if is_asked(event):
            _ = kept_at(state, boot).write_bytes(scrape(path))
        return watcher(event)

    return watch


def _remains_entry(boot: int, left: Remains) -> Mapping[str, Any]:
    """What the runner read on the disk, without the values."""
    return {
        "boot": boot,
        "problem": left.problem,
        "epoch": left.epoch,
        "sequence": left.sequence,
        "records": {
            key.decode(errors="replace"): kept.sequence for key, kept in left.records.items()
        },
        "damaged": left.damaged,
        "lost": left.lost,
    }


CORRUPTION_RUNG: Final = 106


def _goes_on(trace: Trace) -> bool:
    """Whether the system can be booted again: it was not stopped, and left in order."""
    ending = trace.ending
    if ending.stopped or ending.signal or not ending.told_end:
        return False
    return ending.code is not None and ending.code not in {EXIT_RUN_OVER, EXIT_HANG}


def _system_of(request: Request) -> Path:
    """The system file; a relative one is that of this tree, if there is none here."""
    file = request.system
    if not file.exists() and not file.is_absolute():
        file = Path(nexus.__file__).parents[2] / file
    return file


def _job(request: Request, case: Case, boot: int, state: Path) -> Job:
    return Job(
        ground=request.ground.value,
        system=str(_system_of(request)),
        smp=case.scope.smp,
        seed=seed_of(request.seed, boot),
        boot=boot,
        state=str(state),
        slots=slot_devices(case.plan) is not None,
        cut_at=CUT_AT if is_cut(case.scope, boot) else "",
        cut_write=CUT_WRITE,
        limit=SIM_LIMIT if request.ground is Ground.SIM else request.timeout,
        saboteur=request.saboteur,
        log=None if request.log is None else str(request.log),
    )


def seed_of(seed: int, boot: int) -> int:
    """The seed of one boot: no two boots of a run draw the same entropy."""
    if boot == 0:
        return seed
    text = f"nexus.proof.boot.{boot}.{seed}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")


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


def _keep_verdict(record: RecordWriter, traces: Sequence[Trace], verdict: Verdict) -> None:
    for result in verdict.results:
        record.entry(
            "rung",
            {
                "number": result.number,
                "marker": rung(result.number).marker,
                "state": result.state.value,
                "reason": result.reason,
                "boot": result.boot,
                "time": result.time,
                "evidence": dict(result.evidence),
            },
        )
    for trace in traces:
        record.entry("output", {"boot": trace.number, "text": trace.output})
        record.entry("ending", {"boot": trace.number, **asdict(trace.ending)})
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

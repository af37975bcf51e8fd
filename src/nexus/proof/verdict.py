"""From what a run left behind to its verdict. Pure: the same traces give the same verdict.

A rung passes when its line was printed once, in its boot, by its printer, behind the rungs it
comes after, with evidence that holds. It is red when one of these is not so, or when the line is
missing; blocked when a rung it comes after is red or blocked, and its line is missing, failed or
not, or its evidence does not hold; not_run outside its scope. What makes a run red without naming a
rung (a stray FAIL line, a traceback, a dirty exit) is a finding: it denies #144, whose claim is the
whole stream.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum, unique
from pathlib import Path
from typing import Any, Final

from nexus.abi import INIT_NAME, EventKind, Nanos
from nexus.bootctl.handover import EXIT_SLOT_FAILED, EXIT_STOPPED
from nexus.init.plan import Plan
from nexus.proof.boot_remains import slot_devices
from nexus.proof.expected import PHASES, Scope, boots_of, is_bad, is_cut, not_run
from nexus.proof.trace import ALARMS, CRASH_PATTERNS, FAIL_WORD, Line, Trace
from nexus.protocols.ladder import (
    CLAIMED_PREFIXES,
    KERNEL,
    RUNGS,
    SELFTEST,
    Ground,
    Phase,
    Rung,
    rung,
)

END_RUNG: Final = 144
RESOURCE_RUNG: Final = 143
CPU_RUNG: Final = 39
KILLED: Final = 9  # the signal of init's Kill, the only one a task may end by
CRASHES: Final = ("demo.exit42", 42, 0)  # the one program that is there to crash, and how: #91
FINDINGS_MAX: Final = 64  # kept; a run that is this red needs no more

_EXACT: Final = {row.marker: row for row in RUNGS if not row.prefix}
_PREFIXES: Final = tuple(row for row in RUNGS if row.prefix)


@unique
class State(StrEnum):
    """What became of a rung."""

    PASSED = "passed"
    RED = "red"
    BLOCKED = "blocked"
    NOT_RUN = "not_run"


class Mismatch(Exception):
    """Evidence does not hold; the text says what was compared and found."""


def demand(condition: object, message: str) -> None:
    """Raise Mismatch unless `condition` holds."""
    if not condition:
        raise Mismatch(message)


def demand_equal(found: object, expected: object, what: str) -> None:
    """Raise Mismatch unless the two are equal."""
    if found != expected:
        raise Mismatch(f"{what}: {found!r}, expected {expected!r}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """What a verdict is about: the scope, the plan as `nexus check` computes it from the system
    file outside of the run, what independent checks exist, and, once it is judged, every boot and
    the files that the run has written: its record so far, and the event log if one is kept."""

    scope: Scope
    plan: Plan
    checks: "Mapping[int, Check]"
    until: str | None = None
    boots: tuple[Trace, ...] = ()
    written: tuple[Path, ...] = ()


Check = Callable[[Case, Trace, Line], None]
"""Compares the evidence of one printed rung with something else. Raises Mismatch."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RungResult:
    """The state of one rung, why, when its line came (kernel clock) in which boot, and the
    evidence printed."""

    number: int
    state: State
    reason: str = ""
    time: Nanos | None = None
    boot: int = 0
    evidence: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """The state of all rungs, and what made the run red besides."""

    results: tuple[RungResult, ...]
    findings: tuple[str, ...]
    last_phase: Phase

    def of(self, state: State) -> tuple[RungResult, ...]:
        """The results in one state, by number."""
        return tuple(result for result in self.results if result.state is state)

    @property
    def exit_code(self) -> int:
        """0 green, 1 red."""
        return 1 if self.findings or self.of(State.RED) or self.of(State.BLOCKED) else 0

    @property
    def first_failed_phase(self) -> str:
        """The phase of the red rung with the lowest number, or "" when green."""
        red = self.of(State.RED)
        if red:
            return rung(red[0].number).phase.value
        return self.last_phase.value if self.exit_code else ""

    @property
    def missing_marker(self) -> str:
        """The marker of the red rung with the lowest number, or ""."""
        red = self.of(State.RED)
        return rung(red[0].number).marker if red else ""


def rung_of(line: str) -> Rung | None:
    """The row whose marker this whole line is."""
    found = _EXACT.get(line)
    if found is not None:
        return found
    return next((row for row in _PREFIXES if row.matches(line)), None)


def failed_rung_of(line: str) -> Rung | None:
    """The row whose FAIL form this line is."""
    return next((row for row in RUNGS if row.is_failure(line)), None)


def judge(case: Case, *traces: Trace) -> Verdict:
    """The verdict on the boots of a run, oldest first."""
    return _Judge(case, traces).verdict()


class _Judge:
    def __init__(self, case: Case, traces: Sequence[Trace]) -> None:
        self._case = replace(case, boots=tuple(traces))
        self._traces = traces
        self._last = traces[-1]
        self._boots = boots_of(case.scope)
        self._not_run = dict(not_run(case.scope))
        self._printed: dict[int, list[Line]] = defaultdict(list)
        self._faults: dict[int, list[str]] = defaultdict(list)
        self._findings: list[str] = []
        self._results: dict[int, RungResult] = {}
        self._passed_by: set[int] = set()  # rungs that a printed one comes after

    def verdict(self) -> Verdict:
        for trace in self._traces:
            self._read_lines(trace)
        for row in RUNGS:
            self._check_repeats(row)
        for trace in self._traces:
            self._read_ending(trace)
        self._read_until()
        self._passed_by = _behind(number for number, lines in self._printed.items() if lines)
        for row in RUNGS[: END_RUNG - 1]:
            self._results[row.number] = self._decide(row)
        self._results[END_RUNG] = self._decide_end(rung(END_RUNG))
        return Verdict(
            results=tuple(self._results[row.number] for row in RUNGS),
            findings=tuple(self._findings[:FINDINGS_MAX]),
            last_phase=self._last_phase(),
        )

    # ------------------------------------------------------------ what was printed

    def _read_lines(self, trace: Trace) -> None:
        for line in trace.lines:
            if line.place in trace.impostors:
                self._findings.append(f"{line.text!r}: {trace.impostors[line.place]}")
            row = rung_of(line.text)
            if row is not None:
                self._read_marker(row, line, forged=line.place in trace.impostors)
            elif FAIL_WORD.search(line.text):
                self._read_failure(line)
            elif line.text.startswith(CLAIMED_PREFIXES) and not self._is_cpu_line(line):
                self._findings.append(f"unexpected line {line.text!r} from {line.printer}")

    def _read_marker(self, row: Rung, line: Line, *, forged: bool) -> None:
        if line.printer != row.printer or forged:
            reason = f"forged: printed by {line.printer} (pid {line.pid}), not by {row.printer}"
            self._faults[row.number].append(reason)
            if row.number in self._not_run:
                self._findings.append(f"{line.text!r} {reason}")
            return
        outside = self._not_run.get(row.number)
        if outside is not None and not outside.startswith("behind RUN_PHASE"):
            self._findings.append(f"{line.text!r} was printed although it is {outside}")
        self._printed[row.number].append(line)

    def _read_failure(self, line: Line) -> None:
        row = failed_rung_of(line.text)
        if row is None or row.number in self._not_run:
            self._findings.append(f"FAIL line {line.text!r} from {line.printer}")
        else:
            self._faults[row.number].append(line.text)

    def _is_cpu_line(self, line: Line) -> bool:
        """`KINIT: cpuN online` for N below SMP belongs to #39, whose check counts them."""
        number = line.text.removeprefix("KINIT: cpu").removesuffix(" online")
        return (
            line.printer == KERNEL
            and line.text == f"KINIT: cpu{number} online"
            and number.isdecimal()
            and int(number) < self._case.scope.smp
        )

    def _check_repeats(self, row: Rung) -> None:
        """A marker comes once in each boot, and counts for the rung in its own. A restarted
        service states anew that it is ready: the line of a later generation is another instance's
        and counts neither for nor against the rung."""
        seen: dict[tuple[int, str], Line] = {}
        kept: list[Line] = []
        boot = self._boots.get(row.number, 0)
        for line in self._printed.get(row.number, ()):
            first = seen.setdefault((line.boot, line.text), line)
            if first is line:
                if line.boot == boot:
                    kept.append(line)
            elif not _is_restart(row, first, line):
                self._faults[row.number].append(f"printed again at {line.time} ns")
        self._printed[row.number] = kept

    # ------------------------------------------------------------ how the boot ended

    @property
    def _clean(self) -> int:
        """The exit code of an init that was told to end and did: bare, or out of a slot."""
        return 0 if slot_devices(self._case.plan) is None else EXIT_STOPPED

    def _read_ending(self, trace: Trace) -> None:
        ending = trace.ending

        def found(text: str) -> None:
            several = len(self._traces) > 1
            self._findings.append(f"boot {trace.number}: {text}" if several else text)

        if ending.code is None:
            found("the boot was killed at its deadline")
        elif is_bad(self._case.scope, trace.number) and not ending.stopped:
            if (ending.code, ending.signal) != (EXIT_SLOT_FAILED, 0):
                found(
                    f"init was to give the bad set up with code {EXIT_SLOT_FAILED}, and ended "
                    f"with code {ending.code}, signal {ending.signal}"
                )
        elif not (ending.stopped or ending.cut) and (ending.code, ending.signal) != (
            self._clean,
            0,
        ):
            found(f"dirty exit: code {ending.code}, signal {ending.signal}")
        if is_cut(self._case.scope, trace.number) and not (ending.cut or ending.stopped):
            found("the power was to be cut, and the boot did not get there")
        if ending.left_behind and not ending.stopped:
            found(f"{ending.left_behind} processes were left behind")
        if ending.code is not None and not ending.stopped and not ending.told_end:
            found("the event stream ended before the boot said so")
        if ending.dropped:
            found(f"{ending.dropped} events were lost")
        self._read_alarm(trace, found)
        self._read_crashes(trace, found)

    def _read_alarm(self, trace: Trace, found: Callable[[str], None]) -> None:
        """Whatever its ending: the exit code of a machine that is stopped or cut is not its own."""
        if self._case.scope.ground is not Ground.VM:
            return
        alarm = next((text for text in trace.output.splitlines() if ALARMS.search(text)), None)
        if alarm is not None:
            found(f"the console tells of {alarm!r}")

    def _read_crashes(self, trace: Trace, found: Callable[[str], None]) -> None:
        texts = [trace.output, *(line.text for line in trace.lines)]
        for pattern in CRASH_PATTERNS:
            match = next((m for m in map(pattern.search, texts) if m is not None), None)
            if match is not None:
                last = trace.output.strip().rpartition("\n")[2]
                found(f"crash in the output: {match[0]!r}, at its end {last!r}")
        for text in trace.output.splitlines():
            if FAIL_WORD.search(text):
                found(f"FAIL in the output: {text!r}")
        for _, event in trace.of_kind(EventKind.EXIT):
            code, signal = event.fields.get("code"), event.fields.get("signal")
            if event.fields.get("name") == INIT_NAME and is_bad(self._case.scope, trace.number):
                continue  # how the boot of a bad set ends is looked at above
            if (event.fields.get("name"), code, signal) == CRASHES:
                continue
            if event.fields.get("name") == INIT_NAME and (code, signal) == (self._clean, 0):
                continue
            if signal != KILLED and (code or signal):
                crash = str(event.fields.get("crash", "")).strip().rpartition("\n")[2]
                how = f"code {code}, signal {signal}" + (f", {crash}" if crash else "")
                found(f"dirty exit of {event.fields.get('name')}: {how}")
        for _, event in trace.of_kind(EventKind.HANG):
            found(f"{event.fields.get('name')} never yields")

    def _read_until(self) -> None:
        until = self._case.until
        if until and not any(until in trace.text_lines for trace in self._traces):
            self._findings.append(f"the run ended without the line {until!r}")

    def _last_phase(self) -> Phase:
        run = [row.phase for row in RUNGS if row.number not in self._not_run]
        return max(run, key=PHASES.index, default=Phase.BRING_UP)

    # ------------------------------------------------------------ one rung

    def _decide(self, row: Rung) -> RungResult:
        if row.number in self._not_run:
            reason = self._not_run[row.number]
            return RungResult(number=row.number, state=State.NOT_RUN, reason=reason)
        faults = self._faults[row.number]
        lines = self._printed[row.number]
        if not lines and (not faults or self._first_in_the_way(row) is not None):
            return self._decide_missing(row)
        state = State.RED
        if lines and not faults:
            faults = list(self._mismatches(row, lines))
            behind = self._lowest_in_the_way(row)
            if faults and behind is not None:  # what it stands on does not hold
                faults.insert(0, f"behind #{behind}")
                state = State.BLOCKED
        line = lines[0] if lines else None
        return RungResult(
            number=row.number,
            state=state if faults else State.PASSED,
            reason="; ".join(faults),
            time=line.time if line else None,
            boot=self._boots[row.number],
            evidence=line.evidence if line else {},
        )

    def _decide_missing(self, row: Rung) -> RungResult:
        behind = self._first_in_the_way(row)
        if behind is not None:  # also if it failed: that is what it came after that failed first
            reason = "; ".join((f"behind #{behind}", *self._faults[row.number]))
            return RungResult(number=row.number, state=State.BLOCKED, reason=reason)
        if self._last.ending.stopped and row.number not in self._passed_by:
            reason = "the run was stopped before it"
            return RungResult(number=row.number, state=State.NOT_RUN, reason=reason)
        boot = self._boots[row.number]
        if boot > self._last.number:
            reason = f"boot {boot} was not made: boot {self._last.number} did not end well enough"
            return RungResult(number=row.number, state=State.BLOCKED, reason=reason)
        return RungResult(number=row.number, state=State.RED, reason="its line was not printed")

    def _first_in_the_way(self, row: Rung) -> int | None:
        """The first rung this one comes after that does not hold."""
        return next((number for number in row.after if self._stands_in_the_way(number)), None)

    def _lowest_in_the_way(self, row: Rung) -> int | None:
        """The first rung that does not hold of all those that this one stands on."""
        under = sorted(_behind([row.number]) & self._results.keys())
        return next((number for number in under if self._stands_in_the_way(number)), None)

    def _stands_in_the_way(self, number: int) -> bool:
        return self._results[number].state in {State.RED, State.BLOCKED}

    def _mismatches(self, row: Rung, lines: Sequence[Line]) -> Iterator[str]:
        # Others' ends may have come before, under the same prefix: the row's own line comes last.
        yield from self._misordered(row, lines[-1] if row.prefix else lines[0])
        for line in lines:
            try:
                self._compare(row, line)
            except Mismatch as mismatch:
                yield str(mismatch)

    def _misordered(self, row: Rung, line: Line) -> Iterator[str]:
        """Edges that this line breaks. One to a red rung is that rung's fault, not this one's."""
        for number in row.after:
            before = self._printed[number]
            if self._results[number].state is State.PASSED and before[0].order > line.order:
                yield f"printed before #{number}"

    def _compare(self, row: Rung, line: Line) -> None:
        check = self._case.checks.get(row.number)
        if row.printer == SELFTEST:
            demand(line.evidence, "no evidence came with the line")
        else:
            demand(check is not None, "no independent evidence is compared for this line")
        if check is not None:
            try:
                check(self._case, self._trace_of(line), line)
            except (KeyError, TypeError, ValueError, IndexError) as error:
                raise Mismatch(f"evidence malformed: {error!r}") from error

    def _trace_of(self, line: Line) -> Trace:
        return next(trace for trace in self._traces if trace.number == line.boot)

    def _decide_end(self, row: Rung) -> RungResult:
        """#144 claims that all is well: behind anything red it is blocked, whatever it says."""
        result = self._decide(row)
        if result.state is State.NOT_RUN:
            return result
        worse = next((number for number in self._results if self._stands_in_the_way(number)), None)
        if worse is not None:
            reason = f"behind #{worse}"
            return RungResult(number=row.number, state=State.BLOCKED, reason=reason)
        if self._findings and result.state is State.PASSED:
            reason = "; ".join(self._findings[:3])
            return RungResult(number=row.number, state=State.RED, reason=reason, time=result.time)
        return result


def _behind(numbers: Iterable[int]) -> set[int]:
    """Every rung that one of these comes after, over any number of edges."""
    found: set[int] = set()
    waiting = list(numbers)
    while waiting:
        fresh = [number for number in rung(waiting.pop()).after if number not in found]
        found.update(fresh)
        waiting.extend(fresh)
    return found


def _is_restart(row: Rung, first: Line, again: Line) -> bool:
    if row.printer == SELFTEST or row.printer == KERNEL:
        return False
    if row.printer == INIT_NAME:
        old, new = (line.evidence.get("generation") for line in (first, again))
        return isinstance(old, int) and isinstance(new, int) and old < new
    return first.generation < again.generation

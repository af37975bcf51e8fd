"""A verdict for people and for programs."""

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, Final

from nexus.proof.prove import Outcome
from nexus.proof.trace import Trace
from nexus.proof.verdict import RungResult, State, Verdict
from nexus.protocols.ladder import Phase, rung

RUNGS_SHOWN_MAX: Final = 20  # red ones told with their reasons; the record has all


def verdict_line(verdict: Verdict) -> str:
    """The one line that a script looks for."""
    return (
        f"exit_code={verdict.exit_code} "
        f'first_failed_phase="{verdict.first_failed_phase}" '
        f'missing_marker="{verdict.missing_marker}"'
    )


def as_text(outcome: Outcome) -> str:
    """The report of a run."""
    request, verdict = outcome.request, outcome.verdict
    head = (
        f"ground {request.ground.value}, system {outcome.plan.name} "
        f"(plan {outcome.plan.digest[:12]}), SMP {outcome.smp}, seed {request.seed}, "
        f"{_boots(len(outcome.traces))}, {outcome.wall / 1e9:.2f} s"
    )
    lines = [head, "", *_table(verdict), "", *_trouble(verdict), *_outside(verdict)]
    lines += [f"record: {outcome.record}", verdict_line(verdict)]
    return "\n".join(lines) + "\n"


def as_json(outcome: Outcome) -> str:
    """The same as one JSON object on one line."""
    request, verdict = outcome.request, outcome.verdict
    report: dict[str, Any] = {
        "exit_code": verdict.exit_code,
        "first_failed_phase": verdict.first_failed_phase,
        "missing_marker": verdict.missing_marker,
        "ground": request.ground.value,
        "system": outcome.plan.name,
        "plan_digest": outcome.plan.digest,
        "smp": outcome.smp,
        "seed": request.seed,
        "boots": [_boot_json(trace) for trace in outcome.traces],
        "timeout_ns": request.timeout,
        "duration_ns": outcome.wall,
        "stopped": outcome.traces[-1].ending.stopped,
        "phases": [_phase_json(phase, verdict) for phase in Phase],
        "rungs": [_rung_json(result) for result in verdict.results if not _is_outside(result)],
        "not_run": [
            {"reason": reason, "rungs": numbers} for reason, numbers in not_run_by_reason(verdict)
        ],
        "findings": list(verdict.findings),
        "record": str(outcome.record),
    }
    return json.dumps(report, separators=(",", ":")) + "\n"


def _boots(count: int) -> str:
    return "1 boot" if count == 1 else f"{count} boots"


def _boot_json(trace: Trace) -> dict[str, Any]:
    return {
        "boot": trace.number,
        "duration_ns": trace.ending.wall,
        "power_cut": trace.ending.cut,
    }


def not_run_by_reason(verdict: Verdict) -> list[tuple[str, list[int]]]:
    """The rungs that were not run, grouped, the largest group first."""
    groups: dict[str, list[int]] = defaultdict(list)
    for result in verdict.of(State.NOT_RUN):
        groups[result.reason].append(result.number)
    return sorted(groups.items(), key=lambda group: (-len(group[1]), group[1]))


def spans(numbers: Sequence[int]) -> str:
    """Sorted numbers as `1-3, 7`."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and parts[-1][-1] == number - 1:
            parts[-1] = [parts[-1][0], number]
        else:
            parts.append([number])
    return ", ".join("-".join(map(str, part)) for part in parts)


def _is_outside(result: RungResult) -> bool:
    return result.state is State.NOT_RUN


def _of_phase(phase: Phase, verdict: Verdict) -> list[RungResult]:
    return [result for result in verdict.results if rung(result.number).phase is phase]


def _spans(results: Sequence[RungResult]) -> dict[int, tuple[int, int]]:
    """Kernel clock of the first and the last line of these rungs, in each boot: every boot has a
    clock of its own."""
    times: dict[int, list[int]] = defaultdict(list)
    for result in results:
        if result.time is not None:
            times[result.boot].append(result.time)
    return {boot: (min(found), max(found)) for boot, found in sorted(times.items())}


def _table(verdict: Verdict) -> Iterator[str]:
    """One row per phase. The span is between its first and its last line, by the kernel clock, of
    all boots together."""
    yield f"{'phase':<10} {'passed':>7} {'red':>5} {'blocked':>8} {'not run':>8} {'span':>12}"
    for phase in Phase:
        results = _of_phase(phase, verdict)
        counts = [sum(r.state is state for r in results) for state in State]
        spans = _spans(results).values()
        span = f"{sum(last - first for first, last in spans) / 1e6:.2f} ms" if spans else "-"
        passed, red, blocked, outside = counts
        yield f"{phase.value:<10} {passed:>7} {red:>5} {blocked:>8} {outside:>8} {span:>12}"


def _trouble(verdict: Verdict) -> Iterator[str]:
    red = verdict.of(State.RED)
    for result in red[:RUNGS_SHOWN_MAX]:
        yield f"red      #{result.number} {rung(result.number).marker!r}: {result.reason}"
    if len(red) > RUNGS_SHOWN_MAX:
        yield f"red      {len(red) - RUNGS_SHOWN_MAX} more"
    blocked = verdict.of(State.BLOCKED)
    if blocked:
        yield f"blocked  {spans([result.number for result in blocked])}"
    for finding in verdict.findings:
        yield f"finding  {finding}"
    if red or blocked or verdict.findings:
        yield ""


def _outside(verdict: Verdict) -> Iterator[str]:
    groups = not_run_by_reason(verdict)
    if groups:
        yield "not run:"
    for reason, numbers in groups:
        yield f"  {reason}: {spans(numbers)}"
    if groups:
        yield ""


def _phase_json(phase: Phase, verdict: Verdict) -> dict[str, Any]:
    results = _of_phase(phase, verdict)
    counts = {state.value: sum(r.state is state for r in results) for state in State}
    spans = _spans(results)
    return {
        "phase": phase.value,
        **counts,
        "spans": [
            {"boot": boot, "first_ns": first, "last_ns": last}
            for boot, (first, last) in spans.items()
        ],
    }


def _rung_json(result: RungResult) -> dict[str, Any]:
    return {
        "number": result.number,
        "marker": rung(result.number).marker,
        "state": result.state.value,
        "reason": result.reason,
        "boot": result.boot,
        "time_ns": result.time,
    }

"""Every saboteur in turn: each must turn exactly its rung red.

First the ground is run as it is; only from green does a red rung mean anything. Then every rung
that is run there is sabotaged in a run of its own. What comes behind the red rung may be
blocked; any other red rung, and a rung without a saboteur, is a failure of the sweep.

A sweep of some rungs alone makes its runs as far as the phase of each, for time's sake.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nexus.proof.prove import Outcome, prove
from nexus.proof.report import spans
from nexus.proof.request import Request
from nexus.proof.sabotage import NoSuchSaboteur
from nexus.proof.saboteurs import find
from nexus.proof.verdict import State, Verdict
from nexus.protocols.ladder import Ground, rung


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """What one saboteur did. `problem` is empty if exactly its rung turned red."""

    rung: int
    fault: str
    problem: str = ""
    seconds: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Swept:
    """A whole sweep of one ground. `unsound` says why nothing could be concluded, or is empty."""

    ground: Ground
    findings: Sequence[Finding]
    unsound: str = ""

    @property
    def exit_code(self) -> int:
        """0 if every rung of the ground has a saboteur that turns exactly it red."""
        return 1 if self.unsound or any(finding.problem for finding in self.findings) else 0


def problem_of(number: int, verdict: Verdict) -> str:
    """What is wrong with the verdict on a run whose rung `number` was sabotaged; "" if nothing."""
    red = [result.number for result in verdict.of(State.RED)]
    if red == [number]:
        return ""
    if not red:
        return "nothing turned red"
    also = ", ".join(f"#{other} ({verdict.results[other - 1].reason})" for other in red)
    return f"red: {also}"


def sweep(
    base: Request,
    directory: Path,
    *,
    tell: Callable[[str], None],
    numbers: Sequence[int] | None = None,
) -> Swept:
    """Run the ground clean, then once per rung, or for each of `numbers`. `tell` is given a line
    about each."""
    clean = prove(base, directory)
    tell(f"{base.ground.value} without a saboteur: exit code {clean.verdict.exit_code}")
    if clean.verdict.exit_code:
        missing = clean.verdict.missing_marker
        unsound = f"the run without a saboteur is red: {missing or clean.verdict.findings}"
        return Swept(ground=base.ground, findings=(), unsound=unsound)
    findings = []
    passed = [result.number for result in clean.verdict.of(State.PASSED)]
    for number in passed if numbers is None else numbers:
        if number not in passed:
            why = "it is not climbed in the run without a saboteur"
            finding = Finding(rung=number, fault=rung(number).fault, problem=why)
        elif numbers is None:
            finding = _sabotage(number, base, directory)
        else:
            short = replace(base, phase=rung(number).phase, until="")
            finding = _sabotage(number, short, directory)
        tell(_line(finding))
        findings.append(finding)
    return Swept(ground=base.ground, findings=findings)


def _sabotage(number: int, base: Request, directory: Path) -> Finding:
    fault = rung(number).fault
    try:
        _ = find(number, base.ground)
    except NoSuchSaboteur as error:
        return Finding(rung=number, fault=fault, problem=str(error))
    outcome: Outcome = prove(replace(base, saboteur=number, record=None), directory)
    seconds = outcome.wall / 1e9
    problem = problem_of(number, outcome.verdict)
    return Finding(rung=number, fault=fault, problem=problem, seconds=seconds)


def as_text(swept: Swept) -> str:
    """The summary; each finding was told when it was made."""
    return "\n".join(_summary(swept)) + "\n"


def as_json(swept: Swept) -> str:
    """The same as one JSON object on one line."""
    report: dict[str, Any] = {
        "exit_code": swept.exit_code,
        "ground": swept.ground.value,
        "unsound": swept.unsound,
        "saboteurs": [
            {
                "rung": finding.rung,
                "fault": finding.fault,
                "problem": finding.problem,
                "seconds": finding.seconds,
            }
            for finding in swept.findings
        ],
    }
    return json.dumps(report, separators=(",", ":")) + "\n"


def _summary(swept: Swept) -> Iterator[str]:
    if swept.unsound:
        yield swept.unsound
    bad = [finding for finding in swept.findings if finding.problem]
    for finding in bad:
        yield _line(finding)
    good = sorted(finding.rung for finding in swept.findings if not finding.problem)
    told = f"{len(good)} saboteurs turned exactly their rung red, {len(bad)} did not"
    yield f"{swept.ground.value}: {told}{': #' if good else ''}{spans(good)}"


def _line(finding: Finding) -> str:
    verdict = finding.problem or "exactly this rung is red"
    return f"#{finding.rung} {finding.fault}: {verdict} ({finding.seconds:.1f} s)"

"""A run as one HTML page that needs nothing else: verdict, boot timelines, the ladder.

No script, no address in it; every text that came out of a run is escaped.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any, Final

import nexus
from nexus.proof.prove import Outcome
from nexus.proof.report import not_run_by_reason, spans, verdict_line
from nexus.proof.timeline import Mark, heard_after, marks_of, waited_of
from nexus.proof.trace import Trace
from nexus.proof.verdict import RungResult, State
from nexus.protocols.ladder import Phase, rung

EVIDENCE_SIZE_MAX: Final = 4096  # characters shown of one rung's evidence; the record has all
MARKS_MAX: Final = 64  # shown of one boot
WIDTH: Final = 1000  # of a drawing, in its own units
LABELS: Final = 330  # of them for the names
ROW: Final = 18
WORDS: Final = {
    State.PASSED: "passed",
    State.RED: "red",
    State.BLOCKED: "blocked",
    State.NOT_RUN: "not run",
}

STYLE: Final = """
:root { --ground: #fff; --ink: #1d232a; --faint: #5d6873; --line: #dde2e7; --panel: #f5f7f9;
  --passed: #1a7f4b; --red: #c0262d; --blocked: #b26a00; --not_run: #8a949e; --bar: #2f6fbf; }
@media (prefers-color-scheme: dark) { :root { --ground: #14181d; --ink: #e6eaee; --faint: #9aa5b0;
  --line: #2c343c; --panel: #1b2127; --passed: #4cc38a; --red: #ff6369; --blocked: #f5a623;
  --not_run: #7a8590; --bar: #6aa5f0; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 24px; max-width: 1120px; background: var(--ground);
  color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 22px; margin: 0 0 4px; } h2 { font-size: 17px; margin: 36px 0 10px; }
h3 { font-size: 14px; margin: 18px 0 6px; font-weight: 600; }
code, .line { font: 13px/1.45 ui-monospace, monospace; }
.line { display: block; padding: 12px 14px; border-radius: 6px; background: var(--panel);
  border-left: 5px solid var(--passed); overflow-wrap: anywhere; }
.line.red { border-color: var(--red); }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 10px;
  margin: 18px 0 0; }
.facts div { background: var(--panel); border-radius: 6px; padding: 8px 12px; }
.facts dt { color: var(--faint); font-size: 12px; }
.facts dd { margin: 0; overflow-wrap: anywhere; }
dl { margin: 0; } table { border-collapse: collapse; width: 100%; }
th { text-align: left; font-size: 12px; color: var(--faint); font-weight: 600; }
th, td { padding: 4px 8px; border-bottom: 1px solid var(--line); vertical-align: top; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.state { white-space: nowrap; font-weight: 600; }
.passed { color: var(--passed); } .red .state, .state.red { color: var(--red); }
.state.blocked { color: var(--blocked); }
.state.not_run { color: var(--not_run); font-weight: 400; }
.bar { display: flex; height: 10px; border-radius: 3px; overflow: hidden; background: var(--line);
  min-width: 120px; } .bar i { display: block; } .bar .passed { background: var(--passed); }
.bar .red { background: var(--red); } .bar .blocked { background: var(--blocked); }
.bar .not_run { background: transparent; }
.reason { color: var(--faint); } details summary { cursor: pointer; color: var(--faint); }
pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: 6px 0; font-size: 12px; }
svg { width: 100%; height: auto; display: block; } svg text { font: 11px ui-monospace, monospace;
  fill: var(--ink); } svg .faint { fill: var(--faint); } svg .grid { stroke: var(--line); }
svg .bar { fill: var(--bar); } .wide { overflow-x: auto; }
"""


def as_page(outcome: Outcome) -> str:
    """The page of a run."""
    title = f"Nexus: {outcome.plan.name} on {outcome.request.ground.value}"
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body>",
        *_head(title, outcome),
        *_phases(outcome),
        *_timelines(outcome.traces),
        *_ladder(outcome),
        *_outside(outcome),
        "</body></html>",
    ]
    return "\n".join(parts) + "\n"


def _head(title: str, outcome: Outcome) -> Iterator[str]:
    verdict, request = outcome.verdict, outcome.request
    state = "red" if verdict.exit_code else "green"
    yield f"<h1>{escape(title)}</h1>"
    yield f'<code class="line {state}">{escape(verdict_line(verdict))}</code>'
    passed = len(verdict.of(State.PASSED))
    run = len(verdict.results) - len(verdict.of(State.NOT_RUN))
    facts = {
        "rungs": f"{passed} of {run} passed",
        "boots": str(len(outcome.traces)),
        "duration": f"{outcome.wall / 1e9:.1f} s",
        "CPUs": str(outcome.smp),
        "seed": str(request.seed),
        "last phase": request.phase.value,
        "bound of a boot": f"{request.timeout / 1e9:.0f} s",
        "plan": outcome.plan.digest[:16],
        "Nexus": nexus.__version__,
    }
    machine = next((n for trace in outcome.traces for n in trace.notes if "kernel" in n), None)
    if machine is not None:
        facts["kernel"] = str(machine["kernel"])
        facts["Python"] = str(machine.get("python", ""))
    yield '<dl class="facts">'
    for name, value in facts.items():
        yield f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>"
    yield "</dl>"
    if verdict.findings:
        yield "<h2>Findings</h2><ul>"
        yield from (f"<li><code>{escape(finding)}</code></li>" for finding in verdict.findings)
        yield "</ul>"


def _phases(outcome: Outcome) -> Iterator[str]:
    yield '<h2>Phases</h2><div class="wide"><table><tr><th>phase</th><th>rungs</th>'
    yield from (f'<th class="number">{WORDS[state]}</th>' for state in State)
    yield "</tr>"
    for phase in Phase:
        results = [each for each in outcome.verdict.results if rung(each.number).phase is phase]
        counts = {state: sum(each.state is state for each in results) for state in State}
        bar = "".join(
            f'<i class="{state.value}" style="flex:{count}"></i>'
            for state, count in counts.items()
            if count
        )
        cells = "".join(f'<td class="number">{count or ""}</td>' for count in counts.values())
        yield f'<tr><td>{phase.value}</td><td><div class="bar">{bar}</div></td>{cells}</tr>'
    yield "</table></div>"


# ---------------------------------------------------------------- timelines


def _timelines(traces: Sequence[Trace]) -> Iterator[str]:
    yield "<h2>Boots</h2>"
    for trace in traces:
        marks = marks_of(trace)
        how = _ending(trace)
        yield f"<h3>boot {trace.number}: {trace.ending.wall / 1e9:.2f} s, {escape(how)}</h3>"
        if marks:
            yield f'<div class="wide">{_drawn(marks, trace)}</div>'


def _ending(trace: Trace) -> str:
    ending = trace.ending
    if ending.cut:
        return "the power was cut"
    if ending.stopped:
        return "stopped at a marker"
    if ending.code is None:
        return "killed at its deadline"
    return f"exit code {ending.code}" + (f", signal {ending.signal}" if ending.signal else "")


def _drawn(marks: Sequence[Mark], trace: Trace) -> str:
    """Each mark at its time, on a scale of whole steps."""
    shown = marks[:MARKS_MAX]
    end = max(mark.at for mark in shown) or 1
    scale = (WIDTH - LABELS - 90) / end
    height = ROW * (len(shown) + 2)
    parts = [f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="timeline of a boot">']
    step = _step(end)
    for at in range(0, end + 1, step):
        x = LABELS + at * scale
        parts.append(f'<line class="grid" x1="{x:.1f}" y1="{ROW}" x2="{x:.1f}" y2="{height}"/>')
        parts.append(f'<text class="faint" x="{x:.1f}" y="12">{at / 1e9:g} s</text>')
    earlier = 0
    for index, mark in enumerate(shown):
        y = ROW * (index + 1) + 4
        x, x_before = LABELS + mark.at * scale, LABELS + earlier * scale
        name = mark.name if len(mark.name) <= 46 else f"{mark.name[:45]}…"
        parts.append(f'<text x="{LABELS - 8}" y="{y + 10}" text-anchor="end">{escape(name)}</text>')
        parts.append(
            f'<rect class="bar" x="{x_before:.1f}" y="{y + 2}" '
            f'width="{max(x - x_before, 2):.1f}" height="9" rx="2"/>'
        )
        told = f"{mark.at / 1e9:.3f} s"
        parts.append(f'<text class="faint" x="{x + 6:.1f}" y="{y + 10}">{told}</text>')
        earlier = mark.at
    parts.append("</svg>")
    heard = heard_after(trace.notes)
    if heard is not None:
        said = (
            f"Process 1 was heard {heard:.2f} s after the machine was started, by the host's clock."
        )
        parts.append(f'<p class="reason">{escape(said)}</p>')
    waited = waited_of(trace.notes)
    if waited.until:
        said = (
            f"It was started while the one before still ran, and waited {waited.length / 1e9:.2f} "
            "s for its disks, which are left out."
        )
        parts.append(f'<p class="reason">{escape(said)}</p>')
    if len(marks) > len(shown):
        parts.append(f'<p class="reason">{len(marks) - len(shown)} more in the record.</p>')
    return "".join(parts)


def _step(end: int) -> int:
    """Nanoseconds between two lines of a scale, so that there are at most ten."""
    power: int = 10 ** len(str(end // 10))
    return next(
        step for step in (power // 10, power // 5, power // 2, power) if step and end / step <= 10
    )


# ---------------------------------------------------------------- the ladder


def _ladder(outcome: Outcome) -> Iterator[str]:
    yield '<h2>Ladder</h2><div class="wide"><table><tr><th class="number">#</th><th>rung</th>'
    yield '<th>state</th><th class="number">boot</th><th class="number">at</th></tr>'
    for result in outcome.verdict.results:
        if result.state is not State.NOT_RUN:
            yield _row(result)
    yield "</table></div>"


def _row(result: RungResult) -> str:
    row = rung(result.number)
    state = f'<td class="state {result.state.value}">{WORDS[result.state]}</td>'
    at = "" if result.time is None else f"{result.time / 1e9:.3f} s"
    reason = f'<div class="reason">{escape(result.reason)}</div>' if result.reason else ""
    more = f"<p>{escape(row.claim)}</p>{_evidence(result.evidence)}"
    return (
        f'<tr><td class="number">{row.number}</td><td><details><summary><code>'
        f"{escape(row.marker)}</code></summary>{more}"
        f'</details>{reason}</td>{state}<td class="number">{result.boot}</td>'
        f'<td class="number">{at}</td></tr>'
    )


def _evidence(evidence: Mapping[str, Any]) -> str:
    if not evidence:
        return ""
    text = json.dumps(evidence, indent=1, default=str)
    left_out = len(text) - EVIDENCE_SIZE_MAX
    more = f"\n… {left_out} characters more in the record" if left_out > 0 else ""
    return f"<pre>{escape(text[:EVIDENCE_SIZE_MAX] + more)}</pre>"


def _outside(outcome: Outcome) -> Iterator[str]:
    groups = not_run_by_reason(outcome.verdict)
    if not groups:
        return
    yield "<h2>Not run</h2><ul>"
    for reason, numbers in groups:
        yield f"<li>{escape(reason)}: {spans(numbers)}</li>"
    yield "</ul>"

"""Two grounds, one scenario, and every difference between what each task saw.

Each task's traps (class, status, size), lines (text, evidence) and end are put in its own order;
times, pids and digests are left out. Tasks are not ordered against each other, nor a task's lines
against its traps: on linux they travel apart. A difference is either named in ALLOWED, or it
fails the comparison.
"""

import difflib
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from nexus.abi import INIT_NAME, EventKind, Pid
from nexus.proof.prove import SIM_LIMIT
from nexus.proof.request import Comparison, UsageError
from nexus.proof.runner import Job, run_boot
from nexus.proof.trace import Trace
from nexus.protocols.ladder import Ground

DIFF_LINES_MAX: Final = 80  # shown per task; the first ones tell

TaskKey = tuple[str, int]
"""Name and generation of a task."""


class Seen(NamedTuple):
    """What one task saw."""

    traps: tuple[str, ...] = ()
    lines: tuple[str, ...] = ()
    end: str = ""


Log = dict[TaskKey, Seen]


@dataclass(frozen=True, kw_only=True, slots=True)
class Allowed:
    """A difference that is no difference, by name and reason.

    `settle` is given what a task saw on both grounds and returns it without the difference.
    """

    what: str
    why: str
    settle: Callable[[Seen, Seen], tuple[Seen, Seen]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """What a comparison found. `used` counts how often each allowed difference was needed."""

    grounds: tuple[Ground, Ground]
    entries: int
    diffs: Mapping[TaskKey, Sequence[str]]
    used: Mapping[str, int]
    endings: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()

    @property
    def exit_code(self) -> int:
        """0 if nothing but allowed differences was found, each of them at least once."""
        return 1 if self.diffs or self.endings or self.unused else 0


ALLOWED: Final[tuple[Allowed, ...]] = ()
"""None is needed: the scenario gives every task the same on both grounds."""


def compare(comparison: Comparison) -> Result:
    """Run the scenario on both grounds and compare. Raises UsageError."""
    if comparison.scenario != "conformance":
        raise UsageError(f"There is no scenario {comparison.scenario!r}: choose conformance.")
    first, second = comparison.grounds
    traces = [_run(ground, comparison) for ground in (first, second)]
    endings = tuple(
        f"{ground.value}: {problem}"
        for ground, trace in zip((first, second), traces, strict=True)
        for problem in _problems(trace)
    )
    return compare_logs(normalise(traces[0]), normalise(traces[1]), (first, second), endings)


def compare_logs(
    left: Log, right: Log, grounds: tuple[Ground, Ground], endings: tuple[str, ...] = ()
) -> Result:
    """Compare two normalised logs, task by task."""
    used: Counter[str] = Counter()
    diffs: dict[TaskKey, Sequence[str]] = {}
    for key in sorted(left.keys() | right.keys()):
        first, second = left.get(key, Seen()), right.get(key, Seen())
        for allowed in ALLOWED:
            settled = allowed.settle(first, second)
            used[allowed.what] += settled != (first, second)
            first, second = settled
        if first != second:
            one, other = (ground.value for ground in grounds)
            entries = _entries(first), _entries(second)
            diffs[key] = list(difflib.unified_diff(*entries, one, other, n=3, lineterm=""))
    return Result(
        grounds=grounds,
        entries=sum(len(_entries(seen)) for seen in left.values()),
        diffs=diffs,
        used=dict(used),
        endings=endings,
        unused=tuple(allowed.what for allowed in ALLOWED if not used[allowed.what]),
    )


def normalise(trace: Trace) -> Log:
    """What each task saw, in its own order, without what differs from run to run."""
    traps: dict[TaskKey, list[str]] = defaultdict(list)
    lines: dict[TaskKey, list[str]] = defaultdict(list)
    ends: dict[TaskKey, str] = {}
    tasks: dict[Pid, TaskKey] = {}
    for event in trace.events:
        fields: Mapping[str, Any] = event.fields
        if event.kind is EventKind.SPAWN:
            tasks[event.pid] = (fields["name"], fields["generation"])
        key = tasks.get(event.pid, (INIT_NAME, 1))
        if event.kind is EventKind.TRAP:
            entry = {"status": fields["status"], "size": fields.get("size", 0)}
            traps[key].append(f"{fields['trap']} {_json(entry)}")
        elif event.kind is EventKind.CONSOLE:
            lines[key].append(f"line {fields['line']} {_json(fields.get('evidence') or {})}")
        elif event.kind is EventKind.EXIT:
            ends[key] = f"end {_json({'code': fields['code'], 'signal': fields['signal']})}"
    return {
        key: Seen(tuple(traps[key]), tuple(lines[key]), ends.get(key, ""))
        for key in traps.keys() | lines.keys() | ends.keys()
    }


def _entries(seen: Seen) -> list[str]:
    return [*seen.traps, *seen.lines, seen.end]


def as_text(result: Result) -> str:
    """The report: differences first, then the table of allowed ones and how often it was used."""
    first, second = (ground.value for ground in result.grounds)
    lines = [f"{first} and {second}: {result.entries} entries compared"]
    lines += [f"ending   {ending}" for ending in result.endings]
    for (name, generation), diff in result.diffs.items():
        lines += [f"different: {name} generation {generation}", *diff[:DIFF_LINES_MAX]]
    lines += [f"unused   {what}: allowed and never seen, remove it" for what in result.unused]
    lines += [
        f"allowed  {allowed.what} ({result.used.get(allowed.what, 0)} times): {allowed.why}"
        for allowed in ALLOWED
    ]
    if not ALLOWED:
        lines.append("allowed  no difference at all")
    lines.append("the same" if result.exit_code == 0 else "NOT the same")
    return "\n".join(lines) + "\n"


def as_json(result: Result) -> str:
    """The same as one JSON object on one line."""
    report = {
        "exit_code": result.exit_code,
        "grounds": [ground.value for ground in result.grounds],
        "entries": result.entries,
        "diffs": {
            f"{name}#{generation}": list(diff) for (name, generation), diff in result.diffs.items()
        },
        "endings": list(result.endings),
        "allowed": {allowed.what: result.used.get(allowed.what, 0) for allowed in ALLOWED},
        "unused": list(result.unused),
    }
    return _json(report) + "\n"


def _run(ground: Ground, comparison: Comparison) -> Trace:
    job = Job(
        ground=ground.value,
        system="",
        smp=1,
        seed=comparison.seed,
        limit=SIM_LIMIT if ground is Ground.SIM else comparison.timeout,
        scenario=comparison.scenario,
        trace=True,
    )
    return run_boot(job, timeout=comparison.timeout, watch=lambda _event: False)


def _problems(trace: Trace) -> Iterator[str]:
    ending = trace.ending
    if ending.code or ending.code is None or ending.signal:
        yield f"ended with code {ending.code}, signal {ending.signal}"
    if ending.left_behind:
        yield f"{ending.left_behind} processes left behind"
    if ending.dropped or not ending.told_end:
        yield "events were lost"
    if trace.output:
        yield f"output: {trace.output[-2000:]}"


def _json(value: object) -> str:
    return json.dumps(value, separators=(",", ":"), sort_keys=True, default=str)

"""Several grounds, one scenario, and every difference between what each task saw: each ground is
compared with the first.

Every kind of event is put in the order of the task it is about, with all its fields: traps, lines,
QoS audit lines, refused messages, links by their holder, starts, refused starts, ends. What is not
compared, a kind, a field or an order, stands in LEFT_OUT, which every report prints; a field or a
kind that is in neither place is compared. A difference that remains is either named in ALLOWED, or
it fails the comparison.
"""

import difflib
import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from tempfile import TemporaryDirectory
from typing import Any, Final, NamedTuple

from nexus.abi import INIT_NAME, EventKind, Pid
from nexus.kernel.sim.log import CRASH_KEY
from nexus.proof.prove import SIM_LIMIT
from nexus.proof.request import Comparison, UsageError
from nexus.proof.runner import Job, make_ready, run_boot
from nexus.proof.trace import Trace
from nexus.protocols.ladder import Ground

DIFF_LINES_MAX: Final = 80  # shown per task; the first ones tell

TaskKey = tuple[str, int]
"""Name and generation of a task."""


class Seen(NamedTuple):
    """What one task saw, by kind; each sequence is in the task's own order.

    `links` are those that were made for a holder of this name, whatever its generation: they
    stand under generation 0.
    """

    traps: tuple[str, ...] = ()
    lines: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()  # QoS audit lines about its requests
    refused: tuple[str, ...] = ()  # messages to it that its kernel dropped
    links: tuple[str, ...] = ()
    starts: tuple[str, ...] = ()  # its own, and those it was refused
    others: tuple[str, ...] = ()
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
    """What a comparison of two found. `used` counts how often each allowed difference was
    needed."""

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
"""Differences between tasks. None is needed: the scenario gives every task the same."""


class LeftOut(NamedTuple):
    """Something that is not compared at all, and why."""

    id: str
    what: str
    why: str
    kinds: frozenset[EventKind] = frozenset()  # left out whole
    fields: frozenset[str] = frozenset()  # left out of events of any other kind


LEFT_OUT: Final = (
    LeftOut("time", "the clock of an event", "sim's clock is virtual, and seeded"),
    LeftOut(
        "pid",
        "numbers of tasks; in audit lines they are put as name#generation",
        "linux takes them from the host",
    ),
    LeftOut(
        "order-of-tasks",
        "the order of events of two tasks",
        "it is the schedule's, which no kernel promises",
    ),
    LeftOut(
        "order-of-kinds",
        "the order of a task's events of two kinds",
        "on linux traps, lines and notes come to the recorder by different ways",
    ),
    LeftOut(
        "link-generation",
        "the generation of a link's holder",
        "the event names the holder alone; two instances are compared as one sequence",
    ),
    LeftOut(
        "refused",
        "messages the kernel drops (reason, owner): compared, and neither ground has one here",
        "no correct task can cause one: the kernel makes the stamp, a Send moves one capability, "
        "size and delegations are refused at the sender; rungs and tests forge them instead",
    ),
    LeftOut(
        "heap",
        "reports of an allocation over the budget",
        "what an object costs is each kernel's own; the ladder judges them",
        kinds=frozenset({EventKind.HEAP}),
    ),
    LeftOut(
        "kernel",
        "lines of the kernels' own self tests",
        "each kernel tests what it is made of; the ladder judges them",
        kinds=frozenset({EventKind.KERNEL}),
    ),
    LeftOut(
        "fault",
        "injected faults",
        "no plan is given here, and linux has no injector",
        kinds=frozenset({EventKind.FAULT}),
    ),
    LeftOut(
        "hang",
        "the name of a task that never yields",
        "it ends the run, and so fails the comparison as an ending",
        kinds=frozenset({EventKind.HANG}),
    ),
    LeftOut(
        "confinement",
        "what Linux says about a started process: ids, capabilities, descriptors",
        "a property of a process; sim has none. The ladder and the attacks judge it",
        fields=frozenset({"outside"}),
    ),
    LeftOut(
        "world",
        "signals, ports, boot memory and notices: what comes from outside the system or goes there",
        "the scenario has no world outside; the conformance suite has one on both grounds",
    ),
    LeftOut(
        "probes",
        "what init and the runtime of services send each other: health probes and their answers",
        "how many fit into a run is a matter of its length, which is the host's on linux; the "
        "scenario has its own root task in the place of init, so that every trap has one reason",
    ),
    LeftOut(
        "degraded",
        "what the host did not grant a task",
        "a property of the host; sim has none to ask",
        fields=frozenset({"degraded"}),
    ),
    LeftOut(
        "detail",
        "the words behind the reason of a refused start",
        "for a reader; the reason is the promise",
        fields=frozenset({"detail"}),
    ),
    LeftOut(
        "crash",
        "the traceback of a task that ended by an exception",
        "file paths; its code and signal are compared",
        fields=frozenset({CRASH_KEY}),
    ),
)
"""Everything that is not compared."""

KINDS_LEFT_OUT: Final = frozenset().union(*(entry.kinds for entry in LEFT_OUT))
FIELDS_LEFT_OUT: Final = frozenset().union(*(entry.fields for entry in LEFT_OUT))

ORDINARY: Final = re.compile(r"\s*|\[ *[0-9.]+\] reboot: Power down")
"""A line of a machine's console at its end."""

_AUDIT_PID: Final = re.compile(r"\b(caller_pid|target_pid)=(\d+)")


def compare(comparison: Comparison) -> tuple[Result, ...]:
    """Run the scenario on each ground, and compare with the first. Raises UsageError and NotRun."""
    if comparison.scenario != "conformance":
        raise UsageError(
            f"There is no scenario {comparison.scenario!r}: choose ladder or conformance."
        )
    for ground in comparison.grounds:
        make_ready(ground)
    traces = {ground: _run(ground, comparison) for ground in comparison.grounds}
    first, *others = comparison.grounds
    logs = {ground: normalise(trace) for ground, trace in traces.items()}
    return tuple(
        compare_logs(
            logs[first],
            logs[other],
            (first, other),
            tuple(
                f"{ground.value}: {problem}"
                for ground in (first, other)
                for problem in _problems(traces[ground])
            ),
        )
        for other in others
    )


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
    seen: dict[TaskKey, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    tasks: dict[Pid, TaskKey] = {}
    for event in trace.events:
        if event.kind in KINDS_LEFT_OUT:
            continue
        fields = {key: value for key, value in event.fields.items() if key not in FIELDS_LEFT_OUT}
        if event.kind is EventKind.SPAWN:
            tasks[event.pid] = (str(fields["name"]), _generation(fields))
        key = tasks.get(event.pid, (INIT_NAME, 1))
        if event.kind is EventKind.LINK:
            key = (str(fields["holder"]), 0)
        elif event.kind is EventKind.QOS:
            fields["line"] = _AUDIT_PID.sub(lambda match: _named(match, tasks), str(fields["line"]))
        elif event.kind is EventKind.TRAP:
            fields = {"size": 0, **fields}
        elif event.kind is EventKind.CONSOLE:
            fields["evidence"] = fields.get("evidence") or {}
        seen[key][_PLACES.get(event.kind, "others")].append(_entry(event.kind, fields))
    return {key: _seen(places) for key, places in seen.items()}


_PLACES: Final[Mapping[EventKind, str]] = {
    EventKind.TRAP: "traps",
    EventKind.CONSOLE: "lines",
    EventKind.QOS: "classes",
    EventKind.REFUSED: "refused",
    EventKind.LINK: "links",
    EventKind.SPAWN: "starts",
    EventKind.SPAWN_FAILED: "starts",
    EventKind.EXIT: "end",
    EventKind.DEVICE: "others",
}


def _seen(places: Mapping[str, Sequence[str]]) -> Seen:
    sequences = {place: tuple(entries) for place, entries in places.items() if place != "end"}
    return Seen(**sequences, end="; ".join(places.get("end", ())))


def _entry(kind: EventKind, fields: Mapping[str, Any]) -> str:
    """One event as a line: its kind, what a reader looks for first, and the other fields."""
    first = next((name for name in ("trap", "line") if name in fields), None)
    others = {name: value for name, value in fields.items() if name != first}
    return f"{kind.value} {'' if first is None else fields[first]} {_json(others)}"


def _named(match: re.Match[str], tasks: Mapping[Pid, TaskKey]) -> str:
    name, generation = tasks.get(Pid(int(match[2])), ("nobody", 0))
    return f"{match[1]}={name}#{generation}"


def _generation(fields: Mapping[str, object]) -> int:
    generation = fields["generation"]
    assert isinstance(generation, int), "the kernel counts generations"
    return generation


def _entries(seen: Seen) -> list[str]:
    return [
        *(entry for place in seen[:-1] for entry in place),
        *((seen.end,) if seen.end else ()),
    ]


def exit_code(results: Sequence[Result]) -> int:
    """0 if all are the same."""
    return max(result.exit_code for result in results)


def as_text(results: Sequence[Result]) -> str:
    """The report: of each pair differences first, then what is allowed and how often; and what is
    not compared."""
    lines = [line for result in results for line in _told(result)]
    lines += [f"left out {entry.id}: {entry.what}; {entry.why}" for entry in LEFT_OUT]
    lines.append("the same" if exit_code(results) == 0 else "NOT the same")
    return "\n".join(lines) + "\n"


def _told(result: Result) -> list[str]:
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
    return lines


def as_json(results: Sequence[Result]) -> str:
    """The same as one JSON object on one line."""
    report = {
        "exit_code": exit_code(results),
        "pairs": [_pair(result) for result in results],
        "left_out": {entry.id: f"{entry.what}; {entry.why}" for entry in LEFT_OUT},
    }
    return _json(report) + "\n"


def _pair(result: Result) -> Mapping[str, object]:
    return {
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


def _run(ground: Ground, comparison: Comparison) -> Trace:
    with TemporaryDirectory(prefix="compared-") as state:
        job = Job(
            ground=ground.value,
            system="",
            smp=1,
            seed=comparison.seed,
            limit=SIM_LIMIT if ground is Ground.SIM else comparison.timeout,
            state=state,
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
    said = [line for line in trace.output.splitlines() if not ORDINARY.fullmatch(line)]
    if said:
        yield f"output: {said[-20:]}"


def _json(value: object) -> str:
    return json.dumps(value, separators=(",", ":"), sort_keys=True, default=str)

"""One ladder on several grounds, and every difference between what each service said and how it
ended, boot by boot: starts, calls, denials, crashes, state, an update and its rollback.

Compared are the lines of each service in its own order (init's, who hears of others as they come,
without theirs), with process ids left out, and the ends of its instances. A difference is named in
ALLOWED, which every report prints with how often it was needed, or the comparison fails.
"""

import difflib
import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, NamedTuple

from nexus.abi import INIT_NAME, EventKind
from nexus.proof.expected import BOOT_CUT
from nexus.proof.prove import Outcome, prove
from nexus.proof.request import SCENARIO_DEFAULT, SYSTEM_DEFAULT, Comparison, Request
from nexus.proof.runner import make_ready
from nexus.proof.trace import Trace
from nexus.proof.verdict import rung_of
from nexus.protocols.ladder import BAD_BOOT, RUNGS, Ground, Phase, boot_of, last_boot, rung

SCENARIO: Final = SCENARIO_DEFAULT  # of `nexus prove --compare`
DIFF_LINES_MAX: Final = 40  # shown of one service in one boot
PID: Final = re.compile(r"\bpid=\d+")
ENDED_AT_ONCE: Final = ("demo.copy", "demo.exit0", "demo.exit42", "demo.hello")
BEFORE_THE_BAD: Final = ("logd", "policyd", "statefsd", "timed", "rngd", "metricsd", "demo.stuck")
"""What has certainly started when init gives the bad set up, and the service it does so for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """What the scenario has of a system's life, and the rungs that are about it."""

    what: str
    rungs: tuple[int, ...]

    @property
    def boots(self) -> tuple[int, ...]:
        """The boots that it happens in."""
        last = last_boot(RUNGS)
        return tuple(sorted({boot_of(rung(number), last) for number in self.rungs}))


def _in_phase(phase: Phase) -> tuple[int, ...]:
    return tuple(row.number for row in RUNGS if row.phase is phase)


PARTS: Final = (
    Part(what="boot", rungs=_in_phase(Phase.BRING_UP)),
    Part(what="calls", rungs=_in_phase(Phase.IPC)),
    Part(what="denials", rungs=(48, *range(78, 83), 93, 101, 109, 132, 139)),
    Part(what="a crash", rungs=(68, 71, 90, 91, 92, 96, 129)),
    Part(what="state", rungs=tuple(range(100, 111))),
    Part(what="update", rungs=(131, 133, 134, 135)),
    Part(what="rollback", rungs=(136, 137, 138)),
)
"""The scenario that is asked for, and where the ladder has it. Boots are numbered from 0."""


class Entry(NamedTuple):
    """A line that a service printed, or an end of it, in one boot."""

    boot: int
    name: str
    text: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Allowed:
    """A difference that is none: `is_it` says whether an entry is about it, on these grounds."""

    id: str
    why: str
    is_it: Callable[[Entry, frozenset[Ground]], bool]


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """What a comparison of two found. `red` says which ladder is not green, or is empty."""

    grounds: tuple[Ground, Ground]
    entries: int
    diffs: Mapping[tuple[int, str], Sequence[str]]
    used: Mapping[str, int]
    red: tuple[str, ...] = ()

    @property
    def exit_code(self) -> int:
        """0 if both are green and nothing but allowed differences was found."""
        return 1 if self.diffs or self.red else 0


def _of_some_grounds(entry: Entry, grounds: frozenset[Ground]) -> bool:
    row = rung_of(entry.text.removeprefix("line "))
    return row is not None and not grounds <= row.grounds


def _of_the_cut(entry: Entry, grounds: frozenset[Ground]) -> bool:
    ends = entry.text.startswith("end ") or entry.text == "line init: stopped"
    return entry.boot == BOOT_CUT and Ground.LINUX in grounds and (ends or "#105" in entry.text)


def _is_late(entry: Entry, _grounds: frozenset[Ground]) -> bool:
    is_health = entry.text.startswith("line init: health ")
    return entry.name == INIT_NAME and is_health and entry.text.endswith(" late")


def _of_a_short_life(entry: Entry, _grounds: frozenset[Ground]) -> bool:
    if entry.name == INIT_NAME:
        return entry.text in {f"line init: health {name} ok" for name in ENDED_AT_ONCE}
    ready = f"line {entry.name}: ready"
    return entry.name in ENDED_AT_ONCE and entry.text in {ready, f"{ready} again"}


def _of_the_bad_set(entry: Entry, _grounds: frozenset[Ground]) -> bool:
    if entry.boot != BAD_BOOT:
        return False
    if entry.name == INIT_NAME:
        return entry.text.startswith(("line init: health ", "line init: up "))
    return entry.name not in BEFORE_THE_BAD


def _is_first_segment(entry: Entry, _grounds: frozenset[Ground]) -> bool:
    return entry.boot > 0 and entry.text == "line [INFO metricsd] retention wal active"


ALLOWED: Final = (
    Allowed(
        id="rungs",
        why="the line of a rung that one of the grounds does not have, as the ladder says",
        is_it=_of_some_grounds,
    ),
    Allowed(
        id="cut",
        why="boot 1 ends in a power cut where a disk can lose power, and in order on linux",
        is_it=_of_the_cut,
    ),
    Allowed(
        id="late",
        why="an answer that comes late is a matter of how busy the machine is",
        is_it=_is_late,
    ),
    Allowed(
        id="short-life",
        why="whether a program that ends or is killed at once has said that it is ready",
        is_it=_of_a_short_life,
    ),
    Allowed(
        id="bad-set",
        why="boot 4 is given up while others still start; how far they came is a matter of time",
        is_it=_of_the_bad_set,
    ),
    Allowed(
        id="segment",
        why="a later boot may be over before metricsd has written its first segment",
        is_it=_is_first_segment,
    ),
)


def compare(comparison: Comparison, directory: Path) -> tuple[Pair, ...]:
    """Climb the ladder on each ground, and compare with the first. Raises UsageError, NotRun."""
    for ground in comparison.grounds:
        make_ready(ground)
    outcomes = {ground: _climbed(ground, comparison, directory) for ground in comparison.grounds}
    first, *others = comparison.grounds
    return tuple(compare_two(outcomes[first], outcomes[other]) for other in others)


def _climbed(ground: Ground, comparison: Comparison, directory: Path) -> Outcome:
    request = Request(
        ground=ground,
        system=SYSTEM_DEFAULT,
        smp=1,
        seed=comparison.seed,
        timeout=comparison.timeout,
    )
    return prove(request, directory)


def compare_two(one: Outcome, other: Outcome) -> Pair:
    """Compare two ladders."""
    grounds = (one.request.ground, other.request.ground)
    red = tuple(
        f"{each.request.ground.value}: {each.verdict.missing_marker or each.verdict.findings}"
        for each in (one, other)
        if each.verdict.exit_code
    )
    return replace(compare_traces(one.traces, other.traces, grounds), red=red)


def compare_traces(
    one: Sequence[Trace], other: Sequence[Trace], grounds: tuple[Ground, Ground]
) -> Pair:
    """Compare what two runs left."""
    used: Counter[str] = Counter()
    kept = [_settled(traces, frozenset(grounds), used) for traces in (one, other)]
    diffs = {}
    for key in sorted(kept[0].keys() | kept[1].keys()):
        left, right = (each.get(key, []) for each in kept)
        if key[1] == INIT_NAME:
            left, right = sorted(left), sorted(right)
        if left != right:
            first, second = (ground.value for ground in grounds)
            diffs[key] = list(difflib.unified_diff(left, right, first, second, n=1, lineterm=""))
    count = sum(map(len, kept[0].values()))
    return Pair(grounds=grounds, entries=count, diffs=diffs, used=dict(used))


def _settled(
    traces: Sequence[Trace], grounds: frozenset[Ground], used: Counter[str]
) -> dict[tuple[int, str], list[str]]:
    """What each service said and how it ended, in its own order, without what is allowed."""
    kept: dict[tuple[int, str], list[str]] = {}
    for trace in traces:
        for entry in entries_of(trace):
            allowed = next((each for each in ALLOWED if each.is_it(entry, grounds)), None)
            if allowed is not None:
                used[allowed.id] += 1
            else:
                kept.setdefault((entry.boot, entry.name), []).append(entry.text)
    return kept


def entries_of(trace: Trace) -> list[Entry]:
    """Every line and every end of one boot."""
    found = []
    for event in trace.events:
        name = str(event.fields.get("name", ""))
        if event.kind is EventKind.CONSOLE:
            text = PID.sub("pid=N", str(event.fields.get("line", "")))
            found.append(Entry(trace.number, name, f"line {text}"))
        elif event.kind is EventKind.EXIT:
            code, signal = event.fields.get("code"), event.fields.get("signal")
            found.append(Entry(trace.number, name, f"end code {code}, signal {signal}"))
    return found


def exit_code(pairs: Sequence[Pair]) -> int:
    """0 if all are the same."""
    return max(pair.exit_code for pair in pairs)


def as_text(pairs: Sequence[Pair]) -> str:
    """The report: of each pair what differs, and how often each allowed difference was met."""
    lines = []
    for pair in pairs:
        first, second = (ground.value for ground in pair.grounds)
        lines.append(f"{first} and {second}: {pair.entries} lines and ends compared")
        lines += [f"red      {told}" for told in pair.red]
        for (boot, name), diff in pair.diffs.items():
            lines += [f"different: {name} in boot {boot}", *diff[:DIFF_LINES_MAX]]
        lines += [
            f"allowed  {each.id} ({pair.used.get(each.id, 0)}): {each.why}" for each in ALLOWED
        ]
    lines.append("the same" if exit_code(pairs) == 0 else "NOT the same")
    return "\n".join(lines) + "\n"


def as_json(pairs: Sequence[Pair]) -> str:
    """The same as one JSON object on one line."""
    report = {
        "exit_code": exit_code(pairs),
        "pairs": [
            {
                "grounds": [ground.value for ground in pair.grounds],
                "entries": pair.entries,
                "red": list(pair.red),
                "diffs": {f"{boot} {name}": list(d) for (boot, name), d in pair.diffs.items()},
                "allowed": {each.id: pair.used.get(each.id, 0) for each in ALLOWED},
            }
            for pair in pairs
        ],
    }
    return json.dumps(report, separators=(",", ":")) + "\n"

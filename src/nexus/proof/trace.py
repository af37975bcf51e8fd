"""What one boot left behind, put in order for the verdict: events, lines, and who printed them."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Final, NamedTuple

from nexus.abi import INIT_NAME, Event, EventKind, Nanos, Pid
from nexus.proof.boot_remains import BootRemains, Made
from nexus.proof.remains import NOTHING_LEFT, Remains
from nexus.protocols.ladder import KERNEL

CRASH_PATTERNS: Final = (
    re.compile(r"^Traceback \(most recent call last\)", re.MULTILINE),
    re.compile(r"^Fatal Python error", re.MULTILINE),
    re.compile(r"\bpanic(ked)?\b", re.IGNORECASE),
    re.compile(r"\bAssertionError\b"),
)
FAIL_WORD: Final = re.compile(r"\bFAIL\b")
ALARMS: Final = re.compile(
    r"Kernel panic|Oops\b|Internal error:|BUG: |Unable to handle kernel|Out of memory: Killed"
)
"""A line of a machine's console with one of these is of a kernel that went wrong. (A service that
is killed over its own limit is "Memory cgroup out of memory".)"""


class Identity(NamedTuple):
    """A task as the kernel's spawn record names it."""

    name: str
    generation: int
    pid: Pid


class Line(NamedTuple):
    """One printed line. `place` is its index in the event stream of its boot; `printer` is the
    kernel's stamp, KERNEL for the kernel's own lines; `evidence` is empty when none came with
    it."""

    place: int
    time: Nanos
    printer: str
    generation: int
    pid: Pid
    text: str
    evidence: Mapping[str, Any]
    boot: int = 0

    @property
    def order(self) -> tuple[int, int]:
        """Where the line stands among those of the whole run."""
        return self.boot, self.place


@dataclass(frozen=True, kw_only=True, slots=True)
class Ending:
    """How a boot's process ended. `stopped`: the runner ended it on purpose, at a marker; `cut`:
    the power was cut where the runner had said."""

    code: int | None = 0  # None: killed at the deadline
    cut: bool = False
    signal: int = 0
    stopped: bool = False
    left_behind: int = 0  # processes of the boot still there when it had ended
    dropped: int = 0  # events that were lost on the way to the runner
    told_end: bool = True  # the boot said that these were all its events
    wall: int = 0  # ns of the runner's clock


@dataclass(frozen=True)
class Trace:
    """One boot: its events in the order they were recorded, raw output, and its ending.

    `left` is what the runner itself read on the disks when the boot had ended, and `earlier` are
    the boots of the run before this one, oldest first. `seed` is what a simulated machine's chance
    came from. `boot_left` is what lies on boot device and slots, None without them, `made` the sets
    that the runner has made, by name. `notes` are what the machine said of itself, on the vm.
    """

    events: Sequence[Event]
    output: str = ""
    ending: Ending = field(default_factory=Ending)
    number: int = 0
    seed: int = 0
    left: Remains = NOTHING_LEFT
    scraped: bytes = b""
    boot_left: BootRemains | None = None
    made: Mapping[str, Made] = field(default_factory=dict)
    notes: Sequence[Mapping[str, Any]] = ()
    earlier: "tuple[Trace, ...]" = ()

    @cached_property
    def lines(self) -> tuple[Line, ...]:
        """Every console and kernel line in order."""
        return tuple(_lines(self.events, self.number))

    @cached_property
    def text_lines(self) -> frozenset[str]:
        """The texts of all lines."""
        return frozenset(line.text for line in self.lines)

    def of_kind(self, kind: EventKind) -> Iterator[tuple[int, Event]]:
        """Index and event of every event of a kind."""
        return ((at, event) for at, event in enumerate(self.events) if event.kind is kind)

    def spawns(self, name: str) -> list[tuple[int, Event]]:
        """Every spawn of a service, oldest first."""
        return [
            (at, event)
            for at, event in self.of_kind(EventKind.SPAWN)
            if event.fields.get("name") == name
        ]

    @cached_property
    def impostors(self) -> Mapping[int, str]:
        """Index of each console line whose stamped pid is not that of the task it names."""
        return dict(_impostors(self.events))


def _lines(events: Sequence[Event], boot: int) -> Iterator[Line]:
    for index, event in enumerate(events):
        if event.kind not in {EventKind.CONSOLE, EventKind.KERNEL}:
            continue
        kernel = event.kind is EventKind.KERNEL
        evidence = event.fields.get("evidence")
        yield Line(
            place=index,
            time=event.time,
            printer=KERNEL if kernel else str(event.fields.get("name", "")),
            generation=0 if kernel else _integer(event.fields.get("generation")),
            pid=event.pid,
            text=str(event.fields.get("line", "")),
            evidence=evidence if isinstance(evidence, dict) else {},
            boot=boot,
        )


def _impostors(events: Sequence[Event]) -> Iterator[tuple[int, str]]:
    """Compare every console line's pid with the spawn record. Only the root task has none."""
    identities: dict[Pid, Identity] = {}
    root: Pid | None = None
    for index, event in enumerate(events):
        name = str(event.fields.get("name", ""))
        generation = _integer(event.fields.get("generation"))
        if event.kind is EventKind.SPAWN:
            identities[event.pid] = Identity(name, generation, event.pid)
        elif event.kind is EventKind.CONSOLE:
            known = identities.get(event.pid)
            if known is None and name == INIT_NAME and root in {None, event.pid}:
                root = event.pid
            elif known is None or known[:2] != (name, generation):
                yield index, f"pid {event.pid} is not {name} generation {generation}"


def _integer(value: object) -> int:
    return value if isinstance(value, int) else 0

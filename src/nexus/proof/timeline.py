"""When what stood in a boot: kernel, process 1, each service, the ladder's end.

Times are of the booted kernel's clock. In a machine that clock begins with the kernel, and the
guest says when process 1 came; what a machine waited for the one before it is left out. On other
grounds a boot begins with its first event.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

from nexus.abi import INIT_NAME, Nanos
from nexus.proof.notes import GOES_ON, NOTE, NOTE_STAGE, NOTE_UP, WAITS
from nexus.proof.trace import Line, Trace
from nexus.protocols.ladder import SELFTEST

NOTES_SIZE_MAX: Final = 1024 * 1024  # bytes; some kilobytes are usual
GUEST_WORDS: Final = {
    NOTE_UP: "process 1",
    "off": "power off",
    "reboot": "reboot",
    "crash": "process 1 failed",
}


class Mark(NamedTuple):
    """Something that stood from `at` on, in nanoseconds since the boot began."""

    name: str
    at: Nanos


def marks_of(trace: Trace) -> tuple[Mark, ...]:
    """The timeline of one boot, in order of time."""
    is_guest = any(note.get(NOTE) == NOTE_UP for note in trace.notes)
    start = 0 if is_guest or not trace.events else trace.events[0].time
    found = [*_of_guest(trace.notes), *_of_system(trace.lines)]
    waited = waited_of(trace.notes)
    marks = [
        Mark(name, Nanos(at - start - (waited.length if at >= waited.until else 0)))
        for name, at in found
    ]
    if is_guest:
        marks.append(Mark("kernel", Nanos(0)))
    return tuple(sorted(marks, key=lambda mark: mark.at))


def notes_of(state: Path, boot: int) -> tuple[Mapping[str, Any], ...]:
    """What the guest said of itself in this boot; nothing on other grounds."""
    try:
        with (state / f"guest-{boot}.jsonl").open("rb") as file:
            lines = file.read(NOTES_SIZE_MAX).splitlines()
        return tuple(json.loads(line) for line in lines)
    except (FileNotFoundError, ValueError):
        return ()


class Waited(NamedTuple):
    """How long a machine had to wait for its disks, and until when; nanoseconds of its clock."""

    length: int
    until: int


def waited_of(notes: Sequence[Mapping[str, Any]]) -> Waited:
    """That of a machine which was started ahead; nothing of others."""
    stages = {note["name"]: int(note["t"]) for note in notes if note.get(NOTE) == NOTE_STAGE}
    until = stages.get(GOES_ON, 0)
    return Waited(until - stages.get(WAITS, until), until)


def heard_after(notes: Sequence[Mapping[str, Any]]) -> float | None:
    """Seconds of the host's clock from the start of the machine to the first word of process 1. The
    guest's clock counts its instructions and tells nothing about that. Nobody listens to a machine
    that waits."""
    if waited_of(notes).until:
        return None
    return next((float(note["at"]) for note in notes if note.get(NOTE) == NOTE_UP), None)


def _of_guest(notes: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, int]]:
    for note in notes:
        kind = note.get(NOTE)
        if kind == NOTE_STAGE:
            yield f"process 1: {note['name']}", int(note["t"])
        elif kind in GUEST_WORDS:
            yield GUEST_WORDS[kind], int(note["t"])


def _of_system(lines: Sequence[Line]) -> Iterator[tuple[str, int]]:
    started: set[str] = set()
    last: Line | None = None
    for line in lines:
        last = line if line.text.startswith("SELFTEST: ") else last
        is_init = line.printer == INIT_NAME and line.text in {"init: start", "init: ready"}
        if is_init or line.text.startswith("KSELFTEST: "):
            yield line.text, line.time
        elif line.text.startswith(f"{line.printer}: ready") and line.printer not in started:
            started.add(line.printer)
            yield line.text, line.time
    if last is not None and last.printer == SELFTEST:
        yield f"ladder: {last.text}", last.time

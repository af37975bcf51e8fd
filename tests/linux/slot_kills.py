"""The whole system killed at random moments of an update: loader, init and every service at once.

    python -m tests.linux.slot_kills --kills 100 --seed 0 --report docs/reference/ota-kills.txt
    python -m tests.linux.slot_kills --only 37 --seed 0

Each kill begins with a copy of a device that was brought to the phase before: so one can be
repeated without the others. The moment is drawn over a tenth more than what the phase takes on
this machine when nobody kills it, which the first, unkilled run of the phase measures.

SIGKILL takes no page of the file cache with it, so this is no power cut: torn and lost writes are
`nexus sim powercut ota`. What it adds is the real loader, real processes and real restarts.
"""

import argparse
import os
import random  # noqa: TID251 (seeded: when to kill)
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from threading import Event as Pause
from typing import Final

from nexus.bootctl import BootRecord, SlotName, SlotState
from tests.fakes.machine import machine, python_of
from tests.linux.slotted import (
    Device,
    Set,
    changed,
    eventually,
    first_set,
    stamp_of,
)

MARGIN: Final = 1.1  # of what a phase takes, so that some kills come right behind its end
RUNS_MAX: Final = 3  # of a phase that is measured, as far as it is killed so often
KEPT: Final = "kept"  # the folder of what devices were at some moment
NEW: Final = "new"
LOADER_END: Final = 60.0  # seconds for a loader that was asked to end
UP: Final = "updated: ready (statefs)"
COMMITTED: Final = "init: health ok (slot b)"
BROKEN: Final = {"python/nexus/cli/boot.py": b"raise SystemExit(9)\n"}

A, B = SlotName.A, SlotName.B


class Wrong(Exception):
    """What was found after a kill may not be."""


def must(truth: object, text: str) -> None:
    if not truth:
        raise Wrong(text)


@dataclass
class Sets:
    """What slots may hold: the first set, a good update, and one whose init does not start."""

    first: Set = field(default_factory=first_set)
    good: Set = field(default_factory=lambda: first_set().as_version(2))
    bad: Set = field(default_factory=lambda: changed(first_set().as_version(2), BROKEN))


@dataclass
class Act:
    """What a phase does to a device: it is over when `done` says so; `commands` go along."""

    device: Device
    loader: "subprocess.Popen[bytes]"
    command: "subprocess.Popen[str] | None" = None
    begun: int = 0  # where the console ended

    @property
    def acknowledged(self) -> bool:
        """Whether the command was told that it is done."""
        return self.command is not None and self.command.poll() == 0


@dataclass(frozen=True)
class Phase:
    """A part of an update. `prepare` brings a new device before it, `begin` begins it, `is_over`
    says when it is over; `check` is told what the record says after a kill, and the versions that
    may be booted next are what it answers."""

    name: str
    prepare: Callable[[Device, Sets], None]
    begin: Callable[[Device], Act]
    is_over: Callable[[Act], bool]
    check: Callable[[Act, BootRecord], set[int]]


# ------------------------------------------------------------------ one device


def started(device: Device) -> "subprocess.Popen[bytes]":
    """A loader whose system is ready."""
    since = device.size()
    loader = device.start()
    _ = device.says(UP, since)
    return loader


def end(loader: "subprocess.Popen[bytes]") -> None:
    loader.send_signal(signal.SIGTERM)
    _ = loader.wait(LOADER_END)


def kill(act: Act) -> None:
    """Everything at once: loader, init and services are one process group; then the command."""
    os.killpg(act.loader.pid, signal.SIGKILL)
    if act.command is not None:
        act.command.kill()
        _ = act.command.communicate()
    _ = act.loader.wait()
    must(eventually(partial(is_empty, act.loader.pid)), "processes are left behind")


def is_empty(group: int) -> bool:
    """Whether a process group has no member that runs."""
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                words = (folder / "stat").read_text("ascii", "replace").rpartition(")")[2].split()
            except OSError:
                continue
            if int(words[2]) == group and words[0] != "Z":
                return False
    return True


def by_command(*words: str) -> Callable[[Device], Act]:
    """Begin with a running system and a command."""

    def begin(device: Device) -> Act:
        loader = started(device)
        since = device.size()
        return Act(device, loader, device.host.start("ota", *words), since)

    return begin


def by_boot(device: Device) -> Act:
    """Begin with the start of the loader."""
    since = device.size()
    return Act(device, device.start(), None, since)


def said(text: str) -> Callable[[Act], bool]:
    return lambda act: text.encode() in act.device.console.read_bytes()[act.begun :]


def answered(act: Act) -> bool:
    return act.command is not None and act.command.poll() is not None


# ------------------------------------------------------------------ the phases


def stage(device: Device, made: Set) -> None:
    _ = device.host.ok("ota", "stage", device.write_update(made))


def prepare_stage(device: Device, sets: Sets) -> None:
    path = device.write_update(sets.good)
    _ = Path(path).rename(device.host.home / "update.nxu")


def check_stage(act: Act, record: BootRecord) -> set[int]:
    state = record.slot(B).state
    must(record.trying is None, "staging began a trial")
    must(state in (SlotState.EMPTY, SlotState.STAGED), f"slot b is {state.name}")
    must(state is SlotState.STAGED or not act.acknowledged, "an acknowledged set is not staged")
    return {1}


def prepare_switch(device: Device, sets: Sets) -> None:
    loader = started(device)
    stage(device, sets.good)
    end(loader)


def check_switch(act: Act, record: BootRecord) -> set[int]:
    must(record.trying is B or not act.acknowledged, "an acknowledged switch is forgotten")
    return {1} if record.trying is None else {2}


def prepare_trial(tries: int, pick: Callable[[Sets], Set]) -> Callable[[Device, Sets], None]:
    def prepare(device: Device, sets: Sets) -> None:
        loader = started(device)
        stage(device, pick(sets))
        _ = device.host.ok("ota", "switch", "--tries", str(tries))
        end(loader)

    return prepare


def check_first_boot(act: Act, record: BootRecord) -> set[int]:
    if said(COMMITTED)(act):
        must(record.active is B, "init said that the set is committed, and it is not")
    must(record.active is B or record.trying is B, "a set with a try left was given up")
    return {2}


def check_rollback(_act: Act, record: BootRecord) -> set[int]:
    must(record.active is A, "a set that never ran was committed")
    must(record.slot(A).state is SlotState.GOOD, "the good slot is not good any more")
    return {1}


def prepare_taken_back(device: Device, sets: Sets) -> None:
    prepare_trial(2, lambda each: each.good)(device, sets)
    loader = device.start()
    _ = device.says(COMMITTED)
    end(loader)


def check_taken_back(act: Act, record: BootRecord) -> set[int]:
    must(record.active is A or not act.acknowledged, "an acknowledged rollback is forgotten")
    return {1 if record.active is A else 2}


PHASES: Final = (
    Phase("stage", prepare_stage, by_command("stage", "update.nxu"), answered, check_stage),
    Phase(
        "switch",
        prepare_switch,
        by_command("switch", "--reboot"),
        said("slot b, version 2"),
        check_switch,
    ),
    Phase(
        "first boot and commit",
        prepare_trial(2, lambda sets: sets.good),
        by_boot,
        said(COMMITTED),
        check_first_boot,
    ),
    Phase(
        "rollback of a set that does not start",
        prepare_trial(1, lambda sets: sets.bad),
        by_boot,
        said(UP),
        check_rollback,
    ),
    Phase(
        "rollback by a command",
        prepare_taken_back,
        by_command("rollback"),
        answered,
        check_taken_back,
    ),
)


# ------------------------------------------------------------------ the campaign


def prepared(phase: Phase, device: Device, sets: Sets, runs: int) -> float:
    """Bring a new device before a phase and keep that; how many seconds the phase takes, the
    shortest of so many runs."""
    back(device.host.home, NEW)
    phase.prepare(device, sets)
    keep(device.host.home, phase.name)
    return min(measured(phase, device) for _ in range(runs))


def measured(phase: Phase, device: Device) -> float:
    """Seconds of a phase that nobody interrupts."""
    back(device.host.home, phase.name)
    act = phase.begin(device)
    start = time.perf_counter()
    must(eventually(partial(phase.is_over, act)), f"{phase.name} does not end:\n{device.tail()}")
    seconds = time.perf_counter() - start
    kill(act)
    return seconds


def keep(home: Path, name: str) -> None:
    """Keep the state of the device, and what is on its console."""
    for folder in ("s", "l"):
        _ = shutil.copytree(home / folder, home / KEPT / name / folder)


def back(home: Path, name: str) -> None:
    """Have the device as it was kept."""
    for folder in ("s", "l", "r"):
        shutil.rmtree(home / folder, ignore_errors=True)
    for folder in ("s", "l"):
        _ = shutil.copytree(home / KEPT / name / folder, home / folder)


def killed_once(phase: Phase, device: Device, sets: Sets, moment: float) -> str:
    """Kill at `moment` (s after the begin), look, boot, look again; what was on the device after
    the kill, in a word. Raises Wrong."""
    back(device.host.home, phase.name)
    act = phase.begin(device)
    _ = Pause().wait(moment)
    over = phase.is_over(act)
    kill(act)
    record = device.record()  # it can be read: NoBootRecord would be a brick
    versions = phase.check(act, record)
    good = record.slot(record.active)
    must(good.state is SlotState.GOOD, f"the active slot is {good.state.name}")
    content = Set(device.content(record.active, good.size), sets.first.manifest)
    must(content.digest == good.digest, "the active slot does not hold what was committed")
    since = device.size()
    loader = device.start()
    try:
        ready = eventually(lambda: UP.encode() in device.console.read_bytes()[since:])
        must(ready, f"it does not boot any more:\n{device.tail()}")
        stamps = device.stamps().all
        whole = {stamp_of(sets.first): 1, stamp_of(sets.good): 2}
        must(len(stamps) == 1, f"a half set runs: {stamps}")
        (stamp,) = stamps
        must(whole.get(stamp) in versions, f"{stamp} runs and not one of {versions}")
    finally:
        end(loader)
    state = "none" if record.trying is None else f"slot {record.trying.value} on trial"
    return f"{state}, {'after' if over else 'before'} the end of the phase"


def campaign(numbers: Sequence[int], seed: int, say: Callable[[str], None]) -> Counter[str]:
    """Kill once for each number; how many of each outcome there were. Raises Wrong."""
    python = python_of(os.getuid())
    assert python is not None
    sets = Sets()
    counts: Counter[str] = Counter()
    with machine(os.getuid(), python) as host:
        device = Device(host, sets.first)
        end(started(device))  # what every phase begins with, its first tree among it
        keep(host.home, NEW)
        for index, phase in enumerate(PHASES):
            own = [number for number in numbers if number % len(PHASES) == index]
            seconds = prepared(phase, device, sets, min(RUNS_MAX, len(own))) if own else 0
            for number in own:
                moment = random.Random(f"{seed} {number}").uniform(0, seconds * MARGIN)
                place = f"kill {number}, {phase.name}, {moment:.3f} s of {seconds:.3f}"
                try:
                    outcome = killed_once(phase, device, sets, moment)
                except Exception as error:
                    repeat = f"python -m tests.linux.slot_kills --only {number} --seed {seed}"
                    raise Wrong(
                        f"{place}: {type(error).__name__}: {error}\nrepeat: {repeat}"
                    ) from error
                counts[phase.name] += 1
                counts[f"{phase.name}: {outcome}"] += 1
                say(f"{place}: {outcome}")
    return counts


def report(counts: Counter[str], kills: int, seed: int) -> str:
    """What a campaign that ended says of itself: it ends at the first brick or wrong slot."""
    lines = [
        f"SIGKILL of the whole system at {kills} random moments of an update, seed {seed}",
        "bricks 0, wrong slots 0, half sets 0, acknowledged work lost 0",
        f"repeat: python -m tests.linux.slot_kills --kills {kills} --seed {seed}",
        "",
    ]
    for phase in PHASES:
        lines.append(f"{counts[phase.name]:4}  {phase.name}")
        lines += [
            f"{count:10}  {name.partition(': ')[2]}"
            for name, count in sorted(counts.items())
            if name.startswith(f"{phase.name}: ")
        ]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, prog="slot_kills")
    _ = parser.add_argument("--kills", type=int, default=100)
    _ = parser.add_argument("--seed", type=int, default=0)
    _ = parser.add_argument("--only", type=int)
    _ = parser.add_argument("--report", type=Path)
    words = parser.parse_args()
    numbers = range(words.kills) if words.only is None else [words.only]
    counts = campaign(numbers, words.seed, print)
    text = report(counts, len(numbers), words.seed)
    _ = sys.stdout.write(text)
    if words.report is not None:
        _ = words.report.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())

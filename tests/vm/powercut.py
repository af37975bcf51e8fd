"""The power is cut at every flush of a machine, and nothing acknowledged is lost.

    python -m tests.vm.powercut [--every N] [--report FILE] [--forgetful]

A system that keeps numbered values is booted in QEMU, which writes down every write and flush of
its disk. For each value the length of that log is noted when the word comes that it is durable, so
what is durable at any place in it is known from below. Then the disk is put together as a power cut
at each place could have left it: as it was flushed, and with each of the later writes missing, and
with all of them. On each a store has to open and hold what the first values leave, as many as were
durable there, or more: no fewer, and nothing else.

Exit code 3 if there is no machine to run it on: that is no pass.
"""

import argparse
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final, NamedTuple

from nexus.abi import EventKind
from nexus.init.plan import load_plan
from nexus.proof.record import decode_event
from nexus.proof.remains import read_image
from nexus.proof.runner import EXIT_NOT_RUN, Job
from nexus.vm import qemu
from nexus.vm.disks import disks_of
from nexus.vm.host import overlay_of
from nexus.vm.image import INIT, Image, build
from nexus.vm.machines import machine_named
from nexus.vm.packages import NotHad, cache_folder
from nexus.vm.writelog import Cut, Entry, Kind, count_of, cuts, entries_of

HOME: Final = Path(__file__).parent / "keeper"
SYSTEM: Final = HOME / "system.toml"
KEYS: Final = 7  # as keeper.py has it; test_powercut.py compares them
COUNT: Final = 150
KEPT: Final = "keeper: kept "
FORGETFUL: Final = {
    False: """\
import os
write = os.pwritev
os.pwritev = lambda descriptor, buffers, offset, flags=0: write(descriptor, buffers, offset)
os.fdatasync = lambda descriptor: None
""",
    True: """\
import sys
sys.path.append("/usr/lib/python3/dist-packages")
from nexus.drivers import virtio_block
perform = virtio_block.VirtioBlock._perform
async def forget(self, kind, *rest):
    if kind != virtio_block.FLUSH:
        return await perform(self, kind, *rest)
virtio_block.VirtioBlock._perform = forget
""",
}
"""A missing flush, where statefsd drives the disk by itself and where Linux does. It stands in
front of process 1's own program, and what that forks has it too."""

BOOT_MAX: Final = 180.0  # seconds
PROBLEMS_MAX: Final = 10
CONSOLE_MAX: Final = 20  # lines of a boot that did not get there


class Kept(NamedTuple):
    """A value is durable since the log of the disk had so many entries, at the latest."""

    number: int
    entries: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Recorded:
    """What a boot did to its disk, which was `before`."""

    before: bytes
    entries: Sequence[Entry]
    kept: Sequence[Kept]
    ended: qemu.Ended
    console: Sequence[str]

    def durable(self, after: int) -> int:
        """The last value known to be durable when the log had so many entries."""
        return max((each.number for each in self.kept if each.entries <= after), default=0)


def record(image: Image, folder: Path, *, by_linux: bool, forgetful: bool = False) -> Recorded:
    """Boot it once, until its last value is durable. The disk is driven `by_linux`, or by statefsd
    alone; `forgetful` plants a missing flush. Raises NotHad."""
    job = Job(
        ground="vm", system=str(SYSTEM), smp=1, seed=0, limit=int(BOOT_MAX * 1e9), state=str(folder)
    )
    initrd, log = folder / "initrd", folder / "writes"
    overlay = overlay_of(job, plain=True)
    first, _, rest = INIT.partition("\n")
    planted = FORGETFUL[not by_linux] if forgetful else ""
    overlay.file("init", f"{first}\n{planted}{rest}".encode(), 0o755)
    image.write_initrd(initrd, overlay)
    _ = log.write_bytes(b"")
    disks = {each.name: each for each in disks_of(load_plan(SYSTEM), folder)}
    before = disks["disk"].file.read_bytes()
    disks["disk"] = replace(disks["disk"], log=log, is_alone=not by_linux)
    setup = qemu.Setup(
        machine=image.machine, kernel=image.kernel, initrd=initrd, disks=tuple(disks.values())
    )
    kept: list[Kept] = []
    console: list[str] = []

    def on_evidence(_seconds: float, line: bytes) -> bool:
        if KEPT.encode() not in line:
            return False
        event = decode_event(line)
        text = str(event.fields.get("line", ""))
        if event.kind is EventKind.CONSOLE and text.startswith(KEPT):
            kept.append(Kept(int(text.removeprefix(KEPT)), count_of(log)))
        return len(kept) == COUNT

    def told(_seconds: float, text: str) -> None:
        console.append(text)

    ended = qemu.run(setup, deadline=BOOT_MAX, told=told, evidence=on_evidence)
    entries = list(entries_of(log)) if count_of(log) else []  # of a disk that was never flushed
    return Recorded(before=before, entries=entries, kept=kept, ended=ended, console=console)


def problem_of(cut: Cut, durable: int) -> str:
    """What is wrong with the disk that a cut left; empty if nothing is."""
    left = read_image(cut.image)
    if left.problem:
        return f"no store: {left.problem}" if durable else ""
    if left.lost:
        return f"{left.lost} records are damaged"
    numbers = {
        int(key.rpartition(b"/")[2]): int(each.value.split()[0])
        for key, each in left.records.items()
        if key.startswith(b"/state/keeper/")
    }
    last = max(numbers.values(), default=0)
    if last < durable:
        return f"value {durable} was durable, and the last one is {last}"
    expected = {number % KEYS: number for number in range(max(1, last - KEYS + 1), last + 1)}
    return "" if numbers == expected else f"{numbers} is not what {last} values leave"


def problems(recorded: Recorded, every: int) -> tuple[int, list[str]]:
    """How many cuts were tried, one of so many, and what was wrong after each."""
    tried, found = 0, []
    for number, cut in enumerate(cuts(recorded.before, recorded.entries)):
        if number % every == 0:
            tried += 1
            problem = problem_of(cut, recorded.durable(cut.after))
            if problem:
                found.append(f"after {cut.after} entries without {cut.dropped}: {problem}")
    return tried, found


def told(recorded: Recorded, tried: int, found: Sequence[str]) -> Iterable[str]:
    """What was done and found, for people."""
    writes = sum(entry.is_write for entry in recorded.entries)
    flushes = sum(Kind.FLUSH in entry.kind for entry in recorded.entries)
    yield f"values acknowledged as durable: {len(recorded.kept)} of {COUNT}"
    yield f"writes of the disk: {writes}, flushes: {flushes}"
    yield f"power cuts tried: {tried}, with something lost or wrong: {len(found)}"
    yield from found[:PROBLEMS_MAX]


def main(argv: Sequence[str]) -> int:
    """Boot, cut, look."""
    parser = argparse.ArgumentParser(description=__doc__)
    _ = parser.add_argument("--every", type=int, default=1, help="try one cut of so many")
    _ = parser.add_argument("--report", type=Path, help="where to write what was found")
    _ = parser.add_argument("--forgetful", action="store_true", help="plant a missing flush")
    options = parser.parse_args(argv)
    lines: list[str] = []
    code = 0
    try:
        image = build(machine_named(), cache_folder())
        for by_linux in (False, True):
            with TemporaryDirectory(prefix="nexus-cut-") as name:
                recorded = record(image, Path(name), by_linux=by_linux, forgetful=options.forgetful)
            tried, found = problems(recorded, options.every)
            lines.append(f"The disk is driven by {'Linux' if by_linux else 'statefsd'}:")
            lines += (f"- {line}" for line in told(recorded, tried, found))
            if len(recorded.kept) < COUNT:
                lines += [*recorded.console[-CONSOLE_MAX:], str(recorded.ended)]
            if found or len(recorded.kept) < COUNT:
                code = 1
    except NotHad as missing:
        _ = sys.stdout.write(f"not run: {missing}\n")
        return EXIT_NOT_RUN
    text = "".join(f"{line}\n" for line in lines)
    _ = sys.stdout.write(text)
    if options.report:
        _ = options.report.write_text(f"# Power cuts of a virtual machine\n\n{text}", "utf-8")
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""`nexus sim powercut ota`: the power is cut everywhere in an update, and the device boots.

A device of four simulated disks (boot device, slot a, slot b, state) goes through the scenes of its
life (`ota_device`): a set is staged, staged again, switched to, booted for the first time,
committed, rolled back by itself and by hand. Before each write and each flush of any disk the
caches of all four are looked at, and for the ways in which a power cut could leave them (`splits`)
the device is booted from what would be left. A few lines of paper (`Paper`) know what may run then:

- a slot boots, and what stands in it is to the byte a set that was signed: else it is a brick, or a
  half set;
- it is the one of before the step that was cut off, or the one of after it; an acknowledged step
  stays: else it is a wrong slot;
- the data are those that the running set knows, and after a rollback those of before the trial;
  what was staged, and whom was believed, is not forgotten: else it is a loss.

Then life goes on from there: a trial is committed, or fails until it is rolled back, and in a part
of the cases a whole update follows; in another part the power is cut once more, at every write of
that boot.

Every problem comes with the command that repeats it alone.
"""

import argparse
import json
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from hashlib import sha256
from pathlib import Path
from random import Random  # noqa: TID251 (which splits are drawn where not every one is tried)
from typing import Final, NamedTuple, TypeAlias

from nexus.abi import BLOCK_SIZE
from nexus.drivers import finished
from nexus.kernel.sim.disk import (
    NOTHING,
    Choice,
    Disk,
    Piece,
    choice_text,
    parse_choice,
)
from nexus.proof.ota_device import (
    BACKENDS,
    BLOCKS,
    BOOTED,
    COMMITTED,
    FAILED,
    LAST,
    MIGRATED,
    SCENES,
    SCHEMAS,
    SLOTS,
    STATE,
    TRIES,
    Disks,
    Paper,
    Session,
    Step,
    System,
    Unbootable,
    new_disks,
    switch,
    vendor,
    whole,
)
from nexus.proof.powercut import GREEN, RED, DiskDevice, Problem, choices
from nexus.services.statefsd.engine import snapshot
from nexus.services.updated.faults import Declined

SUBSETS_MAX: Final = 4  # pending writes of one disk of which every subset is tried
DRAWN: Final = 8  # splits of all disks at once, in any order and with any tear
LIVE_EVERY: Final = 13  # of so many cases a whole update follows
SECOND_EVERY: Final = 149  # of so many cases one is cut again while it boots
SECOND_CHOICES: Final = 1  # pending writes of which every subset is tried, in a second cut
PROBLEMS_MAX: Final = 20  # a scene with more of them is left
BOOTS_MAX: Final = TRIES + 2  # until a trial that fails has to be over
PAGE: Final = "# Power cuts during updates\n"

Split: TypeAlias = dict[str, Choice]
"""What of each disk's cache reached the medium; disks that are not named lost all of it."""


# ---------------------------------------------------------------- ways to lose four caches


def splits(
    disks: Disks, writing: str, current: int | None, subsets_max: int, source: Random
) -> Iterator[Split]:
    """Ways in which a power cut leaves the disks, the `current` write of one in its midst.

    Every choice of powercut.choices for the disk that is written, each with nothing and with all of
    what the others have cached; for each other disk every such choice of its own, with nothing and
    with all of the rest; and DRAWN splits of everything.
    """
    others = [name for name in disks if name != writing and disks[name].pending]
    everything = {
        name: tuple(
            Piece(index, 0, len(pending.data)) for index, pending in enumerate(disk.pending)
        )
        for name, disk in disks.items()
    }
    for choice in choices(disks[writing].pending, current, subsets_max, source):
        yield {writing: choice}
        if others:
            yield {writing: choice, **{name: everything[name] for name in others}}
    for name in others:
        rest_of = {other: everything[other] for other in (writing, *others) if other != name}
        for choice in choices(disks[name].pending, None, subsets_max, source):
            yield {name: choice}
            yield {**rest_of, name: choice}
    if others:
        for _ in range(DRAWN):
            yield {name: disks[name].drawn_choice(source) for name in (writing, *others)}


def left_of(disks: Disks, split: Split) -> Disks:
    """What a power cut leaves."""
    return {name: disk.survivors(split.get(name, NOTHING)) for name, disk in disks.items()}


def split_text(split: Split) -> str:
    """A split on a command line: `boot=0:0-512/state=none`, or `none`."""
    told = (f"{name}={choice_text(choice)}" for name, choice in split.items() if choice)
    return "/".join(told) or "none"


def parse_split(text: str) -> Split:
    """The split that `split_text` wrote. ValueError for anything else."""
    if text == "none":
        return {}
    split = {}
    for word in text.split("/"):
        name, _, choice = word.partition("=")
        if name not in BLOCKS:
            raise ValueError(f"{name!r} is no disk of the device")
        split[name] = parse_choice(choice)
    return split


class Cutting(DiskDevice):
    """Tells before each write and flush of a disk what is about to be done."""

    def __init__(self, name: str, disk: Disk, tell: "Callable[[str, int, bytes], None]") -> None:
        super().__init__(disk)
        self._name = name
        self._tell = tell

    async def write(
        self, block: int, data: bytes | bytearray | memoryview, *, durable: bool = False
    ) -> None:
        """Tell, then write."""
        self._tell(self._name, block, bytes(data))
        await super().write(block, data, durable=durable)

    async def flush(self) -> None:
        """Tell, then flush."""
        self._tell(self._name, 0, b"")
        await super().flush()


# ---------------------------------------------------------------- the exploration


@dataclass(kw_only=True, slots=True)
class Explored:
    """What came out of a scene."""

    scene: str
    backend: str
    operations: int = 0
    cases: int = 0
    second_cuts: int = 0
    lives: int = 0  # cases that a whole update followed
    seen: dict[int, int] = field(default_factory=dict)  # version that came up -> cases
    problems: list[Problem] = field(default_factory=list)


class CutTarget(NamedTuple):
    """A case to repeat: after which operation, which split, and the same during the boot."""

    cut: int
    split: Split
    second: int | None = None
    second_split: Split | None = None


class NoSuchCase(Exception):
    """A case to repeat that there is not."""


def _check_split(disks: Disks, split: Split, where: str) -> None:
    """Raises NoSuchCase unless all of it is there to survive."""
    for name, choice in split.items():
        pending = disks[name].pending
        for piece in choice:
            if piece.which >= len(pending):
                raise NoSuchCase(f"at {where} {name} has no pending write {piece.which}")
            if not piece.start <= piece.stop <= len(pending[piece.which].data):
                raise NoSuchCase(f"at {where} write {piece.which} of {name} is shorter")


class Mode(StrEnum):
    """How life goes on after a cut."""

    COMMIT = "commit"  # a trial is committed
    FAIL = "fail"  # a trial fails until it is rolled back
    LIVE = "live"  # and then a whole update follows


class Explorer:
    """Cuts the power in one scene."""

    def __init__(
        self,
        scene: str,
        *,
        backend: str = "block",
        subsets_max: int = SUBSETS_MAX,
        every: int = 1,
        target: CutTarget | None = None,
    ) -> None:
        self.explored = Explored(scene=scene, backend=backend)
        self._scene = SCENES[scene]
        self._subsets_max = subsets_max
        self._every = every
        self._target = target
        self._source = Random(f"powercut ota {scene}")  # noqa: S311
        self._count = 0
        self._disks: Disks = {}
        self._papers = (Paper(), Paper())  # before the step that is going on, and after it
        self._step = ""
        self._armed = False

    def run(self) -> Explored:
        """Go through the scene; what came out."""
        self._disks = new_disks(self.explored.backend)
        session = Session(
            {name: Cutting(name, disk, self._at) for name, disk in self._disks.items()}
        )
        paper = Paper()
        for step in self._scene.before:
            step.act(session)
            paper = step.notes(paper)
        self._armed = True
        try:
            for step in self._scene.cut:
                self._step = step.name
                self._papers = (paper, step.notes(paper))
                step.act(session)
                paper = step.notes(paper)
        except (Unbootable, Declined) as error:
            self._report("brick", f"without a cut: {error}", "")
            return self.explored
        self._step = "at rest"
        self._papers = (paper, paper)
        self._at(STATE, 0, b"")
        return self.explored

    def _at(self, name: str, block: int, data: bytes) -> None:
        """Every power cut at an operation of the scene."""
        if not self._armed:
            return
        self.explored.operations += 1
        cut = self.explored.operations
        disks, current = _in_midst(self._disks, name, block, data)
        target = self._target
        if target is not None:
            if cut == target.cut:
                _check_split(disks, target.split, f"cut {cut}")
                self._open(disks, target.split, cut)
            return
        for split in splits(disks, name, current, self._subsets_max, self._source):
            self._count += 1
            if self._count % self._every:
                continue
            if len(self.explored.problems) >= PROBLEMS_MAX:
                return
            self._open(disks, split, cut)

    def _open(self, disks: Disks, split: Split, cut: int) -> None:
        """Boot what is left, look at it, and let life go on."""
        self.explored.cases += 1
        cases, target = self.explored.cases, self._target
        case = f"--cut {cut} --split {split_text(split)}"
        if target is not None and target.second is not None:
            self._cut_again(left_of(disks, split), case)
            return
        for mode in Mode if target is not None else (_mode(cases),):
            self._judge(left_of(disks, split), self._papers, mode, case)
        if target is None and cases % SECOND_EVERY == 0:
            self._cut_again(left_of(disks, split), case)

    def _cut_again(self, left: Disks, case: str) -> None:
        """The power is cut at every operation of the boot after a cut."""
        target, first = self._target, self._papers
        papers = (*first, *(paper.boots() for paper in first))
        count = 0

        def at(name: str, block: int, data: bytes) -> None:
            nonlocal count
            count += 1
            disks, current = _in_midst(left, name, block, data)
            if target is not None and target.second_split is not None:
                if count == target.second:
                    _check_split(disks, target.second_split, f"second cut {count}")
                    self._judge_again(disks, target.second_split, papers, case, count)
                return
            for split in splits(disks, name, current, SECOND_CHOICES, self._source):
                self._judge_again(disks, split, papers, case, count)

        try:
            _ = Session({name: Cutting(name, disk, at) for name, disk in left.items()}).boot()
        except Unbootable as error:
            self._report("brick", str(error), case)

    def _judge_again(
        self, disks: Disks, split: Split, papers: tuple[Paper, ...], case: str, second: int
    ) -> None:
        self.explored.second_cuts += 1
        again = f"{case} --second {second} --then {split_text(split)}"
        modes = Mode if self._target is not None else (_mode(self.explored.second_cuts),)
        for mode in modes:
            self._judge(left_of(disks, split), papers, mode, again)

    def _judge(self, disks: Disks, papers: tuple[Paper, ...], mode: Mode, case: str) -> None:
        if len(self.explored.problems) >= PROBLEMS_MAX:
            return
        life = Life(disks, tuple(paper.boots() for paper in papers))
        try:
            life.go_on(mode)
        except Unbootable as error:
            self._report("brick", str(error), case)
        except Declined as error:
            self._report("loss", f"refused: {error}", case)
        except _Problem as problem:
            self._report(problem.kind, str(problem), case)
        if life.came_up is not None:
            seen = self.explored.seen
            seen[life.came_up] = seen.get(life.came_up, 0) + 1
        self.explored.lives += life.updated

    def _report(self, kind: str, what: str, case: str) -> None:
        where = f"--scene {self.explored.scene}"
        if self.explored.backend != "block":
            where += f" --backend {self.explored.backend}"
        command = f"nexus sim powercut ota {where} {case}".rstrip()
        self.explored.problems.append(Problem(kind, f"{self._step}: {what}", command))


def _mode(number: int) -> Mode:
    if number % LIVE_EVERY == 0:
        return Mode.LIVE
    return Mode.COMMIT if number % 2 else Mode.FAIL


def _in_midst(disks: Disks, name: str, block: int, data: bytes) -> tuple[Disks, int | None]:
    """The disks with a write of one of them under way, and its index; none of a flush."""
    if not data:
        return disks, None
    trial = disks[name].copy()
    current = trial.begin_write(block, data)
    return {**disks, name: trial}, current


class _Problem(Exception):
    """Something that must not be, of a kind."""

    def __init__(self, kind: str, what: str) -> None:
        super().__init__(what)
        self.kind = kind


class Life:
    """A device after a power cut: looked at, and used. Raises Unbootable, Declined and _Problem."""

    def __init__(self, disks: Disks, papers: tuple[Paper, ...]) -> None:
        """`papers` are what it may be after its first boot."""
        self._disks = disks
        self._papers = papers
        self._session = Session({name: DiskDevice(disk) for name, disk in disks.items()})
        self.came_up: int | None = None  # version
        self.updated = False

    def go_on(self, mode: Mode) -> None:
        """Boot it and live on."""
        system = self._session.boot()
        self.came_up = system.version
        self._compare()
        if system.chosen.boot.trial and mode is Mode.FAIL:
            self._fail()
        elif system.chosen.boot.trial:
            self._do(MIGRATED, COMMITTED)
        self._do(BOOTED)
        self._compare()
        if mode is Mode.LIVE:
            self._update()

    def _do(self, *steps: Step) -> None:
        for step in steps:
            step.act(self._session)
            self._papers = tuple(step.notes(paper) for paper in self._papers)

    def _fail(self) -> None:
        """The trial fails as often as it may, and is over then; the last set there is goes on."""
        for _ in range(BOOTS_MAX):
            if not any(paper.has_way_back for paper in self._papers):
                self._do(MIGRATED, FAILED, MIGRATED, COMMITTED)
                return
            self._do(MIGRATED, FAILED)
            self._compare()
            if not self._session.system.chosen.boot.trial:
                return
        raise _Problem("wrong", f"a trial is not over after {BOOTS_MAX} boots")

    def _update(self) -> None:
        """The release that was on its way, or else the last one, from the beginning to its end."""
        paper = self._papers[0]
        version = list(SCHEMAS)[paper.trusted - 1] if paper.trusted else LAST
        if version == paper.good:
            version = LAST
        self._do(*whole(version), switch(version), BOOTED, MIGRATED, COMMITTED, BOOTED)
        self._compare()
        self.updated = True

    def _compare(self) -> None:
        """What is up against what may be; what it cannot be is not on paper any more."""
        system, papers = self._session.system, self._papers
        found = (system.version, system.chosen.boot.trial)
        fitting = [each for each in papers if (each.runs, each.trying is not None) == found]
        if not fitting:
            may = {_told((each.runs, each.trying is not None)) for each in papers}
            raise _Problem("wrong", f"{_told(found)} runs; it may be {' or '.join(sorted(may))}")
        self._check_slots(system)
        data, staged, trusted = system.data, system.staged, system.trusted
        schemas = sorted({each.data for each in fitting})
        if data not in schemas:
            raise _Problem("loss", f"{_told(found)} finds data {data}; they may be {schemas}")
        if staged not in {each.staged for each in fitting}:
            raise _Problem("loss", f"staged is {staged}; acknowledged was {fitting[0].staged}")
        if trusted not in {each.trusted for each in papers}:
            raise _Problem("loss", f"{trusted} releases are believed, not {papers[0].trusted}")
        self._check_copy(system)
        matching = [each for each in fitting if (each.data, each.staged) == (data, staged)]
        if not matching:
            raise _Problem("loss", f"data {data} with {staged} staged are of two moments")
        self._papers = tuple({each._replace(trusted=trusted) for each in matching})

    def _check_copy(self, system: System) -> None:
        """A copy of data is there if it is needed, and only then."""
        head = finished(snapshot.head_of(system.store))
        record = system.engine.record
        if head.is_kept and record.snapshot != head.number:
            raise _Problem("loss", "a copy of data stays that nobody needs")
        if record.snapshot and not head.is_kept:
            raise _Problem("loss", "the copy of data is gone that a rollback needs")
        if record.restore:
            raise _Problem("loss", "the data are as before, and the record says they are not")

    def _check_slots(self, system: System) -> None:
        """What the record calls bootable is to the byte a set that was signed."""
        record = system.engine.record
        for name, device in SLOTS.items():
            info = record.slot(name)
            if not info.is_bootable:
                continue
            disk = self._disks[device]
            data = disk.read(0, -(-info.size // BLOCK_SIZE))[: info.size]
            known = vendor().by_digest(sha256(data).digest())
            if known is None or known.version != info.version:
                what = f"slot {name} is {info.state.name.lower()} and holds no whole set"
                raise _Problem("wrong", f"{what} of version {info.version}")


def _told(found: tuple[int, bool]) -> str:
    version, trial = found
    return f"{version} on trial" if trial else str(version)


# ---------------------------------------------------------------- the report


@dataclass(kw_only=True, slots=True)
class OtaReport:
    """Everything a run explored."""

    subsets_max: int
    every: int
    explored: list[Explored] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def problems(self) -> list[Problem]:
        """Every problem of every scene."""
        return [problem for each in self.explored for problem in each.problems]

    def count(self, kind: str) -> int:
        """Problems of a kind: brick, wrong, loss."""
        return sum(problem.kind == kind for problem in self.problems)

    @property
    def cut_points(self) -> int:
        """Writes and flushes at which the power was cut."""
        return sum(each.operations for each in self.explored)

    @property
    def cases(self) -> int:
        """Devices that were booted after a cut."""
        return sum(each.cases for each in self.explored)

    @property
    def second_cuts(self) -> int:
        """Devices that were booted after a cut during the boot after a cut."""
        return sum(each.second_cuts for each in self.explored)

    @property
    def exit_code(self) -> int:
        """0 without a problem; 1 also if nothing was explored."""
        return GREEN if self.cases and not self.problems else RED

    def document(self) -> str:
        """The report in figures, as JSON, with the command that repeats each problem."""
        figures = {
            "cut_points": self.cut_points,
            "cases": self.cases,
            "second_cuts": self.second_cuts,
            "bricks": self.count("brick"),
            "wrong_slots": self.count("wrong"),
            "losses": self.count("loss"),
            "seconds": round(self.seconds, 3),
            "problems": [
                {"kind": each.kind, "what": each.what, "command": each.command}
                for each in self.problems[:PROBLEMS_MAX]
            ],
        }
        return json.dumps(figures, indent=2) + "\n"

    def lines(self) -> Iterator[str]:
        """The report, as Markdown."""
        yield (
            f"{self.cut_points} cut points, {self.cases} devices booted after a cut, "
            f"{self.second_cuts} after a second one: {self.count('brick')} bricks, "
            f"{self.count('wrong')} wrong slots, {self.count('loss')} losses."
        )
        yield ""
        disks = ", ".join(f"{name} {blocks}" for name, blocks in BLOCKS.items())
        yield (
            "The power is cut before, inside and after every write and at every flush of four "
            f"disks ({disks} blocks of {BLOCK_SIZE} bytes), in each scene."
        )
        yield (
            f"Bound: of up to {self.subsets_max} pending writes of one disk every subset survives; "
            "of more, none, all, each alone, each missing, every prefix and every suffix; of the "
            f"other disks nothing or everything; and {DRAWN} drawn splits of all of them, in any "
            "order and with any tear."
        )
        yield (
            "The write in progress survives not, wholly, or in up to 20 parts, and so does each of "
            f"the last {self.subsets_max} pending ones."
        )
        yield (
            "Each device is booted by the loader; what runs, what the slots hold, the data, what "
            "is staged and what is believed are compared with a few lines of paper."
        )
        yield (
            "Then a trial is committed, or fails until it is rolled back; in one of "
            f"{LIVE_EVERY} cases a whole update follows; in one of {SECOND_EVERY} the power is cut "
            "again at every operation of that boot."
        )
        if self.every > 1:
            yield f"Of {self.every} cases one is booted: this is a sample."
        yield ""
        yield (
            "One case alone: `nexus sim powercut ota --scene SCENE --backend BACKEND --cut N "
            "--split DISK=PENDING:FROM-TO,.../...`; a problem prints it as it is."
        )
        yield ""
        yield (
            "| boot control | scene | cut points | devices | second cuts | whole updates "
            "| versions that came up | problems |"
        )
        yield "|---|---|--:|--:|--:|--:|---|--:|"
        for each in self.explored:
            seen = ", ".join(f"{version}: {count}" for version, count in sorted(each.seen.items()))
            yield (
                f"| {each.backend} | {each.scene} | {each.operations} | {each.cases} "
                f"| {each.second_cuts} | {each.lives} | {seen} | {len(each.problems)} |"
            )
        if self.problems:
            yield ""
        for problem in self.problems[:PROBLEMS_MAX]:
            yield f"- {problem.kind}: {problem.what}: `{problem.command}`"


def explore(
    scenes: Sequence[str],
    *,
    backends: Sequence[str] = ("block",),
    subsets_max: int = SUBSETS_MAX,
    every: int = 1,
    target: CutTarget | None = None,
) -> OtaReport:
    """Explore these scenes."""
    report = OtaReport(subsets_max=subsets_max, every=every)
    start = time.monotonic_ns()
    for backend in backends:
        for scene in scenes:
            explorer = Explorer(
                scene, backend=backend, subsets_max=subsets_max, every=every, target=target
            )
            report.explored.append(explorer.run())
    report.seconds = (time.monotonic_ns() - start) / 1e9
    return report


def _positive(text: str) -> int:
    """A number of the command line. Raises ArgumentTypeError."""
    if not re.fullmatch(r"[0-9]{1,9}", text) or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least 1")
    return int(text)


def main(argv: Sequence[str]) -> int:
    """`nexus sim powercut ota` with these arguments: run, print, and the exit code."""
    parser = argparse.ArgumentParser(
        prog="nexus sim powercut ota",
        description="Cut the power at every write of an update, on a simulated device.",
    )
    _ = parser.add_argument("--scene", choices=(*SCENES, "all"), default="all")
    _ = parser.add_argument("--backend", choices=(*BACKENDS, "all"), help="of boot control")
    _ = parser.add_argument(
        "--subsets", type=_positive, default=SUBSETS_MAX, help="bound of the subsets"
    )
    _ = parser.add_argument("--every", type=_positive, default=1, help="boot one of so many cases")
    _ = parser.add_argument("--cut", type=_positive, help="repeat: the operation")
    _ = parser.add_argument("--split", type=parse_split, help="repeat: what survives")
    _ = parser.add_argument("--second", type=_positive, help="repeat: the operation of the boot")
    _ = parser.add_argument("--then", type=parse_split, help="repeat: what survives of that")
    _ = parser.add_argument("--report", type=Path, help="write the report as Markdown here")
    _ = parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(list(argv))
    if options.report is not None:
        # Before the exploration, which takes minutes.
        try:
            options.report.open("a").close()
        except OSError as error:
            parser.error(f"cannot write {options.report}: {error.strerror or error}")
    backend = options.backend or ("all" if options.cut is None else "block")
    target = None
    if options.cut is not None or options.split is not None:
        if options.cut is None or options.split is None or options.scene == "all":
            parser.error("to repeat a case say --scene, --cut and --split")
        if (options.second is None) != (options.then is None):
            parser.error("to repeat a second cut say --second and --then")
        if options.backend == "all":
            parser.error("to repeat a case say which --backend")
        target = CutTarget(options.cut, options.split, options.second, options.then)
    try:
        report = explore(
            list(SCENES) if options.scene == "all" else [options.scene],
            backends=list(BACKENDS) if backend == "all" else [backend],
            subsets_max=options.subsets,
            every=options.every,
            target=target,
        )
    except NoSuchCase as error:
        parser.error(str(error))
    text = PAGE + "\n" + "\n".join(report.lines()) + "\n"
    if options.report is not None:
        _ = options.report.write_text(text, encoding="utf-8")
    _ = sys.stdout.write(report.document() if options.json else text)
    return report.exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

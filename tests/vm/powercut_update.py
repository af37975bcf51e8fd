"""The power is cut at every write of an update in a machine, and the device boots and knows.

    python -m tests.vm.powercut_update [--every N] [--boots N] [--report FILE]

A device stages an update and switches to it in QEMU, by its own updated; U-Boot counts the two
tries of what turns out to be broken, and the set before runs again; another device's set is healthy
and is committed. QEMU writes down every write
and flush of the boot device, of both slots and of the store. Then the disks are put together as a
power cut at each place could have left them: the disk that is written as it was flushed, with each
of the later writes missing or torn, and with all of them missing; the others with everything that
they had, and without what they had not flushed. On each of these

- there is a boot record and the trust anchor, and the store opens and knows the release that was
  believed;
- what the record calls bootable is to the byte a set that was signed;
- what was acknowledged is there: staged, switched, a try counted, fallen back or committed;
- the device boots, at once and as often as its trial fails, and ends with the set that was proven.

Some are booted in QEMU as well. Then a guard is taken out of the set, and has to be missed: the
flush of the slot before it is called staged, and that of the boot record.

Exit code 3 if there is no machine to run it on: that is no pass.
"""

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from random import Random  # noqa: TID251 (which sectors of a write arrive)
from tempfile import TemporaryDirectory
from typing import Final, NamedTuple

from nexus.abi import BLOCK_SIZE
from nexus.bootctl import (
    BootRecord,
    Counted,
    EnvironmentBoot,
    NoAnchor,
    NoBootRecord,
    SlotName,
    SlotState,
    open_boot,
)
from nexus.bootctl.handover import EXIT_SLOT_FAILED
from nexus.bundle import package_folder
from nexus.drivers import finished
from nexus.drivers.block import check_range, whole_blocks
from nexus.loader.choose import Chosen, Ended, NothingBootable, choose
from nexus.proof.remains import read_image
from nexus.proof.runner import EXIT_NOT_RUN
from nexus.services.updated.kept import TRUST
from nexus.trust import decode_state
from nexus.vm.contract import PERSIST
from nexus.vm.image import Image
from nexus.vm.packages import NotHad
from nexus.vm.writelog import Entry, Kind, apply, lasting, rebuilt
from tests.linux.slotted import Set, Signer, changed
from tests.vm import board, person
from tests.vm.board import BROKEN_INIT, COUNTED, HEALTHY, LOGGED, NEVER, TRIES, UP, Board, Kept

A, B = SlotName.A, SlotName.B
STEPS: Final = (
    "nothing",
    "staged",
    "switched",
    "counted 1",
    "counted 2",
    "fallen back",
    "committed",
)
"""Of an update; the last two are its ends."""
FALLEN_BACK, COMMITTED = 5, 6
STAGED_WORD: Final = "is staged in slot b: "
SWITCHED_WORD: Final = "is to be tried up to "
BACK_WORD: Final = "in slot a was booted again"
BOOTS_MAX: Final = TRIES + 2  # until a trial that fails has to be over
BOOTED: Final = 8  # of the disks that a cut left, in QEMU
PARTS: Final = 32  # places inside a write
DRAWN: Final = 64  # ways in which any of its sectors arrive
PROBLEMS_MAX: Final = 10
PLANTS: Final = {
    "the flush of the slot before it is called staged": (
        "services/updated/engine.py",
        "await self._slots[NAMES[transfer.slot]].flush()",
        "pass",
    ),
    "the flush of the boot record": (
        "bootctl/anchor.py",
        "await device.write(block, data, durable=True)",
        "await device.write(block, data)",
    ),
}
"""Guards of the set that updates itself: the file, what stands there, and what instead."""


# ---------------------------------------------------------------- the cuts


class Cut(NamedTuple):
    """Disks as a power cut left them. `counts` are entries that the logs had when it came; `step`
    is the last one that was acknowledged by then, `moment` the last one before it. `images` has to
    be asked before the next cut."""

    counts: tuple[int, ...]
    step: int
    told: str
    is_torn: bool
    moment: int
    images: Callable[[], Mapping[str, bytes]]


class _Cache:
    """A disk and its cache: what is flushed, and what came since."""

    def __init__(self, image: bytes) -> None:
        self._flushed = bytearray(image)
        self._since: list[Entry] = []
        self.whole = self.bare = image  # with everything that came; without what may be lost

    def take(self, entry: Entry) -> None:
        """The next of its log."""
        if Kind.FLUSH in entry.kind:
            for each in self._since:
                apply(self._flushed, each)
            self._since.clear()
        if entry.size:
            self._since.append(entry)
        self.whole, self.bare = self.left(), self.left(without=self.loose)

    def left(self, *, without: Iterable[int] = (), torn: Iterable[Entry] = ()) -> bytes:
        """What a power cut leaves, some writes of the cache lost, and one in its midst."""
        image = bytearray(self._flushed)
        lost = set(without)
        for number, each in enumerate(self._since):
            if number not in lost:
                apply(image, each)
        for each in torn:
            apply(image, each)
        return bytes(image)

    @property
    def loose(self) -> list[int]:
        """Those that may be lost."""
        return [at for at, each in enumerate(self._since) if Kind.FUA not in each.kind]


def acknowledged(kept: Kept) -> list[tuple[int, tuple[int, ...]]]:
    """Which step was acknowledged when the logs had how many entries, at the latest."""
    found, counted = [], 0
    for text, counts in kept.words:
        step = 0
        if STAGED_WORD in text:
            step = 1
        elif SWITCHED_WORD in text:
            step = 2
        elif text.startswith(COUNTED):
            counted += 1
            step = 2 + counted
        elif BACK_WORD in text:
            step = FALLEN_BACK
        elif text.startswith(HEALTHY):
            step = COMMITTED
        if step:
            found.append((step, counts.of))
    return found


def cuts(kept: Kept) -> Iterator[Cut]:
    """Disks that a power cut could have left. Where two disks were written and it is not known in
    which order, there is none until both were."""
    entries = {name: kept.now(name) for name in LOGGED}
    caches = {name: _Cache(kept.before[name]) for name in LOGGED}
    words = acknowledged(kept)
    source = Random("cuts of an update")
    at = [0] * len(LOGGED)

    def cut(name: str, what: str, image: Callable[[], bytes], *, torn: bool) -> Iterator[Cut]:
        step = max((step for step, counts in words if all(map(int.__le__, counts, at))), default=0)
        others = [caches[other] for other in LOGGED if other != name]

        def images(*, is_bare: bool) -> Mapping[str, bytes]:
            rest = {other: each.bare if is_bare else each.whole for other, each in caches.items()}
            return {**rest, name: image()}

        place = (tuple(at), step)
        yield Cut(*place, f"{name}: {what}", torn, before, partial(images, is_bare=False))
        if any(each.loose for each in others):
            told = f"{name}: {what}; the others as they were flushed"
            yield Cut(*place, told, torn, before, partial(images, is_bare=True))

    before = 0
    for index, moment in enumerate(kept.moments):
        before = max(0, index - 1)
        grown = [place for place in range(len(LOGGED)) if moment.of[place] > at[place]]
        for place in grown:
            name, cache = LOGGED[place], caches[LOGGED[place]]
            for number in range(at[place], moment.of[place]):
                entry = entries[name][number]
                for what, parts in _torn(entry, source) if len(grown) == 1 else ():
                    yield from cut(name, what, partial(cache.left, torn=parts), torn=True)
                    if lost := cache.loose:
                        image = partial(cache.left, without=lost, torn=parts)
                        yield from cut(name, f"{what} alone", image, torn=True)
                cache.take(entry)
                at[place] = number + 1
                if len(grown) > 1 and (place, number + 1) != (grown[-1], moment.of[place]):
                    continue
                yield from cut(name, "all", cache.left, torn=False)
                loose = cache.loose
                for each in loose if len(loose) > 1 else ():
                    image = partial(cache.left, without=(each,))
                    yield from cut(name, f"without write {each}", image, torn=False)
                if loose:
                    image = partial(cache.left, without=loose)
                    yield from cut(name, "as it was flushed", image, torn=False)


def _torn(entry: Entry, source: Random) -> Iterator[tuple[str, Sequence[Entry]]]:
    """A write in its midst: its beginning, its end, and any of its sectors."""
    count = entry.size // BLOCK_SIZE
    if not entry.is_write or count < 2:
        return
    every = max(1, count // PARTS)
    for part in range(1, count, every):
        yield f"the first {part} of {count} sectors of a write", [_part(entry, 0, part)]
        yield f"the last {count - part} of {count} sectors of a write", [_part(entry, part, count)]
    for _ in range(DRAWN):
        drawn = sorted(source.sample(range(count), source.randrange(1, count)))
        parts = [_part(entry, sector, sector + 1) for sector in drawn]
        yield f"{len(drawn)} of {count} sectors of a write", parts


def _part(entry: Entry, start: int, stop: int) -> Entry:
    """Some sectors of a write."""
    data = entry.data[start * BLOCK_SIZE : stop * BLOCK_SIZE]
    return entry._replace(offset=entry.offset + start * BLOCK_SIZE, size=len(data), data=data)


# ---------------------------------------------------------------- the judge


class ImageBlock:
    """drivers.BlockDevice over bytes: nothing is ever lost here."""

    def __init__(self, image: bytes) -> None:
        self._image = bytearray(image)
        self.block_count = len(image) // BLOCK_SIZE
        self.writable = True

    async def read(self, block: int, count: int) -> bytes:
        """`count` blocks from `block` on."""
        check_range(block, count, self.block_count)
        return bytes(self._image[block * BLOCK_SIZE : (block + count) * BLOCK_SIZE])

    async def write(
        self, block: int, data: bytes | bytearray | memoryview, *, durable: bool = False
    ) -> None:
        """Write whole blocks."""
        del durable
        check_range(block, whole_blocks(data), self.block_count)
        self._image[block * BLOCK_SIZE : block * BLOCK_SIZE + len(data)] = data

    async def flush(self) -> None:
        """They are."""


def step_of(record: BootRecord) -> int:
    """How far an update has come; an index of STEPS."""
    info = record.slot(B)
    if record.active is B:
        return COMMITTED
    if record.trying is B:
        return 2 + TRIES - info.tries_left
    return {SlotState.STAGED: 1, SlotState.BAD: FALLEN_BACK}.get(info.state, 0)


def counted(record: BootRecord) -> BootRecord:
    """What boot.scr makes of a record before it starts a kernel."""
    name = record.trying
    if name is None:
        return record
    info = record.slot(name)
    boots = 0 if record.counted is None else record.counted.boots
    if info.tries_left:
        record = record.with_slot(name, replace(info, tries_left=info.tries_left - 1))
        return replace(record, counted=Counted(boots=boots + 1, slot=name))
    if record.slot(name.other).state is SlotState.GOOD:
        name = name.other
    return replace(record, counted=Counted(boots=boots, slot=name))


def store_problem(image: bytes) -> str:
    """What is wrong with a disk of statefsd's once a set is staged; empty if nothing is."""
    left = read_image(image)
    if left.problem or left.lost:
        return left.problem or f"{left.lost} records are damaged"
    kept = left.records.get(TRUST)
    if kept is None or not decode_state(kept.value).targets:
        return "it is forgotten whose release was believed"
    return ""


class Judge:
    """Knows what was signed, by whom, and looks at disks."""

    def __init__(
        self,
        anchor: bytes,
        digests: tuple[bytes, bytes],
        store: Callable[[bytes], str] = store_problem,
    ) -> None:
        """`digests` are of the set in slot a, which is good, and of that in slot b, which is tried;
        `store` says what is wrong with a disk of statefsd's."""
        self._store = store
        self._anchor = anchor
        self._digests = dict(zip(SlotName, digests, strict=True))

    def problem(self, images: Mapping[str, bytes], step: int) -> str:
        """What is wrong with disks on which that step was acknowledged; empty if nothing is."""
        boot = ImageBlock(images["boot"])
        try:
            control, record = finished(open_boot(boot))
            anchor = finished(control.read_anchor())
        except (NoBootRecord, NoAnchor) as error:
            return f"brick: {error}"
        if anchor != self._anchor:
            return "loss: another trust anchor"
        for name in SlotName:
            info = record.slot(name)
            if info.is_bootable:
                digest = sha256(images[f"slot-{name}"][: info.size]).digest()
                if digest != info.digest or digest != self._digests[name]:
                    state = info.state.name.lower()
                    return f"half: slot {name} is {state}, and holds no whole set"
        if step_of(record) < step:
            return f"loss: {STEPS[step]} was acknowledged, not {STEPS[step_of(record)]}"
        if step and (problem := self._store(images["disk"])):
            return f"loss: {problem}"
        try:
            return self._live(control, images, min(max(0, step - 2), TRIES))
        except NothingBootable as error:
            return f"brick: {error}"

    def first(self, images: Mapping[str, bytes]) -> Chosen:
        """What is booted at once. Raises as `choose`."""
        control, _ = finished(open_boot(ImageBlock(images["boot"])))
        assert isinstance(control, EnvironmentBoot)
        return self._boot(control, _slots(images), None)

    def _live(self, control: object, images: Mapping[str, bytes], taken: int) -> str:
        """Boot it as often as its trial fails; what is wrong then."""
        assert isinstance(control, EnvironmentBoot)
        good = self._digests[finished(control.load()).active]
        slots, ended = _slots(images), None
        for trials in range(BOOTS_MAX):
            chosen = self._boot(control, slots, ended)
            digest = bytes.fromhex(chosen.boot.digest)
            if digest != self._digests[SlotName(chosen.boot.slot)]:
                return f"half: {chosen.boot.digest[:12]} is booted"
            if not chosen.boot.trial:
                if digest != good:
                    return f"wrong: version {chosen.boot.version} stays"
                if trials > TRIES - taken:
                    return f"wrong: {trials} more tries, after {taken} were counted"
                return ""
            ended = Ended(code=EXIT_SLOT_FAILED)
        return f"wrong: a trial is not over after {BOOTS_MAX} boots"

    def _boot(
        self, control: EnvironmentBoot, slots: Mapping[SlotName, ImageBlock], ended: Ended | None
    ) -> Chosen:
        """What U-Boot's script does and what our loader does."""
        record = finished(control.load())
        if (after := counted(record)) != record:
            _ = finished(control.store(after))
        return finished(choose(control, slots, ended))


def _slots(images: Mapping[str, bytes]) -> dict[SlotName, ImageBlock]:
    return {name: ImageBlock(images[f"slot-{name}"]) for name in SlotName}


@dataclass(kw_only=True)
class Found:
    """What came out of the cuts of a device's life."""

    tried: int = 0
    torn: int = 0
    steps: list[str] = field(default_factory=list)  # that were acknowledged
    untold: int = 0  # pairs of moments between which more than one disk was written
    problems: list[str] = field(default_factory=list)


def judged(kept: Kept, judge: Judge, *, every: int = 1) -> Found:
    """Look at what cuts leave, one of so many."""
    found = Found(steps=[STEPS[step] for step, _ in acknowledged(kept)])
    pairs = zip(kept.moments, kept.moments[1:], strict=False)
    found.untold = sum(sum(map(int.__lt__, one.of, two.of)) > 1 for one, two in pairs)
    for number, cut in enumerate(cuts(kept)):
        if number % every:
            continue
        found.tried += 1
        found.torn += cut.is_torn
        problem = judge.problem(cut.images(), cut.step)
        if problem:
            found.problems.append(f"{cut.counts} {cut.told}: {problem}")
    return found


# ---------------------------------------------------------------- the campaign


def lived(image: Image, folder: Path, first: Set, second: Set, *, is_healthy: bool) -> Board:
    """A device that updates itself, and keeps the set or comes back; all that it wrote kept."""
    device = Board(image, folder, update=Signer().update(second), is_kept=True)
    device.provision(first)
    _ = device.boot(NEVER)
    if is_healthy:
        _ = device.boot(HEALTHY)
        _ = device.boot()
    else:
        _ = board.falls_back(device, person.DONE)
    device.is_kept = False
    return device


def planted(first: Set, what: str) -> Set:
    """The first set without one of its guards."""
    file, old, new = PLANTS[what]
    text = (package_folder() / file).read_text("utf-8")
    assert text.count(old) == 1, f"{file} does not have it"
    return changed(first, {f"python/nexus/{file}": text.replace(old, new).encode()})


def chosen_cuts(kept: Kept, count: int) -> list[Cut]:
    """Some with a write in its midst: of each disk and step one."""
    last: dict[tuple[str, int], int] = {}
    for number, cut in enumerate(cuts(kept)):
        disk = cut.told.partition(":")[0]
        if cut.is_torn and disk != "disk":
            last[disk, cut.step] = number
    wanted = set(list(last.values())[:count])
    return [
        cut._replace(images=partial(dict, cut.images()))
        for number, cut in enumerate(cuts(kept))
        if number in wanted
    ]


def really(device: Board, judge: Judge, cut: Cut) -> str:
    """Boot in QEMU what a cut left, the file system too, as it was flushed; what is wrong, empty if
    it is what `Judge` says."""
    assert device.kept is not None, "it was kept"
    count = lasting(device.kept.lasting, device.kept.lasting_counts[cut.moment])
    files = rebuilt(device.kept.lasting_before, device.kept.lasting[:count])
    device.put({**cut.images(), PERSIST: files})
    expected = judge.first(cut.images()).boot
    seen = device.boot(UP)
    if not seen.script or seen.script[-1] != f"slot {expected.slot}":
        return f"U-Boot said {seen.script[-1:]}, not slot {expected.slot}"
    came = any(line.startswith(UP) for line in seen.lines)
    if expected.slot == B:
        came = any("this init is broken" in line for line in seen.console)
    return "" if came else f"slot {expected.slot} did not come up: {seen.ended}"


def _lines(image: Image, every: int, boots: int) -> Iterator[tuple[bool, str]]:
    """What was done and found, for people, and whether it is as it should be."""
    first = board.first_set()
    broken = changed(first.as_version(2), BROKEN_INIT)
    for is_healthy, second in ((False, broken), (True, first.as_version(2))):
        judge = Judge(Signer().root, (first.digest, second.digest))
        yield True, f"an update to a set that is {'healthy' if is_healthy else 'broken'}"
        with TemporaryDirectory(prefix="nexus-cut-") as name:
            device = lived(image, Path(name), first, second, is_healthy=is_healthy)
            assert device.kept is not None, "it is kept"
            yield from _told(
                device.kept, judge, every, STEPS[COMMITTED if is_healthy else FALLEN_BACK]
            )
            for cut in () if is_healthy else chosen_cuts(device.kept, boots):
                wrong = really(device, judge, cut)
                where = f"{cut.told}, {STEPS[cut.step]} acknowledged"
                yield not wrong, f"booted in QEMU: {where}: {wrong or 'as it should'}"
    for what in PLANTS:
        with TemporaryDirectory(prefix="nexus-cut-") as name:
            bad = planted(first, what)
            device = Board(image, Path(name), update=Signer().update(broken), is_kept=True)
            device.provision(bad)
            _ = device.boot(NEVER)
            assert device.kept is not None, "it is kept"
            found = judged(
                device.kept, Judge(Signer().root, (bad.digest, broken.digest)), every=every
            )
        is_found = f"{len(found.problems)} of {found.tried} cuts show it"
        first_one = f", the first: {found.problems[0]}" if found.problems else ""
        yield bool(found.problems), f"planted, without {what}: {is_found}{first_one}"


def _told(kept: Kept, judge: Judge, every: int, last: str) -> Iterator[tuple[bool, str]]:
    """What cuts of a life leave, which ends with the step `last`."""
    found = judged(kept, judge, every=every)
    writes = {disk: sum(each.is_write for each in kept.entries[disk]) for disk in LOGGED}
    flushes = {disk: sum(not each.size for each in kept.entries[disk]) for disk in LOGGED}
    yield found.steps[-1:] == [last], f"acknowledged: {', '.join(found.steps)}"
    told = ", ".join(f"{disk} {writes[disk]} and {flushes[disk]}" for disk in LOGGED)
    yield bool(writes["slot-b"]), f"writes and flushes: {told}"
    counts = sum(step.startswith("counted") for step in found.steps)
    through = f"written through, by QEMU's word, at {sum(kept.through)} of them"
    yield kept.through == [True] * counts, f"tries that U-Boot counted: {counts}; {through}"
    yield True, f"places where the order of two disks is not known: {found.untold}"
    shown = f"{found.tried}, {found.torn} of them inside a write"
    yield not found.problems, f"power cuts: {shown}; with a problem: {len(found.problems)}"
    yield from ((False, f"  {each}") for each in found.problems[:PROBLEMS_MAX])


def main(argv: Sequence[str]) -> int:
    """Live, cut, look."""
    parser = argparse.ArgumentParser(description=__doc__)
    _ = parser.add_argument("--every", type=int, default=1, help="try one cut of so many")
    _ = parser.add_argument("--boots", type=int, default=BOOTED, help="boot so many in QEMU")
    _ = parser.add_argument("--report", type=Path, help="where to write what was found")
    options = parser.parse_args(argv)
    lines: list[str] = []
    code = 0
    try:
        for is_right, line in _lines(board.built(), options.every, options.boots):
            lines.append(f"- {line}\n" if is_right else f"- PROBLEM: {line}\n")
            _ = sys.stdout.write(lines[-1])
            _ = sys.stdout.flush()
            code = code if is_right else 1
    except NotHad as missing:
        _ = sys.stdout.write(f"not run: {missing}\n")
        return EXIT_NOT_RUN
    if options.report:
        text = f"# Power cuts during an update in a virtual machine\n\n{''.join(lines)}"
        _ = options.report.write_text(text, "utf-8")
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""`nexus sim powercut ota`: the power is cut everywhere in an update, and the device boots.

A device of four simulated disks (boot device, slot a, slot b, state) goes through the scenes of its
life: a set is staged, staged again, switched to, booted for the first time, committed, rolled back
by itself and by hand. The code is the device's own: the loader's `choose`, bootctl, updated's
engine, statefsd's store with its snapshots. Before each write and each flush of any disk the caches
of all four are looked at, and for the ways in which a power cut could leave them (`splits`) the
device is booted from what would be left. A few lines of paper (`Paper`) know what may run then:

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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cache
from hashlib import sha256
from pathlib import Path
from random import Random  # noqa: TID251 (which splits are drawn where not every one is tried)
from typing import Final, NamedTuple, TypeAlias

from nexus.abi import BLOCK_SIZE
from nexus.bootctl import (
    BlockBoot,
    BootRefused,
    NoBootRecord,
    SlotInfo,
    SlotName,
    SlotState,
    TrialFailure,
)
from nexus.bootctl.handover import EXIT_SLOT_FAILED, TrialReason
from nexus.bootctl.provision import provision
from nexus.drivers import BlockDevice, DeviceFault, finished
from nexus.kernel.sim.disk import (
    NOTHING,
    Choice,
    Disk,
    Piece,
    choice_text,
    parse_choice,
)
from nexus.loader.choose import Chosen, Ended, NothingBootable, choose
from nexus.proof.powercut import GREEN, RED, DiskDevice, Problem, choices
from nexus.protocols.updated import UpdatedStatus
from nexus.services.statefsd.engine import (
    Change,
    Quota,
    Store,
    StoreFull,
    StoreLimits,
    Unopenable,
    snapshot,
)
from nexus.services.updated.engine import Engine, Rules
from nexus.services.updated.faults import Declined
from nexus.services.updated.kept import TRUST, Asker
from nexus.sets import About, Base, BytesSource, Content, write
from nexus.trust import Target, decode_state, encode_metadata
from nexus.trust.sign import ROLES, RoleKeys, Term, first_root, newest, release, signer_of

BOOT, STATE = "boot", "state"
SLOTS: Final[Mapping[SlotName, str]] = {SlotName.A: "slot-a", SlotName.B: "slot-b"}
BLOCKS: Final[Mapping[str, int]] = {BOOT: 128, "slot-a": 32, "slot-b": 32, STATE: 512}
SUBSETS_MAX: Final = 4  # pending writes of one disk of which every subset is tried
DRAWN: Final = 8  # splits of all disks at once, in any order and with any tear
LIVE_EVERY: Final = 13  # of so many cases a whole update follows
SECOND_EVERY: Final = 61  # of so many cases one is cut again while it boots
SECOND_CHOICES: Final = 1  # pending writes of which every subset is tried, in a second cut
PROBLEMS_MAX: Final = 20  # a scene with more of them is left
TRIES: Final = 2
BOOTS_MAX: Final = TRIES + 2  # until a trial that fails has to be over
PIECE_SIZE: Final = 2048  # bytes of a set sent at a time
ISSUED: Final = 1_700_000_000  # s since 1970
LASTS: Final = 365 * 86_400  # s
HEALTH: Final = 10_000_000_000  # ns
PYTHON: Final = "3.11"
AREA: Final = "/state/app/"
SCHEMA: Final = AREA.encode() + b"schema"
VALUES: Final = 3  # values of the application, all changed by a migration
PAGE: Final = "# Power cuts during updates\n"

LIMITS: Final = StoreLimits(
    quota=Quota(size=1 << 30, keys=1 << 20),
    quotas={},
    reserves={},
    areas_max=4,
    clients_kept=2,
    requests_kept=4,
    lost_kept=4,
)
RULES: Final = Rules(release=True, python=PYTHON)
ASKER: Final = Asker(subject=7, name="operator", trace=bytes(range(16)), at=5, wall=1000)

Disks: TypeAlias = dict[str, Disk]
Split: TypeAlias = dict[str, Choice]
"""What of each disk's cache reached the medium; disks that are not named lost all of it."""


# ---------------------------------------------------------------- what is installed


class Release(NamedTuple):
    """A signed set: its metadata as they travel, and its file."""

    version: int
    schema: int  # of the application's data that it knows, and migrates to
    metadata: bytes
    data: bytes

    @property
    def digest(self) -> bytes:
        return sha256(self.data).digest()


@dataclass(frozen=True, slots=True)
class Vendor:
    """Who signs: the trust anchor, and what was released one after the other."""

    anchor: bytes
    releases: Mapping[int, Release]

    def by_digest(self, digest: bytes) -> Release | None:
        """The release with this set file."""
        return next((each for each in self.releases.values() if each.digest == digest), None)


FIRST, PLAIN, MIGRATING, LATER, LAST = 10, 11, 12, 13, 14
SCHEMAS: Final = {FIRST: 1, PLAIN: 1, MIGRATING: 2, LATER: 2, LAST: 2}


@cache
def vendor() -> Vendor:
    """Sets of a few KiB with bytes that do not pack, and their metadata; the same in each run."""
    signers = {role: signer_of(sha256(f"powercut {role}".encode()).digest()) for role in ROLES}
    everybody = list(signers.values())
    roles = {role: RoleKeys([key.public_key], 1) for role, key in signers.items()}
    files = first_root(roles, [signers["root"]], Term(ISSUED, ISSUED + LASTS), development=False)
    (anchor,) = files.values()
    releases = {}
    for number, (version, schema) in enumerate(SCHEMAS.items(), 1):
        data = _set_file(version, schema)
        target = Target(
            name=f"1.{version}.0",
            length=len(data),
            sha256=sha256(data).digest(),
            version=version,
            floor=FIRST,
        )
        issued = ISSUED + 60 * number
        files = release(files, target, everybody, Term(issued, issued + LASTS))
        releases[version] = Release(version, schema, encode_metadata(newest(files)), data)
    return Vendor(anchor, releases)


def _set_file(version: int, schema: int) -> bytes:
    noise = b"".join(sha256(b"%d %d" % (version, at)).digest() for at in range(150))
    files = {
        "system/system.toml": Content(data=b"[system]\nname = 'device'\n"),
        "sbom.cdx.json": Content(data=b"{}"),
        "python/app/data.bin": Content(data=noise),
    }
    about = About(
        version=version,
        name=f"1.{version}.0",
        system="system/system.toml",
        sbom="sbom.cdx.json",
        health=HEALTH,
        base=Base(python=PYTHON, distributions={}),
        services={},
        schemas={AREA: schema},
    )
    return write(about, files)


# ---------------------------------------------------------------- a device that runs


class StoreMemory:
    """updated's Memory on statefsd's store, without the two services between."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def get(self, key: bytes) -> bytes | None:
        """As Memory."""
        entry = await self._store.get(key)
        return None if entry is None else entry.value

    async def put(self, key: bytes, value: bytes | None) -> None:
        """As Memory."""
        if value is None and await self._store.get(key) is None:
            return
        try:
            _ = self._store.stage([Change(key, value)])
        except StoreFull as error:
            raise Declined(UpdatedStatus.NO_SPACE, str(error)) from error
        await self._store.commit(True)

    async def snapshot(self, areas: Sequence[str]) -> int:
        """As Memory."""
        head = await snapshot.take(self._store, [area.encode() for area in areas])
        return head.number

    async def restore(self, number: int) -> None:
        """As Memory."""
        _ = await snapshot.restore(self._store, number)

    async def keep_only(self, number: int) -> None:
        """As Memory."""
        head = await snapshot.head_of(self._store)
        if head.is_kept and head.number != number:
            _ = await snapshot.drop(self._store, head.number)


class Unbootable(Exception):
    """The device does not come up, and why."""


class System:
    """A device that is up: what the loader chose, statefsd's store and updated's engine."""

    def __init__(self, devices: Mapping[str, BlockDevice], ended: Ended | None) -> None:
        """Boot it. Raises Unbootable."""
        slots = {name: devices[device] for name, device in SLOTS.items()}
        try:
            self.chosen: Chosen = finished(choose(BlockBoot(devices[BOOT]), slots, ended))
            boot = self.chosen.boot
            self.store = finished(Store.open(devices[STATE], LIMITS))
            _ = finished(
                snapshot.resume(self.store, boot.snapshot if boot.restore else 0)
            )  # before it serves anybody, as init told it
            self.engine = Engine(BlockBoot(devices[BOOT]), slots, StoreMemory(self.store), RULES)
            finished(self.engine.open(ASKER))
        except (
            NothingBootable,
            NoBootRecord,
            BootRefused,
            DeviceFault,
            Unopenable,
            Declined,
            snapshot.NoSnapshot,
            snapshot.SnapshotDamaged,
        ) as error:
            raise Unbootable(f"{type(error).__name__}: {error}") from error

    @property
    def version(self) -> int:
        """Of the set that runs."""
        return self.chosen.boot.version

    @property
    def schema(self) -> int:
        """That the set that runs knows."""
        return self.chosen.manifest.schemas[AREA]

    @property
    def data(self) -> int | str:
        """The schema of the application's data, or what is wrong with them."""
        entry = finished(self.store.get(SCHEMA))
        if entry is None:
            return "there are no data"
        schema = int(entry.value)
        for number in range(VALUES):
            entry = finished(self.store.get(_value_key(number)))
            if entry is None or entry.value != _value(number, schema):
                return f"of schema {schema}, but value {number} is not"
        return schema

    @property
    def staged(self) -> int | None:
        """The version that waits in the standby slot."""
        info = self.engine.record.slot(self.engine.record.standby)
        return info.version if info.state is SlotState.STAGED else None

    @property
    def trusted(self) -> int:
        """Of the metadata that were believed last: how many targets there were; 0 for none."""
        entry = finished(self.store.get(TRUST))
        return 0 if entry is None else decode_state(entry.value).targets

    def migrate(self) -> None:
        """What the application does first: its data become those that its set knows."""
        if self.data == self.schema:
            return
        _ = self.store.stage(_data(self.schema))
        finished(self.store.commit(True))

    def begin(self, release: Release) -> int:
        """Announce it; from where to send it."""
        return finished(self.engine.begin(release.metadata, ASKER)).offset

    def send(self, release: Release, offset: int, stop: int) -> None:
        """The pieces from an offset to a stop."""
        for at in range(offset, stop, PIECE_SIZE):
            _ = finished(self.engine.take(at, release.data[at : min(at + PIECE_SIZE, stop)]))

    def finish(self) -> None:
        """Have it verified."""
        staged = finished(self.engine.finish(ASKER))
        while staged is None:
            staged = finished(self.engine.verify_step(ASKER))

    def stage(self, release: Release) -> None:
        """All of it, from wherever it stands."""
        offset = self.begin(release)
        if offset < len(release.data):
            self.send(release, offset, len(release.data))
        self.finish()

    def switch(self, release: Release, tries: int) -> None:
        """Have it tried."""
        _ = finished(self.engine.switch(release.digest, tries, ASKER))

    def commit(self) -> None:
        """What init asks for when every service is healthy."""
        running = self.engine.running
        digest = self.engine.record.slot(running).digest
        _ = finished(self.engine.commit(running, digest, 9, ASKER))

    def go_back(self) -> None:
        """What the operator asks for."""
        record = self.engine.record
        target = record.active if record.trying is not None else record.standby
        _ = finished(self.engine.rollback(target, ASKER))

    def fail(self) -> Ended:
        """How a trial ends that init has judged."""
        boot = self.chosen.boot
        return Ended(
            code=EXIT_SLOT_FAILED,
            failure=TrialFailure(
                slot=boot.slot,
                version=boot.version,
                attempt=boot.attempt,
                boot=1,
                at=5,
                trace="11" * 16,
                service="app",
                reason=TrialReason.NOT_READY,
                detail="not ready after 5 s",
            ),
            tail="init: start app\ninit: app is late\n",
        )


def _value_key(number: int) -> bytes:
    return b"%svalue-%d" % (AREA.encode(), number)


def _value(number: int, schema: int) -> bytes:
    return b"value %d as schema %d has it" % (number, schema) * (10 * schema)


def _data(schema: int) -> list[Change]:
    """The application's data: one batch, for a migration that is half done is nobody's fault."""
    values = [Change(_value_key(number), _value(number, schema)) for number in range(VALUES)]
    return [Change(SCHEMA, b"%d" % schema), *values]


def new_disks() -> Disks:
    """A device as it leaves the factory, with the application's first data."""
    disks = {name: Disk(blocks) for name, blocks in BLOCKS.items()}
    first = vendor().releases[FIRST]
    info = SlotInfo(
        version=FIRST, name="1.10.0", digest=first.digest, size=len(first.data), floor=FIRST
    )
    control = BlockBoot(DiskDevice(disks[BOOT]))
    slot = DiskDevice(disks["slot-a"])
    source = BytesSource(first.data)
    _ = finished(provision(control, slot, source, info, vendor().anchor))
    store = finished(Store.open(DiskDevice(disks[STATE]), LIMITS))
    _ = store.stage(_data(1))
    finished(store.commit(True))
    finished(store.close())
    return disks


# ---------------------------------------------------------------- what may be


class Paper(NamedTuple):
    """What a person would note of a device; it knows nothing of bootctl."""

    good: int = FIRST  # proven good last, and not given up
    before: int | None = None  # the good one before it
    staged: int | None = None
    trying: int | None = None
    tries: int = 0
    data: int = 1  # schema
    copy: int = 0  # schema of the data that were copied before the trial; 0 for no copy
    trusted: int = 0  # releases that were believed, counted

    def boots(self) -> "Paper":
        """After a boot. Which set runs then, `runs` says."""
        if self.trying is None:
            return self
        if self.tries:
            return self._replace(tries=self.tries - 1, staged=None)
        return self._replace(trying=None, staged=None, data=self.copy or self.data, copy=0)

    @property
    def runs(self) -> int:
        """The version that runs, of a device that has booted."""
        return self.good if self.trying is None else self.trying


class Step(NamedTuple):
    """Something that is asked of a device, and what it comes to on paper."""

    name: str
    act: Callable[["Session"], None]
    notes: Callable[[Paper], Paper]


class Session:
    """A device over its boots."""

    def __init__(self, devices: Mapping[str, BlockDevice]) -> None:
        self.devices = devices
        self._system: System | None = None

    @property
    def system(self) -> System:
        """What is up."""
        assert self._system is not None, "it was booted"
        return self._system

    def boot(self, ended: Ended | None = None) -> System:
        """Boot it, again: the disks keep what they have cached. Raises Unbootable."""
        if self._system is not None:
            finished(self._system.store.close())
        self._system = System(self.devices, ended)
        return self._system


def _boot(session: Session) -> None:
    _ = session.boot()


def _fail(session: Session) -> None:
    _ = session.boot(session.system.fail())


def _half(version: int) -> Callable[[Session], None]:
    def act(session: Session) -> None:
        each = vendor().releases[version]
        session.system.send(each, session.system.begin(each), 2 * PIECE_SIZE)
        finished(session.system.engine.sync())

    return act


def _number(version: int) -> int:
    return list(SCHEMAS).index(version) + 1


def begin(version: int) -> Step:
    """Announce a release: whatever stood in the standby slot is given up."""
    return Step(
        f"begin {version}",
        lambda session: _ignore(session.system.begin(vendor().releases[version])),
        lambda paper: paper._replace(staged=None, before=None, trusted=_number(version)),
    )


def _ignore(_: object) -> None:
    return None


def half(version: int) -> Step:
    """Send a part of it, durably."""
    return Step(
        f"half of {version}",
        _half(version),
        lambda paper: paper._replace(staged=None, before=None, trusted=_number(version)),
    )


def rest(version: int) -> Step:
    """Send what is missing, and have it verified."""
    return Step(
        f"stage {version}",
        lambda session: session.system.stage(vendor().releases[version]),
        lambda paper: paper._replace(staged=version),
    )


def switch(version: int, tries: int = TRIES) -> Step:
    """Have it tried from the next boot on."""

    def notes(paper: Paper) -> Paper:
        raises = SCHEMAS[version] > SCHEMAS[paper.good]
        return paper._replace(trying=version, tries=tries, copy=paper.data if raises else 0)

    return Step(
        f"switch to {version}",
        lambda session: session.system.switch(vendor().releases[version], tries),
        notes,
    )


BOOTED: Final = Step("boot", _boot, Paper.boots)
FAILED: Final = Step("fail and boot", _fail, Paper.boots)
MIGRATED: Final = Step(
    "migrate",
    lambda session: session.system.migrate(),
    lambda paper: paper._replace(data=max(paper.data, SCHEMAS[paper.runs])),
)
COMMITTED: Final = Step(
    "commit",
    lambda session: session.system.commit(),
    lambda paper: paper._replace(good=paper.runs, before=paper.good, trying=None, tries=0, copy=0),
)


def _notes_back(paper: Paper) -> Paper:
    if paper.trying is None:
        assert paper.before is not None
        return paper._replace(good=paper.before, before=paper.good)
    if paper.staged is not None:  # it was never booted
        return paper._replace(trying=None, tries=0, copy=0)
    return paper._replace(trying=None, tries=0, data=paper.copy or paper.data, copy=0)


BACK: Final = Step("go back", lambda session: session.system.go_back(), _notes_back)


class Scene(NamedTuple):
    """What has happened, and what is cut."""

    before: tuple[Step, ...]
    cut: tuple[Step, ...]


def _whole(version: int) -> tuple[Step, ...]:
    return (begin(version), rest(version))


_TRIAL: Final = (BOOTED, *_whole(MIGRATING), switch(MIGRATING), BOOTED, MIGRATED)
_LAST_TRY: Final = (BOOTED, *_whole(MIGRATING), switch(MIGRATING, 1), BOOTED, MIGRATED)
_UPDATED: Final = (BOOTED, *_whole(PLAIN), switch(PLAIN), BOOTED, MIGRATED, COMMITTED)

SCENES: Final[Mapping[str, Scene]] = {
    "stage": Scene((BOOTED,), _whole(MIGRATING)),
    "stage-on": Scene((BOOTED, half(MIGRATING), BOOTED), (begin(MIGRATING), rest(MIGRATING))),
    "stage-anew": Scene((BOOTED, *_whole(PLAIN)), _whole(MIGRATING)),
    "stage-over-the-older": Scene((*_UPDATED, BOOTED), _whole(MIGRATING)),
    "switch": Scene((BOOTED, *_whole(MIGRATING)), (switch(MIGRATING),)),
    "take-back": Scene((BOOTED, *_whole(MIGRATING), switch(MIGRATING)), (BACK, BOOTED)),
    "first-boot": Scene(
        (BOOTED, *_whole(MIGRATING), switch(MIGRATING)),
        (BOOTED, MIGRATED),
    ),
    "commit": Scene(_TRIAL, (COMMITTED, BOOTED)),
    "second-try": Scene(_TRIAL, (FAILED, MIGRATED, COMMITTED)),
    "rollback": Scene(_LAST_TRY, (FAILED, MIGRATED, BOOTED)),
    "rollback-of-two": Scene(_TRIAL, (FAILED, FAILED, BOOTED)),
    "give-up": Scene(_TRIAL, (BACK, BOOTED, BOOTED)),
    "go-back": Scene(_UPDATED, (BACK, BOOTED)),
    "after-a-rollback": Scene(
        (*_LAST_TRY, FAILED), (*_whole(LATER), switch(LATER), BOOTED, MIGRATED, COMMITTED)
    ),
}


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
    whole = {
        name: tuple(
            Piece(index, 0, len(pending.data)) for index, pending in enumerate(disk.pending)
        )
        for name, disk in disks.items()
    }
    for choice in choices(disks[writing].pending, current, subsets_max, source):
        yield {writing: choice}
        if others:
            yield {writing: choice, **{name: whole[name] for name in others}}
    for name in others:
        rest_of = {other: whole[other] for other in (writing, *others) if other != name}
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
        subsets_max: int = SUBSETS_MAX,
        every: int = 1,
        target: CutTarget | None = None,
    ) -> None:
        self.explored = Explored(scene=scene)
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
        self._disks = new_disks()
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
        command = f"nexus sim powercut ota --scene {self.explored.scene} {case}".rstrip()
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
        """The trial fails as often as it may, and is over then."""
        for _ in range(BOOTS_MAX):
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
        self._do(*_whole(version), switch(version), BOOTED, MIGRATED, COMMITTED, BOOTED)
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
            "One case alone: `nexus sim powercut ota --scene SCENE --cut N --split "
            "DISK=PENDING:FROM-TO,.../...`; a problem prints it as it is."
        )
        yield ""
        yield (
            "| scene | cut points | devices | second cuts | whole updates | versions that came up "
            "| problems |"
        )
        yield "|---|--:|--:|--:|--:|---|--:|"
        for each in self.explored:
            seen = ", ".join(f"{version}: {count}" for version, count in sorted(each.seen.items()))
            yield (
                f"| {each.scene} | {each.operations} | {each.cases} | {each.second_cuts} "
                f"| {each.lives} | {seen} | {len(each.problems)} |"
            )
        if self.problems:
            yield ""
        for problem in self.problems[:PROBLEMS_MAX]:
            yield f"- {problem.kind}: {problem.what}: `{problem.command}`"


def explore(
    scenes: Sequence[str],
    *,
    subsets_max: int = SUBSETS_MAX,
    every: int = 1,
    target: CutTarget | None = None,
    progress: Callable[[Explored], None] | None = None,
) -> OtaReport:
    """Explore these scenes."""
    report = OtaReport(subsets_max=subsets_max, every=every)
    start = time.monotonic_ns()
    for scene in scenes:
        explorer = Explorer(scene, subsets_max=subsets_max, every=every, target=target)
        report.explored.append(explorer.run())
        if progress is not None:
            progress(report.explored[-1])
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
    target = None
    if options.cut is not None or options.split is not None:
        if options.cut is None or options.split is None or options.scene == "all":
            parser.error("to repeat a case say --scene, --cut and --split")
        if (options.second is None) != (options.then is None):
            parser.error("to repeat a second cut say --second and --then")
        target = CutTarget(options.cut, options.split, options.second, options.then)
    try:
        report = explore(
            list(SCENES) if options.scene == "all" else [options.scene],
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

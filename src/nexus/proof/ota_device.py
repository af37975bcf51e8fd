"""A device that is updated, for `nexus sim powercut ota`: four disks, and what is done with them.

The code is the device's own: the loader's `choose`, bootctl in either backend, updated's engine,
statefsd's store with its snapshots. `Paper` is what a person would note meanwhile; it knows nothing
of bootctl, and says which set may run, and with which data. `SCENES` is such a device's life.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from typing import Final, NamedTuple, TypeAlias

from nexus.bootctl import (
    BlockBoot,
    BootControl,
    BootRefused,
    EnvironmentBoot,
    NoBootRecord,
    SlotInfo,
    SlotName,
    SlotState,
    TrialFailure,
    open_boot,
)
from nexus.bootctl.handover import EXIT_SLOT_FAILED, TrialReason
from nexus.bootctl.provision import provision
from nexus.drivers import BlockDevice, DeviceFault, finished
from nexus.kernel.sim.disk import Disk
from nexus.loader.choose import Chosen, Ended, NothingBootable, choose
from nexus.proof.powercut import DiskDevice
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
TRIES: Final = 2
PIECE_SIZE: Final = 2048  # bytes of a set sent at a time
ISSUED: Final = 1_700_000_000  # s since 1970
LASTS: Final = 365 * 86_400  # s
HEALTH: Final = 10_000_000_000  # ns
PYTHON: Final = "3.11"
AREA: Final = "/state/app/"
SCHEMA: Final = AREA.encode() + b"schema"
ROTTEN_AT: Final = 700  # byte of a slot, in the midst of a chunk
EDITION: Final = 100  # data are told by one number: that times an edition, and their schema
VALUES: Final = 3  # values of the application, all changed by a migration

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
BACKENDS: Final[Mapping[str, Callable[[BlockDevice], BootControl]]] = {
    "block": BlockBoot,
    "environment": EnvironmentBoot,
}

Disks: TypeAlias = dict[str, Disk]


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
        try:
            _ = await snapshot.restore(self._store, number)
        except (snapshot.NoSnapshot, snapshot.SnapshotDamaged) as error:
            raise Declined(UpdatedStatus.NO_SNAPSHOT, f"{number}: {error}") from error

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
            control, _ = finished(open_boot(devices[BOOT]))
            self.chosen: Chosen = finished(choose(control, slots, ended))
            boot = self.chosen.boot
            self.store = finished(Store.open(devices[STATE], LIMITS))
            # Before it serves anybody, as init told it; without a copy it serves what there is.
            with suppress(snapshot.NoSnapshot, snapshot.SnapshotDamaged):
                _ = finished(snapshot.go_back(self.store, boot.snapshot if boot.restore else 0))
            if boot.trial and boot.snapshot:
                _ = finished(snapshot.take_again(self.store, boot.snapshot))
            control, _ = finished(open_boot(devices[BOOT]))
            memory = StoreMemory(self.store)
            self.engine = Engine(control, slots, memory, RULES, SlotName(boot.slot))
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
        """EDITION times the edition of the application's data, and their schema; or what is wrong
        with them."""
        entry = finished(self.store.get(SCHEMA))
        if entry is None:
            return "there are no data"
        data = int(entry.value)
        for number in range(VALUES):
            entry = finished(self.store.get(_value_key(number)))
            if entry is None or entry.value != _value(number, data):
                return f"{data}, but value {number} is not"
        return data

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
        data = self.data
        assert isinstance(data, int), data
        if data % EDITION != self.schema:
            self._write(data - data % EDITION + self.schema)

    def edit(self) -> None:
        """What the application does now and then: its data change, and their schema does not."""
        data = self.data
        assert isinstance(data, int), data
        self._write(data + EDITION)

    def _write(self, data: int) -> None:
        _ = self.store.stage(_data(data))
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


def _value(number: int, data: int) -> bytes:
    return b"value %d as data %d have it" % (number, data) * (10 * (data % EDITION))


def _data(data: int) -> list[Change]:
    """The application's data: one batch, for a migration that is half done is nobody's fault."""
    values = [Change(_value_key(number), _value(number, data)) for number in range(VALUES)]
    return [Change(SCHEMA, b"%d" % data), *values]


def new_disks(backend: str) -> Disks:
    """A device as it leaves the factory, with the application's first data."""
    disks = {name: Disk(blocks) for name, blocks in BLOCKS.items()}
    first = vendor().releases[FIRST]
    info = SlotInfo(
        version=FIRST, name="1.10.0", digest=first.digest, size=len(first.data), floor=FIRST
    )
    control = BACKENDS[backend](DiskDevice(disks[BOOT]))
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
    data: int = 1
    copy: int = 0  # the data that were copied for the way back; 0 for no copy
    has_way_back: bool = True  # from a trial: what was good is whole
    trusted: int = 0  # releases that were believed, counted

    def boots(self) -> "Paper":
        """After a boot. Which set runs then, `runs` says."""
        if self.trying is None:
            return self
        if self.tries or not self.has_way_back:
            is_first = self.staged is not None
            copy = self.data if self.copy and is_first else self.copy
            return self._replace(tries=max(0, self.tries - 1), staged=None, copy=copy)
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
    lambda paper: paper._replace(data=_migrated(paper.data, SCHEMAS[paper.runs])),
)
EDITED: Final = Step(
    "edit",
    lambda session: session.system.edit(),
    lambda paper: paper._replace(data=paper.data + EDITION),
)


def _notes_commit(paper: Paper) -> Paper:
    before = paper.good if paper.has_way_back else None
    done = paper._replace(good=paper.runs, before=before, trying=None, tries=0, copy=0)
    return done._replace(has_way_back=True)  # the next trial's is what is good now


COMMITTED: Final = Step("commit", lambda session: session.system.commit(), _notes_commit)


def _migrated(data: int, schema: int) -> int:
    return data - data % EDITION + schema


def _notes_back(paper: Paper) -> Paper:
    if paper.trying is None:
        assert paper.before is not None
        return paper._replace(good=paper.before, before=paper.good)
    if paper.staged is not None:  # it was never booted
        return paper._replace(trying=None, tries=0, copy=0)
    return paper._replace(trying=None, tries=0, data=paper.copy or paper.data, copy=0)


BACK: Final = Step("go back", lambda session: session.system.go_back(), _notes_back)


def _rot(session: Session) -> None:
    record = session.system.engine.record
    _rot_slot(session, record.trying or record.active)


def _rot_way_back(session: Session) -> None:
    _rot_slot(session, session.system.engine.record.active)


def _rot_slot(session: Session, name: SlotName) -> None:
    device = session.devices[SLOTS[name]]
    assert isinstance(device, DiskDevice)
    device.disk.rot(ROTTEN_AT)


def _notes_rot(paper: Paper) -> Paper:
    if paper.trying is None:
        assert paper.before is not None
        return paper._replace(good=paper.before, before=None)
    data = paper.data if paper.staged is not None else paper.copy or paper.data
    return paper._replace(trying=None, tries=0, staged=None, data=data, copy=0)


ROTTEN: Final = Step("rot", _rot, _notes_rot)
"""A bit of the set that would be booted next flips; on paper it is as if it were not there."""

ROTTEN_BACK: Final = Step(
    "rot the way back", _rot_way_back, lambda paper: paper._replace(has_way_back=False)
)
"""A bit of the good set flips while another is on trial: that one is tried without an end."""


class Scene(NamedTuple):
    """What has happened, and what is cut."""

    before: tuple[Step, ...]
    cut: tuple[Step, ...]


def whole(version: int) -> tuple[Step, ...]:
    """All of staging."""
    return (begin(version), rest(version))


_TRIAL: Final = (BOOTED, *whole(MIGRATING), switch(MIGRATING), BOOTED, MIGRATED)
_LAST_TRY: Final = (BOOTED, *whole(MIGRATING), switch(MIGRATING, 1), BOOTED, MIGRATED)
_UPDATED: Final = (BOOTED, *whole(PLAIN), switch(PLAIN), BOOTED, MIGRATED, COMMITTED)

SCENES: Final[Mapping[str, Scene]] = {
    "stage": Scene((BOOTED,), whole(MIGRATING)),
    "stage-on": Scene((BOOTED, half(MIGRATING), BOOTED), (begin(MIGRATING), rest(MIGRATING))),
    "stage-anew": Scene((BOOTED, *whole(PLAIN)), whole(MIGRATING)),
    "stage-over-the-older": Scene((*_UPDATED, BOOTED), whole(MIGRATING)),
    "switch": Scene((BOOTED, *whole(MIGRATING)), (switch(MIGRATING),)),
    "take-back": Scene((BOOTED, *whole(MIGRATING), switch(MIGRATING)), (BACK, BOOTED)),
    "first-boot": Scene(
        (BOOTED, *whole(MIGRATING), switch(MIGRATING)),
        (BOOTED, MIGRATED),
    ),
    "commit": Scene(_TRIAL, (COMMITTED, BOOTED)),
    "second-try": Scene(_TRIAL, (FAILED, MIGRATED, COMMITTED)),
    "rollback": Scene(_LAST_TRY, (FAILED, MIGRATED, BOOTED)),
    "rollback-of-two": Scene(_TRIAL, (FAILED, FAILED, BOOTED)),
    "give-up": Scene(_TRIAL, (BACK, BOOTED, BOOTED)),
    "edit-and-roll-back": Scene(
        (BOOTED, *whole(MIGRATING), switch(MIGRATING, 1)),
        (EDITED, BOOTED, MIGRATED, EDITED, FAILED, BOOTED),
    ),
    "go-back": Scene(_UPDATED, (BACK, BOOTED)),
    "rotten": Scene((*_UPDATED, ROTTEN), (BOOTED, BOOTED)),
    "rotten-before-its-trial": Scene(
        (BOOTED, *whole(MIGRATING), switch(MIGRATING), ROTTEN), (BOOTED, BOOTED)
    ),
    "rotten-in-its-trial": Scene((*_TRIAL, ROTTEN), (FAILED, MIGRATED, BOOTED)),
    "rotten-way-back": Scene((*_LAST_TRY, ROTTEN_BACK), (FAILED, MIGRATED, FAILED, COMMITTED)),
    "after-a-rollback": Scene(
        (*_LAST_TRY, FAILED), (*whole(LATER), switch(LATER), BOOTED, MIGRATED, COMMITTED)
    ),
}

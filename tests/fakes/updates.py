"""Updates to try updated with: signed sets made on the spot, a device on simulated disks, and what
statefs keeps, without statefsd."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from random import Random  # noqa: TID251 (bytes that do not pack, the same in each run)
from typing import Final

from nexus.bootctl import BlockBoot, SlotInfo, SlotName, attempt
from nexus.bootctl.provision import provision
from nexus.drivers import finished
from nexus.kernel.sim.disk import Disk
from nexus.protocols.updated import Begun, Committed, Staged, Switched, Taken, UpdatedStatus
from nexus.services.updated.config import DISTRIBUTIONS, PYTHON
from nexus.services.updated.engine import Engine, Rules
from nexus.services.updated.faults import Declined
from nexus.services.updated.kept import Asker, Damaged
from nexus.sets import About, Base, BytesSource, Content, write
from nexus.trust import Target, encode_metadata
from nexus.trust.sign import (
    ROLES,
    RoleKeys,
    Signer,
    Term,
    first_root,
    newest,
    release,
    signer_of,
)
from tests.fakes.diskdevice import DiskDevice

BOOT_BLOCKS: Final = 128
SLOT_BLOCKS: Final = 2048  # 1 MiB
ISSUED: Final = 1_700_000_000  # s since 1970
LASTS: Final = 86_400 * 365
BASE: Final[Mapping[str, str]] = {"msgspec": DISTRIBUTIONS["msgspec"]}
RULES: Final = Rules(release=True, python=PYTHON, distributions=BASE)
ASKER: Final = Asker(subject=7, name="operator", trace=bytes(range(16)), at=5, wall=1000)
AREA: Final = "/state/app/"


@dataclass(frozen=True, kw_only=True, slots=True)
class Made:
    """An update: its metadata as they travel, and its set file."""

    metadata: bytes
    data: bytes
    target: Target

    @property
    def digest(self) -> bytes:
        return self.target.sha256


def set_file(
    version: int,
    *,
    size: int = 3000,
    schemas: Mapping[str, int] | None = None,
    base: Mapping[str, str] = BASE,
    python: str = PYTHON,
    name: str = "",
) -> bytes:
    """A set of this version, with about `size` bytes that do not pack."""
    files = {
        "system/system.toml": Content(data=b"[system]\nname = 'x'\n"),
        "sbom.cdx.json": Content(data=b"{}"),
        "python/app/data.bin": Content(data=Random(version).randbytes(size)),
    }
    about = About(
        version=version,
        name=name or f"1.{version}",
        system="system/system.toml",
        sbom="sbom.cdx.json",
        health=10_000_000_000,
        base=Base(python=python, distributions=dict(base)),
        services={},
        schemas={AREA: 1} if schemas is None else schemas,
    )
    return write(about, files)


class Maker:
    """Who signs: keys, and a repository whose releases follow one another."""

    def __init__(self, *, seed: int = 1, development: bool = False) -> None:
        self.signers: dict[str, Signer] = {
            role: signer_of(sha256(f"{seed} {role}".encode()).digest()) for role in ROLES
        }
        roles = {role: RoleKeys([key.public_key], 1) for role, key in self.signers.items()}
        self.issued = ISSUED
        self.files = first_root(
            roles, [self.signers["root"]], self._term(), development=development
        )

    def _term(self) -> Term:
        return Term(self.issued, self.issued + LASTS)

    @property
    def anchor(self) -> bytes:
        return self.files["1.root.json"]

    def made(self, data: bytes, version: int, *, name: str = "", floor: int = 0) -> Made:
        """The next release: this set file, signed as of that version and name."""
        target = Target(
            name=name or f"1.{version}",
            length=len(data),
            sha256=sha256(data).digest(),
            version=version,
            floor=floor,
        )
        self.issued += 60
        self.files = release(self.files, target, list(self.signers.values()), self._term())
        return Made(metadata=encode_metadata(newest(self.files)), data=data, target=target)

    def update(
        self,
        version: int,
        *,
        size: int = 3000,
        schemas: Mapping[str, int] | None = None,
        floor: int = 0,
    ) -> Made:
        """A good set of this version, released."""
        return self.made(set_file(version, size=size, schemas=schemas), version, floor=floor)


class FakeMemory:
    """kept.Memory in a dict, with the data of one area that a snapshot copies.

    `failing` are the keys that cannot be written, or every one; `reads_fail` says the same of
    reading; `room` whether a copy fits.
    """

    def __init__(self) -> None:
        self.values: dict[bytes, bytes] = {}
        self.writes = 0
        self.failing: set[bytes] | bool = False
        self.reads_fail = False
        self.damaged: set[bytes] = set()
        self.room = True
        self.data = b"old"  # what the area holds
        self.copies: dict[int, bytes] = {}
        self.copied: list[list[str]] = []
        self.restored: list[int] = []
        self.restore_fails: UpdatedStatus | None = None
        self.drop_fails = False
        self._copies = 0

    async def get(self, key: bytes) -> bytes | None:
        if self.reads_fail:
            raise Declined(UpdatedStatus.UNAVAILABLE, "statefsd: TimedOut")
        if key in self.damaged:
            raise Damaged(key)
        return self.values.get(key)

    async def put(self, key: bytes, value: bytes | None) -> None:
        if self.failing is True or (self.failing and key in self.failing):
            raise Declined(UpdatedStatus.UNAVAILABLE, "statefsd: TimedOut")
        self.writes += 1
        self.damaged.discard(key)
        if value is None:
            _ = self.values.pop(key, None)
        else:
            self.values[key] = value

    async def snapshot(self, areas: Sequence[str]) -> int:
        if not self.room:
            raise Declined(UpdatedStatus.NO_SNAPSHOT, "no room")
        assert not self.copies, "one copy at a time"
        self._copies += 1
        self.copies[self._copies] = self.data
        self.copied.append(list(areas))
        return self._copies

    async def restore(self, snapshot: int) -> None:
        if self.restore_fails is not None:
            raise Declined(self.restore_fails, "statefsd: it cannot be put back")
        if snapshot not in self.restored:
            self.data = self.copies[snapshot]
            self.restored.append(snapshot)

    async def keep_only(self, snapshot: int) -> None:
        if self.drop_fails:
            raise Declined(UpdatedStatus.UNAVAILABLE, "statefsd: CORRUPTED")
        self.copies = {number: data for number, data in self.copies.items() if number == snapshot}


class Device:
    """A device with two slots: its disks and its memory last, its engine is made at each boot."""

    def __init__(
        self, maker: Maker | None = None, *, slot_blocks: int = SLOT_BLOCKS, first: int = 10
    ) -> None:
        self.maker = maker or Maker()
        self.memory = FakeMemory()
        self.boot_disk = Disk(BOOT_BLOCKS)
        self.slot_disks = {name: Disk(slot_blocks) for name in SlotName}
        self.rules = RULES
        self.first = self.maker.update(first, schemas={AREA: 1})
        self.provision(self.first)
        self.engine: Engine
        self.slots: dict[SlotName, DiskDevice] = {}
        self.running: SlotName | None = None  # what the loader booted

    def provision(self, made: Made) -> None:
        target = made.target
        info = SlotInfo(
            version=target.version,
            name=target.name,
            digest=target.sha256,
            size=target.length,
            floor=target.floor,
        )
        _ = finished(
            provision(
                BlockBoot(DiskDevice(self.boot_disk)),
                DiskDevice(self.slot_disks[SlotName.A]),
                BytesSource(made.data),
                info,
                self.maker.anchor,
            )
        )

    def boot(self) -> SlotName:
        """What the loader does, and then updated begins: the slot that runs."""
        control = BlockBoot(DiskDevice(self.boot_disk))
        record = finished(control.load())
        record, slot = attempt(record)
        _ = finished(control.store(record))
        self.running = slot
        _ = self.start()
        return slot

    def start(self) -> Engine:
        """updated begins, as it does when its process was replaced."""
        self.slots = {name: DiskDevice(disk) for name, disk in self.slot_disks.items()}
        self.engine = Engine(
            BlockBoot(DiskDevice(self.boot_disk)),
            self.slots,
            self.memory,
            self.rules,
            self.running,
        )
        finished(self.engine.open(ASKER))
        return self.engine

    # -------------------------------------------------------------- steps, one after the other

    def begin(self, made: Made) -> Begun:
        return finished(self.engine.begin(made.metadata, ASKER))

    def take(self, offset: int, data: bytes) -> Taken:
        return finished(self.engine.take(offset, data))

    def send(self, data: bytes, offset: int = 0, piece: int = 1024) -> None:
        """The file from `offset` on, in pieces."""
        for at in range(offset, len(data), piece):
            _ = self.take(at, data[at : at + piece])

    def finish(self) -> Staged:
        """Finish, and every step of the verification."""
        staged = finished(self.engine.finish(ASKER))
        while staged is None:
            staged = finished(self.engine.verify_step(ASKER))
        return staged

    def stage(self, made: Made) -> Staged:
        begun = self.begin(made)
        if begun.staged:
            return self.finish()
        self.send(made.data, begun.offset)
        return self.finish()

    def switch(self, made: Made, tries: int = 2) -> Switched:
        return finished(self.engine.switch(made.digest, tries, ASKER))

    def commit(self, made: Made, nonce: int = 9) -> Committed:
        return finished(self.engine.commit(self.engine.running, made.digest, nonce, ASKER))

    def update(self, made: Made) -> None:
        """Everything that a good update goes through."""
        _ = self.stage(made)
        _ = self.switch(made)
        _ = self.boot()
        _ = self.commit(made)

    def slot_bytes(self, name: SlotName) -> bytes:
        return bytes(self.slot_disks[name].read(0, self.slot_disks[name].block_count))

    def with_rules(self, **changes: object) -> None:
        self.rules = replace(self.rules, **changes)  # type: ignore[arg-type]

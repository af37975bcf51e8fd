"""The judge of power cuts during an update: what it lets pass, and what it finds.

The device is a simulated one here, updated's engine and the loader are ours; its writes are kept as
QEMU keeps those of a machine. The machine's own are tried in test_boot_loader.py, and all of them
in `make campaign`.
"""

from dataclasses import dataclass, field
from typing import Final

import pytest

from nexus.abi import BLOCK_SIZE
from nexus.drivers import finished
from nexus.kernel.sim.disk import Disk
from nexus.proof.ota_device import FIRST, PLAIN, TRIES, Session, new_disks, vendor
from nexus.proof.powercut import DiskDevice
from nexus.services.statefsd.config import Settings
from nexus.services.statefsd.engine import Store
from nexus.vm.writelog import Entry, Kind
from tests.vm.board import COUNTED, LOGGED, Counts, Kept, Word, first_set
from tests.vm.powercut_update import (
    BACK_WORD,
    PLANTS,
    STAGED_WORD,
    STEPS,
    SWITCHED_WORD,
    Found,
    Judge,
    judged,
    planted,
    store_problem,
)

STORE_BLOCKS: Final = 8192
EVERY: Final = 7  # of so many cuts one is tried
NAMES: Final = {"boot": "boot", "slot-a": "slot-a", "slot-b": "slot-b", "state": "disk"}


@dataclass
class Life:
    """A device in memory, what it writes kept. A disk that is `forgetful` is never flushed."""

    forgetful: str = ""
    kept: Kept = field(default_factory=lambda: Kept(before={}))

    def take(self, name: str, entry: Entry) -> None:
        if name == self.forgetful and Kind.FLUSH in entry.kind:
            return
        self.kept.entries[name].append(entry)
        self.kept.moments.append(self.now)

    @property
    def now(self) -> Counts:
        return Counts(tuple(len(self.kept.entries[name]) for name in LOGGED))

    def says(self, text: str) -> None:
        self.kept.words.append(Word(text, self.now))


class Logged(DiskDevice):
    """A disk of that device."""

    def __init__(self, name: str, disk: Disk, life: Life) -> None:
        super().__init__(disk)
        self._name, self._life = name, life

    async def write(
        self, block: int, data: bytes | bytearray | memoryview, *, durable: bool = False
    ) -> None:
        await super().write(block, data, durable=durable)
        content = bytes(data)
        self._life.take(self._name, Entry(Kind(0), block * BLOCK_SIZE, len(content), content))
        if durable:
            self._life.take(self._name, Entry(Kind.FLUSH, 0, 0, b""))

    async def flush(self) -> None:
        await super().flush()
        self._life.take(self._name, Entry(Kind.FLUSH, 0, 0, b""))


def lived(forgetful: str = "") -> Life:
    """An update that fails twice and is left."""
    life = Life(forgetful)
    disks = new_disks("environment")
    life.kept.before = {NAMES[name]: disk.image() for name, disk in disks.items()}
    session = Session({name: Logged(NAMES[name], disk, life) for name, disk in disks.items()})
    release = vendor().releases[PLAIN]
    session.boot().stage(release)
    life.says(f"it {STAGED_WORD}")
    session.system.switch(release, TRIES)
    life.says(f"it {SWITCHED_WORD}")
    for number in range(TRIES):
        _ = session.boot(session.system.fail() if number else None)
        life.says(f"{COUNTED}1")
    _ = session.boot(session.system.fail())
    life.says(f"it {BACK_WORD}")
    return life


def found(life: Life, every: int = EVERY) -> Found:
    releases = vendor().releases
    digests = (releases[FIRST].digest, releases[PLAIN].digest)
    judge = Judge(vendor().anchor, digests, store=lambda _image: "")  # its store is a smaller one
    return judged(life.kept, judge, every=every)


def test_no_cut_of_an_update_is_found_wrong_and_every_step_is_acknowledged() -> None:
    life = lived()

    result = found(life)

    assert result.problems == []
    assert result.steps == list(STEPS[1:-1])
    assert result.tried > len(life.kept.moments)
    assert result.torn > result.tried // 2


@pytest.mark.parametrize(("forgetful", "kind"), [("slot-b", "half: "), ("boot", "loss: ")])
def test_a_disk_that_is_not_flushed_is_found(forgetful: str, kind: str) -> None:
    problems = found(lived(forgetful)).problems

    assert any(kind in problem for problem in problems), problems[:3]


def test_a_store_that_has_forgotten_what_was_believed_is_found() -> None:
    disk = Disk(STORE_BLOCKS)
    store = finished(Store.open(DiskDevice(disk), Settings().limits))
    finished(store.close())

    assert store_problem(disk.image()) == "it is forgotten whose release was believed"
    assert store_problem(bytes(STORE_BLOCKS * BLOCK_SIZE)) == (
        "nothing was ever written to the disk"
    )


def test_between_two_writes_whose_order_is_not_known_nothing_is_claimed() -> None:
    life = lived()
    kept = life.kept
    kept.moments = [kept.moments[0], kept.moments[-1]]

    result = found(life, every=1)

    assert result.untold == 1
    assert result.problems == []


def test_a_write_of_the_boot_loader_lasts_and_one_behind_it_does_not() -> None:
    write = Entry(Kind(0), 0, BLOCK_SIZE, bytes(BLOCK_SIZE))
    kept = Kept(before={})
    kept.entries["boot"] = [write, write, write]
    for text, count in (("nexus: boot.scr", 1), ("Starting kernel ...", 2)):
        kept.words.append(Word(text, Counts((count, 0, 0, 0))))

    kinds = [entry.kind for entry in kept.now("boot")]

    assert kinds == [Kind(0), Kind.FUA, Kind(0)]


@pytest.mark.parametrize("what", PLANTS)
def test_the_guards_that_a_campaign_takes_out_are_there(what: str) -> None:
    first = first_set()

    assert planted(first, what).digest != first.digest

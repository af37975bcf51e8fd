"""What the runner reads on a disk between two boots, and the one byte that it changes there."""

import dataclasses
from pathlib import Path

from nexus.abi import BLOCK_SIZE
from nexus.drivers import BlockDevice
from nexus.init.plan import load_plan
from nexus.kernel.sim.disk import Disk
from nexus.proof.remains import NOTHING_LEFT, damage, read_image, remains_of
from nexus.services.statefsd.config import Settings
from nexus.services.statefsd.engine import Change, Store

SYSTEMS = Path(__file__).parents[2] / "systems"
BLOCKS = 16384
KEY = b"/state/selftest/victim"
VALUE = b"a value that stands alone in the image"
OTHER = b"/state/selftest/other"


class _Device:
    """drivers.BlockDevice over a simulated disk, which answers at once."""

    writable = True

    def __init__(self, disk: Disk) -> None:
        self._disk = disk
        self.block_count = disk.block_count

    async def read(self, block: int, count: int) -> bytes:
        return self._disk.read(block, count)

    async def write(
        self, block: int, data: bytes | bytearray | memoryview, *, durable: bool = False
    ) -> None:
        self._disk.write(block, data, durable=durable)

    async def flush(self) -> None:
        self._disk.flush()


async def _fill(device: BlockDevice) -> None:
    store = await Store.open(device, Settings().limits)
    for key, value in ((KEY, VALUE), (OTHER, b"another one")):
        _ = store.stage([Change(key, value)])
        await store.commit(durable=True)


def _image() -> bytes:
    """An image with two values in it."""
    disk = Disk(BLOCKS)
    filling = _fill(_Device(disk))
    try:
        _ = filling.send(None)
    except StopIteration:
        return disk.image()
    raise AssertionError("a disk answers at once")


def test_the_values_of_a_store_are_read_with_their_numbers() -> None:
    left = read_image(_image())

    assert left.problem == ""
    assert {key: kept.value for key, kept in left.records.items()} == {
        KEY: VALUE,
        OTHER: b"another one",
    }
    assert left.records[OTHER].sequence == left.sequence
    assert (left.size, left.lost) == (BLOCKS * BLOCK_SIZE, 0)


def test_a_disk_that_was_never_written_says_so() -> None:
    assert read_image(bytes(BLOCKS * BLOCK_SIZE)).problem == "nothing was ever written to the disk"


def test_a_disk_that_holds_something_else_says_so() -> None:
    assert "holds no store" in read_image(b"GPT " * (BLOCKS * BLOCK_SIZE // 4)).problem


def test_a_system_without_statefsd_has_no_disk(tmp_path: Path) -> None:
    assert remains_of(load_plan(SYSTEMS / "minimal.toml"), tmp_path) is NOTHING_LEFT


def test_a_damaged_record_is_lost_and_the_other_is_not(tmp_path: Path) -> None:
    plan = load_plan(SYSTEMS / "selftest.toml")
    image = tmp_path / "disk.img"
    _ = image.write_bytes(_image())
    left = remains_of(plan, tmp_path)

    after = damage(plan, tmp_path, left, KEY)
    found = remains_of(plan, tmp_path)

    assert image.read_bytes()[after.damaged] == VALUE[0] ^ 1
    assert after == dataclasses.replace(left, damaged=after.damaged, lost=1)
    assert (set(found.records), found.lost) == ({OTHER}, 1)


def test_what_is_not_there_is_not_damaged(tmp_path: Path) -> None:
    plan = load_plan(SYSTEMS / "selftest.toml")
    image = tmp_path / "disk.img"
    before = _image()
    _ = image.write_bytes(before)

    left = damage(plan, tmp_path, remains_of(plan, tmp_path), b"/state/selftest/nothing")

    assert left.damaged == -1
    assert image.read_bytes() == before


def test_a_missing_image_is_a_problem_and_no_crash(tmp_path: Path) -> None:
    assert "cannot be read" in remains_of(load_plan(SYSTEMS / "selftest.toml"), tmp_path).problem

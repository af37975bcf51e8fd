"""Provisioning a device, and the power that goes while it is done."""

from collections.abc import Callable
from hashlib import sha256
from random import Random  # noqa: TID251 (seeded)

import pytest

from nexus.abi import BLOCK_SIZE
from nexus.bootctl import BlockBoot, BootRecord, NoBootRecord, SlotInfo, SlotName, SlotState
from nexus.bootctl.anchor import NoAnchor
from nexus.bootctl.contract import BOOT_BLOCKS_MIN
from nexus.bootctl.provision import provision
from nexus.drivers import BlockDevice, DeviceFault, finished
from nexus.kernel.sim.disk import NOTHING, Disk
from nexus.proof.powercut import Watched, choices
from nexus.sets import BytesSource
from tests.fakes.diskdevice import DiskDevice

SLOT_BLOCKS = 128
PIECE = 8 * BLOCK_SIZE  # in place of PIECE_SIZE
FIRST, SECOND = (Random(seed).randbytes(5 * PIECE + 700 + seed) for seed in (1, 2))
CHOICES_MAX = 6  # ways to lose what is pending, at each write


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several pieces of a small set."""
    monkeypatch.setattr("nexus.bootctl.provision.PIECE_SIZE", PIECE)


def info_of(content: bytes, version: int) -> SlotInfo:
    """What is said of a set."""
    return SlotInfo(
        version=version,
        name=f"1.{version}",
        digest=sha256(content).digest(),
        size=len(content),
        floor=version - 1,
    )


def provisioned(boot: BlockDevice, slot: BlockDevice, content: bytes, version: int) -> BootRecord:
    """Provision with this set and an anchor of its own."""
    anchor = f"root {version}".encode()
    source, info = BytesSource(content), info_of(content, version)
    return finished(provision(BlockBoot(boot), slot, source, info, anchor, wall=7))


def holds(slot: Disk, info: SlotInfo) -> bool:
    """Whether the set stands in the slot, whole."""
    data = bytes(slot.read(0, -(-info.size // BLOCK_SIZE)))[: info.size]
    return sha256(data).digest() == info.digest


def test_a_new_device_has_its_set_its_anchor_and_a_record() -> None:
    boot, slot = Disk(BOOT_BLOCKS_MIN), Disk(SLOT_BLOCKS)

    record = provisioned(DiskDevice(boot), DiskDevice(slot), FIRST, 3)

    control = BlockBoot(DiskDevice(boot))
    assert finished(control.load()) == record
    assert finished(control.read_anchor()) == b"root 3"
    info = record.slot(SlotName.A)
    assert (info.state, info.version, info.floor) == (SlotState.GOOD, 3, 2)
    assert record.slot(SlotName.B).state is SlotState.EMPTY
    assert (record.active, record.trying, record.floor) == (SlotName.A, None, 2)
    assert holds(slot, info)


class Cuts:
    """Loses power before, in and after each write of provisioning, and looks what is there."""

    def __init__(self, before: BootRecord | None) -> None:
        self.boot, self.slot = Disk(BOOT_BLOCKS_MIN), Disk(SLOT_BLOCKS)
        self._before = before
        self._source = Random(1)
        self.counts = {"none": 0, "before": 0, "after": 0}

    def watched(self) -> tuple[BlockDevice, BlockDevice]:
        """The two devices, whose every write is looked at."""

        def of_boot(_: int, disk: Disk, current: int | None) -> None:
            for choice in choices(disk.pending, current, CHOICES_MAX, self._source):
                self._look(disk.survivors(choice), self.slot.survivors(NOTHING))

        def of_slot(_: int, disk: Disk, current: int | None) -> None:
            for choice in choices(disk.pending, current, CHOICES_MAX, self._source):
                self._look(self.boot.survivors(NOTHING), disk.survivors(choice))

        return Watched(self.boot, of_boot), Watched(self.slot, of_slot)

    def _look(self, boot: Disk, slot: Disk) -> None:
        control = BlockBoot(DiskDevice(boot))
        try:
            record = finished(control.load())
        except NoBootRecord:
            assert self._before is None, "an older record goes only when the new one is there"
            self.counts["none"] += 1
            return
        if record == self._before:
            self.counts["before"] += 1
            return
        assert holds(slot, record.slot(SlotName.A)), "a new record, and its set is not there"
        assert finished(control.read_anchor()) == b"root 4", "a new record with another anchor"
        self.counts["after"] += 1


@pytest.mark.parametrize("is_again", [False, True])
def test_a_record_is_there_only_with_its_set_and_its_anchor(*, is_again: bool) -> None:
    cuts = Cuts(None)
    before = None
    if is_again:
        before = provisioned(DiskDevice(cuts.boot), DiskDevice(cuts.slot), FIRST, 3)
        cuts = _again(cuts, before)

    after = provisioned(*cuts.watched(), SECOND, 4)

    assert finished(BlockBoot(DiskDevice(cuts.boot)).load()) == after
    assert cuts.counts["before" if is_again else "none"] > 20, cuts.counts
    assert cuts.counts["none" if is_again else "before"] == 0, cuts.counts
    assert cuts.counts["after"] > 5, cuts.counts


def _again(cuts: Cuts, before: BootRecord) -> Cuts:
    other = Cuts(before)
    other.boot, other.slot = cuts.boot, cuts.slot
    return other


def test_a_cut_off_device_is_provisioned_once_more() -> None:
    boot, slot = Disk(BOOT_BLOCKS_MIN), Disk(SLOT_BLOCKS)
    source = BytesSource(FIRST[:-1])
    source.size += 1
    with pytest.raises(DeviceFault, match="does not hold what was written"):
        _ = finished(
            provision(
                BlockBoot(DiskDevice(boot)), DiskDevice(slot), source, info_of(FIRST, 3), b"root"
            )
        )
    with pytest.raises(NoBootRecord):
        _ = finished(BlockBoot(DiskDevice(boot)).load())
    with pytest.raises(NoAnchor):
        _ = finished(BlockBoot(DiskDevice(boot)).read_anchor())

    record = provisioned(DiskDevice(boot), DiskDevice(slot), FIRST, 3)

    assert holds(slot, record.slot(SlotName.A))


@pytest.mark.parametrize(
    "wrong",
    [lambda slot: slot, lambda _: Disk(SLOT_BLOCKS // 4)],
    ids=["another size", "too small a slot"],
)
def test_a_set_that_does_not_fit_is_refused_before_a_write(wrong: Callable[[Disk], Disk]) -> None:
    boot, slot = Disk(BOOT_BLOCKS_MIN), Disk(SLOT_BLOCKS)
    given = wrong(slot)
    content = FIRST if given is not slot else FIRST[:-1]
    devices = DiskDevice(boot), DiskDevice(given)

    with pytest.raises(DeviceFault, match="the set has"):
        _ = finished(
            provision(
                BlockBoot(devices[0]), devices[1], BytesSource(content), info_of(FIRST, 3), b"root"
            )
        )

    assert (devices[0].writes, devices[1].writes) == (0, 0)

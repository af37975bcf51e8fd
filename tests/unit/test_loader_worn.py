"""A device whose storage is wearing out: what was proven good boots as long as it can be read, and
again when it can be read again."""

import errno
import os
from dataclasses import replace
from pathlib import Path

import pytest

from nexus.bootctl import BlockBoot, Cause, SlotInfo, SlotName, SlotState
from nexus.bootctl.environment import (
    DATA_SIZE,
    ENVIRONMENT_COPIES,
    EnvironmentBoot,
    encode_environment,
    variables_of,
)
from nexus.drivers import DeviceFault, Fault, finished
from nexus.kernel.sim.disk import Disk, DiskFaults
from nexus.loader.choose import Chosen, Ended, NothingBootable, choose
from nexus.loader.devices import Missing, opened, opened_slot
from tests.fakes.bootrecords import BOOT_BLOCKS
from tests.fakes.diskdevice import DiskDevice
from tests.unit.test_loader_choose import Board

A, B = SlotName.A, SlotName.B


@pytest.fixture
def board() -> Board:
    return Board()


def choose_on_worn(board: Board, ended: Ended | None = None) -> Chosen:
    """With a boot device that refuses every write."""
    worn = Disk(board.boot.block_count, board.boot.image(), DiskFaults(read_only=True))
    slots = {name: DiskDevice(disk, writable=False) for name, disk in board.disks.items()}
    return finished(choose(BlockBoot(DiskDevice(worn)), slots, ended))


def test_a_worn_boot_device_boots_the_good_slot_uncounted(board: Board) -> None:
    chosen = choose_on_worn(board)

    assert (chosen.boot.slot, chosen.boot.trial) == ("a", False)
    assert chosen.record == board.record


def test_an_environment_that_others_have_filled_boots_the_good_slot_and_tries_nothing(
    board: Board,
) -> None:
    board.switch(tries=2)
    full = Disk(BOOT_BLOCKS)
    kept = variables_of(replace(board.record, reasons=(), sequence=9, boots=9))  # 10 is longer
    size = sum(len(f"{name}={text}") + 1 for name, text in kept.items())
    filled = {**kept, "script": "x" * (DATA_SIZE - size - len("script=") - 2)}
    full.write(ENVIRONMENT_COPIES[0], encode_environment(1, filled), durable=True)
    slots = {name: DiskDevice(disk, writable=False) for name, disk in board.disks.items()}

    chosen = finished(choose(EnvironmentBoot(DiskDevice(full)), slots, None))

    assert (chosen.boot.slot, chosen.boot.trial) == ("a", False)


def test_on_a_worn_boot_device_nothing_is_tried(board: Board) -> None:
    board.switch(tries=2)

    chosen = choose_on_worn(board)

    assert (chosen.boot.slot, chosen.boot.trial, chosen.boot.attempt) == ("a", False, 0)
    assert not chosen.boot.restore, "the trial was not booted: the data are those of before"


def test_on_a_worn_boot_device_a_trial_that_was_booted_ends_and_the_data_go_back(
    board: Board,
) -> None:
    board.switch(tries=2, snapshot=4)
    _ = board.choose()

    chosen = choose_on_worn(board, Ended(code=1))

    assert (chosen.boot.slot, chosen.boot.trial) == ("a", False)
    assert (chosen.boot.restore, chosen.boot.snapshot) == (True, 4)


def test_a_good_slot_beside_a_damaged_one_boots_on_a_worn_boot_device(board: Board) -> None:
    good = replace(board.record.slot(B), state=SlotState.GOOD)
    board.keep(board.record.with_slot(B, good))
    board.rot(A)

    chosen = choose_on_worn(board)

    assert chosen.boot.slot == "b"


def test_a_worn_boot_device_without_a_whole_good_slot_boots_nothing_and_says_why(
    board: Board,
) -> None:
    board.rot(A)

    with pytest.raises(DeviceFault) as caught:
        _ = choose_on_worn(board)

    assert caught.value.fault is Fault.READ_ONLY


def spoil(board: Board, name: SlotName, *, heal: bool = False) -> None:
    """The first block of a slot cannot be read for now."""
    disk = board.disks[name]
    faults = DiskFaults() if heal else DiskFaults(unreadable=frozenset({0}))
    board.disks[name] = Disk(disk.block_count, disk.image(), faults)


class OnceUnreadable(DiskDevice):
    """A slot whose first read fails, and no other one."""

    async def read(self, block: int, count: int) -> bytes:
        data = await super().read(block, count)
        if self.reads == 1:
            raise DeviceFault(Fault.TIMED_OUT)
        return data


def good_beside_good(board: Board) -> None:
    board.keep(board.record.with_slot(B, replace(board.record.slot(B), state=SlotState.GOOD)))


def test_the_only_good_slot_is_not_condemned_for_what_cannot_be_read_now(board: Board) -> None:
    board.keep(board.record.with_slot(B, SlotInfo()))
    spoil(board, A)

    with pytest.raises(NothingBootable, match="slot a: it cannot be read"):
        _ = board.choose()

    assert board.stored() == board.record, "nothing was decided"
    spoil(board, A, heal=True)
    assert board.choose().boot.slot == "a"


def test_two_slots_that_cannot_be_read_now_are_as_before_when_they_can(board: Board) -> None:
    board.switch(tries=1, snapshot=4)
    spoil(board, A)
    spoil(board, B)

    with pytest.raises(NothingBootable, match=r"slot b: it cannot.*slot a: it cannot"):
        _ = board.choose()

    assert board.stored() == board.record
    spoil(board, B, heal=True)
    assert (board.choose().boot.slot, board.record.slot(B).tries_left) == ("b", 0)


def test_a_read_that_fails_once_changes_nothing(board: Board) -> None:
    good_beside_good(board)
    slots = {A: OnceUnreadable(board.disks[A], writable=False), B: DiskDevice(board.disks[B])}

    chosen = finished(choose(BlockBoot(DiskDevice(board.boot)), slots, None))

    assert chosen.boot.slot == "a"
    assert chosen.record.reasons == board.record.reasons


def test_the_other_good_slot_boots_and_the_one_that_cannot_be_read_stays_good(
    board: Board,
) -> None:
    good_beside_good(board)
    spoil(board, A)

    boot = board.choose().boot

    assert (boot.slot, boot.trial) == ("b", False)
    assert (board.record.active, board.record.slot(A).state) == (B, SlotState.GOOD)
    last = board.record.reasons[-1]
    assert (last.cause, last.slot) == (Cause.DAMAGED, A)
    assert last.detail.startswith("slot a: it cannot be read")
    spoil(board, A, heal=True)
    board.rot(B)
    assert board.choose().boot.slot == "a", "and it is there when it is needed"


def test_a_set_tried_in_place_of_one_that_cannot_be_read_leads_back_to_it(board: Board) -> None:
    spoil(board, A)

    assert (board.choose().boot.slot, board.record.active) == ("b", A)
    assert board.choose(Ended(code=1)).boot.slot == "b", "it is the last one as long as that lasts"

    spoil(board, A, heal=True)
    boot = board.choose(Ended(code=1)).boot
    assert (boot.slot, boot.trial) == ("a", False)
    assert board.record.slot(B).state is SlotState.BAD


def test_damage_found_beside_a_slot_that_cannot_be_read_is_stored_and_it_is_not(
    board: Board,
) -> None:
    board.rot(B)
    spoil(board, A)

    with pytest.raises(NothingBootable, match="slot a: it cannot be read"):
        _ = board.choose()

    assert [board.stored().slot(name).state for name in SlotName] == [
        SlotState.GOOD,
        SlotState.BAD,
    ]
    spoil(board, A, heal=True)
    assert board.choose().boot.slot == "a"


def test_a_slot_that_is_missing_is_no_reason_not_to_boot_the_other_one(
    board: Board, tmp_path: Path
) -> None:
    slots = {A: DiskDevice(board.disks[A], writable=False), B: DiskDevice(board.disks[B])}
    with opened_slot(tmp_path / "slot-b.img") as missing:
        assert isinstance(missing, Missing)
        board.switch(tries=2)
        control = BlockBoot(DiskDevice(board.boot))

        chosen = finished(choose(control, {**slots, B: missing}, None))

    assert chosen.boot.slot == "a"
    assert chosen.record.slot(B).state is SlotState.BAD
    assert "No such file" in chosen.record.reasons[-1].detail


def test_with_both_slots_missing_there_is_nothing_to_boot(board: Board, tmp_path: Path) -> None:
    control = BlockBoot(DiskDevice(board.boot))

    with opened_slot(tmp_path / "x") as first, opened_slot(tmp_path / "y") as second:
        with pytest.raises(NothingBootable):
            _ = finished(choose(control, {A: first, B: second}, None))


def test_a_write_protected_device_is_read_and_refuses_the_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = tmp_path / "boot.img"
    image.write_bytes(bytes(512 * 128))
    genuine = os.open

    def protected(path: Path, flags: int) -> int:
        if flags & os.O_RDWR:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return genuine(path, flags)

    monkeypatch.setattr("nexus.loader.devices.os.open", protected)

    with opened(image, writable=True) as device:
        assert not device.writable
        assert finished(device.read(0, 1)) == bytes(512)
        with pytest.raises(DeviceFault) as caught:
            finished(device.write(0, bytes(512)))

    assert caught.value.fault is Fault.READ_ONLY


def test_a_device_that_may_not_be_written_is_still_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = tmp_path / "boot.img"
    image.write_bytes(bytes(512 * 128))
    genuine = os.open

    def denied(path: Path, flags: int) -> int:
        if flags & os.O_RDWR:
            raise OSError(errno.EACCES, os.strerror(errno.EACCES))
        return genuine(path, flags)

    monkeypatch.setattr("nexus.loader.devices.os.open", denied)

    with pytest.raises(DeviceFault, match="Permission denied"), opened(image, writable=True):
        pass

from dataclasses import replace
from hashlib import sha256

import pytest

from nexus.abi import BLOCK_SIZE
from nexus.bootctl import (
    BlockBoot,
    BootRecord,
    Cause,
    Reason,
    SlotInfo,
    SlotName,
    SlotState,
    TrialFailure,
    commit,
    provisioned,
    staged,
    staging,
    switch,
)
from nexus.bootctl.handover import EXIT_STOPPED, TrialReason
from nexus.drivers import finished
from nexus.kernel.sim.disk import Disk
from nexus.loader.choose import Chosen, Ended, NothingBootable, SlotSource, choose, note_end
from nexus.sets import About, Base, Content, write
from tests.fakes.bootrecords import BOOT_BLOCKS
from tests.fakes.diskdevice import DiskDevice

SLOT_BLOCKS = 64
HEALTH = 7_000_000_000
A, B = SlotName.A, SlotName.B


def a_set(version: int) -> bytes:
    about = About(
        version=version,
        name=f"{version}.0.0",
        system="system/s.toml",
        sbom="sbom.cdx.json",
        health=HEALTH,
        base=Base(python="3.11", distributions={}),
        services={},
        schemas={},
    )
    content = Content(data=b"[system]\n# %d" % version)
    return write(about, {"system/s.toml": content, "sbom.cdx.json": Content(data=b"{}")})


def info_of(data: bytes, version: int) -> SlotInfo:
    return SlotInfo(
        version=version, name=f"{version}.0.0", digest=sha256(data).digest(), size=len(data)
    )


class Board:
    """Boot device and slots of a device: version 1 good in slot a, version 2 staged in slot b."""

    def __init__(self) -> None:
        self.boot = Disk(BOOT_BLOCKS)
        self.disks = {name: Disk(SLOT_BLOCKS) for name in SlotName}
        self.control = BlockBoot(DiskDevice(self.boot))
        self._put(A, 1)
        self.record = finished(self.control.create(provisioned(info_of(a_set(1), 1))))
        self.keep(staging(self.record))
        self._put(B, 2)
        self.keep(staged(self.record, info_of(a_set(2), 2)))

    def _put(self, name: SlotName, version: int) -> None:
        data = a_set(version)
        self.disks[name].write(0, data + bytes(-len(data) % BLOCK_SIZE), durable=True)

    def keep(self, record: BootRecord) -> None:
        self.record = finished(self.control.store(record))

    def switch(self, tries: int = 2, *, snapshot: int = 0) -> None:
        reason = Reason(cause=Cause.SWITCHED, slot=B, version=2, boot=self.record.boots)
        self.keep(switch(self.record, tries, reason, snapshot=snapshot))

    def rot(self, name: SlotName, offset: int = 100) -> None:
        """Another byte is read from the slot than was written."""
        block = bytearray(self.disks[name].read(offset // BLOCK_SIZE, 1))
        block[offset % BLOCK_SIZE] ^= 1
        self.disks[name].write(offset // BLOCK_SIZE, bytes(block), durable=True)

    def choose(self, ended: Ended | None = None) -> Chosen:
        slots = {name: DiskDevice(disk, writable=False) for name, disk in self.disks.items()}
        control = BlockBoot(DiskDevice(self.boot))
        chosen = finished(choose(control, slots, ended, wall=5))
        self.control, self.record = control, chosen.record
        assert self.stored() == chosen.record, "what is acted on is on the device"
        return chosen

    def stored(self) -> BootRecord:
        return finished(BlockBoot(DiskDevice(self.boot)).load())


@pytest.fixture
def board() -> Board:
    return Board()


def test_the_good_slot_is_booted_and_what_init_is_told_is_of_that_slot(board: Board) -> None:
    boot = board.choose().boot

    assert (boot.slot, boot.version, boot.name) == ("a", 1, "1.0.0")
    assert boot.digest == sha256(a_set(1)).hexdigest()
    assert (boot.trial, boot.attempt, boot.deadline, boot.restore) == (False, 0, 0, False)
    assert board.stored().boots == 1


def test_a_trial_is_paid_for_before_it_is_booted(board: Board) -> None:
    board.switch(tries=2)

    chosen = board.choose()

    assert chosen.boot.slot == "b"
    assert (chosen.boot.trial, chosen.boot.attempt, chosen.boot.deadline) == (True, 1, HEALTH)
    assert board.stored().slot(B).tries_left == 1
    assert board.stored().slot(B).state is SlotState.TRYING


def test_after_the_last_try_the_old_slot_is_booted_and_says_that_data_go_back(
    board: Board,
) -> None:
    board.switch(tries=1, snapshot=7)
    _ = board.choose()

    boot = board.choose(Ended(code=1)).boot

    assert (boot.slot, boot.trial, boot.snapshot, boot.restore) == ("a", False, 7, True)
    assert board.record.slot(B).state is SlotState.BAD
    causes = [reason.cause for reason in board.record.reasons]
    assert causes[-2:] == [Cause.INIT_ENDED, Cause.ROLLED_BACK]


def test_a_committed_slot_is_no_trial_any_more(board: Board) -> None:
    board.switch()
    _ = board.choose()
    reason = Reason(cause=Cause.COMMITTED, slot=B, version=2, boot=board.record.boots)
    board.keep(commit(board.record, B, reason))

    boot = board.choose(Ended(code=3)).boot

    assert (boot.slot, boot.trial) == ("b", False)
    assert board.record.reasons[-1].cause is Cause.COMMITTED, "a reboot of a good set is no fault"


@pytest.mark.parametrize(
    ("ended", "cause", "text"),
    [
        (Ended(code=9), Cause.INIT_ENDED, "exit code 9"),
        (Ended(code=0, signal=11), Cause.INIT_ENDED, "signal 11"),
        (Ended(code=0, signal=9, is_hung=True), Cause.INIT_HUNG, "deadline"),
        (Ended(code=0), Cause.INIT_ENDED, "exit code 0"),
        (Ended(code=EXIT_STOPPED), Cause.STOPPED, "in order"),
        (Ended(problem="no room"), Cause.INIT_ENDED, "no room"),
        (Ended(), Cause.LOST, "nobody saw how"),
        (Ended(tail="init: start"), Cause.LOST, "nobody saw how"),
        (None, Cause.LOST, "nobody saw how"),
    ],
)
def test_the_end_of_a_trial_is_kept_with_its_cause(
    board: Board, ended: Ended | None, cause: Cause, text: str
) -> None:
    board.switch()
    _ = board.choose()

    _ = board.choose(ended)

    last = board.record.reasons[-1]
    assert (last.cause, last.slot, last.version, last.boot) == (cause, B, 2, 1)
    assert text in last.detail
    assert last.tail == ("" if ended is None else ended.tail)


@pytest.mark.parametrize("reason", list(TrialReason))
def test_inits_own_word_counts_more_than_how_it_ended(board: Board, reason: TrialReason) -> None:
    board.switch()
    _ = board.choose()
    failure = a_failure(attempt=1, reason=reason)

    _ = board.choose(Ended(code=4, failure=failure, tail="app: no"))

    last = board.record.reasons[-1]
    assert (last.cause.name, last.service) == (reason.name, "app")
    assert (last.trace.hex(), last.detail, last.tail) == ("ab" * 16, "app was not", "app: no")


def a_failure(
    *, attempt: int, reason: str = TrialReason.CRASHED, trace: str = "", version: int = 2
) -> TrialFailure:
    return TrialFailure(
        slot="b",
        version=version,
        attempt=attempt,
        boot=1,
        at=1,
        trace=trace or "ab" * 16,
        service="app",
        reason=reason,
        detail="app was not",
    )


def test_inits_word_about_an_earlier_boot_is_not_taken_for_this_ones(board: Board) -> None:
    board.switch()
    _ = board.choose()
    _ = board.choose(Ended(code=4, failure=a_failure(attempt=1)))

    _ = board.choose(Ended(code=0, signal=9, failure=a_failure(attempt=1)))

    assert board.record.reasons[-2].cause is Cause.INIT_ENDED
    assert "signal 9" in board.record.reasons[-2].detail
    assert board.record.reasons[-1].cause is Cause.ROLLED_BACK


def test_inits_word_about_an_earlier_set_is_not_taken_for_this_ones(board: Board) -> None:
    board.switch()
    _ = board.choose()
    of_the_set_before = a_failure(attempt=1, version=1)

    _ = board.choose(Ended(code=0, signal=9, failure=of_the_set_before))

    last = board.record.reasons[-1]
    assert (last.cause, last.service) == (Cause.INIT_ENDED, "")


def test_a_later_inits_words_and_a_trace_that_is_none_are_kept_as_far_as_they_go(
    board: Board,
) -> None:
    board.switch()
    _ = board.choose()

    _ = board.choose(Ended(code=4, failure=a_failure(attempt=1, reason="too hot", trace="no hex")))

    last = board.record.reasons[-1]
    assert (last.cause, last.service, last.trace) == (Cause.INIT_ENDED, "app", bytes(16))


def test_an_end_that_was_kept_before_is_not_kept_twice(board: Board) -> None:
    board.switch()
    _ = board.choose()
    _ = finished(note_end(board.control, Ended(code=0), wall=5))
    count = len(board.stored().reasons)

    _ = board.choose(Ended(code=0))

    assert len(board.record.reasons) == count


def test_how_a_good_slots_boot_ended_is_no_reason(board: Board) -> None:
    _ = board.choose()
    before = board.record.reasons

    _ = board.choose(Ended(code=70, signal=6))

    assert board.record.reasons == before


def test_a_damaged_trial_is_never_started_and_costs_the_good_slot_nothing(board: Board) -> None:
    board.switch(tries=2, snapshot=7)
    board.rot(B)

    boot = board.choose().boot

    assert (boot.slot, boot.restore) == ("a", False), "what was never booted changed no data"
    assert board.record.slot(B).state is SlotState.BAD
    last = board.record.reasons[-1]
    assert (last.cause, last.slot) == (Cause.DAMAGED, B)
    assert last.detail == "slot b: its bytes are not those that were staged"
    assert board.record.boots == 1, "the boot that did not happen is not counted"


def test_every_byte_of_a_slot_is_looked_at(board: Board) -> None:
    size = board.record.slot(B).size
    for offset in (0, size // 2, size - 1):
        fresh = Board()
        fresh.switch()
        fresh.rot(B, offset)
        assert fresh.choose().boot.slot == "a", f"byte {offset}"
    board.switch()
    board.rot(B, size)  # behind the set, where nothing is read
    assert board.choose().boot.slot == "b"


def test_in_place_of_a_damaged_good_slot_the_staged_one_is_tried(board: Board) -> None:
    board.rot(A)

    boot = board.choose().boot

    assert (boot.slot, boot.trial) == ("b", True)
    assert board.record.slot(A).state is SlotState.BAD
    assert board.choose(Ended(code=1)).boot.slot == "b", "it is the last one there is"


def test_in_place_of_a_damaged_good_slot_a_set_that_used_up_its_tries_is_tried_on(
    board: Board,
) -> None:
    board.switch(tries=1, snapshot=7)
    _ = board.choose()
    board.rot(A)

    boot = board.choose(Ended(code=1)).boot

    assert (boot.slot, boot.trial, boot.restore) == ("b", True, False), "better than none"
    assert board.record.slot(A).state is SlotState.BAD
    assert board.choose(Ended(code=1)).boot.slot == "b"


def test_a_device_with_two_damaged_slots_boots_neither(board: Board) -> None:
    board.switch()
    board.rot(A)
    board.rot(B)

    with pytest.raises(NothingBootable):
        _ = board.choose()

    assert [board.stored().slot(name).state for name in SlotName] == [SlotState.BAD] * 2


def test_a_slot_with_another_set_than_the_record_says_is_damaged(board: Board) -> None:
    wrong = replace(board.record.slot(B), version=3)
    board.keep(board.record.with_slot(B, wrong))
    reason = Reason(cause=Cause.SWITCHED, slot=B, version=3, boot=0)
    board.keep(switch(board.record, 1, reason))

    assert board.choose().boot.slot == "a"

    assert board.record.reasons[-1].detail == "slot b: it says version 2"


def test_a_slot_that_cannot_be_read_is_damaged(board: Board) -> None:
    board.switch()
    too_long = replace(board.record.slot(B), size=SLOT_BLOCKS * BLOCK_SIZE + 1)
    board.keep(board.record.with_slot(B, too_long))

    assert board.choose().boot.slot == "a"

    assert board.record.reasons[-1].detail.startswith("slot b: it cannot be read: outside")


@pytest.mark.parametrize(("offset", "size"), [(0, 10), (500, 30), (511, 1), (512, 512), (0, 2000)])
def test_a_source_gives_the_sets_bytes_whatever_blocks_they_are_in(offset: int, size: int) -> None:
    disk = Disk(4)
    data = bytes(range(256)) * 8
    disk.write(0, data, durable=True)
    source = SlotSource(DiskDevice(disk), 1500)

    assert finished(source.read_at(offset, size)) == data[offset : min(offset + size, 1500)]
    assert finished(source.read_at(1500, 1)) == b""

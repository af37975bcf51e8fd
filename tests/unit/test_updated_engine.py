"""updated's engine over simulated disks: what is staged, tried, kept and left, and what is not."""

from collections.abc import Callable
from dataclasses import replace

import msgspec
import pytest

from nexus.abi import BLOCK_SIZE
from nexus.bootctl import BlockBoot, BootRecord, Cause, Reason, SlotName, SlotState, failed
from nexus.drivers import DeviceFault, Fault, finished
from nexus.kernel.sim.disk import NOTHING, Disk, DiskFaults, Failure, Operation
from nexus.protocols.updated import (
    HISTORY_KEPT,
    EventKind,
    Phase,
    Slot,
    UpdatedStatus,
)
from nexus.services.updated.config import PYTHON
from nexus.services.updated.faults import Declined
from nexus.services.updated.kept import (
    HISTORY,
    TRANSFER,
    TRUST,
    read_transfer,
    write_transfer,
)
from nexus.services.updated.source import WINDOW_SIZE, SlotSource
from tests.fakes.diskdevice import DiskDevice
from tests.fakes.updates import AREA, ASKER, Device, Made, Maker, set_file
from tests.unit.test_sets_reader import bomb

A, B = SlotName.A, SlotName.B


@pytest.fixture
def device() -> Device:
    """A device that was booted from slot a, with nothing staged."""
    found = Device()
    _ = found.boot()
    return found


def declined(work: Callable[[], object]) -> UpdatedStatus:
    """The status that `work` is declined with."""
    with pytest.raises(Declined) as caught:
        _ = work()
    return caught.value.status


def stored(device: Device) -> BootRecord:
    """The boot-control record as it is on the disk."""
    return finished(BlockBoot(DiskDevice(device.boot_disk)).load())


def kinds(device: Device) -> list[EventKind]:
    """The history, oldest first."""
    events, _ = device.engine.history.page(0, HISTORY_KEPT)
    return [event.kind for event in reversed(events)]


def cut(device: Device) -> None:
    """The power goes: what was not flushed is lost; and the next boot."""
    device.boot_disk = device.boot_disk.survivors(NOTHING)
    device.slot_disks = {name: disk.survivors(NOTHING) for name, disk in device.slot_disks.items()}
    _ = device.boot()


# ------------------------------------------------------------------ staging


def test_a_staged_set_stands_whole_in_the_other_slot_and_the_record_says_so(
    device: Device,
) -> None:
    before = device.slot_bytes(A)
    made = device.maker.update(11, floor=3)

    staged = device.stage(made)

    assert (staged.slot, staged.version, staged.name) == (Slot.B, 11, "1.11")
    assert device.slot_bytes(B)[: len(made.data)] == made.data
    assert device.slot_bytes(A) == before
    info = stored(device).slot(B)
    assert (info.state, info.digest, info.size) == (SlotState.STAGED, made.digest, len(made.data))
    assert info.floor == 3
    assert stored(device).sequence == staged.sequence
    assert kinds(device) == [EventKind.BEGUN, EventKind.STAGED]
    assert TRANSFER not in device.memory.values


def test_the_standby_slot_is_empty_in_the_record_before_its_first_byte_is_written(
    device: Device,
) -> None:
    _ = device.stage(device.maker.update(11))

    _ = device.begin(device.maker.update(12))

    assert stored(device).slot(B).state is SlotState.EMPTY


def test_a_set_counts_as_staged_only_after_it_was_read_back(device: Device) -> None:
    made = device.maker.update(11)
    _ = device.begin(made)
    device.send(made.data)

    assert finished(device.engine.finish(ASKER)) is None
    assert device.engine.transfer().phase is Phase.VERIFYING
    assert stored(device).slot(B).state is SlotState.EMPTY

    assert device.finish().digest == made.digest
    assert device.engine.transfer().phase is Phase.STAGED


def test_asking_again_stages_nothing_anew(device: Device) -> None:
    made = device.maker.update(11)
    first = device.stage(made)

    again = device.begin(made)

    assert (again.staged, again.offset) == (True, len(made.data))
    assert device.finish() == first
    assert device.start().record.sequence == first.sequence
    assert device.finish() == first


def test_the_same_set_under_another_floor_is_staged_with_that_floor(device: Device) -> None:
    made = device.maker.update(11)
    _ = device.stage(made)
    raised = device.maker.made(made.data, 11, floor=5)

    begun = device.begin(raised)

    assert (begun.staged, begun.offset) == (False, 0)
    device.send(raised.data)
    assert device.finish().digest == made.digest
    assert stored(device).slot(B).floor == 5


def test_a_transfer_goes_on_where_it_was_kept_after_an_orderly_end(device: Device) -> None:
    made = device.maker.update(11)
    _ = device.begin(made)
    _ = device.take(0, made.data[:1024])
    finished(device.engine.sync())
    _ = device.start()

    begun = device.begin(made)

    assert (begun.offset, begun.staged) == (1024, False)
    device.send(made.data, 1024)
    assert device.finish().digest == made.digest
    assert device.slot_bytes(B)[: len(made.data)] == made.data


def test_after_a_power_cut_it_goes_on_from_what_is_durable_and_no_further(device: Device) -> None:
    made = device.maker.update(11)
    _ = device.begin(made)
    _ = device.take(0, made.data[:1024])
    finished(device.engine.sync())
    _ = device.take(1024, made.data[1024:2048])
    cut(device)

    begun = device.begin(made)

    assert begun.offset == 1024
    device.send(made.data, 1024)
    assert device.finish().digest == made.digest


def test_what_came_is_made_durable_every_so_many_bytes(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nexus.services.updated.engine.SYNC_SIZE", 4096)
    _ = device.start()
    made = device.maker.update(11, size=10_000)
    _ = device.begin(made)

    taken = [
        device.take(at, made.data[at : at + 1024]).durable for at in range(0, len(made.data), 1024)
    ]

    assert taken == [0] * 3 + [4096] * 4 + [8192] * (len(taken) - 7)


def test_after_a_restart_a_transfer_goes_on_only_once_its_metadata_are_believed_again(
    device: Device,
) -> None:
    made = device.maker.update(11)
    _ = device.begin(made)
    device.send(made.data)
    finished(device.engine.sync())
    device.provision(device.first)  # for another publisher, say
    _ = device.boot()

    assert declined(lambda: device.take(0, made.data[:512])) is UpdatedStatus.NOT_STAGING
    assert declined(device.finish) is UpdatedStatus.NOT_STAGING

    assert device.begin(made).offset == len(made.data)
    assert device.finish().digest == made.digest


def test_another_update_ends_the_transfer_that_was_under_way(device: Device) -> None:
    one, other = device.maker.update(11), device.maker.update(12)
    _ = device.begin(one)
    _ = device.take(0, one.data[:1024])

    begun = device.begin(other)

    assert (begun.version, begun.offset) == (12, 0)
    device.send(other.data)
    assert device.finish().version == 12


def test_a_piece_that_has_come_already_changes_nothing(device: Device) -> None:
    made = device.maker.update(11)
    _ = device.begin(made)
    _ = device.take(0, made.data[:1024])

    assert device.take(0, bytes(1024)).offset == 1024

    device.send(made.data, 1024)
    assert device.finish().digest == made.digest


@pytest.mark.parametrize(
    ("offset", "size", "status"),
    [
        (1024, 512, UpdatedStatus.OUT_OF_ORDER),  # a gap
        (0, 1024, UpdatedStatus.OUT_OF_ORDER),  # over what has come, and beyond
        (512, 100, UpdatedStatus.OUT_OF_ORDER),  # no whole blocks, and not the last
        (512, 1 << 20, UpdatedStatus.TOO_LARGE),  # more than was signed
    ],
)
def test_a_piece_that_does_not_fit_is_refused_and_writes_nothing(
    device: Device, offset: int, size: int, status: UpdatedStatus
) -> None:
    made = device.maker.update(11)
    _ = device.begin(made)
    _ = device.take(0, made.data[:512])
    before = device.slot_bytes(B)

    assert declined(lambda: device.take(offset, bytes(size))) is status

    assert device.slot_bytes(B) == before
    assert device.engine.transfer().offset == 512


def test_without_a_transfer_there_are_no_pieces_and_nothing_to_finish(device: Device) -> None:
    assert declined(lambda: device.take(0, bytes(512))) is UpdatedStatus.NOT_STAGING
    assert declined(device.finish) is UpdatedStatus.NOT_STAGING


def test_a_file_that_has_not_come_whole_is_not_finished(device: Device) -> None:
    made = device.maker.update(11)
    _ = device.begin(made)
    _ = device.take(0, made.data[:1024])

    assert declined(device.finish) is UpdatedStatus.INCOMPLETE
    assert device.engine.transfer().phase is Phase.RECEIVING


def test_a_set_larger_than_the_slot_is_refused_before_anything_is_cleared(device: Device) -> None:
    _ = device.stage(device.maker.update(11))
    large = device.maker.update(12, size=device.engine.capacity(B))

    assert declined(lambda: device.begin(large)) is UpdatedStatus.TOO_LARGE

    assert stored(device).slot(B).version == 11
    assert kinds(device)[-1] is EventKind.REFUSED


def test_the_set_that_runs_is_not_brought_again(device: Device) -> None:
    again = device.maker.made(device.first.data, 10)

    assert declined(lambda: device.begin(again)) is UpdatedStatus.ALREADY_RUNS


# ------------------------------------------------------------------ what is not taken


def refused(device: Device, made: Made, data: bytes | None = None) -> UpdatedStatus:
    """Stage it, with other bytes if there are; how the end of it is refused."""
    _ = device.begin(made)
    device.send(made.data if data is None else data)
    running = device.slot_bytes(A)

    status = declined(device.finish)

    assert stored(device).slot(B).state is SlotState.EMPTY, "nothing can be booted there"
    assert stored(device).active is A
    assert device.slot_bytes(A) == running
    told = device.engine.transfer()
    if told.phase is Phase.REFUSED:
        assert (told.status, declined(device.finish)) == (status, status), "it stays refused"
        event = device.engine.history.page(0, 1)[0][0]
        assert (event.kind, event.status) == (EventKind.REFUSED, status)
        assert event.detail
        assert TRANSFER not in device.memory.values
    return status


def test_a_flipped_bit_anywhere_is_another_file_than_the_signed_one(device: Device) -> None:
    made = device.maker.update(11, size=700)

    for at in (0, 10, 60, len(made.data) // 2, len(made.data) - 1):
        data = bytearray(made.data)
        data[at] ^= 1
        assert refused(device, made, bytes(data)) is UpdatedStatus.WRONG_DIGEST

    assert device.stage(made).version == 11, "and the whole one is still taken"


def test_nothing_of_a_file_is_parsed_before_its_digest_is_the_signed_one(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = device.maker.update(11)
    _ = device.begin(made)
    device.send(b"X" + made.data[1:])

    def parsed(*_words: object, **_options: object) -> None:
        raise AssertionError("it is parsed")

    monkeypatch.setattr("nexus.services.updated.engine.Verification", parsed)

    assert declined(device.finish) is UpdatedStatus.WRONG_DIGEST


def test_a_flipped_bit_is_found_also_in_what_came_before_a_restart(device: Device) -> None:
    made = device.maker.update(11)
    _ = device.begin(made)
    _ = device.take(0, b"X" + made.data[1:1024])
    finished(device.engine.sync())
    _ = device.start()
    device.send(made.data, device.begin(made).offset)

    assert declined(device.finish) is UpdatedStatus.WRONG_DIGEST
    assert stored(device).slot(B).state is SlotState.EMPTY


def test_a_slot_that_does_not_keep_what_it_was_given_is_found_out(device: Device) -> None:
    made = device.maker.update(11)
    _ = device.begin(made)
    device.send(made.data)
    device.slot_disks[B].rot(len(made.data) // 2)

    assert declined(device.finish) is UpdatedStatus.WRONG_DIGEST
    assert stored(device).slot(B).state is SlotState.EMPTY


def test_what_was_signed_and_is_no_set_is_refused(device: Device) -> None:
    noise = bytes(range(256)) * 8

    assert refused(device, device.maker.made(noise, 11)) is UpdatedStatus.BAD_SET


def test_a_signed_set_that_would_unpack_to_gigabytes_is_refused(device: Device) -> None:
    assert refused(device, device.maker.made(bomb(), 11)) is UpdatedStatus.BAD_SET
    assert device.engine.transfer().detail.startswith("compression: ")


def test_a_signed_set_that_is_cut_short_is_refused(device: Device) -> None:
    short = device.maker.made(set_file(11)[:-100], 11)

    assert refused(device, short) is UpdatedStatus.BAD_SET


def test_a_bad_set_is_told_from_a_damaged_one_also_after_a_restart(device: Device) -> None:
    made = device.maker.made(bytes(2048), 11)
    _ = device.begin(made)
    device.send(made.data)
    finished(device.engine.sync())
    _ = device.start()
    _ = device.begin(made)

    assert declined(device.finish) is UpdatedStatus.BAD_SET


@pytest.mark.parametrize("signed_as", [(12, "1.11"), (11, "another")])
def test_a_set_is_what_it_was_signed_as(device: Device, signed_as: tuple[int, str]) -> None:
    version, name = signed_as

    made = device.maker.made(set_file(11), version, name=name)

    assert refused(device, made) is UpdatedStatus.WRONG_MANIFEST


@pytest.mark.parametrize(
    ("python", "base"),
    [("3.99", {}), (PYTHON, {"msgspec": "9.9"}), (PYTHON, {"left-pad": "1.0"})],
)
def test_a_set_that_needs_another_base_system_is_refused(
    device: Device, python: str, base: dict[str, str]
) -> None:
    made = device.maker.made(set_file(11, python=python, base=base), 11)

    assert refused(device, made) is UpdatedStatus.WRONG_BASE


def test_what_trusted_metadata_was_seen_is_kept_before_the_update_is_taken(device: Device) -> None:
    old = device.maker.update(11)
    new = device.maker.update(12)
    _ = device.begin(new)

    _ = device.start()

    assert declined(lambda: device.begin(old)) is UpdatedStatus.REPLAYED


def test_where_that_cannot_be_kept_nothing_is_taken(device: Device) -> None:
    device.memory.failing = {TRUST}

    assert declined(lambda: device.begin(device.maker.update(11))) is UpdatedStatus.UNAVAILABLE

    assert stored(device).sequence == device.engine.record.sequence
    assert device.engine.transfer().phase is Phase.IDLE


def test_keys_for_development_are_refused_by_a_device_that_is_none() -> None:
    made_for = Maker(development=True)
    device = Device(made_for)
    _ = device.boot()

    status = declined(lambda: device.begin(made_for.update(11)))

    assert status is UpdatedStatus.DEVELOPMENT_KEY
    device.with_rules(release=False)
    _ = device.start()
    assert device.stage(made_for.update(12)).version == 12


def test_a_damaged_memory_of_what_was_seen_is_refused_and_not_forgotten(device: Device) -> None:
    _ = device.stage(device.maker.update(11))
    device.memory.values[TRUST] = b"\xc1"
    _ = device.start()

    assert declined(lambda: device.begin(device.maker.update(12))) is UpdatedStatus.NO_ANCHOR

    device.memory.damaged = {TRUST}
    _ = device.start()
    assert declined(lambda: device.begin(device.maker.update(13))) is UpdatedStatus.NO_ANCHOR


# ------------------------------------------------------------------ trying


def test_a_good_set_is_tried_committed_and_then_the_one_to_go_back_from(device: Device) -> None:
    made = device.maker.update(11, schemas={AREA: 1})
    _ = device.stage(made)

    switched = device.switch(made, tries=3)

    assert (switched.slot, switched.tries_left, switched.snapshot) == (Slot.B, 3, 0)
    assert (stored(device).trying, stored(device).active) == (B, A)
    assert device.boot() is B
    assert device.engine.running is B
    assert stored(device).active is A, "not proven yet"
    committed = device.commit(made, nonce=77)
    assert (committed.slot, committed.nonce, committed.repeated) == (Slot.B, 77, False)
    assert stored(device).active is B
    assert stored(device).slot(B).state is SlotState.GOOD
    assert stored(device).slot(A).state is SlotState.GOOD
    assert device.memory.copied == []
    assert kinds(device)[-2:] == [EventKind.SWITCHED, EventKind.COMMITTED]


def test_who_asked_and_when_is_written_before_the_risky_step(device: Device) -> None:
    made = device.maker.update(11)
    _ = device.stage(made)

    _ = device.switch(made)

    reason = stored(device).reasons[-1]
    assert (reason.cause, reason.slot, reason.version) == (Cause.SWITCHED, B, 11)
    assert (reason.trace, reason.wall, reason.service) == (ASKER.trace, 1000, "operator")


def test_asking_to_switch_again_changes_nothing(device: Device) -> None:
    made = device.maker.update(11)
    _ = device.stage(made)
    first = device.switch(made)

    again = device.switch(made, tries=9)

    assert again.repeated
    assert (again.sequence, again.tries_left) == (first.sequence, first.tries_left)


@pytest.mark.parametrize("digest", [bytes(32), b"\xff" * 32])
def test_only_what_is_staged_can_be_switched_to(device: Device, digest: bytes) -> None:
    assert declined(lambda: finished(device.engine.switch(digest, 2, ASKER))) is (
        UpdatedStatus.NOT_STAGED
    )
    _ = device.stage(device.maker.update(11))
    assert declined(lambda: finished(device.engine.switch(digest, 2, ASKER))) is (
        UpdatedStatus.NOT_STAGED
    )


def test_a_switch_that_waits_for_its_boot_refuses_staging(device: Device) -> None:
    made = device.maker.update(11)
    _ = device.stage(made)
    _ = device.switch(made)

    assert declined(lambda: device.begin(device.maker.update(12))) is UpdatedStatus.PENDING
    other = b"\x01" * 32
    assert declined(lambda: finished(device.engine.switch(other, 2, ASKER))) is (
        UpdatedStatus.PENDING
    )
    assert stored(device).slot(B).state is SlotState.STAGED


def test_on_trial_neither_slot_can_be_written_or_switched_to(device: Device) -> None:
    made = device.maker.update(11)
    _ = device.stage(made)
    _ = device.switch(made)
    _ = device.boot()
    slots = device.slot_bytes(A), device.slot_bytes(B)

    assert declined(lambda: device.begin(device.maker.update(12))) is UpdatedStatus.UNPROVEN
    assert declined(lambda: device.switch(made)) is UpdatedStatus.UNPROVEN

    assert (device.slot_bytes(A), device.slot_bytes(B)) == slots


def test_only_the_set_on_trial_is_committed(device: Device) -> None:
    made = device.maker.update(11)
    _ = device.stage(made)

    assert declined(lambda: finished(device.engine.commit(B, made.digest, 1, ASKER))) is (
        UpdatedStatus.NOT_ON_TRIAL
    )
    _ = device.switch(made)
    assert declined(lambda: finished(device.engine.commit(B, made.digest, 1, ASKER))) is (
        UpdatedStatus.NOT_ON_TRIAL
    )
    _ = device.boot()
    assert declined(lambda: finished(device.engine.commit(B, bytes(32), 1, ASKER))) is (
        UpdatedStatus.NOT_ON_TRIAL
    )
    assert declined(lambda: finished(device.engine.commit(A, device.first.digest, 1, ASKER))) is (
        UpdatedStatus.NOT_ON_TRIAL
    )
    assert stored(device).active is A


def test_a_commit_is_durable_when_it_is_answered_and_can_be_asked_for_again(
    device: Device,
) -> None:
    made = device.maker.update(11)
    device.update(made)

    cut(device)

    assert stored(device).active is B
    again = device.commit(made)
    assert again.repeated


def test_a_set_that_fails_its_tries_leaves_the_old_one_running(device: Device) -> None:
    made = device.maker.update(11)
    _ = device.stage(made)
    _ = device.switch(made, tries=2)

    booted = [device.boot() for _ in range(3)]

    assert booted == [B, B, A]
    assert device.engine.running is A
    assert stored(device).slot(B).state is SlotState.BAD
    found = kinds(device)
    assert found[-3:] == [EventKind.FAILED, EventKind.FAILED, EventKind.ROLLED_BACK]
    assert device.begin(device.maker.update(12)).slot is Slot.B, "it can be tried with another"


def test_what_the_loader_wrote_comes_into_the_history_once(device: Device) -> None:
    made = device.maker.update(11)
    _ = device.stage(made)
    _ = device.switch(made, tries=1)
    _ = device.boot()
    control = BlockBoot(DiskDevice(device.boot_disk))
    record = finished(control.load())
    why = Reason(
        cause=Cause.NOT_READY, slot=B, version=11, boot=record.boots, service="app", detail="late"
    )
    _ = finished(control.store(failed(record, why)))

    _ = device.boot()
    _ = device.start()

    events, _ = device.engine.history.page(0, 3)
    assert [event.kind for event in events] == [
        EventKind.ROLLED_BACK,
        EventKind.FAILED,
        EventKind.SWITCHED,
    ]
    assert "app" in events[1].detail
    assert "late" in events[1].detail


# ------------------------------------------------------------------ the data


def test_data_that_a_set_migrates_are_copied_before_it_is_tried(device: Device) -> None:
    made = device.maker.update(11, schemas={AREA: 2, "/state/new/": 1})
    _ = device.stage(made)

    switched = device.switch(made)

    assert device.memory.copied == [[AREA, "/state/new/"]]
    assert switched.snapshot == stored(device).snapshot == 1


def test_after_a_failed_trial_the_data_are_as_before(device: Device) -> None:
    made = device.maker.update(11, schemas={AREA: 2})
    _ = device.stage(made)
    _ = device.switch(made, tries=1)
    _ = device.boot()
    device.memory.data = b"migrated"

    assert device.boot() is A

    assert device.memory.data == b"old"
    assert device.memory.copies == {}
    record = stored(device)
    assert (record.restore, record.snapshot) == (False, 0)
    assert EventKind.RESTORED in kinds(device)


def test_after_a_commit_the_copy_is_dropped_and_the_data_stay(device: Device) -> None:
    made = device.maker.update(11, schemas={AREA: 2})
    _ = device.stage(made)
    _ = device.switch(made)
    _ = device.boot()
    device.memory.data = b"migrated"

    _ = device.commit(made)
    _ = device.boot()

    assert (device.memory.data, device.memory.copies) == (b"migrated", {})


def test_without_room_for_a_copy_a_set_that_migrates_is_not_tried(device: Device) -> None:
    made = device.maker.update(11, schemas={AREA: 2})
    _ = device.stage(made)
    device.memory.room = False

    assert declined(lambda: device.switch(made)) is UpdatedStatus.NO_SNAPSHOT

    assert stored(device).trying is None
    assert device.boot() is A
    assert kinds(device)[-1] is EventKind.REFUSED
    device.memory.room = True
    assert device.switch(made).snapshot == 1


def test_a_copy_of_a_switch_that_was_not_stored_is_not_taken_for_the_next_ones(
    device: Device,
) -> None:
    made = device.maker.update(11, schemas={AREA: 2})
    _ = device.stage(made)
    writes = device.boot_disk.done[Operation.WRITE]
    device.boot_disk.faults = DiskFaults(
        failures=(Failure(operation=Operation.WRITE, nth=writes + 1),)
    )
    assert declined(lambda: device.switch(made)) is UpdatedStatus.IO_ERROR
    device.memory.data = b"newer"

    switched = device.switch(made)

    assert device.memory.copies == {switched.snapshot: b"newer"}


def test_a_set_that_knows_an_older_schema_than_the_data_have_is_refused(device: Device) -> None:
    device.update(device.maker.update(11, schemas={AREA: 2}))

    for schemas in ({AREA: 1}, {}):
        made = device.maker.update(12, schemas=schemas)
        _ = device.begin(made)
        device.send(made.data)
        assert declined(device.finish) is UpdatedStatus.SCHEMA_OLDER

    assert stored(device).slot(A).state is SlotState.EMPTY


def test_staging_waits_until_the_data_are_restored(device: Device) -> None:
    made = device.maker.update(11, schemas={AREA: 2})
    _ = device.stage(made)
    _ = device.switch(made)
    _ = device.boot()

    back = finished(device.engine.rollback(A, ASKER))

    assert (back.slot, back.restoring) == (Slot.A, True)
    assert declined(lambda: device.begin(device.maker.update(12))) is UpdatedStatus.RESTORING
    device.memory.data = b"migrated"
    assert device.boot() is A
    assert device.memory.data == b"old"


def test_data_are_not_restored_under_the_services_of_the_set_that_was_left(
    device: Device,
) -> None:
    made = device.maker.update(11, schemas={AREA: 2})
    _ = device.stage(made)
    _ = device.switch(made)
    _ = device.boot()
    device.memory.data = b"migrated"
    _ = finished(device.engine.rollback(A, ASKER))

    _ = device.start()  # updated alone: the others are still those of the new set

    assert (device.memory.data, device.memory.restored) == (b"migrated", [])
    assert stored(device).restore
    assert device.boot() is A
    assert (device.memory.data, device.memory.copies) == (b"old", {})


def left_with_data_to_put_back(device: Device, fails: UpdatedStatus) -> None:
    """A trial that migrated data has failed, and the old set runs again."""
    made = device.maker.update(11, schemas={AREA: 2})
    _ = device.stage(made)
    _ = device.switch(made, tries=1)
    _ = device.boot()
    device.memory.data = b"migrated"
    device.memory.restore_fails = fails
    assert device.boot() is A


def test_data_that_cannot_be_put_back_yet_are_put_back_later(device: Device) -> None:
    left_with_data_to_put_back(device, UpdatedStatus.UNAVAILABLE)

    assert (device.engine.opened, device.engine.unrestored) == (True, True)
    assert device.memory.copies, "the way back stays open"
    assert declined(lambda: device.begin(device.maker.update(12))) is UpdatedStatus.RESTORING

    device.memory.restore_fails = None
    finished(device.engine.put_back(ASKER))
    assert (device.memory.data, device.memory.copies) == (b"old", {})
    assert device.begin(device.maker.update(13)).slot is Slot.B


def test_where_the_copy_is_gone_that_is_told_and_the_device_can_be_updated(device: Device) -> None:
    left_with_data_to_put_back(device, UpdatedStatus.NO_SNAPSHOT)

    assert not device.engine.unrestored
    event = device.engine.history.page(0, 1)[0][0]
    assert (event.kind, event.status) == (EventKind.RESTORED, UpdatedStatus.NO_SNAPSHOT)
    assert device.begin(device.maker.update(12)).slot is Slot.B


def test_a_copy_that_a_cut_left_behind_is_put_away(device: Device) -> None:
    device.memory.copies = {5: b"left"}

    _ = device.boot()

    assert device.memory.copies == {}


def test_a_copy_that_cannot_be_put_away_costs_neither_a_start_nor_an_update(
    device: Device,
) -> None:
    device.memory.drop_fails = True  # its head is damaged, or the disk can only be read

    _ = device.boot()

    assert device.engine.opened
    made = device.maker.update(11)
    _ = device.stage(made)
    assert device.switch(made).slot is Slot.B


# ------------------------------------------------------------------ going back


def test_a_switch_that_was_not_booted_is_taken_back_and_stays_staged(device: Device) -> None:
    made = device.maker.update(11, schemas={AREA: 2})
    _ = device.stage(made)
    _ = device.switch(made)

    back = finished(device.engine.rollback(A, ASKER))

    assert (back.slot, back.restoring, back.repeated) == (Slot.A, False, False)
    assert stored(device).slot(B).state is SlotState.STAGED
    assert device.memory.copies == {}
    assert finished(device.engine.rollback(A, ASKER)).repeated
    assert device.switch(made).repeated is False


def test_a_committed_set_is_left_for_the_one_before(device: Device) -> None:
    device.update(device.maker.update(11, schemas={AREA: 1}))

    back = finished(device.engine.rollback(A, ASKER))

    assert back.slot is Slot.A
    assert device.boot() is A
    assert stored(device).reasons[-1].cause is Cause.GIVEN_UP


def test_until_the_way_back_was_booted_the_slot_that_runs_is_not_written(device: Device) -> None:
    device.update(device.maker.update(11))
    running = device.slot_bytes(B)

    _ = finished(device.engine.rollback(A, ASKER))

    assert device.engine.running is B
    assert declined(lambda: device.begin(device.maker.update(12))) is UpdatedStatus.PENDING
    _ = device.start()
    assert declined(lambda: device.begin(device.maker.update(13))) is UpdatedStatus.PENDING
    assert device.slot_bytes(B) == running
    _ = device.boot()
    assert device.begin(device.maker.update(14)).slot is Slot.B


def test_there_is_no_way_back_to_a_set_that_knows_an_older_schema(device: Device) -> None:
    device.update(device.maker.update(11, schemas={AREA: 2}))

    assert declined(lambda: finished(device.engine.rollback(A, ASKER))) is (
        UpdatedStatus.SCHEMA_OLDER
    )
    assert stored(device).active is B


def test_there_is_no_way_back_below_the_floor(device: Device) -> None:
    device.update(device.maker.update(11, schemas={AREA: 1}, floor=11))

    assert stored(device).floor == 11
    assert declined(lambda: finished(device.engine.rollback(A, ASKER))) is UpdatedStatus.NO_TARGET


def test_the_floor_of_a_commit_holds_for_the_very_next_update(device: Device) -> None:
    device.update(device.maker.update(11, schemas={AREA: 1}, floor=11))

    assert declined(lambda: device.begin(device.maker.update(10))) is UpdatedStatus.BELOW_FLOOR


def test_there_is_no_way_back_to_what_was_never_good(device: Device) -> None:
    made = device.maker.update(11)
    assert declined(lambda: finished(device.engine.rollback(B, ASKER))) is UpdatedStatus.NO_TARGET
    _ = device.stage(made)
    assert declined(lambda: finished(device.engine.rollback(B, ASKER))) is UpdatedStatus.NO_TARGET
    _ = device.switch(made)
    assert declined(lambda: finished(device.engine.rollback(B, ASKER))) is UpdatedStatus.NO_TARGET


# ------------------------------------------------------------------ what fails


def test_a_slot_that_cannot_be_written_fails_the_piece_which_can_be_sent_again(
    device: Device,
) -> None:
    made = device.maker.update(11)
    _ = device.begin(made)
    disk = device.slot_disks[B]
    disk.faults = DiskFaults(failures=(Failure(operation=Operation.WRITE, nth=1, done=512),))

    assert declined(lambda: device.take(0, made.data[:1024])) is UpdatedStatus.IO_ERROR

    device.send(made.data)
    assert device.finish().digest == made.digest


def test_a_full_disk_under_the_slot_leaves_the_running_set_alone(device: Device) -> None:
    made = device.maker.update(11)
    _ = device.begin(made)
    device.slot_disks[B].faults = DiskFaults(room=2)
    running = device.slot_bytes(A)

    assert declined(lambda: device.send(made.data)) is UpdatedStatus.IO_ERROR

    assert device.slot_bytes(A) == running
    assert device.boot() is A
    device.slot_disks[B].faults = DiskFaults()
    device.send(made.data, device.begin(made).offset)
    assert device.finish().digest == made.digest


def test_after_a_flush_that_failed_all_since_the_last_one_is_sent_again(device: Device) -> None:
    made = device.maker.update(11)
    _ = device.begin(made)
    _ = device.take(0, made.data[:1024])
    finished(device.engine.sync())
    device.slot_disks[B].faults = DiskFaults(
        failures=(
            Failure(operation=Operation.FLUSH, nth=device.slot_disks[B].done[Operation.FLUSH] + 1),
        )
    )
    device.send(made.data, 1024)

    assert declined(device.finish) is UpdatedStatus.IO_ERROR

    assert device.begin(made).offset == 1024
    device.send(made.data, 1024)
    assert device.finish().digest == made.digest


def test_a_disk_too_slow_for_so_much_at_once_is_given_less_at_a_time(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nexus.services.updated.engine.SYNC_SIZE", 8192)
    monkeypatch.setattr("nexus.services.updated.engine.SYNC_LEAST", 1024)
    _ = device.start()
    made = device.maker.update(11, size=20_000)
    _ = device.begin(made)
    slot = device.slots[B]
    flush = slot.flush

    async def slow() -> None:
        due = sum(len(pending.data) for pending in slot.disk.pending)
        await flush()  # it goes on behind the back of who gave up waiting
        if due > 4096:
            raise DeviceFault(Fault.TIMED_OUT)

    slot.flush = slow  # type: ignore[method-assign]

    assert declined(lambda: device.send(made.data)) is UpdatedStatus.IO_ERROR

    device.send(made.data, device.begin(made).offset)
    assert device.finish().digest == made.digest


def test_a_piece_is_taken_though_statefs_cannot_keep_how_far_it_is(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nexus.services.updated.engine.SYNC_SIZE", 1024)
    _ = device.start()
    made = device.maker.update(11)
    _ = device.begin(made)
    device.memory.failing = {TRANSFER}

    taken = device.take(0, made.data[:1024])

    assert (taken.offset, taken.durable) == (1024, 0)
    device.send(made.data, 1024)
    assert declined(device.finish) is UpdatedStatus.UNAVAILABLE
    device.memory.failing = False
    assert device.finish().digest == made.digest


def test_a_boot_device_that_fails_costs_the_step_and_not_the_transfer(device: Device) -> None:
    made = device.maker.update(11)
    _ = device.begin(made)
    device.send(made.data)
    writes = device.boot_disk.done[Operation.WRITE]
    device.boot_disk.faults = DiskFaults(
        failures=(Failure(operation=Operation.WRITE, nth=writes + 1),)
    )

    assert declined(device.finish) is UpdatedStatus.IO_ERROR

    assert device.finish().digest == made.digest
    assert stored(device).slot(B).state is SlotState.STAGED


def test_a_set_that_a_store_in_doubt_has_staged_is_staged_when_it_is_asked_again(
    device: Device,
) -> None:
    made = device.maker.update(11)
    _ = device.begin(made)
    device.send(made.data)
    reads = device.boot_disk.done[Operation.READ]
    device.boot_disk.faults = DiskFaults(  # it is written, and cannot be read back
        failures=(Failure(operation=Operation.READ, nth=reads + 1),)
    )

    assert declined(device.finish) is UpdatedStatus.IO_ERROR

    assert device.finish().digest == made.digest
    assert stored(device).slot(B).state is SlotState.STAGED


def test_after_a_store_that_failed_the_record_on_the_device_counts(device: Device) -> None:
    made = device.maker.update(11)
    _ = device.stage(made)
    reads = device.boot_disk.done[Operation.READ]
    device.boot_disk.faults = DiskFaults(  # it is written, and cannot be read back
        failures=(Failure(operation=Operation.READ, nth=reads + 1),)
    )

    assert declined(lambda: device.switch(made)) is UpdatedStatus.IO_ERROR

    before = device.engine.record
    finished(device.engine.sure())

    assert before.trying is None, "nothing is told that was not read back"
    assert device.engine.record.trying is B, "it was in force all the same"
    assert device.switch(made).repeated


def test_without_statefs_nothing_is_opened_and_later_it_is(device: Device) -> None:
    device.memory.reads_fail = True

    assert declined(device.start) is UpdatedStatus.UNAVAILABLE
    assert not device.engine.opened

    device.memory.reads_fail = False
    finished(device.engine.open(ASKER))
    assert device.engine.opened


def test_a_set_that_cannot_stand_in_its_slot_is_refused_and_not_read(device: Device) -> None:
    control = BlockBoot(DiskDevice(device.boot_disk))
    record = finished(control.load())
    info = replace(record.slot(A), size=device.engine.capacity(A) + 1)
    _ = finished(control.store(record.with_slot(A, info)))
    _ = device.start()
    made = device.maker.update(11)
    _ = device.begin(made)
    device.send(made.data)

    assert declined(device.finish) is UpdatedStatus.BAD_SET


def test_without_a_record_nothing_is_opened() -> None:
    device = Device()
    device.boot_disk = Disk(device.boot_disk.block_count)

    assert declined(device.start) is UpdatedStatus.NO_BOOT_RECORD


def test_a_history_that_cannot_be_written_holds_up_no_commit_and_is_written_later(
    device: Device,
) -> None:
    made = device.maker.update(11)
    _ = device.stage(made)
    _ = device.switch(made)
    _ = device.boot()
    device.memory.failing = True

    _ = device.commit(made)

    assert stored(device).active is B
    assert device.engine.history.unwritten
    device.memory.failing = False
    finished(device.engine.history.write())
    _ = device.start()
    assert kinds(device)[-1] is EventKind.COMMITTED


@pytest.mark.parametrize("content", [b"", b"\xc1", None])
def test_a_damaged_history_or_transfer_begins_anew(device: Device, content: bytes | None) -> None:
    made = device.maker.update(11)
    _ = device.begin(made)
    _ = device.take(0, made.data[:512])
    finished(device.engine.sync())
    for key in (HISTORY, TRANSFER):
        if content is None:
            device.memory.damaged.add(key)
        else:
            device.memory.values[key] = content

    _ = device.start()

    assert device.engine.history.damaged
    assert device.engine.history.last == 0
    assert device.begin(made).offset == 0
    device.send(made.data)
    assert device.finish().digest == made.digest


@pytest.mark.parametrize(
    "changes", [{"durable": 100}, {"durable": 1 << 40}, {"size": 1 << 40}, {"slot": Slot.NONE}]
)
def test_a_kept_transfer_that_cannot_be_begins_anew(
    device: Device, changes: dict[str, object]
) -> None:
    made = device.maker.update(11)
    _ = device.begin(made)
    kept = finished(read_transfer(device.memory))
    assert kept is not None
    finished(write_transfer(device.memory, msgspec.structs.replace(kept, **changes)))

    _ = device.start()

    assert device.engine.transfer().phase is Phase.IDLE
    assert device.stage(made).digest == made.digest


# ------------------------------------------------------------------ bounds


def test_many_updates_leave_no_garbage(device: Device) -> None:
    sizes = set()
    for version in range(11, 31):
        device.update(device.maker.update(version, schemas={AREA: version}))
        sizes.add(len(device.memory.values[HISTORY]) // 1024)
        assert set(device.memory.values) == {TRUST, HISTORY}
        assert device.memory.copies == {}

    events, more = device.engine.history.page(0, HISTORY_KEPT)
    assert (len(events), more) == (HISTORY_KEPT, False)
    assert device.engine.history.last == 4 * 20
    assert max(sizes) < 8
    assert len(stored(device).reasons) <= 4


def test_the_history_is_told_in_pages_the_latest_first(device: Device) -> None:
    device.update(device.maker.update(11))
    history = device.engine.history

    first, more = history.page(0, 3)
    rest, none = history.page(first[-1].number, 3)

    assert [event.number for event in (*first, *rest)] == [4, 3, 2, 1]
    assert (more, none) == (True, False)


def test_reading_a_slot_takes_one_window_of_memory_at_a_time() -> None:
    blocks = 3 * WINDOW_SIZE // BLOCK_SIZE
    disk = Disk(blocks)
    disk.write(0, bytes(range(256)) * (blocks * 2))
    device = DiskDevice(disk)
    asked: list[int] = []
    read = device.read

    async def noted(block: int, count: int) -> bytes:
        asked.append(count * BLOCK_SIZE)
        return await read(block, count)

    device.read = noted  # type: ignore[method-assign]
    size = blocks * BLOCK_SIZE - 100
    source = SlotSource(device, size)

    whole = b"".join(finished(source.read_at(at, 70_000)) for at in range(0, size, 70_000))

    assert whole == disk.image()[:size]
    assert finished(source.read_at(size, 10)) == b""
    assert max(asked) <= WINDOW_SIZE + BLOCK_SIZE
    assert len(asked) <= 4

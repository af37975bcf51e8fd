"""Where a boot-control record is kept: both backends, what damages them, and what they refuse."""

import zlib
from dataclasses import replace
from random import Random  # noqa: TID251 (seeded)

import pytest

from nexus.abi import BLOCK_SIZE
from nexus.bootctl import (
    ANCHOR_SIZE_MAX,
    COUNT_MAX,
    BlockBoot,
    BootControl,
    BootRecord,
    Cause,
    EnvironmentBoot,
    NoAnchor,
    NoBootRecord,
    Reason,
    SlotName,
    SlotState,
    attempt,
    block,
    environment,
    open_boot,
    staged,
    staging,
    switch,
)
from nexus.bootctl.block import COPIES, COPY_SIZE, Other, decode_record, encode_record
from nexus.bootctl.environment import (
    DATA_SIZE,
    ENVIRONMENT_COPIES,
    ENVIRONMENT_SIZE,
    Copy,
    decode_environment,
    encode_environment,
    variables_of,
)
from nexus.drivers import DeviceFault, Fault, finished
from nexus.drivers.crc import crc32c
from nexus.kernel.sim.disk import Disk, DiskFaults, Failure, Operation
from nexus.proof.powercut import DiskDevice
from tests.fakes.bootrecords import BACKENDS, BOOT_BLOCKS, a_reason, a_set, new


def fresh(backend: str, disk: Disk | None = None) -> tuple[Disk, BootControl, BootRecord]:
    """A provisioned boot device."""
    disk = disk or Disk(BOOT_BLOCKS)
    boot = BACKENDS[backend](DiskDevice(disk))
    return disk, boot, finished(boot.create(new()))


def again(backend: str, disk: Disk) -> BootRecord:
    """What another process finds."""
    return finished(BACKENDS[backend](DiskDevice(disk)).load())


def next_of(record: BootRecord) -> BootRecord:
    return attempt(record)[0]


def longest() -> BootRecord:
    """A record with every text at its longest, in bytes that cost the most."""
    reason = Reason(
        cause=Cause.PROVISIONED,
        slot=SlotName.B,
        version=COUNT_MAX,
        boot=COUNT_MAX,
        wall=COUNT_MAX,
        trace=b"\xff" * 16,
        service="s" * 100,
        detail="\x01" * 300,
        tail="\x01" * 2000,
    )
    info = replace(a_set(1), version=COUNT_MAX, size=COUNT_MAX, name="n" * 48, state=SlotState.GOOD)
    return replace(new(), slots=(info, info), reasons=(reason,) * 4)


# ---------------------------------------------------------------- both backends


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_was_stored_is_what_another_process_finds(backend: str) -> None:
    disk, boot, record = fresh(backend)

    stored = finished(boot.store(next_of(record)))

    assert again(backend, disk) == stored
    assert stored == replace(next_of(record), sequence=record.sequence + 1)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_device_says_which_backend_it_has(backend: str) -> None:
    disk, _, record = fresh(backend)

    boot, found = finished(open_boot(DiskDevice(disk)))

    assert isinstance(boot, BACKENDS[backend])  # type: ignore[arg-type]  # they are classes
    assert found == record


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_stored_record_is_on_the_medium_when_it_is_answered(backend: str) -> None:
    disk, boot, record = fresh(backend)

    stored = finished(boot.store(next_of(record)))

    assert disk.pending == ()
    assert again(backend, Disk(BOOT_BLOCKS, disk.durable_image())) == stored


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_empty_device_has_no_record_and_is_not_written_to(backend: str) -> None:
    disk = Disk(BOOT_BLOCKS)

    with pytest.raises(NoBootRecord):
        _ = again(backend, disk)
    with pytest.raises(NoBootRecord, match=r"no record: copy 1: there is none.*no U-Boot"):
        _ = finished(open_boot(DiskDevice(disk)))

    assert disk.done[Operation.WRITE] == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_device_that_is_too_small_is_refused(backend: str) -> None:
    with pytest.raises(NoBootRecord, match="has 128 blocks"):
        _ = again(backend, Disk(BOOT_BLOCKS - 1))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_successor_of_another_record_is_never_stored(backend: str) -> None:
    _, boot, record = fresh(backend)
    _ = finished(boot.store(next_of(record)))

    with pytest.raises(AssertionError, match="successor of another record"):
        _ = finished(boot.store(next_of(record)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_is_stored_before_it_was_looked_what_is_there(backend: str) -> None:
    disk, _, record = fresh(backend)

    with pytest.raises(AssertionError, match="is loaded before"):
        _ = finished(BACKENDS[backend](DiskDevice(disk)).store(next_of(record)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_failed_write_is_told_and_the_record_is_looked_up_again(backend: str) -> None:
    disk, boot, record = fresh(backend)
    nth = disk.done[Operation.WRITE] + 1
    disk.faults = DiskFaults(failures=(Failure(operation=Operation.WRITE, nth=nth),))

    with pytest.raises(DeviceFault) as caught:
        _ = finished(boot.store(next_of(record)))

    assert caught.value.fault is Fault.IO
    with pytest.raises(AssertionError, match="is loaded before"):
        _ = finished(boot.store(next_of(record)))
    assert finished(boot.load()) == record
    assert finished(boot.store(next_of(record))).boots == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_write_the_disk_only_claims_to_have_made_is_found_out(backend: str) -> None:
    disk, boot, record = fresh(backend)
    disk.faults = DiskFaults(lost=frozenset({disk.done[Operation.WRITE] + 1}))

    with pytest.raises(DeviceFault, match="does not come back"):
        _ = finished(boot.store(next_of(record)))

    assert again(backend, disk) == record


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_copy_that_cannot_be_read_is_no_obstacle(backend: str) -> None:
    disk, boot, record = fresh(backend)
    stored = finished(boot.store(next_of(record)))
    copies = COPIES if backend == "block" else ENVIRONMENT_COPIES
    unreadable = {each for each in copies if again_without(backend, disk, each) == stored}

    assert unreadable, "at least one of the copies can be missed"


def again_without(backend: str, disk: Disk, block_lost: int) -> BootRecord:
    left = Disk(
        BOOT_BLOCKS, disk.image(), faults=DiskFaults(unreadable=frozenset({block_lost + 1}))
    )
    return again(backend, left)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_device_can_be_provisioned_over_whatever_was_there(backend: str) -> None:
    disk, boot, record = fresh(backend)
    for _ in range(3):
        record = finished(boot.store(next_of(record)))

    other = finished(BACKENDS[backend](DiskDevice(disk)).create(new(9)))

    assert other.sequence > record.sequence
    assert again(backend, disk).slot(SlotName.A).version == 9


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_longest_record_there_can_be_is_stored(backend: str) -> None:
    disk, boot, _ = fresh(backend)

    stored = finished(boot.create(longest()))

    assert again(backend, disk) == stored
    assert len(stored.reasons) == 4


# ---------------------------------------------------------------- the block's two copies


def test_both_copies_hold_the_record() -> None:
    _, boot, record = fresh("block")
    assert isinstance(boot, BlockBoot)

    stored = finished(boot.store(next_of(record)))

    assert finished(boot.copies()) == (stored, stored)


def test_any_single_rotten_bit_of_a_copy_costs_nothing() -> None:
    disk, _, record = fresh("block")
    source = Random(1)

    for copy in COPIES:
        for at in [*range(24), *(source.randrange(COPY_SIZE) for _ in range(40))]:
            rotten = Disk(BOOT_BLOCKS, disk.image())
            rotten.rot(copy * BLOCK_SIZE + at, 1 << source.randrange(8))
            assert again("block", rotten) == record


def test_a_rotten_copy_is_mended_by_the_next_record() -> None:
    disk, _, record = fresh("block")
    disk.rot(COPIES[0] * BLOCK_SIZE + 30)
    boot = BlockBoot(DiskDevice(disk))
    assert finished(boot.load()) == record

    stored = finished(boot.store(next_of(record)))

    assert finished(boot.copies()) == (stored, stored)


@pytest.mark.parametrize("rotten", [0, 1])
def test_the_only_whole_copy_is_written_last(rotten: int) -> None:
    disk, _, record = fresh("block")
    disk.rot(COPIES[rotten] * BLOCK_SIZE + 30)
    boot = BlockBoot(DiskDevice(disk))
    assert finished(boot.load()) == record
    nth = disk.done[Operation.WRITE] + 1
    disk.faults = DiskFaults(failures=(Failure(operation=Operation.WRITE, nth=nth, done=64),))

    with pytest.raises(DeviceFault):
        _ = finished(boot.store(next_of(record)))

    assert again("block", disk) == record


@pytest.mark.parametrize("newer", [0, 1])
def test_of_two_whole_copies_the_one_with_the_higher_sequence_is_in_force(newer: int) -> None:
    before = replace(new(), sequence=4)
    after = replace(next_of(before), sequence=5)
    disk = Disk(BOOT_BLOCKS)

    disk.write(COPIES[newer], encode_record(after), durable=True)
    disk.write(COPIES[1 - newer], encode_record(before), durable=True)

    assert again("block", disk) == after


def test_two_damaged_copies_are_refused_with_the_reason_of_each() -> None:
    disk, _, _ = fresh("block")
    disk.rot(COPIES[0] * BLOCK_SIZE + 30)
    disk.rot(COPIES[1] * BLOCK_SIZE)

    with pytest.raises(NoBootRecord, match=r"copy 1: its checksum is wrong; copy 2: there is none"):
        _ = again("block", disk)


def resealed(copy: bytes) -> bytes:
    return copy[:4] + crc32c(copy[8:]).to_bytes(4, "little") + copy[8:]


def patched(at: int, data: bytes) -> bytes:
    copy = bytearray(encode_record(new()))
    copy[at : at + len(data)] = data
    return resealed(bytes(copy))


@pytest.mark.parametrize(
    ("copy", "problem"),
    [
        (bytes(COPY_SIZE), "there is none"),
        (b"\xff" * COPY_SIZE, "there is none"),
        (patched(8, b"\x02"), "its format is 2, not 1"),
        (patched(12, b"\xff\xff"), "it is larger than its copy"),
        (patched(12, b"\x00\x00"), "it is no record: Input data was truncated"),
        (patched(16, b"\x01"), "it is none that is ever written"),
        (patched(COPY_SIZE - 1, b"\x01"), "it is none that is ever written"),
        (patched(24, b"\xc1"), "it is no record: MessagePack data is malformed"),
    ],
)
def test_a_copy_that_is_not_ours_to_the_byte_is_refused(copy: bytes, problem: str) -> None:
    found = decode_record(copy)

    assert isinstance(found, Other)
    assert found.problem.startswith(problem)


def test_an_unknown_field_is_refused() -> None:
    body = bytearray(encode_record(new())[24:])
    assert body[0] == 0x89, "a map of nine"
    body[0] += 1
    size = len(body.rstrip(b"\0"))
    body[size : size + 3] = b"\xa1x\x01"
    copy = bytearray(encode_record(new()))
    copy[12:16] = (size + 3).to_bytes(4, "little")
    copy[24:] = body

    found = decode_record(resealed(bytes(copy)))

    assert isinstance(found, Other)
    assert found.problem == "it is none that is ever written"


def test_a_newer_format_is_not_undone_by_the_older_copy() -> None:
    disk, _, record = fresh("block")
    newer = bytearray(encode_record(replace(record, sequence=record.sequence + 1)))
    newer[8] = 2
    disk.write(COPIES[1], resealed(bytes(newer)), durable=True)

    with pytest.raises(NoBootRecord, match="copy 2: its format is 2, not 1"):
        _ = again("block", disk)


def test_a_record_that_is_none_is_never_written() -> None:
    _, boot, record = fresh("block")

    with pytest.raises(AssertionError, match="the active slot is in trial"):
        _ = finished(boot.store(replace(record, trying=SlotName.A)))


# ---------------------------------------------------------------- the environment


def variables(disk: Disk) -> dict[str, str]:
    """Of the copy with the higher flags."""
    copies = []
    for at in ENVIRONMENT_COPIES:
        found = decode_environment(disk.read(at, ENVIRONMENT_SIZE // BLOCK_SIZE))
        if isinstance(found, Copy):
            copies.append(found)
    return max(copies, key=lambda copy: copy.flags).variables


def with_environment(flags: int, values: dict[str, str], *, copy: int = 0) -> Disk:
    disk = Disk(BOOT_BLOCKS)
    disk.write(ENVIRONMENT_COPIES[copy], encode_environment(flags, values), durable=True)
    return disk


def test_the_other_variables_of_an_environment_stay() -> None:
    others = {"bootcmd": "run boot_${nexus_active}", "bootdelay": "2", "odd": "\xff\x01"}
    disk, boot, record = fresh("environment", with_environment(7, others))

    _ = finished(boot.store(next_of(record)))

    found = variables(disk)
    assert {name: found[name] for name in others} == others
    assert found["nexus_boots"] == "1"


def test_the_record_in_an_environment_is_text_that_people_read() -> None:
    disk, boot, record = fresh("environment")
    record = staged(staging(record), a_set(2))
    reason = a_reason(Cause.SWITCHED, SlotName.B, record, tail="one\ntwo\\\x1b[0m ü")
    _ = finished(boot.store(switch(record, 2, reason)))

    found = variables(disk)

    assert (found["nexus_active"], found["nexus_trying"], found["nexus_b_tries"]) == ("a", "b", "2")
    assert (found["nexus_a_state"], found["nexus_b_state"]) == ("good", "staged")
    assert found["nexus_b_digest"] == "02" * 32
    assert found["nexus_reason_1_cause"] == "switched"
    assert found["nexus_reason_1_tail"].encode("latin-1") == "one\\ntwo\\\\\\x1b[0m ü".encode()
    assert again("environment", disk).reasons[-1].tail == "one\ntwo\\\x1b[0m ü"


@pytest.mark.parametrize("flags", [0, 1, 127, 254, 255])
def test_the_flags_of_the_newer_copy_are_one_higher_and_start_again_at_0(flags: int) -> None:
    disk = with_environment(flags, variables_of(replace(new(), sequence=5)))
    boot = EnvironmentBoot(DiskDevice(disk))

    record = finished(boot.load())
    for _ in range(3):
        record = finished(boot.store(next_of(record)))
        assert again("environment", disk) == record


@pytest.mark.parametrize(
    ("flags", "newer"), [((7, 8), 1), ((8, 7), 0), ((255, 0), 1), ((0, 255), 0)]
)
def test_of_two_copies_of_one_record_the_flags_say_which_is_newer(
    flags: tuple[int, int], newer: int
) -> None:
    """Somebody has set another variable, and left ours as they are."""
    record = variables_of(replace(new(), sequence=5))
    disk = Disk(BOOT_BLOCKS)
    for copy, at in enumerate(ENVIRONMENT_COPIES):
        data = encode_environment(flags[copy], {**record, "bootdelay": str(copy)})
        disk.write(at, data, durable=True)
    boot = EnvironmentBoot(DiskDevice(disk))

    _ = finished(boot.store(next_of(finished(boot.load()))))

    written = disk.read(ENVIRONMENT_COPIES[1 - newer], ENVIRONMENT_SIZE // BLOCK_SIZE)
    found = decode_environment(written)
    assert isinstance(found, Copy)
    assert (found.variables["nexus_boots"], found.variables["bootdelay"]) == ("1", str(newer))


def test_a_lone_flags_byte_does_not_bring_an_older_record_back() -> None:
    disk, boot, record = fresh("environment")
    record = finished(boot.store(next_of(record)))
    before = bytearray(disk.image())
    stored = finished(boot.store(next_of(record)))
    at = next(
        each * BLOCK_SIZE + 4
        for each in ENVIRONMENT_COPIES
        if disk.image()[each * BLOCK_SIZE] != before[each * BLOCK_SIZE]
    )
    before[at] = disk.image()[at]  # of the write nothing but the flags arrived

    found = again("environment", Disk(BOOT_BLOCKS, bytes(before)))

    assert found == record
    assert stored.sequence == record.sequence + 1


@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [
        ("nexus_format", "2", "nexus_format is '2', not one of 1"),
        ("nexus_sequence", "", "nexus_sequence is '', not a number"),
        ("nexus_sequence", "01", "nexus_sequence is '01', not a number"),
        ("nexus_boots", "-1", "nexus_boots is '-1', not a number"),
        ("nexus_floor", str(1 << 63), "nexus_floor is"),
        ("nexus_active", "c", "nexus_active is 'c', not one of a, b"),
        ("nexus_trying", "a", "the active slot is in trial"),
        ("nexus_trying", "b", "slot b is in trial and not bootable"),
        ("nexus_restore", "yes", "nexus_restore is 'yes', not one of 0, 1"),
        ("nexus_a_state", "Good", "nexus_a_state is 'Good', not one of empty"),
        ("nexus_a_digest", "01", "nexus_a_digest is '01', not 32 bytes"),
        ("nexus_a_name", "n" * 49, "nexus_a_name has more than 48 bytes"),
        ("nexus_a_name", "\xff", "nexus_a_name is no text"),
        ("nexus_reason_1_cause", "because", "nexus_reason_1_cause is 'because', not one of"),
        ("nexus_reason_1_detail", "d" * 201, "nexus_reason_1_detail has more than 200"),
    ],
)
def test_a_variable_that_is_not_understood_is_named(name: str, value: str, problem: str) -> None:
    disk = with_environment(1, {**variables_of(new()), name: value})

    with pytest.raises(NoBootRecord) as caught:
        _ = again("environment", disk)

    assert str(caught.value).startswith(problem)


def test_what_others_set_meanwhile_is_kept() -> None:
    disk, boot, record = fresh("environment")
    here = variables(disk)
    data = encode_environment(2, {**here, "bootdelay": "7"})
    disk.write(ENVIRONMENT_COPIES[1], data, durable=True)

    _ = finished(boot.store(next_of(record)))

    assert variables(disk)["bootdelay"] == "7"


def test_where_others_leave_little_room_the_oldest_tails_go_first() -> None:
    reasons = tuple(
        replace(a_reason(Cause.LOST, SlotName.A, new()), boot=boot, tail="t" * 900)
        for boot in range(4)
    )
    room = DATA_SIZE - len(str(variables_of(replace(new(), reasons=reasons))))
    disk = with_environment(1, {"script": "x" * (room + 1500)})

    stored = finished(EnvironmentBoot(DiskDevice(disk)).create(replace(new(), reasons=reasons)))

    assert len(stored.reasons[-1].tail) == 900
    assert stored.reasons[0].tail == ""
    assert len(stored.reasons) == 4
    assert again("environment", disk) == stored


def test_an_environment_without_room_is_refused_and_stays() -> None:
    disk = with_environment(1, {"script": "x" * (DATA_SIZE - 100)})
    before = disk.image()

    with pytest.raises(DeviceFault, match="leave no room"):
        _ = finished(EnvironmentBoot(DiskDevice(disk)).create(new()))

    assert disk.image() == before


def test_an_environment_that_cannot_be_read_again_is_a_fault_of_its_device() -> None:
    disk, boot, record = fresh("environment")
    for first in ENVIRONMENT_COPIES:
        disk.write(first, bytes(ENVIRONMENT_SIZE), durable=True)

    with pytest.raises(DeviceFault, match="its checksum is wrong"):
        _ = finished(boot.store(next_of(record)))


def test_a_copy_with_a_wrong_checksum_is_none() -> None:
    copy = bytearray(encode_environment(1, {"a": "b"}))
    assert decode_environment(bytes(copy)) == Copy(1, {"a": "b"})
    copy[4] = 9
    assert decode_environment(bytes(copy)) == Copy(9, {"a": "b"}), "flags are outside of it"
    copy[5] ^= 1

    assert decode_environment(bytes(copy)) == "its checksum is wrong"


def test_an_environment_is_read_up_to_its_end_and_the_last_of_a_name_counts() -> None:
    data = b"a=1\0a=2\0odd\0=x\0b=\0\0c=3\0".ljust(DATA_SIZE, b"\0")
    copy = zlib.crc32(data).to_bytes(4, "little") + b"\x01" + data

    assert decode_environment(copy) == Copy(1, {"a": "2", "b": ""})


# ---------------------------------------------------------------- the anchor


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [1, 5000, ANCHOR_SIZE_MAX])
def test_an_anchor_stays_beside_the_record(backend: str, size: int) -> None:
    disk, boot, record = fresh(backend)
    anchor = Random(size).randbytes(size)

    finished(boot.write_anchor(anchor))
    stored = finished(boot.store(next_of(record)))

    assert finished(boot.read_anchor()) == anchor
    assert again(backend, disk) == stored


@pytest.mark.parametrize("copy", [64, 96])
def test_one_rotten_copy_of_the_anchor_costs_nothing_and_two_are_refused(copy: int) -> None:
    disk, boot, _ = fresh("block")
    finished(boot.write_anchor(b"root"))

    disk.rot(copy * BLOCK_SIZE + 17)
    assert finished(boot.read_anchor()) == b"root"
    disk.rot((160 - copy) * BLOCK_SIZE + 17)

    with pytest.raises(NoAnchor, match="copy 1: its checksum is wrong; copy 2: its checksum"):
        _ = finished(boot.read_anchor())


def test_a_device_without_an_anchor_trusts_nothing() -> None:
    _, boot, _ = fresh("block")

    with pytest.raises(NoAnchor, match="there is none"):
        _ = finished(boot.read_anchor())


def test_an_anchor_that_is_too_large_is_a_bug_of_who_provisions() -> None:
    _, boot, _ = fresh("block")

    with pytest.raises(AssertionError, match="an anchor of"):
        finished(boot.write_anchor(bytes(ANCHOR_SIZE_MAX + 1)))


def test_the_parts_of_a_boot_device_do_not_overlap() -> None:
    for copies, blocks in (
        (COPIES, block.COPY_BLOCKS),
        (ENVIRONMENT_COPIES, environment.ENVIRONMENT_BLOCKS),
    ):
        assert copies[0] + blocks <= copies[1]
        assert copies[1] + blocks <= 64

"""What a boot loader has counted: `attempt` takes it up, and no boot costs two tries."""

from dataclasses import replace

import pytest

from nexus.bootctl import (
    TRIES_MAX,
    BlockBoot,
    BootRecord,
    Cause,
    Counted,
    EnvironmentBoot,
    NoBootRecord,
    SlotName,
    SlotState,
    attempt,
    problem_of,
    staged,
    staging,
    switch,
)
from nexus.bootctl.environment import variables_of
from nexus.drivers import finished
from nexus.kernel.sim.disk import Disk
from nexus.proof.powercut import DiskDevice
from tests.fakes.bootrecords import BOOT_BLOCKS, a_reason, a_set, new

A, B = SlotName.A, SlotName.B


def switched(tries: int = 2) -> BootRecord:
    record = staged(staging(new()), a_set(20))
    return switch(record, tries, a_reason(Cause.SWITCHED, B, record))


def counted(record: BootRecord) -> BootRecord:
    """What a boot loader's script makes of a record before it starts a kernel."""
    info = record.slot(B)
    boots = 0 if record.counted is None else record.counted.boots
    if not info.tries_left:
        return replace(record, counted=Counted(boots=boots, slot=A))
    record = record.with_slot(B, replace(info, tries_left=info.tries_left - 1))
    return replace(record, counted=Counted(boots=boots + 1, slot=B))


def causes(record: BootRecord) -> list[Cause]:
    return [reason.cause for reason in record.reasons]


def test_a_boot_that_a_boot_loader_has_counted_is_not_counted_again() -> None:
    alone = attempt(switched())

    assert attempt(counted(switched())) == alone


def test_every_boot_of_a_trial_is_the_same_whoever_counts() -> None:
    alone = both = switched()
    names = []

    for _ in range(4):
        alone, first = attempt(alone)
        # Without a trial a boot loader writes nothing.
        both, second = attempt(counted(both) if both.trying else both)
        names.append((first, second))
        assert both == alone

    assert names == [(B, B), (B, B), (A, A), (A, A)]


def test_boots_that_never_came_to_the_loader_are_lost_one_by_one() -> None:
    record = counted(counted(counted(switched())))

    back, name = attempt(record)

    assert name is A
    assert causes(back)[-3:] == [Cause.LOST, Cause.LOST, Cause.ROLLED_BACK]
    assert [reason.boot for reason in back.reasons[-3:]] == [1, 2, 3]
    assert (back.boots, back.slot(B).attempts, back.slot(B).state) == (3, 2, SlotState.BAD)


def test_a_boot_after_a_lost_one_is_the_second_try() -> None:
    tried, name = attempt(counted(counted(switched())))

    assert name is B
    assert causes(tried)[-1] is Cause.LOST
    assert (tried.boots, tried.slot(B).attempts, tried.slot(B).tries_left) == (2, 2, 0)
    assert tried.counted is None


def test_data_that_a_lost_boot_may_have_changed_go_back() -> None:
    record = staged(staging(new()), a_set(20))
    record = switch(record, 1, a_reason(Cause.SWITCHED, B, record), snapshot=7)

    back, _ = attempt(counted(counted(record)))

    assert (back.snapshot, back.restore) == (7, True)


def test_without_a_good_slot_a_trial_goes_on_and_takes_no_try() -> None:
    record = switched(1)
    record = counted(record.with_slot(A, replace(record.slot(A), state=SlotState.BAD)))
    record, _ = attempt(record)

    record, name = attempt(replace(record, counted=Counted(boots=0, slot=B)))

    assert name is B
    assert record.slot(B).tries_left == 0


@pytest.mark.parametrize("boots", [0, 1, 2])
@pytest.mark.parametrize("slot", [A, B])
def test_a_count_is_kept_in_the_environment_until_it_is_taken_up(
    boots: int, slot: SlotName
) -> None:
    control = EnvironmentBoot(DiskDevice(Disk(BOOT_BLOCKS)))
    record = replace(switched(), counted=Counted(boots=boots, slot=slot))

    stored = finished(control.create(record))

    assert finished(control.load()) == stored
    assert stored.counted == record.counted
    taken = finished(control.store(attempt(stored)[0]))
    assert taken.counted is None
    assert not {"nexus_counted", "nexus_booting"} & variables_of(taken).keys()


def test_more_boots_than_a_trial_has_are_no_count() -> None:
    record = replace(switched(), counted=Counted(boots=TRIES_MAX + 1, slot=B))

    assert problem_of(record) == f"{TRIES_MAX + 1} boots are counted, more than a trial has"


def test_the_block_keeps_no_count() -> None:
    control = BlockBoot(DiskDevice(Disk(BOOT_BLOCKS)))

    with pytest.raises(AssertionError, match="in its own environment"):
        _ = finished(control.create(replace(switched(), counted=Counted(boots=1, slot=B))))
    with pytest.raises(NoBootRecord):
        _ = finished(control.load())

"""What a boot-control record may become: each transition, and each one that is refused."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest

from nexus.abi import Nanos
from nexus.bootctl import (
    COUNT_MAX,
    COUNTER_LAST,
    DETAIL_SIZE_MAX,
    NAME_SIZE_MAX,
    REASONS_MAX,
    TAIL_SIZE_MAX,
    TRIES_MAX,
    BootRecord,
    BootRefused,
    BootStatus,
    Cause,
    Reason,
    SlotInfo,
    SlotName,
    SlotState,
    attempt,
    commit,
    damaged,
    failed,
    problem_of,
    restored,
    rollback,
    slot_boot,
    staged,
    staging,
    switch,
)
from tests.fakes.bootrecords import a_reason, a_set, new

A, B = SlotName.A, SlotName.B
Step = Callable[[BootRecord], BootRecord]


def with_staged(record: BootRecord, version: int = 2, *, floor: int = 0) -> BootRecord:
    return staged(staging(record), a_set(version, floor=floor))


def switched(record: BootRecord, tries: int = 2, *, snapshot: int = 0) -> BootRecord:
    reason = a_reason(Cause.SWITCHED, record.standby, record)
    return switch(record, tries, reason, snapshot=snapshot)


def committed(record: BootRecord) -> BootRecord:
    assert record.trying is not None
    return commit(record, record.trying, a_reason(Cause.COMMITTED, record.trying, record))


def in_trial(tries: int = 2, *, snapshot: int = 0) -> BootRecord:
    record, slot = attempt(switched(with_staged(new()), tries, snapshot=snapshot))
    assert slot is B
    return record


def refusal(step: Callable[[], object]) -> BootStatus:
    with pytest.raises(BootRefused) as caught:
        _ = step()
    return caught.value.status


# ---------------------------------------------------------------- the good way


def test_a_new_device_boots_what_it_was_provisioned_with() -> None:
    record, slot = attempt(new())

    assert slot is A
    assert record.slot(A).state is SlotState.GOOD
    assert (record.boots, record.trying) == (1, None)


def test_a_good_set_goes_through_the_standby_slot_and_is_committed() -> None:
    record = with_staged(new())
    assert (record.slot(B).state, record.active) == (SlotState.STAGED, A)

    record = switched(record)
    assert (record.trying, record.active, record.slot(B).tries_left) == (B, A, 2)

    record, slot = attempt(record)
    assert slot is B
    assert (record.slot(B).state, record.slot(B).tries_left) == (SlotState.TRYING, 1)

    record = committed(record)
    assert (record.active, record.trying, record.slot(B).state) == (B, None, SlotState.GOOD)
    assert attempt(record)[1] is B


def test_tries_are_counted_down_before_the_boot_and_the_last_one_is_booted() -> None:
    record = switched(with_staged(new()), 1)

    record, slot = attempt(record)

    assert (slot, record.slot(B).tries_left) == (B, 0)


def test_without_a_try_left_the_slot_is_bad_and_the_good_one_boots() -> None:
    record, slot = attempt(in_trial(1))

    assert slot is A
    assert (record.trying, record.slot(B).state) == (None, SlotState.BAD)
    assert record.reasons[-1].cause is Cause.ROLLED_BACK


def test_the_standby_slot_is_always_the_one_that_is_not_proven_good() -> None:
    record = committed(in_trial())

    record = with_staged(record, 3)

    assert (record.active, record.standby) == (B, A)
    assert record.slot(A).version == 3
    assert record.slot(B) == replace(a_set(2), state=SlotState.GOOD, attempts=1)


def test_init_is_told_which_attempt_of_a_trial_it_is() -> None:
    record = in_trial(3, snapshot=9)
    record, slot = attempt(record)

    told = slot_boot(record, slot, Nanos(5))

    assert (told.slot, told.trial, told.attempt, told.deadline, told.snapshot) == (
        "b",
        True,
        2,
        5,
        9,
    )
    assert told.digest == a_set(2).digest.hex()


def test_init_is_told_of_no_attempt_and_no_deadline_without_a_trial() -> None:
    record, slot = attempt(committed(in_trial()))

    told = slot_boot(record, slot, Nanos(5))

    assert (told.slot, told.trial, told.attempt, told.deadline) == ("b", False, 0, 0)


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "step", [staging, lambda record: staged(record, a_set(3)), switched], ids=["1", "2", "3"]
)
@pytest.mark.parametrize("booted", [False, True])
def test_nothing_is_staged_or_switched_while_a_trial_is_not_over(
    *, step: Step, booted: bool
) -> None:
    record = in_trial() if booted else switched(with_staged(new()))

    assert refusal(lambda: step(record)) is BootStatus.TRIAL_PENDING


def test_nothing_is_staged_over_the_only_slot_that_boots() -> None:
    record = damaged(with_staged(new()), A, a_reason(Cause.DAMAGED, A, new()))
    record = replace(record, trying=None).with_slot(B, SlotInfo())

    assert refusal(lambda: staging(record)) is BootStatus.UNPROVEN


def test_nothing_is_staged_before_the_data_are_restored() -> None:
    record, _ = attempt(in_trial(1, snapshot=4))

    assert refusal(lambda: staging(record)) is BootStatus.RESTORING
    assert staging(restored(record)).slot(B) == SlotInfo()


def test_a_slot_that_was_not_cleared_first_is_not_called_staged() -> None:
    record = with_staged(new())

    assert refusal(lambda: staged(record, a_set(3))) is BootStatus.NOT_STAGED


@pytest.mark.parametrize("state", [SlotState.EMPTY, SlotState.BAD, SlotState.GOOD])
def test_only_a_staged_set_is_tried(state: SlotState) -> None:
    record = new().with_slot(B, replace(a_set(2), state=state))

    assert refusal(lambda: switched(record)) is BootStatus.NOT_STAGED


@pytest.mark.parametrize("tries", [0, TRIES_MAX + 1])
def test_a_trial_has_at_least_one_try_and_not_too_many(tries: int) -> None:
    record = with_staged(new())

    assert refusal(lambda: switched(record, tries)) is BootStatus.TRIES


def test_a_trial_that_was_not_booted_cannot_be_committed_or_fail() -> None:
    record = switched(with_staged(new()))
    reason = a_reason(Cause.CRASHED, B, record)

    assert refusal(lambda: committed(record)) is BootStatus.NOT_TRYING
    assert refusal(lambda: failed(record, reason)) is BootStatus.NOT_TRYING


def test_the_old_slot_cannot_commit_the_new_one() -> None:
    record = in_trial()

    reason = a_reason(Cause.COMMITTED, A, record)

    assert refusal(lambda: commit(record, A, reason)) is BootStatus.OTHER_SLOT


def test_a_commit_is_made_once() -> None:
    record = committed(in_trial())

    reason = a_reason(Cause.COMMITTED, B, record)

    assert refusal(lambda: commit(record, B, reason)) is BootStatus.NOT_TRYING


def test_there_is_nothing_to_restore_without_a_rollback() -> None:
    assert refusal(lambda: restored(new())) is BootStatus.NOTHING_TO_RESTORE


def test_a_refused_transition_leaves_the_record_as_it_was() -> None:
    record = in_trial()
    before = replace(record)

    _ = refusal(lambda: staging(record))

    assert record == before


# ---------------------------------------------------------------- the floor


def test_the_floor_rises_with_the_commit_and_not_before() -> None:
    record, _ = attempt(switched(with_staged(new(), 5, floor=4)))
    assert record.floor == 0

    record = committed(record)

    assert record.floor == 4


def test_below_the_floor_nothing_is_staged() -> None:
    record = replace(new(5), floor=5)

    assert refusal(lambda: with_staged(record, 4)) is BootStatus.BELOW_FLOOR
    assert with_staged(record, 5).slot(B).state is SlotState.STAGED


def test_a_set_that_would_be_below_its_own_floor_is_not_staged() -> None:
    assert refusal(lambda: with_staged(new(), 5, floor=6)) is BootStatus.BELOW_FLOOR


def test_a_number_no_record_can_hold_is_refused_before_it_is_stored() -> None:
    record = staging(new())

    for info in (replace(a_set(2), size=COUNT_MAX + 1), replace(a_set(2), version=1 << 63)):
        assert refusal(partial(staged, record, info)) is BootStatus.UNCOUNTABLE


def test_no_way_back_leads_under_the_floor() -> None:
    record = committed(attempt(switched(with_staged(new(), 5, floor=4)))[0])

    assert record.slot(A) == SlotInfo()
    reason = a_reason(Cause.GIVEN_UP, B, record)
    assert refusal(lambda: rollback(record, reason)) is BootStatus.NO_SLOT


def test_a_commit_never_lowers_the_floor() -> None:
    record = replace(new(5), floor=5)

    record = committed(attempt(switched(with_staged(record, 6, floor=0)))[0])

    assert record.floor == 5


def test_a_floor_that_was_raised_meanwhile_holds_for_what_is_staged_and_for_the_way_back() -> None:
    waiting = replace(with_staged(new(), 2), floor=3)
    left = replace(committed(in_trial()), floor=3)
    reason = a_reason(Cause.GIVEN_UP, B, left)

    assert refusal(lambda: switched(waiting)) is BootStatus.BELOW_FLOOR
    assert refusal(lambda: rollback(left, reason)) is BootStatus.BELOW_FLOOR


def test_a_failed_trial_does_not_raise_the_floor() -> None:
    record, _ = attempt(switched(with_staged(new(), 5, floor=4), 1))

    record, slot = attempt(record)

    assert (slot, record.floor) == (A, 0)


# ---------------------------------------------------------------- reasons


def test_how_a_boot_ended_is_kept_and_the_rollback_repeats_who_was_at_fault() -> None:
    record = in_trial(1)
    reason = replace(
        a_reason(Cause.NOT_READY, B, record, detail="after 5s", tail="the last line"),
        service="app",
        trace=b"t" * 16,
    )

    record, _ = attempt(failed(record, reason), wall=77)

    assert record.reasons[-2] == reason
    last = record.reasons[-1]
    assert (last.cause, last.service, last.trace, last.wall) == (
        Cause.ROLLED_BACK,
        "app",
        b"t" * 16,
        77,
    )
    assert last.detail == "not_ready: after 5s"


def test_a_boot_whose_end_nobody_saw_is_remembered_as_lost() -> None:
    record, slot = attempt(in_trial(2))

    assert slot is B
    assert (record.reasons[-1].cause, record.reasons[-1].boot) == (Cause.LOST, 1)


def test_a_boot_whose_end_was_reported_is_not_lost() -> None:
    record = in_trial(2)
    record = failed(record, a_reason(Cause.CRASHED, B, record))

    record, _ = attempt(record)

    assert [each.cause for each in record.reasons].count(Cause.LOST) == 0


def test_only_the_latest_reasons_are_kept() -> None:
    record = in_trial(TRIES_MAX)
    for _ in range(TRIES_MAX - 1):
        record, _ = attempt(record)

    assert len(record.reasons) == REASONS_MAX
    assert {each.cause for each in record.reasons} == {Cause.LOST}


def test_texts_are_clipped_in_bytes_and_a_tail_keeps_its_end() -> None:
    reason = Reason(
        cause=Cause.CRASHED,
        slot=A,
        version=1,
        boot=1,
        service="s" * 100,
        detail="ü" * 150,
        tail="x" * TAIL_SIZE_MAX + "€the end",
    )

    assert reason.service == "s" * NAME_SIZE_MAX
    assert reason.detail == "ü" * (DETAIL_SIZE_MAX // 2)
    assert reason.tail.endswith("€the end")
    assert len(reason.tail.encode()) <= TAIL_SIZE_MAX


def test_a_text_that_is_no_utf_8_is_kept_as_one_that_is() -> None:
    reason = Reason(cause=Cause.CRASHED, slot=A, version=1, boot=1, tail="\udcff!")

    assert reason.tail == "?!"


# ---------------------------------------------------------------- data


def test_a_rollback_asks_for_the_data_of_before_the_trial() -> None:
    record, _ = attempt(in_trial(1, snapshot=4))

    assert (record.restore, record.snapshot) == (True, 4)
    record = restored(record)
    assert (record.restore, record.snapshot) == (False, 0)


def test_a_rollback_without_a_snapshot_restores_nothing() -> None:
    record, _ = attempt(in_trial(1))

    assert not record.restore


def test_nobody_goes_back_before_the_data_are_restored() -> None:
    record, _ = attempt(in_trial(1, snapshot=4))
    record = record.with_slot(B, replace(record.slot(B), state=SlotState.GOOD))
    reason = a_reason(Cause.GIVEN_UP, A, record)

    assert refusal(lambda: rollback(record, reason)) is BootStatus.RESTORING


def test_a_commit_lets_the_snapshot_go() -> None:
    assert committed(in_trial(snapshot=4)).snapshot == 0


def test_with_a_commit_there_is_nothing_to_restore_any_more() -> None:
    """Somebody has set it by hand in a U-Boot environment, or a device was patched together."""
    record = replace(in_trial(snapshot=4), restore=True)
    assert problem_of(record) is None

    record = committed(record)

    assert (record.snapshot, record.restore, problem_of(record)) == (0, False, None)


# ---------------------------------------------------------------- the operator goes back


def test_a_switch_that_was_not_booted_is_taken_back_and_stays_staged() -> None:
    record = switched(with_staged(new()), snapshot=4)

    record = rollback(record, a_reason(Cause.GIVEN_UP, B, record))

    assert (record.trying, record.slot(B).state) == (None, SlotState.STAGED)
    assert (record.snapshot, record.restore) == (0, False), "nothing has changed the data"
    assert attempt(record)[1] is A


def test_a_trial_that_was_booted_is_given_up_for_good() -> None:
    record = in_trial(snapshot=4)

    record = rollback(record, a_reason(Cause.GIVEN_UP, B, record))

    assert (record.trying, record.slot(B).state, record.restore) == (None, SlotState.BAD, True)
    assert attempt(record)[1] is A


def test_a_trial_is_not_given_up_for_a_slot_that_does_not_boot() -> None:
    record = in_trial()
    record = damaged(record, A, a_reason(Cause.DAMAGED, A, record))
    reason = a_reason(Cause.GIVEN_UP, B, record)

    assert refusal(lambda: rollback(record, reason)) is BootStatus.NO_SLOT


def test_a_committed_set_is_left_for_the_good_one_before_it() -> None:
    record = committed(in_trial())

    record = rollback(record, a_reason(Cause.GIVEN_UP, B, record))

    assert record.active is A
    assert record.slot(B).state is SlotState.GOOD
    assert attempt(record)[1] is A


@pytest.mark.parametrize("state", [SlotState.EMPTY, SlotState.STAGED, SlotState.BAD])
def test_there_is_no_way_back_to_a_slot_that_was_never_good(state: SlotState) -> None:
    record = new().with_slot(B, replace(a_set(2), state=state))

    reason = a_reason(Cause.GIVEN_UP, A, record)

    assert refusal(lambda: rollback(record, reason)) is BootStatus.NO_SLOT


# ---------------------------------------------------------------- damage


def test_a_damaged_trial_is_over_at_once() -> None:
    record = in_trial(3, snapshot=4)

    record = damaged(record, B, a_reason(Cause.DAMAGED, B, record))

    assert (record.trying, record.slot(B).state, record.restore) == (None, SlotState.BAD, True)
    assert attempt(record)[1] is A


def test_in_place_of_a_damaged_active_slot_the_other_good_one_boots() -> None:
    record = committed(in_trial())

    record = damaged(record, B, a_reason(Cause.DAMAGED, B, record))

    assert record.active is A
    assert attempt(record)[1] is A


def test_in_place_of_a_damaged_active_slot_a_staged_set_is_tried_without_an_end() -> None:
    record = with_staged(new())
    record = damaged(record, A, a_reason(Cause.DAMAGED, A, record))

    for _ in range(TRIES_MAX):
        record, slot = attempt(record)
        assert slot is B
    record = committed(record)

    assert (record.active, record.slot(B).state) == (B, SlotState.GOOD)


def test_a_trial_goes_on_without_an_end_when_the_way_back_is_damaged() -> None:
    record = in_trial(1)
    record = damaged(record, A, a_reason(Cause.DAMAGED, A, record))

    record, slot = attempt(record)

    assert (slot, record.slot(B).state) == (B, SlotState.TRYING)


def test_with_both_slots_damaged_nothing_boots_and_that_is_said() -> None:
    record = damaged(new(), A, a_reason(Cause.DAMAGED, A, new()))

    assert refusal(lambda: attempt(record)) is BootStatus.NO_SLOT


# ---------------------------------------------------------------- what no record can be


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"floor": COUNT_MAX + 1}, "a number is out of bounds"),
        ({"slots": (a_set(1), replace(a_set(2), size=-1))}, "a number is out of bounds"),
        ({"boots": COUNTER_LAST + 1}, "a counter has come too far"),
        ({"trying": A}, "the active slot is in trial"),
        ({"trying": B}, "slot b is in trial and not bootable"),
        ({"restore": True}, "there is nothing to restore from"),
        ({"slots": (replace(a_set(1), digest=b"short"), SlotInfo())}, "the digest of slot a"),
        ({"slots": (replace(a_set(1), name="n" * 49), SlotInfo())}, "the name of slot a"),
        ({"slots": (replace(a_set(1), tries_left=1), SlotInfo())}, "slot a has 1 tries left"),
        (
            {"slots": (replace(a_set(1), state=SlotState.TRYING), SlotInfo())},
            "slot a is tried without a trial",
        ),
        (
            {"reasons": (replace(a_reason(Cause.LOST, A, new()), trace=b""),)},
            "a trace id has 0 bytes",
        ),
        (
            {"reasons": (a_reason(Cause.LOST, A, new()),) * (REASONS_MAX + 1)},
            "there are too many reasons",
        ),
    ],
)
def test_an_impossible_record_is_told(change: dict[str, object], problem: str) -> None:
    record = replace(new(), **change)  # type: ignore[arg-type]  # the table's own names

    assert (problem_of(record) or "").startswith(problem)


def test_every_record_on_the_way_is_possible() -> None:
    record = new()
    for step in (staging, lambda it: staged(it, a_set(2)), switched, lambda it: attempt(it)[0]):
        record = step(record)
        assert problem_of(record) is None

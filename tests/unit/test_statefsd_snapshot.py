"""statefsd's snapshots as updated sees them, and what it brings back before it serves anybody."""

from typing import Any

import msgspec
import pytest

from nexus.drivers import finished
from nexus.ipc import Refused
from nexus.kernel.sim.disk import Disk, DiskErrorKind, DiskFaults, Failure, Operation
from nexus.proof.powercut import DiskDevice
from nexus.protocols.statefsd import (
    READ_RIGHT,
    SNAPSHOT_AREA,
    SNAPSHOT_AREAS_MAX,
    SNAPSHOT_KEYS_MAX,
    SNAPSHOT_RIGHT,
    WRITE_RIGHT,
    DropSnapshot,
    Durability,
    Get,
    GetSnapshot,
    ListKeys,
    Put,
    Restore,
    Snapshot,
    SnapshotKept,
    SnapshotState,
    StatefsdStatus,
)
from nexus.runtime.program import Unusable
from nexus.services.statefsd.config import Settings
from nexus.services.statefsd.engine import Change, Store
from nexus.services.statefsd.engine import snapshot as copies
from nexus.wire import ReplyStatus
from tests.unit.test_statefsd_service import ME, System, batch, put

ALL = {ME: [READ_RIGHT, WRITE_RIGHT, SNAPSHOT_RIGHT]}
AREA = b"/state/t/"
K = AREA + b"key"
PAGES = SNAPSHOT_AREA.encode()
TAKE = Snapshot([AREA])


def fresh(disk: Disk | None = None, **options: Any) -> System:
    return System(disk, rights=ALL, **options)


def values(system: System, *keys: bytes) -> list[Any]:
    return [
        each.status if isinstance(each, Refused) else each.value
        for each in system.ask(*(Get(key) for key in keys))
    ]


def test_areas_are_copied_brought_back_and_the_copy_given_up() -> None:
    system = fresh()
    _ = system.ask(put(K, b"old"), put(b"/state/u/k", b"old"))

    taken, _, _, kept, back, again, dropped, gone = system.ask(
        TAKE,
        batch((K, b"new"), (AREA + b"more", b"1"), (b"/state/u/k", b"new")),
        Get(K),
        GetSnapshot(),
        Restore(1),
        Restore(1),
        DropSnapshot(1),
        Restore(1),
    )

    assert taken == SnapshotKept(1, SnapshotState.KEPT, [AREA], len(K) + 3 + 5, 1, 2)
    assert kept == taken
    assert back.state is again.state is SnapshotState.RESTORED
    assert dropped == SnapshotKept(1, SnapshotState.NONE, [], 0, 0, 0)
    assert gone == Refused(StatefsdStatus.NO_SNAPSHOT)
    assert values(system, K, AREA + b"more", b"/state/u/k") == [
        b"old",
        StatefsdStatus.NOT_FOUND,
        b"new",
    ]


def test_a_second_snapshot_waits_until_the_first_is_dropped() -> None:
    first, refused, nothing, second = fresh().ask(TAKE, TAKE, DropSnapshot(7), TAKE)

    assert first.snapshot == 1
    assert refused == Refused(StatefsdStatus.SNAPSHOT_EXISTS)
    assert nothing == first
    assert second == Refused(StatefsdStatus.SNAPSHOT_EXISTS)


@pytest.mark.parametrize(
    "areas",
    [
        [b"/state/boot/"],
        [PAGES],
        [AREA, AREA],
        [b"/state/t/deeper/"],
        [b"/state/t"],
        [b"/elsewhere/"],
    ],
)
def test_only_areas_that_may_go_back_are_copied(areas: list[bytes]) -> None:
    system = fresh()

    outcome, kept = system.ask(Snapshot(areas), GetSnapshot())

    assert outcome == Refused(StatefsdStatus.INVALID_KEY)
    assert kept.state is SnapshotState.NONE


def test_more_areas_than_one_takes_are_no_request() -> None:
    areas = [b"/state/%d/" % number for number in range(SNAPSHOT_AREAS_MAX + 1)]

    assert fresh().one(Snapshot(areas)) == Refused(ReplyStatus.MALFORMED)


@pytest.mark.parametrize(
    "request_",
    [TAKE, Restore(1), DropSnapshot(1), GetSnapshot()],
    ids=lambda each: type(each).__name__,
)
def test_without_the_right_nothing_is_done_with_snapshots(request_: Any) -> None:
    system = System(rights={ME: [READ_RIGHT, WRITE_RIGHT]})

    assert system.one(request_) == Refused(ReplyStatus.DENIED)


def test_who_brings_areas_back_needs_the_right_for_each_of_them() -> None:
    pages_alone = [READ_RIGHT, WRITE_RIGHT, f"{SNAPSHOT_RIGHT}:{SNAPSHOT_AREA}"]
    system = System(rights={ME: pages_alone, "taker": [SNAPSHOT_RIGHT]})
    _ = system.ask(put(K, b"old"))
    _ = system.one(TAKE, name="taker")
    _ = system.ask(put(K, b"new"))

    assert system.one(Restore(1)) == Refused(ReplyStatus.DENIED)

    assert values(system, K) == [b"new"]


@pytest.mark.parametrize(
    "change", [put(PAGES + b"head"), batch((PAGES + b"page-00000000", None))], ids=["put", "batch"]
)
def test_nobody_changes_the_pages_of_a_snapshot(change: Any) -> None:
    system = fresh()

    _, refused, kept = system.ask(TAKE, change, GetSnapshot())

    assert refused == Refused(StatefsdStatus.INVALID_KEY)
    assert kept.state is SnapshotState.KEPT


def test_the_pages_are_listed_for_nobody_without_the_right() -> None:
    system = System(rights={ME: [READ_RIGHT, WRITE_RIGHT], "taker": [SNAPSHOT_RIGHT]})
    _ = system.ask(put(K))
    _ = system.one(TAKE, name="taker")

    listed = system.one(ListKeys(b"/state/", b"", 24))

    assert listed.keys == [K]
    assert system.one(Get(PAGES + b"head")) == Refused(ReplyStatus.DENIED)


def test_a_copy_for_which_there_is_no_room_is_refused_and_leaves_nothing() -> None:
    system = fresh()
    filled = 0
    while not isinstance(system.one(put(AREA + b"%d" % filled, bytes(7000))), Refused):
        filled += 1

    outcome, kept = system.ask(TAKE, GetSnapshot())

    assert filled > 10
    assert outcome == Refused(StatefsdStatus.NO_SPACE)
    assert kept.state is SnapshotState.NONE


def test_too_many_keys_are_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    assert copies.KEYS_MAX == SNAPSHOT_KEYS_MAX
    monkeypatch.setattr(copies, "KEYS_MAX", 2)
    system = fresh()
    _ = system.ask(*(put(AREA + b"%d" % n) for n in range(3)))

    assert system.one(TAKE) == Refused(StatefsdStatus.NO_SPACE)


def test_what_others_have_just_staged_is_in_the_copy() -> None:
    system = fresh()

    stored, taken = system.together(Put(K, b"staged", Durability.ACCEPTED, 0), TAKE)

    assert stored.sequence == taken.sequence
    assert taken.keys == 1


def test_a_disk_that_cannot_be_written_takes_no_snapshot() -> None:
    assert fresh(writable=False, disk=formatted()).one(TAKE) == Refused(StatefsdStatus.READ_ONLY)


def formatted() -> Disk:
    return fresh().stop().disk


def test_a_device_that_fails_while_copying_is_said_to_have_failed() -> None:
    system = fresh()
    _ = system.one(put(K))
    failure = Failure(operation=Operation.WRITE, nth=1, kind=DiskErrorKind.IO, persistent=True)
    system.disk.faults = DiskFaults(failures=(failure,))

    assert system.one(TAKE) == Refused(StatefsdStatus.IO_ERROR)


# ------------------------------------------------------------------ before it serves


def test_the_setting_brings_the_areas_back_before_anybody_is_served_and_once() -> None:
    system = fresh()
    _ = system.ask(put(K, b"old"), TAKE)
    trial = fresh(system.stop().disk, refresh=1)
    _ = trial.one(put(K, b"migrated"))

    back = fresh(trial.stop().disk, restore=1)
    first = values(back, K)
    _ = back.one(put(K, b"since"))
    _ = back.stop()
    again = fresh(back.disk, restore=1)

    assert first == [b"old"]
    assert ("snapshot restored", {"snapshot": 1, "keys": 1}) in back.log.lines
    assert values(again, K) == [b"since"]
    assert again.log.lines == []


def test_a_trial_begins_with_a_copy_of_what_was_written_up_to_the_end_and_once() -> None:
    system = fresh()
    _ = system.ask(put(K, b"old"), TAKE, put(K, b"late"))

    first = fresh(system.stop().disk, refresh=1)
    _ = first.one(put(K, b"migrated"))
    second = fresh(first.stop().disk, refresh=1)  # its second try
    _ = second.one(put(K, b"migrated again"))
    back = fresh(second.stop().disk, restore=1)

    assert values(back, K) == [b"late"]


def test_a_trial_that_never_came_so_far_as_its_copy_takes_nothing_back() -> None:
    system = fresh()
    _ = system.ask(put(K, b"old"), TAKE, put(K, b"after the switch"))

    back = fresh(system.stop().disk, restore=1)

    assert values(back, K) == [b"after the switch"]
    kept = back.one(Restore(1))
    assert isinstance(kept, SnapshotKept)
    assert kept.state is SnapshotState.RESTORED
    assert values(back, K) == [b"after the switch"]


def test_no_trial_begins_without_its_way_back() -> None:
    system = fresh()
    _ = system.one(put(K))

    with pytest.raises(Unusable, match="no way back without it: NoSnapshot"):
        _ = fresh(system.stop().disk, refresh=1)


def half_restored() -> Disk:
    """A disk whose power went in the midst of going back."""
    system = fresh()
    _ = system.ask(*(put(AREA + b"%d" % n, b"old") for n in range(4)), TAKE)
    _ = system.ask(*(put(AREA + b"%d" % n, b"migrated") for n in range(4)))
    disk = system.stop().disk
    store = finished(Store.open(DiskDevice(disk), Settings().limits))
    head = finished(copies.head_of(store))
    restoring = msgspec.structs.replace(head, state=copies.State.RESTORING)
    _ = store.stage([Change(copies.HEAD, msgspec.msgpack.encode(restoring))])
    _ = store.stage([Change(AREA + b"0", b"old")])
    finished(store.close())
    return disk


def test_what_a_power_cut_left_half_brought_back_is_finished_without_being_asked() -> None:
    system = fresh(half_restored())

    assert values(system, *(AREA + b"%d" % n for n in range(4))) == [b"old"] * 4


def test_half_of_the_areas_is_served_to_nobody() -> None:
    with pytest.raises(Unusable, match="cannot go back to the snapshot on disk"):
        _ = fresh(half_restored(), writable=False)


def test_a_copy_that_was_given_up_when_all_was_back_is_not_missed_by_the_next_instance() -> None:
    system = fresh()
    _ = system.ask(put(K, b"old"), TAKE)
    back = fresh(system.stop().disk, restore=1)
    _ = back.ask(Restore(1), DropSnapshot(1), put(K, b"since"))

    again = fresh(back.stop().disk, restore=1)

    assert values(again, K) == [b"since"]
    assert again.log.lines == []


def test_a_setting_that_names_no_snapshot_is_said_and_what_is_there_is_served() -> None:
    system = fresh()
    _ = system.ask(put(K, b"v"))

    later = fresh(system.stop().disk, restore=3)

    assert values(later, K) == [b"v"]
    assert ("snapshot not restored", {"snapshot": 3, "why": "it is not kept"}) in later.log.lines


def test_a_snapshot_that_is_damaged_leads_nowhere_and_is_said() -> None:
    system = fresh()
    _ = system.ask(put(K, b"v" * 100), TAKE)
    trial = fresh(system.stop().disk, refresh=1)
    _ = trial.one(put(K, b"new"))
    disk = trial.stop().disk
    store = finished(Store.open(DiskDevice(disk), Settings().limits))
    _ = store.stage([Change(PAGES + b"page-00000000", b"rubbish")])
    finished(store.close())

    later = fresh(disk, restore=1)

    assert values(later, K) == [b"new"]
    assert [text for text, _ in later.log.lines] == ["snapshot not restored"]
    assert later.one(Restore(1)) == Refused(StatefsdStatus.CORRUPTED)

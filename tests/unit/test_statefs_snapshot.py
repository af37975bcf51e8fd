"""Snapshots in the store: what comes back, what room they keep, and what they refuse."""

from collections.abc import Mapping
from random import Random  # noqa: TID251 (seeded)

import hypothesis.strategies as st
import msgspec
import pytest
from hypothesis import given, settings

from nexus.drivers import DeviceFault, finished
from nexus.drivers.crc import crc32c
from nexus.kernel.sim.disk import (
    Disk,
    DiskErrorKind,
    DiskFaults,
    Failure,
    Operation,
)
from nexus.proof.powercut import DiskDevice
from nexus.services.statefsd.engine import (
    Change,
    Damaged,
    OverQuota,
    Quota,
    ReadOnly,
    Store,
    StoreFull,
    StoreLimits,
)
from nexus.services.statefsd.engine import snapshot as module
from nexus.services.statefsd.engine.limits import area_of
from nexus.services.statefsd.engine.snapshot import (
    AREA,
    HEAD,
    Head,
    NoSnapshot,
    SnapshotDamaged,
    SnapshotExists,
    State,
    drop,
    head_of,
    restore,
    resume,
    take,
    take_again,
)

BLOCKS = 2048  # 1 MiB
APP = b"/state/app/"
ROOT = b"/state/"
WIDE = Quota(size=1 << 30, keys=1 << 20)

Content = dict[bytes, bytes]


def limits(
    quotas: Mapping[bytes, Quota] | None = None, reserves: Mapping[bytes, int] | None = None
) -> StoreLimits:
    return StoreLimits(
        quota=WIDE,
        quotas=quotas or {},
        reserves=reserves or {},
        areas_max=8,
        clients_kept=4,
        requests_kept=8,
        lost_kept=8,
    )


def opened(disk: Disk, limits_: StoreLimits | None = None) -> Store:
    return finished(Store.open(DiskDevice(disk), limits_ or limits()))


def fresh(blocks: int = BLOCKS) -> Store:
    return opened(Disk(blocks))


def put(store: Store, content: Mapping[bytes, bytes | None]) -> None:
    for key, value in content.items():
        _ = store.stage([Change(key, value)])
        finished(store.commit(durable=False))


def content_of(store: Store) -> Content:
    keys, more = store.keys(ROOT, b"", 1 << 20, lambda _: True)
    assert not more
    found = {}
    for key in keys:
        entry = finished(store.get(key))
        assert entry is not None
        found[key] = entry.value
    return found


def data_of(store: Store) -> Content:
    return {key: value for key, value in content_of(store).items() if area_of(key) != AREA}


KEYS = [b"/state/app/%d" % n for n in range(6)] + [b"/state/app/a/b", b"/state/x", b"/state/log/1"]
CONTENTS = st.dictionaries(
    st.sampled_from(KEYS), st.sampled_from([b"", b"v", b"w" * 300, b"x" * 70, b"y" * 5000])
)


@settings(max_examples=80, deadline=None)
@given(before=CONTENTS, after=CONTENTS, areas=st.sampled_from([[APP], [ROOT], [APP, ROOT]]))
def test_what_was_copied_comes_back_and_nothing_else_changes(
    before: Content, after: Content, areas: list[bytes]
) -> None:
    store = fresh()
    put(store, before)
    head = finished(take(store, areas))
    put(store, dict.fromkeys(before))
    put(store, after)

    back = finished(restore(store, head.number))

    others = {key: value for key, value in after.items() if area_of(key) not in areas}
    copied = {key: value for key, value in before.items() if area_of(key) in areas}
    assert data_of(store) == {**others, **copied}
    assert (back.state, back.keys) == (State.RESTORED, len(copied))
    assert data_of(opened(store._device.disk.copy())) == {**others, **copied}  # type: ignore[attr-defined]


def test_a_snapshot_of_many_pages_comes_back_after_the_store_was_opened_again() -> None:
    source = Random(1)
    before = {b"/state/app/%03d" % n: source.randbytes(source.randrange(4000)) for n in range(60)}
    disk = Disk(BLOCKS)
    store = opened(disk)
    put(store, before)
    head = finished(take(store, [APP]))
    put(store, dict.fromkeys(before, b"migrated"))
    finished(store.close())

    store = opened(disk)
    _ = finished(resume(store, head.number))

    assert head.pages > 3
    assert head.size > sum(map(len, before.values()))
    assert data_of(store) == before


def test_going_back_twice_changes_nothing_that_came_between() -> None:
    store = fresh()
    put(store, {b"/state/app/k": b"old"})
    head = finished(take(store, [APP]))
    put(store, {b"/state/app/k": b"new"})
    _ = finished(restore(store, head.number))
    put(store, {b"/state/app/k": b"since"})

    again = finished(resume(store, head.number))

    assert again.state is State.RESTORED
    assert data_of(store) == {b"/state/app/k": b"since"}


def test_a_copy_that_is_taken_again_is_of_what_was_written_since_and_once() -> None:
    store = fresh()
    put(store, {b"/state/app/k": b"old", b"/state/app/gone": bytes(9000)})
    head = finished(take(store, [APP]))
    put(store, {b"/state/app/k": b"late", b"/state/app/gone": None})

    fresh_one = finished(take_again(store, head.number))
    put(store, {b"/state/app/k": b"migrated"})
    same = finished(take_again(store, head.number))  # the second boot of the same trial
    _ = finished(restore(store, head.number))

    assert (fresh_one.number, fresh_one.keys, fresh_one.pages) == (head.number, 1, 1)
    assert same == fresh_one
    assert data_of(store) == {b"/state/app/k": b"late"}
    with pytest.raises(NoSnapshot):
        _ = finished(take_again(store, head.number))


def test_a_copy_that_does_not_fit_any_more_is_none_and_the_data_stay() -> None:
    store = fresh()
    put(store, {b"/state/app/k": b"old"})
    head = finished(take(store, [APP]))
    put(store, {b"/state/app/%02d" % n: bytes(8000) for n in range(30)})
    before = data_of(store)

    with pytest.raises(StoreFull):
        _ = finished(take_again(store, head.number))
    back = finished(restore(store, head.number))

    assert (back.state, back.pages) == (State.RESTORED, 0)
    assert data_of(store) == before
    assert {key for key in content_of(store) if area_of(key) == AREA} == {HEAD}


def test_a_snapshot_stands_on_the_disk_as_the_format_says() -> None:
    store = fresh()
    put(store, {b"/state/app/b": b"2", b"/state/app/a": b"", b"/state/z": b"3"})
    _ = finished(take(store, [ROOT, APP]))

    content = content_of(store)
    stream = (
        b"\x08\x01\x00\x00\x00/state/z3"
        b"\x0c\x00\x00\x00\x00/state/app/a"
        b"\x0c\x01\x00\x00\x00/state/app/b2"
    )
    assert content[AREA + b"page-00000000"] == stream
    assert msgspec.msgpack.decode(content[HEAD]) == [
        1,
        1,
        2,
        [[b"/state/", 57], [b"/state/app/", 121]],
        1,
        len(stream),
        3,
        crc32c(stream),
        3,
        False,
    ]


def test_one_is_kept_at_a_time_and_no_number_is_given_twice() -> None:
    store = fresh()
    first = finished(take(store, [APP]))
    with pytest.raises(SnapshotExists):
        _ = finished(take(store, [APP]))
    dropped = finished(drop(store, first.number))
    second = finished(take(store, [APP]))

    assert (first.number, dropped.state, second.number) == (1, State.NONE, 2)
    with pytest.raises(NoSnapshot):
        _ = finished(restore(store, first.number))
    assert finished(drop(store, first.number)).number == second.number
    assert finished(head_of(store)).state is State.KEPT


def test_a_dropped_snapshot_leaves_nothing_but_its_number() -> None:
    store = fresh()
    put(store, {b"/state/app/%d" % n: bytes(3000) for n in range(40)})
    used = store.used
    head = finished(take(store, [APP]))
    _ = finished(drop(store, head.number))

    left = {key for key in content_of(store) if area_of(key) == AREA}
    assert left == {HEAD}
    assert store.used - used < 200
    assert store._claimed == store.used


def test_the_way_back_has_room_however_full_the_store_is_made() -> None:
    store = fresh()
    before = {b"/state/app/%02d" % n: bytes([n]) * 3000 for n in range(20)}
    put(store, before)
    head = finished(take(store, [APP]))
    put(store, dict.fromkeys(before))
    fill(store)

    _ = finished(restore(store, head.number))

    assert {key: value for key, value in data_of(store).items() if area_of(key) == APP} == before


def test_a_copy_that_is_taken_again_keeps_the_room_of_what_is_in_it_now() -> None:
    disk = Disk(BLOCKS)
    store = opened(disk)
    keys = [b"/state/app/%02d" % n for n in range(10)]
    put(store, dict.fromkeys(keys, b"small"))
    head = finished(take(store, [APP]))
    before: Content = dict.fromkeys(keys, bytes(6000))
    put(store, before)
    finished(store.close())
    store = opened(disk)
    _ = finished(resume(store))
    _ = finished(take_again(store, head.number))
    put(store, dict.fromkeys(keys))
    fill(store)

    _ = finished(restore(store, head.number))

    assert {key: value for key, value in data_of(store).items() if area_of(key) == APP} == before


def test_what_has_to_shrink_gives_its_room_to_what_has_to_grow() -> None:
    store = fresh()
    large, small = bytes(6000), bytes(10)
    before = {b"/state/app/%02d" % n: small if n < 10 else large for n in range(20)}
    put(store, before)
    head = finished(take(store, [APP]))
    put(store, {key: small if value == large else large for key, value in before.items()})
    fill(store)

    _ = finished(restore(store, head.number))

    assert {key: value for key, value in data_of(store).items() if area_of(key) == APP} == before


def fill(store: Store) -> None:
    """Write until nothing fits, in an area of its own, with smaller and smaller values."""
    number = 0
    for size in (8000, 1000, 100, 1):
        while True:
            try:
                put(store, {b"/state/fill/%06d" % number: bytes(size)})
            except StoreFull:
                break
            number += 1


def test_the_room_is_kept_when_the_store_is_opened_again_and_given_up_with_the_snapshot() -> None:
    disk = Disk(BLOCKS)
    store = opened(disk)
    put(store, {b"/state/app/%d" % n: bytes(6000) for n in range(10)})
    head = finished(take(store, [APP]))
    put(store, {b"/state/app/%d" % n: None for n in range(10)})
    finished(store.close())

    store = opened(disk)
    _ = finished(resume(store))
    kept = store._claimed - store.used
    _ = finished(drop(store, head.number))

    assert kept >= 60_000
    assert store._claimed == store.used


def test_a_snapshot_that_does_not_fit_leaves_the_store_as_it_was() -> None:
    store = fresh()
    put(store, {b"/state/app/%02d" % n: bytes(8000) for n in range(30)})
    before = data_of(store)

    with pytest.raises(StoreFull):
        _ = finished(take(store, [APP]))

    assert data_of(store) == before
    assert {key for key in content_of(store) if area_of(key) == AREA} == {HEAD}
    assert finished(head_of(store)).state is State.NONE
    put(store, {b"/state/app/more": bytes(8000)})


def test_a_reserve_of_its_own_keeps_room_for_a_snapshot() -> None:
    reserve = 64 * 1024
    store = opened(Disk(BLOCKS), limits(reserves={AREA: reserve}))
    put(store, {b"/state/app/%02d" % n: bytes(8000) for n in range(7)})
    fill(store)

    head = finished(take(store, [APP]))

    assert head.keys == 7


def test_more_than_the_bound_is_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SIZE_MAX", 10_000)
    store = fresh()
    put(store, {b"/state/app/%02d" % n: bytes(5000) for n in range(12)})

    with pytest.raises(StoreFull, match="10000 bytes at most"):
        _ = finished(take(store, [APP]))


def test_a_lowered_quota_does_not_close_the_way_back() -> None:
    disk = Disk(BLOCKS)
    store = opened(disk)
    before = {b"/state/app/%02d" % n: bytes(4000) for n in range(10)}
    put(store, before)
    head = finished(take(store, [APP]))
    put(store, dict.fromkeys(before))
    finished(store.close())
    store = opened(disk, limits(quotas={APP: Quota(size=5000, keys=1)}))

    with pytest.raises(OverQuota):
        put(store, {b"/state/app/too-large": bytes(8000)})
    _ = finished(resume(store, head.number))

    assert data_of(store) == before


def damaged_store(key: bytes) -> Store:
    """A store whose record of this key cannot be read any more."""
    disk = Disk(BLOCKS)
    store = opened(disk)
    put(store, {key: b"needle" * 100, b"/state/log/k": b"v"})
    while store.compactions < 1:
        put(store, {b"/state/log/k": bytes(3000)})
        _ = finished(store.maintain())
    finished(store.close())
    image = bytearray(disk.image())
    at = image.rindex(b"needle" * 100)
    image[at : at + 6] = b"NEEDLE"
    return opened(Disk(disk.block_count, bytes(image)))


def test_an_area_with_a_damaged_record_is_not_copied() -> None:
    store = damaged_store(b"/state/app/k")
    assert store.lost_count

    with pytest.raises(Damaged):
        _ = finished(take(store, [APP]))

    assert finished(head_of(store)).state is State.NONE


@pytest.mark.parametrize("what", ["missing", "changed", "longer"])
def test_a_snapshot_that_is_not_what_was_written_changes_nothing(what: str) -> None:
    store = fresh()
    put(store, {b"/state/app/%02d" % n: bytes([n]) * 5000 for n in range(12)})
    head = finished(take(store, [APP]))
    put(store, {b"/state/app/00": b"new"})
    before = data_of(store)
    page = AREA + b"page-00000001"
    entry = finished(store.get(page))
    assert entry is not None
    changed: dict[str, bytes | None] = {
        "missing": None,
        "changed": entry.value[:-1] + b"?",
        "longer": entry.value + b"?",
    }
    put(store, {page: changed[what]})

    with pytest.raises(SnapshotDamaged):
        _ = finished(restore(store, head.number))

    assert data_of(store) == before
    assert finished(head_of(store)).state is State.KEPT


def test_a_snapshot_that_holds_a_key_of_another_area_changes_nothing() -> None:
    """Its pages are what was written; it is the head that names another area."""
    store = fresh()
    put(store, {b"/state/app/k": b"v", b"/state/other/k": b"w"})
    head = finished(take(store, [b"/state/other/"]))
    areas = [(APP, size) for _, size in head.areas]
    put(store, {HEAD: msgspec.msgpack.encode(msgspec.structs.replace(head, areas=areas))})
    put(store, {b"/state/app/k": b"new"})
    before = data_of(store)

    with pytest.raises(SnapshotDamaged, match="a key of another area"):
        _ = finished(restore(store, head.number))

    assert data_of(store) == before


@given(value=st.binary(max_size=80))
def test_any_head_is_one_or_is_damaged(value: bytes) -> None:
    store = fresh(128)
    _ = store.stage([Change(HEAD, value)])

    try:
        head = finished(head_of(store))
    except SnapshotDamaged:
        return
    assert head.format == 1


@given(pages=st.lists(st.binary(min_size=1, max_size=60), max_size=3), keys=st.integers(0, 3))
def test_any_pages_are_a_snapshot_or_are_damaged(pages: list[bytes], keys: int) -> None:
    """Also such as have the checksum that the head says: whoever writes both is no friend."""
    store = fresh(128)
    put(store, {b"/state/app/k": b"v"})
    stream = b"".join(pages)
    head = Head(1, 4, State.KEPT, [(APP, 60)], len(pages), len(stream), keys, crc32c(stream), 1)
    _ = store.stage([Change(HEAD, msgspec.msgpack.encode(head))])
    for index, page in enumerate(pages):
        _ = store.stage([Change(AREA + b"page-%08d" % index, page)])
    before = data_of(store)

    try:
        _ = finished(restore(store, 4))
    except SnapshotDamaged:
        assert data_of(store) == before
        return
    assert set(data_of(store)) == {key for key, _ in records_of(stream)}


def records_of(stream: bytes) -> list[tuple[bytes, bytes]]:
    """The same read by hand."""
    found = []
    while stream:
        key, value = stream[0], int.from_bytes(stream[1:5], "little")
        found.append((stream[5 : 5 + key], stream[5 + key : 5 + key + value]))
        stream = stream[5 + key + value :]
    return found


def test_every_failure_of_the_device_on_the_way_back_is_made_good_by_the_next_boot() -> None:
    """The Nth operation fails, for every N until none does."""
    before = {b"/state/app/%02d" % n: bytes([n]) * 700 for n in range(20)}
    failures = 0
    for nth in range(1, 400):
        disk = Disk(BLOCKS)
        store = opened(disk)
        put(store, before)
        head = finished(take(store, [APP]))
        put(store, {**dict.fromkeys(list(before)[:10]), b"/state/app/new": bytes(900)})
        finished(store.close())
        disk = Disk(BLOCKS, disk.image())
        store = opened(disk)
        opening = disk.done[Operation.WRITE]
        failure = Failure(operation=Operation.WRITE, nth=opening + nth, kind=DiskErrorKind.IO)
        disk.faults = DiskFaults(failures=(failure,))
        try:
            _ = finished(resume(store, head.number))
        except DeviceFault:
            failures += 1
            disk.faults = DiskFaults()
            store = opened(disk)
            _ = finished(resume(store, head.number))
            assert data_of(store) == before
            continue
        assert data_of(store) == before
        break
    assert failures >= 3


def test_a_store_that_cannot_be_written_is_neither_copied_nor_brought_back() -> None:
    disk = Disk(BLOCKS)
    store = opened(disk)
    put(store, {b"/state/app/k": b"v"})
    head = finished(take(store, [APP]))
    finished(store.close())
    disk.faults = DiskFaults(read_only=True)
    store = opened(disk)

    with pytest.raises(ReadOnly):
        _ = finished(restore(store, head.number))
    with pytest.raises(ReadOnly):
        _ = finished(drop(store, head.number))
    assert finished(resume(store)).state is State.KEPT

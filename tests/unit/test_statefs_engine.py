"""The storage engine over a simulated disk: limits, refusals, damage, faults, openings."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from random import Random  # noqa: TID251 (seeded)

import msgspec
import pytest

from nexus.abi import BLOCK_SIZE
from nexus.drivers import DeviceFault, Fault, finished
from nexus.drivers.crc import crc32c
from nexus.kernel.sim.disk import (
    NOTHING,
    Disk,
    DiskErrorKind,
    DiskFaults,
    Failure,
    Operation,
    Piece,
)
from nexus.proof.powercut import DiskDevice
from nexus.services.statefsd.engine import (
    Applied,
    Change,
    Damaged,
    Entry,
    OverQuota,
    Quota,
    ReadOnly,
    Store,
    StoreFull,
    StoreLimits,
    Unopenable,
    layout,
)
from nexus.services.statefsd.engine import limits as limits_module
from nexus.services.statefsd.engine import store as store_module
from nexus.services.statefsd.engine.checkpoint import Builder, Meta
from nexus.services.statefsd.engine.journal import (
    NO_BLOCK,
    Place,
    Reader,
    encode_commit,
    encode_entry,
)
from nexus.services.statefsd.engine.limits import area_of
from nexus.services.statefsd.engine.record import Kind, encode_record
from nexus.services.statefsd.engine.store import BLANK_SIZE

BLOCKS = 256
WIDE = Quota(size=1 << 30, keys=1 << 20)


def limits(
    *,
    quota: Quota = WIDE,
    quotas: dict[bytes, Quota] | None = None,
    reserves: dict[bytes, int] | None = None,
    areas_max: int = 8,
) -> StoreLimits:
    return StoreLimits(
        quota=quota,
        quotas=quotas or {},
        reserves=reserves or {},
        areas_max=areas_max,
        clients_kept=2,
        requests_kept=4,
        lost_kept=8,
    )


LIMITS = limits()


def opened(disk: Disk, within: StoreLimits = LIMITS) -> Store:
    return finished(Store.open(DiskDevice(disk), within))


def put(store: Store, key: bytes, value: bytes, *, durable: bool = True) -> Applied:
    applied = store.stage([Change(key, value)])
    finished(store.commit(durable))
    return applied


def value(store: Store, key: bytes) -> bytes | None:
    entry = finished(store.get(key))
    return None if entry is None else entry.value


def listed(store: Store, prefix: bytes = b"/state/") -> list[bytes]:
    return store.keys(prefix, b"", 1000, lambda _: True)[0]


def compacted(store: Store) -> None:
    """Build a checkpoint now, behind the one that damage may have begun."""
    while finished(store.maintain()):
        pass
    before = store.compactions
    store._begin_build()
    while finished(store.maintain()):
        pass
    assert store.compactions == before + 1


def fill(store: Store) -> int:
    """Put until nothing fits; how many keys did."""
    for number in range(1000):
        try:
            _ = put(store, key(number), b"x" * 900)
        except StoreFull:
            return number
    raise AssertionError("it is never full")


def image_of(found: layout.Superblock, parts: Mapping[int, bytes] | None = None) -> bytes:
    """An image with these superblocks, and what is to stand at these blocks."""
    image = bytearray(found.block_count * BLOCK_SIZE)
    placed = {**dict.fromkeys(layout.COPIES, found.encoded()), **(parts or {})}
    for block, data in placed.items():
        image[block * BLOCK_SIZE : block * BLOCK_SIZE + len(data)] = data
    return bytes(image)


def key(number: int) -> bytes:
    return b"/state/a/%03d" % number


# ---------------------------------------------------------------- reading and writing


def test_a_blank_device_is_formatted_and_holds_what_is_put() -> None:
    disk = Disk(BLOCKS)

    applied = put(opened(disk), b"/state/a/x", b"1")

    assert applied == Applied(1, repeated=False)
    again = opened(disk.survivors(NOTHING))
    assert finished(again.get(b"/state/a/x")) == Entry(b"1", 1)
    assert (again.sequence, again.durable, again.key_count, again.lost_count) == (1, 1, 1, 0)
    assert finished(again.get(b"/state/a/y")) is None


def test_a_staged_change_is_visible_at_once_and_accepted_is_not_durable() -> None:
    disk = Disk(BLOCKS)
    store = opened(disk)

    _ = store.stage([Change(key(1), b"v")])

    assert value(store, key(1)) == b"v"
    finished(store.commit(False))
    assert (store.sequence, store.durable) == (1, 0)
    assert value(opened(disk.survivors(NOTHING)), key(1)) is None
    finished(store.commit(True))
    assert store.durable == 1
    assert value(opened(disk.survivors(NOTHING)), key(1)) == b"v"


def test_a_commit_is_one_write_however_many_changes_it_has() -> None:
    disk = Disk(8 * BLOCKS)
    store = opened(disk)
    before = dict(disk.done)

    for number in range(64):
        _ = store.stage([Change(key(number), b"x" * 50)])
    finished(store.commit(True))

    assert disk.done[Operation.WRITE] - before[Operation.WRITE] == 1
    assert disk.done[Operation.FLUSH] == before[Operation.FLUSH], "durable by that write alone"


def test_an_empty_value_is_a_value_and_a_deleted_key_is_gone() -> None:
    disk = Disk(BLOCKS)
    store = opened(disk)
    _ = put(store, key(1), b"")
    _ = put(store, key(2), b"x")

    _ = store.stage([Change(key(2), None)])
    finished(store.commit(True))

    again = opened(disk)
    assert (value(again, key(1)), value(again, key(2))) == (b"", None)
    assert listed(again) == [key(1)]
    assert (again.has(key(1)), again.has(key(2))) == (True, False)


def test_deleting_what_is_not_there_writes_nothing() -> None:
    disk = Disk(BLOCKS)
    store = opened(disk)
    before = disk.done[Operation.WRITE]

    assert store.stage([Change(key(9), None)]) == Applied(0, repeated=False)
    finished(store.commit(True))

    assert disk.done[Operation.WRITE] == before


def test_keys_are_listed_in_order_by_pages_and_only_of_visible_areas() -> None:
    store = opened(Disk(BLOCKS))
    names = [b"/state/b/2", b"/state/a/1", b"/state/c/3", b"/state/z", b"/state/b/1", b"/state/a0"]
    for index, name in enumerate(names):
        _ = put(store, name, b"v")
        if index == 2:
            compacted(store)

    def all_but_b(area: bytes) -> bool:
        return area != b"/state/b/"

    assert listed(store) == sorted(names)
    assert listed(store, b"/state/b/") == [b"/state/b/1", b"/state/b/2"]
    assert store.keys(b"/state/", b"", 2, all_but_b) == ([b"/state/a/1", b"/state/a0"], True)
    assert store.keys(b"/state/", b"/state/a0", 2, all_but_b) == (
        [b"/state/c/3", b"/state/z"],
        False,
    )
    assert store.keys(b"/state/", b"", 9, lambda area: area == b"/state/") == (
        [b"/state/a0", b"/state/z"],
        False,
    )
    assert store.areas() == {b"/state/", b"/state/a/", b"/state/b/", b"/state/c/"}


def test_the_largest_key_and_value_are_kept_across_checkpoints() -> None:
    disk = Disk(8192)
    store = opened(disk)
    name = b"/state/a/" + b"k" * 246

    _ = put(store, name, bytes(range(256)) * 256)
    compacted(store)

    assert value(opened(disk), name) == bytes(range(256)) * 256


def test_a_request_is_applied_once_also_across_openings_and_checkpoints() -> None:
    disk = Disk(BLOCKS)
    store = opened(disk)
    first = store.stage([Change(key(1), b"1")], client=7, request_id=5)

    assert store.stage([Change(key(1), b"2")], client=7, request_id=5) == (first.sequence, True)
    finished(store.commit(True))
    store = opened(disk)
    assert store.stage([Change(key(1), b"2")], client=7, request_id=5) == (first.sequence, True)
    compacted(store)
    store = opened(disk)
    assert store.stage([Change(key(1), b"2")], client=7, request_id=5) == (first.sequence, True)
    assert value(store, key(1)) == b"1"
    assert store.stage([Change(key(1), b"3")], client=8, request_id=5).repeated is False


def test_a_request_id_takes_no_sequence_number_from_the_changes() -> None:
    disk = Disk(BLOCKS)
    store = opened(disk)

    both = store.stage([Change(key(1), b"1"), Change(key(2), b"2")], client=7, request_id=5)
    single = store.stage([Change(key(3), b"3")], client=7, request_id=6)
    nothing = store.stage([Change(key(9), None)], client=7, request_id=7)
    after = put(store, key(4), b"4")

    assert [each.sequence for each in (both, single, nothing, after)] == [2, 3, 4, 5]
    assert (store.sequence, store.durable) == (5, 5)
    again = opened(disk.survivors(NOTHING))
    assert again.sequence == 5
    assert [finished(again.get(key(number))) for number in (2, 3, 4)] == [
        Entry(b"2", 2),
        Entry(b"3", 3),
        Entry(b"4", 5),
    ]
    assert [again.applied(7, number) for number in (5, 6, 7)] == [
        Applied(sequence, repeated=True) for sequence in (2, 3, 4)
    ]


def test_a_damaged_request_costs_the_request_alone() -> None:
    disk = Disk(BLOCKS)
    store = opened(disk)
    _ = store.stage([Change(key(1), b"1")], client=0x77777777, request_id=5)
    finished(store.commit(True))
    _ = store.stage([Change(key(2), b"2")], client=8, request_id=6)
    finished(store.commit(True))
    disk.rot(disk.image().index((0x77777777).to_bytes(8, "little")))

    again = opened(disk)

    assert (again.lost_count, again.sequence) == (1, 2)
    assert [value(again, key(number)) for number in (1, 2)] == [b"1", b"2"]
    assert again.applied(0x77777777, 5) is None
    assert again.applied(8, 6) == Applied(2, repeated=True)


def test_the_latest_request_ids_of_the_latest_clients_are_remembered() -> None:
    disk = Disk(BLOCKS)
    store = opened(disk)
    for request in range(1, 7):
        _ = store.stage([Change(key(1), b"%d" % request)], client=1, request_id=request)
        finished(store.commit(True))
    store = opened(disk)

    known = [request for request in range(1, 7) if store.applied(1, request) is not None]

    assert known == [3, 4, 5, 6]
    for client in (2, 3):
        _ = store.stage([Change(key(1), b"x")], client=client, request_id=1)
        finished(store.commit(True))
    assert store.applied(1, 6) is None, "two clients are remembered"
    assert store.applied(3, 1) is not None
    assert store.applied(3, 0) is None, "0 is no request id"


# ---------------------------------------------------------------- limits


def test_an_area_takes_no_more_bytes_and_keys_than_its_quota() -> None:
    store = opened(
        Disk(BLOCKS),
        limits(quota=Quota(size=600, keys=2), quotas={b"/state/b/": Quota(size=9999, keys=9)}),
    )
    _ = put(store, key(1), b"x" * 100)
    _ = put(store, key(2), b"x" * 100)

    with pytest.raises(OverQuota):
        _ = store.stage([Change(key(3), b"")])
    with pytest.raises(OverQuota):
        _ = store.stage([Change(key(2), b"x" * 500)])

    assert (listed(store), value(store, key(2))) == ([key(1), key(2)], b"x" * 100)
    assert store.usage(b"/state/a/") == (2 * (layout.RECORD_COST + 12 + 100), 2)
    _ = put(store, key(2), b"y" * 100)
    _ = put(store, b"/state/b/1", b"x" * 600)
    assert store.stage([Change(key(1), None), Change(key(3), b"swapped")]).sequence == 6


def test_a_batch_that_is_over_a_limit_changes_nothing() -> None:
    store = opened(Disk(BLOCKS), limits(quota=Quota(size=9999, keys=2)))
    _ = put(store, key(1), b"old")
    used, sequence = store.used, store.sequence

    with pytest.raises(OverQuota):
        _ = store.stage([Change(key(1), b"new"), Change(key(2), b""), Change(key(3), b"")])

    assert (value(store, key(1)), listed(store)) == (b"old", [key(1)])
    assert (store.used, store.sequence, store.key_count) == (used, sequence, 1)
    finished(store.commit(True))
    assert store.sequence == sequence


def test_what_is_reserved_for_one_area_nobody_else_takes() -> None:
    disk = Disk(BLOCKS)
    within = limits(reserves={b"/state/boot/": 4000})
    store = opened(disk, within)
    _ = fill(store)

    _ = put(store, b"/state/boot/slot", b"x" * 3900)

    assert value(opened(disk, within), b"/state/boot/slot") == b"x" * 3900
    with pytest.raises(StoreFull):
        _ = store.stage([Change(b"/state/boot/more", b"x" * 900)])


def test_on_a_full_store_keys_are_replaced_and_deleted() -> None:
    disk = Disk(BLOCKS)
    store = opened(disk)
    number = fill(store)
    assert number > 20

    for _ in range(3):
        for each in range(number):
            _ = put(store, key(each), b"y" * 900)
    for each in range(number):
        _ = store.stage([Change(key(each), None)])
        finished(store.commit(True))

    assert (store.key_count, store.used) == (0, 0)
    assert listed(opened(disk)) == []


def test_no_more_areas_than_the_limit_have_keys() -> None:
    store = opened(Disk(BLOCKS), limits(areas_max=2))
    for area in (b"a", b"b"):
        _ = put(store, b"/state/%s/x" % area, b"")

    with pytest.raises(StoreFull):
        _ = store.stage([Change(b"/state/c/x", b"")])

    _ = put(store, b"/state/a/y", b"")
    _ = store.stage([Change(b"/state/a/x", None), Change(b"/state/a/y", None)])
    _ = put(store, b"/state/c/x", b"")
    assert store.areas() == {b"/state/b/", b"/state/c/"}


def test_areas_that_are_named_have_a_place_however_many_others_there_are() -> None:
    within = replace(
        limits(quotas={b"/state/x/": WIDE}, reserves={b"/state/y/": 100}, areas_max=4),
        areas_kept=frozenset((b"/state/z/",)),
    )
    store = opened(Disk(BLOCKS), within)

    _ = put(store, b"/state/0/k", b"")
    with pytest.raises(StoreFull, match="1 areas have keys in them, 3 are kept"):
        _ = put(store, b"/state/1/k", b"")

    for area in (b"x", b"y", b"z"):
        _ = put(store, b"/state/%s/k" % area, b"")
    assert len(store.areas()) == 4


def test_what_a_refused_change_takes_back_leaves_the_area_to_what_was_staged_before() -> None:
    disk = Disk(BLOCKS)
    within = limits(quotas={b"/state/x/": Quota(size=200, keys=1)})
    store = opened(disk, within)
    _ = store.stage([Change(b"/state/x/k", b"1")])
    _ = store.stage([Change(b"/state/x/k", None)])
    with pytest.raises(OverQuota):
        _ = store.stage([Change(b"/state/x/k", b"1" * 400)])

    _ = store.stage([Change(b"/state/x/k", b"22")])
    compacted(store)
    finished(store.commit(True))

    size = layout.RECORD_COST + 10 + 2
    assert (store.used, store.usage(b"/state/x/")) == (size, (size, 1))
    again = opened(disk.survivors(NOTHING), within)
    assert (again.used, again.usage(b"/state/x/")) == (size, (size, 1))


def test_taking_back_leaves_the_order_of_the_other_keys() -> None:
    store = opened(Disk(BLOCKS), limits(quotas={b"/state/x/": Quota(size=1, keys=1)}))
    for number in (3, 1, 2):
        _ = put(store, key(number), b"")
    expected = [key(1), key(2), key(3)]
    assert listed(store) == expected
    sorted_once = store._order

    with pytest.raises(OverQuota):
        _ = store.stage([Change(key(0), b""), Change(key(4), b""), Change(b"/state/x/k", b"")])

    assert listed(store) == expected
    assert store._order is sorted_once, "it is not made anew"
    _ = store.stage([Change(key(5), b"")])
    assert listed(store) == [*expected, key(5)]
    store._fail()
    assert listed(store) == expected


def test_a_change_larger_than_a_commit_of_a_small_device_is_refused() -> None:
    store = opened(Disk(BLOCKS))

    with pytest.raises(StoreFull, match="one commit"):
        _ = store.stage([Change(key(1), b"x" * 20_000)])

    assert store.used == 0


def test_lower_limits_than_before_lose_nothing() -> None:
    disk = Disk(BLOCKS)
    store = opened(disk)
    for number in range(20):
        _ = put(store, key(number), b"x" * 100)

    again = opened(disk, limits(quota=Quota(size=500, keys=1), reserves={b"/state/z/": 1 << 20}))

    assert len(listed(again)) == 20
    with pytest.raises((OverQuota, StoreFull)):
        _ = again.stage([Change(key(99), b"")])
    _ = put(again, key(3), b"y" * 100)
    _ = again.stage([Change(key(4), None)])


@pytest.mark.parametrize(
    ("name", "area"),
    [
        (b"/state/x", b"/state/"),
        (b"/state/x/y", b"/state/x/"),
        (b"/state/x/y/z", b"/state/x/"),
        (b"/state//", b"/state//"),
    ],
)
def test_the_area_of_a_key_is_its_first_segment(name: bytes, area: bytes) -> None:
    assert area_of(name) == area


# ---------------------------------------------------------------- what is no store of ours


def test_foreign_content_is_not_formatted_over() -> None:
    disk = Disk(BLOCKS, content=bytes(1024) + b"\x53\xef a file system")
    before = disk.image()

    with pytest.raises(Unopenable, match="something else"):
        _ = opened(disk)

    assert disk.image() == before


@pytest.mark.parametrize("offset", [BLOCK_SIZE * 20, BLOCK_SIZE * (BLOCKS - 1) + 5])
def test_content_behind_a_blank_beginning_is_not_formatted_over(offset: int) -> None:
    disk = Disk(BLOCKS)
    disk.rot(offset)

    with pytest.raises(Unopenable, match="something else"):
        _ = opened(disk)


def test_one_byte_in_the_last_block_of_a_large_disk_is_not_formatted_over() -> None:
    count = 3 * BLANK_SIZE // BLOCK_SIZE  # the looks at its two ends do not meet
    disk = Disk(count)
    disk.rot(count * BLOCK_SIZE - 1)
    before = disk.image()

    with pytest.raises(Unopenable, match="something else"):
        _ = opened(disk)

    assert disk.image() == before


def test_a_newer_format_is_refused_with_its_version() -> None:
    disk = Disk(BLOCKS)
    _ = opened(disk)
    block = bytearray(disk.read(0, 1))
    block[12:16] = (2).to_bytes(4, "little")
    block[8:12] = crc32c(bytes(block[12:])).to_bytes(4, "little")
    for at in layout.COPIES:
        disk.write(at, block)
    before = disk.image()

    with pytest.raises(Unopenable, match="version 2, this program knows 1"):
        _ = opened(disk)

    assert disk.image() == before


def test_one_damaged_superblock_is_harmless_and_two_are_told() -> None:
    disk = Disk(BLOCKS)
    _ = put(opened(disk), key(1), b"v")
    disk.rot(20)
    assert value(opened(disk.survivors(NOTHING)), key(1)) == b"v"

    disk.rot(8 * BLOCK_SIZE + 20)

    with pytest.raises(Unopenable, match="both superblocks are damaged"):
        _ = opened(disk)


def test_a_device_that_was_cut_off_is_refused() -> None:
    disk = Disk(BLOCKS)
    _ = opened(disk)

    with pytest.raises(Unopenable, match="cut off"):
        _ = opened(Disk(BLOCKS - 1, content=disk.image()[:-BLOCK_SIZE]))


@pytest.mark.parametrize(
    "counters",
    [
        {"generation": layout.COUNTER_LAST},
        {"compactions": layout.COUNTER_LAST},
        {"sequence": layout.COUNTER_LAST, "epoch_first": layout.COUNTER_LAST + 1},
        {"epoch": layout.COUNTER_LAST},
    ],
)
def test_a_store_whose_counters_are_at_their_end_is_refused_untouched(
    counters: dict[str, int],
) -> None:
    fresh = layout.initial(BLOCKS)
    assert fresh is not None
    disk = Disk(BLOCKS, image_of(replace(fresh, **counters)))
    image = disk.image()

    with pytest.raises(Unopenable, match="counters are at their end"):
        _ = opened(disk)

    assert disk.image() == image
    less = {name: number - (1 << 20) for name, number in counters.items()}
    assert opened(Disk(BLOCKS, image_of(replace(fresh, **less)))).writable


def test_opening_hashes_each_key_once_however_many_records_are_lost(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    count = 60
    fresh = layout.initial(BLOCKS)
    assert fresh is not None
    keys = [key(number) for number in range(count)]
    whole = [encode_record(at + 1, 1, Kind.PUT, each, b"") for at, each in enumerate(keys)]
    entries = [encode_entry(len(whole[0]), crc32c(each)) for each in keys]
    start = Place(NO_BLOCK, 0, 0)
    first, size, crc = encode_commit(0, start, 1, 1, 1, 0, whole, entries)
    block = len(first) // BLOCK_SIZE
    unknown = [encode_entry(len(whole[0]), number + 1) for number in range(count - 1)]
    place = Place(0, size, crc)
    damaged = [bytes(len(whole[0]))] * count
    second, size, crc = encode_commit(
        block, place, 1, 1, count + 1, count, damaged, [*unknown, entries[7]]
    )
    behind = block + len(second) // BLOCK_SIZE
    seal, _, _ = encode_commit(
        behind, Place(block, size, crc), 1, 1, 2 * count + 1, 2 * count, [], []
    )
    disk = Disk(BLOCKS, image_of(fresh, {layout.HEAD_BLOCKS: first + second + seal}))
    hashed: list[bytes] = []

    def counted(data: bytes) -> int:
        hashed.append(data)
        return crc32c(data)

    monkeypatch.setattr(store_module, "crc32c", counted)
    store = opened(disk)

    assert (store.lost_count, store.key_count) == (count, count)
    assert store.lost[-1].key == keys[7]
    assert sum(each in keys for each in hashed) < 4 * count
    kept = layout.hashes_max(fresh.area_blocks)
    assert store.forgotten == count - 1 - kept > 0, "what has no room is counted"
    again = opened(disk.survivors(NOTHING))
    assert (again.forgotten, len(again._hashes), again.lost_count) == (
        count - 1 - kept,
        kept,
        count,
    )


FOREIGN = [
    b"nothing",
    b"/state/\xff\xfe/x",
    b"/state/a\nb/x",
    b"/state/../x",
    b"/state/" + b"a" * 49 + b"/x",
]


def test_a_stale_commit_is_not_taken_for_one_of_its_number_that_is_damaged() -> None:
    """The commits of epoch 2 are gone from the ring, and with them what says that epoch 1's with
    the same numbers are none of the journal: only the chain tells this one, where a checkpoint
    made the journal begin."""
    record = encode_record(11, 1, Kind.PUT, key(1), b"stale")
    entry = encode_entry(len(record), crc32c(key(1)))

    def read(chain: int) -> list[tuple[int, bytes, bool]]:
        data, _, _ = encode_commit(0, Place(NO_BLOCK, 0, 77), 1, 11, 11, 10, [record], [entry])
        ring = data.ljust(16 * BLOCK_SIZE, b"\0")
        replay = Reader(ring, 0, block=0, chain=chain, sequence=10, epoch=3, epoch_first=12).read()
        return [(each.sequence, each.value, each.lost is not None) for each in replay.records]

    assert read(77) == [(11, b"stale", False)], "the chain is all that is wrong with it"
    assert read(78) == [(11, b"", True)]


@pytest.mark.parametrize("name", FOREIGN)
def test_a_record_in_the_journal_whose_key_is_none_is_lost(name: bytes) -> None:
    fresh = layout.initial(BLOCKS)
    assert fresh is not None
    both = (name, key(1))
    records = [encode_record(at + 1, 1, Kind.PUT, each, b"v") for at, each in enumerate(both)]
    entries = [
        encode_entry(len(record), crc32c(each)) for record, each in zip(records, both, strict=True)
    ]
    data, _, _ = encode_commit(0, Place(NO_BLOCK, 0, 0), 1, 1, 1, 0, records, entries)
    disk = Disk(BLOCKS, image_of(fresh, {layout.HEAD_BLOCKS: data}))

    store = opened(disk)

    assert (listed(store, b""), store.areas(), store.lost_count) == ([key(1)], {b"/state/a/"}, 1)
    assert store.lost[0]._replace(offset=0) == (b"", 0, 1)
    again = opened(disk.survivors(NOTHING))
    assert (listed(again, b""), again.lost_count) == ([key(1)], 1)


@pytest.mark.parametrize("name", FOREIGN)
def test_a_record_in_a_checkpoint_whose_key_is_none_is_lost(name: bytes) -> None:
    disk = Disk(BLOCKS)
    store = opened(disk)
    _ = store.stage([Change(key(1), b"v"), Change(name, b"v"), Change(b"/state/z/1", b"v")])
    finished(store.commit(True))
    compacted(store)
    expected = [key(1), b"/state/z/1"]

    store = opened(disk)

    assert (listed(store, b""), store.areas(), store.lost_count) == (
        expected,
        {b"/state/a/", b"/state/z/"},
        1,
    )
    assert finished(store.get(b"/state/z/1")) == Entry(b"v", 3)
    while finished(store.maintain()):
        pass
    again = opened(disk)
    assert (listed(again, b""), again.lost_count, again.used) == (expected, 1, store.used)


def with_meta(meta: bytes) -> Disk:
    """A store whose checkpoint holds nothing but this."""
    fresh = layout.initial(8 * BLOCKS)
    assert fresh is not None
    found = replace(
        fresh,
        active=0,
        slots=1,
        meta_size=len(meta),
        order_crc=crc32c(b""),
        table_crc=crc32c(bytes(8)),
        meta_crc=crc32c(meta),
    )
    first, sections = found.area_first(0), layout.sections_of(found)
    parts = {first + each: meta for each in (sections.meta, sections.meta_copy)}
    return Disk(8 * BLOCKS, image_of(found, parts))


SOUND = Meta([], {}, [(7, [5, 1])], [(key(1), 9, 1)], 3, [(4, 9, 2)], 2)


def test_a_sound_meta_is_taken() -> None:
    store = opened(with_meta(msgspec.msgpack.encode(SOUND)))

    assert (store.lost_count, store.forgotten, len(store._hashes)) == (3, 2, 1)
    assert store.applied(7, 5) == Applied(1, repeated=True)
    assert [each.key for each in store.lost] == [key(1)]


@pytest.mark.parametrize(
    "changes",
    [
        {"hashes": [(number, 0, 0) for number in range(layout.HASHES_MAX + 1)]},
        {"hashes": [(1 << 32, 0, 0)]},
        {"clients": [(client, []) for client in range(limits_module.CLIENTS_MAX + 1)]},
        {"clients": [(7, [1] * (2 * limits_module.REQUESTS_MAX + 1))]},
        {"clients": [(-7, [])]},
        {"lost": [(key(1), 0, 0)] * (limits_module.LOST_MAX + 1)},
        {"lost": [(key(1), -5, 0)]},
        {"lost": [(b"k" * 256, 0, 0)]},
        {"lost_count": -3},
        {"lost_count": layout.COUNTER_MAX},
        {"forgotten": -1},
        {"areas": {b"/state/a/": (-1, 0)}},
        {"areas": {b"%d" % number: (0, 0) for number in range(limits_module.AREAS_MAX + 1)}},
    ],
)
def test_a_meta_that_nobody_writes_counts_as_damaged(changes: dict[str, object]) -> None:
    meta = msgspec.structs.replace(SOUND, **changes)

    store = opened(with_meta(msgspec.msgpack.encode(meta)))

    assert (store.lost_count, store.forgotten, store._hashes) == (1, 0, {})
    assert store.applied(7, 5) is None
    assert store.writable


def test_areas_that_are_none_or_do_not_come_to_what_there_is_are_counted_anew() -> None:
    for areas in ({b"/state/\xff/": (0, 0)}, {b"/state/a/": (99, 1)}):
        meta = msgspec.structs.replace(SOUND, areas=areas)

        store = opened(with_meta(msgspec.msgpack.encode(meta)))

        assert (store.areas(), store.used, store.lost_count) == (set(), 0, 3)


def test_a_lost_record_of_the_meta_whose_key_is_none_is_told_without_it() -> None:
    meta = msgspec.structs.replace(SOUND, lost=[(b"/state/\xff/x", 5, 7)])

    assert opened(with_meta(msgspec.msgpack.encode(meta))).lost[0] == (b"", 5, 7)


def test_a_meta_larger_than_any_limits_lead_to_is_refused() -> None:
    fresh = layout.initial(32 * 1024)
    assert fresh is not None
    found = replace(fresh, active=0, slots=1, meta_size=layout.META_SIZE_MAX)

    assert layout.decode_superblock(found.encoded()) == found
    larger = replace(found, meta_size=layout.META_SIZE_MAX + 1)
    assert layout.decode_superblock(larger.encoded()) is None


def test_a_superblock_whose_epoch_begins_before_the_first_sequence_is_refused() -> None:
    """`make campaign` found it: the last sequence was then -1, which has no place in the next."""
    fresh = layout.initial(32 * 1024)
    assert fresh is not None

    assert layout.decode_superblock(fresh.encoded()) == fresh
    assert layout.decode_superblock(replace(fresh, epoch_first=0).encoded()) is None


def test_what_the_meta_has_no_room_for_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Disk(BLOCKS)
    store = opened(disk)
    for number in range(4):
        _ = store.stage([Change(key(1), b"v")], client=7, request_id=number + 1)
        finished(store.commit(True))
    compacted(store)
    assert store.left_out == 0

    monkeypatch.setattr(Builder, "meta_room", 36)
    compacted(store)

    assert store.left_out == 2
    assert [opened(disk).applied(7, number) is None for number in (2, 3)] == [True, False]


def test_a_device_too_small_for_a_store_or_for_its_limits_is_refused() -> None:
    with pytest.raises(Unopenable, match="127 blocks are too few"):
        _ = opened(Disk(127))
    wide = StoreLimits(
        quota=WIDE,
        quotas={},
        reserves={},
        areas_max=1000,
        clients_kept=256,
        requests_kept=128,
        lost_kept=256,
    )
    with pytest.raises(Unopenable, match="too few for the store's limits"):
        _ = opened(Disk(BLOCKS), wide)


def test_a_format_that_a_power_cut_tore_is_formatted_again() -> None:
    whole = layout.initial(BLOCKS)
    assert whole is not None
    for stop in (1, 9, 100, 511):
        torn = Disk(BLOCKS, content=whole.encoded()[:stop])

        _ = put(opened(torn), key(1), b"v")


# ---------------------------------------------------------------- damage


def filled() -> tuple[Disk, dict[bytes, bytes]]:
    """A store with a checkpoint and a journal behind it, closed in order."""
    disk = Disk(BLOCKS)
    store = opened(disk)
    content = {}
    source = Random(3)
    for number in range(30):
        content[key(number)] = source.randbytes(40 + number)
        _ = store.stage([Change(key(number), content[key(number)])])
        if number % 5 == 4:
            finished(store.commit(True))
    compacted(store)
    for number in range(20, 40):
        content[key(number)] = source.randbytes(60)
        _ = store.stage([Change(key(number), content[key(number)])])
        if number % 3 == 2:
            finished(store.commit(True))
    finished(store.close())
    return disk, content


def differences(store: Store, content: dict[bytes, bytes]) -> Iterator[bytes]:
    for name, expected in content.items():
        try:
            if value(store, name) != expected:
                yield name
        except Damaged:
            yield name


def test_any_one_flipped_bit_costs_one_record_at_most_and_is_told() -> None:
    disk, content = filled()
    used = [at for at, byte in enumerate(disk.image()) if byte]
    seen_damaged = seen_harmless = 0

    for offset in used[:: len(used) // 400]:
        rotten = disk.survivors(NOTHING)
        rotten.rot(offset, 1 << offset % 8)
        store = opened(rotten)
        wrong = list(differences(store, content))

        assert len(wrong) <= 1, offset
        assert store.lost_count == len(store.lost)
        if wrong:
            seen_damaged += 1
            assert store.lost_count == 1, offset
            [lost] = store.lost
            assert lost.key in (b"", wrong[0])
            if lost.key:
                assert abs(lost.offset - offset) < 600, "the record is where the damage was"
            with pytest.raises(Damaged):
                _ = value(store, wrong[0])
        else:
            seen_harmless += 1
            assert [lost.key for lost in store.lost] in ([], [b""]), offset
        again = opened(rotten)
        assert list(differences(again, content)) == wrong, "and it is the same the next time"
        assert again.lost_count == store.lost_count

    assert seen_damaged > 50
    assert seen_harmless > 20


def test_any_one_wiped_block_costs_what_stood_in_it() -> None:
    disk, content = filled()
    image = disk.image()

    for block in range(BLOCKS):
        if not image[block * BLOCK_SIZE : (block + 1) * BLOCK_SIZE].strip(b"\0"):
            continue
        rotten = disk.survivors(NOTHING)
        rotten.write(block, b"\xa5" * BLOCK_SIZE)
        store = opened(rotten)

        wrong = list(differences(store, content))

        assert len(wrong) <= 9, block
        assert store.lost_count >= len(wrong), block


def test_a_block_that_cannot_be_read_is_damage_and_no_end() -> None:
    disk, content = filled()
    image = disk.image()
    for block in range(16, BLOCKS):
        if not image[block * BLOCK_SIZE : (block + 1) * BLOCK_SIZE].strip(b"\0"):
            continue
        bad = disk.survivors(NOTHING, DiskFaults(unreadable=frozenset({block})))

        store = opened(bad)

        wrong = list(differences(store, content))
        assert len(wrong) <= 9, block
        assert store.lost_count >= len(wrong), block


def test_a_damaged_record_is_replaced_by_a_put_and_ended_by_a_deletion() -> None:
    disk, content = filled()
    at = disk.image().rindex(content[key(2)])
    disk.rot(at)
    store = opened(disk)
    with pytest.raises(Damaged) as caught:
        _ = value(store, key(2))
    assert caught.value.lost == store.lost[0]
    assert store.lost[0].key == key(2)
    assert key(2) in listed(store), "who looks for it learns that it was damaged"
    assert store.has(key(2))

    _ = put(store, key(2), b"new")

    assert value(store, key(2)) == b"new"
    disk.rot(disk.image().rindex(content[key(3)]))
    store = opened(disk)
    _ = store.stage([Change(key(3), None)])
    finished(store.commit(True))
    compacted(store)
    store = opened(disk)
    assert (value(store, key(2)), value(store, key(3))) == (b"new", None)
    assert store.lost_count >= 1, "what was lost stays on record"


def test_damage_in_the_midst_of_the_journal_hides_nothing_behind_it() -> None:
    disk = Disk(BLOCKS)
    store = opened(disk)
    for number in range(8):
        _ = put(store, key(number), bytes([ord("A") + number]) * 50)
    disk.rot(disk.image().index(b"D" * 50))

    again = opened(disk)

    assert [name for name in listed(again) if name != key(3)] == [
        key(number) for number in range(8) if number != 3
    ]
    assert [lost.key for lost in again.lost] == [key(3)]
    assert again.lost[0].sequence == 4


def test_a_damaged_header_costs_nothing_as_its_records_are_whole() -> None:
    disk = Disk(BLOCKS)
    store = opened(disk)
    for number in range(5):
        _ = put(store, key(number), b"v%d" % number)
    disk.rot((layout.HEAD_BLOCKS + 2) * BLOCK_SIZE + 10)

    again = opened(disk)

    assert [value(again, key(number)) for number in range(5)] == [b"v%d" % n for n in range(5)]
    assert again.lost_count == 0
    assert again.compactions == 1, "and what is damaged was written anew"


def test_damage_in_the_checkpoint_is_mended_behind_the_opening() -> None:
    disk, content = filled()
    found = opened(disk)._found
    disk.rot(found.area_first(found.active) * BLOCK_SIZE + 10)
    writes = disk.done.copy()

    store = opened(disk)

    assert disk.done[Operation.WRITE] - writes[Operation.WRITE] == 2, "two superblocks"
    assert (store.lost_count, store.compactions) == (1, found.compactions)
    lost = list(differences(store, content))
    assert len(lost) == 1
    _ = put(store, b"/state/a/new", b"v")
    while finished(store.maintain()):
        pass
    assert store.compactions == found.compactions + 1
    again = opened(disk.survivors(NOTHING))
    assert (again.lost_count, value(again, b"/state/a/new")) == (1, b"v")
    assert list(differences(again, content)) == lost
    assert again._builder is None, "it is mended"


def test_an_unfinished_commit_is_no_loss() -> None:
    disk = Disk(BLOCKS)
    store = opened(disk)
    _ = put(store, key(1), b"kept")
    _ = store.stage([Change(key(2), b"x" * 900)])
    finished(store.commit(False))

    again = opened(disk.survivors((Piece(0, 0, 700),)))

    assert (value(again, key(1)), value(again, key(2))) == (b"kept", None)
    assert (again.lost_count, again.unfinished, again.sequence) == (0, 1, 1)


def test_a_last_commit_damaged_after_an_orderly_end_is_a_loss() -> None:
    disk = Disk(BLOCKS)
    store = opened(disk)
    _ = put(store, key(1), b"kept")
    _ = put(store, key(2), b"to be damaged")
    finished(store.close())
    disk.rot(disk.image().index(b"to be damaged"))

    again = opened(disk)

    assert [lost.key for lost in again.lost] == [key(2)]
    with pytest.raises(Damaged):
        _ = value(again, key(2))


def test_a_last_commit_damaged_after_the_next_opening_is_a_loss() -> None:
    disk = Disk(BLOCKS)
    _ = put(opened(disk), key(1), b"to be damaged")
    _ = opened(disk)
    disk.rot(disk.image().index(b"to be damaged"))

    assert [lost.key for lost in opened(disk).lost] == [key(1)]


def test_a_lost_write_is_told_as_a_loss_as_soon_as_a_later_one_proves_it() -> None:
    disk = Disk(BLOCKS)
    _ = opened(disk)
    disk = Disk(BLOCKS, content=disk.image(), faults=DiskFaults(lost=frozenset({4})))
    store = opened(disk)
    for number in range(3):
        _ = put(store, key(number), b"v")

    again = opened(disk)

    assert [value(again, key(0)), value(again, key(2))] == [b"v", b"v"]
    assert again.lost_count == 1


def test_a_misdirected_write_is_not_taken_for_the_commit_it_lands_on() -> None:
    disk = Disk(BLOCKS)
    _ = opened(disk)
    faults = DiskFaults(misdirected={5: layout.HEAD_BLOCKS})
    disk = Disk(BLOCKS, content=disk.image(), faults=faults)
    store = opened(disk)
    for number in range(4):
        _ = put(store, key(number), b"v%d" % number)

    again = opened(disk)

    found = {}
    for number in range(4):
        try:
            found[number] = value(again, key(number))
        except Damaged:
            found[number] = b"damaged"
    assert all(found[number] in (b"v%d" % number, b"damaged", None) for number in range(4))
    assert (found[1], found[3]) == (b"v1", b"v3")
    assert again.lost_count >= 1


def test_a_record_dropped_once_never_comes_back() -> None:
    disk = Disk(BLOCKS)
    store = opened(disk)
    _ = put(store, key(1), b"1")
    for number in (2, 3, 4):
        _ = put(store, key(number), b"dropped", durable=False)
    whole = [Piece(index, 0, BLOCK_SIZE) for index in range(3)]
    disk = disk.survivors((whole[1], whole[2]))

    store = opened(disk)
    assert (listed(store), store.lost_count) == ([key(1)], 0)
    _ = put(store, key(5), b"new")

    assert listed(opened(disk)) == [key(1), key(5)]


# ---------------------------------------------------------------- a device that fails


@pytest.mark.parametrize(
    ("kind", "fault"),
    [
        (DiskErrorKind.IO, Fault.IO),
        (DiskErrorKind.NO_SPACE, Fault.NO_SPACE),
        (DiskErrorKind.READ_ONLY, Fault.READ_ONLY),
    ],
)
def test_a_write_that_fails_is_taken_back_and_the_store_is_read_only(
    kind: DiskErrorKind, fault: Fault
) -> None:
    failure = Failure(operation=Operation.WRITE, nth=6, kind=kind)
    disk = Disk(BLOCKS, faults=DiskFaults(failures=(failure,)))
    store = opened(disk)
    _ = put(store, key(1), b"kept")
    _ = store.stage([Change(key(1), b"gone"), Change(key(2), b"gone")], client=1, request_id=9)

    with pytest.raises(DeviceFault) as caught:
        finished(store.commit(True))

    assert caught.value.fault is fault
    assert (value(store, key(1)), value(store, key(2))) == (b"kept", None)
    assert (store.sequence, store.key_count, store.writable) == (1, 1, False)
    assert store.applied(1, 9) is None
    with pytest.raises(ReadOnly):
        _ = store.stage([Change(key(1), b"x")])
    assert finished(store.maintain()) is False
    again = opened(disk)
    assert again.writable
    _ = put(again, key(1), b"goes on")


def test_a_flush_that_fails_promises_nothing() -> None:
    failure = Failure(operation=Operation.FLUSH, nth=2)
    disk = Disk(BLOCKS, faults=DiskFaults(failures=(failure,)))
    store = opened(disk)
    _ = put(store, key(1), b"accepted", durable=False)

    with pytest.raises(DeviceFault):
        finished(store.commit(True))

    assert (store.durable, store.writable) == (0, False)
    with pytest.raises(DeviceFault, match="open the store again"):
        finished(store.commit(True))


def test_a_device_that_cannot_be_written_is_read() -> None:
    disk = Disk(BLOCKS)
    _ = put(opened(disk), key(1), b"v")
    before = disk.image()
    fixed = Disk(BLOCKS, content=before, faults=DiskFaults(read_only=True))

    store = opened(fixed)

    assert (value(store, key(1)), store.writable) == (b"v", False)
    with pytest.raises(ReadOnly):
        _ = store.stage([Change(key(1), b"w")])
    finished(store.commit(True))
    finished(store.close())
    assert fixed.image() == before


def test_a_device_whose_writes_fail_at_the_opening_is_read() -> None:
    disk = Disk(BLOCKS)
    _ = put(opened(disk), key(1), b"v")
    failure = Failure(operation=Operation.WRITE, nth=1, persistent=True)

    store = opened(disk.survivors(NOTHING, DiskFaults(failures=(failure,))))

    assert (value(store, key(1)), store.writable) == (b"v", False)


def test_a_failed_checkpoint_leaves_the_one_in_force() -> None:
    disk = Disk(BLOCKS)
    store = opened(disk)
    for number in range(10):
        _ = put(store, key(number), b"v" * 50)
    for nth in range(1, 8):
        bad = disk.survivors(
            NOTHING, DiskFaults(failures=(Failure(operation=Operation.WRITE, nth=2 + nth),))
        )
        again = opened(bad)
        with pytest.raises(DeviceFault):
            compacted(again)
        assert not again.writable
        assert len(listed(again)) == 10
        assert len(listed(opened(bad))) == 10
        if nth == 6:
            break


def test_a_dead_device_is_a_fault_and_no_damage() -> None:
    disk = Disk(BLOCKS)
    _ = opened(disk)
    failure = Failure(operation=Operation.READ, nth=1, persistent=True)

    with pytest.raises(DeviceFault):
        _ = opened(disk.survivors(NOTHING, DiskFaults(failures=(failure,))))


# ---------------------------------------------------------------- checkpoints


def test_a_step_of_tidying_up_is_bounded() -> None:
    disk = Disk(1 << 14)
    store = opened(disk)
    for start in range(0, 6000, 60):
        for number in range(start, start + 60):
            _ = store.stage([Change(b"/state/a/%05d" % number, b"x" * 200)])
        finished(store.commit(False))
    while finished(store.maintain()):
        pass
    store._begin_build()
    writes = []
    while True:
        before = disk.done[Operation.WRITE]
        more = finished(store.maintain())
        writes.append(disk.done[Operation.WRITE] - before)
        if not more:
            break

    assert len(writes) > 12
    assert max(writes) <= 5, "one piece of 64 KiB; the last step writes meta and superblocks"
    assert len(opened(disk)._checkpoint) == 6000


def test_changes_go_on_while_a_checkpoint_is_built() -> None:
    disk = Disk(1 << 13)
    store = opened(disk)
    content = {}
    for number in range(1500):
        content[key(number)] = b"%d" % number
        _ = store.stage([Change(key(number), content[key(number)])])
    finished(store.commit(True))
    store._begin_build()
    number = 0
    while finished(store.maintain()):
        number += 7
        _ = put(store, key(number), b"changed", durable=False)
        content[key(number)] = b"changed"
        _ = store.stage([Change(key(number + 1), None)])
        _ = content.pop(key(number + 1), None)
        finished(store.commit(False))
    assert number > 7

    for each in (store, opened(disk)):
        assert listed(each) == sorted(content)[:1000]
        assert list(differences(each, content)) == []
        assert each.key_count == len(content)


def test_what_is_staged_stays_out_of_the_checkpoint_that_makes_room_for_it() -> None:
    disk = Disk(BLOCKS)
    store = opened(disk)
    _ = put(store, key(1), b"old")
    _ = store.stage([Change(key(1), b"new"), Change(key(1), b"newer"), Change(key(2), b"x")])

    compacted(store)

    assert value(opened(disk.survivors(NOTHING)), key(1)) == b"old"
    assert (value(store, key(1)), store.key_count) == (b"newer", 2)
    store._take_back(0)
    assert (value(store, key(1)), value(store, key(2)), store.key_count) == (b"old", None, 1)
    assert store.usage(b"/state/a/").keys == 1


def test_many_puts_stay_within_the_device() -> None:
    disk = Disk(BLOCKS)
    store = opened(disk)
    source = Random(1)
    for _ in range(20_000):
        _ = store.stage([Change(key(source.randrange(50)), source.randbytes(20))])
        if source.randrange(4) == 0:
            finished(store.commit(False))
            _ = finished(store.maintain())
    finished(store.commit(True))

    assert store.compactions > 50
    assert len(disk.image()) == BLOCKS * BLOCK_SIZE
    assert opened(disk).key_count == 50


def test_a_key_is_found_when_all_of_its_places_in_the_table_are_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("nexus.services.statefsd.engine.store.crc32c", lambda _: 5)
    monkeypatch.setattr("nexus.services.statefsd.engine.checkpoint.crc32c", lambda _: 5)
    disk = Disk(BLOCKS)
    store = opened(disk)
    for number in range(100):
        _ = store.stage([Change(key(number), b"%d" % number)])
    finished(store.commit(True))

    compacted(store)

    assert [value(store, key(number)) for number in range(100)] == [b"%d" % n for n in range(100)]
    assert value(store, key(100)) is None


def test_a_value_that_looks_like_a_commit_is_not_taken_for_one() -> None:
    disk = Disk(BLOCKS)
    store = opened(disk)
    for number in range(3):
        _ = put(store, key(number), b"v")
    ring = disk.read(layout.HEAD_BLOCKS, 3)
    for shift in range(0, BLOCK_SIZE, 4):
        _ = put(store, b"/state/a/forged", bytes(shift) + ring[BLOCK_SIZE:])
        if shift > 40:
            break
    finished(store.close())
    block = store._place.previous + layout.HEAD_BLOCKS  # of the last commit
    disk.rot(block * BLOCK_SIZE + 20)

    again = opened(disk)

    assert listed(again)[:3] == [key(number) for number in range(3)]
    assert [value(again, key(number)) for number in range(3)] == [b"v"] * 3
    assert (again.lost_count, again.sequence) == (0, store.sequence)

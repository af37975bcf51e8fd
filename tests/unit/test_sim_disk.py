"""The model of a disk: what survives a power cut, and how it fails."""

from itertools import permutations
from random import Random  # noqa: TID251 (seeded)

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nexus.abi import BLOCK_SIZE, Nanos
from nexus.kernel.sim.disk import (
    CACHE_BLOCKS_MAX,
    NOTHING,
    Disk,
    DiskError,
    DiskErrorKind,
    DiskFaults,
    Failure,
    Operation,
    Piece,
    choice_text,
    parse_choice,
)

COUNT = 16


def block(letter: str, count: int = 1) -> bytes:
    return letter.encode() * (BLOCK_SIZE * count)


def kind_of(disk: Disk, operation: Operation) -> DiskErrorKind | None:
    try:
        match operation:
            case Operation.READ:
                _ = disk.read(3, 1)
            case Operation.WRITE:
                disk.write(3, block("w"))
            case Operation.FLUSH:
                disk.flush()
    except DiskError as error:
        return error.kind
    return None


def test_what_was_written_is_read_before_and_after_a_flush() -> None:
    disk = Disk(COUNT, content=block("a", 2))

    disk.write(1, block("b", 2))

    assert disk.read(0, 4) == block("a") + block("b", 2) + bytes(BLOCK_SIZE)
    assert disk.durable_image()[: 3 * BLOCK_SIZE] == block("a", 2) + bytes(BLOCK_SIZE)
    disk.flush()
    assert disk.durable_image() == disk.image()


def test_a_power_cut_keeps_what_was_flushed_and_of_the_cache_what_the_choice_says() -> None:
    disk = Disk(COUNT)
    disk.write(0, block("a"))
    disk.flush()
    disk.write(1, block("b"))
    disk.write(2, block("c"))

    left = disk.survivors((Piece(1, 0, BLOCK_SIZE),))

    assert left.image() == (block("a") + bytes(BLOCK_SIZE) + block("c")).ljust(
        COUNT * BLOCK_SIZE, b"\0"
    )
    assert left.pending == ()
    assert disk.read(1, 1) == block("b"), "the disk that was asked stays as it is"
    assert disk.survivors(NOTHING).read(0, 3) == block("a") + bytes(2 * BLOCK_SIZE)


def test_cached_writes_reach_the_medium_in_any_order() -> None:
    disk = Disk(COUNT)
    for letter in "abc":
        disk.write(0, block(letter))

    ends = {
        disk.survivors(tuple(Piece(index, 0, BLOCK_SIZE) for index in order)).read(0, 1)[:1]
        for order in permutations(range(3))
    }

    assert ends == {b"a", b"b", b"c"}


def test_a_write_tears_between_sectors_and_inside_one() -> None:
    disk = Disk(COUNT, content=block("o", 2))
    disk.write(0, block("n", 2))

    between = disk.survivors((Piece(0, BLOCK_SIZE, 2 * BLOCK_SIZE),)).read(0, 2)
    inside = disk.survivors((Piece(0, 0, BLOCK_SIZE + 7),)).read(0, 2)

    assert between == block("o") + block("n")
    assert inside == block("n") + b"n" * 7 + b"o" * (BLOCK_SIZE - 7)


def test_a_write_the_power_was_cut_in_survives_in_part() -> None:
    disk = Disk(COUNT, content=block("o"))
    disk.write(1, block("c"))

    index = disk.begin_write(0, block("n"))

    left = disk.survivors((Piece(index, 0, 100),))
    assert left.read(0, 2) == b"n" * 100 + b"o" * (BLOCK_SIZE - 100) + bytes(BLOCK_SIZE)


def test_a_durable_write_makes_its_own_bytes_durable_and_no_others() -> None:
    disk = Disk(COUNT)
    disk.write(0, block("a", 3))

    disk.write(1, block("d"), durable=True)

    assert disk.survivors(NOTHING).read(0, 3) == bytes(BLOCK_SIZE) + block("d") + bytes(BLOCK_SIZE)
    assert disk.read(0, 3) == block("a") + block("d") + block("a")
    every = tuple(Piece(index, 0, len(each.data)) for index, each in enumerate(disk.pending))
    assert disk.survivors(every).read(0, 3) == disk.read(0, 3), "an older write never covers it"


def test_what_is_tried_on_a_copy_does_not_reach_the_disk() -> None:
    disk = Disk(COUNT, content=block("a"))
    disk.write(1, block("b"))

    copy = disk.copy()
    copy.write(0, block("c"), durable=True)
    copy.flush()

    assert disk.read(0, 2) == block("a") + block("b")
    assert disk.survivors(NOTHING).read(0, 2) == block("a") + bytes(BLOCK_SIZE)
    assert copy.survivors(NOTHING).read(0, 2) == block("c") + block("b")


def test_a_choice_is_written_and_read_back() -> None:
    choice = (Piece(2, 0, 512), Piece(0, 17, 99))

    assert choice_text(choice) == "2:0-512,0:17-99"
    assert parse_choice(choice_text(choice)) == choice
    assert parse_choice(choice_text(NOTHING)) == NOTHING
    with pytest.raises(ValueError, match="invalid literal"):
        _ = parse_choice("2")


def test_a_seed_draws_the_same_survivors_again() -> None:
    disk = Disk(COUNT)
    for number in range(12):
        disk.write(number, block("x"))

    first, again = (disk.drawn_choice(Random(5)) for _ in range(2))

    assert first == again
    drawn = [disk.drawn_choice(Random(seed)) for seed in range(50)]
    assert len(set(drawn)) == 50
    pieces = [piece for choice in drawn for piece in choice]
    assert any(piece.stop - piece.start < BLOCK_SIZE for piece in pieces), "some are torn"
    assert any(list(choice) != sorted(choice) for choice in drawn), "some are reordered"


@pytest.mark.parametrize("operation", list(Operation))
def test_the_planned_operation_fails_and_the_next_one_does_not(operation: Operation) -> None:
    disk = Disk(COUNT, faults=DiskFaults(failures=(Failure(operation=operation, nth=2),)))

    assert [kind_of(disk, operation) for _ in range(3)] == [None, DiskErrorKind.IO, None]


def test_a_persistent_failure_stays() -> None:
    failure = Failure(
        operation=Operation.WRITE, nth=2, kind=DiskErrorKind.NO_SPACE, persistent=True
    )
    disk = Disk(COUNT, faults=DiskFaults(failures=(failure,)))

    kinds = [kind_of(disk, Operation.WRITE) for _ in range(3)]

    assert kinds == [None, DiskErrorKind.NO_SPACE, DiskErrorKind.NO_SPACE]


def test_a_failed_write_may_be_done_in_part() -> None:
    failure = Failure(operation=Operation.WRITE, nth=1, done=BLOCK_SIZE + 10)
    disk = Disk(COUNT, content=block("o", 2), faults=DiskFaults(failures=(failure,)))

    with pytest.raises(DiskError):
        disk.write(0, block("n", 2))

    assert disk.read(0, 2) == block("n") + b"n" * 10 + b"o" * (BLOCK_SIZE - 10)


def test_a_failed_flush_loses_the_cache() -> None:
    faults = DiskFaults(failures=(Failure(operation=Operation.FLUSH, nth=1),))
    disk = Disk(COUNT, faults=faults)
    disk.write(0, block("a"))

    with pytest.raises(DiskError):
        disk.flush()
    disk.flush()

    assert disk.image() == bytes(COUNT * BLOCK_SIZE)


def test_a_lost_write_is_answered_and_not_made() -> None:
    disk = Disk(COUNT, faults=DiskFaults(lost=frozenset({2})))

    for letter in "ab":
        disk.write(0, block(letter), durable=True)

    assert disk.read(0, 1) == block("a")


def test_a_misdirected_write_lands_elsewhere() -> None:
    disk = Disk(COUNT, faults=DiskFaults(misdirected={1: 9, 2: COUNT - 1}))

    disk.write(0, block("a"))
    disk.write(1, block("b", 2))

    assert disk.read(0, 3) == bytes(3 * BLOCK_SIZE)
    assert disk.read(9, 1) == block("a")
    assert disk.read(COUNT - 1, 1) == bytes(BLOCK_SIZE), "outside the disk nobody reads"


def test_an_unreadable_block_fails_every_read_over_it_until_it_is_written() -> None:
    disk = Disk(COUNT, faults=DiskFaults(unreadable=frozenset({3})))

    with pytest.raises(DiskError) as caught:
        _ = disk.read(2, 2)
    assert caught.value.kind is DiskErrorKind.IO
    assert disk.read(4, 2) == bytes(2 * BLOCK_SIZE)

    disk.write(3, block("n"))

    assert disk.read(3, 1) == block("n")


def test_a_thin_disk_takes_no_more_blocks_than_there_is_room_for() -> None:
    disk = Disk(COUNT, content=block("a"), faults=DiskFaults(room=3))
    disk.write(4, block("b", 2))

    with pytest.raises(DiskError) as caught:
        disk.write(8, block("c"))

    assert caught.value.kind is DiskErrorKind.NO_SPACE
    disk.write(5, block("d"))
    assert disk.read(5, 1) == block("d"), "what is there may be written over"


def test_a_read_only_disk_refuses_writes_alone() -> None:
    disk = Disk(COUNT, content=block("a"), faults=DiskFaults(read_only=True))

    assert kind_of(disk, Operation.WRITE) is DiskErrorKind.READ_ONLY
    assert kind_of(disk, Operation.READ) is None
    assert kind_of(disk, Operation.FLUSH) is None


@pytest.mark.parametrize(("first", "count"), [(COUNT, 1), (COUNT - 1, 2), (-1, 1)])
def test_outside_the_disk_nothing_is_read_or_written(first: int, count: int) -> None:
    disk = Disk(COUNT)

    with pytest.raises(DiskError) as read:
        _ = disk.read(first, count)
    with pytest.raises(DiskError) as written:
        disk.write(first, block("x", count))

    assert read.value.kind is written.value.kind is DiskErrorKind.OUT_OF_RANGE


def test_bits_rot_on_the_medium_and_in_the_cache() -> None:
    disk = Disk(COUNT, content=block("a", 2))
    disk.write(0, block("b"))

    disk.rot(5, 0x80)
    disk.rot(BLOCK_SIZE)

    assert disk.read(0, 1)[5] == ord("b") ^ 0x80
    assert disk.durable_image()[5] == ord("a") ^ 0x80
    assert disk.read(1, 1)[0] == ord("a") ^ 1


def test_a_slow_disk_says_how_slow() -> None:
    disk = Disk(COUNT, faults=DiskFaults(latency={Operation.FLUSH: Nanos(7)}))

    assert (disk.latency(Operation.FLUSH), disk.latency(Operation.READ)) == (7, 0)


def test_the_cache_is_bounded_and_writes_the_oldest_out() -> None:
    disk = Disk(2 * CACHE_BLOCKS_MAX)
    half = block("x", CACHE_BLOCKS_MAX // 2)

    for index in range(3):
        disk.write(index * CACHE_BLOCKS_MAX // 2, half)

    assert len(disk.pending) == 2
    assert disk.survivors(NOTHING).read(0, 1) == block("x")


def test_a_disk_takes_memory_for_what_was_written_only() -> None:
    disk = Disk(1 << 31)  # 1 TiB

    disk.write((1 << 31) - 1, block("z"), durable=True)

    assert disk.read((1 << 31) - 1, 1) == block("z")
    assert disk.read(1 << 30, 1) == bytes(BLOCK_SIZE)


@given(
    writes=st.lists(
        st.tuples(
            st.integers(0, 5), st.integers(1, 3), st.booleans(), st.sampled_from(("", "flush"))
        ),
        max_size=12,
    )
)
def test_every_pending_write_in_order_gives_what_is_read(
    writes: list[tuple[int, int, bool, str]],
) -> None:
    disk, model = Disk(8), bytearray(8 * BLOCK_SIZE)

    for number, (first, count, durable, then) in enumerate(writes):
        data = block(chr(ord("a") + number), count)
        disk.write(first, data, durable=durable)
        model[first * BLOCK_SIZE : (first + count) * BLOCK_SIZE] = data
        if then:
            disk.flush()

    every = tuple(Piece(index, 0, len(each.data)) for index, each in enumerate(disk.pending))
    assert disk.image() == bytes(model)
    assert disk.survivors(every).image() == bytes(model)

"""The ring: what is put is read, in order, once; every number is accounted for; nothing raises."""

import random  # noqa: TID251 (seeded)

import hypothesis.strategies as st
import pytest
from hypothesis import given

from nexus.telemetry import DOUBTS_MAX, NoRing, RingReader, RingWriter, payload_size_max
from nexus.telemetry.ring import (
    COMMIT_WORD,
    COUNT_WORD,
    RESERVE_WORD,
    RING_HEADER_SIZE,
    RING_SIZE_MIN,
)

SIZE = 4096


def ring(size: int = SIZE) -> tuple[RingWriter, RingReader, bytearray]:
    memory = bytearray(size)
    writer = RingWriter(memoryview(memory))
    return writer, RingReader(memoryview(memory).toreadonly()), memory


def drained(reader: RingReader) -> list[bytes]:
    """Everything there is, with more turns than a ring can need."""
    payloads: list[bytes] = []
    for _ in range(SIZE):
        if not reader.pending:
            return payloads
        payloads += reader.drain(16)
    raise AssertionError("the reader comes to no end")


@given(st.lists(st.integers(0, 300) | st.none(), max_size=200), st.integers(1024 + 128, 9000))
def test_what_is_read_is_what_was_put_and_every_number_has_one_account(
    steps: list[int | None], size: int
) -> None:
    writer, reader, _ = ring(size)
    put: list[bytes] = []
    read: list[bytes] = []

    for step in steps:
        if step is None:
            read += reader.drain(3)
        elif step <= payload_size_max(size):
            payload = b"%d:" % len(put) + bytes(step)
            if len(payload) <= payload_size_max(size):
                writer.put(payload)
                put.append(payload)
    read += drained(reader)

    assert [int(each.partition(b":")[0]) for each in read] == sorted(
        {put.index(each) for each in read}
    )
    assert reader.accepted == len(read)
    assert reader.accepted + reader.overwritten == reader.sequence == writer.sequence == len(put)
    assert reader.damaged == 0
    assert not put or read[-1] == put[-1]


def test_a_reader_that_was_overtaken_goes_on_at_a_mark_and_keeps_most_of_a_lap() -> None:
    writer, reader, _ = ring()
    for number in range(1000):
        writer.put(b"%04d" % number)

    read = drained(reader)

    assert read[-1] == b"0999"
    assert len(read) > 0.8 * (SIZE - RING_HEADER_SIZE) / 24
    assert reader.overwritten == 1000 - len(read)


def test_a_record_that_is_too_large_is_lost_and_counted() -> None:
    writer, reader, _ = ring()

    writer.put(bytes(payload_size_max(SIZE) + 1))
    writer.put(bytes(payload_size_max(SIZE)))

    assert drained(reader) == [bytes(payload_size_max(SIZE))]
    assert (reader.lost, reader.sequence) == (1, 1)


def test_a_later_reader_goes_on_where_an_earlier_one_was() -> None:
    writer, first, memory = ring()
    for number in range(10):
        writer.put(b"%d" % number)
    _ = first.drain(4)

    second = RingReader(memoryview(memory), first.taken, first.sequence)

    assert drained(second) == [b"%d" % number for number in range(4, 10)]
    assert (second.accepted, second.sequence, second.overwritten) == (6, 10, 0)


def test_a_later_reader_counts_what_was_overwritten_between_the_two() -> None:
    writer, first, memory = ring()
    writer.put(b"first")
    _ = first.drain(1)
    for number in range(1000):
        writer.put(b"%04d" % number)

    second = RingReader(memoryview(memory), first.taken, first.sequence)
    read = drained(second)

    assert read[-1] == b"0999"
    assert 1 + second.accepted + second.overwritten == second.sequence == 1001


def test_one_damaged_record_costs_what_follows_up_to_the_next_mark_and_is_no_lap() -> None:
    writer, reader, memory = ring()
    for number in range(100):
        writer.put(b"%04d" % number)
    memory[RING_HEADER_SIZE + 3 * 24 + 16] ^= 1

    read = drained(reader)
    reader.settle()

    assert read[:3] == [b"0000", b"0001", b"0002"]
    assert b"0003" not in read
    assert read[-1] == b"0099"
    assert (reader.overwritten, reader.sequence) == (0, 100)
    assert reader.damaged == 100 - len(read) > 0


def test_a_damaged_tail_is_accounted_for_when_the_writer_has_ended() -> None:
    writer, reader, memory = ring()
    for number in range(5):
        writer.put(b"%d" % number)
    memory[RING_HEADER_SIZE + 3 * 24 + 16] ^= 1

    read = drained(reader)
    assert reader.sequence == 3
    reader.settle()

    assert len(read) == 3
    assert (reader.damaged, reader.sequence) == (2, 5)


def test_a_record_that_is_not_all_visible_yet_is_waited_for() -> None:
    writer, reader, memory = ring()
    writer.put(b"whole")
    memory[RING_HEADER_SIZE + 16] ^= 1

    early = [reader.drain(4) for _ in range(DOUBTS_MAX - 1)]
    memory[RING_HEADER_SIZE + 16] ^= 1

    assert early == [[]] * (DOUBTS_MAX - 1)
    assert reader.drain(4) == [b"whole"]
    assert reader.damaged == 0


@pytest.mark.parametrize(
    ("size", "word", "value"),
    [(64, 0, 0), (SIZE, 0, 1), (SIZE, 1, SIZE), (SIZE, 1, 0)],
)
def test_memory_that_is_no_ring_is_told(size: int, word: int, value: int) -> None:
    memory = bytearray(SIZE)
    _ = RingWriter(memoryview(memory))
    memory[8 * word : 8 * word + 8] = value.to_bytes(8, "little")

    with pytest.raises(NoRing):
        _ = RingReader(memoryview(memory)[:size])


@pytest.mark.parametrize("seed", range(300))
def test_no_memory_makes_a_reader_raise_loop_or_count_down(seed: int) -> None:
    rng = random.Random(seed)
    writer, reader, memory = ring(RING_SIZE_MIN)
    words = memoryview(memory).cast("Q")
    numbers = (0, 1, 7, 8, 1024, 1 << 31, (1 << 63) - 8, (1 << 64) - 1)
    put = 0

    for _ in range(60):
        match rng.randrange(4):
            case 0:
                writer.put(bytes(rng.randrange(payload_size_max(RING_SIZE_MIN))))
                put += 1
            case 1:
                words[rng.choice((RESERVE_WORD, COMMIT_WORD, COUNT_WORD, *range(5, 16)))] = (
                    rng.choice(numbers)
                )
            case 2:
                memory[rng.randrange(16, len(memory))] = rng.randrange(256)
            case _:
                before = (reader.sequence, reader.accepted, reader.overwritten, reader.damaged)
                assert len(reader.drain(8)) <= 8
                after = (reader.sequence, reader.accepted, reader.overwritten, reader.damaged)
                assert all(a <= b for a, b in zip(before, after, strict=True))
        assert reader.accepted + reader.overwritten + reader.damaged == reader.sequence
        assert 0 <= reader.pending <= RING_SIZE_MIN
    for _ in range(RING_SIZE_MIN):
        if not reader.pending:
            break
        _ = reader.drain(8)
    reader.settle()

    assert reader.accepted + reader.overwritten + reader.damaged == reader.sequence < 1 << 64
    assert not reader.pending

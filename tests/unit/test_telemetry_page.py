"""The page: words, groups and spans as they were written; any memory gets an answer."""

import random  # noqa: TID251 (seeded)

import pytest

from nexus.telemetry import (
    PAGE_SIZE_MIN,
    WORD_MAX,
    Group,
    NoPage,
    PageReader,
    PageWriter,
    SpanRecord,
    called,
    decode_span,
    page_shape,
)

SIZE = 8192
TRACE = b"t" * 16
SPAN = b"s" * 8
ID = int.from_bytes(SPAN, "little")


def page(size: int = SIZE) -> tuple[PageWriter, PageReader, bytearray]:
    memory = bytearray(size)
    writer = PageWriter(memoryview(memory))
    return writer, PageReader(memoryview(memory).toreadonly()), memory


def look(reader: PageReader) -> bool:
    """One pass; whether groups are torn."""
    reader.begin()
    reader.mark()
    reader.copy()
    return reader.settle()


def ended(reader: PageReader) -> list[SpanRecord | None]:
    return [decode_span(each) for each in reader.spans.drain(1000)]


def test_counters_and_gauges_are_read_as_they_stand() -> None:
    writer, reader, _ = page()
    count, depth = reader.allot(), reader.allot()
    assert (count, depth) == (0, 1)
    writer.words[0] = 41
    writer.signed[1] = -7

    torn = look(reader)

    assert not torn
    assert (reader.counter(0), reader.gauge(1), reader.stray) == (41, -7, 0)


def test_a_group_that_is_being_written_keeps_its_former_value_and_is_counted() -> None:
    writer, reader, _ = page()
    first = reader.allot_group(2)
    assert first == 0
    for word, value in enumerate((1, 9, 1, 0)):
        writer.words[word] = value
    _ = look(reader)
    writer.words[0] = 2
    writer.words[1] = 19

    torn = look(reader)
    reader.give_up()

    assert torn
    assert reader.group(0) == Group(1, 9, [1, 0])
    assert (reader.torn, reader.given_up) == (1, 1)


def test_a_group_that_changes_between_the_steps_is_torn() -> None:
    writer, reader, _ = page()
    _ = reader.allot_group(1)
    reader.begin()
    reader.mark()
    writer.words[0] = 1
    reader.copy()

    assert reader.settle()


def test_buckets_that_are_not_the_count_are_not_believed() -> None:
    writer, reader, _ = page()
    _ = reader.allot_group(2)
    for word, value in enumerate((5, 9, 1, 0)):
        writer.words[word] = value

    torn = look(reader)

    assert torn
    assert reader.group(0) == Group(0, 0, [0, 0])


def test_buckets_that_change_without_the_count_are_not_believed() -> None:
    writer, reader, _ = page()
    _ = reader.allot_group(2)
    reader.begin()
    reader.mark()
    writer.words[2] = 1
    reader.copy()

    assert reader.settle()
    assert reader.group(0) == Group(0, 0, [0, 0])


def test_words_without_a_series_are_strays() -> None:
    writer, reader, _ = page()
    _ = reader.allot()
    writer.words[0] = 1
    writer.words[5] = 1
    writer.words[len(writer.words) - 1] = 1

    assert reader.stray == 2


def test_a_page_has_as_many_words_as_its_shape_says_and_no_more() -> None:
    _, reader, _ = page()
    room = reader.room

    words = [reader.allot() for _ in range(room + 1)]

    assert words == [*range(room), None]
    assert room == page_shape(SIZE).states_at // 8 - 8


def test_a_span_is_open_until_it_has_ended_and_is_told_once() -> None:
    writer, reader, _ = page()
    span = writer.spans.open(TRACE + b"p" * 8, ID, 10, called("work", {"a": "b"}))

    _ = look(reader)
    (shown,) = map(decode_span, reader.open_spans())
    writer.spans.close(span, 30, 1, {"c": "d"})
    _ = look(reader)
    first = ended(reader)
    _ = look(reader)

    assert shown == SpanRecord(TRACE, SPAN, b"p" * 8, 10, 0, 0, "work", [("a", "b")])
    assert first == [SpanRecord(TRACE, SPAN, b"p" * 8, 10, 30, 1, "work", [("a", "b"), ("c", "d")])]
    assert (ended(reader), reader.open_spans()) == ([], [])
    assert (reader.spans.accepted, reader.spans.overwritten) == (1, 0)


def test_an_open_span_stays_where_it_is_while_others_go_round() -> None:
    writer, reader, _ = page()
    kept = writer.spans.open(TRACE + SPAN, ID, 1, called("kept", {"long": "x" * 200}))
    units = page_shape(SIZE).units

    for number in range(3 * units):
        span = writer.spans.open(TRACE + SPAN, ID, number, called("short"))
        writer.spans.close(span, number, 1)
    _ = look(reader)
    found = ended(reader)

    (shown,) = map(decode_span, reader.open_spans())
    assert shown is not None
    assert shown.attributes == [("long", "x" * 200)]
    assert [each.start for each in found if each] == list(range(3 * units - len(found), 3 * units))
    assert reader.spans.overwritten == 3 * units - len(found) > 0
    writer.spans.close(kept, 9, 1)
    _ = look(reader)
    assert [each.name for each in ended(reader) if each] == ["kept"]


def test_spans_without_a_place_among_open_ones_are_counted() -> None:
    writer, reader, _ = page(PAGE_SIZE_MIN)
    units = page_shape(PAGE_SIZE_MIN).units

    opened = [writer.spans.open(TRACE + SPAN, ID, 1, called("x")) for _ in range(units + 3)]

    assert opened[-3:] == [-1] * 3
    assert reader.spans.lost == 3
    writer.spans.close(-1, 2, 1)
    _ = look(reader)
    assert len(reader.open_spans()) == units


def test_attributes_at_their_limits_are_told_and_what_is_more_is_cut() -> None:
    writer, reader, _ = page()
    full = {f"k{number}": "v" * 20 for number in range(8)}
    far = {f"k{number}": "v" * 250 for number in range(12)}

    for attributes in (full, far):
        span = writer.spans.open(TRACE + SPAN, ID, 1, called("n" * 48, attributes))
        writer.spans.close(span, 2, 2, attributes)
    _ = look(reader)
    first, second = ended(reader)

    assert first is not None
    assert second is not None
    assert first.attributes[:8] == list(full.items())
    assert 0 < len(second.attributes) < 12
    assert all(each in far.items() for each in second.attributes)


@pytest.mark.parametrize(("size", "word", "value"), [(64, 0, 0), (SIZE, 0, 1), (SIZE, 1, 1)])
def test_memory_that_is_no_page_is_told(size: int, word: int, value: int) -> None:
    memory = bytearray(SIZE)
    _ = PageWriter(memoryview(memory))
    memory[8 * word : 8 * word + 8] = value.to_bytes(8, "little")

    with pytest.raises(NoPage):
        _ = PageReader(memoryview(memory)[:size])


@pytest.mark.parametrize("seed", range(100))
def test_no_memory_makes_a_reader_raise_or_tell_more_than_there_can_be(seed: int) -> None:
    rng = random.Random(seed)
    writer, reader, memory = page(PAGE_SIZE_MIN)
    word, group = reader.allot(), reader.allot_group(4)
    assert word is not None
    assert group is not None
    units = page_shape(PAGE_SIZE_MIN).units

    for _ in range(40):
        for _ in range(rng.randrange(40)):
            memory[rng.randrange(16, len(memory))] = rng.choice(
                (0, 1, 2, 8, 255, rng.randrange(256))
            )
        span = writer.spans.open(TRACE + SPAN, ID, 1, called("x" * rng.randrange(60)))
        before = reader.spans.overwritten
        _ = look(reader)
        reader.give_up()
        spans = reader.spans.drain(1000)
        assert len(spans) + len(reader.open_spans()) <= units
        _ = [decode_span(each) for each in (*spans, *reader.open_spans())]
        assert before <= reader.spans.overwritten < 1 << 62
        assert 0 <= reader.counter(word) <= WORD_MAX
        assert -WORD_MAX - 1 <= reader.gauge(word) <= WORD_MAX
        kept = reader.group(group)
        assert kept.count == sum(kept.buckets) <= WORD_MAX
        assert 0 <= reader.overflow <= WORD_MAX
        writer.spans.close(span, 2, 1)


@pytest.mark.parametrize("size", [0, 7, 8, 63, 64, 65, 200])
def test_any_bytes_are_a_span_or_none(size: int) -> None:
    rng = random.Random(size)

    for _ in range(200):
        found = decode_span(rng.randbytes(size))
        assert found is None or 0 <= found.status <= 5

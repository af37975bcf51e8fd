"""Windows, their parts on disk, and what is made of them at the start: without a kernel."""

from collections.abc import Mapping
from itertools import count, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nexus.abi import Nanos, ServiceId
from nexus.ipc import TimedOut
from nexus.protocols.metricsd import Kind, Resolution, Window
from nexus.services.metricsd.config import Settings
from nexus.services.metricsd.recovery import Recovery
from nexus.services.metricsd.rollup import (
    I64_MAX,
    Figures,
    Rollups,
    figures_of,
    segment_of,
)
from nexus.services.metricsd.series import Key, State
from nexus.services.metricsd.store import Store
from nexus.services.metricsd.wal import (
    PART_SIZE_MAX,
    RECORDS_MAX,
    Meta,
    chunks,
    meta_of,
    part_of,
    segment_key,
    unpack,
    window_key,
)

SHORT, LONG = Nanos(10), Nanos(60)
BOOT = b"boot"
BOUNDS = (10, 20)
META = Meta(1, 0, BOOT, 10, 3, 1000, 0, 1)
HITS = Key(ServiceId(7), Kind.COUNTER, "hits", (("way", "in"),))
LEVEL = Key(ServiceId(7), Kind.GAUGE, "level", ())
TIMES = Key(ServiceId(7), Kind.HISTOGRAM, "times", ())


def rollups(windows: int = 8, boot: int = 0, boot_id: bytes = BOOT) -> Rollups:
    made = Rollups(SHORT, LONG, windows, boot, boot_id)
    made.offset = 1_000_000
    return made


def value(number: int) -> State:
    return State(number, 0, 0, ())


def spread(*buckets: int) -> State:
    return State(0, sum(buckets), 5 * sum(buckets), buckets)


def seen(made: Rollups, key: Key, resolution: Resolution = Resolution.SHORT) -> list[Window]:
    return list(made.windows(key, resolution, 0))


# ------------------------------------------------------------------ windows


def test_a_counter_s_windows_add_up_to_its_increase_and_name_the_largest_step() -> None:
    made = rollups()
    made.begin(Nanos(0))

    for now, number in ((1, 3), (4, 7), (12, 7), (15, 8)):
        _ = made.on_time(Nanos(now))
        made.on_reading(HITS, 1, value(number), (), live=True)

    first, second = seen(made, HITS)
    assert (first.count, first.sum, first.min, first.max, first.last) == (2, 7, 3, 4, 7)
    assert (second.count, second.sum, second.last) == (1, 1, 8)
    (long,) = seen(made, HITS, Resolution.LONG)
    assert (long.sum, long.last) == (8, 8)


def test_a_new_instance_counts_from_nothing_and_the_history_goes_on() -> None:
    made = rollups()
    made.begin(Nanos(0))

    made.on_reading(HITS, 1, value(7), (), live=True)
    made.on_reading(HITS, 2, value(9), (), live=True)

    ((window),) = seen(made, HITS)
    assert (window.sum, window.last) == (16, 9)


def test_a_gauge_has_its_readings_and_no_window_in_which_it_stood_still() -> None:
    made = rollups()
    made.begin(Nanos(0))

    for now, number in ((1, 5), (2, -3), (3, -3), (12, -3), (25, 4)):
        _ = made.on_time(Nanos(now))
        made.on_reading(LEVEL, 1, value(number), (), live=True)

    first, second = seen(made, LEVEL)
    assert (first.count, first.sum, first.min, first.max, first.last) == (3, -1, -3, 5, -3)
    assert (second.min, second.max, second.count) == (4, 4, 1)


def test_a_histogram_has_the_bounds_of_its_new_observations() -> None:
    found = figures_of(Kind.HISTOGRAM, spread(1, 0, 0), spread(1, 2, 1), BOUNDS)

    assert found == Figures(3, 15, 10, 20, 4, [0, 2, 1])


def test_begins_always_grow_whoever_sets_the_clock() -> None:
    made = rollups()
    made.begin(Nanos(0))

    for now in range(1, 50, 10):
        _ = made.on_time(Nanos(now))
        made.offset -= 1_000
        made.on_reading(HITS, 1, value(now), (), live=True)

    starts = [window.start for window in seen(made, HITS)]
    assert len(starts) == 5
    assert all(before < after for before, after in pairwise(starts))


def test_no_more_windows_and_no_more_series_than_may_be_are_kept() -> None:
    made = rollups(windows=7)
    made.entries_max = 3
    made.begin(Nanos(0))
    numbers = count(1)

    for now in range(1, 400, 10):
        _ = made.on_time(Nanos(now))
        for name in "abcde":
            key = Key(ServiceId(1), Kind.COUNTER, name, ())
            made.on_reading(key, 1, value(next(numbers)), (), live=True)
        for resolution in Resolution:
            _ = made.expired(resolution)

    assert {len(kept) for kept in made.closed.values()} <= set(range(8))
    assert made.refused > 0
    assert all(len(list(each.entries())) <= 3 for each in made.closed[Resolution.SHORT])


# ------------------------------------------------------------------ bytes


@given(st.binary(max_size=300))
def test_any_bytes_are_read_without_an_error(data: bytes) -> None:
    found = unpack(data)

    assert found.lost >= 0
    assert all(meta_of(each) is None or each for each in found.payloads)


@given(st.lists(st.binary(min_size=1, max_size=60), min_size=1, max_size=20), st.data())
def test_of_a_part_cut_off_anywhere_the_whole_records_before_the_cut_are_read(
    payloads: list[bytes], data: st.DataObject
) -> None:
    part = part_of(META, payloads)
    cut = data.draw(st.integers(0, len(part)))

    whole, some = unpack(part), unpack(part[:cut])

    assert (whole.payloads[1:], whole.lost) == (payloads, 0)
    assert some.payloads == whole.payloads[: len(some.payloads)]
    assert cut == len(part) or some.lost > 0


@given(st.lists(st.binary(min_size=1, max_size=60), min_size=1, max_size=20), st.data())
def test_a_changed_byte_costs_its_record_and_is_counted(
    payloads: list[bytes], data: st.DataObject
) -> None:
    part = bytearray(part_of(META, payloads))
    at = data.draw(st.integers(0, len(part) - 1))
    part[at] ^= data.draw(st.integers(1, 255))

    found = unpack(bytes(part))

    assert found.lost > 0
    assert set(found.payloads) <= {*payloads, *unpack(part_of(META, [])).payloads}


@given(st.lists(st.binary(min_size=1, max_size=2000), max_size=200))
def test_parts_have_their_size_and_their_number_of_records(payloads: list[bytes]) -> None:
    split = chunks(payloads)

    assert [each for part in split for each in part] == payloads
    assert all(len(part) <= RECORDS_MAX for part in split)
    assert all(len(part_of(META, part)) <= PART_SIZE_MAX for part in split)


# ------------------------------------------------------------------ recovery


def recovered(values: Mapping[str, bytes], now: int, **options: object) -> tuple[Rollups, Recovery]:
    made = rollups(**options)  # type: ignore[arg-type]
    recovery = Recovery()
    for key, data in values.items():
        recovery.on_value(key, data)
    _ = recovery.give(made, SHORT, LONG, Nanos(now))
    made.begin(Nanos(now))
    return made, recovery


def written(made: Rollups, slot: int = 0) -> dict[str, bytes]:
    """Everything as the store would write it: the windows that are over, the WAL of the open."""
    found = {
        window_key(resolution, closed.start, part): data
        for resolution, kept in made.closed.items()
        for closed in kept
        for part, data in enumerate(closed.parts)
    }
    open_ = made.open[Resolution.SHORT]
    if open_ is not None and open_.dirty:
        made.sequence += 1
        found[segment_key(slot)], _ = segment_of(open_, made.boot, made.sequence)
    return found


def filled(until: int = 75) -> Rollups:
    made = rollups()
    made.begin(Nanos(0))
    for now in range(1, until, 4):
        _ = made.on_time(Nanos(now))
        made.on_reading(HITS, 1, value(now), (), live=True)
    return made


def test_readings_go_on_where_an_earlier_metricsd_of_this_boot_ended() -> None:
    before = filled()

    after, recovery = recovered(written(before), 75)
    after.on_reading(HITS, 1, value(80), (), live=True)

    for resolution in Resolution:
        assert sum(each.sum for each in seen(after, HITS, resolution)) == 80
    assert (recovery.found.lost, recovery.found.unwritten) == (0, [])


def test_what_an_earlier_boot_left_open_is_closed_and_is_to_be_written() -> None:
    before = filled()

    after, recovery = recovered(written(before), 5, boot=1, boot_id=b"next")
    after.on_reading(HITS, 1, value(4), (), live=True)

    total = 73 + 4
    for resolution in Resolution:
        assert sum(each.sum for each in seen(after, HITS, resolution)) == total
    assert [each for each, _ in recovery.found.unwritten] == [Resolution.SHORT, Resolution.LONG]
    assert {each.boot for each in seen(after, HITS)} == {0, 1}


def test_a_segment_behind_a_written_window_says_nothing_any_more() -> None:
    before = filled(8)
    segment = written(before, slot=3)
    assert list(segment) == [segment_key(3)]

    _ = before.on_time(Nanos(20))
    before.on_reading(HITS, 1, value(30), (), live=True)
    after, _ = recovered({**segment, **written(before)}, 21)

    assert sum(each.sum for each in seen(after, HITS)) == 30


@pytest.mark.parametrize("missing", range(8))
def test_whatever_value_is_missing_it_starts_and_never_counts_twice(missing: int) -> None:
    values = written(filled())
    keys = sorted(values)
    del values[keys[missing % len(keys)]]

    after, _ = recovered(values, 75)
    after.on_reading(HITS, 1, value(80), (), live=True)

    for resolution in Resolution:
        assert 0 < sum(each.sum for each in seen(after, HITS, resolution)) <= 80


@pytest.mark.parametrize("cut", range(0, 200, 7))
def test_a_value_cut_off_anywhere_is_counted_and_never_fatal(cut: int) -> None:
    values = written(filled())
    for key in sorted(values):
        spoilt = {**values, key: values[key][:cut]}

        after, recovery = recovered(spoilt, 75)
        after.on_reading(HITS, 1, value(80), (), live=True)

        assert cut >= len(values[key]) or recovery.found.lost > 0
        assert sum(each.sum for each in seen(after, HITS)) <= 80


def test_numbers_that_fit_no_answer_are_left_out() -> None:
    made = rollups()
    made.begin(Nanos(0))
    made.on_reading(HITS, 1, value(I64_MAX), (), live=True)
    made.on_reading(HITS, 2, value(I64_MAX), (), live=True)

    ((window),) = seen(made, HITS)
    assert window.sum == window.last == I64_MAX


class Quiet:
    """A log that nobody reads."""

    def warning(self, text: str, /, **fields: str | int) -> None:
        del text, fields


def test_what_cannot_be_written_for_days_is_not_remembered_for_ever() -> None:
    async def connect(_until: Nanos) -> TimedOut:
        return TimedOut()

    made = rollups()
    made.begin(Nanos(0))
    store = Store(Settings(), made, connect, Quiet(), generation=1)
    for number in range(200):
        made.on_reading(HITS, 1, value(number + 1), (), live=True)
        for resolution, closed in made.on_time(Nanos((number + 1) * SHORT)):
            store.on_closed(resolution, closed)
            for old in made.expired(resolution):
                store.on_expired(resolution, old)

    assert store.dropped > 150
    assert len(store._windows) <= 2 * made.windows_max
    assert not store._stale


def test_a_gauge_may_have_the_least_value_there_is() -> None:
    made = rollups()
    made.begin(Nanos(0))
    made.on_reading(LEVEL, 1, value(-(1 << 63)), (), live=True)

    _ = made.on_time(SHORT)

    (window,) = seen(made, LEVEL)
    assert window.min == window.last == -(1 << 63)

"""logd's tail: what is written, what fits a budget, and what a cut leaves to be read."""

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nexus.abi import Nanos, service_id
from nexus.log.payload import packed
from nexus.protocols.logd import EVERY_RECORD, PAGE_MAX, Append, Field, Level
from nexus.protocols.statefsd import BATCH_SIZE_MAX, Changes, decode_changes
from nexus.runtime.wear import Spent, WearBudget
from nexus.services.logd.reading import Entry, Wanted
from nexus.services.logd.tail import (
    IMPORTANT_WAIT,
    RETRY_PAUSE,
    SEGMENT_GROWN,
    SEGMENT_SIZE_MAX,
    SEGMENT_VERSION,
    Found,
    Segment,
    Tail,
    choose,
    entry_size,
    key_of,
    number_of,
    read_segment,
)

SECOND = 1_000_000_000
WALL = 1_790_000_000 * SECOND
EVERY = Nanos(5 * SECOND)
PUMP = service_id("pump")
EXECD = service_id("execd")
ALL = Wanted(EVERY_RECORD)


def entry(number: int, text: str = "text", *, service: int = PUMP, **fields: str) -> Entry:
    level = Level.ERROR if text == "error" else Level.INFO
    request = Append(level, "pump", text, [Field(key, value) for key, value in fields.items()])
    return Entry(number, 100 + number, WALL + number, service, 7, 1, packed(request))


def tail(boot: int = 1, instance: int = 1, **options: Any) -> Tail:
    options = {
        "size_max": 64 * 1024,
        "every": EVERY,
        "budget": WearBudget(1 << 40, 1 << 20),
        **options,
    }
    made = Tail(boot=boot, instance=instance, **options)
    made.begin_after((instance - 1) << 40)
    return made


class Device:
    """What statefsd would keep: batches are all or nothing."""

    def __init__(self) -> None:
        self.values: dict[bytes, bytes] = {}
        self.written = 0

    def apply(self, changes: bytes) -> None:
        decoded: Changes = decode_changes(changes)
        assert len(changes) <= BATCH_SIZE_MAX
        for change in decoded.changes:
            if change.value is None:
                self.values.pop(change.key, None)
            else:
                assert len(change.value) <= SEGMENT_SIZE_MAX
                self.values[change.key] = change.value
                self.written += len(change.value)

    @property
    def size(self) -> int:
        return sum(map(len, self.values.values()))

    def found(self) -> Found:
        found = Found()
        for key, value in sorted(self.values.items()):
            number = number_of(key)
            if number is None:
                continue
            found.sizes[number] = len(value)
            segment = read_segment(number, value)
            if segment is None:
                found.bad += 1
            else:
                found.segments[number] = segment
        return found


class Machine:
    """A tail over a device, with a journal that keeps everything."""

    def __init__(self, device: Device | None = None, **options: Any) -> None:
        self.device = device or Device()
        self.tail = tail(**options)
        self.told = self.tail.on_read(self.device.found())
        self.entries: list[Entry] = []
        self.now = 0

    def add(self, *entries: Entry) -> None:
        self.entries += entries
        for each in entries:
            self.tail.on_records(each.service, [each.payload], Nanos(self.now))

    def run(self, span: int, *, stores: bool = True) -> int:
        """Let time pass; how many writes that made."""
        writes = 0
        until = self.now + span
        while True:
            wake = self.tail.wake
            if wake is None or wake > until:
                self.now = until
                return writes
            self.now = max(self.now, wake)
            new = [each for each in self.entries if each.record > self.tail.persisted]
            write = self.tail.next_write(new, Nanos(self.now), WALL + self.now)
            if write is None:
                continue
            writes += 1
            if stores:
                self.device.apply(write.changes)
                self.tail.on_stored()
            else:
                self.tail.on_failed(Nanos(self.now))

    def kept(self, boot: int = 1) -> list[int]:
        other = tail(boot=99)
        _ = other.on_read(self.device.found())
        found: list[int] = []
        since = 0
        while True:
            page = other.page(boot, since, PAGE_MAX, ALL)
            found += [record.record for record in page.records]
            if not page.next:
                return found
            since = page.next


def test_records_are_written_together_every_few_seconds_and_errors_soon() -> None:
    machine = Machine()

    machine.add(entry(1), entry(2))
    early = machine.run(EVERY - 1)
    at_its_time = machine.run(1)
    machine.add(entry(3), entry(4, "error"))
    soon = machine.run(IMPORTANT_WAIT)
    machine.add(entry(5, event="crash.v1"))
    crash = machine.run(IMPORTANT_WAIT)

    assert (early, at_its_time, soon, crash) == (0, 1, 1, 1)
    assert machine.kept() == [1, 2, 3, 4, 5]
    assert machine.run(10 * EVERY) == 0, "nothing new, nothing written"


def test_what_a_write_may_itself_have_caused_waits_for_somebody_elses_record() -> None:
    machine = Machine()
    statefsd, policyd = service_id("statefsd"), service_id("policyd")
    metricsd = service_id("metricsd")

    machine.add(entry(1, "error", service=statefsd))
    machine.add(entry(2, service=policyd, subject="logd"))
    machine.add(entry(3, service=metricsd, event="span.v1"))
    alone = machine.run(100 * EVERY)
    machine.add(entry(4, service=metricsd, event="metric.v1"))
    together = machine.run(EVERY)
    machine.add(entry(5, service=policyd, subject="pump"))
    again = machine.run(EVERY)

    assert (alone, together, again) == (0, 1, 1)
    assert machine.kept() == [1, 2, 3, 4, 5]


def test_a_segment_is_written_again_until_it_is_large_enough() -> None:
    machine = Machine()

    for number in range(1, 101):
        machine.add(entry(number, "x" * 100))
        _ = machine.run(EVERY)

    sizes = [len(value) for value in machine.device.values.values()]
    assert machine.kept() == list(range(1, 101))
    assert all(SEGMENT_GROWN <= size <= SEGMENT_GROWN + 300 for size in sizes[:-1])
    assert machine.tail.records == 100
    assert machine.tail.size == machine.device.size


def test_the_oldest_go_so_that_the_bytes_stay_inside_the_budget() -> None:
    machine = Machine(size_max=4 * SEGMENT_SIZE_MAX)

    for first in range(1, 2000, 20):
        machine.add(*[entry(number, "x" * 100) for number in range(first, first + 20)])
        _ = machine.run(EVERY)
        assert machine.device.size <= 4 * SEGMENT_SIZE_MAX

    kept = machine.kept()
    assert kept == list(range(kept[0], 2001))
    assert machine.tail.size == machine.device.size


def test_what_does_not_fit_is_left_out_and_counted_the_important_are_not() -> None:
    machine = Machine()
    flood = [entry(number, "x" * 100) for number in range(1, 1001)]
    flood[500] = entry(501, "error")
    quiet = [entry(1001 + number, service=9) for number in range(3)]

    machine.add(*flood, *quiet)
    _ = machine.run(EVERY)

    kept = machine.kept()
    assert {501, 1001, 1002, 1003} <= set(kept)
    assert 1000 in kept, "of each the latest"
    assert machine.tail.left_out + len(kept) == 1003
    (told,) = Machine(machine.device, boot=2).told
    assert (told.records, told.lost, told.left_out) == (len(kept), 0, machine.tail.left_out)


def test_what_several_writes_have_left_out_adds_up() -> None:
    machine = Machine()
    for begin in (1, 1001, 2001):
        machine.add(*[entry(begin + number, "x" * 100) for number in range(1000)])
        _ = machine.run(EVERY)

    (told,) = Machine(machine.device, boot=2).told
    assert told.left_out + told.records + told.lost == 3000


def test_a_failed_write_is_made_again_later_and_later_and_loses_nothing() -> None:
    machine = Machine()
    machine.add(entry(1))

    failed = machine.run(EVERY + 100 * RETRY_PAUSE, stores=False)
    stored = machine.run(1000 * RETRY_PAUSE)

    assert 5 <= failed <= 9
    assert stored == 1
    assert machine.kept() == [1]


def test_errors_of_anybody_do_not_use_up_what_a_crash_needs() -> None:
    machine = Machine(budget=WearBudget(24 * 16384, 24 * 12), trusted={EXECD})
    for number in range(1, 41):
        machine.add(entry(number, "error"))
        _ = machine.run(EVERY)
    of_errors = machine.tail.writes
    machine.add(entry(41, "crashed", service=EXECD, event="crash.v1"))
    _ = machine.run(EVERY)

    assert of_errors == 9, "three quarters of an hour's twelve"
    assert machine.tail.writes == 10
    assert 41 in machine.kept()


def test_the_wear_budget_bounds_bytes_and_writes_and_survives_a_restart() -> None:
    def small() -> WearBudget:
        return WearBudget(24 * 4096, 24 * 12)

    machine = Machine(budget=small())
    for number in range(1, 101):
        machine.add(entry(number, "x" * 100))
        _ = machine.run(EVERY)
    first = machine.device.written
    again = Machine(machine.device, boot=2, budget=small())
    again.now = machine.now
    again.add(*[entry(number, "x" * 100) for number in range(1, 50)])
    _ = again.run(EVERY)

    assert first <= 4096
    assert machine.tail.writes <= 12
    assert machine.tail.budget.refused > 0
    assert machine.device.written == first, "what the first had spent is spent"
    assert small().has_room(3000, WALL + again.now)
    assert not again.tail.budget.has_room(3000, WALL + again.now)


def test_ids_of_a_restarted_logd_stand_beside_those_of_the_first() -> None:
    first = Machine()
    first.add(entry(1), entry(2))
    _ = first.run(EVERY)
    second = Machine(first.device, instance=2)
    base = 1 << 40
    second.add(entry(base + 1))
    _ = second.run(EVERY)

    assert second.kept() == [1, 2, base + 1]
    own = second.tail.page(1, 0, PAGE_MAX, ALL)
    assert [record.record for record in own.records] == [1, 2], "its own it has in its journal"


def test_an_orderly_end_says_that_nothing_is_missing() -> None:
    machine = Machine()
    machine.add(entry(1))
    write = machine.tail.next_write(machine.entries, Nanos(1), WALL, is_end=True)
    assert write is not None
    machine.device.apply(write.changes)

    (told,) = Machine(machine.device, boot=2).told

    assert (told.boot, told.records, told.in_order) == (1, 1, True)


@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 200)), min_size=1, max_size=30),
    st.data(),
)
def test_after_a_cut_at_any_write_it_starts_and_at_most_the_window_is_missing(
    steps: list[tuple[int, int]], data: st.DataObject
) -> None:
    """Every prefix of the batches is what a power cut may leave; some values are damaged too."""
    machine = Machine(size_max=4 * SEGMENT_SIZE_MAX)
    number = 0
    last_written = 0
    cut = data.draw(st.integers(0, len(steps)))
    for step, (count, size) in enumerate(steps):
        new = [entry(number + each + 1, "x" * size) for each in range(count)]
        number += count
        machine.add(*new)
        if step < cut:
            _ = machine.run(EVERY)
            last_written = number
    damaged = 0
    victims = (
        data.draw(st.lists(st.sampled_from(sorted(machine.device.values)), unique=True, max_size=2))
        if machine.device.values
        else []
    )
    survivors = set(machine.kept())
    for victim in victims:
        damaged += 1
        machine.device.values[victim] = data.draw(st.binary(max_size=40))

    again = Machine(machine.device, boot=2)
    found = again.kept()

    assert set(found) <= survivors
    assert found == sorted(found)
    assert again.tail.bad == damaged
    if not damaged and last_written:
        assert found[-1] == last_written
        assert [(each.records, each.lost, each.in_order) for each in again.told] == [
            (len(found), 0, False)
        ]
    lost = survivors - set(found)
    if found and lost:
        between = {each for each in lost if min(found) < each < max(found)}
        assert sum(each.lost for each in again.told) == len(between)
    again.add(entry(1, "after"))
    _ = again.run(EVERY)
    assert again.kept(boot=2) == [1]
    assert not [key for key in machine.device.values if key in victims], "what is bad is deleted"


@given(st.binary(max_size=300))
def test_whatever_is_on_the_device_is_a_segment_or_is_none(value: bytes) -> None:
    found = read_segment(3, value)

    assert found is None or found.number == 3


@pytest.mark.parametrize(
    "change",
    [
        {"version": 2},
        {"number": 4},
        {"boot": -1},
        {"left_out": -1},
        {"before": (1 << 64) - 1},
        {"spent": Spent(today_size=(1 << 64) - 1)},
        {"entries": [entry(1)._replace(payload=b"junk")]},
        {"entries": [entry(1)._replace(pid=1 << 40)]},
        {"entries": [entry(-1)]},
        {"entries": [entry(1, "x" * 300)]},
        {"entries": [entry(1, sender="me")]},
    ],
)
def test_a_segment_that_says_what_no_record_may_be_is_none(change: dict[str, Any]) -> None:
    good = Segment(SEGMENT_VERSION, 3, 1, 1, 0, 0, False, Spent(), [entry(1)])

    assert read_segment(3, msgspec.msgpack.encode(good)) == good
    assert read_segment(3, msgspec.msgpack.encode(msgspec.structs.replace(good, **change))) is None


def test_keys_have_one_spelling() -> None:
    assert number_of(key_of(17)) == 17
    for wrong in (b"/state/observability/logd/tail/11", key_of(17).upper(), key_of(1 << 63), b"x"):
        assert number_of(wrong) is None


def test_choosing_gives_each_sender_its_turn() -> None:
    entries = [entry(number, service=number % 3) for number in range(1, 31)]
    size = entry_size(entries[0])

    chosen = choose(entries, 6 * size)

    assert [each.record for each in chosen] == [25, 26, 27, 28, 29, 30]


def test_a_flood_of_errors_leaves_anothers_crash_its_place() -> None:
    crash = entry(1, "crash", service=1, event="crash.v1")
    errors = [entry(number, "error", service=2) for number in range(2, 40)]
    room = entry_size(crash) + 3 * entry_size(errors[0])

    chosen = choose([crash, *errors], room)

    assert [each.record for each in chosen] == [1, 37, 38, 39]

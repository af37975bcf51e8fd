"""The crash reports: numbered over boots, bounded, written durably, and told apart when damaged."""

from typing import Any

import pytest

from nexus.abi import Nanos
from nexus.ipc import Refused
from nexus.protocols.execd import REPORT_SIZE_MAX, Crash, LastRecord, Report
from nexus.protocols.statefsd import (
    Batch,
    Get,
    Keys,
    ListKeys,
    StatefsdStatus,
    Stored,
    Value,
    decode_changes,
)
from nexus.services.execd.config import Settings
from nexus.services.execd.keeping import AGAIN, FOLDER, NEXT, Keeping, fitted
from nexus.wire import encode

UNTIL = Nanos(10**9)


class Store:
    """statefsd, as far as the reports need it; away when it is told to be."""

    def __init__(self) -> None:
        self.values: dict[bytes, bytes] = {}
        self.away = False
        self.reads_left: int | None = None  # then it is silent

    async def ask(self, request: Any, _until: Nanos) -> Any:
        if self.away:
            return None
        match request:
            case ListKeys(after=after, count=count):
                keys = sorted(key for key in self.values if key > after)
                return Keys(keys[:count], len(keys) > count)
            case Get() if self.reads_left == 0:
                return None
            case Get(key=key):
                if self.reads_left:
                    self.reads_left -= 1
                if key not in self.values:
                    return Refused(StatefsdStatus.NOT_FOUND)
                return Value(self.values[key], 1)
            case Batch(changes=changes):
                for change in decode_changes(changes).changes:
                    if change.value is None:
                        _ = self.values.pop(change.key, None)
                    else:
                        self.values[change.key] = change.value
                return Stored(1, True, False)
            case _:
                raise AssertionError(request)


def run(coroutine: Any) -> Any:
    """The result of a coroutine that waits for nothing."""
    try:
        coroutine.send(None)
    except StopIteration as stop:
        return stop.value
    raise AssertionError("it waits")


def keeping_of(store: Store, *, boot: int = 0, **settings: int) -> Keeping:
    made = Keeping(store, Settings(**settings), boot)  # type: ignore[arg-type]
    run(made.load(UNTIL))
    return made


def report_of(number: int, name: str = "pump", texts: int = 1, size: int = 20) -> Report:
    crash = Crash(
        report=number,
        boot=0,
        wall=1,
        name=name,
        pid=number,
        generation=1,
        code=1,
        signal=0,
        duration=1,
        digest="d",
        reason="exit",
        action="not started again",
    )
    records = [LastRecord(1, 0, f"{index}".ljust(size, "x")) for index in range(texts)]
    return Report(crash, records, [], "", "", "", False)


def keep(keeping: Keeping, name: str = "pump") -> int:
    number = keeping.number()
    _ = run(keeping.keep(report_of(number, name), Nanos(0), UNTIL))
    return number


def test_reports_are_read_back_and_numbers_go_on() -> None:
    store = Store()
    first = keeping_of(store)
    numbers = [keep(first) for _ in range(30)]

    second = keeping_of(store, boot=1)

    assert numbers == list(range(1, 31))
    assert [each.crash.report for each in second.since(0, "")] == numbers
    assert all(each.kept for each in second.since(0, ""))
    assert keep(second) == 31


def test_the_oldest_give_way_in_memory_and_in_the_store_and_are_counted() -> None:
    store = Store()
    keeping = keeping_of(store, reports=3)
    for _ in range(5):
        _ = keep(keeping)

    assert [each.crash.report for each in keeping.since(0, "")] == [3, 4, 5]
    assert keeping.gave_way == 2
    assert sorted(store.values) == [FOLDER + f"{number:012}".encode() for number in (3, 4, 5)]


def test_the_size_of_all_reports_is_bounded_too() -> None:
    store = Store()
    keeping = keeping_of(store, reports_size=REPORT_SIZE_MAX)
    for _ in range(3):
        number = keeping.number()
        report = fitted(report_of(number, texts=8, size=250))
        _ = run(keeping.keep(report, Nanos(0), UNTIL))

    assert sum(len(value) for value in store.values.values()) <= REPORT_SIZE_MAX
    assert keeping.gave_way > 0


def test_what_cannot_be_written_now_is_written_later_and_says_so_meanwhile() -> None:
    store = Store()
    keeping = keeping_of(store)
    store.away = True
    number = keep(keeping)
    before = keeping.get(number)
    assert before is not None
    assert (before.kept, keeping.unsaved, keeping.next_time()) == (False, 1, AGAIN)

    run(keeping.on_time(AGAIN, UNTIL))
    assert keeping.unsaved == 1
    assert keeping.next_time() == 3 * AGAIN, "the pause has doubled"
    store.away = False
    run(keeping.on_time(Nanos(3 * AGAIN), UNTIL))

    after = keeping.get(number)
    assert after is not None
    assert (after.kept, keeping.unsaved, keeping.next_time()) == (True, 0, None)
    assert len(store.values) == 1


def test_numbers_of_a_boot_that_could_not_read_the_kept_ones_are_used_by_no_other() -> None:
    store = Store()
    store.away = True

    keeping = keeping_of(store, boot=3)

    assert keeping.number() == 3001


@pytest.mark.parametrize("damage", [b"", b"\x02rest", b"\x01\xc1", b"\x01" + bytes(40)])
def test_a_damaged_report_is_counted_dropped_and_stops_nothing(damage: bytes) -> None:
    store = Store()
    first = keeping_of(store)
    numbers = [keep(first), keep(first)]
    store.values[FOLDER + b"000000000001"] = damage

    second = keeping_of(store)
    number = keep(second)

    assert second.damaged == 1
    assert [each.crash.report for each in second.since(0, "")] == [numbers[1], number]
    assert number == 3
    assert FOLDER + b"000000000001" not in store.values


def test_a_report_that_could_not_be_read_now_is_left_for_the_next_start() -> None:
    store = Store()
    first = keeping_of(store)
    numbers = [keep(first) for _ in range(3)]
    store.reads_left = 1

    second = keeping_of(store, boot=1)
    store.reads_left = None
    after = keep(second)
    third = keeping_of(store, boot=2)

    assert (second.damaged, second.unread, len(second)) == (0, 2, 2)
    assert after == numbers[-1] + 1, "its number is used all the same"
    assert [each.crash.report for each in third.since(0, "")] == [*numbers, after]


def test_a_report_in_the_place_of_another_is_damaged() -> None:
    store = Store()
    first = keeping_of(store)
    _ = keep(first)
    store.values[FOLDER + b"000000000007"] = store.values.pop(FOLDER + b"000000000001")

    second = keeping_of(store)

    assert (second.damaged, list(second.since(0, ""))) == (1, [])
    assert second.number() == 8


def test_reports_are_found_by_name() -> None:
    keeping = keeping_of(Store())
    _ = keep(keeping, "pump")
    valve = keep(keeping, "valve")

    assert [each.crash.report for each in keeping.since(0, "valve")] == [valve]
    assert list(keeping.since(valve + 1, "valve")) == []


def test_a_report_that_is_too_large_loses_its_oldest_records_first() -> None:
    report = report_of(1, texts=8, size=256)
    large = Report(
        report.crash,
        [LastRecord(1, 0, "\N{SNOWMAN}" * 256) for _ in range(7)] + [LastRecord(2, 0, "last")],
        [],
        "x" * 2048,
        "",
        "",
        False,
    )

    found = fitted(large)

    assert len(encode(found)) <= REPORT_SIZE_MAX
    assert found.records[-1].text == "last"
    assert found.traceback == large.traceback


def test_several_that_could_not_be_written_are_written_one_after_the_other() -> None:
    store = Store()
    keeping = keeping_of(store)
    store.away = True
    for _ in range(3):
        _ = keep(keeping)
    store.away = False
    times = []

    while keeping.unsaved:
        due = keeping.next_time()
        assert due is not None
        run(keeping.on_time(due, UNTIL))
        times.append((due, keeping.next_time()))

    assert len(times) == 3
    assert [after for _, after in times] == [*(Nanos(due + NEXT) for due, _ in times[:2]), None]
    assert len([key for key in store.values if key.startswith(FOLDER)]) == 3

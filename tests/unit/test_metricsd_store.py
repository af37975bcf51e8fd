"""The history on a device: what counts as written, what is read back, what is deleted again."""

from collections.abc import Coroutine
from types import SimpleNamespace
from typing import Any, Final

import pytest

from nexus.abi import ConsoleWrite, Nanos, ServiceId
from nexus.ipc import Posted, Refused, TimedOut
from nexus.protocols.metricsd import Kind, Resolution, Window
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
from nexus.services.metricsd.config import Settings
from nexus.services.metricsd.recovery import Recovery
from nexus.services.metricsd.rollup import Closed, Rollups, segment_of
from nexus.services.metricsd.series import Key, State
from nexus.services.metricsd.store import ACTIVE, DELETES_MAX, Phase, Store
from nexus.services.metricsd.wal import RECORDS_MAX, ROOT, WEAR_KEY, segment_key, window_key

MS: Final = 1_000_000
SHORT, LONG = Nanos(100 * MS), Nanos(600 * MS)
BOUNDS: Final = (10, 20)
SETTINGS: Final = Settings(short="100ms", long="600ms", wal_every="50ms", windows=8)
TIMES: Final = Key(ServiceId(7), Kind.HISTOGRAM, "times", ())


def hits(number: int = 0) -> Key:
    return Key(ServiceId(7), Kind.COUNTER, f"hits{number:03}", ())


def value(number: int) -> State:
    return State(number, 0, 0, ())


def spread(*buckets: int) -> State:
    return State(0, sum(buckets), 5 * sum(buckets), buckets)


class Quiet:
    """A log that nobody reads."""

    def warning(self, text: str, /, **fields: str | int) -> None:
        del text, fields


class Device:
    """statefsd and the way to it: each post is answered with the next look. With `durable` off
    it only says that it has stored; `spoilt` is what it gives back in place of each segment."""

    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}
        self.durable = True
        self.away = False  # no answer comes
        self.full = False  # nothing can be posted
        self.spoilt: bytes | None = None
        self.corrupted: set[str] = set()  # keys whose values cannot be given
        self.batches: list[dict[str, bytes | None]] = []
        self.exchange = SimpleNamespace(peer=SimpleNamespace(alive=True))
        self.outstanding = 0
        self._posts: list[tuple[Any, Any]] = []
        self.store: Store

    async def post(self, request: Any, _now: Nanos, tag: Any) -> Posted:
        if self.full:
            return Posted.FULL
        self._posts.append((request, tag))
        self.outstanding += 1
        return Posted.SENT

    async def take(self, _now: Nanos) -> None:
        posts, self._posts = self._posts, []
        self.outstanding = 0
        for request, tag in posts:
            self.store._on_ended(tag, TimedOut() if self.away else self._answer(request))

    def _answer(self, request: Any) -> Any:
        match request:
            case ListKeys():
                return Keys([key.encode() for key in sorted(self.values)], False)
            case Get():
                key = request.key.decode()
                if key not in self.values:
                    return Refused(StatefsdStatus.NOT_FOUND)
                if key in self.corrupted:
                    return Refused(StatefsdStatus.CORRUPTED)
                is_spoilt = self.spoilt is not None and "/wal/" in key
                return Value(self.spoilt if is_spoilt else self.values[key], 1)  # type: ignore[arg-type]
            case Batch():
                return self._apply(request)
            case _:
                raise AssertionError(request)

    def _apply(self, request: Batch) -> Any:
        changes = decode_changes(request.changes).changes
        batch = {change.key.decode(): change.value for change in changes}
        if len(batch) < len(changes):
            return Refused(StatefsdStatus.INVALID_KEY)
        self.batches.append(batch)
        self.corrupted -= set(batch)
        for key, data in batch.items():
            if data is None:
                _ = self.values.pop(key, None)
            else:
                self.values[key] = data
        return Stored(1, self.durable, False)


class Rig:
    """A store that writes to a device, and readings that come from the test."""

    def __init__(self) -> None:
        self.device = Device()
        self.rollups = Rollups(SHORT, LONG, SETTINGS.windows, 0, b"boot")
        self.store = Store(SETTINGS, self.rollups, self._connect, Quiet(), generation=1)
        self.store._poster = self.device  # type: ignore[assignment] # the way to it
        self.device.store = self.store
        self.console: list[str] = []
        self.now = Nanos(0)

    async def _connect(self, _until: Nanos) -> TimedOut:
        return TimedOut()

    def run(self, span: int, step: int = 10 * MS) -> None:
        """Let the store work for `span` ns, as nexus.services.metricsd.history does."""
        for _ in range(0, span, step):
            self.now = Nanos(self.now + step)
            for resolution, closed in self.rollups.on_time(self.now):
                self.store.on_closed(resolution, closed)
            for resolution in Resolution:
                for closed in self.rollups.expired(resolution):
                    self.store.on_expired(resolution, closed)
            self._drive(self.store.on_time(self.now))
            self._drive(self.store.tell())

    def begin(self) -> None:
        """Until the store has read what there is."""
        self.run(100 * MS)
        assert self.store.phase is Phase.WRITING

    def read(self, number: int, key: Key = hits()) -> None:  # noqa: B008 (a key is a value)
        self.rollups.on_reading(key, 1, value(number), (), live=True)

    def _drive(self, work: Coroutine[Any, Any, None]) -> None:
        try:
            trap = work.send(None)
            while True:
                assert isinstance(trap, ConsoleWrite), trap
                self.console.append(trap.line)
                trap = work.send(None)
        except StopIteration:
            return

    def windows(self) -> set[str]:
        """The keys of windows that are on the device."""
        return {key for key in self.device.values if "/rollup/" in key}

    def wanted(self) -> set[str]:
        """The keys of the windows that are kept."""
        return {
            window_key(resolution, closed.start, part)
            for resolution, kept in self.rollups.closed.items()
            for closed in kept
            for part in range(len(closed.parts))
        }


# ------------------------------------------------------------------ what counts as written


@pytest.mark.parametrize("spoilt", [b"", b"what is this", bytes(6000)])
def test_a_store_that_gives_another_value_back_has_no_active_wal(spoilt: bytes) -> None:
    rig = Rig()
    rig.begin()
    rig.device.spoilt = spoilt

    for number in range(1, 6):
        rig.read(number)
        rig.run(60 * MS)
    before = (rig.store.written, rig.store.is_active, list(rig.console))
    rig.device.spoilt = None
    rig.read(6)
    rig.run(120 * MS)

    assert before[0] > 0
    assert before[1:] == (False, [])
    assert rig.store.is_active
    assert rig.console == [ACTIVE]


def test_a_wal_is_active_when_the_very_value_is_read_back() -> None:
    rig = Rig()
    rig.begin()
    rig.read(1)
    rig.run(20 * MS)
    (key,) = [each for each in rig.device.values if "/wal/" in each]
    rig.device.spoilt = rig.device.values[key][:-1] + b"\xff"

    rig.run(40 * MS)

    assert not rig.store.is_active
    assert rig.console == []


def test_what_was_stored_and_is_not_durable_is_written_again() -> None:
    rig = Rig()
    rig.begin()
    rig.device.durable = False
    rig.read(1)

    rig.run(40 * MS)
    before = (rig.store.written, rig.store.segments, rig.store.is_active, rig.console)
    tries = len(rig.device.batches)
    rig.device.durable = True
    rig.run(1000 * MS)

    assert tries > 0
    assert before == (0, 0, False, [])
    assert rig.windows() == rig.wanted() != set()


def test_a_window_that_is_not_durable_stays_in_the_queue_and_its_segments_too() -> None:
    rig = Rig()
    rig.begin()
    rig.read(1)
    rig.run(40 * MS)
    held = rig.store.segments
    rig.device.durable = False

    rig.run(200 * MS)

    assert held > 0
    assert rig.rollups.closed[Resolution.SHORT]
    assert len(rig.store._windows) == 1
    assert rig.store.segments == held


# ------------------------------------------------------------------ what is deleted again


def test_the_keys_of_windows_that_are_too_old_are_deleted() -> None:
    rig = Rig()
    rig.begin()

    for number in range(1, 40):
        rig.read(number)
        rig.run(100 * MS)

    kept = rig.rollups.closed[Resolution.SHORT]
    assert len(kept) == SETTINGS.windows
    assert not rig.store.dropped
    assert len(rig.windows() - rig.wanted()) <= 2, "those that go with the next write"
    written = {key for batch in rig.device.batches for key, data in batch.items() if data}
    assert len(written - set(rig.device.values)) > 20


@pytest.mark.parametrize("fault", ["away", "full"])
def test_what_was_to_be_deleted_with_a_write_that_failed_goes_with_a_later_one(fault: str) -> None:
    rig = Rig()
    rig.begin()
    stale = [f"{ROOT}rollup/short/w_{number:020}_0" for number in range(DELETES_MAX + 3)]
    rig.device.values |= dict.fromkeys(stale, b"old")
    rig.store._stale.extend(stale)
    setattr(rig.device, fault, True)
    rig.read(1)

    rig.run(60 * MS)
    kept = [key for key in stale if key in rig.device.values]
    setattr(rig.device, fault, False)
    for number in range(2, 12):
        rig.read(number)
        rig.run(100 * MS)

    assert kept == stale
    assert not set(stale) & set(rig.device.values)
    deleted = [key for batch in rig.device.batches for key, data in batch.items() if data is None]
    assert [key for key in deleted if key in stale] == stale, "in their order, each once"


# ------------------------------------------------------------------ merging


def told(made: Rollups, key: Key, resolution: Resolution) -> list[Window]:
    return list(made.windows(key, resolution, 0))


def observed() -> Rollups:
    """Two short windows of one long one, in which a histogram was observed."""
    made = Rollups(SHORT, LONG, 8, 0, b"boot")
    made.begin(Nanos(0))
    made.on_reading(TIMES, 1, spread(1, 0, 2), BOUNDS, live=True)
    made.on_reading(TIMES, 1, spread(1, 3, 2), BOUNDS, live=True)
    _ = made.on_time(SHORT)
    made.on_reading(TIMES, 1, spread(2, 3, 7), BOUNDS, live=True)
    _ = made.on_time(Nanos(2 * SHORT))
    return made


def test_the_buckets_of_all_readings_of_a_window_are_added_up() -> None:
    made = observed()

    assert [each.buckets for each in told(made, TIMES, Resolution.SHORT)] == [[1, 3, 2], [1, 0, 5]]
    assert [each.buckets for each in told(made, TIMES, Resolution.LONG)] == [[2, 3, 7]]


def test_a_long_window_that_is_made_of_short_ones_has_the_buckets_of_all() -> None:
    after = Rollups(SHORT, LONG, 8, 1, b"next")
    recovery = Recovery()
    for closed in observed().closed[Resolution.SHORT]:
        for part, data in enumerate(closed.parts):
            recovery.on_value(window_key(Resolution.SHORT, closed.start, part), data)

    _ = recovery.give(after, SHORT, LONG, Nanos(0))

    (window,) = told(after, TIMES, Resolution.LONG)
    assert (window.count, window.sum, window.buckets) == (12, 60, [2, 3, 7])


def half_written() -> tuple[dict[str, bytes], Closed]:
    """A WAL in which each series has said 1, and of the window, in which each said 3 in the end,
    the first part alone."""
    made = Rollups(SHORT, LONG, 8, 0, b"boot")
    made.begin(Nanos(0))
    keys = [hits(number) for number in range(RECORDS_MAX + 6)]
    for key in keys:
        made.on_reading(key, 1, value(1), (), live=True)
    found = {}
    open_ = made.open[Resolution.SHORT]
    assert open_ is not None
    while open_.dirty:
        made.sequence += 1
        found[segment_key(made.sequence)], written = segment_of(open_, 0, made.sequence)
        open_.dirty.difference_update(written)
    for key in keys:
        made.on_reading(key, 1, value(3), (), live=True)
    ((_, closed),) = made.on_time(SHORT)
    assert len(closed.parts) == 2
    found[window_key(Resolution.SHORT, closed.start, 0)] = closed.parts[0]
    return found, closed


def test_of_a_half_written_window_the_part_counts_before_the_wal_and_the_wal_for_the_rest() -> None:
    values, closed = half_written()
    after = Rollups(SHORT, LONG, 8, 1, b"next")
    recovery = Recovery()
    for key, data in values.items():
        recovery.on_value(key, data)

    found = recovery.give(after, SHORT, LONG, Nanos(0))

    sums = [
        sum(each.sum for each in told(after, hits(number), Resolution.SHORT))
        for number in range(RECORDS_MAX + 6)
    ]
    assert sums == [3] * RECORDS_MAX + [1] * 6
    assert [each for each, _ in found.unwritten] == [Resolution.SHORT, Resolution.LONG]
    assert len(after.closed[Resolution.SHORT]) == 1
    assert found.lost == 0
    assert found.stale == [window_key(Resolution.SHORT, closed.start, 0)]


def test_a_half_written_window_is_written_whole_by_the_next_metricsd() -> None:
    values, _ = half_written()
    rig = Rig()
    rig.rollups.boot, rig.rollups.boot_id = 1, b"next"
    rig.device.values |= values
    rig.begin()

    rig.run(1000 * MS)

    assert len(rig.store._windows) == 0
    assert rig.windows() == rig.wanted() != set()


def test_what_is_damaged_on_the_device_does_not_stop_the_writing() -> None:
    rig = Rig()
    rig.device.values = dict.fromkeys([WEAR_KEY, segment_key(1)], b"x")
    rig.device.corrupted = {WEAR_KEY, segment_key(1)}
    rig.begin()

    rig.read(1)
    rig.run(200 * MS)

    assert rig.store.is_active
    assert rig.windows() == rig.wanted() != set()

"""Roll-ups: what each series did in windows of time, short ones and long ones made of them.

    reading --> open short window --its time is over--> closed, kept, written by others
                open long window  --the same----------> closed, kept, written by others

Windows are cut by the kernel's clock, so that nobody who sets the wall clock cuts one short; their
`start` is told in ns since 1970, as the clock was when they began, and always grows. A window has
the series that changed in it. `windows_max` are kept of each resolution, the oldest go.

What a reading adds, by kind: a counter one count and its increase; a gauge one count and its value;
a histogram its new observations, with `min` and `max` the bounds of their buckets.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Final, NamedTuple

import msgspec

from nexus.abi import Nanos
from nexus.protocols.metricsd import BOUNDS_MAX, Kind, Resolution, Window
from nexus.services.metricsd.series import Key, Labels, State
from nexus.services.metricsd.wal import Meta, chunks, part_of, unpack

I64_MAX: Final = (1 << 63) - 1
I64_MIN: Final = -(1 << 63)
U64_MAX: Final = (1 << 64) - 1
ENTRIES_MAX: Final = 384  # series of a window, unless the settings say otherwise
BUCKETS_MAX: Final = BOUNDS_MAX + 1


class Figures(msgspec.Struct, array_like=True):
    """What happened to one series in a window, as protocols.metricsd.Window tells it."""

    count: int = 0
    sum: int = 0
    min: int = I64_MAX
    max: int = -I64_MAX
    last: int = 0
    buckets: list[int] = []

    def add(self, other: "Figures") -> None:
        """Count what happened later too."""
        self.count = min(self.count + other.count, U64_MAX)
        self.sum = max(-I64_MAX, min(self.sum + other.sum, I64_MAX))
        self.min = min(self.min, other.min)
        self.max = max(self.max, other.max)
        self.last = other.last
        if self.buckets:
            self.buckets = [a + b for a, b in zip(self.buckets, other.buckets, strict=True)]
        else:
            self.buckets = list(other.buckets)


class Entry(msgspec.Struct, array_like=True):
    """One series in one window, as it is kept: its key, what happened, and what it said at the end,
    in which of its lives: from there a later reading goes on. Without a count it is only carried.
    """

    service: int
    kind: int
    name: str
    labels: Labels
    life: int
    figures: Figures
    state: State

    @property
    def key(self) -> Key:
        """The series."""
        return Key(self.service, Kind(self.kind), self.name, self.labels)  # type: ignore[arg-type]


class Place(NamedTuple):
    """Which window it is: of which boot, how long, and its number since that boot's clock was 0."""

    boot_id: bytes
    length: Nanos
    number: int


@dataclass(slots=True, eq=False)
class Open:
    """A window whose time is not over. `dirty` are the series that changed since it was written."""

    place: Place
    start: int
    entries: dict[Key, Entry] = field(default_factory=dict)
    dirty: set[Key] = field(default_factory=set)


@dataclass(frozen=True, slots=True)
class Closed:
    """A window that is over: `parts` are its entries, packed, as they are written."""

    place: Place
    start: int
    boot: int
    parts: tuple[bytes, ...]

    def entries(self) -> Iterator[Entry]:
        """What is in it; parts that were damaged give less."""
        for part in self.parts:
            for payload in unpack(part).payloads[1:]:
                entry = entry_of(payload)
                if entry is not None:
                    yield entry

    def find(self, needle: bytes, key: Key) -> Entry | None:
        """The series' entry."""
        for part in self.parts:
            if needle in part:
                for payload in unpack(part).payloads[1:]:
                    entry = entry_of(payload) if needle in payload else None
                    if entry is not None and entry.key == key:
                        return entry
        return None


_encode: Final = msgspec.msgpack.Encoder().encode
_entry: Final = msgspec.msgpack.Decoder(Entry)


def entry_of(payload: bytes) -> Entry | None:
    """The entry in these bytes; None if there is none."""
    try:
        entry = _entry.decode(payload)
    except msgspec.DecodeError:
        return None
    return entry if entry.kind in tuple(Kind) and _is_sound(entry.figures) else None


def _is_sound(figures: Figures) -> bool:
    """Whether it can be told: every number fits the wire."""
    signed = (figures.sum, figures.min, figures.max, figures.last)
    unsigned = (figures.count, *figures.buckets)
    return (
        all(I64_MIN <= each <= I64_MAX for each in signed)
        and all(0 <= each <= U64_MAX for each in unsigned)
        and len(figures.buckets) <= BUCKETS_MAX
    )


def needle_of(key: Key) -> bytes:
    """What every packed entry of this series contains."""
    return _encode(key.name)


def figures_of(
    kind: Kind, before: State | None, now: State, bounds: tuple[int, ...]
) -> Figures | None:
    """What happened between two readings; None if nothing did. Without one before, or if there is
    less now, the series began anew in between."""
    match kind:
        case Kind.COUNTER:
            begun = before is None or now.value < before.value
            more = now.value - (0 if begun or before is None else before.value)
            return Figures(1, more, more, more, now.value) if more else None
        case Kind.GAUGE:
            return Figures(1, now.value, now.value, now.value, now.value)
        case Kind.HISTOGRAM:
            if before is None or now.observed < before.observed:
                before = State(0, 0, 0, (0,) * len(now.buckets))
            count = now.observed - before.observed
            if not count:
                return None
            buckets = [max(0, a - b) for a, b in zip(now.buckets, before.buckets, strict=True)]
            total = min(max(0, now.total - before.total), I64_MAX)
            hit = [index for index, each in enumerate(buckets) if each] or [0]
            edges = (0, *bounds, bounds[-1] if bounds else 0)
            return Figures(
                count,
                total,
                min(edges[hit[0]], I64_MAX),
                min(edges[hit[-1] + 1], I64_MAX),
                min(now.observed, I64_MAX),
                buckets,
            )


class Rollups:
    """The open windows and the closed ones of both resolutions."""

    def __init__(
        self, short: Nanos, long: Nanos, windows_max: int, boot: int, boot_id: bytes
    ) -> None:
        self.boot = boot
        self.boot_id = boot_id
        self.sequence = 0  # of the latest segment of the WAL
        self.offset = 0  # ns from the kernel's clock to 1970
        self.windows_max = windows_max
        self.entries_max = ENTRIES_MAX  # series of one window
        self.refused = 0  # readings of series beyond that
        self.is_known: Callable[[Key], bool] = _anything
        """Whether somebody has this series now: then what it said must not be forgotten."""
        self.closed: dict[Resolution, list[Closed]] = {each: [] for each in Resolution}
        self.open: dict[Resolution, Open | None] = dict.fromkeys(Resolution)
        self._lengths = {Resolution.SHORT: short, Resolution.LONG: long}
        self._bases: dict[Key, Entry] = {}  # what each series said when it was taken in last
        self._has_taken = False
        self._told: dict[Key, int] = {}  # start of the last long window that has the series

    def know(self, entry: Entry, start: int) -> None:
        """What an earlier metricsd of this boot took in last, in a window that began at `start`;
        readings go on from there."""
        if not self._has_taken:
            self._bases[entry.key] = entry
            self._told[entry.key] = start

    @property
    def has_begun(self) -> bool:
        """Whether readings are taken in."""
        return None not in self.open.values()

    def begin(self, now: Nanos) -> None:
        """Windows begin now; readings of before that are not missed, as what they tell adds up."""
        for resolution in Resolution:
            if self.open[resolution] is None:
                self.open[resolution] = self._opened(resolution, now)

    def configure(
        self, short: Nanos, long: Nanos, windows_max: int
    ) -> list[tuple[Resolution, Closed]]:
        """Use these from now on. Windows of another length are over; they are returned."""
        ended = []
        self.windows_max = windows_max
        lengths = {Resolution.SHORT: short, Resolution.LONG: long}
        for resolution, open_ in self.open.items():
            if open_ is not None and lengths[resolution] != self._lengths[resolution]:
                now = Nanos((open_.place.number + 1) * open_.place.length - 1)
                ended += self._close(resolution)
                self._lengths[resolution] = lengths[resolution]
                self.open[resolution] = self._opened(resolution, now)
        self._lengths = lengths
        return ended

    def next_time(self) -> Nanos | None:
        """When the next window is over."""
        times = [
            Nanos((each.place.number + 1) * each.place.length)
            for each in self.open.values()
            if each is not None
        ]
        return min(times, default=None)

    def on_time(self, now: Nanos) -> list[tuple[Resolution, Closed]]:
        """The windows that are over now, the short one first."""
        ended = []
        for resolution, open_ in self.open.items():
            if open_ is not None and now // open_.place.length > open_.place.number:
                ended += self._close(resolution)
                self.open[resolution] = self._opened(resolution, now)
        return ended

    def on_reading(
        self, key: Key, life: int, state: State, bounds: tuple[int, ...], *, live: bool
    ) -> None:
        """What a series says now."""
        if not self.has_begun:
            return
        self._has_taken = True
        base = self._bases.get(key)
        before = None if base is None or base.life != life else base.state
        if before == state and key.kind is not Kind.GAUGE:
            return
        if key.kind is Kind.GAUGE and not live:
            return
        figures = figures_of(key.kind, before, state, bounds)
        if figures is None:
            return
        entry = Entry(*key, life, figures, state)
        self._bases[key] = entry
        changed = before is None or state != before
        for open_ in self.open.values():
            if open_ is not None:
                self._take(open_, key, entry, changed=changed)

    def _take(self, open_: Open, key: Key, entry: Entry, *, changed: bool) -> None:
        """Add a reading to a window; one that changed nothing makes no new entry."""
        found = open_.entries.get(key)
        if found is None:
            if changed and len(open_.entries) >= self.entries_max:
                self.refused += 1
            elif changed:
                open_.entries[key] = copied(entry)
                open_.dirty.add(key)
            return
        found.figures.add(entry.figures)
        found.life, found.state = entry.life, entry.state
        if changed:
            open_.dirty.add(key)

    # ------------------------------------------------------------------ windows

    def _opened(self, resolution: Resolution, now: Nanos) -> Open:
        length = self._lengths[resolution]
        index = now // length
        start = max(0, self.offset + index * length)
        kept = self.closed[resolution]
        if kept:
            start = max(start, kept[-1].start + 1)
        return Open(Place(self.boot_id, length, index), start)

    def _close(self, resolution: Resolution) -> list[tuple[Resolution, Closed]]:
        """The open window is over; nothing is kept of one in which nothing happened."""
        open_ = self.open[resolution]
        assert open_ is not None
        if resolution is Resolution.LONG:
            self._carry(open_)
        if not open_.entries:
            return []
        closed = closed_of(
            open_.place, open_.start, self.boot, self.sequence, open_.entries.values()
        )
        self.keep(resolution, closed)
        return [(resolution, closed)]

    def _carry(self, open_: Open) -> None:
        """What a series said must outlive the windows that say it: a later metricsd goes on from
        there. One that was told too long ago is told again, with no count, or forgotten if nobody
        has it any more."""
        for key in open_.entries:
            self._told[key] = open_.start
        kept = self.closed[Resolution.LONG]
        if len(kept) + 1 < self.windows_max:
            return
        oldest = kept[len(kept) + 1 - self.windows_max].start
        for key, base in list(self._bases.items()):
            if self._told.get(key, 0) > oldest:
                continue
            if not self.is_known(key):
                del self._bases[key]
                _ = self._told.pop(key, None)
                continue
            open_.entries[key] = Entry(*key, base.life, Figures(), base.state)
            self._told[key] = open_.start

    def keep(self, resolution: Resolution, closed: Closed) -> None:
        """Keep a window; `expired` says what is too old."""
        self.closed[resolution].append(closed)

    def expired(self, resolution: Resolution) -> list[Closed]:
        """Take the windows that are more than may be kept, oldest first."""
        kept = self.closed[resolution]
        surplus = max(0, len(kept) - self.windows_max)
        self.closed[resolution] = kept[surplus:]
        return kept[:surplus]

    # ------------------------------------------------------------------ reading

    def windows(self, key: Key, resolution: Resolution, since: int) -> Iterator[Window]:
        """What is known of a series from `since` on, oldest first, the open window too."""
        kept = self.closed[resolution]
        needle = needle_of(key)
        for index in range(bisect_left(kept, since, key=lambda each: each.start), len(kept)):
            closed = kept[index]
            entry = closed.find(needle, key)
            if entry is not None and entry.figures.count:
                yield told(closed.start, closed.boot, entry.figures)
        open_ = self.open[resolution]
        if open_ is not None and open_.start >= since and key in open_.entries:
            figures = open_.entries[key].figures
            if figures.count:
                yield told(open_.start, self.boot, figures)

    def knows(self, key: Key) -> bool:
        """Whether a series was ever taken in, as far as it is remembered."""
        if key in self._bases:
            return True
        needle = needle_of(key)
        return any(
            closed.find(needle, key) is not None for kept in self.closed.values() for closed in kept
        )


def _anything(_key: Key) -> bool:
    """Whoever has no table of series forgets none."""
    return True


def told(start: int, boot: int, figures: Figures) -> Window:
    """A window as it travels."""
    return Window(
        start=start,
        boot=boot,
        count=figures.count,
        sum=figures.sum,
        min=figures.min,
        max=figures.max,
        last=figures.last,
        buckets=list(figures.buckets),
    )


def copied(entry: Entry) -> Entry:
    """The same, to be added to."""
    figures = entry.figures
    own = Figures(
        figures.count, figures.sum, figures.min, figures.max, figures.last, list(figures.buckets)
    )
    return Entry(*entry.key, entry.life, own, entry.state)


def closed_of(
    place: Place, start: int, boot: int, sequence: int, entries: Iterable[Entry]
) -> Closed:
    """A window that is over, as it is kept and written."""
    split = chunks(_encode(entry) for entry in entries)
    parts = tuple(
        part_of(meta_for(place, start, boot, sequence, index, len(split)), payloads)
        for index, payloads in enumerate(split)
    )
    return Closed(place, start, boot, parts)


def meta_for(place: Place, start: int, boot: int, sequence: int, part: int, parts: int) -> Meta:
    """What the first record of a part says."""
    return Meta(sequence, boot, place.boot_id, place.length, place.number, start, part, parts)


def segment_of(open_: Open, boot: int, sequence: int) -> tuple[bytes, list[Key]]:
    """A segment of the WAL with as many of the dirty entries as it takes, and which those are."""
    keys = sorted(key for key in open_.dirty if key in open_.entries)
    payloads = chunks(_encode(open_.entries[key]) for key in keys)[0]
    meta = meta_for(open_.place, open_.start, boot, sequence, 0, 1)
    return part_of(meta, payloads), keys[: len(payloads)]

"""What the store holds when metricsd starts: which windows, and where readings go on. Pure.

Nothing here is fatal: a part that cannot be read, a record that is not good, a key that is none of
ours is counted and left out. A window that is over and was not written as one when everything
ended is made of the WAL's segments; a long one is made of its short ones.

Rules: of one series in one window the segment with the highest number counts, for it holds all of
the earlier ones; a window that was written as one counts before segments; a segment whose number
is not above that of a written window is behind it and says nothing any more.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from nexus.abi import Nanos
from nexus.protocols.metricsd import Resolution
from nexus.services.metricsd.rollup import (
    Closed,
    Entry,
    Open,
    Place,
    Rollups,
    closed_of,
    copied,
    entry_of,
)
from nexus.services.metricsd.series import Key
from nexus.services.metricsd.wal import SEGMENT, WEAR_KEY, WINDOW, Meta, meta_of, unpack, window_key

RESOLUTIONS: Final = {"short": Resolution.SHORT, "long": Resolution.LONG}


@dataclass(slots=True)
class Parts:
    """The parts of one window that were found."""

    meta: Meta
    values: dict[int, bytes] = field(default_factory=dict)

    @property
    def is_whole(self) -> bool:
        """Whether none is missing."""
        return len(self.values) == self.meta.parts


@dataclass(slots=True, eq=False)
class Recovered:
    """What was made of it."""

    records: int = 0  # good records of the WAL
    lost: int = 0  # records and parts that were not
    sequence: int = 0  # of the latest segment
    slots: dict[int, Place] = field(default_factory=dict)  # segments that are still needed
    unwritten: list[tuple[Resolution, Closed]] = field(default_factory=list)
    stale: list[str] = field(default_factory=list)  # keys that nobody needs


class Recovery:
    """Takes the values of the store one by one, and then gives them to `rollups`."""

    def __init__(self) -> None:
        self.found = Recovered()
        self._segments: list[tuple[int, Meta, list[Entry]]] = []
        self._windows: dict[tuple[Resolution, int], Parts] = {}

    def on_lost(self, key: str) -> None:
        """The store has the key, and cannot give its value."""
        self.found.lost += 1
        self.found.stale.append(key)

    def on_value(self, key: str, value: bytes) -> None:
        """A key and its value."""
        if key == WEAR_KEY:
            return
        segment, window = SEGMENT.match(key), WINDOW.match(key)
        payloads, lost = unpack(value)
        meta = meta_of(payloads[0]) if payloads else None
        if meta is None or (segment is None and window is None):
            self.on_lost(key)
            return
        self.found.lost += lost
        if segment is not None:
            entries = [entry_of(payload) for payload in payloads[1:]]
            good = [each for each in entries if each is not None]
            self.found.lost += len(entries) - len(good)
            self._segments.append((int(segment[1]), meta, good))
            return
        assert window is not None
        place = (RESOLUTIONS[window[1]], int(window[2]))
        parts = self._windows.setdefault(place, Parts(meta))
        if meta.start != place[1] or meta.part != int(window[3]) or meta.parts != parts.meta.parts:
            self.on_lost(key)
            return
        parts.values[meta.part] = value

    def give(self, rollups: Rollups, short: Nanos, long: Nanos, now: Nanos) -> Recovered:
        """Put everything into the roll-ups, whose windows begin after that."""
        found = self.found
        whole = [meta.sequence for meta in self._metas(Resolution.SHORT) if meta is not None]
        behind = max(whole, default=0)
        latest: dict[Place, tuple[Meta, dict[Key, Entry]]] = {}
        for slot, meta, entries in sorted(self._segments, key=lambda each: each[1].sequence):
            found.sequence = max(found.sequence, meta.sequence)
            if meta.sequence <= behind:
                continue
            found.records += len(entries)
            place = place_of(meta)
            found.slots[slot] = place
            _, so_far = latest.setdefault(place, (meta, {}))
            so_far.update((entry.key, entry) for entry in entries)
        found.sequence = max(found.sequence, behind)
        rollups.sequence = found.sequence
        self._keep_whole(rollups, latest)
        current = Place(rollups.boot_id, short, now // short)
        for place, (meta, by_key) in latest.items():
            if place == current:
                self._go_on(rollups, Open(place, meta.start, by_key))
            else:
                self._keep_new(
                    rollups,
                    Resolution.SHORT,
                    closed_of(place, meta.start, meta.boot, found.sequence, by_key.values()),
                )
        self._order(rollups)
        self._know(rollups)
        self._make_long(rollups, short, long, now)
        self._order(rollups)
        return found

    def _metas(self, resolution: Resolution) -> list[Meta | None]:
        return [
            parts.meta if parts.is_whole else None
            for (each, _), parts in self._windows.items()
            if each is resolution
        ]

    def _keep_whole(
        self, rollups: Rollups, latest: Mapping[Place, tuple[Meta, dict[Key, Entry]]]
    ) -> None:
        """Keep the windows that were written; what is there of one that was cut off counts."""
        for (resolution, start), parts in self._windows.items():
            values = tuple(parts.values[each] for each in sorted(parts.values))
            closed = Closed(place_of(parts.meta), start, parts.meta.boot, values)
            if parts.is_whole:
                rollups.keep(resolution, closed)
                continue
            known = latest.get(closed.place)
            if resolution is Resolution.SHORT and known is not None:
                known[1].update((entry.key, entry) for entry in closed.entries())
                self.found.stale += [window_key(resolution, start, each) for each in parts.values]
                continue
            self.found.lost += parts.meta.parts - len(parts.values)
            rollups.keep(resolution, closed)

    def _keep_new(self, rollups: Rollups, resolution: Resolution, closed: Closed) -> None:
        rollups.keep(resolution, closed)
        self.found.unwritten.append((resolution, closed))

    def _go_on(self, rollups: Rollups, found: Open) -> None:
        """Go on with a window whose time is not over, beneath what was taken in meanwhile."""
        begun = rollups.open[Resolution.SHORT]
        if begun is not None:
            for entry in begun.entries.values():
                _merge(found, entry)
            found.dirty = set(found.entries)
        rollups.open[Resolution.SHORT] = found

    def _order(self, rollups: Rollups) -> None:
        for kept in rollups.closed.values():
            kept.sort(key=lambda each: each.start)

    def _know(self, rollups: Rollups) -> None:
        """Where readings of this boot go on."""
        for resolution in (Resolution.LONG, Resolution.SHORT):
            for closed in rollups.closed[resolution]:
                if closed.place.boot_id == rollups.boot_id:
                    for entry in closed.entries():
                        rollups.know(entry, closed.start)
        open_ = rollups.open[Resolution.SHORT]
        if open_ is not None:
            for entry in open_.entries.values():
                rollups.know(copied(entry), open_.start)

    def _make_long(self, rollups: Rollups, short: Nanos, long: Nanos, now: Nanos) -> None:
        """Make the long windows that were not written, of the short ones that are in them."""
        latest: dict[bytes, int] = {}
        for closed in rollups.closed[Resolution.LONG]:
            latest[closed.place.boot_id] = closed.place.number
        groups: dict[Place, Open] = {}
        boots: dict[Place, int] = {}
        shorts = [
            (each.place, each.start, each.boot, list(each.entries()))
            for each in rollups.closed[Resolution.SHORT]
        ]
        open_ = rollups.open[Resolution.SHORT]
        if open_ is not None:
            entries = [copied(each) for each in open_.entries.values()]
            shorts.append((open_.place, open_.start, rollups.boot, entries))
        for place, start, boot, entries in shorts:
            number = place.number * short // long
            if place.length != short or number <= latest.get(place.boot_id, -1):
                continue
            begun = max(
                0, start - (place.number * short - number * long)
            )  # it may be in the middle
            group = groups.setdefault(
                Place(place.boot_id, long, number), Open(Place(place.boot_id, long, number), begun)
            )
            boots[group.place] = boot
            for entry in entries:
                _merge(group, entry)
        for place, group in groups.items():
            if place == Place(rollups.boot_id, long, now // long):
                if rollups.open[Resolution.LONG] is None:
                    rollups.open[Resolution.LONG] = group
            elif group.entries:
                made = closed_of(
                    place, group.start, boots[place], rollups.sequence, group.entries.values()
                )
                self._keep_new(rollups, Resolution.LONG, made)


def _merge(group: Open, entry: Entry) -> None:
    found = group.entries.get(entry.key)
    if found is None:
        group.entries[entry.key] = entry
    elif entry.figures.count:
        found.figures.add(entry.figures)
        found.life, found.state = entry.life, entry.state


def place_of(meta: Meta) -> Place:
    """The window a part is of."""
    return Place(meta.boot_id, Nanos(meta.length), meta.number)

"""Counter, gauge and histogram: a few stores each into cells, wherever these are now.

    waiting --metricsd gave words--> placed --metricsd is gone--> waiting
    waiting --refused--> overflow --metricsd is gone--> waiting

A handle works from its making on and is never made again: what changes is the cells below it. One
thread updates.
"""

from bisect import bisect_left
from collections.abc import Callable
from typing import Final, Protocol, final

from nexus.protocols.metricsd import Kind, Label
from nexus.telemetry import WORD_MAX, PageWriter
from nexus.telemetry.page import BUCKETS, COUNT, SUM

GAUGE_MIN: Final = -WORD_MAX - 1


class Cells(Protocol):
    """Words: of the page, of the task alone, or none at all."""

    def __getitem__(self, index: int, /) -> int: ...

    def __setitem__(self, index: int, value: int, /) -> None: ...


class Waiting(list[int]):
    """Cells of a series that metricsd has not placed yet; counts the stores into cell `counted`."""

    def __init__(self, values: list[int], counted: int) -> None:
        super().__init__(values)
        self._counted = counted
        self.updates = 0

    def __setitem__(self, index: int, value: int, /) -> None:  # type: ignore[override]
        super().__setitem__(index, value)
        self.updates += index == self._counted


class Overflow:
    """The cells of a refused series: an update is counted and has no value."""

    def __init__(self, counted: int, count: Callable[[int], None]) -> None:
        self._counted = counted
        self._count = count

    def __getitem__(self, index: int, /) -> int:
        return 0

    def __setitem__(self, index: int, value: int, /) -> None:
        if index == self._counted:
            self._count(1)


class Series:
    """What the three kinds share: what they are called, and the way of their cells."""

    __slots__ = ("_cells", "_index", "bounds", "kind", "labels", "name", "unit")

    counted = 0  # the cell that every update stores into once

    def __init__(
        self, kind: Kind, name: str, unit: str, labels: list[Label], bounds: tuple[int, ...] = ()
    ) -> None:
        self.kind = kind
        self.name = name
        self.unit = unit
        self.labels = labels
        self.bounds = bounds
        self._cells: Cells = [0] * self.size
        self._index = 0

    @property
    def size(self) -> int:
        """How many words it has."""
        return 1

    def wait(self) -> None:
        """metricsd has no place for it now: the values are kept here."""
        if isinstance(self._cells, Overflow):
            self.forget()
            values = [0] * self.size
        else:
            values = [self._cells[self._index + each] for each in range(self.size)]
        self._move(Waiting(values, self.counted), 0)

    def forget(self) -> None:
        """Begin at 0: what came while it was refused is counted elsewhere."""

    def place(self, page: PageWriter, word: int) -> None:
        """metricsd reads it at `word` from now on, first of all the value it has."""
        raise NotImplementedError

    def refuse(self, count: Callable[[int], None]) -> None:
        """metricsd will not have it: what was and will be updated is counted by `count`."""
        if isinstance(self._cells, Waiting):
            count(self._cells.updates)
        self._move(Overflow(self.counted, count), 0)

    def _move(self, cells: Cells, index: int) -> None:
        """Updates go to `cells` from now on, from `index` on."""
        self._cells = cells
        self._index = index


@final
class Counter(Series):
    """Only grows, and stays at 2^63 - 1."""

    __slots__ = ("_value",)

    def __init__(
        self, kind: Kind, name: str, unit: str, labels: list[Label], bounds: tuple[int, ...] = ()
    ) -> None:
        super().__init__(kind, name, unit, labels, bounds)
        self._value = 0

    def inc(self, amount: int = 1) -> None:
        """Add `amount`, which is not negative."""
        self._value = value = self._value + amount
        if amount < 0 or value > WORD_MAX:
            assert amount >= 0, "a counter only grows"
            self._value = value = WORD_MAX
        self._cells[self._index] = value

    def place(self, page: PageWriter, word: int) -> None:
        """As Series.place."""
        page.words[word] = self._value
        self._move(page.words, word)

    def forget(self) -> None:
        """As Series.forget."""
        self._value = 0


@final
class Gauge(Series):
    """A signed number of 64 bits that is what it was set to last; further out it is the limit."""

    __slots__ = ()

    def set(self, value: int) -> None:
        """It is `value` now."""
        try:
            self._cells[self._index] = value
        except ValueError:
            self._cells[self._index] = _clamped(value)

    def add(self, amount: int) -> None:
        """Change it by `amount`, which may be negative."""
        self._cells[self._index] = _clamped(self._cells[self._index] + amount)

    def place(self, page: PageWriter, word: int) -> None:
        """As Series.place."""
        page.signed[word] = _clamped(self._cells[0])
        self._move(page.signed, word)


@final
class Histogram(Series):
    """How many values were at most each of the bounds, and more than the last; count and sum."""

    __slots__ = ("_aim", "_figures", "_restart", "observe")

    counted = COUNT

    observe: Callable[[int], None]
    """Take in one value, which is not negative. A function and no method: it has its cells at hand,
    and what it has seen as plain numbers."""

    def __init__(
        self, kind: Kind, name: str, unit: str, labels: list[Label], bounds: tuple[int, ...]
    ) -> None:
        super().__init__(kind, name, unit, labels, bounds)
        self.observe, self._aim, self._figures, self._restart = _observer(bounds, self._cells)

    @property
    def size(self) -> int:
        """Count, sum, and a word for each bucket."""
        return BUCKETS + len(self.bounds) + 1

    def place(self, page: PageWriter, word: int) -> None:
        """As Series.place. It stands still for a reader when the last bucket is there."""
        cells = page.signed[word : word + self.size]
        for index, value in enumerate(self._figures()):
            cells[index] = min(value, WORD_MAX)
        self._move(cells, 0)

    def forget(self) -> None:
        """As Series.forget."""
        self._restart()

    def _move(self, cells: Cells, index: int) -> None:
        assert index == 0
        super()._move(cells, index)
        self._aim(cells)


def _observer(
    bounds: tuple[int, ...], cells: Cells
) -> tuple[
    Callable[[int], None], Callable[[Cells], None], Callable[[], list[int]], Callable[[], None]
]:
    """What takes in values; where it is to store from now on; what it has seen; from 0 again."""
    count = total = 0
    # A bucket has the index of its cell: the bounds of the cells before it are below all values.
    edges = (*[-1] * BUCKETS, *bounds)
    counts = [0] * (len(edges) + 1)

    def observe(value: int) -> None:
        nonlocal count, total
        bucket = bisect_left(edges, value)
        assert bucket, "buckets begin at 0"
        counts[bucket] = seen = counts[bucket] + 1
        count += 1
        total += value
        cells[COUNT] = count
        try:
            cells[SUM] = total
        except ValueError:  # more than a word can have
            total = WORD_MAX
            cells[SUM] = total
        cells[bucket] = seen

    def aim(at: Cells) -> None:
        nonlocal cells
        cells = at

    def figures() -> list[int]:
        return [count, total, *counts[BUCKETS:]]

    def restart() -> None:
        nonlocal count, total
        count = total = 0
        counts[:] = [0] * len(counts)

    return observe, aim, figures, restart


def _clamped(value: int) -> int:
    return max(GAUGE_MIN, min(value, WORD_MAX))


assert {COUNT, SUM} == set(range(BUCKETS)), "in _observer a bucket has the index of its cell"

"""The table of series: who has which, within caps, and those whose instance has ended.

    unknown --created--> live --its instance ended--> gone --created again--> live, the same number
                                                      gone --GONE_MAX others ended since--> unknown

A series belongs to a service: its key is (service, kind, name, labels in the order of their keys).
Caps hold for live series: of one metric of one service, of one service, and in all. So nobody uses
up what others need, and a service that is gone takes nothing (services.md W5, W9, D16).
"""

from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from nexus.abi import Nanos, Pid, Sender, ServiceId
from nexus.protocols.metricsd import Kind, Label
from nexus.protocols.metricsd import Series as Told

OWN: Final = ServiceId(0)  # owner of metricsd's own series
GONE_MAX: Final = 256  # series of instances that ended, kept to be read
REFUSED_NAMES_MAX: Final = 32  # metrics counted one by one when they are refused; then "other"
REFUSED_NAME: Final = "nexus_series_refused_total"
OWN_MAX: Final = 64  # series of metricsd's own: REFUSED_NAMES_MAX, and one per kind of loss
OTHER: Final = "other"
COUNTER_MAX: Final = (1 << 63) - 1  # what a Series can tell; there a counter stays
SUM_MAX: Final = (1 << 64) - 1
DEFAULT_BOUNDS: Final = (1_000_000, 5_000_000, 20_000_000, 100_000_000)  # ns (services.md 3.5)

Labels = tuple[tuple[str, str], ...]


class Instance(NamedTuple):
    """One life of a service."""

    service: ServiceId
    generation: int
    pid: Pid

    @classmethod
    def of(cls, sender: Sender) -> "Instance":
        """The instance that sent a message."""
        return cls(sender.service, sender.generation, sender.pid)


class Key(NamedTuple):
    """What makes two series one."""

    service: ServiceId
    kind: Kind
    name: str
    labels: Labels


class State(NamedTuple):
    """What a series says at one moment: `value` of a counter or gauge, the rest of a histogram."""

    value: int
    observed: int
    total: int
    buckets: tuple[int, ...]


@dataclass(slots=True, eq=False)
class Series:
    """One series. `word` is the first of its words in its instance's page; None by message.

    `since` is when its instance began to count, and not after its first value."""

    number: int
    key: Key
    instance: Instance
    since: Nanos
    unit: str = ""
    bounds: tuple[int, ...] = ()
    word: int | None = None
    value: int = 0
    count: int = 0
    sum: int = 0
    buckets: list[int] = field(default_factory=list)
    at: Nanos = Nanos(0)  # noqa: RUF009 (an int)
    live: bool = True
    counted: bool = True  # against the caps
    paged: bool = False  # it is updated in a page, also while that is opened anew
    passing: bool = False  # told to who asks, and neither exported nor kept in the history
    exported: State | None = None

    def __post_init__(self) -> None:
        if self.key.kind is Kind.HISTOGRAM and not self.buckets:
            self.buckets = [0] * (len(self.bounds) + 1)

    @property
    def words(self) -> int:
        """Words in a page: of a histogram sequence, count, sum and one per bucket."""
        return words_of(self.key.kind, len(self.bounds))

    @property
    def state(self) -> State:
        """What it says now."""
        return State(self.value, self.count, self.sum, tuple(self.buckets))

    def set_value(self, value: int, at: Nanos) -> None:
        """A counter or gauge as it was read."""
        self.value = min(value, COUNTER_MAX)
        self.at = at

    def set_group(self, count: int, total: int, buckets: Sequence[int], at: Nanos) -> None:
        """A histogram as it was read."""
        self.count, self.sum, self.buckets = count, total, list(buckets)
        self.at = at

    def observe(self, value: int, at: Nanos) -> None:
        """One value for a histogram that comes by message; bounds are inclusive."""
        self.buckets[bisect_left(self.bounds, value)] += 1
        self.count += 1
        self.sum = min(self.sum + value, SUM_MAX)
        self.at = at

    def begin_anew(self, instance: Instance, since: Nanos) -> None:
        """Another instance has it now; its values begin at nothing."""
        self.instance = instance
        self.since = self.at = since
        self.live = True
        self.word = None
        self.paged = False
        self.value = self.count = self.sum = 0
        self.buckets = [0] * len(self.buckets)

    def told(self) -> Told:
        """The series as it travels."""
        return Told(
            series=self.number,
            service=self.key.service,
            generation=self.instance.generation,
            kind=self.key.kind,
            name=self.key.name,
            unit=self.unit,
            labels=[Label(key, value) for key, value in self.key.labels],
            value=self.value,
            count=self.count,
            sum=self.sum,
            bounds=list(self.bounds),
            buckets=list(self.buckets),
            at=self.at,
            live=self.live,
            since=min(self.since, self.at),
        )


def words_of(kind: Kind, bounds: int) -> int:
    """Words that a series of this kind takes in a page."""
    return 3 + bounds + 1 if kind is Kind.HISTOGRAM else 1


def sorted_labels(labels: Sequence[Label]) -> Labels:
    """Labels in the order of their keys: the order in which they are told makes no other series."""
    return tuple(sorted((label.key, label.value) for label in labels))


@dataclass(frozen=True, slots=True, kw_only=True)
class Caps:
    """How many live series there may be."""

    total: int
    per_service: int
    per_metric: int


class Table:
    """Every series, by key and by number. metricsd's own are counted against no cap."""

    def __init__(self, caps: Caps) -> None:
        self.caps = caps
        self._by_key: dict[Key, Series] = {}
        self._numbers: list[int] = []  # in order
        self._by_number: dict[int, Series] = {}
        self._gone: dict[int, Series] = {}  # by number, the first to go first
        self._of: dict[ServiceId, dict[int, Series]] = {}  # live ones, by number
        self._metrics: Counter[tuple[ServiceId, Kind, str]] = Counter()  # live ones
        self._counts: Counter[ServiceId] = Counter()  # live ones that count
        self._live = 0
        self._next = 1

    def __len__(self) -> int:
        """Live series of others."""
        return self._live

    def __iter__(self) -> Iterator[Series]:
        """All of them by number, metricsd's own and those that are gone too."""
        return (self._by_number[number] for number in self._numbers)

    def find(self, key: Key) -> Series | None:
        """The series of this key, live or gone."""
        return self._by_key.get(key)

    def by_number(self, number: int) -> Series | None:
        """The series of this number, if it is still known."""
        return self._by_number.get(number)

    def live_of(self, service: ServiceId) -> list[Series]:
        """The live series of a service, by number."""
        return list(self._of.get(service, {}).values())

    def count_of(self, service: ServiceId) -> int:
        """How many live series a service has."""
        return self._counts[service]

    def count_of_metric(self, key: Key) -> int:
        """How many live series the metric of `key` has."""
        return self._metrics[key[:3]]

    def is_full_for(self, key: Key) -> bool:
        """Whether one more series of this key is more than a cap allows."""
        return (
            self.count_of_metric(key) >= self.caps.per_metric
            or self.count_of(key.service) >= self.caps.per_service
            or self._live >= self.caps.total
        )

    def add(
        self,
        key: Key,
        instance: Instance,
        unit: str,
        bounds: tuple[int, ...],
        *,
        since: Nanos,
        counted: bool = True,
    ) -> Series:
        """A new series, or one that is gone and lives again. Caps were looked at before."""
        found = self._by_key.get(key)
        if found is not None and found.bounds != bounds:
            self._forget(found)
            found = None
        if found is None:
            found = Series(self._next, key, instance, since, unit, bounds)
            found.at = since
            self._next += 1
            self._by_key[key] = found
            self._by_number[found.number] = found
            insort(self._numbers, found.number)
        else:
            _ = self._gone.pop(found.number)
            found.begin_anew(instance, since)
        found.counted = counted
        found.paged = not counted
        self._count(found, 1)
        return found

    def visible(self, key: Key, instance: Instance, since: Nanos) -> Series:
        """What metricsd itself tells of a service; it counts against no cap."""
        series = self._by_key.get(key)
        if series is not None and series.live and series.instance == instance:
            return series
        if series is not None and series.live:
            self.end(series)
        return self.add(key, instance, "", (), since=since, counted=False)

    def passing(self, key: Key, instance: Instance, since: Nanos) -> Series | None:
        """As `visible`, for what would be a record at every turn; None if a later instance of the
        service has it."""
        series = self._by_key.get(key)
        if series is not None and series.live and series.instance.generation > instance.generation:
            return None
        series = self.visible(key, instance, since)
        series.passing = True
        return series

    def end(self, series: Series) -> None:
        """The instance of a series has ended; the series that went first is forgotten for it."""
        assert series.live
        self._count(series, -1)
        series.live = False
        series.word = None
        self._gone[series.number] = series
        if len(self._gone) > GONE_MAX:
            self._forget(next(iter(self._gone.values())))

    def since(self, number: int) -> Iterator[Series]:
        """Series with this number or a later one, in order."""
        for index in range(bisect_left(self._numbers, number), len(self._numbers)):
            yield self._by_number[self._numbers[index]]

    def _count(self, series: Series, by: int) -> None:
        key = series.key
        if key.service == OWN:
            return
        if series.counted:
            self._live += by
            self._counts[key.service] += by
            self._metrics[key[:3]] += by
            if not self._metrics[key[:3]]:
                del self._metrics[key[:3]]
            if not self._counts[key.service]:
                del self._counts[key.service]
        own = self._of.setdefault(key.service, {})
        if by > 0:
            own[series.number] = series
        else:
            del own[series.number]
        if not own:
            del self._of[key.service]

    def _forget(self, series: Series) -> None:
        del self._gone[series.number]
        del self._by_key[series.key]
        del self._by_number[series.number]
        _ = self._numbers.pop(bisect_left(self._numbers, series.number))


class Own:
    """metricsd's own series, of service 0: what it refused and what it lost, for all to see."""

    def __init__(self, table: Table, instance: Instance) -> None:
        self._table = table
        self._instance = Instance(OWN, instance.generation, instance.pid)
        self._refused: set[str] = set()

    def count(self, name: str, value: int, at: Nanos, *labels: tuple[str, str]) -> None:
        """Say that a counter of one's own has this value; it appears with its first."""
        series = self._series(name, labels)
        if series is not None:
            series.set_value(value, at)
        elif value:
            key = Key(OWN, Kind.COUNTER, name, labels)
            self._table.add(key, self._instance, "", (), since=at).set_value(value, at)

    def on_series_refused(self, metric: str, at: Nanos) -> None:
        """A cap refused a series of this metric."""
        if metric not in self._refused and len(self._refused) >= REFUSED_NAMES_MAX:
            metric = OTHER
        self._refused.add(metric)
        labels = (("metric", metric),)
        series = self._series(REFUSED_NAME, labels)
        self.count(REFUSED_NAME, 1 if series is None else series.value + 1, at, *labels)

    def _series(self, name: str, labels: Labels) -> Series | None:
        return self._table.find(Key(OWN, Kind.COUNTER, name, labels))

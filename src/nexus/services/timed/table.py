"""The timers: who set which, when each fires, and what fires together.

    (register | sleep) -> LIVE --due(deadline passed)--> FIRED
                           LIVE --cancel | forget--> gone
    FIRED, nobody waiting --> KEPT --wait | forget | pushed out by newer ones--> gone

No clock and no messages: the caller says what time it is, and gets back what to answer.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from typing import Final, Generic, NamedTuple, TypeVar

from nexus.abi import LinkId, Nanos, ServiceId
from nexus.protocols.timed import (
    AHEAD_MAX,
    TIMER_ID_MAX,
    TIMERS_MAX,
    TIMERS_PER_OWNER_MAX,
    TimedStatus,
)

KEPT_PER_OWNER_MAX: Final = TIMERS_PER_OWNER_MAX  # firings nobody has waited for yet
STALE_MAX: Final = TIMERS_MAX  # heap entries of timers that are gone; then the heap is rebuilt

WaiterT = TypeVar("WaiterT")


class Owner(NamedTuple):
    """One instance of a service, as the kernel stamped it."""

    service: ServiceId
    generation: int


class Firing(NamedTuple):
    """A timer fired at `now`; nobody was waiting. `link` is the one it was registered over."""

    deadline: Nanos
    now: Nanos
    link: LinkId


@dataclass(slots=True)
class Entry(Generic[WaiterT]):
    """A live timer or sleep. `deadline` is the coalesced one. `waiter` is who hears of it."""

    timer_id: int
    owner: Owner
    link: LinkId
    deadline: Nanos
    sleeps: bool
    waiter: WaiterT | None


def coalesce(deadline: Nanos, window: Nanos) -> Nanos:
    """`deadline` rounded up to a multiple of `window`; a window of 0 leaves it as it is."""
    if window == 0:
        return deadline
    return Nanos(-(-deadline // window) * window)


class TimerTable(Generic[WaiterT]):
    """All timers of all owners, within their limits."""

    def __init__(self) -> None:
        self._live: dict[int, Entry[WaiterT]] = {}
        self._owned: dict[Owner, int] = {}  # live entries of each owner, never 0
        self._kept: dict[Owner, dict[int, Firing]] = {}  # oldest first, never empty
        self._newest: dict[ServiceId, int] = {}  # highest generation seen
        self._heap: list[tuple[Nanos, int]] = []  # holds every live entry, and stale ones
        self._last_id = 0
        self.pushed_out = 0  # firings that nobody took in time

    def __len__(self) -> int:
        return len(self._live)

    def owned(self, owner: Owner) -> int:
        """How many timers and sleeps of `owner` are live."""
        return self._owned.get(owner, 0)

    @property
    def owners(self) -> int:
        """How many owners have a live timer or a kept firing."""
        return len(self._owned.keys() | self._kept.keys())

    @property
    def sleepers(self) -> int:
        """How many of the live entries are sleeps."""
        return sum(entry.sleeps for entry in self._live.values())

    @property
    def kept(self) -> int:
        """Firings waiting for a Wait."""
        return sum(len(firings) for firings in self._kept.values())

    def add(
        self,
        owner: Owner,
        link: LinkId,
        deadline: Nanos,
        fires: Nanos,
        now: Nanos,
        *,
        sleeper: WaiterT | None = None,
    ) -> Entry[WaiterT] | TimedStatus:
        """Set a timer, or with `sleeper` a sleep, that fires at `fires`: `deadline`, coalesced.

        A refusal changes nothing.
        """
        if deadline > now + AHEAD_MAX:
            return TimedStatus.INVALID_ARGS
        if self._is_full(owner):
            return TimedStatus.OVER_LIMIT
        entry = Entry(
            timer_id=self._take_id(),
            owner=owner,
            link=link,
            deadline=fires,
            sleeps=sleeper is not None,
            waiter=sleeper,
        )
        self._live[entry.timer_id] = entry
        self._owned[owner] = self.owned(owner) + 1
        heappush(self._heap, (entry.deadline, entry.timer_id))
        return entry

    def cancel(self, owner: Owner, timer_id: int) -> Entry[WaiterT] | None:
        """Drop a live timer of `owner`; None if it has none of that id. Sleeps have no id."""
        entry = self._timer(owner, timer_id)
        if entry is not None:
            self._drop(entry)
        return entry

    def take_kept(self, owner: Owner, timer_id: int) -> Firing | None:
        """The kept firing of a timer of `owner`; it is given once."""
        firings = self._kept.get(owner)
        if firings is None:
            return None
        firing = firings.pop(timer_id, None)
        if not firings:
            del self._kept[owner]
        return firing

    def find(self, owner: Owner, timer_id: int) -> Entry[WaiterT] | None:
        """The live timer of `owner` with that id."""
        return self._timer(owner, timer_id)

    def next_time(self) -> Nanos | None:
        """When the next timer is due."""
        self._trim()
        return self._heap[0][0] if self._heap else None

    def due(self, now: Nanos) -> list[Entry[WaiterT]]:
        """Take out every timer whose deadline has come, the earliest first."""
        fired = []
        while self._heap and self._heap[0][0] <= now:
            deadline, timer_id = heappop(self._heap)
            entry = self._live.get(timer_id)
            if entry is not None and entry.deadline == deadline:
                self._drop(entry)
                fired.append(entry)
        return fired

    def keep(self, entry: Entry[WaiterT], now: Nanos) -> None:
        """Keep the firing of a timer that nobody waited for; the owner's oldest gives way."""
        assert entry.timer_id not in self._live, "only a fired timer is kept"
        assert not entry.sleeps, "a sleeper is always there"
        firings = self._kept.setdefault(entry.owner, {})
        if len(firings) >= KEPT_PER_OWNER_MAX:
            del firings[next(iter(firings))]
            self.pushed_out += 1
        firings[entry.timer_id] = Firing(entry.deadline, now, entry.link)

    def forget_link(self, link: LinkId) -> None:
        """The link is gone: nobody can be told about what was asked for over it."""
        for entry in [entry for entry in self._live.values() if entry.link == link]:
            self._drop(entry)
        for owner, firings in list(self._kept.items()):
            for timer_id in [each for each, firing in firings.items() if firing.link == link]:
                del firings[timer_id]
            if not firings:
                del self._kept[owner]

    def meet(self, owner: Owner) -> None:
        """A request of `owner` arrived: what an earlier instance of that service set is freed."""
        if self._newest.get(owner.service, 0) >= owner.generation:
            return
        self._newest[owner.service] = owner.generation
        for earlier in self._earlier(owner):
            for entry in [entry for entry in self._live.values() if entry.owner == earlier]:
                self._drop(entry)
            _ = self._kept.pop(earlier, None)

    def _earlier(self, owner: Owner) -> Iterator[Owner]:
        for other in self._owned.keys() | self._kept.keys():
            if other.service == owner.service and other.generation < owner.generation:
                yield other

    def _is_full(self, owner: Owner) -> bool:
        return self.owned(owner) >= TIMERS_PER_OWNER_MAX or len(self._live) >= TIMERS_MAX

    def _take_id(self) -> int:
        """The next id: never 0, and of nothing that lives or whose firing is kept."""
        timer_id = self._last_id
        while True:  # ends: a few thousand of TIMER_ID_MAX ids are taken, by the bounds above
            timer_id = timer_id % TIMER_ID_MAX + 1
            if timer_id not in self._live and not any(
                timer_id in firings for firings in self._kept.values()
            ):
                self._last_id = timer_id
                return timer_id

    def _timer(self, owner: Owner, timer_id: int) -> Entry[WaiterT] | None:
        entry = self._live.get(timer_id)
        if entry is None or entry.owner != owner or entry.sleeps:
            return None
        return entry

    def _drop(self, entry: Entry[WaiterT]) -> None:
        """Take a live entry out; its heap entry may stay behind, stale."""
        del self._live[entry.timer_id]
        left = self._owned[entry.owner] - 1
        if left:
            self._owned[entry.owner] = left
        else:
            del self._owned[entry.owner]
        if len(self._heap) > len(self._live) + STALE_MAX:
            self._heap = [(each.deadline, each.timer_id) for each in self._live.values()]
            heapify(self._heap)

    def _trim(self) -> None:
        """Drop stale entries from the front of the heap."""
        while self._heap:
            deadline, timer_id = self._heap[0]
            entry = self._live.get(timer_id)
            if entry is not None and entry.deadline == deadline:
                return
            _ = heappop(self._heap)

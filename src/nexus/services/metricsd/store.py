"""The history on disk: written to statefsd without waiting for it, read back when metricsd starts.

    seeking --a way to statefsd--> reading --every key is read--> writing
       ^------- statefsd is gone, or refuses: after a pause ---------|

One write is out at a time, a batch of one part, what was written today, and the keys of windows
that are too old; it is asked for as durable, and nothing counts as written before the answer. What
is not written stays where it is, in windows that grow no further, so memory is bounded however
long statefsd is away. Nobody waits for this.

A part is written at most once a turn: a segment of the WAL holds what changed since the last one,
and its slot is free again when its window was written as one. So nothing is written twice but the
sums themselves: flash wears by what happened and not by how long the history is.
"""

import json
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Final, Protocol

import msgspec

from nexus.abi import BLOCK_SIZE, AbiError, ConsoleWrite, Nanos
from nexus.ipc import (
    CallFailure,
    Client,
    Posted,
    Poster,
    Refused,
    RouteFailure,
    deadline_after,
)
from nexus.protocols.metricsd import Resolution
from nexus.protocols.statefsd import (
    LIST_MAX,
    Batch,
    Change,
    Changes,
    Durability,
    Get,
    Keys,
    ListKeys,
    StatefsdStatus,
    Stored,
    Value,
)
from nexus.runtime.wear import Spent, WearBudget
from nexus.services.metricsd.config import Settings
from nexus.services.metricsd.recovery import Recovered, Recovery
from nexus.services.metricsd.rollup import Closed, Place, Rollups, segment_of
from nexus.services.metricsd.series import Key
from nexus.services.metricsd.wal import ROOT, WEAR_KEY, segment_key, window_key
from nexus.wire import encode

ANSWER_WAIT: Final = Nanos(5_000_000_000)  # ns for a durable write; a slow card takes half a second
DISCOVERY_WAIT: Final = Nanos(50_000_000)  # ns of one search for statefsd
LOOK_PAUSE: Final = Nanos(100_000_000)  # ns between two tries, doubling
LOOK_PAUSE_MAX: Final = Nanos(5_000_000_000)  # ns
GRACE: Final = Nanos(1_000_000_000)  # ns after our start in which statefsd need not be there
POLL: Final = Nanos(2_000_000)  # ns between two looks after an answer, doubling
POLL_MAX: Final = Nanos(50_000_000)  # ns
RECOVERY_MAX: Final = Nanos(30_000_000_000)  # ns; then windows begin without the old ones
READS_MAX: Final = 4  # keys that are read at a time
KEYS_MAX: Final = 4096  # keys that are looked at; what is beyond is not of our making
DELETES_MAX: Final = 8  # keys that go with one write
WRITE_OVERHEAD: Final = 128  # bytes of one change besides its value: key, record, frame
FULL: Final = 32  # entries of a segment that had no room for more, at least
ACTIVE: Final = "[INFO metricsd] retention wal active"

Connect = Callable[[Nanos], Awaitable[Client | RouteFailure]]
"""Finds statefsd, at most until the given time."""


class Say(Protocol):
    """What is needed of nexus.log.Logger."""

    def warning(self, text: str, /, **fields: str | int) -> None:
        """Something is not as it should be; it goes on."""


class Phase(Enum):
    """How far it is."""

    SEEKING = "no key was read yet"
    READING = "keys are listed and read"
    WRITING = "the history is known, and grows"


@dataclass(slots=True)
class Job:
    """One write: of a segment, which `keys` of which window, or of a part of a window."""

    key: str
    value: bytes
    place: Place
    slot: int | None = None
    keys: list[Key] = field(default_factory=list)
    resolution: Resolution | None = None
    is_last: bool = False
    deletes: list[str] = field(default_factory=list)


@dataclass(slots=True)
class Window:
    """A window that is over and is to be written, part by part."""

    resolution: Resolution
    closed: Closed
    next_part: int = 0
    tried: int = 0  # parts that may be on the device


class Store:
    """Writes `rollups` to statefsd, within the budget."""

    def __init__(
        self,
        settings: Settings,
        rollups: Rollups,
        connect: Connect,
        log: Say,
        *,
        generation: int,
    ) -> None:
        self._settings = settings
        self._rollups = rollups
        self._connect = connect
        self._log = log
        self._again_word = "" if generation == 1 else " again"
        self.phase = Phase.SEEKING
        self.wear = WearBudget(settings.bytes_max, settings.writes_per_day)
        self.refused = 0  # writes left out for the budget
        self.failed = 0  # writes and searches that statefsd did not answer as asked
        self.dropped = 0  # windows that were too old before they could be written
        self.written = 0
        self.recovered = Recovered()
        self._recovery = Recovery()
        self._poster: Poster[Any] | None = None
        self._begun: Nanos | None = None
        self._again = Nanos(0)  # nothing is asked before
        self._pause = LOOK_PAUSE
        self._poll = POLL
        self._listed: deque[str] = deque()  # keys to be read
        self._after = b""  # the last key of the latest page
        self._is_listed = False
        self._reading = 0  # reads that are out
        self._out: Job | None = None  # the write that is out
        self._windows: deque[Window] = deque()
        self._stale: deque[str] = deque()  # keys to delete
        self._slots: dict[int, Place] = {}  # segments that are needed
        self._next_wal = Nanos(0)
        self._now = Nanos(0)
        self._evidence: dict[str, str | int] | None = None
        self._verify: tuple[str, bytes] | None = None  # what is to be read back
        self._verifying = False
        self.is_active = False  # a segment was acknowledged as durable and read back equal
        self._is_told = False  # that the budget is used up

    def configure(self, settings: Settings) -> None:
        """Use these from now on; what was spent stays spent."""
        spent = self.wear.spent(self._wall_now)
        self._settings = settings
        self.wear = WearBudget(settings.bytes_max, settings.writes_per_day)
        self.wear.restore(spent)
        for slot in [each for each in self._slots if each >= settings.segments]:
            self._stale.append(segment_key(slot))
            del self._slots[slot]

    @property
    def segments(self) -> int:
        """Segments that are needed now."""
        return len(self._slots)

    def next_time(self) -> Nanos:
        """When there is something to do next."""
        soon = Nanos(self._now + POLL)
        if self._is_waiting:
            return Nanos(self._now + self._poll)
        if self.phase is not Phase.WRITING or self._windows or self._verify:
            return max(self._again, soon)
        return max(self._next_wal, self._again, soon)

    @property
    def is_first_due(self) -> bool:
        """Whether there is something for the first segment, which does not wait for its time: it
        shows that the WAL works."""
        open_ = self._rollups.open[Resolution.SHORT]
        return (
            self.phase is Phase.WRITING
            and not self.is_active
            and self._now >= self._again
            and open_ is not None
            and bool(open_.dirty)
        )

    @property
    def written_today(self) -> int:
        """Bytes that were spent today (UTC), by this metricsd and those before it."""
        return self.wear.written_today(self._wall_now)

    @property
    def _is_waiting(self) -> bool:
        return self._poster is not None and self._poster.outstanding > 0

    async def on_time(self, now: Nanos) -> None:
        """Take answers, and ask for what is next; waits for nothing but a way to statefsd."""
        self._now = now
        if self._begun is None:
            self._begun = now
        if self._poster is not None:
            await self._poster.take(now)
            self._poll = min(Nanos(2 * self._poll), POLL_MAX) if self._is_waiting else POLL
        if not self._rollups.has_begun and now - self._begun >= RECOVERY_MAX:
            self._rollups.begin(now)  # what the store has is added when it can be read
        if now >= self._again and await self._is_reached(now):
            await self._ask(now)

    # ------------------------------------------------------------------ the way there

    async def _is_reached(self, now: Nanos) -> bool:
        """Whether there is a way to statefsd, after one bounded search for it."""
        poster = self._poster
        if poster is not None and poster.exchange.peer.alive:
            return True
        until = deadline_after(now, DISCOVERY_WAIT)
        if poster is None:
            found = await self._connect(until)
            if not isinstance(found, Client):
                self._wait(now)
                return False
            self._poster = Poster(found, self._on_ended, wait=ANSWER_WAIT)
            return True
        client = poster.exchange
        assert isinstance(client, Client), "it was found by name"
        if await client.renew(until) is not None:
            self._wait(now)
            return False
        return True

    def _wait(self, now: Nanos) -> None:
        """Something did not succeed: the next try is a little later. What starts beside us may
        take a moment."""
        self.failed += self._begun is not None and now - self._begun > GRACE
        self._again = deadline_after(now, self._pause)
        self._pause = min(Nanos(2 * self._pause), LOOK_PAUSE_MAX)

    # ------------------------------------------------------------------ what is asked

    async def _ask(self, now: Nanos) -> None:
        match self.phase:
            case Phase.SEEKING | Phase.READING:
                await self._read(now)
            case Phase.WRITING:
                await self._write(now)

    async def _post(self, request: Any, now: Nanos, tag: Any) -> bool:
        assert self._poster is not None
        return await self._poster.post(request, now, tag) is Posted.SENT

    async def _read(self, now: Nanos) -> None:
        """List every key below ROOT, and read each."""
        self.phase = Phase.READING
        if not self._is_listed and not self._reading and not self._listed:
            request = ListKeys(ROOT.encode(), self._after, LIST_MAX)
            self._reading += await self._post(request, now, "list")
        room = READS_MAX - self._reading
        asked = [key for key in list(self._listed)[:room] if await self._is_asked(key, now)]
        self._reading += len(asked)
        if self._is_listed and not self._listed and not self._reading:
            self._begin()

    async def _is_asked(self, key: str, now: Nanos) -> bool:
        """Ask for a key's value; one that cannot be asked for now stays in the list."""
        self._listed.remove(key)
        is_sent = await self._post(Get(key.encode()), now, key)
        if not is_sent:
            self._listed.append(key)
        return is_sent

    def _begin(self) -> None:
        """What can be known is known: windows begin."""
        settings = self._settings
        rollups = self._rollups
        self.phase = Phase.WRITING
        self.recovered = self._recovery.give(
            rollups, settings.short_ns, settings.long_ns, self._now
        )
        self._slots = dict(self.recovered.slots)
        self._stale.extend(self.recovered.stale)
        if not rollups.has_begun:
            rollups.begin(self._now)
        for resolution, closed in self.recovered.unwritten:
            self.on_closed(resolution, closed, tried=len(closed.parts))
        self._next_wal = Nanos(self._now + settings.wal_ns)

    async def _write(self, now: Nanos) -> None:
        """The next write, if none is out."""
        if self._out is not None or self._verifying:
            return
        if self._verify is not None:
            self._verifying = await self._post(Get(self._verify[0].encode()), now, "verify")
            return
        job = self._next_window() or self._next_segment(now)
        if job is None:
            return
        for key in {job.key, WEAR_KEY} & set(self._stale):
            self._stale.remove(key)  # it is written: no batch has a key twice
        while self._stale and len(job.deletes) < DELETES_MAX:
            job.deletes.append(self._stale.popleft())
        if not self._spend(job):
            self._take_back(job)
            return
        request = Batch(self._changes(job), Durability.DURABLE, 0)
        self._out = job
        if not await self._post(request, now, job):
            self._out = None
            self._take_back(job)
        elif job.slot is None:
            self._windows[0].tried = self._windows[0].next_part + 1

    def _take_back(self, job: Job) -> None:
        """A write was not made, or nobody knows: all of it is to be written again."""
        self._stale.extendleft(reversed(job.deletes))
        open_ = self._rollups.open[Resolution.SHORT]
        if job.slot is not None:
            _ = self._slots.pop(job.slot, None)
            if open_ is not None and open_.place == job.place:
                open_.dirty.update(job.keys)

    def _changes(self, job: Job) -> bytes:
        """The part, what was written today, and what nobody needs any more."""
        spent = msgspec.msgpack.encode(self.wear.spent(self._wall_now))
        changes = [
            Change(job.key.encode(), job.value),
            Change(WEAR_KEY.encode(), spent),
            *(Change(each.encode(), None) for each in job.deletes),
        ]
        return encode(Changes(changes))

    def _spend(self, job: Job) -> bool:
        """Whether the budget has room for a write; one it has not waits for the next turn."""
        size = len(job.value) + WRITE_OVERHEAD * (2 + len(job.deletes))
        cost = -(-size // BLOCK_SIZE) * BLOCK_SIZE
        if self.wear.spend(cost, self._wall_now, important=job.resolution is Resolution.LONG):
            self._is_told = False
            return True
        self.refused += 1
        self._again = deadline_after(self._now, self._settings.wal_ns)
        self._next_wal = self._again
        if not self._is_told:
            self._is_told = True
            self._log.warning(
                "the history is not written: its share of the device's wear is used up",
                event="retention.budget.v1",
                written_today=self.wear.written_today(self._wall_now),
                bytes_per_day=self.wear.bytes_per_day,
                writes_per_day=self.wear.writes_per_day,
            )
        return False

    def _next_window(self) -> Job | None:
        """The next part of a window that is over."""
        if not self._windows:
            return None
        window = self._windows[0]
        part = window.next_part
        closed = window.closed
        return Job(
            window_key(window.resolution, closed.start, part),
            closed.parts[part],
            closed.place,
            resolution=window.resolution,
            is_last=part + 1 == len(closed.parts),
        )

    def _next_segment(self, now: Nanos) -> Job | None:
        """What changed since the last segment, if it is time and a slot is free."""
        open_ = self._rollups.open[Resolution.SHORT]
        if now < self._next_wal and not self.is_first_due:
            return None
        slot = self._free_slot()
        if slot is None or open_ is None or not open_.dirty:
            self._next_wal = Nanos(now + self._settings.wal_ns)
            return None
        self._rollups.sequence += 1
        value, keys = segment_of(open_, self._rollups.boot, self._rollups.sequence)
        open_.dirty.difference_update(keys)
        self._slots[slot] = open_.place
        return Job(segment_key(slot), value, open_.place, slot=slot, keys=keys)

    def _free_slot(self) -> int | None:
        """The slot that comes next in the ring, or any that is free."""
        count = self._settings.segments
        first = (self._rollups.sequence + 1) % count
        for offset in range(count):
            slot = (first + offset) % count
            if slot not in self._slots:
                return slot
        return None

    # ------------------------------------------------------------------ windows

    def on_closed(self, resolution: Resolution, closed: Closed, *, tried: int = 0) -> None:
        """A window is over and is to be written; `tried` parts of it may be already."""
        self._windows.append(Window(resolution, closed, tried=tried))

    def on_expired(self, resolution: Resolution, closed: Closed) -> None:
        """A window is too old: its keys go, and it is not written if it was not yet. Where nothing
        can be written for days, nothing is remembered of what never was."""
        parts = len(closed.parts)
        for window in [each for each in self._windows if each.closed is closed]:
            self._windows.remove(window)
            self.dropped += 1
            self._release(closed.place)
            parts = window.tried
        for part in range(parts):
            self._stale.append(window_key(resolution, closed.start, part))

    def _release(self, place: Place) -> None:
        """The segments of this window are needed no more; their slots are free."""
        for slot in [each for each, held in self._slots.items() if held == place]:
            del self._slots[slot]

    # ------------------------------------------------------------------ what is answered

    def _on_ended(self, tag: Any, outcome: object) -> None:
        """A request that was out has its outcome."""
        if isinstance(tag, Job):
            self._on_written(tag, outcome)
        elif tag == "list":
            self._on_listed(outcome)
        elif tag == "verify":
            self._on_verified(outcome)
        else:
            self._on_read(tag, outcome)

    def _on_listed(self, outcome: object) -> None:
        self._reading -= 1
        if not isinstance(outcome, Keys):
            self._wait(self._now)
            return
        self._pause = LOOK_PAUSE
        keys = [key.decode("ascii", errors="replace") for key in outcome.keys]
        self._listed.extend(keys)
        if outcome.keys:
            self._after = outcome.keys[-1]
        self._is_listed = not outcome.more or len(self._listed) >= KEYS_MAX

    def _on_read(self, key: str, outcome: object) -> None:
        self._reading -= 1
        match outcome:
            case Value():
                if key == WEAR_KEY:
                    self._restore(outcome.value)
                self._recovery.on_value(key, outcome.value)
            case Refused(StatefsdStatus.NOT_FOUND):
                pass  # somebody else took it away
            case Refused(StatefsdStatus.CORRUPTED | StatefsdStatus.LARGE):
                self._recovery.on_lost(key)
            case _:
                self._listed.append(key)
                self._wait(self._now)

    def _restore(self, value: bytes) -> None:
        """What an earlier metricsd had written today."""
        try:
            spent = msgspec.msgpack.decode(value, type=Spent)
        except msgspec.DecodeError:
            self.recovered.lost += 1
            return
        self.wear.restore(spent)

    def _on_written(self, job: Job, outcome: object) -> None:
        self._out = None
        if not isinstance(outcome, Stored) or not outcome.durable:
            self._take_back(job)
            self._wait(self._now)
            return
        self._pause = LOOK_PAUSE
        self.written += 1
        if job.slot is None:
            self._on_part(job)
        else:
            self._on_segment(job)

    def _on_segment(self, job: Job) -> None:
        """A segment is durable; the first one is read back. What did not fit is written at once."""
        open_ = self._rollups.open[Resolution.SHORT]
        if open_ is None or open_.place != job.place or not open_.dirty or len(job.keys) < FULL:
            self._next_wal = Nanos(self._now + self._settings.wal_ns)
        if not self.is_active:
            self._verify = (job.key, job.value)

    def _on_part(self, job: Job) -> None:
        """A part of a window is durable."""
        if not self._windows or self._windows[0].closed.place != job.place:
            return  # it was dropped meanwhile
        self._windows[0].next_part += 1
        if job.is_last:
            _ = self._windows.popleft()
            self._release(job.place)

    def _on_verified(self, outcome: object) -> None:
        self._verifying = False
        assert self._verify is not None
        key, value = self._verify
        if isinstance(outcome, Value) and outcome.value == value:
            self.is_active = True
            self._evidence = {"key": key, "size": len(value), "store_sequence": outcome.sequence}
        elif isinstance(outcome, CallFailure):
            return  # asked again
        self._verify = None

    async def tell(self) -> None:
        """Say once on the console that the WAL is active; a full console, next time."""
        if not self.is_active or self._evidence is None:
            return
        try:
            await ConsoleWrite(ACTIVE + self._again_word, json.dumps(self._evidence).encode())
        except AbiError:
            return
        self._evidence = None

    @property
    def _wall_now(self) -> int:
        return max(0, self._now + self._rollups.offset)

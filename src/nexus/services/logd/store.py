"""The tail's way to statefsd: everything is posted, nothing is waited for.

    no statefsd --found, within LOOK_MAX--> listing --> reading --> on
    any --statefsd is gone--> no statefsd, and where it was

logd does all its work without statefsd. What it says of the earlier boots comes when it is there.
"""

from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from typing import Final, TypeAlias

from nexus.abi import Nanos
from nexus.ipc import Client, Posted, Poster, Refused, deadline_after
from nexus.protocols.statefsd import (
    LIST_MAX,
    Batch,
    Durability,
    Get,
    Keys,
    ListKeys,
    StatefsdStatus,
    Stored,
    Value,
)
from nexus.services.logd.reading import Entry
from nexus.services.logd.tail import (
    PREFIX,
    SEGMENTS_MAX,
    Ended,
    Found,
    Tail,
    number_of,
    read_segment,
)

LOOK_MAX: Final = Nanos(20_000_000)  # ns for one search for statefsd, in an idle moment
LOOK_PAUSE: Final = Nanos(50_000_000)  # ns between two searches, doubling; it starts after logd
LOOK_PAUSE_MAX: Final = Nanos(5_000_000_000)  # ns
ANSWER_PAUSE: Final = Nanos(2_000_000)  # ns between two looks after answers, doubling
ANSWER_PAUSE_MAX: Final = Nanos(64_000_000)  # ns
ANSWER_MAX: Final = Nanos(5_000_000_000)  # ns an answer may take to count; flushing may be slow
END_MAX: Final = Nanos(300_000_000)  # ns for the last write of all, when logd is told to stop
READS_MAX: Final = 4  # values on their way at a time
READ_PAUSE: Final = Nanos(1_000_000_000)  # ns until a refused or lost reading is begun again
READ_PAUSE_MAX: Final = Nanos(600_000_000_000)  # ns, doubling; a right comes with a new policy

Look: TypeAlias = Callable[[Nanos], Awaitable[Client | None]]
Entries: TypeAlias = Callable[[int], Iterable[Entry]]


class _Keys:
    """Tags the page of keys that was asked for."""


class _Written:
    """Tags a write."""


Tag: TypeAlias = _Keys | _Written | int  # or the number of the segment that is read


class TailStore:
    """Drives `tail` over a client of statefsd that `look` finds.

    `on_told` hears, once, what the device says of earlier boots.
    """

    def __init__(self, tail: Tail, look: Look, on_told: Callable[[list[Ended]], None]) -> None:
        self._tail = tail
        self._look = look
        self._on_told = on_told
        self._client: Client | None = None
        self._poster: Poster[Tag] | None = None
        self._not_before = Nanos(0)  # a search or a post makes no sense earlier
        self._look_pause = LOOK_PAUSE
        self._read_pause = READ_PAUSE
        self._answers_at: Nanos | None = None
        self._answer_pause = ANSWER_PAUSE
        self._now = Nanos(0)
        self._start_reading()

    def _start_reading(self) -> None:
        self._after: bytes | None = b""  # the page of keys to ask for; None when they are all here
        self._to_read: deque[int] = deque()
        self._reading = 0  # posts of the reading without an answer
        self._found = Found()
        self._keys_asked = False
        self._has_failed = False

    def next_time(self) -> Nanos | None:
        """When there is something to do."""
        if self._answers_at is not None:
            return self._answers_at
        if not self._tail.is_on:
            return self._not_before
        wake = self._tail.wake
        return None if wake is None else max(wake, self._not_before)

    async def on_time(self, now: Nanos, wall: int, entries: Entries) -> None:
        """Take answers, read on, write: each a little."""
        self._now = now
        self._answers_at = None
        if self._poster is not None:
            before = self._poster.outstanding
            await self._poster.take(now)
            if self._poster.outstanding < before:
                self._answer_pause = ANSWER_PAUSE
        if self._not_before <= now:
            await self._go_on(now, wall, entries)
        if self._poster is not None and self._poster.outstanding:
            self._answers_at = deadline_after(now, self._answer_pause)
            self._answer_pause = min(Nanos(2 * self._answer_pause), ANSWER_PAUSE_MAX)
        due = self.next_time()
        if due is not None and due <= now:
            self._not_before = deadline_after(now, LOOK_PAUSE)  # a full queue, as a rule

    async def end(self, now: Nanos, wall: int, entries: Entries) -> None:
        """The last write, with the word that nothing is missing behind it; waited for END_MAX."""
        client = self._client
        if client is None or not client.peer.alive or not self._tail.is_on:
            return
        write = self._tail.next_write(entries(self._tail.persisted + 1), now, wall, is_end=True)
        if write is not None:
            request = Batch(write.changes, Durability.DURABLE, 0)
            outcome = await client.call(request, deadline_after(now, END_MAX))
            self._on_written(outcome)

    async def _go_on(self, now: Nanos, wall: int, entries: Entries) -> None:
        tail = self._tail
        if tail.is_on and (tail.wake is None or tail.wake > now):
            return
        poster = await self._ready(now)
        if poster is None:
            return
        if not tail.is_on:
            await self._read_on(poster, now)
            return
        write = tail.next_write(entries(tail.persisted + 1), now, wall)
        if write is not None:
            request = Batch(write.changes, Durability.DURABLE, 0)
            if await poster.post(request, now, _Written()) is not Posted.SENT:
                tail.on_failed(now)

    async def _ready(self, now: Nanos) -> Poster[Tag] | None:
        """The way to the present statefsd; a new one is looked for if there is none."""
        until = deadline_after(now, LOOK_MAX)
        if self._client is None:
            self._client = await self._look(until)
            if self._client is not None:
                self._poster = Poster(self._client, self._on_ended, wait=ANSWER_MAX)
        elif not self._client.peer.alive and await self._client.renew(until) is not None:
            self._wait_for_it(now)
            return None
        if self._client is None:
            self._wait_for_it(now)
            return None
        self._look_pause = LOOK_PAUSE
        return self._poster

    def _wait_for_it(self, now: Nanos) -> None:
        self._not_before = deadline_after(now, self._look_pause)
        self._look_pause = min(Nanos(2 * self._look_pause), LOOK_PAUSE_MAX)

    # ------------------------------------------------------------------ reading

    async def _read_on(self, poster: Poster[Tag], now: Nanos) -> None:
        """Ask for the next keys and values; begin again if something of it has failed."""
        if self._has_failed:
            if not self._reading:
                self._start_reading()
                self._not_before = deadline_after(now, self._read_pause)
                self._read_pause = min(Nanos(2 * self._read_pause), READ_PAUSE_MAX)
            return
        if self._after is not None and not self._keys_asked:
            request = ListKeys(PREFIX, self._after, LIST_MAX)
            self._keys_asked = await poster.post(request, now, _Keys()) is Posted.SENT
            self._reading += self._keys_asked
        for number in list(self._to_read)[: max(0, READS_MAX - self._reading)]:
            key = PREFIX + b"%016x" % number
            if await poster.post(Get(key), now, number) is not Posted.SENT:
                break
            _ = self._to_read.popleft()
            self._reading += 1
        self._check_read()

    def _check_read(self) -> None:
        """Whether all is here."""
        if self._after is None and not self._to_read and not self._reading and not self._has_failed:
            self._on_told(self._tail.on_read(self._found))

    def _on_keys(self, outcome: object) -> None:
        self._keys_asked = False
        if not isinstance(outcome, Keys):
            self._has_failed = True
            return
        numbers = [number_of(key) for key in outcome.keys]
        self._to_read.extend(each for each in numbers if each is not None)
        known = len(self._found.sizes) + len(self._to_read)
        more = outcome.more and outcome.keys and known < SEGMENTS_MAX
        self._after = outcome.keys[-1] if more else None

    def _on_value(self, number: int, outcome: object) -> None:
        if isinstance(outcome, Value):
            self._found.sizes[number] = len(outcome.value)
            segment = read_segment(number, outcome.value)
            if segment is None:
                self._found.bad += 1
            else:
                self._found.segments[number] = segment
        elif isinstance(outcome, Refused) and outcome.status in (
            StatefsdStatus.CORRUPTED,
            StatefsdStatus.LARGE,
        ):
            self._found.sizes[number] = 0
            self._found.bad += 1
        elif not (isinstance(outcome, Refused) and outcome.status is StatefsdStatus.NOT_FOUND):
            self._has_failed = True

    # ------------------------------------------------------------------ answers

    def _on_ended(self, tag: Tag, outcome: object) -> None:
        """What was posted has its outcome."""
        if isinstance(tag, _Written):
            self._on_written(outcome)
            return
        self._reading -= 1
        if isinstance(tag, int):
            self._on_value(tag, outcome)
        else:
            self._on_keys(outcome)

    def _on_written(self, outcome: object) -> None:
        """Durable, by statefsd's word; anything else is tried again."""
        if isinstance(outcome, Stored) and outcome.durable:
            self._tail.on_stored()
        else:
            self._tail.on_failed(self._now)

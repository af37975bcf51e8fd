"""The persisted tail: which records are written to the device, when, and what is read back.

    away --statefsd found--> listing --keys--> reading --all values--> on
    on --records came, `every` ago, or IMPORTANT_WAIT if one is--> writing
    writing --stored, or failed: the same again later--> on

A segment is one value of statefsd under its number. The open one is written again with what came
since until it is large enough, then the next one begins; the oldest are deleted in the same batch
as a new one is written, so that the bytes on the device stay inside the budget at any cut. What was
spent of the wear budget, and how many records were left out, stands in each segment beside the
records.

What does not fit into a write is left out and counted: the important go first, and of them as of
the others the senders take turns, each with its latest. Records that a write of the tail may itself
have caused, those of statefsd and those of policyd about logd, wait for somebody else's to be
written with.

No I/O here: the service posts what `next_write` gives and tells what became of it.
"""

from collections import defaultdict, deque
from collections.abc import Iterable, Iterator
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Final, NamedTuple

import msgspec

from nexus.abi import Nanos, service_id
from nexus.log.payload import LEVEL_INDEX, NO_PAYLOAD, unpack
from nexus.protocols.logd import Level
from nexus.protocols.statefsd import Change, Changes
from nexus.runtime.wear import Spent, WearBudget
from nexus.services.logd.checks import Looker
from nexus.services.logd.reading import Entry, Page, Wanted, page_of
from nexus.wire import encode

PREFIX: Final = b"/state/observability/logd/tail/"
SEGMENT_VERSION: Final = 1
SEGMENT_SIZE_MAX: Final = 6 * 1024  # bytes of a value; with its key and deletions inside a batch
SEGMENT_GROWN: Final = 2 * 1024  # bytes; from there on a segment is not written again
SEGMENT_HEAD_SIZE: Final = 96  # bytes of a segment besides its records
ENTRY_HEAD_SIZE: Final = 56  # bytes of a record besides its payload, in a segment
SEGMENTS_MAX: Final = 4096  # of a tail; what else lies there is deleted
DELETES_MAX: Final = 16  # of one batch: a tail that shrank does so in a few writes
IMPORTANT_WAIT: Final = Nanos(
    100_000_000
)  # ns until an error is written, so that a few go together
RETRY_PAUSE: Final = 1_000_000_000  # ns after a write that failed, doubling
RETRY_PAUSE_MAX: Final = 600_000_000_000  # ns; a denied right comes with a new policy
IMPORTANT: Final = (b"crash.v1", b"exception.v1")  # events that are written soon at any level
ECHOES: Final = service_id("statefsd")  # whose records a write may have caused
DECIDER: Final = service_id("policyd")  # whose records about logd a write may have caused
SELF: Final = b"logd"
OBSERVER: Final = service_id("metricsd")  # who tells of the spans that a write has caused
SPAN: Final = b"span.v1"
U32: Final = 1 << 32
NUMBER_MAX: Final = 1 << 62  # of a segment, and what it counts; more is none of ours


class Segment(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A value of the tail. `boot` and `instance` say whose ids these are."""

    version: int
    number: int
    boot: int
    instance: int
    before: int  # records of this boot and instance in segments before this one
    left_out: int  # records of this boot and instance that were not written so far
    is_end: bool  # logd ended in order behind it
    spent: Spent
    entries: list[Entry]


_decode: Final = msgspec.msgpack.Decoder(Segment).decode


class Write(NamedTuple):
    """A batch for statefsd, and the bytes it takes of the device."""

    changes: bytes
    size: int


@dataclass(slots=True)
class Ended:
    """What was found of one boot: how much, and what is missing."""

    boot: int
    records: int = 0
    lost: int = 0  # known to be missing in between
    left_out: int = 0
    in_order: bool = False  # nothing is missing behind the last one


@dataclass(slots=True)
class _Kept:
    """A segment on the device."""

    number: int
    size: int
    boot: int
    instance: int
    entries: list[Entry]


@dataclass(slots=True)
class _Attempt:
    """A write on its way."""

    kept: _Kept
    upto: int  # the id of the last record that it settles
    left_out: int
    deleted: list[int]


@dataclass(slots=True)
class Found:
    """What the device says of earlier boots, gathered segment by segment."""

    segments: dict[int, Segment] = field(default_factory=dict)
    sizes: dict[int, int] = field(default_factory=dict)
    bad: int = 0


class Tail:
    """Decides about the tail; `boot` and `instance` are ours. Times are ns: of the kernel's clock
    for waits, of the wall for the budget.

    The part of the budget that is kept for what is important is spent on the word of `trusted`
    services alone: whoever writes errors without end does not use up what a crash needs.
    """

    def __init__(
        self,
        *,
        boot: int,
        instance: int,
        size_max: int,
        every: Nanos,
        budget: WearBudget,
        trusted: AbstractSet[int] = frozenset(),
    ) -> None:
        assert size_max >= 2 * SEGMENT_SIZE_MAX, "of one segment there is always a next one"
        self.boot = boot
        self.budget = budget
        self.records = 0  # kept on the device
        self.size = 0  # bytes of them
        self.lost = 0  # records that are known to be missing
        self.bad = 0  # values that were no segments
        self.left_out = 0  # of this instance
        self.writes = 0
        self._instance = instance
        self._trusted = trusted
        self._size_max = size_max
        self._every = every
        self._kept: deque[_Kept] = deque()
        self._stray: deque[int] = deque()  # numbers on the device that are no segments of ours
        self._is_on = False
        self._number = 0  # of the segment to be written next
        self._open: _Kept | None = None  # the one that is written again
        self._persisted = 0  # the id of the last record that is settled
        self._before = 0  # records in segments of this instance that are not written again
        self._due: int | None = None  # there are records that are reason enough to write
        self._not_before = 0
        self._pause = RETRY_PAUSE
        self._attempt: _Attempt | None = None

    # ------------------------------------------------------------------ reading back

    @property
    def is_on(self) -> bool:
        """Whether everything is read back, so that writing may begin."""
        return self._is_on

    def on_read(self, found: Found) -> list[Ended]:
        """Everything the device has is here: what it says of each boot, oldest first."""
        for number, segment in sorted(found.segments.items()):
            kept = _Kept(
                number, found.sizes[number], segment.boot, segment.instance, segment.entries
            )
            self._kept.append(kept)
            self.size += kept.size
            self.records += len(kept.entries)
        self._stray.extend(sorted(set(found.sizes) - set(found.segments)))
        self.bad += found.bad
        self._number = max(found.sizes, default=-1) + 1
        if found.segments:
            self.budget.restore(found.segments[max(found.segments)].spent)
        told = told_of(found.segments.values())
        self.lost += sum(each.lost for each in told)
        self._is_on = True
        return told

    def page(self, boot: int, since: int, count: int, ready: Wanted) -> Page:
        """A page of an earlier boot, or of earlier instances here; `next` is 0 at its end."""
        entries = (
            entry
            for kept in self._kept
            if kept.boot == boot and (kept.boot != self.boot or kept.instance != self._instance)
            for entry in kept.entries
            if entry.record >= since and ready.is_from(entry.service, entry.pid, entry.generation)
        )
        return page_of(entries, ready, count, boot, 0)

    def ends_of(self, boot: int) -> tuple[int, int] | None:
        """The first and the last id that is kept of a boot."""
        ids = [entry.record for kept in self._kept if kept.boot == boot for entry in kept.entries]
        return (min(ids), max(ids)) if ids else None

    # ------------------------------------------------------------------ writing

    def on_records(self, service: int, payloads: Iterable[bytes], now: Nanos) -> None:
        """Records of a sender were added to the journal."""
        wait: Nanos | None = None
        for payload in payloads:
            if is_echo(service, payload):
                continue
            if is_important(payload):
                wait = IMPORTANT_WAIT
                break
            wait = self._every
        if wait is not None:
            due = now + wait
            self._due = due if self._due is None else min(self._due, due)

    @property
    def wake(self) -> Nanos | None:
        """When `next_write` may have something; None if nothing is to be written."""
        if not self._is_on or self._due is None or self._attempt is not None:
            return None
        return Nanos(max(self._due, self._not_before))

    def next_write(
        self, entries: Iterable[Entry], now: Nanos, wall: int, *, is_end: bool = False
    ) -> Write | None:
        """What is to be written now, of the journal's `entries` behind `persisted`."""
        if self._attempt is not None or not self._is_on:
            return None
        if not is_end and (self.wake is None or now < (self.wake or 0)):
            return None
        new = list(entries)
        self._due = None
        if not new and not is_end:
            return None
        old = self._open.entries if self._open is not None else []
        room = SEGMENT_SIZE_MAX - SEGMENT_HEAD_SIZE - sum(map(entry_size, old))
        chosen = choose(new, room)
        upto = new[-1].record if new else self._persisted
        important = is_end or any(
            each.service in self._trusted and is_important(each.payload) for each in chosen
        )
        number = self._number if self._open is None else self._open.number
        # Ids leave no gaps: what the journal has pushed out meanwhile is left out as well.
        left_out = self.left_out + upto - self._persisted - len(chosen)
        segment = Segment(
            SEGMENT_VERSION,
            number,
            self.boot,
            self._instance,
            self._before,
            left_out,
            is_end,
            self.budget.spent(wall),
            [*old, *chosen],
        )
        kept = _Kept(number, 0, self.boot, self._instance, segment.entries)
        value = msgspec.msgpack.encode(segment)
        if not self.budget.spend(len(value), wall, important=important):
            self._due = now + self._every
            return None
        # What this write costs is part of what was spent.
        value = msgspec.msgpack.encode(
            msgspec.structs.replace(segment, spent=self.budget.spent(wall))
        )
        kept.size = len(value)
        deleted = self._deletions(kept)
        changes = [Change(key_of(number), value)]
        changes += [Change(key_of(each), None) for each in deleted]
        self._attempt = _Attempt(kept, upto, left_out, deleted)
        return Write(encode(Changes(changes)), len(value))

    @property
    def persisted(self) -> int:
        """The id of the last record that was written, or left out for good."""
        return self._persisted

    def begin_after(self, record: int) -> None:
        """The journal's ids begin behind this one."""
        self._persisted = record

    def on_stored(self) -> None:
        """The write is durable."""
        attempt, self._attempt = self._attempt, None
        assert attempt is not None, "there was a write"
        self.writes += 1
        self._pause = RETRY_PAUSE
        self._persisted = attempt.upto
        self.left_out = attempt.left_out
        gone = set(attempt.deleted)
        for kept in [each for each in self._kept if each.number in gone]:
            self._drop(kept)
        self._stray = deque(each for each in self._stray if each not in gone)
        if self._open is not None:
            self._drop(self._open)
        self._kept.append(attempt.kept)
        self.size += attempt.kept.size
        self.records += len(attempt.kept.entries)
        self._open = attempt.kept
        if attempt.kept.size >= SEGMENT_GROWN:
            self._before += len(attempt.kept.entries)
            self._number = attempt.kept.number + 1
            self._open = None

    def on_failed(self, now: Nanos) -> None:
        """The write was refused, or nobody knows: the same segment is written again later."""
        self._attempt = None
        self._not_before = now + self._pause
        self._pause = min(2 * self._pause, RETRY_PAUSE_MAX)
        self._due = self._not_before

    def _drop(self, kept: _Kept) -> None:
        self._kept.remove(kept)
        self.size -= kept.size
        self.records -= len(kept.entries)

    def _deletions(self, new: _Kept) -> list[int]:
        """The oldest segments that have to go so that the new one stays inside the budget."""
        deleted = list(self._stray)[:DELETES_MAX]
        size = self.size + new.size - (0 if self._open is None else self._open.size)
        count = len(self._kept) + 1
        for kept in self._kept:
            if len(deleted) == DELETES_MAX:
                break
            if size <= self._size_max and count <= SEGMENTS_MAX:
                break
            if self._open is None or kept.number != self._open.number:
                deleted.append(kept.number)
                size -= kept.size
                count -= 1
        return deleted


# ------------------------------------------------------------------ values


def key_of(number: int) -> bytes:
    """Where a segment lies; keys are in the order of numbers."""
    return PREFIX + b"%016x" % number


def number_of(key: bytes) -> int | None:
    """The number of the segment under a key; None if it is none of ours."""
    try:
        number = int(key.removeprefix(PREFIX), 16)
    except ValueError:
        return None
    return number if 0 <= number < NUMBER_MAX and key_of(number) == key else None


def read_segment(number: int, value: bytes) -> Segment | None:
    """The segment in a value; None if it is none, whatever the device says."""
    looker = Looker(is_core=True)
    try:
        segment = _decode(value)
        payloads = [unpack(entry.payload) for entry in segment.entries]
    except NO_PAYLOAD:
        return None
    good = (
        (segment.version, segment.number) == (SEGMENT_VERSION, number)
        and 0 <= segment.boot < U32
        and all(0 <= each < NUMBER_MAX for each in _counts(segment))
        and all(looker.refusal_of(payload) is None for payload in payloads)
        and all(_is_natural(entry) for entry in segment.entries)
    )
    return segment if good else None


def _counts(segment: Segment) -> tuple[int, ...]:
    """The numbers that are added to others and told."""
    spent = segment.spent
    return (segment.instance, segment.before, segment.left_out, spent.today_size, spent.today_count)


def _is_natural(entry: Entry) -> bool:
    """Whether these numbers are as the wire can carry them; MessagePack has none above 64 bits."""
    return min(entry[:-1]) >= 0 and entry.pid < U32 and entry.generation < U32


def told_of(segments: Iterable[Segment]) -> list[Ended]:
    """What these segments, in the order of their numbers, say of each boot."""
    boots: dict[int, Ended] = {}
    seen: dict[tuple[int, int], int] = defaultdict(int)  # records of an instance so far
    for segment in segments:
        key = (segment.boot, segment.instance)
        ended = boots.setdefault(segment.boot, Ended(segment.boot))
        if key in seen and segment.before > seen[key]:
            ended.lost += segment.before - seen[key]
        ended.records += len(segment.entries)
        seen[key] = segment.before + len(segment.entries)
        ended.left_out = segment.left_out
        ended.in_order = segment.is_end
    return list(boots.values())


def is_important(payload: bytes) -> bool:
    """Whether a record is to be written soon: an error, a crash."""
    return payload[LEVEL_INDEX] == Level.ERROR or any(mark in payload for mark in IMPORTANT)


def is_echo(service: int, payload: bytes) -> bool:
    """Whether a write of the tail may itself have caused this record."""
    return (
        service == ECHOES
        or (service == DECIDER and SELF in payload)
        or (service == OBSERVER and SPAN in payload)
    )


def entry_size(entry: Entry) -> int:
    """Bytes a record takes in a segment, at most."""
    return ENTRY_HEAD_SIZE + len(entry.payload)


def choose(entries: list[Entry], room: int) -> list[Entry]:
    """Which of these are written into `room` bytes, in their order.

    The important first, and always one of each sender in turn, each time its latest.
    """
    if sum(map(entry_size, entries)) <= room:
        return entries
    chosen: list[Entry] = []
    for entry in _in_turns(entries):
        size = entry_size(entry)
        if size <= room:
            room -= size
            chosen.append(entry)
    return sorted(chosen)


def _in_turns(entries: list[Entry]) -> Iterator[Entry]:
    """The important ones, then the others; of each the senders in turns, the latest first.

    What is important is the sender's word: a flood of errors must not cost another's crash.
    """
    ranks: tuple[dict[int, deque[Entry]], ...] = (defaultdict(deque), defaultdict(deque))
    for entry in reversed(entries):
        ranks[0 if is_important(entry.payload) else 1][entry.service].append(entry)
    for rank in ranks:
        queues = [queue for _, queue in sorted(rank.items())]
        while queues:
            for queue in queues:
                yield queue.popleft()
            queues = [queue for queue in queues if queue]

"""The journal: a ring of records, bounded by their number and their bytes.

A new record always finds room: the oldest are pushed out for it, first those of a sender that
holds more than SHARE_MAX of the ring. So no sender, a core one included, pushes out all that others
have told; alone it may fill the ring. Ids grow, count from one above where the journal begins, and
are never reused; between those that are kept some may be missing. There is no budget over the life
of the journal (services.md W1).

Records that came together are kept together, as their sender has written them: what one costs is
its bytes and a look, and it is decoded when somebody reads it. A record counts for RECORD_OVERHEAD
and the bytes of its payload.
"""

from bisect import bisect_right
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Final

from nexus.abi import Nanos, Sender, ServiceId
from nexus.protocols.logd import (
    FIELDS_SIZE_MAX,
    SCOPE_SIZE_MAX,
    TEXT_SIZE_MAX,
    Field,
    Record,
)
from nexus.services.logd.reading import Entry, Page, Wanted, last_of, page_of
from nexus.services.logd.senders import Row

RECORD_OVERHEAD: Final = 64  # bytes a record counts for besides its payload (services.md 1.3)
FIELD_OVERHEAD: Final = 2  # bytes of a field besides key and value
PAYLOAD_HEAD_MAX: Final = 128  # bytes of a payload besides scope, text and fields
PAYLOAD_SIZE_MAX: Final = PAYLOAD_HEAD_MAX + SCOPE_SIZE_MAX + TEXT_SIZE_MAX + FIELDS_SIZE_MAX
RECORD_SIZE_MAX: Final = RECORD_OVERHEAD + PAYLOAD_SIZE_MAX
"""Bytes one record may count for; no ring may be smaller."""

SHARE_MAX: Final = Fraction(3, 4)  # of the records or bytes; beyond it a sender's own go first
PART: Final = 16  # of the ring: so large a part of it is added at once at most
PART_COUNT_MAX: Final = 64  # records

assert Fraction(1, 2) <= SHARE_MAX < 1, "one sender at a time is beyond it"
assert SHARE_MAX + Fraction(1, PART) < 1, "what is added at once leaves the others their part"


@dataclass(slots=True, eq=False)
class Chunk:
    """Records of one sender that came together: ids and times count up from the first one's."""

    first: int
    at: int
    wall: int
    sender: Sender
    row: Row
    payloads: list[bytes]
    size: int  # what the kept ones count for
    start: int = 0  # those before are pushed out

    def entry(self, index: int) -> Entry:
        """One of them."""
        sender = self.sender
        return Entry(
            self.first + index,
            self.at + index,
            self.wall + index,
            sender.service,
            sender.pid,
            sender.generation,
            self.payloads[index],
        )


@dataclass(slots=True)
class Holding:
    """What the journal has of one sender, oldest first."""

    chunks: deque[Chunk] = field(default_factory=deque)
    count: int = 0
    size: int = 0


class Journal:
    """Keeps at most `records_max` records of `size_max` bytes together; ids begin after `base`."""

    def __init__(self, records_max: int, size_max: int, *, base: int = 0, boot: int = 0) -> None:
        assert records_max >= 1
        assert size_max >= RECORD_SIZE_MAX, "every record fits an empty ring"
        self.base = base
        self.boot = boot
        self.size = 0  # bytes of the kept records
        self.total = 0  # records ever added
        self._count = 0
        self._chunks: list[Chunk] = []
        self._firsts: list[int] = []  # of `_chunks`
        self._holdings: dict[ServiceId, Holding] = {}  # of senders with a record
        self._large: set[ServiceId] = set()  # who was beyond its share when it was looked at last
        self._latest = 0  # time of the latest record
        self.resize(records_max, size_max)

    def __len__(self) -> int:
        return self._count

    @property
    def last(self) -> int:
        """The id of the latest record; `base` if there was none."""
        return self.base + self.total

    @property
    def oldest(self) -> int:
        """The first id that is kept, or the one the next record will have."""
        return self._firsts[0] + self._chunks[0].start if self._chunks else self.last + 1

    @property
    def dropped(self) -> int:
        """Records pushed out by newer ones."""
        return self.total - self._count

    def resize(self, records_max: int, size_max: int) -> None:
        """New bounds; what is too much now is pushed out."""
        self.records_max = records_max
        self.size_max = size_max
        self._count_share = int(records_max * SHARE_MAX)
        self._size_share = int(size_max * SHARE_MAX)
        self._part_count = max(1, min(PART_COUNT_MAX, records_max // PART))
        self._part_size = size_max // PART
        self._make_room(0, 0, None)

    def append(self, sender: Sender, payloads: list[bytes], row: Row, now: Nanos, wall: int) -> int:
        """Add records of `sender`, which `row` counts, in order; the id of the last one.

        Times strictly increase. `wall` is the wall's clock at `now`.
        """
        size = _size_of(payloads)
        if len(payloads) <= self._part_count and (len(payloads) <= 1 or size <= self._part_size):
            self._add(sender, payloads, size, row, now, wall)
            return self.last
        part: list[bytes] = []
        size = 0
        for payload in payloads:
            counts = RECORD_OVERHEAD + len(payload)
            if part and (len(part) >= self._part_count or size + counts > self._part_size):
                self._add(sender, part, size, row, now, wall)
                part, size = [], 0
            part.append(payload)
            size += counts
        self._add(sender, part, size, row, now, wall)
        return self.last

    def _add(
        self, sender: Sender, payloads: list[bytes], size: int, row: Row, now: Nanos, wall: int
    ) -> None:
        """Add records that count for `size` bytes."""
        count = len(payloads)
        service = sender.service
        if self._count + count > self.records_max or self.size + size > self.size_max:
            self._make_room(count, size, service)
        at = max(int(now), self._latest + 1)
        chunk = Chunk(self.last + 1, at, wall + at - now, sender, row, payloads, size)
        self.total += count
        self._latest = at + count - 1
        self._chunks.append(chunk)
        self._firsts.append(chunk.first)
        self._count += count
        self.size += size
        holding = self._holdings.get(service)
        if holding is None:
            holding = self._holdings[service] = Holding()
        holding.chunks.append(chunk)
        holding.count += count
        holding.size += size
        if holding.count > self._count_share or holding.size > self._size_share:
            self._large.add(service)

    # ------------------------------------------------------------------ reading

    def page(self, since: int, count: int, wanted: Wanted) -> Page:
        """The first records from `since` on that match, as many as asked for and one page takes."""
        return page_of(
            self._from(since, wanted), wanted, count, self.boot, max(since, self.last + 1)
        )

    def entries(self, since: int) -> Iterator[Entry]:
        """What is kept from id `since` on, in order."""
        return self._from(since, None)

    def last_of(self, service: int, pid: int, generation: int, count: int) -> list[Record]:
        """The last records of one instance that are kept, at most `count` and one page."""
        return last_of(self._backwards(service, pid, generation), count, self.boot)

    def _from(self, since: int, wanted: Wanted | None) -> Iterator[Entry]:
        index = max(0, bisect_right(self._firsts, since) - 1)
        for chunk in self._chunks[index:]:
            sender = chunk.sender
            if wanted is None or wanted.is_from(sender.service, sender.pid, sender.generation):
                for number in range(max(chunk.start, since - chunk.first), len(chunk.payloads)):
                    yield chunk.entry(number)

    def _backwards(self, service: int, pid: int, generation: int) -> Iterator[Entry]:
        holding = self._holdings.get(ServiceId(service))
        for chunk in reversed(holding.chunks if holding is not None else ()):
            if (chunk.sender.pid, chunk.sender.generation) == (pid, generation):
                for number in range(len(chunk.payloads) - 1, chunk.start - 1, -1):
                    yield chunk.entry(number)

    # ------------------------------------------------------------------ pushing out

    def _make_room(self, count: int, size: int, service: ServiceId | None) -> None:
        """Push out until `count` records more of `size` bytes fit, which are of `service`."""
        while self._count and (
            self._count + count > self.records_max or self.size + size > self.size_max
        ):
            chunk, most = self._next_out(count, size, service)
            needed = self._count + count - self.records_max
            self._push_out(chunk, max(1, min(most, needed)))

    def _next_out(self, count: int, size: int, service: ServiceId | None) -> tuple[Chunk, int]:
        """Whose oldest record goes first: the oldest of all, or of who holds too much; and how
        many of it may go until that is to be asked again.

        What is about to be added counts for its sender, but for the last record of it.
        """
        if service is not None and count > 1:
            own = self._holdings.get(service)
            if own is not None and (
                own.count + count - 1 > self._count_share
                or own.size + size - size // count > self._size_share
            ):
                return own.chunks[0], own.count + count - 1 - self._count_share
        for large in self._large:
            holding = self._holdings[large]
            if holding.count > self._count_share or holding.size > self._size_share:
                return holding.chunks[0], holding.count - self._count_share
        self._large.clear()
        return self._chunks[0], count

    def _push_out(self, chunk: Chunk, most: int) -> None:
        """The oldest records of a chunk go, at most so many."""
        index = chunk.start
        count, size = len(chunk.payloads) - index, chunk.size
        if count > most:
            gone = chunk.payloads[index : index + most]
            count, size = most, _size_of(gone)
            chunk.payloads[index : index + count] = [b""] * count
        chunk.start = index + count
        chunk.size -= size
        chunk.row.current.overwritten += count
        service = chunk.sender.service
        holding = self._holdings[service]
        self._count -= count
        self.size -= size
        holding.count -= count
        holding.size -= size
        if chunk.start < len(chunk.payloads):
            return
        at = bisect_right(self._firsts, chunk.first) - 1
        del self._chunks[at], self._firsts[at]  # moves 8 bytes for each chunk behind it
        _ = holding.chunks.popleft()
        if not holding.chunks:
            del self._holdings[service]
            self._large.discard(service)


def _size_of(payloads: list[bytes]) -> int:
    """What these records count for."""
    return RECORD_OVERHEAD * len(payloads) + sum(map(len, payloads))


def text_size(text: str) -> int:
    """Bytes of UTF-8."""
    return len(text.encode())


def fields_size(fields: list[Field]) -> int:
    """Bytes that fields count for: of each its key, its value and 2 more (services.md 1.3)."""
    return sum(text_size(field.key) + text_size(field.value) + FIELD_OVERHEAD for field in fields)

"""The journal: a ring of records, bounded by their number and their bytes.

A new record always finds room: the oldest are pushed out for it, first those of a sender that
holds more than SHARE_MAX of the ring. So no sender, a core one included, pushes out all that others
have told; alone it may fill the ring. Ids count from 1, grow, and are never reused; between those
that are kept some may be missing. There is no budget over the life of the journal (services.md W1).

A record counts for RECORD_OVERHEAD and the bytes of UTF-8 it is kept in, that is escaped: scope,
text, and of each field key, value and FIELD_OVERHEAD.
"""

from bisect import bisect_left
from collections import deque
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Final, NamedTuple

from nexus.abi import CONTROL_LINK_SIZE, Nanos, Sender, ServiceId
from nexus.protocols.logd import (
    ESCAPE_GROWTH_MAX,
    FIELDS_MAX,
    FIELDS_SIZE_MAX,
    PAGE_MAX,
    SCOPE_SIZE_MAX,
    TEXT_SIZE_MAX,
    Append,
    Field,
    Query,
    Record,
)
from nexus.services.logd.escape import escaped
from nexus.services.logd.senders import Row
from nexus.wire import HEADER_SIZE, encode

RECORD_OVERHEAD: Final = 64  # bytes a record counts for besides its text (services.md 1.3)
FIELD_OVERHEAD: Final = 2  # bytes of a field besides key and value
RECORD_SIZE_MAX: Final = RECORD_OVERHEAD + ESCAPE_GROWTH_MAX * (
    SCOPE_SIZE_MAX + TEXT_SIZE_MAX + FIELDS_SIZE_MAX
)  # bytes one record may count for; no ring may be smaller
PAGE_HEAD_SIZE: Final = 64  # bytes of a page besides its records: four numbers, two lengths
PAGE_SIZE_MAX: Final = CONTROL_LINK_SIZE - HEADER_SIZE - PAGE_HEAD_SIZE
"""Bytes of the records of one page: its frame fits the smallest link there is."""

SHARE_MAX: Final = Fraction(3, 4)  # of the records or bytes; beyond it a sender's own go first
SCAN_MAX: Final = 4096  # records looked at for one page; about a millisecond

assert Fraction(1, 2) <= SHARE_MAX < 1, "one sender at a time is beyond it"
assert RECORD_SIZE_MAX + 3 * FIELDS_MAX + 3 * PAGE_HEAD_SIZE <= PAGE_SIZE_MAX, "each fits a page"


class Kept(NamedTuple):
    """A record, the row of its sender, and the bytes it counts for."""

    record: Record
    row: Row
    size: int


@dataclass(slots=True)
class Holding:
    """What the journal has of one sender: ids, oldest first, and the bytes they count for."""

    ids: deque[int] = field(default_factory=deque)
    size: int = 0


@dataclass(frozen=True, slots=True)
class Page:
    """Records in the order of ids, and the id to go on with; beyond the last one at the end."""

    records: list[Record]
    next: int


class Journal:
    """Keeps at most `records_max` records of `size_max` bytes together."""

    def __init__(self, records_max: int, size_max: int) -> None:
        assert records_max >= 1
        assert size_max >= RECORD_SIZE_MAX, "every record fits an empty ring"
        self.records_max = records_max
        self.size_max = size_max
        self.size = 0  # bytes of the kept records
        self.total = 0  # records ever added, and the id of the latest
        self._kept: dict[int, Kept] = {}
        self._ids: list[int] = []  # of `_kept`, in order
        self._holdings: dict[ServiceId, Holding] = {}  # of senders with a record
        self._count_share = int(records_max * SHARE_MAX)
        self._size_share = int(size_max * SHARE_MAX)
        self._latest = Nanos(0)  # time of the latest record

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def oldest(self) -> int:
        """The first id that is kept, or the one the next record will have."""
        return self._ids[0] if self._ids else self.total + 1

    @property
    def dropped(self) -> int:
        """Records pushed out by newer ones."""
        return self.total - len(self._kept)

    def append(self, sender: Sender, request: Append, row: Row, now: Nanos) -> int:
        """Add a record of `sender`, which `row` counts; its id. Times strictly increase."""
        fields = [Field(field.key, escaped(field.value)) for field in request.fields]
        scope, text = escaped(request.scope), escaped(request.text)
        size = RECORD_OVERHEAD + text_size(scope) + text_size(text) + fields_size(fields)
        while len(self._kept) >= self.records_max or self.size + size > self.size_max:
            self._push_out()
        self.total += 1
        self._latest = max(now, Nanos(self._latest + 1))
        record = Record(
            self.total,
            self._latest,
            request.level,
            sender.service,
            sender.pid,
            sender.generation,
            scope,
            text,
            fields,
        )
        self._kept[self.total] = Kept(record, row, size)
        self._ids.append(self.total)
        self.size += size
        holding = self._holdings.setdefault(sender.service, Holding())
        holding.ids.append(self.total)
        holding.size += size
        return self.total

    def page(self, query: Query) -> Page:
        """The first records from `since` on that match, as many as the query and one page take.

        The first that does not fit is where the next page begins.
        """
        wanted = Field(query.key, escaped(query.value)) if query.key else None
        found: list[Record] = []
        size = 0
        index = bisect_left(self._ids, query.since)
        end = min(len(self._ids), index + SCAN_MAX)
        while index < end and len(found) < min(query.count, PAGE_MAX):
            record = self._kept[self._ids[index]].record
            if matches(record, query, wanted):
                size += len(encode(record))
                if size > PAGE_SIZE_MAX:
                    break
                found.append(record)
            index += 1
        at_end = index == len(self._ids)
        return Page(found, max(query.since, self.total + 1) if at_end else self._ids[index])

    def _push_out(self) -> None:
        index = self._next_out()
        kept = self._kept.pop(self._ids.pop(index))  # moves 8 bytes for each id behind it
        self.size -= kept.size
        kept.row.current.overwritten += 1
        service = ServiceId(kept.record.service)
        holding = self._holdings[service]
        _ = holding.ids.popleft()
        holding.size -= kept.size
        if not holding.ids:
            del self._holdings[service]

    def _next_out(self) -> int:
        """The index of the id that goes first: the oldest, or that of who holds too much."""
        for holding in self._holdings.values():
            if len(holding.ids) > self._count_share or holding.size > self._size_share:
                return bisect_left(self._ids, holding.ids[0])
        return 0


def matches(record: Record, query: Query, wanted: Field | None) -> bool:
    """Whether a query asks for this record; `wanted` is its field, escaped as records are."""
    return (
        record.level <= query.level
        and query.service in (0, record.service)
        and (wanted is None or wanted in record.fields)
    )


def text_size(text: str) -> int:
    """Bytes of UTF-8."""
    return len(text.encode())


def fields_size(fields: list[Field]) -> int:
    """Bytes that fields count for: of each its key, its value and 2 more (services.md 1.3)."""
    return sum(text_size(field.key) + text_size(field.value) + FIELD_OVERHEAD for field in fields)

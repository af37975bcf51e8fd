"""How kept records are looked at: as they lie, against a filter, and escaped into a page."""

from collections.abc import Iterable
from typing import Final, NamedTuple

from nexus.abi import CONTROL_LINK_SIZE
from nexus.log.payload import Payload, unpack
from nexus.protocols.logd import (
    ESCAPE_GROWTH_MAX,
    FIELDS_MAX,
    FIELDS_SIZE_MAX,
    PAGE_MAX,
    SCOPE_SIZE_MAX,
    TEXT_SIZE_MAX,
    Field,
    Filter,
    Level,
    Record,
)
from nexus.services.logd.escape import escaped
from nexus.wire import HEADER_SIZE, encode

PAGE_HEAD_SIZE: Final = 64  # bytes of a page besides its records: four numbers, two lengths
PAGE_SIZE_MAX: Final = CONTROL_LINK_SIZE - HEADER_SIZE - PAGE_HEAD_SIZE
"""Bytes of the records of one page: its frame fits the smallest link there is."""

SCAN_MAX: Final = 2048  # records looked at for one page; about two milliseconds
RECORD_HEAD_SIZE: Final = 128  # bytes of a record besides scope, text and fields
SHOWN_SIZE_MAX: Final = (
    RECORD_HEAD_SIZE
    + ESCAPE_GROWTH_MAX * (SCOPE_SIZE_MAX + TEXT_SIZE_MAX + FIELDS_SIZE_MAX)
    + 6 * FIELDS_MAX
)

assert SHOWN_SIZE_MAX <= PAGE_SIZE_MAX, "each record fits a page"


class Entry(NamedTuple):
    """A record as it is kept: logd's and the kernel's words about it, and the sender's payload."""

    record: int
    at: int
    wall: int
    service: int
    pid: int
    generation: int
    payload: bytes


class Page(NamedTuple):
    """Records in the order of ids, and the id to go on with."""

    records: list[Record]
    next: int


class Wanted:
    """A filter, ready for many records."""

    def __init__(self, wanted: Filter) -> None:
        self._wanted = wanted
        self._field = Field(wanted.key, wanted.value) if wanted.key else None

    def is_from(self, service: int, pid: int, generation: int) -> bool:
        """Whether records of this sender may be wanted."""
        wanted = self._wanted
        return (
            wanted.service in (0, service)
            and wanted.pid in (0, pid)
            and wanted.generation in (0, generation)
        )

    def fits(self, entry: Entry, payload: Payload) -> bool:
        """Whether this record of a wanted sender is wanted."""
        wanted = self._wanted
        return (
            payload.level <= wanted.level
            and wanted.since <= entry.wall
            and (not wanted.until or entry.wall < wanted.until)
            and (not wanted.trace or payload.trace == wanted.trace)
            and wanted.text in payload.text
            and (self._field is None or self._field in payload.fields)
        )


def shown(entry: Entry, payload: Payload, boot: int) -> Record:
    """A record as it is told: nothing in it moves a cursor or ends a line."""
    return Record(
        record=entry.record,
        boot=boot,
        at=entry.at,
        written=payload.written,
        wall=entry.wall,
        trace=payload.trace,
        span=payload.span,
        level=Level(payload.level),
        service=entry.service,
        pid=entry.pid,
        generation=entry.generation,
        scope=escaped(payload.scope),
        text=escaped(payload.text),
        fields=[Field(field.key, escaped(field.value)) for field in payload.fields],
    )


def page_of(entries: Iterable[Entry], wanted: Wanted, count: int, boot: int, end: int) -> Page:
    """The first wanted records, as many as `count` and one page take.

    `entries` are those of wanted senders, in the order of ids; the first that does not fit is where
    the next page begins, and `end` if they were all looked at.
    """
    found: list[Record] = []
    size = 0
    for looked, entry in enumerate(entries):
        if looked == SCAN_MAX or len(found) == min(count, PAGE_MAX):
            return Page(found, entry.record)
        payload = unpack(entry.payload)
        if not wanted.fits(entry, payload):
            continue
        record = shown(entry, payload, boot)
        size += len(encode(record))
        if size > PAGE_SIZE_MAX:
            return Page(found, entry.record)
        found.append(record)
    return Page(found, end)


def last_of(entries: Iterable[Entry], count: int, boot: int) -> list[Record]:
    """The last `count` of these, which come latest first, in the order of ids; a page at most."""
    found: list[Record] = []
    size = 0
    for entry in entries:
        if len(found) == min(count, PAGE_MAX):
            break
        record = shown(entry, unpack(entry.payload), boot)
        size += len(encode(record))
        if size > PAGE_SIZE_MAX:
            break
        found.append(record)
    found.reverse()
    return found

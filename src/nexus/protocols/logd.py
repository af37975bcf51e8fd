"""logd protocol: open a stream, append a record, read records back, follow them, ask what was lost.

The fast way: a task shares its log ring once (OpenStream) and rings a doorbell (Drain) when there
is something in it; a record is a store into its own memory (nexus.telemetry.ring), and is still
there when the task has died. The message way is Append. The sender of a record is what the kernel
stamped on the request that opened the stream or brought the record; a field that claims an
identity is refused. Nobody reads without the right `log.read`.
"""

from enum import IntEnum
from typing import Annotated, Final, TypeAlias

from nexus.wire import U8, U16, U32, U64, Blob, List, Message, Protocol, Request, Text

SCOPE_SIZE_MAX: Final = 64  # bytes of UTF-8 a record may have (services.md 1.3)
TEXT_SIZE_MAX: Final = 256  # bytes of UTF-8 of the message
FIELDS_SIZE_MAX: Final = 512  # bytes: of each field its key and value and 2 more
RATE_WINDOW_NS: Final = 1_000_000_000
RATE_MAX: Final = 24  # accepted records of one sender inside the window
TRACE_SIZE: Final = 16  # bytes; W3C
SPAN_SIZE: Final = 8  # bytes
LOG_READ: Final = "log.read"  # the right that Query needs

# What a request may carry at all. Larger than what a record may have, so that one just over the
# limit is refused with its own status and not as a broken frame.
SCOPE_WIRE_MAX: Final = 128  # characters
TEXT_WIRE_MAX: Final = 512
KEY_WIRE_MAX: Final = 64
VALUE_WIRE_MAX: Final = 2048  # a record may have FIELDS_SIZE_MAX bytes, escaped 4 times as many
FIELDS_MAX: Final = 16  # fields of one record
KEY_PATTERN: Final = r"^[a-z0-9_.-]+\Z"  # others are INVALID_ARGS (services.md 1.7)
ESCAPE_GROWTH_MAX: Final = 4  # characters that stand for one byte of a control character: \x0a
RING_SIZE_MAX: Final = 256 * 1024  # bytes; a burst of about 2000 lines
STREAMS_MAX: Final = 64  # rings that are drained; one per service
STREAMS_OF_ONE_MAX: Final = 4  # of one service: its log's, and a few more by further loggers
THIS_BOOT: Final = 0xFFFF_FFFF  # Query.boot: this one, whatever its number; less n, the nth before
FOLLOWERS_MAX: Final = 8  # requests that wait for a record
PAGE_MAX: Final = 16  # records of one answer to Query; fewer when they are large
SENDER_ROWS_MAX: Final = 64  # senders counted one by one; the least recently heard one gives way

assert ESCAPE_GROWTH_MAX * FIELDS_SIZE_MAX <= VALUE_WIRE_MAX


class LogdStatus(IntEnum):
    """Why logd refuses. The numbers are wire format and are never reused."""

    INVALID_ARGS = 16  # a field claims an identity, a key has characters that keys have not
    OVER_LIMIT = 17  # scope, message or fields are larger than a record may have
    RATE_LIMITED = 18  # the sender's records of this window are used up


class Level(IntEnum):
    """How much a record matters. The numbers are wire format (services.md 1.2)."""

    ERROR = 0
    WARN = 1
    INFO = 2
    DEBUG = 3
    TRACE = 4


class Field(Message):
    """One fact of a record."""

    key: Annotated[str, Text(size_min=1, size_max=KEY_WIRE_MAX)]
    value: Annotated[str, Text(size_max=VALUE_WIRE_MAX)]


Fields = Annotated[list[Field], List(count_max=FIELDS_MAX)]


class Appended(Message):
    """The record's id, from 1 on and never reused in a boot; and how many were pushed out."""

    record: Annotated[int, U64()]
    dropped: Annotated[int, U64()]


class Append(Request[Appended], op=1, idempotent=False, refuses=LogdStatus):
    """Add a record. *Refuses*: INVALID_ARGS, OVER_LIMIT, RATE_LIMITED, checked in this order;
    the first two use up nothing of the sender's rate."""

    level: Level
    scope: Annotated[str, Text(size_max=SCOPE_WIRE_MAX)]
    text: Annotated[str, Text(size_max=TEXT_WIRE_MAX)]
    fields: Fields


class Record(Message):
    """A record as it is kept: `service`, `pid` and `generation` are the kernel's word about the
    sender. Control characters are shown escaped.

    `record` counts from 1 in a boot, `boot` is the boot's number. `at` is when logd took it in (the
    kernel's clock, ns, strictly increasing); `written` is what the sender says of the same clock,
    0 if nothing; `wall` is `at` in ns since 1970. `trace` and `span` are the sender's, empty if
    it served nobody's call.
    """

    record: Annotated[int, U64()]
    boot: Annotated[int, U32()]
    at: Annotated[int, U64()]
    written: Annotated[int, U64()]
    wall: Annotated[int, U64()]
    trace: Annotated[bytes, Blob(size_max=TRACE_SIZE)]
    span: Annotated[bytes, Blob(size_max=SPAN_SIZE)]
    level: Level
    service: Annotated[int, U64()]
    pid: Annotated[int, U32()]
    generation: Annotated[int, U32()]
    scope: Annotated[str, Text(size_max=ESCAPE_GROWTH_MAX * SCOPE_SIZE_MAX)]
    text: Annotated[str, Text(size_max=ESCAPE_GROWTH_MAX * TEXT_SIZE_MAX)]
    fields: Fields


class Records(Message):
    """A page in the order of ids. `next` is what to ask for then; `oldest` the first id kept,
    `total` the last one given; after a restart of logd ids go on far above those it had given.

    A record that does not fit on the page begins the next one: none is skipped. Ids grow, and some
    between two of them may have been pushed out: who holds most of the journal loses its own first.
    """

    next: Annotated[int, U64()]
    oldest: Annotated[int, U64()]
    total: Annotated[int, U64()]
    dropped: Annotated[int, U64()]
    records: Annotated[list[Record], List(count_max=PAGE_MAX)]


class Filter(Message):
    """Which records: `level` or more important; `service`, `pid` and `generation` unless 0; the
    trace unless empty; with a field `key` = `value` unless `key` is empty; with `text` in its text
    unless that is empty; taken in at `since` (ns since 1970) or later and before `until`, unless 0.
    """

    level: Level
    service: Annotated[int, U64()]
    pid: Annotated[int, U32()]
    generation: Annotated[int, U32()]
    trace: Annotated[bytes, Blob(size_max=TRACE_SIZE)]
    key: Annotated[str, Text(size_max=KEY_WIRE_MAX)]
    value: Annotated[str, Text(size_max=VALUE_WIRE_MAX)]
    text: Annotated[str, Text(size_max=TEXT_WIRE_MAX)]
    since: Annotated[int, U64()]
    until: Annotated[int, U64()]


EVERY_RECORD: Final = Filter(
    level=Level.TRACE,
    service=0,
    pid=0,
    generation=0,
    trace=b"",
    key="",
    value="",
    text="",
    since=0,
    until=0,
)
"""What lets every record through; `msgspec.structs.replace` makes a stricter one of it."""


class Query(Request[Records], op=2, idempotent=True):
    """Records of boot `boot`, or of THIS_BOOT or as many before it, with id >= `since` that match.
    An earlier boot's are what is left of its persisted tail. Needs the right log.read, else DENIED.

    At most `count` records, and at most as many as one message takes.
    """

    boot: Annotated[int, U32()]
    since: Annotated[int, U64()]
    count: Annotated[int, U8(minimum=1, maximum=PAGE_MAX)]
    wanted: Filter


class Follow(Request[Records], op=4, idempotent=True, refuses=LogdStatus):
    """As Query of this boot, but answered when there is a record that matches; with an empty page
    a little before the request's deadline if none came. Needs log.read.

    *Refuses*: OVER_LIMIT (FOLLOWERS_MAX already wait).
    """

    since: Annotated[int, U64()]
    count: Annotated[int, U8(minimum=1, maximum=PAGE_MAX)]
    wanted: Filter


class StreamOpened(Message):
    """logd drains this ring from now on, from position `taken` (bytes) on."""

    taken: Annotated[int, U64()]


class OpenStream(Request[StreamOpened], op=5, idempotent=True, refuses=LogdStatus, moves=True):
    """Drain my ring, the shared VMO that moves along, from now on. It belongs to this link and ends
    with it; an earlier one of the link is drained to its end and let go.

    It counts as a record for the sender's rate. *Refuses*: INVALID_ARGS (no shared VMO, no ring in
    it), OVER_LIMIT (larger than RING_SIZE_MAX, more than STREAMS_MAX, or than STREAMS_OF_ONE_MAX
    of this sender), RATE_LIMITED.
    """

    taken: Annotated[int, U64()]  # what an earlier logd has drained of it: `taken` and `sequence`
    sequence: Annotated[int, U64()]  # of its last Drained; both 0 for a new ring


class Drained(Message):
    """What became of the stream so far, in records: accepted + refused + overwritten = `sequence`,
    which is how many the writer has written up to position `taken`, less the `sequence` that the
    stream was opened with. `refused` were no records of a journal, `overwritten` were not read in
    time."""

    taken: Annotated[int, U64()]
    sequence: Annotated[int, U64()]
    accepted: Annotated[int, U64()]
    refused: Annotated[int, U64()]
    overwritten: Annotated[int, U64()]


class Drain(Request[Drained], op=6, idempotent=True, refuses=LogdStatus):
    """The doorbell: my ring holds something. *Refuses*: INVALID_ARGS (no stream is open)."""


class LastRecords(Request[Records], op=7, idempotent=True):
    """The last `count` records of one task, which may have died: its ring is drained first. Needs
    log.read."""

    service: Annotated[int, U64()]
    pid: Annotated[int, U32()]
    generation: Annotated[int, U32()]
    count: Annotated[int, U8(minimum=1, maximum=PAGE_MAX)]


class SenderRow(Message):
    """One sender: what was accepted, what was refused and why, what of it was pushed out.

    Service 0 collects the rows of senders that gave way.
    """

    service: Annotated[int, U64()]
    accepted: Annotated[int, U64()]
    invalid_args: Annotated[int, U64()]
    over_limit: Annotated[int, U64()]
    rate_limited: Annotated[int, U64()]
    overwritten: Annotated[int, U64()]
    unread: Annotated[int, U64()]  # overwritten in its ring before they were drained
    damaged: Annotated[int, U64()]  # of its ring, that were no records


class Stats(Message):
    """The journal's own account; nobody needs a right for it. Sizes are bytes.

    `dropped` records were pushed out by newer ones; total = used_records + dropped.
    """

    total: Annotated[int, U64()]
    dropped: Annotated[int, U64()]
    capacity_records: Annotated[int, U32()]
    capacity_size: Annotated[int, U32()]
    used_records: Annotated[int, U32()]
    used_size: Annotated[int, U32()]
    invalid_args: Annotated[int, U64()]
    over_limit: Annotated[int, U64()]
    rate_limited: Annotated[int, U64()]
    unread: Annotated[int, U64()]
    damaged: Annotated[int, U64()]
    denied: Annotated[int, U64()]
    streams: Annotated[int, U16()]
    tail_records: Annotated[int, U32()]  # of earlier boots and this one, that are persisted
    tail_size: Annotated[int, U32()]
    tail_written_today: Annotated[int, U64()]  # bytes
    tail_written_max: Annotated[int, U64()]
    tail_refused: Annotated[int, U64()]  # writes left out for the sake of the budget
    tail_lost: Annotated[int, U64()]  # records of earlier boots that could not be read back
    senders: Annotated[int, U16()]
    rows: Annotated[list[SenderRow], List(count_max=SENDER_ROWS_MAX + 1)]


class GetStats(Request[Stats], op=3, idempotent=True):
    """The counters, with a row for each sender."""


LogdRequest: TypeAlias = Append | Query | GetStats | Follow | OpenStream | Drain | LastRecords
PROTOCOL: Final = Protocol(
    "logd",
    number=7,
    version=2,
    requests=(Append, Query, GetStats, Follow, OpenStream, Drain, LastRecords),
)

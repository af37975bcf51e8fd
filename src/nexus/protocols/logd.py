"""logd protocol: append a record, read records back by id, ask what was lost.

The sender of a record is what the kernel stamped on the request; a field that claims an identity
is refused. Nobody reads without the right `log.read`.
"""

from enum import IntEnum
from typing import Annotated, Final, TypeAlias

from nexus.wire import U8, U16, U32, U64, List, Message, Protocol, Request, Text

SCOPE_SIZE_MAX: Final = 64  # bytes of UTF-8 a record may have (services.md 1.3)
TEXT_SIZE_MAX: Final = 256  # bytes of UTF-8 of the message
FIELDS_SIZE_MAX: Final = 512  # bytes: of each field its key and value and 2 more
RATE_WINDOW_NS: Final = 1_000_000_000
RATE_MAX: Final = 24  # accepted records of one sender inside the window
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
    """A record as it is kept: `at` is logd's clock (ns), strictly increasing; `service`, `pid` and
    `generation` are the kernel's word about the sender. Control characters are shown escaped."""

    record: Annotated[int, U64()]
    at: Annotated[int, U64()]
    level: Level
    service: Annotated[int, U64()]
    pid: Annotated[int, U32()]
    generation: Annotated[int, U32()]
    scope: Annotated[str, Text(size_max=ESCAPE_GROWTH_MAX * SCOPE_SIZE_MAX)]
    text: Annotated[str, Text(size_max=ESCAPE_GROWTH_MAX * TEXT_SIZE_MAX)]
    fields: Fields


class Records(Message):
    """A page in the order of ids. `next` is what to ask for then; `oldest` the first id kept.

    A record that does not fit on the page begins the next one: none is skipped. Ids grow, and some
    between two of them may have been pushed out: who holds most of the journal loses its own first.
    """

    next: Annotated[int, U64()]
    oldest: Annotated[int, U64()]
    total: Annotated[int, U64()]
    dropped: Annotated[int, U64()]
    records: Annotated[list[Record], List(count_max=PAGE_MAX)]


class Query(Request[Records], op=2, idempotent=True):
    """Records with id >= `since` that match: `level` or more important, `service` unless 0, and a
    field `key` = `value` unless `key` is empty. Needs the right log.read, else DENIED.

    At most `count` records, and at most as many as one message takes.
    """

    since: Annotated[int, U64()]
    count: Annotated[int, U8(minimum=1, maximum=PAGE_MAX)]
    level: Level
    service: Annotated[int, U64()]
    key: Annotated[str, Text(size_max=KEY_WIRE_MAX)]
    value: Annotated[str, Text(size_max=VALUE_WIRE_MAX)]


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
    denied: Annotated[int, U64()]
    senders: Annotated[int, U16()]
    rows: Annotated[list[SenderRow], List(count_max=SENDER_ROWS_MAX + 1)]


class GetStats(Request[Stats], op=3, idempotent=True):
    """The counters, with a row for each sender."""


LogdRequest: TypeAlias = Append | Query | GetStats
PROTOCOL: Final = Protocol("logd", number=7, version=1, requests=(Append, Query, GetStats))
